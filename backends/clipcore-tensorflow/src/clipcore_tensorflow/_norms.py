"""The norms of tensors and of their units, as `Wide` numbers: squares in float64, summed in rows and in parts.

Rounding does not pile up so, and only a part of a large tensor is widened at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from clipcore.backend import Axes
from clipcore_tensorflow._elements import is_wide, reals, values_of
from clipcore_tensorflow._groups import product
from clipcore_tensorflow._wide import Wide, root, row_sum, times_power

_PART = 1 << 19  # elements that are widened to float64 at a time
_SMALL = 1 << 14  # elements of a tensor whose norm is taken together with those of others
_POWER_STEPS = 30


def tensor_norms(tensors: Sequence[Any], p: float) -> Wide:
    """The p-norm of each tensor, a vector; inf or NaN where an element is."""
    values = [values_of(tensor) for tensor in tensors]
    small = _small_norms(values) if p == 2 else {}
    each = [small.get(place) or _norm(x, p) for place, x in enumerate(values)]
    if not each:
        return Wide(tf.zeros([0], tf.float64), tf.zeros([0], tf.int64))
    exponents = 0 if all(isinstance(e, int) for _, e in each) else tf.stack([tf.cast(e, tf.int64) for _, e in each])
    return Wide.of(tf.stack([value for value, _ in each]), exponents)


def _small_norms(tensors: Sequence[tf.Tensor]) -> dict[int, tuple[tf.Tensor, int]]:
    """The L2 norms of small tensors by their places, those of one size and dtype at once: an operation on each would
    take longer than what it does.
    """
    alike: dict[Any, list[int]] = {}
    for place, x in enumerate(tensors):
        size = x.shape.num_elements()
        if size is not None and 0 < size <= _SMALL and not is_wide(x) and not x.dtype.is_complex:
            alike.setdefault((size, x.dtype), []).append(place)
    found: dict[int, tuple[tf.Tensor, int]] = {}
    for places in alike.values():
        rows = tf.stack([tf.reshape(tensors[place], [-1]) for place in places])
        norms = root(_squares(rows), 2)
        found |= {place: (norm, 0) for place, norm in zip(places, tf.unstack(norms, len(places)), strict=True)}
    return found


def _norm(x: tf.Tensor, p: float) -> tuple[tf.Tensor, tf.Tensor | int]:
    """The norm as (value, exponent), the value in the range of float64."""
    if x.shape.num_elements() == 0:
        return tf.zeros([], tf.float64), 0
    if p == 2 and not is_wide(x):
        return root(tf.add_n([_sum(part, tf.square) for part in reals(x)]), 2), 0
    # relative to the largest element nothing overflows, and what underflows does not count
    peak = _peak(x)
    exponent = _exponent_of(peak)
    # an inf or NaN is the norm itself
    return tf.where(tf.math.is_finite(peak), _power_norm(x, p, exponent), peak), exponent


def _exponent_of(peak: tf.Tensor) -> tf.Tensor:
    """A power of two close to a magnitude; 0 where it is 0, inf or NaN."""
    return Wide.of(tf.where(tf.math.is_finite(peak) & (peak > 0), peak, tf.ones_like(peak))).exponent


def _power_norm(x: tf.Tensor, p: float, exponent: tf.Tensor) -> tf.Tensor:
    """The p-norm of the tensor divided by 2**exponent, which is close to its largest magnitude."""

    def magnitudes(part: tf.Tensor) -> tf.Tensor:
        real, *imaginary = (tf.abs(times_power(tf.cast(half, tf.float64), -exponent)) for half in reals(part))
        return root(real * real + imaginary[0] * imaginary[0], 2) if imaginary else real

    if p in (1, 2):
        total = _sum(x, lambda part: tf.square(magnitudes(part)) if p == 2 else magnitudes(part))
        return root(total, 2) if p == 2 else total
    largest = tf.maximum(tf.reduce_max(magnitudes(x)), 0.0)  # of no elements -inf, where the shape does not tell
    if p == math.inf:
        return largest
    # divided by the largest itself, since (1/2)**p and sqrt(2)**p may leave the range
    unit = tf.where(largest > 0, largest, tf.ones_like(largest))
    return root(_sum(x, lambda part: (magnitudes(part) / unit) ** p), p) * unit


def _peak(x: tf.Tensor, axis: int | None = None) -> tf.Tensor:
    """The largest magnitude of the real parts in float64, along an axis or of all; NaN where one is NaN."""
    parts = [tf.abs(part) for part in reals(x)]
    largest = [tf.cast(tf.reduce_max(part, axis), tf.float64) for part in parts]
    # a maximum may pass over NaN
    faulty = [tf.reduce_any(tf.math.is_nan(part), axis) for part in parts]
    peak = tf.maximum(tf.maximum(largest[0], largest[-1]), tf.zeros([], tf.float64))
    return tf.where(faulty[0] | faulty[-1], tf.constant(math.nan, tf.float64), peak)


def _sum(x: tf.Tensor, function: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """The sum of function(x) in float64."""
    flat = tf.reshape(x, [-1])
    size = flat.shape[0]
    if tf.executing_eagerly() or size is None or size <= 2 * _PART:
        return row_sum(function(_widened(flat)))
    whole = size // _PART
    sums = _one_by_one(whole, [], lambda i: row_sum(function(_widened(tf.slice(flat, [i * _PART], [_PART])))))
    return row_sum(sums) + row_sum(function(_widened(flat[whole * _PART :])))


def _widened(x: tf.Tensor) -> tf.Tensor:
    return x if x.dtype.is_complex else tf.cast(x, tf.float64)


def _one_by_one(count: int, shape: list[int], function: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """function(0), function(1), … of this shape each, none begun before the one before it has ended."""
    spec = tf.TensorSpec(shape, tf.float64)
    return tf.map_fn(function, tf.range(count), parallel_iterations=1, fn_output_signature=spec)


def unit_norms(x: tf.Tensor, axes: Axes) -> Wide:
    """The L2 norm of each unit of a tensor, in the order of `axes`, which run over the units."""
    units = tf.concat(reals(units_first(x, axes)), 1)
    if units.shape[1] == 0:
        return Wide.of(tf.zeros(tf.shape(units)[:1], tf.float64))
    if not is_wide(x):
        return Wide.of(root(_squares(units), 2))
    peak = _peak(units, 1)
    exponent = _exponent_of(peak)
    norms = root(row_sum(tf.square(times_power(units, -exponent[:, None]))), 2)
    return Wide.of(tf.where(tf.math.is_finite(peak), norms, peak), exponent)


def _squares(units: tf.Tensor) -> tf.Tensor:
    """The sum of squares of each row."""
    count, width = units.shape
    step = max(_PART // (width or 1), 1)
    if tf.executing_eagerly() or count is None or width is None or count <= 2 * step:
        return row_sum(tf.square(_widened(units)))
    whole = count // step
    sums = _one_by_one(
        whole, [step], lambda i: row_sum(tf.square(_widened(tf.slice(units, [i * step, 0], [step, width]))))
    )
    return tf.concat([tf.reshape(sums, [-1]), row_sum(tf.square(_widened(units[whole * step :])))], 0)


def spectral_norm(x: tf.Tensor, axes: Axes, *, exact: bool) -> Wide:
    """The largest singular value of a tensor as a matrix of units, a vector of one."""
    units = units_first(x, axes)
    if units.shape.num_elements() == 0:
        return Wide.of(tf.zeros([1], tf.float64))
    peak = _peak(units)
    exponent = _exponent_of(peak)
    parts = [times_power(tf.cast(part, tf.float64), -exponent) for part in reals(units)]
    matrix = parts[0]
    if len(parts) == 2:  # of the same singular values, each twice; XLA has no complex decomposition
        real, imaginary = parts
        matrix = tf.concat([tf.concat([real, -imaginary], 1), tf.concat([imaginary, real], 1)], 0)
    matrix = tf.where(tf.math.is_finite(matrix), matrix, tf.zeros_like(matrix))
    value = _largest_singular_value(matrix) if exact else _power_method(matrix)
    return Wide.of(tf.where(tf.math.is_finite(peak), value, peak)[None], exponent)


def _largest_singular_value(matrix: tf.Tensor) -> tf.Tensor:
    # of the smaller product, of which the largest eigenvalue loses nothing: XLA's SVD stops at an error of 1e-13
    tall = (matrix.shape[0] or 0) > (matrix.shape[1] or 0)
    return root(tf.linalg.eigvalsh(tf.matmul(matrix, matrix, transpose_a=tall, transpose_b=not tall))[-1], 2)


def _power_method(matrix: tf.Tensor) -> tf.Tensor:
    """From the vector that every backend begins with; a complex matrix, here a real one of twice the size, as well."""
    start = np.random.default_rng(0).standard_normal(int(matrix.shape[1]))

    def step(vector: tf.Tensor) -> tf.Tensor:
        image = tf.linalg.matvec(matrix, tf.linalg.matvec(matrix, vector), transpose_a=True)
        length = root(tf.reduce_sum(tf.square(image)), 2)
        return image / tf.where(length > 0, length, tf.ones_like(length))

    (vector,) = tf.while_loop(
        lambda _: True, lambda vector: (step(vector),), (tf.constant(start),), maximum_iterations=_POWER_STEPS
    )
    return root(tf.reduce_sum(tf.square(tf.linalg.matvec(matrix, vector))), 2)


def units_first(x: tf.Tensor, axes: Axes) -> tf.Tensor:
    """The tensor as (units, rest)."""
    rest = [axis for axis in range(x.shape.rank) if axis not in axes]
    moved = tf.transpose(x, [*axes, *rest]) if [*axes, *rest] != list(range(x.shape.rank)) else x
    return tf.reshape(moved, [product(moved, range(len(axes))), product(moved, range(len(axes), x.shape.rank))])
