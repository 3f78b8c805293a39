"""What a policy is given in one call: the tensors, and what else it may ask of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from clipcore.backend import Axes, NonFiniteMode, Primitives
from clipcore.errors import InvalidInput

State = Mapping[str, Any]  # what an adaptive policy has learned: arrays by name, and the states of its parts


class Spec(NamedTuple):
    """A tensor to come: its name where one is known, its shape, and NumPy's name of its dtype."""

    name: str | None
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Given:
    """Flat lists, one entry per tensor.

    Attributes:
        tensors: what shall be bounded.
        primitives: what acts on them.
        params: the weights beside the gradients, of the same shapes; None where none were passed.
        names: the parameters' names; None where they are not known.
        axes: the axes that run over the units of each, by the layout of its layer; None where that is not known.
        slots: where each stands among all tensors that a state is kept for, some of which may have no gradient now.
    """

    tensors: Sequence[Any]
    primitives: Primitives
    params: Sequence[Any] | None = None
    names: Sequence[str] | None = None
    axes: Sequence[Axes | None] | None = None
    slots: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def sizes(self) -> list[int]:
        """The number of elements of each."""
        return [math.prod(shape_of(tensor)) for tensor in self.tensors]

    def name(self, index: int) -> str:
        """A parameter's name."""
        if self.names is None:
            raise InvalidInput(
                "the policy chooses parameters by name, and these have none: pass model=, or a dict by name"
            )
        return self.names[index]

    def unit_axes(self, declared: int | None, policy: str) -> list[Axes]:
        """For each tensor, the axes that run over its units; () where it is one unit."""
        return [self._unit_axes(index, declared, policy) for index in range(len(self))]

    def _unit_axes(self, index: int, declared: int | None, policy: str) -> Axes:
        known = self.axes[index] if self.axes is not None else None
        if known is not None:
            return known
        shape = shape_of(self.tensors[index])
        if len(shape) <= 1:
            return ()
        if declared is None:
            place = repr(self.names[index]) if self.names is not None else f"tensor {index}"
            remedy = (
                "pass model=, so that the layer's layout tells, or"
                if self.axes is None
                else "its layer is of a kind whose layout clipcore does not know; leave it out by cc.PerGroup, or write"
            )
            raise InvalidInput(
                f"{policy} acts on each unit of a layer, and which axis of {place} (shape {shape}) runs over its units "
                f"is not known: {remedy} {policy}(unit_axis=…)"
            )
        if not -len(shape) <= declared < len(shape):
            raise InvalidInput(f"{policy}: unit_axis is {declared}, and tensor {index} has shape {shape}")
        return (declared % len(shape),)

    def holding(self, tensors: Sequence[Any]) -> Given:
        """The same with other tensors in place of these."""
        return replace(self, tensors=tensors)

    def pick(self, indices: Sequence[int]) -> Given:
        """Some of the tensors, with what belongs to them."""

        def picked(values: Any) -> Any:
            return None if values is None else [values[index] for index in indices]

        return replace(
            self,
            tensors=picked(self.tensors),
            params=picked(self.params),
            names=picked(self.names),
            axes=picked(self.axes),
            slots=picked(self.slots),
        )


def learned(given: Given, nonfinite: NonFiniteMode, faults: Any, old: State, new: State) -> State:
    """The new state, or the old one where the step has faults that do not count as 0."""
    if nonfinite == "zero" or (isinstance(faults, int) and not faults):
        return new
    if isinstance(faults, int):
        return old
    where = given.primitives.arithmetic.where

    def chosen(before: Any, after: Any) -> Any:
        if isinstance(after, Mapping):
            return {name: chosen(before[name], value) for name, value in after.items()}
        return after if after is before else where(faults == 0, after, before)

    kept: State = chosen(old, new)
    return kept


def map_state(function: Any, state: State) -> State:
    """The state with `function` applied to each of its arrays."""
    return {k: map_state(function, v) if isinstance(v, Mapping) else function(v) for k, v in state.items()}


def shape_of(tensor: Any) -> tuple[int, ...]:
    """A tensor's shape as a tuple."""
    return tuple(int(size) for size in tensor.shape)
