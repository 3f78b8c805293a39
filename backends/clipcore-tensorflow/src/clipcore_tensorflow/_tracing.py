"""Running a model in inference mode, its state afterwards what it was."""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import tensorflow as tf

from clipcore.backend import Watcher
from clipcore.errors import ClipcoreError, InvalidInput
from clipcore.structure import leaves, map_leaves
from clipcore_tensorflow._keras import is_keras_model, is_layer, libraries
from clipcore_tensorflow._layers import Listed
from clipcore_tensorflow._models import Running
from clipcore_tensorflow._tensors import is_variable, tf_variable
from clipcore_tensorflow._walk import every_layer
from clipcore_tensorflow._watching import arrays, watched


def run(model: Any, sample: Any, watcher: Watcher | None, running: Running) -> Any:
    """See `clipcore.backend.TracingBackend.run`.

    Keras layers are watched through their `call`, modules through their `__call__`; a module without one is not, nor
    is a layer that is called inside a traced loop.
    """
    args, kwargs = arguments(model, sample)
    failures: list[BaseException] = []
    with ExitStack() as stack:
        stack.enter_context(running.remember(model))
        listed = running.listed(model)
        state = _state(model, listed)
        stack.enter_context(running.put_back(state))
        _seed_anew(state)
        stack.enter_context(_eagerly())
        stack.enter_context(_unbuilt_refused(model, failures))
        if watcher is not None:
            stack.enter_context(watched(model, listed, watcher, failures))
        try:
            return arrays(model(*args, **kwargs))
        except Exception as err:
            if failures:  # Keras re-raises with a text of its own; what a watcher raised is what its author expects
                raise failures[0] from None
            if isinstance(err, ClipcoreError):
                raise
            raise InvalidInput(f"model {_name(model)!r} failed on the sample ({_shapes(args)}): {cause(err)}") from err


def arguments(model: Any, sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with which a model is called on a sample, in inference mode."""
    call = model.call if is_layer(model) else getattr(model, "__call__", None)  # noqa: B004
    if call is None:
        raise InvalidInput(f"module {_name(model)!r} has no __call__, so that it cannot be run")
    parameters = inspect.signature(call).parameters
    kwargs = {name: False for name in ("training", "is_training") if name in parameters}
    inputs = sample if isinstance(sample, tuple | list) else (sample,)
    inputs = _converted(model, inputs)
    return (inputs if _takes_each(model, parameters, len(inputs)) else (list(inputs),)), kwargs


def _takes_each(model: Any, parameters: Any, count: int) -> bool:
    """Whether the inputs are arguments of their own; a functional model takes several as one list."""
    if count == 1:
        return True
    if getattr(model, "inputs", None) and is_keras_model(model):
        return False
    kinds = [p.kind for name, p in parameters.items() if name not in ("training", "is_training", "mask")]
    positional = sum(
        kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds
    )
    return inspect.Parameter.VAR_POSITIONAL in kinds or positional >= count


def _converted(model: Any, inputs: Any) -> tuple[Any, ...]:
    """Arrays made tensors: floating ones in the dtype that the model computes in, others in their own."""
    dtype = tf.as_dtype(_compute_dtype(model))

    def convert(value: Any) -> Any:
        if not isinstance(value, np.ndarray | np.generic):
            return value
        tensor = tf.constant(value)
        return tf.cast(tensor, dtype) if tensor.dtype.is_floating and dtype.is_floating else tensor

    return tuple(map_leaves(convert, value) for value in inputs)


def _compute_dtype(model: Any) -> Any:
    if is_layer(model):
        declared = leaves(getattr(model, "inputs", None) or [])
        floating = [tensor.dtype for _, tensor in declared if tf.as_dtype(tensor.dtype).is_floating]
        return floating[0] if floating else model.compute_dtype
    floating = [variable.dtype for variable in model.variables if variable.dtype.is_floating]
    return floating[0] if floating else tf.float32


@contextmanager
def _eagerly() -> Iterator[None]:
    """Functions under tf.function run as plain Python, so that layers inside them can be watched."""
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


@contextmanager
def _unbuilt_refused(model: Any, failures: list[BaseException]) -> Iterator[None]:
    """A layer that the run reaches before it has weights refuses to be built: the weights would stay in the model.

    One that the run never reaches may stay without.
    """
    # Keras 3 puts each layer's `build` on the instance; a model builds nothing but the layers in it
    waiting = [layer for layer in every_layer(model) if not layer.built and not is_keras_model(layer)]
    plain = [library.layers.Layer.build for library in libraries()]
    builds = [(layer, vars(layer).get("build")) for layer in waiting if type(layer).build not in plain]
    for layer, _ in builds:
        object.__setattr__(layer, "build", functools.partial(_refuse_to_build, _name(model), layer.name, failures))
    try:
        yield
    finally:
        for layer, build in builds:
            if build is None:
                object.__delattr__(layer, "build")
            else:
                object.__setattr__(layer, "build", build)


def _refuse_to_build(model: str, layer: str, failures: list[BaseException], *_: Any, **__: Any) -> None:
    failures.append(
        InvalidInput(
            f"model {model!r}: layer {layer!r} has no weights yet; call the model once on a sample, or build the layer "
            f"(layer.build(input_shape))"
        )
    )
    raise failures[-1]


def _state(model: Any, listed: list[Listed]) -> list[tf.Variable]:
    """Statistics, seeds, counters, metrics and what recurrent layers remember: what a run may change."""
    # a tf.Module does not list the variables of the Keras layers in it, nor a stateful layer its states
    variables = [*model.variables, *(variable for item in listed for variable in item.owner.variables)]
    states = [state for layer in every_layer(model) for _, state in leaves(getattr(layer, "states", None) or [])]
    unique = {id(variable): variable for variable in map(tf_variable, variables)}
    remembered = {id(state): state for state in map(tf_variable, filter(is_variable, states))}
    return [variable for variable in unique.values() if not variable.trainable] + [
        state for key, state in remembered.items() if key not in unique or state.trainable
    ]


_SEEDS = itertools.count(1)


def _seed_anew(state: list[tf.Variable]) -> None:
    """Random numbers of each run's own, so that a model which draws some shows it."""
    seed = next(_SEEDS)
    for variable in state:
        if "seed_generator_state" in variable.name:
            variable.assign(variable + tf.cast(seed, variable.dtype))


def _name(model: Any) -> str:
    return str(getattr(model, "name", type(model).__name__))


def cause(err: Exception) -> str:
    """What an error says, without Keras's frame around it and the terminal's colours."""
    paragraphs = re.sub(r"\x1b\[\d*m", "", str(err)).strip().split("\n\n")
    framed = len(paragraphs) > 1 and paragraphs[0].startswith("Exception encountered when calling")
    return " ".join(paragraphs[1 if framed else 0].split())


def _shapes(args: tuple[Any, ...]) -> str:
    tensors = [leaf for _, leaf in leaves(args) if isinstance(leaf, tf.Tensor)]
    return ", ".join(f"{tensor.dtype.name} {tuple(tensor.shape)}" for tensor in tensors) or "no tensor"
