"""Keras layers built from canonical settings and shapes, for conformance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras

from clipcore.errors import MappingError
from clipcore_tensorflow._layers import padding_pairs

Shapes = Mapping[str, tuple[int, ...]]
Settings = Mapping[str, Any]

_CONV = {1: keras.layers.Conv1D, 2: keras.layers.Conv2D, 3: keras.layers.Conv3D}
_DEPTHWISE = {1: keras.layers.DepthwiseConv1D, 2: keras.layers.DepthwiseConv2D}


def build_layer(kind: str, settings: Settings, shapes: Shapes) -> keras.Sequential:
    """A built Sequential model that is one layer of `kind`; see `clipcore.backend.ModelBackend.build_layer`.

    Data has the channel axis last, batch norm's has two spatial axes.
    Raises:
        MappingError: Keras has no such layer.
    """
    if kind not in _BUILDERS:
        raise MappingError(f"Keras builds no layer of kind {kind!r}; expected one of {sorted(_BUILDERS)}")
    try:
        source, layer = _BUILDERS[kind](settings, shapes)
        return keras.Sequential([source, layer])
    except (ValueError, TypeError) as err:
        raise MappingError(f"{kind}: Keras has no layer with the settings {dict(settings)}: {err}") from err


def _linear(settings: Settings, shapes: Shapes) -> tuple[Any, Any]:
    outs, ins = shapes["kernel"]
    layer = keras.layers.Dense(outs, settings.get("activation"), use_bias="bias" in shapes)
    return keras.Input((ins,)), layer


def _conv(settings: Settings, shapes: Shapes) -> tuple[Any, Any]:
    groups, outs, ins, *window = shapes["kernel"]
    if settings["padding_mode"] != "zeros":
        raise MappingError(f"conv: padding_mode is {settings['padding_mode']!r}; Keras's layers pad with zeros alone")
    stride, dilation = tuple(settings["stride"]), tuple(settings["dilation"])
    if max(stride) > 1 and max(dilation) > 1:
        raise MappingError(f"conv: stride {stride} together with dilation {dilation}; Keras's layers have one or none")
    common = {
        "strides": stride,
        "padding": _padding(settings["padding"], window, stride, dilation),
        "dilation_rate": dilation,
        "activation": settings.get("activation"),
        "use_bias": "bias" in shapes,
        "data_format": "channels_last",
    }
    source = keras.Input((*[None] * len(window), groups * ins))
    if _is_depthwise(groups, ins, window, common):
        return source, _DEPTHWISE[len(window)](tuple(window), depth_multiplier=outs, **common)
    if groups > 1 and len(window) == 3:
        raise MappingError("conv: groups with three spatial axes; TensorFlow computes that on no CPU")
    return source, _CONV[len(window)](groups * outs, tuple(window), groups=groups, **common)


def _is_depthwise(groups: int, ins: int, window: list[int], common: Mapping[str, Any]) -> bool:
    """Whether the layer is one that Keras's depthwise layers are made for: theirs have fewer settings."""
    plain = len(set(common["strides"])) == 1 and common["padding"] != "causal"
    return ins == 1 and groups > 1 and len(window) in _DEPTHWISE and plain


def _padding(padding: Any, window: list[int], stride: tuple[int, ...], dilation: tuple[int, ...]) -> str:
    """Keras's word for a padding."""
    wanted = padding if isinstance(padding, str) else tuple(map(tuple, padding))
    for word in ("valid", "same", "causal") if len(window) == 1 else ("valid", "same"):
        if padding_pairs(word, window, stride, dilation) == wanted:
            return word
    raise MappingError(
        f"conv: padding {padding!r} with stride {stride}; Keras's layers pad with nothing, or by TensorFlow's SAME: "
        f"put a ZeroPadding layer before the layer"
    )


def _batch_norm(settings: Settings, shapes: Shapes) -> tuple[Any, Any]:
    (channels,) = shapes["running_mean"]
    layer = keras.layers.BatchNormalization(
        epsilon=settings["eps"],
        momentum=1 - settings.get("momentum", 0.01),
        scale="scale" in shapes,
        center="bias" in shapes,
    )
    return keras.Input((None, None, channels)), layer


def _layer_norm(settings: Settings, shapes: Shapes) -> tuple[Any, Any]:
    if not shapes:
        raise MappingError("layer_norm: without scale and bias the layer owns nothing that could be moved")
    normalised = next(iter(shapes.values()))
    layer = keras.layers.LayerNormalization(
        axis=list(range(-len(normalised), 0)),
        epsilon=settings["eps"],
        scale="scale" in shapes,
        center="bias" in shapes,
    )
    return keras.Input((None, *normalised)), layer


def _embedding(settings: Settings, shapes: Shapes) -> tuple[Any, Any]:
    num, dim = shapes["kernel"]
    return keras.Input((None,), dtype="int32"), keras.layers.Embedding(num, dim)


_BUILDERS: dict[str, Callable[[Settings, Shapes], tuple[Any, Any]]] = {
    "linear": _linear,
    "conv": _conv,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "embedding": _embedding,
}
