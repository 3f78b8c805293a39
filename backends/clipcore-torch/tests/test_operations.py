"""Layers without tensors: how they are described, built and watched."""

import math

import numpy as np
import pytest
import torch
from torch import nn

ACTIVATIONS = [
    (nn.ReLU(), {"function": "relu"}),
    (nn.ReLU(inplace=True), {"function": "relu"}),
    (nn.ReLU6(), {"function": "relu6"}),
    (nn.LeakyReLU(0.2), {"function": "leaky_relu", "slope": 0.2}),
    (nn.ELU(0.5), {"function": "elu", "alpha": 0.5}),
    (nn.SELU(), {"function": "selu"}),
    (nn.CELU(0.5), {"function": "celu", "alpha": 0.5}),
    (nn.GELU(), {"function": "gelu"}),
    (nn.GELU("tanh"), {"function": "gelu_tanh"}),
    (nn.SiLU(), {"function": "silu"}),
    (nn.Mish(), {"function": "mish"}),
    (nn.Sigmoid(), {"function": "sigmoid"}),
    (nn.Hardsigmoid(), {"function": "hard_sigmoid"}),
    (nn.Hardswish(), {"function": "hard_silu"}),
    (nn.Tanh(), {"function": "tanh"}),
    (nn.Hardtanh(-0.5, 2.0), {"function": "hard_tanh", "low": -0.5, "high": 2.0}),
    (nn.Softplus(), {"function": "softplus"}),
    (nn.Softsign(), {"function": "softsign"}),
    (nn.Softmax(1), {"function": "softmax", "axis": 1}),
    (nn.LogSoftmax(-1), {"function": "log_softmax", "axis": -1}),
    (nn.Threshold(0.3, -2.0), {"function": "threshold", "threshold": 0.3, "low": -2.0}),
]


def softmax(x, axis):
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def gelu_tanh(x):
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# once more, so that a name means one function here and in the reference
FORMULAS = {
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "leaky_relu": lambda x, slope: np.where(x > 0, x, slope * x),
    "elu": lambda x, alpha: np.where(x > 0, x, alpha * np.expm1(x)),
    "selu": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(x)),
    "celu": lambda x, alpha: np.where(x > 0, x, alpha * np.expm1(x / alpha)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_tanh": gelu_tanh,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "hard_sigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "hard_silu": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "tanh": np.tanh,
    "hard_tanh": lambda x, low, high: np.clip(x, low, high),
    "softplus": lambda x: np.log1p(np.exp(x)),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "softmax": softmax,
    "log_softmax": lambda x, axis: np.log(softmax(x, axis)),
    "threshold": lambda x, threshold, low: np.where(x > threshold, x, low),
}
POOLS = [
    (
        nn.AvgPool1d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        "avg_pool",
        {"window": (3,), "stride": (2,), "padding": ((1, 1),), "ceil": True, "count_include_pad": False},
    ),
    (
        nn.AvgPool2d((3, 2)),
        "avg_pool",
        {
            "window": (3, 2),
            "stride": (3, 2),
            "padding": ((0, 0), (0, 0)),
            "ceil": False,
            "count_include_pad": True,
        },
    ),
    (
        nn.AvgPool3d(2, (1, 2, 2), padding=1),
        "avg_pool",
        {
            "window": (2, 2, 2),
            "stride": (1, 2, 2),
            "padding": ((1, 1),) * 3,
            "ceil": False,
            "count_include_pad": True,
        },
    ),
    (
        nn.MaxPool1d(3, 2, 1, dilation=2),
        "max_pool",
        {"window": (3,), "stride": (2,), "padding": ((1, 1),), "dilation": (2,), "ceil": False},
    ),
    (
        nn.MaxPool2d((3, 2), (1, 2), (1, 0)),
        "max_pool",
        {"window": (3, 2), "stride": (1, 2), "padding": ((1, 1), (0, 0)), "dilation": (1, 1), "ceil": False},
    ),
    (
        nn.MaxPool3d(2, ceil_mode=True),
        "max_pool",
        {"window": (2,) * 3, "stride": (2,) * 3, "padding": ((0, 0),) * 3, "dilation": (1,) * 3, "ceil": True},
    ),
]
named = pytest.mark.parametrize(("module", "settings"), ACTIVATIONS, ids=str)


@named
def test_an_activation_is_described_by_its_function_and_numbers(backend, module, settings):
    (layer,) = backend.operations(nn.Sequential(module))
    assert (layer.name, layer.kind, layer.tensors, layer.settings) == ("0", "activation", {}, settings)
    assert backend.layers(nn.Sequential(module)) == []


@named
def test_an_activation_computes_the_function_of_its_name(backend, module, settings):
    numbers = {name: number for name, number in settings.items() if name != "function"}
    x = np.linspace(-5, 7, 40).reshape(2, 4, 5)
    wanted = FORMULAS[settings["function"]](x, **numbers)
    assert np.abs(backend.run(module, x.astype(np.float32)) - wanted).max() < 1e-5
    built = backend.build_layer("activation", settings, {})
    assert np.abs(backend.run(built, x.astype(np.float32)) - wanted).max() < 1e-5
    assert backend.operations(built)[0].settings == settings


@pytest.mark.parametrize(("module", "kind", "settings"), POOLS, ids=str)
def test_pooling_is_described_and_built(backend, module, kind, settings):
    (layer,) = backend.operations(module)
    assert (layer.name, layer.kind, layer.tensors) == ("", kind, {})
    assert layer.settings == {**settings, "channels": "first"}
    built = backend.build_layer(kind, layer.settings, {})
    assert backend.operations(built) == [layer]
    x = torch.randn(2, 3, *[7] * len(settings["window"]))
    assert np.array_equal(backend.run(built, x), backend.run(module, x))


def test_dropout_has_its_rate_and_does_nothing_in_inference(backend):
    (layer,) = backend.operations(nn.Dropout(0.3))
    assert (layer.kind, layer.settings) == ("dropout", {"rate": 0.3})
    built = backend.build_layer("dropout", layer.settings, {})
    assert backend.operations(built) == [layer]
    x = np.ones((2, 3), np.float32)
    assert np.array_equal(backend.run(built, x), x)


class Steep(nn.ReLU):
    def forward(self, x):
        return super().forward(2 * x)


@pytest.mark.parametrize(
    "module",
    [
        Steep(),
        nn.Softplus(beta=2),
        nn.Softplus(threshold=1),
        nn.Softmax(),
        nn.AvgPool2d(2, divisor_override=3),
        nn.MaxPool2d(2, return_indices=True),
        nn.Flatten(),
    ],
    ids=str,
)
def test_what_no_setting_says_is_no_operation(backend, module):
    assert backend.operations(nn.Sequential(module)) == []


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(2, 3, 3)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Dropout(), nn.Softmax(-1))

    def forward(self, x):
        return self.head(self.act(self.pool(self.act(self.conv(x)))))


class Record:
    def __init__(self, **outputs):
        self.calls, self.outputs = [], outputs

    def before(self, name, inputs):
        self.calls.append((name, inputs[0]))

    def after(self, name, output):
        self.calls.append((name, output))
        return self.outputs.get(name)


def test_operations_stand_in_the_order_of_the_model_and_apart_from_its_layers(backend):
    assert [layer.name for layer in backend.operations(Net())] == ["act", "pool", "head.2", "head.3"]
    assert [layer.name for layer in backend.layers(Net())] == ["conv", "head.1"]


def test_operations_are_watched_in_the_order_of_execution_and_replaced(backend):
    model, x, record = Net(), torch.randn(2, 2, 6, 6), Record()
    output = backend.run(model, x, record)
    assert np.array_equal(output, backend.run(model, x))
    names = [name for name, _ in record.calls[::2]]
    assert names == ["conv", "act", "pool", "act", "head.1", "head.2", "head.3"]
    (_, given), (_, made) = record.calls[2:4]
    assert (given < 0).any()
    assert np.array_equal(made, np.maximum(given, 0))
    fixed = np.full((2, 4), 0.5, np.float32)
    assert np.array_equal(backend.run(model, x, Record(**{"head.3": fixed})), fixed)
