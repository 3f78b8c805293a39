"""Why a layer takes something else than its origin: what stands before the two, guessed and computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, product
from typing import Any

import numpy as np

from clipcore.backend import Layer
from clipcore.mapping.align import relative_error
from clipcore.mapping.compare import Comparison, channels_of
from clipcore.mapping.differences import difference, differences_between
from clipcore.mapping.models import Side
from clipcore.mapping.plan import Difference
from clipcore.mapping.recording import Call
from clipcore.mapping.reference import ACTIVATIONS, activate
from clipcore.migration.replay import Replay, pooled
from clipcore.migration.side_by_side import Step
from clipcore.structure import leaves

Array = np.ndarray[Any, np.dtype[Any]]

_EXPLAINED = 1e-5  # the relative error up to which an explanation gives what was seen
_BEFORE = 14  # how many values before a layer's input it is explained by: those of a block with three branches
_FIRST = 256  # elements that are looked at before all are
_BEFORE_POOLS = (None, "relu", "relu6", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "elu", "hard_silu")
_FEWEST = 4  # elements that one number multiplied and one added must explain


def same(first: Array, second: Array) -> bool:
    """Whether an explanation gives what was seen."""
    return relative_error(first, second) <= _EXPLAINED


def why_another_input(comparison: Comparison, step: Step, ours: Array, theirs: Array) -> Iterator[Difference]:
    """What explains two values that should be one, tested; nothing where nothing does.

    Args:
        step: the layers that take them.
        ours, theirs: both as the source would have them.
    """
    if ours.shape != theirs.shape:
        yield from _elsewhere(comparison, step, ours, theirs)
        return
    mine, other = _without_zeros(ours, theirs)
    pairs = list(_whole_and_parts(comparison, step, mine, other))
    tests = [partial(hypothesis, comparison, step, *pair) for pair in pairs for hypothesis in (_activations, _pools)]
    tests += [partial(_elsewhere, comparison, step, ours, theirs)]
    tests += [partial(_scaled, comparison, step, *pair) for pair in pairs]
    yield from next((found for found in (list(test()) for test in tests) if found), ())


def _whole_and_parts(comparison: Comparison, step: Step, ours: Array, theirs: Array) -> Iterator[tuple[Array, Array]]:
    """Two values that differ; and where they have equal channels, those that do not, in parts as wide as what flowed
    before: one branch of a concatenation.
    """
    yield ours, theirs
    axis = _channel_axis(comparison, step, ours)
    first, second = (np.moveaxis(value, axis, 0) for value in (ours, theirs))
    differing = [place for place, pair in enumerate(zip(first, second, strict=True)) if not same(*pair)]
    if not differing or len(differing) == len(first):
        return
    start, stop = differing[0], differing[-1] + 1
    flowed = islice((v for v in _flowed(comparison, step.call) if v.ndim == ours.ndim), _BEFORE)
    for width in dict.fromkeys([*(value.shape[axis] for value in flowed), stop - start]):
        for begin in dict.fromkeys((start, stop - width, 0, len(first) - width)):
            if 0 <= begin <= start and stop <= begin + width <= len(first):
                part = slice(begin, begin + width)
                yield np.moveaxis(first[part], 0, axis), np.moveaxis(second[part], 0, axis)


def _channel_axis(comparison: Comparison, step: Step, value: Array) -> int:
    first = channels_of(comparison.ours.layers[step.source], comparison.ours) == "first"
    return 1 if first and value.ndim > 1 else value.ndim - 1


def _without_zeros(*values: Array) -> tuple[Array, ...]:
    """Values of one shape without a border of zeros that all have: what was padded before the layers."""
    inner = [slice(None)] * values[0].ndim
    for axis in range(1, len(inner) if len(inner) > 2 else 0):
        others = tuple(a for a in range(len(inner)) if a != axis)
        filled = np.flatnonzero(np.logical_or.reduce([np.any(value != 0, axis=others) for value in values]))
        if filled.size:
            inner[axis] = slice(filled[0], filled[-1] + 1)
    return tuple(value[tuple(inner)] for value in values)


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


def _with_sums(values: Sequence[Array]) -> Iterator[Array]:
    """Values, and the sums of the first and another: what a residual's block gave, and what flowed past it."""
    yield from values
    for other in values[1:]:
        if other.shape == values[0].shape:
            yield values[0] + other


def _functions(value: Array, wanted: Array) -> Iterator[str | None]:
    """The activations that make one value of another."""
    if value.shape != wanted.shape:
        return
    wide = value.astype(np.float64)
    few = wide.ravel()[:_FIRST], wanted.ravel()[:_FIRST]
    allowed = 2 * _EXPLAINED * np.abs(wanted).max(initial=0)
    with np.errstate(all="ignore"):
        for name in (None, *ACTIVATIONS):
            by_element = name not in ("softmax", "log_softmax")
            if by_element and (np.abs(activate(few[0], name, axis=-1) - few[1]) > allowed).any():
                continue
            if same(activate(wide, name, axis=-1), wanted):
                yield name
    below = wide < 0
    if below.any():
        slope = float(np.median(wanted[below] / wide[below]))
        if same(activate(wide, "leaky_relu", axis=-1, slope=slope), wanted):
            yield f"leaky_relu with slope {slope:.6g}"


def _activations(comparison: Comparison, step: Step, ours: Array, theirs: Array) -> Iterator[Difference]:
    """One activation here and another there, of a value before, or of what the other model takes."""
    before = list(_values_before(comparison, step, ours))
    for value in _with_sums(before):
        mine = next(_functions(value, ours), "")
        pair = mine, next(_functions(value, theirs), "") if mine != "" else ""
        if "" not in pair:
            yield difference(step.target, "activation before it", *pair, tested=True)
            return
    # where what is activated cannot be seen, what one model has as a function of what the other has
    alone = [("x", f"{name}(x)") for name in _functions(ours, theirs) if name]
    alone += [(f"{name}(x)", "x") for name in _functions(theirs, ours) if name]
    yield from (difference(step.target, "activation before it", *pair, tested=True) for pair in alone[:1])


def _pools(comparison: Comparison, step: Step, ours: Array, theirs: Array) -> Iterator[Difference]:
    """One pooling here and another there, of a value before, with an activation between, the same or not."""
    maps = (value for value in _flowed(comparison, step.call) if value.ndim > 2)
    for value in _with_sums(list(islice(maps, _BEFORE))):
        mine = _pooled_to(comparison.ours, comparison, value, ours)
        other = mine and _pooled_to(comparison.theirs, comparison, value, theirs)
        if not (mine and other):
            continue
        if mine[0] != other[0]:
            yield difference(step.target, "activation before it", mine[0], other[0], tested=True)
        if mine[1].kind != other[1].kind:
            name = other[1].name or step.target
            yield difference(name, "pooling", mine[1].kind, other[1].kind, tested=True)
        else:
            yield from (replace(d, tested=True) for d in differences_between(mine[1], other[1], None, strict=True))
        return


def _pooled_to(owner: Side, comparison: Comparison, value: Array, wanted: Array) -> tuple[str | None, Layer] | None:
    """The activation and the pooling layer that make one value of another: the model's own, or, where it pools by a
    function that cannot be seen, the other model's.
    """
    sides = sorted((comparison.ours, comparison.theirs), key=lambda side: side is not owner)
    last = comparison.ours.channels == "last"
    for side, name in product(sides, _BEFORE_POOLS):
        active = activate(value.astype(np.float64), name, axis=-1)
        fitting = [layer for layer, result in pooled(side, active[:1], last=last) if _fits(result, wanted[:1])]
        if fitting:
            for layer, result in pooled(side, active, last=last):
                if layer in fitting and _fits(result, wanted):
                    return name, layer
    return None


def _scaled(comparison: Comparison, step: Step, ours: Array, theirs: Array) -> Iterator[Difference]:
    """One number that is multiplied and one that is added, for all elements or channel by channel."""
    axis = _channel_axis(comparison, step, ours)
    setting = "scale before it" if step.call else "preprocessing"
    for rows in (1, ours.shape[axis] if ours.ndim > 1 else 1):
        first, second = (np.moveaxis(v.astype(np.float64), axis, 0).reshape(rows, -1) for v in (ours, theirs))
        mean = first.mean(1, keepdims=True)
        spread = np.square(first - mean).sum(1, keepdims=True)
        if first.shape[1] < _FEWEST or not spread.all():
            return
        factor = ((first - mean) * second).sum(1, keepdims=True) / spread
        offset = second.mean(1, keepdims=True) - factor * mean
        if same(first * factor + offset, second):
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
    if any(_is(given, value) for given in _floats(comparison.sample)):
        return "the sample"
    for call in comparison.calls:
        if any(_is(given, value) for given in _floats(call.output)):
            return f"what {call.layer} gives"
    for index, call in enumerate(comparison.calls):
        if index != but and any(_is(taken, value) for taken in _floats(call.inputs)):
            return f"what {call.layer} takes"
    return ""


def _is(flowing: Array, value: Array) -> bool:
    (mine,), (other,) = _without_zeros(flowing), _without_zeros(value)
    return _fits(mine, other)


def _fits(result: Array, wanted: Array) -> bool:
    return result.shape == wanted.shape and same(result, wanted)


def _numbers(values: Array) -> str:
    listed = [f"{value:.6g}" for value in values.ravel()[:4]]
    return listed[0] if values.size == 1 else f"({', '.join(listed)}{', …' if values.size > len(listed) else ''})"
