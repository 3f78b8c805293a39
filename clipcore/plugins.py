"""Finding backends: by name, by object, or by CLIPCORE_BACKEND; each is imported when it is first needed."""

from __future__ import annotations

import os
from importlib import metadata
from typing import Any

import pluggy

from clipcore.backend import Backend
from clipcore.errors import BackendError
from clipcore.hookspecs import HookSpecs

GROUP = "clipcore"
ENVIRONMENT_VARIABLE = "CLIPCORE_BACKEND"

_manager = pluggy.PluginManager("clipcore")
_manager.add_hookspecs(HookSpecs)
_backends: dict[str, Backend] = {}
_names_by_root: dict[str, str] = {}


def backends() -> list[str]:
    """Names of the installed backends, sorted; none of them is imported.

    >>> "numpy" in backends()
    True
    """
    return sorted({entry.name for entry in metadata.entry_points(group=GROUP)})


def get_backend(name: str | None = None) -> Backend:
    """The backend of that name; without a name, the one that CLIPCORE_BACKEND names, else "numpy".

    Raises:
        BackendError: it is not installed, two distributions offer it, or it cannot be imported.

    >>> get_backend("numpy").name
    'numpy'
    """
    if name is None:
        name = os.environ.get(ENVIRONMENT_VARIABLE) or "numpy"
    if name not in _backends:
        _plugin(name)
        _backends[name] = _call(name, "clipcore_backend")
    return _backends[name]


def backend_of(obj: Any) -> Backend:
    """The backend that handles `obj`, a tensor, model or optimizer, by the root modules of its type and their bases.

    Raises:
        BackendError: no installed backend handles it.

    >>> import numpy as np
    >>> backend_of(np.zeros(3)).name
    'numpy'
    """
    roots = [base.__module__.partition(".")[0] for base in type(obj).__mro__]
    for root in roots:
        if root in _names_by_root:
            return get_backend(_names_by_root[root])
    broken = _index_roots(set(roots))
    for root in roots:
        if root in _names_by_root:
            return get_backend(_names_by_root[root])
    place = f"{type(obj).__module__}.{type(obj).__qualname__}"
    known = f"(installed: {', '.join(backends())})"
    raise BackendError("; ".join([f"no installed backend handles objects of type {place} {known}", *broken]))


def _index_roots(wanted: set[str]) -> list[str]:
    """Ask plugins for their root modules until one names a wanted root; what broken plugins said."""
    names, broken = backends(), []
    # a plugin named like the framework is most likely the one, and asking it alone imports no other
    for name in sorted(names, key=lambda name: name not in wanted):
        try:
            _plugin(name)
            roots = _call(name, "clipcore_root_modules")
        except BackendError as err:
            broken.append(str(err))
            continue
        _names_by_root.update(dict.fromkeys(roots, name))
        if wanted & set(roots):
            break
    return broken


def _plugin(name: str) -> object:
    """Import the plugin of that name, once."""
    if (plugin := _manager.get_plugin(name)) is not None:
        return plugin
    entries = {
        (entry.value, entry.dist.name if entry.dist else "?"): entry
        for entry in metadata.entry_points(group=GROUP, name=name)
    }
    if not entries:
        raise BackendError(
            f"backend {name!r} is not installed: pip install clipcore-{name} (installed: {', '.join(backends())})"
        )
    if len(entries) > 1:
        owners = " and ".join(sorted(f"{dist} ({value})" for value, dist in entries))
        raise BackendError(f"backend {name!r} is named twice, by {owners}: uninstall one of them")
    ((_, dist), entry), *_ = entries.items()
    try:
        plugin = entry.load()
    except Exception as err:
        raise _broken(name, dist, err) from err
    _manager.register(plugin, name)
    return plugin


def _call(name: str, hook: str) -> Any:
    """One plugin's answer to one hook."""
    others = [plugin for other, plugin in _manager.list_name_plugin() if other != name]
    try:
        answers = _manager.subset_hook_caller(hook, others)()
    except Exception as err:
        raise _broken(name, name, err) from err
    if not answers:
        raise BackendError(f"backend {name!r}: its plugin does not implement {hook}; see clipcore.hookspecs")
    return answers[0]


def _broken(name: str, dist: str, err: Exception) -> BackendError:
    return BackendError(
        f"backend {name!r} is installed (by {dist}) but cannot be imported: {type(err).__name__}: {err}; "
        f"reinstall it, or remove it with pip uninstall"
    )
