"""Measure, decide, apply as torch operations: for devices, compiled functions and autograd; nothing waits for a device.

A norm, or a factor, is carried as mantissa * 2**exponent, two 0-d tensors, so that it cannot leave the range of its
dtype. Squares are summed in float64, on devices without it (Apple's) in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from clipcore.backend import NonFiniteMode
from clipcore.clipping.report import ClipReport
from clipcore.errors import InvalidInput, NonFinite
from clipcore_torch._tensors import DEVICES_WITHOUT_FLOAT64, map_values, values_of

_BLOCK = 1024  # elements that are summed in a row


class _Format(NamedTuple):
    """Where the exponent stands in a float's bits: integers of its size, bits of the mantissa, bias of the exponent."""

    integers: torch.dtype
    bits: int
    bias: int


_FORMATS = {torch.float64: _Format(torch.int64, 52, 1023), torch.float32: _Format(torch.int32, 23, 127)}
# digits of the significand and exponent of the smallest subnormal number
_DIGITS = {
    torch.float64: (53, -1074),
    torch.float32: (24, -149),
    torch.bfloat16: (8, -133),
    torch.float16: (11, -24),
}


class _Measure(NamedTuple):
    """The p-norm mantissa * 2**exponent of some tensors, and how many elements are not finite."""

    mantissa: Tensor
    exponent: Tensor
    nonfinite: Tensor
    p: float


class _Scale(NamedTuple):
    """The factor mantissa * 2**exponent; with `fills` it may be a 0 that replaces inf and NaN as well."""

    mantissa: Tensor
    exponent: Tensor
    fills: bool


class TorchPrimitives:
    """`clipcore.backend.Primitives` over torch tensors of any device."""

    def measure(self, tensors: Sequence[Tensor], p: float, *, zero_nonfinite: bool) -> tuple[list[Tensor], _Measure]:
        faults = _count(tensors, _not_finite)
        if zero_nonfinite:
            tensors = [map_values(lambda x: torch.where(torch.isfinite(x), x, 0), tensor) for tensor in tensors]
        mantissa, exponent = _norm(tensors, p)
        return list(tensors), _Measure(mantissa, exponent, faults, p)

    def decide(
        self, measures: Sequence[_Measure], max_norm: float, nonfinite: NonFiniteMode
    ) -> tuple[list[_Scale], ClipReport]:
        norms = _gather([measure.mantissa for measure in measures])
        exponents = _gather([measure.exponent for measure in measures])
        faults = _gather([measure.nonfinite for measure in measures]).sum()
        # the limit in the norms' unit may leave the range, and then the comparison is right all the same
        over = norms > _times_power(torch.full_like(norms, max_norm), -exponents)
        bound, shift = math.frexp(max_norm) if max_norm < math.inf else (1.0, 0)
        # where, not if: a branch on the norm would wait for the device; the inner one keeps derivatives finite
        scales = torch.where(over, bound / torch.where(over, norms, 1), 1)
        shifts = torch.where(over, shift - exponents, 0)
        norms, clipped = _times_power(norms, exponents), over.any()
        if nonfinite != "zero":
            fault = faults > 0
            scales = torch.where(fault, _fault_scale(faults, nonfinite), scales)
            shifts = torch.where(fault, 0, shifts)
            norms, clipped = torch.where(fault, math.nan, norms), clipped | fault
        factors = _times_power(scales, shifts)
        report = ClipReport(_joint(norms, measures[0].p), factors.amin(), clipped, faults, norms, factors)
        fills = nonfinite == "skip" or max_norm == 0
        return [_Scale(*pair, fills) for pair in zip(scales.unbind(), shifts.unbind(), strict=True)], report

    def apply(self, tensors: Sequence[Tensor], scale: _Scale) -> list[Tensor]:
        return [map_values(lambda x: _scaled(x, scale), tensor) for tensor in tensors]

    def clamp(
        self, tensors: Sequence[Tensor], low: float, high: float, nonfinite: NonFiniteMode
    ) -> tuple[list[Tensor], ClipReport]:
        faults = _count(tensors, torch.isnan)
        if nonfinite == "zero":
            tensors = [map_values(lambda x: torch.where(torch.isnan(x), 0, x), tensor) for tensor in tensors]
        norm = _times_power(*_norm(tensors, 2.0))
        changed = _count(tensors, lambda x: (x < _bound_in(low, x)) | (x > _bound_in(high, x))) > 0
        clamped = [map_values(lambda x: x.clamp(_bound_in(low, x), _bound_in(high, x)), tensor) for tensor in tensors]
        scale = torch.ones_like(norm)
        if nonfinite != "zero":
            fault = faults > 0
            scale = torch.where(fault, _fault_scale(faults, nonfinite), scale)
            norm, changed = torch.where(fault, math.nan, norm), changed | fault
            clamped = self.apply(clamped, _Scale(scale, torch.zeros_like(faults), fills=nonfinite == "skip"))
        return clamped, ClipReport(norm, scale, changed, faults, norm[None], scale[None])


def _not_finite(x: Tensor) -> Tensor:
    return ~torch.isfinite(x)


def _gather(parts: Sequence[Tensor]) -> Tensor:
    """0-d tensors of any devices, stacked on the first one's."""
    return torch.stack([part.to(parts[0].device) for part in parts])


def _count(tensors: Sequence[Tensor], is_fault: Callable[[Tensor], Tensor]) -> Tensor:
    """Number of elements for which `is_fault` holds, a 0-d int64 tensor."""
    if not tensors:
        return torch.zeros((), dtype=torch.int64)
    return _gather([is_fault(values_of(tensor)).sum() for tensor in tensors]).sum()


def _fault_scale(faults: Tensor, nonfinite: NonFiniteMode) -> float:
    """The factor that takes the place of all others where an element is not finite."""
    if nonfinite == "raise":
        _raise_if_any(faults)
    return 0.0 if nonfinite == "skip" else math.nan


def _raise_if_any(faults: Tensor) -> None:
    refusal = (
        "nonfinite='raise' reads the gradients, which a compiled or transformed function cannot; use 'propagate', "
        "'zero' or 'skip' there, or clip outside of it"
    )
    if torch.compiler.is_compiling():
        raise InvalidInput(refusal)
    try:
        count = int(faults)
    except RuntimeError as err:
        raise InvalidInput(refusal) from err
    if count:
        raise NonFinite(f"{count} elements are inf or NaN, and the policy has nonfinite='raise'; nothing was changed")


def _reals(x: Tensor) -> Tensor:
    """The elements as real numbers, with an axis of two more where they are complex."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _norm(tensors: Sequence[Tensor], p: float) -> tuple[Tensor, Tensor]:
    """The joint p-norm as (mantissa, exponent)."""
    values = [x for x in map(values_of, tensors) if x.numel()]
    if not values:
        device = tensors[0].device if tensors else "cpu"
        return _split(torch.zeros((), dtype=_wide(torch.device(device)), device=device))
    wide = _wide(values[0].device)
    narrow = wide is torch.float64 and not any(x.dtype in (torch.float64, torch.complex128) for x in values)
    if narrow and (p == 2 or (p == 1 and not any(x.is_complex() for x in values))):
        return _split(vector_norm(_gather([_long_norm(_reals(x), p, wide) for x in values]), p))
    # relative to the largest magnitude nothing overflows, and what underflows does not count
    unit = _peak([_reals(x) for x in values], wide)
    magnitudes = [_magnitudes(x, unit.to(x.device)) for x in values]
    top = _peak(magnitudes, wide)  # 1, or up to sqrt(2) for complex elements
    ratio = vector_norm(_gather([_long_norm(m / top.to(m.device), p, wide) for m in magnitudes]), p) * top
    (mantissa, exponent), (factor, shift) = _split(unit), _split(ratio)
    return mantissa * factor, exponent + shift


def _long_norm(x: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """The p-norm summed in blocks, and these in blocks, since on a CPU torch adds a whole tensor up in a row."""
    norms = x.reshape(-1)
    while norms.numel() > _BLOCK:
        whole = norms.numel() // _BLOCK * _BLOCK
        blocks = vector_norm(norms[:whole].reshape(-1, _BLOCK), p, dim=1, dtype=dtype)
        norms = torch.cat([blocks, norms[whole:].to(dtype)])
    norm: Tensor = vector_norm(norms, p, dtype=dtype)
    return norm


def _peak(values: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The largest magnitude, a constant to autograd; 1 where it is 0, inf or NaN."""
    peak = _gather([vector_norm(x.detach(), math.inf).to(dtype) for x in values]).amax()
    return torch.where(torch.isfinite(peak) & (peak > 0), peak, 1)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type in DEVICES_WITHOUT_FLOAT64 else torch.float64


def _magnitudes(x: Tensor, unit: Tensor) -> Tensor:
    parts = _reals(x).to(unit.dtype) / unit
    return vector_norm(parts, 2, dim=-1) if x.is_complex() else parts


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mantissa, exponent) with x = mantissa * 2**exponent, the mantissa in [0.5, 1); 0, inf and NaN stay themselves.

    By the bits, since inductor's C++ for `torch.frexp` does not compile (torch 2.13).
    """
    integers, bits, bias = _FORMATS[x.dtype]
    small = x < 2.0 ** (bits + 1 - bias)  # a subnormal number has no exponent bits: lifted first
    lifted = torch.where(small, x * 2.0 ** (bits + 1), x)
    field = (lifted.detach().view(integers) >> bits) & (2 * bias + 1)
    exponent = field - (bias - 1)
    return _times_power(lifted, -exponent), (exponent - torch.where(small, bits + 1, 0)).to(torch.int64)


def _power(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2**exponent, exactly, for exponents of normal numbers."""
    integers, bits, bias = _FORMATS[dtype]
    power: Tensor = ((exponent.to(integers) + bias) << bits).view(dtype)
    return power


def _times_power(x: Tensor, exponent: Tensor) -> Tensor:
    """Multiply by 2**exponent in two steps, since 2**exponent itself may leave the range."""
    bias = _FORMATS[x.dtype].bias
    exponent = exponent.clamp(2 - 2 * bias, 2 * bias)
    half = exponent >> 1
    product: Tensor = x * _power(half, x.dtype) * _power(exponent - half, x.dtype)
    return product


def _joint(norms: Tensor, p: float) -> Tensor:
    """The norm of all groups together, from theirs."""
    unit = _peak([norms], norms.dtype)
    norm: Tensor = vector_norm(norms / unit, p) * unit
    return norm


def _scaled(x: Tensor, scale: _Scale) -> Tensor:
    """Multiply by a factor in the multiply's dtype: at most 1 ulp from the exact product, unchanged for 1."""
    reals = _reals(x)
    dtype = torch.float64 if reals.dtype == torch.float64 else torch.float32
    first = 2 - _FORMATS[dtype].bias
    mantissa, exponent = scale.mantissa.to(x.device), scale.exponent.to(x.device)
    # a factor that is no normal number of the dtype is multiplied in two normal steps; the second is 1 otherwise
    factor = _times_power(mantissa, exponent.clamp(min=first)).to(dtype)
    rest = _times_power(torch.ones_like(factor), (exponent - first).clamp(max=0))
    product = reals.to(dtype) * factor * rest
    if scale.fills:
        product = torch.where(factor == 0, 0, product)
    product = product.to(reals.dtype)
    return torch.view_as_complex(product) if x.is_complex() else product


def _bound_in(value: float, x: Tensor) -> float:
    """A clamp's bound rounded to a tensor's dtype; a finite bound beyond its range is its largest number."""
    largest = torch.finfo(x.dtype).max
    if abs(value) == math.inf or value == 0:
        return value
    if abs(value) >= largest:
        return math.copysign(largest, value)
    digits, lowest = _DIGITS[x.dtype]
    unit = max(math.frexp(value)[1] - digits, lowest)
    rounded = math.ldexp(round(math.ldexp(value, -unit)), unit)
    return max(-largest, min(rounded, largest))
