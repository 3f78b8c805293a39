"""The same training run in PyTorch and in Keras: clipcore carries the weights over, and the policy means the same."""

import pathlib
import runpy

import numpy as np
import pytest

STEPS = 50


@pytest.fixture(scope="module")
def curves():
    # the script that draws the documentation's picture runs this training too
    script = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "bench" / "parity.py"))
    return script["curves"]("float64", STEPS)


def test_loss_curves_agree_to_1e_9_in_float64_over_50_steps(curves):
    assert len(curves.torch) == len(curves.keras) == STEPS
    np.testing.assert_allclose(curves.keras, curves.torch, rtol=1e-9, atol=0)


def test_clipping_was_active_in_most_of_those_steps(curves):
    assert len(curves.clipped) == STEPS
    assert np.mean(curves.clipped) > 0.5


def test_training_got_somewhere(curves):
    assert curves.torch[-5:].mean() < curves.torch[:5].mean() / 2
