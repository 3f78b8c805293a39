"""A model's tensors by name: read, written all or nothing, loaded from a file, copied in float64."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from clipcore.errors import InvalidInput
from clipcore.structure import leaves
from clipcore_tensorflow._keras import check_keras, is_keras_3, is_keras_model, is_layer
from clipcore_tensorflow._layers import Listed, describe, describe_all
from clipcore_tensorflow._tensors import Array, dtype_name, is_variable, tf_variable, to_array, to_own_tensor

WEIGHT_FILES = (".weights.h5", ".keras", ".h5")


_BUFFERS = ("running", "kernel.u")  # roles of tensors that no optimizer trains


class Running:
    """The models that run just now: their layers and tables, so that neither a run nor a watcher's reads and writes
    walk the model each time, and their variables as they shall be after each run.
    """

    def __init__(self) -> None:
        self._listed: dict[int, list[Listed]] = {}
        self._tables: dict[int, dict[str, tf.Variable]] = {}
        self._states: list[dict[int, tuple[tf.Variable, tf.Tensor]]] = []

    @contextmanager
    def remember(self, model: Any) -> Iterator[None]:
        outermost = id(model) not in self._tables
        if outermost:
            self._listed[id(model)] = describe_all(model)
            self._tables[id(model)] = _table(self._listed[id(model)])
        try:
            yield
        finally:
            if outermost:
                del self._tables[id(model)], self._listed[id(model)]

    @contextmanager
    def put_back(self, variables: Iterable[tf.Variable]) -> Iterator[None]:
        """On leaving, the variables are what they were, or what was written through the backend meanwhile."""
        # a value that was read shares the variable's memory until the variable changes, so that this copies nothing
        state = {id(variable): (variable, variable.value()) for variable in variables}
        self._states.append(state)
        try:
            yield
        finally:
            self._states.pop()
            for variable, value in state.values():
                variable.assign(value)

    def written(self, variables: Iterable[tf.Variable]) -> None:
        """Take note of what was written through the backend, for the runs in progress."""
        for variable in variables:
            for state in self._states:
                if id(variable) in state:
                    state[id(variable)] = variable, variable.value()

    def table(self, model: Any) -> dict[str, tf.Variable]:
        return self._tables[id(model)] if id(model) in self._tables else _table(describe(model))

    def listed(self, model: Any) -> list[Listed]:
        return self._listed[id(model)] if id(model) in self._listed else describe_all(model)


def _table(described: list[Listed]) -> dict[str, tf.Variable]:
    """The variables of a model's layers by the names of its tensors."""
    return {
        tensor.name: listed.variables[role] for listed in described for role, tensor in listed.layer.tensors.items()
    }


def is_model(obj: Any) -> bool:
    """Whether `obj` is a model or layer of Keras 3 or tf_keras, or a tf.Module."""
    return is_layer(obj) or isinstance(obj, tf.Module)


def check_model(model: Any) -> None:
    """Refuse what is no model with InvalidInput."""
    if not is_model(model):
        raise InvalidInput(f"{model!r:.60} of type {type(model).__name__} is no keras.Model, keras.Layer or tf.Module")
    if is_keras_3(model):
        check_keras()


def read(table: Mapping[str, tf.Variable], names: Sequence[str]) -> dict[str, Array]:
    """See `clipcore.backend.ModelBackend.read`."""
    _check_names(table, names)
    return {name: to_array(table[name]) for name in names}


def write(table: Mapping[str, tf.Variable], values: Mapping[str, Array]) -> list[tf.Variable]:
    """See `clipcore.backend.ModelBackend.write`; the variables that were written."""
    _check_names(table, values)
    arrays = {name: np.asarray(value) for name, value in values.items()}
    for name, array in arrays.items():
        variable = table[name]
        if array.shape != tuple(variable.shape):
            raise InvalidInput(
                f"tensor {name!r}: the array has shape {array.shape}, the variable {tuple(variable.shape)}; "
                f"nothing was written: bring the array into the stored layout"
            )
        if array.dtype.name != dtype_name(variable):
            raise InvalidInput(
                f"tensor {name!r}: the array is {array.dtype.name}, the variable {dtype_name(variable)}; "
                f"nothing was written: convert it with .astype"
            )
    for name, array in arrays.items():
        table[name].assign(to_own_tensor(array))
    return [table[name] for name in arrays]


def _check_names(table: Mapping[str, tf.Variable], names: Sequence[str] | Mapping[str, Any]) -> None:
    unknown = [name for name in names if name not in table]
    if unknown:
        raise InvalidInput(
            f"the model has no tensor {unknown[0]!r}; it has {len(table)}: {', '.join(list(table)[:8])}"
            f"{' …' if len(table) > 8 else ''}"
        )


def weights(model_or_params: Any) -> list[Any]:
    """See `clipcore.backend.Backend.weights`."""
    if is_model(model_or_params):
        check_model(model_or_params)
        if is_layer(model_or_params):
            describe(model_or_params)  # refuses a model without weights
        found = list(model_or_params.trainable_variables)
    else:
        listed = isinstance(model_or_params, Iterable) and not is_variable(model_or_params)
        found = list(model_or_params) if listed else [model_or_params]
        for variable in found:
            if not is_variable(variable):
                raise InvalidInput(f"{variable!r:.60} of type {type(variable).__name__} is no variable, nor a model")
    unique = {id(tf_variable(variable)): variable for variable in found if variable.trainable}
    if not unique:
        raise InvalidInput(f"{model_or_params!r:.60} has no trainable variables; build the model, or call it once")
    return list(unique.values())


def parameters(model: Any) -> dict[str, Any]:
    """See `clipcore.backend.ModelBackend.parameters`: the objects that `weights` gives, for frozen ones too."""
    check_model(model)
    held = model.weights if is_layer(model) else model.variables
    objects = {id(tf_variable(variable)): variable for variable in held}
    return {
        tensor.name: objects.get(id(variable), variable)
        for listed in describe(model)
        for role, tensor in listed.layer.tensors.items()
        if not role.startswith(_BUFFERS) and (variable := listed.variables[role]).dtype.is_floating
    }


def load_model(factory: Any, path: str | None) -> Any:
    """See `clipcore.backend.ModelBackend.load_model`; `factory` may be a model already."""
    model = factory if is_model(factory) else factory()
    check_model(model)
    if path is None:
        return model
    if not is_keras_model(model):
        raise InvalidInput(
            f"{type(model).__name__} is no keras.Model, and weight files are Keras's; restore it yourself"
        )
    if not str(path).endswith(WEIGHT_FILES):
        raise InvalidInput(f"weight file {str(path)!r} has another format; expected one of {', '.join(WEIGHT_FILES)}")
    if not os.path.exists(path):
        raise InvalidInput(f"weight file {str(path)!r} does not exist")
    try:
        model.load_weights(path)
    except (ValueError, OSError, KeyError) as err:
        raise InvalidInput(f"weight file {str(path)!r} does not fit model {model.name!r}: {err}") from err
    return model


def save_weights(model: Any, path: str) -> None:
    """Write a Keras model as .keras, or its weights alone as .weights.h5 (Keras 2: .h5 too), as the name says."""
    if not is_keras_model(model):
        raise InvalidInput(f"{type(model).__name__} is no keras.Model, and weight files are Keras's; save it yourself")
    if path.endswith(".keras"):
        model.save(path)
    elif path.endswith(".weights.h5") or (path.endswith(".h5") and not is_keras_3(model)):
        model.save_weights(path)
    else:
        written = WEIGHT_FILES[:2] if is_keras_3(model) else WEIGHT_FILES
        raise InvalidInput(f"output {path!r} has another format; expected one of {', '.join(written)}")


def input_shapes(model: Any) -> list[tuple[int | None, ...]] | None:
    """See `clipcore.backend.TracingBackend.input_shapes`: what functional and Sequential models declare."""
    inputs = getattr(model, "inputs", None) if is_keras_model(model) else None
    return [tuple(tensor.shape) for _, tensor in leaves(inputs)] if inputs else None


def double(model: Any) -> Any | None:
    """A float64 copy of a functional or Sequential model of Keras 3; None of any other, or where a layer cannot be
    copied so.
    """
    if not is_keras_3(model) or input_shapes(model) is None:
        return None
    try:
        declared = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
        inputs = keras.tree.map_structure(_double_input, declared)
        copy = keras.models.clone_model(model, input_tensors=inputs, clone_function=_double_layer)
        pairs = list(zip(model.weights, copy.weights, strict=True))
        if any(new.shape != old.shape or not _widened(old, new) for old, new in pairs):
            return None
        for old, new in pairs:
            new.assign(to_array(old).astype(dtype_name(new)))
    except Exception:  # whatever a custom layer raises, it has no float64 form
        return None
    return copy


def _double_layer(layer: Any) -> Any:
    config = layer.get_config()
    if "layers" in config:  # a model inside the model
        inner = double(layer)
        if inner is None:
            raise InvalidInput(f"layer {layer.name!r} cannot be copied in float64")
        return inner
    config["dtype"] = "float64"
    copy = type(layer).from_config(config)
    for name, value in list(vars(copy).items()):
        if type(value) is float:  # tf.cast rounds a number of Python's to float32 on its way to float64
            object.__setattr__(copy, name, np.float64(value))
    return copy


def _double_input(tensor: Any) -> Any:
    dtype = "float64" if tf.as_dtype(tensor.dtype).is_floating else tensor.dtype
    return keras.Input(batch_shape=tensor.shape, dtype=dtype, name=tensor.name)


def _widened(old: Any, new: Any) -> bool:
    return dtype_name(new) == ("float64" if tf.as_dtype(old.dtype).is_floating else dtype_name(old))
