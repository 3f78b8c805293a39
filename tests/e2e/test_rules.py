"""What the user says goes: rules by name and by pattern, and tensors that no call shows."""

import keras
import numpy as np
import pytest
import torch
from e2e_models import assert_proven_throughout, randomised
from torch import nn

import clipcore as cc

L = keras.layers
SAMPLE = np.random.default_rng(1).standard_normal((4, 5)).astype("float32")


class Towers(nn.Module):
    """Two branches that compute the same, so that nothing but a name or a rule tells them apart."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        return self.first(x) + self.second(x)


def keras_towers(*names):
    inputs = keras.Input((5,))
    return keras.Model(inputs, L.Add()([L.Dense(3, name=name)(inputs) for name in names]))


def test_a_rule_settles_what_nothing_tells_apart():
    source, target = randomised(Towers().eval(), 1), keras_towers("x", "y")
    with pytest.raises(cc.MappingError, match="possible origins"):
        cc.plan(source, target, sample=SAMPLE)
    plan = cc.plan(source, target, sample=SAMPLE, rules=[("second", "x"), ("first", "y")])
    assert {row.evidence for row in plan.rows} == {"given"}
    assert {(row.source_layer, row.target_layer) for row in plan.rows} == {("second", "x"), ("first", "y")}
    assert "a rule of yours" in plan.explain("x")
    cc.migrate(source, target, plan=plan)
    assert cc.verify(source, target, sample=SAMPLE, plan=plan).ok


def test_a_pattern_takes_groups_into_the_targets_name():
    source, target = randomised(Towers().eval(), 1), keras_towers("first_tower", "second_tower")
    plan = cc.plan(source, target, sample=SAMPLE, rules=[("(first|second)", r"\1_tower")])
    assert {(row.source_layer, row.target_layer, row.evidence) for row in plan.rows} == {
        ("first", "first_tower", "given"),
        ("second", "second_tower", "given"),
    }


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["first"], "expected \\(source, target\\)"),
        ("first=x", "expected a list of pairs"),
        ([("first", 1)], "expected texts"),
        ([("frist", "x")], "'frist' matches nothing in the source; near it are 'first'"),
        ([("first", "z")], "the target has no 'z'"),
        ([("fir(st", "x")], "neither a name nor a regular expression"),
        ([("(first)", r"\2")], "does not fit its pattern"),
        ([("first", "x"), ("second", "x")], "two rules name the target's 'x'"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(rules, message):
    with pytest.raises(cc.ClipcoreError, match=message):
        cc.plan(Towers().eval(), keras_towers("x", "y"), sample=SAMPLE, rules=rules)


def test_a_rule_for_another_layer_is_refused_with_both():
    source = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).eval()
    target = keras.Sequential([L.Input((5,)), L.Dense(4, name="a"), L.Dense(3, name="b")])
    with pytest.raises(cc.MappingError, match=r"'b' \(linear: kernel \(3, 4\).*\(linear: kernel \(4, 5\)"):
        cc.plan(source, target, sample=SAMPLE, rules=[("0", "b")])


def test_a_wrong_rule_is_obeyed_and_verify_says_so():
    source = randomised(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).eval(), 1)
    target = keras.Sequential([L.Input((5,)), L.Dense(5, activation="tanh", name="a"), L.Dense(5, name="b")])
    plan = cc.plan(source, target, sample=SAMPLE, rules=[("0", "b"), ("2", "a")])
    cc.migrate(source, target, plan=plan)
    assert not cc.verify(source, target, sample=SAMPLE, plan=plan).ok


def test_a_rule_for_a_tensor_may_say_how_it_is_rearranged():
    source = randomised(nn.Sequential(nn.Linear(5, 5, bias=False)).eval(), 1)
    target = keras.Sequential([L.Input((5,)), L.Dense(5, use_bias=False, name="a")])
    plan = cc.plan(source, target, sample=SAMPLE, rules=[("0.weight", "a/kernel", "x y -> x y")])
    cc.migrate(source, target, plan=plan)
    np.testing.assert_array_equal(target.get_layer("a").kernel.numpy(), source[0].weight.detach().numpy())


class Positions(nn.Module):
    """A bare parameter that is added to what flows."""

    def __init__(self, shape=(1, 5)):
        super().__init__()
        self.first, self.table, self.last = nn.Linear(5, 5), nn.Parameter(torch.zeros(shape)), nn.Linear(5, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)) + self.table)


class KerasPositions(keras.Model):
    """The same, its bare weight of another name and shape."""

    def __init__(self):
        super().__init__()
        self.one, self.two = L.Dense(5, activation="tanh"), L.Dense(2)
        self.offset = self.add_weight(shape=(5,), name="offset")

    def call(self, x):
        return self.two(self.one(x) + self.offset)


def test_a_bare_parameter_is_placed_by_its_shape_and_proven_by_what_is_computed_with_it():
    target = KerasPositions()
    target(SAMPLE)
    plan = assert_proven_throughout(randomised(Positions().eval(), 1), target, SAMPLE)
    (row,) = [row for row in plan.rows if row.target.endswith("offset")]
    assert row.sources == ("table",)
    assert_proven_throughout(randomised(target, 3), Positions().eval(), SAMPLE)


class Scales(nn.Module):
    """Bare parameters of one shape, in the order in which they are used."""

    def __init__(self, count=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))
        self.scales = nn.ParameterList(torch.ones(4) for _ in range(count))

    def forward(self, x):
        for layer, scale in zip(self.layers, self.scales, strict=True):
            x = x + torch.tanh(layer(x)) * scale
        return x


class KerasScales(keras.Model):
    """The same, with other names."""

    def __init__(self, count=3):
        super().__init__()
        self.steps = [L.Dense(4, activation="tanh") for _ in range(count)]
        self.gains = [self.add_weight(shape=(4,), name=f"gain_{letter}") for letter in "abcdefgh"[:count]]

    def call(self, x):
        for step, gain in zip(self.steps, self.gains, strict=True):
            x = x + step(x) * gain
        return x


def test_bare_parameters_of_one_shape_are_placed_in_order_and_proven():
    x = np.random.default_rng(1).standard_normal((3, 4)).astype("float32")
    source, target = randomised(Scales().eval(), 1), KerasScales()
    target(x)
    assert_proven_throughout(source, target, x)
