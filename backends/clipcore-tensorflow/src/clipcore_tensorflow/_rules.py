"""The table: which class of Keras is which kind, and how it stores and sets what the kind needs."""

from __future__ import annotations

import functools
from typing import Any

from clipcore.backend import Stored
from clipcore_tensorflow._canonical import (
    Block,
    Canonical,
    NotDescribedError,
    Rule,
    Shapes,
    by_stored,
)
from clipcore_tensorflow._convolutions import convolution, separable, transposed
from clipcore_tensorflow._einsum import einsum
from clipcore_tensorflow._functions import activation_name
from clipcore_tensorflow._keras import library_of
from clipcore_tensorflow._recurrent import recurrent


def _linear(layer: Any) -> dict[str, Any]:
    return {"activation": activation_name(layer.activation)}


def _conv(layer: Any) -> dict[str, Any]:
    return {**convolution(layer, activation_name(layer.activation)), "groups": int(layer.groups)}


def _depthwise(layer: Any, shapes: Shapes) -> list[Canonical]:
    (kernel,) = set(shapes) - {"bias"}  # Keras 2 calls it depthwise_kernel
    found = by_stored(
        Stored("conv", {kernel: ("kernel", "... (group in) out"), "bias": ("bias", "(group out)")}), layer, shapes
    )
    settings = convolution(layer, activation_name(layer.activation))
    return [Canonical("conv", found.blocks, {**settings, "groups": int(shapes[kernel][-2])})]


def _transposed(layer: Any) -> dict[str, Any]:
    return transposed(layer, activation_name(layer.activation))


def _separable(layer: Any, shapes: Shapes) -> list[Canonical]:
    return separable(layer, shapes, activation_name(layer.activation))


def _batch_norm(layer: Any) -> dict[str, Any]:
    # built once, the layer takes inputs of this rank alone
    rank = layer.input_spec.ndim
    axes = list(layer.axis) if isinstance(layer.axis, list | tuple) else [layer.axis]
    return {
        "eps": float(layer.epsilon),
        "momentum": round(1 - float(layer.momentum), 12),  # 0.01, not 0.010000000000000009
        "channels": _channels(layer, axes, rank),
    }


def _channels(layer: Any, axes: list[int], rank: int) -> str:
    """Where the one axis that a norm keeps apart is."""
    places = [axis % rank for axis in axes]
    if places == [rank - 1]:
        return "last"
    if places == [1]:
        return "first"
    raise NotDescribedError(f"a {type(layer).__name__} whose channels are the axes {axes} of {rank}")


def _layer_norm(layer: Any) -> dict[str, Any]:
    if getattr(layer, "rms_scaling", False):
        raise NotDescribedError(
            "a LayerNormalization with rms_scaling, which divides by the standard deviation without taking the mean off"
        )
    return _over_last_axes(layer)


def _over_last_axes(layer: Any) -> dict[str, Any]:
    rank = len(layer.get_build_config()["input_shape"])
    given = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
    axes = sorted(axis % rank for axis in given)
    if axes != list(range(rank - len(axes), rank)):
        raise NotDescribedError(f"a {type(layer).__name__} over the axes {axes} of {rank}, which are not the last ones")
    return {"eps": float(layer.epsilon)}


def _group_norm(layer: Any, shapes: Shapes) -> list[Canonical]:
    found = by_stored(Stored("group_norm", _SCALE_AND_BIAS), layer, shapes)
    input_shape = layer.get_build_config()["input_shape"]
    channels = int(input_shape[layer.axis])
    settings = {
        "groups": channels if layer.groups == -1 else int(layer.groups),
        "eps": float(layer.epsilon),
        "channels": _channels(layer, [layer.axis], len(input_shape)),
    }
    return [Canonical("group_norm", found.blocks, settings)]


def _prelu(layer: Any, shapes: Shapes) -> list[Canonical]:
    shape = shapes["alpha"]
    long = [axis for axis, size in enumerate(shape) if size != 1] or [len(shape) - 1]
    if long not in ([0], [len(shape) - 1]):
        raise NotDescribedError(f"a PReLU with slopes of shape {shape}, not one per channel: give it shared_axes")
    (axis,) = long
    layout = " ".join("channel" if place == axis else "1" for place in range(len(shape)))
    settings = {"channels": "last" if axis == len(shape) - 1 else "first"}
    return [Canonical("prelu", {"alpha": (Block("slope", layout),)}, settings)]


_KERNEL = frozenset({"kernel"})
_LINEAR = {"kernel": ("kernel", "in out"), "bias": ("bias", "out")}
_CONV = {"kernel": ("kernel", "... in (group out)"), "bias": ("bias", "(group out)")}
_TRANSPOSED = {"kernel": ("kernel", "... (group out) in"), "bias": ("bias", "(group out)")}
_BATCH_NORM = {
    "gamma": ("scale", "channel"),
    "beta": ("bias", "channel"),
    "moving_mean": ("running_mean", "channel"),
    "moving_variance": ("running_var", "channel"),
}
_LAYER_NORM = {"gamma": ("scale", "..."), "beta": ("bias", "...")}
_SCALE_AND_BIAS = {"gamma": ("scale", "channel"), "beta": ("bias", "channel")}

# By the name that the class has in both Keras libraries. A subclass is of its base's kind unless it computes something
# else: see `rule_of`.
_ROWS: dict[str, Rule] = {
    "Dense": Stored("linear", _LINEAR, _linear, _KERNEL),
    "EinsumDense": einsum,
    **{f"Conv{rank}D": Stored("conv", _CONV, _conv, _KERNEL) for rank in (1, 2, 3)},
    **{f"DepthwiseConv{rank}D": _depthwise for rank in (1, 2)},
    **{f"SeparableConv{rank}D": _separable for rank in (1, 2)},
    **{f"Conv{rank}DTranspose": Stored("conv_transpose", _TRANSPOSED, _transposed, _KERNEL) for rank in (1, 2, 3)},
    "BatchNormalization": Stored("batch_norm", _BATCH_NORM, _batch_norm, frozenset({"moving_mean", "moving_variance"})),
    "LayerNormalization": Stored("layer_norm", _LAYER_NORM, _layer_norm),
    "GroupNormalization": _group_norm,
    "RMSNormalization": Stored("rms_norm", {"scale": ("scale", "...")}, _over_last_axes, frozenset({"scale"})),
    "Embedding": Stored("embedding", {"embeddings": ("kernel", "num dim")}, required=frozenset({"embeddings"})),
    "LSTM": recurrent,
    "GRU": recurrent,
    "SimpleRNN": recurrent,
    "RNN": recurrent,
    "PReLU": _prelu,
}
_COMPUTES = ("call", "__call__", "convolution_op", "inner_loop")


@functools.cache
def _classes(layers: Any) -> dict[type, Rule]:
    """The table of one library, by its classes."""
    return {getattr(layers, name): rule for name, rule in _ROWS.items() if hasattr(layers, name)}


def is_known(layer: Any) -> bool:
    """Whether some rule is about the layer's class, or one that it is derived from."""
    library = library_of(layer)
    return library is not None and isinstance(layer, tuple(_classes(library.layers)))


def canonical(owner: Any, shapes: Shapes) -> list[Canonical]:
    """The canonical layers that an object computes: as its class was registered, else as the table says.

    A quantised layer, or one with adapters, has variables that no rule knows.
    Raises:
        NotDescribedError: no rule describes it.
    """
    rule = _registered(type(owner)) or _rule_of(owner)
    return [by_stored(rule, owner, shapes)] if isinstance(rule, Stored) else rule(owner, shapes)


def registered_roles(owner: Any) -> frozenset[str]:
    """The names of tensors that a rule of the user's own is about."""
    rule = _registered(type(owner))
    return frozenset(rule.roles) if rule else frozenset()


def _registered(cls: type) -> Stored | None:
    from clipcore.mapping.registry import stored_by  # it is asked each time: kinds are registered at any time

    return stored_by(cls)


def _rule_of(owner: Any) -> Rule:
    library, what = library_of(owner), type(owner).__name__
    classes = _classes(library.layers) if library is not None else {}
    base = next((cls for cls in type(owner).__mro__ if cls in classes), None)
    if base is None:
        raise NotDescribedError(f"a {what}, which no rule describes")
    if any(getattr(type(owner), name, None) is not getattr(base, name, None) for name in _COMPUTES):
        raise NotDescribedError(f"a {what}, which computes something of its own")
    if getattr(owner, "quantization_mode", None) is not None:
        raise NotDescribedError(f"a quantised {what}")
    return classes[base]
