"""Random architectures: strategies for networks of convolutions and of attention.

No two layers of a network are alike to the last: where parallel branches of one form are added, nothing but a name
could tell them apart, so that none such is drawn; a concatenation, or attention's query and key, tells them by place.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
from architecture_nodes import (
    Activation,
    Architecture,
    Attention,
    BatchNorm,
    Concat,
    Conv,
    Dense,
    Embedding,
    Flatten,
    GroupNorm,
    Layer,
    LayerNorm,
    Node,
    Nodes,
    Pool,
    Residual,
    every,
)
from hypothesis import strategies as st

FUNCTIONS = ("relu", "gelu", "silu", "tanh")
WIDTHS = (4, 4, 6)  # mostly the same, so that shapes settle little
EPS = (1e-5, 1e-3, 0.1)
_OUTER, _INNER = ("ka", "lo", "mi", "ru", "te", "vo", "zu"), ("dan", "fil", "gor", "hem", "nis", "pul", "sab")
_WORDS = tuple(f"{first}.{second}" for first in _OUTER for second in _INNER)
_HABITS = ("fuses", "pads apart", "last first")


class Pen:
    """Draws nodes with fresh keys; the width is that of what flows at the moment."""

    def __init__(self, draw: Any, width: int, halvings: int = 2) -> None:
        self.draw, self.width, self._halvings, self._keys = draw, width, halvings, count()

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def node(self, kind: type[Node], *settings: Any, **more: Any) -> Node:
        return kind(next(self._keys), *settings, **more)

    def stride(self) -> int:
        """1, or 2 as long as something is left to halve."""
        drawn = self.pick(1, 2) if self._halvings else 1
        self._halvings -= drawn - 1
        return drawn

    def activation(self) -> Node:
        return self.node(Activation, self.pick(*FUNCTIONS))

    def conv(self, units: int, kernel: int = 3, **settings: Any) -> Node:
        settings.setdefault("padding", kernel // 2)
        drawn = self.node(Conv, self.width, units, kernel, bias=self.pick(True, False), **settings)
        self.width = units
        return drawn

    def norm(self) -> Nodes:
        kind = self.pick("none", "batch", "batch", "group")
        if kind == "none":
            return ()
        groups = () if kind == "batch" else (2,)
        return (self.node(BatchNorm if kind == "batch" else GroupNorm, self.width, *groups, self.pick(*EPS)),)

    def dense(self, inputs: int, units: int) -> Node:
        return self.node(Dense, inputs, units, bias=self.pick(True, True, False))


def plain(pen: Pen) -> Nodes:
    kernel, stride = pen.pick(1, 3), pen.stride()
    return (pen.conv(pen.pick(*WIDTHS), kernel, stride=stride), *pen.norm(), pen.activation())


def activated_first(pen: Pen) -> Nodes:
    return (*pen.norm(), pen.activation(), pen.conv(pen.pick(*WIDTHS), pen.pick(1, 3), groups=pen.pick(1, 2)))


def separable(pen: Pen) -> Nodes:
    depthwise = pen.conv(pen.width * pen.pick(1, 2), groups=pen.width, stride=pen.stride())
    return (depthwise, *pen.norm(), pen.activation(), pen.conv(pen.pick(*WIDTHS), 1))


def shared(pen: Pen) -> Nodes:
    # no relu: a kernel whose sum is below 0 silences everything in two turns
    return (pen.conv(pen.width), pen.node(Activation, pen.pick(*FUNCTIONS[1:]))) * 2


def pooled(pen: Pen) -> Nodes:
    return (pen.node(Pool, pen.pick("max", "average")),) if pen.stride() == 2 else plain(pen)


def bottleneck(pen: Pen) -> Nodes:
    """Residual; the stride stands on the first of a pair of convolutions, and the shortcut is one like it."""
    inputs, stride, units = pen.width, pen.stride(), pen.pick(*WIDTHS)
    pair = pen.conv(units, 1, stride=stride), *pen.norm(), pen.activation(), pen.conv(units), *pen.norm()
    pen.width = inputs
    identity = stride == 1 and units == inputs
    shortcut = () if identity else (pen.conv(units, 1, stride=stride), *pen.norm())
    pen.width = units
    return pen.node(Residual, pair, shortcut), pen.activation()


def branching(pen: Pen) -> Nodes:
    """Branches of one form side by side, perhaps with what they take; sometimes as a residual's body."""
    inputs, widths, branches = pen.width, [], []
    for _ in range(pen.pick(2, 3)):
        pen.width = inputs
        branches.append((pen.conv(4, pen.pick(1, 3, 3)), *pen.norm(), pen.activation()))
        widths.append(pen.width)
    dense = pen.pick(True, False)
    pen.width = sum(widths) + inputs * dense
    joined = pen.node(Concat, (*([()] if dense else []), *branches))
    if pen.pick(True, False):
        return (pen.node(Residual, (joined, pen.conv(inputs, 1))),)
    return (joined,)


def attention(pen: Pen) -> Node:
    width = pen.width
    return pen.node(Attention, *(pen.dense(width, width) for _ in range(4)), pen.pick(1, 2))


def feed_forward(pen: Pen) -> Nodes:
    hidden = pen.pick(pen.width, pen.width + 4)
    return pen.dense(pen.width, hidden), pen.activation(), pen.dense(hidden, pen.width)


def layer_norm(pen: Pen) -> Node:
    return pen.node(LayerNorm, pen.width, pen.pick(*EPS))


def transformer(pen: Pen) -> Nodes:
    """Attention and a feed-forward one after the other or side by side, the norm before or after."""
    if pen.pick("turn", "turn", "side") == "side":
        both = pen.node(Residual, (attention(pen),), feed_forward(pen))
        return (pen.node(Residual, (layer_norm(pen), both)),)
    bodies = (attention(pen),), feed_forward(pen)
    if pen.pick(True, False):
        return tuple(pen.node(Residual, (layer_norm(pen), *body)) for body in bodies)
    return tuple(node for body in bodies for node in (pen.node(Residual, body), layer_norm(pen)))


def twice(pen: Pen) -> Nodes:
    return (pen.node(Residual, (layer_norm(pen), *feed_forward(pen))),) * 2


def _written(pen: Pen, nodes: Nodes, shape: tuple[int, ...], tokens: int = 0) -> Architecture:
    keys = tuple({node.key for node in every(nodes) if isinstance(node, Layer)})
    numbers = tuple(f"layer{key}" for key in range(len(keys)))
    names = [pen.draw(st.permutations(pen.pick(_WORDS, numbers)))[: len(keys)] for _ in range(2)]
    habits = pen.draw(st.frozensets(st.sampled_from(_HABITS)))
    return Architecture(nodes, shape, tokens, tuple(pen.draw(st.permutations(keys))), tuple(map(tuple, names)), habits)


@st.composite
def images(draw: Any) -> Architecture:
    """Networks of convolutions."""
    channels = draw(st.sampled_from((3, 4)))
    pen = Pen(draw, channels)
    blocks = (plain, activated_first, separable, shared, pooled, bottleneck, branching)
    size = draw(st.sampled_from(((10, 12), (11, 9), (12, 12))))
    nodes = [*plain(pen)]
    for _ in range(pen.pick(2, 3)):
        nodes += pen.pick(*blocks)(pen)
    flat = pen.pick(True, False)
    nodes.append(pen.node(Flatten) if flat else pen.node(Pool, pen.pick("max", "average"), 0))
    features = pen.width * (int(np.prod(spatial(tuple(nodes), size))) if flat else 1)
    nodes += [pen.dense(features, 5)]
    if pen.pick(True, False):
        nodes += [pen.activation(), pen.dense(5, 5)]
    return _written(pen, tuple(nodes), (channels, *size))


def spatial(nodes: Nodes, size: tuple[int, ...]) -> tuple[int, ...]:
    """The size of the images that the nodes give."""
    for node in nodes:
        if isinstance(node, Conv):
            size = tuple((n + 2 * node.padding - node.kernel) // node.stride + 1 for n in size)
        elif isinstance(node, Pool):
            size = tuple(n // node.window for n in size) if node.window else ()
        elif isinstance(node, Residual):
            size = spatial(node.body, size)
    return size


@st.composite
def sequences(draw: Any) -> Architecture:
    """Networks of attention and feed-forwards."""
    pen, tokens, features = Pen(draw, 8), draw(st.sampled_from((0, 11))), draw(st.sampled_from((8, 5)))
    first = pen.node(Embedding, tokens, 8) if tokens else pen.dense(features, 8)
    nodes = [first, *transformer(pen), *pen.pick(transformer, twice)(pen)]
    nodes += [layer_norm(pen), *([pen.node(Pool, "average", 0)] if pen.pick(True, False) else []), pen.dense(8, 5)]
    return _written(pen, tuple(nodes), (6,) if tokens else (6, features), tokens)


def architectures() -> st.SearchStrategy[Architecture]:
    """Networks for images and for sequences."""
    return images() | sequences()
