"""A policy is a frozen value that refuses meaningless arguments as it is made."""

import dataclasses
import math
import pickle

import numpy as np
import pytest

import clipcore as cc
from clipcore.clipping.policies import policy_from_config

POLICIES = [
    cc.ClipByValue(0.5),
    cc.ClipByValue(-1.0, 2.0, nonfinite="zero"),
    cc.ClipByNorm(1.0, p=3),
    cc.ClipByGlobalNorm(2, nonfinite="skip"),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_policy_survives_pickling_and_its_config_and_is_hashable(policy):
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert policy_from_config(policy.to_config()) == policy
    assert hash(policy) == hash(dataclasses.replace(policy))


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_policy_is_frozen(policy):
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.nonfinite = "raise"


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: cc.ClipByNorm(-1.0), "max_norm is -1.0"),
        (lambda: cc.ClipByNorm(math.nan), "max_norm is nan"),
        (lambda: cc.ClipByNorm("one"), "max_norm is 'one'"),
        (lambda: cc.ClipByNorm(None), "max_norm is None"),
        (lambda: cc.ClipByGlobalNorm(1.0, p=0.9), "p is 0.9"),
        (lambda: cc.ClipByGlobalNorm(1.0, p=math.nan), "p is nan"),
        (lambda: cc.ClipByValue(-0.5), "min_value is -0.5"),
        (lambda: cc.ClipByValue(2.0, 1.0), "max_value is 1.0"),
        (lambda: cc.ClipByValue(math.nan, 1.0), "min_value is nan"),
        (lambda: cc.ClipByNorm(1.0, nonfinite="ignore"), "nonfinite is 'ignore'"),
        (lambda: cc.ClipByNorm(1.0, nonfinite=np.array([1, 2])), "nonfinite is array([1, 2])"),
        (lambda: cc.ClipByNorm(1.0, nonfinite=["skip"]), "nonfinite is ['skip']"),
    ],
)
def test_a_meaningless_argument_is_refused_with_its_name_and_value(make, named):
    with pytest.raises(cc.InvalidPolicy) as caught:
        make()
    assert named in str(caught.value)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [{}, {"policy": "ClipByNothing"}, {"policy": "ClipByNorm"}, {"policy": "ClipByNorm", "max_norm": 1, "x": 2}],
)
def test_a_config_of_no_policy_is_refused(config):
    with pytest.raises(cc.InvalidPolicy):
        policy_from_config(config)


def test_one_bound_alone_is_symmetric():
    assert cc.ClipByValue(0.5) == cc.ClipByValue(-0.5, 0.5)
    assert cc.ClipByValue(math.inf) == cc.ClipByValue(-math.inf, math.inf)


@pytest.mark.parametrize(
    "make",
    [
        lambda: cc.ZClip(1e200),
        lambda: cc.ZClip(eps=math.inf),
        lambda: cc.AdaGC(ratio=math.inf),
        lambda: cc.AdaptiveClip(eps=math.inf),
        lambda: cc.AdaptiveClip(exclude=5),
        lambda: cc.AdaptiveClip(unit_axis=0.5),
        lambda: cc.MaxNorm(1.0, unit_axis="x"),
        lambda: cc.SpectralLimit(1.0, unit_axis=(0,)),
        lambda: cc.QuantileClip(1.0, learning_rate=math.inf),
        lambda: cc.Chain(cc.ClipByNorm(1.0)),
        lambda: cc.PerGroup(None),
        lambda: cc.PerGroup({b"a": cc.ClipByNorm(1.0)}),
        lambda: cc.PerGroup({"a": cc.PerExampleClip(1.0)}),
        lambda: cc.PerGroup({"a": cc.PerExampleClip(1.0)}, default=cc.ClipByNorm(1.0)),
    ],
)
def test_arguments_that_mean_nothing_are_refused_at_construction(make):
    with pytest.raises(cc.InvalidPolicy, match=r"expected|no regular expression"):
        make()
