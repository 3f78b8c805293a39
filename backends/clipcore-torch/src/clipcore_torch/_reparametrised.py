"""Weights that torch makes of other tensors before a layer uses them: weight norm and spectral norm, in both forms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from clipcore.backend import Stored

_NEW_WEIGHT_NORM, _NEW_SPECTRAL_NORM = parametrizations._WeightNorm, parametrizations._SpectralNorm


@dataclass(frozen=True)
class Reparametrised:
    """The tensors that stand in a module for its weight.

    Attributes:
        parts: by their path from the module, the part of the kernel that each is.
        settings: what the layer's settings say of it.
        whole: of these tensors, the one that has the kernel's own layout and shape.
    """

    parts: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def whole(self) -> str:
        return next(path for path, part in self.parts.items() if part in ("direction", "original"))


def of_weight(module: nn.Module) -> Reparametrised | None:
    """What makes the module's `weight`, if that is one weight norm or one spectral norm."""
    if is_parametrized(module):
        return _parametrized(module)
    found = [hook for hook in _hooks(module) if hook.name == "weight"]
    return _hooked(found[0]) if len(found) == 1 else None


def _parametrized(module: Any) -> Reparametrised | None:
    makers = list(module.parametrizations.weight) if set(module.parametrizations) == {"weight"} else []
    if len(makers) != 1:
        return None
    at = "parametrizations.weight"
    if type(makers[0]) is _NEW_WEIGHT_NORM:
        return Reparametrised({f"{at}.original0": "magnitude", f"{at}.original1": "direction"})
    if type(makers[0]) is _NEW_SPECTRAL_NORM and module.parametrizations.weight.original.dim() > 1:
        parts = {f"{at}.original": "original", f"{at}.0._u": "u", f"{at}.0._v": "v"}
        return Reparametrised(parts, {"spectral_axis": makers[0].dim})
    return None


def _hooked(hook: WeightNorm | SpectralNorm) -> Reparametrised:
    if isinstance(hook, WeightNorm):
        return Reparametrised({"weight_g": "magnitude", "weight_v": "direction"})
    parts = {"weight_orig": "original", "weight_u": "u", "weight_v": "v"}
    return Reparametrised(parts, {"spectral_axis": hook.dim})


def _hooks(module: nn.Module) -> Iterator[WeightNorm | SpectralNorm]:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm):
            yield hook


def recompute(module: nn.Module, args: Sequence[Any]) -> None:
    """Make the weights of the old form anew, whose hooks ran before a watcher wrote the tensors they are made of."""
    for hook in _hooks(module):
        hook(module, args)


def roles(made: Reparametrised, row: Stored, held: Mapping[str, Tensor]) -> dict[str, tuple[str, str]] | None:
    """By path, role and layout of the tensors that stand for the kernel of a row; None where it cannot be one."""
    role, layout = row.roles["weight"]
    if role != "kernel" or not made.parts.keys() <= held.keys():
        return None
    magnitude = next((held[path] for path, part in made.parts.items() if part == "magnitude"), None)
    if magnitude is not None and not _fits(magnitude, held[made.whole], layout):
        return None
    like = {"direction": layout, "magnitude": layout, "original": layout}
    return {path: (f"{role}.{part}", like.get(part, "...")) for path, part in made.parts.items()}


def _fits(magnitude: Tensor, direction: Tensor, layout: str) -> bool:
    """Whether a magnitude has the axes of the layout: it is one number where the norm is over the whole tensor, and one
    place cannot be divided into groups.
    """
    if magnitude.dim() != direction.dim():
        return False
    return not layout.startswith("(") or magnitude.shape[0] == direction.shape[0]
