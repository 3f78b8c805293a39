"""What one author takes from the framework and the other writes by hand: tables, norms; and outputs with names."""

import keras
import numpy as np
import pytest
import torch
from e2e_models import assert_proven_throughout, randomised
from torch import nn

import clipcore as cc

L = keras.layers
IDS = np.random.default_rng(1).integers(0, 11, (3, 5))


class TorchTable(nn.Module):
    """A table of its own, a norm of a class of its own."""

    def __init__(self):
        super().__init__()
        self.words, self.norm, self.out = nn.Parameter(torch.zeros(11, 6)), TorchNorm(), nn.Linear(6, 4)

    def forward(self, ids):
        return self.out(self.norm(self.words[ids]))


class TorchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return self.weight * centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-3) + self.bias


def torch_layers():
    return nn.Sequential(nn.Embedding(11, 6), nn.LayerNorm(6, eps=1e-3), nn.Linear(6, 4))


class KerasTable(keras.Model):
    def __init__(self):
        super().__init__()
        self.norm, self.out = L.LayerNormalization(epsilon=1e-3), L.Dense(4)

    def build(self, shape):
        self.words = self.add_weight(shape=(11, 6), name="words")
        self.norm.build((*shape, 6))
        self.out.build((*shape, 6))
        self.built = True

    def call(self, ids):
        return self.out(self.norm(keras.ops.take(self.words, ids, axis=0)))


def keras_table():
    model = KerasTable()
    model(IDS)
    return model


def keras_layers():
    inputs = keras.Input((5,), dtype="int64")
    return keras.Model(inputs, L.Dense(4)(L.LayerNormalization(epsilon=1e-3)(L.Embedding(11, 6)(inputs))))


MODELS = {"torch by hand": TorchTable, "torch": torch_layers, "Keras by hand": keras_table, "Keras": keras_layers}


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("torch by hand", "Keras"),
        ("Keras", "torch by hand"),
        ("torch", "Keras by hand"),
        ("Keras by hand", "torch"),
        ("torch by hand", "Keras by hand"),
    ],
)
def test_what_one_writes_by_hand_is_the_others_layer(source, target):
    models = randomised(MODELS[source](), 1), randomised(MODELS[target](), 2)
    if isinstance(models[0], nn.Module):
        models[0].eval()
    assert_proven_throughout(*models, IDS)


def test_another_computation_of_the_same_shapes_is_not_called_proven():
    class Affine(TorchNorm):
        def forward(self, x):
            return self.weight * x + self.bias

    source = randomised(nn.Sequential(nn.Embedding(11, 6), Affine(), nn.Linear(6, 4)), 1)
    plan = cc.plan(source, keras_layers(), sample=IDS)
    assert {row.evidence for row in plan.rows if row.source_layer == "1"} == {"structure"}


class Cache:
    """What a model gives beside tensors, of a class of its own."""


class Named(nn.Module):
    def __init__(self, **further):
        super().__init__()
        self.first, self.second, self.further = nn.Linear(6, 4), nn.Linear(4, 3), further

    def forward(self, x):
        hidden = self.first(x)
        named = {name: hidden if what == "hidden" else Cache() for name, what in self.further.items()}
        return {"scores": self.second(hidden), **named}


NAMED_SAMPLE = np.random.default_rng(1).standard_normal((3, 6)).astype(np.float32)


def test_an_output_that_one_model_gives_as_an_object_is_named_and_the_others_compared():
    source, target = randomised(Named(past="object"), 1), randomised(Named(past="hidden"), 2)
    cc.migrate(source, target, sample=NAMED_SAMPLE)
    check = cc.verify(source, target, sample=NAMED_SAMPLE)
    assert check.ok
    assert check.left_out == ("past",)
    assert "not compared, since one model gives no tensors for it: past" in str(check)
    target.second.bias.data += 1
    assert not cc.verify(source, target, sample=NAMED_SAMPLE).ok


def test_an_output_that_one_model_lacks_is_a_difference():
    source, target = randomised(Named(past="hidden"), 1), randomised(Named(), 1)
    check = cc.verify(source, target, sample=NAMED_SAMPLE)
    assert not check.ok
    assert "the source gives 2 outputs, the target 1" in check.reason


class Turned(nn.Module):
    """A linear layer with its kernel the other way round, as some authors write it."""

    def __init__(self, features, units):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(features, units)), nn.Parameter(torch.zeros(units))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Scaled(nn.Module):
    """A root mean square norm by hand, with an eps of its own."""

    def __init__(self, features):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(features))

    def forward(self, x):
        return x * torch.rsqrt((x**2).mean(-1, keepdim=True) + 1e-6) * self.gain


def test_a_layer_of_an_unknown_class_is_recognised_by_what_it_computes():
    # square kernels: no shape tells in which order their axes are
    source = randomised(nn.Sequential(Turned(6, 6), Scaled(6), Turned(6, 6), nn.ReLU(), Turned(6, 4)), 1)
    inputs = keras.Input((6,))
    x = L.Dense(6, name="a")(inputs)
    x = L.Dense(6, name="b", activation="relu")(L.RMSNormalization(epsilon=1e-6)(x))
    target = randomised(keras.Model(inputs, L.Dense(4, name="c")(x)), 2)
    plan = assert_proven_throughout(source, target, NAMED_SAMPLE)
    kernels = {row.target: row.pattern for row in plan.rows if row.role == "kernel"}
    assert kernels == {f"{name}/kernel": "in out -> in out" for name in "abc"}
    back = randomised(nn.Sequential(Turned(6, 6), Scaled(6), Turned(6, 6), nn.ReLU(), Turned(6, 4)), 3)
    assert_proven_throughout(target, back, NAMED_SAMPLE)


def test_a_recognised_layers_eps_is_a_difference_like_any_other():
    source = randomised(nn.Sequential(Turned(6, 6), Scaled(6), Turned(6, 4)), 1)
    inputs = keras.Input((6,))
    x = L.RMSNormalization(epsilon=0.1, name="norm")(L.Dense(6)(inputs))
    target = keras.Model(inputs, L.Dense(4)(x))
    cc.migrate(source, target, sample=NAMED_SAMPLE)
    check = cc.verify(source, target, sample=NAMED_SAMPLE, explain=True)
    assert [(d.layer, d.setting, d.source, d.target) for d in check.differences if d.tested] == [
        ("norm", "eps", 1e-6, 0.1)
    ]
