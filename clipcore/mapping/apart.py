"""Linear layers that one model has fused (query, key and value in one; a gate and what it gates) taken apart, where the
other has them one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from clipcore.backend import Bounds, Layer, Tensor, Watcher
from clipcore.mapping.layouts import canonical_shape

Array = np.ndarray[Any, np.dtype[Any]]
Parts = dict[str, tuple[Layer, ...]]  # by the name of the layer that they make up

_COUNTS = (3, 2, 4)  # of parts, the likeliest first


def fused(layers: Sequence[Layer], others: Sequence[Layer]) -> Parts:
    """The layers that none of the other model's can be, but several together: each with its equal parts."""
    shapes = Counter(shape for layer in others if (shape := _shape(layer)))
    found: Parts = {}
    for layer in layers:
        shape = _shape(layer)
        if shape is None or shape in shapes or not _is_plain(layer):
            continue
        out, features = shape
        count = next((n for n in _COUNTS if out % n == 0 and shapes[out // n, features] >= n), None)
        if count:
            found[layer.name] = tuple(_part(layer, number, out // count) for number in range(count))
    return found


def _shape(layer: Layer) -> tuple[int, ...] | None:
    """(out, in) of a linear layer."""
    return canonical_shape(layer, "kernel") if layer.kind == "linear" and "kernel" in layer.tensors else None


def _is_plain(layer: Layer) -> bool:
    """Whether the layer's tensors are stored whole, each canonical axis as one."""
    axes = {"kernel": [["in", "out"]], "bias": [["out"], ["1", "out"]]}
    return all(not t.within and sorted(t.layout.split()) in axes.get(role, []) for role, t in layer.tensors.items())


def _part(layer: Layer, number: int, size: int) -> Layer:
    """One of the equal parts of a layer's outputs."""
    within = number * size, (number + 1) * size
    tensors = {role: _cut(tensor, within) for role, tensor in layer.tensors.items()}
    return replace(layer, name=f"{layer.name}.{number}", tensors=tensors)


def _cut(tensor: Tensor, within: tuple[int, int]) -> Tensor:
    axis = tensor.layout.split().index("out")
    bounds: Bounds = tuple(within if i == axis else (0, size) for i, size in enumerate(tensor.shape))
    shape = tuple(stop - start for start, stop in bounds)
    return replace(tensor, shape=shape, within=bounds, whole=tensor.shape)


@dataclass
class Apart:
    """A watcher's view of a model in which fused layers are their parts: all take one input, and give a part each."""

    watcher: Watcher
    parts: Parts

    def before(self, layer: str, inputs: list[Array]) -> list[Array] | None:
        if layer not in self.parts:
            return self.watcher.before(layer, inputs)
        answers = [self.watcher.before(part.name, inputs) for part in self.parts[layer]]
        return next((answer for answer in answers if answer is not None), None)

    def after(self, layer: str, output: Any) -> Any | None:
        if layer not in self.parts:
            return self.watcher.after(layer, output)
        pieces = np.split(output, len(self.parts[layer]), -1)
        # the last that was opened is the first that is closed
        answers = list(self._answers(layer, pieces))[::-1]
        if all(answer is None for answer in answers):
            return None
        return np.concatenate([piece if new is None else new for piece, new in zip(pieces, answers, strict=True)], -1)

    def _answers(self, layer: str, pieces: Sequence[Array]) -> Iterator[Any | None]:
        for part, piece in zip(reversed(self.parts[layer]), reversed(pieces), strict=True):
            yield self.watcher.after(part.name, piece)
