"""One call of a layer run again in NumPy, with the settings that it has or with others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from einops import rearrange

from clipcore.backend import Layer
from clipcore.mapping.kinds import kind_of
from clipcore.mapping.models import Side
from clipcore.mapping.recording import Call
from clipcore.mapping.reference import ACTIVATIONS, FORWARD

Array = np.ndarray[Any, np.dtype[Any]]
Settings = Mapping[str, Any]

# of these kinds the reference takes the channel axis first
_CHANNELS_FIRST = frozenset({"conv", "conv_transpose", "batch_norm", "group_norm", "prelu", "avg_pool", "max_pool"})

_EPS = (1e-3, 1e-5, 1e-6, 1e-7, 1e-8, 1e-12, 1e-2, 0.0)
_ACTIVATIONS = (None, *ACTIVATIONS)
# What a layer may do that its description does not say, by kind: the setting, and the values that are tried.
HIDDEN: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "linear": {"activation": _ACTIVATIONS},
    "conv": {"activation": _ACTIVATIONS, "padding_mode": ("zeros", "reflect", "replicate", "circular")},
    "conv_transpose": {"activation": _ACTIVATIONS},
    "batch_norm": {"training": (True,), "eps": _EPS},
    "layer_norm": {"eps": _EPS},
    "group_norm": {"eps": _EPS},
    "rms_norm": {"eps": _EPS},
}


class Replay:
    """A call of the source's, whose layer can be run again with any settings, on what it took or on `x`.

    Raises:
        ValueError: nothing says what a layer of this kind computes, or it takes other than one array.
    """

    def __init__(self, side: Side, call: Call, x: Array | None = None) -> None:
        layer = side.layers[call.layer]
        if kind_of(layer.kind) is None or layer.kind not in FORWARD or len(call.inputs) != 1:
            raise ValueError(f"layer {layer.name!r} cannot be run again")
        self._kind = layer.kind
        self._last = layer.settings.get("channels", side.channels) == "last"
        self._tensors = side.canonical(layer)
        taken = call.inputs[0] if x is None else x
        self._x = channels_first(taken, last=self._moves(taken))

    def _moves(self, value: Array) -> bool:
        return self._kind in _CHANNELS_FIRST and self._last and value.ndim >= 3

    def run(self, settings: Settings) -> Array:
        """What the layer gives with these settings, the channel axis where the source has it."""
        tensors = self._tensors
        if settings.get("training"):
            axes = tuple(axis for axis in range(self._x.ndim) if axis != 1)
            wide = self._x.astype(np.float64)
            tensors = {**tensors, "running_mean": wide.mean(axes), "running_var": wide.var(axes)}
        with np.errstate(all="ignore"):  # a setting that does not fit may overflow
            result = FORWARD[self._kind](self._x, tensors, settings)
        return channels_last(result) if self._moves(result) else result


def channels_first(value: Array, *, last: bool) -> Array:
    """A value whose channel axis may be the last, with that axis after the batch's."""
    return rearrange(value, "batch ... channel -> batch channel ...") if last else value


def channels_last(value: Array) -> Array:
    """The way back."""
    return rearrange(value, "batch channel ... -> batch ... channel")


def pooled(side: Side, value: Array, *, last: bool) -> Iterator[tuple[Layer, Array]]:
    """What each pooling layer of a model makes of a value, whose channel axis may be the last, and what the mean and
    the largest of all places are.
    """
    for layer in side.backend.operations(side.model):
        if layer.kind in ("avg_pool", "max_pool") and value.ndim == len(layer.settings["window"]) + 2:
            result = FORWARD[layer.kind](channels_first(value, last=last), {}, layer.settings)
            yield layer, channels_last(result) if last else result
    for axes in dict.fromkeys((tuple(range(1, value.ndim - 1)), tuple(range(2, value.ndim)))):
        yield Layer("", "global_avg_pool", {}), value.mean(axes)
        yield Layer("", "global_max_pool", {}), value.max(axes)
