"""The plugin that clipcore finds; TensorFlow is imported when the backend is first asked for."""

from __future__ import annotations

from typing import Any

from clipcore import hookimpl


@hookimpl
def clipcore_root_modules() -> list[str]:
    """Root modules of the types that this backend handles."""
    return ["tensorflow", "keras", "tf_keras"]


@hookimpl
def clipcore_backend() -> Any:
    """The backend; importing it imports TensorFlow."""
    from clipcore_tensorflow.backend import TensorFlowBackend

    return TensorFlowBackend()
