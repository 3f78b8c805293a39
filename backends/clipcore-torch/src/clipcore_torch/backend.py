"""The torch backend: what `clipcore.backend` asks for, each part in a file of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from clipcore.backend import Layer, Memory, Watcher
from clipcore.clipping.policies import Policy
from clipcore.errors import InvalidInput
from clipcore.memory import copies, lent
from clipcore.training import Attachment, OnReport
from clipcore_torch import _building, _examples, _files, _listing, _tensors, _tracing, _training
from clipcore_torch._primitives import TorchPrimitives
from clipcore_torch._tensors import Array
from clipcore_torch._together import assign_


class TorchBackend:
    """Torch tensors, modules and optimizers; every tier of `clipcore.backend`."""

    name = "torch"
    channels: Literal["first", "last"] = "first"
    weight_files = _files.WEIGHT_FILES

    def is_tensor(self, obj: Any) -> bool:
        return isinstance(obj, Tensor)

    def is_parameter(self, tensor: Any) -> bool:
        return isinstance(tensor, nn.Parameter)

    def dtype_name(self, tensor: Tensor) -> str:
        return _tensors.dtype_name(tensor)

    def to_host(self, tensors: Sequence[Tensor], *, writable: bool = False) -> list[Array] | None:
        return _tensors.to_host(tensors, writable=writable)

    def memory(self, tensors: Sequence[Tensor], *, writable: bool = False) -> Memory | None:
        return _tensors.lie_in_memory(tensors, writable=writable)

    def lies_at(self, tensor: Tensor) -> Any:
        return _tensors.lies_at(tensor)

    def written(self, tensors: Sequence[Tensor]) -> None:
        _tensors.announce_writes(tensors)

    def from_host(self, array: Array, like: Tensor | None) -> Tensor:
        return _tensors.from_host(array, like)

    def to_numpy(self, tensor: Tensor) -> Array:
        return _tensors.to_array(tensor)

    def detached(self, tensor: Tensor) -> Tensor:
        # what has no memory yet is refused as it is
        return tensor if isinstance(tensor, nn.parameter.UninitializedTensorMixin) else tensor.detach()

    def to_dense(self, tensor: Tensor) -> Tensor:
        return _tensors.to_dense(tensor)

    def primitives(self) -> TorchPrimitives:
        return TorchPrimitives()

    def assign_(self, tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            assign_(tensors, values)

    def gradients(self, model_or_params: Any) -> tuple[list[Tensor], list[Tensor | None]]:
        params = _unique(_parameters(model_or_params))
        return params, [param.grad for param in params]

    def weights(self, model_or_params: Any) -> list[Tensor]:
        params = _unique(_parameters(model_or_params))
        # of a model its trainable tensors; tensors that the user lists are all meant
        return [p for p in params if p.requires_grad] if isinstance(model_or_params, nn.Module) else params

    def is_model(self, obj: Any) -> bool:
        return isinstance(obj, nn.Module)

    def parameters(self, model: nn.Module) -> dict[str, Tensor]:
        return _listing.parameters(model)

    def load_model(self, factory: Any, weights: str | None) -> nn.Module:
        return _files.load_model(factory, weights)

    def save_weights(self, model: nn.Module, path: str) -> None:
        _files.save_weights(model, path)

    def layers(self, model: nn.Module) -> list[Layer]:
        return _listing.layers(model)

    def operations(self, model: nn.Module) -> list[Layer]:
        return _listing.operations(model)

    def read(self, model: nn.Module, names: Sequence[str], *, keep: bool = False) -> dict[str, Array]:
        arrays = {name: _tensors.to_array(tensor) for name, tensor in _named(model, names).items()}
        return dict(zip(arrays, copies(list(arrays.values())), strict=True)) if keep else arrays

    def write(self, model: nn.Module, values: Mapping[str, Array]) -> None:
        found = _named(model, values)
        arrays = {name: np.asarray(value) for name, value in values.items()}
        for name, tensor in found.items():
            _check_fits(name, arrays[name], tensor)
        with torch.no_grad():
            for name, tensor in found.items():
                tensor.copy_(_tensors.as_tensor(lent(arrays[name])))

    def holding(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # a module's tensors are found at once

    def build_layer(self, kind: str, settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
        return _building.build_layer(kind, settings, shapes)

    def run(self, model: nn.Module, sample: Any, watcher: Watcher | None = None) -> Any:
        return _tracing.run(model, sample, watcher)

    def input_shapes(self, model: nn.Module) -> None:
        """None: a module declares no shapes."""

    def double(self, model: nn.Module) -> nn.Module | None:
        return _tracing.double(model)

    def attach(
        self, optimizer: Any, policy: Policy, model: Any = None, on_report: OnReport | None = None
    ) -> Attachment:
        return _training.attach(optimizer, policy, model, on_report)

    def compile(
        self, model: Any, loss_fn: Any, optimizer: Any, policy: Policy | None, on_report: OnReport | None = None
    ) -> tuple[Any, Any, Any]:
        return _training.compile(model, loss_fn, optimizer, policy, on_report)

    def per_example_grads(self, model: nn.Module, loss_fn: Any, batch: tuple[Any, Any]) -> dict[str, Tensor]:
        return _examples.per_example_grads(model, loss_fn, batch)


def _parameters(model_or_params: Any) -> list[Tensor]:
    if isinstance(model_or_params, nn.Module):
        return list(model_or_params.parameters())
    if isinstance(model_or_params, Tensor):
        return [model_or_params]
    params: list[Any] = list(model_or_params) if isinstance(model_or_params, Iterable) else [model_or_params]
    for param in params:
        if not isinstance(param, Tensor):
            raise InvalidInput(f"{param!r:.60} is a {type(param).__name__}; expected a module or its parameters")
    return params


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _named(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    tensors = _listing.tensors(model)
    for name in names:
        if name not in tensors:
            raise InvalidInput(
                f"{type(model).__name__} has no tensor {name!r}; its tensors are named as in its state_dict: "
                f"{', '.join(list(tensors)[:5])} …"
            )
    return {name: tensors[name] for name in names}


def _check_fits(name: str, array: Array, tensor: Tensor) -> None:
    have, want = (array.shape, array.dtype.name), (tuple(tensor.shape), _tensors.dtype_name(tensor))
    if have != want:
        raise InvalidInput(
            f"tensor {name!r} has shape {want[0]} and dtype {want[1]}; got an array of shape {have[0]} and dtype "
            f"{have[1]}: rearrange and cast it first. Nothing was written"
        )
