"""Bounds that follow what was seen before. A state is a list of all of that, and what is learned is computed anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from clipcore.clipping.reference.arithmetic import (
    FORMATS,
    LARGEST,
    Array,
    clip_finite,
    faults,
    filled,
    norm_of,
    not_finite,
    round_to,
    to_float,
)


def auto_clip(
    tensors: Sequence[Array],
    norms: Sequence[float],
    percentile: float = 10.0,
    window: int = 1000,
    nonfinite: str = "propagate",
) -> tuple[list[Array], list[float], float]:
    """Hold the joint norm of all tensors to a percentile of the latest `window` norms, the current one included.

    Args:
        tensors: floating or complex arrays of any shapes; not modified.
        norms: the state: the joint norm of every step so far, before clipping. A step with faults that do not count as
            0 adds none.
        percentile: in [0, 100], as numpy.percentile has it.
        window: >= 1.
        nonfinite: as for `clip_by_global_norm`.
    Returns:
        (clipped, norms, limit): the limit is NaN where a fault stands.
    Source: Seetharaman et al. 2020, arXiv:2007.14469.

    >>> auto_clip([np.array([8.0])], [4.0, 2.0], 50.0)
    ([array([4.])], [4.0, 2.0, 8.0], 4.0)
    """
    tensors, verdict = faults(tensors, nonfinite, not_finite)
    if verdict is not None:
        return [filled(t, verdict) for t in tensors], list(norms), math.nan
    norm = _within_range(tensors)
    seen = [*norms, norm]
    limit = float(np.percentile(seen[-window:], percentile))
    return clip_finite(tensors, limit if norm > limit else math.inf, 2.0)[0], seen, limit


def zclip(
    tensors: Sequence[Array],
    norms: Sequence[float],
    threshold: float = 2.5,
    decay: float = 0.97,
    warmup: int = 25,
    eps: float = 1e-6,
    nonfinite: str = "propagate",
) -> tuple[list[Array], list[float], float]:
    """Hold the joint norm of all tensors to what is usual, once `warmup` norms were seen.

    limit = mean + threshold**2 / z * deviation where z = (norm - mean) / (deviation + eps) > threshold, else inf. Mean
    and variance are those of the first `warmup` norms n', and from then on

        mean_k = decay**k * mean_0 + (1 - decay) * sum over i <= k of decay**(k - i) * n'_i
        variance_k = decay**k * variance_0 + (1 - decay) * sum over i <= k of decay**(k - i) * (n'_i - mean_i)**2

    Args:
        tensors, nonfinite: as for `auto_clip`.
        norms: the state: of every step so far, the joint norm n' that it was left with.
        threshold, decay, warmup, eps: see the formulas.
    Returns:
        (clipped, norms, limit): the limit is NaN where a fault stands.
    Source: Kumar et al. 2025, arXiv:2504.02507.

    >>> zclip([np.array([6.0])], [1.0, 3.0], 1.0, warmup=2, eps=0.0)
    ([array([2.25])], [1.0, 3.0, 2.25], 2.25)
    """
    tensors, verdict = faults(tensors, nonfinite, not_finite)
    if verdict is not None:
        return [filled(t, verdict) for t in tensors], list(norms), math.nan
    norm, limit = _within_range(tensors), math.inf
    if len(norms) >= warmup:
        mean, deviation = _mean_and_deviation(norms[:warmup], norms[warmup:], decay)
        if norm - mean > threshold * (deviation + eps):
            limit = mean + threshold**2 / ((norm - mean) / (deviation + eps)) * deviation
    return clip_finite(tensors, limit, 2.0)[0], [*norms, min(norm, limit)], limit


def adagc(
    tensors: Sequence[Array | None],
    history: Sequence[Sequence[float | None]],
    max_norm: float = 1.0,
    ratio: float = 1.05,
    decay: float = 0.98,
    warmup: int = 100,
    nonfinite: str = "propagate",
) -> tuple[list[Array | None], list[list[float | None]], list[float] | float]:
    """Hold each tensor's norm to a multiple of the moving average of what its past norms were left at.

    For the first `warmup` steps all are held to the joint norm `max_norm`, and a tensor's average a_0 is its smallest
    norm n' after that which is not 0; without any, it is its first one later. From then on its limit is ratio * a with

        a_k = decay**k * a_0 + (1 - decay) * sum over i <= k of decay**(k - i) * n'_i

    and a tensor that has no average yet, or one of 0, is not clipped.

    Args:
        tensors, nonfinite: as for `auto_clip`; None where there is no gradient in this step.
        history: the state: of every step so far, each tensor's norm after clipping, None where it had no gradient.
        max_norm, ratio, decay, warmup: see the formulas.
    Returns:
        (clipped, history, limit): one limit while warming up, then one per gradient; NaN where a fault stands.
    Source: Wang et al. 2025, arXiv:2502.11034, algorithm 1.

    >>> adagc([np.array([10.0])], [[5.0]], 5.0, 1.5, warmup=1)
    ([array([7.5])], [[5.0], [7.5]], [7.5])
    """
    past = [list(step) for step in history]
    slots = [slot for slot, tensor in enumerate(tensors) if tensor is not None]
    given, verdict = faults([t for t in tensors if t is not None], nonfinite, not_finite)
    limit: list[float] | float = max_norm
    if verdict is not None:
        results, limit = [filled(t, verdict) for t in given], math.nan
    elif len(past) < warmup:
        results, joint = clip_finite(given, max_norm, 2.0)
        part = min(max_norm / joint, 1.0) if joint else 1.0
        past.append(_spread([_within_range([t]) * part for t in given], slots, len(tensors)))
    else:
        limit = [_limit([step[slot] for step in past], ratio, decay, warmup) for slot in slots]
        results = [clip_finite([t], own, 2.0)[0][0] for t, own in zip(given, limit, strict=True)]
        left = [min(_within_range([t]), own) for t, own in zip(given, limit, strict=True)]
        past.append(_spread(left, slots, len(tensors)))
    return _spread(results, slots, len(tensors)), past, limit


def spike_clip(
    tensors: Sequence[Array],
    past: Sequence[Sequence[Array]],
    threshold: float = 5000.0,
    decay: float = 0.999,
    warmup: int = 100,
    nonfinite: str = "propagate",
) -> tuple[list[Array], list[list[Array]], int]:
    """Hold each element to a multiple of the root of its second moment v, once `warmup` steps were seen.

    Elements with g**2 > threshold * v become sign(g) * sqrt(threshold * v), rounded once to the tensor's dtype. v is 0,
    and then after each step decay * v + (1 - decay) * g'**2 with what is left of it, g'; computed in float64, and kept
    in float64 for float64, else in float32; the largest number of that where it is beyond.

    Args:
        tensors: real floating arrays; not modified.
        past: the state: what every step so far was left with.
        threshold, decay, warmup: see the formulas.
        nonfinite: as for `auto_clip`.
    Returns:
        (clipped, past, changed): how many elements were changed.
    Source: Huang et al. 2025, arXiv:2501.06842, section 3.1.

    >>> spike_clip([np.array([-8.0, 1.0])], [[np.array([2.0, 2.0])]], 4.0, decay=0.75, warmup=1)
    ([array([-2.,  1.])], [[array([2., 2.])], [array([-2.,  1.])]], 1)
    """
    tensors, verdict = faults(tensors, nonfinite, not_finite)
    if verdict is not None:
        return [filled(t, verdict) for t in tensors], [list(step) for step in past], 0
    clipped, changed = [], 0
    for index, tensor in enumerate(tensors):
        series = [step[index].astype(np.float64).ravel().tolist() for step in past]
        values = tensor.astype(np.float64).ravel().tolist()
        for place, value in enumerate(values) if len(past) >= warmup else ():
            limit = threshold * _second_moment([step[place] for step in series], decay, tensor.dtype.name)
            if value * value > limit:
                bound = round_to(Fraction(math.sqrt(limit)), *FORMATS[tensor.dtype.name])
                values[place] = math.copysign(float(bound), value)
                changed += 1
        clipped.append(np.array(values, np.float64).reshape(tensor.shape).astype(tensor.dtype))
    return clipped, [*(list(step) for step in past), clipped], changed


def _within_range(tensors: Sequence[Array]) -> float:
    """The joint norm; the largest float64 where it is beyond."""
    return min(to_float(norm_of(tensors, 2.0)), LARGEST["float64"])


def _moving_average(first: float, later: Sequence[float], decay: float) -> float:
    weights = [decay ** (len(later) - 1 - place) for place in range(len(later))]
    moved = math.fsum(weight * value for weight, value in zip(weights, later, strict=True))
    return decay ** len(later) * first + (1 - decay) * moved


def _mean_and_deviation(first: Sequence[float], later: Sequence[float], decay: float) -> tuple[float, float]:
    mean = math.fsum(first) / len(first)
    variance = math.fsum((value - mean) ** 2 for value in first) / len(first)
    means = [_moving_average(mean, later[: count + 1], decay) for count in range(len(later))]
    squares = [(value - own) ** 2 for value, own in zip(later, means, strict=True)]
    return [mean, *means][-1], math.sqrt(_moving_average(variance, squares, decay))


def _limit(norms: Sequence[float | None], ratio: float, decay: float, warmup: int) -> float:
    early = [norm for norm in norms[:warmup] if norm]
    later = [norm for norm in norms[warmup:] if norm is not None]
    while not early and later:
        early = [norm for norm in [later.pop(0)] if norm]
    average = _moving_average(min(early), later, decay) if early else 0.0
    return ratio * average if average else math.inf


def _spread(values: Sequence[Any], slots: Sequence[int], count: int) -> list[Any]:
    """The values in their places among `count`, None in the others."""
    found = dict(zip(slots, values, strict=True))
    return [found.get(slot) for slot in range(count)]


def _second_moment(values: Sequence[float], decay: float, dtype: str) -> float:
    moment = 0.0
    for value in values:
        moment = decay * moment + (1 - decay) * (value * value)
        moment = min(moment, LARGEST["float64" if dtype == "float64" else "float32"])
        moment = moment if dtype == "float64" else float(np.float32(moment))
    return moment
