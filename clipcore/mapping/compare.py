"""Comparing what the layers of two models take and give, in whatever arrangement each framework holds it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from clipcore.backend import Layer
from clipcore.mapping import reference
from clipcore.mapping.align import SAME, Agreement, Arrangement, agree, arrangements, relative_error
from clipcore.mapping.differences import explicit_padding
from clipcore.mapping.models import Call, Side
from clipcore.structure import leaves, rebuild

Array = np.ndarray[Any, np.dtype[Any]]

# Two models that compute the same differ by rounding alone, which depth amplifies; layers that do not belong together
# differ by far more.
_TOLERANCE = {"float16": 5e-2, "bfloat16": 5e-2}
_DEFAULT_TOLERANCE = 1e-3


def tolerance(values: Any) -> float:
    """The relative error up to which two activations count as the same, by their dtype."""
    return max(
        (_TOLERANCE.get(v.dtype.name, _DEFAULT_TOLERANCE) for _, v in leaves(values)), default=_DEFAULT_TOLERANCE
    )


@dataclass(frozen=True)
class Comparison:
    """The source's recorded calls, and the conventions of both models."""

    ours: Side
    theirs: Side
    calls: Sequence[Call]

    @property
    def _conventions(self) -> tuple[str, str]:
        return self.ours.backend.channels, self.theirs.backend.channels

    def arrangements(self, value: Array, index: int) -> list[Arrangement]:
        """The ways in which the target may hold a value that flows in call `index` of the source."""
        features = value.shape[-1] if value.ndim else 0
        return arrangements(value.ndim, features, self._conventions, self._channels_before[index])

    @cached_property
    def _channels_before(self) -> list[tuple[int, ...]]:
        """For each call (and the end), the numbers of channels of the feature maps up to there, the latest first."""
        axis = 1 if self._conventions[0] == "first" else -1
        seen: dict[int, None] = {}
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
            agreement = agree(source, target, self.arrangements(source, index))
            if agreement.error >= worst.error:
                worst = agreement
        return worst

    def layer_outputs(self, index: int, layer: str, theirs: Any) -> tuple[Any, float]:
        """What call `index` of the source gave as the target would have it, and how far the target's output is from it.

        Where one of the two layers has an activation fused in, it is applied to the other's output first.
        """
        call = self.calls[index]
        first = self.ours.layers[call.layer].settings.get("activation")
        second = self.theirs.layers[layer].settings.get("activation")
        pairs = list(zip((v for _, v in leaves(call.output)), (v for _, v in leaves(theirs)), strict=False))
        converted, worst = [], 0.0
        for source, target in pairs:
            value, error = _closest(source, target, first, second, self.arrangements(source, index + 1))
            worst = max(worst, error)
            usable = value is not None and value.shape == target.shape
            converted.append(value.astype(target.dtype) if usable else target)
        return rebuild(theirs, iter(converted)), worst

    def model_outputs(self, ours: Any, theirs: Any) -> float:
        """The largest relative error over the outputs, tensor by tensor, the channel axis where each side has it."""
        first, second = [v for _, v in leaves(ours)], [v for _, v in leaves(theirs)]
        if len(first) != len(second):
            return math.inf
        return max(
            (
                agree(a, b, arrangements(a.ndim, 0, self._conventions, ())).error
                for a, b in zip(first, second, strict=True)
            ),
            default=0.0,
        )


def _padded(value: Array, layer: Layer) -> Array:
    """A convolution's input with the zeros that it adds itself."""
    first = layer.settings.get("channels", "first") == "first"
    pads = explicit_padding(layer, value.shape[2:] if first else value.shape[1:-1])
    if layer.settings.get("padding_mode", "zeros") != "zeros" or len(pads) != value.ndim - 2:
        return value
    return np.pad(value, [(0, 0), (0, 0), *pads] if first else [(0, 0), *pads, (0, 0)])


def _latest(seen: dict[int, None], channels: Iterable[int]) -> None:
    """Move these keys to the end."""
    for count in channels:
        seen.pop(count, None)
        seen[count] = None


def _closest(
    source: Array, target: Array, first: str | None, second: str | None, candidates: Sequence[Arrangement]
) -> tuple[Any, float]:
    """The source's output in its closest arrangement (None where the activation is in the way), and the error."""
    best: tuple[Any, float] = (None, math.inf)
    if source.ndim != target.ndim or source.size != target.size:
        return best
    for arrangement in candidates:
        value, seen = arrangement.apply(source), target
        try:
            if first is None and second is not None:
                value = reference.activate(value.astype(np.float64), second, axis=-1)
            elif second is None and first is not None:
                seen = reference.activate(target.astype(np.float64), first, axis=-1)
        except (KeyError, ValueError):
            # an activation that no one has a definition of: what follows will tell
            return None, 0.0
        error = relative_error(value, seen)
        if error < best[1]:
            best = (value if first is None or first == second else None), error
    return best
