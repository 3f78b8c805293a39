"""Memory is looked through exactly, by several threads, and lent without a copy."""

import gc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipcore.memory import copies, each, is_finite, lent

FLOATS = [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float32, np.float64, np.complex64, np.complex128]


@given(st.sampled_from(FLOATS), st.lists(st.sampled_from([0.0, 1.0, -448.0, np.nan, np.inf, -np.inf]), max_size=9))
def test_finiteness_is_that_of_every_element(dtype, values):
    array = np.array(values, np.float32).astype(dtype)
    assert is_finite(array) == bool(np.isfinite(array).all())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_squares_that_overflow_are_no_fault(dtype):
    array = np.full((40, 30), np.finfo(dtype).max)
    assert is_finite(array)
    assert is_finite(array.T)
    assert is_finite(array[::2, ::-3])
    array[7, 8] = np.inf
    assert not is_finite(array.T)


def test_copies_are_the_same_bits_in_memory_of_their_own():
    shapes = [(3, 5), (), (0, 2), (7,), (1, 2, 3)]
    arrays = [np.arange(np.prod(s)).reshape(s).astype(d).T for s in shapes for d in (*FLOATS, np.bool_, np.int64)]
    kept = [(array.dtype, array.shape, array.tobytes()) for array in arrays]
    copied = copies(arrays)
    for array in arrays:
        array[...] = 1
    assert [(array.dtype, array.shape, array.tobytes()) for array in copied] == kept
    assert copies([]) == []


def test_integers_are_finite():
    assert is_finite(np.arange(3))
    assert is_finite(np.array([True]))


def test_results_come_in_the_order_of_the_arrays():
    arrays = [np.full(size, size) for size in (100_000, 1, 5, 50_000)]
    assert each(np.max, arrays) == [100_000, 1, 5, 50_000]
    assert each(np.max, []) == []


def test_an_exception_of_a_thread_is_the_callers():
    with pytest.raises(ValueError, match="zero-size"):
        each(np.max, [np.ones(2), np.ones(0)])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.bool_])
def test_what_is_lent_is_the_same_memory_and_lives_as_long(dtype):
    array = np.arange(12).astype(dtype).reshape(3, 4)
    array.flags.writeable = False
    again = lent(array.T)
    assert again.flags.writeable
    assert again.dtype == dtype
    assert np.shares_memory(again, array)
    kept = array.copy()
    del array
    gc.collect()
    assert np.array_equal(again, kept.T)
