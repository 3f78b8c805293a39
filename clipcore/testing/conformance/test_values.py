"""ClipByValue, as users call it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clipcore as cc
from clipcore.backend import Backend
from clipcore.testing import checks
from clipcore.testing.strategies import COMPLEX_DTYPES, REAL_DTYPES, Case, arrays, lists_of, structures, value_cases
from clipcore.testing.tensors import as_arrays, as_tensor, as_tensors


def clip(backend: Backend, tensors: Any, policy: cc.Policy) -> tuple[Any, cc.ClipReport]:
    return cc.clip(tensors, policy, backend=backend.name)


@given(case=value_cases())
def test_clip_by_value_equals_the_reference_in_every_bit(backend: Backend, case: Case) -> None:
    clipped, _ = clip(backend, as_tensors(backend, case.tensors), case.policy)
    checks.assert_same_bits(as_arrays(backend, clipped), checks.expected(case.policy, case.tensors)[0])


def test_elements_outside_the_range_take_its_bounds(backend: Backend) -> None:
    clipped, report = clip(backend, as_tensor(backend, np.array([-3.0, 0.2, 7.0])), cc.ClipByValue(-0.5, 2.0))
    checks.assert_same_bits(as_arrays(backend, clipped), [np.array([-0.5, 0.2, 2.0])])
    assert report.clipped


@given(case=value_cases())
def test_the_report_has_the_norm_before_clipping(backend: Backend, case: Case) -> None:
    _, report = clip(backend, as_tensors(backend, case.tensors), case.policy)
    checks.assert_norm(report.norm, checks.expected(case.policy, case.tensors)[1])
    assert int(report.nonfinite) == 0


@given(case=value_cases())
def test_values_in_range_come_back_as_the_same_tensors(backend: Backend, case: Case) -> None:
    tensors = as_tensors(backend, case.tensors)
    clipped, report = clip(backend, tensors, cc.ClipByValue(-math.inf, math.inf))
    checks.assert_same_objects(clipped, tensors)
    assert not report.clipped


@given(case=value_cases())
def test_clipping_by_value_twice_is_clipping_once(backend: Backend, case: Case) -> None:
    once, _ = clip(backend, as_tensors(backend, case.tensors), case.policy)
    twice, _ = clip(backend, once, case.policy)
    checks.assert_same_objects(twice, once)


@given(case=value_cases())
def test_clipping_by_value_does_not_modify_the_input(backend: Backend, case: Case) -> None:
    tensors = as_tensors(backend, case.tensors)
    clip(backend, tensors, case.policy)
    checks.assert_same_bits(as_arrays(backend, tensors), case.tensors)


@given(case=value_cases(grads=structures(arrays(st.sampled_from(REAL_DTYPES)))))
def test_clipping_by_value_keeps_the_structure_and_its_nones(backend: Backend, case: Case) -> None:
    clipped, _ = clip(backend, as_tensors(backend, case.grads), case.policy)
    checks.assert_same_structure(clipped, case.grads)


@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_infinities_are_clipped_to_the_bounds(backend: Backend, dtype: str) -> None:
    inputs = np.array([-math.inf, 1.0, math.inf], dtype)
    clipped, report = clip(backend, as_tensor(backend, inputs), cc.ClipByValue(2.0))
    checks.assert_same_bits(as_arrays(backend, clipped), [np.array([-2.0, 1.0, 2.0], dtype)])
    assert int(report.nonfinite) == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_finite_bound_beyond_the_range_of_a_dtype_is_its_largest_number(backend: Backend, dtype: str) -> None:
    inputs = np.array([-math.inf, math.inf], dtype)
    clipped, _ = clip(backend, as_tensor(backend, inputs), cc.ClipByValue(1e300))
    (result,) = as_arrays(backend, clipped)
    above = np.nextafter(result.astype(np.float64)[1], math.inf)
    assert np.isfinite(result).all()
    # one unit more is infinite in this dtype
    with np.errstate(over="ignore"):
        assert np.isinf(np.array(above * (1 + checks.epsilon(result))).astype(dtype))


@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_a_zero_in_range_keeps_its_sign(backend: Backend, dtype: str) -> None:
    zeros = np.array([-0.0, 0.0], dtype)
    for policy in (cc.ClipByValue(0.0, 1.0), cc.ClipByValue(-0.0, 0.0), cc.ClipByValue(-1.0, 0.0)):
        clipped, _ = clip(backend, as_tensor(backend, zeros), policy)
        checks.assert_same_bits(as_arrays(backend, clipped), [zeros])


@pytest.mark.parametrize("dtype", COMPLEX_DTYPES)
def test_complex_tensors_are_refused_by_value(backend: Backend, dtype: str) -> None:
    tensor = as_tensor(backend, np.ones(2, dtype))
    with pytest.raises(cc.InvalidInput, match=rf"grads\[0\].*{dtype}.*clip by a norm"):
        clip(backend, [tensor], cc.ClipByValue(1.0))


@given(grads=lists_of(arrays(st.sampled_from(REAL_DTYPES))), bound=st.floats(0, 1e4))
def test_every_element_lies_within_the_rounded_bounds(backend: Backend, grads: list[Any], bound: float) -> None:
    clipped, _ = clip(backend, as_tensors(backend, grads), cc.ClipByValue(bound))
    for result in as_arrays(backend, clipped):
        room = bound * (1 + checks.epsilon(result)) + checks.smallest_subnormal(result)
        assert (np.abs(result.astype(np.float64)) <= room).all()
