"""What the suite's modules share, and a word to those who run it without its plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def models(backend: Any) -> Any:
    """The backend, where it has models."""
    if not hasattr(backend, "layers"):
        pytest.skip(f"not offered: backend {backend.name!r} has no models; it ends with clipping, the first tier")
    return backend


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.pluginmanager.hasplugin("clipcore.testing.plugin"):
        return None
    if config.getoption("doctestmodules"):
        return True  # a run over the examples in docstrings: there are none here
    raise pytest.UsageError("the conformance suite needs its plugin: pytest -p clipcore.testing.plugin --backend NAME")
