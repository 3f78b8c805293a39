"""LSTM, GRU and RNN: one canonical layer for each layer and direction, and run so while they are watched."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from clipcore.backend import Layer
from clipcore.mapping.kinds import GRU_GATES, LSTM_GATES
from clipcore_torch._composites import OTHERWISE_MADE, Composite, Tell
from clipcore_torch._described import Names, joined

# the rows of a weight are its gates, in this order
_GATES = {"LSTM": LSTM_GATES, "GRU": GRU_GATES, "RNN_TANH": ("",), "RNN_RELU": ("",)}
_KINDS = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn", "RNN_RELU": "rnn"}
_SETTINGS: dict[str, dict[str, Any]] = {
    "LSTM": {"activation": "tanh", "recurrent_activation": "sigmoid"},
    "GRU": {"activation": "tanh", "recurrent_activation": "sigmoid", "reset_after": True},
    "RNN_TANH": {"activation": "tanh"},
    "RNN_RELU": {"activation": "relu"},
}
_ROLES = {
    "weight_ih": ("kernel", "unit in"),
    "weight_hh": ("recurrent_kernel", "unit state"),
    "bias_ih": ("bias", "unit"),
    "bias_hh": ("recurrent_bias", "unit"),
}


class _Direction(NamedTuple):
    """One direction of one layer: its number among the states, the ending of its names, where it begins."""

    number: int
    ending: str
    reverse: bool


def _directions(module: nn.RNNBase) -> list[list[_Direction]]:
    """By layer, in the order of execution."""
    ways = [("", False), ("_reverse", True)][: 2 if module.bidirectional else 1]
    return [
        [_Direction(len(ways) * layer + at, f"l{layer}{ending}", back) for at, (ending, back) in enumerate(ways)]
        for layer in range(module.num_layers)
    ]


def _weights(module: nn.RNNBase, direction: _Direction) -> Iterator[str]:
    """The attributes that hold its tensors, in the order in which torch's functions take them."""
    for name in _ROLES:
        if module.bias or not name.startswith("bias"):
            yield f"{name}_{direction.ending}"


def _unlike(module: nn.RNNBase, held: Mapping[str, Tensor]) -> str:
    """Why a module is no stack of canonical layers; "" where it is one."""
    if module.proj_size:
        return "with projections"
    expected = {name for layer in _directions(module) for direction in layer for name in _weights(module, direction)}
    return "" if expected == held.keys() else OTHERWISE_MADE


def _describe(name: str, module: nn.RNNBase, held: Mapping[str, Tensor], names: Names) -> list[Layer]:
    """One layer for each layer and direction, in the order of execution."""
    gates = _GATES[module.mode]
    found = []
    for direction in (direction for layer in _directions(module) for direction in layer):
        tensors = {}
        for attribute in _weights(module, direction):
            role, layout = _ROLES[attribute.removesuffix(f"_{direction.ending}")]
            for at, gate in enumerate(gates):
                part = f"{role}.{gate}" if gate else role
                rows = (at * module.hidden_size, (at + 1) * module.hidden_size) if gate else None
                tensors[part] = names.describe(held[attribute], part, layout, rows)
        settings = {**_SETTINGS[module.mode], "reverse": direction.reverse}
        found.append(Layer(joined(name, direction.ending), _KINDS[module.mode], tensors, settings))
    return found


def _apart(name: str, module: nn.RNNBase, tell: Tell) -> Callable[..., Any]:
    """The module's forward, layer by layer and direction by direction, in inference."""
    whole = module.forward

    def forward(input: Any, hx: Any = None) -> Any:
        given = [] if hx is None else list(hx) if module.mode == "LSTM" else [hx]
        if isinstance(input, PackedSequence) or {t.dim() for t in (input, *given)} not in ({2}, {3}):
            return whole(input, hx)
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(0 if module.batch_first else 1)
        states = given if batched else [state.unsqueeze(1) for state in given]
        _check(module, x, states)
        steps = x.transpose(0, 1) if module.batch_first else x
        output, ends = _run(name, module, tell, steps, states)
        output = output.transpose(0, 1) if module.batch_first else output
        if not batched:
            output = output.squeeze(0 if module.batch_first else 1)
            ends = [end.squeeze(1) for end in ends]
        return output, tuple(ends) if module.mode == "LSTM" else ends[0]

    return forward


def _check(module: nn.RNNBase, x: Tensor, states: list[Tensor]) -> None:
    """What the module itself refuses."""
    if states:
        module.check_forward_args(x, tuple(states) if module.mode == "LSTM" else states[0], None)  # type: ignore[arg-type]
    else:
        module.check_input(x, None)


def _run(name: str, module: nn.RNNBase, tell: Tell, steps: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """(outputs, states at the end) of a sequence with the time axis first."""
    ends = []
    for layer in _directions(module):
        outputs = []
        for direction in layer:
            given = [state[direction.number] for state in states]
            output, last = _one(joined(name, direction.ending), module, tell, direction, steps, given)
            outputs.append(output)
            ends.append(last)
        steps = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
    return steps, [torch.stack(each) for each in zip(*ends, strict=True)]


def _one(
    name: str, module: nn.RNNBase, tell: Tell, direction: _Direction, steps: Tensor, given: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """One direction of one layer: its outputs in the order of time, and its states at the end."""
    x, *states = tell.before(name, [steps.transpose(0, 1), *given])
    x = x.transpose(0, 1)
    weights = [getattr(module, attribute) for attribute in _weights(module, direction)]
    zeros = [x.new_zeros(x.shape[1], module.hidden_size)] * (2 if module.mode == "LSTM" else 1)
    start = [state.unsqueeze(0) for state in states or zeros]
    output, *ends = _compute(module, x.flip(0) if direction.reverse else x, start, weights)
    seen = output.transpose(0, 1)
    told = tell.after(name, seen)
    if told is not seen:
        # what stands for the output stands for the state that is the last of it
        output = told.transpose(0, 1)
        ends[0] = output[-1:]
    return output.flip(0) if direction.reverse else output, [end.squeeze(0) for end in ends]


def _compute(module: nn.RNNBase, x: Tensor, start: list[Tensor], weights: list[Tensor]) -> Any:
    function = getattr(torch, module.mode.lower())
    hidden = start if module.mode == "LSTM" else start[0]
    with warnings.catch_warnings():
        # cuDNN wants the weights of a whole module side by side, which those of one direction are not
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        # bias, one layer, no dropout, not in training, one direction, time first
        return function(x, hidden, weights, module.bias, 1, 0.0, False, False, False)


RECURRENT = Composite((nn.LSTM, nn.GRU, nn.RNN), _unlike, _describe, _apart)
