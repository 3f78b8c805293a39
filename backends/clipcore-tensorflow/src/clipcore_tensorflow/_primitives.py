"""Measure, decide, apply as TensorFlow operations: in traced functions, under XLA, on devices, under differentiation.

TensorFlow's CPU threads flush subnormal numbers to zero, as inputs and as results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from clipcore.backend import Axes, NonFiniteMode
from clipcore.clipping.report import ClipReport
from clipcore.errors import InvalidInput, NonFinite
from clipcore_tensorflow import _elements as elements
from clipcore_tensorflow import _wide as wide
from clipcore_tensorflow._arithmetic import Arithmetic
from clipcore_tensorflow._elements import coalesced, map_values, values_of
from clipcore_tensorflow._groups import Groups, product
from clipcore_tensorflow._margin import lowered
from clipcore_tensorflow._norms import spectral_norm, tensor_norms, unit_norms
from clipcore_tensorflow._scaling import factors_for, is_ordinary, scaled
from clipcore_tensorflow._wide import Wide

_FAULT_SCALES = {"propagate": math.nan, "raise": math.nan, "skip": 0.0}
_SIGMA = "sigma"  # in place of p: the largest singular value


class RaiseInGraph(InvalidInput):
    """A policy reads whether there is a fault, in a function that is traced."""


class _Measure(NamedTuple):
    """The norms of some groups, and how many elements are not finite."""

    norms: Wide
    nonfinite: tf.Tensor
    groups: Groups
    p: float | str


class _Scale(NamedTuple):
    """One factor per norm; `acts` is false where it is exactly one."""

    factors: Wide
    acts: tf.Tensor
    groups: Groups
    limits: tf.Tensor


class TensorFlowPrimitives:
    """`clipcore.backend.Primitives` over tf.Tensor and tf.IndexedSlices of any device."""

    arithmetic = Arithmetic()

    def adopt(self, value: Any, like: Any) -> tf.Tensor:
        if not tf.executing_eagerly() or like is None:
            return tf.convert_to_tensor(value)
        with tf.device(values_of(like).device):
            return tf.identity(tf.convert_to_tensor(value))

    def measure(
        self, tensors: Sequence[Any], p: float, axes: Sequence[Axes] | None = None, *, zero_nonfinite: bool = False
    ) -> tuple[list[Any], _Measure]:
        given = [coalesced(tensor) for tensor in tensors]
        groups = _grouped(given, axes or [()] * len(given))
        return _measured(given, groups, p, zero_nonfinite, lambda of: _norms(of, groups, p))

    def measure_spectra(
        self, tensors: Sequence[Any], axes: Sequence[Axes], *, exact: bool, zero_nonfinite: bool = False
    ) -> tuple[list[Any], _Measure]:
        given = [tf.convert_to_tensor(tensor) for tensor in tensors]

        def norms(of: Sequence[Any]) -> Wide:
            return _concat([spectral_norm(x, own, exact=exact) for x, own in zip(of, axes, strict=True)])

        return _measured(given, _grouped(given, [()] * len(given)), _SIGMA, zero_nonfinite, norms)

    def join(self, measure: _Measure) -> _Measure:
        count = len(measure.groups.counts)
        if not count:
            return measure
        each = Wide(*(tf.reshape(part, [count, -1]) for part in measure.norms))
        return measure._replace(norms=wide.join(each, float(measure.p)), groups=measure.groups._replace(joined=True))

    def norms(self, measure: _Measure, against: Any = None) -> tf.Tensor:
        norms, largest = measure.norms.to_float(), tf.constant(tf.float64.max, tf.float64)
        return tf.where(norms > largest, largest, norms)

    def decide(self, measure: _Measure, limits: Any, nonfinite: NonFiniteMode, *, at_least: float = 0.0) -> _Scale:
        norms = measure.norms
        limits = tf.broadcast_to(tf.convert_to_tensor(limits, tf.float64), tf.shape(norms.mantissa))
        over = _exceeds(norms, limits)
        floor = wide.times_power(tf.constant(at_least, tf.float64), -norms.exponent)
        below = (norms.mantissa > 0) & (norms.mantissa < floor)
        acts = over | below
        # where, not a branch: it would wait for the device; the inner one keeps derivatives finite
        one = tf.ones_like(norms.mantissa)
        bound = Wide.of(tf.where(acts, tf.where(below, tf.constant(at_least, tf.float64), limits), one))
        quotient = Wide.of(bound.mantissa / tf.where(acts, norms.mantissa, one), bound.exponent - norms.exponent)
        factors = wide.choose(acts, quotient, Wide.of(one))
        if nonfinite != "zero":
            fault = _fault(measure.nonfinite, nonfinite)
            void = tf.constant(_FAULT_SCALES[nonfinite], tf.float64)
            factors, acts = wide.choose(fault, Wide.of(tf.fill(tf.shape(one), void)), factors), acts | fault
        return _Scale(factors, acts, measure.groups, limits)

    def uniform(self, factor: float, tensors: Sequence[Any]) -> _Scale:
        groups = Groups([()] * len(tensors), [1] * len(tensors), joined=True)
        factors = Wide.of(tf.constant([factor], tf.float64))
        return _Scale(factors, tf.constant([factor != 1]), groups, tf.constant([math.inf], tf.float64))

    def choose(
        self, condition: Any, yes: tuple[_Scale, _Measure], no: tuple[_Scale, _Measure]
    ) -> tuple[_Scale, ClipReport]:
        first, second = (_each(scale) for scale, _ in (yes, no))
        scale = _Scale(
            wide.choose(condition, first.factors, second.factors),
            tf.where(condition, first.acts, second.acts),
            first.groups,
            tf.where(condition, first.limits, second.limits),
        )
        reports = [self.report(measure, _each(scale)) for scale, measure in (yes, no)]
        return scale, ClipReport(*(tf.where(condition, *pair) for pair in zip(*reports, strict=True)))

    def factors(self, scale: _Scale) -> tf.Tensor:
        return _each(scale).factors.to_float()

    def apply(self, tensors: Sequence[Any], scale: _Scale) -> list[Any]:
        if not tensors:
            return []
        values = [values_of(tensor) for tensor in tensors]
        steps = {dtype: factors_for(scale.factors, dtype) for dtype in set(map(elements.multiply_dtype, values))}
        spread = scale.groups.spread
        acts = spread(scale.acts, values)
        by_dtype = {dtype: [spread(number, values) for number in numbers] for dtype, numbers in steps.items()}

        def product_of(index: int, count: int) -> Any:
            numbers = [spread[index] for spread in by_dtype[elements.multiply_dtype(values[index])]]
            keep = acts[index] if scale.groups.axes[index] else None
            return map_values(lambda x: scaled(x, numbers[:count], keep), tensors[index])

        def bounded(indices: Sequence[int], where: tf.Tensor, ordinary: tf.Tensor) -> list[Any]:
            def yes() -> list[Any]:
                return _choose(
                    ~ordinary, lambda: [product_of(i, 3) for i in indices], lambda: [product_of(i, 1) for i in indices]
                )

            return _choose(where, yes, lambda: [tensors[i] for i in indices])

        ordinary = is_ordinary(scale.factors)
        if scale.groups.joined:
            return bounded(range(len(tensors)), tf.reduce_any(scale.acts), tf.reduce_all(ordinary))
        parts = zip(scale.groups.parts(scale.acts), scale.groups.parts(ordinary), strict=True)
        return [
            bounded([index], tf.reduce_any(own), tf.reduce_all(plain))[0] for index, (own, plain) in enumerate(parts)
        ]

    def within(
        self, tensors: Sequence[Any], measure: _Measure, limits: Any, nonfinite: NonFiniteMode
    ) -> tuple[list[Any], _Scale]:
        scale = self.decide(measure, limits, nonfinite)
        if tensors:
            values = [tf.convert_to_tensor(tensor) for tensor in tensors]
            sigma = measure.norms if measure.p == _SIGMA else None
            lower = lowered(values, scale.factors, scale.limits, scale.groups, sigma)
            scale = scale._replace(factors=wide.choose(scale.acts, lower, scale.factors))
        return self.apply(tensors, scale), scale

    def report(self, measure: _Measure, scale: _Scale) -> ClipReport:
        faulty = tf.reduce_any(~tf.math.is_finite(measure.norms.mantissa))
        nan = tf.constant(math.nan, tf.float64)
        norms = tf.where(faulty, nan, measure.norms.to_float())
        joint = wide.join(measure.norms, measure.p if isinstance(measure.p, float) else math.inf).to_float()
        factors = scale.factors.to_float()
        return ClipReport(
            norm=tf.where(faulty, nan, joint),
            scale=_smallest(factors, 1.0),
            clipped=tf.reduce_any(scale.acts),
            nonfinite=measure.nonfinite,
            limit=_smallest(scale.limits, math.inf),
            norms=norms,
            scales=factors,
        )

    def screen(
        self, tensors: Sequence[Any], nonfinite: NonFiniteMode, *, nan_alone: bool
    ) -> tuple[list[Any], tf.Tensor]:
        given = [coalesced(tensor) for tensor in tensors]
        faults = elements.count(given, tf.math.is_nan if nan_alone else elements.not_finite)
        if nonfinite == "raise":
            _fault(faults, nonfinite)
        if nonfinite == "zero":
            given = [map_values(elements.number_or_zero if nan_alone else elements.finite_or_zero, x) for x in given]
        return given, faults

    def clamp(self, tensors: Sequence[Any], low: float, high: float) -> tuple[list[Any], tf.Tensor]:
        changed = elements.count(tensors, lambda x: elements.outside(x, low, high)) > 0
        return [map_values(lambda x: elements.clamped(x, low, high), tensor) for tensor in tensors], changed

    def spike(
        self, tensors: Sequence[Any], moments: Sequence[Any], threshold: float, decay: float, acts: Any
    ) -> tuple[list[Any], list[Any], tf.Tensor]:
        results = [
            elements.despiked(tf.convert_to_tensor(tensor), moment, threshold, decay, acts)
            for tensor, moment in zip(tensors, moments, strict=True)
        ]
        changed = tf.reduce_any(tf.stack([any_ for _, _, any_ in results])) if results else tf.constant(False)
        return [stored for stored, _, _ in results], [after for _, after, _ in results], changed

    def overrule(self, tensors: Sequence[Any], faults: Any, nonfinite: NonFiniteMode) -> list[Any]:
        if nonfinite == "zero" or not tensors:
            return list(tensors)
        fault = _fault(tf.convert_to_tensor(faults), nonfinite)[None]
        void = self.uniform(_FAULT_SCALES[nonfinite], tensors)
        one = self.uniform(1.0, tensors)
        return self.apply(tensors, one._replace(factors=wide.choose(fault, void.factors, one.factors), acts=fault))

    def summary(self, tensors: Sequence[Any], faults: Any, nonfinite: NonFiniteMode) -> ClipReport:
        norm = wide.join(tensor_norms(tensors, 2.0), 2.0).to_float()
        # infinities are no faults to a policy that bounds them
        norm = tf.where(tf.math.is_nan(norm), tf.constant(math.inf, tf.float64), norm)
        scale, overruled = tf.ones([], tf.float64), tf.constant(False)
        if nonfinite != "zero":
            overruled = _fault(faults, nonfinite)
            scale = tf.where(overruled, tf.constant(_FAULT_SCALES[nonfinite], tf.float64), scale)
            norm = tf.where(overruled, tf.constant(math.nan, tf.float64), norm)
        return ClipReport(norm, scale, overruled, faults, norm[None], scale[None], tf.constant(math.inf, tf.float64))

    def total(self, tensors: Sequence[Any]) -> list[tf.Tensor]:
        return [elements.total(tf.convert_to_tensor(tensor)) for tensor in tensors]


def _grouped(tensors: Sequence[Any], axes: Sequence[Axes]) -> Groups:
    return Groups(axes, [product(x, own) if own else 1 for x, own in zip(map(values_of, tensors), axes, strict=True)])


def _measured(
    given: list[Any], groups: Groups, p: float | str, zero_nonfinite: bool, norms: Callable[[Sequence[Any]], Wide]
) -> tuple[list[Any], _Measure]:
    found = norms(given)
    faulty = tf.reduce_any(~tf.math.is_finite(found.mantissa))
    # counting takes as long as summing, and a norm tells that there is nothing to count
    (faults,) = _choose(faulty, lambda: [elements.count(given, elements.not_finite)], lambda: [tf.zeros([], tf.int64)])
    if zero_nonfinite:

        def zeroed() -> list[Any]:
            finite = [map_values(elements.finite_or_zero, tensor) for tensor in given]
            return [*finite, *norms(finite)]

        *given, mantissa, exponent = _choose(faulty, zeroed, lambda: [*given, *found])
        found = Wide(mantissa, exponent)
    return given, _Measure(found, faults, groups, p)


def _norms(tensors: Sequence[Any], groups: Groups, p: float) -> Wide:
    if not any(groups.axes):
        return tensor_norms(tensors, p)
    return _concat(
        [
            unit_norms(tf.convert_to_tensor(tensor), axes) if axes else tensor_norms([tensor], p)
            for tensor, axes in zip(tensors, groups.axes, strict=True)
        ]
    )


def _concat(parts: Sequence[Wide]) -> Wide:
    if not parts:
        return tensor_norms([], 2.0)
    return Wide(*(tf.concat(numbers, 0) for numbers in zip(*parts, strict=True)))


def _each(scale: _Scale) -> _Scale:
    """The scale with its factors tensor by tensor, joined ones repeated."""
    each = scale.groups.each
    return _Scale(
        Wide(*map(each, scale.factors)), each(scale.acts), scale.groups._replace(joined=False), each(scale.limits)
    )


def _exceeds(norms: Wide, limits: tf.Tensor) -> tf.Tensor:
    # a limit in the norm's unit may leave the range, and then the comparison is right all the same
    return norms.mantissa > wide.times_power(limits, -norms.exponent)


def _choose(condition: tf.Tensor, yes: Callable[[], list[Any]], no: Callable[[], list[Any]]) -> list[Any]:
    """`yes` where the condition holds, else `no`, which must be what `yes` gives anyhow.

    A graph on the CPU leaves out what is not needed; on a device a branch would wait for the condition.
    """
    if tf.executing_eagerly() or tf.config.get_visible_devices("GPU"):
        return yes()
    chosen: list[Any] = tf.cond(condition, yes, no)
    return chosen


def _fault(faults: tf.Tensor, nonfinite: NonFiniteMode) -> tf.Tensor:
    """Whether the policy's word on non-finite elements takes effect."""
    if nonfinite == "raise":
        if not tf.executing_eagerly():
            raise RaiseInGraph(
                "nonfinite='raise' reads the gradients, which a traced function cannot; use 'propagate', 'zero' or "
                "'skip' there, or clip outside of tf.function"
            )
        count = int(faults)
        if count:
            raise NonFinite(f"{count} elements are inf or NaN")
    return faults > 0


def _smallest(numbers: tf.Tensor, most: float) -> tf.Tensor:
    """The smallest of the numbers, at most `most`; NaN where one is NaN."""
    smallest = tf.reduce_min(tf.concat([numbers, tf.constant([most], tf.float64)], 0))
    return tf.where(tf.reduce_any(tf.math.is_nan(numbers)), tf.constant(math.nan, tf.float64), smallest)
