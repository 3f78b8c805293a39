"""Norms as the fast sum has them, and what it takes to know them exactly where that could be seen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from clipcore.backend import Axes
from clipcore.clipping import kernels, lists
from clipcore.clipping.kernels import Array, Wide
from clipcore.clipping.lists import Places

Norm = float | Literal["svd", "power"]  # a p-norm, or the largest singular value and how it is found


@dataclass(frozen=True)
class Measure:
    """Norms as the fast sum has them, and what it takes to know them exactly.

    Attributes:
        norms: to a relative error of `kernels.RELATIVE_ERROR`; NaN where an element is inf or NaN.
        places: of each array, where the norms of its units stand; arrays that were joined share them.
        arrays: the arrays that were measured.
        axes: of each array, the axes that run over its units; () where the array is one unit.
        nonfinite: how many elements are inf or NaN.
    """

    norms: Wide
    places: Places
    arrays: Sequence[Array]
    axes: Sequence[Axes]
    p: Norm
    nonfinite: int = 0

    def __len__(self) -> int:
        return len(self.norms.mantissa)

    def surely_below(self, limits: Array) -> bool:
        """Whether every norm is below its limit by far more than it can be off, as in most steps; told in one look."""
        return bool((self.norms.to_float() < limits * (1 - 2.0**-40)).all())

    def exceeds(self, limit: Wide) -> Array:
        """For each norm whether it is over its limit, as a real number: summed exactly where need be; singular values
        as far as they can be known.
        """
        if isinstance(self.p, str):
            sizes = [max(kernels.units_first(x, own).shape) for x, own in zip(self.arrays, self.axes, strict=True)]
            known = 1 + np.array(sizes, np.float64) * np.finfo(np.float64).eps
            surely: Array = self.norms.exceeds(limit.times(known))
            return surely
        low, high = (self.norms.times(1 + sign * kernels.RELATIVE_ERROR).exceeds(limit) for sign in (-1, 1))
        over = np.array(high)
        for index in np.flatnonzero(low != high):
            over[index] = kernels.exceeds_exactly(list(self._members(int(index))), limit[index])
        return over

    def settled(self, limit: Wide, floor: Wide) -> Wide:
        """The norms, summed exactly where the fast sum leaves it open whether one is carried to its limit or its floor,
        or by which factor.
        """
        if isinstance(self.p, str):
            return self.norms
        low, high = (self.norms.times(1 + sign * kernels.RELATIVE_ERROR) for sign in (-1, 1))
        over, below = high.exceeds(limit), floor.exceeds(low)
        open_ = (over != low.exceeds(limit)) | (below != floor.exceeds(high))
        if over.any() and self._has_exact_factors():
            open_ |= over & ~self._same_factor(limit, low, high)
        if below.any() and self._has_exact_factors():
            open_ |= below & ~self._same_factor(floor, low, high)
        if not open_.any():
            return self.norms
        mantissa, exponent = self.norms.mantissa.copy(), self.norms.exponent.copy()
        for index in np.flatnonzero(open_):
            mantissa[index], exponent[index] = self._exact(int(index))
        return Wide(mantissa, exponent)

    def _same_factor(self, bound: Wide, low: Wide, high: Wide) -> Any:
        """For each norm, whether any value between two leads to one and the same factor, as it is multiplied."""
        factors = kernels.quotient(bound, low), kernels.quotient(bound, high)
        return np.all(
            [~self.has(dtype) | kernels.same_multiplier(*factors, dtype) for dtype in (np.float32, np.float64)], axis=0
        )

    def _has_exact_factors(self) -> bool:
        # The factor of every clipped float64 norm is open, and would need 60 digits for such a p, or one slow sum for
        # each of many units; they stay within 1e-14.
        slow = self.p not in (1.0, 2.0, math.inf) or any(self.axes)
        return not (slow and self.has(np.float64).any())

    def settled_as_limits(self, of: Measure, times: float) -> Array:
        """The norms as float64, at most the largest, where `times` as much is the limit of other norms: summed exactly
        where an error of theirs could change what is decided, or the factor as it is multiplied.
        """
        norms: Array = np.minimum(self.norms.to_float(), np.finfo(np.float64).max)
        with np.errstate(all="ignore"):
            products = norms * times
        if of.surely_below(products):
            return norms
        limits = Wide.of(products)
        # of both sums, and of the product
        low, high = (of.norms.times(1 + 3 * sign * kernels.RELATIVE_ERROR) for sign in (-1, 1))
        over = high.exceeds(limits)
        factors = kernels.quotient(limits, low), kernels.quotient(limits, high)
        open_ = over & of.has(np.float32) & ~kernels.same_multiplier(*factors, np.float32)
        for index in np.flatnonzero((over != low.exceeds(limits)) | open_):
            norms[index] = min(float(self._exact(int(index))), np.finfo(np.float64).max)
        return norms

    def _exact(self, index: int) -> Wide:
        return kernels.exact_norm(list(self._members(index)), float(self.p))

    def _members(self, index: int) -> Iterator[Array]:
        """What one of the norms is of."""
        for place in np.flatnonzero((self.places.starts <= index) & (index < self.places.starts + self.places.counts)):
            array, axes = self.arrays[int(place)], self.axes[int(place)]
            yield kernels.units_first(array, axes)[index - int(self.places.starts[place])] if axes else array

    def factor_axes(self) -> Sequence[Axes]:
        """Of each array, the axes that the factors for its units stand along."""
        return [()] * len(self.arrays) if isinstance(self.p, str) else self.axes

    def rounding(self) -> Array:
        """For each norm, the coarsest rounding of an array that it is of."""
        coarsest = np.zeros(len(self))
        for place, dtype in self._dtypes():
            coarsest[place] = np.maximum(coarsest[place], kernels.epsilon(dtype))
        return coarsest

    def has(self, dtype: type[np.floating[Any]]) -> Array:
        """For each norm, whether an array that it is of is multiplied in that dtype."""
        found = np.zeros(len(self), bool)
        for place, name in self._dtypes():
            found[place] |= kernels.MULTIPLY_DTYPE[name] is dtype
        return found

    def _dtypes(self) -> Iterator[tuple[slice, str]]:
        """The places of norms, and the dtype of what they are of: all at once where all are of one dtype."""
        names = lists.dtypes(self.arrays)
        if len(set(names)) == 1:
            yield slice(None), names[0]
            return
        for index, name in enumerate(names):
            yield self.places[index], name

    def again(self, arrays: Sequence[Array]) -> Measure:
        """The same norms of other arrays of these shapes."""
        measure = measured(arrays, self.p, self.axes)
        return measure.joined() if len(self) < len(measure) else measure

    def joined(self) -> Measure:
        """The joint norms of all arrays, unit by unit."""
        if not len(self.arrays):
            return self
        count = len(self) // len(self.arrays)
        each = Wide(*(part.reshape(len(self.arrays), count) for part in self.norms))
        shared = Places.shared(len(self.arrays), count)
        return replace(self, norms=kernels.join(each, float(self.p)), places=shared)


def measured(arrays: Sequence[Array], p: Norm, axes: Sequence[Axes]) -> Measure:
    """The norms of all units of all arrays."""
    if isinstance(p, str):
        each = [kernels.spectral_norm(array, own, p) for array, own in zip(arrays, axes, strict=True)]
        return Measure(kernels.concatenated(each), Places.of(np.ones(len(each), np.int64)), arrays, axes, p)
    return Measure(*lists.norms(arrays, p, axes), arrays, axes, p)
