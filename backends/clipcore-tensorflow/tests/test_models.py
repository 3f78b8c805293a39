"""Reading and writing models, limiting their weights, and loading them from files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L

import clipcore as cc
from clipcore_tensorflow._tensors import to_own_tensor


def small() -> keras.Model:
    return keras.Sequential(
        [keras.Input((3,)), L.Dense(4, name="a"), L.BatchNormalization(name="n"), L.Dense(2, name="b")]
    )


@pytest.fixture
def model(randomised: Any) -> keras.Model:
    return randomised(small())


def bits(model: Any) -> list[bytes]:
    return [np.asarray(v).tobytes() for v in model.weights]


def test_what_is_read_are_the_weights(backend: Any, model: Any) -> None:
    assert np.array_equal(backend.read(model, ["a/kernel"])["a/kernel"], model.layers[0].kernel.numpy())


def test_what_was_read_does_not_change_with_the_model(backend: Any, model: Any) -> None:
    read = backend.read(model, ["a/kernel"])["a/kernel"]
    before = read.copy()
    backend.write(model, {"a/kernel": np.zeros((3, 4), np.float32)})
    assert np.array_equal(read, before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"b/bias": np.zeros(3, np.float32)}, r"'b/bias': the array has shape \(3,\), the variable \(2,\)"),
        ({"b/bias": np.zeros(2)}, "'b/bias': the array is float64, the variable float32"),
        ({"c/bias": np.zeros(2, np.float32)}, "no tensor 'c/bias'; it has 8: a/kernel"),
    ],
)
def test_a_wrong_write_is_refused_before_anything_is_written(
    backend: Any, model: Any, wrong: dict[str, Any], message: str
) -> None:
    before = bits(model)
    with pytest.raises(cc.InvalidInput, match=message):
        backend.write(model, {"a/kernel": np.zeros((3, 4), np.float32), **wrong})
    assert bits(model) == before


def test_arrays_of_any_order_are_written_by_value(backend: Any, model: Any) -> None:
    values = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4))
    backend.write(model, {"a/kernel": values})
    assert np.array_equal(model.layers[0].kernel, values)


def test_an_array_that_was_written_is_the_callers_again(backend: Any, model: Any) -> None:
    memory = np.empty(48 + 64, np.uint8)
    start = -memory.ctypes.data % 64
    values = memory[start : start + 48].view(np.float32).reshape(3, 4)
    values[...] = 1
    backend.write(model, {"a/kernel": values})
    values[...] = 2
    assert float(model.layers[0].kernel[0, 0]) == 1.0


@pytest.mark.parametrize("writeable", [True, False])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 1, 3), (0, 2, 1, 3), (1, 0, 3, 2)])
@pytest.mark.parametrize("dtype", ["bool", "uint16", "float32", "complex64", "bfloat16", "float8_e4m3fn"])
def test_a_tensor_of_its_own_is_the_array_rearranged_and_a_copy(
    dtype: str, axes: tuple[int, ...], aligned: bool, writeable: bool
) -> None:
    numpy_dtype = np.dtype(tf.as_dtype(dtype).as_numpy_dtype)
    memory = np.zeros(64 + 48 * numpy_dtype.itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64 + (0 if aligned else numpy_dtype.itemsize)
    stored = memory[start : start + 48 * numpy_dtype.itemsize].view(numpy_dtype)
    stored[...] = np.arange(48)
    array = stored.reshape(3, 1, 4, 4).transpose(axes)
    array.flags.writeable = writeable
    before = array.copy()
    tensor = to_own_tensor(array)
    stored[...] = 7
    assert tensor.dtype == dtype
    assert np.array_equal(np.asarray(tensor.numpy()), before)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes_are_read_and_written_bitwise(backend: Any, dtype: str) -> None:
    layer = L.Dense(3, dtype=dtype, name="d")
    layer.build((None, 2))
    read = backend.read(layer, ["d/kernel"])["d/kernel"]
    assert read.dtype.name == dtype
    backend.write(layer, {"d/kernel": (read * 2).astype(read.dtype)})
    assert np.array_equal(backend.read(layer, ["d/kernel"])["d/kernel"], read * 2)


def test_limiting_touches_the_trainable_weights_alone(model: Any) -> None:
    statistics = [v.numpy() for v in model.non_trainable_variables]
    report = cc.limit_(model, cc.ClipByGlobalNorm(0.5))
    assert report.clipped
    assert np.sqrt(sum(np.square(v.numpy()).sum() for v in model.trainable_variables)) == pytest.approx(0.5)
    assert all(np.array_equal(a, v) for a, v in zip(statistics, model.non_trainable_variables, strict=True))


def test_limiting_gives_the_bits_of_numpy(model: Any) -> None:
    arrays = [v.numpy() for v in model.trainable_variables]
    wanted, _ = cc.clip(arrays, cc.ClipByNorm(0.5))
    cc.limit_(model, cc.ClipByNorm(0.5))
    assert [v.numpy().tobytes() for v in model.trainable_variables] == [w.tobytes() for w in wanted]


def test_weights_of_variables_are_each_once(backend: Any) -> None:
    variable, frozen = tf.Variable([3.0, 4.0]), tf.Variable([1.0], trainable=False)
    assert backend.weights([variable, variable, frozen]) == [variable]
    with pytest.raises(cc.InvalidInput, match="no trainable variables"):
        backend.weights(frozen)
    with pytest.raises(cc.InvalidInput, match="is no variable, nor a model"):
        backend.weights([tf.constant(1.0)])
    with pytest.raises(cc.InvalidInput, match="is no variable, nor a model"):
        cc.limit_(keras.optimizers.SGD(0.1), cc.ClipByNorm(1.0))


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
def test_a_model_is_loaded_from_keras_s_files(backend: Any, model: Any, tmp_path: Path, suffix: str) -> None:
    path = str(tmp_path / f"m{suffix}")
    model.save_weights(path) if suffix == ".weights.h5" else model.save(path)
    loaded = backend.load_model(small, path)
    assert bits(loaded) == bits(model)
    assert backend.load_model(loaded, None) is loaded


def test_files_that_do_not_fit_are_refused(backend: Any, model: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.weights.h5"
    model.save_weights(path)
    (tmp_path / "broken.weights.h5").write_bytes(b"not a file")
    other = lambda: keras.Sequential([keras.Input((3,)), L.Dense(5)])  # noqa: E731
    for factory, name, message in (
        (other, "m.weights.h5", "does not fit model"),
        (small, "broken.weights.h5", "does not fit model"),
        (small, "none.weights.h5", "does not exist"),
        (small, "m.npz", "another format; expected one of .weights.h5, .keras"),
        (lambda: 3, "m.weights.h5", "is no keras.Model"),
    ):
        with pytest.raises(cc.InvalidInput, match=re.escape(message)):
            backend.load_model(factory, str(tmp_path / name))


def test_declared_inputs_are_told(backend: Any, model: Any) -> None:
    a, b = keras.Input((4, None)), keras.Input((3,))
    assert backend.input_shapes(model) == [(None, 3)]
    assert backend.input_shapes(keras.Model([a, b], [L.ReLU()(a), b])) == [(None, 4, None), (None, 3)]
    assert backend.input_shapes(tf.Module()) is None


def test_a_float64_copy_has_the_same_weights_and_leaves_the_model_alone(backend: Any, model: Any) -> None:
    before = bits(model)
    copy = backend.double(model)
    assert all(np.array_equal(a, b) for a, b in zip(model.weights, copy.weights, strict=True))
    x = np.random.default_rng(0).normal(size=(4, 3))
    output, wide = backend.run(model, x), backend.run(copy, x)
    assert wide.dtype == np.float64
    np.testing.assert_allclose(output, wide, rtol=1e-4, atol=1e-4)
    assert bits(model) == before


def test_a_float64_copy_follows_branches_and_inner_models(backend: Any, randomised: Any) -> None:
    x = keras.Input((5,), name="x")
    inner = keras.Sequential([keras.Input((5,)), L.Dense(5, activation="tanh")], name="inner")
    model = randomised(keras.Model({"x": x}, L.Concatenate()([inner(x), L.LayerNormalization()(inner(inner(x)))])))
    sample = {"x": np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)}
    np.testing.assert_allclose(
        backend.run(backend.double(model), sample), backend.run(model, sample), rtol=1e-4, atol=1e-5
    )


def test_a_float64_copy_of_attention_is_exact_to_float64(backend: Any, randomised: Any) -> None:
    x = keras.Input((4, 3))
    model = randomised(keras.Model(x, L.MultiHeadAttention(1, 3, use_bias=False)(x, x)))
    kernels = {
        name: array.astype(np.float64) for name, array in backend.read(model, list(_names(backend, model))).items()
    }
    sample = np.random.default_rng(0).normal(size=(2, 4, 3))
    q, k, v = (sample @ kernels[f"multi_head_attention/{part}/kernel"][:, 0] for part in ("query", "key", "value"))
    scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(3))
    mixed = scores / scores.sum(-1, keepdims=True) @ v
    wanted = mixed @ kernels["multi_head_attention/attention_output/kernel"][0]
    np.testing.assert_allclose(backend.run(backend.double(model), sample), wanted, rtol=1e-13)


def _names(backend: Any, model: Any) -> set[str]:
    return {tensor.name for layer in backend.layers(model) for tensor in layer.tensors.values()}


class Custom(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.dense = L.Dense(2)

    def call(self, x: Any) -> Any:
        return self.dense(x)


def test_a_model_without_a_graph_of_layers_has_no_float64_copy(backend: Any) -> None:
    model = Custom()
    model(np.zeros((1, 3), np.float32))
    assert backend.double(model) is None
    assert backend.input_shapes(model) is None


def test_the_backend_says_where_channels_are(backend: Any) -> None:
    assert backend.channels == "last"
    keras.config.set_image_data_format("channels_first")
    try:
        assert backend.channels == "first"
    finally:
        keras.config.set_image_data_format("channels_last")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"padding": ((1, 0), (0, 0))}, "put a ZeroPadding layer before the layer"),
        ({"padding_mode": "reflect"}, "pad with zeros alone"),
        ({"stride": (2, 2), "dilation": (2, 2)}, "one or none"),
        ({"activation": "no such"}, "Keras has no layer with the settings"),
    ],
)
def test_layers_that_keras_lacks_are_refused(backend: Any, settings: dict[str, Any], message: str) -> None:
    plain = {
        "stride": (1, 1),
        "padding": ((0, 0), (0, 0)),
        "padding_mode": "zeros",
        "dilation": (1, 1),
        "groups": 1,
        "activation": None,
    }
    with pytest.raises(cc.MappingError, match=message):
        backend.build_layer("conv", {**plain, **settings}, {"kernel": (1, 2, 3, 3, 3)})
