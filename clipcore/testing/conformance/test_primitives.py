"""The backend's own primitives, which devices and traced functions use, on the same cases: within one rounding.

A framework may flush subnormal numbers to zero: what is smaller than the smallest normal one may be lost.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clipcore as cc
from clipcore.backend import Backend
from clipcore.clipping.given import Given
from clipcore.testing import checks
from clipcore.testing.conformance.test_nonfinite import QUIET, faults, faulty
from clipcore.testing.strategies import DTYPES, REAL_DTYPES, Case, arrays, lists_of, norm_cases, value_cases
from clipcore.testing.tensors import as_arrays, as_tensors

Array = np.ndarray[Any, np.dtype[Any]]


def bound(backend: Backend, case: Case) -> tuple[list[Array], cc.ClipReport]:
    tensors, params = as_tensors(backend, case.tensors), as_tensors(backend, case.params)
    given = Given(tensors, backend.primitives(), params, slots=range(len(tensors)))
    bounded, _, report = case.policy.bound(given, {})
    return as_arrays(backend, bounded), report


def flushed(case: Case) -> float:
    """What may be lost where subnormal numbers are flushed, in the whole call."""
    return (1 + sum(t.size for t in case.tensors)) * checks.coarsest(checks.smallest_normal, case.tensors)


def check_hard(results: list[Array], given: list[Array], wanted: list[Array], max_norm: float, room: float) -> None:
    """What is stored keeps the bound and is near the largest that does; where nothing was changed, the norm is within
    the bound as far as it is known.
    """
    wide = np.complex128
    pairs = [(result.astype(wide), before.astype(wide)) for result, before in zip(results, given, strict=True)]
    changed = any((np.abs(result - before) > room).any() for result, before in pairs)
    checks.assert_within(results, max_norm if changed else max_norm * (1 + checks.NORM_TOLERANCE) + room)
    # one factor for all, lowered by what the coarsest of them is rounded by
    coarsest = checks.coarsest(checks.epsilon, results)
    relative = max(3 * coarsest, 3 * checks.NORM_TOLERANCE)
    for result, exact in zip(results, wanted, strict=True):
        ulps = 3 * coarsest / checks.epsilon(result)
        checks.assert_close([result], [exact], relative=relative, ulps=ulps, absolute=room)


def check(backend: Backend, case: Case) -> None:
    results, report = bound(backend, case)
    wanted, norm = checks.expected(case.policy, case.tensors)
    checks.assert_close(results, wanted, relative=checks.NORM_TOLERANCE, absolute=flushed(case))
    checks.assert_norm(report.norm, norm, absolute=flushed(case))
    assert int(report.nonfinite) == faults(case)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_primitives_clip_norms_within_one_ulp(backend: Backend, dtype: str, data: st.DataObject) -> None:
    check(backend, data.draw(norm_cases(grads=lists_of(arrays(st.just(dtype))))))


@given(case=norm_cases())
def test_primitives_clip_mixed_dtypes_within_one_ulp(backend: Backend, case: Case) -> None:
    check(backend, case)


@given(case=value_cases())
def test_primitives_clip_values_within_one_ulp(backend: Backend, case: Case) -> None:
    check(backend, case)


@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_primitives_take_the_largest_bounds_that_there_are(backend: Backend, dtype: str) -> None:
    inputs = [np.array([1.0, -2.0], dtype)]
    for bound in (1.797e308, float(np.finfo(np.float64).max)):
        check(backend, Case(inputs, inputs, cc.ClipByValue(-1.0, bound)))


@pytest.mark.parametrize("policy", [cc.ClipByGlobalNorm(1.0), cc.ClipByNorm(1.0), cc.ClipByValue(1.0)], ids=repr)
def test_primitives_take_nothing_to_clip(backend: Backend, policy: cc.Policy) -> None:
    check(backend, Case([], [], policy))


@pytest.mark.parametrize("mode", QUIET)
@given(data=st.data())
def test_primitives_treat_faults_as_the_policy_says(backend: Backend, mode: Any, data: st.DataObject) -> None:
    check(backend, data.draw(faulty(mode)))


@given(case=faulty("raise"))
def test_primitives_raise_where_the_policy_says_so(backend: Backend, case: Case) -> None:
    with pytest.raises(cc.NonFinite):
        bound(backend, case)


@given(case=norm_cases())
def test_primitives_do_not_modify_the_input(backend: Backend, case: Case) -> None:
    tensors = as_tensors(backend, case.tensors)
    case.policy.bound(Given(tensors, backend.primitives()), {})
    checks.assert_same_bits(as_arrays(backend, tensors), case.tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_primitives_sum_squares_in_float64(backend: Backend, dtype: str) -> None:
    """Half-precision sums show here: 4,096 ones and a small one, whose squares a narrow sum loses."""
    inputs = [np.ones(4096, dtype), np.full(64, 0.03125, dtype)]
    case = Case(inputs, inputs, cc.ClipByGlobalNorm(1.0))
    check(backend, case)


def test_primitives_leave_what_is_in_range_in_every_bit(backend: Backend) -> None:
    inputs = [np.linspace(-1, 1, 41, dtype=np.float32), np.array([0.1, 5.0]), np.array([1e-3], np.float16)]
    results, report = bound(backend, Case(inputs, inputs, cc.ClipByGlobalNorm(41.0)))
    checks.assert_same_bits(results, inputs)
    assert not bool(report.clipped)
    assert float(report.scale) == 1.0
