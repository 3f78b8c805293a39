"""Limits on weights, as users call them: MaxNorm, MinMaxNorm, UnitNorm, SpectralLimit and Box."""

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
from clipcore.testing.conformance.test_primitives import bound, check_hard, flushed
from clipcore.testing.strategies import (
    DTYPES,
    Case,
    max_norm_cases,
    min_max_cases,
    spectral_cases,
    unit_axes,
    value_cases,
)
from clipcore.testing.tensors import as_arrays, as_tensor, as_tensors

Array = np.ndarray[Any, np.dtype[Any]]


def limit(backend: Backend, case: Case) -> tuple[list[Array], cc.ClipReport]:
    limited, report = cc.clip(as_tensors(backend, case.tensors), case.policy, backend=backend.name)
    return as_arrays(backend, limited), report


def units(arrays: list[Array], axis: int | None) -> list[Array]:
    """The units of those that have any."""
    return [
        unit
        for array, axes in zip(arrays, unit_axes(arrays, axis), strict=True)
        if axes
        for unit in np.moveaxis(array, axes[0], 0)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_max_norm_equals_the_reference_in_every_bit(backend: Backend, dtype: str, data: st.DataObject) -> None:
    case = data.draw(max_norm_cases(dtype=st.just(dtype)))
    limited, report = limit(backend, case)
    checks.assert_like_reference(limited, case.policy, case.tensors)
    checks.assert_norm(report.norm, checks.expected(case.policy, case.tensors)[1])


@given(case=max_norm_cases())
def test_max_norm_is_never_exceeded_by_what_is_stored(backend: Backend, case: Case) -> None:
    for unit in units(limit(backend, case)[0], case.policy.unit_axis):
        checks.assert_within([unit], case.policy.max_norm)


@given(case=max_norm_cases())
def test_max_norm_twice_is_max_norm_once(backend: Backend, case: Case) -> None:
    once, _ = cc.clip(as_tensors(backend, case.tensors), case.policy, backend=backend.name)
    checks.assert_same_objects(cc.clip(once, case.policy, backend=backend.name)[0], once)


@given(case=max_norm_cases())
def test_primitives_keep_max_norm_and_are_near_the_largest(backend: Backend, case: Case) -> None:
    results, _ = bound(backend, case)
    wanted, _ = checks.expected(case.policy, case.tensors)
    parts = (units(arrays, case.policy.unit_axis) for arrays in (results, case.tensors, wanted))
    for result, before, exact in zip(*parts, strict=True):
        check_hard([result], [before], [exact], case.policy.max_norm, flushed(case))


def test_no_larger_factor_would_keep_a_unit_of_subnormal_numbers_in_bounds(backend: Backend) -> None:
    """Those of three units round down to two under any factor below 5/6, and leave room for the others to be larger."""
    tiny = 2.0**-149
    weights = np.array([[3.0] * 90 + [400.0] * 2, [0.0] * 92], np.float32) * np.float32(tiny)
    norm = checks.expected(cc.ClipByGlobalNorm(math.inf), [weights])[1]
    case = Case([weights], [weights], cc.MaxNorm(0.8 * norm, unit_axis=0))
    checks.assert_like_reference(limit(backend, case)[0], case.policy, case.tensors)


@given(case=min_max_cases())
def test_scaling_into_a_range_equals_the_reference(backend: Backend, case: Case) -> None:
    limited, report = limit(backend, case)
    checks.assert_like_reference(limited, case.policy, case.tensors)
    checks.assert_norm(report.norm, checks.expected(case.policy, case.tensors)[1])


def test_units_below_and_above_the_range_are_scaled_into_it(backend: Backend) -> None:
    weights = [np.array([[3.0, 4.0], [0.0, 0.5], [0.0, 0.0], [0.0, 2.0]])]
    limited, report = limit(backend, Case(weights, weights, cc.MinMaxNorm(1.0, 2.5, unit_axis=0)))
    checks.assert_same_bits(limited, [np.array([[1.5, 2.0], [0.0, 1.0], [0.0, 0.0], [0.0, 2.0]])])
    assert bool(report.clipped)


@given(case=min_max_cases())
def test_primitives_scale_into_a_range_within_one_ulp(backend: Backend, case: Case) -> None:
    # what is flushed to zero is not scaled up, so that units of such numbers are of no concern
    normal = [np.where(np.abs(t) < 1e-3, np.zeros_like(t), t).astype(t.dtype) for t in case.tensors]
    case = Case(normal, normal, case.policy)
    wanted, _ = checks.expected(case.policy, case.tensors)
    checks.assert_close(bound(backend, case)[0], wanted, relative=checks.NORM_TOLERANCE, absolute=flushed(case))


@given(case=spectral_cases())
def test_spectral_limit_is_near_the_reference(backend: Backend, case: Case) -> None:
    limited, _ = limit(backend, case)
    wanted, _ = checks.expected(case.policy, case.tensors)
    smallest = checks.coarsest(checks.smallest_subnormal, case.tensors)
    checks.assert_close(limited, wanted, relative=1e-13, ulps=3, absolute=2 * smallest)


def check_spectra(results: list[Array], policy: Any) -> None:
    """The largest singular values of what is stored are in bounds, as far as float64 can say."""
    axes = unit_axes(results, policy.unit_axis)
    for result, own in zip(results, axes, strict=True):
        if own and result.size and policy.max_norm < math.inf:
            wide = result.astype(np.complex128 if result.dtype.kind == "c" else np.float64)
            matrix = np.moveaxis(wide, own[0], 0).reshape(wide.shape[own[0]], -1)
            peak = float(np.abs(matrix).max(initial=0.0)) or 1.0
            value = float(np.linalg.svd(matrix / peak, compute_uv=False)[:1].sum())
            assert value <= policy.max_norm / peak * (1 + 2e-15), f"{value * peak!r} is over {policy.max_norm!r}"


@given(case=spectral_cases(dtype=st.sampled_from(["float16", "bfloat16", "float32", "complex64"])))
def test_spectral_limit_is_never_exceeded_by_what_is_stored(backend: Backend, case: Case) -> None:
    check_spectra(limit(backend, case)[0], case.policy)


@given(case=spectral_cases(dtype=st.sampled_from(["float32", "float64"])))
def test_primitives_keep_the_spectral_limit(backend: Backend, case: Case) -> None:
    normal = [np.clip(t, -1e30, 1e30) for t in case.tensors]
    normal = [np.where(np.abs(t) < 1e-30, np.zeros_like(t), t).astype(t.dtype) for t in normal]
    results, _ = bound(backend, Case(normal, normal, case.policy))
    check_spectra(results, case.policy)
    wanted, _ = checks.expected(case.policy, normal)
    checks.assert_close(results, wanted, relative=1e-13, ulps=4, absolute=flushed(case))


@pytest.mark.parametrize("method", ["svd", "power"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_diagonal_is_held_by_its_largest_element(backend: Backend, dtype: str, method: Any) -> None:
    tensor = as_tensor(backend, np.diag([4.0, 1.0]).astype(dtype))
    limited, report = cc.clip(tensor, cc.SpectralLimit(2.0, unit_axis=0, method=method), backend=backend.name)
    (result,) = as_arrays(backend, limited)
    np.testing.assert_allclose(
        result.astype(np.complex128), np.diag([2.0, 0.5]), rtol=3 * checks.epsilon(result) + 2e-14
    )
    assert float(report.norm) == pytest.approx(4.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "policy",
    [
        cc.MaxNorm(5.0, unit_axis=0),
        cc.MinMaxNorm(1.0, 5.0, unit_axis=0),
        cc.SpectralLimit(7.0, unit_axis=0),
        cc.Box(4.0),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_weights_in_range_come_back_as_the_same_tensors(backend: Backend, dtype: str, policy: cc.Policy) -> None:
    tensors = as_tensors(backend, [np.array([[3.0, 4.0], [0.0, 2.0]], dtype), np.array([1.0, 2.0], dtype)])
    if dtype.startswith("complex") and isinstance(policy, cc.Box):
        with pytest.raises(cc.InvalidInput, match=dtype):
            cc.clip(tensors, policy, backend=backend.name)
        return
    limited, report = cc.clip(tensors, policy, backend=backend.name)
    checks.assert_same_objects(limited, tensors)
    assert (float(report.scale), bool(report.clipped)) == (1.0, False)


def test_biases_have_no_units_and_are_left_as_they_are(backend: Backend) -> None:
    tensors = as_tensors(backend, [np.array([30.0, 40.0]), np.array([[3.0, 4.0], [0.0, 1.0]])])
    for policy in (cc.MaxNorm(2.5, unit_axis=0), cc.UnitNorm(unit_axis=0), cc.SpectralLimit(1.0, unit_axis=0)):
        limited, _ = cc.clip(tensors, policy, backend=backend.name)
        checks.assert_same_objects(limited[0], tensors[0])
        assert limited[1] is not tensors[1]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_units_of_subnormal_numbers_are_scaled_to_one(backend: Backend, dtype: str) -> None:
    tiny = float(np.finfo(dtype).smallest_subnormal)
    case_tensors = [np.array([[3.0, 4.0], [0.0, 0.0]]) * tiny]
    case = Case(case_tensors, [t.astype(dtype) for t in case_tensors], cc.UnitNorm(unit_axis=0))
    (result,), _ = limit(backend, case)
    np.testing.assert_allclose(result, [[0.6, 0.8], [0.0, 0.0]], rtol=checks.epsilon(result))


@pytest.mark.parametrize("mode", ["propagate", "zero", "skip", "raise"])
def test_a_fault_in_one_unit_acts_as_the_limit_says(backend: Backend, mode: Any) -> None:
    arrays = [np.array([[3.0, 4.0], [math.inf, 2.0]]), np.array([9.0])]
    tensors, policy = as_tensors(backend, arrays), cc.MaxNorm(2.5, unit_axis=0, nonfinite=mode)
    if mode == "raise":
        with pytest.raises(cc.NonFinite, match="1 elements"):
            cc.clip(tensors, policy, backend=backend.name)
    else:
        limited, report = cc.clip(tensors, policy, backend=backend.name)
        wanted = {
            "propagate": [np.full((2, 2), math.nan), np.array([math.nan])],
            "zero": [np.array([[1.5, 2.0], [0.0, 2.0]]), np.array([9.0])],
            "skip": [np.zeros((2, 2)), np.zeros(1)],
        }
        checks.assert_same_bits(as_arrays(backend, limited), wanted[mode])
        assert int(report.nonfinite) == 1
    checks.assert_same_bits(as_arrays(backend, tensors), arrays)


@given(case=max_norm_cases())
def test_limits_do_not_modify_the_input(backend: Backend, case: Case) -> None:
    tensors = as_tensors(backend, case.tensors)
    cc.clip(tensors, case.policy, backend=backend.name)
    checks.assert_same_bits(as_arrays(backend, tensors), case.tensors)


@given(case=value_cases())
def test_box_is_clip_by_value_under_another_name(backend: Backend, case: Case) -> None:
    policy = cc.Box(case.policy.min_value, case.policy.max_value)
    limited, _ = cc.clip(as_tensors(backend, case.tensors), policy, backend=backend.name)
    checks.assert_like_reference(as_arrays(backend, limited), policy, case.tensors)


def test_limits_say_which_axis_they_need(backend: Backend) -> None:
    with pytest.raises(cc.InvalidInput, match=r"MaxNorm.*\(2, 3\).*model=.*unit_axis"):
        cc.clip(as_tensor(backend, np.ones((2, 3))), cc.MaxNorm(1.0), backend=backend.name)


@pytest.mark.parametrize(
    ("kernel", "sigma"), [(np.ones((5, 5)), 5.0), (np.array([[1.0, 1.0], [1.0, -1.0]]), math.sqrt(2.0))]
)
def test_a_kernel_at_its_spectral_limit_is_in_range(backend: Backend, kernel: Array, sigma: float) -> None:
    tensor = as_tensor(backend, kernel)
    limited, report = cc.clip(tensor, cc.SpectralLimit(sigma, unit_axis=0), backend=backend.name)
    checks.assert_same_objects(limited, tensor)
    assert not bool(report.clipped)


@given(case=spectral_cases())
def test_spectral_limit_twice_is_spectral_limit_once(backend: Backend, case: Case) -> None:
    once, _ = cc.clip(as_tensors(backend, case.tensors), case.policy, backend=backend.name)
    checks.assert_same_objects(cc.clip(once, case.policy, backend=backend.name)[0], once)
