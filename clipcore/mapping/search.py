"""The search for a run of the target that agrees with the source: ties tried, true differences excused."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np

from clipcore.errors import ClipcoreError, InvalidInput, MappingError
from clipcore.mapping.align import SAME
from clipcore.mapping.assembly import alone
from clipcore.mapping.compare import Comparison, as_close, tolerance
from clipcore.mapping.exchanges import Exchange, cost, least
from clipcore.mapping.given import Given
from clipcore.mapping.lockstep import Choices, Contradiction, LockStep, Tie, names_fit
from clipcore.mapping.models import Side
from clipcore.mapping.plan import Evidence, Row
from clipcore.mapping.recording import called
from clipcore.mapping.rows import rows_between, values_for
from clipcore.mapping.trials import Trial, rounds
from clipcore.mapping.unseen import Dependence, Unseen, place_unseen

Array = np.ndarray[Any, np.dtype[Any]]

_MOST_RUNS = 400  # of the target, over all ties together
_OUTPUTS = "<outputs>"
_NOWHERE = "<nowhere>"


def contradicted(step: LockStep) -> int:
    """In how many places the run says that a form of the sample is not the one: layers that saw something else, or
    gave another output. Where as many channels as steps fit both, nothing else does.
    """
    return len(step.differing) + (not step.same_outputs)


class Search:
    """Runs of the target in lock-step until one agrees everywhere, ties tried in order, true differences excused."""

    def __init__(self, comparison: Comparison, outputs: Any, weights: Mapping[str, Array], given: Given) -> None:
        self._comparison, self._outputs, self.weights, self._given = comparison, outputs, weights, given
        self._dependence = Dependence(comparison, outputs)
        self.unseen: Mapping[str, Unseen] = {}
        self.sample: Any = None
        self._bounds: Sequence[float] = ()
        self._known = False  # whether a run without contradiction is known
        self._runs = 0
        # what ties were decided by a contradiction that has nothing to do with a later one
        self._decided: dict[tuple[Choices, str], str] = {}
        self._written: dict[str, Any] = {}

    def solve(self, forms: Sequence[Any]) -> tuple[LockStep, dict[str, Evidence]]:
        """The run that agrees, and for layers that had several possible places, what settled them."""
        found: list[tuple[LockStep, Any]] = []
        failures: list[ClipcoreError] = []
        for form in forms:
            self.sample = form
            try:
                found.append((self._on(form), form))
            except (InvalidInput, MappingError) as err:
                failures.append(err)
                continue
            if not contradicted(found[-1][0]):
                break
        if not found:
            # a form that the target ran on says more than one that it refused
            raise next((err for err in failures if isinstance(err, MappingError)), failures[0])
        step, self.sample = min(found, key=lambda pair: contradicted(pair[0]))
        if step is not found[-1][0]:
            self._on(self.sample)
        self._known = True
        step = self._refined(step)
        if not contradicted(step):
            return self._settle(step)
        step, by_name = least(step, self._with_origins, self._comparison)
        better, settled = self._settle(step)
        while better is not step:
            step, by_name = better, {}
            better, settled = self._settle(step)
        return step, {**by_name, **settled}

    def _on(self, form: Any) -> LockStep:
        """The run on one form of the sample."""
        theirs = self._comparison.theirs
        assumed = {name for name, layer in theirs.layers.items() if not layer.bare}
        failure: MappingError | None = None
        try:
            # a run of the target would tell what is called; most models call all that they can
            self._place_unseen(assumed)
            step = self._with_excuses()
            if step.called == assumed:
                return step
        except MappingError as err:
            failure = err
        actual = called(theirs, form)
        if failure and actual == assumed:
            raise failure
        self._place_unseen(actual)
        return self._with_excuses()

    def _place_unseen(self, shown: Collection[str]) -> None:
        """Find the origins of what no call shows, and write it into the target."""
        ours, theirs = self._comparison.ours, self._comparison.theirs
        self._decided, self._written = {}, {}
        seen = {call.layer for call in self._comparison.calls}, shown
        self.unseen = place_unseen(ours, theirs, seen, self._given, self._dependence)
        for name, place in self.unseen.items():
            rows = rows_between(ours.layers[place.source], theirs.layers[name], SAME, self._given.tensors)
            theirs.backend.write(theirs.model, values_for(rows, theirs.tensors, self.weights, theirs.copies))
        given = [Row(tensor, (alone(tensor, self._given, ours, theirs),)) for tensor in self._given.tensors]
        theirs.backend.write(theirs.model, values_for(given, theirs.tensors, self.weights))

    def agrees(self, theirs: Side) -> bool:
        """Whether the target as it stands gives the source's outputs."""
        outputs = theirs.run(self.sample)
        return self._comparison.model_outputs(self._outputs, outputs) <= tolerance(self._outputs, outputs)

    def _with_excuses(self) -> LockStep:
        """A run without contradiction, one place after the other excused as a true difference."""
        excused: frozenset[str] = frozenset()
        while True:
            step, place = self._search(excused)
            if place is None:
                return step
            if place in excused:
                raise MappingError(f"no mapping found: the target's layer {place!r} fits no origin in the source")
            excused = step.excused | {place}

    def _search(self, excused: frozenset[str]) -> tuple[LockStep, str | None]:
        """Depth first: the first run without contradiction, or the one that came furthest."""
        failed: list[tuple[LockStep, str]] = []
        pending: Choices | None = ()
        while pending is not None and self._runs < _MOST_RUNS:
            step, place = self._run(self._step(pending, excused))
            if place is None:
                return step, None
            failed.append((step, place))
            pending = self._next_choices(step)
        if not failed:
            raise MappingError(f"no mapping found within {_MOST_RUNS} runs of the target: too many layers fit alike")
        furthest = max(failed, key=lambda pair: len(pair[0].matches))
        if pending is None:
            self._decide(furthest[0], [step for step, _ in failed])
        return furthest

    def _decide(self, furthest: LockStep, failed: Sequence[LockStep]) -> None:
        """Hold on to what the run that came furthest chose where every other choice was contradicted before the place
        at which this run was: the difference there has nothing to do with it.
        """
        reached: dict[int, int] = {}
        for step in failed:
            pairs = enumerate(zip(furthest.choices_made, step.choices_made, strict=False))
            turn = next((turn for turn, (mine, others) in pairs if mine != others), None)
            if turn is not None:
                reached[turn] = max(reached.get(turn, 0), len(step.errors))
        for turn, (target, source) in enumerate(furthest.choices_made):
            if reached.get(turn, 0) < len(furthest.errors):
                self._decided[furthest.choices_made[:turn], target] = source

    def _next_choices(self, step: LockStep) -> Choices | None:
        """The next choices, depth first: the last tie with an untried option that was not decided moves on."""
        made = step.choices_made
        for turn in reversed(range(len(step.ties))):
            tie = step.ties[turn]
            if (made[:turn], tie.target) not in self._decided and tie.chosen + 1 < len(tie.options):
                return (*made[:turn], (tie.target, tie.options[tie.chosen + 1]))
        return None

    def _step(self, choices: Choices, excused: frozenset[str]) -> LockStep:
        known = self._bounds, self._given, self._decided, self._written
        return LockStep(self._comparison, self.weights, dict(choices), excused, *known)

    def _run(self, step: LockStep) -> tuple[LockStep, str | None]:
        """The run, and the place where it contradicts the choices that were made; None where it does not."""
        self._runs += 1
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
        step.same_outputs = agreed or bool(step.kept)
        # behind a layer that kept its weights no outputs can agree
        if not (agreed or _OUTPUTS in step.excused or step.kept) or (
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
            small = as_close(error, before, self._outputs, None)
            if not step.ties or small or self._runs >= _MOST_RUNS:
                continue
            bounds[turn] = error / 8
            self._bounds, self._decided = bounds, {}
            better, place = self._search(step.excused)
            if place is None and better.errors[turn] < error / 8:
                step = better
            else:
                bounds[turn] = math.inf
        return step

    def _with_origins(self, exchange: Exchange) -> LockStep | None:
        """The run that is found when some layers get these origins; None where there is none."""
        own, self._decided, self._bounds = self._given, {}, ()
        self._given = replace(own, layers={**own.layers, **exchange})
        try:
            found = self._with_excuses()
        except MappingError:
            return None
        finally:
            self._given = own
        found.given, found.excused = own, found.excused | found.differing
        return found

    def _settle(self, step: LockStep) -> tuple[LockStep, dict[str, Evidence]]:
        """For each tie, whether another choice would do as well; then the names must tell. The first run in which less
        differs, instead, if there is one.
        """
        settled: dict[str, Evidence] = {}
        unseen = {name: match.source for name, match in step.matches.items() if match.input_error == math.inf}
        self._bounds, self._decided = [8 * error for error in accumulate(step.errors, max)], {}
        for exchanged in self._unrefuted(step):
            if settled.keys() >= exchanged.keys():
                continue
            if self._runs >= _MOST_RUNS:
                settled.update({tie.target: "structure" for tie in step.ties if tie.target not in settled})
                break
            made = tuple((target, exchanged.get(target, source)) for target, source in step.choices_made)
            other = self._step((*made, *exchanged.items()), step.excused)
            kept = {name: source for name, source in unseen.items() if name not in exchanged}
            other.given = replace(self._given, layers={**self._given.layers, **kept})
            _, place = self._run(other)
            other.given = self._given
            if place is not None:
                continue
            less = self._less_differs(step, other)
            if less > 0:
                return other, {}
            if less == 0:
                self._settle_by_name(step, other, settled)
        return step, settled

    def _unrefuted(self, step: LockStep) -> Iterator[Mapping[str, str]]:
        """The exchanges of tied layers of which no run with many of them at once shows that they are wrong."""
        for exchanges in rounds(step):
            if self._runs >= _MOST_RUNS:
                yield from exchanges
                continue
            trial = Trial.of(step, exchanges, self._bounds, self._written)
            _, place = self._run(trial)
            if place is not None:
                trial.refute()
            yield from (exchange for number, exchange in enumerate(exchanges) if number not in trial.refuted)

    def _less_differs(self, step: LockStep, other: LockStep) -> int:
        """1 if less differs in the other run, -1 if more does, 0 where it is as much."""
        if not contradicted(step):
            return 0
        names = [name for name in step.matches if step.matches[name].source != other.matches[name].source]
        costs = cost(step, names, self._comparison), cost(other, names, self._comparison)
        return (costs[0] > costs[1]) - (costs[0] < costs[1])

    @staticmethod
    def _settle_by_name(step: LockStep, other: LockStep, settled: dict[str, Evidence]) -> None:
        exchanged = [name for name in step.matches if step.matches[name].source != other.matches[name].source]
        for tie in step.ties:
            if tie.target in exchanged and not _is_named(tie):
                raise MappingError(
                    f"the target's layer {tie.target!r} has several possible origins that compute the same: "
                    f"{', '.join(map(repr, tie.options))}; nothing but a name can tell them apart: "
                    f"name the target's layer like its origin"
                )
        settled.update(dict.fromkeys(exchanged, "name"))


def _is_named(tie: Tie) -> bool:
    """Whether the origin chosen is the only one whose name fits."""
    return [option for option in tie.options if names_fit(option, tie.target)] == [tie.options[tie.chosen]]
