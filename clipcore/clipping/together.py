"""Several networks under one bound, whatever framework each is in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clipcore.backend import Backend
from clipcore.clipping.api import bound, bound_arrays, no_state
from clipcore.clipping.call import Call
from clipcore.clipping.given import State
from clipcore.clipping.host import HostPrimitives
from clipcore.clipping.policies import Policy
from clipcore.clipping.report import ClipReport
from clipcore.errors import InvalidInput
from clipcore.structure import rebuild


def clip_together(
    grads: Mapping[str, Any],
    policy: Policy,
    *,
    params: Mapping[str, Any] | None = None,
    models: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], ClipReport]:
    """Bound the gradients of several networks by one policy, as if all were of one network in one framework.

    Args:
        grads: per network, by a name of yours, its gradients as `clip` takes them; each may be of another framework.
            Where there are two, all tensors are in the CPU's memory.
        policy: what bounds them, all of one call together. Parameters are named "network.parameter", those of a list
            "network.0", "network.1" …. One that learns is held in a `Clipper`, which has this verb as well.
        params, models: per network, as for `clip`.
    Returns:
        (clipped, report): the same structure per network; the report is over all tensors, network by network.
    Raises:
        InvalidInput: as for `clip`; or networks of two frameworks where one is on a device or in a traced function.

    >>> import numpy as np
    >>> import clipcore as cc
    >>> clipped, report = clip_together({"a": [np.array([3.0])], "b": np.array([4.0])}, cc.ClipByGlobalNorm(1.0))
    >>> clipped, report.norm
    ({'a': [array([0.6])], 'b': array([0.8])}, 5.0)
    """
    call = call_together(grads, policy, params, models)
    clipped, _, report = bound_together(call, grads, policy, no_state(call, policy))
    return clipped, report


def call_together(
    grads: Mapping[str, Any], policy: Policy, params: Mapping[str, Any] | None, models: Mapping[str, Any] | None
) -> Call:
    """The one call over all networks; see `clip_together`."""
    for argument, given in (("grads", grads), ("params", params or {}), ("models", models or {})):
        if not isinstance(given, Mapping):
            raise InvalidInput(f"{argument} is a {type(given).__name__}; expected a dict by the networks' names")
        strange = [name for name in given if name not in grads]
        if strange:
            raise InvalidInput(f"{argument} has {strange[0]!r}, and grads has {list(grads)}; expected the same names")
    return Call.together(
        {
            name: Call.of(part, policy, (params or {}).get(name), (models or {}).get(name), None, network=name)
            for name, part in grads.items()
        }
    )


def bound_together(
    call: Call, grads: Mapping[str, Any], policy: Policy, state: State
) -> tuple[dict[str, Any], State, ClipReport]:
    """(the networks' gradients, bounded; the state after it; the report)"""
    parts = call.networks
    if len({part.owner.name for part in parts.values() if part.tensors}) <= 1:
        bounded, state, report = bound(call, policy, state)
    else:
        arrays = [array for name, part in parts.items() for array in _on_host(name, part.owner, part.tensors)]
        beside = call.params and [
            array for name, part in parts.items() for array in _on_host(name, part.owner, part.params or ())
        ]
        results, state, report = bound_arrays(call, arrays, beside, policy, state, HostPrimitives())
        owners = [part.owner for part in parts.values() for _ in part.tensors]
        bounded = [
            tensor if result is array else owner.from_host(result, tensor)
            for owner, tensor, array, result in zip(owners, call.tensors, arrays, results, strict=True)
        ]
    left = iter(bounded)
    return {name: rebuild(part, left) for name, part in grads.items()}, state, report


def _on_host(name: str, owner: Backend, tensors: Sequence[Any]) -> list[Any]:
    arrays = owner.to_host(tensors)
    if arrays is None:
        raise InvalidInput(
            f"network {name!r} ({owner.name}) is on a device, or in a traced function, and others are of another "
            f"framework: bring it to the CPU, or use cc.norm, cc.combine, cc.scale_for and cc.apply_scale"
        )
    return arrays
