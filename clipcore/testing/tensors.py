"""Between NumPy arrays and a backend's tensors, in nested structures."""

from __future__ import annotations

from typing import Any

import numpy as np

from clipcore.backend import Backend
from clipcore.clipping.kernels import empty_like
from clipcore.structure import leaves, map_leaves

Array = np.ndarray[Any, np.dtype[Any]]


def as_tensors(backend: Backend, tree: Any) -> Any:
    """The structure with a tensor of the backend in place of each array; what is not contiguous stays so."""
    return map_leaves(lambda array: as_tensor(backend, array), tree)


def as_tensor(backend: Backend, array: Array) -> Any:
    """A tensor with the values of `array`, in memory of its own."""
    if array.ndim and array.size and not array.flags.c_contiguous:
        doubled = np.repeat(array, 2, axis=-1)
        return backend.from_host(_aligned(doubled), None)[..., ::2]
    return backend.from_host(_aligned(array), None)


def as_arrays(backend: Backend, tree: Any) -> list[Array]:
    """Copies of the tensors of a structure, in order."""
    return [as_array(backend, tensor) for _, tensor in leaves(tree)]


def as_array(backend: Backend, tensor: Any) -> Array:
    """A copy of the tensor's values."""
    return np.array(backend.to_numpy(tensor) if backend.is_tensor(tensor) else tensor)


def _aligned(array: Array) -> Array:
    copy = empty_like(np.ascontiguousarray(array).reshape(array.shape))
    np.copyto(copy, array)
    return copy
