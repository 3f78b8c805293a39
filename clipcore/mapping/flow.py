"""Where a layer's result goes: seen by running the model once more, with other numbers in that place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clipcore.errors import InvalidInput
from clipcore.mapping.align import relative_error
from clipcore.mapping.models import Side
from clipcore.mapping.recording import Call
from clipcore.structure import leaves

Array = np.ndarray[Any, np.dtype[Any]]
Link = tuple[str, str]  # a layer, and one that takes its result

_SAME = 1e-6  # the relative error up to which a device may give other last bits


@dataclass(frozen=True)
class Flow:
    """A recorded run of a model: its calls and outputs on a sample."""

    side: Side
    sample: Any
    calls: Sequence[Call]
    outputs: Any

    def exclusive(self, links: Sequence[Link]) -> frozenset[Link]:
        """Those links in which the first layer's result goes to the second as it is, and nowhere else.

        Proven by execution: with random numbers as the first's result, and what the second gave as the second's, the
        second takes those numbers, and every other layer, and the model's outputs, see what they saw. All links are
        tried in one run; those among which one fails, in halves.

        Args:
            links: pairs of layers that the run calls once each.
        """
        if not links or self._holds(links):
            return frozenset(links)
        middle = len(links) // 2
        return self.exclusive(links[:middle]) | self.exclusive(links[middle:]) if middle else frozenset()

    def _holds(self, links: Sequence[Link]) -> bool:
        recorded = {call.layer: call.output for call in self.calls}
        rng = np.random.default_rng(0)
        changed = {first: _random(rng, recorded[first]) for first, _ in links}
        kept = {second: recorded[second] for _, second in links}
        taken = {second: changed[first] for first, second in links}
        detour = _Detour(self.side, list(self.calls), {**changed, **kept}, taken)
        try:
            outputs = self.side.run(self.sample, detour)
        except InvalidInput:
            return False  # whatever does not run on other numbers takes them
        expected, found = ([np.asarray(value) for _, value in leaves(tree)] for tree in (self.outputs, outputs))
        return detour.as_recorded and not detour.calls and _all_same(expected, found)


@dataclass
class _Detour:
    """A watcher that replaces results, and compares what every layer takes with what it took."""

    side: Side
    calls: list[Call]  # that are still to come
    results: dict[str, Array]
    taken: dict[str, Array]
    as_recorded: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        self.calls.reverse()

    def before(self, layer: str, inputs: list[Array]) -> None:
        if layer not in self.side.layers or not self.as_recorded:
            return
        call = self.calls.pop() if self.calls else Call("", [])
        expected = [self.taken[layer]] if layer in self.taken else call.inputs
        self.as_recorded = call.layer == layer and _all_same(expected, inputs)

    def after(self, layer: str, output: Any) -> Array | None:
        # a copy: what runs next may write into it
        return np.array(self.results[layer]) if layer in self.results else None


def _all_same(expected: Sequence[Array], found: Sequence[Array]) -> bool:
    return len(expected) == len(found) and all(
        relative_error(a, b) <= _SAME for a, b in zip(expected, found, strict=True)
    )


def _random(rng: np.random.Generator, output: Array) -> Array:
    """Random numbers of both signs, as large as an output's."""
    largest = float(np.abs(output.astype(np.float64)).max(initial=1.0))
    return np.asarray(rng.uniform(-largest, largest, output.shape), output.dtype)
