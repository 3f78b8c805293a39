"""What inf and NaN do under each `nonfinite=`, and how they are counted."""

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
from clipcore.testing.strategies import DTYPES, REAL_DTYPES, Case, arrays, limits, lists_of, norm_orders, value_policies
from clipcore.testing.tensors import as_arrays, as_tensors

QUIET: tuple[Any, ...] = ("propagate", "zero", "skip")
MODES: tuple[Any, ...] = (*QUIET, "raise")


def clip(backend: Backend, tensors: Any, policy: cc.Policy) -> tuple[Any, cc.ClipReport]:
    return cc.clip(tensors, policy, backend=backend.name)


@st.composite
def faulty(
    draw: st.DrawFn, nonfinite: Any, policies: Any = (cc.ClipByGlobalNorm, cc.ClipByNorm, cc.ClipByValue)
) -> Case:
    """Gradients with a fault at some place at least, and any policy."""
    kind = draw(st.sampled_from(policies))
    names = REAL_DTYPES if kind is cc.ClipByValue else DTYPES
    tensors = draw(lists_of(arrays(st.sampled_from(names), nonfinite=True)).filter(lambda ts: any(t.size for t in ts)))
    full = draw(st.sampled_from([t for t in tensors if t.size]))
    full[draw(st.sampled_from(list(np.ndindex(full.shape))))] = (
        math.nan if kind is cc.ClipByValue else draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    )
    if kind is cc.ClipByValue:
        return Case(tensors, tensors, draw(value_policies(nonfinite=nonfinite)))
    p = draw(norm_orders([t.dtype.name for t in tensors]))
    return Case(tensors, tensors, kind(draw(limits(tensors, p)), p=p, nonfinite=nonfinite))


def faults(case: Case) -> int:
    is_fault = np.isnan if isinstance(case.policy, cc.ClipByValue) else lambda t: ~np.isfinite(t)
    return sum(int(is_fault(t).sum()) for t in case.tensors)


@given(case=faulty("propagate"))
def test_propagate_makes_every_element_of_every_tensor_nan(backend: Backend, case: Case) -> None:
    clipped, report = clip(backend, as_tensors(backend, case.tensors), case.policy)
    for result, array in zip(as_arrays(backend, clipped), case.tensors, strict=True):
        assert (result.shape, result.dtype) == (array.shape, array.dtype)
        assert np.isnan(result).all()
    assert math.isnan(float(report.norm))


@given(case=faulty("skip"))
def test_skip_makes_every_element_of_every_tensor_zero(backend: Backend, case: Case) -> None:
    clipped, report = clip(backend, as_tensors(backend, case.tensors), case.policy)
    for result, array in zip(as_arrays(backend, clipped), case.tensors, strict=True):
        assert (result.shape, result.dtype) == (array.shape, array.dtype)
        assert (result == 0).all()
    assert float(report.scale) == 0.0


@given(case=faulty("zero"))
def test_zero_clips_what_is_left_when_the_faults_are_zero(backend: Backend, case: Case) -> None:
    clipped, report = clip(backend, as_tensors(backend, case.tensors), case.policy)
    checks.assert_like_reference(as_arrays(backend, clipped), case.policy, case.tensors)
    checks.assert_norm(report.norm, checks.expected(case.policy, case.tensors)[1])


@given(case=faulty("raise"))
def test_raise_says_how_many_and_where_and_changes_nothing(backend: Backend, case: Case) -> None:
    tensors = as_tensors(backend, case.tensors)
    with pytest.raises(cc.NonFinite, match=rf"{faults(case)} elements are inf or NaN \(first in grads\[\d\]"):
        clip(backend, tensors, case.policy)
    checks.assert_same_bits(as_arrays(backend, tensors), case.tensors)


@pytest.mark.parametrize("mode", QUIET)
@given(data=st.data())
def test_the_report_counts_the_faults(backend: Backend, mode: Any, data: st.DataObject) -> None:
    case = data.draw(faulty(mode))
    _, report = clip(backend, as_tensors(backend, case.tensors), case.policy)
    assert int(report.nonfinite) == faults(case)


@pytest.mark.parametrize("mode", QUIET)
@given(data=st.data())
def test_faults_do_not_modify_the_input(backend: Backend, mode: Any, data: st.DataObject) -> None:
    case = data.draw(faulty(mode))
    tensors = as_tensors(backend, case.tensors)
    clip(backend, tensors, case.policy)
    checks.assert_same_bits(as_arrays(backend, tensors), case.tensors)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_a_finite_gradient_whose_norm_overflows_is_no_fault(backend: Backend, mode: Any, dtype: str, p: float) -> None:
    top = float(np.finfo(np.float64).max) if dtype in ("float64", "complex128") else 3e38
    top = 65504.0 if dtype == "float16" else top
    inputs = [np.full(4, top, dtype)]
    policy = cc.ClipByGlobalNorm(1.0, p=p, nonfinite=mode)
    clipped, report = clip(backend, as_tensors(backend, inputs), policy)
    assert int(report.nonfinite) == 0
    checks.assert_like_reference(as_arrays(backend, clipped), policy, inputs)


@pytest.mark.parametrize("mode", QUIET)
def test_a_fault_comes_before_an_infinite_limit(backend: Backend, mode: Any) -> None:
    tensors = as_tensors(backend, [np.array([math.inf, 1.0]), np.array([2.0])])
    clipped, report = clip(backend, tensors, cc.ClipByGlobalNorm(math.inf, nonfinite=mode))
    wanted = {"propagate": [[math.nan] * 2, [math.nan]], "zero": [[0.0, 1.0], [2.0]], "skip": [[0.0, 0.0], [0.0]]}
    checks.assert_same_bits(as_arrays(backend, clipped), [np.array(values) for values in wanted[mode]])
    assert int(report.nonfinite) == 1
