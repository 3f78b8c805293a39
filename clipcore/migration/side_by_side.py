"""The target run beside the recorded source, by a plan: every place in which they differ, in one run.

Where a layer takes or gives something else than its origin, the source's values are put in, so that what follows goes
on as if it agreed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from clipcore.mapping.align import Arrangement
from clipcore.mapping.compare import Comparison

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Step:
    """One call of a layer, in order of execution.

    Attributes:
        source, target: the two layers that belong together; "" where one model has none.
        kind: of layer.
        call: the number of the source's call; -1 where there is none.
        input_error, output_error: relative errors against the source's; of the output, with the source's input put in
            where the layer's own differs.
        padded: whether the inputs agree once each layer's own padding is counted in.
    """

    source: str
    target: str
    kind: str
    call: int = -1
    input_error: float = math.nan
    output_error: float = math.nan
    padded: bool = False


@dataclass
class SideBySide:
    """The watcher of the run.

    Attributes:
        comparison: the source's calls.
        origin: for each layer of the target, its origin.
        allowed: the relative error up to which values are the same.
        steps: what was seen.
        inputs, outputs: where the target differs, what it took or gave, by the number of the step.
        went_on: the steps whose layer ran on its own input, since the source's does not have its shape.
    """

    comparison: Comparison
    origin: Mapping[str, str]
    allowed: float
    steps: list[Step] = field(default_factory=list)
    inputs: dict[int, tuple[Array, Arrangement]] = field(default_factory=dict)
    outputs: dict[int, Array] = field(default_factory=dict)
    went_on: set[int] = field(default_factory=set)
    _open: list[int | None] = field(default_factory=list)
    _used: set[int] = field(default_factory=set)

    def before(self, layer: str, inputs: list[Array]) -> list[Array] | None:
        if layer not in self.comparison.theirs.layers:
            return None
        calls = self.comparison.calls_of.get(self.origin.get(layer, ""), [])
        kind = self.comparison.theirs.layers[layer].kind
        if not calls:
            self.steps.append(Step("", layer, kind))
            self._open.append(None)
            return None
        # of several calls of a shared layer, the one with this input; else the next; one that was met already last
        found = {index: self.comparison.inputs(index, layer, inputs) for index in calls}
        index = min(calls, key=lambda i: (i in self._used, found[i].error > self.allowed, i))
        self._used.add(index)
        self._open.append(len(self.steps))
        error, padded = found[index].error, found[index].padded
        self.steps.append(Step(self.origin[layer], layer, kind, index, error, padded=padded))
        if error <= self.allowed:
            return None
        return self._put_in(index, layer, inputs)

    def _put_in(self, index: int, layer: str, inputs: list[Array]) -> list[Array] | None:
        """The source's inputs as the target would have them; None where their shapes do not fit."""
        ours = self.comparison.calls[index].inputs
        if len(ours) != len(inputs) or not ours or ours[0].ndim != inputs[0].ndim:
            return None
        names = self.comparison.calls[index].layer, layer
        arrangement = self.comparison.expected(names, ours[0], inputs[0], index)
        if arrangement is None or arrangement.apply(ours[0]).shape[:1] != inputs[0].shape[:1]:
            return None
        number = len(self.steps) - 1
        self.inputs[number] = inputs[0], arrangement
        values = self.comparison.as_taken(index, layer, inputs, arrangement)
        if values is None:
            self.went_on.add(number)
        return values

    def after(self, layer: str, output: Any) -> Any | None:
        if layer not in self.comparison.theirs.layers:
            return None
        number = self._open.pop()
        if number is None:
            return None
        step = self.steps[number]
        replaced, error = self.comparison.layer_outputs(step.call, layer, output)
        self.steps[number] = replace(step, output_error=error)
        if error <= self.allowed:
            return None
        if isinstance(output, np.ndarray):
            self.outputs[number] = output
        return replaced
