"""Running a model in inference mode, and watching its layers one by one."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from clipcore.backend import Watcher
from clipcore.errors import ClipcoreError, InvalidInput
from clipcore_tensorflow._layers import Listed, describe, every_layer
from clipcore_tensorflow._models import Running
from clipcore_tensorflow._tensors import tf_variable, to_array


def run(model: Any, sample: Any, watcher: Watcher | None, running: Running) -> Any:
    """See `clipcore.backend.TracingBackend.run`.

    Keras layers are watched through their `call`, modules through their `__call__`; a module without one is not, nor
    is a layer that is called inside a traced loop.
    """
    listed = describe(model)
    args, kwargs = arguments(model, sample)
    failures: list[BaseException] = []
    with ExitStack() as stack:
        stack.enter_context(running.remember(model))
        stack.enter_context(running.put_back(_state(model, listed)))
        stack.enter_context(_eagerly())
        stack.enter_context(_unbuilt_refused(model, failures))
        if watcher is not None:
            for item in listed:
                stack.enter_context(_watched(item, _Watch(item.layer.name, watcher, failures)))
        try:
            return _arrays(model(*args, **kwargs))
        except Exception as err:
            if failures:  # Keras re-raises with a text of its own; what a watcher raised is what its author expects
                raise failures[0] from None
            if isinstance(err, ClipcoreError):
                raise
            raise InvalidInput(f"model {_name(model)!r} failed on the sample ({_shapes(args)}): {_cause(err)}") from err


def arguments(model: Any, sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with which a model is called on a sample, in inference mode."""
    call = model.call if isinstance(model, keras.layers.Layer) else getattr(model, "__call__", None)  # noqa: B004
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
    if getattr(model, "inputs", None) and isinstance(model, keras.Model):
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

    return tuple(keras.tree.map_structure(convert, value) for value in inputs)


def _compute_dtype(model: Any) -> Any:
    if isinstance(model, keras.layers.Layer):
        declared = keras.tree.flatten(getattr(model, "inputs", None) or [])
        floating = [tensor.dtype for tensor in declared if tf.as_dtype(tensor.dtype).is_floating]
        return floating[0] if floating else model.compute_dtype
    floating = [variable.dtype for variable in model.variables if variable.dtype.is_floating]
    return floating[0] if floating else tf.float32


class _Watch:
    """Puts a watcher around the calls of one layer."""

    def __init__(self, name: str, watcher: Watcher, failures: list[BaseException]) -> None:
        self._name, self._watcher, self._failures = name, watcher, failures

    def around(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        places: list[tuple[Any, Any]] = [(args, index) for index in range(len(args))]
        places += [(kwargs, key) for key in kwargs if not key.endswith("mask")]
        inputs = [leaf for held, key in places for leaf in _tensors(held[key])]
        if any(tf.is_symbolic_tensor(tensor) for tensor in inputs):
            return function(*args, **kwargs)
        replaced = self._ask(self._watcher.before, [to_array(tensor) for tensor in inputs])
        if replaced is not None:
            new = iter(_like(inputs, replaced, self._name))
            args = tuple(_replaced(value, new) for value in args)
            kwargs = {key: value if key.endswith("mask") else _replaced(value, new) for key, value in kwargs.items()}
        output = function(*args, **kwargs)
        changed = self._ask(self._watcher.after, _arrays(output))
        if changed is None:
            return output
        return _replaced(output, iter(_like(_tensors(output), _leaves(changed), self._name)))

    def _ask(self, method: Callable[[str, Any], Any], what: Any) -> Any:
        try:
            return method(self._name, what)
        except BaseException as err:
            self._failures.append(err)
            raise


def _is_dense(value: Any) -> bool:
    return isinstance(value, tf.Tensor)


def _tensors(tree: Any) -> list[Any]:
    return [leaf for leaf in keras.tree.flatten(tree) if _is_dense(leaf)]


def _leaves(tree: Any) -> list[Any]:
    return [leaf for leaf in keras.tree.flatten(tree) if leaf is not None]


def _replaced(tree: Any, new: Iterator[Any]) -> Any:
    return keras.tree.map_structure(lambda leaf: next(new) if _is_dense(leaf) else leaf, tree)


def _arrays(tree: Any) -> Any:
    """Nested tensors as nested arrays."""
    return keras.tree.map_structure(lambda leaf: to_array(leaf) if _is_dense(leaf) else leaf, tree)


def _like(tensors: list[Any], arrays: list[Any], place: str) -> list[Any]:
    """What a watcher gave in place of `tensors`, in their dtypes."""
    if len(arrays) != len(tensors):
        raise InvalidInput(f"layer {place!r}: the watcher gave {len(arrays)} arrays in place of {len(tensors)}")
    return [tf.cast(tf.constant(array), tensor.dtype) for tensor, array in zip(tensors, arrays, strict=True)]


def _watched(item: Listed, watch: _Watch) -> Any:
    return (
        _watched_layer(item.owner, watch)
        if isinstance(item.owner, keras.layers.Layer)
        else _watched_module(item.owner, watch)
    )


@contextmanager
def _watched_layer(layer: Any, watch: _Watch) -> Iterator[None]:
    """`layer.call` replaced on the instance; past Keras's tracking of attributes, which may be locked."""
    original, own = layer.call, vars(layer).get("call")

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return watch.around(original, args, kwargs)

    object.__setattr__(layer, "call", call)
    try:
        yield
    finally:
        if own is None:
            object.__delattr__(layer, "call")
        else:
            object.__setattr__(layer, "call", own)


@contextmanager
def _watched_module(module: Any, watch: _Watch) -> Iterator[None]:
    """The module's class swapped for a subclass: Python looks `__call__` up on the class, never on the instance."""
    cls: Any = type(module)
    if not callable(module):
        yield
        return

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return watch.around(functools.partial(cls.__call__, self), args, kwargs)

    object.__setattr__(module, "__class__", type(cls)(cls.__name__, (cls,), {"__call__": call}))
    try:
        yield
    finally:
        object.__setattr__(module, "__class__", cls)


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
    # Keras puts each layer's `build` on the instance; a model builds nothing but the layers in it
    waiting = [layer for layer in every_layer(model) if not layer.built and not isinstance(layer, keras.Model)]
    own = [(layer, layer.build) for layer in waiting if type(layer).build is not keras.layers.Layer.build]
    for layer, _ in own:
        object.__setattr__(layer, "build", functools.partial(_refuse_to_build, _name(model), layer.name, failures))
    try:
        yield
    finally:
        for layer, build in own:
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
    """Statistics, seeds, counters and metrics: what a run may change."""
    # a tf.Module does not list the variables of the Keras layers in it
    variables = [*model.variables, *(variable for item in listed for variable in item.owner.variables)]
    unique = {id(variable): variable for variable in map(tf_variable, variables)}
    return [variable for variable in unique.values() if not variable.trainable]


def _name(model: Any) -> str:
    return str(getattr(model, "name", type(model).__name__))


def _cause(err: Exception) -> str:
    """What an error says, without Keras's frame around it and the terminal's colours."""
    paragraphs = re.sub(r"\x1b\[\d*m", "", str(err)).strip().split("\n\n")
    framed = len(paragraphs) > 1 and paragraphs[0].startswith("Exception encountered when calling")
    return " ".join(paragraphs[1 if framed else 0].split())


def _shapes(args: tuple[Any, ...]) -> str:
    return ", ".join(f"{tensor.dtype.name} {tuple(tensor.shape)}" for tensor in _tensors(args)) or "no tensor"
