"""The settings in which matched layers differ, listed without moving anything."""

import keras
import numpy as np
import pytest
from e2e_models import assert_bitwise_equal, contents, randomised
from torch import nn

import clipcore as cc

L = keras.layers


def settings(differences):
    return {(d.layer, d.setting): (d.source, d.target) for d in differences}


def torch_network():
    convolution = nn.Conv2d(3, 4, 3, padding=1, stride=2)
    pooled = [nn.LeakyReLU(0.2), nn.AvgPool2d(2, padding=1), nn.GELU(), nn.Dropout(0.1)]
    return nn.Sequential(convolution, nn.BatchNorm2d(4), *pooled, nn.Flatten(), nn.Linear(36, 5)).eval()


def keras_network():
    convolution = L.Conv2D(4, 3, padding="same", strides=2, name="conv")
    pooled = [
        L.LeakyReLU(name="leaky"),
        L.AveragePooling2D(2, padding="same", name="pool"),
        L.Activation("gelu"),
        L.Dropout(0.2, name="drop"),
    ]
    norm = L.BatchNormalization(name="norm")
    return keras.Sequential([L.Input((8, 8, 3)), convolution, norm, *pooled, L.Flatten(), L.Dense(5)])


def test_every_kind_of_setting_is_listed_and_neither_model_is_changed():
    source, target = randomised(torch_network(), 1), randomised(keras_network(), 2)
    before = contents(source), contents(target)
    found = settings(cc.diff(source, target))
    assert found[("norm", "eps")] == (1e-5, 1e-3)
    assert found[("norm", "momentum")] == (0.1, 0.01)
    assert found[("leaky", "slope")] == (pytest.approx(0.2), pytest.approx(0.3))
    assert found[("pool", "count_include_pad")] == (True, False)
    assert found[("pool", "padding")] == (((1, 1), (1, 1)), "same")
    assert found[("drop", "rate")] == (0.1, 0.2)
    assert found[("conv", "padding")] == (((1, 1), (1, 1)), "same")
    assert_bitwise_equal(before[0], contents(source))
    assert_bitwise_equal(before[1], contents(target))


def test_models_that_do_not_differ_have_no_difference():
    assert cc.diff(torch_network(), torch_network()) == ()
    assert cc.diff(keras_network(), keras_network()) == ()


def test_whether_padding_counts_is_no_difference_where_nothing_is_padded():
    source = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(2)).eval()
    target = keras.Sequential([L.Input((8, 8, 3)), L.Conv2D(4, 3), L.AveragePooling2D(2)])
    assert cc.diff(source, target) == ()


def test_settings_of_recurrent_layers_and_of_attention_are_listed():
    target = keras.Sequential([L.Input((5, 3)), L.GRU(4, reset_after=False, activation="relu", name="gru")])
    found = settings(cc.diff(nn.GRU(3, 4), target))
    assert found == {("gru", "activation"): ("tanh", "relu"), ("gru", "reset_after"): (True, False)}
    inputs = keras.Input((5, 8))
    target = keras.Model(inputs, L.MultiHeadAttention(2, 4, name="mha")(inputs, inputs))
    found = settings(cc.diff(nn.MultiheadAttention(8, 4), target))
    assert found[("mha/query", "heads")] == (4, 2)


def test_with_a_sample_or_a_plan_the_differences_of_the_plan_are_those_that_are_listed():
    source = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), 1)
    target = keras.Sequential([L.Input((6, 6, 3)), L.Conv2D(4, 3), L.BatchNormalization(name="norm")])
    x = np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype("float32")
    plan = cc.plan(source, target, sample=x)
    for found in (cc.diff(source, target, plan), cc.diff(source, target, sample=x)):
        (eps,) = [difference for difference in found if difference.setting == "eps"]
        assert eps.repaired


def test_a_layer_of_one_side_alone_is_listed_as_such():
    source = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    target = keras.Sequential([L.Input((3,)), L.Dense(4, name="first"), L.Dense(7, name="other")])
    found = settings(cc.diff(source, target))
    assert found[("other", "layer")][0] == "absent"
    assert found[("1", "layer")][1] == "absent"


def test_layers_that_only_a_run_tells_apart_are_refused_with_the_remedy():
    source = nn.Sequential(*[nn.Linear(3, 3) for _ in range(3)])
    target = keras.Sequential([L.Input((3,)), L.Dense(3, name="x"), L.Dense(3, name="y")])
    with pytest.raises(cc.MappingError, match="give sample= or a plan"):
        cc.diff(source, target)
