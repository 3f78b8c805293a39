"""Finding a plan: record the source once, run the target in lock-step, and settle what several places would fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from clipcore.errors import InvalidInput, MappingError
from clipcore.mapping.assembly import assemble
from clipcore.mapping.compare import Comparison
from clipcore.mapping.credible import check_deterministic, check_no_nan, check_something_shared, check_strictly
from clipcore.mapping.flow import Flow
from clipcore.mapping.given import Rule, resolved
from clipcore.mapping.identify import in_same_words
from clipcore.mapping.models import Side, as_arrays, none_taken, target_samples, written
from clipcore.mapping.plan import Part, Plan
from clipcore.mapping.recording import record
from clipcore.mapping.repairs import TOGETHER
from clipcore.mapping.rows import values_for
from clipcore.mapping.search import Search, contradicted

Array = np.ndarray[Any, np.dtype[Any]]


def plan(
    source: Any,
    target: Any,
    sample: Any,
    *,
    target_sample: Any = None,
    rules: Iterable[Rule] = (),
    strict: bool = False,
    unmapped: str = "refuse",
) -> Plan:
    r"""Find where every tensor of the target comes from in the source. Both models stay bitwise what they are.

    The source runs once on the sample, the target in lock-step with it; parameters that would hide an error (zero
    biases, unit scales, fresh statistics) are random while that happens.

    Args:
        source, target: models of any installed backends.
        sample: one input as the source takes it: an array or tensor, a tuple or list of them (positional arguments) or
            a dict.
        target_sample: the same input as the target takes it; left out, it is worked out (NCHW to NHWC and the like).
        rules: pairs (source, target) of names of layers or tensors that belong together, whatever is found; the
            source's may be a regular expression, of which the target's takes groups: ("block(.*)", r"stage\1"). A third
            text is the einops pattern that carries a tensor.
        strict: whether "proven" and "given" are the only evidence that counts.
        unmapped: what becomes of layers without a counterpart: "refuse" raises, "keep" leaves the target's as they are
            (another head, say) and lists them in `Plan.kept`, those of the source in `Plan.unused`.
    Returns:
        The Plan: one row per tensor of the target, with evidence and reason.
    Raises:
        MappingError: the models share no layer, a layer has no counterpart, or several and nothing to tell them apart;
            a model draws random numbers, or the source computes NaN; or, with `strict`, something other than
            execution or a rule settled an origin.
        InvalidInput: no model, a sample that a model does not take, or a rule that matches nothing.
    """
    ours, theirs = Side(source, "source"), Side(target, "target")
    sample = as_arrays(sample)
    forms = target_samples(sample, ours, theirs) if target_sample is None else [as_arrays(target_sample)]
    in_same_words(ours, theirs, sample, forms)
    given = resolved(rules, ours, theirs, unmapped)
    check_something_shared(ours, theirs)
    hiding = ours.hiding()
    held = ours.backend.holding(source), theirs.backend.holding(target)
    with held[0], held[1], written(ours, hiding), theirs.restored():
        calls, outputs = record(ours, sample)
        check_no_nan(calls)
        weights = ours.backend.read(source, list(ours.tensors))
        search = Search(Comparison(ours, theirs, calls, sample), outputs, weights, given)
        try:
            step, settled = search.solve(forms)
        except InvalidInput as err:
            raise err if target_sample is not None else none_taken(forms, err) from err
        except MappingError:
            # what is drawn anew in each run looks like another architecture
            check_deterministic(ours, sample, calls)
            raise
        if contradicted(step):
            check_deterministic(ours, sample, calls)
            check_deterministic(theirs, search.sample, record(theirs, search.sample)[0])
        found = assemble(theirs, Flow(ours, sample, calls, outputs), step, settled, search.unseen, given)
        found = _confirmed(found, search, theirs)
    if strict:
        check_strictly(found)
    return found


def _confirmed(found: Plan, search: Search, theirs: Side) -> Plan:
    """The plan, with what two layers make up for together proven by a run of the target with it."""
    if not any(part.operation in TOGETHER for row in found.rows for part in row.parts):
        return found
    with theirs.restored():
        theirs.backend.write(theirs.model, values_for(found.rows, theirs.tensors, search.weights))
        if not search.agrees(theirs):
            return found
    touched = {part.target_layer for row in found.rows for part in row.parts if part.operation in TOGETHER}
    rows = [
        replace(row, parts=tuple(_proven(p) if p.target_layer in touched else p for p in row.parts))
        for row in found.rows
    ]
    return replace(found, rows=tuple(rows))


def _proven(part: Part) -> Part:
    reason = "with what its layer and the next make up for together, both models gave the same outputs"
    return replace(part, evidence="proven", reason=reason) if part.evidence in ("proven", "structure") else part
