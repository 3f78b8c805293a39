"""What a random architecture is: a tree of nodes, plain data that writers turn into models, and walks over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Node:
    """Anything that can be changed; the same key twice is the same node at two places: a shared layer."""

    key: int


class Layer(Node):
    """A node that owns tensors."""


@dataclass(frozen=True)
class Conv(Layer):
    inputs: int
    units: int
    kernel: int = 3
    stride: int = 1
    padding: int | str = 0  # on every side, or TensorFlow's "same"
    groups: int = 1
    bias: bool = True


@dataclass(frozen=True)
class BatchNorm(Layer):
    units: int
    eps: float


@dataclass(frozen=True)
class GroupNorm(Layer):
    units: int
    groups: int
    eps: float


@dataclass(frozen=True)
class LayerNorm(Layer):
    units: int
    eps: float


@dataclass(frozen=True)
class Dense(Layer):
    inputs: int
    units: int
    bias: bool = True


@dataclass(frozen=True)
class Embedding(Layer):
    count: int
    units: int


@dataclass(frozen=True)
class Activation(Node):
    function: str


@dataclass(frozen=True)
class Pool(Node):
    function: str  # "max" or "average"
    window: int = 2  # 0 for all places, which are no axes any more


@dataclass(frozen=True)
class Flatten(Node):
    pass


@dataclass(frozen=True)
class Residual(Node):
    body: Nodes
    shortcut: Nodes = ()


@dataclass(frozen=True)
class Concat(Node):
    branches: tuple[Nodes, ...]


@dataclass(frozen=True)
class Attention(Node):
    query: Dense
    keys: Dense
    value: Dense
    out: Dense
    heads: int


Nodes = tuple[Node, ...]


@dataclass(frozen=True)
class Architecture:
    """What both writers write.

    Attributes:
        nodes: in order of execution.
        shape: of one example, as torch takes it.
        tokens: how many there are, where the model takes tokens.
        order: the keys of the layers, in the order in which torch defines them.
        names: of torch's and of Keras's layers, by their place in `order`.
        habits: of the Keras writer: "fuses" activations, "pads apart" from convolutions, builds the "last first" of
            parallel branches.
    """

    nodes: Nodes
    shape: tuple[int, ...]
    tokens: int
    order: tuple[int, ...]
    names: tuple[tuple[str, ...], tuple[str, ...]]
    habits: frozenset[str]

    def sample(self, seed: int = 0) -> np.ndarray:
        """A few random examples, as torch takes them."""
        rng = np.random.default_rng(seed)
        if self.tokens:
            return rng.integers(0, self.tokens, (3, *self.shape))
        return rng.standard_normal((3, *self.shape)).astype(np.float32)

    def layers(self) -> dict[int, Layer]:
        """The layers that own tensors, by key."""
        return {node.key: node for node in every(self.nodes) if isinstance(node, Layer)}


def every(tree: Any) -> Iterator[Node]:
    """The nodes of a tree, in the order in which they are written."""
    if isinstance(tree, tuple):
        for node in tree:
            yield from every(node)
    elif isinstance(tree, Node):
        yield tree
        for field in fields(tree):
            yield from every(getattr(tree, field.name))


def rewritten(tree: Any, change: Callable[[Node], Node]) -> Any:
    """A tree in which every node is what `change` makes of it."""
    if isinstance(tree, tuple):
        return tuple(rewritten(node, change) for node in tree)
    if not isinstance(tree, Node):
        return tree
    return change(replace(tree, **{field.name: rewritten(getattr(tree, field.name), change) for field in fields(tree)}))


def readers(tree: Any, key: int, given: bool = False) -> tuple[set[int], bool]:
    """The layers that take what the nodes of a key give, with no layer in between, and whether the tree gives it on.

    Args:
        given: whether the tree takes it.
    """
    found: set[int] = set()
    if isinstance(tree, tuple):
        for node in tree:
            more, given = readers(node, key, given)
            found |= more
        return found, given
    if isinstance(tree, Layer):
        return ({tree.key} if given else set()), tree.key == key
    if isinstance(tree, Attention):
        projections = [readers(x, key, given) for x in (tree.query, tree.keys, tree.value)]
        more, given = readers(tree.out, key, any(gives for _, gives in projections))
        return more.union(*(x for x, _ in projections)), given
    if isinstance(tree, Residual | Concat):
        ways = tree.branches if isinstance(tree, Concat) else (tree.body, tree.shortcut)
        parts = [readers(way, key, given) for way in ways]
        return set().union(*(x for x, _ in parts)), any(gives for _, gives in parts) or tree.key == key
    return found, given or tree.key == key
