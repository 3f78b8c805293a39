"""Verifying: both models run, output by output and layer by layer, against what rounding alone would do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clipcore.errors import InvalidInput, MappingError
from clipcore.files import write_whole
from clipcore.mapping.align import is_exact, relative_error
from clipcore.mapping.compare import Comparison, without_opaque
from clipcore.mapping.find import plan as find_plan
from clipcore.mapping.identify import in_same_words
from clipcore.mapping.models import (
    Side,
    as_arrays,
    comparable,
    describe,
    none_taken,
    target_samples,
    written,
)
from clipcore.mapping.plan import Difference, Plan
from clipcore.mapping.recording import Call, record
from clipcore.mapping.rows import values_for
from clipcore.migration.apply import check_fits
from clipcore.migration.diagnosis import Divergence, LayerAgreement, compare_layers, stale_rows
from clipcore.migration.explain import explained
from clipcore.migration.limited import as_limited
from clipcore.migration.side_by_side import Step
from clipcore.structure import leaves, map_leaves, plain

Array = np.ndarray[Any, np.dtype[Any]]

_TOLERANCE = 1e-5
_NOISE_FLOORS = 10


@dataclass(frozen=True)
class Verification:
    """Whether two models compute the same.

    Attributes:
        ok: max_rel_error is at most max(1e-5, 10 noise floors). Where a plan was given, also: every tensor of the
            target is what the plan carries, and no layer that it calls proven is ten times further off than that.
        max_rel_error: the largest over all outputs, sample sizes and, with a plan, randomised biases and statistics:
            max|source - target| / max|source| per tensor.
        noise_floor: what rounding alone does to the source's outputs, as a relative error.
        first_divergence: where the two part, and why; None where ok.
        differences: settings in which matched layers differ.
        layers: the matched layers' agreement, in the target's order of execution.
        shapes: shapes of the samples that were tried.
        steps: with `explain`, every call of a layer in both, with its agreement.
        left_out: names of outputs that one of the models gives as an object of a class of its own (a cache), so that
            they cannot be compared.
        reason: one sentence where not ok.
    """

    ok: bool
    max_rel_error: float
    noise_floor: float
    first_divergence: Divergence | None
    differences: tuple[Difference, ...]
    layers: tuple[LayerAgreement, ...]
    shapes: tuple[str, ...]
    reason: str = ""
    left_out: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The outcome as plain values, for JSON: NaN and infinities are None."""
        result: dict[str, Any] = plain(asdict(self))
        return result

    def to_html(self) -> str:
        """A whole page, without anything from elsewhere: the verdict, the differences, and, with `explain`, both
        models' layers side by side with their agreement.
        """
        from clipcore.migration.report import page  # here, since few ask for it

        return page(self)

    def save_html(self, path: str | Path) -> None:
        """Write that page: the old file or the new one, whole.

        Raises:
            InvalidInput: it cannot be written there.
        """
        write_whole(path, self.to_html(), "the report")

    def __str__(self) -> str:
        verdict = "ok" if self.ok else f"not ok: {self.reason}"
        return (
            f"{verdict}; relative error {self.max_rel_error:.1e}, noise floor {self.noise_floor:.1e}, "
            f"samples of shape {', '.join(self.shapes)}"
            + (
                f"; not compared, since one model gives no tensors for it: {', '.join(self.left_out)}"
                if self.left_out
                else ""
            )
        )


def verify(
    source: Any,
    target: Any,
    sample: Any,
    plan: Plan | None = None,
    *,
    explain: bool = False,
    target_sample: Any = None,
) -> Verification:
    """Whether the target computes what the source computes, and where not. Both models stay bitwise what they are.

    Args:
        source, target: models of any installed backends.
        sample, target_sample: as for `plan`. Spatial sizes one smaller are tried too, where both models take them.
        plan: the plan by which the target got its weights; left out, one is sought. A plan from a limited migration
            (`result.plan`) compares against the source as limited; where the source cannot hold what the limit left
            (it ties two tensors, or lacks one), that tensor is checked by itself, and both run without the limit on it.
        explain: whether to look for every difference and its cause: the target runs beside the source, the source's
            values are put in where it differs, and what may be the cause is tested by computing with it. The
            differences of which that is true have `tested`.
    Returns:
        A Verification.
    Raises:
        InvalidInput: no model, or a sample that a model does not take.
        MappingError: the plan is for other models.
    """
    ours, theirs = Side(source, "source"), Side(target, "target")
    sample = as_arrays(sample)
    given = None if target_sample is None else as_arrays(target_sample)
    in_same_words(ours, theirs, sample, target_samples(sample, ours, theirs) if given is None else [given])
    if plan is not None:
        check_fits(plan, ours, theirs)
    known, why_none = (plan, "") if plan is not None else _sought(source, target, sample, given)
    # before anything is written for the comparison: what the plan claims of the target as it stands
    stale = stale_rows(ours, theirs, known) if known else {}
    for_source, for_target = as_limited(known, ours, theirs) if known else ({}, {})
    with written(ours, for_source), written(theirs, for_target):
        runs = list(_runs(ours, theirs, sample, given))
        floor = max(_noise_floor(ours, run.sample, run.outputs[0]) for run in runs)
        worst_run = max(runs, key=lambda run: run.error)
        worst = worst_run.error
        found = compare_layers(ours, theirs, known, stale, *worst_run.calls) if known else ([], None, [])
        layers, divergence, seen = found
        allowed = max(_TOLERANCE, _NOISE_FLOORS * floor)
        steps, causes = _explained(ours, theirs, known, worst_run, allowed) if explain and known else ((), None)
        divergence = _with_cause(divergence, causes or ())
        if plan:
            worst = max(worst, _hidden_error(ours, theirs, plan, runs[0]))
    # Whoever gives a plan claims that it was applied: then every tensor and every proven layer must bear it out, since
    # one sample's outputs can hide a fault.
    vacuous = _says_nothing(runs[0].outputs[0], proven_otherwise=plan is not None)
    ok = worst <= allowed and not vacuous and (plan is None or _bears_out(plan, layers, divergence, allowed))
    return Verification(
        ok,
        worst,
        floor,
        None if ok else divergence,
        _with_causes(_together(known.differences if known else (), seen), causes),
        tuple(layers),
        tuple(describe(run.sample) for run in runs),
        "" if ok else vacuous or _where(runs, allowed) + _reason(divergence, runs[0], known, why_none),
        without_opaque(*runs[0].outputs)[2],
        tuple(steps),
    )


def _together(known: Sequence[Difference], seen: Sequence[Difference]) -> tuple[Difference, ...]:
    """The plan's differences, and those that another size of the sample shows."""
    listed = {(difference.layer, difference.setting) for difference in known}
    fresh = {(d.layer, d.setting): d for d in seen if (d.layer, d.setting) not in listed}
    return (*known, *fresh.values())


def _explained(
    ours: Side, theirs: Side, plan: Plan, run: _Run, allowed: float
) -> tuple[Sequence[Step], Sequence[Difference]]:
    origin = {target: source for source, target in plan.layer_pairs}
    return explained(Comparison(ours, theirs, run.calls[0], run.sample), run.target_sample, origin, allowed)


def _with_cause(divergence: Divergence | None, causes: Sequence[Difference]) -> Divergence | None:
    """The divergence, with what was tested as its reason."""
    tested = [cause.values for cause in causes if divergence and cause.tested and cause.layer == divergence.layer]
    return (
        replace(divergence, reason="; ".join(tested)) if divergence and tested and not divergence.stale else divergence
    )


def _with_causes(listed: Sequence[Difference], causes: Sequence[Difference] | None) -> tuple[Difference, ...]:
    """The differences that settings show, with what was found by running both."""
    if causes is None:
        return tuple(listed)
    found = {(cause.layer, cause.setting): cause for cause in causes}
    # where another input was noted, the causes say why
    kept = [d for d in listed if d.setting != "input"]
    tested = [replace(d, tested=found.pop((d.layer, d.setting), d).tested) for d in kept]
    return (*tested, *found.values())


def _where(runs: Sequence[_Run], allowed: float) -> str:
    """The shapes that fail, where others do not."""
    failing = [describe(run.sample) for run in runs if run.error > allowed]
    return f"on a sample of shape {', '.join(failing)} alone: " if 0 < len(failing) < len(runs) else ""


def _says_nothing(outputs: Any, proven_otherwise: bool) -> str:
    """Why a sample's outputs prove nothing; empty where they do."""
    for path, value in leaves(outputs):
        if is_exact(value):
            continue
        if np.isnan(value).any():
            return f"the source's output{path} holds NaN on this sample: give another sample"
        if not proven_otherwise and value.size > 1 and (value == value.flat[0]).all():
            return (
                f"the source's output{path} is the same everywhere on this sample, which proves nothing: give another"
            )
    return ""


def _bears_out(plan: Plan, layers: Sequence[LayerAgreement], divergence: Divergence | None, allowed: float) -> bool:
    proven = {part.target_layer for row in plan.rows for part in row.parts if part.evidence == "proven"}
    # the noise floor is that of the outputs; a single layer can be noisier
    noisy = any(layer.rel_error > 10 * allowed for layer in layers if layer.target in proven)
    return not noisy and (divergence is None or not divergence.stale)


@dataclass(frozen=True)
class _Run:
    """Both models on one sample."""

    sample: Any
    target_sample: Any
    calls: tuple[Sequence[Call], Sequence[Call]]
    outputs: tuple[Any, Any]
    error: float


def _sought(source: Any, target: Any, sample: Any, target_sample: Any) -> tuple[Plan | None, str]:
    try:
        return find_plan(source, target, sample, target_sample=target_sample), ""
    except MappingError as err:
        return None, str(err)


def _runs(ours: Side, theirs: Side, sample: Any, target_sample: Any) -> Iterator[_Run]:
    yield _run(ours, theirs, sample, target_sample)
    smaller = map_leaves(lambda array: _one_smaller(array, ours.channels), sample)
    if target_sample is None and describe(smaller) != describe(sample):
        # models with a Flatten take one size alone
        try:
            run = _run(ours, theirs, smaller, None)
        except InvalidInput:
            return
        yield run


def _one_smaller(array: Array, convention: str) -> Array:
    """The array with every spatial axis one shorter: stride and padding go wrong at even or at odd sizes."""
    if array.ndim < 3 or array.dtype.kind in "biu":
        return array
    channels = 1 if convention == "first" else array.ndim - 1
    spatial = [axis not in (0, channels) and size > 1 for axis, size in enumerate(array.shape)]
    return array[tuple(slice(None, -1) if cut else slice(None) for cut in spatial)]


def _run(ours: Side, theirs: Side, sample: Any, target_sample: Any) -> _Run:
    calls, outputs = record(ours, sample)
    forms = [target_sample] if target_sample is not None else target_samples(sample, ours, theirs)
    runs, failures = [], []
    for form in forms:
        try:
            other_calls, other = record(theirs, form)
        except InvalidInput as err:
            failures.append(err)
            continue
        error = Comparison(ours, theirs, calls).model_outputs(outputs, other)
        runs.append(_Run(sample, form, (calls, other_calls), (outputs, other), error))
        if error <= _TOLERANCE:
            break
    if not runs:
        raise failures[0] if target_sample is not None else none_taken(forms, failures[0])
    return min(runs, key=lambda run: run.error)


def _noise_floor(ours: Side, sample: Any, outputs: Any) -> float:
    """How far the source's own outputs are from exact: against float64, or under a change of the input's last bits."""
    exact = ours.backend.double(ours.model)
    if exact is not None:
        try:
            return _own_error(outputs, comparable(ours.backend.run(exact, map_leaves(_widened, sample))))
        except Exception:
            pass
    return _own_error(outputs, ours.run(map_leaves(_perturbed, sample)))


def _own_error(outputs: Any, others: Any) -> float:
    pairs = zip((v for _, v in leaves(others)), (v for _, v in leaves(outputs)), strict=True)
    errors = [relative_error(np.asarray(exact), np.asarray(value)) for exact, value in pairs]
    return max((error for error in errors if math.isfinite(error)), default=0.0)


def _widened(array: Array) -> Array:
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _perturbed(array: Array) -> Array:
    if array.dtype.kind != "f":
        return array
    signs = np.random.default_rng(0).choice([-1, 1], array.shape)
    perturbed: Array = array + signs.astype(array.dtype) * np.spacing(np.abs(array))
    return perturbed


def _hidden_error(ours: Side, theirs: Side, plan: Plan, run: _Run) -> float:
    """The error with random values where both models hold constants that would hide a wrong place."""
    hiding = {name: value for name, value in ours.hiding().items() if any(name in row.sources for row in plan.rows)}
    if not hiding:
        return 0.0
    rows = [row for row in plan.rows if set(row.sources) & set(hiding)]
    with ExitStack() as stack:
        stack.enter_context(written(ours, hiding))
        weights = ours.copies(dict.fromkeys(name for row in rows for name in row.sources))
        stack.enter_context(written(theirs, values_for(rows, theirs.tensors, weights)))
        outputs = ours.run(run.sample), theirs.run(run.target_sample)
    return Comparison(ours, theirs, run.calls[0]).model_outputs(*outputs)


def _reason(divergence: Divergence | None, run: _Run, known: Plan | None, why_none: str) -> str:
    if divergence is not None:
        return str(divergence)
    if known and known.kept:
        return (
            f"all matched layers agree; the plan leaves {', '.join(map(repr, known.kept[:5]))} as the target has them"
        )
    counts = [len(list(leaves(outputs))) for outputs in without_opaque(*run.outputs)[:2]]
    if counts[0] != counts[1]:
        return f"the source gives {counts[0]} outputs, the target {counts[1]}"
    if why_none:
        return f"outputs differ, and no mapping of the layers was found: {why_none}"
    return "all matched layers agree; what follows the last of them (an activation, pooling, a scale) differs"
