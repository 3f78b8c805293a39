"""The policies that users write: frozen values, each bounding gradients by measure, decide, apply."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any, ClassVar, get_args

from clipcore.backend import NonFiniteMode, Primitives
from clipcore.clipping.report import ClipReport
from clipcore.errors import InvalidPolicy

_POLICIES: dict[str, type[Policy]] = {}


@dataclass(frozen=True)
class Policy:
    """The base of all policies: a frozen value that says how gradients are bounded.

    Attributes:
        nonfinite: what happens when an element is inf or NaN, before anything else. "propagate": every element of
            every tensor in the call comes out NaN; "raise": NonFinite, and nothing is changed (eager only); "zero":
            those elements become 0 first; "skip": everything comes out 0, and an attached optimizer does not step.
    """

    complex_allowed: ClassVar[bool] = True
    infinities_allowed: ClassVar[bool] = False  # NaN alone is non-finite to the policy

    _: KW_ONLY
    nonfinite: NonFiniteMode = "propagate"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__name__.startswith("_"):
            _POLICIES[cls.__name__] = cls

    def __post_init__(self) -> None:
        if not isinstance(self.nonfinite, str) or self.nonfinite not in get_args(NonFiniteMode):
            raise InvalidPolicy(
                f"{type(self).__name__}: nonfinite is {self.nonfinite!r}; expected one of {get_args(NonFiniteMode)}"
            )

    def bound(self, tensors: Sequence[Any], primitives: Primitives) -> tuple[list[Any], ClipReport]:
        """Bound a flat list of floating tensors; the tensors that are in range come back as they are."""
        raise NotImplementedError

    def to_config(self) -> dict[str, Any]:
        """The policy as plain values, for a file; `policy_from_config` reads it."""
        return {"policy": type(self).__name__, **asdict(self)}


def policy_from_config(config: dict[str, Any]) -> Policy:
    """The policy that `Policy.to_config` wrote.

    Raises:
        InvalidPolicy: the name is of no known policy, or the arguments are not its own.
    """
    arguments = dict(config)
    name = arguments.pop("policy", None)
    if not isinstance(name, str) or name not in _POLICIES:
        raise InvalidPolicy(f"policy {name!r} is unknown; expected one of {sorted(_POLICIES)}")
    try:
        return _POLICIES[name](**arguments)
    except TypeError as err:
        raise InvalidPolicy(f"policy {name!r}: {err}") from err


def check_policy(policy: Any) -> None:
    """Refuse what is no policy with InvalidPolicy."""
    if not isinstance(policy, Policy) or type(policy) is Policy:
        raise InvalidPolicy(
            f"policy is {policy!r} of type {type(policy).__name__}; expected a policy, say ClipByGlobalNorm(1.0)"
        )


def _check_number(policy: Policy, name: str, low: float, high: float = math.inf) -> None:
    value = getattr(policy, name)
    try:
        number = math.nan if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high:
        raise InvalidPolicy(f"{type(policy).__name__}: {name} is {value!r}; expected a number in [{low:g}, {high:g}]")
    object.__setattr__(policy, name, number)


@dataclass(frozen=True)
class _NormPolicy(Policy):
    """What policies have in common that hold groups of tensors to a p-norm."""

    max_norm: float
    _: KW_ONLY
    p: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number(self, "max_norm", 0.0)
        object.__setattr__(self, "max_norm", abs(self.max_norm))  # -0.0 would give negative zeros
        _check_number(self, "p", 1.0)


def _bound_groups(
    policy: _NormPolicy, groups: Sequence[Sequence[Any]], primitives: Primitives
) -> tuple[list[list[Any]], ClipReport]:
    """Each group of tensors held to the policy's norm by a factor of its own."""
    if not groups:
        return [], ClipReport(norm=0.0, scale=1.0, clipped=False, nonfinite=0)
    zero = policy.nonfinite == "zero"
    measured = [primitives.measure(group, policy.p, zero_nonfinite=zero) for group in groups]
    scales, report = primitives.decide([measure for _, measure in measured], policy.max_norm, policy.nonfinite)
    bounded = [primitives.apply(group, scale) for (group, _), scale in zip(measured, scales, strict=True)]
    return bounded, report


@dataclass(frozen=True)
class ClipByValue(Policy):
    """Bound every element: min(max(g, min_value), max_value).

    A bound is rounded to the tensor's dtype; a finite one beyond the dtype's range becomes its largest number.
    Infinities are clipped to the bounds; only NaN is non-finite here. Complex tensors are refused.

    Args:
        min_value: in the unit of the gradients. Alone it is symmetric: ClipByValue(0.5) bounds to [-0.5, 0.5].
        max_value: >= min_value.
        nonfinite: see Policy.
    Raises:
        InvalidPolicy: the range is empty, or a bound is NaN.

    >>> import numpy as np
    >>> import clipcore as cc
    >>> cc.clip(np.array([-3.0, 0.2, 7.0]), ClipByValue(0.5))[0]
    array([-0.5,  0.2,  0.5])
    """

    complex_allowed: ClassVar[bool] = False
    infinities_allowed: ClassVar[bool] = True

    min_value: float
    max_value: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_value is None:
            _check_number(self, "min_value", 0.0)
            object.__setattr__(self, "max_value", self.min_value)
            object.__setattr__(self, "min_value", -self.min_value)
        _check_number(self, "min_value", -math.inf)
        _check_number(self, "max_value", self.min_value)

    def bound(self, tensors: Sequence[Any], primitives: Primitives) -> tuple[list[Any], ClipReport]:
        assert self.max_value is not None
        return primitives.clamp(tensors, self.min_value, self.max_value, self.nonfinite)


@dataclass(frozen=True)
class ClipByNorm(_NormPolicy):
    """Shrink each tensor on its own so that its p-norm is at most `max_norm`.

    Per tensor: g * max_norm / ||g||_p where ||g||_p > max_norm, else g itself. A tensor of zeros, or of no elements,
    is in range.

    Args:
        max_norm: >= 0, in the unit of the gradients; inf changes nothing, 0 gives zeros.
        p: in [1, inf].
        nonfinite: see Policy. One non-finite element acts on every tensor of the call.
    Raises:
        InvalidPolicy: max_norm is negative or NaN, or p is outside [1, inf].

    >>> import numpy as np
    >>> import clipcore as cc
    >>> cc.clip([np.array([3.0, 4.0]), np.array([0.5])], ClipByNorm(1.0))[0]
    [array([0.6, 0.8]), array([0.5])]
    """

    def bound(self, tensors: Sequence[Any], primitives: Primitives) -> tuple[list[Any], ClipReport]:
        bounded, report = _bound_groups(self, [[tensor] for tensor in tensors], primitives)
        return [tensor for group in bounded for tensor in group], report


@dataclass(frozen=True)
class ClipByGlobalNorm(_NormPolicy):
    """Shrink all tensors together so that their joint p-norm is at most `max_norm`.

    All: g * max_norm / norm where norm = (sum of |g|**p over every element of every tensor)**(1/p) > max_norm, else
    the tensors themselves.

    Args:
        max_norm: >= 0, in the unit of the gradients; inf changes nothing, 0 gives zeros.
        p: in [1, inf].
        nonfinite: see Policy.
    Raises:
        InvalidPolicy: max_norm is negative or NaN, or p is outside [1, inf].
    Source: Pascanu et al. 2013, arXiv:1211.5063.

    >>> import numpy as np
    >>> import clipcore as cc
    >>> clipped, report = cc.clip([np.array([3.0]), np.array([4.0])], ClipByGlobalNorm(1.0))
    >>> clipped, report.norm, report.scale
    ([array([0.6]), array([0.8])], 5.0, 0.2)
    """

    def bound(self, tensors: Sequence[Any], primitives: Primitives) -> tuple[list[Any], ClipReport]:
        bounded, report = _bound_groups(self, [tensors], primitives)
        return bounded[0], report
