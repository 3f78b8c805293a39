"""Arrays that share memory: each memory once, and none that would be scaled twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clipcore.clipping.kernels import extent
from clipcore.errors import InvalidInput


def one_per_memory(paths: Sequence[str], arrays: Sequence[np.ndarray]) -> list[int]:
    """The first place of each memory: gradients can be one tensor under several names, or views of it.

    Raises:
        InvalidInput: two of them overlap in part, or one overlaps itself, so that an element would be scaled twice.
    """
    seen: dict[Any, int] = {}
    for index, array in enumerate(arrays):
        if _overlaps_itself(array):
            raise InvalidInput(
                f"grads{paths[index]} has shape {array.shape} and strides of {array.strides} bytes: its elements share "
                f"memory and would be scaled twice; use cc.clip, or pass a copy"
            )
        place = footprint(extent(array)[0], array.shape, array.strides, array.itemsize) if array.size else -index
        seen.setdefault(place, index)
    places = list(seen.values())
    before: list[tuple[int, int]] = []  # (end, place) of all that reach beyond where the next one begins
    for low, high, index in sorted((*extent(arrays[i]), i) for i in places if arrays[i].size):
        before = [(end, other) for end, other in before if end > low]
        for _, other in before:
            if np.shares_memory(arrays[other], arrays[index]):
                raise InvalidInput(
                    f"grads{paths[other]} and grads{paths[index]} overlap in memory: elements would be scaled twice; "
                    f"use cc.clip"
                )
        before.append((high, index))
    return places


def footprint(start: int, shape: Sequence[int], strides: Sequence[int], itemsize: int) -> tuple[Any, ...]:
    """The bytes that elements take, in whatever order: the first one, and (distance, count) per axis.

    Args:
        strides: in bytes.
    """
    axes = [[1, itemsize]]
    for distance, count in sorted((abs(stride), size) for size, stride in zip(shape, strides, strict=True)):
        if distance == axes[-1][0] * axes[-1][1]:
            axes[-1][1] *= count
        elif count > 1:
            axes.append([distance, count])
    return start, *map(tuple, axes)


def _overlaps_itself(array: np.ndarray) -> bool:
    """Whether some of an array's elements share memory, as those of broadcast arrays and sliding windows do."""
    if array.flags.forc:  # the usual case, quick for a thousand small tensors
        return False
    span, nested = array.itemsize, True
    for distance, count in sorted((abs(stride), size) for size, stride in zip(array.shape, array.strides, strict=True)):
        nested = nested and (count <= 1 or distance >= span)
        span += (count - 1) * distance
    if nested or array.size == 0:
        return False
    if array.nbytes > span:
        return True
    places = np.zeros(array.shape, np.int64)  # no axis steps over the others: each element is looked at
    for axis, (size, stride) in enumerate(zip(array.shape, array.strides, strict=True)):
        places += np.expand_dims(np.arange(size) * stride, tuple(range(1, array.ndim - axis)))
    return bool(np.diff(np.sort(places, axis=None)).min() < array.itemsize)
