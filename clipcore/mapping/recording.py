"""Recording what flows through a model's layers, in a bounded amount of memory."""

from __future__ import annotations

import tempfile
import weakref
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clipcore.mapping.models import Side
from clipcore.structure import map_leaves

Array = np.ndarray[Any, np.dtype[Any]]

_MOST_HELD = 1 << 28  # bytes that a recording holds in memory; what is beyond lies in a file
_RECENT = 8  # arrays with which a new one is compared, since one layer's output is the next one's input


@dataclass
class Call:
    """One call of one layer: what flowed in and out."""

    layer: str
    inputs: list[Array]
    output: Any = None


class Shelf:
    """Arrays to be kept: those that just came again once, and those beyond a limit of memory in a file without a name.

    Args:
        most: bytes to be held in memory.
    """

    def __init__(self, most: int = _MOST_HELD) -> None:
        self._most, self.held = most, 0
        self._recent: deque[Array] = deque(maxlen=_RECENT)
        self._file: Any = None

    def keep(self, value: Any) -> Any:
        """The value, or an equal one that is kept already; not to be written."""
        if not isinstance(value, np.ndarray):
            return value
        known = next((other for other in self._recent if _equal(other, value)), None)
        if known is not None:
            return known
        if self.held + value.nbytes > self._most and value.size:
            value = self._filed(value)
        else:
            self.held += value.nbytes
        self._recent.append(value)
        return value

    def _filed(self, value: Array) -> Array:
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  closed with the shelf; its arrays have a hold of their own
            weakref.finalize(self, self._file.close)
        place = self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(value).tobytes())
        self._file.flush()
        return np.memmap(self._file, value.dtype, "r", place, value.shape)


def _equal(known: Array, value: Array) -> bool:
    if known.shape != value.shape or known.dtype != value.dtype or not value.size:
        return False
    return bool(known.flat[-1] == value.flat[-1]) and np.array_equal(known, value)


@dataclass
class Recorder:
    """A watcher that keeps every call of these layers, in order of execution."""

    layers: Collection[str]
    calls: list[Call] = field(default_factory=list)
    _shelf: Shelf = field(default_factory=Shelf)
    _open: list[Call] = field(default_factory=list)

    def before(self, layer: str, inputs: list[Array]) -> None:
        if layer not in self.layers:
            return
        call = Call(layer, [self._shelf.keep(value) for value in inputs])
        self.calls.append(call)
        self._open.append(call)

    def after(self, layer: str, output: Any) -> None:
        if layer not in self.layers:
            return
        self._open.pop().output = map_leaves(self._shelf.keep, output)


def record(side: Side, sample: Any) -> tuple[list[Call], Any]:
    """The calls of a model's layers on a sample, and its outputs."""
    recorder = Recorder(side.layers)
    outputs = side.run(sample, recorder)
    return recorder.calls, outputs


class _Names(set[str]):
    """A watcher that notes which layers are called."""

    def before(self, layer: str, inputs: list[Array]) -> None:
        self.add(layer)

    def after(self, layer: str, output: Any) -> None:
        pass


def called(side: Side, sample: Any) -> Collection[str]:
    """The names of the layers that a model calls on a sample."""
    names = _Names()
    side.run(sample, names)
    return names & side.layers.keys()
