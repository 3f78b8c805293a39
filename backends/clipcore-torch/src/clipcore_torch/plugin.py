"""The plugin that clipcore discovers: it names the modules it answers for, and imports torch when first asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipcore import hookimpl

if TYPE_CHECKING:
    from clipcore_torch.backend import TorchBackend


@hookimpl
def clipcore_root_modules() -> list[str]:
    """Tensors, modules and optimizers of torch; subclasses from elsewhere are found by their bases."""
    return ["torch"]


@hookimpl
def clipcore_backend() -> TorchBackend:
    """The backend; imports torch."""
    from clipcore_torch.backend import TorchBackend

    return TorchBackend()
