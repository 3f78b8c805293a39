"""Policies by the number of elements of a tensor, and by the units of its layer, as users call them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given

import clipcore as cc
from clipcore.backend import Backend
from clipcore.testing import checks
from clipcore.testing.conformance.test_primitives import bound, check
from clipcore.testing.strategies import DTYPES, Case, agc_cases, block_cases
from clipcore.testing.tensors import as_arrays, as_tensor, as_tensors

Array = np.ndarray[Any, np.dtype[Any]]


def clip(backend: Backend, case: Case) -> tuple[Any, cc.ClipReport]:
    params = None if case.params is None else as_tensors(backend, case.params)
    return cc.clip(as_tensors(backend, case.tensors), case.policy, params=params, backend=backend.name)


@given(case=block_cases())
def test_policies_by_size_equal_the_reference_in_every_bit(backend: Backend, case: Case) -> None:
    clipped, report = clip(backend, case)
    checks.assert_like_reference(as_arrays(backend, clipped), case.policy, case.tensors)
    checks.assert_norm(report.norm, checks.expected(case.policy, case.tensors)[1])


@given(case=block_cases())
def test_primitives_bound_by_size_within_one_ulp(backend: Backend, case: Case) -> None:
    check(backend, case)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [3, 5, 7, 12])
def test_equal_elements_at_the_threshold_of_their_rms_are_in_range(backend: Backend, dtype: str, size: int) -> None:
    for value in np.random.default_rng(size).uniform(1, 2, 20).astype(dtype):
        tensor = as_tensor(backend, np.full(size, value))
        clipped, report = cc.clip(tensor, cc.ClipByBlockRMS(float(value)), backend=backend.name)
        checks.assert_same_objects(clipped, tensor)
        assert not report.clipped


def test_the_average_norm_of_three_and_four_is_five_halves(backend: Backend) -> None:
    tensors = as_tensors(backend, [np.array([3.0, 4.0]), np.array([0.5])])
    clipped, _ = cc.clip(tensors, cc.ClipByAverageNorm(1.25), backend=backend.name)
    checks.assert_same_bits(as_arrays(backend, clipped), [np.array([1.5, 2.0]), np.array([0.5])])
    checks.assert_same_objects(clipped[1], tensors[1])


def ends(case: Case) -> list[list[Array]]:
    """What the reference makes of a case with limits that are a little lower and higher: weights' norms are rounded."""
    policies = [replace(case.policy, clipping=case.policy.clipping * (1 + s * checks.NORM_TOLERANCE)) for s in (-1, 1)]
    return [checks.expected(policy, case.tensors, case.params)[0] for policy in policies]


@given(case=agc_cases())
def test_adaptive_clip_equals_the_reference(backend: Backend, case: Case) -> None:
    clipped, report = clip(backend, case)
    checks.assert_between(as_arrays(backend, clipped), *ends(case))
    checks.assert_norm(report.norm, checks.expected(case.policy, case.tensors, case.params)[1])


@given(case=agc_cases())
def test_primitives_bound_units_within_one_ulp(backend: Backend, case: Case) -> None:
    bounded, _ = bound(backend, case)
    wanted, _ = checks.expected(case.policy, case.tensors, case.params)
    size = 1 + sum(t.size for t in case.tensors)
    # the weights' norms may lose subnormal numbers as well, and are multiplied by `clipping`
    room = size * checks.coarsest(checks.smallest_normal, case.tensors)
    checks.assert_close(bounded, wanted, relative=3e-14, absolute=room)


@given(case=agc_cases())
def test_adaptive_clip_does_not_modify_gradients_or_weights(backend: Backend, case: Case) -> None:
    tensors, params = as_tensors(backend, case.tensors), as_tensors(backend, case.params)
    cc.clip(tensors, case.policy, params=params, backend=backend.name)
    checks.assert_same_bits(as_arrays(backend, [tensors, params]), [*case.tensors, *(case.params or [])])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_within_its_weights_comes_back_as_the_same_tensor(backend: Backend, dtype: str) -> None:
    weights = np.arange(1, 7).reshape(2, 3).astype(dtype)
    tensor = as_tensor(backend, weights / np.asarray(256, dtype))
    policy = cc.AdaptiveClip(unit_axis=0)
    clipped, report = cc.clip(tensor, policy, params=as_tensor(backend, weights), backend=backend.name)
    checks.assert_same_objects(clipped, tensor)
    assert (float(report.scale), bool(report.clipped)) == (1.0, False)


def test_each_unit_is_held_to_its_own_weights(backend: Backend) -> None:
    grads = np.array([[3.0, 4.0], [0.0, 0.1]])
    weights = as_tensor(backend, np.array([[6.0, 8.0], [1.0, 0.0]]))
    policy = cc.AdaptiveClip(0.25, unit_axis=0)
    clipped, report = cc.clip(as_tensor(backend, grads), policy, params=weights, backend=backend.name)
    checks.assert_same_bits(as_arrays(backend, clipped), [np.array([[1.5, 2.0], [0.0, 0.1]])])
    assert (float(report.scale), float(report.limit)) == (0.5, 0.25)
    rows = cc.clip(
        as_tensor(backend, grads.T.copy()),
        replace(policy, unit_axis=1),
        params=as_tensor(backend, np.array([[6.0, 1.0], [8.0, 0.0]])),
        backend=backend.name,
    )[0]
    checks.assert_same_bits(as_arrays(backend, rows), [np.array([[1.5, 0.0], [2.0, 0.1]])])


def test_weights_of_zero_count_as_eps(backend: Backend) -> None:
    tensor, weights = as_tensor(backend, np.array([3.0, 4.0])), as_tensor(backend, np.zeros(2))
    clipped, _ = cc.clip(tensor, cc.AdaptiveClip(0.5, eps=5.0), params=weights, backend=backend.name)
    checks.assert_same_bits(as_arrays(backend, clipped), [np.array([1.5, 2.0])])


def test_excluded_parameters_are_left_as_they_are(backend: Backend) -> None:
    grads = {"head.weight": np.full(2, 9.0), "body.weight": np.array([3.0, 4.0])}
    tensors, ones = as_tensors(backend, grads), as_tensors(backend, {name: np.array([0.6, 0.8]) for name in grads})
    policy = cc.AdaptiveClip(2.5, exclude=("^head",))
    clipped, _ = cc.clip(tensors, policy, params=ones, backend=backend.name)
    checks.assert_same_objects(clipped["head.weight"], tensors["head.weight"])
    checks.assert_same_bits(as_arrays(backend, clipped["body.weight"]), [np.array([1.5, 2.0])])


def test_a_fault_in_an_excluded_parameter_acts_on_all(backend: Backend) -> None:
    grads = as_tensors(backend, {"head": np.array([math.nan, 1.0]), "body": np.array([3.0, 4.0])})
    policy = cc.AdaptiveClip(exclude=("head",))
    clipped, report = cc.clip(grads, policy, params=grads, backend=backend.name)
    assert all(np.isnan(array).all() for array in as_arrays(backend, clipped))
    assert int(report.nonfinite) == 1


def test_what_adaptive_clip_lacks_is_said(backend: Backend) -> None:
    matrix, vector = as_tensor(backend, np.ones((2, 3))), as_tensor(backend, np.ones(3))
    lacking = [
        (matrix, {}, cc.AdaptiveClip(unit_axis=0), "params="),
        (matrix, {"params": matrix}, cc.AdaptiveClip(), r"shape \(2, 3\).*model=.*unit_axis"),
        (matrix, {"params": matrix}, cc.AdaptiveClip(unit_axis=2), r"unit_axis is 2.*\(2, 3\)"),
        (vector, {"params": vector}, cc.AdaptiveClip(exclude=("bias",)), "by name.*model="),
        (matrix, {"params": vector}, cc.AdaptiveClip(unit_axis=0), r"\(2, 3\).*\(3,\)"),
        ([vector, vector], {"params": [vector]}, cc.AdaptiveClip(), "1 tensors.*2"),
    ]
    for tensors, beside, policy, words in lacking:
        with pytest.raises(cc.InvalidInput, match=words):
            cc.clip(tensors, policy, backend=backend.name, **beside)


def test_weights_in_a_dict_stand_beside_the_gradients_of_their_keys(backend: Backend) -> None:
    grads = as_tensors(backend, {"b": np.array([3.0, 4.0]), "a": np.array([3.0, 4.0])})
    params = as_tensors(backend, {"a": np.array([5.0, 0.0]), "b": np.array([100.0, 0.0])})
    clipped, _ = cc.clip(grads, cc.AdaptiveClip(0.5), params=params, backend=backend.name)
    checks.assert_same_objects(clipped["b"], grads["b"])
    checks.assert_same_bits(as_arrays(backend, clipped["a"]), [np.array([1.5, 2.0])])


def test_weights_by_other_keys_are_refused(backend: Backend) -> None:
    grads, params = (as_tensors(backend, {name: np.ones(2)}) for name in ("a", "b"))
    with pytest.raises(cc.InvalidInput, match=r"params\['a'\] or grads\['a'\] is missing"):
        cc.clip(grads, cc.AdaptiveClip(), params=params, backend=backend.name)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_unit_whose_norm_is_its_limit_is_in_range_in_whatever_order_it_is_summed(
    backend: Backend, dtype: str
) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        grads = rng.standard_normal((1, 999)).astype(dtype)
        params = as_tensor(backend, rng.permuted(grads, axis=1))
        tensor = as_tensor(backend, grads)
        clipped, report = cc.clip(tensor, cc.AdaptiveClip(1.0, unit_axis=0), params=params, backend=backend.name)
        checks.assert_same_objects(clipped, tensor)
        assert not bool(report.clipped)


def test_the_order_of_weights_changes_no_bit_of_their_gradients(backend: Backend) -> None:
    """The limit is half a unit off a factor of float32, so that the last digit of a norm would decide."""
    policy = cc.AdaptiveClip(0.5 + 2.0**-25, unit_axis=0)
    for seed in range(50):
        rng = np.random.default_rng(seed)
        grads = rng.standard_normal((1, 999)).astype(np.float32)
        one, other = (
            cc.clip(as_tensor(backend, grads), policy, params=as_tensor(backend, p), backend=backend.name)[0]
            for p in (grads, rng.permuted(grads, axis=1))
        )
        checks.assert_same_bits(as_arrays(backend, one), as_arrays(backend, other))


def test_a_layer_of_one_unit_and_units_of_one_weight_are_told_apart_by_the_axis(backend: Backend) -> None:
    row, column = np.array([[3.0, 4.0]]), np.array([[3.0], [4.0]])
    for array, axis, wanted in ((row, 0, [[1.5, 2.0]]), (row, 1, [[2.5, 2.5]]), (column, 0, [[2.5], [2.5]])):
        limited, _ = cc.clip(as_tensor(backend, array), cc.MaxNorm(2.5, unit_axis=axis), backend=backend.name)
        checks.assert_same_bits(as_arrays(backend, limited), [np.array(wanted)])
    with pytest.raises(cc.InvalidInput, match="unit_axis"):
        cc.clip(as_tensor(backend, row), cc.MaxNorm(2.5), backend=backend.name)
