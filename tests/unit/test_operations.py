"""What a plan computes beyond rearranging, against examples worked out by hand."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clipcore as cc
from clipcore.mapping.operations import OPERATIONS, compute, formula

EPS = {"source_eps": 1.0, "target_eps": 4.0}
EXAMPLES = {
    "sum": ([[1.0, 2.0], [10.0, 20.0]], {}, [11.0, 22.0]),
    "mean_of_biased": ([[1.0, 2.0], [10.0, 20.0]], {}, [-9.0, -18.0]),
    "repeat": ([[[7.0]]], {"count": 3}, [[7.0, 7.0, 7.0]]),
    "the_one": ([[5.0, 5.0]], {}, [5.0]),
    "weight_norm": ([[[3.0, 4.0], [6.0, 8.0]], [[5.0], [1.0]]], {}, [[3.0, 4.0], [0.6, 0.8]]),
    "norm": ([[[3.0, 4.0], [6.0, 8.0]]], {"axes": (1,)}, [[5.0], [10.0]]),
    "spectral_norm": ([[[2.0, 0.0], [0.0, 1.0]], [1.0, 0.0], [1.0, 0.0]], {"axis": 0}, [[1.0, 0.0], [0.0, 0.5]]),
    "rescaled": ([[2.0, 3.0], [0.0, 2.0]], EPS, [4.0, 3.0 * 2**0.5]),
    "scale_for_eps": ([[0.0, 2.0]], EPS, [2.0, 2**0.5]),
    "moved_variance": ([[3.0, 5.0]], EPS, [0.0, 2.0]),
    "scaled": ([[[1.0, 2.0]], [3.0, 5.0], [0.0, 0.0]], {**EPS, "axes": (1,)}, [[6.0, 20.0]]),
    # 2 * (7 - 1) * 3 - 5 * sqrt(0 + 4)
    "scaled_mean": (
        [[7.0], [3.0], [0.0], [1.0], [5.0]],
        {**EPS, "less": ("the bias before it", "its own bias")},
        [26.0],
    ),
    # 1 - 6 * sqrt(3 + 1) / 4
    "mean_without_bias": ([[1.0], [3.0], [4.0], [6.0]], {"eps": 1.0}, [-2.0]),
    "block_diagonal": ([[[[1.0, 2.0]], [[3.0, 4.0]]]], {}, [[[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 4.0]]]),
    "diagonal_blocks": ([[[[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 4.0]]]], {"groups": 2}, [[[1.0, 2.0]], [[3.0, 4.0]]]),
    "left_vector": ([[[0.0, 0.0], [0.0, 2.0]]], {"axis": 0, "shape": (2,)}, None),
    "right_vector": ([[[0.0, 0.0], [0.0, 2.0]]], {"axis": 0, "shape": (2,)}, None),
}


def arrays(values):
    return [np.array(value) for value in values]


def test_every_operation_has_an_example():
    assert set(EXAMPLES) == set(OPERATIONS)


@pytest.mark.parametrize("name", [name for name, (_, _, wanted) in EXAMPLES.items() if wanted is not None])
def test_an_operation_by_hand(name):
    given_arrays, numbers, wanted = EXAMPLES[name]
    assert compute(name, arrays(given_arrays), numbers) == pytest.approx(np.array(wanted), rel=1e-15, abs=1e-15)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_operation_names_what_it_takes_in_its_formula(name):
    given_arrays, numbers, _ = EXAMPLES[name]
    names = [f"tensor{index}" for index in range(len(given_arrays))]
    text = formula(name, names, numbers)
    assert names[0] in text or "u" in text
    assert set(numbers) == set(OPERATIONS[name].numbers)
    assert "{" not in text


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_the_vectors_of_a_kernel_give_it_back_under_spectral_norm(rows, columns, seed):
    kernel = np.random.default_rng(seed).standard_normal((rows, columns))
    u, v = (compute(name, [kernel], {"axis": 0, "shape": (-1,)}) for name in ("left_vector", "right_vector"))
    np.testing.assert_allclose(np.linalg.norm(u), 1, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(kernel.T @ u), np.linalg.norm(kernel, 2), rtol=1e-12)
    np.testing.assert_allclose(compute("spectral_norm", [kernel, u, v], {"axis": 0}), kernel, rtol=1e-12)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_blocks_go_onto_the_diagonal_and_back_bit_for_bit(groups, first, second, seed):
    kernel = np.random.default_rng(seed).standard_normal((groups, first, second, 2)).astype(np.float32)
    dense = compute("block_diagonal", [kernel], {})
    assert compute("diagonal_blocks", [dense], {"groups": groups}).tobytes() == kernel.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_result_is_rounded_once_to_the_dtype_of_the_first(dtype):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    first, second = np.array([1.0], kind), np.array([1e-3], kind)
    result = compute("sum", [first, second], {})
    assert result.dtype == kind
    assert result[0] == (first.astype(np.float64) + second.astype(np.float64)).astype(kind)[0]


@pytest.mark.parametrize(
    ("name", "values", "numbers", "message"),
    [
        ("mean_without_bias", [[1.0], [3.0], [0.0], [6.0]], {"eps": 1.0}, "a scale of 0"),
        ("moved_variance", [[1.0]], EPS, "would become negative with the target's eps of 4"),
        ("the_one", [[1.0, 2.0]], {}, "2 slopes from 1 to 2 do not fit into one"),
        ("diagonal_blocks", [[[[1.0, 2.0], [3.0, 4.0]]]], {"groups": 2}, "mixes what the target's 2 groups keep apart"),
    ],
)
def test_what_cannot_be_made_up_for_is_refused_with_the_remedy(name, values, numbers, message):
    with pytest.raises(cc.MappingError, match=message):
        compute(name, arrays(values), numbers)


def test_a_scale_of_0_without_a_bias_is_no_fault():
    result = compute("mean_without_bias", arrays([[1.0], [3.0], [0.0], [0.0]]), {"eps": 1.0})
    assert result.tolist() == [1.0]
