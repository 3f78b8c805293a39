"""The verbs of clipping: structures of any backend's tensors in, the same structures out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from clipcore.backend import Backend
from clipcore.clipping.host import HostPrimitives
from clipcore.clipping.kernels import MULTIPLY_DTYPE, extent, not_finite
from clipcore.clipping.policies import Policy, check_policy
from clipcore.clipping.report import ClipReport
from clipcore.errors import BackendError, InvalidInput, NonFinite
from clipcore.plugins import backend_of, get_backend
from clipcore.structure import leaves, rebuild


def clip(grads: Any, policy: Policy, *, backend: str | None = None) -> tuple[Any, ClipReport]:
    """Bound gradients by a policy; the input is never modified.

    Args:
        grads: a floating tensor of any installed backend, or lists, tuples and dicts of them, nested at will; `None`
            entries pass through. All tensors are of one backend. Sparse tensors come out with duplicates summed.
        policy: what bounds them.
        backend: its name, where it shall not be found from the tensors.
    Returns:
        (clipped, report): the same structure, shapes and dtypes; a tensor that is in range is the same object.
    Raises:
        InvalidInput: something in `grads` is no floating tensor, or tensors of two backends are mixed.
        NonFinite: an element is inf or NaN and the policy says "raise".

    >>> import numpy as np
    >>> import clipcore as cc
    >>> clipped, report = cc.clip({"w": np.array([3.0, 4.0])}, cc.ClipByGlobalNorm(1.0))
    >>> clipped["w"], report.norm, report.clipped
    (array([0.6, 0.8]), 5.0, True)
    """
    paths, tensors, owner = _check(grads, policy, backend)
    bounded, report = _bound(paths, tensors, policy, owner)
    return rebuild(grads, iter(bounded)), report


def clip_(grads: Any, policy: Policy, *, backend: str | None = None) -> ClipReport:
    """Bound gradients by a policy in place, where the backend's tensors are mutable; one memory is scaled once.

    Args:
        grads: as for `clip`, but parameters of a model are refused: `clip_grads_` is for their gradients, `limit_`
            for their values.
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
    paths, tensors, owner = _check(grads, policy, backend)
    for path, tensor in zip(paths, tensors, strict=True):
        if owner.is_parameter(tensor):
            raise InvalidInput(
                f"grads{path} is a parameter: cc.clip_grads_ clips the gradients of parameters, "
                f"cc.limit_ limits their values"
            )
    return _bound_in_place(paths, tensors, policy, owner)


def clip_grads_(model_or_params: Any, policy: Policy) -> ClipReport:
    """Bound the gradients that a framework keeps beside its parameters (torch: `.grad`), in place.

    Args:
        model_or_params: a model, a parameter, or an iterable of parameters; those without a gradient are passed over.
    Returns:
        The report, over the gradients in the order of the parameters.
    Raises:
        InvalidInput: the framework keeps no gradients beside parameters (TensorFlow): use `clip`.
    """
    model_or_params, owner = _model_or_params(model_or_params)
    if owner is None:
        return clip_([], policy)
    return clip_(owner.gradients(model_or_params), policy, backend=owner.name)


def limit_(model_or_params: Any, limit: Policy) -> ClipReport:
    """Bound the trainable weights of a model in place; running statistics are never touched.

    Args:
        model_or_params: a model, or an iterable of parameters.
        limit: the rule, acting on the weights as a policy acts on gradients.
    Returns:
        The report, over the weights in the order in which the model lists them.
    Raises:
        InvalidInput: no weights that can be written.
    """
    model_or_params, owner = _model_or_params(model_or_params)
    if owner is None:
        return clip_([], limit)
    paths, tensors, owner = _check(owner.weights(model_or_params), limit, owner.name)
    return _bound_in_place(paths, tensors, limit, owner)


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
    pairs = _leaves(list(model_or_params))
    return [param for _, param in pairs], _owner(pairs[0][1], f"params{pairs[0][0]}") if pairs else None


def _check(grads: Any, policy: Policy, name: str | None) -> tuple[list[str], list[Any], Backend]:
    """Paths and tensors of a structure, and their one backend; everything a caller can get wrong is refused here."""
    check_policy(policy)
    pairs = _leaves(grads)
    paths, tensors = [path for path, _ in pairs], [tensor for _, tensor in pairs]
    owner = get_backend(name) if name or not tensors else _owner(tensors[0], f"grads{paths[0]}")
    for path, tensor in pairs:
        if not owner.is_tensor(tensor):
            raise InvalidInput(_stranger(path, tensor, "" if path == paths[0] else f"grads{paths[0]}", owner))
        try:
            dtype = owner.dtype_name(tensor)
        except InvalidInput as err:
            raise InvalidInput(f"grads{path} is {err}") from err
        if dtype not in MULTIPLY_DTYPE:
            raise InvalidInput(f"grads{path} has dtype {dtype}; expected one of {', '.join(MULTIPLY_DTYPE)}")
        if dtype.startswith("complex") and not policy.complex_allowed:
            raise InvalidInput(
                f"grads{path} has dtype {dtype}; {type(policy).__name__} takes real ones: clip by a norm"
            )
    return paths, tensors, owner


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    try:
        return list(leaves(tree))
    except RecursionError as err:
        raise InvalidInput(
            f"this {type(tree).__name__} contains itself, or is nested without end; expected tensors, or lists, tuples "
            f"and dicts of them"
        ) from err


def _owner(tensor: Any, place: str) -> Backend:
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


def _bound(
    paths: Sequence[str], tensors: Sequence[Any], policy: Policy, owner: Backend
) -> tuple[list[Any], ClipReport]:
    arrays = owner.to_host(tensors)
    if arrays is None:
        return policy.bound(tensors, owner.primitives())
    bounded, report = _bound_arrays(paths, arrays, policy, HostPrimitives())
    clipped = [
        tensor if result is array else owner.from_host(result, tensor)
        for tensor, array, result in zip(tensors, arrays, bounded, strict=True)
    ]
    return clipped, report


def _bound_in_place(paths: Sequence[str], tensors: Sequence[Any], policy: Policy, owner: Backend) -> ClipReport:
    seen: dict[int, tuple[str, Any]] = {}
    for path, tensor in zip(paths, tensors, strict=True):
        seen.setdefault(id(tensor), (path, tensor))
    paths, tensors = [path for path, _ in seen.values()], [tensor for _, tensor in seen.values()]
    written = owner.to_host(tensors, writable=True)
    arrays = owner.to_host(tensors) if written is None else written
    if arrays is not None:  # wherever memory can be seen, views of it are known, even where it is written otherwise
        places = _one_per_memory(paths, arrays)
        paths, tensors = [paths[i] for i in places], [tensors[i] for i in places]
        if written is not None:
            arrays = [arrays[i] for i in places]
            return _bound_arrays(paths, arrays, policy, HostPrimitives(in_place=True))[1]
    bounded, report = _bound(paths, tensors, policy, owner)
    for tensor, result in zip(tensors, bounded, strict=True):
        if result is not tensor:
            owner.assign_(tensor, result)
    return report


def _bound_arrays(
    paths: Sequence[str], arrays: Sequence[np.ndarray], policy: Policy, primitives: HostPrimitives
) -> tuple[list[np.ndarray], ClipReport]:
    try:
        return policy.bound(arrays, primitives)
    except NonFinite as err:
        is_fault = np.isnan if policy.infinities_allowed else not_finite
        faulty = [f"grads{p}" for p, array in zip(paths, arrays, strict=True) if is_fault(array).any()]
        raise NonFinite(
            f"{err} (first in {faulty[0]}, {len(faulty)} of {len(arrays)} tensors), and the policy has "
            f"nonfinite='raise'; nothing was changed"
        ) from err


def _one_per_memory(paths: Sequence[str], arrays: Sequence[np.ndarray]) -> list[int]:
    """The first place of each memory: gradients can be one tensor under several names, or views of it.

    Raises:
        InvalidInput: two of them overlap in part, or one overlaps itself, so that an element would be scaled twice.
    """
    seen: dict[Any, int] = {}
    for index, array in enumerate(arrays):
        if _overlaps_itself(array):
            raise InvalidInput(
                f"grads{paths[index]} has shape {array.shape} and strides of {array.strides} bytes: its elements share "
                f"memory and would be scaled twice; use cc.clip, or pass a copy"
            )
        seen.setdefault(_footprint(array) if array.size else ("empty", index), index)
    places = list(seen.values())
    before: list[tuple[int, int]] = []  # (end, place) of all that reach beyond where the next one begins
    for low, high, index in sorted((*extent(arrays[i]), i) for i in places if arrays[i].size):
        before = [(end, other) for end, other in before if end > low]
        for _, other in before:
            if np.shares_memory(arrays[other], arrays[index]):
                raise InvalidInput(
                    f"grads{paths[other]} and grads{paths[index]} overlap in memory: elements would be scaled twice; "
                    f"use cc.clip"
                )
        before.append((high, index))
    return places


def _footprint(array: np.ndarray) -> tuple[Any, ...]:
    """The bytes that an array's elements take, in whatever order: the first one, and [distance, count] per axis."""
    axes = [[1, array.itemsize]]
    for distance, count in sorted((abs(stride), size) for size, stride in zip(array.shape, array.strides, strict=True)):
        if distance == axes[-1][0] * axes[-1][1]:
            axes[-1][1] *= count
        elif count > 1:
            axes.append([distance, count])
    return extent(array)[0], *map(tuple, axes)


def _overlaps_itself(array: np.ndarray) -> bool:
    """Whether some of an array's elements share memory, as those of broadcast arrays and sliding windows do."""
    if array.flags.forc:  # the usual case, quick for a thousand small tensors
        return False
    span, nested = array.itemsize, True
    for distance, count in sorted((abs(stride), size) for size, stride in zip(array.shape, array.strides, strict=True)):
        nested = nested and (count <= 1 or distance >= span)
        span += (count - 1) * distance
    if nested or array.size == 0:
        return False
    if array.nbytes > span:
        return True
    places = np.zeros(array.shape, np.int64)  # no axis steps over the others: each element is looked at
    for axis, (size, stride) in enumerate(zip(array.shape, array.strides, strict=True)):
        places += np.expand_dims(np.arange(size) * stride, tuple(range(1, array.ndim - axis)))
    return bool(np.diff(np.sort(places, axis=None)).min() < array.itemsize)
