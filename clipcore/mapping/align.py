"""Comparing what flows in two models: equal up to layout, and in which arrangement of axes.

The only rearrangements that frameworks make of the same activations are a moved channel axis, and the order of a
flattened feature map that follows from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

Array = np.ndarray[Any, np.dtype[Any]]


class Arrangement(NamedTuple):
    """How the target holds what the source holds: the source's axes, the target's, and sizes that must be told."""

    source: str
    target: str
    sizes: tuple[tuple[str, int], ...] = ()

    def apply(self, value: Array) -> Array:
        """The source's value as the target holds it."""
        result: Array = rearrange(value, f"{self.source} -> {self.target}", **dict(self.sizes))
        return result


SAME = Arrangement("...", "...")
_MOVED = {
    ("first", "last"): ("batch channel ...", "batch ... channel"),
    ("last", "first"): ("batch ... channel", "batch channel ..."),
}
_FLATTENED = {"first": "... (channel spatial)", "last": "... (spatial channel)"}


class Agreement(NamedTuple):
    """The relative error of two values in the arrangement that makes it smallest.

    `padded`: they agree once each layer's own padding is counted in, so that a padding layer on one side and a padding
    inside the convolution on the other are the same.
    """

    error: float
    arrangement: Arrangement
    padded: bool = False


def relative_error(source: Array, target: Array) -> float:
    """max|source - target| / max|source|; inf for other shapes, NaN in one alone, or unequal integers."""
    if source.shape != target.shape:
        return math.inf
    if source.dtype.kind in "biu" or target.dtype.kind in "biu":
        return 0.0 if np.array_equal(source, target) else math.inf
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


def arrangements(ndim: int, features: int, conventions: tuple[str, str], channels: Iterable[int]) -> list[Arrangement]:
    """The ways in which the target may hold a value of the source.

    Args:
        ndim: of the value.
        features: length of its last axis.
        conventions: where source and target have the channel axis, "first" or "last".
        channels: numbers of channels of feature maps that were computed before: the last axis may be a flattening of
            one.
    """
    found = [SAME]
    if conventions in _MOVED and ndim >= 3:
        found.append(Arrangement(*_MOVED[conventions]))
    if conventions in _MOVED and ndim >= 2:
        source, target = (_FLATTENED[convention] for convention in conventions)
        # with one channel, or one place, both orders are the same
        fitting = [c for c in dict.fromkeys(channels) if 1 < c < features and features % c == 0]
        found += [Arrangement(source, target, (("channel", c),)) for c in fitting]
    return found


def agree(source: Array, target: Array, candidates: Iterable[Arrangement]) -> Agreement:
    """The arrangement in which two values are closest; of equally close ones, the first."""
    best = Agreement(math.inf, SAME)
    if source.ndim != target.ndim or source.size != target.size:
        return best
    for arrangement in candidates:
        error = relative_error(arrangement.apply(source), target)
        if error < best.error:
            best = Agreement(error, arrangement)
    return best
