"""Backends for NumPy arrays, healthy and wrong on purpose: each has one fault, which conformance must name."""

from __future__ import annotations

import dataclasses

import numpy as np

from clipcore.clipping.host import Arithmetic, HostPrimitives
from clipcore.clipping.kernels import Wide
from clipcore.numpy_backend import NumpyBackend


class Tensor(np.ndarray):
    """An array of a class of its own, by whose module the backend is found."""


class Healthy(NumpyBackend):
    """NumPy's backend over `Tensor`."""

    name = "broken"

    def is_tensor(self, obj):
        return isinstance(obj, Tensor)

    def memory(self, tensors, *, writable=False):
        return None

    def to_host(self, tensors, *, writable=False):
        super().to_host(tensors, writable=writable)
        return [np.asarray(tensor) for tensor in tensors]

    def from_host(self, array, like):
        return array.view(Tensor)


class Composed(Healthy):
    """The same over the primitives alone, as a device's backend would be."""

    def to_host(self, tensors, *, writable=False):
        return None


class NegatesWhatIsClipped(Healthy):
    def from_host(self, array, like):
        return (array if like is None else -array).view(Tensor)


class WidensWhatIsClipped(Healthy):
    def from_host(self, array, like):
        wide = array if like is None or array.dtype.kind == "c" else array.astype(np.float64)
        return wide.view(Tensor)


class WritesIntoTheInput(Healthy):
    def from_host(self, array, like):
        if like is not None:
            like[...] = array
        return array.view(Tensor)


class SwallowsNan(Healthy):
    def to_host(self, tensors, *, writable=False):
        arrays = super().to_host(tensors, writable=writable)
        return [np.where(np.isnan(array), np.zeros_like(array), array) for array in arrays]


class WritesIntoCopies(Healthy):
    def to_host(self, tensors, *, writable=False):
        arrays = super().to_host(tensors, writable=writable)
        return [array.copy() for array in arrays] if writable else arrays


class CopiesInRange(Composed):
    class Primitives(HostPrimitives):
        def apply(self, tensors, scale):
            return [np.array(tensor, subok=True) for tensor in super().apply(tensors, scale)]

    def primitives(self):
        return self.Primitives()


class ForgetsTheSignOfZero(Composed):
    class Primitives(HostPrimitives):
        def clamp(self, tensors, low, high):
            return super().clamp([tensor + 0 for tensor in tensors], low, high)

    def primitives(self):
        return self.Primitives()


class ChangesWhatIsMeasured:
    """Primitives whose `change` has its say after every measurement of norms."""

    class Primitives(HostPrimitives):
        def measure(self, tensors, p, axes=None, *, zero_nonfinite=False):
            tensors, measure = super().measure(tensors, p, axes, zero_nonfinite=zero_nonfinite)
            return tensors, self.change(tensors, measure)

    def primitives(self):
        return self.Primitives()


class CountsTensorsNotElements(ChangesWhatIsMeasured, Composed):
    class Primitives(ChangesWhatIsMeasured.Primitives):
        def change(self, tensors, measure):
            return dataclasses.replace(measure, nonfinite=min(measure.nonfinite, 1))


class SumsInHalfPrecision(Healthy):
    class Primitives(HostPrimitives):
        def join(self, measure):
            joined = super().join(measure)
            with np.errstate(all="ignore"):
                squares = [np.square(np.abs(array).astype(np.float16)) for array in measure.arrays]
                total = float(sum((s.sum(dtype=np.float16) for s in squares), np.float16(0)))
            usable = measure.p == 2 and len(joined) == 1 and np.isfinite(total)
            return dataclasses.replace(joined, norms=Wide.of(np.array([total**0.5]))) if usable else joined

    def primitives(self):
        return self.Primitives()


class AddsAnEpsilonToTheNorm(ChangesWhatIsMeasured, Healthy):
    class Primitives(ChangesWhatIsMeasured.Primitives):
        def change(self, tensors, measure):
            return dataclasses.replace(measure, norms=Wide.of(measure.norms.to_float() + 1e-6))


class PrimitivesWriteIntoTheInput(Healthy):
    def primitives(self):
        return HostPrimitives(in_place=True)


class ExceedsTheLimitOfNone(Healthy):
    """A limit that is left out of the comparison: everything is scaled to it, also what is in range."""

    class Primitives(HostPrimitives):
        def decide(self, measure, limits, nonfinite, *, at_least=0.0):
            scale = super().decide(measure, limits, nonfinite, at_least=at_least)
            return dataclasses.replace(scale, acts=scale.acts | True, factors=Wide.of(scale.factors.to_float() * 0.999))

    def primitives(self):
        return self.Primitives()


class TakesColumnsForRows(Composed):
    class Primitives(HostPrimitives):
        def measure(self, tensors, p, axes=None, *, zero_nonfinite=False):
            other = (
                [(t.ndim - 1 - own[0],) if own else () for t, own in zip(tensors, axes, strict=True)] if axes else None
            )
            return super().measure(tensors, p, other, zero_nonfinite=zero_nonfinite)

    def primitives(self):
        return self.Primitives()


class HoldsALittleLower(Composed):
    """Limits that are off by one unit of float64."""

    class Primitives(HostPrimitives):
        def decide(self, measure, limits, nonfinite, *, at_least=0.0):
            return super().decide(measure, np.nextafter(limits, 0.0), nonfinite, at_least=at_least)

    def primitives(self):
        return self.Primitives()


class KeepsBoundsAlmost(Composed):
    """A hard bound by the quotient alone: what is stored is over it about every other time."""

    class Primitives(HostPrimitives):
        def within(self, tensors, measure, limits, nonfinite):
            scale = self.decide(measure, limits, nonfinite)
            return self.apply(tensors, scale), scale

    def primitives(self):
        return self.Primitives()


class PrimitivesKeepBoundsAlmost(KeepsBoundsAlmost):
    def to_host(self, tensors, *, writable=False):
        return Healthy.to_host(self, tensors, writable=writable)


class KeepsBoundsByFar(Composed):
    """A hard bound by a factor that is smaller than it need be."""

    class Primitives(HostPrimitives):
        def within(self, tensors, measure, limits, nonfinite):
            scale = self.decide(measure, limits, nonfinite)
            factors = np.where(scale.acts, scale.factors.to_float() * (1 - 2.0**-20), 1.0)
            scale = dataclasses.replace(scale, factors=Wide.of(factors))
            return self.apply(tensors, scale), scale

    def primitives(self):
        return self.Primitives()


class ForgetsTheFloor(Composed):
    class Primitives(HostPrimitives):
        def decide(self, measure, limits, nonfinite, *, at_least=0.0):
            return super().decide(measure, limits, nonfinite)

    def primitives(self):
        return self.Primitives()


class SumsExamplesNarrowly(Composed):
    class Primitives(HostPrimitives):
        def total(self, tensors):
            return [np.asarray(tensor.sum(0), tensor.dtype) for tensor in tensors]

    def primitives(self):
        return self.Primitives()


class AveragesExamples(Composed):
    class Primitives(HostPrimitives):
        def total(self, tensors):
            return [np.asarray(t / max(len(t), 1), t.dtype) for t in super().total(tensors)]

    def primitives(self):
        return self.Primitives()


class LearnsFromFaults(ChangesWhatIsMeasured, Composed):
    class Primitives(ChangesWhatIsMeasured.Primitives):
        def change(self, tensors, measure):
            return dataclasses.replace(measure, nonfinite=0)


class TakesTheNearestPercentile(Composed):
    class Primitives(HostPrimitives):
        class arithmetic(Arithmetic):
            @staticmethod
            def percentile(values, count, q):
                return float(np.percentile(values[: int(count)], q, method="nearest"))

    def primitives(self):
        return self.Primitives()


class LearnsFromSpikes(Composed):
    """The second moments of what came in, rather than of what was left."""

    class Primitives(HostPrimitives):
        def spike(self, tensors, moments, threshold, decay, acts):
            clipped, _, changed = super().spike(tensors, moments, threshold, decay, acts)
            _, after, _ = super().spike(tensors, moments, threshold, decay, False)
            return clipped, after, changed

    def primitives(self):
        return self.Primitives()


class OverwritesTheState(Composed):
    class Primitives(HostPrimitives):
        def spike(self, tensors, moments, threshold, decay, acts):
            clipped, after, changed = super().spike(tensors, moments, threshold, decay, acts)
            for moment, new in zip(moments, after, strict=True):
                moment[...] = new
            return clipped, after, changed

    def primitives(self):
        return self.Primitives()


class LetsOtherGroupsPass(Composed):
    """A fault in one group leaves the others as they are."""

    class Primitives(HostPrimitives):
        def overrule(self, tensors, faults, nonfinite):
            return list(tensors)

    def primitives(self):
        return self.Primitives()
