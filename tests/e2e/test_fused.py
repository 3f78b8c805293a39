"""Projections that one author fused and the other did not: query, key and value; a gate and what it gates."""

import keras
import numpy as np
import pytest
import torch
from e2e_models import assert_bitwise_equal, assert_proven_throughout, contents, randomised
from torch import nn

import clipcore as cc

L = keras.layers
ops = keras.ops
X = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)


class TorchBlock(nn.Module):
    """Causal attention with one projection for all three, and a gated feed-forward with one for both."""

    def __init__(self):
        super().__init__()
        self.project, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 32, bias=False), nn.Linear(16, 8)

    def forward(self, x):
        q, k, v = self.project(x).split(8, -1)
        x = x + self.out(torch.softmax(q @ k.mT / 8**0.5, -1) @ v)
        gate, value = self.up(x).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * value)


class TorchApart(nn.Module):
    def __init__(self):
        super().__init__()
        self.value, self.key, self.query, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.content, self.gate = (nn.Linear(8, 16, bias=False) for _ in range(2))
        self.down = nn.Linear(16, 8)

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        x = x + self.out(torch.softmax(q @ k.mT / 8**0.5, -1) @ v)
        return x + self.down(nn.functional.silu(self.gate(x)) * self.content(x))


def keras_block(*, is_fused):
    inputs = keras.Input((5, 8))
    if is_fused:
        q, k, v = ops.split(L.Dense(24, name="one")(inputs), 3, axis=-1)
    else:
        q, k, v = (L.Dense(8, name=name)(inputs) for name in ("a", "b", "c"))
    mixed = ops.matmul(ops.softmax(ops.matmul(q, ops.swapaxes(k, 1, 2)) / 8**0.5), v)
    x = inputs + L.Dense(8, name="d")(mixed)
    if is_fused:
        gate, value = ops.split(L.Dense(32, use_bias=False, name="two")(x), 2, axis=-1)
    else:
        gate, value = (L.Dense(16, use_bias=False, name=name)(x) for name in ("e", "f"))
    return keras.Model(inputs, x + L.Dense(8, name="g")(ops.silu(gate) * value))


MODELS = {
    "torch fused": TorchBlock,
    "torch": TorchApart,
    "Keras fused": lambda: keras_block(is_fused=True),
    "Keras": lambda: keras_block(is_fused=False),
}


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("torch fused", "Keras"),
        ("Keras", "torch fused"),
        ("torch", "Keras fused"),
        ("Keras fused", "torch"),
        ("torch fused", "Keras fused"),
    ],
)
def test_what_is_fused_is_taken_apart_where_the_other_has_it_one_by_one(source, target):
    models = randomised(MODELS[source](), 1), randomised(MODELS[target](), 2)
    before = contents(models[0])
    plan = assert_proven_throughout(*models, X)
    assert_bitwise_equal(before, contents(models[0]))
    check = cc.verify(*models, sample=X, plan=plan, explain=True)
    fused = "fused" in source and "fused" in target
    assert len(check.steps) == (4 if fused else 7)


def test_the_parts_of_a_fused_layer_are_rows_of_one_tensor(tmp_path):
    plan = cc.plan(randomised(TorchApart(), 1), keras_block(is_fused=True), sample=X)
    kernel = next(row for row in plan.rows if row.target == "one/kernel")
    assert [part.terms[0].name for part in kernel.parts] == ["query.weight", "key.weight", "value.weight"]
    assert [part.into[1] for part in kernel.parts] == [(0, 8), (8, 16), (16, 24)]
    plan.save(tmp_path / "plan.json")
    assert cc.Plan.load(tmp_path / "plan.json") == plan
