"""Finding backends: by name, by object, or by CLIPCORE_BACKEND; each is imported when it is first needed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from clipcore.backend import Backend
from clipcore.errors import BackendError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    import pluggy

GROUP = "clipcore"
ENVIRONMENT_VARIABLE = "CLIPCORE_BACKEND"

_backends: dict[str, Backend] = {}
_owners: dict[str, str | None] = {}  # by root module
_broken: list[str] = []  # what broken plugins said when they were asked for their root modules
_lock = threading.RLock()  # two threads may be the first to ask for a backend


@cache
def _manager() -> pluggy.PluginManager:
    # imported here, with importlib.metadata, since the two take half of the time of `import clipcore`
    import pluggy

    from clipcore.hookspecs import HookSpecs

    manager = pluggy.PluginManager("clipcore")
    manager.add_hookspecs(HookSpecs)
    return manager


def _entry_points() -> list[EntryPoint]:
    from importlib import metadata

    return list(metadata.entry_points(group=GROUP))


def backends() -> list[str]:
    """Names of the installed backends, sorted; none of them is imported.

    >>> "numpy" in backends()
    True
    """
    return sorted({entry.name for entry in _entry_points()})


def get_backend(name: str | None = None) -> Backend:
    """The backend of that name; without a name, the one that CLIPCORE_BACKEND names, else "numpy".

    Raises:
        BackendError: it is not installed, two distributions offer it, or it cannot be imported.

    >>> get_backend("numpy").name
    'numpy'
    """
    if name is None:
        name = os.environ.get(ENVIRONMENT_VARIABLE) or "numpy"
    return _backends[_load(name)]


def backend_of(obj: Any) -> Backend:
    """The backend that handles `obj`, a tensor, model or optimizer, by the root modules of its type and their bases.

    Raises:
        BackendError: no installed backend handles it, or two claim it.

    >>> import numpy as np
    >>> backend_of(np.zeros(3)).name
    'numpy'
    """
    return _backends[_load_for(type(obj))]


def _load(name: str) -> str:
    """Make sure that the backend of that name is in `_backends`; the name again."""
    if name not in _backends:
        with _lock:
            _plugin(name)
            backend = _call(name, "clipcore_backend")
            if not isinstance(backend, Backend):
                raise BackendError(f"backend {name!r}: clipcore_backend returned {backend!r:.60}; expected a Backend")
            if backend.name != name:
                raise BackendError(
                    f"backend {name!r}: clipcore_backend returned one whose name is {backend.name!r}; expected "
                    f"{name!r}, the name of its entry point"
                )
            _backends[name] = backend
    return name


# AutoGraph, which goes through what a tf.function calls, leaves it as it is: it would warn of code in pluggy
_load.autograph_info__ = {}  # type: ignore[attr-defined]


def _load_for(cls: type) -> str:
    """Make sure that the backend that handles instances of `cls` is in `_backends`; its name."""
    for base in cls.__mro__:
        owner = _owner(base.__module__.partition(".")[0])
        if owner is not None:
            return _load(owner)
    place = f"{cls.__module__}.{cls.__qualname__}"
    known = f"(installed: {', '.join(backends())})"
    said = "; ".join([f"no installed backend handles objects of type {place} {known}", *_broken])
    with _lock:  # what is installed meanwhile is found the next time
        _owners.clear()
        _broken.clear()
        _claims.cache_clear()
    raise BackendError(said)


# What torch.compiler.assume_constant_result sets: torch.compile calls these as it traces, and does not trace them, so
# that a backend may be first asked for inside a compiled function. They return names because it takes no objects.
for _function in (_load, _load_for):
    vars(_function)["_dynamo_marked_constant"] = True


def _owner(root: str) -> str | None:
    """The backend that handles a root module, whatever was asked before."""
    if root not in _owners:
        with _lock:
            _owners[root] = _find_owner(root)
    return _owners[root]


def _find_owner(root: str) -> str | None:
    """The backend that is named like the module, if it claims it; else the only one that does."""
    names = backends()
    # asked alone, which imports no other plugin, and no other takes a framework from the backend of its name
    if root in names and root in _claims(root):
        return root
    claimants = [name for name in names if root in _claims(name)]
    if len(claimants) > 1:
        raise BackendError(
            f"objects of module {root!r} are claimed by the backends {' and '.join(map(repr, claimants))}: uninstall "
            f"all but one of them, or name one with backend="
        )
    return claimants[0] if claimants else None


@cache
def _claims(name: str) -> tuple[str, ...]:
    """The root modules that a backend claims, none where its plugin is broken."""
    try:
        _plugin(name)
        roots = _call(name, "clipcore_root_modules")
        if not isinstance(roots, list | tuple) or not all(isinstance(root, str) for root in roots):
            raise BackendError(f"backend {name!r}: clipcore_root_modules returned {roots!r:.60}; expected names")
    except BackendError as err:
        _broken.append(str(err))
        return ()
    return tuple(roots)


def _plugin(name: str) -> object:
    """Import the plugin of that name, once."""
    plugin = _manager().get_plugin(name)
    if plugin is not None:
        return plugin
    entries = {
        (entry.value, entry.dist.name if entry.dist else "?"): entry for entry in _entry_points() if entry.name == name
    }
    if not entries:
        raise BackendError(
            f"backend {name!r} is not installed: pip install clipcore-{name} (installed: {', '.join(backends())})"
        )
    if len(entries) > 1:
        owners = " and ".join(sorted(f"{dist} ({value})" for value, dist in entries))
        raise BackendError(f"backend {name!r} is named twice, by {owners}: uninstall one of them")
    ((_, dist), entry), *_ = entries.items()
    with _as_broken(name, dist):
        plugin = entry.load()
        _manager().register(plugin, name)
    return plugin


def _call(name: str, hook: str) -> Any:
    """One plugin's answer to one hook."""
    others = [plugin for other, plugin in _manager().list_name_plugin() if other != name]
    with _as_broken(name, f"its hook {hook}"):
        answers = _manager().subset_hook_caller(hook, others)()
    if not answers:
        raise BackendError(f"backend {name!r}: its plugin does not implement {hook}; see clipcore.hookspecs")
    return answers[0]


@contextmanager
def _as_broken(name: str, by: str) -> Iterator[None]:
    """Whatever a plugin raises, SystemExit included, is that plugin's fault alone."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as err:
        raise BackendError(
            f"backend {name!r} is installed (by {by}) but cannot be imported: {type(err).__name__}: "
            f"{' '.join(str(err).split())}; reinstall it, or remove it with pip uninstall"
        ) from err
