"""Factors lowered by what rounding can add, so that what is stored keeps its bound: no trial and error over the data.

A factor f leaves a number x at x * f * (1 + e), where e is at most half a unit in the last place of 1; where that is
subnormal, it is off by half the smallest subnormal number at most. With a factor smaller by as much, the norm of what
is stored is within the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import tensorflow as tf

from clipcore_tensorflow._elements import is_wide, reals
from clipcore_tensorflow._groups import Groups
from clipcore_tensorflow._norms import tensor_norms
from clipcore_tensorflow._wide import Wide

_NORM_ERROR = 2.0**-47  # what a norm that is summed in rows can be off by, relative, with room
_BITS = 24  # of float32


def lowered(tensors: Sequence[tf.Tensor], factors: Wide, limits: tf.Tensor, groups: Groups, sigma: Wide | None) -> Wide:
    """The factors for which what is stored keeps the limits, a little smaller than limit / norm.

    Args:
        sigma: the largest singular values, where those are what is limited: rounding adds to them what it adds to the
            L2 norm.
    """
    errors = _for_each_norm([tf.constant(_error(x), tf.float64) for x in tensors], groups, tf.reduce_max)
    if sigma is not None:
        frobenius = tensor_norms(tensors, 2.0)
        one = tf.ones_like(sigma.mantissa)
        ratio = frobenius.mantissa / tf.where(sigma.mantissa > 0, sigma.mantissa, one)
        errors *= tf.maximum(Wide(ratio, frobenius.exponent - sigma.exponent).to_float(), one)
    kept = _less_subnormal(tensors, factors, limits, groups)
    mantissa, exponent = Wide.of(factors.mantissa * (1 - errors - _NORM_ERROR) * kept, factors.exponent)
    narrow = _for_each_norm([tf.constant(not is_wide(x)) for x in tensors], groups, tf.reduce_any)
    # down to a number of float32, since the nearest one may be larger
    return Wide(tf.where(narrow, tf.floor(mantissa * 2.0**_BITS) * 2.0**-_BITS, mantissa), exponent)


def _error(x: tf.Tensor) -> float:
    """How much larger rounding can make an element, relative: once in the multiply's dtype, once in the tensor's."""
    own = float(_format(x).eps) / 2
    return own + (2.0**-_BITS if own > 2.0**-_BITS else 0.0)


def _less_subnormal(tensors: Sequence[tf.Tensor], factors: Wide, limits: tf.Tensor, groups: Groups) -> tf.Tensor:
    """The part of each limit that is left for the other elements."""
    spread = groups.spread(factors.to_float(), tensors)
    squares = [
        _subnormal(x, factor, axes) * (float(_format(x).smallest_subnormal) / 2) ** 2
        for x, factor, axes in zip(tensors, spread, groups.axes, strict=True)
    ]
    added = tf.sqrt(_for_each_norm(squares, groups, tf.reduce_sum))
    positive = limits > 0
    return tf.where(positive, tf.maximum(1 - added / tf.where(positive, limits, tf.ones_like(limits)), 0.0), 1.0)


def _subnormal(x: tf.Tensor, factor: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """How many elements of each unit are subnormal once they are multiplied."""
    threshold = tf.cast(float(_format(x).tiny) * 1.125 / factor, x.dtype.real_dtype)  # inf where it leaves the range
    rest = [axis for axis in range(x.shape.rank) if axis not in axes]
    small = [tf.abs(part) for part in reals(x)]
    counts = [tf.math.count_nonzero((part > 0) & (part < threshold), rest, dtype=tf.int64) for part in small]
    return tf.reshape(tf.cast(tf.add_n(counts), tf.float64), [-1])


def _for_each_norm(values: Sequence[tf.Tensor], groups: Groups, join: Any) -> tf.Tensor:
    """Values of tensors, or of their units, put together for the norms that these share."""
    each = [
        tf.broadcast_to(tf.reshape(value, [-1]), [count]) for value, count in zip(values, groups.counts, strict=True)
    ]
    return join(tf.stack(each), 0) if groups.joined else tf.concat(each, 0)


def _format(x: tf.Tensor) -> Any:
    return ml_dtypes.finfo(x.dtype.real_dtype.as_numpy_dtype)
