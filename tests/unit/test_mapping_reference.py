"""What each layer kind computes, against examples worked out by hand and against slower definitions."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipcore.mapping.kinds import KINDS
from clipcore.mapping.reference import ACTIVATIONS, FORWARD, activate, kernel_of, paddings
from clipcore.testing.layers import layer_configurations

CONV = {"stride": (1,), "padding": ((0, 0),), "padding_mode": "zeros", "dilation": (1,), "groups": 1}


def row(*values):
    return np.array([[values]], float)


def conv(x, kernel, **changes):
    return FORWARD["conv"](x, {"kernel": np.asarray(kernel, float)}, {**CONV, **changes})


def test_there_is_a_forward_for_every_kind():
    assert set(FORWARD) == {*KINDS, "attention"}


MADE = {"kernel.direction", "kernel.magnitude", "kernel.original", "kernel.u", "kernel.v"}


@pytest.mark.parametrize("kind", FORWARD)
@given(st.data())
def test_every_layer_that_the_strategies_draw_has_a_forward(kind, data):
    configuration = data.draw(layer_configurations(kind))
    x = configuration.data()
    y = FORWARD[kind](x, configuration.weights(), configuration.settings)
    assert y.dtype == np.float64
    assert np.isfinite(y).all()
    assert y.size
    assert y.shape[0] == configuration.input_shape[0]


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_layers_are_drawn_with_the_roles_and_settings_of_their_kind(kind, data):
    configuration = data.draw(layer_configurations(kind))
    names = {*KINDS[kind].settings, *KINDS[kind].training_settings} - {"heads"}
    given_ = set(configuration.settings) - {"spectral_axis"}
    if kind == "activation":
        assert given_ - {"function"} <= set(ACTIVATIONS[configuration.settings["function"]].numbers) <= names
    else:
        assert given_ == names
    assert set(configuration.shapes) - MADE <= set(KINDS[kind].roles)


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
    kernel = kernel_of(weights, settings)
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


def test_weight_norm_by_hand():
    direction, magnitude = np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([[10.0], [-1.0]])
    kernel = kernel_of({"kernel.direction": direction, "kernel.magnitude": magnitude}, {})
    assert kernel.tolist() == [[6.0, 8.0], [0.0, -1.0]]
    along_columns = kernel_of({"kernel.direction": direction, "kernel.magnitude": np.array([[6.0, 1.0]])}, {})
    np.testing.assert_allclose(along_columns, [[6.0, 4 / math.sqrt(20)], [0.0, 2 / math.sqrt(20)]], rtol=1e-15)


def test_spectral_norm_divides_by_the_largest_singular_value():
    rng = np.random.default_rng(0)
    original = rng.standard_normal((2, 3, 2, 2))  # group out in window: the matrix has 6 rows of 4
    left, values, right = np.linalg.svd(original.reshape(6, 4))
    tensors = {"kernel.original": original, "kernel.u": left[:, 0], "kernel.v": right[0]}
    kernel = kernel_of(tensors, {"spectral_axis": 0})
    np.testing.assert_allclose(kernel, original / values[0], rtol=1e-13)


def transposed(x, kernel, **changes):
    settings = {"stride": (1,), "crop": ((0, 0),), "dilation": (1,), "groups": 1, **changes}
    return FORWARD["conv_transpose"](x, {"kernel": np.asarray(kernel, float)}, settings)


def test_transposed_convolution_by_hand():
    kernel = [[[[1, 10]]]]  # it is not flipped: what comes in is spread as the kernel stands
    assert transposed(row(1, 2), kernel).tolist() == [[[1.0, 12.0, 20.0]]]
    assert transposed(row(1, 2), kernel, stride=(3,)).tolist() == [[[1.0, 10.0, 0.0, 2.0, 20.0]]]
    assert transposed(row(1, 2), kernel, dilation=(2,)).tolist() == [[[1.0, 2.0, 10.0, 20.0]]]
    assert transposed(row(1, 2), kernel, crop=((1, -2),)).tolist() == [[[12.0, 20.0, 0.0, 0.0]]]


def test_transposed_groups_see_their_own_channels_alone():
    x = np.array([[[1.0], [2.0], [3.0], [4.0]]])
    kernel = np.array([[[[1.0]], [[10.0]]], [[[100.0]], [[1000.0]]]])  # group in out window
    assert transposed(x, kernel, groups=2).tolist() == [[[21.0], [4300.0]]]


@given(layer_configurations("conv_transpose"))
def test_transposed_convolution_is_the_transpose_of_convolution(configuration):
    """<conv(a), x> = <a, conv_transpose(x)>, where the convolution pads what the other crops."""
    settings = {**configuration.settings, "activation": None}
    x, kernel = configuration.data(), kernel_of(configuration.weights(), settings)
    whole = FORWARD["conv_transpose"](x, {"kernel": kernel}, {**settings, "crop": ((0, 0),) * (x.ndim - 2)})
    a = np.random.default_rng(0).standard_normal(whole.shape)
    padded = {**settings, "padding": ((0, 0),) * (x.ndim - 2), "padding_mode": "zeros"}
    # out of the one is in of the other
    through = FORWARD["conv"](a, {"kernel": kernel}, padded)
    assert np.vdot(through, x) == pytest.approx(np.vdot(a, whole), rel=1e-9, abs=1e-9)


@given(layer_configurations("conv_transpose"))
def test_transposed_convolution_is_the_sum_that_defines_it(configuration):
    """Element by element: what each input place adds to one output place."""
    weights, settings = configuration.weights(), {**configuration.settings, "activation": None}
    x, y = configuration.data(), FORWARD["conv_transpose"](configuration.data(), weights, settings)
    kernel = kernel_of(weights, settings)
    _, ins, outs, *window = kernel.shape
    rng = np.random.default_rng(0)
    for _ in range(3):
        place = tuple(int(rng.integers(size)) for size in y.shape)
        batch, channel, *spatial = place
        group, out = divmod(channel, outs)
        total = float(weights["bias"][channel]) if "bias" in weights else 0.0
        for i, *tap in itertools.product(range(ins), *map(range, window)):
            # q stride + k dilation - before = the place
            ahead = [
                at + before - k * d
                for at, k, d, (before, _) in zip(spatial, tap, settings["dilation"], settings["crop"], strict=True)
            ]
            q = [a // s for a, s in zip(ahead, settings["stride"], strict=True)]
            exact = all(a % s == 0 for a, s in zip(ahead, settings["stride"], strict=True))
            if exact and all(0 <= at < size for at, size in zip(q, x.shape[2:], strict=True)):
                total += float(x[(batch, group * ins + i, *q)]) * float(kernel[(group, i, out, *tap)])
        assert y[place] == pytest.approx(total, rel=1e-9, abs=1e-9)


def test_group_norm_by_hand():
    x = np.array([[[0.0, 2.0], [4.0, 6.0], [5.0, 5.0], [5.0, 5.0]]])  # groups: mean 3, variance 5; mean 5, variance 0
    tensors = {"scale": np.array([1.0, 2.0, 1.0, 1.0]), "bias": np.array([0.0, 0.0, 0.0, 7.0])}
    y = FORWARD["group_norm"](x, tensors, {"groups": 2, "eps": 4.0})
    assert y.tolist() == [[[-1.0, -1 / 3], [2 / 3, 2.0], [0.0, 0.0], [7.0, 7.0]]]


@given(layer_configurations("group_norm"))
def test_group_norm_is_layer_norm_of_each_group(configuration):
    x, weights, settings = configuration.data(), configuration.weights(), configuration.settings
    y = FORWARD["group_norm"](x, weights, settings)
    size = x.shape[1] // settings["groups"]
    for n, group in itertools.product(range(len(x)), range(settings["groups"])):
        channels = slice(group * size, (group + 1) * size)
        normalised = FORWARD["layer_norm"](x[n, channels].ravel(), {}, settings).reshape(x[n, channels].shape)
        shape = (-1, *[1] * (x.ndim - 2))
        scale, bias = (
            weights.get(role, np.full(x.shape[1], neutral))[channels].reshape(shape)
            for role, neutral in (("scale", 1), ("bias", 0))
        )
        np.testing.assert_allclose(y[n, channels], normalised * scale + bias, rtol=1e-9, atol=1e-9)


def test_rms_norm_by_hand():
    y = FORWARD["rms_norm"](np.array([[1.0, 7.0], [0.0, 0.0]]), {"scale": np.array([2.0, 1.0])}, {"eps": 24.0})
    np.testing.assert_allclose(y, [[2 / 7, 1.0], [0.0, 0.0]], rtol=1e-15)


def test_rms_norm_is_layer_norm_of_what_has_no_mean():
    x = np.random.default_rng(0).standard_normal((2, 3, 4))
    x -= x.mean(-1, keepdims=True)
    scale = {"scale": np.arange(1.0, 5.0)}
    wanted = FORWARD["layer_norm"](x, scale, {"eps": 0.5})
    np.testing.assert_allclose(FORWARD["rms_norm"](x, scale, {"eps": 0.5}), wanted, rtol=1e-13)


def numbers(array):
    """One per element, so that the slower definitions are of single numbers alone."""
    return [float(value) for value in np.ravel(array)]


def gate(name, tensors, x, h):
    """(of the input, of the state) for each unit of a gate, sum by sum."""
    kernel, recurrent = tensors[f"kernel{name}"], tensors[f"recurrent_kernel{name}"]
    bias, recurrent_bias = (
        numbers(tensors[f"{role}{name}"]) if f"{role}{name}" in tensors else [0.0] * len(kernel)
        for role in ("bias", "recurrent_bias")
    )
    given_ = [sum(w * v for w, v in zip(numbers(row), x, strict=True)) + b for row, b in zip(kernel, bias, strict=True)]
    kept = [
        sum(w * v for w, v in zip(numbers(row), h, strict=True)) + b
        for row, b in zip(recurrent, recurrent_bias, strict=True)
    ]
    return given_, kept


def function(name):
    return lambda value: float(activate(np.array(value), name, axis=-1))


def rnn_step(tensors, settings, x, h):
    act = function(settings["activation"])
    return [act(a + b) for a, b in zip(*gate("", tensors, x, h), strict=True)]


def lstm_step(tensors, settings, x, h, c):
    act, gate_act = function(settings["activation"]), function(settings["recurrent_activation"])
    i, f, g, o = (
        [a + b for a, b in zip(*gate(name, tensors, x, h), strict=True)]
        for name in (".input", ".forget", ".cell", ".output")
    )
    c = [gate_act(f[n]) * c[n] + gate_act(i[n]) * act(g[n]) for n in range(len(c))]
    return [gate_act(o[n]) * act(c[n]) for n in range(len(c))], c


def gru_step(tensors, settings, x, h):
    act, gate_act = function(settings["activation"]), function(settings["recurrent_activation"])
    r, u = (
        [gate_act(a + b) for a, b in zip(*gate(name, tensors, x, h), strict=True)] for name in (".reset", ".update")
    )
    if settings["reset_after"]:
        given_, kept = gate(".new", tensors, x, h)
        kept = [a * b for a, b in zip(r, kept, strict=True)]
    else:
        given_, kept = gate(".new", tensors, x, [a * b for a, b in zip(r, h, strict=True)])
    new = [act(a + b) for a, b in zip(given_, kept, strict=True)]
    return [(1 - u[n]) * new[n] + u[n] * h[n] for n in range(len(h))]


@pytest.mark.parametrize(
    ("kind", "step", "states"), [("rnn", rnn_step, 1), ("lstm", lstm_step, 2), ("gru", gru_step, 1)]
)
@given(st.data())
def test_recurrent_layers_are_their_steps_number_by_number(kind, step, states, data):
    configuration = data.draw(layer_configurations(kind))
    x, tensors, settings = configuration.data(), configuration.weights(), configuration.settings
    y = FORWARD[kind](x, tensors, settings)
    for n, sequence in enumerate(x):
        held = [[0.0] * y.shape[-1]] * states
        for time, values in enumerate(sequence[::-1] if settings["reverse"] else sequence):
            after = step(tensors, settings, numbers(values), *held)
            held = [after] if states == 1 else list(after)
            np.testing.assert_allclose(y[n, time], held[0], rtol=1e-9, atol=1e-12)


def test_a_reversed_layer_begins_with_the_last_step():
    tensors = {"kernel": np.array([[1.0]]), "recurrent_kernel": np.array([[10.0]])}
    y = FORWARD["rnn"](np.array([[[1.0], [2.0]]]), tensors, {"activation": None, "reverse": True})
    assert y.tolist() == [[[2.0], [21.0]]]


def test_prelu_by_hand():
    x = np.array([[[-2.0, 3.0], [-2.0, 3.0]]])
    assert FORWARD["prelu"](x, {"slope": np.array([0.5, 2.0])}, {}).tolist() == [[[-1.0, 3.0], [-4.0, 3.0]]]
    assert FORWARD["prelu"](x, {"slope": np.array([0.5])}, {}).tolist() == [[[-1.0, 3.0], [-1.0, 3.0]]]


POOL = {"window": (2,), "stride": (2,), "padding": ((0, 0),), "ceil": False}


@pytest.mark.parametrize(
    ("changes", "most", "mean", "mean_with_pads"),
    [
        ({}, [4, 6], [3, 5.5], [3, 5.5]),
        ({"ceil": True}, [4, 6, 8], [3, 5.5, 8], [3, 5.5, 8]),
        ({"padding": ((1, 0),)}, [2, 5, 8], [2, 4.5, 7], [1, 4.5, 7]),
        ({"padding": ((1, 1),), "ceil": True}, [2, 5, 8], [2, 4.5, 7], [1, 4.5, 7]),
        ({"padding": ((0, 1),)}, [4, 6, 8], [3, 5.5, 8], [3, 5.5, 4]),
        ({"padding": "same"}, [4, 6, 8], [3, 5.5, 8], [3, 5.5, 4]),
        ({"stride": (3,)}, [4, 8], [3, 7], [3, 7]),
    ],
)
def test_pooling_by_hand(changes, most, mean, mean_with_pads):
    x, settings = row(2, 4, 5, 6, 8), {**POOL, **changes}
    assert FORWARD["max_pool"](x, {}, {**settings, "dilation": (1,)}).tolist() == [[most]]
    assert FORWARD["avg_pool"](x, {}, {**settings, "count_include_pad": False}).tolist() == [[mean]]
    assert FORWARD["avg_pool"](x, {}, {**settings, "count_include_pad": True}).tolist() == [[mean_with_pads]]


def test_a_dilated_maximum_skips_what_is_between():
    y = FORWARD["max_pool"](row(1, 9, 2, 8), {}, {**POOL, "stride": (1,), "dilation": (2,)})
    assert y.tolist() == [[[2.0, 9.0]]]


@pytest.mark.parametrize("kind", ["avg_pool", "max_pool"])
@given(st.data())
def test_pooling_is_over_the_places_of_each_window(kind, data):
    """Place by place, with a list of what each window sees."""
    configuration = data.draw(layer_configurations(kind))
    x, settings = configuration.data(), configuration.settings
    y = FORWARD[kind](x, {}, settings)
    window, stride = settings["window"], settings["stride"]
    dilation = settings.get("dilation", (1,) * len(window))
    pads = paddings(settings["padding"], x.shape[2:], window, stride, dilation)
    for place in itertools.islice(np.ndindex(*y.shape), 40):
        batch, channel, *spatial = place
        seen = []
        for tap in itertools.product(*map(range, window)):
            at = [
                q * s + k * d - before
                for q, s, k, d, (before, _) in zip(spatial, stride, tap, dilation, pads, strict=True)
            ]
            if all(0 <= a < size for a, size in zip(at, x.shape[2:], strict=True)):
                seen.append(float(x[(batch, channel, *at)]))
            elif settings.get("count_include_pad") and all(
                a < size + after for a, size, (_, after) in zip(at, x.shape[2:], pads, strict=True)
            ):
                seen.append(0.0)
        assert y[place] == pytest.approx(max(seen) if kind == "max_pool" else sum(seen) / len(seen), rel=1e-12)


@given(layer_configurations("max_pool"))
def test_a_last_window_may_end_outside_where_places_are_left(configuration):
    x, settings = configuration.data(), configuration.settings
    y = FORWARD["max_pool"](x, {}, settings)
    rules = zip(x.shape[2:], y.shape[2:], *(settings[name] for name in ("window", "stride", "dilation")), strict=True)
    pads = paddings(settings["padding"], x.shape[2:], settings["window"], settings["stride"], settings["dilation"])
    for (size, count, k, s, d), (before, after) in zip(rules, pads, strict=True):
        starts = range(0, size + before + after - (k - 1) * d, s)
        left_over = starts[-1] + (k - 1) * d + 1 < size + before + after
        begins_inside = starts[-1] + s < size + before
        assert count == len(starts) + (settings["ceil"] and left_over and begins_inside)


def test_dropout_does_nothing_in_inference():
    assert FORWARD["dropout"](np.array([1.0, 2.0]), {}, {"rate": 0.5}).tolist() == [1.0, 2.0]


def test_attention_by_hand():
    """Two heads of two numbers: the first sees the first key, the second both alike."""
    eye = np.eye(4)
    tensors = {f"{part}.kernel": eye for part in ("query", "key", "value", "output")}
    query = np.array([[[1000.0, 0.0, 0.0, 0.0]]])
    key = np.array([[[1.0, 0.0, 5.0, 5.0], [0.0, 0.0, 6.0, 6.0]]])
    value = np.array([[[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]]])
    y = FORWARD["attention"]((query, key, value), tensors, {"heads": 2})
    np.testing.assert_allclose(y, [[[1.0, 2.0, 16.5, 22.0]]], rtol=1e-14)


@given(layer_configurations("attention"))
def test_attention_is_its_heads_one_by_one(configuration):
    x, tensors, heads = configuration.data(), configuration.weights(), configuration.settings["heads"]
    y = FORWARD["attention"](x, tensors, configuration.settings)

    def projected(part, data):
        return data.astype(float) @ tensors[f"{part}.kernel"].T.astype(float) + tensors.get(f"{part}.bias", 0.0)

    q, k, v = (projected(part, data) for part, data in zip(("query", "key", "value"), x, strict=True))
    size = q.shape[-1] // heads
    shared = heads * size // k.shape[-1]
    wide = v.shape[-1] * shared // heads
    for n, place in np.ndindex(*y.shape[:2]):
        found = []
        for head in range(heads):
            other = head // shared
            score = [
                sum(q[n, place, head * size + i] * k[n, key, other * size + i] for i in range(size)) / math.sqrt(size)
                for key in range(k.shape[1])
            ]
            weights = [math.exp(s - max(score)) for s in score]
            found += [
                sum(w * v[n, key, other * wide + i] for key, w in enumerate(weights)) / sum(weights)
                for i in range(wide)
            ]
        wanted = tensors["output.kernel"].astype(float) @ np.array(found) + tensors.get("output.bias", 0.0)
        np.testing.assert_allclose(y[n, place], wanted, rtol=1e-9, atol=1e-9)


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
        ("leaky_relu", {-1: -0.2, 2: 2}),
        ("celu", {-1: math.exp(-1) - 1, 2: 2}),
        ("gelu_tanh", {0: 0, 1: (1 + math.tanh(math.sqrt(2 / math.pi) * 1.044715)) / 2}),
        ("hard_silu", {-3: 0, 1: 4 / 6, 3: 3}),
        ("hard_tanh", {-3: -1, 0.5: 0.5, 3: 1}),
        ("log_sigmoid", {0: -math.log(2), -800: -800, 800: 0}),
        ("tanh_shrink", {0: 0, 1: 1 - math.tanh(1)}),
        ("hard_shrink", {-1: -1, 0.5: 0, 0.6: 0.6}),
        ("soft_shrink", {-1: -0.5, 0.25: 0, 2: 1.5}),
        ("threshold", {-1: 0, 0: 0, 2: 2}),
    ],
)
def test_activations_by_hand(name, values):
    y = activate(np.array(list(values), float), name, axis=-1)
    np.testing.assert_allclose(y, list(values.values()), rtol=1e-14, atol=1e-300)


@pytest.mark.parametrize(
    ("name", "numbers", "values"),
    [
        ("leaky_relu", {"slope": 0.5}, {-1: -0.5, 2: 2}),
        ("relu", {"threshold": 1.0, "high": 3.0, "slope": 0.5}, {-1: -1, 1: 0, 2: 2, 4: 3}),
        ("elu", {"alpha": 2.0}, {-1: 2 * (math.exp(-1) - 1), 2: 2}),
        ("celu", {"alpha": 2.0}, {-1: 2 * (math.exp(-0.5) - 1), 2: 2}),
        ("hard_tanh", {"low": -2.0, "high": 0.5}, {-3: -2, 0.25: 0.25, 3: 0.5}),
        ("hard_shrink", {"threshold": 2.0}, {-3: -3, 2: 0}),
        ("soft_shrink", {"threshold": 2.0}, {-3: -1, 2: 0}),
        ("threshold", {"threshold": 1.0, "low": -7.0}, {1: -7, 1.5: 1.5}),
    ],
)
def test_activations_with_numbers_by_hand(name, numbers, values):
    y = FORWARD["activation"](np.array(list(values), float), {}, {"function": name, **numbers})
    np.testing.assert_allclose(y, list(values.values()), rtol=1e-14, atol=1e-300)


def test_softmax_runs_along_its_axis_and_does_not_overflow():
    x = np.array([[0.0, math.log(3)], [1000.0, 1000.0]])
    np.testing.assert_allclose(activate(x, "softmax", axis=-1), [[0.25, 0.75], [0.5, 0.5]], rtol=1e-14)
    np.testing.assert_allclose(activate(x, "softmax", axis=0), [[0, 0], [1, 1]], atol=1e-300)
    np.testing.assert_allclose(activate(x, "log_softmax", axis=-1)[1], [-math.log(2)] * 2, rtol=1e-14)


def test_every_activation_has_an_example():
    (examples,) = (mark.args[1] for mark in test_activations_by_hand.pytestmark if mark.name == "parametrize")
    assert {name for name, _ in examples} == set(ACTIVATIONS) - {"softmax", "log_softmax"}
