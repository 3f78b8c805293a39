"""The primitives on NumPy arrays: what every eager CPU tensor is clipped by, exact to the last bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from clipcore.backend import Axes, NonFiniteMode
from clipcore.clipping import kernels, lists
from clipcore.clipping.kernels import Array, Wide
from clipcore.clipping.largest import largest_factors
from clipcore.clipping.lists import Places
from clipcore.clipping.measure import Measure, Norm, measured
from clipcore.clipping.report import ClipReport
from clipcore.errors import NonFinite

_FAULT_FACTORS = {"propagate": math.nan, "skip": 0.0}


@dataclass(frozen=True)
class Scale:
    """One factor per norm of a measure, and whether it acts: one that rounds to 1 is not "in range"."""

    factors: Wide
    acts: Array
    axes: Sequence[Axes]
    places: Places
    limits: Array


class Arithmetic:
    """`clipcore.backend.Arithmetic` in NumPy."""

    array = staticmethod(np.asarray)
    where = staticmethod(np.where)
    sqrt = staticmethod(np.sqrt)
    exp = staticmethod(np.exp)
    hypot = staticmethod(np.hypot)
    minimum = staticmethod(np.minimum)
    maximum = staticmethod(np.maximum)
    mean = staticmethod(np.mean)
    arange = staticmethod(np.arange)

    @staticmethod
    def percentile(values: Array, count: Array, q: float) -> Any:
        return float(np.percentile(values[: int(count)], q))

    @staticmethod
    def take(values: Array, places: Sequence[int]) -> Array:
        return values[list(places)]

    @staticmethod
    def put(values: Array, places: Sequence[int], new: Array) -> Array:
        changed = values.copy()
        changed[list(places)] = new
        return changed


class HostPrimitives:
    """`clipcore.backend.Primitives` over NumPy arrays.

    Args:
        in_place: whether results are written into the arrays.
        owns_state: whether what is as large as they are in a state may be overwritten by what follows: memory that is
            new in each step costs more than what is written into it.
    """

    arithmetic = Arithmetic()

    def __init__(self, in_place: bool = False, owns_state: bool = False) -> None:
        self._in_place, self._owns_state = in_place, owns_state

    def measure(
        self, tensors: Sequence[Array], p: float, axes: Sequence[Axes] | None = None, *, zero_nonfinite: bool = False
    ) -> tuple[Sequence[Array], Measure]:
        return self._measured(tensors, p, axes or [()] * len(tensors), zero_nonfinite)

    def _measured(
        self, tensors: Sequence[Array], p: Norm, axes: Sequence[Axes], zero_nonfinite: bool
    ) -> tuple[Sequence[Array], Measure]:
        measure = measured(tensors, p, axes)
        if not np.isnan(measure.norms.mantissa).any():
            return tensors, measure
        faults = kernels.count(tensors, kernels.not_finite)
        if zero_nonfinite:
            tensors = [self._fill(array, kernels.not_finite(array), 0) for array in tensors]
            measure = measured(tensors, p, axes)
        return tensors, replace(measure, nonfinite=faults)

    def adopt(self, value: Any, like: Any) -> Array:
        return np.asarray(value)

    def measure_spectra(
        self, tensors: Sequence[Array], axes: Sequence[Axes], *, exact: bool, zero_nonfinite: bool = False
    ) -> tuple[Sequence[Array], Measure]:
        return self._measured(tensors, "svd" if exact else "power", axes, zero_nonfinite)

    def join(self, measure: Measure) -> Measure:
        return measure.joined()

    def norms(self, measure: Measure, against: tuple[Measure, float] | None = None) -> Array:
        if against is not None:
            return measure.settled_as_limits(*against)
        # state takes nothing that is not finite, and a norm of float64 tensors may be beyond float64
        values: Array = np.minimum(measure.norms.to_float(), np.finfo(np.float64).max)
        return values

    def decide(self, measure: Measure, limits: Any, nonfinite: NonFiniteMode, *, at_least: float = 0.0) -> Scale:
        limits = np.broadcast_to(np.asarray(limits, np.float64), len(measure))
        if measure.nonfinite and nonfinite != "zero":
            fault = np.full(len(measure), _fault_factor(measure.nonfinite, nonfinite))
            return Scale(Wide.of(fault), np.ones(len(measure), bool), measure.factor_axes(), measure.places, limits)
        if at_least == 0 and measure.surely_below(limits):
            one = Wide(*(np.broadcast_to(part, len(measure)) for part in Wide.of(1.0)))
            return Scale(one, np.zeros(len(measure), bool), measure.factor_axes(), measure.places, limits)
        limit, floor, one = Wide.of(limits), Wide.of(np.full(len(measure), at_least)), Wide.of(1.0)
        norms = measure.settled(limit, floor)
        below = floor.exceeds(norms) & (norms.mantissa > 0)
        acts = norms.exceeds(limit) | below
        factors = kernels.choose(acts, kernels.quotient(kernels.choose(below, floor, limit), norms), one)
        return Scale(factors, acts, measure.factor_axes(), measure.places, limits)

    def uniform(self, factor: float, tensors: Sequence[Array]) -> Scale:
        count = len(tensors)
        one = Wide.of(np.array([factor]))
        return Scale(one, np.array([factor != 1]), [()] * count, Places.shared(count, 1), np.array([math.inf]))

    def choose(self, condition: Any, yes: tuple[Scale, Measure], no: tuple[Scale, Measure]) -> tuple[Scale, ClipReport]:
        scale, measure = yes if condition else no
        return scale, self.report(measure, scale)

    def factors(self, scale: Scale) -> Array:
        values: Array = scale.factors.to_float()[scale.places.spread()]
        return values

    def apply(self, tensors: Sequence[Array], scale: Scale) -> Sequence[Array]:
        acts = scale.places.any(scale.acts)
        if not acts.any():
            return tensors
        if self._in_place:
            # a factor of 1 leaves an array as it is
            lists.scale(tensors, tensors, scale.factors, scale.places, scale.axes)
            return tensors
        chosen = np.flatnonzero(acts)
        arrays = [tensors[int(index)] for index in chosen]
        fresh = [kernels.empty_like(array) for array in arrays]
        places = Places(scale.places.starts[chosen], scale.places.counts[chosen])
        lists.scale(arrays, fresh, scale.factors, places, [scale.axes[index] for index in chosen.tolist()])
        results = list(tensors)
        for index, array in zip(chosen, fresh, strict=True):
            results[index] = array
        return results

    def within(
        self, tensors: Sequence[Array], measure: Measure, limits: Any, nonfinite: NonFiniteMode
    ) -> tuple[Sequence[Array], Scale]:
        scale = self.decide(measure, limits, nonfinite)
        if not (measure.nonfinite and nonfinite != "zero"):
            # a rounded norm can be at its limit where the norm is over it
            scale = replace(scale, acts=measure.exceeds(Wide.of(scale.limits)))
        if scale.acts.any() and not (measure.nonfinite and nonfinite != "zero"):
            scale = replace(scale, factors=Wide.of(_largest(tensors, measure, scale)))
        return self.apply(tensors, scale), scale

    def report(self, measure: Measure, scale: Scale) -> ClipReport:
        norms, factors = measure.norms.to_float(), scale.factors.to_float()
        faulty = bool(np.isnan(norms).any())
        p = math.inf if isinstance(measure.p, str) else measure.p
        joint = norms[0] if len(measure) == 1 else kernels.join(measure.norms, p).to_float()
        return ClipReport(
            norm=math.nan if faulty else float(joint),
            scale=float(factors.min(initial=1.0)),
            clipped=bool(scale.acts.any()),
            nonfinite=measure.nonfinite,
            limit=float(scale.limits.min(initial=math.inf)),
            norms=tuple([math.nan] * len(measure) if faulty else norms.tolist()),
            scales=tuple(factors.tolist()),
        )

    def screen(self, tensors: Sequence[Array], nonfinite: NonFiniteMode, *, nan_alone: bool) -> tuple[list[Array], int]:
        is_fault = np.isnan if nan_alone else kernels.not_finite
        faults = kernels.count(tensors, is_fault)
        if faults and nonfinite == "raise":
            raise _refusal(faults)
        if faults and nonfinite == "zero":
            return [self._fill(array, is_fault(array), 0) for array in tensors], faults
        return list(tensors), faults

    def clamp(self, tensors: Sequence[Array], low: float, high: float) -> tuple[list[Array], bool]:
        results = [self._clamped(array, low, high) for array in tensors]
        clamped = [array if result is None else result for array, result in zip(tensors, results, strict=True)]
        return clamped, any(result is not None for result in results)

    def spike(
        self, tensors: Sequence[Array], moments: Sequence[Array], threshold: float, decay: float, acts: Any
    ) -> tuple[Sequence[Array], list[Array], bool]:
        after = [moment if self._owns_state and moment.flags.writeable else np.empty_like(moment) for moment in moments]
        # memory that is not written costs nothing: only an array that has spikes is
        outs = tensors if self._in_place else [kernels.empty_like(array) for array in tensors]
        spikes = lists.despike(tensors, moments, outs, after, threshold, decay, bool(acts))
        clipped = tensors
        if spikes.any() and not self._in_place:
            clipped = [out if found else array for array, out, found in zip(tensors, outs, spikes > 0, strict=True)]
        return clipped, after, bool(spikes.any())

    def overrule(self, tensors: Sequence[Array], faults: int, nonfinite: NonFiniteMode) -> list[Array]:
        if not faults or nonfinite == "zero":
            return list(tensors)
        return list(self.apply(tensors, self.uniform(_fault_factor(faults, nonfinite), tensors)))

    def summary(self, tensors: Sequence[Array], faults: int, nonfinite: NonFiniteMode) -> ClipReport:
        norm = float(kernels.join(kernels.norms(tensors, 2.0), 2.0))
        if math.isnan(norm) and (not faults or nonfinite == "zero"):
            norm = math.inf  # infinities are no faults to this policy
        overruled = faults > 0 and nonfinite != "zero"
        scale = _fault_factor(faults, nonfinite) if overruled else 1.0
        norm = math.nan if overruled else norm
        return ClipReport(norm, scale, overruled, faults, (norm,), (scale,))

    def total(self, tensors: Sequence[Array]) -> list[Array]:
        return [kernels.total(array) for array in tensors]

    def _target(self, array: Array) -> Array:
        return array if self._in_place else kernels.empty_like(array)

    def _fill(self, array: Array, where: Array, value: float) -> Array:
        if not where.any():
            return array
        out = self._target(array)
        np.copyto(out, array)
        out[where] = value
        return out

    def _clamped(self, array: Array, low: float, high: float) -> Array | None:
        below, above = kernels.bound_in(low, array.dtype), kernels.bound_in(high, array.dtype)
        with np.errstate(invalid="ignore"):  # of bfloat16's NaN
            under, over = array < below, array > above
        if not (under.any() or over.any()):
            return None
        out = self._target(array)
        np.copyto(out, array)
        np.copyto(out, below, where=under)
        np.copyto(out, above, where=over)
        return out


def _largest(tensors: Sequence[Array], measure: Measure, scale: Scale) -> Array:
    """For each norm that is over its limit the largest factor with which what is stored keeps it; 1 for others."""
    trials, limits = HostPrimitives(), Wide.of(scale.limits)

    def keeps(factors: Array) -> Array:
        stored = trials.apply(tensors, replace(scale, factors=Wide.of(np.where(scale.acts, factors, 1.0))))
        again = measure.again(stored)
        over = again.norms.exceeds(limits) if isinstance(measure.p, str) else again.exceeds(limits)
        return ~over | ~scale.acts

    start = np.where(scale.acts, scale.factors.to_float(), 1.0)
    factors = largest_factors(start, ~measure.has(np.float64), 4 * measure.rounding(), keeps)
    return np.where(scale.acts, factors, 1.0)


def _refusal(faults: int) -> NonFinite:
    error: NonFinite = NonFinite(f"{faults} elements are inf or NaN")
    return error


def _fault_factor(faults: int, nonfinite: NonFiniteMode) -> float:
    if nonfinite == "raise":
        raise _refusal(faults)
    return _FAULT_FACTORS[nonfinite]
