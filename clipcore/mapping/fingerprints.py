"""Numbers by which values are told apart at a glance: what no rearrangement changes, so that where two differ by much,
the values do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_FEWEST = 9  # elements; the numbers of fewer are looked at themselves
_LARGE = 1e15  # beyond which a square may leave float32


class Fingerprint(NamedTuple):
    """Of one value.

    Attributes:
        size: the number of elements.
        numbers: the smallest element, the largest, their mean and root mean square; NaN where they tell nothing: of
            integers, of few elements, of elements that are not finite.
    """

    size: int
    numbers: tuple[float, float, float, float]

    @classmethod
    def of(cls, value: Array) -> Fingerprint:
        """That of an array."""
        nothing = cls(value.size, (np.nan,) * 4)
        if value.dtype.kind not in "fV" or value.size < _FEWEST:
            return nothing
        low, high = float(value.min()), float(value.max())
        if not np.isfinite([low, high]).all():
            return nothing
        large = value.dtype == np.float64 or max(-low, high) > _LARGE
        flat = value.astype(np.float64 if large else np.float32, copy=False).ravel()
        mean, square = float(flat.mean(dtype=np.float64)), float(np.dot(flat, flat))
        return cls(value.size, (low, high, mean, (square / value.size) ** 0.5))


class Fingerprints:
    """Of many lists of values, by the first of each.

    Args:
        lists: of values.
        allowed: of each list, the relative error up to which its values are the same as others.
    """

    def __init__(self, lists: Sequence[Sequence[Array]], allowed: Sequence[float]) -> None:
        found = [Fingerprint.of(values[0]) if values else Fingerprint(0, (np.nan,) * 4) for values in lists]
        self._counts = np.array([len(values) for values in lists])
        self._sizes = np.array([fingerprint.size for fingerprint in found])
        self._numbers = np.array([fingerprint.numbers for fingerprint in found]).reshape(-1, 4)
        self._allowed = np.array(allowed)

    def alike(self, places: Sequence[int], values: Sequence[Array], allowed: float) -> list[int]:
        """Those of the lists at these places that may hold these values, in any arrangement.

        Args:
            values: as many as a list must have; of another size than its own, one may be padded.
            allowed: the relative error up to which these are the same as others.
        """
        where = np.asarray(places, int)
        fits = self._counts[where] == len(values)
        if values:
            size, numbers = Fingerprint.of(values[0])
            ours = self._numbers[where]
            largest = np.abs(ours[:, :2]).max(1, initial=0.0)
            bound = np.maximum(self._allowed[where], allowed) * largest
            # a comparison with NaN is false
            differs = (np.abs(ours - np.asarray(numbers)) > bound[:, None]).any(1)
            fits &= (self._sizes[where] != size) | ~differs
        return [place for place, fit in zip(places, fits.tolist(), strict=True) if fit]
