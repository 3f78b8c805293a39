"""The largest factor for which a bound holds of what is stored: bisection over the numbers that can be factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def largest_factors(start: Array, grid: Array, width: Array, keeps: Callable[[Array], Array]) -> Array:
    """For each of several factors, the largest one at most 1 for which `keeps` holds.

    Rounding is monotone, so that with a smaller factor nothing that is stored grows: bisection finds it.

    Args:
        start: about what the factors are, float64 in [0, 1].
        grid: True where a factor is a float32 number, False where it may be any float64.
        width: how far off the largest may be, relative; beyond that it is looked for from 0 on.
        keeps: given factors, whether the bound holds with each; it does with 0.

    >>> stored = lambda factor: np.float32(factor * np.float32(3))
    >>> largest_factors(np.array([1 / 3]), np.array([True]), np.array([1e-6]), lambda f: stored(f) <= 1)
    array([0.33333334])
    """
    grid = grid & (start * (1 - width) >= np.finfo(np.float32).tiny)
    low, high = (_to_bits(np.minimum(start * (1 + sign * width), 1.0), grid) for sign in (-1, 1))
    one = _to_bits(np.ones_like(start), grid)
    high = np.minimum(high + 1, one)
    kept = keeps(_to_factors(low, grid))
    low, top = np.where(kept, low, 0), np.where(kept, high, low)
    low = _bisected(low, top, grid, keeps)
    # among subnormal numbers a rounding is far more than `width`: what holds up to the top is looked for up to 1
    held = (low == top - 1) & (top == high) & (top < one)
    if held.any():
        low = _bisected(low, np.where(held, one, low + 1), grid, keeps)
    return _to_factors(low, grid)


def _bisected(low: Array, high: Array, grid: Array, keeps: Callable[[Array], Array]) -> Array:
    """The last bits from `low` on for which the bound holds; it does not for `high`."""
    while (high - low > 1).any():
        middle = (low + high) // 2
        kept = keeps(_to_factors(middle, grid))
        low, high = np.where(kept, middle, low), np.where(kept, high, middle)
    return low


def _to_bits(factors: Array, grid: Array) -> Array:
    """Non-negative numbers as integers of the same order: neighbours are neighbours."""
    return np.where(grid, factors.astype(np.float32).view(np.int32).astype(np.int64), factors.view(np.int64))


def _to_factors(bits: Array, grid: Array) -> Array:
    narrow = np.where(grid, bits, 0).astype(np.int32).view(np.float32)
    return np.where(grid, narrow.astype(np.float64), bits.view(np.float64))
