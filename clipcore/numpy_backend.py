"""The NumPy backend: the first plugin, and the shortest example of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clipcore.clipping.host import HostPrimitives
from clipcore.errors import InvalidInput
from clipcore.hookspecs import hookimpl


class NumpyBackend:
    """Arrays and NumPy scalars, clipped where they are."""

    name = "numpy"

    def is_tensor(self, obj: Any) -> bool:
        return isinstance(obj, np.ndarray | np.generic)

    def is_parameter(self, tensor: Any) -> bool:
        return False

    def dtype_name(self, tensor: Any) -> str:
        if isinstance(tensor, np.ma.MaskedArray):
            raise InvalidInput("a masked array; expected one whose elements all count: pass array.filled(0)")
        return str(tensor.dtype.name)

    def to_host(self, tensors: Sequence[Any], *, writable: bool = False) -> list[np.ndarray] | None:
        for tensor in tensors if writable else ():
            if not (isinstance(tensor, np.ndarray) and tensor.flags.writeable):
                raise InvalidInput("a read-only array or NumPy scalar cannot be clipped in place; use cc.clip")
        return [np.asarray(tensor) for tensor in tensors]

    def memory(self, tensors: Sequence[Any], *, writable: bool = False) -> None:
        """None: arrays are what `to_host` gives, and no slower to look at."""

    def lies_at(self, tensor: Any) -> Any:
        return id(tensor)

    def written(self, tensors: Sequence[Any]) -> None:
        """Nothing: nobody keeps arrays for later."""

    def from_host(self, array: np.ndarray, like: Any) -> Any:
        if isinstance(like, np.generic):
            return array[()]
        return array if like is None else like.__array_wrap__(array)

    def to_numpy(self, tensor: Any) -> np.ndarray:
        return np.asarray(tensor)

    def detached(self, tensor: Any) -> Any:
        return tensor

    def to_dense(self, tensor: Any) -> Any:
        return tensor

    def primitives(self) -> HostPrimitives:
        return HostPrimitives()

    def assign_(self, tensors: Sequence[Any], values: Sequence[Any]) -> None:
        for tensor, value in zip(tensors, values, strict=True):
            tensor[...] = value

    def gradients(self, model_or_params: Any) -> tuple[list[Any], list[Any]]:
        raise InvalidInput("NumPy keeps no gradients beside parameters; use cc.clip(grads, policy)")

    def weights(self, model_or_params: Any) -> list[Any]:
        raise InvalidInput("NumPy has no models; use cc.clip_(arrays, policy)")


@hookimpl
def clipcore_root_modules() -> list[str]:
    return ["numpy", "ml_dtypes"]


@hookimpl
def clipcore_backend() -> NumpyBackend:
    return NumpyBackend()
