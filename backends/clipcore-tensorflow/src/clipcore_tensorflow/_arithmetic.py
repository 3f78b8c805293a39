"""Functions of the numbers that norms and states are, as TensorFlow operations: what NumPy's of their names do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf


class Arithmetic:
    """`clipcore.backend.Arithmetic` over tf.Tensor."""

    def array(self, value: Any) -> tf.Tensor:
        return _tensor(value)

    def where(self, condition: Any, yes: Any, no: Any) -> tf.Tensor:
        return tf.where(condition, *_alike(yes, no))

    def sqrt(self, x: Any) -> tf.Tensor:
        return tf.sqrt(_tensor(x))

    def exp(self, x: Any) -> tf.Tensor:
        return tf.exp(_tensor(x))

    def hypot(self, x: Any, y: Any) -> tf.Tensor:
        x, y = (tf.abs(value) for value in _alike(x, y))
        largest = tf.maximum(x, y)
        unit = tf.where((largest > 0) & tf.math.is_finite(largest), largest, tf.ones_like(largest))
        return tf.sqrt(tf.square(x / unit) + tf.square(y / unit)) * unit

    # where, since whether TensorFlow's own pass over NaN depends on the device
    def minimum(self, x: Any, y: Any) -> tf.Tensor:
        x, y = _alike(x, y)
        return tf.where((x <= y) | _is_nan(x), x, y)

    def maximum(self, x: Any, y: Any) -> tf.Tensor:
        x, y = _alike(x, y)
        return tf.where((x >= y) | _is_nan(x), x, y)

    def mean(self, x: Any) -> tf.Tensor:
        return tf.reduce_mean(tf.cast(x, tf.float64))

    def arange(self, count: int) -> tf.Tensor:
        return tf.range(count, dtype=tf.int64)

    def percentile(self, values: tf.Tensor, count: Any, q: float) -> tf.Tensor:
        count = tf.cast(count, tf.int64)
        size = tf.size(values, tf.int64)
        ordered = tf.sort(tf.where(tf.range(size) < count, values, tf.constant(values.dtype.max, values.dtype)))
        place = tf.cast(count - 1, tf.float64) * (q / 100)
        below = tf.cast(tf.floor(place), tf.int64)
        low, high = tf.gather(ordered, below), tf.gather(ordered, tf.minimum(below + 1, count - 1))
        part = place - tf.floor(place)
        # from the nearer end, as NumPy does
        return tf.where(part < 0.5, low + (high - low) * part, high - (high - low) * (1 - part))

    def take(self, values: tf.Tensor, places: Sequence[int]) -> tf.Tensor:
        return tf.gather(values, list(places))

    def put(self, values: tf.Tensor, places: Sequence[int], new: tf.Tensor) -> tf.Tensor:
        return tf.tensor_scatter_nd_update(values, [[place] for place in places], new)


def _tensor(value: Any) -> tf.Tensor:
    return tf.constant(value, tf.float64) if isinstance(value, float) else tf.convert_to_tensor(value)


def _alike(x: Any, y: Any) -> tuple[tf.Tensor, tf.Tensor]:
    """Two values as tensors of one dtype: a float's where one is, of two the tensor's."""
    values = [value if tf.is_tensor(value) else _tensor(value) for value in (x, y)]
    rank = [(value.dtype.is_floating, tf.is_tensor(given)) for value, given in zip(values, (x, y), strict=True)]
    dtype = values[rank.index(max(rank))].dtype
    return tf.cast(values[0], dtype), tf.cast(values[1], dtype)


def _is_nan(x: tf.Tensor) -> tf.Tensor:
    return tf.math.is_nan(x) if x.dtype.is_floating else tf.zeros_like(x, tf.bool)
