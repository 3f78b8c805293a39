"""The verbs of clipping: structures of any backend's tensors in, the same structures out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from clipcore.backend import Backend
from clipcore.clipping.call import Call, all_places, owner_of
from clipcore.clipping.given import State, map_state
from clipcore.clipping.host import HostPrimitives
from clipcore.clipping.lists import Arrays
from clipcore.clipping.overlaps import one_per_memory
from clipcore.clipping.policies import Policy
from clipcore.clipping.report import ClipReport
from clipcore.clipping.states import check_state
from clipcore.errors import BackendError, InvalidInput, NonFinite
from clipcore.plugins import backend_of
from clipcore.structure import rebuild


def clip(
    grads: Any, policy: Policy, *, params: Any = None, model: Any = None, backend: str | None = None
) -> tuple[Any, ClipReport]:
    """Bound gradients by a policy; the input is never modified.

    Args:
        grads: a floating tensor of any installed backend, or lists, tuples and dicts of them, nested at will; `None`
            entries pass through. All tensors are of one backend. Sparse tensors come out with duplicates summed.
        policy: what bounds them; one that learns from step to step is held in a `Clipper`.
        params: the weights beside the gradients, in the same structure, where the policy compares the two.
        model: the model that the gradients are of, for policies that ask for names or layouts: gradients in the order
            of its trainable weights, or a dict by their names. It stands for `params` as well.
        backend: its name, where it shall not be found from the tensors.
    Returns:
        (clipped, report): the same structure, shapes and dtypes; a tensor that is in range is the same object.
    Raises:
        InvalidInput: something in `grads` is no floating tensor, tensors of two backends are mixed, or the policy
            needs params or a model, and these are missing or do not fit.
        NonFinite: an element is inf or NaN and the policy says "raise".

    >>> import numpy as np
    >>> import clipcore as cc
    >>> clipped, report = cc.clip({"w": np.array([3.0, 4.0])}, cc.ClipByGlobalNorm(1.0))
    >>> clipped["w"], report.norm, report.clipped
    (array([0.6, 0.8]), 5.0, True)
    """
    call = Call.of(grads, policy, params, model, backend)
    bounded, _, report = bound(call, policy, no_state(call, policy))
    return rebuilt(call, grads, bounded), report


def clip_(
    grads: Any, policy: Policy, *, params: Any = None, model: Any = None, backend: str | None = None
) -> ClipReport:
    """Bound gradients by a policy in place, where the backend's tensors are mutable; one memory is scaled once.

    Args:
        grads: as for `clip`, but parameters of a model are refused: `clip_grads_` is for their gradients, `limit_`
            for their values.
        policy, params, model, backend: as for `clip`.
    Returns:
        The report.
    Raises:
        InvalidInput: as for `clip`; also tensors that cannot be written, and parameters.
        NonFinite: as for `clip`; nothing was changed.

    >>> import numpy as np
    >>> import clipcore as cc
    >>> grads = [np.array([3.0, 4.0])]
    >>> report = cc.clip_(grads, cc.ClipByGlobalNorm(1.0))
    >>> grads
    [array([0.6, 0.8])]
    """
    call = Call.of(grads, policy, params, model, backend, writable=True)
    refuse_parameters(call)
    return bound_in_place(call, policy, no_state(call, policy))[1]


def clip_grads_(model_or_params: Any, policy: Policy) -> ClipReport:
    """Bound the gradients that a framework keeps beside its parameters (torch: `.grad`), in place.

    Args:
        model_or_params: a model, a parameter, or an iterable of parameters; those without a gradient are passed over.
        policy: what bounds them; of a model it may ask for names and layouts.
    Returns:
        The report, over the gradients in the order of the parameters.
    Raises:
        InvalidInput: the framework keeps no gradients beside parameters (TensorFlow): use `clip`.
    """
    model_or_params, owner = _model_or_params(model_or_params)
    if owner is None:
        return clip_([], policy)
    model = None if isinstance(model_or_params, list) else model_or_params
    params, grads = owner.gradients(model_or_params)
    return clip_(grads, policy, params=params, model=model, backend=owner.name)


def limit_(model_or_params: Any, limit: Policy) -> ClipReport:
    """Bound the trainable weights of a model in place; running statistics are never touched.

    Args:
        model_or_params: a model, or an iterable of parameters.
        limit: the rule, acting on the weights as a policy acts on gradients; of a model it may ask for layouts.
    Returns:
        The report, over the weights in the order in which the model lists them.
    Raises:
        InvalidInput: no weights that can be written.
    """
    model_or_params, owner = _model_or_params(model_or_params)
    if owner is None:
        return clip_([], limit)
    model = None if isinstance(model_or_params, list) else model_or_params
    weights = owner.weights(model_or_params)
    call = Call.of([owner.detached(weight) for weight in weights], limit, weights, model, owner.name, writable=True)
    return bound_in_place(call, limit, no_state(call, limit))[1]


def init(policy: Policy, grads: Any, params: Any, *, model: Any = None, backend: str | None = None) -> State:
    """See `Policy.init`."""
    return policy.start(Call.of(grads, policy, params, model, backend).specs())


def update(
    policy: Policy, grads: Any, state: State, params: Any, *, model: Any = None, backend: str | None = None
) -> tuple[Any, State, ClipReport]:
    """See `Policy.update`."""
    call = Call.of(grads, policy, params, model, backend)
    check_state(policy, state, call.specs())
    bounded, state, report = bound(call, policy, state)
    return rebuilt(call, grads, bounded), state, report


def rebuilt(call: Call, grads: Any, bounded: Sequence[Any]) -> Any:
    """The caller's structure with the results in it."""
    return rebuild(grads, iter(bounded)) if call.memory is None else type(grads)(bounded)


def refuse_parameters(call: Call) -> None:
    """Refuse parameters where gradients are meant: both are tensors, and only one is to be clipped in place."""
    for path, tensor in zip(call.paths, call.tensors, strict=True) if call.memory is None else ():
        if call.owner.is_parameter(tensor):
            raise InvalidInput(
                f"grads{path} is a parameter: cc.clip_grads_ clips the gradients of parameters, "
                f"cc.limit_ limits their values"
            )


def refuse_other_shapes(policy: Policy, remedy: str) -> None:
    """Refuse a policy whose results have other shapes than the tensors that they shall take the place of."""
    if not policy.keeps_shapes:
        raise InvalidInput(f"{type(policy).__name__} sums over examples, so that its result has no place: {remedy}")


def no_state(call: Call, policy: Policy) -> State:
    """The state of a policy that has none, its parts' names checked; one that has is refused."""
    if policy.stateful:
        name = type(policy).__name__
        raise InvalidInput(
            f"{name} learns from step to step, and one call alone teaches it nothing: hold it in a "
            f"cc.Clipper({name}(…)), which has the verbs of cc, attach it to the optimizer, or keep its state yourself "
            f"with policy.update"
        )
    return policy.start(call.specs()) if policy.members else {}


def _model_or_params(model_or_params: Any) -> tuple[Any, Backend | None]:
    """The model, or its parameters as a list, and whose they are; no parameters are nobody's."""
    # asked first, since torch.compile cannot trace the search for a backend that ends in an exception
    if not isinstance(model_or_params, list | tuple | Iterator):
        try:
            return model_or_params, backend_of(model_or_params)
        except BackendError as err:
            if isinstance(model_or_params, str | bytes | dict) or not hasattr(model_or_params, "__iter__"):
                raise InvalidInput(
                    f"model_or_params is of type {type(model_or_params).__name__}; expected a model or its parameters, "
                    f"say model.parameters(): {err}"
                ) from err
    pairs = [(path, param) for path, param in all_places(list(model_or_params)) if param is not None]
    return [param for _, param in pairs], owner_of(pairs[0][1], f"params{pairs[0][0]}") if pairs else None


def bound(
    call: Call, policy: Policy, state: State, *, owns_state: bool = False
) -> tuple[Sequence[Any], State, ClipReport]:
    """Bound the tensors of a call: (results, the state after it, the report).

    Args:
        owns_state: whether the state may be overwritten.
    """
    owner = call.owner
    arrays, params = _host_arrays(call), call.params
    beside = owner.to_host(params) if params is not None else None
    if arrays is None or (params is not None and beside is None):
        primitives = owner.primitives()
        like = call.tensors[0] if call.tensors else None
        state = map_state(lambda value: primitives.adopt(value, like), state)
        try:
            return policy.bound(call.given(call.tensors, params, primitives), state)
        except NonFinite as err:
            raise _placed(err, call, call.tensors, policy, primitives) from err
    bounded, state, report = bound_arrays(call, arrays, beside, policy, state, HostPrimitives(owns_state=owns_state))
    if bounded is arrays:
        return call.tensors, state, report
    clipped = [
        tensor if result is array else owner.from_host(result, tensor)
        for tensor, array, result in zip(call.tensors, arrays, bounded, strict=True)
    ]
    return clipped, state, report


def _host_arrays(call: Call, *, writable: bool = False) -> Sequence[np.ndarray] | None:
    if call.memory is None:
        return call.owner.to_host(call.tensors, writable=writable)

    def array_of(place: int) -> np.ndarray:
        arrays = call.owner.to_host([call.tensors[place]], writable=writable)
        assert arrays is not None
        return arrays[0]

    return Arrays(call.memory, array_of)


def _once(call: Call) -> Call:
    """The call with each tensor, and each memory wherever it can be seen, once."""
    memory = call.owner.memory(call.tensors, writable=True)
    if memory is not None and not memory.overlaps:
        return call
    first = {call.owner.lies_at(tensor): place for place, tensor in reversed(list(enumerate(call.tensors)))}
    if len(first) < len(call.tensors):
        call = call.pick(sorted(first.values()))
    first_alone = _memories(call.owner, call.tensors[:1])  # where it cannot be seen, the others need not be asked
    arrays = first_alone and _memories(call.owner, call.tensors)
    chosen = one_per_memory(call.paths, arrays) if arrays else range(len(call.tensors))
    return call if len(chosen) == len(call.tensors) else call.pick(chosen)


def _memories(owner: Backend, tensors: Sequence[Any]) -> list[np.ndarray] | None:
    # out of sight of what differentiates: the memory is the same
    return owner.to_host([owner.detached(tensor) for tensor in tensors])


def bound_in_place(call: Call, policy: Policy, state: State, *, owns_state: bool = False) -> tuple[State, ClipReport]:
    """Bound the tensors of a call in place: (the state after it, the report); see `bound`."""
    owner = call.owner
    refuse_other_shapes(policy, "use cc.clip")
    if call.memory is None:
        call = _once(call)
    arrays, params = _host_arrays(call, writable=True), call.params
    beside = owner.to_host(params) if params is not None else None
    # a policy that acts part by part could find a fault when others are written
    all_or_nothing = policy.nonfinite == "raise" and (policy.members or policy.asks)
    if arrays is not None and (params is None or beside is not None) and not all_or_nothing:
        primitives = HostPrimitives(in_place=True, owns_state=owns_state)
        _, state, report = bound_arrays(call, arrays, beside, policy, state, primitives)
        if report.clipped or report.nonfinite:
            owner.written(call.tensors)
        return state, report
    bounded, state, report = bound(call, policy, state, owns_state=owns_state)
    changed = [place for place, result in enumerate(bounded) if result is not call.tensors[place]]
    owner.assign_([call.tensors[place] for place in changed], [bounded[place] for place in changed])
    return state, report


def bound_arrays(
    call: Call,
    arrays: Sequence[np.ndarray],
    params: Sequence[np.ndarray] | None,
    policy: Policy,
    state: State,
    primitives: HostPrimitives,
) -> tuple[Sequence[np.ndarray], State, ClipReport]:
    """Bound the memory of the tensors of a call; a fault is named with its place."""
    try:
        with np.errstate(over="ignore"):  # a number beyond float64 is the policy's to judge
            return policy.bound(call.given(arrays, params, primitives), map_state(np.asarray, state))
    except NonFinite as err:
        raise _placed(err, call, arrays, policy, primitives) from err


def _placed(err: NonFinite, call: Call, tensors: Sequence[Any], policy: Policy, primitives: Any) -> NonFinite:
    """The error with the place of the first fault."""
    # counted where they are: a device's tensors need not come to the CPU for it
    counts = [primitives.screen([x], "propagate", nan_alone=policy.infinities_allowed)[1] for x in tensors]
    faulty = [f"grads{path}" for path, count in zip(call.paths, counts, strict=True) if int(count)]
    where = f"first in {faulty[0]}, {len(faulty)} of {len(counts)} tensors" if faulty else "after its first policies"
    error: NonFinite = NonFinite(f"{err} ({where}), and the policy has nonfinite='raise'; nothing was changed")
    return error
