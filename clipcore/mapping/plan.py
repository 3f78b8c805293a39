"""The plan: where each tensor of the target comes from, on what evidence; plain JSON that needs no framework."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from clipcore.backend import Bounds
from clipcore.errors import MappingError
from clipcore.files import write_whole
from clipcore.mapping.kinds import base_role
from clipcore.mapping.layouts import apply_pattern
from clipcore.mapping.operations import OPERATIONS, compute, formula

Array = np.ndarray[Any, np.dtype[Any]]
Evidence = Literal["proven", "structure", "name", "given"]

SCHEMA = 3


@dataclass(frozen=True)
class Term:
    """A tensor of the source, or a part of one, that goes into a tensor of the target.

    Attributes:
        name: of the source's stored tensor.
        within: the bounds of the part, axis by axis; () for all of it.
        pattern: how it is rearranged before an operation takes it; "" for as it is stored.
    """

    name: str
    within: Bounds = ()
    pattern: str = ""


@dataclass(frozen=True)
class Part:
    """A tensor of the target, or a part of one: what it is made of, and how that is known.

    Attributes:
        role: what it is to its layer.
        source_layer, target_layer: the two layers that were matched.
        terms: what it is made of; nothing where the source's layer lacks the role, and it takes the value that has no
            effect, `fill`.
        operation: what is computed of the terms first, a name of `clipcore.mapping.operations`; "" for the one term.
        pattern: the einops pattern that carries that into the target's layout.
        then: what is computed of what the pattern gave; "" for nothing.
        numbers: what the operations need beside the arrays.
        sizes: lengths of the patterns' axes that the shapes alone do not tell.
        evidence: "proven" by executing both, or "structure", "name", "given".
        reason: one sentence for a reader.
        fill: the value of every element where there is no term.
        into: the bounds of the part in the target's tensor; () for all of it.
    """

    role: str
    source_layer: str
    target_layer: str
    terms: tuple[Term, ...]
    pattern: str
    sizes: Mapping[str, int]
    evidence: Evidence
    reason: str
    operation: str = ""
    then: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    fill: float | None = None
    into: Bounds = ()

    @property
    def reversible(self) -> bool:
        """Whether it is a rearrangement, which the way back undoes bit for bit."""
        return len(self.terms) == 1 and not self.operation and not self.then

    @property
    def formula(self) -> str:
        """Where it comes from, for a reader."""
        if not self.terms:
            return f"filled with {self.fill:g}"
        names = [f"{term.name}{_indices(term.within)}" for term in self.terms]
        made = formula(self.operation, names, self.numbers) if self.operation else names[0]
        return formula(self.then, [made], self.numbers) if self.then else made

    def carry(self, sources: Mapping[str, Array], place: str) -> Array | None:
        """Its values from the source's tensors by name, a view where possible; None where `fill` stands for it."""
        if not self.terms:
            return None
        arrays = [self._term(term, sources, place) for term in self.terms]
        value = compute(self.operation, arrays, self._numbers(self.operation)) if self.operation else arrays[0]
        where = f"{place} from {self.formula}"
        value = apply_pattern(value, self.pattern, self.sizes, where) if self.pattern else value
        return compute(self.then, [value], self._numbers(self.then)) if self.then else value

    def _numbers(self, operation: str) -> dict[str, Any]:
        return {name: number for name, number in self.numbers.items() if name in OPERATIONS[operation].numbers}

    def _term(self, term: Term, sources: Mapping[str, Array], place: str) -> Array:
        if term.name not in sources:
            raise MappingError(f"the plan takes {place} from {term.name!r}, which the source does not have")
        array = cut(sources[term.name], term.within)
        return apply_pattern(array, term.pattern, self.sizes, f"{place} from {term.name!r}") if term.pattern else array

    def put_back(self, target: Array, sources: Mapping[str, Array]) -> None:
        """Write into the source's tensor what the target's tensor says of it: the inverse of `carry`."""
        (term,) = self.terms
        back = "; ".join(" -> ".join(reversed(step.split(" -> "))) for step in reversed(self.pattern.split("; ")))
        value = cut(target, self.into)
        value = apply_pattern(value, back, self.sizes, f"{term.name!r} from {self.role}") if back else value
        cut(sources[term.name], term.within)[...] = value


def cut(array: Array, bounds: Bounds) -> Array:
    """The part of an array within bounds, as a view."""
    return array[tuple(slice(start, stop) for start, stop in bounds)] if bounds else array


def _indices(bounds: Bounds) -> str:
    return f"[{', '.join(f'{start}:{stop}' for start, stop in bounds)}]" if bounds else ""


@dataclass(frozen=True)
class Row:
    """The origin of one tensor of the target.

    Attributes:
        target: its name in the target.
        parts: what it is made of: one, or several where one stored tensor holds several of a layer (gates, fused
            query, key and value).
    """

    target: str
    parts: tuple[Part, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """Names in the source that it is made of, each once; none where it is filled."""
        return tuple(dict.fromkeys(term.name for part in self.parts for term in part.terms))

    @property
    def role(self) -> str:
        """What it is to its layer: the roles of its parts, as far as they have one word in common."""
        roles = dict.fromkeys(part.role for part in self.parts)
        return next(iter(roles)) if len(roles) == 1 else "/".join(dict.fromkeys(map(base_role, roles)))

    @property
    def source_layer(self) -> str:
        """The layer of the source that its first part comes from."""
        return self.parts[0].source_layer

    @property
    def target_layer(self) -> str:
        """The layer of the target that its first part is of."""
        return self.parts[0].target_layer

    @property
    def pattern(self) -> str:
        """The einops patterns that carry its parts, each once."""
        return "; ".join(dict.fromkeys(part.pattern for part in self.parts))

    @property
    def sizes(self) -> Mapping[str, int]:
        """Lengths of the patterns' axes that the shapes alone do not tell."""
        return {axis: size for part in self.parts for axis, size in part.sizes.items()}

    @property
    def evidence(self) -> Evidence:
        """The weakest evidence of its parts."""
        return max((part.evidence for part in self.parts), key=_STRENGTH.index)

    @property
    def reason(self) -> str:
        """The reasons of its parts, each once."""
        return "; ".join(dict.fromkeys(part.reason for part in self.parts))

    @property
    def fill(self) -> float | None:
        """The value of every element where there is no source."""
        return None if self.sources else self.parts[0].fill

    @property
    def reversible(self) -> bool:
        """Whether it is a rearrangement, which the way back undoes bit for bit."""
        return all(part.reversible for part in self.parts)

    def carry(self, sources: Mapping[str, Array]) -> Array | None:
        """The target's tensor from the source's by name, a view where possible; None where `fill` stands for it.

        Raises:
            MappingError: a source tensor is missing, or its shape does not fit the pattern.
        """
        values = [part.carry(sources, repr(self.target)) for part in self.parts]
        if len(values) == 1 and not self.parts[0].into:
            return values[0]
        filled = [value for value in values if value is not None]
        if not filled:
            return None
        shape = tuple(max(stop for _, stop in axis) for axis in zip(*(part.into for part in self.parts), strict=True))
        whole = np.empty(shape, np.result_type(*filled))
        for part, value in zip(self.parts, values, strict=True):
            place = cut(whole, part.into)
            if value is not None and value.shape != place.shape:
                raise MappingError(
                    f"{self.target!r}: {part.role} from {part.formula} has shape {value.shape} after "
                    f"[{part.pattern}]; its place{_indices(part.into)} has {place.shape}: make a plan for these models"
                )
            place[...] = part.fill if value is None else value
        return whole


_STRENGTH: tuple[Evidence, ...] = ("given", "proven", "structure", "name")


@dataclass(frozen=True)
class Difference:
    """A setting in which two matched layers differ.

    Attributes:
        layer: the target's layer.
        setting: its canonical name ("eps", "padding" …).
        source, target: the two values; equal where no value tells the difference.
        repair: what would make up for it, in one sentence; None where nothing is known to.
        repaired: whether the plan does that.
        tested: whether computing with the two values gave what the two models give.
    """

    layer: str
    setting: str
    source: Any
    target: Any
    repair: str | None = None
    repaired: bool = False
    tested: bool = False

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
        kept: tensors of the target that have no origin and keep what they hold, as `unmapped="keep"` asks.
        limited: of a plan that `migrate` returned, the target's tensors that the limit changed, or a dtype rounded, by
            name, as they were written; `verify` compares against these. It is not saved.
    """

    source: str
    target: str
    rows: tuple[Row, ...]
    unused: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()
    kept: tuple[str, ...] = ()
    limited: Mapping[str, Array] = field(default_factory=dict, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, as it stands in a file."""
        return {
            "schema": SCHEMA,
            "source": self.source,
            "target": self.target,
            "rows": [asdict(row) for row in self.rows],
            "unused": list(self.unused),
            "kept": list(self.kept),
            "differences": [asdict(difference) for difference in self.differences],
        }

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON: the same bytes for the same plan, and the old file or the new one, whole."""
        text = json.dumps(self.to_dict(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        write_whole(path, text, "the plan")

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
            _check_list(document, "kept", str)
            _check_list(document, "differences", dict)
            _check_list(document, "rows", dict)
            return cls(
                source=document["source"],
                target=document["target"],
                rows=tuple(_row(**entry) for entry in document["rows"]),
                unused=tuple(document["unused"]),
                kept=tuple(document["kept"]),
                differences=tuple(_difference(**entry) for entry in document["differences"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as err:
            raise MappingError(f"{path} is no whole plan: {err}; make the plan anew") from err

    def __str__(self) -> str:
        lines = [f"{self.source} -> {self.target}, {len(self.rows)} tensors"]
        width = max((len(row.target) for row in self.rows), default=0)
        for row in self.rows:
            origin = ", ".join(dict.fromkeys(part.formula for part in row.parts))
            marks = "" if row.reversible or not row.sources else "  (one way: not undone by migrating back)"
            lines.append(f"  {row.target:{width}}  <- {origin}  [{row.pattern}]  {row.evidence}: {row.reason}{marks}")
        lines += [f"  unused: {name}" for name in self.unused]
        lines += [f"  kept as it is: {name}" for name in self.kept]
        lines += [f"  difference: {difference}" for difference in self.differences]
        return "\n".join(lines)

    def explain(self, name: str) -> str:
        """Where a layer, or one of its tensors, comes from, on what evidence, and what differs, for a reader.

        Args:
            name: of a layer or a tensor, in the target or in the source.
        Raises:
            MappingError: the plan knows no such name.
        """
        found = [(row, part) for row in self.rows for part in row.parts if name in _names_of(row, part)]
        if not found:
            known = dict.fromkeys(known for row in self.rows for part in row.parts for known in _names_of(row, part))
            near = get_close_matches(name, list(known), 3, 0.3) or list(known)[:5]
            raise MappingError(f"the plan has no layer or tensor {name!r}; near it are {', '.join(map(repr, near))}")
        lines: list[str] = []
        layers = dict.fromkeys((part.source_layer, part.target_layer) for _, part in found)
        for source, target in layers:
            lines.append(f"{target} <- {source}")
            of_layer = [
                (row, part) for row, part in found if (part.source_layer, part.target_layer) == (source, target)
            ]
            for row, part in of_layer:
                lines += [
                    f"  {part.role}: {row.target}{_indices(part.into)} = {part.formula}",
                    f"    rearranged [{part.pattern or 'as it is'}]{_with_sizes(part.sizes)}",
                    f"    {part.evidence}: {part.reason}",
                ]
                if part.terms and not part.reversible:
                    lines.append("    one way: the function stays, the way back gives other numbers")
            lines += [f"  difference: {d}" for d in self.differences if d.layer == target]
        return "\n".join(lines)

    @property
    def layer_pairs(self) -> tuple[tuple[str, str], ...]:
        """(source layer, target layer) for every matched pair, in the order of the rows."""
        return tuple(dict.fromkeys((part.source_layer, part.target_layer) for row in self.rows for part in row.parts))


def _names_of(row: Row, part: Part) -> tuple[str, ...]:
    return row.target, part.target_layer, part.source_layer, *(term.name for term in part.terms)


def _with_sizes(sizes: Mapping[str, int]) -> str:
    return f" with {', '.join(f'{axis}={size}' for axis, size in sizes.items())}" if sizes else ""


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
    _refuse_unknown(entry, Row)
    _check_text(entry, ("target",))
    _check_list(entry, "parts", dict)
    if not entry["parts"]:
        raise TypeError(f"the row of {entry['target']!r} has no parts")
    return Row(entry["target"], tuple(_part(**part) for part in entry["parts"]))


def _part(**entry: Any) -> Part:
    _refuse_unknown(entry, Part)
    _check_text(entry, ("role", "source_layer", "target_layer", "pattern", "reason", "operation", "then"))
    _check_list(entry, "terms", dict)
    fill, sizes, numbers = entry["fill"], entry["sizes"], entry["numbers"]
    if not entry["terms"] and not (isinstance(fill, int | float) and math.isfinite(fill)):
        raise TypeError(f"a part without a source has fill {fill!r}; expected a number")
    if entry["pattern"] and any(step.count(" -> ") != 1 for step in entry["pattern"].split("; ")):
        raise TypeError(f"pattern is {entry['pattern']!r}; expected 'axes -> axes'")
    if not isinstance(sizes, dict) or not all(isinstance(size, int) for size in sizes.values()):
        raise TypeError(f"sizes is {sizes!r}; expected lengths by axis")
    if not isinstance(numbers, dict):
        raise TypeError(f"numbers is {numbers!r}; expected numbers by name")
    for name in (entry["operation"], entry["then"]):
        if name and name not in OPERATIONS:
            raise TypeError(f"there is no operation {name!r}; expected one of {sorted(OPERATIONS)}")
    if len(entry["terms"]) > 1 and not entry["operation"]:
        raise TypeError(f"{len(entry['terms'])} terms without an operation; expected one term")
    if entry["evidence"] not in get_args(Evidence):
        raise TypeError(f"evidence is {entry['evidence']!r}; expected one of {get_args(Evidence)}")
    terms = tuple(_term(**term) for term in entry["terms"])
    return Part(**{**entry, "terms": terms, "into": _bounds(entry["into"]), "numbers": _with_tuples(numbers)})


def _term(**entry: Any) -> Term:
    _refuse_unknown(entry, Term)
    _check_text(entry, ("name", "pattern"))
    return Term(entry["name"], _bounds(entry["within"]), entry["pattern"])


def _bounds(value: Any) -> Bounds:
    pairs: list[Any] = value if isinstance(value, list) else [value]
    if not all(isinstance(p, list) and len(p) == 2 and all(isinstance(n, int) for n in p) for p in pairs):
        raise TypeError(f"bounds are {value!r}; expected a list of [start, stop]")
    return tuple((start, stop) for start, stop in pairs)


def _with_tuples(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _in_tuples(number) for name, number in numbers.items()}


def _refuse_unknown(entry: Mapping[str, Any], kind: Any) -> None:
    if unknown := set(entry) - {f.name for f in fields(kind)}:
        raise TypeError(f"a {kind.__name__.lower()} has the unknown entries {sorted(unknown)}")
