"""Layers without tensors: activations, pooling, dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from clipcore.backend import Layer
from clipcore_torch._layers import class_of

Settings = dict[str, Any]

# what a module's attributes say; None where the kind has no word for one of them
_ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Settings | None]] = {
    nn.ReLU: lambda m: {"function": "relu"},
    nn.ReLU6: lambda m: {"function": "relu6"},
    nn.LeakyReLU: lambda m: {"function": "leaky_relu", "slope": m.negative_slope},
    nn.ELU: lambda m: {"function": "elu", "alpha": m.alpha},
    nn.SELU: lambda m: {"function": "selu"},
    nn.CELU: lambda m: {"function": "celu", "alpha": m.alpha},
    nn.GELU: lambda m: {"function": "gelu_tanh" if m.approximate == "tanh" else "gelu"},
    nn.SiLU: lambda m: {"function": "silu"},
    nn.Mish: lambda m: {"function": "mish"},
    nn.Sigmoid: lambda m: {"function": "sigmoid"},
    nn.Hardsigmoid: lambda m: {"function": "hard_sigmoid"},
    nn.Hardswish: lambda m: {"function": "hard_silu"},
    nn.Tanh: lambda m: {"function": "tanh"},
    nn.Hardtanh: lambda m: {"function": "hard_tanh", "low": m.min_val, "high": m.max_val},
    # beyond its threshold, which is 20, it is the identity, to rounding
    nn.Softplus: lambda m: {"function": "softplus"} if m.beta == 1 and m.threshold >= 20 else None,
    nn.Softsign: lambda m: {"function": "softsign"},
    nn.Softmax: lambda m: None if m.dim is None else {"function": "softmax", "axis": m.dim},
    nn.LogSoftmax: lambda m: None if m.dim is None else {"function": "log_softmax", "axis": m.dim},
    nn.Threshold: lambda m: {"function": "threshold", "threshold": m.threshold, "low": m.value},
}


def _per_axis(value: Any, rank: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * rank


def _pool(module: Any, rank: int) -> Settings:
    return {
        "window": _per_axis(module.kernel_size, rank),
        "stride": _per_axis(module.stride, rank),
        "padding": tuple((size, size) for size in _per_axis(module.padding, rank)),
        "ceil": module.ceil_mode,
        "channels": "first",
    }


def _avg_pool(module: Any, rank: int) -> Settings | None:
    if getattr(module, "divisor_override", None) is not None:
        return None
    return {**_pool(module, rank), "count_include_pad": module.count_include_pad}


def _max_pool(module: Any, rank: int) -> Settings | None:
    if module.return_indices:
        return None
    return {**_pool(module, rank), "dilation": _per_axis(module.dilation, rank)}


AVG_POOLS: dict[int, type[nn.Module]] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
MAX_POOLS: dict[int, type[nn.Module]] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}

_TABLE: dict[type[nn.Module], tuple[str, Callable[[Any], Settings | None]]] = {
    **{cls: ("activation", settings) for cls, settings in _ACTIVATIONS.items()},
    **{cls: ("avg_pool", lambda m, rank=rank: _avg_pool(m, rank)) for rank, cls in AVG_POOLS.items()},
    **{cls: ("max_pool", lambda m, rank=rank: _max_pool(m, rank)) for rank, cls in MAX_POOLS.items()},
    nn.Dropout: ("dropout", lambda m: {"rate": m.p}),
}


def operation(name: str, module: nn.Module) -> Layer | None:
    """The operation that a module without tensors is; None where no rule describes it."""
    # a class before its base: ReLU6 is a Hardtanh
    base = next((cls for cls in class_of(module).__mro__ if cls in _TABLE), None)
    if base is None or type(module).forward is not base.forward:
        return None
    kind, settings = _TABLE[base]
    found = settings(module)
    return None if found is None else Layer(name, kind, {}, found)
