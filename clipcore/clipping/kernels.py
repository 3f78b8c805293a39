"""The CPU kernels, on NumPy arrays: norms with a known error bound, exact norms, scaling, clamping.

Numbers that may leave the range of float64 (a norm of float64 tensors, the factor it leads to) are carried as `Wide`.
"""

from __future__ import annotations

import decimal
import functools
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

name_of: Callable[[np.dtype[Any]], str] = functools.cache(lambda dtype: dtype.name)  # NumPy builds it anew each time

_CHUNK = 1 << 15  # elements; their float64 copies stay in the L2 cache
# NumPy sums a chunk pairwise (at most 28 roundings in a row), fsum adds one, squares and roots a few more; a power
# function is off by up to 4 ulp. 128 units of 2**-53 hold all of it.
RELATIVE_ERROR = 2.0**-46
_POWER_STEPS = 30
_ALIGNMENT = 64  # bytes; TensorFlow takes an array's memory as its own only where it is aligned so


class Wide(NamedTuple):
    """mantissa * 2**exponent, the mantissa 0 or in [0.5, 1): non-negative float64 numbers with unbounded exponents.

    Both are arrays of one shape, or numbers. A mantissa may be inf or NaN, and stands for it.
    """

    mantissa: Any
    exponent: Any

    @classmethod
    def of(cls, values: Any, exponents: Any = 0) -> Wide:
        """The numbers values * 2**exponents."""
        mantissa, shift = np.frexp(values)
        return cls(mantissa, np.where(mantissa == 0, _EXPONENT_OF_ZERO, np.asarray(shift, np.int64) + exponents))

    def to_float(self) -> Any:
        """As float64; inf beyond its range, 0 or subnormal below it."""
        with np.errstate(all="ignore"):
            # ldexp takes C's int
            return np.ldexp(self.mantissa, np.clip(self.exponent, -5000, 5000).astype(np.int32))

    def __float__(self) -> float:
        return float(self.to_float())

    def __getitem__(self, index: Any) -> Wide:
        return Wide(self.mantissa[index], self.exponent[index])

    def exceeds(self, other: Wide) -> Any:
        """Where this is the larger number; NaN and infinities are not."""
        larger = np.where(
            self.exponent == other.exponent, self.mantissa > other.mantissa, self.exponent > other.exponent
        )
        return larger & np.isfinite(other.mantissa) & np.isfinite(self.mantissa)

    def times(self, factor: float | Array) -> Wide:
        """Each number times a factor close to 1, rounded once."""
        return Wide.of(self.mantissa * factor, self.exponent)


_EXPONENT_OF_ZERO = -(1 << 40)  # below that of any other number


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


def norms(arrays: Sequence[Array], p: float) -> Wide:
    """The p-norm of each array, NaN where an element is inf or NaN: one pass over memory, two for float64 and for p
    other than 2. The relative error is at most `RELATIVE_ERROR`, also after `join`.
    """
    with np.errstate(all="ignore"):
        if p == 2 and all(is_narrow(array) for array in arrays):
            sums = [_sum(reals(array), 0, np.square) for array in arrays]
            # Sums of squares of float32 cannot overflow in float64: a non-finite sum means a non-finite element.
            return _finite_or_nan(Wide.of(np.sqrt(np.array(sums, np.float64))))
        each = [_norm(array, p) for array in arrays]
        return Wide(np.array([n.mantissa for n in each], np.float64), np.array([n.exponent for n in each], np.int64))


def is_narrow(array: Array) -> bool:
    """Whether squares of the array's elements fit float64: float32 and narrower."""
    return MULTIPLY_DTYPE[name_of(array.dtype)] is np.float32


def _finite_or_nan(wide: Wide) -> Wide:
    return Wide(np.where(np.isfinite(wide.mantissa), wide.mantissa, math.nan), wide.exponent)


def _norm(array: Array, p: float) -> Wide:
    peak = _peak(reals(array))
    if peak == 0 or not math.isfinite(peak):
        return Wide.of(peak if peak == 0 else math.nan)
    exponent = math.frexp(peak)[1]
    if p == 2:
        return Wide.of(math.sqrt(_sum(reals(array), exponent, np.square)), exponent)
    magnitudes = _magnitudes(array, exponent)
    largest = float(magnitudes.max())
    if p == math.inf:
        return Wide.of(largest, exponent)
    # Divided by the largest itself, since a power of two would leave (1/2)**p to underflow.
    total = math.fsum(float(np.power(x / largest, p).sum()) for x in chunks(magnitudes))
    return Wide.of(total ** (1 / p) * largest, exponent)


def _magnitudes(array: Array, exponent: int) -> Array:
    """|x| * 2**-exponent of real or complex elements, in float64."""
    parts = [np.ldexp(part.astype(np.float64), -exponent) for part in reals(array)]
    return np.abs(parts[0]) if len(parts) == 1 else np.hypot(*parts)


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


def unit_norms(array: Array, axes: Sequence[int]) -> Wide:
    """The L2 norm of each unit of an array, in the order of `axes`, which run over the units; NaN as in `norms`."""
    units = units_first(array, axes)
    count = units.shape[0]
    mantissa, exponent = np.zeros(count), np.full(count, _EXPONENT_OF_ZERO, np.int64)
    with np.errstate(all="ignore"):
        # a slice of units at a time is widened, so that no second array of float64 is made
        step = max(_CHUNK // max(units.size // max(count, 1), 1), 1)
        for start in range(0, count, step) if units.size else ():
            x = np.concatenate([part.astype(np.float64) for part in reals(units[start : start + step])], axis=1)
            shift = np.zeros(len(x), np.int64) if is_narrow(array) else np.frexp(np.abs(x).max(1))[1].astype(np.int64)
            root = np.sqrt(np.square(np.ldexp(x, -shift[:, None])).sum(1))
            mantissa[start : start + step], exponent[start : start + step] = Wide.of(root, shift)
    return _finite_or_nan(Wide(mantissa, exponent))


def concatenated(parts: Sequence[Wide]) -> Wide:
    """Vectors of numbers, one after the other."""
    mantissas = [np.zeros(0), *(part.mantissa for part in parts)]
    exponents = [np.zeros(0, np.int64), *(part.exponent for part in parts)]
    return Wide(np.concatenate(mantissas), np.concatenate(exponents))


def spectral_norm(array: Array, axes: Sequence[int], method: str) -> Wide:
    """The largest singular value of an array as a matrix of units, a vector of one; NaN as in `norms`."""
    matrix = units_first(array, axes)
    peak = _peak(reals(matrix))
    if peak == 0 or not math.isfinite(peak):
        return Wide.of(np.array([peak if peak == 0 else math.nan]))
    exponent = math.frexp(peak)[1]
    wide = matrix.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
    for half in (exponent // 2, exponent - exponent // 2):  # 2**-exponent itself may leave the range
        wide *= 2.0**-half
    if method == "svd":
        return Wide.of(np.linalg.svd(wide, compute_uv=False)[:1], exponent)
    vector = np.random.default_rng(0).standard_normal(wide.shape[1])
    for _ in range(_POWER_STEPS):
        image = wide @ vector
        vector = wide.conj().T @ image
        vector /= np.linalg.norm(vector) or 1.0
    return Wide.of(np.array([np.linalg.norm(wide @ vector)]), exponent)


def units_first(array: Array, axes: Sequence[int]) -> Array:
    """The array as (units, rest), a view where its strides allow one."""
    axes = [axis % array.ndim for axis in axes]
    rest = [axis for axis in range(array.ndim) if axis not in axes]
    count = math.prod(array.shape[axis] for axis in axes)
    return array.transpose([*axes, *rest]).reshape(count, math.prod(array.shape[axis] for axis in rest))


def join(each: Wide, p: float) -> Wide:
    """The joint p-norm of numbers along their first axis."""
    top = each.exponent.max(0, initial=_EXPONENT_OF_ZERO)
    relative = Wide(each.mantissa, each.exponent - top).to_float()
    largest = relative.max(0, initial=0.0)
    if p == math.inf:
        return Wide.of(largest, top)
    # relative to the largest itself, since (1/2)**p may underflow
    unit = np.where(largest > 0, largest, 1.0)
    # the axis that is summed lies last, where NumPy adds up pairwise
    sums = np.ascontiguousarray(np.moveaxis(np.power(relative / unit, p), 0, -1)).sum(-1)
    return Wide.of((np.sqrt(sums) if p == 2 else sums ** (1 / p)) * unit, top)


def exact_norm(arrays: Sequence[Array], p: float) -> Wide:
    """The joint p-norm of finite arrays, rounded once to 53 bits; independent of order and grouping."""
    real = all(array.dtype.kind != "c" for array in arrays)
    parts = [part for array in arrays for part in reals(array)]
    if p == 2:
        return root(*_exact_sum(parts, 2))
    if p == 1 and real:
        return _round(*_exact_sum(parts, 1))
    if p == math.inf and real:
        return Wide.of(_peak(parts))
    if p in (1, math.inf):
        squares, exponent = _whole_squares(arrays)
        return _round(*_sum_of_roots(squares, exponent)) if p == 1 else root(max(squares, default=0), exponent)
    return _decimal_norm(arrays, p)


def exceeds_exactly(arrays: Sequence[Array], limit: Wide) -> bool:
    """Whether the joint L2 norm of finite arrays, as a real number, is over a finite limit."""
    whole, exponent = _exact_sum([part for array in arrays for part in reals(array)], 2)
    root, place = int(math.ldexp(float(limit.mantissa), 53)), int(limit.exponent) - 53
    if not whole or not root:
        return whole > 0
    shift = exponent - 2 * place
    return (whole << max(shift, 0)) > (root * root << max(-shift, 0))


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


def root(whole: int, exponent: int) -> Wide:
    """The root sqrt(whole * 2**exponent), rounded once to 53 bits."""
    shift = max(128 - whole.bit_length(), 0)
    shift += (shift + exponent) % 2
    whole <<= shift
    floor = math.isqrt(whole)
    # one more bit, set where the root is inexact, so that rounding sees which side of a tie it is on
    return _round(floor << 1 | (floor * floor != whole), (exponent - shift) // 2 - 1)


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


def choose(condition: Any, yes: Wide, no: Wide) -> Wide:
    """`yes` where the condition holds, else `no`."""
    return Wide(*(np.where(condition, *parts) for parts in zip(yes, no, strict=True)))


def quotient(limit: Wide, norm: Wide) -> Wide:
    """The ratio limit / norm, rounded once to 53 bits."""
    with np.errstate(all="ignore"):
        return Wide.of(limit.mantissa / norm.mantissa, limit.exponent - norm.exponent)


def multiplier(factor: Wide, dtype: type[np.floating[Any]]) -> np.floating[Any] | Wide:
    """One factor as it is multiplied: in float32 for float32 and narrower unless it is not normal there."""
    wide = float(factor)
    if dtype is np.float32:
        rounded = np.float32(wide)
        if is_normal(rounded, np.float32):
            return rounded
    return np.float64(wide) if is_normal(wide, np.float64) else factor


def is_normal(factors: Any, dtype: type[np.floating[Any]]) -> Any:
    """Where positive factors, rounded to a dtype, are neither subnormal nor infinite in it, nor 0."""
    return (factors >= np.finfo(dtype).tiny) & (factors < math.inf)


def same_multiplier(first: Wide, second: Wide, dtype: type[np.floating[Any]]) -> Any:
    """Where two factors are one and the same as they are multiplied."""
    same = (first.mantissa == second.mantissa) & (first.exponent == second.exponent)
    if dtype is np.float64:
        return same
    with np.errstate(all="ignore"):
        narrow, other = (factor.to_float().astype(np.float32) for factor in (first, second))
    return same | ((narrow == other) & (narrow >= np.finfo(np.float32).tiny))


def empty_like(array: Array) -> Array:
    """An uninitialised array of the same shape, dtype and order of axes, aligned to 64 bytes."""
    memory = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    flat = memory[start : start + array.nbytes].view(array.dtype)
    order = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    permuted = flat.reshape([array.shape[axis] for axis in order])
    return permuted.transpose(np.argsort(order)) if array.ndim else permuted


def scale_into(array: Array, factor: Wide, out: Array) -> None:
    """Write array * factor into `out`: one multiply in the multiply's dtype, one rounding to the array's dtype."""
    with np.errstate(all="ignore"):
        for source, target in zip(reals(array), reals(out), strict=True):
            _scale_real(source, multiplier(factor, MULTIPLY_DTYPE[name_of(array.dtype)]), target)


def scale_units_into(array: Array, factors: Wide, axes: Sequence[int], out: Array) -> None:
    """`scale_into` with one factor per unit of the array, in the order of `axes`."""
    dtype = MULTIPLY_DTYPE[name_of(array.dtype)]
    with np.errstate(all="ignore"):
        plain = factors.to_float().astype(dtype)
        if is_normal(plain, dtype).all():
            spread = np.ones(array.ndim, int)
            spread[list(axes)] = [array.shape[axis] for axis in axes]
            for source, target in zip(reals(array), reals(out), strict=True):
                target[...] = source * plain.reshape(spread)
            return
    for index, unit in enumerate(_unit_indices(array, axes)):
        fill_or_scale(array[unit], factors[index], out[unit])


def _unit_indices(array: Array, axes: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """One index per unit, in the order of `axes`; it gives a view even where a unit is a single element."""
    for place in np.ndindex(*(array.shape[axis] for axis in axes)):
        index: list[Any] = [slice(None)] * array.ndim
        for axis, at in zip(axes, place, strict=True):
            index[axis] = slice(at, at + 1)
        yield tuple(index)


def fill_or_scale(array: Array, factor: Wide, out: Array) -> None:
    """`scale_into`, but a factor of 0 gives zeros and NaN NaN, whatever the array holds."""
    value = float(factor.mantissa)
    if value == 0 or math.isnan(value):
        out[...] = value * (1 + 1j) if array.dtype.kind == "c" else value
    else:
        scale_into(array, factor, out)


def _scale_real(array: Array, factor: np.floating[Any] | Wide, out: Array) -> None:
    if isinstance(factor, Wide):
        # the factor itself leaves the range of float64: where it is small, its power of two follows the multiply
        if factor.exponent < 0:
            np.multiply(array, float(factor.mantissa), out=out)
            np.ldexp(out, max(int(factor.exponent), -5000), out=out)
        else:
            np.ldexp(array, min(int(factor.exponent), 5000), out=out)
            np.multiply(out, float(factor.mantissa), out=out)
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


def epsilon(dtype: str) -> float:
    """One unit in the last place of 1."""
    return {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "complex64": 2.0**-23}.get(dtype, 2.0**-52)


def total(array: Array) -> Array:
    """The sum over the first axis, one after the other in float64, whatever the order of axes; rounded once."""
    wide = np.complex128 if array.dtype.kind == "c" else np.float64
    rows = array.astype(wide, order="C").reshape(len(array), math.prod(array.shape[1:]))
    with np.errstate(all="ignore"):
        # NumPy adds up an axis in order unless it is the last: a lone column it would add up pairwise
        summed = rows.sum(0) if rows.shape[1] != 1 or not len(rows) else np.add.accumulate(rows)[-1]
        summed = np.asarray(summed.reshape(array.shape[1:]) + 0.0)  # as a sum from 0 on: a lone -0 becomes 0
        return summed.astype(array.dtype) if array.dtype.kind == "c" else np.asarray(round_once(summed, array.dtype))


def despike(array: Array, moment: Array, out: Array, after: Array, threshold: float, decay: float) -> int:
    """Count an array's spikes, write it without them into `out` where it has any, and its next moment into `after`."""
    with np.errstate(all="ignore"):
        wide, before = array.astype(np.float64), moment.astype(np.float64)
        over = np.square(wide) > threshold * before
        if over.any():
            if out is not array:
                np.copyto(out, array)
            np.copyto(out, round_once(np.copysign(np.sqrt(threshold * before), wide), array.dtype), where=over)
            wide = out.astype(np.float64)
        moved = decay * before + (1 - decay) * np.square(wide)
        after[...] = np.minimum(moved, np.finfo(after.dtype).max)  # a state stays finite
        return int(np.count_nonzero(over))
