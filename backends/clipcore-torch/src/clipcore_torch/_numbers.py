"""Numbers that cannot leave the range of a dtype: mantissa * 2**exponent, as tensors of any device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipcore_torch._tensors import DEVICES_WITHOUT_FLOAT64


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


class Numbers(NamedTuple):
    """mantissa * 2**exponent, two tensors of one shape; a mantissa of 0, inf or NaN stands for itself."""

    mantissa: Tensor
    exponent: Tensor


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which a device sums: float64, on devices without it (Apple's) float32."""
    return torch.float32 if device.type in DEVICES_WITHOUT_FLOAT64 else torch.float64


def split(x: Tensor) -> Numbers:
    """A float64 or float32 tensor, its mantissas in [0.5, 1) but for 0, inf and NaN.

    By the bits, since inductor's C++ for `torch.frexp` does not compile (torch 2.13).
    """
    integers, bits, bias = _FORMATS[x.dtype]
    small = x < 2.0 ** (bits + 1 - bias)  # a subnormal number has no exponent bits: lifted first
    lifted = torch.where(small, x * 2.0 ** (bits + 1), x)
    field = (lifted.detach().view(integers) >> bits) & (2 * bias + 1)
    exponent = field - (bias - 1)
    lowered = (exponent - torch.where(small, bits + 1, 0)).to(torch.int64)
    return Numbers(times_power(lifted, -exponent), lowered)


def times_power(x: Tensor, exponent: Any) -> Tensor:
    """Multiply by 2**exponent in two steps, since 2**exponent itself may leave the range."""
    bias = _FORMATS[x.dtype].bias
    exponent = exponent.clamp(2 - 2 * bias, 2 * bias)
    half = exponent >> 1
    product: Tensor = x * power(half, x.dtype) * power(exponent - half, x.dtype)
    return product


def power(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2**exponent, exactly, for exponents of normal numbers."""
    integers, bits, bias = _FORMATS[dtype]
    result: Tensor = ((exponent.to(integers) + bias) << bits).view(dtype)
    return result


def lowest_power(dtype: torch.dtype) -> int:
    """The exponent of the smallest power of two that is a normal number."""
    return 1 - _FORMATS[dtype].bias


def to_float(numbers: Numbers) -> Tensor:
    """As numbers of the mantissas' dtype; inf beyond its range."""
    return times_power(*numbers)


def numbers_like(values: Any, like: Numbers) -> Numbers:
    """One number, several, or a tensor of them, as one for each of `like`."""
    mantissa, exponent = like
    if isinstance(values, Tensor):
        given = split(values.to(mantissa))
        return Numbers(given.mantissa.expand_as(mantissa), given.exponent.expand_as(exponent))
    if isinstance(values, Sequence):
        pairs = [math.frexp(value) for value in values]
        parts = torch.tensor([m for m, _ in pairs], dtype=mantissa.dtype), torch.tensor([e for _, e in pairs])
        # torch.tensor on a device would wait for it
        return Numbers(*(part.to(mantissa.device, non_blocking=True) for part in parts))
    m, e = math.frexp(values)
    return Numbers(torch.full_like(mantissa, m), torch.full_like(exponent, e))


def exceed(numbers: Numbers, others: Numbers) -> Tensor:
    """Where they are larger than the others, which may leave the range in the numbers' unit: the answer stays right."""
    return numbers.mantissa > times_power(others.mantissa, others.exponent - numbers.exponent)


def either(condition: Tensor, yes: Numbers, no: Numbers) -> Numbers:
    """`yes` where the condition holds, else `no`."""
    return Numbers(*(torch.where(condition, *parts) for parts in zip(yes, no, strict=True)))


def concatenated(parts: Sequence[Numbers], device: torch.device) -> Numbers:
    """Vectors of numbers on any devices, one after the other on `device`."""
    if not parts:
        return split(torch.zeros(0, dtype=wide_dtype(device), device=device))
    mantissas = [part.mantissa.to(device, wide_dtype(device)) for part in parts]
    return Numbers(torch.cat(mantissas), torch.cat([part.exponent.to(device) for part in parts]))


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to a dtype's normal numbers."""
    return 2.0 ** -_DIGITS[dtype][0]


def smallest_subnormal(dtype: torch.dtype) -> float:
    """The smallest positive number of a dtype."""
    return 2.0 ** _DIGITS[dtype][1]


def rounded(value: float, dtype: torch.dtype) -> float:
    """A clamp's bound rounded to a dtype; a finite bound beyond its range is its largest number."""
    largest = torch.finfo(dtype).max
    if abs(value) == math.inf or value == 0:
        return value
    if abs(value) >= largest:
        return math.copysign(largest, value)
    digits, lowest = _DIGITS[dtype]
    unit = max(math.frexp(value)[1] - digits, lowest)
    nearest = math.ldexp(round(math.ldexp(value, -unit)), unit)
    return math.copysign(min(abs(nearest), largest), value)
