"""Sums of squares per unit, of float64 and in a fixed order."""

from __future__ import annotations

import numpy as np

from clipcore.clipping.fast.compiler import compiled, helper, kernel
from clipcore.clipping.fast.memory import AHEAD, VECTOR, add_four_squares, add_squares, square, view
from clipcore.clipping.fast.plans import CHUNK, LANES, PARTIALS, TASKS, UNITS, WIDTH, cut, is_run, piece, tile
from clipcore.clipping.fast.threads import blockwise, run
from clipcore.clipping.kernels import Array


def unit_sums_of_squares(addresses: Array, outer: Array, units: Array, inner: Array, dtype: str) -> Array:
    """The sum of squares of each unit of (outer, units, inner) arrays: float64[sum(units)], tensor by tensor.

    0 for no elements. For up to 2**30 elements in a unit the relative error is below 2**-46, and below 2**-47 where a
    tensor has but one, unless a float64 square leaves the normal range. For the other dtypes none does: a sum is inf or
    NaN exactly where an element is.
    """
    plan = cut(outer, units, inner, dtype)
    partial = np.empty(plan.table[PARTIALS, -1])
    sums = np.zeros(plan.table[UNITS, -1])
    run(_sum_block, dtype, plan, addresses, partial)
    compiled(_add_up)(plan.outer, plan.units, plan.inner, plan.table, partial, sums)
    return sums


@blockwise("if")
def _sum_block(
    like: Array,
    cuts: Array,
    block: int,
    scratch: Array,
    outer: Array,
    units: Array,
    inner: Array,
    table: Array,
    addresses: Array,
    partial: Array,
) -> None:
    """The sum of squares of each piece of a run, or of each unit in each tile."""
    like, sums = view(like, 0, 0), view(scratch, scratch.ctypes.data, WIDTH)
    i = cuts[1, block]
    for task in range(cuts[0, block], cuts[0, block + 1]):
        while task >= table[TASKS, i + 1]:
            i += 1
        index = task - table[TASKS, i]
        if is_run(units[i], inner[i]):
            _, start, count = piece(index, inner[i])
            _add_columns(like, addresses[i] + start * like.itemsize, 1, count, 1, sums)
            partial[table[PARTIALS, i] + index] = sums[0]
        else:
            band, top, rows, left, width = tile(index, outer[i], units[i], inner[i])
            row = units[i] * inner[i]
            start = top * row + left * inner[i]
            _add_columns(like, addresses[i] + start * like.itemsize, row, rows, width * inner[i], sums)
            _add_units(sums, inner[i], width, partial, table[PARTIALS, i] + band * units[i] + left)


@helper
def _add_columns(like: Array, address: int, stride: int, rows: int, width: int, sums: Array) -> None:
    """Into sums[:width] the sums of squares down the columns of rows that lie `stride` elements apart.

    Roundings that meet in one sum, at most: 4 in four squares, 32 groups of those and 4 single rows (64 groups where
    rows that do not fill `LANES` are joined), 7 halvings.
    """
    many, full = 1, rows
    if stride == width:
        # narrow rows side by side: a power of two of them, that halving puts together again
        while 2 * many * width <= LANES and full >= 2:
            many, full = 2 * many, full // 2
    wide, step = many * width, many * stride * like.itemsize
    for k in range(wide):
        sums[k] = 0.0
    _add_rows(like, address, step, full, wide, sums)
    if full * many < rows:
        _add_rows(like, address + full * step, step, 1, (rows - full * many) * width, sums)
    if wide == LANES and width == 1:
        _fold_lanes(sums)
        return
    while many > 1:
        many //= 2
        for k in range(many * width):
            sums[k] += sums[k + many * width]


@helper
def _fold_lanes(sums: Array) -> None:
    """The same for 128 rows of one element each: distances that the compiler knows, and so can take at once."""
    for k in range(16):
        low = (sums[k] + sums[k + 64]) + (sums[k + 32] + sums[k + 96])
        sums[k] = low + ((sums[k + 16] + sums[k + 80]) + (sums[k + 48] + sums[k + 112]))
    for k in range(4):
        sums[k] = (sums[k] + sums[k + 8]) + (sums[k + 4] + sums[k + 12])
    sums[0] = (sums[0] + sums[2]) + (sums[1] + sums[3])


@helper
def _add_rows(like: Array, address: int, step: int, rows: int, width: int, sums: Array) -> None:
    """Add to sums[:width] the squares of rows that lie `step` bytes apart, of four rows at a time."""
    whole, fours = width // VECTOR * VECTOR, rows // 4 * 4
    ahead = max(4 * step, AHEAD)
    for r in range(0, fours, 4):
        for k in range(0, whole, VECTOR):
            add_four_squares(like, address + r * step, step, ahead, k, sums)
        for k in range(whole, width):
            first = square(like, address + r * step, k) + square(like, address + (r + 1) * step, k)
            second = square(like, address + (r + 2) * step, k) + square(like, address + (r + 3) * step, k)
            sums[k] += first + second
    for r in range(fours, rows):
        for k in range(0, whole, VECTOR):
            add_squares(like, address + r * step, k, sums)
        for k in range(whole, width):
            sums[k] += square(like, address + r * step, k)


@helper
def _add_units(sums: Array, inner: int, count: int, partial: Array, at: int) -> None:
    """Into partial[at : at + count] the sums of `inner` neighbours each."""
    if inner == 1:
        for k in range(count):
            partial[at + k] = sums[k]
        return
    for k in range(count):
        a = b = c = d = 0.0
        base, fours = k * inner, inner // 4 * 4
        for j in range(base, base + fours, 4):
            a += sums[j]
            b += sums[j + 1]
            c += sums[j + 2]
            d += sums[j + 3]
        for j in range(base + fours, base + inner):
            a += sums[j]
        partial[at + k] = (a + b) + (c + d)


@kernel("iiitff")
def _add_up(outer: Array, units: Array, inner: Array, table: Array, partial: Array, out: Array) -> None:
    """The sum for each unit, pairwise over its partial sums, which are overwritten."""
    for i in range(outer.size):
        start, count = table[PARTIALS, i], table[PARTIALS, i + 1] - table[PARTIALS, i]
        pieces = -(-inner[i] // CHUNK) if is_run(units[i], inner[i]) else 1
        if pieces > 1:
            for j in range(count // pieces):
                _halve(partial, start + j * pieces, pieces, 1)
                partial[start + j] = partial[start + j * pieces]
        if count > 0:
            _halve(partial, start, count // (pieces * units[i]), units[i])
            for k in range(units[i]):
                out[table[UNITS, i] + k] = partial[start + k]


@helper
def _halve(values: Array, start: int, rows: int, width: int) -> None:
    """Into values[start : start + width] the sums down `rows` rows, pairwise."""
    while rows > 1:
        half = (rows + 1) // 2
        for k in range(start, start + (rows - half) * width):
            values[k] += values[k + half * width]
        rows = half
