"""The layers of a model: what each computes, and the variables that its tensors are, or are parts of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import tensorflow as tf

from clipcore.backend import Layer, Tensor
from clipcore.errors import InvalidInput
from clipcore_tensorflow._canonical import AsItIs, Block, Canonical, NotDescribedError, View
from clipcore_tensorflow._functions import operation_of
from clipcore_tensorflow._keras import check_keras, is_keras_3, is_layer, libraries
from clipcore_tensorflow._rules import canonical, is_known, registered_roles
from clipcore_tensorflow._tensors import dtype_name, tf_variable
from clipcore_tensorflow._walk import Node, Own, attribute_names, every_layer, numbered, walk


@dataclass(frozen=True)
class Listed:
    """A layer with the object that it describes, and its variables by role.

    Attributes:
        view: how a watcher sees the object's calls; None where these are not the layer's.
        step: see `clipcore_tensorflow._canonical.Canonical`.
    """

    layer: Layer
    owner: Any
    variables: Mapping[str, tf.Variable]
    view: View | None = field(default_factory=AsItIs)
    step: Any = None


def describe(model: Any) -> list[Listed]:
    """Every canonical layer of a model that owns variables, once, in the order in which the model lists them.

    A variable that two layers own (tied weights) is listed in both, under one name.
    Raises:
        InvalidInput: the model has no variables yet.
    """
    return [listed for listed in describe_all(model) if listed.variables]


def operations(model: Any) -> list[Listed]:
    """The layers of a model that are one function without tensors."""
    return [listed for listed in describe_all(model) if not listed.variables]


def describe_all(model: Any) -> list[Listed]:
    """Both of them, in the model's order."""
    _check_built(model)
    nodes = list(walk(model))
    guests = _guests(nodes)
    moved = {id(variable) for guest in guests.values() for _, variable in guest}
    paths: Counter[str] = Counter()
    names = _Names()
    found: list[Listed] = []
    for node in nodes:
        rest = [(name, variable) for name, variable in node.own if id(variable) not in moved]
        if rest:
            listed = _listed(replace(node, own=rest), str(getattr(model, "name", type(model).__name__)), paths, names)
            found += [_joined(listed[0], guests.get(id(node.owner), []), names), *listed[1:]]
        elif not node.inner:
            found += _operation(node, paths)
    return found


def _operation(node: Node, paths: Counter[str]) -> list[Listed]:
    """The function that a node without variables is, if it is one."""
    found = operation_of(node.owner)
    if found is None:
        return []
    kind, settings = found
    return [Listed(Layer(numbered(node.path or node.owner.name, paths), kind, {}, settings), node.owner, {})]


def _listed(node: Node, model_name: str, paths: Counter[str], names: _Names) -> list[Listed]:
    """What a node with variables of its own is described as."""
    own = attribute_names(node.owner, node.own, registered_roles(node.owner))
    shapes = {name: tuple(variable.shape) for name, variable in own}
    try:
        parts, why = canonical(node.owner, shapes), ""
    except NotDescribedError as reason:
        if node.holds:  # its calls are those of the layers inside it
            return [_bare(node, name, variable, paths, names) for name, variable in own]
        parts, why = [Canonical("raw", {name: (Block(name, "..."),) for name in shapes})], str(reason)
    path = numbered(node.path or model_name, paths)
    return [_listed_part(part, node.owner, own, path, names, why) for part in parts]


def _listed_part(part: Canonical, owner: Any, own: Own, path: str, names: _Names, why: str) -> Listed:
    tensors, variables = {}, {}
    for name, variable in own:
        for block in part.blocks.get(name, ()):
            plain = tf_variable(variable)
            tensors[block.role] = _tensor(names.of(plain, f"{path}/{name}"), block, plain)
            variables[block.role] = plain
    name = f"{path}/{part.part}" if part.part else path
    return Listed(Layer(name, part.kind, tensors, part.settings, why), owner, variables, part.view, part.step)


def _bare(node: Node, name: str, variable: Any, paths: Counter[str], names: _Names) -> Listed:
    """One variable of an object that has others in layers inside it."""
    place = numbered(f"{node.path}/{name}" if node.path else name, paths)
    plain = tf_variable(variable)
    tensor = _tensor(names.of(plain, place), Block(name, "..."), plain)
    why = f"a tensor of a {type(node.owner).__name__}'s own"
    return Listed(Layer(place, "raw", {name: tensor}, {}, why, bare=True), node.owner, {name: plain}, None)


def _tensor(name: str, block: Block, variable: tf.Variable) -> Tensor:
    whole = tuple(variable.shape)
    shape = tuple(stop - start for start, stop in block.within) if block.within else whole
    # trainable by its role: freezing a layer marks the Keras variable alone
    trainable, dtype = bool(variable.trainable), dtype_name(variable)
    return Tensor(name, block.role, block.layout, shape, dtype, trainable, block.within, whole if block.within else ())


def _guests(nodes: list[Node]) -> dict[int, Own]:
    """By the layer that takes them in, variables of its wrapper: of spectral norm, where the next step of its power
    iteration begins. In inference the inner layer's kernel is used as it stands, so that no other layer needs them.
    """
    wrappers = tuple(getattr(library.layers, "SpectralNormalization", ()) for library in libraries())
    hosts = {id(node.owner) for node in nodes if node.own}
    return {
        id(node.owner.layer): [(f"{node.path}/{name}", variable) for name, variable in node.own]
        for node in nodes
        if isinstance(node.owner, wrappers) and id(node.owner.layer) in hosts
    }


def _joined(listed: Listed, guests: Own, names: _Names) -> Listed:
    """A layer with tensors that its wrapper keeps for it."""
    tensors, variables = dict(listed.layer.tensors), dict(listed.variables)
    for place, variable in guests:
        plain, name = tf_variable(variable), place.rpartition("/")[2]
        role = _GUESTS.get(name, name)
        tensors[role] = _tensor(names.of(plain, place), Block(role, "..."), plain)
        variables[role] = plain
    # spectral norm takes the kernel's last axis for the rows of its matrix
    rows = {"spectral_axis": len(tensors["kernel"].shape) - 1} if guests and "kernel" in tensors else {}
    layer = replace(listed.layer, tensors=tensors, settings={**listed.layer.settings, **rows})
    return replace(listed, layer=layer, variables=variables) if guests else listed


_GUESTS = {"vector_u": "kernel.u"}


class _Names:
    """Names of variables: the layer's and the variable's own; one name for one variable.

    Keras's paths begin with the name of a Sequential model, which is "sequential_7" as often as not.
    """

    def __init__(self) -> None:
        self._given: dict[int, str] = {}
        self._seen: Counter[str] = Counter()

    def of(self, variable: tf.Variable, place: str) -> str:
        if id(variable) not in self._given:
            self._given[id(variable)] = numbered(place, self._seen)
        return self._given[id(variable)]


def _check_built(model: Any) -> None:
    if not is_layer(model):
        return
    if is_keras_3(model):
        check_keras()
    known: list[Any] = [layer for layer in every_layer(model) if is_known(layer)]
    if not model.built or (known and not any(layer.built for layer in known)):
        raise InvalidInput(
            f"model {model.name!r} has no weights yet: build it with model.build(input_shape), or call it once"
        )
