"""Arrays as memory: looked through or copied by several threads, and lent without a copy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Item = TypeVar("Item")
Result = TypeVar("Result")

_ALIGNMENT = 64  # bytes
_MOST_THREADS = 8  # more do not read memory faster


def each(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """What NumPy computes of each item, in their order, several at a time: it lets other threads run meanwhile."""
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as threads:
        return list(threads.map(function, items))


def is_finite(array: Array) -> bool:
    """Whether no element is NaN or infinite.

    >>> is_finite(np.array([1e200, 1.0])), is_finite(np.array([np.inf, 1.0]))
    (True, False)
    """
    if array.dtype.kind in "biu":
        return True
    if array.dtype.char in "fd":
        flat = array.ravel(order="K")
        with np.errstate(all="ignore"):
            # one pass that stores nothing; where squares overflow, it takes the look at each element
            if np.isfinite(np.dot(flat, flat)):
                return True
    return bool(np.isfinite(array).all())


def copies(arrays: Sequence[Array]) -> list[Array]:
    """Copies of arrays in one piece of memory, which takes less time and less memory than a piece for each."""
    ends = list(accumulate(-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays))
    whole = np.empty(ends[-1] if ends else 0, np.uint8)
    places = [
        whole[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        for start, array in zip([0, *ends], arrays, strict=False)
    ]
    each(lambda pair: np.copyto(*pair), zip(places, arrays, strict=True))
    return places


class _Lent:
    """Tells NumPy of an array's memory as of one that may be written, and keeps the array."""

    def __init__(self, array: Array) -> None:
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}
        self._array = array


def lent(array: Array) -> Array:
    """The same memory as an array that says it may be written: for a framework that only reads, yet takes no other."""
    return array if array.flags.writeable else np.asarray(_Lent(array)).view(array.dtype)
