"""Every difference between two models in one run, each with its cause, tested by computing with it."""

import keras
import numpy as np
import pytest
import torch
from e2e_models import assert_bitwise_equal, contents, randomised
from torch import nn

import clipcore as cc

L = keras.layers
rng = np.random.default_rng(0)
IMAGE = rng.standard_normal((2, 3, 12, 12)).astype(np.float32)
ROWS = rng.standard_normal((8, 6)).astype(np.float32)


def explained(source, target, sample):
    """The tested differences as {layer: (setting, source, target)}, and the verification; both models stay."""
    source = randomised(source, 1).eval()
    cc.migrate(source, target, sample=sample)
    before = contents(source), contents(target)
    check = cc.verify(source, target, sample=sample, explain=True)
    assert_bitwise_equal(before[0], contents(source))
    assert_bitwise_equal(before[1], contents(target))
    assert not check.ok
    return {d.layer: (d.setting, d.source, d.target) for d in check.differences if d.tested}, check


def dense(*layers):
    inputs = keras.Input((6,))
    x = inputs
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, x)


def image(*layers):
    inputs = keras.Input((12, 12, 3))
    x = inputs
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, x)


@pytest.mark.parametrize(
    ("ours", "theirs", "names"),
    [
        (nn.GELU(), "gelu_tanh", ("gelu", "gelu_tanh")),
        (nn.ReLU(), "relu6", ("relu", "relu6")),
        (nn.SiLU(), "tanh", ("silu", "tanh")),
        (nn.Identity(), "relu", (None, "relu")),
    ],
)
def test_an_activation_between_two_layers_is_named_on_both_sides(ours, theirs, names):
    function = (lambda x: keras.activations.gelu(x, approximate=True)) if theirs == "gelu_tanh" else theirs
    source = nn.Sequential(nn.Linear(6, 40), ours, nn.Linear(40, 4))
    target = dense(L.Dense(40, name="a"), L.Activation(function), L.Dense(4, name="b"))
    found, _ = explained(source, target, ROWS * 9)
    assert found == {"b": ("activation before it", *names)}


def test_every_difference_is_listed_and_not_the_first_alone():
    source = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 9), nn.LayerNorm(9), nn.ReLU(), nn.Linear(9, 4))
    target = dense(
        L.Dense(9, name="a"),
        L.Activation("silu"),
        L.Dense(9, name="b"),
        L.LayerNormalization(epsilon=0.5, name="norm"),
        L.Activation("tanh"),
        L.Dense(4, name="c"),
    )
    found, check = explained(source, target, ROWS)
    assert found == {
        "b": ("activation before it", "gelu", "silu"),
        "norm": ("eps", 1e-5, 0.5),
        "c": ("activation before it", "relu", "tanh"),
    }
    assert [step.target for step in check.steps] == ["a", "b", "norm", "c"]
    # what follows a difference agrees, since the source's values went on
    assert check.steps[1].output_error <= 1e-5 < check.steps[1].input_error


@pytest.mark.parametrize(
    ("ours", "theirs", "setting"),
    [
        (
            {"stride": 2, "padding": 1},
            {"strides": 2, "padding": "same"},
            ("padding", ((1, 1), (1, 1)), ((0, 1), (0, 1))),
        ),
        ({"dilation": 2, "padding": 2}, {"padding": "same"}, None),
    ],
)
def test_a_convolutions_settings_are_tested(ours, theirs, setting):
    source = nn.Sequential(nn.Conv2d(3, 5, 3, **ours), nn.Conv2d(5, 4, 1))
    target = image(L.Conv2D(5, 3, **theirs, name="a"), L.Conv2D(4, 1, name="b"))
    found, check = explained(source, target, IMAGE)
    if setting is None:
        settings = {d.setting for d in check.differences if d.tested and d.layer == "a"}
        assert settings == {"dilation", "padding"}
    else:
        assert found == {"a": setting}


def test_whether_padding_counts_in_an_average_is_named_at_the_pooling_layer():
    source = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AvgPool2d(3, 1, 1), nn.Conv2d(5, 4, 1))
    target = image(
        L.Conv2D(5, 3, name="a"),
        L.ReLU(),
        L.AveragePooling2D(3, 1, padding="same", name="pool"),
        L.Conv2D(4, 1, name="b"),
    )
    found, _ = explained(source, target, IMAGE)
    assert found == {"pool": ("count_include_pad", True, False)}


def test_preprocessing_inside_the_target_is_found():
    source = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1))
    target = image(L.Rescaling(0.5, offset=0.25), L.Conv2D(5, 3, name="a"), L.Conv2D(4, 1, name="b"))
    found, _ = explained(source, target, IMAGE)
    assert found == {"a": ("preprocessing", "x", "0.5 x + 0.25")}


def test_a_norm_in_training_mode_is_found():
    class Trains(L.Layer):
        def __init__(self):
            super().__init__(name="holder")
            self.norm = L.BatchNormalization(epsilon=1e-5, name="norm")

        def build(self, shape):
            self.norm.build(shape)

        def call(self, x):
            return self.norm(x, training=True)

    source = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    target = dense(L.Dense(5, name="a"), Trains(), L.Dense(4, name="b"))
    _, check = explained(source, target, ROWS)
    assert [(d.setting, d.source, d.target) for d in check.differences if d.tested] == [("training", False, True)]


def test_layers_in_another_order_are_named_by_what_the_target_takes():
    source = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4))
    target = dense(L.LayerNormalization(epsilon=1e-5, name="norm"), L.Dense(6, name="a"), L.Dense(4, name="b"))
    found, check = explained(source, target, ROWS)
    assert found["norm"] == ("place", "what 0 gives", "the sample")
    assert "let the target's layer take what 0 gives" in [d.repair for d in check.differences]


def test_what_nothing_explains_is_called_so():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.sin(3 * x) + x.flip(-1)

    source = nn.Sequential(nn.Linear(6, 9), Odd(), nn.Linear(9, 4))
    target = dense(L.Dense(9, name="a"), L.Activation("softsign"), L.Dense(4, name="b"))
    found, check = explained(source, target, ROWS)
    assert not found
    assert [(d.layer, d.setting, d.tested) for d in check.differences] == [("b", "input", False)]


def test_the_report_is_one_page_without_anything_from_elsewhere(tmp_path):
    source = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4))
    target = dense(L.Dense(9, name="<a>"), L.Activation("silu"), L.Dense(4, name="b"))
    _, check = explained(source, target, ROWS)
    check.save_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert text.startswith("<!doctype html>")
    assert "not verified" in text
    assert "activation before it" in text
    assert "<a>" not in text.replace("&lt;a&gt;", "")
    assert "http" not in text
    assert "src=" not in text
    with pytest.raises(cc.InvalidInput, match="the report cannot be written to"):
        check.save_html(tmp_path / "none" / "report.html")


def test_models_that_agree_have_steps_and_no_cause():
    source = randomised(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)), 1)
    target = dense(L.Dense(9, name="a", activation="relu"), L.Dense(4, name="b"))
    cc.migrate(source, target, sample=ROWS)
    check = cc.verify(source, target, sample=ROWS, explain=True)
    assert check.ok
    assert not check.differences
    assert all(step.input_error <= 1e-5 and step.output_error <= 1e-5 for step in check.steps)


class Root(L.Layer):
    def call(self, x):
        return keras.ops.sqrt(x)


def test_the_layer_of_the_target_where_nan_starts_is_named():
    source = randomised(nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 4)), 1)
    target = dense(L.Dense(9, name="a"), Root(), L.Dense(9, name="b"), L.Dense(4, name="c"))
    cc.migrate(source, target, sample=ROWS)
    check = cc.verify(source, target, sample=ROWS)
    assert not check.ok
    assert check.first_divergence.layer == "b"
    assert "the target has NaN from here on, in what the layer takes" in check.reason


def test_the_tested_cause_is_the_reason():
    source = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4))
    _, check = explained(source, dense(L.Dense(9, name="a"), L.Activation("silu"), L.Dense(4, name="b")), ROWS)
    assert check.reason.startswith("b (from 2): activation before it: the target has silu, the source gelu")
