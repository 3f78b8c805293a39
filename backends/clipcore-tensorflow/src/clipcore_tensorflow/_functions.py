"""What functions are called: activations fused into layers, and layers that are one function without tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from clipcore_tensorflow._convolutions import padding_pairs, pair_up
from clipcore_tensorflow._keras import libraries, library_of

# Functions of Keras by another name than the one that the other frameworks know them by.
_RENAMED = {"swish": "silu"}
# Names under which Keras 2 computes something else: its hard sigmoid is 0.2 x + 0.5, clipped.
_ANOTHER_IN_KERAS_2 = frozenset({"hard_sigmoid"})
# Numbers of functions that are asked for by name alone, as other frameworks' layers say them.
NUMBERS: dict[str, dict[str, Any]] = {
    "leaky_relu": {"slope": 0.2},
    "elu": {"alpha": 1.0},
    "celu": {"alpha": 1.0},
    "hard_tanh": {"low": -1.0, "high": 1.0},
    "hard_shrink": {"threshold": 0.5},
    "soft_shrink": {"threshold": 0.5},
    "softmax": {"axis": -1},
    "log_softmax": {"axis": -1},
}
_ALSO_IN_TENSORFLOW = frozenset(
    {"relu", "relu6", "leaky_relu", "elu", "selu", "gelu", "silu", "swish", "sigmoid", "tanh"}
    | {"softplus", "softsign", "softmax", "log_softmax"}
)


def activation_name(function: Any) -> str | None:
    """None for linear, the canonical name of a function that Keras or TensorFlow ships, "unknown:name" for others."""
    if isinstance(function, functools.partial) and _is_approximate_gelu(function):
        return "gelu_tanh"
    name = str(getattr(function, "__name__", type(function).__name__))
    if function is None or any(function is library.activations.linear for library in libraries()):
        return None
    return _RENAMED.get(name, name) if _is_known(function, name) else f"unknown:{name}"


def _is_approximate_gelu(function: functools.partial[Any]) -> bool:
    return any(function.func is library.activations.gelu for library in libraries()) and function.keywords == {
        "approximate": True
    }


def _is_known(function: Any, name: str) -> bool:
    for library in libraries():
        if getattr(library.activations, name, None) is function:
            return library is keras or name not in _ANOTHER_IN_KERAS_2
    return name in _ALSO_IN_TENSORFLOW and getattr(tf.nn, name) is function


def _activation(layer: Any) -> dict[str, Any] | None:
    name = activation_name(layer.activation)
    return None if name is None else {"function": name, **NUMBERS.get(name, {})}


def _relu(layer: Any) -> dict[str, Any]:
    slope, high, threshold = float(layer.negative_slope), layer.max_value, float(layer.threshold)
    numbers = {"slope": slope, "high": high if high is None else float(high), "threshold": threshold}
    given = {name: number for name, number in numbers.items() if number not in (0.0, None)}
    if given == {"high": 6.0}:
        return {"function": "relu6"}
    if set(given) == {"slope"}:
        return {"function": "leaky_relu", "slope": slope}
    return {"function": "relu", **given}


def _leaky_relu(layer: Any) -> dict[str, Any]:
    slope = layer.negative_slope if hasattr(layer, "negative_slope") else layer.alpha  # Keras 2's name
    return {"function": "leaky_relu", "slope": float(slope)}


def _thresholded(layer: Any) -> dict[str, Any]:
    return {"function": "threshold", "threshold": float(layer.theta)}


def _elu(layer: Any) -> dict[str, Any]:
    return {"function": "elu", "alpha": float(layer.alpha)}


def _softmax(layer: Any) -> dict[str, Any]:
    axis = layer.axis
    several = isinstance(axis, list | tuple)
    return {"function": "softmax", "axis": tuple(axis) if several and len(axis) > 1 else axis[0] if several else axis}


def _pooling(layer: Any) -> dict[str, Any]:
    rank = layer.input_spec.ndim - 2
    window, stride = pair_up(layer.pool_size, rank), pair_up(layer.strides, rank)
    return {
        "window": window,
        "stride": stride,
        "padding": padding_pairs(layer.padding, window, stride, (1,) * rank),
        "ceil": False,
        "channels": layer.data_format.removeprefix("channels_"),
    }


def _avg_pool(layer: Any) -> dict[str, Any]:
    return {**_pooling(layer), "count_include_pad": False}


def _max_pool(layer: Any) -> dict[str, Any]:
    settings = _pooling(layer)
    return {**settings, "dilation": (1,) * len(settings["window"])}


def _dropout(layer: Any) -> dict[str, Any]:
    return {"rate": float(layer.rate)}


# Keras's name of the class, the kind, the settings (None where the layer does nothing).
_OPERATIONS: dict[str, tuple[str, Callable[[Any], dict[str, Any] | None]]] = {
    "Activation": ("activation", _activation),
    "ReLU": ("activation", _relu),
    "LeakyReLU": ("activation", _leaky_relu),
    "ELU": ("activation", _elu),
    "ThresholdedReLU": ("activation", _thresholded),
    "Softmax": ("activation", _softmax),
    **{f"AveragePooling{rank}D": ("avg_pool", _avg_pool) for rank in (1, 2, 3)},
    **{f"MaxPooling{rank}D": ("max_pool", _max_pool) for rank in (1, 2, 3)},
    "Dropout": ("dropout", _dropout),
}


@functools.cache
def _classes(layers: Any) -> dict[type, tuple[str, Callable[[Any], dict[str, Any] | None]]]:
    return {getattr(layers, name): row for name, row in _OPERATIONS.items() if hasattr(layers, name)}


def operation_of(layer: Any) -> tuple[str, dict[str, Any]] | None:
    """Kind and settings of a layer that is a function without tensors; None for any other."""
    library = library_of(layer)
    if library is None:
        return None
    base = next((cls for cls in type(layer).__mro__ if cls in _classes(library.layers)), None)
    if base is None or type(layer).call is not base.call:  # type: ignore[attr-defined]
        return None
    kind, settings = _classes(library.layers)[base]
    found = settings(layer)
    return None if found is None else (kind, found)
