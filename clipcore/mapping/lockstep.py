"""Lock-step execution: the target runs layer by layer beside the recorded source, taking its weights as it goes.

When a layer of the target is about to run, its actual input is known: the source's layer of that kind and shape that
saw the same input is its origin. Its weights are written, the layer runs, and the outputs are compared. Where they
differ although the inputs agree, the two layers are different functions; the source's output then flows on, so that
one difference does not hide the next.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import numpy as np

from clipcore.backend import Bounds, Layer, Tensor
from clipcore.errors import MappingError
from clipcore.mapping.align import SAME, Agreement, Arrangement
from clipcore.mapping.compare import Comparison, as_close, tolerance
from clipcore.mapping.given import Given
from clipcore.mapping.kinds import kind_of
from clipcore.mapping.models import Side
from clipcore.mapping.plan import cut
from clipcore.mapping.rows import describe_layer, rows_between, values_for

Array = np.ndarray[Any, np.dtype[Any]]


class Contradiction(Exception):
    """The choices made so far cannot be right, or the models differ here."""

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.place = place


def plain_name(name: str) -> tuple[str, ...]:
    """A name's words and numbers, case and separators aside."""
    return tuple(re.findall(r"[a-z]+|\d+", name.lower()))


def names_fit(source: str, target: str) -> bool:
    """Whether one name holds every word and number of the other ("text", "tower_text"), or both end alike ("a.key",
    "attention/key").
    """
    first, second = set(plain_name(source)), set(plain_name(target))
    ends = [plain_name(re.split(r"[./]", name)[-1]) for name in (source, target)]
    return bool(first and second) and (first <= second or second <= first or ends[0] == ends[1])


def resemblance(source: str, target: str) -> float:
    """How alike two names are, in [0, 1]: the order in which equals are tried, and never a reason."""
    return SequenceMatcher(None, " ".join(plain_name(source)), " ".join(plain_name(target))).ratio()


def place_of(tensor: Tensor) -> tuple[str, Bounds]:
    """Where a tensor lies: a stored tensor, or a part of one."""
    return tensor.name, tensor.within


@dataclass
class Match:
    """One pair of layers, and what speaks for it."""

    source: str
    target: str
    arrangement: Arrangement
    input_error: float
    same_output: bool = True
    padded: bool = False
    options: int = 1


class Tie(NamedTuple):
    """A layer for which several origins saw the same input: the options in the order in which they are tried."""

    target: str
    options: tuple[str, ...]
    chosen: int


class Opened(NamedTuple):
    """One call of the target: the match of its layer, the source's call that it is, and whether that one's inputs were
    put in the place of its own.
    """

    match: Match
    call: int
    put_in: bool


Choices = tuple[tuple[str, str], ...]  # of each tie in turn, the target's layer and its origin


@dataclass
class LockStep:
    """The watcher of one run of the target.

    What must find a place is the source's calls and tensors, not its layers: a layer that is called twice may be two
    layers in the target, and equal ones may be one there.

    Attributes:
        choices: for layers with several possible origins, which one to take; the first where none is given.
        excused: layers that may see another input than their origin, or give another output; one that does is added
            where no tie is open that could be the cause.
        bounds: for each call of the target in turn, the largest error of its input that is no contradiction.
        given: the origins that rules name.
        decided: by the choices before a tie, and its layer, the origin that no other choice needs to be tried for.
        written: what the target's layers hold from runs before, so that it is not written again.
        served: layers of the source of which a call was met.
        called: layers of the target of which a call was met.
        alike: layers that took something else than their origin, and gave the same: a table that is asked for other
            places, or for none.
        kept: layers that ran as they are, since they have no counterpart.
        choices_made: of the ties in turn.
        opened: what each call of the target in turn was; None where its tensors were in their place already.
        errors: for each call of the target in turn, the error of its input; 0 where it was excused.
        same_outputs: whether the model's outputs are the source's.
        apart: for layers that take something else than their origin, which part of the features or channels differs.
        others: for layers with a difference, what else may be their origin, since it saw the same input.
    """

    comparison: Comparison
    weights: Mapping[str, Array]
    choices: Mapping[str, str] = field(default_factory=dict)
    excused: frozenset[str] = frozenset()
    bounds: Sequence[float] = ()
    given: Given = field(default_factory=Given)
    decided: Mapping[tuple[Choices, str], str] = field(default_factory=dict)
    written: dict[str, tuple[str, Arrangement]] = field(default_factory=dict)
    matches: dict[str, Match] = field(default_factory=dict)
    ties: list[Tie] = field(default_factory=list)
    served: set[str] = field(default_factory=set)
    called: set[str] = field(default_factory=set)
    alike: set[str] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)
    choices_made: Choices = ()
    opened: list[Opened | None] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    apart: dict[str, float] = field(default_factory=dict)
    others: dict[str, list[str]] = field(default_factory=dict)
    same_outputs: bool = True
    stopped: Exception | None = None
    _used: set[int] = field(default_factory=set)
    _finished: set[str] = field(default_factory=set)  # layers of which every call was met
    _placed: set[tuple[str, Bounds]] = field(default_factory=set)
    _open: list[Opened | None] = field(default_factory=list)

    @property
    def differing(self) -> frozenset[str]:
        """Layers that take something else than their origin, and give something else, or that do the latter alone."""
        return frozenset(
            name
            for name, match in self.matches.items()
            if not match.same_output or (match.input_error == math.inf and name not in self.alike)
        )

    def hold(self, layers: Iterable[str]) -> None:
        """Take note of layers of the target that have their tensors already."""
        for name in layers:
            self._placed |= {place_of(tensor) for tensor in self.comparison.theirs.layers[name].tensors.values()}

    def before(self, layer: str, inputs: list[Array]) -> list[Array] | None:
        if layer not in self.comparison.theirs.layers:
            return None
        self.called.add(layer)
        try:
            return self._before(layer, inputs)
        except Exception as err:
            self.stopped = err
            raise

    def after(self, layer: str, output: Any) -> Any | None:
        if layer not in self.comparison.theirs.layers:
            return None
        try:
            return self._after(layer, output)
        except Exception as err:
            self.stopped = err
            raise

    def _before(self, layer: str, inputs: list[Array]) -> list[Array] | None:
        known = self.matches.get(layer)
        names = self._candidates(layer)
        if not names and (self.given.keep or self._is_placed(layer)):
            if not self._is_placed(layer):
                self.kept.add(layer)
            self.errors.append(0.0)
            return self._take(None, inputs)
        found = self._same_input(layer, names, inputs)
        error = 0.0
        if known and found:
            match, (agreement, index) = known, min(found.values(), key=lambda pair: pair[0].error)
            error = agreement.error
        elif found:
            match, index = self._choose(layer, found)
            self._check_order(layer, found[match.source][0], index, inputs)
            error = match.input_error
        elif layer in self.excused or layer in self.given.layers or self._all_decided():
            match, index = self._by_structure(layer, inputs)
            self.others[layer] = self._that_saw(layer, inputs)
            if layer not in self.given.layers:
                self.excused |= {layer}
        else:
            raise Contradiction(layer)
        if not self.within_bound(error, self.comparison.calls[index].inputs, inputs):
            raise Contradiction(layer)
        self.errors.append(error)
        if known:
            match = known
        else:
            self._bind(layer, match)
        put_in = self._take(Opened(match, index, put_in=not found), inputs)
        if put_in is not None:
            self.apart[layer] = self.comparison.part_that_differs(layer, inputs, put_in)
        return put_in

    def _take(self, opened: Opened | None, inputs: list[Array]) -> list[Array] | None:
        """Take note of a call that begins; the inputs that are put in, if any."""
        self._open.append(opened)
        self.opened.append(opened)
        if opened is None:
            return None
        call = self.comparison.calls[opened.call]
        self._used.add(opened.call)
        if self._used.issuperset(self.comparison.calls_of[call.layer]):
            self._finished.add(call.layer)
        self.served.add(call.layer)
        if not opened.put_in:
            return None
        match = opened.match
        put_in = self.comparison.as_taken(opened.call, match.target, inputs, match.arrangement)
        if put_in is None:
            self.alike.add(match.target)  # until its output says otherwise
        else:
            match.padded |= any(a.size != b.size for a, b in zip(call.inputs, put_in, strict=True))
        return put_in

    def _all_decided(self) -> bool:
        """Whether no other choice could be the cause of what is seen."""
        return not self.bounds and all(
            (self.choices_made[:turn], tie.target) in self.decided for turn, tie in enumerate(self.ties)
        )

    def _after(self, layer: str, output: Any) -> Any | None:
        opened = self._open.pop()
        if opened is None:
            return None
        match, index, _ = opened
        replaced, error = self.comparison.layer_outputs(index, layer, output)
        if error <= tolerance(self.comparison.calls[index].output, output):
            pair = self.comparison.ours.layers[match.source], self.comparison.theirs.layers[layer]
            return replaced if self.comparison.lacks_bias(*pair) else None
        match.same_output = False
        self.alike.discard(layer)
        if match.options > 1 and layer not in self.excused:
            raise Contradiction(layer)
        self.others.setdefault(layer, []).extend(self._with_same_input(layer, index))
        return replaced

    def within_bound(self, error: float, ours: Any, theirs: Any) -> bool:
        """Whether the error of the next call's input, or of the outputs after the last, contradicts no bound."""
        turn = len(self.errors)
        return turn >= len(self.bounds) or as_close(error, self.bounds[turn] / 8, ours, theirs)

    def _candidates(self, layer: str) -> list[str]:
        """The source's layers that a call of the target's layer may be one of: those with a call that is not met yet;
        of a layer whose origin is known, that one and its equals.
        """
        if layer in self.given.layers:
            return [self.given.layers[layer]]
        reserved = set(self.given.layers.values())
        names = [n for n in self.comparison.fitting[layer] if n not in reserved and n not in self._finished]
        known = self.matches.get(layer)
        if known is None:
            same_sizes = self.comparison.of_same_sizes[layer]
            return [n for n in names if n in same_sizes] or names
        return [known.source, *(name for name in names if name != known.source and self._equal(name, known.source))]

    def _equal(self, first: str, second: str) -> bool:
        """Whether two layers of the source hold the same tensors."""
        ours, others = (self.comparison.ours.layers[name].tensors for name in (first, second))
        return ours.keys() == others.keys() and all(
            np.array_equal(self._weight(ours[role]), self._weight(others[role])) for role in ours
        )

    def _weight(self, tensor: Tensor) -> Array:
        return cut(self.weights[tensor.name], tensor.within)

    def _is_placed(self, layer: str) -> bool:
        """Whether layers that ran before hold all tensors of this one: where the target has a tied layer, the source
        may have an operation on the other layer's tensor.
        """
        return all(place_of(tensor) in self._placed for tensor in self.comparison.theirs.layers[layer].tensors.values())

    def _same_input(self, layer: str, names: Sequence[str], inputs: list[Array]) -> dict[str, tuple[Agreement, int]]:
        """For each candidate that saw this input, the call in which it did."""
        best: dict[str, tuple[Agreement, int]] = {}
        # calls that were met already come last: they count for a layer that is called more often in the target
        known = self.matches.get(layer)
        calls = [index for name in names for index in self.comparison.calls_of.get(name, ())]
        if known is None:
            calls = [index for index in calls if index not in self._used]
        alike = self.comparison.alike(calls, inputs)
        for index in sorted(alike, key=lambda index: (index in self._used, index)):
            call = self.comparison.calls[index]
            agreement = self.comparison.inputs(index, layer, inputs)
            nearest = best[call.layer][0].error if call.layer in best else math.inf
            if agreement.error <= tolerance(call.inputs, inputs) and agreement.error < nearest:
                best[call.layer] = agreement, index
        closest = min((agreement.error for agreement, _ in best.values()), default=0.0)
        # candidates much further off than the closest saw something else that is merely alike
        return {
            name: (agreement, index)
            for name, (agreement, index) in best.items()
            if as_close(agreement.error, closest, self.comparison.calls[index].inputs, inputs)
        }

    def _that_saw(self, layer: str, inputs: list[Array]) -> list[str]:
        """The source's layers that saw this input, also those of which every call was met as another's."""
        calls = [index for name in self.comparison.fitting[layer] for index in self.comparison.calls_of[name]]
        agreements = {i: self.comparison.inputs(i, layer, inputs) for i in self.comparison.alike(calls, inputs)}
        found = [i for i in agreements if agreements[i].error <= tolerance(self.comparison.calls[i].inputs, inputs)]
        return list(dict.fromkeys(self.comparison.calls[index].layer for index in found))

    def _with_same_input(self, layer: str, index: int) -> list[str]:
        """The source's layers that a layer of the target may be and that saw what call `index` did."""
        calls_of = self.comparison.calls_of
        names = self.comparison.fitting[layer]
        return [name for name in names if any(self._same_call_inputs(index, other) for other in calls_of[name])]

    def _choose(self, layer: str, found: Mapping[str, tuple[Agreement, int]]) -> tuple[Match, int]:
        options = sorted(found, key=lambda name: (not names_fit(name, layer), -resemblance(name, layer)))
        wanted = self.choices.get(layer, self.decided.get((self.choices_made, layer)))
        chosen = options.index(wanted) if wanted in options else 0
        if len(options) > 1:
            self.ties.append(Tie(layer, tuple(options), chosen))
            self.choices_made = (*self.choices_made, (layer, options[chosen]))
        agreement, index = found[options[chosen]]
        match = Match(
            options[chosen],
            layer,
            agreement.arrangement,
            agreement.error,
            padded=agreement.padded,
            options=len(options),
        )
        return match, index

    def _check_order(self, layer: str, agreement: Agreement, index: int, inputs: list[Array]) -> None:
        kind = kind_of(self.comparison.theirs.layers[layer].kind)
        if kind and kind.features and self.comparison.order_is_open(index, inputs, agreement):
            raise MappingError(
                f"on this sample too many features that the target's layer {layer!r} takes are the same, or NaN: their "
                f"order after flattening cannot be seen; give another sample"
            )

    def _by_structure(self, layer: str, inputs: list[Array]) -> tuple[Match, int]:
        """The origin of a layer whose input no source layer saw: with the input that the one of its kind and shape saw,
        or the next of them in order, any layer that saw that input as well.
        """
        known = self.matches.get(layer)
        name = self.given.layers.get(layer) or (known.source if known else self._next_in_order(layer))
        index = self._next_call(name)
        if known:
            return known, index
        options = {name: index}
        for other in self._candidates(layer):
            call = self._next_call(other)
            if self._same_call_inputs(index, call):
                options.setdefault(other, call)
        arrangement = self._expected_arrangement(layer, index, inputs)
        return self._choose(layer, {other: (Agreement(math.inf, arrangement), i) for other, i in options.items()})

    def _next_call(self, name: str) -> int:
        """The first call of a source layer that is not met yet; the first of all where every one is."""
        calls = [index for index, call in enumerate(self.comparison.calls) if call.layer == name]
        return next((index for index in calls if index not in self._used), calls[0])

    def _same_call_inputs(self, first: int, second: int) -> bool:
        ours, others = (self.comparison.calls[index].inputs for index in (first, second))
        return len(ours) == len(others) and all(map(np.array_equal, ours, others))

    def _next_in_order(self, layer: str) -> str:
        """The source layer left of this kind and shape: by an equal name, the only one, or the next in execution."""
        candidates = self._candidates(layer)
        names = [name for name in candidates if name not in self.served] or candidates
        waiting = [
            name
            for name in self.comparison.theirs.layers
            if name not in self.matches
            and not (self.comparison.of_same_sizes[name] or set(self.comparison.fitting[name])).isdisjoint(names)
        ]
        fitting = [name for name in names if plain_name(name) == plain_name(layer)]
        # where no name says anything, the order of execution does, if as many layers are left on both sides
        speaking = {plain_name(name) for name in names} & {plain_name(name) for name in waiting}
        if len(fitting) != 1 and (not names or (len(names) > 1 and (speaking or len(names) != len(waiting)))):
            placed = (
                f"{len(self.matches)} of the target's {len(self.comparison.theirs.layers)} layers had one before it"
            )
            raise MappingError(_no_place(self.comparison.theirs.layers[layer], names, self.comparison.ours, placed))
        return [*fitting, *names][0]

    def _expected_arrangement(self, layer: str, index: int, inputs: list[Array]) -> Arrangement:
        ours = self.comparison.calls[index].inputs
        kind = kind_of(self.comparison.theirs.layers[layer].kind)
        if not ours or not inputs or ours[0].ndim != inputs[0].ndim:
            return SAME
        if ours[0].ndim < 3 and not (kind and kind.features):
            return SAME
        pair = self.comparison.calls[index].layer, layer
        arrangement = self.comparison.expected(pair, ours[0], inputs[0], index)
        if arrangement is None:
            raise MappingError(
                f"the {ours[0].shape[-1]} features that the target's layer {layer!r} takes differ from the source's, "
                f"so that their order after flattening cannot be seen; let what comes before it (a layer that one "
                f"lacks, pooling, activation) compute the same, or give another sample"
            )
        return arrangement

    def _bind(self, layer: str, match: Match) -> None:
        self.matches[layer] = match
        self.hold([layer])
        if self.written.get(layer) == (match.source, match.arrangement):
            return
        rows = rows_between(
            self.comparison.ours.layers[match.source],
            self.comparison.theirs.layers[layer],
            match.arrangement,
            self.given.tensors,
        )
        theirs = self.comparison.theirs
        theirs.backend.write(theirs.model, values_for(rows, theirs.tensors, self.weights, theirs.copies))
        if not self.comparison.shares_tensors(layer):
            self.written[layer] = match.source, match.arrangement


def _no_place(layer: Layer, candidates: Sequence[str], source: Side, placed: str) -> str:
    what = f"the target's layer {layer.name!r} ({describe_layer(layer)})"
    if candidates:
        return (
            f"{what} has several possible origins in the source and nothing to tell them apart: "
            f"{', '.join(map(repr, candidates))}; give its layer the name of its origin, or another sample"
        )
    alike = [
        f"{other.name!r} ({describe_layer(other)})" for other in source.layers.values() if other.kind == layer.kind
    ]
    return (
        f"{what} has no counterpart in the source: of that kind and shape none is left there "
        f"(of that kind: {', '.join(alike[:5]) or 'none'}); {placed}: build one like the other, or "
        f"leave such layers as they are with unmapped='keep'"
    )
