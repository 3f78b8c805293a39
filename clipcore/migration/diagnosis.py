"""Where two models part: the matched layers in order of execution, and why the first of them differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipcore.backend import Layer
from clipcore.mapping.align import Agreement
from clipcore.mapping.compare import Comparison
from clipcore.mapping.credible import has_nan
from clipcore.mapping.differences import differences_between
from clipcore.mapping.kinds import kind_of
from clipcore.mapping.models import Side
from clipcore.mapping.plan import Difference, Plan, Row, cut
from clipcore.mapping.recording import Call
from clipcore.mapping.rows import values_for

Array = np.ndarray[Any, np.dtype[Any]]

_TOLERANCE = 1e-5


@dataclass(frozen=True)
class LayerAgreement:
    """Two matched layers, and the relative error of the target's output against the source's."""

    source: str
    target: str
    rel_error: float


@dataclass(frozen=True)
class Divergence:
    """The first layer, in the target's order of execution, that is not the source's, and why.

    Attributes:
        layer, source_layer: as target and source name it.
        rel_error: of its output.
        reason: one sentence.
        stale: whether one of its tensors is not what the plan carries.
    """

    layer: str
    source_layer: str
    rel_error: float
    reason: str
    stale: bool = False

    def __str__(self) -> str:
        return f"{self.layer} (from {self.source_layer}): {self.reason} (relative error {self.rel_error:.1e})"


def compare_layers(
    ours: Side,
    theirs: Side,
    plan: Plan,
    stale: Mapping[str, Row],
    source_calls: Sequence[Call],
    target_calls: Sequence[Call],
) -> tuple[list[LayerAgreement], Divergence | None, list[Difference]]:
    """The agreement of matched layers, the first that parts (by its tensors, see `stale_rows`, or by its output), and
    the settings in which they differ on this sample: a padding may depend on its size.
    """
    comparison = Comparison(ours, theirs, source_calls)
    origin = {target: source for source, target in plan.layer_pairs}
    stale = dict(stale)
    places: dict[str, list[int]] = {}
    for index, call in enumerate(source_calls):
        places.setdefault(call.layer, []).append(index)
    layers: list[LayerAgreement] = []
    differences: list[Difference] = []
    divergence = None
    together = {part.target_layer for row in plan.rows for part in row.parts if part.operation == "scaled"}
    for call in target_calls:
        if call.layer in together:
            continue
        remaining = places.get(origin.get(call.layer, ""), [])
        if not remaining:
            continue
        # of several calls of a shared layer, the one with this input
        inputs = {index: comparison.inputs(index, call.layer, call.inputs) for index in remaining}
        index = min(inputs, key=lambda i: inputs[i].error)
        remaining.remove(index)
        pair = ours.layers[origin[call.layer]], theirs.layers[call.layer]
        ignored = frozenset({"padding"} if inputs[index].padded else ())
        found = differences_between(*pair, source_calls[index], ignored)
        differences += found
        error = comparison.layer_outputs(index, call.layer, call.output)[1]
        layers.append(LayerAgreement(origin[call.layer], call.layer, error))
        if divergence is None and (error > _TOLERANCE or call.layer in stale):
            why = _why(inputs[index], pair[1], found, stale.pop(call.layer, None), plan.differences)
            divergence = Divergence(call.layer, origin[call.layer], error, _first_nan(call) + why[0], why[1])
    if divergence is None and stale:
        layer, row = next(iter(stale.items()))
        divergence = Divergence(layer, row.source_layer, 0.0, _not_carried(row), stale=True)
    return layers, divergence, differences


def _first_nan(call: Call) -> str:
    if has_nan(call.inputs):
        return "the target has NaN from here on, in what the layer takes; "
    return "the target has NaN from here on, in what the layer gives; " if has_nan(call.output) else ""


def stale_rows(ours: Side, theirs: Side, plan: Plan) -> dict[str, Row]:
    """For each layer of the target with a tensor that is not what the plan carries, the first such row."""
    weights = ours.backend.read(ours.model, [name for row in plan.rows for name in row.sources])
    held = theirs.backend.read(theirs.model, [row.target for row in plan.rows])
    expected: Mapping[str, Array] = {**values_for(plan.rows, theirs.tensors, weights), **plan.limited}
    stale: dict[str, Row] = {}
    for row in plan.rows:
        for part in row.parts:
            if not np.array_equal(cut(expected[row.target], part.into), cut(held[row.target], part.into)):
                stale.setdefault(part.target_layer, row)
    return stale


def _not_carried(row: Row) -> str:
    return (
        f"{row.role}: the target's {row.target!r} is not what the plan carries from "
        f"{', '.join(map(repr, row.sources)) or 'no source'}; migrate first; after a limited migration pass result.plan"
    )


def _why(
    inputs: Agreement, layer: Layer, differences: Sequence[Difference], stale: Row | None, known: Sequence[Difference]
) -> tuple[str, bool]:
    """(reason, whether a tensor is not what the plan carries)."""
    if stale is not None:
        return _not_carried(stale), True
    if inputs.error > 10 * _TOLERANCE:
        return (
            f"its input differs already (relative error {inputs.error:.1e}): an operation without weights before it "
            f"(pooling, activation, padding, reshaping) is not the same"
        ), False
    kind = kind_of(layer.kind)
    idle = kind.training_settings if kind else ()
    mended = {(d.layer, d.setting) for d in known if d.repaired}
    found = [d for d in differences if d.setting not in idle and (d.layer, d.setting) not in mended]
    if found:
        return "; ".join(difference.values for difference in found), False
    return "inputs, weights and the known settings agree; the layer computes something else", False
