"""Numba kernels over the memory of many arrays, by address: sums of squares, peaks and scaling at memory speed.

Every call takes whole lists: `addresses` (bytes) and sizes (elements) are int64 arrays with one entry per tensor, each
tensor contiguous and aligned to its dtype; the caller has checked them and keeps the memory alive. `dtype` is
"float16", "bfloat16", "float32" or "float64".

Inside, every tensor is an (outer, units, inner) array, cut into tasks of about `_CHUNK` elements. Tasks are handed to
threads in blocks, but each writes results of its own, which are put together in a fixed order: no result depends on
the number of threads, and sums, added in an order that is spelled out here, not on the processor either.

Nothing here imports Numba before the first call. Each kernel is compiled once for each dtype, and cached on disk where
Numba finds a folder that it can write to.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import math
import os
import threading
import types
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK = 1 << 14  # elements in a task: few enough for the roundings that meet in one sum to be counted
_VECTOR = 16  # elements that an instruction of ours takes at once; LLVM makes of it what the processor has
_LANES = 128  # sums that run side by side; rows narrower than half of it are joined until they fill it
_WIDTH = 1024  # elements of a row that a tile spans, so that their float64 sums stay in the L1 cache
_AHEAD = 1 << 13  # bytes that are fetched ahead of their use
_SHORT = 256  # units of fewer elements in a row are summed by columns first
_TASK_COST = 512  # what starting a task costs, in elements
_ROWS = 128  # of a tile, at least
_BLOCK_BYTES = 1 << 18  # what a thread takes at a time, at least: about 20 microseconds
_BLOCKS_PER_THREAD = 4  # a thread is woken for no fewer
_MOST_BLOCKS = 128
_MOST_THREADS = 8

# A zero-size array tells a kernel its dtype. Numba computes with neither of the two of 16 bits: they are their bits.
_LIKE: dict[str, Array] = {
    "float16": np.empty(0, np.uint16),
    "bfloat16": np.empty(0, np.int16),
    "float32": np.empty(0, np.float32),
    "float64": np.empty(0, np.float64),
}
# the same for the dtype in which it is multiplied
_MULTIPLIED = {name: _LIKE["float64" if name == "float64" else "float32"] for name in _LIKE}


def available() -> bool:
    """Whether the kernels can be used: Numba is installed, works with this NumPy, and compiles.

    The first call imports Numba and compiles the smallest kernel (about half a second), later calls look that up.
    """
    global _works
    if _works is None:
        try:
            _compiled("plan")
            _works = True
        except Exception:
            _works = False
    return _works


def sums_of_squares(addresses: Array, sizes: Array, dtype: str) -> Array:
    """The sum of squares of each tensor: float64, one entry per tensor, 0 for no elements.

    The relative error is below 2**-47 for up to 2**30 elements, unless a float64 square leaves the normal range. For
    the other dtypes none does: a sum is inf or NaN exactly where an element is.
    """
    ones = np.ones(sizes.size, np.int64)
    return _unit_sums(addresses, ones, ones, sizes, dtype)


def unit_sums_of_squares(addresses: Array, outer: Array, units: Array, inner: Array, dtype: str) -> Array:
    """The sum of squares of each unit of (outer, units, inner) arrays: float64[sum(units)], tensor by tensor.

    The relative error is below 2**-46 for up to 2**30 elements in a unit; as `sums_of_squares` otherwise.
    """
    return _unit_sums(addresses, *_joined(outer, units, inner), dtype)


def _unit_sums(addresses: Array, outer: Array, units: Array, inner: Array, dtype: str) -> Array:
    plan = _plan(outer, units, inner, dtype)
    partial = np.empty(plan.table[_PARTIALS, -1])
    sums = np.zeros(plan.table[_UNITS, -1])
    _run("sum_squares", dtype, plan, addresses, partial)
    _compiled("add_up")(outer, units, inner, plan.table, partial, sums)
    return sums


def peaks(addresses: Array, sizes: Array, dtype: str) -> Array:
    """The largest magnitude in each tensor: float64, NaN where an element is NaN, 0 for no elements."""
    ones = np.ones(sizes.size, np.int64)
    plan = _plan(ones, ones, sizes, dtype)
    partial = np.empty(plan.table[_TASKS, -1], np.uint64)
    largest = np.zeros(sizes.size, np.uint64)
    _run("peaks", dtype, plan, addresses, partial)
    _compiled("largest")(plan.table, partial, largest)
    return _from_bits(largest, dtype)


def _from_bits(bits: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        bits, dtype = bits << np.uint64(16), "float32"
    numbers = np.dtype(dtype)
    with np.errstate(invalid="ignore"):  # signalling NaN
        return bits.astype(f"u{numbers.itemsize}").view(numbers).astype(np.float64)


def scale(sources: Array, targets: Array, sizes: Array, dtype: str, factors: Array) -> None:
    """Write source * factor into each target, which may be its source: one multiply, one rounding to the dtype.

    `factors` is float64, one entry per tensor; float32 and narrower multiply in float32, in which their factors must
    be representable. A factor of exactly 1 leaves a tensor alone that is its own target.
    """
    ones = np.ones(sizes.size, np.int64)
    _run("scale", dtype, _plan(ones, ones, sizes, dtype), sources, targets, _MULTIPLIED[dtype], factors)


def scale_units(
    sources: Array, targets: Array, outer: Array, units: Array, inner: Array, dtype: str, factors: Array
) -> None:
    """As `scale`, with one factor for each unit of (outer, units, inner) arrays, tensor by tensor."""
    plan = _plan(*_joined(outer, units, inner), dtype)
    _run("scale", dtype, plan, sources, targets, _MULTIPLIED[dtype], factors)


def _joined(outer: Array, units: Array, inner: Array) -> tuple[Array, Array, Array]:
    """The shapes in which a tensor of one unit is one row."""
    whole = units == 1
    return np.where(whole, 1, outer), units, np.where(whole, outer * inner, inner)


def spike(
    grads: Array, moments: Array, targets: Array, sizes: Array, dtype: str, threshold: float, decay: float, clip: bool
) -> int:
    """Clip the elements of gradients whose squares exceed `threshold` times their second moment; advance the moments.

    `moments` holds the addresses of float32 arrays of the same sizes, which are overwritten:

        g = sign(g) * sqrt(threshold * v)  where  clip and g * g > threshold * v;   v = decay * v + (1 - decay) * g * g

    in float64, target and moment rounded once each. Targets may be the gradients, which are not float64.
    Returns the number of elements that were clipped.
    Source: Huang et al. 2025, SPAM, arXiv:2501.06842.
    """
    ones = np.ones(sizes.size, np.int64)
    plan = _plan(ones, ones, sizes, dtype)
    counts = np.empty(plan.table[_TASKS, -1], np.int64)
    single = _LIKE["float32"]
    _run("spike", dtype, plan, grads, moments, targets, single, float(threshold), float(decay), bool(clip), counts)
    return int(counts.sum())


# Threads: our own, since of Numba's layers one aborts on concurrent callers and another dies in a forked child.

_lock = threading.RLock()
_pool: ThreadPoolExecutor | None = None


def _threads() -> int:
    """How many threads a call may use, the calling one included."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_THREADS)


def _run(name: str, dtype: str, plan: _Plan, *arguments: Any) -> None:
    """Run a kernel over all blocks of a plan: in this thread, and in others if there is enough to do."""
    kernel, like = _compiled(name, dtype), _LIKE[dtype]
    shape = plan.outer, plan.units, plan.inner, plan.table
    blocks = collections.deque(range(plan.blocks))

    def work() -> None:
        scratch = np.empty(_WIDTH)
        while True:
            try:
                block = blocks.popleft()
            except IndexError:
                return
            kernel(like, plan.cuts, block, scratch, *shape, *arguments)

    helpers = _submit(work, min(_threads(), 1 + plan.blocks // _BLOCKS_PER_THREAD) - 1)
    try:
        work()
    finally:
        # also when interrupted: nobody may touch the caller's memory once this has returned
        blocks.clear()
        for helper in helpers:
            if not helper.cancel():
                helper.result()


def _submit(work: Callable[[], None], count: int) -> list[Future[None]]:
    """Start `work` in up to `count` other threads; in fewer, or none, where the interpreter grants no more."""
    global _pool
    helpers: list[Future[None]] = []
    if count:
        with _lock:
            pool = _pool = _pool or ThreadPoolExecutor(_MOST_THREADS - 1, "clipcore")
        with contextlib.suppress(RuntimeError):  # the interpreter is shutting down, or out of threads
            for _ in range(count):
                helpers.append(pool.submit(work))
    return helpers


def _in_forked_child() -> None:
    global _pool
    _pool = None  # its threads stayed behind
    _lock.release()


if hasattr(os, "register_at_fork"):
    # A fork waits for a compilation to end: the child would find Numba's lock taken for ever.
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_in_forked_child)


# Plans

_TASKS, _PARTIALS, _UNITS = range(3)  # the rows of a plan's table


class _Plan(NamedTuple):
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


def _plan(outer: Array, units: Array, inner: Array, dtype: str) -> _Plan:
    table = np.zeros((3, outer.size + 1), np.int64)
    cuts = np.zeros((2, _MOST_BLOCKS + 1), np.int64)
    blocks = _compiled("plan")(_LIKE[dtype].itemsize, outer, units, inner, table, cuts)
    return _Plan(outer, units, inner, table, cuts, blocks)


# From here on to the compiler, everything is compiled by Numba: kernels, and what they call.


def _is_run(units: int, inner: int) -> bool:
    """Whether each unit's row of `inner` elements is summed on its own, in pieces; else, tiles of many units are."""
    return units == 1 or inner >= _SHORT


def _height(units: int, inner: int) -> int:
    """Rows in a tile."""
    return max(_ROWS, _CHUNK // (units * inner))


def _split(outer: int, units: int, inner: int) -> tuple[int, int]:
    """(tasks, partial results) of a tensor."""
    if outer * units * inner == 0:
        return 0, 0
    if _is_run(units, inner):
        pieces = outer * units * -(-inner // _CHUNK)
        return pieces, pieces
    bands = -(-outer // _height(units, inner))
    return bands * -(-units // (_WIDTH // inner)), bands * units


def _piece(task: int, inner: int) -> tuple[int, int, int]:
    """(run, first element in the tensor, elements) of a task that is a piece of a run."""
    pieces = -(-inner // _CHUNK)
    run = task // pieces if pieces > 1 else task  # divisions cost more than many a small tensor
    start = (task - run * pieces) * _CHUNK
    return run, run * inner + start, min(_CHUNK, inner - start)


def _tile(task: int, outer: int, units: int, inner: int) -> tuple[int, int, int, int, int]:
    """(band, first row, rows, first unit, units) of a task that is a tile."""
    across = _WIDTH // inner
    columns = -(-units // across)
    band = task // columns
    left = (task - band * columns) * across
    height = _height(units, inner)
    return band, band * height, min(height, outer - band * height), left, min(across, units - left)


def _plan_kernel(itemsize: int, outer: Array, units: Array, inner: Array, table: Array, cuts: Array) -> int:
    """Fill a plan's table and cuts; blocks take about equally long. Returns their number."""
    size = weight = 0
    for i in range(outer.size):
        tasks, partials = _split(outer[i], units[i], inner[i])
        table[_TASKS, i + 1] = table[_TASKS, i] + tasks
        table[_PARTIALS, i + 1] = table[_PARTIALS, i] + partials
        table[_UNITS, i + 1] = table[_UNITS, i] + units[i]
        size += outer[i] * units[i] * inner[i]
        weight += outer[i] * units[i] * inner[i] + tasks * _TASK_COST
    blocks = max(1, min(cuts.shape[1] - 1, size * itemsize // _BLOCK_BYTES))
    done, block = 0, 1
    for i in range(outer.size):
        tasks = table[_TASKS, i + 1] - table[_TASKS, i]
        here = outer[i] * units[i] * inner[i] + tasks * _TASK_COST
        while block < blocks and weight * block // blocks < done + here:
            cuts[0, block] = table[_TASKS, i] + int(tasks * ((weight * block // blocks - done) / here))
            cuts[1, block] = i
            block += 1
        done += here
    for end in range(block, blocks + 1):
        cuts[0, end] = table[_TASKS, outer.size]
        cuts[1, end] = outer.size - 1
    return int(blocks)


def _sum_squares_kernel(
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
    like, sums = _view(like, 0, 0), _view(scratch, scratch.ctypes.data, _WIDTH)
    i = cuts[1, block]
    for task in range(cuts[0, block], cuts[0, block + 1]):
        while task >= table[_TASKS, i + 1]:
            i += 1
        index = task - table[_TASKS, i]
        if _is_run(units[i], inner[i]):
            _, start, count = _piece(index, inner[i])
            _add_columns(like, addresses[i] + start * like.itemsize, 1, count, 1, sums)
            partial[table[_PARTIALS, i] + index] = sums[0]
        else:
            band, top, rows, left, width = _tile(index, outer[i], units[i], inner[i])
            row = units[i] * inner[i]
            start = top * row + left * inner[i]
            _add_columns(like, addresses[i] + start * like.itemsize, row, rows, width * inner[i], sums)
            _add_units(sums, inner[i], width, partial, table[_PARTIALS, i] + band * units[i] + left)


def _add_columns(like: Array, address: int, stride: int, rows: int, width: int, sums: Array) -> None:
    """Into sums[:width] the sums of squares down the columns of rows that lie `stride` elements apart.

    Roundings that meet in one sum, at most: 4 in four squares, 32 groups of those and 4 single rows (64 groups where
    rows that do not fill `_LANES` are joined), 7 halvings.
    """
    many, full = 1, rows
    if stride == width:
        # narrow rows side by side: a power of two of them, that halving puts together again
        while 2 * many * width <= _LANES and full >= 2:
            many, full = 2 * many, full // 2
    wide, step = many * width, many * stride * like.itemsize
    for k in range(wide):
        sums[k] = 0.0
    _add_rows(like, address, step, full, wide, sums)
    if full * many < rows:
        _add_rows(like, address + full * step, step, 1, (rows - full * many) * width, sums)
    if wide == _LANES and width == 1:
        _fold_lanes(sums)
        return
    while many > 1:
        many //= 2
        for k in range(many * width):
            sums[k] += sums[k + many * width]


def _fold_lanes(sums: Array) -> None:
    """The same for 128 rows of one element each: distances that the compiler knows, and so can take at once."""
    for k in range(16):
        low = (sums[k] + sums[k + 64]) + (sums[k + 32] + sums[k + 96])
        sums[k] = low + ((sums[k + 16] + sums[k + 80]) + (sums[k + 48] + sums[k + 112]))
    for k in range(4):
        sums[k] = (sums[k] + sums[k + 8]) + (sums[k + 4] + sums[k + 12])
    sums[0] = (sums[0] + sums[2]) + (sums[1] + sums[3])


def _add_rows(like: Array, address: int, step: int, rows: int, width: int, sums: Array) -> None:
    """Add to sums[:width] the squares of rows that lie `step` bytes apart, of four rows at a time."""
    whole, fours = width // _VECTOR * _VECTOR, rows // 4 * 4
    ahead = max(4 * step, _AHEAD)
    for r in range(0, fours, 4):
        for k in range(0, whole, _VECTOR):
            _add_four_squares(like, address + r * step, step, ahead, k, sums)
        for k in range(whole, width):
            first = _square(like, address + r * step, k) + _square(like, address + (r + 1) * step, k)
            second = _square(like, address + (r + 2) * step, k) + _square(like, address + (r + 3) * step, k)
            sums[k] += first + second
    for r in range(fours, rows):
        for k in range(0, whole, _VECTOR):
            _add_squares(like, address + r * step, k, sums)
        for k in range(whole, width):
            sums[k] += _square(like, address + r * step, k)


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


def _add_up_kernel(outer: Array, units: Array, inner: Array, table: Array, partial: Array, out: Array) -> None:
    """The sum for each unit, pairwise over its partial sums, which are overwritten."""
    for i in range(outer.size):
        start, count = table[_PARTIALS, i], table[_PARTIALS, i + 1] - table[_PARTIALS, i]
        pieces = -(-inner[i] // _CHUNK) if _is_run(units[i], inner[i]) else 1
        if pieces > 1:
            for j in range(count // pieces):
                _halve(partial, start + j * pieces, pieces, 1)
                partial[start + j] = partial[start + j * pieces]
        if count > 0:
            _halve(partial, start, count // (pieces * units[i]), units[i])
            for k in range(units[i]):
                out[table[_UNITS, i] + k] = partial[start + k]


def _halve(values: Array, start: int, rows: int, width: int) -> None:
    """Into values[start : start + width] the sums down `rows` rows, pairwise."""
    while rows > 1:
        half = (rows + 1) // 2
        for k in range(start, start + (rows - half) * width):
            values[k] += values[k + half * width]
        rows = half


def _peaks_kernel(
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
    """The largest magnitude of each piece, as bits: of numbers without a sign they are ordered alike, NaN above all."""
    i = cuts[1, block]
    for task in range(cuts[0, block], cuts[0, block + 1]):
        while task >= table[_TASKS, i + 1]:
            i += 1
        _, start, count = _piece(task - table[_TASKS, i], inner[i])
        address = addresses[i] + start * like.itemsize
        best = _magnitude(like, address, 0)
        for k in range(count):
            bits = _magnitude(like, address, k)
            best = bits if bits > best else best
        partial[task] = best


def _largest_kernel(table: Array, partial: Array, out: Array) -> None:
    """The largest partial result of each tensor."""
    for i in range(out.size):
        for task in range(table[_TASKS, i], table[_TASKS, i + 1]):
            out[i] = max(out[i], partial[task])


def _scale_kernel(
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
    like, row_factors = _view(like, 0, 0), _view(multiplied, scratch.ctypes.data, _WIDTH)
    i = cuts[1, block]
    for task in range(cuts[0, block], cuts[0, block + 1]):
        while task >= table[_TASKS, i + 1]:
            i += 1
        index, unit = task - table[_TASKS, i], table[_UNITS, i]
        if _is_run(units[i], inner[i]):
            run, start, count = _piece(index, inner[i])
            offset = start * like.itemsize
            _scale_run(like, sources[i] + offset, targets[i] + offset, count, factors[unit + run % units[i]])
        else:
            _, top, rows, left, width = _tile(index, outer[i], units[i], inner[i])
            row = units[i] * inner[i]
            offset = (top * row + left * inner[i]) * like.itemsize
            for k in range(width):
                for j in range(k * inner[i], (k + 1) * inner[i]):
                    row_factors[j] = factors[unit + left + k]
            _scale_rows(like, sources[i] + offset, targets[i] + offset, row, rows, width * inner[i], row_factors)


def _scale_run(like: Array, source: int, target: int, count: int, factor: float) -> None:
    if source == target and factor == 1.0:
        return
    whole = count // _VECTOR * _VECTOR
    for k in range(0, whole, _VECTOR):
        _multiply_all(like, source, target, _AHEAD, k, factor)
    for k in range(whole, count):
        _multiply(like, source, target, k, factor)


def _scale_rows(like: Array, source: int, target: int, stride: int, rows: int, width: int, factors: Array) -> None:
    """Multiply rows that lie `stride` elements apart by a row of `width` factors, which is overwritten."""
    many = 1
    if stride == width:
        # narrow rows side by side, as one wide row
        while 2 * many * width <= _LANES and 2 * many <= rows:
            for k in range(many * width):
                factors[many * width + k] = factors[k]
            many *= 2
    ahead = _AHEAD if stride == width else stride * like.itemsize
    for r in range(0, rows, many):
        offset = r * stride * like.itemsize
        count = min(many, rows - r) * width
        whole = count // _VECTOR * _VECTOR
        for k in range(0, whole, _VECTOR):
            _multiply_each(like, source + offset, target + offset, ahead, k, factors)
        for k in range(whole, count):
            _multiply(like, source + offset, target + offset, k, factors[k])


def _spike_kernel(
    like: Array,
    cuts: Array,
    block: int,
    scratch: Array,
    outer: Array,
    units: Array,
    inner: Array,
    table: Array,
    grads: Array,
    moments: Array,
    targets: Array,
    single: Array,
    threshold: float,
    decay: float,
    clip: bool,
    counts: Array,
) -> None:
    """Clip pieces of gradients and advance their moments; counts what each piece had to clip."""
    like, single = _view(like, 0, 0), _view(single, 0, 0)
    i = cuts[1, block]
    for task in range(cuts[0, block], cuts[0, block + 1]):
        while task >= table[_TASKS, i + 1]:
            i += 1
        _, start, count = _piece(task - table[_TASKS, i], inner[i])
        grad, target = grads[i] + start * like.itemsize, targets[i] + start * like.itemsize
        moment = moments[i] + start * single.itemsize
        clipped = 0
        # two loops: a compiler that knew of two addresses would have to expect that they overlap
        if grad != target:
            for k in range(count):
                clipped += _spike(like, single, grad, moment, target, k, threshold, decay, clip)
        else:
            for k in range(count):
                clipped += _spike(like, single, target, moment, target, k, threshold, decay, clip)
        counts[task] = clipped


def _spike(
    like: Array, single: Array, grad: int, moment: int, target: int, k: int, threshold: float, decay: float, clip: bool
) -> int:
    """One element of `spike`; 1 where it was clipped."""
    g, v = _load(like, grad, k), _load(single, moment, k)
    limit = threshold * v
    over = clip and g * g > limit
    root = math.sqrt(limit)
    g = (root if g > 0 else -root) if over else g
    _store(like, target, k, g)
    _store(single, moment, k, decay * v + (1 - decay) * g * g)
    return 1 if over else 0


def _square(like: Array, address: int, index: int) -> float:
    x = _load(like, address, index)
    return x * x


# What touches memory: the element at an index, or `_VECTOR` of them from there on. `_teach` tells Numba how.


def _view(like: Array, address: int, count: int) -> Array:
    """The array of `count` elements at an address.

    Nobody owns it, so that passing it on counts no references: counting them takes longer than a small tensor.
    """
    raise NotImplementedError


def _load(like: Array, address: int, index: int) -> float:
    """An element as float64."""
    raise NotImplementedError


def _store(like: Array, address: int, index: int, value: float) -> None:
    """Write an element, rounded once from float64."""
    raise NotImplementedError


def _magnitude(like: Array, address: int, index: int) -> int:
    """The bits of an element without its sign."""
    raise NotImplementedError


def _multiply(like: Array, source: int, target: int, index: int, factor: float) -> None:
    """Write source * factor: factor and product in float32, of float64 in float64, then rounded to the dtype."""
    raise NotImplementedError


def _multiply_all(like: Array, source: int, target: int, ahead: int, index: int, factor: float) -> None:
    """As `_multiply`, a vector by one factor; fetches what lies `ahead` bytes further."""
    raise NotImplementedError


def _multiply_each(like: Array, source: int, target: int, ahead: int, index: int, factors: Array) -> None:
    """As `_multiply`, a vector by the vector of factors at the same index; fetches what lies `ahead` bytes further."""
    raise NotImplementedError


def _add_squares(like: Array, address: int, index: int, sums: Array) -> None:
    """Add a vector's squares to the vector of sums at the same index."""
    raise NotImplementedError


def _add_four_squares(like: Array, address: int, step: int, ahead: int, index: int, sums: Array) -> None:
    """Add to the sums at the same index the squares of four vectors that lie `step` bytes apart.

    Fetches what lies `ahead` bytes further into the cache: the processor does not foresee rows (a quarter slower).
    """
    raise NotImplementedError


# The compiler

_CUTTING = (_is_run, _height, _split, _piece, _tile)
_HELPERS = (
    *_CUTTING,
    _add_columns,
    _add_rows,
    _fold_lanes,
    _add_units,
    _halve,
    _scale_run,
    _scale_rows,
    _spike,
    _square,
)
# The types of the kernels' arguments, a letter each: l(ike), s(ingle), m(ultiplied), b(lock or another integer),
# i(ntegers), t(able), f(loats), u(nsigned integers), d(ouble), c(ondition).
_BLOCKWISE = "ltbfiiit"
_KERNELS: dict[str, tuple[Callable[..., Any], str]] = {
    "plan": (_plan_kernel, "biiitt"),
    "sum_squares": (_sum_squares_kernel, _BLOCKWISE + "if"),
    "add_up": (_add_up_kernel, "iiitff"),
    "peaks": (_peaks_kernel, _BLOCKWISE + "iu"),
    "largest": (_largest_kernel, "tuu"),
    "scale": (_scale_kernel, _BLOCKWISE + "iimf"),
    "spike": (_spike_kernel, _BLOCKWISE + "iiisddci"),
}
_MEMORY: dict[Callable[..., Any], tuple[str, int]] = {
    _view: ("view", 1),
    _load: ("load", 1),
    _store: ("store", 1),
    _magnitude: ("magnitude", 1),
    _multiply: ("multiply", 1),
    _multiply_all: ("multiply_all", _VECTOR),
    _multiply_each: ("multiply_each", _VECTOR),
    _add_squares: ("add_squares", _VECTOR),
    _add_four_squares: ("add_four_squares", _VECTOR),
}
_ready: dict[tuple[str, str], Callable[..., Any]] = {}
_taught = False
_works: bool | None = None


def _compiled(name: str, dtype: str = "float64") -> Callable[..., Any]:
    """The kernel for a dtype (of some, every dtype's), compiled on first use."""
    kernel = _ready.get((name, dtype))
    if kernel is None:
        with _lock:
            kernel = _ready.get((name, dtype)) or _ready.setdefault((name, dtype), _compile(name, dtype))
    return kernel


def _compile(name: str, dtype: str) -> Callable[..., Any]:
    import numba

    global _taught
    if not _taught:
        _check_compiler()
        _teach()
        _taught = True
    function, letters = _KERNELS[name]
    # A name of its own for each dtype: two processes that add to one cache file at a time can mix up their entries.
    own = types.FunctionType(function.__code__, globals(), f"{function.__name__}_{dtype}")
    own.__qualname__ = own.__name__
    own.__module__ = __name__
    signature = _signature(letters, dtype)
    compiled: Callable[..., Any]
    try:
        compiled = numba.njit(signature, nogil=True, cache=True)(own)
    except Exception:  # no folder to write to, or a damaged file in it
        compiled = numba.njit(signature, nogil=True)(own)
    return compiled


def _check_compiler() -> None:
    import numba
    from numba.core.registry import cpu_target

    if numba.config.DISABLE_JIT:
        raise RuntimeError("NUMBA_DISABLE_JIT is set, and these kernels work only when compiled: unset it")
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    if triple.startswith(("x86", "i686")) and "+f16c" not in features:
        # LLVM would call a function for each float16, does not find it, and ends the process
        raise RuntimeError(f"Numba compiles for a processor without F16C ({features or 'NUMBA_CPU_FEATURES is empty'})")


def _signature(letters: str, dtype: str) -> tuple[Any, ...]:
    import numba

    argument = {
        "l": numba.typeof(_LIKE[dtype]),
        "s": numba.typeof(_LIKE["float32"]),
        "m": numba.typeof(_MULTIPLIED[dtype]),
        "b": numba.int64,
        "i": numba.int64[::1],
        "t": numba.int64[:, ::1],
        "f": numba.float64[::1],
        "u": numba.uint64[::1],
        "d": numba.float64,
        "c": numba.boolean,
    }
    return tuple(argument[letter] for letter in letters)


def _teach() -> None:
    """Let Numba compile what the kernels call: the helpers as they are, what touches memory in LLVM's terms."""
    from numba import types as nb
    from numba.extending import lower_builtin, register_jitable, type_callable

    for helper in _HELPERS:
        register_jitable(helper)

    def teach(function: Callable[..., Any], method: str, lanes: int) -> None:
        def result(like: Any, *_: Any) -> Any:
            bits = getattr(nb, f"uint{like.dtype.bitwidth}")
            return {"view": like, "load": nb.float64, "magnitude": bits}.get(method, nb.none)

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            like, *kinds = signature.args
            # of an array, the address of its elements
            values = [
                context.make_array(kind)(context, builder, value).data if isinstance(kind, nb.Array) else value
                for kind, value in zip(kinds, arguments[1:], strict=True)
            ]
            elements = _Elements(builder, like.dtype.name, lanes)
            if method == "view":
                return elements.view(context.make_array(like)(context, builder), *values)
            value = getattr(elements, method)(*values)
            return context.get_dummy_value() if value is None else value

        result.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        type_callable(function)(lambda context: result)
        lower_builtin(function, nb.VarArg(nb.Any))(emit)

    for function, (method, lanes) in _MEMORY.items():
        teach(function, method, lanes)


class _Elements:
    """LLVM instructions for `lanes` neighbours in an array like one of `_LIKE`, which `name` is the dtype of."""

    def __init__(self, builder: Any, name: str, lanes: int) -> None:
        from llvmlite import ir

        self._builder, self._lanes, self._ir = builder, lanes, ir
        self._half, self._bfloat = name == "uint16", name == "int16"
        self._float, self._double, self._word = map(self._wide, (ir.FloatType(), ir.DoubleType(), ir.IntType(32)))
        self._bits = {"float32": 32, "float64": 64}.get(name, 16)
        self._stored = {"float32": ir.FloatType(), "float64": ir.DoubleType()}.get(name, ir.IntType(16))
        # Where a square is exact in float64, an instruction that multiplies and adds at once changes no bit.
        self._flags = () if name == "float64" else ("contract",)

    def view(self, array: Any, address: Any, count: Any) -> Any:
        from numba.np.arrayobj import populate_array

        data = self._builder.inttoptr(address, self._stored.as_pointer())
        size = address.type(self._bits // 8)
        populate_array(array, data=data, shape=[count], strides=[size], itemsize=size, meminfo=None)
        return array._getvalue()

    def load(self, address: Any, index: Any) -> Any:
        return self._to_double(self._load(address, index))

    def store(self, address: Any, index: Any, value: Any) -> None:
        self._store(address, index, value)

    def magnitude(self, address: Any, index: Any) -> Any:
        bits = self._builder.load(self._pointer(address, index, self._ir.IntType(self._bits)))
        return self._builder.and_(bits, self._constant(bits.type, (1 << (self._bits - 1)) - 1))

    def multiply(self, source: Any, target: Any, index: Any, factor: Any) -> None:
        value = self._load(source, index)
        if value.type != factor.type:
            factor = self._builder.fptrunc(factor, self._float)
        self._store(target, index, self._builder.fmul(value, factor))

    def multiply_all(self, source: Any, target: Any, ahead: Any, index: Any, factor: Any) -> None:
        self._prefetch(source, ahead, index)
        vector = self._builder.insert_element(
            self._ir.Constant(self._wide(factor.type), self._ir.Undefined), factor, self._int(0)
        )
        lanes = self._ir.Constant(self._word, [0] * self._lanes)
        self.multiply(source, target, index, self._builder.shuffle_vector(vector, vector, lanes))

    def multiply_each(self, source: Any, target: Any, ahead: Any, index: Any, factors: Any) -> None:
        self._prefetch(source, ahead, index)
        vector = self._builder.load(self._lanes_at(factors, index), align=4)
        self.multiply(source, target, index, vector)

    def add_squares(self, address: Any, index: Any, sums: Any) -> None:
        self._add(self._squares(address, index), index, sums)

    def add_four_squares(self, address: Any, step: Any, ahead: Any, index: Any, sums: Any) -> None:
        self._prefetch(address, ahead, index)
        total = self._squares(address, index)
        for _ in range(3):
            address = self._builder.add(address, step)
            self._prefetch(address, ahead, index)
            total = self._builder.fadd(self._squares(address, index), total, flags=self._flags)
        self._add(total, index, sums)

    def _prefetch(self, address: Any, ahead: Any, index: Any) -> None:
        byte, word = self._ir.IntType(8).as_pointer(), self._ir.IntType(32)
        kind = self._ir.FunctionType(self._ir.VoidType(), [byte, word, word, word])
        prefetch = self._builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        start = self._pointer(self._builder.add(address, ahead), index, self._stored)
        reading, keep, data = word(0), word(3), word(1)
        self._builder.call(prefetch, [self._builder.bitcast(start, byte), reading, keep, data])

    def _add(self, squares: Any, index: Any, sums: Any) -> None:
        at = self._lanes_at(sums, index)
        total = self._builder.fadd(squares, self._builder.load(at, align=8), flags=self._flags)
        self._builder.store(total, at, align=8)

    def _squares(self, address: Any, index: Any) -> Any:
        value = self._load(address, index)
        if self._half:
            # exact in float32 as well, with half as many numbers to convert
            return self._to_double(self._builder.fmul(value, value))
        value = self._to_double(value)
        return self._builder.fmul(value, value, flags=self._flags)

    def _load(self, address: Any, index: Any) -> Any:
        """As float, or of float64 as double."""
        builder = self._builder
        value = builder.load(self._pointer(address, index, self._stored), align=self._bits // 8)
        if self._half:
            return builder.fpext(builder.bitcast(value, self._wide(self._ir.HalfType())), self._float)
        if self._bfloat:
            word = builder.shl(builder.zext(value, self._word), self._constant(self._word, 16))
            return builder.bitcast(word, self._float)
        return value

    def _store(self, address: Any, index: Any, value: Any) -> None:
        """From float or double, rounded once, to nearest even."""
        builder, narrow = self._builder, self._half or self._bfloat
        if narrow:
            value = self._to_odd(value) if value.type == self._double else value
            value = self._to_half(value) if self._half else self._to_bfloat(value)
        elif value.type != self._wide(self._stored):
            value = builder.fptrunc(value, self._float)
        builder.store(value, self._pointer(address, index, self._stored), align=self._bits // 8)

    def _to_double(self, value: Any) -> Any:
        return value if value.type == self._double else self._builder.fpext(value, self._double)

    def _to_half(self, value: Any) -> Any:
        half = self._builder.fptrunc(value, self._wide(self._ir.HalfType()))
        return self._builder.bitcast(half, self._wide(self._stored))

    def _to_bfloat(self, value: Any) -> Any:
        builder, word = self._builder, functools.partial(self._constant, self._word)
        bits = builder.bitcast(value, self._word)
        high = builder.lshr(bits, word(16))
        half = builder.add(builder.and_(high, word(1)), word(0x7FFF))
        rounded = builder.lshr(builder.add(bits, half), word(16))
        # a NaN stays one, whichever of its bits are cut off
        nan = builder.fcmp_unordered("uno", value, value)
        kept = builder.select(nan, builder.or_(high, word(0x40)), rounded)
        return builder.trunc(kept, self._wide(self._stored))

    def _to_odd(self, value: Any) -> Any:
        """A double as a float, cut off, its last bit set where it is inexact: what rounds it on rounds only once."""
        builder = self._builder
        near = builder.fptrunc(value, self._float)
        back = builder.fpext(near, self._double)
        beyond = builder.fcmp_ordered(">", self._absolute(back), self._absolute(value))
        inexact = builder.fcmp_ordered("!=", back, value)
        bits = builder.sub(builder.bitcast(near, self._word), builder.zext(beyond, self._word))
        return builder.bitcast(builder.or_(bits, builder.zext(inexact, self._word)), self._float)

    def _absolute(self, value: Any) -> Any:
        negative = self._builder.fcmp_ordered("<", value, self._constant(value.type, 0.0))
        return self._builder.select(negative, self._builder.fneg(value), value)

    def _wide(self, kind: Any) -> Any:
        return kind if self._lanes == 1 else self._ir.VectorType(kind, self._lanes)

    def _constant(self, kind: Any, value: Any) -> Any:
        return self._ir.Constant(kind, value if self._lanes == 1 else [value] * self._lanes)

    def _int(self, value: int) -> Any:
        return self._ir.Constant(self._ir.IntType(32), value)

    def _pointer(self, address: Any, index: Any, kind: Any) -> Any:
        return self._lanes_at(self._builder.inttoptr(address, kind.as_pointer()), index)

    def _lanes_at(self, start: Any, index: Any) -> Any:
        first = self._builder.gep(start, [index])
        return first if self._lanes == 1 else self._builder.bitcast(first, self._wide(start.type.pointee).as_pointer())
