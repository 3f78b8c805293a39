"""One call of a verb of clipping: its tensors and what belongs to them, and all that a caller can get wrong."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from clipcore.backend import Axes, Backend, Memory
from clipcore.clipping import fast
from clipcore.clipping.given import Given, Spec, State, shape_of
from clipcore.clipping.kernels import MULTIPLY_DTYPE
from clipcore.clipping.policies import Policy, check_policy
from clipcore.errors import BackendError, InvalidInput
from clipcore.plugins import backend_of, get_backend
from clipcore.structure import places


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
        cls, grads: Any, policy: Policy, params: Any, model: Any, backend: str | None, *, writable: bool = False
    ) -> Call:
        """Take a caller's arguments apart.

        Args:
            writable: whether the tensors will be written in place.
        Raises:
            InvalidPolicy, InvalidInput: see `clipcore.clip`.
        """
        check_policy(policy)
        if not policy.asks:
            params = model = None
            if (call := cls._of_ordinary(grads, backend, writable)) is not None:
                return call
        pairs = list(places(grads))
        slots = [slot for slot, (_, tensor) in enumerate(pairs) if tensor is not None]
        paths, tensors = [pairs[slot][0] for slot in slots], [pairs[slot][1] for slot in slots]
        owner = get_backend(backend) if backend or not tensors else _owner(tensors[0], paths[0])
        for path, tensor in zip(paths, tensors, strict=True):
            if not owner.is_tensor(tensor):
                raise InvalidInput(_stranger(path, tensor, "" if path == paths[0] else f"grads{paths[0]}", owner))
            _check_dtype(path, owner.dtype_name(tensor), policy)
        if policy.dense:
            tensors = [owner.to_dense(tensor) for tensor in tensors]
        beside, names, axes = _beside(grads, [path for path, _ in pairs], params, model, owner)
        everywhere = [tensor for _, tensor in pairs] if beside is None else beside

        def picked(values: Sequence[Any] | None) -> list[Any] | None:
            return None if values is None else [values[slot] for slot in slots]

        call = cls(paths, tensors, owner, slots, picked(beside), picked(names), picked(axes), everywhere, names)
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
        return cls(_Indices(len(grads)), grads, owner, range(len(grads)), None, None, None, grads, None, memory=memory)

    def signature(self) -> Any:
        """What tells one list of tensors from another, for a state: cheap to compare."""
        return self.specs() if self.memory is None else (self.memory.dtype, self.memory.sizes.tobytes())

    @classmethod
    def together(cls, calls: Mapping[str, Call]) -> Call:
        """One call over the tensors of several, the names of each prefixed with its own."""
        parts = list(calls.values())
        starts = itertools.accumulate((len(part.everywhere) for part in parts), initial=0)

        def joined(name: str) -> list[Any] | None:
            lists = [getattr(part, name) for part in parts if part.tensors]
            return None if any(values is None for values in lists) else [value for part in lists for value in part]

        return cls(
            paths=[f"[{name!r}]{path}" for name, part in calls.items() for path in part.paths],
            tensors=joined("tensors") or [],
            owner=next((part.owner for part in parts if part.tensors), get_backend()),
            slots=[start + slot for start, part in zip(starts, parts, strict=False) for slot in part.slots],
            params=joined("params"),
            names=[f"{name}.{own}" for name, part in calls.items() for own in part.names or part.paths],
            axes=[axes for part in parts for axes in part.axes or [None] * len(part.tensors)],
            everywhere=(),
            all_names=None,
            networks=calls,
        )

    def given(self, tensors: Sequence[Any], params: Sequence[Any] | None, primitives: Any) -> Given:
        """What the policy is given, in the form in which `primitives` takes tensors."""
        return Given(tensors, primitives, params, self.names, self.axes, self.slots)

    def specs(self) -> list[Spec | None]:
        """What a state is kept for: the tensors of all places, those without a gradient just now included."""
        if self.networks:
            return [
                spec and spec._replace(name=f"{network}.{spec.name}" if spec.name else None)
                for network, call in self.networks.items()
                for spec in call.specs()
            ]
        names: Sequence[str | None] = self.all_names or [None] * len(self.everywhere)
        return [
            None if tensor is None else Spec(name, shape_of(tensor), self.owner.dtype_name(tensor))
            for name, tensor in zip(names, self.everywhere, strict=True)
        ]

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


class _Indices(Sequence[str]):
    """The paths of a plain list."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return f"[{range(self._count)[index]}]"


def _check_dtype(path: str, dtype: str, policy: Policy) -> None:
    if dtype not in MULTIPLY_DTYPE:
        raise InvalidInput(f"grads{path} has dtype {dtype}; expected one of {', '.join(MULTIPLY_DTYPE)}")
    if dtype.startswith("complex") and not policy.complex_allowed:
        raise InvalidInput(f"grads{path} has dtype {dtype}; {type(policy).__name__} takes real ones: clip by a norm")


def _owner(tensor: Any, path: str) -> Backend:
    try:
        return backend_of(tensor)
    except BackendError as err:
        raise InvalidInput(f"grads{path} is {tensor!r:.60}, no tensor of an installed backend: {err}") from err


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
    names = ["".join(_keys(path)) for path in paths] if isinstance(grads, Mapping) else None
    beside = None if params is None else [leaf for _, leaf in places(params)]
    if model is not None:
        return _of_model(model, owner, names, beside, len(paths))
    if beside is not None and len(beside) != len(paths):
        raise InvalidInput(f"params has {len(beside)} tensors, and grads has {len(paths)}; expected one beside each")
    return beside, names, None


def _keys(path: str) -> str:
    """The name that a path through dicts and lists is: "['a'][0]" is "a.0"."""
    return path.removeprefix("[").removesuffix("]").replace("][", ".").replace("'", "")


def _of_model(
    model: Any, owner: Any, names: list[str] | None, beside: list[Any] | None, count: int
) -> tuple[list[Any], list[str], list[Axes | None]]:
    from clipcore.mapping.layouts import unit_axes  # it imports einops, which a user who only clips need not wait for

    if not hasattr(owner, "layers"):
        raise InvalidInput(f"backend {owner.name!r} has no models: leave out model=")
    parameters = owner.parameters(model)
    if beside is None and names is not None and set(names) <= set(parameters):
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


def check_state(policy: Policy, state: Any, specs: Sequence[Spec | None]) -> None:
    """Refuse a state that is not this policy's, or is of tensors of other shapes."""
    wanted = flat_state(policy, policy.start(specs))
    try:
        found = flat_state(policy, state)
    except (KeyError, TypeError, AttributeError) as err:
        raise InvalidInput(
            f"the state {state!r:.60} is none of {type(policy).__name__}; expected what policy.init or update gave"
        ) from err
    check_flat_state(policy, found, wanted)


def check_flat_state(policy: Policy, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a state by names that are not this policy's, or arrays of other shapes."""
    if found.keys() != wanted.keys():
        odd = sorted(found.keys() ^ wanted.keys())[0]
        raise InvalidInput(
            f"the state has the entries {_named(found)}, and {type(policy).__name__} has {_named(wanted)} for these "
            f"tensors (first difference: {odd!r}): it was saved from another policy, or for other tensors"
        )
    for name, value in wanted.items():
        if shape_of(found[name]) != shape_of(value):
            raise InvalidInput(
                f"the state's {name!r} has shape {shape_of(found[name])}, and for these tensors it has "
                f"{shape_of(value)}: it was saved with other settings, or for other tensors"
            )


def _named(state: Mapping[str, Any]) -> str:
    shown = [repr(name) for name in state][:4]
    return f"[{', '.join(shown)}{', …' if len(state) > 4 else ''}]"


def flat_state(policy: Policy, state: State) -> dict[str, Any]:
    """A state by names that say whose each entry is: "AutoClip.count", "Chain.1.ZClip.mean"."""
    name = type(policy).__name__
    if not policy.members:
        return {f"{name}.{key}": value for key, value in state.items()}
    return {
        f"{name}.{place}.{key}": value
        for place, member in enumerate(policy.members)
        for key, value in flat_state(member, state[str(place)]).items()
    }


def nested_state(policy: Policy, flat: Mapping[str, Any]) -> State:
    """The inverse of `flat_state`."""
    prefix = f"{type(policy).__name__}."
    own = {key.removeprefix(prefix): value for key, value in flat.items()}
    if not policy.members:
        return own
    parts = {
        str(place): {k.removeprefix(f"{place}."): v for k, v in own.items() if k.startswith(f"{place}.")}
        for place in range(len(policy.members))
    }
    return {place: nested_state(policy.members[int(place)], part) for place, part in parts.items()}
