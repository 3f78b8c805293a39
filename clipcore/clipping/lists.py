"""What acts on whole lists of arrays: the Numba kernels where they are installed and the memory suits them, else NumPy.

Either way the results have the same bits: sums differ within the error that is allowed for, and where that could be
seen they are taken again exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from clipcore.backend import Axes, Memory
from clipcore.clipping import fast, kernels
from clipcore.clipping.kernels import Array, Wide

_SAFE = 2.0**900  # a float64 sum of squares within 1/_SAFE and _SAFE has lost nothing to the ends of the range


class Arrays(Sequence[Array]):
    """The memory of tensors of one dtype, known by address: arrays are made of it when one is looked at."""

    def __init__(self, memory: Memory, array_of: Any) -> None:
        self.memory = memory
        self._array_of = array_of
        self._made: dict[int, Array] = {}

    def __len__(self) -> int:
        return len(self.memory.sizes)

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> list[Array]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        if place not in self._made:
            self._made[place] = self._array_of(place)
        return self._made[place]


class _Block(NamedTuple):
    """Arrays of one dtype as (outer, units, inner) arrays by address; `places` are theirs in the list."""

    dtype: str
    places: Array
    addresses: Array
    outer: Array
    units: Array
    inner: Array


def _blocks(arrays: Sequence[Array], axes: Sequence[Axes]) -> tuple[list[_Block], list[int]]:
    """Blocks for the kernels, and the places of the arrays that they cannot take."""
    if isinstance(arrays, Arrays) and not any(axes):
        ones = np.ones(len(arrays), np.int64)
        memory = arrays.memory
        return [_Block(memory.dtype, np.arange(len(arrays)), memory.addresses, ones, ones, memory.sizes)], []
    if not fast.available():
        return [], list(range(len(arrays)))
    rows: dict[str, list[tuple[int, int, int, int, int]]] = {}
    rest = []
    for place, (array, own) in enumerate(zip(arrays, axes, strict=True)):
        shape = _as_block(array, own)
        if shape is None:
            rest.append(place)
        else:
            rows.setdefault(kernels.name_of(array.dtype), []).append((place, _address(array), *shape))
    return [_Block(dtype, *np.array(found, np.int64).T.copy()) for dtype, found in rows.items()], rest


def _as_block(array: Array, axes: Axes) -> tuple[int, int, int] | None:
    """(outer, units, inner) of an array whose memory has no gaps; None where the kernels cannot take it."""
    if kernels.name_of(array.dtype) not in _KERNEL_DTYPES or not array.dtype.isnative or not array.flags.aligned:
        return None
    if not axes:
        dense = array.flags.c_contiguous or array.flags.f_contiguous or _is_dense(array)
        return (1, 1, array.size) if dense else None
    first, last = axes[0], axes[-1] + 1
    if not array.flags.c_contiguous or list(axes) != list(range(first, last)):
        return None
    return math.prod(array.shape[:first]), math.prod(array.shape[first:last]), math.prod(array.shape[last:])


_KERNEL_DTYPES = ("float16", "bfloat16", "float32", "float64")


def _is_dense(array: Array) -> bool:
    """Whether the elements fill their memory in some order of the axes."""
    order = np.argsort(array.strides)[::-1]
    return bool(array.transpose(order).flags.c_contiguous)


def dtypes(arrays: Sequence[Array]) -> list[str]:
    """NumPy's names of the arrays' dtypes; one name for all where they are known to share it."""
    return [arrays.memory.dtype] if isinstance(arrays, Arrays) else [kernels.name_of(x.dtype) for x in arrays]


class Places:
    """Of each array, where the values of its units stand in a vector: a slice by index."""

    def __init__(self, starts: Array, counts: Array) -> None:
        self.starts, self.counts = starts, counts

    @classmethod
    def of(cls, counts: Array) -> Places:
        """One after the other."""
        return cls(np.cumsum(counts) - counts, counts)

    @classmethod
    def shared(cls, arrays: int, count: int) -> Places:
        """The same for all."""
        return cls(np.zeros(arrays, np.int64), np.full(arrays, count, np.int64))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> slice:
        return slice(int(self.starts[index]), int(self.starts[index] + self.counts[index]))

    def spread(self) -> Array:
        """The places of the units of all arrays, array by array."""
        ends = np.cumsum(self.counts)
        offsets = np.repeat(self.starts - (ends - self.counts), self.counts)
        return np.asarray(np.arange(len(offsets)) + offsets)

    def any(self, mask: Array) -> Array:
        """For each array, whether the mask holds for any of its units."""
        if (self.counts == 1).all():
            chosen: Array = mask[self.starts]
            return chosen
        return np.array([bool(mask[self[index]].any()) for index in range(len(self))], bool)


def norms(arrays: Sequence[Array], p: float, axes: Sequence[Axes]) -> tuple[Wide, Places]:
    """The p-norms of all units of all arrays (with axes: L2), NaN where an element is inf or NaN.

    The relative error is at most `kernels.RELATIVE_ERROR`.
    """
    blocks, rest = _blocks(arrays, axes) if p == 2 else ([], list(range(len(arrays))))
    if isinstance(arrays, Arrays) and not rest:
        return _block_norms(blocks[0], arrays, axes), Places.of(blocks[0].units)
    counts = [math.prod(array.shape[axis] for axis in own) for array, own in zip(arrays, axes, strict=True)]
    places = Places.of(np.array(counts, np.int64))
    found = Wide(np.zeros(sum(counts)), np.zeros(sum(counts), np.int64))
    for block in blocks:
        where = Places(places.starts[block.places], block.units).spread()
        found.mantissa[where], found.exponent[where] = _block_norms(block, arrays, axes)
    for place in rest:
        own = _plain_norms(arrays[place], p, axes[place])
        found.mantissa[places[place]], found.exponent[places[place]] = own
    return found, places


def _plain_norms(array: Array, p: float, axes: Axes) -> Wide:
    return kernels.unit_norms(array, axes) if axes else kernels.norms([array], p)


def _block_norms(block: _Block, arrays: Sequence[Array], axes: Sequence[Axes]) -> Wide:
    sums = fast.unit_sums_of_squares(block.addresses, block.outer, block.units, block.inner, block.dtype)
    found = Wide.of(np.sqrt(np.where(np.isfinite(sums), sums, math.nan)))
    lost = ~((sums > 1 / _SAFE) & (sums < _SAFE))
    if block.dtype == "float64" and lost.any():
        own = Places.of(block.units)
        for index in np.flatnonzero(own.any(lost)).tolist():
            place = int(block.places[index])
            found.mantissa[own[index]], found.exponent[own[index]] = _plain_norms(arrays[place], 2.0, axes[place])
    return found


def scale(arrays: Sequence[Array], outs: Sequence[Array], factors: Wide, places: Places, axes: Sequence[Axes]) -> None:
    """Write each array times its factors, one per unit, into `outs`: these very arrays, or fresh ones like them."""
    values = factors.to_float()
    blocks, rest = _blocks(arrays, axes)
    for block in blocks:
        dtype = kernels.MULTIPLY_DTYPE[block.dtype]
        own = Places(places.starts[block.places], block.units)
        with np.errstate(all="ignore"):
            rounded = values.astype(dtype).astype(np.float64)
        # what is 0, NaN, subnormal or beyond the range takes NumPy's way
        odd = own.any(~kernels.is_normal(rounded, dtype))
        rest += block.places[odd].tolist()
        _scale_block(block, arrays, outs, rounded[own.spread()], odd)
    for place in rest:
        mine = factors[places[place]]
        if axes[place]:
            kernels.scale_units_into(arrays[place], mine, axes[place], outs[place])
        else:
            kernels.fill_or_scale(arrays[place], mine[0], outs[place])


def _scale_block(
    block: _Block, arrays: Sequence[Array], outs: Sequence[Array], factors: Array, left_out: Array
) -> None:
    sources = block.addresses
    targets = sources if outs is arrays else _addresses(outs, block.places)
    outer, units, inner = block.outer, block.units, block.inner
    if left_out.any():
        factors = factors[np.repeat(~left_out, units)]
        sources, targets, outer, units, inner = (x[~left_out] for x in (sources, targets, outer, units, inner))
    fast.scale_units(sources, targets, outer, units, inner, block.dtype, factors)


def _addresses(arrays: Sequence[Array], places: Array) -> Array:
    return np.array([_address(arrays[place]) for place in places.tolist()], np.int64)


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def despike(
    arrays: Sequence[Array],
    moments: Sequence[Array],
    outs: Sequence[Array],
    after: Sequence[Array],
    threshold: float,
    decay: float,
    acts: bool,
) -> Array:
    """Write arrays that have spikes, without them, into `outs`, and the moments that follow into `after`.

    See `clipcore.backend.Primitives.spike`; `outs` may be the arrays, and `after` the moments.
    Returns, int64, the number of spikes of each array: `outs` of those that have none are not written.
    """
    blocks, rest = _blocks(arrays, [()] * len(arrays))
    spikes = np.zeros(len(arrays), np.int64)
    for block in blocks:
        if block.dtype == "float64" or not all(
            _is_plain(arrays, place) and _is_single(moments[place]) and _is_single(after[place])
            for place in block.places.tolist()
        ):
            rest += block.places.tolist()
            continue
        targets = block.addresses if outs is arrays else _addresses(outs, block.places)
        memory = block.addresses, _addresses(moments, block.places), targets, _addresses(after, block.places)
        sizes = block.outer * block.units * block.inner
        spikes[block.places] = fast.spike(*memory, sizes, block.dtype, threshold, decay, acts)
    limit = threshold if acts else math.inf
    for place in rest:
        spikes[place] = kernels.despike(arrays[place], moments[place], outs[place], after[place], limit, decay)
    return spikes


def _is_plain(arrays: Sequence[Array], place: int) -> bool:
    """Whether an array's elements lie one after the other."""
    return isinstance(arrays, Arrays) or bool(arrays[place].flags.c_contiguous)


def _is_single(moment: Array) -> bool:
    """Whether a moment is of float32 and its elements lie one after the other."""
    return moment.dtype == np.float32 and moment.flags.c_contiguous and moment.flags.aligned
