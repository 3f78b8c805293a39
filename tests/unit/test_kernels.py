"""The CPU kernels: the fast norm's bounds hold the exact one, and every rounding is the one that is asked for."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clipcore.clipping import kernels
from clipcore.clipping.kernels import Wide

FINITE = st.floats(allow_nan=False, allow_infinity=False)
ARRAYS = st.lists(
    st.sampled_from([np.float16, np.float32, np.float64]).flatmap(
        lambda dtype: hnp.arrays(
            dtype,
            hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=6),
            elements=hnp.from_dtype(np.dtype(dtype), allow_nan=False, allow_infinity=False),
        )
    ),
    max_size=3,
)


def as_fraction(value):
    return Fraction(float(value.mantissa)) * Fraction(2) ** int(value.exponent if value.mantissa else 0)


def joint(arrays, p):
    return kernels.join(kernels.norms(arrays, p), p)


def rational_sum(arrays, power):
    return sum((abs(Fraction(float(x))) ** power for array in arrays for x in array.ravel()), Fraction(0))


@given(ARRAYS, st.sampled_from([1.0, 2.0, math.inf]))
def test_the_fast_bounds_hold_the_exact_norm(arrays, p):
    fast, exact = as_fraction(joint(arrays, p)), as_fraction(kernels.exact_norm(arrays, p))
    assert abs(fast - exact) <= exact * Fraction(kernels.RELATIVE_ERROR)


@given(ARRAYS)
def test_the_exact_norm_is_the_rational_one_rounded_to_53_bits(arrays):
    norm = as_fraction(kernels.exact_norm(arrays, 2.0))
    square = rational_sum(arrays, 2)
    half_unit = norm * Fraction(2) ** -53
    assert (norm - half_unit) ** 2 <= square <= (norm + half_unit) ** 2
    assert (
        abs(as_fraction(kernels.exact_norm(arrays, 1.0)) - rational_sum(arrays, 1))
        <= rational_sum(arrays, 1) * Fraction(2) ** -53
    )


@given(hnp.arrays(np.float32, st.integers(0, 300), elements=st.floats(-1e3, 1e3, width=32)), st.randoms())
def test_the_exact_norm_depends_on_no_order_and_no_split(array, random):
    order = list(range(array.size))
    random.shuffle(order)
    cut = random.randint(0, array.size)
    shuffled = array[order]
    for p in (1.0, 2.0, 3.0, math.inf):
        assert kernels.exact_norm([array], p) == kernels.exact_norm([shuffled[:cut], shuffled[cut:]], p)


@given(hnp.arrays(np.float64, st.integers(1, 5), elements=FINITE), st.sampled_from([1.0, 2.0, math.inf]), st.randoms())
def test_the_exact_norm_of_complex_numbers_with_one_part_is_that_of_real_ones(array, p, random):
    turned = array * np.array([random.choice([1, 1j]) for _ in array])
    assert kernels.exact_norm([turned], p) == kernels.exact_norm([array], p)


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_the_exact_norm_of_complex_numbers_rounds_ties_to_even(p):
    for low in (1, 3):  # 5 * whole has 54 bits and ends in 1: it lies in the middle of two numbers of 53 bits
        whole = (1 << 51) + low
        norm = kernels.exact_norm([np.array([3 * whole + 4j * whole])], p)
        assert as_fraction(norm) == round(Fraction(5 * whole, 2)) * 2


def test_a_sum_of_magnitudes_above_a_tie_by_however_little_is_rounded_up():
    above = kernels.exact_norm([np.array([2.0**53, 1, 5e-324 + 5e-324j])], 1.0)
    assert as_fraction(above) == 2**53 + 2


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, 50.0, math.inf])
@pytest.mark.parametrize("unit", [5e-324, 1e-300, 1.0, 1e300])
def test_norms_of_equal_elements_by_hand(p, unit):
    n = 9
    norm = float(joint([np.full(n, unit)], p))
    assert norm == pytest.approx(unit * n ** (1 / p), rel=1e-14)


@given(FINITE.map(abs), st.integers(-3000, 3000), FINITE.map(abs))
def test_wide_numbers_compare_as_their_values_do(value, exponent, limit):
    wide = Wide.of(value, exponent)
    assert as_fraction(wide) == Fraction(value) * Fraction(2) ** exponent
    assert wide.exceeds(Wide.of(limit)) == (as_fraction(wide) > Fraction(limit))


def test_nothing_exceeds_infinity_and_a_wide_number_out_of_range_reads_as_infinity():
    assert not Wide.of(1.0, 5000).exceeds(Wide.of(math.inf))
    assert float(Wide.of(1.0, 5000)) == math.inf


@given(FINITE)
def test_float64_is_rounded_to_bfloat16_once(value):
    rounded = float(kernels.round_once(np.array([value]), np.dtype(ml_dtypes.bfloat16))[0])
    if math.isinf(rounded):
        assert abs(value) >= (2 - 2**-8) * 2.0**127
        return
    neighbours = [float(x) for x in _around(rounded)]
    assert all(abs(Fraction(value) - Fraction(rounded)) <= abs(Fraction(value) - Fraction(x)) for x in neighbours)


def _around(rounded):
    bits = np.array([rounded], ml_dtypes.bfloat16).view(np.uint16)
    near = np.array([bits[0] - (bits[0] & 0x7FFF > 0), bits[0] + 1], np.uint16).view(ml_dtypes.bfloat16)
    return [x for x in near if np.isfinite(x)]


def test_ml_dtypes_rounds_twice_where_this_does_not():
    # just above the middle of 1 and 1 + 2**-7: through float32 it would fall to 1
    value = np.array([1 + 2**-8 + 2**-40])
    assert float(kernels.round_once(value, np.dtype(ml_dtypes.bfloat16))[0]) == 1 + 2**-7


@given(
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3),  # all counts exact in bfloat16
    st.sampled_from([np.float16, ml_dtypes.bfloat16, np.float32, np.complex128]),
    st.data(),
)
def test_fresh_arrays_are_aligned_and_keep_the_order_of_axes(shape, dtype, data):
    axes = data.draw(st.permutations(range(len(shape))))
    array = np.zeros(shape, dtype).transpose(axes)
    fresh = kernels.empty_like(array)
    assert fresh.shape == array.shape
    assert fresh.dtype == array.dtype
    if array.size:
        assert fresh.ctypes.data % 64 == 0
    places = np.arange(array.size).reshape(shape).transpose(axes)
    np.copyto(fresh, places.astype(fresh.dtype))
    assert fresh.ravel("K").real.astype(int).tolist() == list(range(array.size))


@pytest.mark.parametrize(
    ("value", "dtype", "bound"),
    [
        (0.1, np.float16, 0.0999755859375),
        (1e300, np.float16, 65504.0),
        (-1e300, np.float32, -float(np.finfo(np.float32).max)),
        (1e300, ml_dtypes.bfloat16, (2 - 2**-7) * 2.0**127),
        (math.inf, np.float32, math.inf),
    ],
)
def test_a_clamps_bound_is_rounded_and_a_finite_one_stays_finite(value, dtype, bound):
    assert float(kernels.bound_in(value, np.dtype(dtype))) == bound


def test_the_first_pass_is_exact_enough_for_all_but_about_one_scale_in_a_million():
    rng = np.random.default_rng(0)
    open_ = 0
    for _ in range(500):
        norm = kernels.norms([rng.standard_normal(1000).astype(np.float32)], 2.0)
        bounds = (norm.times(1 + sign * kernels.RELATIVE_ERROR) for sign in (-1, 1))
        factors = [kernels.quotient(Wide.of(1.0), bound) for bound in bounds]
        open_ += not kernels.same_multiplier(*factors, np.float32).all()
    assert open_ <= 1
