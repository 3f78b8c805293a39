"""Layers with weight norm or spectral norm built from their canonical descriptions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from clipcore.errors import MappingError
from clipcore_torch._building_composites import Builder, Settings, Shapes


def with_kernel(build: Builder, settings: Settings, shapes: Shapes) -> nn.Module:
    """The module that `build` makes, its kernel made of the tensors that the shapes name.

    Raises:
        MappingError: torch has no such layer.
    """
    whole = next((shapes[role] for role in ("kernel.direction", "kernel.original") if role in shapes), None)
    if whole is None:
        return build(settings, shapes)
    rest = {role: shape for role, shape in shapes.items() if not role.startswith("kernel.")}
    module: Any = build(settings, {**rest, "kernel": whole})
    if "kernel.original" in shapes:
        return spectral_norm(module, dim=settings["spectral_axis"])
    return weight_norm(module, dim=_kept_axis(whole, shapes["kernel.magnitude"]))


def _kept_axis(kernel: Sequence[int], magnitude: Sequence[int]) -> int:
    """The one axis of torch's kernel over which the norm does not run; a convolution's first one is two of these."""
    linear = len(kernel) == 2
    first = 1 if linear else 2
    if tuple(magnitude) == (*kernel[:first], *[1] * (len(kernel) - first)):
        return 0
    if linear and tuple(magnitude) == (1, kernel[1]):
        return 1
    raise MappingError(
        f"kernel.magnitude has shape {tuple(magnitude)} beside a kernel of {tuple(kernel)}; torch's weight norm runs "
        f"over all axes but one, of convolutions the first"
    )
