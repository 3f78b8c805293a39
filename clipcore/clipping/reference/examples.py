"""Bounds on the gradient of each example of a batch, which are then summed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from clipcore.clipping.reference.arithmetic import (
    FORMATS,
    LARGEST,
    Array,
    faults,
    filled,
    hold,
    norm_of,
    not_finite,
    round_to,
    to_float,
)


def per_example_clip(
    tensors: Sequence[Array], max_norm: float, per_layer: bool = False, nonfinite: str = "propagate"
) -> tuple[list[Array], list[float]]:
    """Shrink each example so that the L2 norm of what is stored is at most `max_norm`, then sum over the examples.

    Each is bounded by the largest factor that does. The sum is float64's, example after example
    from 0 on, rounded once.

    Args:
        tensors: floating or complex arrays with the examples along their first axis; not modified.
        max_norm: >= 0. The bound is one of real arithmetic: the sum of the stored elements' squares is at most its
            square.
        per_layer: whether each of K tensors has a bound of its own: the largest float64 at most max_norm / sqrt(K).
        nonfinite: as for `clip_by_global_norm`.
    Returns:
        (sums, norms): the first axis is gone; one norm per example, before; with `per_layer` one per tensor
        and example.
    Source: Abadi et al. 2016, arXiv:1607.00133; per layer: McMahan et al. 2018, arXiv:1710.06963.

    >>> per_example_clip([np.array([[3.0, 4.0], [0.0, 1.0]])], 2.5)
    ([array([1.5, 3. ])], [5.0, 1.0])
    """
    tensors, verdict = faults(tensors, nonfinite, not_finite)
    groups = [[i] for i in range(len(tensors))] if per_layer else [list(range(len(tensors)))]
    examples = len(tensors[0]) if tensors else 0
    if verdict is not None:
        sums = [filled(np.zeros(t.shape[1:], t.dtype), verdict) for t in tensors]
        return sums, [math.nan] * (examples * len(groups))
    limit = _share(max_norm, len(tensors)) if per_layer else max_norm
    bounded, norms = [t.copy() for t in tensors], []
    for group in groups:
        for place in [slice(i, i + 1) for i in range(examples)]:
            parts = [tensors[i][place] for i in group]
            norms.append(to_float(norm_of(parts, 2.0)))
            for i, part in zip(group, hold(parts, limit), strict=True):
                bounded[i][place] = part
    return [_total(t) for t in bounded], norms


def quantile_clip(
    tensors: Sequence[Array],
    shares: Sequence[float],
    max_norm: float,
    quantile: float = 0.5,
    learning_rate: float = 0.2,
    nonfinite: str = "propagate",
) -> tuple[list[Array], list[float], float]:
    """`per_example_clip` with a limit that follows a quantile of the examples' norms.

    limit = max_norm * exp(-learning_rate * (sum over past steps of (b - quantile))), b the share of a step's examples
    whose norm was at most its limit.

    Args:
        tensors, nonfinite: as for `per_example_clip`.
        shares: the state: b of every step so far. A step with faults that do not count as 0 adds none.
        max_norm: > 0.
        quantile, learning_rate: see the formula.
    Returns:
        (sums, shares, limit)
    Source: Andrew et al. 2021, arXiv:1905.03871, section 2.

    >>> sums, shares, limit = quantile_clip([np.array([[8.0], [4.0]])], [0.5, 0.0], 1.0, learning_rate=1.0)
    >>> shares, limit == math.exp(0.5)
    ([0.5, 0.0, 0.0], True)
    """
    limit = max_norm * math.exp(-learning_rate * math.fsum(share - quantile for share in shares))
    sums, norms = per_example_clip(tensors, limit, nonfinite=nonfinite)
    if not norms or math.isnan(norms[0]):
        return sums, list(shares), limit
    return sums, [*shares, sum(norm <= limit for norm in norms) / len(norms)], limit


def _share(max_norm: float, count: int) -> float:
    """The largest float64 of which `count` squares are at most max_norm**2."""
    if max_norm == math.inf or not count:
        return max_norm

    def fits(share: float) -> bool:
        return count * Fraction(share) ** 2 <= Fraction(max_norm) ** 2

    share = max_norm / math.sqrt(count)
    while not fits(share):
        share = math.nextafter(share, 0.0)
    while share < max_norm and fits(math.nextafter(share, math.inf)):
        share = math.nextafter(share, math.inf)
    return share


def _total(tensor: Array) -> Array:
    if tensor.dtype.kind == "c":
        result = np.zeros(tensor.shape[1:], tensor.dtype)
        result.real, result.imag = _total(tensor.real), _total(tensor.imag)
        return result
    rows = tensor.astype(np.float64).reshape(len(tensor), math.prod(tensor.shape[1:])).tolist()
    total = [0.0] * math.prod(tensor.shape[1:])
    for row in rows:
        total = [a + b for a, b in zip(total, row, strict=True)]
    values = [_stored(value, tensor.dtype.name) for value in total]
    return np.array(values, np.float64).reshape(tensor.shape[1:]).astype(tensor.dtype)


def _stored(value: float, dtype: str) -> float:
    if not math.isfinite(value):
        return value
    rounded = abs(round_to(Fraction(value), *FORMATS[dtype]))
    return math.copysign(float(rounded) if rounded <= Fraction(LARGEST[dtype]) else math.inf, value)
