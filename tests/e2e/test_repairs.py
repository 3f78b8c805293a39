"""Differences that weights can make up for: exact in inference, rows that a reader understands, said plainly."""

import keras
import numpy as np
import pytest
import torch
from e2e_models import assert_bitwise_equal, assert_proven_throughout, contents, randomised
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import clipcore as cc

L = keras.layers
SAMPLE = np.random.default_rng(5).standard_normal((3, 2, 6, 7)).astype("float32")


def torch_network(bias=False, affine=True, eps=1e-5):
    layers = [nn.Conv2d(2, 4, 3, bias=bias), nn.BatchNorm2d(4, eps, affine=affine), nn.ReLU()]
    layers += [nn.Conv2d(4, 4, 2, groups=2, bias=bias), nn.BatchNorm2d(4, eps, affine=affine)]
    return nn.Sequential(*layers).eval()


def keras_network(bias=False, scale=True, center=True, eps=1e-3):
    def norm():
        return L.BatchNormalization(scale=scale, center=center, epsilon=eps)

    first, second = L.Conv2D(4, 3, use_bias=bias), L.Conv2D(4, 2, groups=2, use_bias=bias)
    return keras.Sequential([L.Input((6, 7, 2)), first, norm(), L.ReLU(), second, norm()])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(*[st.booleans()] * 5, *[st.sampled_from([1e-5, 1e-3, 0.1])] * 2, st.integers(0, 99))
def test_whatever_a_batch_norm_lacks_is_made_up_for(ours, affine, theirs, scale, center, eps, other_eps, seed):
    source = randomised(torch_network(ours, affine, eps), seed)
    target = randomised(keras_network(theirs, scale, center, other_eps), seed + 1)
    # a batch norm without scale on both sides has its variance alone to make up for another eps
    assume(affine or scale or eps >= other_eps)
    assert_proven_throughout(source, target, SAMPLE)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(*[st.booleans()] * 2, st.sampled_from([1e-5, 1e-3, 0.1]), st.sampled_from([1e-5, 0.1]), st.integers(0, 99))
def test_a_keras_batch_norm_moves_into_torchs_whatever_it_lacks(ours, center, eps, other_eps, seed):
    source = randomised(keras_network(ours, True, center, eps), seed)
    target = randomised(torch_network(ours, True, other_eps), seed + 1)
    assert_proven_throughout(source, target, np.moveaxis(SAMPLE, 1, -1).copy())


def test_another_epsilon_by_hand():
    source, target = (
        nn.Sequential(nn.BatchNorm2d(2, eps=1.0)).eval(),
        keras.Sequential([L.Input((6, 7, 2)), L.BatchNormalization(epsilon=4.0, name="norm")]),
    )
    randomised(source, 1)
    source[0].running_var.copy_(torch.tensor([3.0, 8.0]))
    cc.migrate(source, target, sample=SAMPLE)
    scale = source[0].weight.detach().numpy().astype(np.float64) * np.sqrt([7 / 4, 12 / 9])
    np.testing.assert_array_equal(target.get_layer("norm").gamma.numpy(), scale.astype(np.float32))


def test_a_repair_says_what_it_does_and_what_differs_in_training():
    source, target = randomised(torch_network(bias=True), 1), keras_network()
    plan = cc.plan(source, target, sample=SAMPLE)
    mended = {d.setting: d for d in plan.differences if d.repaired}
    assert set(mended) == {"eps", "bias"}
    assert "running mean" in mended["bias"].repair
    assert all("in training" in d.repair for d in mended.values())
    assert "sqrt((1.running_var + 0.001) / (1.running_var + 1e-05))" in str(plan)
    assert "one way" in str(plan)


def test_a_plan_with_repairs_is_saved_and_applied_to_other_weights(tmp_path):
    source, target = randomised(torch_network(bias=True), 1), keras_network(scale=False, center=False)
    cc.plan(source, target, sample=SAMPLE).save(tmp_path / "plan.json")
    plan = cc.Plan.load(tmp_path / "plan.json")
    other = randomised(torch_network(bias=True), 2)
    cc.migrate(other, target, plan=plan)
    assert cc.verify(other, target, sample=SAMPLE, plan=plan).ok


def test_a_scale_of_zero_that_leaves_a_bias_is_refused_where_the_target_has_no_bias():
    source, target = randomised(torch_network(), 1), keras_network(center=False)
    plan = cc.plan(source, target, sample=SAMPLE)
    with torch.no_grad():
        source[1].weight[1] = 0
    before = contents(target)
    with pytest.raises(cc.MappingError, match="a scale of 0"):
        cc.migrate(source, target, plan=plan)
    assert_bitwise_equal(before, contents(target))


def test_a_bias_without_a_batch_norm_behind_it_is_a_difference_and_named():
    source = randomised(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval(), 1)
    target = keras.Sequential([L.Input((4,)), L.Dense(3, activation="relu", use_bias=False, name="first"), L.Dense(2)])
    x = np.random.default_rng(0).standard_normal((5, 4)).astype("float32")
    plan = cc.plan(source, target, sample=x)
    (difference,) = plan.differences
    assert (difference.layer, difference.setting, difference.repaired) == ("first", "bias", False)
    cc.migrate(source, target, plan=plan)
    check = cc.verify(source, target, sample=x, plan=plan)
    assert not check.ok
    assert check.first_divergence.layer == "first"
    assert "bias" in check.first_divergence.reason


class Branching(nn.Module):
    """A convolution whose result flows on beside the batch norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        x = self.conv(x)
        return self.last(x), self.norm(x)


def test_a_bias_that_something_else_takes_as_well_is_not_folded_away():
    source = randomised(Branching().eval(), 1)
    inputs = keras.Input((6, 7, 2))
    x = L.Conv2D(2, 1, use_bias=False, name="conv")(inputs)
    target = keras.Model(inputs, [L.Conv2D(2, 1)(x), L.BatchNormalization(epsilon=1e-5)(x)])
    plan = cc.plan(source, target, sample=SAMPLE)
    (bias,) = [d for d in plan.differences if d.setting == "bias"]
    assert not bias.repaired


class Residual(nn.Module):
    """Two convolutions, to whose results what a batch norm makes of them is added: the second hides the first."""

    def __init__(self, bias=True, affine=True):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 1, bias=bias), nn.BatchNorm2d(4, affine=affine)
        self.plain, self.then = nn.Conv2d(4, 4, 1, bias=bias), nn.BatchNorm2d(4, affine=affine)

    def forward(self, x):
        x = self.conv(x)
        return self.then(self.plain(self.norm(x) + x))


@pytest.mark.parametrize("lacking", [{"bias": False}, {"affine": False}])
def test_a_result_that_is_added_to_what_the_batch_norm_makes_of_it_is_left_alone(lacking):
    source, target = randomised(Residual().eval(), 1), Residual(**lacking).eval()
    before = contents(source)
    plan = cc.plan(source, target, sample=SAMPLE)
    assert_bitwise_equal(before, contents(source))
    setting, first, second = ("bias", "conv", "plain") if "bias" in lacking else ("scale", "norm", "then")
    assert {d.layer: d.repaired for d in plan.differences if d.setting == setting} == {first: False, second: True}
    cc.migrate(source, target, plan=plan)
    assert not cc.verify(source, target, sample=SAMPLE, plan=plan).ok


@pytest.mark.parametrize("lacking", ["bias", "scale"])
def test_nothing_is_moved_through_an_activation_that_a_layer_has_fused_in(lacking):
    def network(bias=True, scale=True):
        dense = L.Dense(4, activation="relu", use_bias=bias)
        return keras.Sequential([L.Input((5,)), dense, L.BatchNormalization(scale=scale), L.Dense(2)])

    x = np.random.default_rng(0).standard_normal((7, 5)).astype("float32")
    plan = cc.plan(randomised(network(), 1), network(bias=lacking != "bias", scale=lacking != "scale"), sample=x)
    (difference,) = plan.differences
    assert (difference.setting, difference.repaired) == (lacking, False)
    assert all(row.reversible for row in plan.rows)


def test_the_scale_of_a_batch_norm_is_not_multiplied_into_the_rows_of_a_table():
    def network(scale):
        table = L.Embedding(4, 4)  # as many rows as columns
        return keras.Sequential([L.Input((6,), dtype="int32"), table, L.BatchNormalization(scale=scale), L.Dense(2)])

    x = np.random.default_rng(0).integers(0, 4, (3, 6))
    plan = cc.plan(randomised(network(True), 1), network(False), sample=x)
    (difference,) = plan.differences
    assert (difference.setting, difference.repaired) == ("scale", False)
    assert all(row.reversible for row in plan.rows)


def test_momentum_is_told_in_torchs_convention_and_acts_in_training_alone():
    source, target = randomised(torch_network(), 1), keras_network(eps=1e-5)
    plan = cc.plan(source, target, sample=SAMPLE)
    assert {(d.setting, d.source, d.target) for d in plan.differences} == {("momentum", 0.1, 0.01)}
