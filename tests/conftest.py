"""Which backends a run is about, and how much hypothesis tries."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import pytest
from hypothesis import HealthCheck, settings

import clipcore as cc

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
# the same examples in every run: a failure is the change's, not the day's
settings.register_profile("ci", max_examples=50, derandomize=True, database=None, **_COMMON)
settings.register_profile("thorough", max_examples=1000, **_COMMON)


def pytest_addoption(parser):
    parser.addoption("--backends", help="comma-separated names (default: all that are installed)")


def pytest_configure(config):
    config.addinivalue_line("markers", "needs(backend): the test is about this backend; left out of runs without it")
    if not config.getoption("--hypothesis-profile", default=None):
        settings.load_profile("ci")
    missing = sorted(set(_names(config)) - set(cc.backends()))
    if missing:
        raise pytest.UsageError(
            f"--backends names {', '.join(missing)}, not installed here (installed: {', '.join(cc.backends())})"
        )


def _names(config):
    named = config.getoption("--backends")
    return named.split(",") if named else cc.backends()


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", _names(metafunc.config), indirect=True)


def pytest_collection_modifyitems(config, items):
    names = set(_names(config))
    needed = [{mark.args[0] for mark in item.iter_markers("needs")} for item in items]
    left_out = [item for item, needs in zip(items, needed, strict=True) if not needs <= names]
    items[:] = [item for item, needs in zip(items, needed, strict=True) if needs <= names]
    # deselected, so that pytest counts them in its summary
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def backend(request):
    """Each backend of the run in turn."""
    return cc.get_backend(request.param)
