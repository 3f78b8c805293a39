"""The layers of a model: which class is which kind, and how Keras stores and sets what the kind needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from clipcore.backend import Layer, Tensor
from clipcore.errors import InvalidInput
from clipcore_tensorflow._tensors import dtype_name, tf_variable


@dataclass(frozen=True)
class Listed:
    """A layer with the object that it describes, and its variables by role."""

    layer: Layer
    owner: Any
    variables: Mapping[str, tf.Variable]


@dataclass(frozen=True)
class Rule:
    """How one Keras class stores a kind of layer.

    Attributes:
        kind: the name of the kind.
        roles: the role and layout of each variable, by Keras's name of it.
        settings: the layer's settings by canonical name; None where the kind has no word for one of them.
        required: names of variables without which the rule does not hold.
    """

    kind: str
    roles: Mapping[str, tuple[str, str]]
    settings: Callable[[Any], dict[str, Any] | None]
    required: frozenset[str] = frozenset()


def activation_name(function: Any) -> str | None:
    """None for linear, the name of a function that Keras ships, "unknown:name" for others."""
    if function is None or function is keras.activations.linear:
        return None
    name = getattr(function, "__name__", type(function).__name__)
    return name if getattr(keras.activations, name, None) is function else f"unknown:{name}"


def _linear(layer: Any) -> dict[str, Any]:
    return {"activation": activation_name(layer.activation)}


def _conv(layer: Any) -> dict[str, Any]:
    return {**_convolution(layer), "groups": layer.groups}


def _depthwise(layer: Any) -> dict[str, Any]:
    channels = tf_variable(layer.kernel).shape[-2]
    return {**_convolution(layer), "groups": int(channels)}


def _convolution(layer: Any) -> dict[str, Any]:
    return {
        "stride": tuple(map(int, layer.strides)),
        "padding": padding_pairs(layer.padding, layer.kernel_size, layer.strides, layer.dilation_rate),
        "padding_mode": "zeros",
        "dilation": tuple(map(int, layer.dilation_rate)),
        "activation": activation_name(layer.activation),
        "channels": layer.data_format.removeprefix("channels_"),
    }


def padding_pairs(padding: str, kernel_size: Any, strides: Any, dilation: Any) -> Any:
    """Keras's padding as one (before, after) pair per spatial axis, or "same" where it depends on the input's size."""
    totals = [rate * (size - 1) for size, rate in zip(kernel_size, dilation, strict=True)]
    if padding == "valid":
        return tuple((0, 0) for _ in totals)
    if padding == "causal":
        return tuple((total, 0) for total in totals)
    if any(stride > 1 for stride in strides):
        return "same"
    return tuple((total // 2, total - total // 2) for total in totals)


def _batch_norm(layer: Any) -> dict[str, Any] | None:
    # built once, the layer takes inputs of this rank alone
    rank = layer.input_spec.ndim
    axis = layer.axis % rank
    if axis not in (1, rank - 1):
        return None
    return {
        "eps": float(layer.epsilon),
        "momentum": round(1 - float(layer.momentum), 12),  # 0.01, not 0.010000000000000009
        "channels": "last" if axis == rank - 1 else "first",
    }


def _layer_norm(layer: Any) -> dict[str, Any] | None:
    rank = len(layer.get_build_config()["input_shape"])
    axes = sorted(axis % rank for axis in layer.axis)
    trailing = axes == list(range(rank - len(axes), rank))
    return {"eps": float(layer.epsilon)} if trailing and not getattr(layer, "rms_scaling", False) else None


def _no_settings(layer: Any) -> dict[str, Any]:
    return {}


_KERNEL = frozenset({"kernel"})
_LINEAR = {"kernel": ("kernel", "in out"), "bias": ("bias", "out")}
_CONV = {"kernel": ("kernel", "... in (group out)"), "bias": ("bias", "(group out)")}
_DEPTHWISE = {"kernel": ("kernel", "... (group in) out"), "bias": ("bias", "(group out)")}
_BATCH_NORM = {
    "gamma": ("scale", "channel"),
    "beta": ("bias", "channel"),
    "moving_mean": ("running_mean", "channel"),
    "moving_variance": ("running_var", "channel"),
}
_LAYER_NORM = {"gamma": ("scale", "..."), "beta": ("bias", "...")}

# A subclass is of its base's kind unless it computes something else: see _rule.
RULES: dict[type, Rule] = {
    keras.layers.Dense: Rule("linear", _LINEAR, _linear, _KERNEL),
    keras.layers.Conv1D: Rule("conv", _CONV, _conv, _KERNEL),
    keras.layers.Conv2D: Rule("conv", _CONV, _conv, _KERNEL),
    keras.layers.Conv3D: Rule("conv", _CONV, _conv, _KERNEL),
    keras.layers.DepthwiseConv1D: Rule("conv", _DEPTHWISE, _depthwise, _KERNEL),
    keras.layers.DepthwiseConv2D: Rule("conv", _DEPTHWISE, _depthwise, _KERNEL),
    keras.layers.BatchNormalization: Rule(
        "batch_norm", _BATCH_NORM, _batch_norm, frozenset({"moving_mean", "moving_variance"})
    ),
    keras.layers.LayerNormalization: Rule("layer_norm", _LAYER_NORM, _layer_norm),
    keras.layers.Embedding: Rule(
        "embedding", {"embeddings": ("kernel", "num dim")}, _no_settings, frozenset({"embeddings"})
    ),
}
_COMPUTES = ("call", "__call__", "convolution_op")
# Their cells are never called where a fused kernel runs, so that what cells own counts as the layer's.
_WHOLE = (keras.layers.RNN,)


def check_keras() -> None:
    """Refuse Keras on another framework with InvalidInput."""
    if keras.backend.backend() != "tensorflow":
        raise InvalidInput(
            f"Keras runs on {keras.backend.backend()!r}, and clipcore-tensorflow acts on Keras on TensorFlow: "
            f"set KERAS_BACKEND=tensorflow before Keras is imported"
        )


def describe(model: Any) -> list[Listed]:
    """Every layer or module that owns variables, once, in the order in which the model lists them.

    A variable that two layers own (tied weights) is listed in both, under one name.
    Raises:
        InvalidInput: the model has no variables yet.
    """
    _check_built(model)
    paths: Counter[str] = Counter()
    names = _Names()
    return [_listed(owner, _numbered(path, paths), own, names) for path, owner, own in _owners(model)]


def _listed(owner: Any, path: str, own: list[tuple[str, Any]], names: _Names) -> Listed:
    rule, settings = _rule(owner, [name for name, _ in own])
    roles: Counter[str] = Counter()
    tensors, variables = {}, {}
    for name, variable in own:
        role, layout = rule.roles[name] if rule else (_numbered(name, roles), "...")
        plain = tf_variable(variable)
        variables[role] = plain
        tensors[role] = Tensor(
            names.of(plain, f"{path}/{name}"),
            role,
            layout,
            tuple(plain.shape),
            dtype_name(plain),
            bool(plain.trainable),  # by its role: freezing a layer marks the Keras variable alone
        )
    framework = "keras" if isinstance(owner, keras.layers.Layer) else "tensorflow"
    kind = rule.kind if rule else f"{framework}:{type(owner).__name__}"
    return Listed(Layer(path, kind, tensors, settings), owner, variables)


def _rule(owner: Any, names: list[str]) -> tuple[Rule | None, dict[str, Any]]:
    """The rule that an object's class and variables follow to the letter, with its settings; else None.

    A quantised layer, or one with adapters, has variables that no rule knows.
    """
    base = next((cls for cls in type(owner).__mro__ if cls in RULES), None)
    if base is None or any(getattr(type(owner), name, None) is not getattr(base, name, None) for name in _COMPUTES):
        return None, {}
    rule = RULES[base]
    fits = rule.required <= set(names) <= set(rule.roles) and len(names) == len(set(names))
    settings = rule.settings(owner) if fits and getattr(owner, "quantization_mode", None) is None else None
    return (rule, settings) if settings is not None else (None, {})


class _Names:
    """Names of variables: the layer's and the variable's own; one name for one variable.

    Keras's paths begin with the name of a Sequential model, which is "sequential_7" as often as not.
    """

    def __init__(self) -> None:
        self._given: dict[int, str] = {}
        self._seen: Counter[str] = Counter()

    def of(self, variable: tf.Variable, place: str) -> str:
        if id(variable) not in self._given:
            self._given[id(variable)] = _numbered(place, self._seen)
        return self._given[id(variable)]


def _numbered(name: str, seen: Counter[str]) -> str:
    """The name, with "#2" and so on where it was seen before."""
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}#{seen[name]}"


def _owners(model: Any) -> Iterator[tuple[str, Any, list[tuple[str, Any]]]]:
    """(path, object, its own variables by name) of every layer or module that owns some."""
    seen: set[int] = set()
    walk = _walk_layer if isinstance(model, keras.layers.Layer) else _walk_module
    for path, owner, own in walk(model, "", seen):
        yield path or str(getattr(model, "name", type(model).__name__)), owner, own


def _walk_layer(layer: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any, list[tuple[str, Any]]]]:
    if id(layer) in seen:
        return
    seen.add(id(layer))
    children = [] if isinstance(layer, _WHOLE) else sublayers(layer)
    nested = {id(variable) for child in children for variable in child.weights}
    own = [(variable.name, variable) for variable in layer.weights if id(variable) not in nested]
    if own:
        yield path, layer, own
    for child in children:
        yield from _walk_layer(child, f"{path}/{child.name}" if path else child.name, seen)


def sublayers(layer: Any) -> list[Any]:
    """The layers directly inside a Keras layer or model, as it lists them."""
    if isinstance(layer, keras.Model):
        return list(layer.layers)
    return list(layer._flatten_layers(include_self=False, recursive=False))  # public in models alone


def _walk_module(module: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any, list[tuple[str, Any]]]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    held = _inside(module)
    own = {id(value): (name, value) for name, value in reversed(held) if isinstance(value, tf.Variable)}
    if own:
        yield path, module, list(reversed(own.values()))
    for name, value in held:
        inner = f"{path}/{name}" if path else name
        if isinstance(value, keras.layers.Layer):
            yield from _walk_layer(value, inner, seen)
        elif isinstance(value, tf.Module):
            yield from _walk_module(value, inner, seen)


def _inside(module: Any) -> list[tuple[str, Any]]:
    """Names and values of the variables, modules and layers in a module's attributes."""
    return [item for name, value in vars(module).items() if _is_state(module, name) for item in _held(value, name)]


def _is_state(module: Any, name: str) -> bool:
    """Whether an attribute is the module's, and not tf.Module's record of it."""
    return name not in getattr(module, "_TF_MODULE_IGNORED_PROPERTIES", ()) and not name.startswith("_self_")


def _held(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Variables and modules in an attribute, also in lists, tuples and dicts."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _held(item, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _held(item, f"{name}/{index}")
    elif isinstance(value, tf.Variable | tf.Module | keras.layers.Layer):
        yield name, value


def _check_built(model: Any) -> None:
    if not isinstance(model, keras.layers.Layer):
        return
    check_keras()
    known: list[Any] = [layer for layer in every_layer(model) if isinstance(layer, tuple(RULES))]
    if not model.built or (known and not any(layer.built for layer in known)):
        raise InvalidInput(
            f"model {model.name!r} has no weights yet: build it with model.build(input_shape), or call it once"
        )


def every_layer(model: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """The Keras layers of a model or module, itself included, each once."""
    seen = set() if seen is None else seen
    if id(model) in seen:
        return
    seen.add(id(model))
    if isinstance(model, keras.layers.Layer):
        yield model
        inside = sublayers(model)
    else:
        inside = [value for _, value in _inside(model) if not isinstance(value, tf.Variable)]
    for child in inside:
        yield from every_layer(child, seen)
