"""Backends for NumPy arrays, healthy and wrong on purpose: each has one fault, which conformance must name."""

from __future__ import annotations

import dataclasses

import numpy as np

from clipcore.clipping.host import HostPrimitives
from clipcore.clipping.kernels import Interval
from clipcore.numpy_backend import NumpyBackend


class Tensor(np.ndarray):
    """An array of a class of its own, by whose module the backend is found."""


class Healthy(NumpyBackend):
    """NumPy's backend over `Tensor`."""

    name = "broken"

    def is_tensor(self, obj):
        return isinstance(obj, Tensor)

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
        def clamp(self, tensors, low, high, nonfinite):
            return super().clamp([tensor + 0 for tensor in tensors], low, high, nonfinite)

    def primitives(self):
        return self.Primitives()


class CountsTensorsNotElements(Composed):
    class Primitives(HostPrimitives):
        def measure(self, tensors, p, *, zero_nonfinite):
            tensors, measure = super().measure(tensors, p, zero_nonfinite=zero_nonfinite)
            return tensors, dataclasses.replace(measure, nonfinite=min(measure.nonfinite, 1))

    def primitives(self):
        return self.Primitives()


class SumsInHalfPrecision(Healthy):
    class Primitives(HostPrimitives):
        def measure(self, tensors, p, *, zero_nonfinite):
            tensors, measure = super().measure(tensors, p, zero_nonfinite=zero_nonfinite)
            with np.errstate(all="ignore"):
                squares = [np.square(np.abs(tensor).astype(np.float16)) for tensor in tensors]
                total = float(sum((s.sum(dtype=np.float16) for s in squares), np.float16(0)))
            if p != 2 or measure.bounds is None or not np.isfinite(total):
                return tensors, measure
            return tensors, dataclasses.replace(measure, bounds=Interval.around(total**0.5, error=0))

    def primitives(self):
        return self.Primitives()


class AddsAnEpsilonToTheNorm(Healthy):
    class Primitives(HostPrimitives):
        def measure(self, tensors, p, *, zero_nonfinite):
            tensors, measure = super().measure(tensors, p, zero_nonfinite=zero_nonfinite)
            if measure.bounds is None:
                return tensors, measure
            norm = float(measure.bounds.value) + 1e-6
            return tensors, dataclasses.replace(measure, bounds=Interval.around(norm, error=0))

    def primitives(self):
        return self.Primitives()


class PrimitivesWriteIntoTheInput(Healthy):
    def primitives(self):
        return HostPrimitives(in_place=True)


class ExceedsTheLimitOfNone(Healthy):
    """A limit that is left out of the comparison: everything is scaled to it, also what is in range."""

    class Primitives(HostPrimitives):
        def decide(self, measures, max_norm, nonfinite):
            raised = [
                dataclasses.replace(m, bounds=Interval.around(max(float(m.bounds.value), max_norm * 1.001), error=0))
                if m.bounds is not None and 0 < max_norm < 1e300
                else m
                for m in measures
            ]
            return super().decide(raised, max_norm, nonfinite)

    def primitives(self):
        return self.Primitives()
