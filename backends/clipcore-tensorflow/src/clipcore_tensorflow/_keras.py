"""The two Keras libraries whose layers run on TensorFlow: Keras 3, and tf_keras (Keras 2) where a user imported it."""

from __future__ import annotations

import sys
from typing import Any

import keras

from clipcore.errors import InvalidInput


def libraries() -> list[Any]:
    """Keras 3, and tf_keras if it is there: it is never imported for its own sake."""
    legacy = sys.modules.get("tf_keras")
    return [keras] if getattr(legacy, "layers", None) is None else [keras, legacy]


def library_of(obj: Any) -> Any | None:
    """The library that a layer or model is of; None for anything else."""
    return next((library for library in libraries() if isinstance(obj, library.layers.Layer)), None)


def is_layer(obj: Any) -> bool:
    """Whether `obj` is a layer (or model) of one of the two."""
    return library_of(obj) is not None


def is_keras_model(obj: Any) -> bool:
    """Whether `obj` is a Model of one of the two."""
    return any(isinstance(obj, library.Model) for library in libraries())


def is_keras_3(obj: Any) -> bool:
    """Whether `obj` is a layer or model of Keras 3."""
    return library_of(obj) is keras


def check_keras() -> None:
    """Refuse Keras 3 on another framework with InvalidInput."""
    if keras.backend.backend() != "tensorflow":
        raise InvalidInput(
            f"Keras runs on {keras.backend.backend()!r}, and clipcore-tensorflow acts on Keras on TensorFlow: "
            f"set KERAS_BACKEND=tensorflow before Keras is imported"
        )
