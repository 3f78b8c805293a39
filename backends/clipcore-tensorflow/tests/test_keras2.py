"""Models of tf_keras (Keras 2): walked, read, written, run, watched, loaded and saved as those of Keras 3 are."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tf_keras
from tf_keras import layers as L

import clipcore as cc


def small() -> Any:
    return tf_keras.Sequential(
        [
            tf_keras.Input((8, 8, 3)),
            L.Conv2D(4, 3, activation="relu", name="c"),
            L.BatchNormalization(name="n", epsilon=1e-5),
            L.LeakyReLU(alpha=0.3, name="l"),
            L.AveragePooling2D(padding="same", name="p"),
            L.Flatten(),
            L.Dense(2, activation="swish", name="d"),
        ]
    )


@pytest.fixture
def model() -> Any:
    rng = np.random.default_rng(0)
    made = small()
    for variable in made.weights:
        variable.assign(rng.uniform(0.5, 1.5, tuple(variable.shape)))
    return made


SAMPLE = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)


class Watch:
    def __init__(self, before: Any = None) -> None:
        self.order: list[str] = []
        self._before = before

    def before(self, layer: str, inputs: list[np.ndarray]) -> Any:
        self.order.append(layer)
        return self._before(layer) if self._before else None

    def after(self, layer: str, output: Any) -> None:
        pass


def test_a_model_is_found_and_described(backend: Any, model: Any) -> None:
    assert cc.backend_of(model) is backend
    described = {layer.name: layer for layer in backend.layers(model)}
    assert {name: layer.kind for name, layer in described.items()} == {"c": "conv", "n": "batch_norm", "d": "linear"}
    assert [t.name for t in described["n"].tensors.values()] == [
        "n/gamma",
        "n/beta",
        "n/moving_mean",
        "n/moving_variance",
    ]
    assert described["n"].settings == {"eps": 1e-5, "momentum": 0.01, "channels": "last"}
    assert described["d"].settings["activation"] == "silu"
    operations = {layer.name: layer for layer in backend.operations(model)}
    assert operations["l"].settings == {"function": "leaky_relu", "slope": pytest.approx(0.3)}
    assert (operations["p"].kind, operations["p"].settings["padding"]) == ("avg_pool", "same")
    assert backend.input_shapes(model) == [(None, 8, 8, 3)]
    assert backend.double(model) is None


def test_a_model_is_read_written_run_and_watched(backend: Any, model: Any) -> None:
    before = [v.numpy().tobytes() for v in model.weights]
    output = backend.run(model, SAMPLE, watch := Watch())
    assert watch.order == ["c", "n", "l", "p", "d"]
    np.testing.assert_allclose(output, model(SAMPLE, training=False), rtol=1e-5)
    assert [v.numpy().tobytes() for v in model.weights] == before
    assert not any({"call", "build"} & set(vars(layer)) for layer in model.layers)
    zeros = {"d/kernel": np.zeros((36, 2), np.float32), "d/bias": np.zeros(2, np.float32)}
    written = backend.run(model, SAMPLE, Watch(lambda layer: backend.write(model, zeros) if layer == "d" else None))
    np.testing.assert_array_equal(written, np.zeros((2, 2)))
    assert set(backend.parameters(model)) == {"c/kernel", "c/bias", "n/gamma", "n/beta", "d/kernel", "d/bias"}
    report = cc.limit_(model, cc.ClipByGlobalNorm(0.5))
    assert report.clipped


@pytest.mark.parametrize("suffix", [".weights.h5", ".h5", ".keras"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning")
def test_weights_are_saved_and_loaded(backend: Any, model: Any, tmp_path: Path, suffix: str) -> None:
    path = str(tmp_path / f"m{suffix}")
    backend.save_weights(model, path)
    loaded = backend.load_model(small, path)
    assert [v.numpy().tobytes() for v in loaded.weights] == [v.numpy().tobytes() for v in model.weights]


def test_keras_3_writes_no_plain_h5(backend: Any, tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(cc.InvalidInput, match=r"expected one of .weights.h5, .keras$"):
        backend.save_weights(model, str(tmp_path / "m.h5"))


class Custom(tf_keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = [L.Dense(3, name="first"), L.Dense(3, name="second")]
        self.gain = self.add_weight(name="gain", shape=(1,), initializer="ones")

    def call(self, x: Any, y: Any = None, training: bool = True) -> Any:
        for block in self.blocks:
            x = block(x)
        return {"sum": (x + y) * self.gain, "x": x}


class Scaled(L.Layer):
    def build(self, input_shape: Any) -> None:
        self.factor = self.add_weight(name="factor", shape=input_shape[-1:], initializer="ones")

    def call(self, x: Any) -> Any:
        return x * self.factor


def test_subclassed_models_and_layers_of_one_s_own(backend: Any) -> None:
    model = Custom()
    x, y = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)
    with pytest.raises(cc.InvalidInput, match="has no weights yet"):
        backend.layers(model)
    model(x, y)
    assert [(layer.name, layer.kind) for layer in backend.layers(model)] == [
        ("gain", "raw"),
        ("first", "linear"),
        ("second", "linear"),
    ]
    output = backend.run(model, (x, y), watch := Watch())
    assert sorted(output) == ["sum", "x"]
    assert watch.order == ["first", "second"]
    scaled = tf_keras.Sequential([tf_keras.Input((3,)), Scaled(name="s")])
    (layer,) = backend.layers(scaled)
    assert (layer.name, layer.kind, layer.why) == ("s", "raw", "a Scaled, which no rule describes")
    backend.run(scaled, x, watch := Watch())
    assert watch.order == ["s"]


def test_keras_2_s_hard_sigmoid_is_another_function(backend: Any) -> None:
    names = [
        backend.layers(library.Sequential([library.Input((3,)), library.layers.Dense(1, "hard_sigmoid")]))[0].settings
        for library in (keras, tf_keras)
    ]
    assert [settings["activation"] for settings in names] == ["hard_sigmoid", "unknown:hard_sigmoid"]


def test_a_layer_without_weights_is_refused_and_not_built(backend: Any) -> None:
    class Late(tf_keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = L.Dense(3, name="first"), L.Dense(3, name="second")
            self.first.build((None, 3))
            self.built = True

        def call(self, x: Any) -> Any:
            return self.second(self.first(x))

    model = Late()
    with pytest.raises(cc.InvalidInput, match="layer 'second' has no weights yet"):
        backend.run(model, np.ones((2, 3), np.float32))
    assert not model.second.built
    assert "build" not in vars(model.second)


def test_mixed_precision_is_read_in_the_variable_s_own_dtype(backend: Any) -> None:
    layer = L.Dense(2, name="d", dtype=tf_keras.mixed_precision.Policy("mixed_float16"))
    model = tf_keras.Sequential([tf_keras.Input((3,)), layer])
    read = []
    output = backend.run(model, np.ones((2, 3)), Watch(lambda _: read.append(backend.read(model, ["d/kernel"]))))
    assert (output.dtype, read[0]["d/kernel"].dtype) == (np.float16, np.float32)


def in_a_process(code: str) -> str:
    """What a program prints that chooses Keras 2 before TensorFlow is imported."""
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_tf_keras_by_its_other_name_and_spectral_norm() -> None:
    out = in_a_process(
        """
        import numpy as np, tensorflow as tf, clipcore as cc
        layers = tf.keras.layers
        model = tf.keras.Sequential([tf.keras.Input((3,)), layers.SpectralNormalization(layers.Dense(4, name="d"))])
        backend = cc.backend_of(model)
        (layer,) = backend.layers(model)
        print(layer.kind, list(layer.tensors), backend.run(model, np.ones((2, 3), np.float32)).shape)
        """
    )
    assert out.split("\n")[0] == "linear ['kernel', 'bias', 'kernel.u'] (2, 4)"


def test_models_of_hugging_face_s_are_walked_and_run() -> None:
    pytest.importorskip(
        "transformers", reason="Hugging Face's TensorFlow classes are looked at where they are installed"
    )
    out = in_a_process(
        """
        import numpy as np, clipcore as cc
        from transformers import BertConfig, ResNetConfig, TFBertModel, TFResNetModel
        class Watch:
            def __init__(self): self.order = []
            def before(self, layer, inputs): self.order.append(layer)
            def after(self, layer, output): pass
        bert = TFBertModel(BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                      intermediate_size=16, max_position_embeddings=12))
        ids = {"input_ids": np.array([[1, 2, 3]]), "attention_mask": np.ones((1, 3), np.int64)}
        bert(ids)
        backend = cc.backend_of(bert)
        for layer in backend.layers(bert): print(layer.name, layer.kind, *layer.tensors)
        output, watch = backend.run(bert, ids, watch := Watch()), watch
        print(type(output), output["last_hidden_state"].shape, len(watch.order))
        assert np.allclose(output["last_hidden_state"], bert(ids).last_hidden_state, atol=1e-6)
        net = TFResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"))
        x = np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)
        net(x)
        kinds = [layer.kind for layer in backend.layers(net)]
        print(sorted(set(kinds)), backend.run(net, x, Watch())["pooler_output"].shape)
        """
    )
    lines = out.strip().split("\n")
    assert "bert/embeddings/weight raw weight" in lines
    assert "bert/encoder/layer_._0/attention/self/query linear kernel bias" in lines
    assert lines[-2].startswith("<class 'dict'> (1, 3, 8)")
    assert lines[-1] == "['batch_norm', 'conv'] (1, 8, 1, 1)"
