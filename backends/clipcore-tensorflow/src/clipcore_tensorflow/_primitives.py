"""Measure, decide, apply as TensorFlow operations: in traced functions, under XLA, on devices, under differentiation.

A norm, or a factor, is carried as mantissa * 2**exponent, two 0-d tensors, so that it cannot leave the range of
float64. Squares are summed in float64, in rows, so that rounding does not pile up and only a part of a large tensor
is widened at a time. TensorFlow's CPU threads flush subnormal numbers to zero, as inputs and as results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from clipcore.backend import NonFiniteMode
from clipcore.clipping.kernels import bound_in
from clipcore.clipping.report import ClipReport
from clipcore.errors import InvalidInput, NonFinite

_ROW = 256  # elements that are summed one after the other
_PART = 1 << 19  # elements that are widened to float64 at a time
_BITS, _BIAS = 52, 1023  # of float64: bits of the mantissa, bias of the exponent
_FAULT_SCALES = {"propagate": math.nan, "raise": math.nan, "skip": 0.0}
# the exponents that a first factor takes; two more take what is left
_FIRST = {tf.float32: 100, tf.float64: 1000}


class _Measure(NamedTuple):
    """The p-norm mantissa * 2**exponent of some tensors, and how many elements are not finite."""

    mantissa: tf.Tensor
    exponent: tf.Tensor
    nonfinite: tf.Tensor
    p: float


class _Scale(NamedTuple):
    """The factor mantissa * 2**exponent; `acts` is false where it is exactly one."""

    mantissa: tf.Tensor
    exponent: tf.Tensor
    acts: tf.Tensor


class TensorFlowPrimitives:
    """`clipcore.backend.Primitives` over tf.Tensor and tf.IndexedSlices of any device."""

    def measure(self, tensors: Sequence[Any], p: float, *, zero_nonfinite: bool) -> tuple[list[Any], _Measure]:
        given = [_coalesced(tensor) for tensor in tensors]
        mantissa, exponent = _norm(given, p)
        faulty = ~tf.math.is_finite(mantissa)
        # counting takes as long as summing, and a norm tells that there is nothing to count
        (faults,) = _choose(faulty, lambda: [_count(given, _not_finite)], lambda: [tf.zeros([], tf.int64)])
        if zero_nonfinite:

            def zeroed() -> list[Any]:
                finite = [_map(_finite_or_zero, tensor) for tensor in given]
                return [*finite, *_norm(finite, p)]

            *given, mantissa, exponent = _choose(faulty, zeroed, lambda: [*given, mantissa, exponent])
        return given, _Measure(mantissa, exponent, faults, p)

    def decide(
        self, measures: Sequence[_Measure], max_norm: float, nonfinite: NonFiniteMode
    ) -> tuple[list[_Scale], ClipReport]:
        norms = tf.stack([measure.mantissa for measure in measures])
        exponents = tf.stack([measure.exponent for measure in measures])
        faults = tf.add_n([measure.nonfinite for measure in measures])
        # the limit in the norms' unit may leave the range, and then the comparison is right all the same
        over = norms > _times_power(tf.constant(max_norm, tf.float64), -exponents)
        bound, shift = math.frexp(max_norm) if math.isfinite(max_norm) else (1.0, 0)
        # where, not a branch: it would wait for the device; the inner one keeps derivatives finite
        one = tf.ones_like(norms)
        scales, carried = _split(tf.where(over, tf.constant(bound, tf.float64) / tf.where(over, norms, one), one))
        shifts = tf.where(over, carried + shift - exponents, carried)
        norms = _times_power(norms, exponents)
        if nonfinite != "zero":
            fault = _fault(faults, nonfinite)
            scales = tf.where(fault, tf.constant(_FAULT_SCALES[nonfinite], tf.float64), scales)
            shifts = tf.where(fault, tf.zeros_like(shifts), shifts)
            norms, over = tf.where(fault, tf.constant(math.nan, tf.float64), norms), over | fault
        factors = _times_power(scales, shifts)
        joint = _joint(norms, measures[0].p)
        report = ClipReport(joint, _smallest(factors), tf.reduce_any(over), faults, norms, factors)
        parts = zip(tf.unstack(scales), tf.unstack(shifts), tf.unstack(over), strict=True)
        return [_Scale(*part) for part in parts], report

    def apply(self, tensors: Sequence[Any], scale: _Scale) -> list[Any]:
        if not tensors:
            return []
        factors = {dtype: _factors(scale, dtype) for dtype in {_multiply_dtype(_values(t)) for t in tensors}}
        ordinary = scale.exponent >= -min(_FIRST.values())

        def scaled() -> list[Any]:
            return _choose(
                ~ordinary,
                lambda: [_map(lambda x: _scaled(x, factors, steps=3), tensor) for tensor in tensors],
                lambda: [_map(lambda x: _scaled(x, factors, steps=1), tensor) for tensor in tensors],
            )

        return _choose(scale.acts, scaled, lambda: list(tensors))

    def clamp(
        self, tensors: Sequence[Any], low: float, high: float, nonfinite: NonFiniteMode
    ) -> tuple[list[Any], ClipReport]:
        coalesced = [_coalesced(tensor) for tensor in tensors]
        faults = _count(coalesced, tf.math.is_nan)
        if nonfinite == "zero":
            coalesced = [_map(_number_or_zero, tensor) for tensor in coalesced]
        norm = _times_power(*_norm(coalesced, 2.0))
        clamped = [_map(lambda x: _clamped(x, low, high), tensor) for tensor in coalesced]
        changed = _count(coalesced, lambda x: (x < _bound(low, x)) | (x > _bound(high, x))) > 0
        scale = tf.ones([], tf.float64)
        if nonfinite != "zero":
            fault = _fault(faults, nonfinite)
            scale = tf.where(fault, tf.constant(_FAULT_SCALES[nonfinite], tf.float64), scale)
            norm, changed = tf.where(fault, tf.constant(math.nan, tf.float64), norm), changed | fault
            clamped = self.apply(clamped, _Scale(scale, tf.zeros([], tf.int64), fault))
        return clamped, ClipReport(norm, scale, changed, faults, norm[None], scale[None])


def _choose(condition: tf.Tensor, yes: Callable[[], list[Any]], no: Callable[[], list[Any]]) -> list[Any]:
    """`yes` where the condition holds, else `no`, which must be what `yes` gives anyhow.

    A graph on the CPU leaves out what is not needed; on a device a branch would wait for the condition.
    """
    if tf.executing_eagerly() or tf.config.get_visible_devices("GPU"):
        return yes()
    chosen: list[Any] = tf.cond(condition, yes, no)
    return chosen


def _values(tensor: Any) -> tf.Tensor:
    return tensor.values if isinstance(tensor, tf.IndexedSlices) else tf.convert_to_tensor(tensor)


def _map(function: Callable[[tf.Tensor], tf.Tensor], tensor: Any) -> Any:
    """`function` of the values of a dense or sparse tensor."""
    if isinstance(tensor, tf.IndexedSlices):
        return tf.IndexedSlices(function(tensor.values), tensor.indices, tensor.dense_shape)
    return function(tf.convert_to_tensor(tensor))


def _coalesced(tensor: Any) -> Any:
    """A sparse tensor whose rows of one index were summed; the rows that are left over are zeros of some index in it.

    Sorted, not tf.unique: the number of rows stays, so that XLA can compile it and no device is waited for.
    """
    if not isinstance(tensor, tf.IndexedSlices):
        return tensor
    if tensor.values.shape[:1].num_elements() == 0:
        return tensor
    order = tf.argsort(tensor.indices, stable=True)
    indices = tf.gather(tensor.indices, order)
    first = tf.concat([tf.zeros_like(indices[:1], tf.int32), tf.cast(indices[1:] != indices[:-1], tf.int32)], 0)
    segments, count = tf.cumsum(first), tf.size(indices)
    wide = tf.complex128 if tensor.dtype.is_complex else tf.float64
    total = tf.math.unsorted_segment_sum(tf.gather(tf.cast(tensor.values, wide), order), segments, count)
    kept = tf.math.unsorted_segment_max(indices, segments, count)
    kept = tf.where(tf.range(count) <= tf.reduce_max(segments), kept, indices[:1])
    return tf.IndexedSlices(tf.cast(total, tensor.dtype), kept, tensor.dense_shape)


def _reals(x: tf.Tensor) -> list[tf.Tensor]:
    return [tf.math.real(x), tf.math.imag(x)] if x.dtype.is_complex else [x]


def _not_finite(x: tf.Tensor) -> tf.Tensor:
    return ~_is_finite(x)


def _is_finite(x: tf.Tensor) -> tf.Tensor:
    real, *imaginary = (tf.math.is_finite(part) for part in _reals(x))
    return real & imaginary[0] if imaginary else real


def _finite_or_zero(x: tf.Tensor) -> tf.Tensor:
    return tf.where(_is_finite(x), x, tf.zeros_like(x))


def _number_or_zero(x: tf.Tensor) -> tf.Tensor:
    return tf.where(tf.math.is_nan(x), tf.zeros_like(x), x)


def _count(tensors: Sequence[Any], is_fault: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """Number of elements for which `is_fault` holds, a 0-d int64 tensor."""
    counts = [tf.math.count_nonzero(is_fault(_values(tensor)), dtype=tf.int64) for tensor in tensors]
    return tf.add_n(counts) if counts else tf.zeros([], tf.int64)


def _fault(faults: tf.Tensor, nonfinite: NonFiniteMode) -> tf.Tensor:
    """Whether the policy's word on non-finite elements takes effect."""
    if nonfinite == "raise":
        if not tf.executing_eagerly():
            raise InvalidInput(
                "nonfinite='raise' reads the gradients, which a traced function cannot; use 'propagate', 'zero' or "
                "'skip' there, or clip outside of tf.function"
            )
        if count := int(faults):
            raise NonFinite(f"{count} elements are inf or NaN, and the policy has nonfinite='raise'")
    return faults > 0


def _norm(tensors: Sequence[Any], p: float) -> tuple[tf.Tensor, tf.Tensor]:
    """The joint p-norm as (mantissa, exponent): the mantissa in [0.5, 1), or 0, or inf or NaN where an element is."""
    tensors = [x for x in map(_values, tensors) if x.shape.num_elements() != 0]
    if not tensors:
        return tf.zeros([], tf.float64), tf.zeros([], tf.int64)
    if p == 2 and not any(x.dtype in (tf.float64, tf.complex128) for x in tensors):
        parts = [part for x in tensors for part in _reals(x)]
        return _split(tf.sqrt(tf.add_n([_sum(part, tf.square) for part in parts])))
    # relative to the largest element nothing overflows, and what underflows does not count
    peak = tf.reduce_max(tf.stack([_peak(x) for x in tensors]))
    _, exponent = _split(tf.where(tf.math.is_finite(peak) & (peak > 0), peak, tf.ones_like(peak)))
    # an inf or NaN is the norm itself
    mantissa, shift = _split(tf.where(tf.math.is_finite(peak), _power_norm(tensors, p, exponent), peak))
    return mantissa, exponent + shift


def _power_norm(tensors: Sequence[tf.Tensor], p: float, exponent: tf.Tensor) -> tf.Tensor:
    """The p-norm of the tensors divided by 2**exponent, which is close to their largest magnitude."""

    def magnitudes(x: tf.Tensor) -> tf.Tensor:
        real, *imaginary = (tf.abs(_times_power(tf.cast(part, tf.float64), -exponent)) for part in _reals(x))
        return tf.sqrt(real * real + imaginary[0] * imaginary[0]) if imaginary else real

    if p in (1, 2):
        return _power_of(tf.add_n([_sum(x, lambda part: _power_of(magnitudes(part), p)) for x in tensors]), 1 / p)
    largest = tf.reduce_max(tf.stack([tf.zeros([], tf.float64), *(tf.reduce_max(magnitudes(x)) for x in tensors)]))
    if p == math.inf:
        return largest
    # divided by the largest itself, since (1/2)**p and sqrt(2)**p may leave the range
    unit = tf.where(largest > 0, largest, tf.ones_like(largest))
    return _power_of(tf.add_n([_sum(x, lambda part: (magnitudes(part) / unit) ** p) for x in tensors]), 1 / p) * unit


def _power_of(x: tf.Tensor, p: float) -> tf.Tensor:
    return {1: tf.identity, 2: tf.square, 0.5: tf.sqrt}.get(p, lambda base: base**p)(x)


def _peak(x: tf.Tensor) -> tf.Tensor:
    """The largest magnitude of the real parts in float64; NaN where one is NaN."""
    magnitudes = [tf.reduce_max(tf.abs(part)) for part in _reals(x)]
    largest = tf.reduce_max(tf.stack([tf.cast(magnitude, tf.float64) for magnitude in magnitudes]))
    faulty = tf.reduce_any(tf.math.is_nan(tf.stack(magnitudes)))
    for part in _reals(x):
        faulty |= tf.reduce_any(tf.math.is_nan(part))  # a maximum may pass over NaN
    return tf.where(faulty, tf.constant(math.nan, tf.float64), tf.maximum(largest, tf.zeros([], tf.float64)))


def _sum(x: tf.Tensor, function: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """The sum of function(x) in float64."""

    def part_sum(part: tf.Tensor) -> tf.Tensor:
        return _row_sum(function(part if part.dtype.is_complex else tf.cast(part, tf.float64)))

    flat = tf.reshape(x, [-1])
    size = flat.shape.num_elements()
    if tf.executing_eagerly() or size is None or size <= 2 * _PART:
        return part_sum(flat)
    whole = size // _PART
    parts = tf.map_fn(  # one part at a time is widened
        lambda index: part_sum(tf.slice(flat, [index * _PART], [_PART])),
        tf.range(whole),
        parallel_iterations=1,
        fn_output_signature=tf.TensorSpec([], tf.float64),
    )
    return tf.reduce_sum(parts) + part_sum(flat[whole * _PART :])


def _row_sum(x: tf.Tensor) -> tf.Tensor:
    """The sum of a vector, in rows of rows, so that at most a few hundred numbers are added in a row."""
    size = x.shape.num_elements()
    if size is None:
        return tf.reduce_sum(x)
    if size <= _ROW:
        return tf.reduce_sum(x)
    rows = size // _ROW
    return _row_sum(tf.reduce_sum(tf.reshape(x[: rows * _ROW], [rows, _ROW]), 1)) + tf.reduce_sum(x[rows * _ROW :])


def _split(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """(mantissa, exponent) with x = mantissa * 2**exponent, the mantissa in [0.5, 1); 0, inf and NaN stay themselves.

    By the bits, since TensorFlow has no frexp.
    """
    field = tf.bitwise.right_shift(tf.bitcast(tf.stop_gradient(x), tf.int64), tf.constant(_BITS, tf.int64)) & 0x7FF
    normal = (field > 0) & (field < 0x7FF)
    exponent = tf.where(normal, field - (_BIAS - 1), tf.zeros_like(field))
    return _times_power(x, -exponent), exponent


def _power(exponent: tf.Tensor) -> tf.Tensor:
    """2**exponent, exactly, for exponents of normal float64 numbers."""
    return tf.bitcast(tf.bitwise.left_shift(exponent + _BIAS, tf.constant(_BITS, tf.int64)), tf.float64)


def _times_power(x: tf.Tensor, exponent: tf.Tensor) -> tf.Tensor:
    """Multiply by 2**exponent in two steps, since 2**exponent itself may leave the range."""
    exponent = tf.clip_by_value(exponent, tf.constant(2 - 2 * _BIAS, tf.int64), tf.constant(2 * _BIAS, tf.int64))
    half = tf.bitwise.right_shift(exponent, tf.constant(1, tf.int64))
    # a division, since grappler would multiply two scalars first, and their product may be subnormal
    return x * _power(half) / _power(half - exponent)


def _joint(norms: tf.Tensor, p: float) -> tf.Tensor:
    """The norm of all groups together, from theirs."""
    if norms.shape[0] == 1:
        return norms[0]
    top = tf.reduce_max(tf.stop_gradient(norms))
    unit = tf.where(tf.math.is_finite(top) & (top > 0), top, tf.ones_like(top))
    ratios = norms / unit
    if p == math.inf:
        return tf.reduce_max(ratios) * unit + tf.reduce_sum(ratios - ratios)  # NaN stays NaN
    return _power_of(tf.reduce_sum(_power_of(ratios, p)), 1 / p) * unit


def _smallest(factors: tf.Tensor) -> tf.Tensor:
    return tf.reduce_min(factors) + tf.reduce_sum(factors - factors)  # NaN where one is NaN


def _multiply_dtype(x: tf.Tensor) -> tf.DType:
    return tf.float64 if x.dtype in (tf.float64, tf.complex128) else tf.float32


def _factors(scale: _Scale, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """A factor as three normal numbers of the dtype; the last two, powers of two, are 1 where it is one itself."""
    first = _FIRST[dtype]
    factor = _times_power(scale.mantissa, tf.maximum(scale.exponent, -first))
    rest = [tf.clip_by_value(scale.exponent + n * first, tf.constant(-first, tf.int64), 0) for n in (1, 2)]
    return tf.cast(factor, dtype), tf.cast(_power(-rest[0]), dtype), tf.cast(_power(rest[1]), dtype)


def _scaled(x: tf.Tensor, factors: Mapping[tf.DType, tuple[tf.Tensor, ...]], steps: int) -> tf.Tensor:
    """Multiply in the multiply's dtype; a factor of 0 gives zeros and NaN NaN, whatever `x` holds."""
    if x.dtype.is_complex:
        return tf.complex(*(_scaled(part, factors, steps) for part in _reals(x)))
    dtype = _multiply_dtype(x)
    factor, divisor, last = factors[dtype]
    product = tf.math.multiply_no_nan(tf.cast(x, dtype), factor)
    if steps > 1:
        product = product / divisor * last  # a division, as in _times_power
    return tf.cast(product, x.dtype)


def _bound(value: float, x: tf.Tensor) -> tf.Tensor:
    """A clamp's bound rounded to a tensor's dtype; a finite bound beyond its range is its largest number."""
    return tf.constant(bound_in(value, x.dtype.as_numpy_dtype(0).dtype), x.dtype)


def _clamped(x: tf.Tensor, low: float, high: float) -> tf.Tensor:
    # where, since what a minimum makes of NaN depends on the device
    bounded = tf.where(x < _bound(low, x), _bound(low, x), x)
    return tf.where(x > _bound(high, x), _bound(high, x), bounded)
