"""How tensors are cut up: into tasks, which threads take in blocks.

A tensor of shape (outer, units, inner) that has one unit, or long rows, is cut into pieces of its runs, the rows of
`inner` elements; others into tiles, so many rows by so many units.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from clipcore.clipping.fast.compiler import LIKE, compiled, helper, kernel
from clipcore.clipping.kernels import Array

CHUNK = 1 << 14  # elements in a task: few enough for the roundings that meet in one sum to be counted
WIDTH = 1024  # elements of a row that a tile spans, so that their float64 sums stay in the L1 cache
LANES = 128  # sums that run side by side; rows narrower than half of it are joined until they fill it
_SHORT = 256  # units of fewer elements in a row are summed by columns first
_ROWS = 128  # of a tile, at least
_TASK_COST = 512  # what starting a task costs, in elements
_BLOCK_BYTES = 1 << 18  # what a thread takes at a time, at least: about 20 microseconds
_MOST_BLOCKS = 128

TASKS, PARTIALS, UNITS = range(3)  # the rows of a plan's table


class Plan(NamedTuple):
    """How tensors of shape (outer, units, inner) are cut up; each but the last field has one entry per tensor.

    table: int64[3, tensors + 1], the numbers of tasks, partial results and units before each tensor.
    cuts: int64[2, blocks + 1 or more], the task with which each block begins, and its tensor.
    """

    outer: Array
    units: Array
    inner: Array
    table: Array
    cuts: Array
    blocks: int


def cut(outer: Array, units: Array, inner: Array, dtype: str) -> Plan:
    """The plan for tensors of these shapes; one of a single unit is a single row."""
    whole = units == 1
    outer, inner = np.where(whole, 1, outer), np.where(whole, outer * inner, inner)
    table = np.zeros((3, outer.size + 1), np.int64)
    cuts = np.zeros((2, _MOST_BLOCKS + 1), np.int64)
    blocks = compiled(fill)(LIKE[dtype].itemsize, outer, units, inner, table, cuts)
    return Plan(outer, units, inner, table, cuts, blocks)


@helper
def is_run(units: int, inner: int) -> bool:
    """Whether each unit's row of `inner` elements is summed on its own, in pieces; else, tiles of many units are."""
    return units == 1 or inner >= _SHORT


@helper
def _height(units: int, inner: int) -> int:
    """Rows in a tile."""
    return max(_ROWS, CHUNK // (units * inner))


@helper
def _split(outer: int, units: int, inner: int) -> tuple[int, int]:
    """(tasks, partial results) of a tensor."""
    if outer * units * inner == 0:
        return 0, 0
    if is_run(units, inner):
        pieces = outer * units * -(-inner // CHUNK)
        return pieces, pieces
    bands = -(-outer // _height(units, inner))
    return bands * -(-units // (WIDTH // inner)), bands * units


@helper
def piece(task: int, inner: int) -> tuple[int, int, int]:
    """(run, first element in the tensor, elements) of a task that is a piece of a run."""
    pieces = -(-inner // CHUNK)
    run = task // pieces if pieces > 1 else task  # divisions cost more than many a small tensor
    start = (task - run * pieces) * CHUNK
    return run, run * inner + start, min(CHUNK, inner - start)


@helper
def tile(task: int, outer: int, units: int, inner: int) -> tuple[int, int, int, int, int]:
    """(band, first row, rows, first unit, units) of a task that is a tile."""
    across = WIDTH // inner
    columns = -(-units // across)
    band = task // columns
    left = (task - band * columns) * across
    rows = _height(units, inner)
    return band, band * rows, min(rows, outer - band * rows), left, min(across, units - left)


@kernel("biiitt")
def fill(itemsize: int, outer: Array, units: Array, inner: Array, table: Array, cuts: Array) -> int:
    """Fill a plan's table and cuts; blocks take about equally long. Returns their number."""
    size = weight = 0
    for i in range(outer.size):
        tasks, partials = _split(outer[i], units[i], inner[i])
        table[TASKS, i + 1] = table[TASKS, i] + tasks
        table[PARTIALS, i + 1] = table[PARTIALS, i] + partials
        table[UNITS, i + 1] = table[UNITS, i] + units[i]
        size += outer[i] * units[i] * inner[i]
        weight += outer[i] * units[i] * inner[i] + tasks * _TASK_COST
    blocks = max(1, min(cuts.shape[1] - 1, size * itemsize // _BLOCK_BYTES))
    done, block = 0, 1
    for i in range(outer.size):
        tasks = table[TASKS, i + 1] - table[TASKS, i]
        here = outer[i] * units[i] * inner[i] + tasks * _TASK_COST
        while block < blocks and weight * block // blocks < done + here:
            cuts[0, block] = table[TASKS, i] + int(tasks * ((weight * block // blocks - done) / here))
            cuts[1, block] = i
            block += 1
        done += here
    for end in range(block, blocks + 1):
        cuts[0, end] = table[TASKS, outer.size]
        cuts[1, end] = outer.size - 1
    return int(blocks)
