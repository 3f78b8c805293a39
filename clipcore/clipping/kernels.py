"""The CPU kernels, on NumPy arrays: norms with a known error bound, exact norms, scaling, clamping.

Numbers that may leave the range of float64 (a norm of float64 tensors, the factor it leads to) are carried as `Wide`.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# The dtypes that can be clipped, and the real dtype in which each is multiplied.
MULTIPLY_DTYPE: dict[str, type[np.floating[Any]]] = {
    "float16": np.float32,
    "bfloat16": np.float32,
    "float32": np.float32,
    "complex64": np.float32,
    "float64": np.float64,
    "complex128": np.float64,
}

_CHUNK = 1 << 15  # elements; their float64 copies stay in the L2 cache
# NumPy sums a chunk pairwise (at most 28 roundings in a row), fsum adds one, squares and roots a few more; a power
# function is off by up to 4 ulp. 128 units of 2**-53 hold all of it.
_RELATIVE_ERROR = 2.0**-46
_ALIGNMENT = 64  # bytes; TensorFlow takes an array's memory as its own only where it is aligned so


class Wide(NamedTuple):
    """mantissa * 2**exponent, the mantissa 0 or in [0.5, 1): a non-negative float64 with an unbounded exponent."""

    mantissa: float
    exponent: int

    @classmethod
    def of(cls, value: float, exponent: int = 0) -> Wide:
        mantissa, shift = math.frexp(value)
        return cls(mantissa, shift + exponent if mantissa else 0)

    def __float__(self) -> float:
        try:
            return math.ldexp(self.mantissa, self.exponent)
        except OverflowError:
            return math.inf

    def exceeds(self, other: float) -> bool:
        if other == math.inf or self.mantissa == 0:
            return False
        bound = Wide.of(other)
        return bound.mantissa == 0 or (self.exponent, self.mantissa) > (bound.exponent, bound.mantissa)


class Interval(NamedTuple):
    """A computed value and the bounds between which the true one lies."""

    low: Wide
    value: Wide
    high: Wide

    @classmethod
    def around(cls, value: float, exponent: int = 0, error: float = _RELATIVE_ERROR) -> Interval:
        return cls(
            Wide.of(value * (1 - error), exponent), Wide.of(value, exponent), Wide.of(value * (1 + error), exponent)
        )


def reals(array: Array) -> list[Array]:
    """The array as real arrays that share its memory: itself, or its real and imaginary parts."""
    return [array.real, array.imag] if array.dtype.kind == "c" else [array]


def chunks(array: Array) -> Iterator[Array]:
    """The elements of a real array as float64, in pieces of at most `_CHUNK`, in order of memory."""
    return iter(_iterate([array], [["readonly"]], [np.float64]))


def _iterate(arrays: Sequence[Array], flags: Sequence[Sequence[Any]], dtypes: Sequence[Any]) -> Any:
    return np.nditer(
        list(arrays),
        flags=["external_loop", "buffered", "zerosize_ok"],
        op_flags=flags,
        op_dtypes=dtypes,
        casting="unsafe",
        order="K",
        buffersize=_CHUNK,
    )


def not_finite(array: Array) -> Array:
    return ~np.isfinite(array)


def count(arrays: Sequence[Array], is_fault: Callable[[Array], Any]) -> int:
    """Number of elements for which `is_fault` holds."""
    return sum(int(np.count_nonzero(is_fault(array))) for array in arrays)


def extent(array: Array) -> tuple[int, int]:
    """The addresses between which an array's elements lie."""
    low = high = array.__array_interface__["data"][0]
    if array.flags.forc:
        return low, low + array.nbytes
    for size, stride in zip(array.shape, array.strides, strict=True):
        low, high = low + min((size - 1) * stride, 0), high + max((size - 1) * stride, 0)
    return low, high + array.itemsize


def norm_bounds(arrays: Sequence[Array], p: float) -> Interval | None:
    """Bounds of the joint p-norm, from one pass over memory (two for float64 and for p other than 1 and 2).

    None where an element is inf or NaN.
    """
    narrow = all(MULTIPLY_DTYPE[array.dtype.name] is np.float32 for array in arrays)
    with np.errstate(all="ignore"):
        parts = [part for array in arrays for part in reals(array)]
        if p == 2 and narrow:
            total = _sum(parts, 0, np.square)
            # Sums of squares of float32 cannot overflow in float64: a non-finite sum means a non-finite element.
            return Interval.around(math.sqrt(total)) if math.isfinite(total) else None
        peak = _peak(parts)
        if not math.isfinite(peak):
            return None
        if peak == 0:
            return Interval.around(0.0)
        exponent = math.frexp(peak)[1]
        if p == 2:
            return Interval.around(math.sqrt(_sum(parts, exponent, np.square)), exponent)
        return _power_bounds([_magnitudes(array, exponent) for array in arrays], p, exponent)


def _magnitudes(array: Array, exponent: int) -> Array:
    """|x| * 2**-exponent of real or complex elements, in float64."""
    parts = [np.ldexp(part.astype(np.float64), -exponent) for part in reals(array)]
    return np.abs(parts[0]) if len(parts) == 1 else np.hypot(*parts)


def _power_bounds(magnitudes: Sequence[Array], p: float, exponent: int) -> Interval:
    peak = max(float(m.max()) for m in magnitudes if m.size)
    if p == math.inf:
        return Interval.around(peak, exponent)
    # Divided by the peak itself, since a power of two would leave (1/2)**p to underflow.
    total = math.fsum(float(np.power(x / peak, p).sum()) for m in magnitudes for x in chunks(m))
    return Interval.around(total ** (1 / p) * peak, exponent)


def _peak(parts: Sequence[Array]) -> float:
    """The largest magnitude, NaN if any element is NaN, 0 for no elements."""
    peaks = [float(np.max(np.abs(x))) for part in parts for x in chunks(part)]
    return math.nan if any(map(math.isnan, peaks)) else max(peaks, default=0.0)


def _sum(parts: Sequence[Array], exponent: int, power: Callable[..., Array]) -> float:
    """Sum of power(x * 2**-exponent) over all elements; inf or NaN where a float32 or narrower element is."""
    buffer = np.empty(_CHUNK)
    partial = []
    for part in parts:
        for x in chunks(part):
            y = buffer[: x.size]
            power(np.ldexp(x, -exponent, out=y) if exponent else x, out=y)
            partial.append(float(y.sum()))
    return math.fsum(partial) if all(map(math.isfinite, partial)) else math.nan


def exact_norm(arrays: Sequence[Array], p: float) -> Wide:
    """The joint p-norm of finite arrays, rounded once to 53 bits; independent of order and grouping."""
    real = all(array.dtype.kind != "c" for array in arrays)
    parts = [part for array in arrays for part in reals(array)]
    if p == 2:
        return _round_root(*_exact_sum(parts, 2))
    if p == 1 and real:
        return _round(*_exact_sum(parts, 1))
    if p == math.inf and real:
        return Wide.of(_peak(parts))
    if p in (1, math.inf):
        squares, exponent = _whole_squares(arrays)
        return _round(*_sum_of_roots(squares, exponent)) if p == 1 else _round_root(max(squares, default=0), exponent)
    return _decimal_norm(arrays, p)


def _exact_sum(parts: Sequence[Array], power: int) -> tuple[int, int]:
    """Sum of |x|**power as (integer, exponent of two): exact, whatever the magnitudes.

    Every element is a 53-bit integer times a power of two. Its square is cut into pieces of 27 bits, and pieces of
    equal weight are summed in float64, where a chunk of them cannot round.
    """
    bits, half, offset = 53, 27, 2 * (1074 + 53)
    mask = (1 << half) - 1
    total = 0
    for part in parts:
        for x in chunks(part):
            mantissa, exponents = np.frexp(np.abs(x))
            whole = np.ldexp(mantissa, bits).astype(np.int64)
            exponents = (exponents - bits).astype(np.int64)
            base = int(exponents.min())
            high, low = whole >> half, whole & mask
            products = [(whole, 0)] if power == 1 else [(high * high, 2 * half), (high * low, half + 1), (low * low, 0)]
            for product, shift in products:
                for piece, weight in ((product >> half, shift + half), (product & mask, shift)):
                    sums = np.bincount(exponents - base, weights=piece)
                    for index in np.flatnonzero(sums):
                        total += int(sums[index]) << (power * (base + int(index)) + weight + offset)
    return total, -offset


def _round(whole: int, exponent: int) -> Wide:
    """The value whole * 2**exponent, rounded once to 53 bits."""
    drop = max(whole.bit_length() - 64, 0)
    sticky = bool(whole & ((1 << drop) - 1))
    return Wide.of(float((whole >> drop) | sticky), drop + exponent)


def _round_root(whole: int, exponent: int) -> Wide:
    """The root sqrt(whole * 2**exponent), rounded once to 53 bits."""
    shift = max(128 - whole.bit_length(), 0)
    shift += (shift + exponent) % 2
    whole <<= shift
    root = math.isqrt(whole)
    # one more bit, set where the root is inexact, so that rounding sees which side of a tie it is on
    return _round(root << 1 | (root * root != whole), (exponent - shift) // 2 - 1)


def _whole_squares(arrays: Sequence[Array]) -> tuple[list[int], int]:
    """|z|**2 of every element as (integers, their common exponent of two), exactly."""
    ratios = [
        [v.as_integer_ratio() for v in values]
        for array in arrays
        for values in zip(*(part.astype(np.float64).ravel().tolist() for part in reals(array)), strict=True)
    ]
    unit = max((denominator for ratio in ratios for _, denominator in ratio), default=1)  # all are powers of two
    squares = [sum((n * (unit // d)) ** 2 for n, d in ratio) for ratio in ratios]
    return squares, -2 * (unit.bit_length() - 1)


def _sum_of_roots(squares: Sequence[int], exponent: int) -> tuple[int, int]:
    """Sum of the roots of squares * 2**exponent, which is even: exact where they all are.

    A sum that has an irrational root in it is never a tie, so that its last bit, set, tells on which side of one it is.
    """
    spare = 128  # bits below the last one of the elements themselves
    roots = [math.isqrt(square << 2 * spare) for square in squares]
    inexact = any(root * root != square << 2 * spare for root, square in zip(roots, squares, strict=True))
    return sum(roots) << 1 | inexact, exponent // 2 - spare - 1


def _decimal_norm(arrays: Sequence[Array], p: float) -> Wide:
    """The p-norm to 60 decimal digits, element by element: slow, and asked for about once in a million calls."""
    with decimal.localcontext(prec=60, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN):
        squares = [
            sum((decimal.Decimal(v) ** 2 for v in values), decimal.Decimal(0))
            for array in arrays
            for values in zip(*(part.astype(np.float64).ravel().tolist() for part in reals(array)), strict=True)
        ]
        top = max(squares, default=decimal.Decimal(0))
        norm = top.sqrt()
        if top:
            # of the largest square, since even a decimal's exponent has an end: p may be 1e300
            power = decimal.Decimal(p)
            norm *= sum(((s / top) ** (power / 2) for s in squares if s), decimal.Decimal(0)) ** (1 / power)
        numerator, denominator = norm.as_integer_ratio()
    shift = max(128 - numerator.bit_length() + denominator.bit_length(), 0)
    whole, rest = divmod(numerator << shift, denominator)
    return _round(whole << 1 | bool(rest), -shift - 1)


def quotient(max_norm: float, norm: Wide) -> Wide:
    """max_norm / norm, rounded once to 53 bits."""
    bound = Wide.of(max_norm)
    return Wide.of(bound.mantissa / norm.mantissa, bound.exponent - norm.exponent)


def multiplier(scale: Wide, dtype: type[np.floating[Any]]) -> np.floating[Any] | Wide:
    """The factor as it is multiplied: in float32 for float32 and narrower unless it would be subnormal there."""
    if dtype is np.float32:
        rounded = np.float32(float(scale))
        if rounded >= np.finfo(np.float32).tiny:
            return rounded
    wide = float(scale)
    return np.float64(wide) if wide >= np.finfo(np.float64).tiny else scale


def empty_like(array: Array) -> Array:
    """An uninitialised array of the same shape, dtype and order of axes, aligned to 64 bytes."""
    memory = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    flat = memory[start : start + array.nbytes].view(array.dtype)
    order = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    permuted = flat.reshape([array.shape[axis] for axis in order])
    return permuted.transpose(np.argsort(order)) if array.ndim else permuted


def scale_into(array: Array, scale: Wide, out: Array) -> None:
    """Write array * scale into `out`: one multiply in the multiply's dtype, one rounding to the array's dtype."""
    with np.errstate(all="ignore"):
        for source, target in zip(reals(array), reals(out), strict=True):
            _scale_real(source, multiplier(scale, MULTIPLY_DTYPE[array.dtype.name]), target)


def _scale_real(array: Array, factor: np.floating[Any] | Wide, out: Array) -> None:
    if isinstance(factor, Wide):
        # the factor itself would be subnormal in float64: its power of two follows the multiply
        np.multiply(array, factor.mantissa, out=out)
        np.ldexp(out, factor.exponent, out=out)
    elif array.dtype == factor.dtype:
        np.multiply(array, factor, out=out)
    else:
        # a float32 product is rounded on its way out of the buffer, a float64 one by round_once
        product_dtype = factor.dtype if factor.dtype == np.float32 else out.dtype
        with _iterate([array, out], [["readonly"], ["writeonly"]], [factor.dtype, product_dtype]) as pairs:
            for x, y in pairs:
                product = x * factor
                y[...] = product if product.dtype == y.dtype else round_once(product, y.dtype)


def round_once(values: Array, dtype: np.dtype[Any]) -> Array:
    """float64 values rounded once to a narrower dtype.

    ml_dtypes goes through float32 and rounds twice; setting the last bit of an inexact float32 prevents that.
    """
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32 if dtype.name == "bfloat16" else dtype)
    if dtype.name != "bfloat16":
        return narrow
    bits = narrow.view(np.uint32)
    inexact = narrow != values
    bits -= np.abs(narrow) > np.abs(values)
    bits |= inexact
    return narrow.astype(dtype)


def bound_in(value: float, dtype: np.dtype[Any]) -> Array:
    """A clamp's bound in the array's dtype, a 0-d array; a finite bound beyond its range is its largest number."""
    rounded = np.asarray(round_once(np.array([value]), dtype)[0], dtype)
    if math.isfinite(value) and not np.isfinite(rounded):
        bits = {"float16": 0x7BFF, "bfloat16": 0x7F7F, "float32": 0x7F7FFFFF}[dtype.name]
        largest = np.array(bits, f"u{dtype.itemsize}").view(dtype.newbyteorder("=")).astype(dtype)
        return np.negative(largest) if value < 0 else largest
    return rounded
