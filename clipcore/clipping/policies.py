"""The policies that users write: frozen values, each bounding gradients by measure, decide, apply.

Here are the base of them all and those without state; `adaptive` has those that learn from the norms that they see,
`examples` those for gradients per example, `limits` those for weights, and `combine` those made of others.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, ClassVar, get_args

from clipcore.backend import NonFiniteMode
from clipcore.clipping.given import Given, Spec, State
from clipcore.clipping.report import ClipReport
from clipcore.errors import InvalidInput, InvalidPolicy

_POLICIES: dict[str, type[Policy]] = {}

Bounded = tuple[list[Any], State, ClipReport]


@dataclass(frozen=True)
class Policy:
    """The base of all policies: a frozen value that says how gradients are bounded.

    A policy is pure. What an adaptive one has learned is a state, that `init` makes and `update` takes and returns:

        state = policy.init(grads)
        clipped, state, report = policy.update(grads, state)

    `Clipper` holds the state for you, and `attach` does so inside a training loop.

    Attributes:
        nonfinite: what happens when an element is inf or NaN, before anything else. "propagate": every element of
            every tensor in the call comes out NaN; "raise": NonFinite, and nothing is changed (eager only); "zero":
            those elements become 0 first; "skip": everything comes out 0, and an attached optimizer does not step.
    """

    complex_allowed: ClassVar[bool] = True
    infinities_allowed: ClassVar[bool] = False  # NaN alone is non-finite to the policy
    refuses_attach: ClassVar[str] = ""  # why it cannot act on an optimizer's gradients
    keeps_shapes: ClassVar[bool] = True  # whether what comes out has the shape of what went in
    stateful: ClassVar[bool] = False  # whether it learns from step to step
    dense: ClassVar[bool] = False  # whether it compares elements or units, and sparse tensors are made dense for it
    asks: ClassVar[bool] = False  # whether it asks for weights, names or layouts
    members: ClassVar[tuple[Policy, ...]] = ()  # the policies that it is made of

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

    def init(self, grads: Any, params: Any = None, *, model: Any = None, backend: str | None = None) -> State:
        """The state before the first step: NumPy arrays by name, none for a policy that learns nothing.

        Args:
            grads: as for `clip`, of the shapes that will be clipped; their values do not matter.
            params, model, backend: as for `clip`.
        """
        from clipcore.clipping import api  # it is written over policies

        return api.init(self, grads, params, model=model, backend=backend)

    def update(
        self, grads: Any, state: State, params: Any = None, *, model: Any = None, backend: str | None = None
    ) -> tuple[Any, State, ClipReport]:
        """Bound gradients: (clipped, the state after this step, the report). Neither `grads` nor `state` is changed.

        A step with non-finite elements leaves the state as it is, unless they count as 0.
        Args:
            grads, params, model, backend: as for `clip`.
            state: what `init` or the step before gave.
        Raises:
            InvalidInput: as for `clip`; also the state of another policy, or of tensors of other shapes.
        """
        from clipcore.clipping import api

        return api.update(self, grads, state, params, model=model, backend=backend)

    def start(self, specs: Sequence[Spec | None]) -> State:
        """The state before the first step, for tensors of these shapes; None stands for tensors of no concern."""
        return {}

    def bound(self, given: Given, state: State) -> Bounded:
        """Bound a flat list of floating tensors; the tensors that are in range come back as they are."""
        raise NotImplementedError

    def to_config(self) -> dict[str, Any]:
        """The policy as plain values, for a file; `policy_from_config` reads it."""
        values = {field.name: _to_plain(getattr(self, field.name)) for field in fields(self) if field.init}
        return {"policy": type(self).__name__, **values}


def _to_plain(value: Any) -> Any:
    if isinstance(value, Policy):
        return value.to_config()
    if isinstance(value, tuple | list):
        return [_to_plain(item) for item in value]
    return {key: _to_plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _from_plain(value: Any) -> Any:
    if isinstance(value, dict):
        return policy_from_config(value) if "policy" in value else {k: _from_plain(v) for k, v in value.items()}
    return tuple(map(_from_plain, value)) if isinstance(value, list | tuple) else value


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
        return _POLICIES[name](**{key: _from_plain(value) for key, value in arguments.items()})
    except TypeError as err:
        raise InvalidPolicy(f"policy {name!r}: {err}") from err


def check_policy(policy: Any) -> None:
    """Refuse what is no policy with InvalidPolicy."""
    if not isinstance(policy, Policy) or type(policy) is Policy:
        raise InvalidPolicy(
            f"policy is {policy!r} of type {type(policy).__name__}; expected a policy, say ClipByGlobalNorm(1.0)"
        )


def check_number(policy: Policy, name: str, low: float, high: float = math.inf) -> None:
    """Make a field of a policy a float, and refuse what is no number in [low, high] with InvalidPolicy."""
    value = getattr(policy, name)
    try:
        number = math.nan if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high:
        raise InvalidPolicy(f"{type(policy).__name__}: {name} is {value!r}; expected a number in [{low:g}, {high:g}]")
    object.__setattr__(policy, name, number)


def check_count(policy: Policy, name: str, low: int) -> None:
    """Refuse a field of a policy that is no integer of at least `low` with InvalidPolicy."""
    value = getattr(policy, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise InvalidPolicy(f"{type(policy).__name__}: {name} is {value!r}; expected an integer of at least {low}")


def check_axis(policy: Policy) -> None:
    """Refuse a `unit_axis` that is neither an integer nor None with InvalidPolicy."""
    axis = getattr(policy, "unit_axis", None)
    if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int)):
        raise InvalidPolicy(f"{type(policy).__name__}: unit_axis is {axis!r}; expected an integer, or None")


def check_pattern(policy: Policy, name: str, pattern: Any) -> None:
    """Refuse what is no regular expression with InvalidPolicy."""
    try:
        if not isinstance(pattern, str):
            raise TypeError(f"it is of type {type(pattern).__name__}")
        re.compile(pattern)
    except (re.error, TypeError) as err:
        raise InvalidPolicy(
            f"{type(policy).__name__}: {name} has {pattern!r}, which is no regular expression: {err}"
        ) from err


def hold(
    given: Given, nonfinite: NonFiniteMode, limits: Any, p: float = 2.0, *, joint: bool = False
) -> tuple[list[Any], ClipReport]:
    """Each tensor, or all of them together, held to a limit on its p-norm."""
    primitives = given.primitives
    tensors, measure = primitives.measure(given.tensors, p, zero_nonfinite=nonfinite == "zero")
    measure = primitives.join(measure) if joint else measure
    scale = primitives.decide(measure, limits, nonfinite)
    return primitives.apply(tensors, scale), primitives.report(measure, scale)


@dataclass(frozen=True)
class _NormPolicy(Policy):
    """What policies have in common that hold groups of tensors to one p-norm."""

    max_norm: float
    _: KW_ONLY
    p: float = 2.0

    joint: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "max_norm", 0.0)
        object.__setattr__(self, "max_norm", abs(self.max_norm))  # -0.0 would give negative zeros
        check_number(self, "p", 1.0)

    def bound(self, given: Given, state: State) -> Bounded:
        bounded, report = hold(given, self.nonfinite, self.max_norm, self.p, joint=self.joint)
        return bounded, state, report


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

    @property
    def dense(self) -> bool:  # type: ignore[override]
        # what a sparse tensor does not hold is 0, and in range only where 0 is
        assert self.max_value is not None
        return not self.min_value <= 0 <= self.max_value

    min_value: float
    max_value: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_value is None:
            check_number(self, "min_value", 0.0)
            object.__setattr__(self, "max_value", self.min_value)
            object.__setattr__(self, "min_value", -self.min_value)
        check_number(self, "min_value", -math.inf)
        check_number(self, "max_value", self.min_value)

    def bound(self, given: Given, state: State) -> Bounded:
        assert self.max_value is not None
        primitives = given.primitives
        tensors, faults = primitives.screen(given.tensors, self.nonfinite, nan_alone=True)
        report = primitives.summary(tensors, faults, self.nonfinite)  # before: clamping may be in place
        clamped, changed = primitives.clamp(tensors, self.min_value, self.max_value)
        report = report._replace(clipped=report.clipped | changed)
        return primitives.overrule(clamped, faults, self.nonfinite), state, report


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

    joint: ClassVar[bool] = True


@dataclass(frozen=True)
class ClipByAverageNorm(Policy):
    """Shrink each tensor on its own so that its L2 norm per element is at most `max_norm`.

    Per tensor of N elements: g * max_norm * N / ||g||_2 where ||g||_2 > max_norm * N, else g itself.

    Args:
        max_norm: >= 0, in the unit of the gradients; inf changes nothing, 0 gives zeros.
        nonfinite: see Policy.
    Raises:
        InvalidPolicy: max_norm is negative or NaN.
    Source: the definition of tf.clip_by_average_norm in TensorFlow 1.

    >>> import numpy as np
    >>> import clipcore as cc
    >>> cc.clip([np.array([3.0, 4.0]), np.array([0.5])], ClipByAverageNorm(1.25))[0]
    [array([1.5, 2. ]), array([0.5])]
    """

    max_norm: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "max_norm", 0.0)

    def bound(self, given: Given, state: State) -> Bounded:
        bounded, report = hold(given, self.nonfinite, [self.max_norm * n if n else 0.0 for n in given.sizes])
        return bounded, state, report


@dataclass(frozen=True)
class ClipByBlockRMS(Policy):
    """Shrink each tensor on its own so that the root mean square of its elements is at most `threshold`.

    Per tensor: g / max(1, rms(g) / threshold), rms(g) = ||g||_2 / sqrt(N) over its N elements.

    Args:
        threshold: >= 0, in the unit of the gradients; inf changes nothing, 0 gives zeros.
        nonfinite: see Policy.
    Raises:
        InvalidPolicy: threshold is negative or NaN.
    Source: Shazeer and Stern 2018, arXiv:1804.04235, section 6, "update clipping".

    >>> import numpy as np
    >>> import clipcore as cc
    >>> cc.clip([np.array([3.0, -3.0]), np.array([0.5])], ClipByBlockRMS(1.5))[0]
    [array([ 1.5, -1.5]), array([0.5])]
    """

    threshold: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "threshold", 0.0)

    def bound(self, given: Given, state: State) -> Bounded:
        limits = {n: _times_root(self.threshold, n) for n in dict.fromkeys(given.sizes)}
        bounded, report = hold(given, self.nonfinite, [limits[n] for n in given.sizes])
        return bounded, state, report


def _times_root(threshold: float, count: int) -> float:
    """`threshold` * sqrt(count), rounded once, so that equal elements at the threshold are in range."""
    if math.isinf(threshold) or not threshold or not count:
        return threshold
    mantissa, exponent = math.frexp(threshold)
    spare = 64
    square = int(math.ldexp(mantissa, 53)) ** 2 * count << 2 * spare
    root = math.isqrt(square)
    # one more bit, set where the root is inexact, so that rounding sees which side of a tie it is on
    whole = float(2 * root + (root * root != square))
    scale = exponent - 53 - spare - 1
    return math.ldexp(whole, scale) if math.frexp(whole)[1] + scale <= sys.float_info.max_exp else math.inf


@dataclass(frozen=True)
class AdaptiveClip(Policy):
    """AGC: shrink the gradient of each unit of a layer relative to the norm of the unit's weights.

    Per unit: g * limit / ||g||_2 where ||g||_2 > limit = clipping * max(||w||_2, eps), else g itself. A unit is what
    feeds one output of a linear or convolution layer, wherever the framework's layout has it, so that every framework
    gives the same for the same layer; an embedding's units are its rows. Biases, scales and other tensors of one axis
    are one unit each.

    Args:
        clipping: >= 0, the largest norm of a gradient in units of the weights' norm.
        eps: > 0, what the weights' norm counts as where it is smaller, in the unit of the weights.
        unit_axis: the axis of tensors of several axes that runs over their units, where no layout says it; left out,
            it follows from the layers of `model=`, which the call then needs.
        exclude: regular expressions; a parameter whose name one of them is found in is left as it is (the last layer,
            say). Needs names: `model=`, or a dict of gradients by name.
        nonfinite: see Policy.
    Raises:
        InvalidPolicy: an argument is out of range. InvalidInput: at the call, params, a layout or a name is missing.
    Source: Brock et al. 2021, arXiv:2102.06171, section 4.1.

    >>> import numpy as np
    >>> import clipcore as cc
    >>> grads, params = np.array([[3.0, 4.0], [0.0, 0.1]]), np.array([[6.0, 8.0], [1.0, 0.0]])
    >>> cc.clip(grads, AdaptiveClip(0.25, unit_axis=0), params=params)[0]
    array([[1.5, 2. ],
           [0. , 0.1]])
    """

    dense: ClassVar[bool] = True
    asks: ClassVar[bool] = True

    clipping: float = 0.01
    _: KW_ONLY
    eps: float = 1e-3
    unit_axis: int | None = None
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "clipping", 0.0)
        check_number(self, "eps", math.ulp(0.0), sys.float_info.max)
        check_axis(self)
        if not isinstance(self.exclude, str | list | tuple):
            raise InvalidPolicy(
                f"AdaptiveClip: exclude is {self.exclude!r}; expected regular expressions, say ['head']"
            )
        object.__setattr__(self, "exclude", (self.exclude,) if isinstance(self.exclude, str) else tuple(self.exclude))
        for pattern in self.exclude:
            check_pattern(self, "exclude", pattern)

    def bound(self, given: Given, state: State) -> Bounded:
        if given.params is None:
            raise InvalidInput("AdaptiveClip compares gradients with weights: pass params=, or model= for both")
        kept = [i for i in range(len(given)) if not any(re.search(p, given.name(i)) for p in self.exclude)]
        if len(kept) == len(given):
            bounded, report = self._bound_units(given)
        else:
            bounded, report = bound_parts(given, [(kept, self._bound_units)], self.nonfinite)
        return bounded, state, report

    def _bound_units(self, given: Given) -> tuple[list[Any], ClipReport]:
        primitives, arithmetic = given.primitives, given.primitives.arithmetic
        axes = given.unit_axes(self.unit_axis, "AdaptiveClip")
        tensors, measure = primitives.measure(given.tensors, 2.0, axes, zero_nonfinite=self.nonfinite == "zero")
        _, weights = primitives.measure(given.params or [], 2.0, axes)
        norms = primitives.norms(weights, against=(measure, self.clipping))
        limits = arithmetic.maximum(norms, self.eps) * self.clipping
        scale = primitives.decide(measure, limits, self.nonfinite)
        return primitives.apply(tensors, scale), primitives.report(measure, scale)


def bound_parts(
    given: Given,
    parts: Sequence[tuple[Sequence[int], Any]],
    nonfinite: NonFiniteMode,
) -> tuple[list[Any], ClipReport]:
    """Parts of the tensors bounded each in its way, the others left as they are; a non-finite element acts on all.

    Args:
        parts: the places of each part's tensors, and what bounds a `Given` of them: (tensors, report).
    """
    primitives = given.primitives
    bounded = list(given.tensors)
    reports = []
    rest = sorted(set(range(len(given))) - {index for indices, _ in parts for index in indices})
    for indices, bound in [*parts, (rest, lambda part: _left_alone(part, nonfinite))]:
        if not indices:
            continue
        results, report = bound(given.pick(indices))
        reports.append(report)
        for index, result in zip(indices, results, strict=True):
            bounded[index] = result
    report = join_reports(reports, primitives.arithmetic)
    return primitives.overrule(bounded, report.nonfinite, nonfinite), report


def _left_alone(given: Given, nonfinite: NonFiniteMode) -> tuple[list[Any], ClipReport]:
    return hold(given, nonfinite, math.inf, joint=True)


def join_reports(reports: Sequence[ClipReport], arithmetic: Any) -> ClipReport:
    """One report on parts of a call: the joint norm, the smallest factor and limit; norms and factors part by part."""
    if not reports:
        return ClipReport(0.0, 1.0, False, 0)
    joined, *others = reports
    for other in others:
        joined = ClipReport(
            norm=arithmetic.hypot(joined.norm, other.norm),
            scale=arithmetic.minimum(joined.scale, other.scale),
            clipped=joined.clipped | other.clipped,
            nonfinite=joined.nonfinite + other.nonfinite,
            limit=arithmetic.minimum(joined.limit, other.limit),
        )
    return joined._replace(norms=tuple(r.norm for r in reports), scales=tuple(r.scale for r in reports))
