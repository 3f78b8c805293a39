"""What each layer kind computes, against examples worked out by hand and against slower definitions."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipcore.mapping.kinds import KINDS
from clipcore.mapping.reference import ACTIVATIONS, FORWARD, activate, paddings
from clipcore.testing.strategies import layer_configurations

CONV = {"stride": (1,), "padding": ((0, 0),), "padding_mode": "zeros", "dilation": (1,), "groups": 1}


def row(*values):
    return np.array([[values]], float)


def conv(x, kernel, **changes):
    return FORWARD["conv"](x, {"kernel": np.asarray(kernel, float)}, {**CONV, **changes})


def test_there_is_a_forward_for_every_kind():
    assert set(FORWARD) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_every_layer_that_the_strategies_draw_has_a_forward(kind, data):
    configuration = data.draw(layer_configurations(kind))
    assert {*KINDS[kind].settings, *KINDS[kind].training_settings} == set(configuration.settings)
    assert set(configuration.shapes) <= set(KINDS[kind].roles)
    y = FORWARD[kind](configuration.data(), configuration.weights(), configuration.settings)
    assert y.dtype == np.float64
    assert np.isfinite(y).all()
    assert y.shape[0] == configuration.input_shape[0]


def test_linear_by_hand():
    kernel, bias = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), np.array([0.5, 0.0, -0.5])
    y = FORWARD["linear"](np.array([10.0, 1.0]), {"kernel": kernel, "bias": bias}, {"activation": None})
    assert y.tolist() == [12.5, 34.0, 55.5]


def test_convolution_is_not_flipped():
    assert conv(row(1, 2, 3), [[[[1, 10]]]]).tolist() == [[[21.0, 32.0]]]


def test_stride_dilation_and_padding_by_hand():
    kernel = [[[[1, 10]]]]
    assert conv(row(1, 2, 3, 4, 5), kernel, stride=(2,)).tolist() == [[[21.0, 43.0]]]
    assert conv(row(1, 2, 3, 4, 5), kernel, dilation=(3,)).tolist() == [[[41.0, 52.0]]]
    assert conv(row(1, 2), kernel, padding=((2, 1),)).tolist() == [[[0.0, 10.0, 21.0, 2.0]]]


def test_groups_see_their_own_channels_alone():
    x = np.array([[[1.0], [2.0], [3.0], [4.0]]])
    kernel = np.array([[[[1.0], [10.0]]], [[[100.0], [1000.0]]]])  # group out in window
    assert conv(x, kernel, groups=2).tolist() == [[[21.0], [4300.0]]]


def test_same_padding_puts_the_odd_one_after():
    # TensorFlow's rule: stride 2 over 4 needs one more, over 5 two
    assert paddings("same", [4], [3], [2], [1]) == [(0, 1)]
    assert paddings("same", [5], [3], [2], [1]) == [(1, 1)]
    assert paddings("same", [4], [1], [2], [1]) == [(0, 0)]
    assert conv(row(1, 2, 3, 4), [[[[1, 1, 1]]]], stride=(2,), padding="same").tolist() == [[[6.0, 7.0]]]


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("zeros", [0, 1, 2, 3, 0]),
        ("reflect", [2, 1, 2, 3, 2]),
        ("replicate", [1, 1, 2, 3, 3]),
        ("circular", [3, 1, 2, 3, 1]),
    ],
)
def test_padding_modes_by_hand(mode, wanted):
    assert conv(row(1, 2, 3), [[[[1]]]], padding=((1, 1),), padding_mode=mode).tolist() == [[wanted]]


@given(layer_configurations("conv"))
def test_convolution_is_the_sum_that_defines_it(configuration):
    """Element by element, on data padded by hand."""
    x, weights, settings = configuration.data(), configuration.weights(), {**configuration.settings, "activation": None}
    y = FORWARD["conv"](x, weights, settings)
    kernel = weights["kernel"].astype(float)
    _, outs, ins, *window = kernel.shape
    stride, dilation = settings["stride"], settings["dilation"]
    pads = paddings(settings["padding"], x.shape[2:], window, stride, dilation)
    rng = np.random.default_rng(0)
    for _ in range(5):
        place = tuple(int(rng.integers(size)) for size in y.shape)
        batch, channel, *spatial = place
        group, out = divmod(channel, outs)
        total = float(weights["bias"][channel]) if "bias" in weights else 0.0
        for i, *tap in itertools.product(range(ins), *map(range, window)):
            at = [
                q * s + k * d - before
                for q, s, k, d, (before, _) in zip(spatial, stride, tap, dilation, pads, strict=True)
            ]
            if all(0 <= a < size for a, size in zip(at, x.shape[2:], strict=True)):
                total += float(x[(batch, group * ins + i, *at)]) * float(kernel[(group, out, i, *tap)])
        assert y[place] == pytest.approx(total, rel=1e-12, abs=1e-12)


def test_batch_norm_by_hand():
    tensors = {"scale": [2.0, 1.0], "bias": [1.0, 0.0], "running_mean": [3.0, 0.0], "running_var": [15.0, 3.0]}
    x = np.array([[[7.0], [4.0]]])
    y = FORWARD["batch_norm"](x, {role: np.array(v) for role, v in tensors.items()}, {"eps": 1.0})
    assert y.tolist() == [[[3.0], [2.0]]]


def test_layer_norm_divides_by_the_biased_deviation():
    x = np.array([[0.0, 4.0]])  # mean 2, variance 4
    y = FORWARD["layer_norm"](x, {"scale": np.array([3.0, 3.0]), "bias": np.array([1.0, 2.0])}, {"eps": 0.0})
    assert y.tolist() == [[-2.0, 5.0]]


def test_layer_norm_covers_the_axes_of_its_scale():
    x = np.array([[[0.0, 4.0], [4.0, 0.0]], [[8.0, 12.0], [12.0, 8.0]]])
    y = FORWARD["layer_norm"](x, {"scale": np.ones((2, 2))}, {"eps": 0.0})
    assert y.tolist() == [[[-1, 1], [1, -1]], [[-1, 1], [1, -1]]]


def test_embedding_takes_rows():
    kernel = np.arange(6.0).reshape(3, 2)
    assert FORWARD["embedding"](np.array([[2, 0]]), {"kernel": kernel}, {}).tolist() == [[[4.0, 5.0], [0.0, 1.0]]]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("relu", {-1: 0, 2: 2}),
        ("relu6", {-1: 0, 2: 2, 7: 6}),
        ("elu", {-1: math.exp(-1) - 1, 2: 2}),
        ("selu", {1: 1.0507009873554805, -1: 1.0507009873554805 * 1.6732632423543772 * (math.exp(-1) - 1)}),
        ("gelu", {0: 0, 1: 0.8413447460685429, -1: -0.15865525393145707}),  # x times the normal distribution
        ("silu", {0: 0, 1: 1 / (1 + math.exp(-1))}),
        ("mish", {0: 0, 1: math.tanh(math.log(1 + math.e))}),
        ("sigmoid", {0: 0.5, -800: 0, 800: 1}),
        ("hard_sigmoid", {-3: 0, 0: 0.5, 3: 1, 1: 4 / 6}),
        ("tanh", {0: 0, 1: math.tanh(1)}),
        ("softplus", {0: math.log(2), 800: 800}),
        ("softsign", {-3: -0.75, 1: 0.5}),
        ("exponential", {0: 1, 1: math.e}),
    ],
)
def test_activations_by_hand(name, values):
    y = activate(np.array(list(values), float), name, axis=-1)
    np.testing.assert_allclose(y, list(values.values()), rtol=1e-14, atol=1e-300)


def test_softmax_runs_along_its_axis_and_does_not_overflow():
    x = np.array([[0.0, math.log(3)], [1000.0, 1000.0]])
    np.testing.assert_allclose(activate(x, "softmax", axis=-1), [[0.25, 0.75], [0.5, 0.5]], rtol=1e-14)
    np.testing.assert_allclose(activate(x, "softmax", axis=0), [[0, 0], [1, 1]], atol=1e-300)
    np.testing.assert_allclose(activate(x, "log_softmax", axis=-1)[1], [-math.log(2)] * 2, rtol=1e-14)


def test_every_activation_has_an_example():
    assert len(ACTIVATIONS) == 15
