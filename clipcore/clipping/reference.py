"""The definition of clipping: every element a rational number, every rounding written out. Slow, and always right.

It imports NumPy alone and shares no line with the code that users run: agreement between the two is evidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import MAX_EMAX, MIN_EMIN, Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# digits of the significand, and the exponent of the smallest subnormal number
_FORMATS = {"float16": (11, -24), "bfloat16": (8, -133), "float32": (24, -149), "float64": (53, -1074)}
_LARGEST = {
    "float16": (2 - 2**-10) * 2.0**15,
    "bfloat16": (2 - 2**-7) * 2.0**127,
    "float32": (2 - 2**-23) * 2.0**127,
    "float64": (2 - 2**-52) * 2.0**1023,
}
_UNBOUNDED = -(10**9)


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
    tensors, verdict = _faults(tensors, nonfinite, np.isnan)
    if verdict is not None:
        return [_filled(t, verdict) for t in tensors], math.nan
    infinite = any(np.isinf(t).any() for t in tensors)
    norm = math.inf if infinite else _to_float(_norm(tensors, 2.0))
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
    tensors, verdict = _faults(tensors, nonfinite, _not_finite)
    if verdict is not None:
        return [_filled(t, verdict) for t in tensors], [math.nan] * len(tensors)
    parts = [_clip_finite([t], max_norm, p) for t in tensors]
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
    tensors, verdict = _faults(tensors, nonfinite, _not_finite)
    if verdict is not None:
        return [_filled(t, verdict) for t in tensors], math.nan
    return _clip_finite(tensors, max_norm, p)


def _not_finite(tensor: Array) -> Array:
    return ~np.isfinite(tensor)


def _faults(tensors: Sequence[Array], nonfinite: str, is_fault: Any) -> tuple[list[Array], float | None]:
    """The tensors to clip, or None and the value that every element takes instead."""
    masks = [is_fault(t) for t in tensors]
    if not any(mask.any() for mask in masks):
        return list(tensors), None
    if nonfinite == "raise":
        raise ArithmeticError("an element is inf or NaN")
    if nonfinite == "zero":
        return [np.where(mask, np.zeros_like(t), t) for t, mask in zip(tensors, masks, strict=True)], None
    return list(tensors), {"propagate": math.nan, "skip": 0.0}[nonfinite]


def _filled(tensor: Array, value: float) -> Array:
    result = np.zeros_like(tensor)
    result[...] = complex(value, value) if tensor.dtype.kind == "c" else value
    return result


def _clip_finite(tensors: Sequence[Array], max_norm: float, p: float) -> tuple[list[Array], float]:
    norm = _norm(tensors, p)
    if max_norm == math.inf or norm <= Fraction(max_norm):
        return list(tensors), _to_float(norm)
    scale = _round(Fraction(max_norm) / norm, 53, _UNBOUNDED)
    return [_scaled(t, scale) for t in tensors], _to_float(norm)


def _norm(tensors: Sequence[Array], p: float) -> Fraction:
    """The joint p-norm, rounded to 53 bits with an unbounded exponent."""
    squares = [re * re + im * im for t in tensors for re, im in _elements(t)]
    if not any(squares):
        return Fraction(0)
    if p == math.inf:
        return _root(max(squares))
    if p == 2.0:
        return _root(sum(squares, Fraction(0)))
    with localcontext(prec=100, Emax=MAX_EMAX, Emin=MIN_EMIN):
        if p == 1.0:
            return _round(sum(map(_magnitude, squares), Fraction(0)), 53, _UNBOUNDED)
        digits = [_decimal(s) for s in squares]
        power, largest = Decimal(p), max(digits)
        ratios = [d / largest for d in digits if d]
        norm = largest.sqrt() * sum((r ** (power / 2) for r in ratios), Decimal(0)) ** (1 / power)
        return _round(Fraction(norm), 53, _UNBOUNDED)


def _elements(tensor: Array) -> list[tuple[Fraction, Fraction]]:
    wide = tensor.astype(np.complex128).ravel()
    return [(Fraction(z.real), Fraction(z.imag)) for z in wide.tolist()]


def _magnitude(square: Fraction) -> Fraction:
    """sqrt(square): exact where it is rational, so that a sum of such may be a tie; else its first 100 digits."""
    exact = Fraction(math.isqrt(square.numerator), math.isqrt(square.denominator))
    return exact if exact * exact == square else Fraction(_decimal(square).sqrt())


def _decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)


def _root(square: Fraction) -> Fraction:
    """sqrt(square), rounded to 53 bits: the integer root of a 400-bit numerator, with a bit for what is left over."""
    shift = 2 * max(200 + square.denominator.bit_length() - square.numerator.bit_length() // 2, 0)
    whole, rest = divmod(square.numerator << shift, square.denominator)
    root = math.isqrt(whole)
    inexact = rest != 0 or root * root != whole
    return _round(Fraction(2 * root + inexact, 2 << (shift // 2)), 53, _UNBOUNDED)


def _round(value: Fraction, digits: int, lowest: int) -> Fraction:
    """The nearest number of so many binary digits, ties to even; no digit stands below 2**lowest."""
    if value == 0:
        return value
    magnitude = abs(value)
    top = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** top:
        top -= 1
    unit = Fraction(2) ** max(top + 1 - digits, lowest)
    return round(value / unit) * unit  # Fraction rounds ties to even


def _to_float(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _scaled(tensor: Array, scale: Fraction) -> Array:
    if tensor.dtype.kind == "c":
        parts = [_scaled(np.ascontiguousarray(part), scale) for part in (tensor.real, tensor.imag)]
        result = np.empty_like(tensor)
        result.real, result.imag = parts
        return result
    if scale == 0:
        return np.zeros_like(tensor)
    return _mapped(tensor, lambda x: _product(x, scale, tensor.dtype.name))


def _product(x: Fraction, scale: Fraction, dtype: str) -> Fraction:
    multiply = "float64" if dtype == "float64" else "float32"
    smallest_normal = Fraction(2) ** -126
    if multiply == "float32" and _round(scale, *_FORMATS["float32"]) >= smallest_normal:
        scale = _round(scale, *_FORMATS["float32"])
    else:
        multiply = "float64"
    if multiply == "float64" and scale < Fraction(2) ** -1022:
        # a factor below float64's range: 53 digits of the product first, then its place
        return _round(_round(x * scale, 53, _UNBOUNDED), *_FORMATS[dtype])
    return _round(_round(x * scale, *_FORMATS[multiply]), *_FORMATS[dtype])


def _mapped(tensor: Array, function: Any) -> Array:
    """`function` applied to every real element as a rational number; the sign of a zero stays."""
    wide = tensor.astype(np.float64)
    values = [math.copysign(float(function(Fraction(x))), x) for x in wide.ravel().tolist()]
    return np.array(values, np.float64).reshape(tensor.shape).astype(tensor.dtype)


def _clamp(tensor: Array, min_value: float, max_value: float) -> Array:
    low, high = (_bound(value, tensor.dtype.name) for value in (min_value, max_value))
    wide = tensor.astype(np.float64)
    return np.where(wide < low, low, np.where(wide > high, high, wide)).astype(tensor.dtype)


def _bound(value: float, dtype: str) -> float:
    if math.isinf(value):
        return value
    rounded = abs(_round(Fraction(value), *_FORMATS[dtype]))
    return math.copysign(float(min(rounded, Fraction(_LARGEST[dtype]))), value)
