"""Policies made of policies: Chain and PerGroup are their members, one after the other or side by side."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clipcore as cc
from clipcore.backend import Backend
from clipcore.clipping.policies import policy_from_config
from clipcore.testing import checks
from clipcore.testing.strategies import REAL_DTYPES, Run, arrays, lists_of, runs
from clipcore.testing.tensors import as_arrays, as_tensors

Array = np.ndarray[Any, np.dtype[Any]]

NAMES = ["a.bias", "a.weight", "b.bias", "b.weight"]
MEMBERS: list[cc.Policy] = [
    cc.ClipByValue(2.0),
    cc.ClipByNorm(1.5),
    cc.ClipByGlobalNorm(1.0),
    cc.ClipByAverageNorm(0.5),
    cc.ClipByBlockRMS(0.5),
]

members = st.lists(st.sampled_from(MEMBERS), min_size=1, max_size=3)
real = arrays(st.sampled_from(REAL_DTYPES))


@given(grads=lists_of(real), policies=members)
def test_a_chain_is_its_policies_one_after_the_other(
    backend: Backend, grads: list[Array], policies: list[cc.Policy]
) -> None:
    clipped, report = cc.clip(as_tensors(backend, grads), cc.Chain(policies), backend=backend.name)
    wanted = grads
    for policy in policies:
        wanted, _ = checks.expected(policy, wanted)
    checks.assert_same_bits(as_arrays(backend, clipped), wanted)
    checks.assert_norm(report.norm, checks.expected(policies[0], grads)[1])
    assert len(report.norms) == len(policies)


@given(grads=st.fixed_dictionaries(dict.fromkeys(NAMES, real)), policies=st.tuples(*[st.sampled_from(MEMBERS)] * 2))
def test_each_group_is_bounded_by_its_own_policy(
    backend: Backend, grads: dict[str, Array], policies: tuple[cc.Policy, cc.Policy]
) -> None:
    first, second = policies
    policy = cc.PerGroup({"bias$": first}, default=second)
    clipped, report = cc.clip(as_tensors(backend, grads), policy, backend=backend.name)
    for names, member in ((["a.bias", "b.bias"], first), (["a.weight", "b.weight"], second)):
        wanted, _ = checks.expected(member, [grads[name] for name in names])
        checks.assert_same_bits(as_arrays(backend, [clipped[name] for name in names]), wanted)
    checks.assert_norm(report.norm, checks.expected(cc.ClipByGlobalNorm(math.inf), list(grads.values()))[1])


def test_the_first_pattern_that_is_found_decides(backend: Backend) -> None:
    grads = {"a.weight": np.array([8.0]), "b.weight": np.array([8.0]), "b.bias": np.array([8.0])}
    policy = cc.PerGroup({"^a": cc.ClipByNorm(1.0), "weight": cc.ClipByNorm(2.0)})
    tensors = as_tensors(backend, grads)
    clipped, _ = cc.clip(tensors, policy, backend=backend.name)
    checks.assert_same_bits(as_arrays(backend, clipped), [np.array([1.0]), np.array([2.0]), np.array([8.0])])
    checks.assert_same_objects(clipped["b.bias"], tensors["b.bias"])


def test_in_range_of_every_member_the_same_tensors_come_back(backend: Backend) -> None:
    tensors = as_tensors(backend, {name: np.array([0.1, 0.2]) for name in NAMES})
    for policy in (cc.Chain(MEMBERS), cc.PerGroup({"bias": MEMBERS[0]}, default=cc.Chain(MEMBERS[1:]))):
        clipped, report = cc.clip(tensors, policy, backend=backend.name)
        checks.assert_same_objects(clipped, tensors)
        assert (float(report.scale), bool(report.clipped)) == (1.0, False)


@pytest.mark.parametrize("mode", ["propagate", "zero", "skip", "raise"])
def test_a_fault_in_one_group_acts_on_all(backend: Backend, mode: Any) -> None:
    grads = {"a.bias": np.array([math.nan, 8.0]), "a.weight": np.array([3.0, 4.0]), "other": np.array([5.0])}
    policy = cc.PerGroup(
        {"bias": cc.ClipByNorm(2.0, nonfinite=mode), "weight": cc.ClipByNorm(2.5, nonfinite=mode)},
    )
    tensors = as_tensors(backend, grads)
    if mode == "raise":
        with pytest.raises(cc.NonFinite, match=r"first in grads\['a.bias'\]"):
            cc.clip(tensors, policy, backend=backend.name)
    else:
        clipped, report = cc.clip(tensors, policy, backend=backend.name)
        value = math.nan if mode == "propagate" else 0.0
        wanted = [np.full(2, value), np.full(2, value), np.full(1, value)]
        if mode == "zero":
            wanted = [np.array([0.0, 2.0]), np.array([1.5, 2.0]), np.array([5.0])]
        checks.assert_same_bits(as_arrays(backend, clipped), wanted)
        assert int(report.nonfinite) == 1
    checks.assert_same_bits(as_arrays(backend, tensors), list(grads.values()))


@pytest.mark.parametrize("mode", ["propagate", "zero", "skip"])
@given(grads=lists_of(arrays(st.sampled_from(REAL_DTYPES), nonfinite=True)))
def test_a_chain_treats_faults_as_one_policy_does(backend: Backend, mode: Any, grads: list[Array]) -> None:
    policy = cc.ClipByNorm(1.0, nonfinite=mode)
    alone, chained = (
        cc.clip(as_tensors(backend, grads), each, backend=backend.name) for each in (policy, cc.Chain([policy, policy]))
    )
    assert int(chained[1].nonfinite) == int(alone[1].nonfinite)
    if int(alone[1].nonfinite) and mode != "zero":
        checks.assert_same_bits(as_arrays(backend, chained[0]), as_arrays(backend, alone[0]))


@given(run=runs([cc.AutoClip, cc.ZClip, cc.AdaGC], nonfinite="skip"), data=st.data())
def test_states_of_members_are_kept_apart_and_resume(backend: Backend, run: Run, data: st.DataObject) -> None:
    """A chain with a policy that changes nothing, and a group of all, learn what the policy alone learns."""
    policy, open_ = run.policy, cc.ClipByNorm(math.inf, nonfinite="skip")
    combined = [cc.Chain([open_, policy]), cc.PerGroup({"": policy}), cc.Chain([cc.PerGroup({"w": policy}), open_])]
    for each in combined:
        stop = data.draw(st.integers(0, len(run.steps) - 1))
        alone, whole = (cc.Clipper(p, backend=backend.name) for p in (policy, each))
        for place, step in enumerate(run.steps):
            if place == stop:
                state = whole.state_dict()
                whole = cc.Clipper(each, backend=backend.name)
                whole.load_state_dict(state)
            tensors = as_tensors(backend, {f"w{index}": array for index, array in enumerate(step)})
            actual, wanted = (as_arrays(backend, clipper.clip(tensors)[0]) for clipper in (whole, alone))
            checks.assert_same_bits(actual, wanted)


def test_a_fault_anywhere_keeps_the_states_of_all_members(backend: Backend) -> None:
    policy = cc.PerGroup({"a": cc.ZClip(), "b": cc.AutoClip()})
    clipper = cc.Clipper(policy, backend=backend.name)
    clipper.clip(as_tensors(backend, {"a": np.ones(2), "b": np.ones(2)}))
    before = clipper.state_dict()
    clipper.clip(as_tensors(backend, {"a": np.array([2.0, math.nan]), "b": np.full(2, 3.0)}))
    after = clipper.state_dict()
    assert list(after) == list(before)
    checks.assert_same_bits(list(after.values()), list(before.values()))


def test_a_pattern_that_is_found_nowhere_is_refused_with_the_names(backend: Backend) -> None:
    grads = as_tensors(backend, {"a.weight": np.ones(2), "a.bias": np.ones(2)})
    policy = cc.PerGroup({"bias": cc.ClipByNorm(1.0), "wieght": cc.ClipByNorm(1.0)})
    with pytest.raises(cc.InvalidInput, match=r"'wieght'.*'a\.weight', 'a\.bias'"):
        cc.clip(grads, policy, backend=backend.name)


def test_groups_need_names(backend: Backend) -> None:
    with pytest.raises(cc.InvalidInput, match=r"by name.*model="):
        cc.clip(as_tensors(backend, [np.ones(2)]), cc.PerGroup({"a": cc.ClipByNorm(1.0)}), backend=backend.name)


def test_members_that_learn_are_refused_in_one_call_alone(backend: Backend) -> None:
    for policy in (cc.Chain([cc.AutoClip()]), cc.PerGroup({"": cc.AutoClip()})):
        with pytest.raises(cc.InvalidInput, match="learns"):
            cc.clip(as_tensors(backend, {"a": np.ones(2)}), policy, backend=backend.name)


def test_a_member_that_needs_weights_says_so(backend: Backend) -> None:
    grads = as_tensors(backend, {"a": np.array([3.0, 4.0]), "b": np.array([3.0, 4.0])})
    policy = cc.PerGroup({"a": cc.AdaptiveClip(0.5)}, default=cc.ClipByNorm(2.5))
    with pytest.raises(cc.InvalidInput, match="params="):
        cc.clip(grads, policy, backend=backend.name)
    clipped, _ = cc.clip(grads, policy, params=grads, backend=backend.name)
    checks.assert_same_bits(as_arrays(backend, clipped), [np.array([1.5, 2.0])] * 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: cc.Chain([]),
        lambda: cc.PerGroup({}),
        lambda: cc.Chain([cc.ClipByNorm(1.0), cc.ClipByNorm(1.0, nonfinite="skip")]),
        lambda: cc.PerGroup({"(": cc.ClipByNorm(1.0)}),
        lambda: cc.Chain(cast(Any, [1.0])),
    ],
)
def test_combinations_that_mean_nothing_are_refused(make: Any) -> None:
    with pytest.raises(cc.InvalidPolicy):
        make()


@given(run=runs([cc.AutoClip, cc.ZClip, cc.AdaGC], faults=False))
def test_a_policy_survives_its_configuration(run: Run) -> None:
    for policy in (run.policy, cc.Chain([run.policy]), cc.PerGroup({"a": run.policy}, default=run.policy)):
        assert policy_from_config(policy.to_config()) == policy
    assert replace(run.policy) == run.policy
