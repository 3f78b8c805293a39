"""What a rule says of a layer: the canonical layers that it computes, and how a watcher sees each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from clipcore.backend import Bounds, Stored


class NotDescribedError(Exception):
    """No rule describes the layer; the text says why."""


@dataclass(frozen=True)
class Block:
    """A canonical tensor: all of a variable, or the block of it within these bounds."""

    role: str
    layout: str
    within: Bounds = ()


class View(Protocol):
    """What a watcher sees of a call: canonical inputs and output, and the way back."""

    def seen(self, inputs: list[Any]) -> list[Any]:
        """The tensors that flow in, as the watcher sees them."""

    def back(self, seen: list[Any], inputs: list[Any]) -> list[Any]:
        """What replaced them, as the layer takes it."""

    def shown(self, output: Any) -> Any:
        """The layer's output as the watcher sees it."""

    def given(self, shown: Any, output: Any) -> Any:
        """What replaced it, as the layer gives it."""


class AsItIs:
    """The view of a layer whose data is canonical."""

    def seen(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def back(self, seen: list[Any], inputs: list[Any]) -> list[Any]:
        return seen

    def shown(self, output: Any) -> Any:
        return output

    def given(self, shown: Any, output: Any) -> Any:
        return shown


@dataclass(frozen=True)
class Canonical:
    """One canonical layer that a Keras layer computes.

    Attributes:
        kind, settings: as in `clipcore.backend.Layer`.
        blocks: what each variable holds, by the variable's name.
        part: its name inside the Keras layer; "" where it is all of it.
        view: how a watcher sees its calls.
        step: the Keras layer and a tensor to what this part makes of it, where the layer computes several in turn.
    """

    kind: str
    blocks: Mapping[str, tuple[Block, ...]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    part: str = ""
    view: View = field(default_factory=AsItIs)
    step: Callable[[Any, Any], Any] | None = None


Shapes = Mapping[str, tuple[int, ...]]  # of a layer's variables, by name
Rule = Stored | Callable[[Any, Shapes], list[Canonical]]


def by_stored(stored: Stored, layer: Any, shapes: Shapes) -> Canonical:
    """A layer of which each variable is one canonical tensor.

    Raises:
        NotDescribedError: it has other variables than the rule names, or a setting that its kind has no word for.
    """
    missing, extra = stored.required - set(shapes), [name for name in shapes if name not in stored.roles]
    what = type(layer).__name__
    if missing or extra:
        raise NotDescribedError(
            f"a {what} without {', '.join(sorted(missing))}" if missing else f"a {what} with {', '.join(extra)}"
        )
    settings = stored.settings(layer)
    if settings is None:
        raise NotDescribedError(f"a {what} with a setting that its kind has no word for")
    return Canonical(stored.kind, {name: (Block(*stored.roles[name]),) for name in shapes}, settings)
