"""Why two models differ, place by place: explanations that were tested by computing with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, product
from typing import Any

import numpy as np

from clipcore.backend import Layer
from clipcore.mapping.align import Arrangement, relative_error
from clipcore.mapping.compare import Comparison, repadded
from clipcore.mapping.differences import difference, differences_between
from clipcore.mapping.kinds import kind_of
from clipcore.mapping.models import Side
from clipcore.mapping.plan import Difference
from clipcore.mapping.recording import Call
from clipcore.mapping.reference import ACTIVATIONS, activate
from clipcore.migration.replay import HIDDEN, Replay, pooled
from clipcore.migration.side_by_side import SideBySide, Step
from clipcore.structure import leaves

Array = np.ndarray[Any, np.dtype[Any]]

_EXPLAINED = 1e-5  # the relative error up to which an explanation gives what was seen
_BEFORE = 6  # how many values before a layer's input it is explained by
_BEFORE_POOLS = (None, "relu", "relu6", "silu", "gelu", "tanh")
_FEWEST = 4  # elements that one number multiplied and one added must explain


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


def _same(first: Array, second: Array) -> bool:
    return relative_error(first, second) <= _EXPLAINED


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
    if arrangement is None or not _same(ours.run(comparison.ours.layers[step.source].settings), call.output):
        return None
    return partial(_gives, other, theirs, arrangement)


def _idle(layer: Layer) -> Sequence[str]:
    kind = kind_of(layer.kind)
    return kind.training_settings if kind else ()


def _gives(replay: Replay, theirs: Array, arrangement: Arrangement, settings: Mapping[str, Any]) -> bool:
    try:
        return _same(arrangement.apply(replay.run(settings)), theirs)
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
    target = np.asarray(_back(theirs, arrangement), np.float64)
    if ours.shape != target.shape:
        # else it is a stride before it, named there, that makes it smaller
        return list(_elsewhere(comparison, step, ours, target))
    for mine, other in _whole_and_parts(comparison, step, ours, target):
        for hypothesis in (_activations, _pools, _scaled):
            found = list(hypothesis(comparison, step, mine, other))
            if found:
                return found
    return list(_elsewhere(comparison, step, ours, target)) or [_unexplained(step, "input")]


def _whole_and_parts(comparison: Comparison, step: Step, ours: Array, theirs: Array) -> Iterator[tuple[Array, Array]]:
    """Two values that differ; and where they have equal channels, those that do not, in parts as wide as what flowed
    before: one branch of a concatenation.
    """
    yield ours, theirs
    axis = _channel_axis(comparison, ours)
    first, second = (np.moveaxis(value, axis, 0) for value in (ours, theirs))
    differing = [place for place, pair in enumerate(zip(first, second, strict=True)) if not _same(*pair)]
    if not differing or len(differing) == len(first):
        return
    start, stop = differing[0], differing[-1] + 1
    flowed = islice((v for v in _flowed(comparison, step.call) if v.ndim == ours.ndim), _BEFORE)
    widths = dict.fromkeys([*(value.shape[axis] for value in flowed), stop - start])
    for width in widths:
        for begin in range(max(stop - width, 0), min(start, len(first) - width) + 1):
            part = slice(begin, begin + width)
            yield np.moveaxis(first[part], 0, axis), np.moveaxis(second[part], 0, axis)


def _channel_axis(comparison: Comparison, value: Array) -> int:
    return 1 if comparison.ours.channels == "first" and value.ndim > 1 else value.ndim - 1


def _back(value: Array, arrangement: Arrangement) -> Array:
    return Arrangement(arrangement.target, arrangement.source, arrangement.sizes).apply(value)


def _values_before(comparison: Comparison, step: Step, ours: Array) -> Iterator[Array]:
    """What flowed shortly before a call of the source, the latest first: of the rank of its input, or of its size, and
    then in its shape (a Flatten stands between).
    """
    fitting = (v for v in _flowed(comparison, step.call) if v.ndim == ours.ndim or v.size == ours.size)
    for value in islice(fitting, _BEFORE):
        yield value if value.ndim == ours.ndim else value.reshape(ours.shape)


def _flowed(comparison: Comparison, end: int) -> Iterator[Array]:
    """What the source's calls before number `end` gave, also before an activation of their own, and took; the latest
    first, and the sample last.
    """
    for call in reversed(comparison.calls[:end]):
        yield from _floats(call.output)
        yield from _not_activated(comparison.ours, call)
        yield from reversed(list(_floats(call.inputs)))
    yield from reversed(list(_floats(comparison.sample)))


def _floats(tree: Any) -> Iterator[Array]:
    return (value for _, value in leaves(tree) if isinstance(value, np.ndarray) and value.dtype.kind in "fV")


def _not_activated(side: Side, call: Call) -> Iterator[Array]:
    """What a layer would have given without the activation that it applies itself."""
    settings = side.layers[call.layer].settings
    if settings.get("activation") is None:
        return
    try:
        yield Replay(side, call).run({**settings, "activation": None})
    except ValueError:  # nothing says what it computes
        return


def _functions(value: Array, wanted: Array) -> Iterator[str | None]:
    """The activations that make one value of another."""
    if value.shape != wanted.shape:
        return
    wide = value.astype(np.float64)
    if _same(wide, wanted):
        yield None
    for name in ACTIVATIONS:
        with np.errstate(all="ignore"):
            if _same(activate(wide, name, axis=-1), wanted):
                yield name
    below = wide < 0
    if below.any():
        slope = float(np.median(wanted[below] / wide[below]))
        if _same(activate(wide, "leaky_relu", axis=-1, slope=slope), wanted):
            yield f"leaky_relu with slope {slope:.6g}"


def _activations(comparison: Comparison, step: Step, ours: Array, theirs: Array) -> Iterator[Difference]:
    """One activation here and another there, of a value before, or of what the other model takes."""
    for value in _values_before(comparison, step, ours):
        pair = next(_functions(value, ours), ""), next(_functions(value, theirs), "")
        if "" not in pair:
            yield difference(step.target, "activation before it", *pair, tested=True)
            return
    # where what is activated cannot be seen, what one model has as a function of what the other has
    alone = [("x", f"{name}(x)") for name in _functions(ours, theirs) if name]
    alone += [(f"{name}(x)", "x") for name in _functions(theirs, ours) if name]
    yield from (difference(step.target, "activation before it", *pair, tested=True) for pair in alone[:1])


def _pools(comparison: Comparison, step: Step, ours: Array, theirs: Array) -> Iterator[Difference]:
    """One pooling here and another there, of a value before, with an activation between or not."""
    for value, name in product(_values_before(comparison, step, ours), _BEFORE_POOLS):
        active = activate(value.astype(np.float64), name, axis=-1)
        mine = _pool_that_gives(comparison.ours, comparison.ours, active, ours)
        other = mine and _pool_that_gives(comparison.theirs, comparison.ours, active, theirs)
        if mine and other:
            found = differences_between(mine, other, None, strict=True)
            if mine.kind != other.kind:
                found = [difference(other.name, "pooling", mine.kind, other.kind)]
            yield from (replace(d, tested=True) for d in found)
            return


def _pool_that_gives(owner: Side, data: Side, value: Array, wanted: Array) -> Layer | None:
    """The pooling layer of a model that makes one value of another, both as the model `data` has them."""
    pools = pooled(owner, value, last=data.channels == "last")
    return next((layer for layer, result in pools if _same(result, wanted)), None)


def _scaled(comparison: Comparison, step: Step, ours: Array, theirs: Array) -> Iterator[Difference]:
    """One number that is multiplied and one that is added, for all elements or channel by channel."""
    axis = _channel_axis(comparison, ours)
    setting = "scale before it" if step.call else "preprocessing"
    for rows in (1, ours.shape[axis] if ours.ndim > 1 else 1):
        first, second = (np.moveaxis(v.astype(np.float64), axis, 0).reshape(rows, -1) for v in (ours, theirs))
        mean = first.mean(1, keepdims=True)
        spread = np.square(first - mean).sum(1, keepdims=True)
        if first.shape[1] < _FEWEST or not spread.all():
            return
        factor = ((first - mean) * second).sum(1, keepdims=True) / spread
        offset = second.mean(1, keepdims=True) - factor * mean
        if _same(first * factor + offset, second):
            yield difference(step.target, setting, "x", f"{_numbers(factor)} x + {_numbers(offset)}", tested=True)
            return


def _elsewhere(comparison: Comparison, step: Step, ours: Array, theirs: Array) -> Iterator[Difference]:
    """The target's layer takes what flows at another place of the source."""
    place = _place_of(comparison, step.call, theirs)
    if place:
        own = _place_of(comparison, step.call, ours) or f"what {step.source} takes"
        yield difference(step.target, "place", own, place, tested=True)


def _place_of(comparison: Comparison, but: int, value: Array) -> str:
    """Where a value flows in the source, except as what call `but` takes; empty where it does not."""
    for _, given in leaves(comparison.sample):
        if _is(given, value):
            return "the sample"
    for call in comparison.calls:
        if any(_is(given, value) for given in _floats(call.output)):
            return f"what {call.layer} gives"
    for index, call in enumerate(comparison.calls):
        if index != but and any(_is(taken, value) for taken in _floats(call.inputs)):
            return f"what {call.layer} takes"
    return ""


def _is(flowing: Array, value: Array) -> bool:
    return flowing.shape == value.shape and _same(flowing, value)


def _numbers(values: Array) -> str:
    listed = [f"{value:.6g}" for value in values.ravel()[:4]]
    return listed[0] if values.size == 1 else f"({', '.join(listed)}{', …' if values.size > len(listed) else ''})"
