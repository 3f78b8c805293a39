"""The hooks of a clipcore plugin. They obtain a backend; they are never called inside a step.

A plugin is a module named by an entry point of the group `clipcore`; the entry point's name is the backend's:

    [project.entry-points.clipcore]
    torch = "clipcore_torch.plugin"

The module must not import its framework: `clipcore_backend` does, when the backend is first asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from clipcore.backend import Backend

hookspec = pluggy.HookspecMarker("clipcore")
hookimpl = pluggy.HookimplMarker("clipcore")


class HookSpecs:
    """What a plugin implements, as functions of these names marked with `clipcore.hookimpl`."""

    @hookspec
    def clipcore_root_modules(self) -> Sequence[str]:  # type: ignore[empty-body]
        """Root modules of the types that the backend handles ("tensorflow", "keras"), importing none of them.

        A module that a backend is named like is that backend's, if it names it; two others that name one module are an
        error as soon as an object of it is met.
        """

    @hookspec
    def clipcore_backend(self) -> Backend:  # type: ignore[empty-body]
        """The backend itself; may import its framework. Called once."""
