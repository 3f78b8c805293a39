"""Finding a plan: record the source once, run the target in lock-step, and settle what several places would fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from clipcore.backend import Layer
from clipcore.errors import ClipcoreError, InvalidInput, MappingError
from clipcore.mapping.align import SAME
from clipcore.mapping.compare import Comparison, tolerance
from clipcore.mapping.differences import differences_between
from clipcore.mapping.lockstep import (
    Contradiction,
    LockStep,
    Match,
    describe_layer,
    names_fit,
    plain_name,
    rows_between,
    signature,
)
from clipcore.mapping.models import Call, Side, as_arrays, none_taken, record, target_samples, written
from clipcore.mapping.plan import Difference, Evidence, Plan, Row

Array = np.ndarray[Any, np.dtype[Any]]

_MOST_RUNS = 400  # of the target, over all ties together
_OUTPUTS = "<outputs>"
_NOWHERE = "<nowhere>"
_UNEXPLAINED = "an operation without weights before it (pooling, activation, padding, reshaping) is not the same"


def plan(source: Any, target: Any, sample: Any, *, target_sample: Any = None) -> Plan:
    """Find where every tensor of the target comes from in the source. Both models stay bitwise what they are.

    The source runs once on the sample, the target in lock-step with it; parameters that would hide an error (zero
    biases, unit scales, fresh statistics) are random while that happens.

    Args:
        source, target: models of any installed backends.
        sample: one input as the source takes it: an array or tensor, a tuple or list of them (positional arguments) or
            a dict.
        target_sample: the same input as the target takes it; left out, it is worked out (NCHW to NHWC and the like).
    Returns:
        The Plan: one row per tensor of the target, with evidence and reason.
    Raises:
        MappingError: the models share no layer, a layer has no counterpart, or several and nothing to tell them apart.
        InvalidInput: no model, or a sample that a model does not take.
    """
    ours, theirs = Side(source, "source"), Side(target, "target")
    _check_something_shared(ours, theirs)
    sample = as_arrays(sample)
    hiding = ours.hiding()
    with written(ours, hiding), theirs.restored():
        calls, outputs = record(ours, sample)
        weights = ours.copies(ours.tensors)
        forms = target_samples(sample, ours, theirs) if target_sample is None else [as_arrays(target_sample)]
        search = _Search(Comparison(ours, theirs, calls, sample), outputs, weights)
        try:
            step, settled = search.solve(forms)
        except InvalidInput as err:
            raise err if target_sample is not None else none_taken(forms, err) from err
    return _assemble(ours, theirs, calls, step, settled)


def _check_something_shared(ours: Side, theirs: Side) -> None:
    signatures = [{signature(layer) for layer in side.layers.values()} for side in (ours, theirs)]
    if not signatures[0] & signatures[1]:
        first, second = next(iter(ours.layers.values())), next(iter(theirs.layers.values()))
        raise MappingError(
            f"the models share no layer of one kind and shape: the source begins with {first.name!r} "
            f"({describe_layer(first)}), the target with {second.name!r} ({describe_layer(second)}); "
            f"are they of the same architecture?"
        )


class _Search:
    """Runs of the target in lock-step until one agrees everywhere, ties tried in order, true differences excused."""

    def __init__(self, comparison: Comparison, outputs: Any, weights: Mapping[str, Array]) -> None:
        self._comparison, self._outputs, self._weights = comparison, outputs, weights
        self._sample: Any = None
        self._bounds: Sequence[float] = ()
        self._known = False  # whether a run without contradiction is known
        self._runs = 0

    def solve(self, forms: Sequence[Any]) -> tuple[LockStep, dict[str, Evidence]]:
        """The run that agrees, and for layers that had several possible places, what settled them."""
        found: list[tuple[LockStep, Any]] = []
        failures: list[ClipcoreError] = []
        for form in forms:
            self._sample = form
            try:
                self._comparison.theirs.run(form)
                found.append((self._with_excuses(), form))
            except (InvalidInput, MappingError) as err:
                failures.append(err)
                continue
            if not found[-1][0].excused:
                break
        if not found:
            # a form that the target ran on says more than one that it refused
            raise next((err for err in failures if isinstance(err, MappingError)), failures[0])
        step, self._sample = min(found, key=lambda pair: len(pair[0].excused))
        self._known = True
        step = self._refined(step)
        return step, self._settle(step)

    def _with_excuses(self) -> LockStep:
        """A run without contradiction, one place after the other excused as a true difference."""
        excused: frozenset[str] = frozenset()
        while True:
            step, place = self._search((), excused)
            if place is None:
                return step
            if place in excused:
                raise MappingError(f"no mapping found: the target's layer {place!r} fits no origin in the source")
            excused |= {place}

    def _search(self, choices: tuple[int, ...], excused: frozenset[str]) -> tuple[LockStep, str | None]:
        """Depth first from `choices` on: the first run without contradiction, or the one that came furthest."""
        furthest: tuple[LockStep, str] | None = None
        pending: tuple[int, ...] | None = choices
        while pending is not None and self._runs < _MOST_RUNS:
            step, place = self._run(pending, excused)
            if place is None:
                return step, None
            if furthest is None or len(step.matches) > len(furthest[0].matches):
                furthest = step, place
            pending = _next_choices(step)
        if furthest is None:
            raise MappingError(f"no mapping found within {_MOST_RUNS} runs of the target: too many layers fit alike")
        return furthest

    def _run(self, choices: tuple[int, ...], excused: frozenset[str]) -> tuple[LockStep, str | None]:
        self._runs += 1
        step = LockStep(self._comparison, self._weights, choices, excused, self._bounds)
        try:
            outputs = self._comparison.theirs.run(self._sample, step)
        except Exception:
            # frameworks may wrap what a watcher raises
            if isinstance(step.stopped, Contradiction):
                return step, step.stopped.place
            if self._known and isinstance(step.stopped, MappingError):
                return step, _NOWHERE
            if step.stopped is not None:
                raise step.stopped from None
            raise
        error = self._comparison.model_outputs(self._outputs, outputs)
        agreed = error <= tolerance(self._outputs, outputs)
        if not (agreed or _OUTPUTS in excused) or (agreed and not step.within_bound(error, self._outputs, outputs)):
            return step, _OUTPUTS
        step.errors.append(error if agreed else 0.0)
        return step, None

    def _refined(self, step: LockStep) -> LockStep:
        """The run that remains when errors within the tolerance are taken as contradictions where other choices avoid
        them: a branch of small weight hides what stands in it, and shows as a jump of the error.
        """
        bounds = [math.inf] * len(step.errors)
        for turn in range(len(bounds)):
            error, before = step.errors[turn], max(step.errors[:turn], default=0.0)
            if not step.ties or error <= 8 * before or self._runs >= _MOST_RUNS:
                continue
            bounds[turn] = error / 8
            self._bounds = bounds
            better, place = self._search((), step.excused)
            if place is None and better.errors[turn] < error / 8:
                step = better
            else:
                bounds[turn] = math.inf
        return step

    def _settle(self, step: LockStep) -> dict[str, Evidence]:
        """For each tie, whether another choice would do as well; then the names must tell."""
        settled: dict[str, Evidence] = {}
        self._bounds = [8 * error for error in accumulate(step.errors, max)]
        second = _next_choices(step)
        while second is not None and self._runs < _MOST_RUNS:
            other, place = self._run(second, step.excused)
            if place is None:
                self._settle_by_name(step, other, settled)
                # one symmetry is settled by names: go on past the tie that showed it
                turn = next(
                    i
                    for i, tie in enumerate(step.ties)
                    if step.matches[tie.target].source != other.matches[tie.target].source
                )
                second = _next_choices(step, turn)
                continue
            second = _next_choices(other)
        if second is not None:
            # not every other choice was tried
            settled.update({tie.target: "structure" for tie in step.ties if tie.target not in settled})
        return settled

    @staticmethod
    def _settle_by_name(step: LockStep, other: LockStep, settled: dict[str, Evidence]) -> None:
        exchanged = [name for name in step.matches if step.matches[name].source != other.matches[name].source]
        for tie in step.ties:
            if tie.target not in exchanged:
                continue
            if [option for option in tie.options if names_fit(option, tie.target)] != [tie.options[tie.chosen]]:
                raise MappingError(
                    f"the target's layer {tie.target!r} has several possible origins that compute the same: "
                    f"{', '.join(map(repr, tie.options))}; nothing but a name can tell them apart: "
                    f"name the target's layer like its origin"
                )
        settled.update(dict.fromkeys(exchanged, "name"))


def _next_choices(step: LockStep, before: int | None = None) -> tuple[int, ...] | None:
    """The next choices, depth first: the last tie (before turn `before`) with an untried option moves on."""
    ties = step.ties[:before]
    for turn in reversed(range(len(ties))):
        if ties[turn].chosen + 1 < len(ties[turn].options):
            return (*(tie.chosen for tie in ties[:turn]), ties[turn].chosen + 1)
    return None


def _assemble(ours: Side, theirs: Side, calls: Sequence[Call], step: LockStep, settled: Mapping[str, Evidence]) -> Plan:
    pairs = {name: (match.source, match.arrangement, *_judge(match, settled)) for name, match in step.matches.items()}
    pairs.update(_never_run(ours, theirs, step))
    rows: list[Row] = []
    differences: list[Difference] = []
    for name, layer in theirs.layers.items():
        if name not in pairs:
            continue
        source, arrangement, evidence, reason = pairs[name]
        rows += rows_between(ours.layers[source], layer, arrangement, evidence, reason)
        call = next((call for call in calls if call.layer == source), None)
        padded = name in step.matches and step.matches[name].padded
        ignore = frozenset({"padding"} if padded else ())
        differences += differences_between(ours.layers[source], layer, call, ignore)
        if name in step.excused:
            differences.append(Difference(name, "input", "another", "another", _UNEXPLAINED))
    kept = _once(rows, ours)
    taken = {name for row in rows for name in row.sources}
    _check_all_placed(ours, calls, step, taken)
    unused = tuple(name for name in ours.tensors if name not in taken)
    return Plan(ours.backend.name, theirs.backend.name, kept, unused, tuple(differences))


def _once(rows: Sequence[Row], ours: Side) -> tuple[Row, ...]:
    """One row per tensor: a tied one stands under several layers, and must come from equal tensors."""
    kept: dict[str, Row] = {}
    for row in rows:
        first = kept.setdefault(row.target, row)
        if (first.sources, first.pattern) == (row.sources, row.pattern):
            continue
        weights = ours.backend.read(ours.model, [*first.sources, *row.sources])
        values = first.carry(weights), row.carry(weights)
        if values[0] is None or values[1] is None or not np.array_equal(values[0], values[1]):
            raise MappingError(
                f"the target ties {row.target!r}, which would come from both {first.sources} and {row.sources}, and "
                f"these differ: untie it in the target, or tie them in the source"
            )
    return tuple(kept.values())


def _judge(match: Match, settled: Mapping[str, Evidence]) -> tuple[Evidence, str]:
    if settled.get(match.target) == "structure":
        return "structure", f"the first of {match.options} that fits what follows; not all others were tried"
    if match.target in settled:
        return "name", "several layers would do as well; the names decide"
    if match.input_error == float("inf"):
        return "structure", "its input differs from every source layer's; its kind, shape and order decide"
    if not match.same_output:
        return "structure", "saw the same input, but gave another output: see the differences"
    # no figures: an error's last bits may differ from run to run, and a plan has the same bytes for the same models
    reason = "saw the same input and gave the same output"
    if match.options > 1:
        reason += f"; of {match.options} with this input, the one that fits what follows"
    return "proven", reason


def _never_run(ours: Side, theirs: Side, step: LockStep) -> dict[str, tuple[str, Any, Evidence, str]]:
    """Layers of the target that the sample never reaches: a unique name match with a layer that it never reaches."""
    taken = set(step.served)
    placed = {tensor.name for name in step.matches for tensor in theirs.layers[name].tensors.values()}
    pairs: dict[str, tuple[str, Any, Evidence, str]] = {}
    for name, layer in theirs.layers.items():
        if name in step.matches or all(tensor.name in placed for tensor in layer.tensors.values()):
            continue
        free = [n for n, other in ours.layers.items() if n not in taken and signature(other) == signature(layer)]
        same = [n for n in free if plain_name(n) == plain_name(name)]
        fitting = same if len(same) == 1 else [n for n in free if names_fit(n, name)]
        if len(fitting) != 1:
            raise MappingError(
                f"the target's layer {name!r} ({describe_layer(layer)}) is not reached by the sample, and no name "
                f"settles its origin (candidates: {', '.join(map(repr, free)) or 'none'}); give one that reaches it"
            )
        taken.add(fitting[0])
        pairs[name] = fitting[0], SAME, "name", "the sample does not reach it; the only name that fits"
    return pairs


def _check_all_placed(ours: Side, calls: Sequence[Call], step: LockStep, taken: set[str]) -> None:
    """Refuse a target that lacks a layer of the source, unless other layers hold all of that one's tensors."""
    called = dict.fromkeys(call.layer for call in calls if call.layer not in step.served)
    left = [name for name in called if not _held_elsewhere(ours.layers[name], step.weights, taken)]
    if left:
        layer: Layer = ours.layers[left[0]]
        raise MappingError(
            f"the target has no room for the source's layer {left[0]!r} ({describe_layer(layer)})"
            f"{f', nor for {len(left) - 1} others' if len(left) > 1 else ''}; is it of the same architecture?"
        )


def _held_elsewhere(layer: Layer, weights: Mapping[str, Array], taken: set[str]) -> bool:
    """Whether every tensor of the layer is among those taken, or equal to one of them."""
    return all(
        tensor.name in taken or any(np.array_equal(weights[tensor.name], weights[name]) for name in taken)
        for tensor in layer.tensors.values()
    )
