"""One difference planted in a random architecture: the same layers, of which the other network makes something else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

from architecture_nodes import (
    Activation,
    Architecture,
    BatchNorm,
    Concat,
    Conv,
    Dense,
    Flatten,
    GroupNorm,
    Layer,
    LayerNorm,
    Node,
    Nodes,
    Pool,
    Residual,
    every,
    readers,
    rewritten,
)
from architectures import EPS, FUNCTIONS, architectures, spatial
from hypothesis import assume
from hypothesis import strategies as st


@dataclass(frozen=True)
class Planted:
    """What the other network has instead.

    Attributes:
        what: the kind of difference.
        architecture: with the difference.
        keys: the layers at which it may be named: those that have it, or that take what has it.
        settings: of which one names it.
    """

    what: str
    architecture: Architecture
    keys: frozenset[int]
    settings: frozenset[str]


def swapped(architecture: Architecture) -> Iterator[Planted]:
    """Two layers that follow each other change places; both take what they can."""
    if _flattens(architecture) or _bypassed(architecture):
        return
    for run in runs(architecture.nodes):
        for place, (first, second) in enumerate(pairwise(run)):
            if not (isinstance(first, Conv | Dense) and isinstance(second, BatchNorm | GroupNorm | LayerNorm)):
                continue
            if first.inputs != first.units or [node.key for node in every(architecture.nodes)].count(first.key) > 1:
                continue
            changed = _with_run(architecture, run, (*run[:place], second, first, *run[place + 2 :]))
            after = readers(architecture.nodes, second.key)[0]
            keys = {first.key, second.key, *after}
            yield Planted("swapped order", changed, frozenset(keys), frozenset({"place", "scale before it"}))


def moved_stride(architecture: Architecture) -> Iterator[Planted]:
    """The stride stands on the second convolution of a pair and not on the first, as in ResNet v1.5 and v1."""
    if _flattens(architecture):
        return
    for run in runs(architecture.nodes):
        # what stands between acts on each place alone
        kept = [node for node in run if not isinstance(node, Activation | BatchNorm)]
        keys = [node.key for node in kept]
        for first, second in pairwise(kept):
            if not (isinstance(first, Conv) and isinstance(second, Conv)) or keys.count(second.key) > 1:
                continue
            if first.stride == 2 and second.stride == 1 and first.kernel == 1 < second.kernel:
                changes = {first.key: replace(first, stride=1), second.key: replace(second, stride=2)}
                changed = _replaced(architecture, changes)
                if _fits(architecture, changed):
                    yield Planted("stride", changed, frozenset(changes), frozenset({"stride"}))


def other_padding(architecture: Architecture) -> Iterator[Planted]:
    """TensorFlow's "same", which at a stride pads (0, 1) where the other pads (1, 1), on even sizes."""
    for run, size in _sized(architecture):
        for node in run:
            if isinstance(node, Conv) and node.stride == 2 and node.kernel == 3 and any(n % 2 == 0 for n in size):
                changed = _replaced(architecture, {node.key: replace(node, padding="same")})
                yield Planted("padding", changed, frozenset({node.key}), frozenset({"padding"}))
            size = spatial((node,), size)


def other_function(architecture: Architecture) -> Iterator[Planted]:
    """Another activation function at one place."""
    # of two in a row either would do, and what two poolings in a row make of one, nothing computes
    hidden = {node.key for run in runs(architecture.nodes) for node in _hidden_functions(run)}
    for node in dict.fromkeys(every(architecture.nodes)):
        if not isinstance(node, Activation) or node.key in hidden:
            continue
        after = readers(architecture.nodes, node.key)[0]
        flat = _flattens(architecture) and _last_kernel(architecture) in after
        if flat or (len(after) > 1 and _bypassed(architecture)):
            continue
        for function in FUNCTIONS:
            if function != node.function:
                changed = _replaced(architecture, {node.key: replace(node, function=function)})
                names = {"activation", "activation before it", "input"}
                yield Planted("activation", changed, frozenset(after | _before(architecture, node)), frozenset(names))


def other_eps(architecture: Architecture) -> Iterator[Planted]:
    """Another epsilon, where no scale makes up for it."""
    for node in architecture.layers().values():
        if isinstance(node, GroupNorm | LayerNorm):
            eps = EPS[-1] if node.eps < EPS[-1] else EPS[0]
            changed = _replaced(architecture, {node.key: replace(node, eps=eps)})
            yield Planted("eps", changed, frozenset({node.key}), frozenset({"eps"}))


def _hidden_functions(run: Nodes) -> Iterator[Node]:
    for first, second in pairwise(run):
        if isinstance(first, Activation) and isinstance(second, Activation):
            yield from (first, second)
    for first, *pools in zip(run, run[1:], run[2:], strict=False):
        if isinstance(first, Activation) and all(isinstance(pool, Pool) for pool in pools):
            yield first


def _flattens(architecture: Architecture) -> bool:
    """Whether a feature map is flattened: in which order another one was, none can see."""
    return any(isinstance(node, Flatten) for node in every(architecture.nodes))


def _last_kernel(architecture: Architecture) -> int:
    """The dense layer behind the flattened map."""
    nodes = architecture.nodes
    return next(second.key for first, second in pairwise(nodes) if isinstance(first, Flatten))


def _bypassed(architecture: Architecture) -> bool:
    """Whether a concatenation holds what its branches take: that differing hides which branch of one form is which."""
    return any(isinstance(node, Concat) and () in node.branches for node in every(architecture.nodes))


KINDS = (swapped, moved_stride, other_padding, other_function, other_eps)


@st.composite
def differing(draw: Any) -> tuple[Architecture, Planted]:
    """An architecture, and one with a single difference; of the kinds that it has room for, each is as likely."""
    architecture = draw(architectures())
    # no layer of one network has a name of the other's: where a difference hides what belongs together, none misleads
    numbers = tuple(f"block{number}" for number in range(len(architecture.order)))
    architecture = replace(architecture, names=(architecture.names[0], numbers))
    choices = [planted for planted in (list(kind(architecture)) for kind in KINDS) if planted]
    assume(choices)
    return architecture, draw(st.sampled_from(draw(st.sampled_from(choices))))


def runs(nodes: Nodes) -> Iterator[Nodes]:
    """All sequences of nodes in a tree, the outer before the inner."""
    yield nodes
    for node in nodes:
        if isinstance(node, Residual):
            yield from (*runs(node.body), *runs(node.shortcut))
        elif isinstance(node, Concat):
            for branch in node.branches:
                yield from runs(branch)


def _sized(architecture: Architecture) -> Iterator[tuple[Nodes, tuple[int, ...]]]:
    """The outermost sequence of an image's network, with the size of what it takes."""
    if len(architecture.shape) == 3:
        yield architecture.nodes, architecture.shape[1:]


def _before(architecture: Architecture, activation: Node) -> set[int]:
    """The layers right before an activation, into which it may be fused."""
    found = set()
    for run in runs(architecture.nodes):
        for first, second in pairwise(run):
            if second.key == activation.key and isinstance(first, Layer):
                found.add(first.key)
    return found


def _fits(first: Architecture, second: Architecture) -> bool:
    """Whether both give the same sizes, and every residual's ways in the second too."""
    size = first.shape[1:]
    return spatial(first.nodes, size) == spatial(second.nodes, size)


def _replaced(architecture: Architecture, changes: dict[int, Node]) -> Architecture:
    def change(node: Node) -> Node:
        # a node of a key's own kind: keys are of one node each
        return changes.get(node.key, node)

    return replace(architecture, nodes=rewritten(architecture.nodes, change))


def _with_run(architecture: Architecture, run: Nodes, other: Nodes) -> Architecture:
    def walk(tree: Any) -> Any:
        if tree is run:
            return other
        if isinstance(tree, tuple):
            return tuple(map(walk, tree))
        if isinstance(tree, Node):
            return replace(tree, **{field.name: walk(getattr(tree, field.name)) for field in fields(tree)})
        return tree

    return replace(architecture, nodes=walk(architecture.nodes))
