"""Which tensors one launch on a device can serve: `torch._foreach_*` over lists of one device and dtype."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_DEVICES = ("cuda",)  # where a launch costs more than the loop around it


def groups(tensors: Sequence[Tensor], among: Iterable[int]) -> list[list[int]]:
    """The places of tensors that can be taken together, at least two in each group.

    Not in a compiled function, whose compiler fuses on its own, and not under vmap, which knows no `_foreach`.
    """
    if torch.compiler.is_compiling():
        return []
    found: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index in among:
        tensor = tensors[index]
        if tensor.device.type in _DEVICES and not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            found.setdefault((tensor.device, tensor.dtype), []).append(index)
    return [places for places in found.values() if len(places) > 1]
