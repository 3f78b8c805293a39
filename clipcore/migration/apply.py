"""Applying a plan: every tensor is checked before the first write, and on any later error the target is put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from clipcore.backend import Tensor
from clipcore.clipping.api import clip
from clipcore.clipping.policies import ClipByNorm, Policy
from clipcore.clipping.report import ClipReport
from clipcore.errors import InvalidInput, InvalidPolicy, MappingError, MigrationError
from clipcore.mapping.find import plan as find_plan
from clipcore.mapping.lockstep import numpy_dtype
from clipcore.mapping.models import Side
from clipcore.mapping.plan import Plan, Row
from clipcore.migration.limits import Delta, Limit
from clipcore.structure import plain

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class MigratedTensor:
    """What happened to one tensor of the target.

    Attributes:
        target, source: its name, and its origin's ("" where it was filled).
        norm: L2 norm of what was limited: of the source's tensor, or of source minus target; NaN without a limit.
        scale: the factor that the limit applied to it; 1 where it did not.
        clipped: whether the limit changed it.
    """

    target: str
    source: str
    norm: float
    scale: float
    clipped: bool


@dataclass(frozen=True)
class MigrationResult:
    """What `migrate` did.

    Attributes:
        plan: the plan that was applied, with the limited tensors in it, so that `verify(..., plan=result.plan)`
            compares against the source as limited.
        report: what the limit reported over all trainable tensors; None without a limit.
        tensors: one entry per tensor of the target.
    """

    plan: Plan
    report: ClipReport | None
    tensors: tuple[MigratedTensor, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values, for JSON: NaN and infinities are None."""
        result: dict[str, Any] = plain(
            {
                "plan": self.plan.to_dict(),
                "report": self.report._asdict() if self.report else None,
                "tensors": [asdict(tensor) for tensor in self.tensors],
            }
        )
        return result


def migrate(
    source: Any,
    target: Any,
    plan: Plan | None = None,
    *,
    sample: Any = None,
    limit: Limit | None = None,
    target_sample: Any = None,
) -> MigrationResult:
    """Copy the source's weights and running statistics into the target: all of them, or none.

    The source is never written. Every tensor is checked before the first write; on any later error the target is put
    back bitwise, at the cost of one copy of its tensors.

    Args:
        source, target: models of any installed backends.
        plan: where each tensor comes from; left out, it is found on `sample`.
        sample, target_sample: see `plan`.
        limit: bounds the trainable tensors that move: a policy acts on the source's weights, `Delta(policy)` on their
            difference to the target's. Running statistics are never limited.
    Returns:
        A MigrationResult.
    Raises:
        InvalidInput: neither plan nor sample; or a source tensor holds NaN or inf.
        MappingError: the plan does not fit the models, or none is found.
        MigrationError: a tensor's shape or dtype does not fit, or a write failed. The target is as it was before.
    """
    if plan is None:
        if sample is None:
            raise InvalidInput("migrate needs a plan or a sample: migrate(source, target, plan=…) or (…, sample=x)")
        plan = find_plan(source, target, sample, target_sample=target_sample)
    ours, theirs = Side(source, "source"), Side(target, "target")
    check_fits(plan, ours, theirs)
    weights = _finite_weights(plan, ours)
    current = theirs.backend.read(theirs.model, [row.target for row in plan.rows])
    limited, report, tensors = _limited(plan, weights, current, theirs.tensors, limit)
    values = target_values(plan, theirs, {**weights, **limited})
    _write_all_or_nothing(theirs, values)
    return MigrationResult(replace(plan, limited=limited), report, tensors)


def check_fits(plan: Plan, ours: Side, theirs: Side) -> None:
    """Refuse what is no plan, and a plan that was made for other models."""
    if not isinstance(plan, Plan):
        raise InvalidInput(
            f"plan is {plan!r:.60} of type {type(plan).__name__}; expected a Plan (cc.plan, cc.Plan.load); "
            f"a sample goes as sample="
        )
    for side, name in ((ours, plan.source), (theirs, plan.target)):
        if side.backend.name != name:
            raise MappingError(
                f"the plan's {side.which} is a model of {name!r}, and this one is of {side.backend.name!r}; "
                f"make a plan for these models"
            )
    targets = [row.target for row in plan.rows]
    for name, tensor in theirs.tensors.items():
        if targets.count(name) != 1 and not (name not in targets and tensor.role == "batch_count"):
            raise MappingError(
                f"the plan has {targets.count(name)} rows for the target's {name!r}; expected one: make it anew"
            )
    for row in plan.rows:
        for side, wanted in ((ours, row.sources), (theirs, (row.target,))):
            for name in wanted:
                if name not in side.tensors:
                    raise MappingError(f"the plan names {name!r}, which the {side.which} does not have; make it anew")


def _finite_weights(plan: Plan, ours: Side) -> dict[str, Array]:
    names = dict.fromkeys(name for row in plan.rows for name in row.sources)
    weights = ours.backend.read(ours.model, list(names))
    for name, array in weights.items():
        if array.dtype.kind not in "biu" and not np.isfinite(array).all():
            faults = int(np.count_nonzero(~np.isfinite(array)))
            raise InvalidInput(
                f"the source's tensor {name!r} holds {faults} elements that are NaN or inf (of {array.size}); "
                f"nothing was written: mend the source first"
            )
    return weights


def _limited(
    plan: Plan,
    weights: Mapping[str, Array],
    current: Mapping[str, Array],
    tensors: Mapping[str, Tensor],
    limit: Limit | None,
) -> tuple[dict[str, Array], ClipReport | None, tuple[MigratedTensor, ...]]:
    """The source's tensors that a limit changes, its report, and what became of each tensor of the target."""
    moving = [row for row in plan.rows if row.sources and tensors[row.target].trainable]
    if limit is None:
        return {}, None, _entries(plan, {}, {}, None)
    if not isinstance(limit, Policy | Delta):
        raise InvalidPolicy(f"limit is {limit!r}; expected a policy, say ClipByNorm(1.0), or Delta(policy)")
    # a tensor that moves to several places is limited once
    rows = list({row.sources: row for row in moving}.values())
    if isinstance(limit, Delta):
        before = [row.carry_back(current[row.target]).astype(np.float64) for row in rows]
        updates = [weights[row.sources[0]].astype(np.float64) - old for row, old in zip(rows, before, strict=True)]
        bounded, report = clip(updates, limit.policy)
        results = [
            weights[row.sources[0]] if new is update else (old + new).astype(weights[row.sources[0]].dtype)
            for row, old, update, new in zip(rows, before, updates, bounded, strict=True)
        ]
    else:
        updates = [weights[row.sources[0]] for row in rows]
        results, report = clip(updates, limit)
    names = [row.sources[0] for row in rows]
    limited = {name: result for name, result in zip(names, results, strict=True) if result is not weights[name]}
    _, each = clip(updates, ClipByNorm(np.inf))
    norms = dict(zip(names, each.norms, strict=True))
    scales = report.scales if len(report.scales) == len(names) else [report.scale] * len(names)
    return limited, report, _entries(plan, norms, dict(zip(names, scales, strict=True)), limited)


def _entries(
    plan: Plan, norms: Mapping[str, float], scales: Mapping[str, float], limited: Mapping[str, Array] | None
) -> tuple[MigratedTensor, ...]:
    return tuple(
        MigratedTensor(
            row.target,
            origin := row.sources[0] if row.sources else "",
            float(norms.get(origin, np.nan)),
            float(scales.get(origin, 1.0)),
            origin in (limited or {}),
        )
        for row in plan.rows
    )


def target_values(plan: Plan, theirs: Side, weights: Mapping[str, Array]) -> dict[str, Array]:
    """What the plan writes into the target, by name, in the target's shapes and dtypes.

    Raises:
        MigrationError: a shape does not fit, or a dtype would lose digits.
    """
    return {row.target: _value(row, theirs.tensors[row.target], weights) for row in plan.rows}


def _value(row: Row, tensor: Tensor, weights: Mapping[str, Array]) -> Array:
    carried = row.carry(weights)
    dtype = numpy_dtype(tensor.dtype)
    if carried is None:
        return np.broadcast_to(np.asarray(row.fill, dtype), tensor.shape)
    if carried.shape != tensor.shape:
        raise MigrationError(
            f"layer {row.target_layer!r}: {row.role} from {row.sources[0]!r} has shape {carried.shape} after "
            f"[{row.pattern}]; the target's {row.target!r} expects {tensor.shape}; nothing was written: make a plan "
            f"for these models"
        )
    value = carried.astype(dtype, copy=False)
    if carried.dtype != dtype and not np.array_equal(value.astype(carried.dtype), carried):
        raise MigrationError(
            f"{row.sources[0]!r} is {carried.dtype.name} and the target's {row.target!r} {dtype.name}, which would "
            f"round it; nothing was written: convert the source or build the target in {carried.dtype.name}"
        )
    return value


def _write_all_or_nothing(theirs: Side, values: Mapping[str, Array]) -> None:
    before = theirs.copies(values)
    try:
        theirs.backend.write(theirs.model, values)
    except BaseException as err:
        theirs.backend.write(theirs.model, before)
        if not isinstance(err, Exception):
            raise
        raise MigrationError(
            f"writing the target failed ({type(err).__name__}: {err}); every tensor was put back as it was before"
        ) from err
