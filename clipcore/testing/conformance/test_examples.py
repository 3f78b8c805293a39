"""PerExampleClip, as users call it: the sum of examples of which none, as it is stored, exceeds the bound."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clipcore as cc
from clipcore.backend import Backend
from clipcore.testing import checks
from clipcore.testing.conformance.test_primitives import bound, check_hard, flushed
from clipcore.testing.strategies import DTYPES, Case, example_cases
from clipcore.testing.tensors import as_arrays, as_tensor, as_tensors

Array = np.ndarray[Any, np.dtype[Any]]


def clip(backend: Backend, case: Case) -> tuple[list[Array], cc.ClipReport]:
    sums, report = cc.clip(as_tensors(backend, case.tensors), case.policy, backend=backend.name)
    return as_arrays(backend, sums), report


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_per_example_clip_equals_the_reference_in_every_bit(backend: Backend, dtype: str, data: st.DataObject) -> None:
    case = data.draw(example_cases(dtype=st.just(dtype)))
    sums, report = clip(backend, case)
    checks.assert_like_reference(sums, case.policy, case.tensors)
    checks.assert_norm(report.norm, checks.expected(case.policy, case.tensors)[1])


@given(case=example_cases())
def test_examples_of_mixed_dtypes_equal_the_reference_in_every_bit(backend: Backend, case: Case) -> None:
    checks.assert_like_reference(clip(backend, case)[0], case.policy, case.tensors)


def check_bound(stored: list[Array], policy: Any) -> None:
    """Of one example, whose sum is what was stored: it is in bounds, and so is each layer's share."""
    checks.assert_within(stored, policy.max_norm)
    for layer in stored if policy.per_layer else []:
        checks.assert_within([layer], policy.max_norm / math.sqrt(len(stored)) * (1 + 2**-50))


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_the_bound_is_never_exceeded_by_what_is_stored(backend: Backend, dtype: str, data: st.DataObject) -> None:
    case = data.draw(example_cases(dtype=st.just(dtype), examples=st.just(1)))
    check_bound(clip(backend, case)[0], case.policy)


@given(case=example_cases(examples=st.just(1)))
def test_primitives_never_exceed_the_bound_and_are_near_the_largest(backend: Backend, case: Case) -> None:
    results, _ = bound(backend, case)
    wanted, _ = checks.expected(case.policy, case.tensors)
    examples = [tensor[0] for tensor in case.tensors]
    if not case.policy.per_layer:
        check_hard(results, examples, wanted, case.policy.max_norm, flushed(case))
    for result, example, exact in zip(results, examples, wanted, strict=True) if case.policy.per_layer else []:
        share = case.policy.max_norm / math.sqrt(len(results)) * (1 + 2**-50)
        check_hard([result], [example], [exact], share, flushed(case))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_no_larger_factor_keeps_the_bound(backend: Backend, dtype: str) -> None:
    """Every larger factor of float32's is tried, up to the quotient and a little beyond."""
    example = np.random.default_rng(5).standard_normal(9).astype(dtype)
    wide = example.astype(np.float32)
    bound = float(np.float32(0.3) * np.sqrt((wide.astype(np.float64) ** 2).sum()))
    case = Case([example[None]], [example[None]], cc.PerExampleClip(bound))
    (stored,), report = clip(backend, case)
    factor = np.float32(report.scale)
    checks.assert_same_bits([(wide * factor).astype(dtype)], [stored])
    for _ in range(1000):
        factor = np.nextafter(factor, np.float32(2))
        larger = (wide * factor).astype(dtype).astype(np.float64)
        assert sum(Fraction(x) ** 2 for x in larger.tolist()) > Fraction(bound) ** 2


def test_the_largest_bound_of_a_layer_is_a_bound(backend: Backend) -> None:
    largest = float(np.finfo(np.float64).max)
    example = np.array([[largest, 5e-324]])
    policy = cc.PerExampleClip(largest, per_layer=True)
    sums, report = cc.clip(as_tensor(backend, example), policy, backend=backend.name)
    checks.assert_like_reference(as_arrays(backend, sums), policy, [example])
    assert bool(report.clipped)


def test_each_example_is_bounded_and_then_all_are_summed(backend: Backend) -> None:
    tensor = as_tensor(backend, np.array([[3.0, 4.0], [0.0, 1.0]]))
    sums, report = cc.clip(tensor, cc.PerExampleClip(2.5), backend=backend.name)
    checks.assert_same_bits(as_arrays(backend, sums), [np.array([1.5, 3.0])])
    assert [float(x) for x in report.norms] == [5.0, 1.0]
    assert [float(x) for x in report.scales] == [0.5, 1.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_those_of_float64_example_after_example(backend: Backend, dtype: str) -> None:
    """In another order, or in a narrower sum, the ones are lost."""
    column = np.array([1024.0, *[2.0**-40] * 20, -1024.0]).astype(dtype)
    for array in (column, np.stack([column] * 3, axis=1), np.asfortranarray(np.stack([column] * 3, axis=1))):
        tensors = [np.asarray(array)]
        case = Case(tensors, tensors, cc.PerExampleClip(math.inf))
        checks.assert_like_reference(clip(backend, case)[0], case.policy, tensors)


@pytest.mark.parametrize("mode", ["propagate", "zero", "skip", "raise"])
def test_a_fault_in_one_example_acts_as_the_policy_says(backend: Backend, mode: Any) -> None:
    arrays = [np.array([[3.0, 4.0], [math.nan, 1.0]]), np.array([0.0, 0.0])]
    tensors, policy = as_tensors(backend, arrays), cc.PerExampleClip(2.5, nonfinite=mode)
    if mode == "raise":
        with pytest.raises(cc.NonFinite, match="1 elements"):
            cc.clip(tensors, policy, backend=backend.name)
    else:
        sums, report = cc.clip(tensors, policy, backend=backend.name)
        wanted = {"propagate": [[math.nan] * 2, math.nan], "zero": [[1.5, 3.0], 0.0], "skip": [[0.0, 0.0], 0.0]}
        checks.assert_same_bits(as_arrays(backend, sums), [np.array(values) for values in wanted[mode]])
        assert int(report.nonfinite) == 1
    checks.assert_same_bits(as_arrays(backend, tensors), arrays)


@given(case=example_cases())
def test_examples_are_not_modified(backend: Backend, case: Case) -> None:
    tensors = as_tensors(backend, case.tensors)
    cc.clip(tensors, case.policy, backend=backend.name)
    checks.assert_same_bits(as_arrays(backend, tensors), case.tensors)


@pytest.mark.parametrize("shapes", [[(2, 3), (3, 2)], [(), (1,)]], ids=str)
def test_tensors_of_unequal_numbers_of_examples_are_refused(backend: Backend, shapes: list[tuple[int, ...]]) -> None:
    tensors = as_tensors(backend, [np.ones(shape) for shape in shapes])
    with pytest.raises(cc.InvalidInput, match="first axis"):
        cc.clip(tensors, cc.PerExampleClip(1.0), backend=backend.name)


def test_sums_have_no_place_among_the_examples(backend: Backend) -> None:
    with pytest.raises(cc.InvalidInput, match=r"use cc\.clip"):
        cc.clip_(as_tensor(backend, np.ones((2, 3))), cc.PerExampleClip(1.0), backend=backend.name)
