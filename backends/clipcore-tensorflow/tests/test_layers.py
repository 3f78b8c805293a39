"""Layers as they are described: kinds, roles, layouts, settings and names, against what Keras computes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from einops import rearrange
from keras import layers as L

import clipcore as cc
from clipcore.backend import Layer
from clipcore.mapping.layouts import canonical_layout, canonical_shape, transformation
from clipcore.mapping.reference import FORWARD


def only(backend: Any, model: Any) -> Layer:
    (layer,) = backend.layers(model)
    return layer


def built(layer: Any, *shape: int | None) -> keras.Sequential:
    return keras.Sequential([keras.Input(shape), layer])


def canonical(layer: Layer, role: str, array: np.ndarray) -> np.ndarray:
    sizes = {"group": layer.settings["groups"]} if "group" in layer.tensors[role].layout else {}
    pattern = f"{layer.tensors[role].layout} -> {canonical_layout(layer, role)}"
    return rearrange(array, re.sub(r"\bin\b", "input", pattern), **sizes)  # einops warns of names that are keywords


# name: (layer, input shape, kind, canonical shapes)
ROWS: dict[str, tuple[Callable[[], Any], tuple[Any, ...], str, dict[str, tuple[int, ...]]]] = {
    "Dense": (lambda: L.Dense(4), (3,), "linear", {"kernel": (4, 3), "bias": (4,)}),
    "Dense, square, no bias": (lambda: L.Dense(3, use_bias=False), (3,), "linear", {"kernel": (3, 3)}),
    "Conv1D": (lambda: L.Conv1D(4, 3), (9, 2), "conv", {"kernel": (1, 4, 2, 3), "bias": (4,)}),
    "Conv1D, causal": (
        lambda: L.Conv1D(4, 3, padding="causal", dilation_rate=2),
        (9, 2),
        "conv",
        {"kernel": (1, 4, 2, 3), "bias": (4,)},
    ),
    "Conv2D": (lambda: L.Conv2D(4, (3, 2)), (6, 5, 3), "conv", {"kernel": (1, 4, 3, 3, 2), "bias": (4,)}),
    "Conv2D, groups": (
        lambda: L.Conv2D(6, (3, 2), groups=3, padding="same"),
        (6, 5, 6),
        "conv",
        {"kernel": (3, 2, 2, 3, 2), "bias": (6,)},
    ),
    "Conv2D, stride 2, same": (
        lambda: L.Conv2D(4, 3, strides=2, padding="same"),
        (6, 5, 3),
        "conv",
        {"kernel": (1, 4, 3, 3, 3), "bias": (4,)},
    ),
    "Conv3D": (lambda: L.Conv3D(2, (1, 2, 3)), (3, 4, 5, 2), "conv", {"kernel": (1, 2, 2, 1, 2, 3), "bias": (2,)}),
    "DepthwiseConv1D": (
        lambda: L.DepthwiseConv1D(3, depth_multiplier=2),
        (9, 3),
        "conv",
        {"kernel": (3, 2, 1, 3), "bias": (6,)},
    ),
    "DepthwiseConv2D": (
        lambda: L.DepthwiseConv2D((3, 2), depth_multiplier=2, padding="same"),
        (6, 5, 3),
        "conv",
        {"kernel": (3, 2, 1, 3, 2), "bias": (6,)},
    ),
    "BatchNormalization": (
        lambda: L.BatchNormalization(epsilon=0.1),
        (4, 5, 3),
        "batch_norm",
        dict.fromkeys(["scale", "bias", "running_mean", "running_var"], (3,)),
    ),
    "BatchNormalization, no scale": (
        lambda: L.BatchNormalization(scale=False),
        (4, 5, 3),
        "batch_norm",
        dict.fromkeys(["bias", "running_mean", "running_var"], (3,)),
    ),
    "BatchNormalization, channels first": (
        lambda: L.BatchNormalization(axis=1, center=False),
        (3, 4, 5),
        "batch_norm",
        dict.fromkeys(["scale", "running_mean", "running_var"], (3,)),
    ),
    "LayerNormalization": (
        lambda: L.LayerNormalization(epsilon=0.1),
        (4, 5),
        "layer_norm",
        {"scale": (5,), "bias": (5,)},
    ),
    "LayerNormalization over two axes": (
        lambda: L.LayerNormalization(axis=[1, 2], center=False),
        (4, 5),
        "layer_norm",
        {"scale": (4, 5)},
    ),
    "Embedding": (lambda: L.Embedding(5, 5), (3,), "embedding", {"kernel": (5, 5)}),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_layer_is_described_in_canonical_shapes_and_computes_what_the_reference_says(
    backend: Any, randomised: Any, row: str
) -> None:
    make, shape, kind, shapes = ROWS[row]
    model = randomised(built(make(), *shape))
    layer = only(backend, model)
    assert layer.kind == kind
    assert {role: canonical_shape(layer, role) for role in layer.tensors} == shapes
    values = backend.read(model, [t.name for t in layer.tensors.values()])
    tensors = {role: canonical(layer, role, values[t.name]) for role, t in layer.tensors.items()}
    rng = np.random.default_rng(1)
    x = rng.integers(0, 5, (2, *shape)) if kind == "embedding" else rng.normal(size=(2, *shape)).astype(np.float32)
    last = layer.settings.get("channels") == "last"
    wanted = FORWARD[kind](np.moveaxis(x, -1, 1) if last else x, tensors, layer.settings)
    output = backend.run(model, x)
    np.testing.assert_allclose(np.moveaxis(output, -1, 1) if last else output, wanted, rtol=1e-5, atol=1e-5)


def test_a_layout_composes_with_another_framework_s(backend: Any, randomised: Any) -> None:
    layer = only(backend, randomised(built(L.DepthwiseConv2D(3, depth_multiplier=2), 6, 5, 4)))
    pattern, sizes = transformation(layer, layer, "kernel")
    assert pattern == "... (group in) out -> ... (group in) out"
    assert sizes == {"group": 4}


@pytest.mark.parametrize(
    ("conv", "padding"),
    [
        (lambda: L.Conv2D(1, 3), ((0, 0), (0, 0))),
        (lambda: L.Conv2D(1, (3, 4), padding="same"), ((1, 1), (1, 2))),
        (lambda: L.Conv2D(1, (3, 4), padding="same", dilation_rate=2), ((2, 2), (3, 3))),
        (lambda: L.Conv2D(1, 3, padding="same", strides=2), "same"),
    ],
)
def test_padding_is_described_in_pairs_where_it_does_not_depend_on_the_size(
    backend: Any, conv: Any, padding: Any
) -> None:
    assert only(backend, built(conv(), 9, 9, 1)).settings["padding"] == padding


def test_causal_padding_is_before_the_data(backend: Any) -> None:
    settings = only(backend, built(L.Conv1D(1, 3, padding="causal", dilation_rate=2), 9, 1)).settings
    assert settings["padding"] == ((4, 0),)


def test_settings_have_canonical_names(backend: Any) -> None:
    conv = only(backend, built(L.Conv2D(4, 3, strides=(2, 1), activation="relu", groups=2), 9, 9, 2))
    assert conv.settings == {
        "stride": (2, 1),
        "padding": ((0, 0), (0, 0)),
        "padding_mode": "zeros",
        "dilation": (1, 1),
        "groups": 2,
        "activation": "relu",
        "channels": "last",
    }
    norm = only(backend, built(L.BatchNormalization(momentum=0.9, epsilon=1e-5), 9, 9, 2))
    assert norm.settings == {"eps": 1e-5, "momentum": 0.1, "channels": "last"}
    assert only(backend, built(L.LayerNormalization(epsilon=1e-5), 9)).settings == {"eps": 1e-5}


def _own(x: Any) -> Any:
    return x


@pytest.mark.parametrize(
    ("activation", "name"),
    [(None, None), ("linear", None), ("gelu", "gelu"), ("swish", "silu"), (_own, "unknown:_own")],
)
def test_activations_are_named(backend: Any, activation: Any, name: str | None) -> None:
    assert only(backend, built(L.Dense(1, activation=activation), 2)).settings == {"activation": name}


def test_a_frozen_layer_s_weights_are_trainable_by_their_role_and_limit_leaves_them_alone(backend: Any) -> None:
    model = keras.Sequential([keras.Input((3,)), L.Dense(3), L.BatchNormalization(), L.Dense(2, trainable=False)])
    model.layers[1].trainable = False
    tensors = [tensor for layer in backend.layers(model) for tensor in layer.tensors.values()]
    assert {t.role for t in tensors if not t.trainable} == {"running_mean", "running_var"}
    assert [variable.path for variable in backend.weights(model)] == [v.path for v in model.layers[0].weights]


def test_running_statistics_are_not_trainable(backend: Any) -> None:
    tensors = only(backend, built(L.BatchNormalization(), 3)).tensors
    assert {role for role, tensor in tensors.items() if not tensor.trainable} == {"running_mean", "running_var"}


class Doubled(L.Dense):
    """A Dense that computes something else."""

    def call(self, inputs: Any) -> Any:
        return 2 * super().call(inputs)


class Renamed(L.Dense):
    """A Dense by another name."""


def test_a_subclass_is_of_its_base_s_kind_unless_it_computes_something_else(backend: Any) -> None:
    assert only(backend, built(Renamed(2), 3)).kind == "linear"
    layer = only(backend, built(Doubled(2), 3))
    assert (layer.kind, layer.why) == ("raw", "a Doubled, which computes something of its own")
    assert [(t.role, t.layout) for t in layer.tensors.values()] == [("kernel", "..."), ("bias", "...")]


def test_a_layer_with_adapters_is_of_no_known_kind(backend: Any) -> None:
    model = built(L.Dense(4), 3)
    model.layers[0].enable_lora(2)
    layer = only(backend, model)
    assert (layer.kind, layer.why) == ("raw", "a Dense with lora_kernel_a, lora_kernel_b")
    assert set(layer.tensors) == {"kernel", "bias", "lora_kernel_a", "lora_kernel_b"}


def test_a_quantised_layer_is_of_no_known_kind(backend: Any) -> None:
    model = built(L.Dense(4), 3)
    model.layers[0].quantize("int8")
    layer = only(backend, model)
    assert (layer.kind, layer.why) == ("raw", "a quantised Dense")


def test_a_norm_over_other_axes_is_of_no_known_kind(backend: Any) -> None:
    batch, layer = built(L.BatchNormalization(axis=2), 3, 4, 5), built(L.LayerNormalization(axis=1), 3, 4)
    assert only(backend, batch).why == "a BatchNormalization whose channels are the axes [2] of 4"
    assert only(backend, layer).why == "a LayerNormalization over the axes [1] of 3, which are not the last ones"


def test_models_inside_models_are_walked_and_shared_layers_listed_once(backend: Any) -> None:
    shared = L.Dense(3, name="shared")
    inner = keras.Sequential([keras.Input((3,)), L.Dense(3, name="first"), shared], name="inner")
    x = keras.Input((3,))
    model = keras.Model(x, L.Add()([shared(inner(inner(x))), L.Dense(3, name="first")(x)]))
    described = backend.layers(model)
    assert sorted(layer.name for layer in described) == ["first", "inner/first", "inner/shared"]
    assert [layer.name for layer in described] == [layer.name for layer in backend.layers(model)]


def test_equal_names_are_told_apart(backend: Any) -> None:
    class Blocks(L.Layer):  # a layer may hold layers of one name, a functional model may not
        def __init__(self) -> None:
            super().__init__(name="blocks")
            self.both = [keras.Sequential([keras.Input((3,)), L.Dense(3, name="same")], name="one") for _ in range(2)]

        def call(self, x: Any) -> Any:
            return self.both[1](self.both[0](x))

    described = backend.layers(keras.Sequential([keras.Input((3,)), Blocks()]))
    assert [layer.name for layer in described] == ["blocks/one/same", "blocks/one/same#2"]
    assert [t.name for layer in described for t in layer.tensors.values()] == [
        "blocks/one/same/kernel",
        "blocks/one/same/bias",
        "blocks/one/same#2/kernel",
        "blocks/one/same#2/bias",
    ]


def test_tied_weights_have_one_name(backend: Any) -> None:
    class Tied(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.embed = L.Embedding(7, 3)
            self.head = Head(self.embed)

        def call(self, x: Any) -> Any:
            return self.head(self.embed(x))

    class Head(L.Layer):
        def __init__(self, embed: Any) -> None:
            super().__init__()
            self.embed = embed
            self.bias = self.add_weight((7,), name="bias")

        def call(self, x: Any) -> Any:
            return keras.ops.matmul(x, keras.ops.transpose(self.embed.embeddings)) + self.bias

    model = Tied()
    model(np.zeros((1, 2), np.int32))
    assert [(layer.kind, list(layer.tensors)) for layer in backend.layers(model)] == [
        ("embedding", ["kernel"]),
        ("raw", ["bias"]),
    ]


def test_a_tensor_of_a_model_s_own_is_a_layer_of_its_own(backend: Any) -> None:
    class Scaled(keras.Model):
        def __init__(self) -> None:
            super().__init__(name="scaled")
            self.gain = self.add_weight((1,), name="gain")
            self.dense = L.Dense(2)

        def call(self, x: Any) -> Any:
            return self.dense(x) * self.gain

    model = Scaled()
    model(np.zeros((1, 3), np.float32))
    assert [(layer.name, layer.kind) for layer in backend.layers(model)] == [
        ("gain", "raw"),
        ("dense", "linear"),
    ]
    gain = backend.layers(model)[0]
    assert (gain.why, gain.tensors["gain"].name) == ("a tensor of a Scaled's own", "gain")


def test_a_layer_alone_is_a_model(backend: Any) -> None:
    layer = L.Dense(2, name="alone")
    layer.build((None, 3))
    assert only(backend, layer).name == "alone"


@pytest.mark.parametrize("model", [lambda: keras.Sequential([L.Dense(1)]), lambda: L.Dense(1)])
def test_a_model_without_weights_is_refused(backend: Any, model: Any) -> None:
    with pytest.raises(cc.InvalidInput, match=r"has no weights yet: build it with model.build\(input_shape\)"):
        backend.layers(model())


def test_what_is_no_model_is_refused(backend: Any) -> None:
    with pytest.raises(cc.InvalidInput, match=r"is no keras.Model, keras.Layer or tf.Module"):
        backend.layers(tf.constant(1.0))


class Linear(tf.Module):
    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        rng = np.random.default_rng(ins)
        self.w = tf.Variable(rng.normal(size=(ins, outs)), dtype=tf.float32)
        self.b = tf.Variable(rng.normal(size=outs), dtype=tf.float32)

    @tf.function
    def __call__(self, x: Any) -> Any:
        return x @ self.w + self.b


class Net(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = [Linear(3, 4), Linear(4, 2)]
        self.gains = {"out": tf.Variable([2.0, 3.0])}
        self.counter = tf.Variable(0, trainable=False)

    def __call__(self, x: Any) -> Any:
        self.counter.assign_add(1)
        for block in self.blocks:
            x = block(x)
        return x * self.gains["out"]


def test_modules_are_described_by_their_attributes(backend: Any) -> None:
    described = {layer.name: layer for layer in backend.layers(Net())}
    assert {name: layer.why for name, layer in described.items()} == {
        "blocks/0": "a Linear, which no rule describes",
        "blocks/1": "a Linear, which no rule describes",
        "gains/out": "a tensor of a Net's own",
        "counter": "a tensor of a Net's own",
    }
    assert {layer.kind for layer in described.values()} == {"raw"}
    assert [t.name for t in described["blocks/1"].tensors.values()] == ["blocks/1/w", "blocks/1/b"]
    counter = described["counter"].tensors["counter"]
    assert (counter.dtype, counter.trainable) == ("int32", False)
