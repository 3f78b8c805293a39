"""Policies made of policies: one after the other, or each for some of the parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from clipcore.backend import NonFiniteMode
from clipcore.clipping.given import Given, Spec, State, learned
from clipcore.clipping.policies import Bounded, Policy, bound_parts, check_pattern, check_policy
from clipcore.clipping.report import ClipReport
from clipcore.errors import InvalidInput, InvalidPolicy


@dataclass(frozen=True)
class _Combined(Policy):
    """What policies made of policies have in common: they allow what all of their members allow."""

    # one non-finite element acts on every tensor of a call, so that the members must agree on it
    nonfinite: NonFiniteMode = field(init=False, default="propagate", kw_only=True)

    def __post_init__(self) -> None:
        name = type(self).__name__
        for member in self.members:
            check_policy(member)
        modes = list(dict.fromkeys(member.nonfinite for member in self.members))
        if not modes:
            raise InvalidPolicy(f"{name} holds no policy; expected at least one")
        if len(modes) > 1:
            raise InvalidPolicy(
                f"{name}: its policies have nonfinite {modes}; expected one and the same in all of them"
            )
        object.__setattr__(self, "nonfinite", modes[0])

    @property
    def complex_allowed(self) -> bool:  # type: ignore[override]
        return all(member.complex_allowed for member in self.members)

    @property
    def infinities_allowed(self) -> bool:  # type: ignore[override]
        return self.members[0].infinities_allowed

    @property
    def refuses_attach(self) -> str:  # type: ignore[override]
        return next((member.refuses_attach for member in self.members if member.refuses_attach), "")

    @property
    def asks(self) -> bool:  # type: ignore[override]
        return any(member.asks for member in self.members)

    @property
    def stateful(self) -> bool:  # type: ignore[override]
        return any(member.stateful for member in self.members)

    @property
    def dense(self) -> bool:  # type: ignore[override]
        return any(member.dense for member in self.members)

    @property
    def keeps_shapes(self) -> bool:  # type: ignore[override]
        return all(member.keeps_shapes for member in self.members)


@dataclass(frozen=True)
class Chain(_Combined):
    """Several policies, one after the other: each bounds what the one before it left.

    Args:
        policies: at least one, all with the same `nonfinite`, which is the chain's. Of the report, `norm` and
            `nonfinite` are the first policy's, `limit` the last one's, `norms` and `scales` one per policy, and `scale`
            their product.
    Raises:
        InvalidPolicy: there is none, or their `nonfinite` differ.

    >>> import numpy as np
    >>> import clipcore as cc
    >>> chain = Chain([cc.ClipByValue(8.0), cc.ClipByGlobalNorm(5.0)])
    >>> cc.clip(np.array([6.0, 100.0]), chain)[0]
    array([3., 4.])
    """

    policies: Sequence[Policy]

    def __post_init__(self) -> None:
        if not isinstance(self.policies, list | tuple):
            raise InvalidPolicy(f"Chain: policies is {self.policies!r:.60}; expected a list of policies")
        object.__setattr__(self, "policies", tuple(self.policies))
        super().__post_init__()

    @property
    def members(self) -> tuple[Policy, ...]:  # type: ignore[override]
        return tuple(self.policies)

    def start(self, specs: Sequence[Spec | None]) -> State:
        return {str(place): policy.start(specs) for place, policy in enumerate(self.policies)}

    def bound(self, given: Given, state: State) -> Bounded:
        reports: list[ClipReport] = []
        new: dict[str, State] = {}
        for place, policy in enumerate(self.policies):
            tensors, new[str(place)], report = policy.bound(given, state[str(place)])
            given = given.holding(tensors)
            reports.append(report)
        joined = reports[0]
        for report in reports[1:]:
            joined = joined._replace(
                nonfinite=_first(joined.nonfinite, report.nonfinite, given.primitives),
                scale=joined.scale * report.scale,
                clipped=joined.clipped | report.clipped,
                limit=report.limit,
            )
        # a step that one policy voided is all zeros to the next, which must not learn from them
        new_state = learned(given, self.nonfinite, sum(report.nonfinite for report in reports), state, new)
        norms, scales = (tuple(getattr(report, name) for report in reports) for name in ("norm", "scale"))
        return list(given.tensors), new_state, joined._replace(norms=norms, scales=scales)


def _first(faults: Any, later: Any, primitives: Any) -> Any:
    """What the first policy counts; where it finds none, what the next does, to which infinities may be faults."""
    return later if isinstance(faults, int) and not faults else primitives.arithmetic.where(faults > 0, faults, later)


@dataclass(frozen=True, eq=True)
class PerGroup(_Combined):
    """A policy for each group of parameters, chosen by name.

    Args:
        policies: regular expressions on parameters' names to policies; the first that is found in a name decides. All
            have the same `nonfinite`. In the report, `norms` and `scales` are one per group, in order.
        default: for parameters that no pattern is found in; left out, these are left as they are.
    Raises:
        InvalidPolicy: a pattern is no regular expression, or `nonfinite` differs. InvalidInput: at the call, the
            parameters have no names (pass `model=`, or a dict by name), or a pattern is found in none of them.

    >>> import numpy as np
    >>> import clipcore as cc
    >>> policy = PerGroup({"bias$": cc.ClipByValue(0.5)}, default=cc.ClipByGlobalNorm(1.0))
    >>> cc.clip({"a.weight": np.array([3.0, 4.0]), "a.bias": np.array([7.0])}, policy)[0]
    {'a.weight': array([0.6, 0.8]), 'a.bias': array([0.5])}
    """

    asks: ClassVar[bool] = True

    policies: Mapping[str, Policy]
    default: Policy | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.policies, Mapping):
            raise InvalidPolicy(
                f"PerGroup: policies is {self.policies!r:.60}; expected a dict of regular expressions to policies"
            )
        object.__setattr__(self, "policies", dict(self.policies))
        for pattern in self.policies:
            check_pattern(self, "policies", pattern)
        super().__post_init__()
        if not self.keeps_shapes and (self.default is None or any(member.keeps_shapes for member in self.members)):
            raise InvalidPolicy(
                "PerGroup: some of its policies sum over examples, and some tensors would keep theirs; expected all "
                "policies to, the default too"
            )

    def __hash__(self) -> int:
        return hash((tuple(self.policies.items()), self.default))

    @property
    def members(self) -> tuple[Policy, ...]:  # type: ignore[override]
        return (*self.policies.values(), *(() if self.default is None else (self.default,)))

    def start(self, specs: Sequence[Spec | None]) -> State:
        names = [spec.name for spec in specs if spec is not None]
        if None in names:
            raise InvalidInput(
                "PerGroup chooses parameters by name, and these have none: pass model=, or gradients as a dict by name"
            )
        groups = self._groups([spec.name if spec else None for spec in specs])
        for pattern, group in zip(self.policies, groups, strict=False):
            if not group:
                raise InvalidInput(
                    f"PerGroup: the pattern {pattern!r} is found in none of the names: {', '.join(map(repr, names))}"
                )
        return {
            str(place): member.start([spec if index in group else None for index, spec in enumerate(specs)])
            for place, (member, group) in enumerate(zip(self.members, map(set, groups), strict=True))
        }

    def bound(self, given: Given, state: State) -> Bounded:
        new = dict(state)

        def bounding(place: int) -> Any:
            def bound(part: Given) -> tuple[list[Any], ClipReport]:
                tensors, new[str(place)], report = self.members[place].bound(part, state[str(place)])
                return tensors, report

            return bound

        groups = self._groups([given.name(index) for index in range(len(given))])
        parts = [(group, bounding(place)) for place, group in enumerate(groups)]
        bounded, report = bound_parts(given, parts, self.nonfinite)
        return bounded, learned(given, self.nonfinite, report.nonfinite, state, new), report

    def _groups(self, names: Sequence[str | None]) -> list[list[int]]:
        """The places of each member's parameters, in the order of the members."""
        groups: list[list[int]] = [[] for _ in self.members]
        patterns = list(enumerate(self.policies))
        others = len(patterns) if self.default is not None else None
        for index, name in enumerate(names):
            place = next((place for place, p in patterns if name is not None and re.search(p, name)), others)
            if place is not None:
                groups[place].append(index)
        return groups
