"""The elements of dense and sparse tensors: which are faults, and what is done to each on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from clipcore.clipping.kernels import bound_in


def values_of(tensor: Any) -> tf.Tensor:
    """The values of a dense or sparse tensor, or of a variable."""
    return tensor.values if isinstance(tensor, tf.IndexedSlices) else tf.convert_to_tensor(tensor)


def map_values(function: Callable[[tf.Tensor], tf.Tensor], tensor: Any) -> Any:
    """`function` of the values of a dense or sparse tensor."""
    if isinstance(tensor, tf.IndexedSlices):
        return tf.IndexedSlices(function(tensor.values), tensor.indices, tensor.dense_shape)
    return function(tf.convert_to_tensor(tensor))


def coalesced(tensor: Any) -> Any:
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


def reals(x: tf.Tensor) -> list[tf.Tensor]:
    """The tensor as real ones: itself, or its real and imaginary parts."""
    return [tf.math.real(x), tf.math.imag(x)] if x.dtype.is_complex else [x]


def is_wide(x: tf.Tensor) -> bool:
    """Whether the tensor is multiplied in float64; all others in float32."""
    return x.dtype in (tf.float64, tf.complex128)


def multiply_dtype(x: tf.Tensor) -> tf.DType:
    """The real dtype in which the tensor's elements are multiplied."""
    return tf.float64 if is_wide(x) else tf.float32


def not_finite(x: tf.Tensor) -> tf.Tensor:
    return ~is_finite(x)


def is_finite(x: tf.Tensor) -> tf.Tensor:
    real, *imaginary = (tf.math.is_finite(part) for part in reals(x))
    return real & imaginary[0] if imaginary else real


def finite_or_zero(x: tf.Tensor) -> tf.Tensor:
    return tf.where(is_finite(x), x, tf.zeros_like(x))


def number_or_zero(x: tf.Tensor) -> tf.Tensor:
    return tf.where(tf.math.is_nan(x), tf.zeros_like(x), x)


def count(tensors: Sequence[Any], holds: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """Number of elements for which `holds` does, a 0-d int64 tensor."""
    counts = [tf.math.count_nonzero(holds(values_of(tensor)), dtype=tf.int64) for tensor in tensors]
    return tf.add_n(counts) if counts else tf.zeros([], tf.int64)


def clamped(x: tf.Tensor, low: float, high: float) -> tf.Tensor:
    """Each element bounded to [low, high]; NaN stays."""
    # where, since what a minimum makes of NaN depends on the device
    bounded = tf.where(x < _bound(low, x), _bound(low, x), x)
    return tf.where(x > _bound(high, x), _bound(high, x), bounded)


def outside(x: tf.Tensor, low: float, high: float) -> tf.Tensor:
    return (x < _bound(low, x)) | (x > _bound(high, x))


def _bound(value: float, x: tf.Tensor) -> tf.Tensor:
    """A clamp's bound rounded to a tensor's dtype; a finite bound beyond its range is its largest number."""
    return tf.constant(bound_in(value, x.dtype.as_numpy_dtype(0).dtype), x.dtype)


def despiked(
    x: tf.Tensor, moment: tf.Tensor, threshold: float, decay: float, acts: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """(the tensor without spikes, the second moment after this step, whether it had any)"""
    wide, before = tf.cast(x, tf.float64), tf.cast(moment, tf.float64)
    over = acts & (tf.square(wide) > threshold * before)
    bounds = tf.sqrt(threshold * before)
    stored = tf.where(over, round_once(tf.where(wide < 0, -bounds, bounds), x.dtype), x)
    after = decay * before + (1 - decay) * tf.square(tf.cast(stored, tf.float64))
    after = tf.minimum(after, tf.constant(moment.dtype.max, tf.float64))  # a state stays finite
    return stored, tf.cast(after, moment.dtype), tf.reduce_any(over)


def round_once(values: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """float64 values rounded once to a narrower dtype.

    TensorFlow goes through float32 to the half precisions; the last bit of an inexact float32, set, prevents that it
    rounds twice.
    """
    if dtype not in (tf.float16, tf.bfloat16):
        return tf.cast(values, dtype)
    narrow = tf.cast(values, tf.float32)
    widened = tf.cast(narrow, tf.float64)
    bits = tf.bitcast(narrow, tf.int32) - tf.cast(tf.abs(widened) > tf.abs(values), tf.int32)
    bits = tf.bitwise.bitwise_or(bits, tf.cast(widened != values, tf.int32))
    return tf.cast(tf.bitcast(bits, tf.float32), dtype)


def total(x: tf.Tensor) -> tf.Tensor:
    """The sum over the first axis, in float64, rounded once."""
    if x.dtype.is_complex:
        return tf.cast(tf.reduce_sum(tf.cast(x, tf.complex128), 0), x.dtype)
    return round_once(tf.reduce_sum(tf.cast(x, tf.float64), 0), x.dtype)
