"""From matched layers to a plan: the parts of every tensor, what differs, and what has no place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clipcore.backend import Bounds, Layer
from clipcore.errors import MappingError
from clipcore.mapping.align import SAME
from clipcore.mapping.differences import difference, differences_between
from clipcore.mapping.flow import Flow
from clipcore.mapping.given import Given
from clipcore.mapping.lockstep import LockStep, Match, place_of
from clipcore.mapping.models import Side
from clipcore.mapping.plan import Difference, Evidence, Part, Plan, Row, cut
from clipcore.mapping.recording import Call
from clipcore.mapping.repairs import Pair, Parts, repair_together, repaired
from clipcore.mapping.rows import describe_layer, given_part, parts_between
from clipcore.mapping.unseen import Unseen

Array = np.ndarray[Any, np.dtype[Any]]


def alone(tensor: str, given: Given, ours: Side, theirs: Side) -> Part:
    """The part of a tensor that a rule names, with the layers that both are of."""
    origin, pattern = given.tensors[tensor]
    source = next(layer for layer in ours.layers.values() if origin in {t.name for t in layer.tensors.values()})
    target, role = next((x, role) for x in theirs.layers.values() for role, t in x.tensors.items() if t.name == tensor)
    return given_part(source.name, target, role, origin, pattern)


def assemble(
    theirs: Side,
    flow: Flow,
    step: LockStep,
    settled: Mapping[str, Evidence],
    unseen: Mapping[str, Unseen],
    given: Given,
) -> Plan:
    ours, calls = flow.side, flow.calls
    pairs = {
        name: (match.source, match.arrangement, *_judge(match, settled, given, name in step.alike))
        for name, match in step.matches.items()
    }
    agreed = not step.differing and step.same_outputs
    pairs.update({name: (place.source, SAME, *place.judged(agreed)) for name, place in unseen.items()})
    first_calls = {call.layer: call for call in reversed(calls)}
    matched: dict[str, Pair] = {}
    parts: list[tuple[str, Part]] = []
    differences: list[Difference] = []
    for name, layer in theirs.layers.items():
        if name not in pairs:
            parts += [
                (t.name, alone(t.name, given, ours, theirs)) for t in layer.tensors.values() if t.name in given.tensors
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
        if name in step.excused - step.alike:
            differences.append(difference(name, "input", "another", "another"))
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


def _judge(match: Match, settled: Mapping[str, Evidence], given: Given, alike: bool) -> tuple[Evidence, str]:
    if match.target in given.layers:
        return "given", "a rule of yours"
    if settled.get(match.target) == "structure":
        return "structure", f"the first of {match.options} that fits what follows; not all others were tried"
    if match.target in settled:
        return "name", "several layers would do as well; the names decide"
    if alike:
        return "proven", "gave the same output, though it takes something else"
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
