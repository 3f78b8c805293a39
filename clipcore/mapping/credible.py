"""What must hold of two models and a sample for a plan to mean anything, and of a plan to be taken strictly."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from clipcore.errors import MappingError
from clipcore.mapping.align import relative_error
from clipcore.mapping.compare import tolerance
from clipcore.mapping.models import Side
from clipcore.mapping.plan import Plan
from clipcore.mapping.recording import Call, record
from clipcore.mapping.rows import describe_layer, may_be, signature
from clipcore.structure import leaves


def check_something_shared(ours: Side, theirs: Side) -> None:
    """Refuse two models of which no layer of one can be a layer of the other."""
    signatures = [{signature(layer) for layer in side.layers.values()} for side in (ours, theirs)]
    layers = ours.layers.values(), theirs.layers.values()
    if not signatures[0] & signatures[1] and not any(may_be(first, second) for first, second in product(*layers)):
        first, second = next(iter(ours.layers.values())), next(iter(theirs.layers.values()))
        raise MappingError(
            f"the models share no layer of one kind and shape: the source begins with {first.name!r} "
            f"({describe_layer(first)}), the target with {second.name!r} ({describe_layer(second)}); "
            f"are they of the same architecture?"
        )


def check_no_nan(calls: Sequence[Call]) -> None:
    """Refuse a sample on which the source computes NaN: nothing after it could be told apart."""
    for call in calls:
        if has_nan(call.inputs):
            place = f"in what its layer {call.layer!r} takes, from an operation without weights before it"
        elif has_nan(call.output):
            place = f"in what its layer {call.layer!r} gives, although that takes none"
        else:
            continue
        raise MappingError(f"the source computes NaN on this sample, first {place}: mend that, or give another sample")


def has_nan(values: Any) -> bool:
    """Whether an element of these arrays is NaN."""
    arrays = (value for _, value in leaves(values) if isinstance(value, np.ndarray) and value.dtype.kind in "fcV")
    return any(np.isnan(array).any() for array in arrays)


def check_deterministic(side: Side, sample: Any, calls: Sequence[Call]) -> None:
    """Refuse a model that computes something else each time: nothing that it gives could be compared."""
    again, _ = record(side, sample)
    for call, other in zip(calls, again, strict=False):
        places = {"takes": (call.inputs, other.inputs), "gives": (call.output, other.output)}
        for what, values in places.items():
            if not _same_values(*values):
                raise MappingError(
                    f"the {side.which} is not deterministic: run twice on one sample, its layer {call.layer!r} {what} "
                    f"other values; make what draws random numbers (dropout that ignores inference mode, noise) obey it"
                )


def _same_values(ours: Any, theirs: Any) -> bool:
    first, second = ([value for _, value in leaves(tree) if isinstance(value, np.ndarray)] for tree in (ours, theirs))
    # a device may give other last bits
    return len(first) == len(second) and all(
        relative_error(a, b) <= tolerance(a, b) for a, b in zip(first, second, strict=True)
    )


def check_strictly(found: Plan) -> None:
    """Refuse origins that neither execution nor a rule settled."""
    weak = [row for row in found.rows if row.evidence not in ("proven", "given")]
    if weak:
        listed = "; ".join(
            f"{row.target!r} from {', '.join(map(repr, row.sources))} ({row.reason})" for row in weak[:5]
        )
        raise MappingError(
            f"strict: {len(weak)} of {len(found.rows)} tensors have an origin that is neither proven nor given: "
            f"{listed}{' …' if len(weak) > 5 else ''}; give rules= for them, or a sample that reaches them"
        )
