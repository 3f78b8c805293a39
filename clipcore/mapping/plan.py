"""The plan: where each tensor of the target comes from, on what evidence; plain JSON that needs no framework."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from clipcore.errors import InvalidInput, MappingError
from clipcore.mapping.layouts import apply_pattern

Array = np.ndarray[Any, np.dtype[Any]]
Evidence = Literal["proven", "structure", "name", "given"]

SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """The origin of one tensor of the target.

    Attributes:
        target: its name in the target.
        sources: names in the source that it is made of; none where the source's layer lacks the role, and the tensor
            takes the value that has no effect, `fill`.
        role: what it is to its layer.
        source_layer, target_layer: the two layers that were matched.
        pattern: the einops pattern that carries the source's layout into the target's.
        sizes: lengths of the pattern's axes that the shape alone does not tell.
        evidence: "proven" by executing both, or "structure", "name", "given".
        reason: one sentence for a reader.
        fill: the value of every element where there is no source.
    """

    target: str
    sources: tuple[str, ...]
    role: str
    source_layer: str
    target_layer: str
    pattern: str
    sizes: Mapping[str, int]
    evidence: Evidence
    reason: str
    fill: float | None = None

    def carry(self, sources: Mapping[str, Array]) -> Array | None:
        """The target's tensor from the source's by name, a view where possible; None where `fill` stands for it.

        Raises:
            MappingError: a source tensor is missing, or its shape does not fit the pattern.
        """
        if not self.sources:
            return None
        (name,) = self.sources
        if name not in sources:
            raise MappingError(f"the plan takes {self.target!r} from {name!r}, which the source does not have")
        return apply_pattern(sources[name], self.pattern, self.sizes, f"{self.target!r} from {name!r}")

    def carry_back(self, target: Array) -> Array:
        """The source's tensor from the target's: the inverse of `carry` for one source."""
        before, _, after = self.pattern.partition(" -> ")
        return apply_pattern(target, f"{after} -> {before}", self.sizes, f"{self.sources[0]!r} from {self.target!r}")


@dataclass(frozen=True)
class Difference:
    """A setting in which two matched layers differ.

    Attributes:
        layer: the target's layer.
        setting: its canonical name ("eps", "padding" …).
        source, target: the two values; equal where no value tells the difference.
        repair: what would make up for it, in one sentence; None where nothing is known to.
    """

    layer: str
    setting: str
    source: Any
    target: Any
    repair: str | None = None

    def __post_init__(self) -> None:
        # JSON has no tuples: a plan that was read is equal to the one that was saved
        object.__setattr__(self, "source", _in_tuples(self.source))
        object.__setattr__(self, "target", _in_tuples(self.target))

    @property
    def values(self) -> str:
        """The setting and its two values, for a sentence about the layer."""
        values = f"the target has {self.target}, the source {self.source}"
        return f"{self.setting}: {'not the same' if self.source == self.target else values}"

    def __str__(self) -> str:
        text = f"{self.layer}: {self.values}"
        return f"{text}; {self.repair}" if self.repair else text


def _in_tuples(value: Any) -> Any:
    return tuple(map(_in_tuples, value)) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Plan:
    """The mapping between two models, tensor by tensor.

    Attributes:
        source, target: names of the backends.
        rows: one per tensor of the target, in the target's order.
        unused: tensors of the source that nothing takes.
        differences: settings in which matched layers differ.
        limited: of a plan that `migrate` returned, the target's tensors that the limit changed, by name, as they were
            written; `verify` compares against these. It is not saved.
    """

    source: str
    target: str
    rows: tuple[Row, ...]
    unused: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()
    limited: Mapping[str, Array] = field(default_factory=dict, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, as it stands in a file."""
        return {
            "schema": SCHEMA,
            "source": self.source,
            "target": self.target,
            "rows": [asdict(row) for row in self.rows],
            "unused": list(self.unused),
            "differences": [asdict(difference) for difference in self.differences],
        }

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON: the same bytes for the same plan, and the old file or the new one, whole."""
        text = json.dumps(self.to_dict(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        part = Path(f"{path}.part")
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(path)
        except OSError as err:
            raise InvalidInput(
                f"the plan cannot be written to {path}: {err}; name a file in a folder that is there"
            ) from err
        finally:
            with suppress(OSError):
                part.unlink()

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            MappingError: the file is no plan, or of another schema version.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as err:
            raise MappingError(f"{path} is no plan: {err}; write one with plan.save") from err
        schema = document.get("schema") if isinstance(document, dict) else None
        if schema != SCHEMA:
            raise MappingError(f"{path} has schema {schema!r}; this clipcore reads schema {SCHEMA}: make the plan anew")
        try:
            _check_text(document, ("source", "target"))
            _check_list(document, "unused", str)
            _check_list(document, "differences", dict)
            _check_list(document, "rows", dict)
            return cls(
                source=document["source"],
                target=document["target"],
                rows=tuple(_row(**entry) for entry in document["rows"]),
                unused=tuple(document["unused"]),
                differences=tuple(_difference(**entry) for entry in document["differences"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as err:
            raise MappingError(f"{path} is no whole plan: {err}; make the plan anew") from err

    def __str__(self) -> str:
        lines = [f"{self.source} -> {self.target}, {len(self.rows)} tensors"]
        width = max((len(row.target) for row in self.rows), default=0)
        for row in self.rows:
            origin = ", ".join(row.sources) or f"filled with {row.fill:g}"
            lines.append(f"  {row.target:{width}}  <- {origin}  [{row.pattern}]  {row.evidence}: {row.reason}")
        lines += [f"  unused: {name}" for name in self.unused]
        lines += [f"  difference: {difference}" for difference in self.differences]
        return "\n".join(lines)

    @property
    def layer_pairs(self) -> tuple[tuple[str, str], ...]:
        """(source layer, target layer) for every matched pair, in the order of the rows."""
        return tuple(dict.fromkeys((row.source_layer, row.target_layer) for row in self.rows))


def _check_text(entry: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if not isinstance(entry[name], str):
            raise TypeError(f"{name} is {entry[name]!r}; expected text")


def _check_list(document: Mapping[str, Any], name: str, kind: type) -> None:
    if not isinstance(document[name], list) or not all(isinstance(entry, kind) for entry in document[name]):
        raise TypeError(f"{name} is {document[name]!r:.60}; expected a list of {'names' if kind is str else 'entries'}")


def _difference(**entry: Any) -> Difference:
    _check_text(entry, ("layer", "setting") if entry.get("repair") is None else ("layer", "setting", "repair"))
    return Difference(**entry)


def _row(**entry: Any) -> Row:
    unknown = set(entry) - {f.name for f in fields(Row)}
    if unknown:
        raise TypeError(f"a row has the unknown entries {sorted(unknown)}")
    _check_text(entry, ("target", "role", "source_layer", "target_layer", "pattern", "reason"))
    sources, fill, sizes = entry["sources"], entry.get("fill"), entry["sizes"]
    if not isinstance(sources, list) or len(sources) > 1 or not all(isinstance(name, str) for name in sources):
        raise TypeError(f"sources is {sources!r}; expected a list of one name, or of none")
    if not sources and not (isinstance(fill, int | float) and math.isfinite(fill)):
        raise TypeError(f"a row without a source has fill {fill!r}; expected a number")
    if sources and entry["pattern"].count(" -> ") != 1:
        raise TypeError(f"pattern is {entry['pattern']!r}; expected 'axes -> axes'")
    if not isinstance(sizes, dict) or not all(isinstance(size, int) for size in sizes.values()):
        raise TypeError(f"sizes is {sizes!r}; expected lengths by axis")
    if entry["evidence"] not in get_args(Evidence):
        raise TypeError(f"evidence is {entry['evidence']!r}; expected one of {get_args(Evidence)}")
    return Row(**{**entry, "sources": tuple(sources)})
