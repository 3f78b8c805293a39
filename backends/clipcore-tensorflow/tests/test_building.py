"""Layers built from canonical settings: described with what they were built with, and refused where Keras has none."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import clipcore as cc
from clipcore.mapping.kinds import KINDS
from clipcore.mapping.layouts import canonical_shape

LSTM = {f"{role}.{gate}": shape for gate in ("input", "forget", "cell", "output")
        for role, shape in {"kernel": (3, 2), "recurrent_kernel": (3, 3), "bias": (3,)}.items()}  # fmt: skip
GRU = {f"{role}.{gate}": shape for gate in ("reset", "update", "new")
       for role, shape in {"kernel": (3, 2), "recurrent_kernel": (3, 3), "bias": (3,)}.items()}  # fmt: skip
BOTH_BIASES = {**GRU, **{f"recurrent_{role}": shape for role, shape in GRU.items() if "bias" in role}}
GATES = {"activation": "tanh", "recurrent_activation": "sigmoid"}
CUT = {"stride": (2, 2), "dilation": (1, 1), "groups": 1, "activation": None}
POOL = {"window": (3, 2), "stride": (2, 1), "ceil": False}
TRANSPOSED = {"kernel": (1, 3, 4, 3, 3), "bias": (4,)}

ROWS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "linear": ("linear", {"activation": "relu"}, {"kernel": (4, 3)}),
    "heads": ("linear", {"activation": None, "heads": 2}, {"kernel": (4, 3), "bias": (4,)}),
    "conv_transpose": ("conv_transpose", {**CUT, "crop": ((0, 0), (0, 0))}, TRANSPOSED),
    "same": ("conv_transpose", {**CUT, "crop": ((0, 1), (0, 1))}, TRANSPOSED),
    "output_padding": ("conv_transpose", {**CUT, "crop": ((1, 1), (0, 1))}, TRANSPOSED),
    "dilated": ("conv_transpose", {**CUT, "stride": (1, 1), "dilation": (2, 2), "crop": ((0, 0),) * 2}, TRANSPOSED),
    "group_norm": ("group_norm", {"groups": 2, "eps": 0.25}, {"scale": (4,)}),
    "rms_norm": ("rms_norm", {"eps": 0.25}, {"scale": (4,)}),
    "lstm": ("lstm", {**GATES, "reverse": True}, LSTM),
    "gru": ("gru", {**GATES, "reverse": False, "reset_after": False}, GRU),
    "gru after": ("gru", {**GATES, "reverse": True, "reset_after": True}, BOTH_BIASES),
    "rnn": ("rnn", {"activation": "relu", "reverse": True}, {"kernel": (3, 2), "recurrent_kernel": (3, 3)}),
    "prelu": ("prelu", {}, {"slope": (3,)}),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_layer_is_built_and_described_alike(backend: Any, row: str) -> None:
    kind, settings, shapes = ROWS[row]
    model = backend.build_layer(kind, settings, shapes)
    (layer,) = backend.layers(model)
    assert layer.kind == kind
    assert {role: canonical_shape(layer, role) for role in layer.tensors} == shapes
    assert {name: layer.settings.get(name) for name in KINDS[kind].settings if name in settings} == settings


OPERATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("activation", {"function": "relu"}),
    "relu6": ("activation", {"function": "relu6"}),
    "clipped": ("activation", {"function": "relu", "high": 2.0, "threshold": 0.5}),
    "leaky": ("activation", {"function": "leaky_relu", "slope": 0.1}),
    "elu": ("activation", {"function": "elu", "alpha": 0.5}),
    "softmax": ("activation", {"function": "softmax", "axis": -1}),
    "hard_tanh": ("activation", {"function": "hard_tanh", "low": -1.0, "high": 1.0}),
    "hard_silu": ("activation", {"function": "hard_silu"}),
    "gelu": ("activation", {"function": "gelu"}),
    "gelu_tanh": ("activation", {"function": "gelu_tanh"}),
    "avg_pool": ("avg_pool", {**POOL, "padding": "same", "count_include_pad": False}),
    "max_pool": ("max_pool", {**POOL, "padding": ((0, 0), (0, 0)), "dilation": (1, 1)}),
    "same pairs": ("max_pool", {**POOL, "stride": (1, 1), "padding": ((1, 1), (0, 1)), "dilation": (1, 1)}),
    "dropout": ("dropout", {"rate": 0.25}),
}


@pytest.mark.parametrize("row", OPERATIONS)
def test_an_operation_is_built_described_and_watched(backend: Any, row: str) -> None:
    kind, settings = OPERATIONS[row]
    model = backend.build_layer(kind, settings, {})
    (layer,) = backend.operations(model)
    assert (layer.kind, layer.tensors, layer.name) == (kind, {}, model.layers[0].name)
    assert {name: value for name, value in layer.settings.items() if name != "channels"} == settings
    assert backend.layers(model) == []
    seen = []

    class Watch:
        def before(self, name: str, inputs: Any) -> None:
            seen.append(name)

        def after(self, name: str, output: Any) -> Any:
            return output + 1

    x = np.random.default_rng(0).normal(size=(2, 6, 5, 3) if "pool" in kind else (2, 6))
    np.testing.assert_allclose(backend.run(model, x, Watch()), backend.run(model, x) + 1)
    assert seen == [layer.name]


@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_a_model_of_query_key_and_value(backend: Any, key_heads: int, bias: bool) -> None:
    narrow, value = key_heads * 3, 7 if key_heads == 4 else 5
    shapes = {
        "query.kernel": (12, 5),
        "key.kernel": (narrow, 6),
        "value.kernel": (narrow, value),
        "output.kernel": (5, 12),
    }
    shapes |= {name.replace("kernel", "bias"): shape[:1] for name, shape in shapes.items() if bias}
    model = backend.build_layer("attention", {"heads": 4}, shapes)
    described = {layer.name.rpartition("/")[2]: layer for layer in backend.layers(model)}
    assert list(described) == ["query", "key", "value", "attention_output"]
    for name, layer in described.items():
        part = name.removeprefix("attention_")
        wanted = {role.partition(".")[2]: shape for role, shape in shapes.items() if role.startswith(part)}
        assert {role: canonical_shape(layer, role) for role in layer.tensors} == wanted
        assert layer.settings["heads"] == (key_heads if name in ("key", "value") else 4)
    rng = np.random.default_rng(0)
    sample = tuple(rng.normal(size=shape).astype(np.float32) for shape in ((2, 6, 5), (2, 4, 6), (2, 4, value)))
    assert backend.run(model, sample).shape == (2, 6, 5)


@pytest.mark.parametrize(
    ("kind", "settings", "shapes", "message"),
    [
        ("linear", {"heads": 3}, {"kernel": (4, 3)}, "4 features are not divided into 3 heads"),
        ("linear", {}, {"kernel.direction": (4, 3), "kernel.magnitude": (4, 1)}, "stand in its place"),
        ("conv_transpose", {**CUT, "crop": ((1, 0), (1, 0))}, TRANSPOSED, "put a Cropping layer behind one"),
        ("conv_transpose", {**CUT, "crop": ((0, 0),) * 2}, {"kernel": (2, 3, 4, 3, 3)}, "groups is 2"),
        ("lstm", {**GATES, "reverse": False}, {**LSTM, "recurrent_bias.input": (3,)}, "and none recurrent"),
        ("gru", {**GATES, "reverse": False, "reset_after": True}, GRU, "both for every gate, or none"),
        ("prelu", {}, {"slope": (1,)}, "one slope for all channels"),
        ("avg_pool", {**POOL, "padding": "same", "count_include_pad": True}, {}, "never count what was padded"),
        ("max_pool", {**POOL, "padding": ((1, 1), (0, 0))}, {}, "put a ZeroPadding layer before"),
        ("max_pool", {**POOL, "padding": "same", "ceil": True}, {}, "no ceil"),
        ("activation", {"function": "no such"}, {}, "Keras has no layer with the settings"),
        ("activation", {"function": "tanh", "low": 1.0}, {}, "Keras has no 'tanh' with"),
        ("group_norm", {"groups": 2, "eps": 0.1}, {}, "owns nothing that could be moved"),
    ],
)
def test_what_keras_lacks_is_refused(
    backend: Any, kind: str, settings: dict[str, Any], shapes: dict[str, Any], message: str
) -> None:
    with pytest.raises(cc.MappingError, match=message):
        backend.build_layer(kind, settings, shapes)


def test_attention_that_keras_lacks_is_refused(backend: Any) -> None:
    shapes = {"query.kernel": (12, 5), "key.kernel": (6, 6), "value.kernel": (8, 7), "output.kernel": (5, 16)}
    with pytest.raises(cc.MappingError, match="values of 8 beside keys of 6"):
        backend.build_layer("attention", {"heads": 4}, shapes)
    with pytest.raises(cc.MappingError, match="1 of the four projections"):
        backend.build_layer("attention", {"heads": 4}, {**shapes, "query.bias": (12,)})


def test_operations_of_a_model_are_listed_in_its_order(backend: Any) -> None:
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3),
            layers.Activation("silu", name="a"),
            layers.MaxPooling2D(name="p"),
            layers.Activation("linear"),
            layers.Dropout(0.1, name="d"),
            layers.Flatten(),
            layers.LeakyReLU(negative_slope=0.3, name="l"),
            layers.Activation("leaky_relu", name="k"),
        ]
    )
    assert [(layer.name, layer.kind) for layer in backend.operations(model)] == [
        ("a", "activation"),
        ("p", "max_pool"),
        ("d", "dropout"),
        ("l", "activation"),
        ("k", "activation"),
    ]
    assert [layer.settings["slope"] for layer in backend.operations(model)[-2:]] == [0.3, 0.2]
    assert len(backend.layers(model)) == 1
