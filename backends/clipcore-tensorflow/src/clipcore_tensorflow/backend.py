"""The backend of TensorFlow, Keras 3 and tf_keras: each method hands over to the module that has the idea."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras

from clipcore.backend import Layer, Primitives, Watcher
from clipcore.clipping import api
from clipcore.clipping.policies import Policy
from clipcore.errors import InvalidInput
from clipcore.training import Attachment, OnReport
from clipcore_tensorflow import _building, _examples, _layers, _models, _tensors, _tracing, _training
from clipcore_tensorflow._primitives import TensorFlowPrimitives
from clipcore_tensorflow._tensors import Array

# AutoGraph would translate clipcore itself where a tf.function calls it: slowly, and with errors of another class. This
# mark, which tf.autograph.experimental.do_not_convert sets as well, makes it call these functions as they are.
for _verb in (api.clip, api.clip_, api.limit_, Policy.init, Policy.update):
    vars(_verb).setdefault("autograph_info__", {})

_training.register_builtin_optimizers()


class TensorFlowBackend:
    """All tiers of `clipcore.backend` for tf.Tensor, tf.IndexedSlices, variables, Keras 3 models and tf.Module."""

    name = "tensorflow"
    weight_files = _models.WEIGHT_FILES

    def __init__(self) -> None:
        self._running = _models.Running()

    @property
    def channels(self) -> str:
        """Either "last" or "first": what `keras.config.image_data_format` says."""
        return str(keras.config.image_data_format()).removeprefix("channels_")

    def is_tensor(self, obj: Any) -> bool:
        return _tensors.is_tensor(obj)

    def is_parameter(self, tensor: Any) -> bool:
        return False

    def dtype_name(self, tensor: Any) -> str:
        return _tensors.dtype_name(tensor)

    def to_host(self, tensors: Sequence[Any], *, writable: bool = False) -> list[Array] | None:
        return _tensors.to_host(tensors, writable=writable)

    def memory(self, tensors: Sequence[Any], *, writable: bool = False) -> None:
        """None: where a tensor lies is known from the array that `to_host` gives, and from nothing quicker."""

    def lies_at(self, tensor: Any) -> Any:
        return id(tensor)

    def written(self, tensors: Sequence[Any]) -> None:
        """Nothing: no memory of TensorFlow's is written."""

    def from_host(self, array: Array, like: Any) -> Any:
        return _tensors.from_host(array, like)

    def to_numpy(self, tensor: Any) -> Array:
        return _tensors.to_array(tensor)

    def detached(self, tensor: Any) -> Any:
        return tensor  # a tape sees no more than what is computed with it

    def to_dense(self, tensor: Any) -> Any:
        return _tensors.to_dense(tensor)

    def primitives(self) -> Primitives:
        return TensorFlowPrimitives()

    def assign_(self, tensors: Sequence[Any], values: Sequence[Any]) -> None:
        for tensor, value in zip(tensors, values, strict=True):
            _tensors.check_assignable(tensor)
            _tensors.tf_variable(tensor).assign(value)

    def gradients(self, model_or_params: Any) -> tuple[list[Any], list[Any]]:
        raise InvalidInput("TensorFlow keeps no gradients beside variables; use cc.clip(grads, policy)")

    def weights(self, model_or_params: Any) -> list[Any]:
        return _models.weights(model_or_params)

    def is_model(self, obj: Any) -> bool:
        return _models.is_model(obj)

    def parameters(self, model: Any) -> dict[str, Any]:
        return _models.parameters(model)

    def load_model(self, factory: Any, weights: str | None) -> Any:
        return _models.load_model(factory, weights)

    def save_weights(self, model: Any, path: str) -> None:
        _models.save_weights(model, path)

    def layers(self, model: Any) -> list[Layer]:
        _models.check_model(model)
        return [listed.layer for listed in _layers.describe(model)]

    def operations(self, model: Any) -> list[Layer]:
        """Activations, pooling and dropout: layers without tensors, in the model's order, named as in `layers`."""
        _models.check_model(model)
        return [listed.layer for listed in _layers.operations(model)]

    def read(self, model: Any, names: Sequence[str], *, keep: bool = False) -> dict[str, Array]:
        _models.check_model(model)  # and nothing to be done to keep: a variable that changes takes other memory
        return _models.read(self._running.table(model), names)

    def write(self, model: Any, values: Mapping[str, Array]) -> None:
        _models.check_model(model)
        self._running.written(_models.write(self._running.table(model), values))

    def holding(self, model: Any) -> AbstractContextManager[None]:
        return self._running.remember(model)

    def build_layer(self, kind: str, settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Any:
        return _building.build_layer(kind, settings, shapes)

    def run(self, model: Any, sample: Any, watcher: Watcher | None = None) -> Any:
        _models.check_model(model)
        return _tracing.run(model, sample, watcher, self._running)

    def input_shapes(self, model: Any) -> list[tuple[int | None, ...]] | None:
        return _models.input_shapes(model)

    def double(self, model: Any) -> Any | None:
        return _models.double(model)

    def attach(self, optimizer: Any, policy: Policy, model: Any, on_report: OnReport | None) -> Attachment:
        return _training.attach(optimizer, policy, model, on_report)

    def compile(
        self, model: Any, loss_fn: Any, optimizer: Any, policy: Policy | None, on_report: OnReport | None
    ) -> tuple[Any, Any, Any]:
        return _training.compile(model, loss_fn, optimizer, policy, on_report)

    def per_example_grads(self, model: Any, loss_fn: Any, batch: tuple[Any, Any]) -> dict[str, Any]:
        return _examples.per_example_grads(model, loss_fn, batch)
