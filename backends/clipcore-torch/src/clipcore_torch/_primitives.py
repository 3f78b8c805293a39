"""Measure, decide, apply as torch operations, for devices, compiled functions and autograd; none waits for a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from clipcore.backend import Axes, NonFiniteMode
from clipcore.clipping.report import ClipReport
from clipcore_torch._arithmetic import TorchArithmetic
from clipcore_torch._norms import Norm, count_units, each_norm, join
from clipcore_torch._numbers import (
    Numbers,
    concatenated,
    either,
    exceed,
    numbers_like,
    rounded,
    split,
    to_float,
    unit_roundoff,
    wide_dtype,
)
from clipcore_torch._scales import Measure, Place, Scale, apply, fault_factor, hold_hard, raise_if_any, scale_to, spread
from clipcore_torch._tensors import map_values, values_of
from clipcore_torch._together import groups, others, portions


class TorchPrimitives:
    """`clipcore.backend.Primitives` over torch tensors of any device, for one call: norms are on its first tensor's."""

    def __init__(self) -> None:
        self.arithmetic = TorchArithmetic()
        self._settled = False

    def adopt(self, value: Any, like: Tensor | None) -> Tensor:
        if like is not None:
            self._settle([like])
        tensor = torch.as_tensor(value)
        dtype = wide_dtype(self._home) if tensor.dtype == torch.float64 else tensor.dtype
        # detached: the graph of one step is not kept for the next
        return tensor.detach().to(self._home, dtype)

    @property
    def _home(self) -> torch.device:
        return self.arithmetic.device

    def _settle(self, tensors: Sequence[Tensor]) -> None:
        if tensors and not self._settled:
            self.arithmetic.device, self._settled = tensors[0].device, True

    def measure(
        self, tensors: Sequence[Tensor], p: float, axes: Sequence[Axes] | None = None, *, zero_nonfinite: bool = False
    ) -> tuple[list[Tensor], Measure]:
        return self._measured(tensors, p, axes or [()] * len(tensors), zero_nonfinite)

    def measure_spectra(
        self, tensors: Sequence[Tensor], axes: Sequence[Axes], *, exact: bool, zero_nonfinite: bool = False
    ) -> tuple[list[Tensor], Measure]:
        return self._measured(tensors, "svd" if exact else "power", axes, zero_nonfinite)

    def _measured(
        self, tensors: Sequence[Tensor], p: Norm, axes: Sequence[Axes], zero_nonfinite: bool
    ) -> tuple[list[Tensor], Measure]:
        self._settle(tensors)
        faults = self._count(tensors, _not_finite)
        if zero_nonfinite:
            tensors = [map_values(lambda x: torch.where(torch.isfinite(x), x, 0), tensor) for tensor in tensors]
        norms = self._norms(tensors, p, axes)
        known = torch.isfinite(norms.mantissa)
        norms = Numbers(torch.where(known, norms.mantissa, math.nan), norms.exponent)
        counts = [1 if isinstance(p, str) else count_units(*pair) for pair in zip(tensors, axes, strict=True)]
        return list(tensors), Measure(norms, faults, p, axes, _places(counts))

    def _norms(self, tensors: Sequence[Tensor], p: Norm, axes: Sequence[Axes]) -> Numbers:
        return concatenated(each_norm([values_of(tensor) for tensor in tensors], p, axes), self._home)

    def _count(self, tensors: Sequence[Tensor], is_fault: Callable[[Tensor], Tensor]) -> Tensor:
        """Number of elements for which `is_fault` holds, a 0-d int64 tensor."""
        if not tensors:
            return torch.zeros((), dtype=torch.int64, device=self._home)
        values = [values_of(tensor) for tensor in tensors]
        together = groups(values)
        counts = [_count_together([values[i] for i in places], is_fault) for places in together]
        counts += [is_fault(values[i]).sum() for i in others(values, together)]
        return torch.stack([count.to(self._home) for count in counts]).sum()

    def join(self, measure: Measure) -> Measure:
        count = len(measure.places)
        if not count:
            return measure
        assert not isinstance(measure.p, str)
        norms = join(Numbers(*(part.reshape(count, -1) for part in measure.norms)), measure.p)
        return measure._replace(norms=norms, places=[(0, norms.mantissa.shape[0])] * count, joint=True)

    def norms(self, measure: Measure, against: Any = None) -> Tensor:
        # state takes nothing that is not finite, and a norm of float64 tensors may be beyond float64
        norms = to_float(measure.norms)
        return norms.clamp(max=torch.finfo(norms.dtype).max)

    def decide(self, measure: Measure, limits: Any, nonfinite: NonFiniteMode, *, at_least: float = 0.0) -> Scale:
        norms, bounds = measure.norms, numbers_like(limits, measure.norms)
        acts, targets = exceed(norms, bounds), bounds
        if at_least > 0:
            floors = numbers_like(at_least, norms)
            below = (norms.mantissa > 0) & exceed(floors, norms)
            acts, targets = acts | below, either(below, floors, bounds)
        return scale_to(measure, acts, targets, bounds, nonfinite, fills=_may_be_zero(limits))

    def uniform(self, factor: float, tensors: Sequence[Tensor]) -> Scale:
        self._settle(tensors)
        one = torch.ones(1, dtype=wide_dtype(self._home), device=self._home)
        factors = numbers_like(factor, split(one))
        acts, limits = torch.ones_like(one, dtype=torch.bool), numbers_like(math.inf, factors)
        return Scale(factors, acts, limits, [()] * len(tensors), [(0, 1)] * len(tensors), fills=factor == 0)

    def choose(self, condition: Any, yes: tuple[Scale, Measure], no: tuple[Scale, Measure]) -> tuple[Scale, ClipReport]:
        condition = torch.as_tensor(condition, device=self._home)
        each = [_tensor_by_tensor(scale) for scale, _ in (yes, no)]
        scale = Scale(
            either(condition, each[0].factors, each[1].factors),
            torch.where(condition, each[0].acts, each[1].acts),
            either(condition, each[0].limits, each[1].limits),
            each[0].axes,
            each[0].places,
            each[0].fills or each[1].fills,
        )
        reports = [self._report_of_each(*pair) for pair in (yes, no)]
        return scale, ClipReport(*(torch.where(condition, *fields) for fields in zip(*reports, strict=True)))

    def _report_of_each(self, scale: Scale, measure: Measure) -> ClipReport:
        """The report with a joint norm and factor for each tensor, since what is chosen from two has one shape."""
        report = self.report(measure, scale)
        each = {name: spread(getattr(report, name), scale.places) for name in ("norms", "scales")}
        return report._replace(**each)

    def factors(self, scale: Scale) -> Tensor:
        return spread(to_float(scale.factors), scale.places)

    def apply(self, tensors: Sequence[Tensor], scale: Scale) -> list[Tensor]:
        return apply(tensors, scale)

    def within(
        self, tensors: Sequence[Tensor], measure: Measure, limits: Any, nonfinite: NonFiniteMode
    ) -> tuple[list[Tensor], Scale]:
        """With factors lowered by all that rounding can add, at most two units of the tensor's dtype."""
        scale = self.decide(measure, limits, nonfinite)
        lowered = hold_hard(tensors, measure, scale, nonfinite, certain=not isinstance(measure.p, str))
        bounded = apply(tensors, lowered)
        if not isinstance(measure.p, str) or not tensors:
            return bounded, lowered
        # all that rounding can add to a spectral norm is far more than what it does: a second look decides
        again = self._norms(bounded, measure.p, measure.axes)
        sure = 1 - 2 * max(max(tensor.shape, default=1) for tensor in tensors) * unit_roundoff(again.mantissa.dtype)
        over = exceed(again, Numbers(lowered.limits.mantissa * sure, lowered.limits.exponent))
        lowest = hold_hard(tensors, measure, scale, nonfinite)
        lowered = lowered._replace(factors=either(over, lowest.factors, lowered.factors))
        return apply(tensors, lowered), lowered

    def report(self, measure: Measure, scale: Scale) -> ClipReport:
        norms, factors, limits = (to_float(numbers) for numbers in (measure.norms, scale.factors, scale.limits))
        faulty = torch.isnan(norms).any()
        norm = norms.sum() if norms.shape[0] <= 1 else self._joint(measure)
        one = torch.ones_like(faulty, dtype=factors.dtype)[None]
        return ClipReport(
            norm=torch.where(faulty, math.nan, norm),
            scale=torch.cat([one, factors]).amin(),
            clipped=scale.acts.any(),
            nonfinite=measure.nonfinite,
            norms=torch.where(faulty, math.nan, norms),
            scales=factors,
            limit=torch.cat([one / 0, limits]).amin(),
        )

    def _joint(self, measure: Measure) -> Tensor:
        p = math.inf if isinstance(measure.p, str) else measure.p
        return to_float(join(Numbers(*(part[:, None] for part in measure.norms)), p))[0]

    def screen(
        self, tensors: Sequence[Tensor], nonfinite: NonFiniteMode, *, nan_alone: bool
    ) -> tuple[list[Tensor], Tensor]:
        self._settle(tensors)
        is_fault = torch.isnan if nan_alone else _not_finite
        faults = self._count(tensors, is_fault)
        if nonfinite == "raise":
            raise_if_any(faults)
        if nonfinite == "zero":
            tensors = [map_values(lambda x: torch.where(is_fault(x), 0, x), tensor) for tensor in tensors]
        return list(tensors), faults

    def clamp(self, tensors: Sequence[Tensor], low: float, high: float) -> tuple[list[Tensor], Tensor]:
        def is_outside(x: Tensor) -> Tensor:
            return (x < rounded(low, x.dtype)) | (x > rounded(high, x.dtype))

        def bounded(x: Tensor) -> Tensor:
            # not `clamp`, which on a device gives a zero the sign of a bound of zero
            lowest, highest = rounded(low, x.dtype), rounded(high, x.dtype)
            return torch.where(x < lowest, lowest, torch.where(x > highest, highest, x))

        changed = self._count(tensors, is_outside) > 0
        return [map_values(bounded, tensor) for tensor in tensors], changed

    def spike(
        self, tensors: Sequence[Tensor], moments: Sequence[Tensor], threshold: float, decay: float, acts: Any
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        acts = torch.as_tensor(acts, device=self._home)
        results, after, changed = [], [], [torch.zeros_like(acts)]
        for x, moment in zip(tensors, moments, strict=True):
            wide = wide_dtype(x.device)
            before = moment.to(x.device, wide)
            over = (x.to(wide).square() > threshold * before) & acts.to(x.device)
            bounds = torch.copysign(torch.sqrt(threshold * before), x.to(wide)).to(x.dtype)
            result = torch.where(over, bounds, x)
            results.append(result)
            moved = decay * before + (1 - decay) * result.to(wide).square()
            after.append(moved.clamp(max=torch.finfo(moment.dtype).max).to(moment))  # a state stays finite
            changed.append(over.any().to(self._home))
        return results, after, torch.stack(changed).any()

    def overrule(self, tensors: Sequence[Tensor], faults: Any, nonfinite: NonFiniteMode) -> list[Tensor]:
        if nonfinite == "zero" or not tensors:
            return list(tensors)
        value = fault_factor(faults, nonfinite)
        return [
            map_values(lambda x: torch.where((faults > 0).to(x.device), torch.full_like(x, value), x), tensor)
            for tensor in tensors
        ]

    def summary(self, tensors: Sequence[Tensor], faults: Any, nonfinite: NonFiniteMode) -> ClipReport:
        norms = self._norms(tensors, 2.0, [()] * len(tensors))
        norm = to_float(join(Numbers(*(part[:, None] for part in norms)), 2.0))[0] if tensors else to_float(norms).sum()
        fault, scale = faults > 0, torch.ones_like(norm)
        if nonfinite == "zero":
            fault = torch.zeros_like(fault)
        else:
            scale = torch.where(fault, fault_factor(faults, nonfinite), scale)
            norm = torch.where(fault, math.nan, norm)
        return ClipReport(norm, scale, fault, faults, norm[None], scale[None])

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [x.sum(0, dtype=torch.promote_types(x.dtype, wide_dtype(x.device))).to(x.dtype) for x in tensors]


def _not_finite(x: Tensor) -> Tensor:
    return ~torch.isfinite(x)


def _count_together(tensors: Sequence[Tensor], is_fault: Callable[[Tensor], Tensor]) -> Tensor:
    """Number of elements of tensors of one device and dtype for which `is_fault` holds."""
    with torch.no_grad():
        flat = (portion[0] if len(portion) == 1 else torch.cat(portion) for portion in portions(tensors))
        return torch.stack([is_fault(x).sum() for x in flat]).sum()


def _may_be_zero(limits: Any) -> bool:
    if isinstance(limits, Tensor):
        return True
    return any(limit == 0 for limit in limits) if isinstance(limits, Sequence) else limits == 0


def _places(counts: Sequence[int]) -> list[Place]:
    """Where parts of these lengths stand, one after the other."""
    places, stop = [], 0
    for count in counts:
        start, stop = stop, stop + count
        places.append((start, stop))
    return places


def _tensor_by_tensor(scale: Scale) -> Scale:
    """The scale with the factors of tensors that were joined one after the other."""

    def apart(values: Tensor) -> Tensor:
        return spread(values, scale.places)

    return Scale(
        Numbers(*map(apart, scale.factors)),
        apart(scale.acts),
        Numbers(*map(apart, scale.limits)),
        scale.axes,
        _places([stop - start for start, stop in scale.places]),
        scale.fills,
    )
