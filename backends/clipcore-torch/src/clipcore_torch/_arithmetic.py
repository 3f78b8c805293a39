"""`clipcore.backend.Arithmetic` in torch: what policies do with norms and states, on one device, without waiting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipcore_torch._numbers import wide_dtype


class TorchArithmetic:
    """Functions of tensors of few elements; numbers of Python are taken beside them.

    Attributes:
        device: where new tensors are made.
    """

    device = torch.device("cpu")

    def array(self, value: Any) -> Tensor:
        return torch.full((), value, dtype=wide_dtype(self.device), device=self.device)

    def where(self, condition: Any, yes: Any, no: Any) -> Any:
        if not isinstance(condition, Tensor):
            return yes if condition else no
        return torch.where(condition, yes, no)

    def sqrt(self, x: Any) -> Any:
        return torch.sqrt(x)

    def exp(self, x: Any) -> Any:
        return torch.exp(x)

    def hypot(self, x: Any, y: Any) -> Any:
        return torch.hypot(x, y) if isinstance(x, Tensor) else math.hypot(x, y)

    def minimum(self, x: Any, y: Any) -> Any:
        return _of_two(x, y, torch.minimum, lambda tensor, number: tensor.clamp(max=number), min)

    def maximum(self, x: Any, y: Any) -> Any:
        return _of_two(x, y, torch.maximum, lambda tensor, number: tensor.clamp(min=number), max)

    def mean(self, x: Any) -> Tensor:
        mean: Tensor = x.to(wide_dtype(self.device)).mean()
        return mean

    def arange(self, count: int) -> Tensor:
        return torch.arange(count, device=self.device)

    def percentile(self, values: Tensor, count: Tensor, q: float) -> Tensor:
        """numpy.percentile of the first `count` values, step by step as NumPy interpolates."""
        known = torch.arange(len(values), device=values.device) < count
        ascending = torch.where(known, values, math.inf).sort().values
        last = (count - 1).to(values)
        place = last * (q / 100)
        below = place.floor()
        above = torch.minimum(below + 1, last)
        low, high = (ascending.gather(0, index.long()[None])[0] for index in (below, above))
        share = place - below
        near_low, near_high = low + (high - low) * share, high - (high - low) * (1 - share)
        nearest = torch.where(share >= 0.5, near_high, near_low)
        return torch.where((known & torch.isnan(values)).any(), math.nan, nearest)

    def take(self, values: Tensor, places: Sequence[int]) -> Tensor:
        if _is_all(places, values):
            return values
        # one by one, since an index made of a list would wait for a device
        return torch.stack([values[place] for place in places])

    def put(self, values: Tensor, places: Sequence[int], new: Tensor) -> Tensor:
        if _is_all(places, values):
            return new
        parts = list(values.unbind())
        for place, part in zip(places, new.unbind(), strict=True):
            parts[place] = part
        return torch.stack(parts)


def _of_two(x: Any, y: Any, of_tensors: Any, of_both: Any, of_numbers: Any) -> Any:
    """A function that takes two tensors, two numbers or one of each, in whichever order."""
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return of_tensors(x, y)
    if isinstance(x, Tensor):
        return of_both(x, y)
    return of_both(y, x) if isinstance(y, Tensor) else of_numbers(x, y)


def _is_all(places: Sequence[int], values: Tensor) -> bool:
    return list(places) == list(range(len(values)))
