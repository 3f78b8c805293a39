"""What slides over spatial axes: where windows stand, and pooling over them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from clipcore.mapping.reference.arrays import Array, Settings, Tensors, double

Pads = list[tuple[int, int]]


def paddings(
    padding: Any, sizes: Sequence[int], window: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Pads:
    """(before, after) per spatial axis; of "same", as TensorFlow defines it, with the odd one after.

    >>> paddings("same", [4], [3], [2], [1]), paddings("same", [5], [3], [2], [1])
    ([(0, 1)], [(1, 1)])
    """
    if padding != "same":
        return [(int(before), int(after)) for before, after in padding]
    totals = [
        max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
        for size, k, s, d in zip(sizes, window, stride, dilation, strict=True)
    ]
    return [(total // 2, total - total // 2) for total in totals]


def reaches(window: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """How many places a window covers, those between its taps included."""
    return [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]


def taps(
    window: Sequence[int], stride: Sequence[int], dilation: Sequence[int], counts: Sequence[int]
) -> Iterator[tuple[Any, Any]]:
    """Each tap of a window, with the places that it sees in `counts` windows per axis: indices of the last axes."""
    for tap in np.ndindex(*window):
        starts = [k * d for k, d in zip(tap, dilation, strict=True)]
        seen = (slice(at, at + s * (c - 1) + 1, s) for at, s, c in zip(starts, stride, counts, strict=True))
        yield (..., *tap), (..., *seen)


def max_pool(x: Array, tensors: Tensors, settings: Settings) -> Array:
    """y[n, c, q] = max over k of x[n, c, q stride + k dilation - before]; what is outside of x never counts.

    Args:
        x: (batch, channel, *spatial).
        tensors: none.
        settings: window, stride, padding, dilation, ceil (whether a last window that begins inside and ends outside
            counts).

    >>> settings = {"window": (2,), "stride": (2,), "padding": ((0, 0),), "dilation": (1,), "ceil": True}
    >>> max_pool(np.array([[[1.0, 3.0, 2.0, 0.0, -1.0]]]), {}, settings)
    array([[[ 3.,  2., -1.]]])
    """
    window, stride, dilation = settings["window"], settings["stride"], settings["dilation"]
    pads = paddings(settings["padding"], x.shape[2:], window, stride, dilation)
    counts = _counts(x.shape[2:], pads, reaches(window, dilation), stride, settings["ceil"])
    padded = _padded(double(x), pads, window, stride, dilation, counts, -math.inf)
    return np.asarray(np.max([padded[places] for _, places in taps(window, stride, dilation, counts)], axis=0))


def avg_pool(x: Array, tensors: Tensors, settings: Settings) -> Array:
    """y[n, c, q] = the mean over k of x[n, c, q stride + k - before].

    What was padded counts as zeros with count_include_pad, else only what is inside of x counts; what a last window
    has beyond the padding (ceil) never does.

    Args:
        x: (batch, channel, *spatial).
        tensors: none.
        settings: window, stride, padding, count_include_pad, ceil.

    >>> settings = {"window": (2,), "stride": (2,), "padding": ((1, 1),), "ceil": False}
    >>> x = np.array([[[2.0, 4.0, 6.0, 8.0]]])
    >>> avg_pool(x, {}, {**settings, "count_include_pad": True})
    array([[[1., 5., 4.]]])
    >>> avg_pool(x, {}, {**settings, "count_include_pad": False})
    array([[[2., 5., 8.]]])
    """
    window, stride = settings["window"], settings["stride"]
    ones = (1,) * len(window)
    pads = paddings(settings["padding"], x.shape[2:], window, stride, ones)
    counts = _counts(x.shape[2:], pads, window, stride, settings["ceil"])
    total = _padded(double(x), pads, window, stride, ones, counts, 0.0)
    # what counts: the places of x, and with count_include_pad those that the padding adds, but none beyond
    counted, rest = np.ones((1, 1, *x.shape[2:])), pads
    if settings["count_include_pad"]:
        counted, rest = np.pad(counted, [(0, 0), (0, 0), *pads], constant_values=1.0), [(0, 0)] * len(pads)
    count = _padded(counted, rest, window, stride, ones, counts, 0.0)
    seen = [places for _, places in taps(window, stride, ones, counts)]
    result: Array = sum(total[places] for places in seen) / sum(count[places] for places in seen)
    return result


def _counts(sizes: Sequence[int], pads: Pads, reach: Sequence[int], stride: Sequence[int], ceil: bool) -> list[int]:
    """How many windows stand on each axis."""
    counts = []
    for size, (before, after), r, s in zip(sizes, pads, reach, stride, strict=True):
        room = size + before + after - r
        count = (math.ceil(room / s) if ceil else room // s) + 1
        # a window that begins beyond what is inside sees nothing
        counts.append(count - 1 if ceil and (count - 1) * s >= size + before else count)
    return counts


def _padded(
    x: Array,
    pads: Pads,
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    counts: Sequence[int],
    value: float,
) -> Array:
    """The data with `value` before it, and after it up to where the last window ends."""
    ends = [(c - 1) * s + r for c, s, r in zip(counts, stride, reaches(window, dilation), strict=True)]
    wide = [
        (before, max(after, end - size - before))
        for (before, after), end, size in zip(pads, ends, x.shape[2:], strict=True)
    ]
    return np.pad(x, [(0, 0), (0, 0), *wide], constant_values=value)
