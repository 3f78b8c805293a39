"""Each kind of layer, of both Keras libraries, against a formula written from the definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import pytest
import tf_keras

from clipcore.backend import Layer
from clipcore.mapping.layouts import apply_pattern, canonical_layout, sizes_of
from clipcore.mapping.plan import cut
from clipcore.mapping.reference import activate, conv, layer_norm, linear

Array = np.ndarray[Any, np.dtype[Any]]
BOTH = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
RNG = np.random.default_rng(0)


def randomise(model: Any) -> Any:
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.uniform(0.2, 1.2, tuple(variable.shape)) * rng.choice([-1, 1], tuple(variable.shape)))
        if "moving" in variable.name:
            variable.assign(rng.uniform(0.5, 1.5, tuple(variable.shape)))
    return model


def built(library: Any, layer: Any, *shape: int | None) -> Any:
    return randomise(library.Sequential([library.Input(shape), layer]))


def tensors_of(backend: Any, model: Any, layer: Layer) -> dict[str, Array]:
    """The canonical tensors of a layer, by role."""
    values = backend.read(model, [t.name for t in layer.tensors.values()])
    return {
        role: apply_pattern(
            cut(values[t.name], t.within), f"{t.layout} -> {canonical_layout(layer, role)}", sizes_of(layer, t), role
        ).astype(np.float64)
        for role, t in layer.tensors.items()
        if layer.kind != "raw"
    }


def assert_read_and_written_back(backend: Any, model: Any) -> None:
    """What is read of each role and written back is what was there, and the roles cover every variable once."""
    tensors = {(t.name, t.within): t for layer in backend.layers(model) for t in layer.tensors.values()}
    before = {name: np.array(a) for name, a in backend.read(model, [name for name, _ in tensors]).items()}
    counts = {name: np.zeros(a.shape, int) for name, a in before.items()}
    after = {name: np.zeros_like(a) for name, a in before.items()}
    for (name, within), tensor in tensors.items():
        part = cut(before[name], within)
        assert part.shape == tensor.shape
        assert before[name].shape == tensor.stored_shape
        cut(counts[name], within)[...] += 1
        cut(after[name], within)[...] = part
    assert all((count == 1).all() for count in counts.values())
    assert sum(count.size for count in counts.values()) == sum(int(np.prod(v.shape)) for v in model.weights)
    backend.write(model, after)
    read = backend.read(model, list(before))
    assert all(read[name].tobytes() == before[name].tobytes() for name in before)


class Watch:
    """Keeps what it sees, and replaces what it is told to."""

    def __init__(self, inputs: Mapping[str, Any] | None = None, outputs: Mapping[str, Any] | None = None) -> None:
        self.order: list[str] = []
        self.inputs: dict[str, list[Array]] = {}
        self.outputs: dict[str, Any] = {}
        self._inputs, self._outputs = inputs or {}, outputs or {}

    def before(self, layer: str, inputs: list[Array]) -> Any:
        self.order.append(layer)
        self.inputs[layer] = inputs
        return self._inputs.get(layer)

    def after(self, layer: str, output: Any) -> Any:
        self.outputs[layer] = output
        return self._outputs.get(layer)


def assert_watched_layers_compute(backend: Any, model: Any, x: Any, forward: Any = None) -> Watch:
    """Every canonical layer gives, of what it is seen to take, what its formula says; what it is given in place of
    either flows on.
    """
    watch = Watch()
    output = backend.run(model, x, watch)
    np.testing.assert_allclose(_first(output), _first(backend.run(model, x)), rtol=1e-5, atol=1e-5)
    for layer in backend.layers(model):
        if layer.kind == "raw":
            continue
        wanted = (forward or FORWARD[layer.kind])(watch.inputs[layer.name], tensors_of(backend, model, layer), layer)
        np.testing.assert_allclose(watch.outputs[layer.name], wanted, rtol=2e-5, atol=2e-5, err_msg=layer.name)
        assert_replaceable(backend, model, x, layer.name, watch)
    assert_read_and_written_back(backend, model)
    return watch


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, list | tuple) else output


def assert_replaceable(backend: Any, model: Any, x: Any, name: str, watch: Watch) -> None:
    """The same values in place of what flows change nothing; others are seen downstream."""
    same = Watch(inputs={name: watch.inputs[name]}, outputs={name: watch.outputs[name]})
    np.testing.assert_allclose(_first(backend.run(model, x, same)), _first(backend.run(model, x, Watch())), rtol=1e-6)
    zeros = [np.zeros_like(value) for value in watch.inputs[name]]
    other = Watch(inputs={name: zeros})
    backend.run(model, x, other)
    assert not np.allclose(other.outputs[name], watch.outputs[name])
    given = Watch(outputs={name: -2 * watch.outputs[name]})
    assert not np.allclose(_first(backend.run(model, x, given)), _first(backend.run(model, x)))


def _channels_first(forward: Callable[..., Array]) -> Callable[..., Array]:
    def call(inputs: list[Array], tensors: Any, layer: Layer) -> Array:
        last = layer.settings["channels"] == "last"
        (x,) = inputs
        y = forward(np.moveaxis(x, -1, 1) if last else x, tensors, layer.settings)
        return np.moveaxis(y, 1, -1) if last else y

    return call


def conv_transpose(x: Array, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Array:
    """Every input place adds its kernel into the whole result, which is then cropped (or padded with zeros)."""
    kernel = tensors["kernel"]
    groups, ins, outs, *window = kernel.shape
    batch, _, *sizes = x.shape
    stride, dilation = settings["stride"], settings["dilation"]
    whole = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(sizes, stride, window, dilation, strict=True)]
    y = np.zeros((batch, groups, outs, *whole))
    grouped = x.reshape(batch, groups, ins, *sizes)
    for place in np.ndindex(*sizes):
        for tap in np.ndindex(*window):
            at = tuple(p * s + t * d for p, s, t, d in zip(place, stride, tap, dilation, strict=True))
            y[(..., *at)] += np.einsum("bgi,gio->bgo", grouped[(..., *place)], kernel[(..., *tap)])
    for axis, (before, after) in enumerate(settings["crop"], start=3):
        pads = [(0, 0)] * y.ndim
        pads[axis] = (max(-before, 0), max(-after, 0))
        y = np.pad(y, pads)
        y = np.take(y, range(max(before, 0), y.shape[axis] - max(after, 0)), axis)
    y = y.reshape(batch, groups * outs, *y.shape[3:])
    y += tensors.get("bias", np.zeros(groups * outs)).reshape(-1, *[1] * len(window))
    return activate(y, settings["activation"], axis=1)


def group_norm(x: Array, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Array:
    batch, channels, *rest = x.shape
    grouped = x.reshape(batch, settings["groups"], -1)
    centred = grouped - grouped.mean(-1, keepdims=True)
    y = (centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + settings["eps"])).reshape(x.shape)
    shape = (-1, *[1] * len(rest))
    scale, bias = tensors.get("scale", np.ones(channels)), tensors.get("bias", np.zeros(channels))
    return y * scale.reshape(shape) + bias.reshape(shape)


def rms_norm(inputs: list[Array], tensors: Mapping[str, Array], layer: Layer) -> Array:
    axes = tuple(range(-tensors["scale"].ndim, 0))
    (x,) = inputs
    return x / np.sqrt(np.square(x).mean(axes, keepdims=True) + layer.settings["eps"]) * tensors["scale"]


def prelu(x: Array, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Array:
    slope = tensors["slope"].reshape(-1, *[1] * (x.ndim - 2))
    return np.where(x > 0, x, slope * x)


def recurrent(inputs: list[Array], tensors: Mapping[str, Array], layer: Layer) -> Array:
    """The whole sequence; a state starts at zero unless it is given."""
    x, *states = inputs
    settings = layer.settings
    steps = x[:, ::-1] if settings["reverse"] else x
    units = tensors[next(role for role in tensors if role.startswith("recurrent_kernel"))].shape[0]
    h, c = (states + [np.zeros((len(x), units))] * 2)[:2]
    act, gate = settings["activation"], settings.get("recurrent_activation")
    outputs = []

    def side(prefix: str, name: str, data: Array) -> Array:
        part = f".{name}" if name else ""
        bias = tensors.get(f"{prefix}bias{part}", np.zeros(1)).reshape(-1)
        return data @ tensors[f"{prefix}kernel{part}"].T + bias

    def total(name: str, step: Array) -> Array:
        return side("", name, step) + side("recurrent_", name, h)

    for step in np.moveaxis(steps, 1, 0):
        if layer.kind == "rnn":
            h = activate(total("", step), act, -1)
        elif layer.kind == "lstm":
            i, f, o = (activate(total(name, step), gate, -1) for name in ("input", "forget", "output"))
            c = f * c + i * activate(total("cell", step), act, -1)
            h = o * activate(c, act, -1)
        else:
            r, u = (activate(total(name, step), gate, -1) for name in ("reset", "update"))
            inner = r * side("recurrent_", "new", h) if settings["reset_after"] else side("recurrent_", "new", r * h)
            h = (1 - u) * activate(side("", "new", step) + inner, act, -1) + u * h
        outputs.append(h)
    return np.stack(outputs, 1)


FORWARD: dict[str, Any] = {
    "linear": lambda inputs, tensors, layer: linear(inputs[0], tensors, layer.settings),
    "conv": _channels_first(conv),
    "conv_transpose": _channels_first(conv_transpose),
    "layer_norm": lambda inputs, tensors, layer: layer_norm(inputs[0], tensors, layer.settings),
    "group_norm": _channels_first(group_norm),
    "rms_norm": rms_norm,
    "prelu": _channels_first(prelu),
    "lstm": recurrent,
    "gru": recurrent,
    "rnn": recurrent,
}


def data(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


# equation, output_shape, bias_axes, input shape, kernel layout, heads
EINSUMS = {
    "dense": ("ab,bc->ac", 4, "c", (3,), "in out", None),
    "any rank": ("...x,xy->...y", 4, "y", (5, 3), "in out", None),
    "transposed": ("abc,dc->abd", (None, 4), "d", (5, 3), "out in", None),
    "heads out": ("abc,cde->abde", (None, 2, 4), "de", (5, 3), "in out0 out1", 2),
    "heads in": ("abcd,cde->abe", (None, 4), "e", (5, 2, 3), "in0 in1 out", 2),
    "heads between": ("abc,dce->abde", (None, 2, 4), "de", (5, 3), "out0 in out1", 2),
    "both": ("abcd,cdef->abef", (None, 2, 4), "ef", (5, 3, 2), "in0 in1 out0 out1", 2),
    "three": ("...b,bcde->...cde", (2, 3, 2), "cde", (3,), "in out0 out1 out2", None),
}


@BOTH
@pytest.mark.parametrize("row", EINSUMS)
def test_einsum_layers_that_are_plain_products_are_linear(backend: Any, library: Any, row: str) -> None:
    equation, outs, bias_axes, shape, layout, heads = EINSUMS[row]
    for axes in (bias_axes, None):
        layer = library.layers.EinsumDense(equation, outs, bias_axes=axes, activation="tanh")
        model = built(library, layer, *shape)
        (described,) = backend.layers(model)
        assert (described.kind, described.tensors["kernel"].layout) == ("linear", layout)
        assert described.settings.get("heads") == heads
        assert_watched_layers_compute(backend, model, data(2, *shape))


@BOTH
@pytest.mark.parametrize(
    ("equation", "outs", "bias_axes", "shape", "why"),
    [
        ("abc,cde->abed", (None, 4, 2), None, (5, 3), "no plain product"),
        ("abc,bcd->abd", (5, 4), None, (5, 3), "no plain product"),
        ("abc,cd->adb", (4, 5), None, (5, 3), "no plain product"),
        ("ab...,bc->ac...", (4, 5), None, (3, 5), "no plain product"),
        ("abc,cde->abde", (None, 2, 4), "e", (5, 3), "a bias over 'e' of 'de' alone"),
    ],
)
def test_other_einsum_layers_are_raw(
    backend: Any, library: Any, equation: str, outs: Any, bias_axes: Any, shape: Any, why: str
) -> None:
    (layer,) = backend.layers(built(library, library.layers.EinsumDense(equation, outs, bias_axes=bias_axes), *shape))
    assert layer.kind == "raw"
    assert why in layer.why


@BOTH
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(("window", "stride", "more"), [(3, 2, None), (2, 3, None), (4, 2, None), (5, 3, None),
    (3, 1, None), (3, 2, 0), (3, 2, 1), (4, 3, 1), (2, 3, 2), (5, 2, 1), (1, 2, None)])  # fmt: skip
@pytest.mark.parametrize("size", [4, 5])
def test_transposed_convolutions(
    backend: Any, library: Any, padding: str, window: int, stride: int, more: int | None, size: int
) -> None:
    layer = library.layers.Conv1DTranspose(4, window, stride, padding, more, activation="tanh")
    model = built(library, layer, size, 3)
    assert_watched_layers_compute(backend, model, data(2, size, 3))


@BOTH
def test_transposed_convolutions_of_two_and_three_axes(backend: Any, library: Any) -> None:
    two = library.layers.Conv2DTranspose(4, (3, 2), (2, 3), "same", use_bias=False)
    assert_watched_layers_compute(backend, built(library, two, 4, 5, 3), data(2, 4, 5, 3))
    three = library.layers.Conv3DTranspose(2, (3, 2, 1), (2, 1, 1), "valid", output_padding=(1, 0, 0))
    assert_watched_layers_compute(backend, built(library, three, 2, 3, 4, 3), data(2, 2, 3, 4, 3))


@BOTH
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_dilated_transposed_convolutions(backend: Any, library: Any, rank: int, padding: str) -> None:
    for window, dilation in ((2, 2), (3, 2), (3, 3)):
        make = getattr(library.layers, f"Conv{rank}DTranspose")
        model = built(library, make(4, window, padding=padding, dilation_rate=dilation), *[5] * rank, 3)
        assert_watched_layers_compute(backend, model, data(2, *[5] * rank, 3))
    (layer,) = backend.layers(model)
    assert layer.settings["dilation"] == ((1, 1, 1) if (library, rank) == (tf_keras, 3) else (3,) * rank)


@BOTH
def test_separable_convolutions_are_two_and_are_watched_in_two_steps(backend: Any, library: Any) -> None:
    one = {"padding": "causal"} if library is tf_keras else {"padding": "same"}
    layers = [
        (library.layers.SeparableConv1D(4, 3, depth_multiplier=2, activation="tanh", name="s", **one), (7, 3)),
        (library.layers.SeparableConv1D(4, 3, strides=2, padding="same", use_bias=False, name="s"), (8, 3)),
        (library.layers.SeparableConv2D(4, (3, 2), padding="same", dilation_rate=2, name="s"), (6, 5, 3)),
        (library.layers.SeparableConv2D(4, 3, strides=2, padding="same", activation="relu", name="s"), (6, 5, 3)),
    ]
    for layer, shape in layers:
        watch = assert_watched_layers_compute(backend, built(library, layer, *shape), data(2, *shape))
        assert watch.order == ["s/depthwise", "s/pointwise"]


@BOTH
def test_depthwise_convolutions(backend: Any, library: Any) -> None:
    one = library.layers.DepthwiseConv1D(3, depth_multiplier=2, padding="same")
    two = library.layers.DepthwiseConv2D((3, 2), depth_multiplier=2, activation="tanh")
    assert_watched_layers_compute(backend, built(library, one, 7, 3), data(2, 7, 3))
    assert_watched_layers_compute(backend, built(library, two, 6, 5, 3), data(2, 6, 5, 3))


@BOTH
def test_group_norms(backend: Any, library: Any) -> None:
    make = library.layers.GroupNormalization
    for layer, groups in ((make(2), 2), (make(-1, epsilon=0.1, center=False), 6), (make(3, axis=1), 3)):
        shape = (6, 4, 5) if layer.axis == 1 else (4, 5, 6)
        model = built(library, layer, *shape)
        assert backend.layers(model)[0].settings["groups"] == groups
        assert_watched_layers_compute(backend, model, data(2, *shape))


def test_rms_norms(backend: Any) -> None:
    assert_watched_layers_compute(backend, built(keras, keras.layers.RMSNormalization(epsilon=0.1), 5), data(2, 5))
    two = keras.layers.RMSNormalization(axis=[-2, -1])
    assert_watched_layers_compute(backend, built(keras, two, 4, 5), data(2, 4, 5))
    (layer,) = backend.layers(built(keras, keras.layers.RMSNormalization(axis=1), 4, 5))
    assert "which are not the last ones" in layer.why


@pytest.mark.filterwarnings("ignore:You passed `rms_scaling=True`:UserWarning")
def test_a_layer_norm_with_rms_scaling_is_none_of_root_mean_squares(backend: Any) -> None:
    model = built(keras, keras.layers.LayerNormalization(rms_scaling=True), 5)
    (layer,) = backend.layers(model)
    x = data(2, 5) + 3
    wanted = x / np.sqrt(x.var(-1, keepdims=True) + 1e-3) * model.layers[0].gamma.numpy()
    np.testing.assert_allclose(backend.run(model, x), wanted, rtol=1e-4)
    assert "without taking the mean off" in layer.why


@BOTH
def test_prelus_with_a_slope_per_channel(backend: Any, library: Any) -> None:
    make = library.layers.PReLU
    for axes, shape, layout in (
        ([1, 2], (4, 5, 3), "1 1 channel"),
        ([2, 3], (3, 4, 5), "channel 1 1"),
        (None, (3,), "channel"),
        ([1, 2, 3], (4, 5, 3), "1 1 channel"),
    ):
        model = built(library, make(shared_axes=axes), *shape)
        assert backend.layers(model)[0].tensors["slope"].layout == layout
        assert_watched_layers_compute(backend, model, data(2, *shape))
    (layer,) = backend.layers(built(library, make(), 4, 5, 3))
    assert layer.why == "a PReLU with slopes of shape (4, 5, 3), not one per channel: give it shared_axes"


RECURRENT: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "LSTM": lambda layers, more: layers.LSTM(3, **more),
    "LSTM, other activations": lambda layers, more: layers.LSTM(
        3, activation="softsign", recurrent_activation="tanh", use_bias=False, **more
    ),
    "GRU": lambda layers, more: layers.GRU(3, **more),
    "GRU, reset before": lambda layers, more: layers.GRU(3, reset_after=False, **more),
    "GRU, no bias": lambda layers, more: layers.GRU(3, use_bias=False, **more),
    "SimpleRNN": lambda layers, more: layers.SimpleRNN(3, **more),
    "RNN of LSTMCell": lambda layers, more: layers.RNN(layers.LSTMCell(3), **more),
    "RNN of GRUCell": lambda layers, more: layers.RNN(layers.GRUCell(3), **more),
    "RNN of SimpleRNNCell": lambda layers, more: layers.RNN(layers.SimpleRNNCell(3, activation="sigmoid"), **more),
}


@BOTH
@pytest.mark.parametrize("row", RECURRENT)
@pytest.mark.parametrize("reverse", [False, True])
def test_recurrent_layers(backend: Any, library: Any, row: str, reverse: bool) -> None:
    for more in ({"return_sequences": True}, {}, {"return_state": True}, {"return_sequences": True, "return_state": 1}):
        layer = RECURRENT[row](library.layers, {"go_backwards": reverse, "name": "r", **more})
        x = library.Input((5, 2))
        model = randomise(library.Model(x, layer(x)))
        every = bool(more.get("return_sequences"))
        forward = recurrent if every else lambda *args: recurrent(*args)[:, -1]
        watch = assert_watched_layers_compute(backend, model, data(2, 5, 2), forward)
        assert watch.outputs["r"].shape == ((2, 5, 3) if every else (2, 3))
        (described,) = backend.layers(model)
        assert described.settings["reverse"] is reverse


@BOTH
def test_initial_states_are_inputs(backend: Any, library: Any) -> None:
    x, h, c = library.Input((5, 2)), library.Input((3,)), library.Input((3,))
    layer = library.layers.LSTM(3, return_sequences=True, name="r")
    model = randomise(library.Model([x, h, c], layer(x, initial_state=[h, c])))
    watch = assert_watched_layers_compute(backend, model, (data(2, 5, 2), data(2, 3), data(2, 3)))
    assert [value.shape for value in watch.inputs["r"]] == [(2, 5, 2), (2, 3), (2, 3)]


@BOTH
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "SimpleRNN"])
@pytest.mark.parametrize("merge", ["concat", "sum"])
def test_the_two_layers_in_a_bidirectional_one_are_seen(backend: Any, library: Any, cell: str, merge: str) -> None:
    inner = getattr(library.layers, cell)(3, return_sequences=True, name="r")
    model = built(library, library.layers.Bidirectional(inner, merge_mode=merge, name="both"), 5, 2)
    watch = assert_watched_layers_compute(backend, model, data(2, 5, 2))
    assert watch.order == ["both/forward_r", "both/backward_r"]
    assert [layer.settings["reverse"] for layer in backend.layers(model)] == [False, True]


def test_time_major_data_is_seen_batch_first(backend: Any) -> None:
    layer = tf_keras.layers.LSTM(3, return_sequences=True, time_major=True, name="r")
    model = randomise(tf_keras.Sequential([tf_keras.Input(batch_shape=(5, 2, 4)), layer]))
    watch = assert_watched_layers_compute(backend, model, data(5, 2, 4))
    assert (watch.inputs["r"][0].shape, watch.outputs["r"].shape) == ((2, 5, 4), (2, 5, 3))


class OwnCell(keras.layers.SimpleRNNCell):
    def call(self, inputs: Any, states: Any, training: Any = None) -> Any:
        return super().call(inputs, states, training=training)


@BOTH
def test_other_recurrent_layers_are_raw_and_say_why(backend: Any, library: Any) -> None:
    layers = library.layers
    cells = [layers.LSTMCell(3), layers.GRUCell(2)]
    stacked, grid = layers.RNN(cells, name="r"), layers.ConvLSTM2D(2, 3, name="r")
    (first,), (second,) = (
        backend.layers(built(library, stacked, 5, 2)),
        backend.layers(built(library, grid, 4, 5, 5, 2)),
    )
    assert first.why == "several cells stacked in one RNN; an RNN around each would be described"
    assert list(first.tensors) == ["kernel", "recurrent_kernel", "bias", "kernel#2", "recurrent_kernel#2", "bias#2"]
    assert second.why == "a ConvLSTM2D, which computes something of its own"
    if library is keras:
        (own,) = backend.layers(built(library, layers.RNN(OwnCell(3), name="r"), 5, 2))
        assert own.why == "a recurrent layer around a OwnCell, whose call is its own"


@BOTH
def test_states_that_a_layer_remembers_are_put_back(backend: Any, library: Any) -> None:
    layer = library.layers.GRU(3, stateful=True)
    model = randomise(library.Sequential([library.Input(batch_shape=(2, 5, 4)), layer]))
    x = data(2, 5, 4)
    np.testing.assert_array_equal(backend.run(model, x), backend.run(model, x, Watch()))
    assert not any(np.asarray(state).any() for state in layer.states)


@BOTH
def test_attention_is_its_projections_with_heads_in_one_axis(backend: Any, library: Any) -> None:
    attention = library.layers.MultiHeadAttention(2, 3, value_dim=4, output_shape=5, name="m")
    q, k, v = library.Input((6, 7)), library.Input((4, 2)), library.Input((4, 3))
    model = randomise(library.Model([q, k, v], attention(q, v, k)))
    watch = assert_watched_layers_compute(backend, model, (data(2, 6, 7), data(2, 4, 2), data(2, 4, 3)))
    described = {layer.name: layer for layer in backend.layers(model)}
    assert list(described) == ["m/query", "m/key", "m/value", "m/attention_output"]
    assert [layer.settings["heads"] for layer in described.values()] == [2, 2, 2, 2]
    assert watch.outputs["m/query"].shape == (2, 6, 6)
    assert watch.inputs["m/attention_output"][0].shape == (2, 6, 8)
    assert backend.operations(model) == []


def test_attention_in_groups_of_heads(backend: Any) -> None:
    attention = keras.layers.GroupQueryAttention(3, 4, 2, name="g")
    x = keras.Input((6, 5))
    model = randomise(keras.Model(x, attention(x, x)))
    assert_watched_layers_compute(backend, model, data(2, 6, 5))
    described = {layer.name: layer.settings["heads"] for layer in backend.layers(model)}
    assert described == {"g/query": 4, "g/key": 2, "g/value": 2, "g/attention_output": 4}


def test_spectral_normalization_leaves_its_vector_with_the_layer_inside(backend: Any) -> None:
    inner = keras.layers.Dense(4, name="d")
    model = built(keras, keras.layers.SpectralNormalization(inner, name="s"), 3)
    (layer,) = backend.layers(model)
    assert (layer.name, layer.kind, list(layer.tensors)) == ("s/d", "linear", ["kernel", "bias", "kernel.u"])
    assert (layer.tensors["kernel.u"].name, layer.tensors["kernel.u"].trainable) == ("s/vector_u", False)
    assert_watched_layers_compute(backend, model, data(2, 3))
    assert set(backend.parameters(model)) == {"s/d/kernel", "s/d/bias"}


@BOTH
def test_a_layer_over_time_is_watched_in_one_call(backend: Any, library: Any) -> None:
    dense = library.layers.TimeDistributed(library.layers.Dense(4, name="d"), name="t")
    watch = assert_watched_layers_compute(backend, built(library, dense, 5, 3), data(2, 5, 3))
    assert watch.inputs["t/d"][0].shape == (2, 5, 3)
    conv2d = library.layers.TimeDistributed(library.layers.Conv2D(4, 2, name="c"), name="t")
    watch = assert_watched_layers_compute(backend, built(library, conv2d, 5, 4, 4, 3), data(2, 5, 4, 4, 3))
    assert watch.inputs["t/c"][0].shape == (10, 4, 4, 3)
    assert watch.order == ["t/c"]


def test_every_place_of_a_whole_model_is_covered_once(backend: Any) -> None:
    layers = keras.layers
    x = keras.Input((6, 4))
    y = layers.Bidirectional(layers.GRU(3, return_sequences=True))(x)
    y = layers.MultiHeadAttention(2, 3)(y, y)
    y = layers.SeparableConv1D(4, 3)(y)
    assert_read_and_written_back(backend, randomise(keras.Model(x, layers.LSTM(2)(y))))


def test_the_formula_notices_swapped_gates(backend: Any) -> None:
    model = built(keras, keras.layers.GRU(3, return_sequences=True), 5, 2)
    (layer,) = backend.layers(model)
    tensors = tensors_of(backend, model, layer)
    swapped = {
        role.replace("reset", "x").replace("update", "reset").replace("x", "update"): value
        for role, value in tensors.items()
    }
    x = data(2, 5, 2)
    assert np.abs(recurrent([x], swapped, layer) - backend.run(model, x)).max() > 0.05
