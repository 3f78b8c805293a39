"""Arithmetic of the definition: every element a rational number, every rounding written out."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from decimal import MAX_EMAX, MIN_EMIN, Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# digits of the significand, and the exponent of the smallest subnormal number
FORMATS = {"float16": (11, -24), "bfloat16": (8, -133), "float32": (24, -149), "float64": (53, -1074)}
LARGEST = {
    "float16": (2 - 2**-10) * 2.0**15,
    "bfloat16": (2 - 2**-7) * 2.0**127,
    "float32": (2 - 2**-23) * 2.0**127,
    "float64": (2 - 2**-52) * 2.0**1023,
}
UNBOUNDED = -(10**9)


def not_finite(tensor: Array) -> Array:
    return ~np.isfinite(tensor)


def faults(tensors: Sequence[Array], nonfinite: str, is_fault: Any) -> tuple[list[Array], float | None]:
    """The tensors to clip, or None and the value that every element takes instead."""
    masks = [is_fault(t) for t in tensors]
    if not any(mask.any() for mask in masks):
        return list(tensors), None
    if nonfinite == "raise":
        raise ArithmeticError("an element is inf or NaN")
    if nonfinite == "zero":
        return [np.where(mask, np.zeros_like(t), t) for t, mask in zip(tensors, masks, strict=True)], None
    return list(tensors), {"propagate": math.nan, "skip": 0.0}[nonfinite]


def filled(tensor: Array, value: float) -> Array:
    result = np.zeros_like(tensor)
    result[...] = complex(value, value) if tensor.dtype.kind == "c" else value
    return result


def clip_finite(tensors: Sequence[Array], max_norm: float, p: float) -> tuple[list[Array], float]:
    norm = norm_of(tensors, p)
    if max_norm == math.inf or norm <= Fraction(max_norm):
        return list(tensors), to_float(norm)
    scale = round_to(Fraction(max_norm) / norm, 53, UNBOUNDED)
    return [scaled(t, scale) for t in tensors], to_float(norm)


def norm_of(tensors: Sequence[Array], p: float) -> Fraction:
    """The joint p-norm, rounded to 53 bits with an unbounded exponent."""
    squares = [re * re + im * im for t in tensors for re, im in elements(t)]
    if not any(squares):
        return Fraction(0)
    if p == math.inf:
        return root(max(squares))
    if p == 2.0:
        return root(sum(squares, Fraction(0)))
    with localcontext(prec=100, Emax=MAX_EMAX, Emin=MIN_EMIN):
        if p == 1.0:
            return round_to(sum(map(_magnitude, squares), Fraction(0)), 53, UNBOUNDED)
        digits = [_decimal(s) for s in squares]
        power, largest = Decimal(p), max(digits)
        ratios = [d / largest for d in digits if d]
        norm = largest.sqrt() * sum((r ** (power / 2) for r in ratios), Decimal(0)) ** (1 / power)
        return round_to(Fraction(norm), 53, UNBOUNDED)


def elements(tensor: Array) -> list[tuple[Fraction, Fraction]]:
    wide = tensor.astype(np.complex128).ravel()
    return [(Fraction(z.real), Fraction(z.imag)) for z in wide.tolist()]


def _magnitude(square: Fraction) -> Fraction:
    """sqrt(square): exact where it is rational, so that a sum of such may be a tie; else its first 100 digits."""
    exact = Fraction(math.isqrt(square.numerator), math.isqrt(square.denominator))
    return exact if exact * exact == square else Fraction(_decimal(square).sqrt())


def _decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)


def root(square: Fraction, lowest: int = UNBOUNDED) -> Fraction:
    """sqrt(square), rounded to 53 bits: the integer root of a 400-bit numerator, with a bit for what is left over."""
    shift = 2 * max(200 + square.denominator.bit_length() - square.numerator.bit_length() // 2, 0)
    whole, rest = divmod(square.numerator << shift, square.denominator)
    root = math.isqrt(whole)
    inexact = rest != 0 or root * root != whole
    return round_to(Fraction(2 * root + inexact, 2 << (shift // 2)), 53, lowest)


def round_to(value: Fraction, digits: int, lowest: int) -> Fraction:
    """The nearest number of so many binary digits, ties to even; no digit stands below 2**lowest."""
    if value == 0:
        return value
    numerator, denominator = abs(value.numerator), value.denominator
    top = numerator.bit_length() - denominator.bit_length()
    if numerator << max(-top, 0) < denominator << max(top, 0):
        top -= 1
    place = max(top + 1 - digits, lowest)
    unit = denominator << max(place, 0)
    whole, rest = divmod(numerator << max(-place, 0), unit)
    whole += 2 * rest > unit or (2 * rest == unit and whole % 2)
    rounded = Fraction(whole << max(place, 0), 1 << max(-place, 0))
    return rounded if value > 0 else -rounded


def squares_of(tensors: Sequence[Array]) -> Fraction:
    """The sum of |x|**2 over all elements: of whole numbers of the smallest float64."""
    total, unit = 0, 2**1074
    for tensor in tensors:
        for value in tensor.astype(np.complex128).ravel().view(np.float64).tolist():
            numerator, denominator = value.as_integer_ratio()
            total += (numerator * (unit // denominator)) ** 2
    return Fraction(total, unit * unit)


def hold(tensors: Sequence[Array], limit: float) -> list[Array]:
    """The tensors where their joint L2 norm is at most `limit`, else as near to it as one factor takes them.

    The norm is a real number here, not a rounded one. The factor is the largest with which the norm of what is stored
    is at most `limit`: of the numbers of float32 that are not subnormal and, where these are all too large or a tensor
    is of float64, of the numbers of float64.
    """
    if limit == math.inf or squares_of(tensors) <= Fraction(limit) ** 2:
        return list(tensors)

    about = to_float(Fraction(limit) / norm_of(tensors, 2.0))

    def keeps(factor: float) -> bool:
        return squares_of([scaled(t, Fraction(factor)) for t in tensors]) <= Fraction(limit) ** 2

    if all(t.real.dtype.name != "float64" for t in tensors) and keeps(2.0**-126):
        return [scaled(t, Fraction(_largest(keeps, about, "f", 2.0**-126))) for t in tensors]
    return [scaled(t, Fraction(_largest(keeps, about, "d", 0.0))) for t in tensors]


def _largest(keeps: Callable[[float], bool], about: float, form: str, lowest: float) -> float:
    """The largest number of a format below 1 for which `keeps` holds, as it does for the lowest and not for 1.

    Non-negative numbers are in the order of their bits. It is looked for from `about` on, in ever longer steps.
    """
    bits = {"f": "I", "d": "Q"}[form]

    def place(value: float) -> int:
        return int(struct.unpack(bits, struct.pack(form, value))[0])

    def number(place: int) -> float:
        return float(struct.unpack(form, struct.pack(bits, place))[0])

    bottom, top = place(lowest), place(1.0)
    low = high = min(max(place(about), bottom), top - 1)
    step = 1
    while low > bottom and not keeps(number(low)):
        low, high, step = max(low - step, bottom), low, 2 * step
    while high < top and (high == low or keeps(number(high))):
        low, high, step = high, min(high + step, top), 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if keeps(number(middle)) else (low, middle)
    return number(low)


def to_float(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def scaled(tensor: Array, scale: Fraction) -> Array:
    if tensor.dtype.kind == "c":
        parts = [scaled(np.ascontiguousarray(part), scale) for part in (tensor.real, tensor.imag)]
        result = np.empty_like(tensor)
        result.real, result.imag = parts
        return result
    if scale == 0:
        return np.zeros_like(tensor)
    dtype = tensor.dtype.name
    factor, *roundings = _multiplication(scale, dtype)

    def product(x: Fraction) -> Fraction:
        result: Fraction = x * factor
        for digits, lowest in roundings:
            result = round_to(result, digits, lowest)
        return result

    return _mapped(tensor, product)


def _multiplication(scale: Fraction, dtype: str) -> tuple[Any, ...]:
    """The factor as it is multiplied, and the formats that the product is rounded to, one after the other."""
    narrow = round_to(scale, *FORMATS["float32"])
    if dtype != "float64" and Fraction(2) ** -126 <= narrow <= LARGEST["float32"]:
        return (narrow, FORMATS["float32"], *([] if dtype == "float32" else [FORMATS[dtype]]))
    if Fraction(2) ** -1022 <= scale <= LARGEST["float64"]:
        return (scale, FORMATS["float64"], *([] if dtype == "float64" else [FORMATS[dtype]]))
    # a factor outside float64's range: 53 digits of the product first, then its place
    return (scale, (53, UNBOUNDED), FORMATS[dtype])


def _mapped(tensor: Array, function: Any) -> Array:
    """`function` applied to every real element as a rational number; the sign of a zero stays."""
    wide = tensor.astype(np.float64)
    values = [math.copysign(float(function(Fraction(x))), x) for x in wide.ravel().tolist()]
    return np.array(values, np.float64).reshape(tensor.shape).astype(tensor.dtype)
