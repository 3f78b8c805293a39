"""ClipByNorm and ClipByGlobalNorm, as users call them: against the reference, and the properties that define them."""

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
from clipcore.structure import leaves
from clipcore.testing import checks
from clipcore.testing.strategies import DTYPES, Case, arrays, lists_of, norm_cases, norm_orders, structures
from clipcore.testing.tensors import as_arrays, as_tensor, as_tensors

Array = np.ndarray[Any, np.dtype[Any]]


def clip(backend: Backend, tensors: Any, policy: cc.Policy) -> tuple[Any, cc.ClipReport]:
    return cc.clip(tensors, policy, backend=backend.name)


@given(case=norm_cases(policies=[cc.ClipByGlobalNorm]))
def test_clip_by_global_norm_equals_the_reference_in_every_bit(backend: Backend, case: Case) -> None:
    clipped, _ = clip(backend, as_tensors(backend, case.tensors), case.policy)
    checks.assert_like_reference(as_arrays(backend, clipped), case.policy, case.tensors)


@given(case=norm_cases(policies=[cc.ClipByNorm]))
def test_clip_by_norm_equals_the_reference_in_every_bit(backend: Backend, case: Case) -> None:
    clipped, _ = clip(backend, as_tensors(backend, case.tensors), case.policy)
    checks.assert_like_reference(as_arrays(backend, clipped), case.policy, case.tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_each_dtype_alone_equals_the_reference_in_every_bit(backend: Backend, dtype: str, data: st.DataObject) -> None:
    case = data.draw(norm_cases(grads=lists_of(arrays(st.just(dtype))), exact=True))
    clipped, _ = clip(backend, as_tensors(backend, case.tensors), case.policy)
    checks.assert_same_bits(as_arrays(backend, clipped), checks.expected(case.policy, case.tensors)[0])


def test_three_and_four_under_a_limit_of_half_their_norm_are_halved(backend: Backend) -> None:
    clipped, report = clip(backend, as_tensors(backend, [np.array([3.0]), np.array([4.0])]), cc.ClipByGlobalNorm(2.5))
    checks.assert_same_bits(as_arrays(backend, clipped), [np.array([1.5]), np.array([2.0])])
    assert (float(report.norm), float(report.scale), bool(report.clipped)) == (5.0, 0.5, True)


def test_many_elements_equal_the_reference_in_every_bit(backend: Backend) -> None:
    rng = np.random.default_rng(7)
    inputs: list[Array] = [
        rng.standard_normal(40_000).astype(np.float32),
        rng.standard_normal((300, 5)).astype(np.float16),
    ]
    policy = cc.ClipByGlobalNorm(1.0)
    clipped, _ = clip(backend, as_tensors(backend, inputs), policy)
    checks.assert_like_reference(as_arrays(backend, clipped), policy, inputs)


def at_the_edge(norm: float, factor: float, step: float) -> float:
    """A limit for which limit / norm stands between `factor` and the next number of float32, at the middle of the two.

    There the fast sum cannot tell which way the factor is rounded; `step` units of float64 to either side it can.
    """
    below = np.float32(factor)
    middle = (float(below) + float(np.nextafter(below, np.float32(2)))) / 2
    return norm * middle * (1 + step * 2.0**-53)


@given(
    grads=lists_of(arrays(st.sampled_from(["float16", "bfloat16", "float32", "complex64"]))),
    factor=st.floats(2.0**-120, 0.99),
    step=st.integers(-4, 4),
    p=st.sampled_from([1.0, 2.0, 3.0, math.inf]),
)
def test_at_the_edge_of_a_rounding_the_factor_is_that_of_the_exact_sum(
    backend: Backend, grads: list[Array], factor: float, step: int, p: float
) -> None:
    _, norm = checks.expected(cc.ClipByGlobalNorm(math.inf, p=p), grads)
    policy = cc.ClipByGlobalNorm(at_the_edge(norm, factor, step), p=p)
    clipped, _ = clip(backend, as_tensors(backend, grads), policy)
    checks.assert_like_reference(as_arrays(backend, clipped), policy, grads)


@pytest.mark.parametrize("step", [-1, 0, 1])
def test_at_the_edge_of_a_rounding_many_elements_are_summed_exactly(backend: Backend, step: int) -> None:
    inputs = [np.random.default_rng(step + 1).standard_normal(3000).astype(np.float32)]
    _, norm = checks.expected(cc.ClipByGlobalNorm(math.inf), inputs)
    policy = cc.ClipByGlobalNorm(at_the_edge(norm, 0.3, step))
    clipped, _ = clip(backend, as_tensors(backend, inputs), policy)
    checks.assert_like_reference(as_arrays(backend, clipped), policy, inputs)


@given(case=norm_cases())
def test_the_reported_norm_and_factor_are_within_1e_14(backend: Backend, case: Case) -> None:
    _, report = clip(backend, as_tensors(backend, case.tensors), case.policy)
    checks.assert_norm(report.norm, checks.expected(case.policy, case.tensors)[1])
    checks.assert_norm(report.scale, _factor(case))


def _factor(case: Case) -> float:
    """The smallest factor, by the definition."""
    groups = [[t] for t in case.tensors] if isinstance(case.policy, cc.ClipByNorm) else [case.tensors]
    norms = [_norm(group, case.policy.p) for group in groups]
    limit = case.policy.max_norm
    over = [Fraction(limit) / norm for norm in norms if limit < math.inf and norm > limit]
    return float(min(over, default=1))


def _norm(tensors: list[Array], p: float) -> Fraction:
    """The norm as a rational number: that of float64 tensors can leave the range, or have few digits."""
    _, norm = checks.expected(cc.ClipByGlobalNorm(math.inf, p=p), tensors)
    if 1e-290 < norm < math.inf:
        return Fraction(norm)
    unit = 2.0**-16 if norm == math.inf else 2.0**100
    scaled = [(t.real.astype(np.float64) * unit) + 1j * (t.imag.astype(np.float64) * unit) for t in tensors]
    return Fraction(checks.expected(cc.ClipByGlobalNorm(math.inf, p=p), scaled)[1]) / Fraction(unit)


@given(tree=structures(arrays()), policy=st.sampled_from([cc.ClipByGlobalNorm, cc.ClipByNorm]), p=norm_orders())
def test_in_range_the_same_tensors_come_back(backend: Backend, tree: Any, policy: Any, p: float) -> None:
    _, norm = checks.expected(cc.ClipByGlobalNorm(math.inf, p=p), [leaf for _, leaf in leaves(tree)])
    tensors = as_tensors(backend, tree)
    # a norm of float64 under a fractional p is known to 1e-14, a subnormal one to one unit
    limit = math.nextafter(norm * (1 + 1e-13), math.inf) if norm else 0.0
    clipped, report = clip(backend, tensors, policy(limit, p=p))
    checks.assert_same_objects(clipped, tensors)
    assert not report.clipped


@given(case=norm_cases())
def test_the_input_is_not_modified(backend: Backend, case: Case) -> None:
    tensors = as_tensors(backend, case.tensors)
    clip(backend, tensors, case.policy)
    checks.assert_same_bits(as_arrays(backend, tensors), case.tensors)


@given(case=norm_cases(grads=structures(arrays())))
def test_the_structure_comes_back_with_its_nones(backend: Backend, case: Case) -> None:
    clipped, _ = clip(backend, as_tensors(backend, case.grads), case.policy)
    checks.assert_same_structure(clipped, case.grads)
    assert all(backend.is_tensor(leaf) for _, leaf in leaves(clipped))
    assert [leaf.shape for leaf in as_arrays(backend, clipped)] == [leaf.shape for leaf in case.tensors]


@given(case=norm_cases())
def test_clipping_twice_is_clipping_once_but_for_one_rounding(backend: Backend, case: Case) -> None:
    once, _ = clip(backend, as_tensors(backend, case.tensors), case.policy)
    twice, _ = clip(backend, once, case.policy)
    first = as_arrays(backend, once)
    # in mixed dtypes the coarsest one decides by how much the norm can be over
    unit = checks.coarsest(checks.epsilon, first)
    if not checks.is_exact(case.policy, case.tensors):
        unit = max(unit, checks.NORM_TOLERANCE)
    room = 2 * sum(t.size for t in first) * checks.coarsest(checks.smallest_subnormal, first)
    for a, b in zip(as_arrays(backend, twice), first, strict=True):
        checks.assert_close([a], [b], ulps=1.01 * unit / checks.epsilon(b), absolute=room)


@given(case=norm_cases())
def test_the_norm_of_the_result_is_bounded_but_for_one_rounding(backend: Backend, case: Case) -> None:
    clipped, _ = clip(backend, as_tensors(backend, case.tensors), case.policy)
    results = as_arrays(backend, clipped)
    for group in [[r] for r in results] if isinstance(case.policy, cc.ClipByNorm) else [results]:
        checks.assert_bounded(group, case.policy.max_norm, case.policy.p)


@given(case=norm_cases(policies=[cc.ClipByGlobalNorm], exact=True), data=st.data())
def test_the_result_does_not_depend_on_the_order_of_tensors(backend: Backend, case: Case, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(case.tensors))))
    straight, _ = clip(backend, as_tensors(backend, case.tensors), case.policy)
    shuffled, _ = clip(backend, as_tensors(backend, [case.tensors[i] for i in order]), case.policy)
    wanted = as_arrays(backend, straight)
    checks.assert_same_bits(as_arrays(backend, shuffled), [wanted[i] for i in order])


@given(case=norm_cases(policies=[cc.ClipByGlobalNorm], exact=True), data=st.data())
def test_the_result_does_not_depend_on_how_tensors_are_split(backend: Backend, case: Case, data: st.DataObject) -> None:
    whole, _ = clip(backend, as_tensors(backend, case.tensors), case.policy)
    cuts = [data.draw(st.integers(0, t.size)) for t in case.tensors]
    pieces = [part for t, cut in zip(case.tensors, cuts, strict=True) for part in np.split(t.ravel(), [cut])]
    parts, _ = clip(backend, as_tensors(backend, pieces), case.policy)
    results = [r.ravel() for r in as_arrays(backend, whole)]
    wanted = [part for r, cut in zip(results, cuts, strict=True) for part in np.split(r, [cut])]
    checks.assert_same_bits(as_arrays(backend, parts), wanted)


@given(grads=lists_of(arrays()), policy=st.sampled_from([cc.ClipByGlobalNorm, cc.ClipByNorm]), p=norm_orders())
def test_an_infinite_limit_changes_nothing(backend: Backend, grads: list[Array], policy: Any, p: float) -> None:
    tensors = as_tensors(backend, grads)
    clipped, report = clip(backend, tensors, policy(math.inf, p=p))
    checks.assert_same_objects(clipped, tensors)
    assert (float(report.scale), bool(report.clipped)) == (1.0, False)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@given(seed=st.integers(0, 2**32 - 1))
def test_complex_numbers_without_imaginary_parts_are_clipped_as_real_ones(
    backend: Backend, dtype: str, p: float, seed: int
) -> None:
    inputs = [np.array(row, dtype) for row in np.random.default_rng(seed).standard_normal((20, 3))]
    policy = cc.ClipByNorm(0.1, p=p)
    wanted, _ = clip(backend, as_tensors(backend, inputs), policy)
    turned = [array.astype("complex64" if dtype == "float32" else "complex128") for array in inputs]
    clipped, _ = clip(backend, as_tensors(backend, turned), policy)
    checks.assert_same_bits([np.array(x.real) for x in as_arrays(backend, clipped)], as_arrays(backend, wanted))


@pytest.mark.parametrize("limit", [0.0, -0.0])
@given(grads=lists_of(arrays()), policy=st.sampled_from([cc.ClipByGlobalNorm, cc.ClipByNorm]), p=norm_orders())
def test_a_limit_of_zero_gives_zeros(backend: Backend, limit: float, grads: list[Array], policy: Any, p: float) -> None:
    clipped, report = clip(backend, as_tensors(backend, grads), policy(limit, p=p))
    assert math.copysign(1.0, float(report.scale)) == 1.0
    for result, array in zip(as_arrays(backend, clipped), grads, strict=True):
        assert (result.shape, result.dtype) == (array.shape, array.dtype)
        assert not result.any()


@pytest.mark.parametrize("empty", [[], (), {}, None, [None, {}]], ids=str)
@pytest.mark.parametrize("policy", [cc.ClipByGlobalNorm(1.0), cc.ClipByNorm(1.0), cc.ClipByValue(1.0)], ids=repr)
def test_nothing_to_clip_is_in_range(backend: Backend, empty: Any, policy: cc.Policy) -> None:
    clipped, report = clip(backend, empty, policy)
    assert clipped == empty
    assert (float(report.norm), float(report.scale), bool(report.clipped)) == (0.0, 1.0, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_tensors_of_no_elements_count_for_nothing(backend: Backend, dtype: str, p: float) -> None:
    inputs = [np.zeros((0, 3), dtype), np.array([8.0], dtype), np.zeros((2, 0), dtype)]
    clipped, report = clip(backend, as_tensors(backend, inputs), cc.ClipByGlobalNorm(2.0, p=p))
    checks.assert_same_bits(as_arrays(backend, clipped), [inputs[0], np.array([2.0], dtype), inputs[2]])
    assert float(report.norm) == 8.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_tensor_in_two_places_counts_twice_and_comes_out_alike(backend: Backend, dtype: str) -> None:
    tensor = as_tensor(backend, np.array([6.0], dtype))
    other = as_tensor(backend, np.array([-7.0], dtype))
    clipped, report = clip(backend, [tensor, other, tensor], cc.ClipByGlobalNorm(5.5))
    half = np.array([3.0], dtype)
    checks.assert_same_bits(as_arrays(backend, clipped), [half, np.array([-3.5], dtype), half])
    checks.assert_norm(report.norm, 11.0)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "bool"])
@pytest.mark.parametrize("policy", [cc.ClipByGlobalNorm(1.0), cc.ClipByNorm(1.0), cc.ClipByValue(1.0)], ids=repr)
def test_integer_tensors_are_refused_by_place_and_dtype(backend: Backend, dtype: str, policy: cc.Policy) -> None:
    tensor = as_tensor(backend, np.ones(2, dtype))
    with pytest.raises(cc.InvalidInput, match=rf"grads\['w'\].*{dtype}.*float32"):
        clip(backend, {"w": tensor}, policy)


@pytest.mark.parametrize("stranger", [1.0, "gradient", object(), [1.0]], ids=["float", "str", "object", "list"])
def test_what_is_no_tensor_is_refused_by_place(backend: Backend, stranger: Any) -> None:
    tensor = as_tensor(backend, np.ones(2))
    with pytest.raises(cc.InvalidInput, match=r"grads\[1\]"):
        clip(backend, [tensor, stranger], cc.ClipByGlobalNorm(1.0))


def test_tensors_of_two_frameworks_are_refused_naming_both(backend: Backend) -> None:
    if backend.name == "numpy":
        pytest.skip("NumPy is the other framework of this test: it runs with every backend but numpy")
    tensor = as_tensor(backend, np.ones(2))
    with pytest.raises(cc.InvalidInput, match=rf"'numpy'.*'{backend.name}'.*one framework per call"):
        clip(backend, [tensor, np.ones(2)], cc.ClipByGlobalNorm(1.0))


def test_the_backend_is_found_from_a_tensor(backend: Backend) -> None:
    tensor = as_tensor(backend, np.array([3.0, 4.0]))
    assert cc.backend_of(tensor).name == backend.name
    clipped, _ = cc.clip(tensor, cc.ClipByGlobalNorm(2.5))
    checks.assert_same_bits(as_arrays(backend, clipped), [np.array([1.5, 2.0])])
