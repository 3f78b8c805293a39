"""Plans of which something is left out, plans that take proof alone, and models that nothing can be proven of."""

import keras
import numpy as np
import pytest
import torch
from e2e_models import assert_bitwise_equal, contents, randomised
from torch import nn

import clipcore as cc

L = keras.layers
SAMPLE = np.random.default_rng(1).standard_normal((4, 5)).astype("float32")


def source(classes=3):
    return randomised(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Linear(7, classes)).eval(), 1)


def target(classes=3, *further):
    inputs = keras.Input((5,))
    hidden = L.Dense(7, name="second")(L.Dense(6, activation="tanh", name="first")(inputs))
    return keras.Model(inputs, L.Dense(classes, name="head")(hidden))


def test_another_head_is_refused_and_kept_on_request_with_what_is_left_out_listed():
    ours, theirs = source(3), target(4)
    with pytest.raises(cc.MappingError, match=r"'head'.*no counterpart.*2 of the target's 3 layers had one before it"):
        cc.plan(ours, theirs, sample=SAMPLE)
    head = [np.array(value) for value in theirs.get_layer("head").get_weights()]
    result = cc.migrate(ours, theirs, sample=SAMPLE, unmapped="keep")
    assert result.plan.kept == ("head/kernel", "head/bias")
    assert result.plan.unused == ("3.weight", "3.bias")
    assert {(row.source_layer, row.target_layer, row.evidence) for row in result.plan.rows} == {
        ("0", "first", "proven"),
        ("2", "second", "proven"),
    }
    assert_bitwise_equal(head, theirs.get_layer("head").get_weights())
    np.testing.assert_array_equal(theirs.get_layer("second").get_weights()[0], ours[2].weight.detach().numpy().T)
    check = cc.verify(ours, theirs, sample=SAMPLE, plan=result.plan)
    assert not check.ok
    assert "leaves 'head/kernel'" in check.reason
    assert "kept as it is: head/kernel" in str(result.plan)


def test_a_plan_that_keeps_tensors_is_read_as_it_was_saved(tmp_path):
    plan = cc.plan(source(3), target(4), sample=SAMPLE, unmapped="keep")
    plan.save(tmp_path / "plan.json")
    assert cc.Plan.load(tmp_path / "plan.json") == plan


def test_keep_leaves_nothing_out_where_all_belongs_together():
    plan = cc.plan(source(), target(), sample=SAMPLE, unmapped="keep", strict=True)
    assert not plan.kept
    assert not plan.unused


def test_another_word_for_unmapped_is_refused():
    with pytest.raises(cc.InvalidInput, match="unmapped is 'drop'; expected 'refuse', or 'keep'"):
        cc.plan(source(), target(), sample=SAMPLE, unmapped="drop")


def test_strict_refuses_what_a_name_settles_and_takes_rules():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.x, self.y = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x):
            return self.x(x) + self.y(x)

    inputs = keras.Input((5,))
    theirs = keras.Model(inputs, L.Add()([L.Dense(3, name=name)(inputs) for name in ("x", "y")]))
    ours = randomised(Towers().eval(), 1)
    assert {row.evidence for row in cc.plan(ours, theirs, sample=SAMPLE).rows} == {"name"}
    with pytest.raises(cc.MappingError, match=r"strict: 4 of 4 tensors.*'x/kernel' from 'x.weight'.*give rules="):
        cc.plan(ours, theirs, sample=SAMPLE, strict=True)
    rules = [("x", "x"), ("y", "y")]
    assert {row.evidence for row in cc.plan(ours, theirs, sample=SAMPLE, rules=rules, strict=True).rows} == {"given"}


class Dropping(nn.Module):
    """Dropout that ignores inference mode."""

    def forward(self, x):
        return nn.functional.dropout(x, 0.5, training=True)


def test_a_source_that_draws_random_numbers_is_refused_and_the_users_go_on():
    ours = randomised(nn.Sequential(nn.Linear(5, 6), Dropping(), nn.Linear(6, 3)).eval(), 1)
    inputs = keras.Input((5,))
    theirs = keras.Model(inputs, L.Dense(3, name="b")(L.Dense(6, name="a")(inputs)))
    before, state = contents(theirs), torch.get_rng_state()
    with pytest.raises(cc.MappingError, match=r"the source is not deterministic.*'2' takes other values"):
        cc.plan(ours, theirs, sample=SAMPLE)
    assert torch.equal(state, torch.get_rng_state())
    assert_bitwise_equal(before, contents(theirs))


class Noisy(L.Layer):
    """Dropout that ignores inference mode."""

    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(3)

    def call(self, x):
        return keras.random.dropout(x, 0.5, seed=self.seeds)


def test_a_target_that_draws_random_numbers_is_refused():
    ours = randomised(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)).eval(), 1)
    inputs = keras.Input((5,))
    hidden = Noisy()(L.Dense(6, name="a")(inputs))
    theirs = keras.Model(inputs, L.Dense(3, name="b")(hidden))
    before = contents(theirs)
    with pytest.raises(cc.MappingError, match=r"the target is not deterministic.*'b' takes other values"):
        cc.plan(ours, theirs, sample=SAMPLE)
    assert_bitwise_equal(before, contents(theirs))


class Noise(nn.Module):
    """Noise from NumPy's own generator."""

    def forward(self, x):
        return x + torch.from_numpy(np.random.randn(*x.shape).astype(np.float32))


def test_numpys_generator_goes_on_as_if_no_model_had_drawn_from_it():
    ours = randomised(nn.Sequential(nn.Linear(5, 6), Noise(), nn.Linear(6, 3)).eval(), 1)
    inputs = keras.Input((5,))
    theirs = keras.Model(inputs, L.Dense(3)(L.Dense(6)(inputs)))
    before = np.random.get_state()[1].tolist()
    with pytest.raises(cc.MappingError):
        cc.plan(ours, theirs, sample=SAMPLE)
    assert np.random.get_state()[1].tolist() == before


class Root(nn.Module):
    def forward(self, x):
        return x.sqrt()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(5, 6), Root(), nn.Linear(6, 3)), "first in what its layer '2' takes"),
        (nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), "first in what its layer '1' gives"),
    ],
)
def test_nan_on_the_way_is_refused_with_the_layer_where_it_starts(model, message):
    ours = randomised(model.eval(), 1)
    if isinstance(ours[1], nn.BatchNorm1d):
        ours[1].running_var.fill_(-1.0)
        ours[1].running_var[0] = -2.0
    inputs = keras.Input((5,))
    hidden = L.Dense(6)(inputs)
    if isinstance(ours[1], nn.BatchNorm1d):
        hidden = L.BatchNormalization()(hidden)
    with pytest.raises(cc.MappingError, match=message):
        cc.plan(ours, keras.Model(inputs, L.Dense(3)(hidden)), sample=SAMPLE)
