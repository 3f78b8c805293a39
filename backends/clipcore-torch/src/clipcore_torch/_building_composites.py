"""Recurrent layers and attention built from their canonical descriptions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from clipcore.errors import MappingError
from clipcore.mapping.kinds import GRU_GATES, LSTM_GATES

Settings = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
Builder = Callable[[Settings, Shapes], nn.Module]


class _Sequence(nn.Module):
    """A recurrent module that gives the sequence alone; of a bidirectional one, the second direction's as processed."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        sequence: Tensor = self.layer(x)[0]
        return sequence[..., self.layer.hidden_size :].flip(1) if self.layer.bidirectional else sequence


def _recurrent(kind: str, build: Callable[..., nn.RNNBase], gates: tuple[str, ...]) -> Builder:
    def builder(settings: Settings, shapes: Shapes) -> nn.Module:
        biases = set(_roles(gates, "bias", "recurrent_bias"))
        has = biases & shapes.keys()
        if has and has != biases:
            raise MappingError(
                f"{kind}: torch's layer has bias and recurrent_bias of every gate, or none; got {sorted(has)}: set the "
                f"missing ones to zero"
            )
        _refuse_other(kind, settings)
        units, ins = shapes[_roles(gates, "kernel")[0]]
        more = {"nonlinearity": settings["activation"]} if kind == "rnn" else {}
        reverse = bool(settings.get("reverse", False))
        return _Sequence(build(ins, units, bias=bool(has), batch_first=True, bidirectional=reverse, **more))

    return builder


def _roles(gates: tuple[str, ...], *roles: str) -> list[str]:
    return [f"{role}.{gate}" for role in roles for gate in gates] if gates else list(roles)


# what torch's layers are, where they cannot be set
_RECURRENT: dict[str, dict[str, tuple[Any, ...]]] = {
    "lstm": {"activation": ("tanh",), "recurrent_activation": ("sigmoid",)},
    "gru": {"activation": ("tanh",), "recurrent_activation": ("sigmoid",), "reset_after": (True,)},
    "rnn": {"activation": ("tanh", "relu")},
}


def _refuse_other(kind: str, settings: Settings) -> None:
    for setting, possible in _RECURRENT[kind].items():
        if settings[setting] not in possible:
            raise MappingError(
                f"{kind}: {setting} is {settings[setting]!r}; torch's layer has {' or '.join(map(repr, possible))}"
            )


class _Attention(nn.Module):
    """Attention that gives its output alone."""

    def __init__(self, layer: nn.MultiheadAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output: Tensor = self.layer(query, key, value, need_weights=False)[0]
        return output


def _attention(settings: Settings, shapes: Shapes) -> nn.Module:
    parts = ("query", "key", "value", "output")
    (dim, _), (_, keys), (_, values), _ = sizes = [shapes[f"{part}.kernel"] for part in parts]
    if sizes != [(dim, dim), (dim, keys), (dim, values), (dim, dim)]:
        raise MappingError(
            f"attention: kernels of shapes {sizes}; torch's layer has as many features in all heads together as in the "
            f"query and in the output: {dim} in each"
        )
    biased = [part for part in parts if f"{part}.bias" in shapes]
    if len(biased) not in (0, len(parts)):
        raise MappingError(
            f"attention: biases of {biased} alone; torch's layer has all four or none: set the missing ones to zero"
        )
    heads = settings["heads"]
    if dim % heads:
        raise MappingError(f"attention: {dim} features in {heads} heads; torch's layer divides them into equal heads")
    layer = nn.MultiheadAttention(dim, heads, bias=bool(biased), kdim=keys, vdim=values, batch_first=True)
    return _Attention(layer)


BUILDERS: dict[str, Builder] = {
    "lstm": _recurrent("lstm", nn.LSTM, LSTM_GATES),
    "gru": _recurrent("gru", nn.GRU, GRU_GATES),
    "rnn": _recurrent("rnn", nn.RNN, ()),
    "attention": _attention,
}
