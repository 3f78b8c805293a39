"""Finding a plan: record the source once, run the target in lock-step, and settle what several places would fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np

from clipcore.backend import Bounds, Layer
from clipcore.errors import ClipcoreError, InvalidInput, MappingError
from clipcore.mapping.align import SAME
from clipcore.mapping.compare import Comparison, tolerance
from clipcore.mapping.credible import check_deterministic, check_no_nan, check_something_shared, check_strictly
from clipcore.mapping.differences import differences_between
from clipcore.mapping.flow import Flow
from clipcore.mapping.given import Given, Rule, resolved
from clipcore.mapping.lockstep import (
    Contradiction,
    LockStep,
    Match,
    names_fit,
    place_of,
)
from clipcore.mapping.models import Call, Side, as_arrays, none_taken, record, target_samples, written
from clipcore.mapping.plan import Difference, Evidence, Part, Plan, Row, cut
from clipcore.mapping.repairs import TOGETHER, Pair, Parts, repair_together, repaired
from clipcore.mapping.rows import describe_layer, given_part, parts_between, rows_between, values_for
from clipcore.mapping.unseen import Dependence, Unseen, place_unseen

Array = np.ndarray[Any, np.dtype[Any]]

_MOST_RUNS = 400  # of the target, over all ties together
_OUTPUTS = "<outputs>"
_NOWHERE = "<nowhere>"
_UNEXPLAINED = "an operation without weights before it (pooling, activation, padding, reshaping) is not the same"


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
    given = resolved(rules, ours, theirs, unmapped)
    check_something_shared(ours, theirs)
    sample = as_arrays(sample)
    hiding = ours.hiding()
    with written(ours, hiding), theirs.restored():
        calls, outputs = record(ours, sample)
        check_no_nan(calls)
        weights = ours.copies(ours.tensors)
        forms = target_samples(sample, ours, theirs) if target_sample is None else [as_arrays(target_sample)]
        search = _Search(Comparison(ours, theirs, calls, sample), outputs, weights, given)
        try:
            step, settled = search.solve(forms)
        except InvalidInput as err:
            raise err if target_sample is not None else none_taken(forms, err) from err
        except MappingError:
            # what is drawn anew in each run looks like another architecture
            check_deterministic(ours, sample, calls)
            raise
        if _contradicted(step):
            check_deterministic(ours, sample, calls)
            check_deterministic(theirs, search.sample, record(theirs, search.sample)[0])
        found = _assemble(theirs, Flow(ours, sample, calls, outputs), step, settled, search.unseen, given)
        found = _confirmed(found, search, theirs)
    if strict:
        check_strictly(found)
    return found


def _confirmed(found: Plan, search: _Search, theirs: Side) -> Plan:
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


def _contradicted(step: LockStep) -> int:
    """In how many places the run says that a form of the sample is not the one: layers that saw something else, or
    gave another output. Where as many channels as steps fit both, nothing else does.
    """
    return len(step.excused.union(name for name, match in step.matches.items() if not match.same_output))


class _Search:
    """Runs of the target in lock-step until one agrees everywhere, ties tried in order, true differences excused."""

    def __init__(self, comparison: Comparison, outputs: Any, weights: Mapping[str, Array], given: Given) -> None:
        self._comparison, self._outputs, self.weights, self._given = comparison, outputs, weights, given
        self._dependence = Dependence(comparison.ours, comparison.sample, outputs)
        self.unseen: Mapping[str, Unseen] = {}
        self.sample: Any = None
        self._bounds: Sequence[float] = ()
        self._known = False  # whether a run without contradiction is known
        self._runs = 0

    def solve(self, forms: Sequence[Any]) -> tuple[LockStep, dict[str, Evidence]]:
        """The run that agrees, and for layers that had several possible places, what settled them."""
        found: list[tuple[LockStep, Any]] = []
        failures: list[ClipcoreError] = []
        for form in forms:
            self.sample = form
            try:
                self._place_unseen(form)
                found.append((self._with_excuses(), form))
            except (InvalidInput, MappingError) as err:
                failures.append(err)
                continue
            if not _contradicted(found[-1][0]):
                break
        if not found:
            # a form that the target ran on says more than one that it refused
            raise next((err for err in failures if isinstance(err, MappingError)), failures[0])
        step, self.sample = min(found, key=lambda pair: _contradicted(pair[0]))
        if step is not found[-1][0]:
            self._place_unseen(self.sample)
        self._known = True
        step = self._refined(step)
        return step, self._settle(step)

    def _place_unseen(self, form: Any) -> None:
        """Find the origins of what no call shows, and write it into the target."""
        ours, theirs = self._comparison.ours, self._comparison.theirs
        calls, _ = record(theirs, form)
        seen = {call.layer for call in self._comparison.calls}, {call.layer for call in calls}
        self.unseen = place_unseen(ours, theirs, seen, self._given, self._dependence)
        for name, place in self.unseen.items():
            rows = rows_between(ours.layers[place.source], theirs.layers[name], SAME, self._given.tensors)
            theirs.backend.write(theirs.model, values_for(rows, theirs.tensors, self.weights, theirs.copies))
        alone = [Row(tensor, (_alone(tensor, self._given, ours, theirs),)) for tensor in self._given.tensors]
        theirs.backend.write(theirs.model, values_for(alone, theirs.tensors, self.weights))

    def agrees(self, theirs: Side) -> bool:
        """Whether the target as it stands gives the source's outputs."""
        outputs = theirs.run(self.sample)
        return self._comparison.model_outputs(self._outputs, outputs) <= tolerance(self._outputs, outputs)

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
        step = LockStep(self._comparison, self.weights, choices, excused, self._bounds, self._given)
        step.hold(self.unseen)
        try:
            outputs = self._comparison.theirs.run(self.sample, step)
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
        # behind a layer that kept its weights no outputs can agree
        if not (agreed or _OUTPUTS in excused or step.kept) or (
            agreed and not step.within_bound(error, self._outputs, outputs)
        ):
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


def _alone(tensor: str, given: Given, ours: Side, theirs: Side) -> Part:
    """The part of a tensor that a rule names, with the layers that both are of."""
    origin, pattern = given.tensors[tensor]
    source = next(layer for layer in ours.layers.values() if origin in {t.name for t in layer.tensors.values()})
    target, role = next((x, role) for x in theirs.layers.values() for role, t in x.tensors.items() if t.name == tensor)
    return given_part(source.name, target, role, origin, pattern)


def _assemble(
    theirs: Side,
    flow: Flow,
    step: LockStep,
    settled: Mapping[str, Evidence],
    unseen: Mapping[str, Unseen],
    given: Given,
) -> Plan:
    ours, calls = flow.side, flow.calls
    pairs = {
        name: (match.source, match.arrangement, *_judge(match, settled, given)) for name, match in step.matches.items()
    }
    agreed = not step.excused and all(match.same_output for match in step.matches.values())
    pairs.update({name: (place.source, SAME, *place.judged(agreed)) for name, place in unseen.items()})
    first_calls = {call.layer: call for call in reversed(calls)}
    matched: dict[str, Pair] = {}
    parts: list[tuple[str, Part]] = []
    differences: list[Difference] = []
    for name, layer in theirs.layers.items():
        if name not in pairs:
            parts += [
                (t.name, _alone(t.name, given, ours, theirs)) for t in layer.tensors.values() if t.name in given.tensors
            ]
            continue
        source, arrangement, evidence, reason = pairs[name]
        made = parts_between(ours.layers[source], layer, arrangement, evidence, reason, given.tensors)
        matched[name] = Pair(ours.layers[source], layer)
        parts += [(target, part) for target, found in made.items() for part in found]
        padded = name in step.matches and step.matches[name].padded
        ignore = frozenset({"padding"} if padded else ())
        between = differences_between(ours.layers[source], layer, first_calls.get(source), ignore)
        differences += repaired(layer, between, [part for found in made.values() for part in found])
        if name in step.excused:
            differences.append(Difference(name, "input", "another", "another", _UNEXPLAINED))
    placed = _placed(parts, ours)
    differences = repair_together(matched, flow, placed, differences)
    rows = _rows(placed, theirs)
    taken = {(term.name, term.within) for row in rows for part in row.parts for term in part.terms}
    if not given.keep:
        _check_all_placed(ours, calls, step, taken)
    names = {name for name, _ in taken}
    unused = tuple(name for name in ours.tensors if name not in names)
    return Plan(ours.backend.name, theirs.backend.name, rows, unused, tuple(differences), _kept(rows, theirs, given))


def _kept(rows: Sequence[Row], theirs: Side, given: Given) -> tuple[str, ...]:
    """The target's tensors that have no row, and may be left as they are."""
    placed = {row.target for row in rows}
    left = [tensor for name, tensor in theirs.tensors.items() if name not in placed and tensor.role != "batch_count"]
    return tuple(tensor.name for tensor in left) if given.keep else ()


def _placed(parts: Sequence[tuple[str, Part]], ours: Side) -> Parts:
    """The parts by place; a tied tensor stands under several layers: these must come from equal ones."""
    placed: Parts = {}
    for target, part in parts:
        first = placed.setdefault((target, part.into), part)
        if (first.terms, first.pattern, first.operation) == (part.terms, part.pattern, part.operation):
            continue
        weights = ours.backend.read(ours.model, [term.name for term in (*first.terms, *part.terms)])
        values = first.carry(weights, repr(target)), part.carry(weights, repr(target))
        if values[0] is None or values[1] is None or not np.array_equal(values[0], values[1]):
            raise MappingError(
                f"the target ties {target!r}, which would come from both {first.formula} and {part.formula}, and "
                f"these differ: untie it in the target, or tie them in the source"
            )
    return placed


def _rows(placed: Parts, theirs: Side) -> tuple[Row, ...]:
    """One row per tensor, of all its parts; a tensor of which a part has no origin is refused."""
    rows: dict[str, list[Part]] = {}
    for (target, _), part in placed.items():
        rows.setdefault(target, []).append(part)
    for target, parts in rows.items():
        covered = sum(math.prod(stop - start for start, stop in part.into) for part in parts if part.into)
        if all(part.into for part in parts) and covered != math.prod(theirs.tensors[target].shape):
            raise MappingError(
                f"the target's tensor {target!r} of shape {theirs.tensors[target].shape} has an origin for "
                f"{', '.join(part.role for part in parts)} alone; is the source of the same architecture?"
            )
    return tuple(Row(target, tuple(parts)) for target, parts in rows.items())


def _judge(match: Match, settled: Mapping[str, Evidence], given: Given) -> tuple[Evidence, str]:
    if match.target in given.layers:
        return "given", "a rule of yours"
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


def _check_all_placed(ours: Side, calls: Sequence[Call], step: LockStep, taken: set[tuple[str, Bounds]]) -> None:
    """Refuse a target that lacks a layer of the source, unless other layers hold all of that one's tensors."""
    called = dict.fromkeys(call.layer for call in calls if call.layer not in step.served)
    left = [name for name in called if not _held_elsewhere(ours.layers[name], step.weights, taken)]
    if left:
        layer: Layer = ours.layers[left[0]]
        raise MappingError(
            f"the target has no room for the source's layer {left[0]!r} ({describe_layer(layer)})"
            f"{f', nor for {len(left) - 1} others' if len(left) > 1 else ''}; is it of the same architecture?"
        )


def _held_elsewhere(layer: Layer, weights: Mapping[str, Array], taken: set[tuple[str, Bounds]]) -> bool:
    """Whether every tensor of the layer is among those taken, or equal to one of them."""
    return all(
        place_of(tensor) in taken
        or any(np.array_equal(cut(weights[tensor.name], tensor.within), cut(weights[n], w)) for n, w in taken)
        for tensor in layer.tensors.values()
    )
