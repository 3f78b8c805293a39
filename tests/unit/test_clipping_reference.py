"""The definition of clipping, against examples worked out by hand."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from clipcore.clipping import reference

BF16 = np.dtype(ml_dtypes.bfloat16)


def test_three_and_four_are_halved_under_half_their_norm():
    (first, second), norm = reference.clip_by_global_norm([np.array([3.0]), np.array([4.0])], 2.5)
    assert (first.tolist(), second.tolist(), norm) == ([1.5], [2.0], 5.0)


def test_each_tensor_is_bounded_alone_by_its_norm():
    clipped, norms = reference.clip_by_norm([np.array([3.0, 4.0]), np.array([12.0])], 6.0)
    assert [t.tolist() for t in clipped] == [[3.0, 4.0], [6.0]]
    assert norms == [5.0, 12.0]


@pytest.mark.parametrize(("p", "norm"), [(1.0, 7.0), (2.0, 5.0), (3.0, 91 ** (1 / 3)), (math.inf, 4.0), (1e300, 4.0)])
def test_the_norms_of_three_and_four(p, norm):
    _, found = reference.clip_by_global_norm([np.array([3.0, -4.0])], math.inf, p)
    assert found == pytest.approx(norm, rel=1e-15)


@pytest.mark.parametrize(("p", "norm"), [(1.0, 10.0), (2.0, 50**0.5), (math.inf, 5.0)])
def test_a_complex_number_counts_with_its_magnitude(p, norm):
    _, found = reference.clip_by_global_norm([np.array([3 + 4j, -5j])], math.inf, p)
    assert found == pytest.approx(norm, rel=1e-15)


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_a_complex_number_with_one_part_counts_as_a_real_one(p):
    for values in np.random.default_rng(0).standard_normal((300, 3)):
        (_, real), (_, turned) = (
            reference.clip_by_global_norm([array], math.inf, p) for array in (values, values * [1, 1j, -1j])
        )
        assert real == turned


def test_magnitudes_that_are_whole_make_ties_which_are_rounded_to_even():
    whole = 2**51 + 1  # 5 * whole has 54 bits and ends in 1
    for p in (1.0, 2.0, math.inf):
        _, norm = reference.clip_by_global_norm([np.array([3 * whole + 4j * whole])], math.inf, p)
        assert norm == 5 * whole - 1
    _, norm = reference.clip_by_global_norm([np.array([2.0**53, 1j, 1e-300 + 1e-300j])], math.inf, 1.0)
    assert norm == 2.0**53 + 2


def test_the_factor_is_rounded_to_float32_and_so_is_the_product():
    # norm 3, limit 1: the factor is float32(1/3) = 11184811 * 2**-25, and 3 times that is 33554433 * 2**-25 -> 1
    (clipped,), _ = reference.clip_by_global_norm([np.array([3.0], np.float32)], 1.0)
    assert clipped.tolist() == [1.0]
    # 7 times float32(1/7) = 9586981 * 2**-26 is 67108867 * 2**-26, three units over 1, which has room for none of them
    (clipped,), _ = reference.clip_by_global_norm([np.array([7.0], np.float32)], 1.0)
    assert clipped.tolist() == [1.0]


def test_float16_is_multiplied_in_float32_and_rounded_once_more():
    # 300 * float32(1 / 300) is 1 + 2**-26 or so: 1 in float16
    (clipped,), norm = reference.clip_by_global_norm([np.array([300.0], np.float16)], 1.0)
    assert (clipped.dtype, clipped.tolist(), norm) == (np.float16, [1.0], 300.0)


def test_a_factor_that_is_subnormal_in_float32_is_multiplied_in_float64():
    # 1e-40 / 1e3: in float32 the factor 1e-43 has 7 bits and would be off by 0.1%; 1e3 times it is 1e-40, a subnormal
    (clipped,), _ = reference.clip_by_global_norm([np.array([1e3], np.float32)], 1e-40)
    assert clipped[0] == np.float32(1e-40)


def test_products_among_subnormal_numbers_are_rounded_to_even():
    unit = np.float32(2**-149)
    (clipped,), _ = reference.clip_by_global_norm([np.array([unit, 3 * unit], np.float32)], float(unit) * 10**0.5 / 2)
    # a half and one and a half units: ties go to the even one
    assert (clipped / unit).tolist() == [0.0, 2.0]


def test_a_float64_norm_beyond_the_range_still_gives_the_right_factor():
    (clipped,), norm = reference.clip_by_global_norm([np.full(4, 1.5e308)], 1e308)
    assert norm == math.inf
    np.testing.assert_allclose(clipped, np.full(4, 0.5e308), rtol=1e-15)


def test_a_norm_equal_to_the_limit_is_in_range():
    arrays = [np.array([3.0, 4.0], np.float32)]
    (clipped,), _ = reference.clip_by_global_norm(arrays, 5.0)
    assert clipped is arrays[0]


def test_the_sign_of_zero_stays():
    (clipped,), _ = reference.clip_by_global_norm([np.array([-0.0, 0.0, 8.0])], 1.0)
    assert np.signbit(clipped).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("mode", "wanted"), [("propagate", [math.nan] * 3), ("zero", [0.0, 1.5, 2.0]), ("skip", [0.0, 0.0, 0.0])]
)
def test_what_an_infinity_does(mode, wanted):
    (clipped,), _ = reference.clip_by_global_norm([np.array([math.inf, 3.0, 4.0])], 2.5, nonfinite=mode)
    np.testing.assert_array_equal(clipped, wanted)


def test_an_infinity_raises_where_it_shall():
    with pytest.raises(ArithmeticError):
        reference.clip_by_global_norm([np.array([math.inf])], 1.0, nonfinite="raise")
    with pytest.raises(ArithmeticError):
        reference.clip_by_value([np.array([math.nan])], -1.0, 1.0, nonfinite="raise")


def test_values_are_held_to_the_rounded_bounds():
    inputs = [np.array([-math.inf, -0.05, 0.0999, 7.0], BF16)]
    (clipped,), _ = reference.clip_by_value(inputs, -0.1, 0.1)
    # 0.1 in bfloat16 is 205 * 2**-11
    assert clipped.astype(float)[[0, 3]].tolist() == [-205 * 2.0**-11, 205 * 2.0**-11]
    assert clipped[1] == inputs[0][1]


@pytest.mark.parametrize(("dtype", "largest"), [(np.float16, 65504.0), (BF16, 255 * 2.0**120)])
def test_a_finite_bound_beyond_the_range_is_the_largest_number(dtype, largest):
    (clipped,), _ = reference.clip_by_value([np.array([-math.inf, math.inf], dtype)], -1e300, 1e300)
    assert clipped.astype(float).tolist() == [-largest, largest]


def test_the_norm_that_is_reported_of_values_is_the_one_before():
    assert reference.clip_by_value([np.array([3.0, 4.0])], -1, 1)[1] == 5.0
    assert reference.clip_by_value([np.array([math.inf, 4.0])], -1, 1)[1] == math.inf


def test_nothing_has_the_norm_zero():
    assert reference.clip_by_global_norm([], 1.0) == ([], 0.0)
    (clipped,), norm = reference.clip_by_global_norm([np.zeros((0, 3))], 1.0)
    assert (clipped.shape, norm) == ((0, 3), 0.0)


def test_the_limit_by_size_is_rounded_once():
    # rms of equal elements is their magnitude, whatever sqrt(3) rounds to
    arrays = [np.full(3, 1.1), np.full(7, -1.3)]
    for array in arrays:
        (clipped,), _ = reference.clip_by_block_rms([array], abs(float(array[0])))
        assert clipped is array
    (clipped,), norms = reference.clip_by_average_norm([np.array([6.0, 8.0])], 2.5)
    assert (clipped.tolist(), norms) == ([3.0, 4.0], [10.0])


def test_each_row_or_column_is_a_unit():
    grads, weights = np.array([[3.0, 4.0], [6.0, 8.0]]), np.array([[5.0, 0.0], [0.0, 0.0]])
    (rows,), norms = reference.adaptive_clip([grads], [weights], [(0,)], 0.5, eps=10.0)
    assert (rows.tolist(), norms) == ([[3.0, 4.0], [3.0, 4.0]], [5.0, 10.0])
    (columns,), _ = reference.max_norm([np.array([[3.0, 0.0], [4.0, 1.0]])], [(1,)], 2.5)
    assert columns.tolist() == [[1.5, 0.0], [2.0, 1.0]]
    (whole,), _ = reference.max_norm([np.array([3.0, 4.0])], [()], 2.5)
    assert whole.tolist() == [3.0, 4.0]


def test_a_hard_bound_takes_the_largest_factor_that_keeps_it():
    # in units of the smallest number: 3 and 40 under 0.8 of their norm; from 5/6 on 3 rounds to 3
    unit = np.float32(2.0**-149)
    array = np.array([[3] * 100 + [40]], np.float32) * unit
    bound = 0.8 * 50.0 * float(unit)
    (stored,), _ = reference.max_norm([array], [(0,)], bound)
    # squares: 100 * 2**2 + 33**2 <= 40**2, and neither 34 nor 3 come before a factor of 5/6
    assert (stored / unit).tolist() == [[2.0] * 100 + [33.0]]


def test_a_norm_that_rounds_to_its_bound_can_be_over_it():
    ones = np.ones((1, 3))
    bound = math.sqrt(3)
    assert Fraction(bound) ** 2 < 3
    ((stored,),), _ = reference.max_norm([ones], [(0,)], bound)
    assert stored.tolist() == [math.nextafter(1.0, 0.0)] * 3


def test_examples_are_bounded_together_or_layer_by_layer():
    tensors = [np.array([[3.0], [0.0]]), np.array([[4.0], [1.0]])]
    sums, norms = reference.per_example_clip(tensors, 2.5)
    assert ([s.tolist() for s in sums], norms) == ([[1.5], [3.0]], [5.0, 1.0])
    sums, norms = reference.per_example_clip(tensors, 2.0, per_layer=True)
    assert norms == [3.0, 0.0, 4.0, 1.0]
    np.testing.assert_allclose([s[0] for s in sums], [math.sqrt(2), math.sqrt(2) + 1])


def test_sums_start_from_zero_and_go_in_order():
    (total,), _ = reference.per_example_clip([np.array([1e16, 1.0, -1e16])], math.inf)
    assert total == 0.0
    (total,), _ = reference.per_example_clip([np.array([[-0.0]])], 1.0)
    assert not np.signbit(total[0])


def test_mean_and_variance_are_moving_averages_of_what_was_left():
    # warm-up: 1 and 3, so mean 2 and variance 1; then 2.25 enters with weight a half: mean 2.125, variance 0.5078125
    norms = [1.0, 3.0, 2.25]
    _, after, limit = reference.zclip([np.array([9.0])], norms, 1.0, decay=0.5, warmup=2, eps=0.0)
    wanted = 2.125 + 0.5078125 / 6.875
    assert limit == pytest.approx(wanted, rel=1e-15)
    assert after == [*norms, limit]


def test_a_tensor_has_an_average_of_its_own():
    history = [[4.0, 0.0, None], [2.0, 6.0, None], [8.0, None, 5.0]]
    tensors = [np.array([9.0]), np.array([9.0]), np.array([9.0])]
    clipped, after, limits = reference.adagc(tensors, history, ratio=1.0, decay=0.5, warmup=2)
    assert limits == [5.0, 6.0, 5.0]
    assert [float(t[0]) for t in clipped] == after[-1] == limits


def test_second_moments_are_kept_in_the_precision_of_their_tensor():
    for dtype in (np.float32, np.float64):
        past = [[np.array([0.1], dtype)], [np.array([0.2], dtype)]]
        (clipped,), _, changed = reference.spike_clip([np.array([9.0], dtype)], past, 1.0, decay=0.9, warmup=2)
        a, b = float(past[0][0][0]), float(past[1][0][0])
        v = 0.9 * float(dtype((1 - 0.9) * (a * a))) + (1 - 0.9) * (b * b)
        assert (clipped[0], changed) == (dtype(math.sqrt(float(dtype(v)))), 1)


def test_the_largest_singular_value_is_that_of_units_by_the_rest():
    kernel = np.zeros((2, 1, 2))
    kernel[0, 0, 0], kernel[1, 0, 1] = 4.0, 1.0
    for axes in ((0,), (2,)):
        (limited,), (value,) = reference.spectral_limit([kernel], [axes], 2.0)
        assert (value, limited[0, 0, 0], limited[1, 0, 1]) == (4.0, 2.0, 0.5)


@pytest.mark.parametrize("mode", ["propagate", "skip", "zero"])
def test_faults_change_no_state_unless_they_count_as_zero(mode):
    fault = [np.array([[math.nan, 3.0]])]
    for definition, state in (
        (reference.auto_clip, [1.0]),
        (reference.zclip, [1.0]),
        (reference.adagc, [[1.0]]),
        (reference.spike_clip, [[np.ones((1, 2))]]),
        (lambda *a, **k: reference.quantile_clip(*a, 1.0, **k), [0.5]),
    ):
        (clipped,), after, _ = definition(fault, state, nonfinite=mode)
        assert len(after) == (2 if mode == "zero" else 1)
        if mode != "zero":
            assert np.array_equal(
                clipped, np.full(clipped.shape, {"propagate": math.nan, "skip": 0.0}[mode]), equal_nan=True
            )
