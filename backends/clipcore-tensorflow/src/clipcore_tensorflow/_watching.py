"""Putting a watcher around the calls of a model's layers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import tensorflow as tf

from clipcore.backend import Watcher
from clipcore.errors import InvalidInput
from clipcore.structure import leaves, rebuild
from clipcore_tensorflow._canonical import View
from clipcore_tensorflow._keras import is_layer, libraries
from clipcore_tensorflow._layers import Listed
from clipcore_tensorflow._tensors import to_array
from clipcore_tensorflow._walk import every_layer

# Kinds that act on the last axes of their data, however many stand before.
_ON_LAST_AXES = frozenset({"linear", "layer_norm", "rms_norm", "embedding", "activation", "dropout"})


@contextmanager
def watched(model: Any, listed: list[Listed], watcher: Watcher, failures: list[BaseException]) -> Iterator[None]:
    """The calls of these layers go through the watcher; what it raises is kept in `failures`."""
    owners: dict[int, list[Listed]] = {}
    for item in listed:
        if item.view is not None:
            owners.setdefault(id(item.owner), []).append(item)
    with ExitStack() as stack:
        for items in owners.values():
            stack.enter_context(_watched_owner(items, watcher, failures))
        for layer in every_layer(model):
            if isinstance(layer, tuple(library.layers.TimeDistributed for library in libraries())):
                kinds = {item.layer.kind for item in owners.get(id(layer.layer), ())}
                stack.enter_context(_replaced_call(layer, _at_once(layer, kinds)))
        yield


class _Watch:
    """Puts a watcher around the calls of one layer."""

    def __init__(self, name: str, view: View, watcher: Watcher, failures: list[BaseException]) -> None:
        self._name, self._view, self._watcher, self._failures = name, view, watcher, failures

    def around(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        masked = _masked(function, len(args))
        shown = [None if masked[index] else arg for index, arg in enumerate(args)]
        named = {key: value for key, value in kwargs.items() if not key.endswith("mask")}
        inputs = _tensors([shown, named])
        if any(tf.is_symbolic_tensor(tensor) for tensor in inputs):
            return function(*args, **kwargs)
        seen = self._view.seen(inputs)
        replaced = self._ask(self._watcher.before, [to_array(tensor) for tensor in seen])
        if replaced is not None:
            new = iter(self._view.back(_like(seen, replaced, self._name), inputs))
            args = tuple(value if masked[index] else _refilled(value, new) for index, value in enumerate(args))
            kwargs = {key: _refilled(value, new) if key in named else value for key, value in kwargs.items()}
        output = function(*args, **kwargs)
        outcome = self._view.shown(output)
        changed = self._ask(self._watcher.after, arrays(outcome))
        if changed is None:
            return output
        values = iter(_like(_tensors(outcome), [leaf for _, leaf in leaves(changed)], self._name))
        return self._view.given(_refilled(outcome, values), output)

    def _ask(self, method: Callable[[str, Any], Any], what: Any) -> Any:
        try:
            return method(self._name, what)
        except BaseException as err:
            self._failures.append(err)
            raise


def _masked(function: Callable[..., Any], count: int) -> list[bool]:
    """Of each positional argument, whether it is a mask."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        names = []
    return [name.endswith("mask") for name in names[:count]] + [False] * (count - len(names))


def _is_dense(value: Any) -> bool:
    return isinstance(value, tf.Tensor)


def _tensors(tree: Any) -> list[Any]:
    return [leaf for _, leaf in leaves(tree) if _is_dense(leaf)]


def _refilled(tree: Any, new: Iterator[Any]) -> Any:
    return rebuild(tree, (next(new) if _is_dense(leaf) else leaf for _, leaf in leaves(tree)))


def arrays(tree: Any) -> Any:
    """Nested tensors as nested arrays, in plain lists, tuples and dicts: a class of a library's own may refuse them."""
    if isinstance(tree, dict):
        return {key: arrays(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        values = [arrays(value) for value in tree]
        return rebuild(tree, (leaf for _, leaf in leaves(values))) if type(tree) is not list else values
    return to_array(tree) if _is_dense(tree) else tree


def _like(tensors: list[Any], given: list[Any], place: str) -> list[Any]:
    """What a watcher gave in place of `tensors`, in their dtypes."""
    if len(given) != len(tensors):
        raise InvalidInput(f"layer {place!r}: the watcher gave {len(given)} arrays in place of {len(tensors)}")
    return [tf.cast(tf.constant(np.asarray(array)), t.dtype) for t, array in zip(tensors, given, strict=True)]


def _watched_owner(items: list[Listed], watcher: Watcher, failures: list[BaseException]) -> Any:
    """The calls of one object watched: as one layer, or as the steps that it consists of."""
    owner = items[0].owner
    watches = [_Watch(item.layer.name, item.view, watcher, failures) for item in items if item.view is not None]
    if not is_layer(owner):
        return _watched_module(owner, watches[0])
    if items[0].step is None:
        original = owner.call
        return _replaced_call(owner, lambda *args, **kwargs: watches[0].around(original, args, kwargs))

    def in_steps(x: Any, *_: Any, **__: Any) -> Any:
        for item, watch in zip(items, watches, strict=True):
            x = watch.around(functools.partial(item.step, owner), (x,), {})
        return x

    return _replaced_call(owner, in_steps)


def _at_once(layer: Any, kinds: set[str]) -> Callable[..., Any]:
    """What a TimeDistributed computes, in one call of the layer inside it: no other framework runs one step by step."""
    original, inner = layer.call, layer.layer

    def call(inputs: Any, training: Any = None, mask: Any = None) -> Any:
        if mask is not None or not _is_dense(inputs) or tf.is_symbolic_tensor(inputs):
            return original(inputs, training=training, mask=mask)
        takes_training = "training" in inspect.signature(inner.call).parameters
        kwargs = {"training": training} if takes_training else {}
        if kinds and kinds <= _ON_LAST_AXES:
            return inner.call(inputs, **kwargs)
        batch, steps, *shape = inputs.shape
        output = inner.call(tf.reshape(inputs, (batch * steps, *shape)), **kwargs)
        parts = [tf.reshape(tensor, (batch, steps, *tensor.shape[1:])) for tensor in _tensors(output)]
        return _refilled(output, iter(parts))

    return call


@contextmanager
def _replaced_call(layer: Any, function: Callable[..., Any]) -> Iterator[None]:
    """`layer.call` replaced on the instance; past Keras's tracking of attributes, which may be locked."""
    original, own = layer.call, vars(layer).get("call")
    object.__setattr__(layer, "call", functools.wraps(original)(function))
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
