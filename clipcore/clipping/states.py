"""States of policies by names, as they are saved: made flat, nested again, and refused where they do not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clipcore.clipping.given import Spec, State, shape_of
from clipcore.clipping.policies import Policy
from clipcore.errors import InvalidInput
from clipcore.plugins import backend_of


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
            f"tensors (first difference: {odd!r}): it is of another policy or of other tensors; begin anew, with a new "
            f"Clipper or attachment, where parameters were added"
        )
    for name, value in wanted.items():
        if not hasattr(found[name], "shape"):
            raise InvalidInput(
                f"the state's {name!r} is {found[name]!r:.60} of type {type(found[name]).__name__}; expected an array"
            )
        if shape_of(found[name]) != shape_of(value):
            raise InvalidInput(
                f"the state's {name!r} has shape {shape_of(found[name])}, and for these tensors it has "
                f"{shape_of(value)}: it is of other settings or of other tensors; begin anew, with a new Clipper or "
                f"attachment, where parameters were added"
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


def saved_state(policy: Policy, state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A state by names, as arrays of its own; refused where it is of another policy.

    Raises:
        InvalidInput: a name is of another policy.
    """
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise InvalidInput(f"the state is {state!r:.60}; expected what state_dict gave, arrays by name")
    prefix = f"{type(policy).__name__}."
    strange = [name for name in state if not name.startswith(prefix)]
    if strange:
        raise InvalidInput(
            f"the state has {strange[0]!r}, and the policy here is {type(policy).__name__}: it was saved from another"
        )
    arrays = {name: copied(value) for name, value in state.items()}
    for name, array in arrays.items():
        if array.dtype.kind not in "iuf" or not np.all(np.isfinite(array) & (array >= 0)):
            raise InvalidInput(f"the state's {name!r} is {array!r:.60}; expected finite numbers of at least 0")
    return arrays


def check_dtypes(saved: Mapping[str, np.ndarray], wanted: Mapping[str, Any]) -> None:
    """Refuse saved arrays of other dtypes than those that a policy keeps."""
    for name, array in saved.items():
        if array.dtype.name != str(wanted[name].dtype):
            raise InvalidInput(
                f"the state's {name!r} has dtype {array.dtype.name}; expected {wanted[name].dtype}, as it was saved"
            )


def copied(value: Any) -> np.ndarray:
    """A number, array or tensor of any framework as an array of its own."""
    return np.array(value) if isinstance(value, int | float) else np.array(backend_of(value).to_numpy(value))
