"""Why two models differ, place by place: explanations that were tested by computing with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from clipcore.backend import Layer
from clipcore.mapping.align import Arrangement
from clipcore.mapping.compare import Comparison, repadded
from clipcore.mapping.differences import difference, differences_between
from clipcore.mapping.kinds import kind_of
from clipcore.mapping.plan import Difference
from clipcore.migration.hypotheses import same, why_another_input
from clipcore.migration.replay import HIDDEN, Replay
from clipcore.migration.side_by_side import SideBySide, Step

Array = np.ndarray[Any, np.dtype[Any]]


def explained(
    comparison: Comparison, target_sample: Any, origin: Mapping[str, str], allowed: float
) -> tuple[list[Step], list[Difference]]:
    """The steps of a run of the target beside the source, and every difference in it, those that were tested marked.

    Args:
        comparison: with the source's calls on the sample.
        target_sample: the sample as the target takes it.
        origin: for each layer of the target, its origin.
        allowed: the relative error up to which two models are the same.
    """
    watcher = SideBySide(comparison, origin, allowed)
    comparison.theirs.run(target_sample, watcher)
    found: list[Difference] = []
    for number, step in enumerate(watcher.steps):
        if number in watcher.inputs:
            found += _of_input(comparison, step, *watcher.inputs[number])
        if step.output_error > allowed:
            taken = _back(*watcher.inputs[number]) if number in watcher.went_on else None
            found += _of_output(comparison, step, watcher.outputs.get(number), taken)
    return list(_with_unmet(watcher.steps, comparison)), list(dict.fromkeys(found))


def _with_unmet(steps: Sequence[Step], comparison: Comparison) -> Iterator[Step]:
    """The steps, and between them the source's calls that no layer of the target is."""
    met = {step.call for step in steps}
    unmet = [index for index in range(len(comparison.calls)) if index not in met]
    for step in (*steps, None):
        while unmet and (step is None or unmet[0] < step.call):
            name = comparison.calls[unmet.pop(0)].layer
            yield Step(name, "", comparison.ours.layers[name].kind)
        if step is not None:
            yield step


def _of_output(comparison: Comparison, step: Step, theirs: Array | None, taken: Array | None) -> list[Difference]:
    """Why a layer gives something else than its origin, which took the same, or, in another shape, not `taken`."""
    source, target = comparison.ours.layers[step.source], comparison.theirs.layers[step.target]
    ignored = {*_idle(target), *(["padding"] if step.padded else [])}
    listed = differences_between(source, target, comparison.calls[step.call], frozenset(ignored))
    gives = _test(comparison, step, theirs, taken)
    if gives is None:
        return listed or [_unexplained(step, "output")]
    known = {d.setting: target.settings[d.setting] for d in listed if d.setting in target.settings}
    settings = {**source.settings, **known}
    if gives(settings):
        # of several, those without which it would give something else
        return [replace(d, tested=not gives({**settings, d.setting: source.settings.get(d.setting)})) for d in listed]
    for setting, values in HIDDEN.get(target.kind, {}).items():
        for value in values:
            if gives({**settings, setting: value}):
                hidden = difference(target.name, setting, settings.get(setting, False), value, tested=True)
                return [*(replace(d, tested=True) for d in listed), hidden]
    return listed or [_unexplained(step, "output")]


def _test(
    comparison: Comparison, step: Step, theirs: Array | None, taken: Array | None
) -> Callable[[Mapping[str, Any]], bool] | None:
    """Whether the source's layer gives with some settings what the target's gave; None where nothing computes it."""
    call = comparison.calls[step.call]
    if theirs is None or not isinstance(call.output, np.ndarray):
        return None
    try:
        ours, other = Replay(comparison.ours, call), Replay(comparison.ours, call, taken)
    except ValueError:
        return None
    arrangement = comparison.expected((step.source, step.target), call.output, theirs, step.call + 1)
    if arrangement is None or not same(ours.run(comparison.ours.layers[step.source].settings), call.output):
        return None
    return partial(_gives, other, theirs, arrangement)


def _idle(layer: Layer) -> Sequence[str]:
    kind = kind_of(layer.kind)
    return kind.training_settings if kind else ()


def _gives(replay: Replay, theirs: Array, arrangement: Arrangement, settings: Mapping[str, Any]) -> bool:
    try:
        return same(arrangement.apply(replay.run(settings)), theirs)
    except (KeyError, TypeError, ValueError, IndexError):  # a setting that does not go with this layer
        return False


def _unexplained(step: Step, what: str) -> Difference:
    return difference(step.target, what, "another", "another")


def _of_input(comparison: Comparison, step: Step, theirs: Array, arrangement: Arrangement) -> list[Difference]:
    """Why a layer takes something else than its origin, although everything before agrees."""
    ours = comparison.calls[step.call].inputs[0]
    if arrangement.apply(ours).shape != theirs.shape:
        pair = comparison.theirs.layers[step.target], comparison.ours.layers[step.source]
        theirs = repadded(theirs, *pair, ours)
    found = list(why_another_input(comparison, step, ours, np.asarray(_back(theirs, arrangement), np.float64)))
    # what has another shape has it from a stride before it, named there
    return found or ([_unexplained(step, "input")] if arrangement.apply(ours).shape == theirs.shape else [])


def _back(value: Array, arrangement: Arrangement) -> Array:
    return Arrangement(arrangement.target, arrangement.source, arrangement.sizes).apply(value)
