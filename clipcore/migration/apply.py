"""Applying a plan: every tensor is checked before the first write, and on any later error the target is put back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from clipcore.backend import Tensor
from clipcore.clipping.api import bound, clip, no_state, refuse_other_shapes
from clipcore.clipping.call import Call
from clipcore.clipping.kernels import extent, round_once
from clipcore.clipping.policies import ClipByNorm, Policy
from clipcore.clipping.report import ClipReport
from clipcore.errors import InvalidInput, InvalidPolicy, MappingError, MigrationError
from clipcore.mapping.find import plan as find_plan
from clipcore.mapping.given import Rule
from clipcore.mapping.layouts import unit_axes
from clipcore.mapping.models import Side
from clipcore.mapping.plan import Plan, Row
from clipcore.mapping.rows import numpy_dtype
from clipcore.memory import each, is_finite
from clipcore.migration.dtypes import check_dtype, converted
from clipcore.migration.limits import Delta, Limit
from clipcore.structure import plain

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class MigratedTensor:
    """What happened to one tensor of the target.

    Attributes:
        target, source: its name, and those of its origins ("" where it was filled).
        norm: L2 norm of what was limited: of what moves into the tensor, or of that minus what it held; NaN without a
            limit, and for running statistics.
        scale: by how much the limit made that norm smaller, or larger: the norm after by that before; 1 where it was 0.
        clipped: whether the limit changed it.
        rounding: how far a conversion of dtype moved an element, relative to the largest; 0 where it is exact.
    """

    target: str
    source: str
    norm: float
    scale: float
    clipped: bool
    rounding: float = 0.0


@dataclass(frozen=True)
class MigrationResult:
    """What `migrate` did.

    Attributes:
        plan: the plan that was applied, with the limited tensors in it, so that `verify(..., plan=result.plan)`
            compares against the source as limited.
        report: what the limit reported over all trainable tensors of the target; None without a limit.
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
    rules: Iterable[Rule] = (),
    strict: bool = False,
    unmapped: str = "refuse",
    dtype: str | None = None,
) -> MigrationResult:
    """Copy the source's weights and running statistics into the target: all of them, or none.

    The source is never written. Every tensor is checked before the first write; on any later error the target is put
    back bitwise, at the cost of one copy of its tensors.

    Args:
        source, target: models of any installed backends.
        plan: where each tensor comes from; left out, it is found on `sample`.
        sample, target_sample, rules, strict, unmapped: see `plan`.
        dtype: what to do where the target's dtype would round: None refuses, "target" rounds to what each tensor of the
            target holds, and a floating dtype's name ("bfloat16") rounds everything floating to that first. Integers of
            8 bits and 8-bit floats move as they are, or not at all.
        limit: bounds what moves into the target's trainable tensors, frozen or not, tensor by tensor of the target: a
            policy acts on the values in the target's dtype, `Delta(policy)` on their difference to what the target
            holds. What fills a tensor that the source lacks moves too. Running statistics are never limited.
    Returns:
        A MigrationResult.
    Raises:
        InvalidInput: neither plan nor sample; or a source tensor, or with Delta one of the target's, holds NaN or inf.
        MappingError: the plan does not fit the models, or none is found.
        MigrationError: a tensor's shape or dtype does not fit, one that would change is the source's as well, or a
            write failed. The target is as it was before.
    """
    if plan is None and sample is None:
        raise InvalidInput("migrate needs a plan or a sample: migrate(source, target, plan=…) or (…, sample=x)")
    check_dtype(dtype)
    ours, theirs = Side(source, "source"), Side(target, "target")
    if plan is None:
        # what flows after a NaN is NaN, so that the search would fail for a reason that is none
        trained = [tensor.name for tensor in ours.tensors.values() if tensor.trainable]
        _check_finite(ours.backend.read(ours.model, trained), "the source's", "mend the source first")
        plan = find_plan(
            source, target, sample, target_sample=target_sample, rules=rules, strict=strict, unmapped=unmapped
        )
    check_fits(plan, ours, theirs)
    with ours.backend.holding(source), theirs.backend.holding(target):
        values, result = _prepared(plan, ours, theirs, limit, dtype)
        _write_all_or_nothing(theirs, values)
    return result


def _prepared(
    plan: Plan, ours: Side, theirs: Side, limit: Limit | None, dtype: str | None
) -> tuple[dict[str, Array], MigrationResult]:
    """What is to be written, by the target's names, checked in every way, and what will have happened then."""
    weights = ours.backend.read(ours.model, list(ours.tensors))
    taken = dict.fromkeys(name for row in plan.rows for name in row.sources)
    _check_finite({name: weights[name] for name in taken}, "the source's", "mend the source first")
    values, rounding = target_values(plan, theirs, weights, dtype)
    current = theirs.backend.read(theirs.model, list(values))
    limited, report, tensors = _limited(plan, values, current, theirs, limit)
    _check_finite(limited, "under the limit the target's", "choose another limit")
    values.update(limited)
    _check_apart(weights, current, values)
    tensors = tuple(replace(tensor, rounding=rounding[tensor.target]) for tensor in tensors)
    rounded = {name: values[name] for name, error in rounding.items() if error}
    return values, MigrationResult(replace(plan, limited={**rounded, **limited}), report, tensors)


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
        may_lack = tensor.role == "batch_count" or name in plan.kept
        if targets.count(name) != 1 and not (name not in targets and may_lack):
            raise MappingError(
                f"the plan has {targets.count(name)} rows for the target's {name!r}; expected one: make it anew"
            )
    for row in plan.rows:
        for side, wanted in ((ours, row.sources), (theirs, (row.target,))):
            for name in wanted:
                if name not in side.tensors:
                    raise MappingError(f"the plan names {name!r}, which the {side.which} does not have; make it anew")


def _check_finite(arrays: Mapping[str, Array], whose: str, remedy: str) -> None:
    finite = each(is_finite, arrays.values())
    for (name, array), fine in zip(arrays.items(), finite, strict=True):
        if not fine:
            faults = int(np.count_nonzero(~np.isfinite(array)))
            raise InvalidInput(
                f"{whose} tensor {name!r} holds {faults} elements that are NaN or inf (of {array.size}); "
                f"nothing was written: {remedy}"
            )


def _check_apart(sources: Mapping[str, Array], current: Mapping[str, Array], values: Mapping[str, Array]) -> None:
    """Refuse to change a tensor of the target that is the source's too (a shared layer, a view)."""
    for target, source in _shared(current, sources):
        if values[target].tobytes() != current[target].tobytes():
            raise MigrationError(
                f"the target's tensor {target!r} and the source's {source!r} are one memory, and to write the target "
                f"would change the source; nothing was written: build the target with tensors of its own, or copy it "
                f"first (copy.deepcopy, keras.models.clone_model)"
            )


def _shared(first: Mapping[str, Array], second: Mapping[str, Array]) -> Iterator[tuple[str, str]]:
    """The names of each two tensors, one of either side, that have an element in common."""
    one, two = (np.array([extent(array) for array in side.values()]).reshape(-1, 2) for side in (first, second))
    near = (one[:, None, 0] < two[None, :, 1]) & (two[None, :, 0] < one[:, None, 1])
    names = list(first), list(second)
    for i, j in np.argwhere(near):
        pair = names[0][i], names[1][j]
        if np.shares_memory(first[pair[0]], second[pair[1]]):
            yield pair


def _limited(
    plan: Plan,
    values: Mapping[str, Array],
    current: Mapping[str, Array],
    theirs: Side,
    limit: Limit | None,
) -> tuple[dict[str, Array], ClipReport | None, tuple[MigratedTensor, ...]]:
    """The target's tensors that a limit changes, its report, and what became of each tensor of the target."""
    if limit is None:
        return {}, None, _entries(plan, {}, {}, {})
    if not isinstance(limit, Policy | Delta):
        raise InvalidPolicy(f"limit is {limit!r}; expected a policy, say ClipByNorm(1.0), or Delta(policy)")
    moving = {row.target: values[row.target] for row in plan.rows if theirs.tensors[row.target].trainable}
    held = {name: current[name] for name in moving}
    if isinstance(limit, Delta):
        _check_finite(held, "the target's", "Delta measures from it, so mend it first, or migrate without Delta")
        with np.errstate(over="ignore"):  # a difference beyond float64 is the policy's to judge
            moving = {name: _wide(value) - _wide(held[name]) for name, value in moving.items()}
    policy = limit.policy if isinstance(limit, Delta) else limit
    before = _norms(moving)
    bounded, report = _bounded(moving, policy, held, theirs)
    changed = {name: result for name, result in bounded.items() if result is not moving[name]}
    after = _norms(changed)
    scales = {name: norm / before[name] for name, norm in after.items() if before[name]}
    limited = {name: _moved(held[name], x) for name, x in changed.items()} if isinstance(limit, Delta) else changed
    return limited, report, _entries(plan, before, scales, limited)


def _bounded(
    moving: Mapping[str, Array], policy: Policy, held: Mapping[str, Array], theirs: Side
) -> tuple[dict[str, Array], ClipReport]:
    """What moves under a policy, which may ask for the weights beside it and for the units of the target's layers."""
    axes = {t.name: unit_axes(layer, role) for layer in theirs.layers.values() for role, t in layer.tensors.items()}
    call = replace(Call.of(moving, policy, held, None, "numpy"), axes=[axes[name] for name in moving])
    refuse_other_shapes(policy, "limit what moves by a policy that keeps shapes")
    bounded, _, report = bound(call, policy, no_state(call, policy))
    return dict(zip(moving, bounded, strict=True)), report


def _norms(arrays: Mapping[str, Array]) -> dict[str, float]:
    """The L2 norm of each."""
    return dict(zip(arrays, clip(arrays, ClipByNorm(np.inf), backend="numpy")[1].norms, strict=True))


def _wide(array: Array) -> Array:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _moved(held: Array, step: Array) -> Array:
    """What a tensor becomes by a step in float64, rounded once to its own dtype."""
    return round_once(np.asarray(_wide(held) + step), held.dtype)


def _entries(
    plan: Plan, norms: Mapping[str, float], scales: Mapping[str, float], limited: Mapping[str, Array]
) -> tuple[MigratedTensor, ...]:
    return tuple(
        MigratedTensor(
            row.target,
            ", ".join(row.sources),
            float(norms.get(row.target, np.nan)),
            float(scales.get(row.target, 1.0)),
            row.target in limited,
        )
        for row in plan.rows
    )


def target_values(
    plan: Plan, theirs: Side, weights: Mapping[str, Array], dtype: str | None = None
) -> tuple[dict[str, Array], dict[str, float]]:
    """What the plan writes into the target, by name, in the target's shapes and dtypes; and how far each was rounded.

    Raises:
        MigrationError: a shape does not fit, or a dtype would lose digits.
    """
    values = {row.target: _value(row, theirs.tensors[row.target], weights, dtype) for row in plan.rows}
    return {name: value for name, (value, _) in values.items()}, {name: error for name, (_, error) in values.items()}


def _value(row: Row, tensor: Tensor, weights: Mapping[str, Array], dtype: str | None) -> tuple[Array, float]:
    carried = row.carry(weights)
    if carried is None:
        return np.broadcast_to(np.asarray(row.fill, numpy_dtype(tensor.dtype)), tensor.shape), 0.0
    origin = ", ".join(map(repr, row.sources))
    if carried.shape != tensor.shape:
        raise MigrationError(
            f"layer {row.target_layer!r}: {row.role} from {origin} has shape {carried.shape} after "
            f"[{row.pattern}]; the target's {row.target!r} expects {tensor.shape}; nothing was written: make a plan "
            f"for these models"
        )
    return converted(carried, tensor.dtype, dtype, f"the target's {row.target!r} from {origin}")


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
