"""Which tensors one launch on a device can serve: `torch._foreach_*` over lists of one device and dtype."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from clipcore_torch._tensors import is_plain

_DEVICES = ("cuda",)  # where a launch costs more than the loop around it
_PORTION = 1 << 23  # elements that keep a device busy and take little of its memory: 32 MiB in float32


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


def portions(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The elements of tensors, in order, in lists of vectors; views of those that are contiguous."""
    portion: list[Tensor] = []
    room = _PORTION
    for tensor in tensors:
        for part in tensor.reshape(-1).split(_PORTION):
            if part.numel() > room:
                yield portion
                portion, room = [], _PORTION
            portion.append(part)
            room -= part.numel()
    yield portion


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
