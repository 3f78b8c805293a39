"""One call of a verb of clipping: its tensors and what belongs to them, and all that a caller can get wrong."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from clipcore.backend import Axes, Backend, Memory
from clipcore.clipping import fast
from clipcore.clipping.given import Given, Spec, shape_of
from clipcore.clipping.kernels import MULTIPLY_DTYPE
from clipcore.clipping.policies import Policy, check_policy
from clipcore.errors import BackendError, InvalidInput
from clipcore.plugins import backend_of, get_backend
from clipcore.structure import in_order_of, keys, places


@dataclass(frozen=True)
class Call:
    """The tensors of one call; flat lists, one entry per tensor.

    Attributes:
        paths: where each stands in the caller's structure.
        owner: their one backend.
        slots: where each stands among all places of the structure, the empty ones counted.
        params, names, axes: see `Given`.
        everywhere: what stands at each place of the structure: the weight, else the gradient, else None.
        all_names: the names of all places; None where they have none.
        networks: of a call over several networks, the call of each by name.
        memory: where ordinary tensors lie, where the backend has said so.
    """

    paths: Sequence[str]
    tensors: Sequence[Any]
    owner: Backend
    slots: Sequence[int]
    params: Sequence[Any] | None
    names: Sequence[str] | None
    axes: Sequence[Axes | None] | None
    everywhere: Sequence[Any]
    all_names: Sequence[str] | None
    networks: Mapping[str, Call] = field(default_factory=dict)
    memory: Memory | None = None

    @classmethod
    def of(
        cls,
        grads: Any,
        policy: Policy,
        params: Any,
        model: Any,
        backend: str | None,
        *,
        writable: bool = False,
        network: str | None = None,
    ) -> Call:
        """Take a caller's arguments apart.

        Args:
            writable: whether the tensors will be written in place.
            network: what the names of the tensors begin with, whatever the structure; they then all have one.
        Raises:
            InvalidPolicy, InvalidInput: see `clipcore.clip`.
        """
        check_policy(policy)
        if not policy.asks:
            # of a state, the weights tell the shapes of tensors that have no gradient just now
            params, model = params if policy.stateful else None, None
            # no assignment expressions: AutoGraph, which goes through this in a tf.function, warns of each
            ordinary = cls._of_ordinary(grads, backend, writable) if network is None else None
            if ordinary is not None:
                return ordinary
        pairs = all_places(grads)
        slots = [slot for slot, (_, tensor) in enumerate(pairs) if tensor is not None]
        paths, tensors = [pairs[slot][0] for slot in slots], [pairs[slot][1] for slot in slots]
        owner = get_backend(backend) if backend or not tensors else owner_of(tensors[0], f"grads{paths[0]}")
        for path, tensor in zip(paths, tensors, strict=True):
            if not owner.is_tensor(tensor):
                raise InvalidInput(_stranger(path, tensor, "" if path == paths[0] else f"grads{paths[0]}", owner))
            _check_dtype(path, tensor, owner, policy)
        if policy.dense:
            sparse, tensors = tensors, [owner.to_dense(tensor) for tensor in tensors]
            if writable:
                _refuse_sparse(policy, paths, sparse, tensors)
        beside, names, axes = _beside(grads, [path for path, _ in pairs], params, model, owner)
        if network is not None:
            names = [".".join(filter(None, (str(network), name))) for name in names or _names(grads)]
        everywhere = [tensor for _, tensor in pairs] if beside is None else beside

        def picked(values: Sequence[Any] | None) -> list[Any] | None:
            return None if values is None else [values[slot] for slot in slots]

        weights = [None if weight is None else owner.detached(weight) for weight in picked(beside) or ()]
        call = cls(
            paths,
            tensors,
            owner,
            slots,
            None if beside is None else weights,
            picked(names),
            picked(axes),
            everywhere,
            names,
        )
        if policy.keeps_shapes:
            call._check_params()
        return call

    @classmethod
    def _of_ordinary(cls, grads: Any, backend: str | None, writable: bool) -> Call | None:
        """The call on a plain list of ordinary tensors, where no tensor need be looked at on its own; else None."""
        if type(grads) not in (list, tuple) or not grads:
            return None
        try:
            owner = get_backend(backend) if backend else backend_of(grads[0])
        except BackendError:
            return None  # what is wrong is said further on
        memory = owner.memory(grads, writable=writable)
        if memory is None or not fast.available():
            return None
        if not memory.is_aligned or (writable and memory.overlaps):
            return None
        return cls(_Indices(len(grads)), grads, owner, range(len(grads)), None, None, None, grads, None, memory=memory)

    def signature(self) -> Any:
        """What tells one list of tensors from another, for a state: cheap to compare."""
        return self.specs() if self.memory is None else (self.memory.dtype, self.memory.sizes.tobytes())

    @classmethod
    def together(cls, calls: Mapping[str, Call]) -> Call:
        """One call over the tensors of several networks."""
        parts = list(calls.values())
        starts = itertools.accumulate((len(part.everywhere) for part in parts), initial=0)

        def joined(name: str) -> list[Any] | None:
            lists = [getattr(part, name) for part in parts]
            return None if any(values is None for values in lists) else [value for part in lists for value in part]

        return cls(
            paths=[f"[{name!r}]{path}" for name, part in calls.items() for path in part.paths],
            tensors=joined("tensors") or [],
            owner=next((part.owner for part in parts if part.tensors), None) or get_backend(),
            slots=[start + slot for start, part in zip(starts, parts, strict=False) for slot in part.slots],
            params=joined("params"),
            names=joined("names"),
            axes=[axes for part in parts for axes in part.axes or [None] * len(part.tensors)],
            everywhere=joined("everywhere") or [],
            all_names=joined("all_names"),
            networks=calls,
        )

    def given(self, tensors: Sequence[Any], params: Sequence[Any] | None, primitives: Any) -> Given:
        """What the policy is given, in the form in which `primitives` takes tensors."""
        return Given(tensors, primitives, params, self.names, self.axes, self.slots)

    def specs(self) -> list[Spec | None]:
        """What a state is kept for: the tensors of all places, those without a gradient just now included."""
        if self.networks:
            parts = self.networks.values()
            found = {
                name: spec for part in parts for name, spec in zip(part.all_names or (), part.specs(), strict=True)
            }
            return [found[name] for name in self.all_names or ()]
        names: Sequence[str | None] = self.all_names or [None] * len(self.everywhere)
        return [
            None if tensor is None else Spec(name, shape_of(tensor), self.owner.dtype_name(tensor))
            for name, tensor in zip(names, self.everywhere, strict=True)
        ]

    def in_order(self, names: Sequence[str] | None) -> Call:
        """The call with its places in the order of `names`, where they have these; its tensors stay where they are."""
        own = self.all_names
        if names is None or own is None or own == names or sorted(own) != sorted(names):
            return self
        where = {name: place for place, name in enumerate(names)}
        everywhere = [
            tensor for _, tensor in sorted(zip(map(where.get, own), self.everywhere, strict=True), key=_first)
        ]
        return replace(self, slots=[where[own[slot]] for slot in self.slots], everywhere=everywhere, all_names=names)

    def pick(self, indices: Sequence[int]) -> Call:
        """Some of the tensors, with what belongs to them."""

        def picked(values: Any) -> Any:
            return None if values is None else [values[index] for index in indices]

        chosen = {
            name: picked(getattr(self, name)) for name in ("paths", "tensors", "slots", "params", "names", "axes")
        }
        return replace(self, **chosen)

    def _check_params(self) -> None:
        for path, tensor, param in zip(self.paths, self.tensors, self.params or (), strict=False):
            if param is None or shape_of(param) != shape_of(tensor):
                shape = None if param is None else shape_of(param)
                raise InvalidInput(
                    f"grads{path} has shape {shape_of(tensor)}, and the parameter beside it has {shape}: pass params "
                    f"in the order of the gradients"
                )


def _first(pair: tuple[Any, Any]) -> Any:
    return pair[0]


class _Indices(Sequence[str]):
    """The paths of a plain list."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return f"[{range(self._count)[index]}]"


def all_places(tree: Any) -> list[tuple[str, Any]]:
    """Path and leaf of each place of a structure, the empty ones included."""
    try:
        return list(places(tree))
    except RecursionError as err:
        raise InvalidInput(
            f"this {type(tree).__name__} contains itself, or is nested without end; expected tensors, or lists, tuples "
            f"and dicts of them"
        ) from err


def _refuse_sparse(policy: Policy, paths: Sequence[str], sparse: Sequence[Any], dense: Sequence[Any]) -> None:
    for path, one, other in zip(paths, sparse, dense, strict=True):
        if one is not other:
            raise InvalidInput(
                f"grads{path} is sparse, and {type(policy).__name__} looks at all of its elements, so that the result "
                f"is dense and has no place in it: use cc.clip, or make it dense first"
            )


def _check_dtype(path: str, tensor: Any, owner: Backend, policy: Policy) -> None:
    try:
        dtype = owner.dtype_name(tensor)
    except InvalidInput as err:
        raise InvalidInput(f"grads{path} is {err}") from err
    if dtype not in MULTIPLY_DTYPE:
        raise InvalidInput(f"grads{path} has dtype {dtype}; expected one of {', '.join(MULTIPLY_DTYPE)}")
    if dtype.startswith("complex") and not policy.complex_allowed:
        raise InvalidInput(f"grads{path} has dtype {dtype}; {type(policy).__name__} takes real ones: clip by a norm")


def owner_of(tensor: Any, place: str) -> Backend:
    """The backend of a tensor that stands at a place of the caller's structure."""
    try:
        return backend_of(tensor)
    except BackendError as err:
        raise InvalidInput(f"{place} is {tensor!r:.60}, no tensor of an installed backend: {err}") from err


def _stranger(path: str, tensor: Any, first: str, owner: Backend) -> str:
    try:
        other = backend_of(tensor).name
    except BackendError:
        kind = type(tensor).__name__
        return f"grads{path} is {tensor!r:.60} of type {kind}; expected a tensor of backend {owner.name!r}"
    if other == owner.name:
        return f"grads{path} is of type {type(tensor).__name__}; expected tensors, or lists, tuples and dicts of them"
    if not first:
        return f"grads{path} is a tensor of backend {other!r}, and backend={owner.name!r} was asked for; leave it out"
    return (
        f"grads{path} is a tensor of backend {other!r}, and {first} of {owner.name!r}: cc.clip takes one framework per "
        f"call; cc.clip_together holds several under one bound"
    )


def _beside(
    grads: Any, paths: Sequence[str], params: Any, model: Any, owner: Backend
) -> tuple[list[Any] | None, list[str] | None, list[Axes | None] | None]:
    """(weights, names, axes of units) for all places of a structure of gradients, as far as they are known."""
    names = _names(grads) if isinstance(grads, Mapping) else None
    beside = None if params is None else _in_order(params, grads, paths, owner)
    if model is not None:
        return _of_model(model, owner, names, beside, len(paths))
    return beside, names, None


def _names(tree: Any) -> list[str]:
    """The name of each place: its keys and indices, "a.0" for tree["a"][0]."""
    return [".".join(map(str, own)) for own in keys(tree)]


def _in_order(params: Any, grads: Any, paths: Sequence[str], owner: Backend) -> list[Any]:
    """The weights beside the gradients: of dicts by key, else one after the other."""
    if isinstance(params, Iterator):
        params = list(params)
    pairs = all_places(in_order_of(params, grads))
    if isinstance(grads, Mapping) or isinstance(params, Mapping):
        strange = sorted({path for path, _ in pairs} ^ set(paths))
        if strange:
            raise InvalidInput(
                f"params{strange[0]} or grads{strange[0]} is missing; expected weights and gradients by the same keys"
            )
    elif len(pairs) != len(paths):
        raise InvalidInput(f"params has {len(pairs)} tensors, and grads has {len(paths)}; expected one beside each")
    for path, weight in pairs:
        if weight is not None and not owner.is_tensor(weight):
            raise InvalidInput(
                f"params{path} is {weight!r:.60} of type {type(weight).__name__}; expected a tensor of backend "
                f"{owner.name!r}, as the gradient beside it"
            )
        if weight is not None and owner.dtype_name(weight) not in MULTIPLY_DTYPE:
            raise InvalidInput(
                f"params{path} has dtype {owner.dtype_name(weight)}; expected one of {', '.join(MULTIPLY_DTYPE)}"
            )
    return [weight for _, weight in pairs]


def _of_model(
    model: Any, owner: Any, names: list[str] | None, beside: list[Any] | None, count: int
) -> tuple[list[Any], list[str], list[Axes | None]]:
    from clipcore.mapping.layouts import unit_axes  # it imports einops, which a user who only clips need not wait for

    if not hasattr(owner, "layers"):
        raise InvalidInput(f"backend {owner.name!r} has no models: leave out model=")
    parameters = owner.parameters(model)
    if beside is None and names is not None:
        unknown = [name for name in names if name not in parameters]
        if unknown:
            raise InvalidInput(
                f"grads has {unknown[0]!r}, and the model ({type(model).__name__}) has no parameter of that name; "
                f"expected its names, such as {next(iter(parameters), '')!r}"
            )
        beside = [parameters[name] for name in names]
    elif beside is None:
        beside = owner.weights(model)
    if len(beside) != count:
        raise InvalidInput(
            f"the model has {len(beside)} trainable tensors, and grads has {count} places; expected one for each, in "
            f"the model's order, None where there is no gradient, or a dict by the model's names"
        )
    known = {id(tensor): name for name, tensor in parameters.items()}
    strangers = [index for index, tensor in enumerate(beside) if id(tensor) not in known]
    if strangers:
        raise InvalidInput(f"params[{strangers[0]}] is no parameter of the model ({type(model).__name__})")
    names = [known[id(tensor)] for tensor in beside]
    axes = {t.name: unit_axes(layer, t.role) for layer in owner.layers(model) for t in layer.tensors.values()}
    return beside, names, [axes[name] for name in names]
