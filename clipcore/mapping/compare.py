"""Comparing what the layers of two models take and give, in whatever arrangement each framework holds it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from clipcore.backend import Layer
from clipcore.mapping import reference
from clipcore.mapping.align import (
    SAME,
    Agreement,
    Arrangement,
    agree,
    closest,
    flattened,
    joined,
    likely,
    moved,
    other_order_fits,
    relative_error,
    resembling,
)
from clipcore.mapping.differences import explicit_padding
from clipcore.mapping.fingerprints import Fingerprints
from clipcore.mapping.kinds import kind_of
from clipcore.mapping.layouts import axis_sizes
from clipcore.mapping.models import Side
from clipcore.mapping.plan import cut
from clipcore.mapping.recording import Call
from clipcore.mapping.rows import holds, may_be, signature
from clipcore.structure import in_order_of, leaves, map_leaves, rebuild

Array = np.ndarray[Any, np.dtype[Any]]

# Two models that compute the same differ by rounding alone, which depth amplifies; layers that do not belong together
# differ by far more.
_TOLERANCE = {"float16": 5e-2, "bfloat16": 5e-2}
_DEFAULT_TOLERANCE = 1e-3
_EPS = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float64": 2.0**-52}
_DEFAULT_EPS = 2.0**-23


def tolerance(ours: Any, theirs: Any) -> float:
    """The relative error up to which activations of two models count as the same: by the coarser of their dtypes."""
    arrays = [value for _, value in leaves([ours, theirs]) if isinstance(value, np.ndarray)]
    return max((_TOLERANCE.get(v.dtype.name, _DEFAULT_TOLERANCE) for v in arrays), default=_DEFAULT_TOLERANCE)


def as_close(error: float, closest: float, ours: Any, theirs: Any) -> bool:
    """Whether an error of activations says no less than the smallest one does: rounding alone makes as much of it."""
    arrays = [value for _, value in leaves([ours, theirs]) if isinstance(value, np.ndarray)]
    eps = max((_EPS.get(value.dtype.name, _DEFAULT_EPS) for value in arrays), default=_DEFAULT_EPS)
    return error <= max(4 * eps, 8 * closest)


@dataclass(frozen=True)
class Comparison:
    """The source's recorded calls, and the conventions of both models."""

    ours: Side
    theirs: Side
    calls: Sequence[Call]
    sample: Any = None

    @cached_property
    def calls_of(self) -> dict[str, list[int]]:
        """The source's calls by layer, in order of execution."""
        calls: dict[str, list[int]] = {}
        for index, call in enumerate(self.calls):
            calls.setdefault(call.layer, []).append(index)
        return calls

    @cached_property
    def fitting(self) -> dict[str, list[str]]:
        """For each layer of the target, the source's called layers whose tensors it can hold, in order of execution,
        those last of which one of the two is of no known kind.
        """
        by_signature: dict[tuple[Any, ...], list[str]] = {}
        for name in self.calls_of:
            by_signature.setdefault(signature(self.ours.layers[name]), []).append(name)
        fitting = {
            name: [n for n in by_signature.get(signature(layer), ()) if holds(self.ours.layers[n], layer)]
            for name, layer in self.theirs.layers.items()
        }
        return {
            name: found + [n for n in self.calls_of if may_be(self.ours.layers[n], self.theirs.layers[name])]
            for name, found in fitting.items()
        }

    def shares_tensors(self, layer: str) -> bool:
        """Whether a layer of the target has a stored tensor, or a part of one, in common with another."""
        return any(self._holders[tensor.name] > 1 for tensor in self.theirs.layers[layer].tensors.values())

    @cached_property
    def _holders(self) -> Counter[str]:
        """How many layers of the target hold each of its stored tensors."""
        layers = self.theirs.layers.values()
        return Counter(name for layer in layers for name in {tensor.name for tensor in layer.tensors.values()})

    @cached_property
    def _fingerprints(self) -> Fingerprints:
        inputs = [call.inputs for call in self.calls]
        return Fingerprints(inputs, [tolerance(values, ()) for values in inputs])

    def alike(self, places: Sequence[int], theirs: Sequence[Array]) -> list[int]:
        """Those of the source's calls at these places that may have these inputs, as far as fingerprints tell."""
        return self._fingerprints.alike(places, theirs, tolerance(theirs, ()))

    @cached_property
    def of_same_sizes(self) -> dict[str, frozenset[str]]:
        """For each layer of the target, those of `fitting` whose axes have the lengths that settings tell as well."""
        sizes = [{name: axis_sizes(layer) for name, layer in side.layers.items()} for side in (self.ours, self.theirs)]
        return {
            name: frozenset(n for n in names if sizes[0][n] == sizes[1][name]) for name, names in self.fitting.items()
        }

    def expected(self, pair: tuple[str, str], value: Array, theirs: Array, index: int) -> Arrangement | None:
        """How a layer of the target holds what a layer of the source holds where the values differ: by where both have
        the channel axis, and for features that may be flattened by which order is alike; None where that does not tell.

        Args:
            pair: the two layers.
            index: the number of calls of the source before this value.
        """
        if value.ndim >= 3:
            ours = channels_of(self.ours.layers[pair[0]], self.ours)
            same = ours == channels_of(self.theirs.layers[pair[1]], self.theirs)
            return SAME if same else moved(value.ndim)[1 if ours == "first" else 2]
        if value.ndim < 2 or self.ours.channels == self.theirs.channels:
            return SAME
        if not self._channels_before[index] or self._given_by_a_kernel(value, index):
            return SAME
        return resembling(value, theirs, [SAME, *self._likely(value, index)])

    def order_is_open(self, index: int, theirs: Sequence[Array], found: Agreement) -> bool:
        """Whether the features that call `index` of the source takes may be a flattened feature map's, and their values
        do not tell in which order the target holds them.
        """
        ours = self.calls[index].inputs
        if len(ours) != 1 or len(theirs) != 1 or "batch" in found.arrangement.source:
            return False
        if found.arrangement.joins:
            return len(self._joined(ours[0], theirs[0], index)) > 1
        return other_order_fits(
            ours[0], theirs[0], found, self._likely(ours[0], index)
        ) and not self._given_by_a_kernel(ours[0], index)

    def _joined(self, ours: Array, theirs: Array, index: int) -> list[Arrangement]:
        """The orders of several feature maps that were flattened and put together, in an input of this call."""
        if self.ours.channels == self.theirs.channels or ours.ndim < 2 or ours.shape != theirs.shape:
            return []
        first = self.ours.channels == "first"
        return joined(ours, theirs, self._channels_before[index], first, tolerance(ours, theirs))

    def _given_by_a_kernel(self, value: Array, index: int) -> bool:
        """Whether the features that flow into call `index` are a linear layer's own, activated and normalised at most:
        then nothing was flattened since.
        """
        for before in reversed(range(index)):
            output, kind = self.calls[before].output, self.ours.layers[self.calls[before].layer].kind
            if not isinstance(output, np.ndarray) or output.shape != value.shape or not _activated(output, value):
                continue
            if kind == "linear":
                return True
            inputs = self.calls[before].inputs
            if kind in ("batch_norm", "layer_norm") and self._given_by_a_kernel(inputs[0], before):
                return True
        return False

    def _likely(self, value: Array, index: int) -> list[Arrangement]:
        features = value.shape[-1] if value.ndim else 0
        return likely(features, self._channels_before[index], self.ours.channels == "first")

    def _orders(self, value: Array, index: int) -> list[Arrangement]:
        """The orders in which the target may hold the features of a value that flows in call `index` of the source."""
        features = value.shape[-1] if value.ndim else 0
        return flattened(features, self._channels_before[index], self.ours.channels == "first")

    @cached_property
    def _channels_before(self) -> list[tuple[int, ...]]:
        """For each call (and the end), the numbers of channels of the feature maps up to there, the latest first."""
        axis = 1 if self.ours.channels == "first" else -1
        seen: dict[int, None] = {}
        _latest(seen, (v.shape[axis] for _, v in leaves(self.sample) if v.ndim >= 3))
        before = []
        for call in self.calls:
            _latest(seen, (v.shape[axis] for v in call.inputs if v.ndim >= 3))
            before.append(tuple(reversed(seen)))
            _latest(seen, (v.shape[axis] for _, v in leaves(call.output) if v.ndim >= 3))
        return [*before, tuple(reversed(seen))]

    def inputs(self, index: int, layer: str, theirs: Sequence[Array]) -> Agreement:
        """How well the inputs of call `index` of the source agree with those of a call of a layer of the target."""
        plain = self._inputs(index, self.calls[index].inputs, theirs)
        pair = self.ours.layers[self.calls[index].layer], self.theirs.layers[layer]
        if plain.error < math.inf or any("padding" not in side.settings for side in pair):
            return plain
        ours, theirs = (
            [_padded(value, side) for value in values]
            for side, values in zip(pair, (self.calls[index].inputs, theirs), strict=True)
        )
        return self._inputs(index, ours, theirs)._replace(padded=True)

    def _inputs(self, index: int, ours: Sequence[Array], theirs: Sequence[Array]) -> Agreement:
        if len(ours) != len(theirs):
            return Agreement(math.inf, SAME)
        worst = Agreement(0.0, SAME)
        for source, target in zip(ours, theirs, strict=True):
            agreement = self._agreement(source, target, index)
            if agreement.error >= worst.error:
                worst = agreement
        return worst

    def _agreement(self, ours: Array, theirs: Array, index: int) -> Agreement:
        """How well a value that flows into call `index` of the source agrees with one of the target."""
        found = agree(ours, theirs, partial(self._orders, ours, index))
        if found.error <= tolerance(ours, theirs):
            return found
        other = closest(ours, theirs, self._joined(ours, theirs, index))
        return other if other.error < found.error else found

    def as_taken(self, index: int, layer: str, theirs: Sequence[Array], arrangement: Arrangement) -> list[Array] | None:
        """What call `index` of the source took, as a call of a layer of the target that took `theirs` would take it;
        None where it does not have those shapes. Where one of the two pads itself, and something before the other
        does, it is the same once padded.
        """
        ours = self.calls[index].inputs
        pair = self.ours.layers[self.calls[index].layer], self.theirs.layers[layer]
        if len(ours) != len(theirs):
            return None
        values = []
        for source, target in zip(ours, theirs, strict=True):
            if source.ndim != target.ndim or (source.ndim < 3 and source.size != target.size):
                return None
            value = arrangement.apply(source)
            if value.shape != target.shape:
                value = arrangement.apply(repadded(source, *pair, target))
            if value.shape != target.shape:
                return None
            values.append(value.astype(target.dtype))
        return values

    def part_that_differs(self, layer: str, theirs: Sequence[Array], others: Sequence[Array]) -> float:
        """Of how many of their channels two inputs of one layer of the target differ, as a fraction."""
        first = channels_of(self.theirs.layers[layer], self.theirs) == "first"
        differing: list[bool] = []
        for a, b in zip(theirs, others, strict=True):
            axis = 1 if first and a.ndim > 1 else -1
            rows = [np.moveaxis(np.atleast_1d(value), axis, 0).astype(np.float64) for value in (a, b)]
            rows = [value.reshape(len(value), -1) for value in rows]
            size, apart = np.abs(rows[1]).max(1, initial=0), np.abs(rows[0] - rows[1]).max(1, initial=0)
            differing += (~(apart <= tolerance(a, b) * size)).tolist()
        return float(np.mean(differing)) if differing else 0.0

    def layer_outputs(self, index: int, layer: str, theirs: Any) -> tuple[Any, float]:
        """What call `index` of the source gave as the target would have it, and how far the target's output is from it.

        What the target's layer lacks and something else may make up for is applied to its output first: a bias, and an
        activation that the source's layer has fused in; an activation of the target's alone is applied to the source's.
        """
        call = self.calls[index]
        pair = self.ours.layers[call.layer], self.theirs.layers[layer]
        first, second = map(_fused_activation, pair)
        axis = 1 if pair[0].settings.get("channels") == "first" else -1
        ours, seen = in_order_of(call.output, theirs), self._with_bias(*pair, theirs)
        arrays = zip(*([value for _, value in leaves(tree)] for tree in (ours, theirs, seen)), strict=False)
        names = call.layer, layer
        converted: list[Any] = []
        worst = 0.0
        for source, target, compared in arrays:
            if not isinstance(target, np.ndarray):  # a number beside the tensors flows on as it is
                converted.append(target)
                continue
            source, compared = _same_steps(pair[1], source, compared)
            value, error = _closest(source, compared, first, second, axis, partial(self._output, names, index + 1))
            worst = max(worst, error)
            usable = value is not None and value.shape == target.shape
            converted.append(value.astype(target.dtype) if usable else target)
        return rebuild(theirs, iter(converted)), worst

    def lacks_bias(self, source: Layer, target: Layer) -> bool:
        """Whether the target's layer lacks a bias that the source's adds to its result."""
        kind = kind_of(target.kind)
        adds = kind is not None and "kernel" in kind.roles and not kind.sequence
        return adds and "bias" in source.tensors and "bias" not in target.tensors

    def _with_bias(self, source: Layer, target: Layer, output: Any) -> Any:
        """The target's output with the bias that its layer lacks."""
        if not self.lacks_bias(source, target):
            return output
        tensor = source.tensors["bias"]
        bias = cut(self.ours.backend.read(self.ours.model, [tensor.name])[tensor.name], tensor.within).ravel()
        first = target.settings.get("channels") == "first"
        return map_leaves(lambda value: value + (bias.reshape(-1, *[1] * (value.ndim - 2)) if first else bias), output)

    def _output(
        self, pair: tuple[str, str], index: int, ours: Array, theirs: Array
    ) -> tuple[float, Arrangement | None]:
        """How far two outputs are apart, and in which arrangement the target holds the source's."""
        found = self._agreement(ours, theirs, index)
        if found.error <= tolerance(ours, theirs):
            return found.error, found.arrangement
        repeated = _as_repeated(ours, theirs)
        if repeated <= tolerance(ours, theirs):
            return repeated, None
        # of values that differ, the closest arrangement is one by chance
        return found.error, self.expected(pair, ours, theirs, index)

    def model_outputs(self, ours: Any, theirs: Any) -> float:
        """The largest relative error over the outputs that can be compared, tensor by tensor, the channel axis where
        each side has it.
        """
        ours, theirs, _ = without_opaque(ours, theirs)
        first, second = [v for _, v in leaves(in_order_of(ours, theirs))], [v for _, v in leaves(theirs)]
        if len(first) != len(second):
            return math.inf
        return max(
            (agree(a, b).error for a, b in zip(first, second, strict=True)),
            default=0.0,
        )


def without_opaque(ours: Any, theirs: Any) -> tuple[Any, Any, tuple[str, ...]]:
    """Two models' outputs without what one of them gives as an object that nothing can be compared with (a cache), and
    the names of those. Whatever else one gives and the other does not remains, and is a difference.
    """
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return ours, theirs, ()
    both = [name for name in theirs if name in ours]
    opaque = [name for name in both if any(leaves(ours[name])) != any(leaves(theirs[name]))]
    if len(opaque) == len(both):
        return ours, theirs, ()
    first, second = ({name: side[name] for name in side if name not in opaque} for side in (ours, theirs))
    return first, second, tuple(map(str, opaque))


def _as_repeated(ours: Array, theirs: Array) -> float:
    """The relative error of two values of which one may be repeated along leading axes: once per row of a batch."""
    longest = max(ours.ndim, theirs.ndim)
    shapes = [(1,) * (longest - value.ndim) + value.shape for value in (ours, theirs)]
    fits = ours.shape != theirs.shape and all(1 in pair or pair[0] == pair[1] for pair in zip(*shapes, strict=True))
    if not fits or ours.shape[-1:] != theirs.shape[-1:]:
        return math.inf
    return relative_error(*np.broadcast_arrays(ours, theirs))


def channels_of(layer: Layer, side: Side) -> str:
    """Where a layer has the channel axis of its data: as it is set; last, as linear layers have it; and where its model
    has it, if it acts on channels and places alike.
    """
    kind = kind_of(layer.kind)
    alike = [role for role, axis in (kind.features if kind else {}).items() if axis == "..." and role in layer.tensors]
    acts_on_both = any(len(layer.tensors[role].shape) > 1 for role in alike)
    return str(layer.settings.get("channels", side.channels if acts_on_both else "last"))


def _fused_activation(layer: Layer) -> str | None:
    """The activation that a layer applies to its result; a recurrent layer's is inside it."""
    kind = kind_of(layer.kind)
    return None if kind is None or kind.sequence else layer.settings.get("activation")


def _same_steps(layer: Layer, ours: Any, theirs: Array) -> tuple[Any, Array]:
    """The outputs of two layers of sequences, where one of them keeps the last step alone: that step of both."""
    kind = kind_of(layer.kind)
    if kind is None or not kind.sequence or ours.ndim == theirs.ndim:
        return ours, theirs
    return (ours[..., -1, :], theirs) if ours.ndim > theirs.ndim else (ours, theirs[..., -1, :])


def repadded(value: Array, giver: Layer, taker: Layer, like: Array) -> Array:
    """A value that one convolution takes, as another takes it, so that both have the same once they have padded it.

    Args:
        like: what the other took, of which the sizes count.
    """
    if any("padding" not in layer.settings for layer in (giver, taker)):
        return value
    whole = _padded(value, giver)
    inner = [slice(None)] * value.ndim
    for (axis, _), (_, (before, after)) in zip(_pads(giver, value), _pads(taker, like), strict=False):
        inner[axis] = slice(before, whole.shape[axis] - after)
    return whole[tuple(inner)]


def _padded(value: Array, layer: Layer) -> Array:
    """A convolution's input with the zeros that it adds itself."""
    widths = [(0, 0)] * value.ndim
    for axis, pads in _pads(layer, value):
        widths[axis] = pads
    return np.pad(value, widths)


def _pads(layer: Layer, value: Array) -> list[tuple[int, tuple[int, int]]]:
    """The spatial axes of what a convolution takes, and the zeros before and after that it adds."""
    first = layer.settings.get("channels", "first") == "first"
    pads = explicit_padding(layer, value.shape[2:] if first else value.shape[1:-1])
    if layer.settings.get("padding_mode", "zeros") != "zeros" or len(pads) != value.ndim - 2:
        return []
    return list(enumerate(pads, 2 if first else 1))


def _activated(output: Array, value: Array) -> bool:
    """Whether a value is a layer's output, or an activation of it."""
    wide, allowed = output.astype(np.float64), tolerance(output, value)
    results = (reference.activate(wide, name, axis=-1) for name in (None, *reference.ACTIVATIONS))
    return any(relative_error(result, value) <= allowed for result in results)


def _latest(seen: dict[int, None], channels: Iterable[int]) -> None:
    """Move these keys to the end."""
    for count in channels:
        seen.pop(count, None)
        seen[count] = None


def _closest(
    source: Array,
    target: Array,
    first: str | None,
    second: str | None,
    axis: int,
    compared: Callable[[Array, Array], tuple[float, Arrangement | None]],
) -> tuple[Any, float]:
    """The source's output in its closest arrangement (None where the activation is in the way), and the error.

    Args:
        first, second: the activations that are applied in the source's and in the target's output.
        axis: where the source has the features, along which a softmax runs; the target has them last.
        compared: how far two values are apart, and in which arrangement they are the same; None where none tells.
    """
    value, seen = source, target
    try:
        if first is None and second is not None:
            value = reference.activate(source.astype(np.float64), second, axis=axis)
        elif second is None and first is not None:
            seen = reference.activate(target.astype(np.float64), first, axis=-1)
    except (KeyError, ValueError):
        # an activation that no one has a definition of: what follows will tell
        return None, 0.0
    error, arrangement = compared(value, seen)
    usable = first is None or first == second
    fits = source.ndim == target.ndim and source.size == target.size
    return arrangement.apply(value) if arrangement and usable and fits else None, error
