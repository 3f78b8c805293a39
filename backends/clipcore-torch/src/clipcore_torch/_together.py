"""Which tensors one launch on a device can serve: `torch._foreach_*` over lists of one device and dtype."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from clipcore_torch._tensors import is_plain

_DEVICES = ("cuda",)  # where a launch costs more than the loop around it


def groups(tensors: Sequence[Tensor], among: Iterable[int] | None = None) -> list[list[int]]:
    """The places of tensors that can be taken together, at least two in each group.

    Not in a compiled function, whose compiler fuses on its own, and not under vmap, which knows no `_foreach`.
    """
    if torch.compiler.is_compiling():
        return []
    found: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index in range(len(tensors)) if among is None else among:
        tensor = tensors[index]
        if tensor.device.type in _DEVICES and is_plain(tensor):
            found.setdefault((tensor.device, tensor.dtype), []).append(index)
    return [places for places in found.values() if len(places) > 1]


def assign_(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Overwrite each tensor with its value."""
    together = groups(tensors)
    for places in together:
        torch._foreach_copy_([tensors[i] for i in places], [values[i] for i in places])
    for i in others(tensors, together):
        tensors[i].copy_(values[i])


def others(tensors: Sequence[Tensor], together: Iterable[list[int]]) -> list[int]:
    """The places of tensors that are in none of the groups."""
    grouped = {place for places in together for place in places}
    return [place for place in range(len(tensors)) if place not in grouped]
