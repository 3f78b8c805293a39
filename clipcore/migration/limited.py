"""Comparing after a limit: what each side holds for a moment, so that both compute the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clipcore.backend import Tensor
from clipcore.mapping.lockstep import values_for
from clipcore.mapping.models import Side
from clipcore.mapping.plan import Plan, Row

Array = np.ndarray[Any, np.dtype[Any]]


def as_limited(plan: Plan, ours: Side, theirs: Side) -> tuple[dict[str, Array], dict[str, Array]]:
    """Tensors to write into the source, and into the target, before the two are compared.

    The source takes each tensor that the limit changed. Where it cannot (it lacks the tensor, it ties what the target
    holds twice, its dtype would round the value), the target takes what would have moved without the limit.
    """
    weights = ours.backend.read(ours.model, [name for row in plan.rows for name in row.sources])
    for_source: dict[str, Array] = {}
    for_target: dict[str, Array] = {}
    for sources in dict.fromkeys(row.sources for row in plan.rows if row.target in plan.limited):
        rows = [row for row in plan.rows if row.sources == sources]
        held = _held(rows, theirs.tensors, weights, plan.limited) if sources else None
        if held is not None:
            for_source[sources[0]] = held
        else:
            changed = [row for row in rows if row.target in plan.limited]
            for_target.update(values_for(changed, theirs.tensors, weights))
    return for_source, for_target


def _held(
    rows: Sequence[Row], tensors: Mapping[str, Tensor], weights: Mapping[str, Array], limited: Mapping[str, Array]
) -> Array | None:
    """The source's one tensor from which all its rows carry what the target holds; None where there is none."""
    plain = values_for(rows, tensors, weights)
    wanted = {target: limited.get(target, value) for target, value in plain.items()}
    (name,) = rows[0].sources
    with np.errstate(over="ignore"):
        held = rows[0].carry_back(wanted[rows[0].target]).astype(weights[name].dtype)
    carried = values_for(rows, tensors, {name: held})
    return held if all(np.array_equal(carried[target], value) for target, value in wanted.items()) else None
