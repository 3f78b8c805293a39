"""Walking a model: every layer and module in it once, in the model's order, with the variables of its own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from clipcore_tensorflow._keras import is_keras_model, is_layer, libraries
from clipcore_tensorflow._tensors import tf_variable

Own = list[tuple[str, Any]]  # variables by name

_AUTOMATIC = re.compile(r"variable(_\d+)?", re.IGNORECASE)  # numbered anew in every process


@dataclass(frozen=True)
class Node:
    """A layer or module of a model.

    Attributes:
        path: the names on the way to it, "" for the model.
        owner: itself.
        own: its variables by name, without those of what is inside it.
        holds: whether something inside it has variables.
        inner: whether it is a working part of a layer that is described by its other parts.
    """

    path: str
    owner: Any
    own: Own
    holds: bool
    inner: bool = False


def walk(model: Any) -> Iterator[Node]:
    """Every layer and module of a model, itself included, each once."""
    seen: set[int] = set()
    yield from _walk_layer(model, "", seen) if is_layer(model) else _walk_module(model, "", seen)


def _walk_layer(layer: Any, path: str, seen: set[int], *, inner: bool = False) -> Iterator[Node]:
    if id(layer) in seen:
        return
    seen.add(id(layer))
    children = [] if is_whole(layer) else sublayers(layer)
    nested = {id(variable) for child in children for variable in child.weights}
    own = [variable for variable in layer.weights if id(variable) not in nested]
    yield Node(path, layer, _named(layer, own), bool(nested), inner)
    works = isinstance(layer, attention_types())
    for child in children:
        yield from _walk_layer(child, f"{path}/{child.name}" if path else child.name, seen, inner=works)


def attention_types() -> tuple[type, ...]:
    """Layers that are their projections: the softmax between these is no layer of the model's."""
    names = ("MultiHeadAttention", "GroupQueryAttention")
    return tuple(getattr(lib.layers, name) for lib in libraries() for name in names if hasattr(lib.layers, name))


def is_whole(layer: Any) -> bool:
    """Whether what is inside a layer counts as its own: a fused kernel may run in place of a recurrent layer's cell."""
    return isinstance(layer, tuple(library.layers.RNN for library in libraries()))


def sublayers(layer: Any) -> list[Any]:
    """The layers directly inside a Keras layer or model, as it lists them."""
    if is_keras_model(layer):
        return list(layer.layers)
    return list(layer._flatten_layers(include_self=False, recursive=False))  # public in models alone


def _named(layer: Any, own: list[Any]) -> Own:
    """Each variable by the shortest end of its path that tells it from the layer's others; one that Keras named for
    want of a name, by its attribute.
    """
    paths = [_path(variable) for variable in own]
    names = [path[-1] for path in paths]
    attributes = {id(value): name for name, value in vars(layer).items() if not name.startswith("_")}
    for index, (variable, path) in enumerate(zip(own, paths, strict=True)):
        if _AUTOMATIC.fullmatch(path[-1]) and id(variable) in attributes:
            names[index] = attributes[id(variable)]
        elif not is_whole(layer):  # of whose cells Keras numbers the names
            names[index] = _distinct(path, paths)
    seen: Counter[str] = Counter()
    return [(numbered(name, seen), variable) for name, variable in zip(names, own, strict=True)]


def _distinct(path: list[str], paths: list[list[str]]) -> str:
    for length in range(1, len(path) + 1):
        if sum(other[-length:] == path[-length:] for other in paths) == 1:
            return "/".join(path[-length:])
    return path[-1]


def _path(variable: Any) -> list[str]:
    """The names on the way to a variable, its own last; Keras 2 has TensorFlow's ":0" behind it."""
    return str(getattr(variable, "path", variable.name)).partition(":")[0].split("/")


def numbered(name: str, seen: Counter[str]) -> str:
    """The name, with "#2" and so on where it was seen before."""
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}#{seen[name]}"


def _walk_module(module: Any, path: str, seen: set[int]) -> Iterator[Node]:
    if id(module) in seen:
        return
    seen.add(id(module))
    held = inside(module)
    own = {id(value): (name, value) for name, value in reversed(held) if isinstance(value, tf.Variable)}
    modules = [(name, value) for name, value in held if not isinstance(value, tf.Variable)]
    holds = any(value.weights if is_layer(value) else value.variables for _, value in modules)
    yield Node(path, module, list(reversed(own.values())), holds)
    for name, value in modules:
        place = f"{path}/{name}" if path else name
        yield from _walk_layer(value, place, seen) if is_layer(value) else _walk_module(value, place, seen)


def inside(module: Any) -> Own:
    """Names and values of the variables, modules and layers in a module's attributes."""
    return [item for name, value in vars(module).items() if _is_state(module, name) for item in _held(value, name)]


def _is_state(module: Any, name: str) -> bool:
    """Whether an attribute is the module's, and not tf.Module's record of it."""
    return name not in getattr(module, "_TF_MODULE_IGNORED_PROPERTIES", ()) and not name.startswith("_self_")


def _held(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Variables and modules in an attribute, also in lists, tuples and dicts."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _held(item, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _held(item, f"{name}/{index}")
    elif isinstance(value, tf.Variable | tf.Module) or is_layer(value):
        yield name, value


def every_layer(model: Any) -> Iterator[Any]:
    """The Keras layers of a model or module, itself included, each once; the cells of recurrent ones too."""
    waiting, seen = [model], set()
    while waiting:
        obj = waiting.pop(0)
        if id(obj) in seen:
            continue
        seen.add(id(obj))
        if is_layer(obj):
            yield obj
            waiting[:0] = sublayers(obj)
        else:
            waiting[:0] = [value for _, value in inside(obj) if not isinstance(value, tf.Variable)]


def attribute_names(owner: Any, own: Own, wanted: frozenset[str]) -> Own:
    """The variables, those that are an attribute with a wanted name under that."""
    attributes = {id(tf_variable(getattr(owner, name, None))): name for name in wanted}
    return [
        (name if name in wanted else attributes.get(id(tf_variable(variable)), name), variable)
        for name, variable in own
    ]
