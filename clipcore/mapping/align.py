"""Comparing what flows in two models: equal up to layout, and in which arrangement of axes.

The only rearrangements that frameworks make of the same activations are a moved channel axis, and the order of
flattened feature maps that follows from it: of one, or of several put one behind the other, with plain features
between.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import numpy as np
from einops import EinopsError, rearrange

Array = np.ndarray[Any, np.dtype[Any]]


class Arrangement(NamedTuple):
    """How the target holds what the source holds: the source's axes, the target's, and sizes that must be told."""

    source: str
    target: str
    sizes: tuple[tuple[str, int], ...] = ()

    @property
    def joins(self) -> bool:
        """Whether one axis is made of segments, each with its own order."""
        return " + " in self.source

    def apply(self, value: Array) -> Array:
        """The source's value as the target holds it."""
        return carried(value, f"{self.source} -> {self.target}", dict(self.sizes))


def carried(array: Array, pattern: str, sizes: Mapping[str, int]) -> Array:
    """The array rearranged by einops patterns, one after the other ("; "); in them one axis may be made of segments,
    each with its own order.

    >>> carried(np.arange(6), "(a b + c) -> (b a + c)", {"a": 2, "b": 2, "c": 2})
    array([0, 2, 1, 3, 4, 5])
    """
    for step in pattern.split("; "):
        array = _carried_once(
            array, step, {name: size for name, size in sizes.items() if re.search(rf"\b{name}\b", step)}
        )
    return array


def _carried_once(array: Array, pattern: str, sizes: Mapping[str, int]) -> Array:
    before, _, after = pattern.partition(" -> ")
    sides = [_SEGMENTED.search(side) for side in (before, after)]
    if sides[0] is None or sides[1] is None:
        return _rearranged(array, pattern, sizes)
    segments = [match[1].split(" + ") for match in sides if match]
    axes = [_axis_of(side, match.span()) for side, match in zip((before, after), sides, strict=True) if match]
    ends = list(accumulate(math.prod(sizes[name] for name in segment.split()) for segment in segments[0]))
    if ends[-1] != array.shape[axes[0]]:
        raise EinopsError(f"segments of {ends[-1]} elements do not make up an axis of {array.shape[axes[0]]}")
    parts = [
        _rearranged(
            part,
            f"{_SEGMENTED.sub(f'({ours})', before)} -> {_SEGMENTED.sub(f'({theirs})', after)}",
            {name: size for name, size in sizes.items() if name not in _names(segments[0]) - set(ours.split())},
        )
        for part, ours, theirs in zip(np.split(array, ends[:-1], axes[0]), *segments, strict=True)
    ]
    return np.concatenate(parts, axes[1])


_SEGMENTED = re.compile(r"\(([^()]* \+ [^()]*)\)")


def _names(segments: Iterable[str]) -> set[str]:
    return {name for segment in segments for name in segment.split()}


def _axis_of(side: str, span: tuple[int, int]) -> int:
    """The number of the axis that stands at a place of one side of a pattern."""
    before, after = (re.findall(r"\([^()]*\)|\S+", part) for part in (side[: span[0]], side[span[1] :]))
    return -1 - len(after) if "..." in before else len(before)


def _rearranged(array: Array, pattern: str, sizes: Mapping[str, int]) -> Array:
    # einops warns of axes that are named like a keyword of Python
    result: Array = rearrange(array, re.sub(r"\bin\b", "input", pattern), **sizes)
    return result


SAME = Arrangement("...", "...")
_TO_LAST = Arrangement("batch channel ...", "batch ... channel")
_TO_FIRST = Arrangement("batch ... channel", "batch channel ...")
_CHANNELS_FIRST, _CHANNELS_LAST = "... (channel spatial)", "... (spatial channel)"


class Agreement(NamedTuple):
    """The relative error of two values in the arrangement that makes it smallest.

    `padded`: they agree once each layer's own padding is counted in, so that a padding layer on one side and a padding
    inside the convolution on the other are the same.
    """

    error: float
    arrangement: Arrangement
    padded: bool = False


def relative_error(source: Array, target: Array) -> float:
    """max|source - target| / max|source|; inf for other shapes, NaN in one alone, or unequal integers or texts."""
    if source.shape != target.shape:
        return math.inf
    if is_exact(source) or is_exact(target):
        return 0.0 if np.array_equal(source, target) else math.inf
    if source.dtype == target.dtype and source.dtype.kind == "f" and source.dtype.itemsize >= 4:
        # what differs by little is subtracted without rounding; NaN and infinities take the longer way
        with np.errstate(invalid="ignore", over="ignore"):
            largest = float(np.abs(source - target).max(initial=0.0))
        magnitude = float(max(source.max(initial=0.0), -source.min(initial=0.0)))
        if math.isfinite(largest):
            return largest / magnitude if magnitude else math.inf if largest else 0.0
    kind = np.complex128 if "c" in (source.dtype.kind, target.dtype.kind) else np.float64
    wide, other = source.astype(kind), target.astype(kind)
    with np.errstate(invalid="ignore"):
        same = (wide == other) | (np.isnan(wide) & np.isnan(other))
        difference = np.where(same, 0.0, np.abs(wide - other))
    largest = float(difference.max(initial=0.0))
    if largest == 0:
        return 0.0
    # a faulty element has no relative error of its own: it is as far off as can be
    magnitude = float(np.abs(wide[np.isfinite(wide)]).max(initial=0.0))
    return largest / magnitude if magnitude and math.isfinite(largest) else math.inf


def is_exact(value: Array) -> bool:
    """Whether nothing rounds these elements: integers and texts; bfloat16 is a "V" to NumPy."""
    return value.dtype.kind not in "fcV"


def moved(ndim: int) -> list[Arrangement]:
    """The ways in which the target may hold a value of so many axes: the same, or with the channel axis moved."""
    return [SAME, _TO_LAST, _TO_FIRST] if ndim >= 3 else [SAME]


def flattened(features: int, channels: Iterable[int], first: bool) -> list[Arrangement]:
    """The orders in which the target may hold so many flattened features.

    Args:
        channels: numbers of channels of feature maps that were computed before, the likeliest first; every other
            divisor of `features` follows.
        first: whether the source has the channel axis first.
    """
    divisors = [c for c in range(2, features // 2 + 1) if features % c == 0]
    # the other direction is the same order with the numbers of channels and places exchanged
    rest = [Arrangement(_CHANNELS_FIRST, _CHANNELS_LAST, (("channel", c),)) for c in divisors]
    return likely(features, channels, first) + rest


def likely(features: int, channels: Iterable[int], first: bool) -> list[Arrangement]:
    """Of the orders of so many flattened features, those of feature maps with one of these numbers of channels."""
    sides = (_CHANNELS_FIRST, _CHANNELS_LAST) if first else (_CHANNELS_LAST, _CHANNELS_FIRST)
    fitting = [c for c in dict.fromkeys(channels) if 1 < c < features and features % c == 0]
    return [Arrangement(*sides, (("channel", c),)) for c in fitting]


def joined(source: Array, target: Array, channels: Iterable[int], first: bool, allowed: float) -> list[Arrangement]:
    """Up to two orders in which the target may hold features that are flattened feature maps with one of these numbers
    of channels and plain features, one behind the other: two, where the values do not tell.

    Args:
        first: whether the source has the channel axis first.
        allowed: the relative error up to which two features are the same.
    """
    if not same_contents(source, target):
        return []
    ours, theirs = (value.astype(np.float64).reshape(-1, value.shape[-1]) for value in (source, target))
    features, allowed = ours.shape[1], allowed * float(np.abs(ours).max(initial=0.0))
    plain = np.asarray((np.abs(ours - theirs) <= allowed).all(0))
    # from the end: the ways in which the features from each place on can be held
    ways: list[list[tuple[tuple[int, int], ...]]] = [[] for _ in range(features)] + [[()]]
    solved = np.array([False] * features + [True])
    for start in np.flatnonzero(plain)[::-1].tolist():
        found = [((1, 1), *rest) for rest in ways[start + 1]]
        for count in dict.fromkeys(c for c in channels if c > 1):
            places = np.arange(2, (features - start) // count + 1)
            ends = start + count * places
            # the second feature and the last tell most orders apart without a look at the others
            seconds = ours[:, start + (places if first else np.full_like(places, count))]
            fits = (np.abs(seconds - theirs[:, start + 1 : start + 2]) <= allowed).all(0)
            for size in places[fits & solved[ends] & plain[ends - 1]].tolist():
                end = start + count * size
                shape = (-1, count, size) if first else (-1, size, count)
                turned = ours[:, start:end].reshape(shape).swapaxes(1, 2).reshape(len(ours), -1)
                if (np.abs(turned - theirs[:, start:end]) <= allowed).all():
                    found += [((count, size), *rest) for rest in ways[end]]
        ways[start] = found[:2]
        solved[start] = bool(found)
    return [_of_segments(way, first) for way in ways[0]]


def _of_segments(way: Sequence[tuple[int, int]], first: bool) -> Arrangement:
    """The arrangement of segments of (channels, places); single features are put together to plain segments."""
    sides: tuple[list[str], list[str]] = ([], [])
    sizes: list[tuple[str, int]] = []
    for number, (is_plain, group) in enumerate(groupby(way, key=lambda segment: segment == (1, 1))):
        for count, places in [(len(list(group)), 1)] if is_plain else group:
            axes = [f"plain{number}"] if is_plain else [f"channel{len(sizes)}", f"spatial{len(sizes)}"]
            sizes += zip(axes, (count, places), strict=False)
            for side, channels_first in zip(sides, (first, not first), strict=True):
                side.append(" ".join(axes if channels_first else reversed(axes)))
    source, target = (f"... ({' + '.join(side)})" for side in sides)
    return Arrangement(source, target, tuple(sizes))


def agree(source: Array, target: Array, orders: Callable[[], Iterable[Arrangement]] = tuple) -> Agreement:
    """The arrangement in which two values are closest; of equally close ones, the first.

    Args:
        orders: the orders in which the last axis may be flattened, asked for where nothing simpler fits.
    """
    if source.ndim != target.ndim or source.size != target.size:
        return Agreement(math.inf, SAME)
    best = closest(source, target, moved(source.ndim))
    if best.error <= _SAME or source.ndim < 2 or not same_contents(source, target):
        return best
    other = closest(source, target, orders())
    return other if other.error < best.error else best


_SAME = 1e-6  # the relative error up to which no other arrangement is sought


def other_order_fits(source: Array, target: Array, found: Agreement, orders: Iterable[Arrangement]) -> bool:
    """Whether the features are as close in another order than the one found: where they are all the same, or the only
    ones that are not stand where both orders leave them.
    """
    if source.shape != target.shape or source.ndim < 2:
        return False
    places = np.arange(source.shape[-1])[None]
    held = {found.arrangement.apply(places).tobytes()}
    for order in (SAME, *orders):
        permutation = order.apply(places).tobytes()
        if permutation not in held and relative_error(order.apply(source), target) <= max(_SAME, 8 * found.error):
            return True
        held.add(permutation)
    return False


def resembling(source: Array, target: Array, candidates: Sequence[Arrangement]) -> Arrangement | None:
    """The arrangement in which two values that differ are still alike (another activation or pooling keeps large what
    was large): of which the correlation is at least half, and falls at most half as short of 1 as any other's. None
    where none stands out.
    """
    wide = target.astype(np.float64)
    values = [arrangement.apply(source).astype(np.float64) for arrangement in candidates]
    if any(value.shape != wide.shape or np.ptp(value) == 0 for value in (*values, wide)):
        return None
    short = [1 - float(np.corrcoef(value.ravel(), wide.ravel())[0, 1]) for value in values]
    best, *others = sorted(range(len(short)), key=short.__getitem__)
    stands_out = short[best] <= 0.5 and all(2 * short[best] <= short[other] for other in others)
    return candidates[best] if stands_out else None


def closest(source: Array, target: Array, candidates: Iterable[Arrangement]) -> Agreement:
    """The first of the candidates with the smallest error."""
    best = Agreement(math.inf, SAME)
    for arrangement in candidates:
        error = relative_error(arrangement.apply(source), target)
        if error < best.error:
            best = Agreement(error, arrangement)
    return best


def same_contents(source: Array, target: Array) -> bool:
    """Whether each row may hold the same numbers in another order: a quick look before every order is tried."""
    if source.shape != target.shape or is_exact(source) or source.dtype.kind == "c" or source.shape[-1] < 4:
        return False
    ours, theirs = (value.astype(np.float64) for value in (source, target))
    size = np.abs(ours).sum(-1) + np.finfo(np.float64).tiny
    return bool((np.abs(ours.sum(-1) - theirs.sum(-1)) <= 1e-2 * size).all())
