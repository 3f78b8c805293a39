"""Modules that are several canonical layers: what says so of a class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from clipcore.backend import Layer
from clipcore_torch._described import Names

OTHERWISE_MADE = "whose tensors are made of others in a way that no rule describes"


class Tell(Protocol):
    """How a module that runs layer by layer tells a watcher of each; the tensors come back as they are, or replaced."""

    def before(self, layer: str, inputs: list[Tensor]) -> list[Tensor]: ...
    def after(self, layer: str, output: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Composite:
    """How modules of some classes are taken apart.

    Attributes:
        classes: which compute this, and so do those of their subclasses that have their forward.
        unlike: why a module with these tensors is not made of canonical layers; "" where it is.
        describe: name, module, tensors and their names to the layers, but for those that are submodules.
        apart: name and module to a forward that runs layer by layer.
        inner: submodules whose tensors the module uses as a layer without calling them, and their further settings.
        bare: its tensors that are of no layer.
    """

    classes: tuple[type[nn.Module], ...]
    unlike: Callable[[Any, Mapping[str, Tensor]], str]
    describe: Callable[[str, Any, Mapping[str, Tensor], Names], list[Layer]]
    apart: Callable[[str, Any, Tell], Callable[..., Any]]
    inner: Callable[[Any], dict[str, dict[str, Any]]] = lambda module: {}
    bare: tuple[str, ...] = ()
