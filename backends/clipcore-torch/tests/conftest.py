"""One thread for every test, since the tensors are small, and the same examples in every run."""

import pytest
import torch
from hypothesis import HealthCheck, settings

import clipcore as cc

torch.set_num_threads(1)
settings.register_profile(
    "torch", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("torch")


@pytest.fixture(scope="session")
def backend():
    return cc.get_backend("torch")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
