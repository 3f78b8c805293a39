"""Factors, one per norm: how they follow from limits, how tensors are multiplied by them, and hard bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipcore.backend import Axes, NonFiniteMode
from clipcore.errors import InvalidInput, NonFinite
from clipcore_torch._norms import Norm, reals, sum_error, units_first
from clipcore_torch._numbers import (
    Numbers,
    lowest_power,
    smallest_subnormal,
    split,
    times_power,
    to_float,
    unit_roundoff,
)
from clipcore_torch._tensors import map_values, values_of
from clipcore_torch._together import groups

Place = tuple[int, int]  # where the norms of a tensor's units stand in the vector of all: start and stop


class Measure(NamedTuple):
    """The norms of the units of some tensors, one after the other, or joined; NaN where an element is inf or NaN.

    Attributes:
        nonfinite: how many elements are inf or NaN.
        axes: of each tensor, those that run over its units.
        places: of each tensor; those that were joined share one.
    """

    norms: Numbers
    nonfinite: Tensor
    p: Norm
    axes: Sequence[Axes]
    places: Sequence[Place]
    joint: bool = False


class Scale(NamedTuple):
    """One factor per norm of a measure, whether it acts, and its limit.

    Attributes:
        axes: of each tensor, those that its factors stand along.
        fills: whether a factor may be a 0, which replaces inf and NaN as well.
    """

    factors: Numbers
    acts: Tensor
    limits: Numbers
    axes: Sequence[Axes]
    places: Sequence[Place]
    fills: bool


def scale_to(
    measure: Measure, acts: Tensor, targets: Numbers, limits: Numbers, nonfinite: NonFiniteMode, *, fills: bool
) -> Scale:
    """The factors target / norm where they act, else 1; where there are faults, what `nonfinite` says."""
    # where, not if: a branch on the norm would wait for the device; the inner ones keep derivatives finite
    mantissa = torch.where(acts, targets.mantissa, 1) / torch.where(acts, measure.norms.mantissa, 1)
    exponent = torch.where(acts, targets.exponent - measure.norms.exponent, 0)
    if nonfinite != "zero":
        fault = measure.nonfinite > 0
        mantissa = torch.where(fault, fault_factor(measure.nonfinite, nonfinite), mantissa)
        exponent, acts = torch.where(fault, 0, exponent), acts | fault
    axes = [()] * len(measure.axes) if isinstance(measure.p, str) else measure.axes
    return Scale(Numbers(mantissa, exponent), acts, limits, axes, measure.places, fills or nonfinite == "skip")


def fault_factor(faults: Any, nonfinite: NonFiniteMode) -> float:
    """The factor that takes the place of all others where an element is not finite."""
    if nonfinite == "raise":
        raise_if_any(faults)
    return 0.0 if nonfinite == "skip" else math.nan


def raise_if_any(faults: Any) -> None:
    """Refuse faults, or to count them where nothing can be read."""
    refusal = (
        "nonfinite='raise' reads the gradients, which a compiled or transformed function cannot; use 'propagate', "
        "'zero' or 'skip' there, or clip outside of it"
    )
    if isinstance(faults, Tensor) and faults.is_meta:
        return  # what has no elements has none that are not finite
    if torch.compiler.is_compiling():
        raise InvalidInput(refusal)
    try:
        count = int(faults)
    except RuntimeError as err:
        if type(faults) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(faults):
            raise  # nothing hides its value: the error is of the device
        raise InvalidInput(refusal) from err
    if count:
        raise NonFinite(f"{count} elements are inf or NaN")


def spread(values: Tensor, places: Sequence[Place]) -> Tensor:
    """A vector of one value per norm, tensor by tensor: values that were joined are repeated."""
    return torch.cat([values[:0], *(values[start:stop] for start, stop in places)])


def apply(tensors: Sequence[Tensor], scale: Scale) -> list[Tensor]:
    """Each tensor, or unit, times its factor: one multiply in the multiply's dtype, then one rounding to its own."""
    values = [values_of(tensor) for tensor in tensors]
    found: dict[int, Tensor] = {}
    plain = [i for i, x in enumerate(values) if not scale.axes[i] and x.dtype in (torch.float32, torch.float64)]
    for indices in groups(values, plain) if len(set(scale.places)) == 1 else []:
        factor, rest = _multipliers(_factors_of(values[indices[0]], scale, indices[0]), values[indices[0]].dtype)
        products = list(torch._foreach_mul(torch._foreach_mul([values[i] for i in indices], factor), rest))
        if scale.fills:
            products = [torch.where(factor == 0, 0, product) for product in products]
        found.update(zip(indices, products, strict=True))

    def scaled(index: int, x: Tensor) -> Tensor:
        return found[index] if index in found else _scaled(x, _factors_of(x, scale, index), scale.fills)

    return [map_values(lambda x, i=i: scaled(i, x), tensor) for i, tensor in enumerate(tensors)]  # type: ignore[misc]


def _factors_of(x: Tensor, scale: Scale, index: int) -> Numbers:
    """The factors of one tensor, on its device, so that they multiply its units."""
    (start, stop), axes = scale.places[index], scale.axes[index]
    parts = [part[start:stop].to(x.device) for part in scale.factors]
    if not axes:
        return Numbers(*(part[0] for part in parts))
    order = [*axes, *(axis for axis in range(x.ndim) if axis not in axes)]
    shape = [x.shape[axis] if axis in axes else 1 for axis in order]
    places = [order.index(axis) for axis in range(x.ndim)]
    return Numbers(*(part.reshape(shape).permute(places) for part in parts))


def _scaled(x: Tensor, factors: Numbers, fills: bool) -> Tensor:
    parts = reals(x)
    dtype = torch.float64 if parts.dtype == torch.float64 else torch.float32
    if x.is_complex():
        factors = Numbers(*(part[..., None] for part in factors))
    factor, rest = _multipliers(factors, dtype)
    product = parts.to(dtype) * factor * rest
    if fills:
        product = torch.where(factor == 0, 0, product)
    product = product.to(parts.dtype)
    return torch.view_as_complex(product) if x.is_complex() else product


def _multipliers(factors: Numbers, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two normal factors of the dtype whose product it is; the second is 1 unless the product is not normal."""
    mantissa, exponent = factors
    first = lowest_power(dtype) + 1
    within = exponent.clamp(first, -first)  # of a unit of subnormal numbers, the factor may be beyond the dtype
    factor = times_power(mantissa, within).to(dtype)
    return factor, times_power(torch.ones_like(factor), exponent - within)


def hold_hard(
    tensors: Sequence[Tensor], measure: Measure, scale: Scale, nonfinite: NonFiniteMode, *, certain: bool = True
) -> Scale:
    """The scale with factors so low that what is stored keeps the limits, whichever way each product is rounded.

    Rounding adds to a norm at most a part of it, and a little for each product below the normal numbers.

    Args:
        certain: of a spectral norm, whether the roundings may all add up in one direction, which they hardly ever do.
    """
    if not tensors:
        return scale
    limits = to_float(scale.limits)
    some, most = _lost_below_normal(tensors, measure, scale)
    # where so much is lost that the factor is halved, more products than were counted may be so small
    lost = torch.where(2 * some > limits, most, some)
    targets = split((limits - lost).clamp(min=0) * (1 - _margins(tensors, measure, certain)))
    return scale_to(measure, scale.acts, targets, scale.limits, nonfinite, fills=True)


def _margins(tensors: Sequence[Tensor], measure: Measure, certain: bool) -> Tensor:
    """For each norm, the part of it that errors of the sum and of rounding can add up to."""
    norms = measure.norms.mantissa
    each = [_margin(values_of(x), axes, measure, certain) for x, axes in zip(tensors, measure.axes, strict=True)]
    if measure.joint:
        joining = sum_error(len(each), norms.dtype, norms.dtype)
        return torch.full_like(norms, max(each) + joining)
    places = zip(each, measure.places, strict=True)
    return torch.cat([norms.new_full((stop - start,), margin) for margin, (start, stop) in places])


def _margin(x: Tensor, axes: Axes, measure: Measure, certain: bool) -> float:
    wide, dtype = measure.norms.mantissa.dtype, reals(x).dtype
    multiply = torch.float64 if dtype == torch.float64 else torch.float32
    # of the factor and of the product; then of what is stored, where that is narrower; then of the quotient
    rounding = 2 * unit_roundoff(multiply) + (unit_roundoff(dtype) if dtype != multiply else 0.0)
    rounding += 5 * unit_roundoff(wide)
    shape = units_first(x, axes).shape
    if not isinstance(measure.p, str):
        return rounding + sum_error(shape[1] * (2 if x.is_complex() else 1), dtype, wide)
    # the matrix of all roundings has a spectral norm of at most its Frobenius norm
    return min(rounding * (math.sqrt(min(shape)) if certain else 1.0) + 2 * max(shape) * unit_roundoff(wide), 1.0)


def _lost_below_normal(tensors: Sequence[Tensor], measure: Measure, scale: Scale) -> tuple[Tensor, Tensor]:
    """For each norm, what rounding can add to it in products below the normal numbers: those that may lie there by
    their factors, and if all did.
    """
    norms, factors = measure.norms.mantissa, to_float(scale.factors)
    some, most = [], []
    for tensor, axes, (start, stop) in zip(tensors, scale.axes, scale.places, strict=True):
        rows = units_first(reals(values_of(tensor)), axes)
        products = rows.abs().to(norms.dtype) * factors[start:stop, None].to(rows.device)
        # twice the smallest normal number, since the factor is yet to be lowered
        small = (rows != 0) & (products < 2 * torch.finfo(rows.dtype).tiny)
        each = max(smallest_subnormal(rows.dtype) / 2, math.ulp(0.0))
        some.append(small.sum(1).to(norms.device, norms.dtype).sqrt() * each)
        most.append(torch.full_like(some[-1], math.sqrt(rows.shape[1]) * each))
    if measure.joint:
        return torch.stack(some).sum(0), torch.stack(most).sum(0)
    return torch.cat(some), torch.cat(most)
