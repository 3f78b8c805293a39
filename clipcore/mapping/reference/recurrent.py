"""Recurrent layers, one direction of one layer: (batch, time, in) to (batch, time, unit), in the order of processing.

A layer with reverse=True reads the sequence from its end, so that its first output belongs to the last step. States
begin at zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from clipcore.mapping.reference.activations import activate
from clipcore.mapping.reference.arrays import Array, Settings, Tensors, double, optional

Function = Callable[[Array], Array]


def rnn(x: Array, tensors: Tensors, settings: Settings) -> Array:
    """At each step h' = activation(kernel x + bias + recurrent_kernel h + recurrent_bias).

    Args:
        x: (batch, time, in).
        tensors: kernel (unit, in), recurrent_kernel (unit, state), bias (unit), recurrent_bias (unit).
        settings: activation, reverse.
    Source: Elman 1990, Cognitive Science 14.

    >>> tensors = {"kernel": np.array([[1.0]]), "recurrent_kernel": np.array([[10.0]]), "bias": np.array([0.5])}
    >>> rnn(np.array([[[1.0], [2.0]]]), tensors, {"activation": "relu", "reverse": False})
    array([[[ 1.5],
            [17.5]]])
    """
    act = _function(settings["activation"])
    h = _zeros(x, tensors["recurrent_kernel"])
    outputs = []
    for step in _steps(x, settings):
        h = act(_given(step, tensors, "") + _kept(h, tensors, ""))
        outputs.append(h)
    return np.stack(outputs, axis=1)


def lstm(x: Array, tensors: Tensors, settings: Settings) -> Array:
    """At each step c' = s(forget) * c + s(input) * activation(cell) and h' = s(output) * activation(c'); each gate is
    kernel x + bias + recurrent_kernel h + recurrent_bias with its own tensors, and s the recurrent activation.

    Args:
        x: (batch, time, in).
        tensors: of each gate (input, forget, cell, output) kernel (unit, in), recurrent_kernel (unit, state),
            bias (unit), recurrent_bias (unit).
        settings: activation, recurrent_activation, reverse.
    Source: Hochreiter and Schmidhuber 1997; with the forget gate of Gers et al. 2000.

    >>> gates = ("input", "forget", "cell", "output")
    >>> tensors = {f"kernel.{gate}": np.array([[1.0]]) for gate in gates}
    >>> tensors |= {f"recurrent_kernel.{gate}": np.array([[0.0]]) for gate in gates}
    >>> tensors |= {f"bias.{gate}": np.array([n]) for n, gate in enumerate(gates)}
    >>> lstm(np.array([[[1.0], [1.0]]]), tensors, {"activation": "relu", "recurrent_activation": "relu", "reverse": 0})
    array([[[12.],
            [36.]]])
    """
    act, gate_act = _function(settings["activation"]), _function(settings["recurrent_activation"])
    h = c = _zeros(x, tensors["recurrent_kernel.input"])
    outputs = []
    for step in _steps(x, settings):
        i, f, g, o = (
            _given(step, tensors, gate) + _kept(h, tensors, gate) for gate in (".input", ".forget", ".cell", ".output")
        )
        c = gate_act(f) * c + gate_act(i) * act(g)
        h = gate_act(o) * act(c)
        outputs.append(h)
    return np.stack(outputs, axis=1)


def gru(x: Array, tensors: Tensors, settings: Settings) -> Array:
    """A step's h' = (1 - u) * n + u * h with r = s(reset), u = s(update), gates as in an LSTM, and n of its tensors:

    - with reset_after: activation(kernel x + bias + r * (recurrent_kernel h + recurrent_bias)),
    - else: activation(kernel x + bias + recurrent_kernel (r * h) + recurrent_bias).

    Args:
        x: (batch, time, in).
        tensors: of each gate (reset, update, new) kernel (unit, in), recurrent_kernel (unit, state), bias (unit),
            recurrent_bias (unit).
        settings: activation, recurrent_activation, reset_after, reverse.
    Source: Cho et al. 2014, arXiv:1406.1078 (version 3 for the second form; the first is cuDNN's).

    >>> tensors = {f"kernel.{gate}": np.array([[k]]) for gate, k in {"reset": 0.0, "update": 0.0, "new": 1.0}.items()}
    >>> tensors |= {f"recurrent_kernel.{gate}": np.array([[0.0]]) for gate in ("reset", "update")}
    >>> tensors |= {"recurrent_kernel.new": np.array([[1.0]]), "recurrent_bias.new": np.array([1.0])}
    >>> settings = {"activation": "relu", "recurrent_activation": "sigmoid", "reverse": False}  # both gates are 1/2
    >>> gru(np.array([[[2.0], [4.0]]]), tensors, {**settings, "reset_after": True}).ravel()
    array([1.25  , 3.1875])
    >>> gru(np.array([[[2.0], [4.0]]]), tensors, {**settings, "reset_after": False}).ravel()
    array([1.5  , 3.625])
    """
    act, gate_act = _function(settings["activation"]), _function(settings["recurrent_activation"])
    h = _zeros(x, tensors["recurrent_kernel.reset"])
    outputs = []
    for step in _steps(x, settings):
        r, u = (gate_act(_given(step, tensors, gate) + _kept(h, tensors, gate)) for gate in (".reset", ".update"))
        old = r * _kept(h, tensors, ".new") if settings["reset_after"] else _kept(r * h, tensors, ".new")
        h = (1 - u) * act(_given(step, tensors, ".new") + old) + u * h
        outputs.append(h)
    return np.stack(outputs, axis=1)


def _given(step: Array, tensors: Tensors, gate: str) -> Array:
    """What a gate makes of the input of one step."""
    return np.asarray(step @ double(tensors[f"kernel{gate}"]).T + optional(tensors, f"bias{gate}", 0.0))


def _kept(h: Array, tensors: Tensors, gate: str) -> Array:
    """What a gate makes of the state."""
    kernel = double(tensors[f"recurrent_kernel{gate}"])
    return np.asarray(h @ kernel.T + optional(tensors, f"recurrent_bias{gate}", 0.0))


def _function(name: str | None) -> Function:
    return lambda x: activate(x, name, axis=-1)


def _zeros(x: Array, recurrent_kernel: Array) -> Array:
    return np.zeros((len(x), recurrent_kernel.shape[1]))


def _steps(x: Array, settings: Settings) -> Iterator[Array]:
    """The steps of the sequence in the order of processing, each (batch, in)."""
    times = range(x.shape[1])
    for time in reversed(times) if settings["reverse"] else times:
        yield double(x[:, time])
