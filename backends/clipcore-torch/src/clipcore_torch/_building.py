"""One layer built from its canonical description."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from clipcore.errors import MappingError
from clipcore_torch._building_composites import BUILDERS as _COMPOSITES
from clipcore_torch._building_composites import Builder, Settings, Shapes
from clipcore_torch._building_reparametrised import with_kernel
from clipcore_torch._operations import AVG_POOLS, MAX_POOLS

_CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSES: dict[int, type[nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def build_layer(kind: str, settings: Settings, shapes: Shapes) -> nn.Module:
    """A module that is one layer of `kind`; see `clipcore.backend.ModelBackend.build_layer`.

    Raises:
        MappingError: torch has no such layer.
    """
    if kind not in _BUILDERS:
        raise MappingError(f"torch builds no layer of kind {kind!r}; expected one of {sorted(_BUILDERS)}")
    activation = settings.get("activation")
    if activation is not None and kind not in _COMPOSITES:
        raise MappingError(f"{kind}: activation is {activation!r}; torch's layers have none, it is a module of its own")
    return with_kernel(_BUILDERS[kind], settings, shapes)


def _linear(settings: Settings, shapes: Shapes) -> nn.Module:
    outs, ins = shapes["kernel"]
    return nn.Linear(ins, outs, bias="bias" in shapes)


def _conv(settings: Settings, shapes: Shapes) -> nn.Module:
    groups, outs, ins, *window = shapes["kernel"]
    build: Callable[..., nn.Module] = _CONVS[len(window)]
    return build(
        groups * ins,
        groups * outs,
        tuple(window),
        stride=tuple(settings["stride"]),
        padding=_padding(settings, window),
        dilation=tuple(settings["dilation"]),
        groups=groups,
        bias="bias" in shapes,
        padding_mode=settings["padding_mode"],
    )


def _padding(settings: Settings, window: Sequence[int]) -> Any:
    padding, stride, dilation = settings["padding"], settings["stride"], settings["dilation"]
    if padding != "same" and all(before == after for before, after in padding):
        return tuple(before for before, _ in padding)
    totals = [d * (k - 1) for k, d in zip(window, dilation, strict=True)]
    same = tuple((total // 2, total - total // 2) for total in totals)
    if set(stride) == {1} and (padding == "same" or tuple(map(tuple, padding)) == same):
        return "same"
    raise MappingError(
        f"conv: padding {padding!r} with stride {tuple(stride)} is not symmetric; torch's layers pad both sides alike "
        f"(stride 1 apart): put an nn.ZeroPad before the layer"
    )


def _conv_transpose(settings: Settings, shapes: Shapes) -> nn.Module:
    groups, ins, outs, *window = shapes["kernel"]
    build: Callable[..., nn.Module] = _TRANSPOSES[len(window)]
    stride, dilation = tuple(settings["stride"]), tuple(settings["dilation"])
    more = tuple(before - after for before, after in settings["crop"])
    for (before, after), extra, s, d in zip(settings["crop"], more, stride, dilation, strict=True):
        if before < 0 or not 0 <= extra < max(s, d):
            raise MappingError(
                f"conv_transpose: crop ({before}, {after}) with stride {s} and dilation {d}; torch's layer cuts 0 or "
                f"more before, and after it as much or up to {max(s, d) - 1} less: pad or crop outside of the layer"
            )
    return build(
        groups * ins,
        groups * outs,
        tuple(window),
        stride=stride,
        padding=tuple(before for before, _ in settings["crop"]),
        output_padding=more,
        groups=groups,
        bias="bias" in shapes,
        dilation=dilation,
    )


def _batch_norm(settings: Settings, shapes: Shapes) -> nn.Module:
    (channels,) = shapes["running_mean"]
    # SyncBatchNorm is the one class that takes data of any rank; in a single process it is the plain layer
    norm = nn.SyncBatchNorm(channels, settings["eps"], settings.get("momentum", 0.1), affine="scale" in shapes)
    return _with_bias_as("batch_norm", norm, shapes)


def _group_norm(settings: Settings, shapes: Shapes) -> nn.Module:
    groups = settings["groups"]
    # without a scale torch's layer never looks at the number of channels
    (channels,) = shapes.get("scale", (groups,))
    return _with_bias_as(
        "group_norm", nn.GroupNorm(groups, channels, settings["eps"], affine="scale" in shapes), shapes
    )


def _with_bias_as(kind: str, norm: nn.Module, shapes: Shapes) -> nn.Module:
    """The layer without its bias where none was asked for: an argument `bias` is newer than torch 2.4."""
    _refuse_bias_alone(kind, shapes)
    if "bias" not in shapes:
        norm.register_parameter("bias", None)
    return norm


def _layer_norm(settings: Settings, shapes: Shapes) -> nn.Module:
    _refuse_bias_alone("layer_norm", shapes)
    if "scale" not in shapes:
        raise MappingError("layer_norm: without scale and bias no shape says over which axes it runs: give it a scale")
    return nn.LayerNorm(shapes["scale"], settings["eps"], bias="bias" in shapes)


def _refuse_bias_alone(kind: str, shapes: Shapes) -> None:
    if "bias" in shapes and "scale" not in shapes:
        raise MappingError(f"{kind}: torch's layer has no bias without a scale: set the scale to ones")


def _rms_norm(settings: Settings, shapes: Shapes) -> nn.Module:
    return nn.RMSNorm(shapes["scale"], settings["eps"])


def _embedding(settings: Settings, shapes: Shapes) -> nn.Module:
    num, dim = shapes["kernel"]
    return nn.Embedding(num, dim)


def _prelu(settings: Settings, shapes: Shapes) -> nn.Module:
    (channels,) = shapes["slope"]
    return nn.PReLU(channels)


_ACTIVATIONS: dict[str, Callable[[Settings], nn.Module]] = {
    "relu": lambda s: nn.ReLU(),
    "relu6": lambda s: nn.ReLU6(),
    "leaky_relu": lambda s: nn.LeakyReLU(s["slope"]),
    "elu": lambda s: nn.ELU(s.get("alpha", 1.0)),
    "selu": lambda s: nn.SELU(),
    "celu": lambda s: nn.CELU(s.get("alpha", 1.0)),
    "gelu": lambda s: nn.GELU(),
    "gelu_tanh": lambda s: nn.GELU("tanh"),
    "silu": lambda s: nn.SiLU(),
    "mish": lambda s: nn.Mish(),
    "sigmoid": lambda s: nn.Sigmoid(),
    "hard_sigmoid": lambda s: nn.Hardsigmoid(),
    "hard_silu": lambda s: nn.Hardswish(),
    "tanh": lambda s: nn.Tanh(),
    "hard_tanh": lambda s: nn.Hardtanh(s["low"], s["high"]),
    "softplus": lambda s: nn.Softplus(),
    "softsign": lambda s: nn.Softsign(),
    "softmax": lambda s: nn.Softmax(s["axis"]),
    "log_softmax": lambda s: nn.LogSoftmax(s["axis"]),
    "threshold": lambda s: nn.Threshold(s["threshold"], s.get("low", 0.0)),
}


def _activation(settings: Settings, shapes: Shapes) -> nn.Module:
    function = settings["function"]
    if function not in _ACTIVATIONS:
        raise MappingError(f"activation: torch has no module for {function!r}; expected one of {sorted(_ACTIVATIONS)}")
    if function == "relu" and len(settings) > 1:
        raise MappingError(f"activation: relu with {dict(settings)}; torch's module has no numbers")
    return _ACTIVATIONS[function](settings)


def _avg_pool(settings: Settings, shapes: Shapes) -> nn.Module:
    window, stride, padding = _windows("avg_pool", settings)
    build: Callable[..., nn.Module] = AVG_POOLS[len(window)]
    return build(window, stride, padding, settings["ceil"], settings["count_include_pad"])


def _max_pool(settings: Settings, shapes: Shapes) -> nn.Module:
    window, stride, padding = _windows("max_pool", settings)
    build: Callable[..., nn.Module] = MAX_POOLS[len(window)]
    return build(window, stride, padding, tuple(settings["dilation"]), ceil_mode=settings["ceil"])


def _windows(kind: str, settings: Settings) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(window, stride, padding) of pooling."""
    window, padding = tuple(settings["window"]), settings["padding"]
    if padding == "same" or any(
        before != after or before > size // 2 for (before, after), size in zip(padding, window, strict=True)
    ):
        raise MappingError(
            f"{kind}: padding {padding!r} of a window {window}; torch's layer pads both sides alike, by half of it "
            f"at most: put an nn.ZeroPad before the layer"
        )
    return window, tuple(settings["stride"]), tuple(before for before, _ in padding)


def _dropout(settings: Settings, shapes: Shapes) -> nn.Module:
    return nn.Dropout(settings["rate"])


_BUILDERS: dict[str, Builder] = {
    "linear": _linear,
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "rms_norm": _rms_norm,
    "embedding": _embedding,
    "prelu": _prelu,
    "activation": _activation,
    "avg_pool": _avg_pool,
    "max_pool": _max_pool,
    "dropout": _dropout,
    **_COMPOSITES,
}
