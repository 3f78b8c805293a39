"""Recurrent layers: gates as blocks of the stored tensors, and data as a watcher sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from clipcore_tensorflow._canonical import Block, Canonical, NotDescribedError, Shapes
from clipcore_tensorflow._functions import activation_name
from clipcore_tensorflow._keras import library_of

# Keras's name of the cell: the kind, and its gates in the order in which Keras stores them along the last axis.
CELLS: dict[str, tuple[str, tuple[str, ...]]] = {
    "LSTMCell": ("lstm", ("input", "forget", "cell", "output")),
    "GRUCell": ("gru", ("update", "reset", "new")),
    "SimpleRNNCell": ("rnn", ()),
}
_LAYOUTS = {"kernel": "in unit", "recurrent_kernel": "state unit", "bias": "unit"}


def recurrent(layer: Any, shapes: Shapes) -> list[Canonical]:
    """One direction of one recurrent layer: an LSTM, GRU or SimpleRNN, or an RNN around one such cell."""
    kind, gates = _cell_kind(layer)
    unknown = set(shapes) - set(_LAYOUTS)
    if unknown:
        raise NotDescribedError(f"a {type(layer).__name__} with {', '.join(sorted(unknown))}")
    blocks = {name: tuple(_blocks(name, shape, gates)) for name, shape in shapes.items()}
    cell = layer.cell
    settings: dict[str, Any] = {"activation": activation_name(cell.activation), "reverse": bool(layer.go_backwards)}
    if gates:
        settings["recurrent_activation"] = activation_name(cell.recurrent_activation)
    if kind == "gru":
        settings["reset_after"] = bool(cell.reset_after)
    view = Sequential(bool(getattr(layer, "time_major", False)), bool(layer.return_state), bool(layer.return_sequences))
    return [Canonical(kind, blocks, settings, view=view)]


def _cell_kind(layer: Any) -> tuple[str, tuple[str, ...]]:
    layers: Any = library_of(layer).layers  # type: ignore[union-attr]
    name = type(layer.cell).__name__
    for word, row in CELLS.items():
        known = getattr(layers, word)
        if isinstance(layer.cell, known):
            if type(layer.cell).call is not known.call:
                raise NotDescribedError(f"a recurrent layer around a {name}, whose call is its own")
            return row
    if isinstance(layer.cell, layers.StackedRNNCells):
        raise NotDescribedError("several cells stacked in one RNN; an RNN around each would be described")
    raise NotDescribedError(f"a recurrent layer around a {name}, which no rule describes")


def _blocks(name: str, shape: tuple[int, ...], gates: Sequence[str]) -> list[Block]:
    """What a variable holds: the gates along its last axis; along the first of a GRU's bias, the two biases."""
    if not gates:
        return [Block(name, _LAYOUTS[name])]
    *before, last = shape
    size = last // len(gates)
    if name == "bias" and len(shape) == 2:
        rows = [("bias", "1 unit", ((0, 1),)), ("recurrent_bias", "1 unit", ((1, 2),))]
    else:
        rows = [(name, _LAYOUTS[name], tuple((0, length) for length in before))]
    return [
        Block(f"{role}.{gate}", layout, (*first, (index * size, (index + 1) * size)))
        for role, layout, first in rows
        for index, gate in enumerate(gates)
    ]


@dataclass(frozen=True)
class Sequential:
    """The view of a recurrent layer: data batch-first, the output alone, without the states beside it."""

    time_major: bool
    gives_states: bool
    gives_sequence: bool

    def seen(self, inputs: list[Any]) -> list[Any]:
        return [self._swapped(inputs[0]), *inputs[1:]]

    def back(self, seen: list[Any], inputs: list[Any]) -> list[Any]:
        return self.seen(seen)

    def shown(self, output: Any) -> Any:
        first = output[0] if self.gives_states else output
        return self._swapped(first) if self.gives_sequence else first

    def given(self, shown: Any, output: Any) -> Any:
        first = self._swapped(shown) if self.gives_sequence else shown
        return type(output)([first, *output[1:]]) if self.gives_states else first

    def _swapped(self, tensor: Any) -> Any:
        return tf.transpose(tensor, [1, 0, *range(2, tensor.shape.rank)]) if self.time_major else tensor
