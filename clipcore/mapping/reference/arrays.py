"""The arrays that every definition works on: float64, and one value per channel beside the data's axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = Mapping[str, Array]
Settings = Mapping[str, Any]
Forward = Callable[[Any, Tensors, Settings], Array]


def double(array: Any) -> Array:
    """The array in float64."""
    return np.asarray(array).astype(np.float64)


def optional(tensors: Tensors, role: str, default: float) -> Array:
    """A tensor that a layer may lack, and then what has no effect."""
    return double(tensors[role]) if role in tensors else np.array(default)


def per_channel(values: Array, ndim: int) -> Array:
    """One value per channel, shaped to stand on axis 1 of `ndim` axes."""
    return values.reshape(-1, *[1] * (ndim - 2)) if values.ndim else values
