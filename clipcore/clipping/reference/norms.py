"""Bounds on values and norms that need the gradients alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

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
    root,
    round_to,
    to_float,
)


def clip_by_value(
    tensors: Sequence[Array], min_value: float, max_value: float, nonfinite: str = "propagate"
) -> tuple[list[Array], float]:
    """Bound every element: min(max(g, min_value), max_value), the bounds rounded to the tensor's dtype.

    Args:
        tensors: real floating arrays of any shapes; not modified.
        min_value, max_value: in the unit of the gradients; a finite bound beyond the dtype's range is its largest
            number.
        nonfinite: what a NaN does: "propagate", "raise", "zero" or "skip". Infinities are clipped to the bounds.
    Returns:
        (clipped, norm): same shapes and dtypes; norm is the joint L2 norm before clipping.
    Raises:
        ArithmeticError: a NaN under "raise".

    >>> clip_by_value([np.array([-3.0, 0.2])], -0.5, 0.5)[0]
    [array([-0.5,  0.2])]
    """
    tensors, verdict = faults(tensors, nonfinite, np.isnan)
    if verdict is not None:
        return [filled(t, verdict) for t in tensors], math.nan
    infinite = any(np.isinf(t).any() for t in tensors)
    norm = math.inf if infinite else to_float(norm_of(tensors, 2.0))
    return [_clamp(t, min_value, max_value) for t in tensors], norm


def clip_by_norm(
    tensors: Sequence[Array], max_norm: float, p: float = 2.0, nonfinite: str = "propagate"
) -> tuple[list[Array], list[float]]:
    """Shrink each tensor on its own so that its p-norm is at most `max_norm`; see `clip_by_global_norm`.

    Returns:
        (clipped, norms): one float64 norm per tensor, before clipping.

    >>> clip_by_norm([np.array([3.0, 4.0]), np.array([0.5])], 1.0)
    ([array([0.6, 0.8]), array([0.5])], [5.0, 0.5])
    """
    tensors, verdict = faults(tensors, nonfinite, not_finite)
    if verdict is not None:
        return [filled(t, verdict) for t in tensors], [math.nan] * len(tensors)
    parts = [clip_finite([t], max_norm, p) for t in tensors]
    return [clipped for (clipped,), _ in parts], [norm for _, norm in parts]


def clip_by_global_norm(
    tensors: Sequence[Array], max_norm: float, p: float = 2.0, nonfinite: str = "propagate"
) -> tuple[list[Array], float]:
    """Shrink all tensors together so that their joint p-norm is at most `max_norm`.

    norm = (sum of |g|**p)**(1/p), exact and then rounded to 53 bits. Where norm <= max_norm the tensors come back
    unchanged. Else scale = max_norm / norm, rounded to 53 bits and then to the multiply's dtype (float32 for float32
    and narrower unless it would be subnormal there, else float64); one multiply in that dtype, and one rounding to the
    tensor's own. A scale of 0 gives zeros. Exponents of norm and scale are unbounded.

    Args:
        tensors: floating or complex arrays of any shapes; not modified.
        max_norm: >= 0, in the unit of the gradients.
        p: in [1, inf].
        nonfinite: what an inf or NaN does: "propagate" (all NaN), "raise", "zero" (counts as 0), "skip" (all 0).
    Returns:
        (clipped, norm): same shapes and dtypes; norm is a float64 scalar, before clipping, NaN where a fault stands.
    Raises:
        ArithmeticError: an inf or NaN under "raise".
    Source: Pascanu et al. 2013, arXiv:1211.5063.

    >>> clip_by_global_norm([np.array([3.0, 4.0])], 1.0)
    ([array([0.6, 0.8])], 5.0)
    """
    tensors, verdict = faults(tensors, nonfinite, not_finite)
    if verdict is not None:
        return [filled(t, verdict) for t in tensors], math.nan
    return clip_finite(tensors, max_norm, p)


def clip_by_average_norm(
    tensors: Sequence[Array], max_norm: float, nonfinite: str = "propagate"
) -> tuple[list[Array], list[float]]:
    """Shrink each tensor on its own so that its L2 norm per element is at most `max_norm`; see `clip_by_norm`.

    The limit on the norm of N elements is max_norm * N, rounded to float64.

    >>> clip_by_average_norm([np.array([3.0, 4.0]), np.array([0.5])], 1.25)
    ([array([1.5, 2. ]), array([0.5])], [5.0, 0.5])
    """
    return _clip_each(tensors, [_product(max_norm, t.size) for t in tensors], nonfinite)


def clip_by_block_rms(
    tensors: Sequence[Array], threshold: float, nonfinite: str = "propagate"
) -> tuple[list[Array], list[float]]:
    """Shrink each tensor on its own so that the root mean square of its elements is at most `threshold`.

    The limit on the norm of N elements is threshold * sqrt(N), rounded to float64.

    Source: Shazeer and Stern 2018, arXiv:1804.04235, section 6.

    >>> clip_by_block_rms([np.array([3.0, -3.0]), np.array([0.5])], 1.5)[0]
    [array([ 1.5, -1.5]), array([0.5])]
    """
    return _clip_each(tensors, [_product_with_root(threshold, t.size) for t in tensors], nonfinite)


def _clip_each(tensors: Sequence[Array], limits: Sequence[float], nonfinite: str) -> tuple[list[Array], list[float]]:
    tensors, verdict = faults(tensors, nonfinite, not_finite)
    if verdict is not None:
        return [filled(t, verdict) for t in tensors], [math.nan] * len(tensors)
    parts = [clip_finite([t], limit, 2.0) for t, limit in zip(tensors, limits, strict=True)]
    return [clipped for (clipped,), _ in parts], [norm for _, norm in parts]


def _product(limit: float, count: int) -> float:
    return limit if math.isinf(limit) or not count else to_float(Fraction(limit) * count)


def _product_with_root(limit: float, count: int) -> float:
    if math.isinf(limit) or not count or not limit:
        return limit
    return to_float(root(Fraction(limit) ** 2 * count, FORMATS["float64"][1]))


def _clamp(tensor: Array, min_value: float, max_value: float) -> Array:
    low, high = (_bound(value, tensor.dtype.name) for value in (min_value, max_value))
    wide = tensor.astype(np.float64)
    return np.where(wide < low, low, np.where(wide > high, high, wide)).astype(tensor.dtype)


def _bound(value: float, dtype: str) -> float:
    if math.isinf(value):
        return value
    rounded = abs(round_to(Fraction(value), *FORMATS[dtype]))
    return math.copysign(float(min(rounded, Fraction(LARGEST[dtype]))), value)
