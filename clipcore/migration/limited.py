"""Comparing after a limit: what each side holds for a moment, so that both compute the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clipcore.backend import Tensor
from clipcore.mapping.models import Side
from clipcore.mapping.plan import Plan, Row
from clipcore.mapping.rows import values_for

Array = np.ndarray[Any, np.dtype[Any]]


def as_limited(plan: Plan, ours: Side, theirs: Side) -> tuple[dict[str, Array], dict[str, Array]]:
    """Tensors to write into the source, and into the target, before the two are compared.

    The source takes each tensor that the limit changed. Where it cannot (it lacks the tensor, it ties what the target
    holds twice, its dtype would round the value), the target takes what would have moved without the limit.
    """
    weights = ours.backend.read(ours.model, [name for row in plan.rows for name in row.sources])
    uses = Counter(name for sources in {row.sources for row in plan.rows} for name in sources)
    for_source: dict[str, Array] = {}
    for_target: dict[str, Array] = {}
    for sources in dict.fromkeys(row.sources for row in plan.rows if row.target in plan.limited):
        rows = [row for row in plan.rows if row.sources == sources]
        # a tensor that other rows take together with further ones has no value of its own
        alone = sources and all(uses[name] == 1 for name in sources)
        held = _held(rows, theirs.tensors, weights, plan.limited) if alone else None
        if held is not None:
            for_source.update(held)
        else:
            changed = [row for row in rows if row.target in plan.limited]
            for_target.update(values_for(changed, theirs.tensors, weights))
    return for_source, for_target


def _held(
    rows: Sequence[Row], tensors: Mapping[str, Tensor], weights: Mapping[str, Array], limited: Mapping[str, Array]
) -> dict[str, Array] | None:
    """The source's tensors from which all these rows carry what the target holds; None where there are none."""
    parts = [(row.target, part) for row in rows for part in row.parts]
    if not all(part.reversible or not part.terms for _, part in parts):
        return None
    plain = values_for(rows, tensors, weights)
    wanted = {target: limited.get(target, value) for target, value in plain.items()}
    held = {name: np.array(weights[name]) for row in rows for name in row.sources}
    with np.errstate(over="ignore"):
        for target, part in parts:
            if part.terms:
                part.put_back(wanted[target], held)
    carried = values_for(rows, tensors, held)
    return held if all(np.array_equal(carried[target], value) for target, value in wanted.items()) else None
