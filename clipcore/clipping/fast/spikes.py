"""Clipping elements that exceed a multiple of their second moment, which moves on with them."""

from __future__ import annotations

import math

import numpy as np

from clipcore.clipping.fast.compiler import LIKE, helper
from clipcore.clipping.fast.memory import AHEAD, VECTOR, add_spikes, advance_all, load, store, view
from clipcore.clipping.fast.plans import CHUNK, TASKS, Plan, cut, piece
from clipcore.clipping.fast.scaling import scale_units
from clipcore.clipping.fast.threads import blockwise, run
from clipcore.clipping.kernels import Array

LARGEST_SINGLE = float(np.finfo(np.float32).max)  # what a moment stays at, so that a state is finite


def spike(
    grads: Array,
    moments: Array,
    targets: Array,
    after: Array,
    sizes: Array,
    dtype: str,
    threshold: float,
    decay: float,
    clip: bool,
) -> Array:
    """Clip the elements of gradients whose squares exceed `threshold` times their second moment; advance the moments.

        g = sign(g) * sqrt(threshold * v)  where  clip and g * g > threshold * v;   v = decay * v + (1 - decay) * g * g

    in float64, rounded once to the target's dtype, with which the moment is advanced, and to float32 for the moment.
    A target may be its gradient, which is not float64; it is written only where an element of the tensor is clipped:
    then whole, or of its own gradient the parts that change. `moments` and `after`, which may be the same, hold the
    addresses of float32 arrays of the same sizes.
    Returns, int64, how many elements of each tensor were clipped.
    Source: Huang et al. 2025, SPAM, arXiv:2501.06842.
    """
    ones = np.ones(sizes.size, np.int64)
    plan = cut(ones, ones, sizes, dtype)
    counts = np.zeros(plan.table[TASKS, -1], np.int64)
    arguments = LIKE["float32"], float(threshold), float(decay), bool(clip), counts
    run(_spike_block, dtype, plan, grads, moments, targets, after, *arguments)
    spikes: Array = np.diff(np.concatenate([[0], np.cumsum(counts)])[plan.table[TASKS]])
    if spikes.any():
        _copy_rest(grads, targets, plan, dtype, counts, spikes)
    return spikes


def _copy_rest(grads: Array, targets: Array, plan: Plan, dtype: str, counts: Array, spikes: Array) -> None:
    """Copy the pieces without a spike of tensors with one."""
    tensor = np.repeat(np.arange(spikes.size), np.diff(plan.table[TASKS]))
    task = np.flatnonzero((counts == 0) & ((spikes > 0) & (grads != targets))[tensor])
    tensor = tensor[task]
    start = (task - plan.table[TASKS][tensor]) * CHUNK
    offset, ones = start * LIKE[dtype].itemsize, np.ones(task.size, np.int64)
    sizes = np.minimum(CHUNK, plan.inner[tensor] - start)
    scale_units(grads[tensor] + offset, targets[tensor] + offset, ones, ones, sizes, dtype, np.ones(task.size))


@blockwise("iiiisddci")
def _spike_block(
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
    after: Array,
    single: Array,
    threshold: float,
    decay: float,
    clip: bool,
    counts: Array,
) -> None:
    """Clip the pieces of gradients that have a spike, and advance their moments; a piece stays in the L2 cache."""
    like, single, sums = view(like, 0, 0), view(single, 0, 0), view(scratch, scratch.ctypes.data, VECTOR)
    i = cuts[1, block]
    for task in range(cuts[0, block], cuts[0, block + 1]):
        while task >= table[TASKS, i + 1]:
            i += 1
        _, start, count = piece(task - table[TASKS, i], inner[i])
        grad, target = grads[i] + start * like.itemsize, targets[i] + start * like.itemsize
        moment, new = moments[i] + start * single.itemsize, after[i] + start * single.itemsize
        if clip:
            counts[task] = _count(like, single, grad, moment, count, threshold, sums)
        if counts[task] > 0:
            _clip(like, single, grad, moment, target, count, threshold)
            grad = target
        _advance(like, single, grad, moment, new, count, decay)


@helper
def _count(like: Array, single: Array, grads: int, moments: int, count: int, threshold: float, sums: Array) -> int:
    """The number of spikes."""
    whole = count // VECTOR * VECTOR
    for k in range(VECTOR):
        sums[k] = 0.0
    for k in range(0, whole, VECTOR):
        # the vector of sums stands at the start, and not at the elements' own index
        add_spikes(like, grads + k * like.itemsize, moments + k * single.itemsize, AHEAD, 0, threshold, sums)
    spikes = 0
    for k in range(VECTOR):
        spikes += int(sums[k])
    for k in range(whole, count):
        g = load(like, grads, k)
        spikes += 1 if g * g > threshold * load(single, moments, k) else 0
    return spikes


@helper
def _clip(like: Array, single: Array, grad: int, moment: int, target: int, count: int, threshold: float) -> None:
    """Write the target, spikes clipped."""
    for k in range(count):
        g, limit = load(like, grad, k), threshold * load(single, moment, k)
        root = math.sqrt(limit)
        store(like, target, k, (root if g > 0 else -root) if g * g > limit else g)


@helper
def _advance(like: Array, single: Array, grads: int, moments: int, after: int, count: int, decay: float) -> None:
    """Write the next moments, which may be the same memory."""
    whole, rest = count // VECTOR * VECTOR, 1 - decay
    for k in range(0, whole, VECTOR):
        advance_all(like, grads, moments, after, k, decay, rest, LARGEST_SINGLE)
    for k in range(whole, count):
        g = load(like, grads, k)
        moved = decay * load(single, moments, k) + rest * (g * g)
        store(single, after, k, LARGEST_SINGLE if moved > LARGEST_SINGLE else moved)
