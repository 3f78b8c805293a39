"""Clipping inside tf.function and XLA: within one rounding of the eager result, and without asking the host."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import clipcore as cc

DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
compiled = pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])


def clip_compiled(tensors: Any, policy: cc.Policy, jit: bool) -> tuple[Any, cc.ClipReport]:
    return tf.function(lambda grads: cc.clip(grads, policy), jit_compile=jit, autograph=False)(tensors)


def assert_within_one_ulp(actual: Any, wanted: Any) -> None:
    a, w = np.asarray(actual), np.asarray(wanted)
    assert (a.dtype, a.shape) == (w.dtype, w.shape)
    unit = float(ml_dtypes.finfo(w.real.dtype).eps)
    tiny = float(ml_dtypes.finfo(w.real.dtype).tiny)  # TensorFlow flushes what is smaller
    for part, target in ((a.real, w.real), (a.imag, w.imag)):
        x, y = part.astype(np.float64), target.astype(np.float64)
        with np.errstate(invalid="ignore"):
            close = (np.abs(x - y) <= unit * np.abs(y) + tiny) | (np.isnan(x) & np.isnan(y)) | (x == y)
        assert close.all(), f"{x[~close][:3]} where {y[~close][:3]} is wanted"


def assert_like_eager(arrays: list[Any], policy: cc.Policy, jit: bool) -> None:
    tensors = [tf.constant(array) for array in arrays]
    results, report = clip_compiled(tensors, policy, jit)
    wanted, eager = cc.clip(tensors, policy)
    for result, target in zip(results, wanted, strict=True):
        assert_within_one_ulp(result, target)
    for field in ("norm", "scale", "clipped", "nonfinite"):
        value, target = float(getattr(report, field)), float(getattr(eager, field))
        assert value == pytest.approx(target, rel=1e-14, nan_ok=True), field


def cast(values: Any, dtype: str) -> np.ndarray:
    return np.asarray(values).astype(getattr(ml_dtypes, dtype, dtype))


# (values, limit, p): what the frameworks' own clipping gets wrong, see facts on peers
CASES: dict[str, tuple[list[Any], float, float]] = {
    "in range": ([np.float32([3, 4])], 41.0, 2.0),
    "at the limit": ([np.float32([3, 4])], 5.0, 2.0),
    "float32 squares overflow": ([np.full(3, 1e20, np.float32)], 1.0, 2.0),
    "float32 squares underflow": ([np.float32([3e-30, 4e-30])], 1e-30, 2.0),
    "float16 sums overflow": ([np.full(100_000, 300, np.float16)], 1.0, 2.0),
    "the factor is subnormal in float32": ([np.full(4, 3e38, np.float32)], 1e-5, 2.0),
    "float64 squares overflow": ([np.array([3e300, 4e300])], 1.0, 2.0),
    "float64 squares underflow": ([np.array([3e-300, 4e-300])], 1e-300, 2.0),
    "the factor is subnormal in float64": ([np.array([3e200, 4e200])], 1e-150, 2.0),
    "the norm leaves float64": ([np.array([1.7e308, 1.7e308])], 1.0, 2.0),
    "the limit is at the top": ([np.array([1e308, 1e308])], 1e308, 2.0),
    "p = 1": ([np.float32([1e38, 3e38])], 1.0, 1.0),
    "p = 3": ([np.float32([1e13, 1e13])], 1.0, 3.0),
    "p = 1.5 in float64": ([np.array([1e250, -3e250, 0])], 1.0, 1.5),
    "p = 100,000": ([np.complex64([3 + 4j, 1j])], 1.0, 1e5),
    "p = inf": ([np.float32([1e38, -3e38])], 1.0, math.inf),
    "complex, p = inf": ([np.complex128([3 + 4j])], 1.0, math.inf),
    "mixed dtypes": ([np.full(3, 100, np.float16), np.ones((2, 2), np.float32), np.ones(2)], 1.0, 2.0),
    "empty and 0-d": ([np.zeros((0, 3), np.float32), np.float32([3, 4]), np.array(5, np.float32)], 1.0, 2.0),
    "only empty": ([np.zeros((0, 3), np.float32)], 1.0, 2.0),
    "zeros, limit 0": ([np.zeros(3, np.float32)], 0.0, 2.0),
    "limit 0": ([np.ones(3, np.float32)], 0.0, 2.0),
    "limit inf": ([np.float32([3, 4])], math.inf, 2.0),
    "more than one part": ([np.full(1_200_000, 0.1, np.float32)], 1.0, 2.0),
}


@compiled
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", [cc.ClipByGlobalNorm, cc.ClipByNorm])
def test_compiled_clipping_is_within_one_ulp_of_eager(case: str, policy: Any, jit: bool) -> None:
    arrays, max_norm, p = CASES[case]
    assert_like_eager(arrays, policy(max_norm, p=p), jit)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["propagate", "zero", "skip"])
def test_compiled_faults_are_treated_as_the_policy_says(mode: Any, dtype: str, jit: bool) -> None:
    arrays = [cast([math.inf, 3, -4, math.nan], dtype), cast([1, 2], dtype)]
    assert_like_eager(arrays, cc.ClipByGlobalNorm(1.0, nonfinite=mode), jit)
    assert_like_eager(arrays, cc.ClipByNorm(1.0, nonfinite=mode), jit)
    if not dtype.startswith("complex"):
        assert_like_eager(arrays, cc.ClipByValue(-0.5, 2.0, nonfinite=mode), jit)


@compiled
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_compiled_clipping_by_value_gives_the_bits_of_eager(dtype: str, jit: bool) -> None:
    tensor = tf.constant(cast([-math.inf, -3, -0.5, 0.1, 0.3, 7, math.inf], dtype))
    policy = cc.ClipByValue(-0.7, 0.3)
    (result,), report = clip_compiled([tensor], policy, jit)
    (wanted,), _ = cc.clip([tensor], policy)
    assert np.asarray(result).tobytes() == np.asarray(wanted).tobytes()
    assert bool(report.clipped)


@settings(max_examples=10)
@given(
    st.lists(st.lists(st.floats(-(2.0**66), 2.0**66, width=32), min_size=1, max_size=5), min_size=1, max_size=3),
    st.floats(1e-3, 1e3),
    st.sampled_from([1.0, 2.0, 3.0, math.inf]),
)
def test_any_list_is_clipped_in_a_graph_as_it_is_eagerly(values: Any, max_norm: float, p: float) -> None:
    assert_like_eager([np.array(v, np.float32) for v in values], cc.ClipByGlobalNorm(max_norm, p=p), jit=False)


@compiled
def test_compiled_sums_are_exact_to_1e_14(jit: bool) -> None:
    values = np.full(3_000_000, 0.1, np.float32)
    _, report = clip_compiled([tf.constant(values)], cc.ClipByGlobalNorm(1.0), jit)
    exact = math.sqrt(3_000_000) * float(np.float32(0.1))
    assert abs(float(report.norm) - exact) <= 1e-14 * exact


@compiled
def test_a_traced_function_returns_the_structure_and_the_report(jit: bool) -> None:
    grads = {"a": tf.constant([3.0]), "b": (tf.constant([4.0]), None)}
    clipped, report = clip_compiled(grads, cc.ClipByGlobalNorm(1.0), jit)
    assert clipped["b"][1] is None
    assert isinstance(report, cc.ClipReport)
    assert all(isinstance(field, tf.Tensor) for field in report)
    assert float(report.norm) == 5.0


@compiled
def test_sparse_duplicates_are_summed_in_a_graph(jit: bool) -> None:
    sparse = tf.IndexedSlices(tf.constant([[3.0], [1.0], [4.0], [2.0]]), tf.constant([3, 1, 3, 0]), tf.constant([5, 1]))
    policy = cc.ClipByGlobalNorm(1.0)
    (clipped,), report = clip_compiled([sparse], policy, jit)
    (wanted,), eager = cc.clip([sparse], policy)
    np.testing.assert_allclose(tf.convert_to_tensor(clipped), tf.convert_to_tensor(wanted), rtol=1e-7)
    assert float(report.norm) == pytest.approx(eager.norm, rel=1e-15)


@compiled
@pytest.mark.parametrize(
    ("values", "dtype", "total"),
    [
        ([1.0] * 3000, "float16", 3000.0),
        ([1.0] * 3000, "bfloat16", 3008.0),  # the nearest bfloat16
        ([6e4, 6e4, -6e4], "float16", 6e4),
        ([1e8, 1.0, -1e8], "float32", 1.0),
        ([1e8, 1j, -1e8], "complex64", 1.0),
    ],
)
def test_duplicates_are_summed_in_float64_in_a_graph(values: Any, dtype: str, total: float, jit: bool) -> None:
    sparse = tf.IndexedSlices(tf.constant(cast(values, dtype)), tf.constant([0] * len(values)), tf.constant([3]))
    assert float(clip_compiled([sparse], cc.ClipByGlobalNorm(1e9), jit)[1].norm) == total


def test_unknown_shapes_are_clipped() -> None:
    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.float32)], autograph=False)
    def traced(x: Any) -> Any:
        return cc.clip(x, cc.ClipByGlobalNorm(1.0))

    clipped, _ = traced(tf.constant([[3.0, 4.0]]))
    np.testing.assert_array_equal(clipped, np.float32([[0.6, 0.8]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_a_tensor_that_turns_out_to_be_empty_has_the_norm_zero(dtype: str, p: float) -> None:
    @tf.function(input_signature=[tf.TensorSpec(None, dtype)], autograph=False)
    def traced(x: Any) -> Any:
        return cc.clip(x, cc.ClipByGlobalNorm(1.0, p=p))

    clipped, report = traced(tf.zeros([0, 3], dtype))
    assert clipped.shape == (0, 3)
    assert (float(report.norm), float(report.scale), bool(report.clipped)) == (0.0, 1.0, False)


@compiled
def test_raising_inside_a_graph_is_a_clear_error(jit: bool) -> None:
    with pytest.raises(cc.InvalidInput, match="nonfinite='raise' reads the gradients"):
        clip_compiled([tf.constant([1.0])], cc.ClipByGlobalNorm(1.0, nonfinite="raise"), jit)


@compiled
@pytest.mark.parametrize(
    "grads", [[tf.constant([1])], [tf.constant([1.0]), np.ones(1)], ["gradient"]], ids=["ints", "two", "str"]
)
def test_an_error_keeps_its_class_and_its_sentence_on_its_way_out_of_a_traced_function(grads: Any, jit: bool) -> None:
    def by_hand(grads: Any) -> Any:
        return cc.clip(grads, cc.ClipByGlobalNorm(1.0))

    with pytest.raises(cc.InvalidInput) as eager:
        by_hand(grads)
    with pytest.raises(cc.InvalidInput) as traced:
        tf.function(lambda: by_hand(grads), jit_compile=jit)()
    assert str(eager.value) in str(traced.value)


def test_autograph_leaves_clipcore_alone() -> None:
    @tf.function
    def traced(x: Any) -> Any:
        clipped, report = cc.clip([x], cc.ClipByGlobalNorm(1.0))
        if report.clipped:  # AutoGraph makes this a branch of the graph
            clipped = [clipped[0] * 2]
        return clipped[0]

    np.testing.assert_allclose(traced(tf.constant([3.0, 4.0])), [1.2, 1.6], rtol=1e-6)
