"""One thread for every test: the tensors here are small, and the machine is shared."""

import pytest
import torch

import clipcore as cc

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def backend():
    return cc.get_backend("torch")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
