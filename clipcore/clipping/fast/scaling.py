"""Multiplying units by factors, as NumPy rounds it."""

from __future__ import annotations

from clipcore.clipping.fast.compiler import MULTIPLIED, helper
from clipcore.clipping.fast.memory import AHEAD, VECTOR, multiply, multiply_all, multiply_each, view
from clipcore.clipping.fast.plans import LANES, TASKS, UNITS, WIDTH, cut, is_run, piece, tile
from clipcore.clipping.fast.threads import blockwise, run
from clipcore.clipping.kernels import Array


def scale_units(
    sources: Array, targets: Array, outer: Array, units: Array, inner: Array, dtype: str, factors: Array
) -> None:
    """Write source * factor into each target, which may be its source: one multiply, one rounding to the dtype.

    `factors` is float64, one for each unit of (outer, units, inner) arrays, tensor by tensor; float32 and narrower
    multiply in float32, in which their factors must be representable. A factor of exactly 1 leaves a tensor of one unit
    alone that is its own target.
    """
    run(_scale_block, dtype, cut(outer, units, inner, dtype), sources, targets, MULTIPLIED[dtype], factors)


@blockwise("iimf")
def _scale_block(
    like: Array,
    cuts: Array,
    block: int,
    scratch: Array,
    outer: Array,
    units: Array,
    inner: Array,
    table: Array,
    sources: Array,
    targets: Array,
    multiplied: Array,
    factors: Array,
) -> None:
    """Multiply pieces of runs, or tiles, by the factors of their units."""
    like, row_factors = view(like, 0, 0), view(multiplied, scratch.ctypes.data, WIDTH)
    i = cuts[1, block]
    for task in range(cuts[0, block], cuts[0, block + 1]):
        while task >= table[TASKS, i + 1]:
            i += 1
        index, unit = task - table[TASKS, i], table[UNITS, i]
        if is_run(units[i], inner[i]):
            row, start, count = piece(index, inner[i])
            offset = start * like.itemsize
            _scale_run(like, sources[i] + offset, targets[i] + offset, count, factors[unit + row % units[i]])
        else:
            _, top, rows, left, width = tile(index, outer[i], units[i], inner[i])
            row = units[i] * inner[i]
            offset = (top * row + left * inner[i]) * like.itemsize
            for k in range(width):
                for j in range(k * inner[i], (k + 1) * inner[i]):
                    row_factors[j] = factors[unit + left + k]
            _scale_rows(like, sources[i] + offset, targets[i] + offset, row, rows, width * inner[i], row_factors)


@helper
def _scale_run(like: Array, source: int, target: int, count: int, factor: float) -> None:
    if source == target and factor == 1.0:
        return
    whole = count // VECTOR * VECTOR
    for k in range(0, whole, VECTOR):
        multiply_all(like, source, target, AHEAD, k, factor)
    for k in range(whole, count):
        multiply(like, source, target, k, factor)


@helper
def _scale_rows(like: Array, source: int, target: int, stride: int, rows: int, width: int, factors: Array) -> None:
    """Multiply rows that lie `stride` elements apart by a row of `width` factors, which is overwritten."""
    many = 1
    if stride == width:
        # narrow rows side by side, as one wide row
        while 2 * many * width <= LANES and 2 * many <= rows:
            for k in range(many * width):
                factors[many * width + k] = factors[k]
            many *= 2
    ahead = AHEAD if stride == width else stride * like.itemsize
    for r in range(0, rows, many):
        offset = r * stride * like.itemsize
        count = min(many, rows - r) * width
        whole = count // VECTOR * VECTOR
        for k in range(0, whole, VECTOR):
            multiply_each(like, source + offset, target + offset, ahead, k, factors)
        for k in range(whole, count):
            multiply(like, source + offset, target + offset, k, factors[k])
