"""Exchanges: where models truly differ, the pairing of layers with which the least differs.

A search that goes on after a difference may pair a layer with the origin of another one. Each layer with a difference
is given every other origin that saw its input, whoever has that one gets its own, and a run tells what differs then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from clipcore.errors import MappingError
from clipcore.mapping.compare import Comparison
from clipcore.mapping.differences import differences_between
from clipcore.mapping.lockstep import LockStep, names_fit
from clipcore.mapping.plan import Evidence

Exchange = dict[str, str]  # layers of the target, and the origins that they get

_MOST = 40  # exchanges


class Cost(NamedTuple):
    """What differs in a run: how many layers, how much of what they take, and how many settings of some of them."""

    layers: int
    inputs: float
    settings: int


def least(
    step: LockStep, run: Callable[[Exchange], LockStep | None], comparison: Comparison
) -> tuple[LockStep, dict[str, Evidence]]:
    """The run with the fewest differences among those to which exchanges lead from the run `step`, and the layers of
    which a name alone settles the origin.

    Args:
        run: the run that is found with some layers' origins given; None where there is none.
    Raises:
        MappingError: with two pairings as much differs, and no name tells them apart.
    """
    tried: set[frozenset[tuple[str, str]]] = set()
    ties: list[tuple[Exchange, Exchange]] = []
    while len(tried) < _MOST:
        exchange = next((e for e in _exchanges(step, comparison) if frozenset(e.items()) not in tried), None)
        if exchange is None:
            break
        tried.add(frozenset(exchange.items()))
        other = run(exchange)
        if other is None:
            continue
        own, others = _where_different(step, other)
        costs = cost(step, own, comparison), cost(other, own, comparison)
        if costs[1] < costs[0]:
            step = other
        elif costs[1] == costs[0] and any(_saw(way, name) for way in (step, other) for name in own):
            ties.append((own, others))
    settled: dict[str, Evidence] = {}
    for own, others in ties:
        if all(step.matches[name].source == source for name, source in own.items()):
            _check_named(own, others)
            settled.update(dict.fromkeys(own, "name"))
    return step, settled


def _saw(step: LockStep, layer: str) -> bool:
    """Whether a layer takes what its origin does; of those that do not, the order of execution decides."""
    return step.matches[layer].input_error < math.inf


def _where_different(step: LockStep, other: LockStep) -> tuple[Exchange, Exchange]:
    """The layers with one origin in one run and another in the other, with both origins."""
    names = [n for n, match in step.matches.items() if other.matches[n].source != match.source]
    return {n: step.matches[n].source for n in names}, {n: other.matches[n].source for n in names}


def _exchanges(step: LockStep, comparison: Comparison) -> Iterator[Exchange]:
    """Other origins for each layer with a difference: those that saw its input, those of others with a difference, and
    of those that might as well have its own; whoever has that one gets its own, or what the search finds for it.
    """
    owners = {match.source: name for name, match in step.matches.items()}
    differing = step.differing
    held = [match.source for name, match in step.matches.items() if name in differing]
    for layer, match in step.matches.items():
        if layer not in differing or layer in step.given.layers:
            continue
        tied = [step.matches[tie.target].source for tie in step.ties if match.source in tie.options]
        for option in dict.fromkeys([*step.others.get(layer, ()), *held, *tied]):
            holder = owners.get(option)
            if option == match.source or option not in comparison.fitting[layer] or holder in step.given.layers:
                continue
            yield {layer: option}
            if holder and match.source in comparison.fitting[holder]:
                yield {layer: option, holder: match.source}


def cost(step: LockStep, layers: Collection[str], comparison: Comparison) -> Cost:
    """What differs in a run, the settings of some layers."""
    settings = 0
    for name in layers:
        match = step.matches[name]
        pair = comparison.ours.layers[match.source], comparison.theirs.layers[name]
        call = comparison.calls[comparison.calls_of[match.source][0]]
        settings += len(differences_between(*pair, call, frozenset({"padding"} if match.padded else ())))
    differing = sorted(step.differing)
    inputs = sum(step.apart.get(name, 1.0) for name in differing)
    return Cost(len(differing) + (not step.same_outputs), round(inputs, 6), settings)


def _check_named(own: Exchange, other: Exchange) -> None:
    """Refuse two pairings of which the names do not say which is right."""
    fits = [all(names_fit(source, target) for target, source in pairs.items()) for pairs in (own, other)]
    if fits != [True, False]:
        layer, option = next(iter(other.items()))
        raise MappingError(
            f"the target's layer {layer!r} has two possible origins in the source, and with either as much differs: "
            f"{own[layer]!r}, {option!r}; nothing but a name can tell them apart: name the target's layer like its "
            f"origin"
        )
