"""Clipping inside tf.function and XLA: within one rounding of the eager result, and without asking the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

# There is no public way to hear what AutoGraph warns of.
from tensorflow.python.autograph.utils import ag_logging

import clipcore as cc

DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
compiled = pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])


# Tracing and XLA take nearly all of the time here: of three lists any two values meet, or as many as there are rows.
def each_way_in_turn(names: str, first: Sequence[Any], second: Sequence[Any]) -> Any:
    """Every pair of two lists, in a graph and under XLA in turn."""
    return _rows(names, [(a, b, (i + j) % 2 == 1) for i, a in enumerate(first) for j, b in enumerate(second)])


def each_dtype_in_turn(first: Sequence[str], dtypes: Sequence[str]) -> Any:
    """Every name in a graph and under XLA, each time with the next dtype, so that each dtype meets both."""
    rows = [(a, dtypes[(i + jit) % len(dtypes)], jit) for i, a in enumerate(first) for jit in (False, True)]
    return _rows("name,dtype", rows)


def _rows(names: str, rows: Sequence[tuple[Any, Any, bool]]) -> Any:
    ids = [f"{a}-{b}-{'xla' if jit else 'graph'}" for a, b, jit in rows]
    return pytest.mark.parametrize(f"{names},jit", rows, ids=ids)


def clip_compiled(tensors: Any, policy: cc.Policy, jit: bool) -> tuple[Any, cc.ClipReport]:
    return tf.function(lambda grads: cc.clip(grads, policy), jit_compile=jit, autograph=False)(tensors)


def assert_within_one_ulp(actual: Any, wanted: Any, ulps: float = 1.0) -> None:
    # a bfloat16 scalar's __array__ gives no array (TensorFlow 2.21)
    a, w = (np.asarray(x.numpy() if tf.is_tensor(x) else x) for x in (actual, wanted))
    assert (a.dtype, a.shape) == (w.dtype, w.shape)
    unit = ulps * float(ml_dtypes.finfo(w.real.dtype).eps)
    unit = max(unit, 1e-14) if w.real.dtype == np.float64 else unit
    tiny = float(ml_dtypes.finfo(w.real.dtype).tiny)  # TensorFlow flushes what is smaller
    for part, target in ((a.real, w.real), (a.imag, w.imag)):
        x, y = part.astype(np.float64), target.astype(np.float64)
        with np.errstate(invalid="ignore"):
            close = (np.abs(x - y) <= unit * np.abs(y) + tiny) | (np.isnan(x) & np.isnan(y)) | (x == y)
        assert close.all(), f"{x[~close][:3]} where {y[~close][:3]} is wanted"


def assert_like_eager(arrays: list[Any], policy: cc.Policy, jit: bool) -> None:
    tensors = [tf.constant(array) for array in arrays]
    assert_alike(clip_compiled(tensors, policy, jit), cc.clip(tensors, policy))


def assert_alike(actual: tuple[Any, cc.ClipReport], wanted: tuple[Any, cc.ClipReport]) -> None:
    for result, target in zip(actual[0], wanted[0], strict=True):
        assert_within_one_ulp(result, target)
    assert_same_report(actual[1], wanted[1])


def assert_same_report(report: cc.ClipReport, eager: cc.ClipReport, tolerance: float = 1e-14) -> None:
    # a norm within rounding of its limit (AutoClip's first one is the limit) may be on either side of it
    fields = ("norm", "scale", "nonfinite", "limit", *(() if 1 - tolerance < eager.scale < 1 else ("clipped",)))
    for field in fields:
        value, target = float(getattr(report, field)), float(getattr(eager, field))
        assert value == pytest.approx(target, rel=tolerance, nan_ok=True), field


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
def test_compiled_clipping_is_within_one_ulp_of_eager(case: str, jit: bool) -> None:
    arrays, max_norm, p = CASES[case]
    assert_like_eager(arrays, cc.ClipByGlobalNorm(max_norm, p=p), jit)
    if len(arrays) > 1:  # of one tensor, both do the same
        assert_like_eager(arrays, cc.ClipByNorm(max_norm, p=p), jit)


@each_way_in_turn("mode,dtype", ["propagate", "zero", "skip"], DTYPES)
def test_compiled_faults_are_treated_as_the_policy_says(mode: Any, dtype: str, jit: bool) -> None:
    arrays = [cast([math.inf, 3, -4, math.nan], dtype), cast([1, 2], dtype)]
    kind = [cc.ClipByGlobalNorm, cc.ClipByNorm][DTYPES.index(dtype) // 2 % 2]  # each in a graph and under XLA
    assert_like_eager(arrays, kind(1.0, nonfinite=mode), jit)
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


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_any_list_is_clipped_in_a_graph_as_it_is_eagerly(p: float) -> None:
    policy = cc.ClipByGlobalNorm(0.75, p=p)
    spec = [tf.TensorSpec([None], tf.float32)] * 3
    clip = tf.function(lambda *grads: cc.clip(list(grads), policy), input_signature=spec, autograph=False)

    @given(
        st.lists(st.lists(st.floats(-(2.0**66), 2.0**66, width=32), max_size=5), min_size=3, max_size=3),
        st.integers(-70, 0),
    )
    def check(values: Any, power: int) -> None:
        tensors = [tf.constant(np.ldexp(np.array(v, np.float32), power)) for v in values]
        # a graph flushes subnormal numbers, and the eager path does not
        tensors = [tf.where(tf.abs(x) < np.finfo(np.float32).tiny, tf.zeros_like(x), x) for x in tensors]
        assert_alike(clip(*tensors), cc.clip(tensors, policy))

    check()


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
def test_a_tensor_that_turns_out_to_be_empty_has_the_norm_zero(dtype: str) -> None:
    @tf.function(input_signature=[tf.TensorSpec(None, dtype)], autograph=False)
    def traced(x: Any) -> Any:
        return [cc.clip(x, cc.ClipByGlobalNorm(1.0, p=p)) for p in (1.0, 2.0, 3.0, math.inf)]

    for clipped, report in traced(tf.zeros([0, 3], dtype)):
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


RNG = np.random.default_rng(0)
NAMES = ["dense/kernel", "dense/bias", "conv/kernel"]
SHAPES = [(5, 4), (4,), (2, 3, 3, 6)]


def step(dtype: str = "float32", size: float = 1.0) -> dict[str, Any]:
    """Gradients of one step, by name."""
    return {name: tf.constant(cast(size * RNG.normal(size=s), dtype)) for name, s in zip(NAMES, SHAPES, strict=True)}


# name: (policy, the sizes of the gradients step by step)
POLICIES: dict[str, tuple[cc.Policy, list[float]]] = {
    "average norm": (cc.ClipByAverageNorm(0.05), [1.0]),
    "block rms": (cc.ClipByBlockRMS(0.5), [1.0]),
    "AGC": (cc.AdaptiveClip(0.3, unit_axis=-1), [1.0]),
    "AGC, biases left alone": (cc.AdaptiveClip(0.3, unit_axis=-1, exclude="bias$"), [1.0]),
    "AutoClip": (cc.AutoClip(60.0, window=3), [1.0, 3.0, 0.5, 2.0, 9.0]),
    "ZClip": (cc.ZClip(1.0, warmup=2), [1.0, 2.0, 9.0, 1.5, 30.0]),
    "AdaGC": (cc.AdaGC(4.0, warmup=2), [1.0, 2.0, 9.0, 1.0, 30.0]),
    "SpikeClip": (cc.SpikeClip(4.0, decay=0.9, warmup=2), [1.0, 1.0, 9.0, 1.0]),
    "chain": (cc.Chain([cc.ClipByValue(0.5), cc.ZClip(1.0, warmup=1), cc.ClipByNorm(2.0)]), [1.0, 2.0, 9.0]),
    "per group": (
        cc.PerGroup({"bias": cc.ClipByValue(0.1), "dense": cc.AdaGC(warmup=1)}, default=cc.AutoClip(50.0, window=4)),
        [1.0, 9.0, 2.0],
    ),
    "per group, others left alone": (cc.PerGroup({"bias": cc.ClipByNorm(0.1)}), [1.0]),
    "UnitNorm": (cc.UnitNorm(unit_axis=-1), [1.0]),
    "MinMaxNorm": (cc.MinMaxNorm(1.0, 2.5, unit_axis=-1), [1.0]),
    "Box": (cc.Box(-0.25, 0.5), [1.0]),
}
# What promises a hard bound takes the largest factor eagerly, and compiled one that is a little smaller.
BOUNDED: dict[str, cc.Policy] = {
    "per example": cc.PerExampleClip(1.0),
    "per example and layer": cc.PerExampleClip(1.0, per_layer=True),
    "quantile": cc.QuantileClip(1.0),
    "MaxNorm": cc.MaxNorm(1.5, unit_axis=-1),
    "SpectralLimit": cc.SpectralLimit(1.0, unit_axis=-1),
    "SpectralLimit by powers": cc.SpectralLimit(1.0, method="power", unit_axis=-1),
}


def assert_steps_like_eager(policy: cc.Policy, steps: list[dict[str, Any]], jit: bool, ulps: float = 1.0) -> None:
    params = {name: tf.constant(RNG.normal(size=x.shape), x.dtype) for name, x in steps[0].items()}
    update = tf.function(lambda grads, state: policy.update(grads, state, params), jit_compile=jit, autograph=False)
    state = eager_state = policy.init(steps[0], params)
    for grads in steps:
        results, state, report = update(grads, state)
        wanted, eager_state, eager = policy.update(grads, eager_state, params)
        for result, target in zip(tf.nest.flatten(results), tf.nest.flatten(wanted), strict=True):
            assert_within_one_ulp(result, target, ulps)
        unit = max(float(ml_dtypes.finfo(x.dtype.as_numpy_dtype).eps) for x in grads.values())
        assert_same_report(report, eager, 1e-14 if ulps == 1 else max(2.5 * unit, 1e-14))
        for value, target in zip(tf.nest.flatten(state), tf.nest.flatten(eager_state), strict=True):
            target = np.asarray(target)
            assert (value.dtype.as_numpy_dtype, value.shape) == (target.dtype, target.shape)
            # the kernels take a second moment's square before the element is rounded to its dtype
            np.testing.assert_allclose(value, target, rtol=1e-14 if target.dtype == np.float64 else 4 * unit)


@each_dtype_in_turn(list(POLICIES), ["float32", "float64", "bfloat16"])
def test_a_compiled_policy_does_what_the_eager_one_does(name: str, dtype: str, jit: bool) -> None:
    policy, sizes = POLICIES[name]
    assert_steps_like_eager(policy, [step(dtype, size) for size in sizes], jit)


@each_dtype_in_turn(list(BOUNDED), ["float16", "bfloat16", "float32", "float64"])
def test_a_compiled_hard_bound_is_kept_and_nearly_reached(name: str, dtype: str, jit: bool) -> None:
    policy, grads = BOUNDED[name], step(dtype)
    if not policy.keeps_shapes:
        grads = {name: x for name, x in grads.items() if x.shape[0] == 4 or x.shape.rank == 4}
        # positive ones, since their sum would else lose digits
        grads = {name: tf.abs(tf.concat([x, x], 0)[:4]) for name, x in grads.items()}
    assert_steps_like_eager(policy, [grads], jit, ulps=4)


@each_way_in_turn("dtype,limit", ["float16", "bfloat16", "float32", "complex64"], [1e-5, 0.3, 1.0])
def test_what_is_stored_never_exceeds_a_hard_bound(dtype: str, limit: float, jit: bool) -> None:
    rng = np.random.default_rng(1)
    array = cast(10.0 ** rng.integers(-6, 3, (50, 40)) * rng.normal(size=(50, 40)), dtype)
    policy = cc.MaxNorm(limit, unit_axis=0)
    stored, report = clip_compiled(tf.constant(array), policy, jit)
    for unit in np.asarray(stored):
        wide = unit.astype(np.complex128)
        exact = math.sqrt(math.fsum([*np.square(wide.real), *np.square(wide.imag)]))
        assert exact <= limit
    assert bool(report.clipped)


@compiled
def test_a_compiled_fault_teaches_nothing(jit: bool) -> None:
    for policy in (cc.AutoClip(50.0, window=4), cc.ZClip(warmup=1), cc.AdaGC(warmup=1), cc.SpikeClip(warmup=1)):
        update = tf.function(policy.update, jit_compile=jit, autograph=False)
        state = policy.init([tf.zeros(3)])
        _, state, _ = update([tf.constant([1.0, 2.0, 3.0])], state)
        before = [np.array(value) for value in tf.nest.flatten(state)]
        clipped, state, report = update([tf.constant([1.0, math.nan, 3.0])], state)
        assert np.isnan(clipped[0]).all()
        assert int(report.nonfinite) == 1
        for value, target in zip(tf.nest.flatten(state), before, strict=True):
            np.testing.assert_array_equal(value, target)


@compiled
def test_sparse_gradients_are_made_dense_where_elements_are_compared(jit: bool) -> None:
    def step(values: Any) -> Any:
        sparse = tf.IndexedSlices(values, tf.constant([3, 1, 3]), tf.constant([5, 1]))
        return policy.update([sparse], policy.init([sparse]))

    policy, values = cc.SpikeClip(warmup=1), tf.constant([[3.0], [1.0], [4.0]])
    (eager,), _, _ = step(values)
    ((dense,), _, _) = tf.function(step, jit_compile=jit, autograph=False)(values)
    assert eager.numpy().ravel().tolist() == [0, 1, 0, 7, 0]
    np.testing.assert_array_equal(dense, eager)


def test_a_sparse_gradient_without_a_shape_is_refused_where_it_must_be_dense() -> None:
    sparse = tf.IndexedSlices(tf.constant([[3.0]]), tf.constant([3]))
    with pytest.raises(cc.InvalidInput, match="has no dense_shape"):
        cc.Clipper(cc.SpikeClip()).clip([sparse])


def test_a_zero_gradient_has_a_derivative() -> None:
    x = tf.zeros(3)
    for policy in (cc.ClipByGlobalNorm(1.0), cc.ClipByGlobalNorm(1.0, p=3.0), cc.MaxNorm(1.0, unit_axis=0)):
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(cc.clip(x, policy)[0])
        np.testing.assert_array_equal(tape.gradient(total, x), np.ones(3))


def test_autograph_has_nothing_to_warn_of(backend, monkeypatch):
    said = []
    monkeypatch.setattr(ag_logging, "warning", lambda *args, **kwargs: said.append(args))
    grads = {"a": tf.constant([3.0, 4.0]), "b": tf.constant([[1.0]])}
    policies = [
        cc.ClipByGlobalNorm(1.0),
        cc.ClipByValue(1.0),
        cc.Chain([cc.ClipByValue(1.0), cc.ClipByGlobalNorm(1.0)]),
        cc.PerGroup({"a": cc.ClipByNorm(1.0)}),
        cc.AdaptiveClip(unit_axis=0),
        cc.MaxNorm(1.0, unit_axis=0),
    ]
    for policy in policies:
        tf.function(lambda g, policy=policy: cc.clip(g, policy, params=g))(grads)
        tf.function(lambda g, policy=policy: cc.clip_together({"x": g}, policy, params={"x": g}))(grads)
        tf.function(lambda g, policy=policy: policy.update(g, policy.init(g, g), g))(grads)
    assert not said
