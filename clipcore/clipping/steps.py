"""The steps of clipping by a norm apart, so that a trainer whose gradients are spread out can reduce norms in between.

norm = cc.norm(my_gradients)                 # on each rank
total = cc.combine(all_gathered_norms)       # a list of numbers, from wherever they are
clipped = cc.apply_scale(my_gradients, cc.scale_for(total, policy))
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from clipcore.clipping import kernels
from clipcore.clipping.call import Call
from clipcore.clipping.host import HostPrimitives
from clipcore.clipping.kernels import Wide
from clipcore.clipping.policies import ClipByGlobalNorm, Policy
from clipcore.errors import InvalidInput, InvalidPolicy, NonFinite
from clipcore.structure import rebuild


def norm(grads: Any, p: float = 2.0, *, backend: str | None = None) -> Any:
    """The joint p-norm of all tensors, within 1e-14 of the exact one.

    Args:
        grads, backend: as for `clip`.
        p: in [1, inf].
    Returns:
        A float where the tensors are in the CPU's memory, else a 0-d tensor: nothing waits for a device. 0 for no
        elements, NaN where an element is inf or NaN, inf where the norm leaves the range of float64.
    Raises:
        InvalidPolicy: p is outside [1, inf]. InvalidInput: as for `clip`.

    >>> import numpy as np
    >>> norm([np.array([3.0]), np.array([4.0])])
    5.0
    """
    policy = ClipByGlobalNorm(math.inf, p=p)
    call = Call.of(grads, policy, None, None, backend)
    arrays = call.owner.to_host(call.tensors)
    primitives: Any = call.owner.primitives() if arrays is None else HostPrimitives()
    _, measure = primitives.measure(call.tensors if arrays is None else arrays, policy.p)
    joint = primitives.join(measure)
    return primitives.report(joint, primitives.decide(joint, math.inf, "propagate")).norm


def combine(norms: Iterable[Any], p: float = 2.0) -> float:
    """The joint p-norm of parts from theirs, in any order; nothing overflows on the way.

    Args:
        norms: what `norm` gave of each part: numbers, or 0-d tensors, which are waited for.
        p: in [1, inf], as it was for them.
    Returns:
        A float; 0 for no parts, NaN where one is NaN.
    Raises:
        InvalidInput: a norm is negative. InvalidPolicy: p is outside [1, inf].

    >>> combine([3.0, 4.0])
    5.0
    """
    p = ClipByGlobalNorm(math.inf, p=p).p
    if not isinstance(norms, Iterable):
        raise InvalidInput(f"norms is {norms!r:.60}; expected the parts' norms, say [cc.norm(a), cc.norm(b)]")
    values = [_number(value, f"norms[{index}]") for index, value in enumerate(norms)]
    for index, value in enumerate(values):
        if value < 0:
            raise InvalidInput(f"norms[{index}] is {value!r}; expected a norm, which is at least 0")
    if any(map(math.isnan, values)) or math.inf in values:
        return math.nan if any(map(math.isnan, values)) else math.inf
    return float(kernels.join(Wide.of(np.array(values, np.float64)), p))


def scale_for(norm: Any, policy: Policy) -> float:
    """The factor that brings gradients of that joint norm to a policy's limit; 1.0 in range.

    Args:
        norm: a number, or a 0-d tensor, which is waited for; NaN stands for non-finite elements.
        policy: a ClipByGlobalNorm, since no other policy's factor follows from one norm.
    Returns:
        max_norm / norm where norm > max_norm, rounded once. For a NaN what the policy's `nonfinite` says: NaN for
        "propagate", 0.0 for "skip".
    Raises:
        NonFinite: the norm is NaN and the policy says "raise". InvalidPolicy: another policy.
        InvalidInput: the norm is NaN and the policy says "zero", which must happen before norms are taken; or negative.

    >>> import clipcore as cc
    >>> scale_for(5.0, cc.ClipByGlobalNorm(1.0)), scale_for(0.5, cc.ClipByGlobalNorm(1.0))
    (0.2, 1.0)
    """
    if not isinstance(policy, ClipByGlobalNorm):
        raise InvalidPolicy(f"policy is {policy!r}; expected a ClipByGlobalNorm, whose factor follows from one norm")
    value = _number(norm, "norm")
    if math.isnan(value):
        if policy.nonfinite == "raise":
            raise NonFinite("the norm is NaN: an element is inf or NaN, and the policy has nonfinite='raise'")
        if policy.nonfinite == "zero":
            raise InvalidInput("the norm is NaN, and nonfinite='zero' must act before norms are taken: use cc.clip")
        return math.nan if policy.nonfinite == "propagate" else 0.0
    if value < 0:
        raise InvalidInput(f"norm is {value!r}; expected a norm, which is at least 0")
    if value == math.inf and policy.max_norm < math.inf:
        raise InvalidInput(
            "norm is inf: it is beyond float64, and no factor follows from it; use cc.clip, or scale the gradients "
            "down before their norms are taken"
        )
    return policy.max_norm / value if value > policy.max_norm else 1.0


def _number(value: Any, place: str) -> float:
    """A number, or a 0-d tensor, as a float."""
    try:
        if isinstance(value, str | bytes):
            raise TypeError("it is text")
        return float(value)
    except (TypeError, ValueError) as err:
        raise InvalidInput(f"{place} is {value!r:.60}; expected a number, or a 0-d tensor") from err


def apply_scale(grads: Any, scale: Any, *, backend: str | None = None) -> Any:
    """Each tensor times one factor, by the multiply of `clip`: the same bits where the factor is the same.

    Args:
        grads, backend: as for `clip`; not modified.
        scale: a factor >= 0; 1 gives the tensors themselves, 0 zeros and NaN NaN, whatever they held. A number, or a
            0-d tensor, which is waited for.
    Returns:
        The same structure, shapes and dtypes.
    Raises:
        InvalidInput: as for `clip`; or the factor is negative or infinite.

    >>> import numpy as np
    >>> apply_scale([np.array([3.0, 4.0])], 0.2)
    [array([0.6, 0.8])]
    """
    factor = _number(scale, "scale")
    if factor < 0 or factor == math.inf:
        raise InvalidInput(f"scale is {factor!r}; expected a factor of at least 0, or NaN")
    call = Call.of(grads, ClipByGlobalNorm(math.inf), None, None, backend)
    if factor == 1:
        return grads
    arrays = call.owner.to_host(call.tensors)
    primitives: Any = call.owner.primitives() if arrays is None else HostPrimitives()
    tensors = call.tensors if arrays is None else arrays
    scaled = primitives.apply(tensors, primitives.uniform(factor, tensors))
    if arrays is not None:
        scaled = [call.owner.from_host(array, tensor) for array, tensor in zip(scaled, call.tensors, strict=True)]
    return rebuild(grads, iter(scaled))
