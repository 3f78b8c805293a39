"""Host views and tensors made of arrays: every bit, no copy where none is due, and no memory that dies too early."""

from __future__ import annotations

import gc
from typing import Any

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

import clipcore as cc
from clipcore.clipping.kernels import empty_like

DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
SHAPES = [(), (0,), (3, 0), (1,), (2, 3), (4, 1, 5)]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def array_of(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    numpy_dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape) * 3
    return np.asarray(values + 1j * rng.normal(size=shape) if numpy_dtype.kind == "c" else values).astype(numpy_dtype)


def aligned(array: np.ndarray) -> np.ndarray:
    copy = empty_like(array)
    copy[...] = array
    return copy


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@every_dtype
@every_shape
def test_a_tensor_is_shown_with_the_bits_it_has(backend: Any, dtype: str, shape: tuple[int, ...]) -> None:
    array = array_of(dtype, shape)
    (view,) = backend.to_host([tf.constant(array)])
    assert same_bits(view, array)


@every_dtype
@every_shape
def test_an_array_becomes_a_tensor_with_the_bits_it_has(backend: Any, dtype: str, shape: tuple[int, ...]) -> None:
    array = array_of(dtype, shape)
    tensor = backend.from_host(aligned(array), tf.zeros([]))
    assert isinstance(tensor, tf.Tensor)
    assert backend.dtype_name(tensor) == dtype
    assert same_bits(np.array(backend.to_host([tensor])[0]), array)


@every_dtype
def test_views_and_tensors_share_memory_where_it_is_aligned(backend: Any, dtype: str) -> None:
    array = aligned(array_of(dtype, (5, 7)))
    tensor = backend.from_host(array, None)
    (view,) = backend.to_host([tensor])
    assert view.ctypes.data == array.ctypes.data


@every_dtype
def test_memory_that_is_not_aligned_is_copied(backend: Any, dtype: str) -> None:
    array = array_of(dtype, (5, 7))
    memory = np.empty(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + array.itemsize
    odd = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    odd[...] = array
    tensor = backend.from_host(odd, None)
    odd[...] = 0
    assert same_bits(np.array(backend.to_host([tensor])[0]), array)


@pytest.mark.parametrize("order", ["F", "strided", "read-only"])
def test_arrays_of_other_orders_become_equal_tensors(backend: Any, order: str) -> None:
    array = aligned(array_of("float32", (4, 6)))
    given = {"F": aligned(np.asfortranarray(array)), "strided": array[:, ::2], "read-only": array}[order]
    if order == "read-only":
        given.flags.writeable = False
    assert np.array_equal(backend.to_host([backend.from_host(given, None)])[0], given)


def test_a_tensor_keeps_the_memory_it_was_made_of_alive(backend: Any) -> None:
    tensors = [backend.from_host(aligned(np.full(1000, i, np.float32)), None) for i in range(50)]
    gc.collect()
    churn = [np.ones(1000, np.float32) for _ in range(200)]
    assert all(float(np.ptp(np.asarray(t))) == 0 and float(t[0]) == i for i, t in enumerate(tensors))
    assert len(churn) == 200


def test_variables_of_tensorflow_and_keras_are_shown(backend: Any) -> None:
    views = backend.to_host([tf.Variable([1.0, 2.0]), keras.Variable([3.0, 4.0])])
    assert [view.tolist() for view in views] == [[1.0, 2.0], [3.0, 4.0]]


def test_duplicates_of_a_sparse_tensor_are_summed(backend: Any) -> None:
    sparse = tf.IndexedSlices(tf.constant([[3.0], [1.0], [4.0]]), tf.constant([3, 1, 3]), tf.constant([5, 1]))
    (view,) = backend.to_host([sparse])
    assert view.tolist() == [[1.0], [7.0]]
    rebuilt = backend.from_host(aligned(view), sparse)
    assert isinstance(rebuilt, tf.IndexedSlices)
    assert rebuilt.indices.numpy().tolist() == [1, 3]
    assert rebuilt.dense_shape.numpy().tolist() == [5, 1]
    assert tf.convert_to_tensor(rebuilt).numpy().ravel().tolist() == [0, 1, 0, 7, 0]


def test_a_sparse_tensor_without_duplicates_is_shown_as_it_is(backend: Any) -> None:
    sparse = tf.IndexedSlices(tf.constant([[3.0], [1.0]]), tf.constant([3, 1]), tf.constant([5, 1]))
    assert backend.to_host([sparse])[0].tolist() == [[3.0], [1.0]]
    assert backend.from_host(np.array([[6.0], [2.0]], np.float32), sparse).indices is sparse.indices


def test_duplicates_are_rounded_once(backend: Any) -> None:
    ones = tf.IndexedSlices(tf.ones([4096, 1], tf.bfloat16), tf.zeros([4096], tf.int64), tf.constant([2, 1], tf.int64))
    assert float(backend.to_host([ones])[0][0, 0]) == 4096.0


def test_nothing_is_shown_in_a_traced_function(backend: Any) -> None:
    shown = []

    @tf.function(autograph=False)
    def traced(x: Any) -> Any:
        shown.append(backend.to_host([x]))
        return x

    traced(tf.constant([1.0]))
    assert shown == [None]


def test_nothing_is_shown_under_differentiation(backend: Any) -> None:
    x = tf.constant([3.0, 4.0])
    with tf.GradientTape() as tape:
        tape.watch(x)
        assert backend.to_host([x]) is None
        clipped, _ = cc.clip(x, cc.ClipByGlobalNorm(1.0))
        total = tf.reduce_sum(clipped)
    # d/dx of sum(x) / |x|
    np.testing.assert_allclose(tape.gradient(total, x), [(16 - 12) / 125, (9 - 12) / 125], rtol=1e-5)


def test_a_fault_under_a_tape_is_named_with_its_place() -> None:
    grads = {"a": tf.constant([3.0]), "b": tf.constant([4.0, np.inf])}
    with tf.GradientTape() as tape:
        tape.watch(grads["a"])
        with pytest.raises(cc.NonFinite) as caught:
            cc.clip(grads, cc.ClipByGlobalNorm(1.0, nonfinite="raise"))
    assert str(caught.value) == (
        "1 elements are inf or NaN (first in grads['b'], 1 of 2 tensors), and the policy has nonfinite='raise'; "
        "nothing was changed"
    )


def test_only_variables_can_be_written(backend: Any) -> None:
    assert backend.to_host([tf.Variable(1.0), keras.Variable(1.0)], writable=True) is None
    variable, constant = tf.Variable([3.0, 4.0]), tf.constant([3.0, 4.0])
    with pytest.raises(cc.InvalidInput, match=r"tf.Tensor is immutable; use cc.clip"):
        cc.clip_([variable, constant], cc.ClipByNorm(1.0))
    assert variable.numpy().tolist() == [3.0, 4.0]
    with pytest.raises(cc.InvalidInput, match="immutable"):
        backend.assign_([constant], [constant])


@pytest.mark.parametrize("make", [tf.Variable, keras.Variable])
def test_variables_are_clipped_in_place(make: Any) -> None:
    variable = make([3.0, 4.0])
    report = cc.clip_([variable], cc.ClipByGlobalNorm(1.0))
    assert (report.norm, report.clipped) == (5.0, True)
    assert np.array_equal(np.asarray(variable), np.array([0.6, 0.8], np.float32))


@pytest.mark.parametrize("traced", [False, True])
def test_one_variable_in_two_places_is_clipped_once(traced: bool) -> None:
    variable = tf.Variable([3.0, 4.0])

    def clip() -> cc.ClipReport:
        return cc.clip_([variable, variable], cc.ClipByGlobalNorm(1.0))

    report = (tf.function(clip) if traced else clip)()
    assert float(report.norm) == 5.0
    np.testing.assert_allclose(variable.numpy(), [0.6, 0.8], rtol=1e-6)


def test_a_keras_variable_and_the_variable_under_it_are_one_memory() -> None:
    variable = keras.Variable(np.float32([3.0, 4.0]))
    assert cc.clip_([variable, variable.value], cc.ClipByGlobalNorm(1.0)).norm == 5.0


def test_what_is_a_tensor(backend: Any) -> None:
    sparse = tf.IndexedSlices(tf.ones([1, 1]), tf.constant([0]))
    assert all(map(backend.is_tensor, [tf.constant(1.0), tf.Variable(1.0), keras.Variable(1.0), sparse]))
    assert not any(map(backend.is_tensor, [keras.Input((3,)), np.zeros(3), 1.0, [tf.constant(1.0)]]))
    assert not backend.is_parameter(tf.Variable(1.0))


def test_gradients_beside_variables_are_refused(backend: Any) -> None:
    with pytest.raises(cc.InvalidInput, match=r"use cc.clip\(grads, policy\)"):
        cc.clip_grads_(tf.Variable([1.0]), cc.ClipByNorm(1.0))


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=20), st.floats(1e-3, 1e3))
def test_eager_clipping_gives_the_bits_of_numpy(values: list[float], max_norm: float) -> None:
    array = np.array(values, np.float32)
    clipped, report = cc.clip(tf.constant(array), cc.ClipByGlobalNorm(max_norm))
    wanted, numpy_report = cc.clip(array, cc.ClipByGlobalNorm(max_norm))
    assert same_bits(np.array(clipped), wanted)
    assert report == numpy_report


def test_tensors_in_range_are_returned_themselves() -> None:
    grads = {"a": tf.constant([3.0]), "b": [tf.constant([4.0]), None]}
    clipped, _ = cc.clip(grads, cc.ClipByGlobalNorm(5.0))
    assert clipped["a"] is grads["a"]
    assert clipped["b"][0] is grads["b"][0]
    assert clipped["b"][1] is None
