"""Norms of tensors and of their units, as `Numbers`: sums in blocks, what could overflow relative to a power of two.

Squares are summed in float64, on devices without it in float32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.linalg import svdvals, vector_norm

from clipcore.backend import Axes
from clipcore_torch._numbers import Numbers, lowest_power, power, split, times_power, unit_roundoff, wide_dtype
from clipcore_torch._together import groups, others

Norm = float | Literal["svd", "power"]  # a p-norm, or the largest singular value and how it is found

# elements that are summed in a row: squares of float32 have digits to spare in float64, those of float64 have none
_LONG_BLOCK, _SHORT_BLOCK = 1024, 16
_POWER_STEPS = 30


def reals(x: Tensor) -> Tensor:
    """The elements as real numbers, with an axis of two more where they are complex."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def units_first(x: Tensor, axes: Axes) -> Tensor:
    """The tensor as (units, what feeds each), a view where its strides allow one."""
    axes = tuple(axis % x.ndim for axis in axes)
    rest = [axis for axis in range(x.ndim) if axis not in axes]
    shape = [math.prod([x.shape[axis] for axis in group]) for group in (axes, rest)]
    return x.permute([*axes, *rest]).reshape(shape) if axes else x.reshape(shape)


def count_units(x: Tensor, axes: Axes) -> int:
    """How many units a tensor has; one where no axis runs over them."""
    return math.prod([x.shape[axis] for axis in axes])  # torch.compile takes no generator


def unit_norms(x: Tensor, p: float, axes: Axes) -> Numbers:
    """The p-norm of each unit of a tensor, a vector."""
    wide = wide_dtype(x.device)
    rows = units_first(reals(x), axes)
    if not x.numel():
        return split(torch.zeros(count_units(x, axes), dtype=wide, device=x.device))
    if can_be_summed_as_it_is(x, p):
        return split(_long_norm(rows, p, wide, _LONG_BLOCK))
    if p == 2:
        unit, exponent = _power_beside(rows, wide)
        mantissa, shift = split(_long_norm(rows.to(wide) / unit[:, None], p, wide, _SHORT_BLOCK))
        return Numbers(mantissa, shift + exponent)
    if x.is_complex():
        rows = rows.reshape(len(rows), -1, 2)
    # relative to the largest magnitude itself: of half of it, (1/2)**p may underflow
    unit = _peak(rows.flatten(1), wide)
    magnitudes = rows.to(wide) / unit.reshape(-1, *[1] * (rows.ndim - 1))
    magnitudes = vector_norm(magnitudes, 2, dim=-1) if x.is_complex() else magnitudes
    top = _peak(magnitudes, wide)  # 1, or up to sqrt(2) for complex elements
    ratio = split(_long_norm(magnitudes / top[:, None], p, wide, _SHORT_BLOCK) * top)
    mantissa, exponent = split(unit)
    return Numbers(mantissa * ratio.mantissa, exponent + ratio.exponent)


def can_be_summed_as_it_is(x: Tensor, p: float) -> bool:
    """Whether no power of an element leaves the range of the dtype in which the device sums."""
    narrow = wide_dtype(x.device) is torch.float64 and x.dtype not in (torch.float64, torch.complex128)
    return narrow and (p == 2 or (p == 1 and not x.is_complex()))


def _long_norm(rows: Tensor, p: float, dtype: torch.dtype, block: int) -> Tensor:
    """The p-norm of each row, summed in blocks, and these in blocks, since on a CPU torch adds a row up in a row."""
    while rows.shape[1] > block:
        whole = rows.shape[1] // block * block
        blocks = vector_norm(rows[:, :whole].reshape(rows.shape[0], -1, block), p, dim=2, dtype=dtype)
        rows = torch.cat([blocks, rows[:, whole:].to(dtype)], 1)
    norms: Tensor = vector_norm(rows, p, dim=1, dtype=dtype)
    return norms


def sum_error(length: int, dtype: torch.dtype, wide: torch.dtype) -> float:
    """What the 2-norm of a row of so many elements can be off by, relative: the worst case of its additions."""
    narrow = wide is torch.float64 and dtype != torch.float64
    block, levels = (_LONG_BLOCK if narrow else _SHORT_BLOCK), 1
    while length > block:
        length, levels = length // block + length % block, levels + 1  # as `_long_norm` goes
    return unit_roundoff(wide) * (levels * (block / 2 + 1) + 2)


def _peak(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest magnitude of each row, a constant to autograd; 1 where it is 0, inf or NaN."""
    peak = vector_norm(rows.detach(), math.inf, dim=1).to(dtype)
    return torch.where(torch.isfinite(peak) & (peak > 0), peak, 1)


def _power_beside(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(2**exponent, exponent) for each row, normal and at most its largest magnitude where that is normal."""
    exponent = (split(_peak(rows, dtype)).exponent - 1).clamp(min=lowest_power(dtype))
    return power(exponent, dtype), exponent


def spectral_norm(x: Tensor, axes: Axes, method: str) -> Numbers:
    """The largest singular value of a tensor as a matrix of units, a vector of one; NaN where an element is not finite.

    torch's own SVD waits for a device, to ask whether it converged.
    """
    wide = wide_dtype(x.device)
    if not x.numel():
        return split(torch.zeros(1, dtype=wide, device=x.device))
    unit, exponent = _power_beside(reals(x).reshape(1, -1), wide)
    matrix = units_first(x, axes)
    matrix = matrix.to(torch.promote_types(matrix.dtype, wide)) / unit
    finite = torch.isfinite(matrix)
    matrix = torch.where(finite, matrix, 0)  # the SVD refuses others
    top = svdvals(matrix).amax() if method == "svd" else _by_power(matrix)
    mantissa, shift = split(torch.where(finite.all(), top, math.nan)[None])
    return Numbers(mantissa, shift + exponent)


def _by_power(matrix: Tensor) -> Tensor:
    vector = _start(matrix.shape[1]).to(matrix, non_blocking=True)  # else it would wait for the device
    for _ in range(_POWER_STEPS):
        vector = matrix.mH @ (matrix @ vector)
        length = vector_norm(vector)
        vector = vector / torch.where(length > 0, length, 1)
    norm: Tensor = vector_norm(matrix @ vector)
    return norm


@torch.library.custom_op("clipcore::power_start", mutates_args=())
def _start(length: int) -> Tensor:
    """Where the power method starts, in every framework; an operation, since NumPy's generator cannot be traced."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal(length))


@_start.register_fake
def _(length: int) -> Tensor:
    return torch.empty(length, dtype=torch.float64)


def join(each: Numbers, p: float) -> Numbers:
    """The joint p-norm of numbers along their first axis."""
    top = each.exponent.amax(0)
    relative = times_power(each.mantissa, each.exponent - top).T
    largest = _peak(relative, relative.dtype)
    mantissa, exponent = split(_long_norm(relative / largest[:, None], p, relative.dtype, _SHORT_BLOCK) * largest)
    return Numbers(mantissa, exponent + top)


def each_norm(tensors: Sequence[Tensor], p: Norm, axes: Sequence[Axes]) -> list[Numbers]:
    """The norms of each tensor's units, tensor by tensor, in vectors one after the other."""
    if isinstance(p, str):
        return [spectral_norm(x, own, p) for x, own in zip(tensors, axes, strict=True)]
    found: dict[int, Numbers] = {}
    whole = [i for i, x in enumerate(tensors) if not axes[i] and x.numel() and can_be_summed_as_it_is(x, p)]
    together = groups(tensors, whole)
    for places in together:
        values = torch._foreach_norm(
            [reals(tensors[i]) for i in places], p, dtype=wide_dtype(tensors[places[0]].device)
        )
        each = split(torch.stack(values))  # together: it is some twenty launches
        for start, stop in _stretches(places):
            found[places[start]] = Numbers(*(part[start:stop] for part in each))
    for i in others(tensors, together):
        found[i] = unit_norms(tensors[i], p, axes[i])
    return [found[i] for i in range(len(tensors)) if i in found]


def _stretches(places: Sequence[int]) -> list[tuple[int, int]]:
    """Where consecutive numbers begin and end among ascending ones."""
    starts = [at for at, place in enumerate(places) if at == 0 or place != places[at - 1] + 1]
    return list(itertools.pairwise([*starts, len(places)]))
