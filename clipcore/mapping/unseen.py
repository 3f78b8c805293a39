"""Layers that no watcher sees run: bare tensors of a model, and what the sample never reaches.

They are placed before the target runs, by a rule, a name, a shape that no other has, or their order; and they are
proven where the source's outputs depend on them and everything that is computed with them agrees.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipcore.backend import Layer
from clipcore.errors import MappingError
from clipcore.mapping.align import relative_error
from clipcore.mapping.compare import Comparison
from clipcore.mapping.given import Given
from clipcore.mapping.lockstep import names_fit, place_of, plain_name
from clipcore.mapping.models import Side
from clipcore.mapping.plan import Evidence
from clipcore.mapping.recording import Call
from clipcore.mapping.rows import describe_layer, fits, may_be
from clipcore.structure import leaves

_OTHER = 1e-6  # the relative error up to which a device may give other last bits
_MOST_TRIALS = 64  # runs of the source to see what its outputs depend on


@dataclass(frozen=True)
class Unseen:
    """The origin of one such layer of the target.

    Attributes:
        source: the layer of the source.
        evidence, reason: what places it.
        matters: whether what the source computes depends on it, so that agreement proves it.
    """

    source: str
    evidence: Evidence
    reason: str
    matters: bool

    def judged(self, agreed: bool) -> tuple[Evidence, str]:
        """The evidence and reason once it is known whether everything that was computed agreed."""
        if self.evidence != "given" and self.matters and agreed:
            return "proven", "no call shows it; what follows depends on it, and everything computed with it agrees"
        return self.evidence, self.reason


def place_unseen(
    ours: Side, theirs: Side, seen: tuple[Collection[str], Collection[str]], given: Given, dependence: Dependence
) -> dict[str, Unseen]:
    """The origin of every layer of the target that its run does not call.

    Args:
        seen: the layers that the source's run calls, and those that the target's does.
    Raises:
        MappingError: nothing settles an origin.
    """
    waiting = {name: theirs.layers[name] for name in _waiting(ours, theirs, seen)}
    placed = {
        name: Unseen(given.layers[name], "given", "a rule of yours", False) for name in waiting if name in given.layers
    }
    taken = set(given.layers.values())
    for name, layer in waiting.items():
        if name in placed or all(tensor.name in given.tensors for tensor in layer.tensors.values()):
            continue
        free = {n: other for n, other in ours.layers.items() if n not in taken}
        # a table that one model looks up by hand is a layer of the other's, which shows its calls
        candidates = [n for n, other in free.items() if n not in seen[0] and fits(other, layer)] or [
            n for n, other in free.items() if may_be(other, layer)
        ]
        if given.keep and not candidates:
            continue
        rivals = [
            n
            for n, other in waiting.items()
            if n not in placed and any(fits(ours.layers[c], other) or may_be(ours.layers[c], other) for c in candidates)
        ]
        origin, evidence, reason = _origin(name, layer, candidates, rivals, ours, dependence)
        placed[name] = Unseen(origin, evidence, reason, dependence.on(origin))
        taken.add(origin)
    return placed


def _waiting(ours: Side, theirs: Side, seen: tuple[Collection[str], Collection[str]]) -> Iterator[str]:
    """The layers that the run does not call, and that hold a tensor which no called one holds; and those called that no
    call of the source can be, since it uses such a tensor by hand.
    """
    held = {place_of(tensor) for name in seen[1] for tensor in theirs.layers[name].tensors.values()}
    by_hand = [layer for name, layer in ours.layers.items() if name not in seen[0]]
    called = [ours.layers[name] for name in seen[0]]
    for name, layer in theirs.layers.items():
        if name not in seen[1]:
            if not all(place_of(tensor) in held for tensor in layer.tensors.values()):
                yield name
        elif any(may_be(other, layer) for other in by_hand) and not any(
            fits(other, layer) or may_be(other, layer) for other in called
        ):
            yield name


def _origin(
    name: str, layer: Layer, candidates: list[str], rivals: list[str], ours: Side, dependence: Dependence
) -> tuple[str, Evidence, str]:
    for is_like in (_equal, _one_ends_with_the_other, names_fit):
        fitting = [n for n in candidates if is_like(n, name)]
        if len(fitting) == 1:
            return fitting[0], "name", "no call shows it; the only name that fits"
    if candidates and len(candidates) == len(rivals) and all(map(dependence.on, candidates)):
        alone = len(candidates) == 1
        return (
            candidates[0],
            "structure",
            f"no call shows it; {'the only one of its shape' if alone else 'by its order'}",
        )
    raise MappingError(
        f"the target's layer {name!r} ({describe_layer(layer)}) is not reached by the sample, and no name "
        f"settles its origin (candidates: {', '.join(map(repr, candidates)) or 'none'}); give one that reaches it, or "
        f"rules=[(source, {name!r})]"
    )


def _equal(source: str, target: str) -> bool:
    return plain_name(source) == plain_name(target)


def _one_ends_with_the_other(source: str, target: str) -> bool:
    first, second = plain_name(source), plain_name(target)
    length = min(len(first), len(second))
    return first[-length:] == second[-length:]


class Dependence:
    """Whether anything that the source computes with other layers, or its outputs, depends on a layer's tensors."""

    def __init__(self, comparison: Comparison, outputs: Any) -> None:
        self._comparison, self._outputs = comparison, outputs
        self._ours = comparison.ours
        self._known: dict[str, bool] = {}

    def on(self, layer: str) -> bool:
        """False also where that is not found out, after too many trials."""
        if layer not in self._known and len(self._known) < _MOST_TRIALS:
            self._known[layer] = self._found(layer)
        return self._known.get(layer, False)

    def _found(self, layer: str) -> bool:
        names = [tensor.name for tensor in self._ours.layers[layer].tensors.values()]
        with self._ours.restored(names):
            changed = {name: _changed(array) for name, array in self._ours.copies(names).items()}
            self._ours.backend.write(self._ours.model, changed)
            watcher = _Until(iter(self._comparison.calls), self._ours.layers)
            try:
                outputs = self._ours.run(self._comparison.sample, watcher)
            except Exception:
                if watcher.differs:
                    return True
                raise
        pairs = zip(leaves(self._outputs), leaves(outputs), strict=True)
        return any(relative_error(np.asarray(a), np.asarray(b)) > 0 for (_, a), (_, b) in pairs)


@dataclass
class _Until:
    """A watcher that ends the run where a layer takes something else than it took."""

    calls: Iterator[Call]
    layers: Collection[str]
    differs: bool = False

    def before(self, layer: str, inputs: list[np.ndarray[Any, Any]]) -> None:
        if layer not in self.layers:
            return
        call = next(self.calls, None)
        expected = call.inputs if call is not None and call.layer == layer else []
        pairs = zip(expected, inputs, strict=False)
        if len(expected) != len(inputs) or any(relative_error(a, b) > _OTHER for a, b in pairs):
            self.differs = True
            raise _EndError

    def after(self, layer: str, output: Any) -> None:
        pass


class _EndError(Exception):
    pass


def _changed(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if array.dtype.kind in "biu":
        return array
    changed = np.asarray(-1.3 * array, array.dtype)
    changed += np.asarray(0.2, array.dtype)
    return changed
