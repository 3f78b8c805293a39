"""Which backends a run is about, and how much hypothesis tries."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import pytest
from hypothesis import HealthCheck, settings

import clipcore as cc

settings.register_profile(
    "clipcore", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("clipcore")


def pytest_addoption(parser):
    parser.addoption("--backends", help="comma-separated names (default: all that are installed)")


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        named = metafunc.config.getoption("--backends")
        names = named.split(",") if named else cc.backends()
        metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture(scope="session")
def backend(request):
    """Each backend of the run in turn; one that is named but not installed is an error."""
    return cc.get_backend(request.param)
