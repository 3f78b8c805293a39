"""Numbers that may leave the range of float64, as TensorFlow operations: mantissa * 2**exponent, two tensors."""

from __future__ import annotations

import math
from typing import NamedTuple

import tensorflow as tf

_BITS, _BIAS = 52, 1023  # of float64: bits of the mantissa, bias of the exponent
_EXPONENT_OF_ZERO = -(1 << 40)  # below that of any other number
_ROW = 256  # elements that are summed one after the other


class Wide(NamedTuple):
    """mantissa * 2**exponent, the mantissa in [0.5, 1), or 0, or inf or NaN, which stand for themselves."""

    mantissa: tf.Tensor
    exponent: tf.Tensor

    @classmethod
    def of(cls, values: tf.Tensor, exponents: tf.Tensor | int = 0) -> Wide:
        """The numbers values * 2**exponents, by the bits of the values, since TensorFlow has no frexp."""
        bits = tf.bitcast(tf.stop_gradient(values), tf.int64)
        field = tf.bitwise.right_shift(bits, tf.constant(_BITS, tf.int64)) & 0x7FF
        shift = tf.where((field > 0) & (field < 0x7FF), field - (_BIAS - 1), tf.zeros_like(field))
        # subnormal numbers are flushed wherever they are used
        exponent = tf.where(field > 0, shift + exponents, tf.constant(_EXPONENT_OF_ZERO, tf.int64))
        return cls(times_power(values, -shift), exponent)

    def to_float(self) -> tf.Tensor:
        """As float64; inf beyond its range, 0 below it."""
        return times_power(self.mantissa, self.exponent)


def choose(condition: tf.Tensor, yes: Wide, no: Wide) -> Wide:
    """`yes` where the condition holds, else `no`."""
    return Wide(*(tf.where(condition, *parts) for parts in zip(yes, no, strict=True)))


def join(each: Wide, p: float) -> Wide:
    """The joint p-norm of numbers along their first axis; not finite where one is not."""
    if each.mantissa.shape[0] == 1:
        return Wide(each.mantissa[0], each.exponent[0])
    top = tf.reduce_max(each.exponent, 0)
    last = [*range(1, each.mantissa.shape.rank), 0]
    relative = tf.transpose(times_power(each.mantissa, each.exponent - top), last)
    if p == 2:
        return Wide.of(root(row_sum(tf.square(relative)), 2), top)
    largest = tf.reduce_max(relative, -1)
    if p == math.inf:
        return Wide.of(largest + tf.reduce_sum(relative - relative, -1), top)  # a maximum may pass over NaN
    # relative to the largest itself, since (1/2)**p may underflow
    unit = tf.where(largest > 0, largest, tf.ones_like(largest))
    return Wide.of(root(row_sum((relative / unit[..., None]) ** p), p) * unit, top)


def root(x: tf.Tensor, p: float) -> tf.Tensor:
    """x**(1/p), with a finite derivative at 0."""
    positive = x > 0
    base = tf.where(positive, x, tf.ones_like(x))
    return tf.where(positive, tf.sqrt(base) if p == 2 else base ** (1 / p), x)


def row_sum(x: tf.Tensor) -> tf.Tensor:
    """The sum over the last axis, in rows of rows, so that at most a few hundred numbers are added in a row."""
    size = x.shape[-1]
    if size is None or size <= _ROW:
        return tf.reduce_sum(x, -1)
    rows = size // _ROW
    shape = tf.concat([tf.shape(x)[:-1], [rows, _ROW]], 0) if None in x.shape else [*x.shape[:-1], rows, _ROW]
    whole = row_sum(tf.reduce_sum(tf.reshape(x[..., : rows * _ROW], shape), -1))
    return whole + tf.reduce_sum(x[..., rows * _ROW :], -1)


def times_power(x: tf.Tensor, exponent: tf.Tensor) -> tf.Tensor:
    """Multiply by 2**exponent in two steps, since 2**exponent itself may leave the range."""
    exponent = tf.clip_by_value(exponent, tf.constant(2 - 2 * _BIAS, tf.int64), tf.constant(2 * _BIAS, tf.int64))
    half = tf.bitwise.right_shift(exponent, tf.constant(1, tf.int64))
    # a division, since grappler would multiply two scalars first, and their product may be subnormal
    return x * power(half) / power(half - exponent)


def power(exponent: tf.Tensor) -> tf.Tensor:
    """2**exponent, exactly, for exponents of normal float64 numbers."""
    return tf.bitcast(tf.bitwise.left_shift(exponent + _BIAS, tf.constant(_BITS, tf.int64)), tf.float64)
