"""clipcore on TensorFlow and Keras 3; `clipcore.get_backend("tensorflow")` obtains it."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["ClipLogger", "clipped_class"]


def clipped_class(optimizer_class: type) -> type:
    """The registered subclass of an optimizer's class that a policy is attached through.

    Call it before loading a model that was saved with a policy on an optimizer of your own; Keras's optimizers are
    registered by `clipcore.get_backend("tensorflow")`.
    """
    from clipcore_tensorflow._training import clipped_class as registered

    return registered(optimizer_class)


def __getattr__(name: str) -> Any:
    """ClipLogger, whose base class is Keras's: it is imported when it is first used."""
    if name != "ClipLogger":
        raise AttributeError(f"module 'clipcore_tensorflow' has no attribute {name!r}")
    from clipcore_tensorflow._logger import ClipLogger

    return ClipLogger
