"""Says what is missing where the suite is run without its plugin."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.pluginmanager.hasplugin("clipcore.testing.plugin"):
        return None
    if config.getoption("doctestmodules"):
        return True  # a run over the examples in docstrings: there are none here
    raise pytest.UsageError("the conformance suite needs its plugin: pytest -p clipcore.testing.plugin --backend NAME")
