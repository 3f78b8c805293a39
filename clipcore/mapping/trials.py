"""Trials: a run that is known to agree, run again with many pairs of tied layers exchanged at once.

Each pair that matters is contradicted by what follows it; from there on the source's values are put in, so that the
next pair is tried in the same run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import numpy as np

from clipcore.errors import MappingError
from clipcore.mapping.lockstep import Contradiction, LockStep, Opened

Array = np.ndarray[Any, np.dtype[Any]]
Exchange = Mapping[str, str]  # layers of the target, and the other origins that they get


def rounds(step: LockStep) -> list[list[Exchange]]:
    """The exchanges of each tie's layer with those that hold its other options, so that no two of one round are of the
    same set of tied layers.
    """
    owners = {match.source: name for name, match in step.matches.items()}
    groups: dict[frozenset[str], list[Exchange]] = {}
    for tie in step.ties:
        mine = step.matches[tie.target].source
        others = [option for option in tie.options if option != mine]
        found = [_exchange(tie.target, mine, option, owners) for option in others]
        layers = frozenset(tie.options)
        known = next((group for group in groups if group & layers), layers)
        groups[known | layers] = groups.pop(known, []) + found
    return [[exchange for exchange in at_once if exchange] for at_once in zip_longest(*groups.values())]


def _exchange(layer: str, mine: str, other: str, owners: Mapping[str, str]) -> Exchange:
    return {layer: other, **({owners[other]: mine} if other in owners else {})}


@dataclass
class Trial(LockStep):
    """The watcher of one such run.

    Attributes:
        script: what each call of the target was in the run that agrees.
        exchanges: what is exchanged.
        refuted: the numbers of the exchanges that something contradicts.
    """

    script: Sequence[Opened | None] = ()
    exchanges: Sequence[Exchange] = ()
    refuted: set[int] = field(default_factory=set)
    _begun: set[int] = field(default_factory=set)

    @classmethod
    def of(
        cls, step: LockStep, exchanges: Sequence[Exchange], bounds: Sequence[float], written: dict[str, Any]
    ) -> Trial:
        """A trial beside the run `step`."""
        choices = {target: source for exchange in exchanges for target, source in exchange.items()}
        kept = {name: match.source for name, match in step.matches.items()}
        return cls(
            step.comparison,
            step.weights,
            {**kept, **choices},
            step.excused,
            bounds,
            step.given,
            {},
            written,
            script=step.opened,
            exchanges=exchanges,
        )

    def refute(self) -> None:
        """What was begun and had no consequence yet is contradicted, if it is one exchange alone; of several, any may
        be the cause.
        """
        if len(self._begun) == 1:
            self.refuted |= self._begun
        self._begun = set()

    def _before(self, layer: str, inputs: list[Array]) -> list[Array] | None:
        turn = len(self.errors)
        known = self.script[turn]
        number = next((i for i, exchange in enumerate(self.exchanges) if layer in exchange), None)
        if not self._begun and number is None:
            return self._go_on(layer, known, inputs)
        try:
            found = super()._before(layer, inputs)
        except (Contradiction, MappingError):
            del self.errors[turn:]
            self.refute()
            return self._go_on(layer, known, inputs, resumed=True)
        if number is not None:
            self._begun.add(number)
        return found

    def _after(self, layer: str, output: Any) -> Any | None:
        opened = self._open[-1]
        if opened is not None and not self._begun and opened.match.same_output and not self._adds_a_bias(opened):
            self._open.pop()
            return None
        try:
            return super()._after(layer, output)
        except Contradiction:
            self.refute()
            return self.comparison.layer_outputs(opened.call, layer, output)[0] if opened else None

    def _adds_a_bias(self, opened: Opened) -> bool:
        pair = self.comparison.ours.layers[opened.match.source], self.comparison.theirs.layers[opened.match.target]
        return self.comparison.lacks_bias(*pair)

    def _go_on(
        self, layer: str, known: Opened | None, inputs: list[Array], *, resumed: bool = False
    ) -> list[Array] | None:
        """As in the run that agrees."""
        self.errors.append(0.0)
        if known is None:
            return self._take(None, inputs)
        if layer not in self.matches:
            self._bind(layer, replace(known.match))
        return self._take(Opened(self.matches[layer], known.call, put_in=resumed or known.put_in), inputs)
