"""What the user says of a mapping: rules that name origins, by name or by pattern."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from clipcore.errors import InvalidInput, MappingError
from clipcore.mapping.models import Side
from clipcore.mapping.rows import describe_layer, fits

Rule = Sequence[str]  # (source, target), or (source, target, einops pattern)


@dataclass(frozen=True)
class Given:
    """Rules, resolved.

    Attributes:
        layers: for a layer of the target, the layer of the source that it comes from.
        tensors: for a tensor of the target, the tensor of the source and the pattern ("" where it moves as it is, or as
            the layers' layouts say).
        keep: whether a layer of the target without a counterpart keeps what it holds.
    """

    layers: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, tuple[str, str]] = field(default_factory=dict)
    keep: bool = False


def resolved(rules: Iterable[Rule], ours: Side, theirs: Side, unmapped: str = "refuse") -> Given:
    """The rules by the names of two models.

    Raises:
        InvalidInput: a rule is no pair of texts, no pattern, matches nothing, or names what is not there; or `unmapped`
            is another word.
        MappingError: two rules name one target, or a layer cannot hold what the other does.
    """
    if isinstance(rules, str) or not isinstance(rules, Iterable):
        raise InvalidInput(f"rules is {rules!r:.60}; expected a list of pairs (source, target)")
    if unmapped not in ("refuse", "keep"):
        raise InvalidInput(f"unmapped is {unmapped!r}; expected 'refuse', or 'keep' to leave such layers as they are")
    given = Given(keep=unmapped == "keep")
    for rule in rules:
        source, target, pattern = _checked(rule)
        found = list(_pairs(source, target, list(ours.layers), list(theirs.layers))) if not pattern else []
        if found:
            for name, origin in found:
                _add_layer(given, name, origin, ours, theirs)
            continue
        tensors = list(_pairs(source, target, list(ours.tensors), list(theirs.tensors)))
        if not tensors:
            raise InvalidInput(_nothing(source, ours))
        for name, origin in tensors:
            if name in given.tensors:
                raise MappingError(f"two rules name the target's {name!r}; expected one origin")
            given.tensors[name] = origin, pattern
    return given


def _checked(rule: Any) -> tuple[str, str, str]:
    if isinstance(rule, str) or not isinstance(rule, Sequence) or len(rule) not in (2, 3):
        raise InvalidInput(
            f"rule {rule!r:.80}; expected (source, target), names or patterns, or with an einops pattern"
        )
    if not all(isinstance(text, str) for text in rule):
        raise InvalidInput(f"rule {rule!r:.80}; expected texts: names, or regular expressions")
    source, target, *pattern = rule
    return source, target, pattern[0] if pattern else ""


def _pairs(source: str, target: str, ours: Sequence[str], theirs: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name in the target, name in the source) for every name that a rule matches; a plain name is taken literally."""
    for name in ours:
        if name == source:
            found = target
        else:
            match = _match(source, name)
            if match is None or source in ours:
                continue
            found = _expanded(match, target)
        if found not in theirs:
            near = get_close_matches(found, theirs, 3, 0.3) or list(theirs[:5])
            raise InvalidInput(
                f"rule ({source!r}, {target!r}): the target has no {found!r}; near it are {', '.join(map(repr, near))}"
            )
        yield found, name


def _match(pattern: str, name: str) -> re.Match[str] | None:
    try:
        return re.fullmatch(pattern, name)
    except re.error as err:
        raise InvalidInput(f"rule {pattern!r} is neither a name nor a regular expression: {err}") from err


def _expanded(match: re.Match[str], target: str) -> str:
    try:
        return match.expand(target)
    except (re.error, IndexError) as err:
        raise InvalidInput(
            f"the rule's target {target!r} does not fit its pattern {match.re.pattern!r}: {err}"
        ) from err


def _add_layer(given: Given, name: str, origin: str, ours: Side, theirs: Side) -> None:
    if given.layers.get(name, origin) != origin:
        raise MappingError(
            f"two rules name the target's {name!r}, from {given.layers[name]!r} and {origin!r}; expected one origin"
        )
    source, target = ours.layers[origin], theirs.layers[name]
    if not fits(source, target):
        raise MappingError(
            f"a rule takes the target's {name!r} ({describe_layer(target)}) from {origin!r} "
            f"({describe_layer(source)}); expected a layer of its kind and shapes"
        )
    given.layers[name] = origin


def _nothing(source: str, ours: Side) -> str:
    names = [*ours.layers, *ours.tensors]
    near = get_close_matches(source, names, 3, 0.3) or names[:5]
    return f"rule {source!r} matches nothing in the source; near it are {', '.join(map(repr, near))}"
