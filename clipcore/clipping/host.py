"""The primitives on NumPy arrays: what every eager CPU tensor is clipped by, exact to the last bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipcore.backend import NonFiniteMode
from clipcore.clipping import kernels
from clipcore.clipping.kernels import Array, Interval, Wide
from clipcore.clipping.report import ClipReport
from clipcore.errors import NonFinite

_ONE = Wide(1.0, 0)  # deliberately not normalised: "in range" differs from a factor that rounds to one
_FAULT_SCALES = {"propagate": Wide(math.nan, 0), "skip": Wide(0.0, 0)}


@dataclass(frozen=True)
class _Measure:
    """Bounds of the norm of some arrays, and what it takes to know it exactly."""

    bounds: Interval | None
    nonfinite: int
    arrays: Sequence[Array]
    p: float

    def scale(self, max_norm: float) -> tuple[Wide, Wide]:
        """(norm, factor), summing again exactly where the fast sum leaves the rounded factor open."""
        assert self.bounds is not None
        if max_norm == math.inf:
            return self.bounds.value, _ONE
        dtypes = {kernels.MULTIPLY_DTYPE[array.dtype.name] for array in self.arrays}
        low, norm, high = self.bounds
        if low != high and _outcome(low, max_norm, dtypes) != _outcome(high, max_norm, dtypes) and self._can_be_exact():
            norm = kernels.exact_norm(self.arrays, self.p)
        return norm, kernels.quotient(max_norm, norm) if norm.exceeds(max_norm) else _ONE

    def _can_be_exact(self) -> bool:
        # Every clipped float64 call would need 60 digits for these powers; they stay within 1e-14.
        fractional = self.p not in (1.0, 2.0, math.inf)
        return not (fractional and any(kernels.MULTIPLY_DTYPE[a.dtype.name] is np.float64 for a in self.arrays))


def _outcome(norm: Wide, max_norm: float, dtypes: set[type[np.floating[Any]]]) -> Any:
    """What the output depends on: whether `norm` is over the limit, and the factors as they would be multiplied."""
    if not norm.exceeds(max_norm):
        return None
    return {kernels.multiplier(kernels.quotient(max_norm, norm), dtype) for dtype in dtypes}


class HostPrimitives:
    """`clipcore.backend.Primitives` over NumPy arrays; with `in_place`, results are written into the arrays."""

    def __init__(self, in_place: bool = False) -> None:
        self._in_place = in_place

    def measure(self, tensors: Sequence[Array], p: float, *, zero_nonfinite: bool) -> tuple[list[Array], _Measure]:
        bounds, nonfinite = kernels.norm_bounds(tensors, p), 0
        if bounds is None:
            nonfinite = kernels.count(tensors, kernels.not_finite)
            if zero_nonfinite:
                tensors = [self._fill(array, kernels.not_finite(array), 0) for array in tensors]
                bounds = kernels.norm_bounds(tensors, p)
        return list(tensors), _Measure(bounds, nonfinite, tensors, p)

    def decide(
        self, measures: Sequence[_Measure], max_norm: float, nonfinite: NonFiniteMode
    ) -> tuple[list[Wide], ClipReport]:
        faults = sum(measure.nonfinite for measure in measures)
        if faults and nonfinite != "zero":
            scale = _fault_scale(faults, nonfinite)
            report = _report([Wide(math.nan, 0)] * len(measures), [scale] * len(measures), faults)
            return [scale] * len(measures), report
        settled = [measure.scale(max_norm) for measure in measures]
        norms, scales = [norm for norm, _ in settled], [scale for _, scale in settled]
        return scales, _report(norms, scales, faults, measures[0].p if measures else 2.0)

    def apply(self, tensors: Sequence[Array], scale: Wide) -> list[Array]:
        if scale is _ONE:
            return list(tensors)
        return [self._scaled(array, scale) for array in tensors]

    def clamp(
        self, tensors: Sequence[Array], low: float, high: float, nonfinite: NonFiniteMode
    ) -> tuple[list[Array], ClipReport]:
        faults = kernels.count(tensors, np.isnan)
        norm = Wide(math.nan, 0)
        if faults and nonfinite != "zero":
            scale = _fault_scale(faults, nonfinite)
            return self.apply(tensors, scale), _report([norm], [scale], faults)
        if faults:
            tensors = [self._fill(array, np.isnan(array), 0) for array in tensors]
        bounds = kernels.norm_bounds(tensors, 2.0)
        results = [self._clamped(array, low, high) for array in tensors]
        clamped = [array if result is None else result for array, result in zip(tensors, results, strict=True)]
        changed = any(result is not None for result in results)
        report = _report([bounds.value if bounds else Wide(math.inf, 0)], [_ONE], faults)
        return clamped, report._replace(clipped=changed)

    def _target(self, array: Array) -> Array:
        return array if self._in_place else kernels.empty_like(array)

    def _scaled(self, array: Array, scale: Wide) -> Array:
        out = self._target(array)
        if scale.mantissa == 0 or math.isnan(scale.mantissa):
            out[...] = scale.mantissa * (1 + 1j) if array.dtype.kind == "c" else scale.mantissa
        else:
            kernels.scale_into(array, scale, out)
        return out

    def _fill(self, array: Array, where: Array, value: float) -> Array:
        if not where.any():
            return array
        out = self._target(array)
        np.copyto(out, array)
        out[where] = value
        return out

    def _clamped(self, array: Array, low: float, high: float) -> Array | None:
        below, above = kernels.bound_in(low, array.dtype), kernels.bound_in(high, array.dtype)
        under, over = array < below, array > above
        if not (under.any() or over.any()):
            return None
        out = self._target(array)
        np.copyto(out, array)
        np.copyto(out, below, where=under)
        np.copyto(out, above, where=over)
        return out


def _fault_scale(faults: int, nonfinite: NonFiniteMode) -> Wide:
    if nonfinite == "raise":
        raise NonFinite(f"{faults} elements are inf or NaN")
    return _FAULT_SCALES[nonfinite]


def _report(norms: Sequence[Wide], scales: Sequence[Wide], faults: int, p: float = 2.0) -> ClipReport:
    return ClipReport(
        norm=_joint_norm(norms, p),
        scale=min(map(float, scales), default=1.0),
        clipped=any(scale is not _ONE for scale in scales),
        nonfinite=faults,
        norms=tuple(map(float, norms)),
        scales=tuple(map(float, scales)),
    )


def _joint_norm(norms: Sequence[Wide], p: float) -> float:
    """The norm of all groups together, from theirs."""
    if len(norms) <= 1:
        return float(norms[0]) if norms else 0.0
    top = max(norm.exponent for norm in norms)
    values = np.array([math.ldexp(norm.mantissa, norm.exponent - top) for norm in norms])
    peak = float(values.max())
    if not peak > 0:
        return peak
    joint = float(np.linalg.norm(values / peak, p)) * peak
    return float(Wide.of(joint, top))
