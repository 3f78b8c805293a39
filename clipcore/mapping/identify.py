"""Layers of classes that no one described, recognised by what they compute, so that both models are in one language."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np

from clipcore.backend import Layer, Tensor
from clipcore.errors import InvalidInput
from clipcore.mapping.align import relative_error
from clipcore.mapping.apart import fused
from clipcore.mapping.models import Side, written
from clipcore.mapping.recording import Call, record
from clipcore.mapping.reference import FORWARD

_RECOGNISED = 1e-4  # the relative error up to which a layer is what it computes
_EPS = (1e-5, 1e-6, 1e-12, 1e-3, 1e-8, 1e-7, 0.0)
# kind, layouts of its roles, settings: what a layer with as many tensors of as many axes may be
_HYPOTHESES: Sequence[tuple[str, dict[str, str], dict[str, Any]]] = (
    ("linear", {"kernel": "in out", "bias": "out"}, {"activation": None}),
    ("linear", {"kernel": "out in", "bias": "out"}, {"activation": None}),
    ("linear", {"kernel": "in out"}, {"activation": None}),
    ("linear", {"kernel": "out in"}, {"activation": None}),
    ("embedding", {"kernel": "num dim"}, {}),
    *(("layer_norm", {"scale": "...", "bias": "..."}, {"eps": eps}) for eps in _EPS),
    *(("rms_norm", {"scale": "..."}, {"eps": eps}) for eps in _EPS),
)


def in_same_words(ours: Side, theirs: Side, sample: Any, forms: Sequence[Any]) -> None:
    """Recognise layers of both models, and take apart those that one has fused and the other not.

    Args:
        forms: of the sample, as the target may take it.
    """
    _recognise(ours, [sample])
    _recognise(theirs, forms)
    found = [list(side.layers.values()) for side in (ours, theirs)]
    ours.take_apart(fused(*found))
    theirs.take_apart(fused(*reversed(found)))


def _recognise(side: Side, forms: Sequence[Any]) -> None:
    possible = {layer.name: list(_possible(layer)) for layer in side.layers.values() if layer.kind == "raw"}
    if not any(possible.values()):
        return
    with written(side, side.hiding()):
        calls = next((calls for form in forms if (calls := _calls(side, form))), [])
        for call in calls:
            errors = [(_error(side, layer, call), number) for number, layer in enumerate(possible.get(call.layer, ()))]
            # the smallest: an eps of another size is nearly as good
            error, number = min(errors, default=(math.inf, 0))
            if error <= _RECOGNISED:
                side.layers[call.layer] = possible.pop(call.layer)[number]


def _calls(side: Side, form: Any) -> list[Call]:
    try:
        return record(side, form)[0]
    except InvalidInput:
        return []  # who uses the form says why it is refused


def _possible(layer: Layer) -> Iterator[Layer]:
    """What the layer may be, by the axes of its tensors."""
    if layer.bare or any(tensor.within for tensor in layer.tensors.values()):
        return
    for kind, layouts, settings in _HYPOTHESES:
        for tensors in permutations(layer.tensors.values()) if len(layouts) == len(layer.tensors) else ():
            stored = [_stored(tensor, layout) for tensor, layout in zip(tensors, layouts.values(), strict=True)]
            if all(stored):
                described = {
                    role: replace(tensor, role=role, layout=layout)
                    for role, tensor, layout in zip(layouts, tensors, stored, strict=True)
                }
                yield replace(layer, kind=kind, tensors=described, settings=settings, why="")


def _stored(tensor: Tensor, layout: str) -> str:
    """The layout of a tensor that may have axes of one place beside those named; "" where it has others."""
    axes = layout.split()
    if len(tensor.shape) == len(axes):
        return layout
    if layout == "..." or sum(size != 1 for size in tensor.shape) != len(axes):
        return ""
    named = iter(axes)
    return " ".join("1" if size == 1 else next(named) for size in tensor.shape)


def _error(side: Side, layer: Layer, call: Call) -> float:
    """The relative error of what the call gave against what such a layer gives."""
    if len(call.inputs) != 1 or not isinstance(call.output, np.ndarray):
        return math.inf
    x = call.inputs[0]
    if (x.dtype.kind in "iu") != (layer.kind == "embedding"):
        return math.inf
    try:
        expected = FORWARD[layer.kind](x, side.canonical(layer), layer.settings)
    except (ValueError, IndexError):  # shapes that do not go together
        return math.inf
    return relative_error(expected, call.output)
