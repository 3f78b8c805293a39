"""A factor times a tensor: one multiply in the multiply's dtype, also where the factor itself would be subnormal."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from clipcore_tensorflow._elements import multiply_dtype, reals
from clipcore_tensorflow._wide import Wide, power, times_power

# the exponents that a first factor takes; two more take what is left
_FIRST = {tf.float32: 100, tf.float64: 1000}


def is_ordinary(factors: Wide) -> tf.Tensor:
    """Where a first factor is all of it, in every dtype."""
    return (factors.exponent >= -min(_FIRST.values())) | (factors.mantissa == 0)


def factors_for(factors: Wide, dtype: tf.DType) -> list[tf.Tensor]:
    """Each factor as three normal numbers of the dtype; the last two, powers of two, are 1 where it is one itself."""
    first = _FIRST[dtype]
    factor = times_power(factors.mantissa, tf.maximum(factors.exponent, -first))
    rest = [tf.clip_by_value(factors.exponent + n * first, tf.constant(-first, tf.int64), 0) for n in (1, 2)]
    return [tf.cast(factor, dtype), tf.cast(power(-rest[0]), dtype), tf.cast(power(rest[1]), dtype)]


def scaled(x: tf.Tensor, numbers: Sequence[tf.Tensor], acts: tf.Tensor | None = None) -> tf.Tensor:
    """Multiply in the multiply's dtype; a factor of 0 gives zeros and NaN NaN, whatever `x` holds.

    Args:
        numbers: what `factors_for` gave, or the first of it alone where that is all.
        acts: where the factors act; elsewhere the elements stay, subnormal ones too.
    """
    if x.dtype.is_complex:
        return tf.complex(*(scaled(part, numbers, acts) for part in reals(x)))
    factor, *rest = numbers
    product = tf.math.multiply_no_nan(tf.cast(x, multiply_dtype(x)), factor)
    if rest:
        product = product / rest[0] * rest[1]  # a division, as in times_power
    product = tf.cast(product, x.dtype)
    return product if acts is None else tf.where(acts, product, x)
