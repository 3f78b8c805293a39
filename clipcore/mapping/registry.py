"""Layer kinds of one's own: registered once, by a call or by a plugin, and mapped like the built-in ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from clipcore.backend import Stored
from clipcore.errors import MappingError
from clipcore.mapping.kinds import KINDS, Kind, add_kind

GROUP = "clipcore.kinds"  # entry points: modules that call `register_kind` as they are imported

_stored: dict[str, Stored] = {}  # by the full name of a class


def register_kind(kind: Kind, layers: Mapping[type | str, Stored]) -> None:
    """Teach clipcore a kind of layer: its roles and settings, and how classes of any framework store it.

    Args:
        kind: roles with their canonical axes. The name of a built-in kind, as `cc.layer_kinds()` gives it, says that
            these classes are layers of that kind as well.
        layers: by class, or by its full name "module.Class" (nothing is imported then), how it stores the roles.
            Subclasses count too.
    Raises:
        MappingError: another kind has the name, or a layout does not have the axes of its role.

    >>> import clipcore as cc
    >>> kind = cc.Kind("gain", {"gain": "channel"})
    >>> cc.register_kind(kind, {"mine.TorchGain": cc.Stored("gain", {"g": ("gain", "channel")})})
    """
    if not isinstance(kind, Kind):
        raise MappingError(f"kind is {kind!r:.60}; expected a cc.Kind")
    for stored in layers.values():
        _check(kind, stored)
    if KINDS.get(kind.name) != kind:
        add_kind(kind)
    _stored.update({cls if isinstance(cls, str) else _full_name(cls): stored for cls, stored in layers.items()})


def stored_by(cls: type) -> Stored | None:
    """How a class, or the nearest of its bases that is registered, stores a kind; None where none is."""
    _load_plugins()
    if not _stored:
        return None
    return next((_stored[name] for name in map(_full_name, cls.__mro__) if name in _stored), None)


def layer_kinds() -> dict[str, Kind]:
    """Every kind of layer that clipcore knows, by name.

    >>> layer_kinds()["linear"].roles
    {'kernel': 'out in', 'bias': 'out'}
    """
    _load_plugins()
    return dict(KINDS)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@cache
def _load_plugins() -> None:
    from importlib import metadata

    for entry in metadata.entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as err:
            raise MappingError(
                f"the layer kinds of {entry.value} (entry point {entry.name!r} of {GROUP}) cannot be imported: "
                f"{type(err).__name__}: {err}; mend or uninstall that distribution"
            ) from err


def _check(kind: Kind, stored: Stored) -> None:
    """Refuse a table that cannot be carried out."""
    if stored.kind != kind.name:
        raise MappingError(f"a class is said to store kind {stored.kind!r} under kind {kind.name!r}; expected one name")
    for name, (role, layout) in stored.roles.items():
        if role not in kind.roles:
            raise MappingError(
                f"kind {kind.name!r}: {name!r} is said to be role {role!r}; expected one of {sorted(kind.roles)}"
            )
        if _axes(layout) != _axes(kind.roles[role]):
            raise MappingError(
                f"kind {kind.name!r}: {name!r} is stored as {layout!r}, and the axes of role {role!r} are "
                f"{kind.roles[role]!r}; expected the same axes in any order"
            )


def _axes(layout: str) -> set[str]:
    return set(re.findall(r"[a-z]+|\.\.\.", layout))
