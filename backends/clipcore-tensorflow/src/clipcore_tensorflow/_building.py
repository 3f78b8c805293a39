"""Keras layers built from canonical settings and shapes, for conformance."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import keras

from clipcore.errors import MappingError
from clipcore_tensorflow._convolutions import crop_pairs, padding_pairs
from clipcore_tensorflow._functions import NUMBERS
from clipcore_tensorflow._tracing import cause

Shapes = Mapping[str, tuple[int, ...]]
Settings = Mapping[str, Any]

_CONV = {1: keras.layers.Conv1D, 2: keras.layers.Conv2D, 3: keras.layers.Conv3D}
_DEPTHWISE = {1: keras.layers.DepthwiseConv1D, 2: keras.layers.DepthwiseConv2D}
_TRANSPOSED = {1: keras.layers.Conv1DTranspose, 2: keras.layers.Conv2DTranspose, 3: keras.layers.Conv3DTranspose}
_POOLING = {
    "avg_pool": {1: keras.layers.AveragePooling1D, 2: keras.layers.AveragePooling2D, 3: keras.layers.AveragePooling3D},
    "max_pool": {1: keras.layers.MaxPooling1D, 2: keras.layers.MaxPooling2D, 3: keras.layers.MaxPooling3D},
}


def build_layer(kind: str, settings: Settings, shapes: Shapes) -> keras.Model:
    """A built model that is one layer of `kind`; see `clipcore.backend.ModelBackend.build_layer`.

    Data has the channel axis last, that of norms two spatial axes. "attention" is a model of (query, key, value).
    Raises:
        MappingError: Keras has no such layer.
    """
    if kind not in _BUILDERS:
        raise MappingError(f"Keras builds no layer of kind {kind!r}; expected one of {sorted(_BUILDERS)}")
    if {"kernel.direction", "kernel.original"} & set(shapes):
        raise MappingError(f"{kind}: Keras's layers have a kernel, and {sorted(shapes)} stand in its place")
    try:
        built = _BUILDERS[kind](settings, shapes)
        return built if isinstance(built, keras.Model) else keras.Sequential(list(built))
    except (ValueError, TypeError) as err:
        raise MappingError(f"{kind}: Keras has no layer with the settings {dict(settings)}: {cause(err)}") from err


def _linear(settings: Settings, shapes: Shapes) -> tuple[Any, ...]:
    outs, ins = shapes["kernel"]
    heads = settings.get("heads")
    if heads is None:
        layer = keras.layers.Dense(outs, settings.get("activation"), use_bias="bias" in shapes)
        return keras.Input((ins,)), layer
    if outs % heads:
        raise MappingError(f"linear: {outs} features are not divided into {heads} heads")
    divided = keras.layers.EinsumDense(
        "...a,abc->...bc",
        (heads, outs // heads),
        activation=settings.get("activation"),
        bias_axes="bc" if "bias" in shapes else None,
    )
    return keras.Input((ins,)), divided, keras.layers.Reshape((outs,))


def _conv(settings: Settings, shapes: Shapes) -> tuple[Any, ...]:
    groups, outs, ins, *window = shapes["kernel"]
    if settings["padding_mode"] != "zeros":
        raise MappingError(f"conv: padding_mode is {settings['padding_mode']!r}; Keras's layers pad with zeros alone")
    stride, dilation = tuple(settings["stride"]), tuple(settings["dilation"])
    _check_one_or_none("conv", stride, dilation)
    common = {
        "strides": stride,
        "padding": _padding("conv", settings["padding"], window, stride, dilation),
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


def _check_one_or_none(kind: str, stride: tuple[int, ...], dilation: tuple[int, ...]) -> None:
    if max(stride) > 1 and max(dilation) > 1:
        raise MappingError(
            f"{kind}: stride {stride} together with dilation {dilation}; Keras's layers have one or none"
        )


def _is_depthwise(groups: int, ins: int, window: list[int], common: Mapping[str, Any]) -> bool:
    """Whether the layer is one that Keras's depthwise layers are made for: theirs have fewer settings."""
    plain = len(set(common["strides"])) == 1 and common["padding"] != "causal"
    return ins == 1 and groups > 1 and len(window) in _DEPTHWISE and plain


def _padding(kind: str, padding: Any, window: Any, stride: tuple[int, ...], dilation: tuple[int, ...]) -> str:
    """Keras's word for a padding."""
    wanted = padding if isinstance(padding, str) else tuple(map(tuple, padding))
    words = ("valid", "same", "causal") if len(window) == 1 and kind == "conv" else ("valid", "same")
    for word in words:
        if padding_pairs(word, window, stride, dilation) == wanted:
            return word
    raise MappingError(
        f"{kind}: padding {padding!r} with stride {stride}; Keras's layers pad with nothing, or by TensorFlow's SAME: "
        f"put a ZeroPadding layer before the layer"
    )


def _conv_transpose(settings: Settings, shapes: Shapes) -> tuple[Any, ...]:
    groups, ins, outs, *window = shapes["kernel"]
    if groups != 1:
        raise MappingError(f"conv_transpose: groups is {groups}; Keras's layers have none, the dense kernel would do")
    stride, dilation = tuple(settings["stride"]), tuple(settings["dilation"])
    _check_one_or_none("conv_transpose", stride, dilation)
    padding, more = _cropping(tuple(map(tuple, settings["crop"])), window, stride, dilation)
    layer = _TRANSPOSED[len(window)](
        outs,
        tuple(window),
        stride,
        padding,
        output_padding=more,
        dilation_rate=dilation,
        activation=settings.get("activation"),
        use_bias="bias" in shapes,
        data_format="channels_last",
    )
    return keras.Input((*[None] * len(window), ins)), layer


def _cropping(
    crop: tuple[Any, ...], window: list[int], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[str, tuple[int, ...] | None]:
    """Keras's words for what is cut: padding and output_padding."""
    choices = [None, *itertools.product(*(range(step) for step in stride))]
    for padding, more in itertools.product(("valid", "same"), choices):
        if crop_pairs(padding, window, stride, dilation, more) == crop:
            return padding, more
    raise MappingError(
        f"conv_transpose: crop {crop} with window {tuple(window)} and stride {stride}; Keras's layers cut nothing, or "
        f"by TensorFlow's SAME: put a Cropping layer behind one with padding='valid'"
    )


def _batch_norm(settings: Settings, shapes: Shapes) -> tuple[Any, ...]:
    (channels,) = shapes["running_mean"]
    layer = keras.layers.BatchNormalization(
        epsilon=settings["eps"],
        momentum=1 - settings.get("momentum", 0.01),
        scale="scale" in shapes,
        center="bias" in shapes,
    )
    return keras.Input((None, None, channels)), layer


def _layer_norm(settings: Settings, shapes: Shapes) -> tuple[Any, ...]:
    normalised = _first_shape("layer_norm", shapes)
    layer = keras.layers.LayerNormalization(
        axis=list(range(-len(normalised), 0)),
        epsilon=settings["eps"],
        scale="scale" in shapes,
        center="bias" in shapes,
    )
    return keras.Input((None, *normalised)), layer


def _first_shape(kind: str, shapes: Shapes) -> tuple[int, ...]:
    if not shapes:
        raise MappingError(f"{kind}: without scale and bias the layer owns nothing that could be moved")
    return next(iter(shapes.values()))


def _group_norm(settings: Settings, shapes: Shapes) -> tuple[Any, ...]:
    (channels,) = _first_shape("group_norm", shapes)
    layer = keras.layers.GroupNormalization(
        int(settings["groups"]), epsilon=settings["eps"], scale="scale" in shapes, center="bias" in shapes
    )
    return keras.Input((None, None, channels)), layer


def _rms_norm(settings: Settings, shapes: Shapes) -> tuple[Any, ...]:
    if not hasattr(keras.layers, "RMSNormalization"):
        raise MappingError(f"rms_norm: Keras {keras.__version__} has no RMSNormalization; Keras 3.9 has")
    normalised = _first_shape("rms_norm", shapes)
    axes = list(range(-len(normalised), 0))
    return keras.Input((None, *normalised)), keras.layers.RMSNormalization(axis=axes, epsilon=settings["eps"])


def _embedding(settings: Settings, shapes: Shapes) -> tuple[Any, ...]:
    num, dim = shapes["kernel"]
    return keras.Input((None,), dtype="int32"), keras.layers.Embedding(num, dim)


def _recurrent(kind: str) -> Callable[[Settings, Shapes], tuple[Any, ...]]:
    """The builder of a recurrent kind; it gives the whole sequence."""

    def build(settings: Settings, shapes: Shapes) -> tuple[Any, ...]:
        first = next(role for role in shapes if role.partition(".")[0] == "kernel")
        units, ins = shapes[first]
        kernels = sum(role.partition(".")[0] == "kernel" for role in shapes)
        biases, recurrent_biases = (
            sum(role.partition(".")[0] == word for role in shapes) for word in ("bias", "recurrent_bias")
        )
        two = kind == "gru" and bool(settings["reset_after"])
        if recurrent_biases != (biases if two else 0) or biases not in (0, kernels):
            raise MappingError(
                f"{kind}: {biases} biases and {recurrent_biases} recurrent ones for {kernels} kernels; Keras's layer "
                f"has {'both for every gate, or none' if two else 'one for every kernel, or none, and none recurrent'}"
            )
        more = {} if kind == "rnn" else {"recurrent_activation": settings["recurrent_activation"]}
        if kind == "gru":
            more["reset_after"] = settings["reset_after"]
        layer = _RECURRENT[kind](
            units,
            activation=settings["activation"],
            use_bias=biases > 0,
            return_sequences=True,
            go_backwards=settings["reverse"],
            **more,
        )
        return keras.Input((None, ins)), layer

    return build


_RECURRENT = {"lstm": keras.layers.LSTM, "gru": keras.layers.GRU, "rnn": keras.layers.SimpleRNN}


def _prelu(settings: Settings, shapes: Shapes) -> tuple[Any, ...]:
    (channels,) = shapes["slope"]
    if channels == 1:
        raise MappingError("prelu: one slope for all channels; Keras's layer learns one for each")
    return keras.Input((None, None, channels)), keras.layers.PReLU(shared_axes=[1, 2])


def _attention(settings: Settings, shapes: Shapes) -> keras.Model:
    """Attention of (query, key, value); one with fewer key heads is Keras's GroupQueryAttention."""
    heads = int(settings["heads"])
    wide, query = shapes["query.kernel"]
    narrow, key = shapes["key.kernel"]
    values, value = shapes["value.kernel"]
    outs, _ = shapes["output.kernel"]
    head = wide // heads
    biases = sum(f"{part}.bias" in shapes for part in ("query", "key", "value", "output"))
    if biases not in (0, 4):
        raise MappingError(f"attention: {biases} of the four projections have a bias; in Keras all have, or none")
    inputs = [keras.Input((None, features)) for features in (query, key, value)]
    if narrow == wide:
        layer = keras.layers.MultiHeadAttention(
            heads, head, value_dim=values // heads, use_bias=biases > 0, output_shape=outs
        )
    else:
        if not outs == query == value or values != narrow:
            raise MappingError(
                f"attention in groups of heads with {query} query, {value} value and {outs} output features, and "
                f"values of {values} beside keys of {narrow}; in Keras the former are equal, and the latter"
            )
        layer = keras.layers.GroupQueryAttention(head, heads, narrow // head, use_bias=biases > 0)
    return keras.Model(inputs, layer(inputs[0], inputs[2], inputs[1]))


def _activation(settings: Settings, shapes: Shapes) -> tuple[Any, ...]:
    numbers = {name: value for name, value in settings.items() if name != "function" and value is not None}
    function = settings["function"]
    if function in _WITH_NUMBERS:
        make, names = _WITH_NUMBERS[function]
        if set(numbers) <= set(names):
            return keras.Input((None,)), make(**{names[name]: value for name, value in numbers.items()})
    if function == "gelu_tanh" and not numbers:
        return keras.Input((None,)), keras.layers.Activation(_gelu_tanh)
    if numbers != NUMBERS.get(function, {}):
        raise MappingError(f"activation: Keras has no {function!r} with {numbers}")
    return keras.Input((None,)), keras.layers.Activation(function)


_gelu_tanh = functools.partial(keras.activations.gelu, approximate=True)
_WITH_NUMBERS: dict[str, tuple[Any, dict[str, str]]] = {
    "relu": (keras.layers.ReLU, {"slope": "negative_slope", "high": "max_value", "threshold": "threshold"}),
    "leaky_relu": (keras.layers.LeakyReLU, {"slope": "negative_slope"}),
    "elu": (keras.layers.ELU, {"alpha": "alpha"}),
    "softmax": (keras.layers.Softmax, {"axis": "axis"}),
}


def _pool(kind: str) -> Callable[[Settings, Shapes], tuple[Any, ...]]:
    """The builder of a kind of pooling."""

    def build(settings: Settings, shapes: Shapes) -> tuple[Any, ...]:
        window, stride = tuple(settings["window"]), tuple(settings["stride"])
        rank = len(window)
        padding = _padding(kind, settings["padding"], window, stride, (1,) * rank)
        if settings.get("ceil") or max(settings.get("dilation", (1,))) > 1:
            raise MappingError(
                f"{kind}: Keras's layers have no ceil and no dilation; the settings are {dict(settings)}"
            )
        if settings.get("count_include_pad") and padding != "valid":
            raise MappingError(f"{kind}: count_include_pad; Keras's layers never count what was padded")
        layer = _POOLING[kind][rank](window, stride, padding, data_format="channels_last")
        return keras.Input((*[None] * rank, 3)), layer

    return build


def _dropout(settings: Settings, shapes: Shapes) -> tuple[Any, ...]:
    return keras.Input((None,)), keras.layers.Dropout(settings["rate"])


_BUILDERS: dict[str, Callable[[Settings, Shapes], Any]] = {
    "linear": _linear,
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "rms_norm": _rms_norm,
    "embedding": _embedding,
    **{kind: _recurrent(kind) for kind in _RECURRENT},
    "prelu": _prelu,
    "attention": _attention,
    "activation": _activation,
    "avg_pool": _pool("avg_pool"),
    "max_pool": _pool("max_pool"),
    "dropout": _dropout,
}
