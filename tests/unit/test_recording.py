"""What is recorded is kept once, and beyond a limit in a file."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipcore.mapping.recording import Recorder, Shelf


@given(st.lists(st.integers(0, 3), max_size=20), st.integers(0, 400))
def test_every_array_comes_back_as_it_was_whatever_is_held(numbers, most):
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((4, 5)).astype(np.float32) for _ in range(4)]
    shelf = Shelf(most)
    kept = [shelf.keep(values[number].copy()) for number in numbers]
    for number, array in zip(numbers, kept, strict=True):
        np.testing.assert_array_equal(array, values[number])
    assert shelf.held <= most
    assert len({id(array) for array in kept}) == len(set(numbers))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.int64, np.bool_, np.complex64])
def test_arrays_of_every_dtype_may_lie_in_the_file(dtype):
    value = np.arange(12).reshape(3, 4).astype(dtype).T
    kept = Shelf(0).keep(value)
    assert isinstance(kept, np.memmap)
    assert kept.dtype == value.dtype
    np.testing.assert_array_equal(kept, value)
    with pytest.raises(ValueError, match="read-only"):
        kept[0] = 0


def test_empty_arrays_and_what_is_no_array_are_kept():
    shelf = Shelf(0)
    assert shelf.keep(np.zeros((0, 3))).shape == (0, 3)
    assert shelf.keep("text") == "text"
    assert np.isnan(shelf.keep(np.full(3, np.nan))).all()


def test_a_recorder_keeps_calls_in_order_of_execution_and_only_of_its_layers():
    recorder = Recorder({"a", "b"})
    x = np.ones(3)
    recorder.before("a", [x])
    recorder.before("other", [x])
    recorder.before("b", [x])
    recorder.after("b", {"y": x + 1})
    recorder.after("other", x)
    recorder.after("a", x)
    assert [call.layer for call in recorder.calls] == ["a", "b"]
    assert recorder.calls[1].output["y"].tolist() == [2.0, 2.0, 2.0]
    assert recorder.calls[0].inputs[0] is recorder.calls[0].output
