"""The pytest plugin of the conformance suite: the option `--backend NAME`, and the fixture `backend`.

Examples are the same in every run; `--hypothesis-profile clipcore-thorough` draws more, and new ones each time.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from clipcore.backend import Backend
from clipcore.errors import BackendError
from clipcore.plugins import backends, get_backend

# data of a framework is slow to make, and a layer that a framework does not have is filtered out
_HEALTH = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
_COMMON: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": _HEALTH}
settings.register_profile("clipcore", derandomize=True, max_examples=30, **_COMMON)
# only whether a check fails, not why: nothing is shrunk or explained
settings.register_profile(
    "clipcore-quick",
    derandomize=True,
    max_examples=15,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    **_COMMON,
)
settings.register_profile("clipcore-thorough", max_examples=500, print_blob=True, **_COMMON)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("clipcore", "clipcore conformance")
    group.addoption("--backend", dest="clipcore_backend", metavar="NAME", help="the backend to test")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--hypothesis-profile", default=None):
        settings.load_profile("clipcore")


def pytest_sessionstart(session: pytest.Session) -> None:
    name = session.config.getoption("clipcore_backend")
    if name is None:
        raise pytest.UsageError(f"--backend is missing: name the backend to test (installed: {', '.join(backends())})")
    try:
        get_backend(name)
    except BackendError as err:
        raise pytest.UsageError(str(err)) from err


def pytest_report_header(config: pytest.Config) -> str:
    return f"clipcore backend: {config.getoption('clipcore_backend')}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Nothing is passed over in silence: what a backend does not offer is said, with the number of checks."""
    reasons = Counter(str(report.longrepr[2]) for report in terminalreporter.getreports("skipped"))
    for reason, count in reasons.items():
        terminalreporter.write_line(f"{count} checks were skipped: {reason.removeprefix('Skipped: ')}")


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    """The backend that `--backend` names."""
    return get_backend(request.config.getoption("clipcore_backend"))
