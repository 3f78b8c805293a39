"""The table: what kind of layer each class of torch is, how it stores the roles, its settings in canonical words."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from clipcore.backend import Stored


def _linear(module: nn.Linear) -> dict[str, Any]:
    return {"activation": None}


def _conv(module: Any) -> dict[str, Any]:
    return {
        "stride": module.stride,
        "padding": _padding(module),
        "padding_mode": module.padding_mode,
        "dilation": module.dilation,
        "groups": module.groups,
        "activation": None,
        "channels": "first",
    }


def _padding(module: Any) -> tuple[tuple[int, int], ...]:
    """One (before, after) pair per spatial axis."""
    if module.padding == "valid":
        return tuple((0, 0) for _ in module.kernel_size)
    if module.padding == "same":
        # torch refuses strides with "same", so the total is the same for every size; the odd one comes after
        totals = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((size, size) for size in module.padding)


def _conv_transpose(module: Any) -> dict[str, Any]:
    return {
        "stride": module.stride,
        "crop": tuple((p, p - more) for p, more in zip(module.padding, module.output_padding, strict=True)),
        "dilation": module.dilation,
        "groups": module.groups,
        "activation": None,
        "channels": "first",
    }


def _batch_norm(module: Any) -> dict[str, Any]:
    return {"eps": module.eps, "momentum": module.momentum, "channels": "first"}


def _tracking_instance_norm(module: Any) -> dict[str, Any] | None:
    return _batch_norm(module) if module.track_running_stats else None


def _instance_norm(module: Any) -> dict[str, Any]:
    return {"groups": module.num_features, "eps": module.eps, "channels": "first"}


def _group_norm(module: nn.GroupNorm) -> dict[str, Any]:
    return {"groups": module.num_groups, "eps": module.eps, "channels": "first"}


def _layer_norm(module: nn.LayerNorm) -> dict[str, Any]:
    return {"eps": module.eps}


def _rms_norm(module: nn.RMSNorm) -> dict[str, Any]:
    # without one of its own it takes that of the dtype it computes in, which for the halves is float32
    wide = torch.promote_types(module.weight.dtype, torch.float32)
    return {"eps": torch.finfo(wide).eps if module.eps is None else module.eps}


def _embedding(module: nn.Embedding) -> dict[str, Any] | None:
    return {} if module.max_norm is None else None


def _prelu(module: nn.PReLU) -> dict[str, Any]:
    return {"channels": "first"}


_WEIGHT = frozenset({"weight"})
_LINEAR = Stored("linear", {"weight": ("kernel", "out in"), "bias": ("bias", "out")}, _linear, _WEIGHT)
_CONV = Stored("conv", {"weight": ("kernel", "(group out) in ..."), "bias": ("bias", "(group out)")}, _conv, _WEIGHT)
_CONV_TRANSPOSE = Stored(
    "conv_transpose",
    {"weight": ("kernel", "(group in) out ..."), "bias": ("bias", "(group out)")},
    _conv_transpose,
    _WEIGHT,
)
_PER_CHANNEL = {"weight": ("scale", "channel"), "bias": ("bias", "channel")}
_STATISTICS = {
    "running_mean": ("running_mean", "channel"),
    "running_var": ("running_var", "channel"),
    "num_batches_tracked": ("batch_count", "..."),
}
_TRACKED = frozenset({"running_mean", "running_var"})
_BATCH_NORM = Stored("batch_norm", {**_PER_CHANNEL, **_STATISTICS}, _batch_norm, _TRACKED)
_INSTANCE_NORM = (
    Stored("batch_norm", {**_PER_CHANNEL, **_STATISTICS}, _tracking_instance_norm, _TRACKED),
    Stored("group_norm", _PER_CHANNEL, _instance_norm),
)
_GROUP_NORM = Stored("group_norm", _PER_CHANNEL, _group_norm)
_LAYER_NORM = Stored("layer_norm", {"weight": ("scale", "..."), "bias": ("bias", "...")}, _layer_norm, _WEIGHT)
_RMS_NORM = Stored("rms_norm", {"weight": ("scale", "...")}, _rms_norm, _WEIGHT)
_EMBEDDING = Stored("embedding", {"weight": ("kernel", "num dim")}, _embedding, _WEIGHT)
_PRELU = Stored("prelu", {"weight": ("slope", "channel")}, _prelu, _WEIGHT)

# of several rows of a class, a module is of the first that describes the tensors which it has
TABLE: dict[type[nn.Module], tuple[Stored, ...]] = {
    nn.Linear: (_LINEAR,),
    nn.Conv1d: (_CONV,),
    nn.Conv2d: (_CONV,),
    nn.Conv3d: (_CONV,),
    nn.ConvTranspose1d: (_CONV_TRANSPOSE,),
    nn.ConvTranspose2d: (_CONV_TRANSPOSE,),
    nn.ConvTranspose3d: (_CONV_TRANSPOSE,),
    nn.BatchNorm1d: (_BATCH_NORM,),
    nn.BatchNorm2d: (_BATCH_NORM,),
    nn.BatchNorm3d: (_BATCH_NORM,),
    nn.SyncBatchNorm: (_BATCH_NORM,),
    nn.InstanceNorm1d: _INSTANCE_NORM,
    nn.InstanceNorm2d: _INSTANCE_NORM,
    nn.InstanceNorm3d: _INSTANCE_NORM,
    nn.GroupNorm: (_GROUP_NORM,),
    nn.LayerNorm: (_LAYER_NORM,),
    nn.RMSNorm: (_RMS_NORM,),
    nn.Embedding: (_EMBEDDING,),
    nn.PReLU: (_PRELU,),
}


def row_of(module: nn.Module, held: Set[str]) -> tuple[Stored | None, str]:
    """(the row that describes a module which holds tensors of these names, ""), or (None, why there is none)."""
    cls = class_of(module)
    rows, why = _rows(cls)
    if not rows:
        return None, why
    fitting = [row for row in rows if row.required <= held <= set(row.roles)]
    if not fitting:
        return None, f"{named(cls)} with the tensors {', '.join(sorted(held))}, which no rule describes"
    if fitting[0].settings(module) is None:
        return None, f"{named(cls)} with settings that no rule describes"
    return fitting[0], ""


def _rows(cls: type[nn.Module]) -> tuple[tuple[Stored, ...], str]:
    """The rows of a class: the user's own, else those of the class of the table whose forward it has."""
    own = registered(cls)
    if own is not None:
        return (own,), ""
    base = next((base for base in TABLE if issubclass(cls, base)), None)
    if base is None:
        return (), f"{named(cls)}, which no rule describes"
    if cls.forward is not base.forward:
        return (), f"{named(base)} whose forward is its own"
    return TABLE[base], ""


def registered(cls: type[nn.Module]) -> Stored | None:
    """How a class stores a kind of layer, as a user said."""
    from clipcore.mapping.registry import stored_by  # not at once: plugins may import this package as they are loaded

    return stored_by(cls)


def class_of(module: nn.Module) -> type[nn.Module]:
    """A module's class as the user knows it: not the one that torch generates for a parametrized module."""
    return type(module).__mro__[1] if is_parametrized(module) else type(module)


def named(cls: type[nn.Module]) -> str:
    """A class in a sentence: "a Linear", "an LSTM".

    >>> named(nn.LSTM), named(nn.GRU), named(nn.Embedding)
    ('an LSTM', 'a GRU', 'an Embedding')
    """
    spoken = "AEFHILMNORSX" if cls.__name__[:2].isupper() else "AEIOU"
    return f"{'an' if cls.__name__[0].upper() in spoken else 'a'} {cls.__name__}"
