"""The settings in which two models' layers differ, without moving anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from clipcore.backend import Layer
from clipcore.errors import MappingError
from clipcore.mapping.align import SAME
from clipcore.mapping.differences import differences_between
from clipcore.mapping.find import plan as find_plan
from clipcore.mapping.lockstep import names_fit, plain_name
from clipcore.mapping.models import Side
from clipcore.mapping.plan import Difference, Plan
from clipcore.mapping.repairs import repaired
from clipcore.mapping.rows import describe_layer, fits, parts_between


def diff(
    source: Any, target: Any, plan: Plan | None = None, *, sample: Any = None, target_sample: Any = None
) -> tuple[Difference, ...]:
    """Every setting in which matched layers differ: eps, momentum, strides, padding, activations, slopes and the like.

    Layers without tensors (activations, pooling, dropout) are compared where both models have as many of a kind as
    modules or layers; a function call in between cannot be seen.

    Args:
        source, target: models of any installed backends; they are neither changed nor, without a sample, run.
        plan: says which layers belong together; left out, it is sought on `sample`, and without that the layers are
            matched by kind and shape, names and order.
        sample, target_sample: see `plan`.
    Returns:
        The differences, in the target's order; those that a plan makes up for say so. Of layers that have no
        counterpart, one whose setting is "layer".
    Raises:
        MappingError: layers cannot be matched; give a plan or a sample.
    """
    ours, theirs = Side(source, "source"), Side(target, "target")
    if plan is None and sample is not None:
        plan = find_plan(source, target, sample, target_sample=target_sample)
    if plan is not None:
        return (*plan.differences, *_between(_operations(ours, theirs)))
    pairs, alone = _matched(ours.layers, theirs.layers)
    return (*alone, *_between([*pairs, *_operations(ours, theirs)]))


def _between(pairs: Iterable[tuple[Layer, Layer]]) -> Iterator[Difference]:
    for source, target in pairs:
        found = differences_between(source, target, None, strict=True)
        made = parts_between(source, target, SAME, "structure", "")
        yield from repaired(target, found, [part for parts in made.values() for part in parts])


def _matched(
    ours: Mapping[str, Layer], theirs: Mapping[str, Layer]
) -> tuple[list[tuple[Layer, Layer]], list[Difference]]:
    """The layers that belong together by kind and shape, then names, then order; and those of one side alone."""
    free = dict(ours)
    pairs: list[tuple[Layer, Layer]] = []
    alone: list[Difference] = []
    for name, layer in theirs.items():
        candidates = [n for n, other in free.items() if fits(other, layer)]
        same = [n for n in candidates if plain_name(n) == plain_name(name)]
        close = same or [n for n in candidates if names_fit(n, name)]
        rivals = [n for n, other in theirs.items() if any(fits(ours[c], other) for c in candidates)]
        every = [n for n, other in ours.items() if fits(other, layer)]
        if not candidates:
            alone.append(Difference(name, "layer", "absent", describe_layer(layer)))
            continue
        if len(close) == 1:
            origin = close[0]
        elif len(every) == len(rivals):
            origin = candidates[0]
        else:
            raise MappingError(
                f"the target's layer {name!r} ({describe_layer(layer)}) has {len(candidates)} possible origins, and "
                f"without running the models nothing tells which: give sample= or a plan"
            )
        pairs.append((free.pop(origin), layer))
    return pairs, alone + [Difference(name, "layer", describe_layer(layer), "absent") for name, layer in free.items()]


def _operations(ours: Side, theirs: Side) -> Iterator[tuple[Layer, Layer]]:
    """Layers without tensors in turn, of each kind of which both models have as many."""
    sides = [side.backend.operations(side.model) for side in (ours, theirs)]
    for kind in dict.fromkeys(layer.kind for layer in sides[1]):
        first, second = ([layer for layer in side if layer.kind == kind] for side in sides)
        if len(first) == len(second):
            yield from zip(first, second, strict=True)
