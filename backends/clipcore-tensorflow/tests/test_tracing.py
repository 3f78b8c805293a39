"""Running models and watching them: real values in order of execution, and everything as before afterwards."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L

import clipcore as cc


class Watch:
    """Records what it sees, and answers as told."""

    def __init__(self, before: Any = None, after: Any = None) -> None:
        self.seen: list[tuple[str, str]] = []
        self.inputs: dict[str, list[np.ndarray]] = {}
        self.outputs: dict[str, Any] = {}
        self._before, self._after = before, after

    def before(self, layer: str, inputs: list[np.ndarray]) -> list[np.ndarray] | None:
        self.seen.append(("before", layer))
        self.inputs[layer] = inputs
        return self._before(layer, inputs) if self._before else None

    def after(self, layer: str, output: Any) -> Any:
        self.seen.append(("after", layer))
        self.outputs[layer] = output
        return self._after(layer, output) if self._after else None


def branching() -> keras.Model:
    x = keras.Input((3,))
    a = L.Dense(4, activation="relu", name="a")(x)
    a = L.Dropout(0.5)(a)
    b = L.Dense(4, name="b")(x)
    return keras.Model(x, L.BatchNormalization(name="n")(L.Add()([a, b])))


@pytest.fixture
def model(randomised: Any) -> keras.Model:
    return randomised(branching())


SAMPLE = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)


def state(model: Any) -> list[bytes]:
    return [np.asarray(v).tobytes() for v in model.variables]


def test_layers_are_seen_in_order_with_their_values(backend: Any, model: Any) -> None:
    watch = Watch()
    output = backend.run(model, SAMPLE, watch)
    assert [name for when, name in watch.seen if when == "before"] == ["a", "dropout", "b", "n"]
    assert np.array_equal(watch.inputs["a"][0], SAMPLE)
    a = model.get_layer("a")
    wanted = np.maximum(SAMPLE @ a.kernel.numpy() + a.bias.numpy(), 0)
    np.testing.assert_allclose(watch.outputs["a"], wanted, rtol=1e-6)
    assert np.array_equal(output, model(SAMPLE, training=False))
    assert np.array_equal(watch.outputs["n"], output)


def test_a_run_changes_nothing(backend: Any, model: Any) -> None:
    before = state(model)
    first = backend.run(model, SAMPLE)
    watched = backend.run(model, SAMPLE, Watch())
    assert state(model) == before
    assert first.tobytes() == watched.tobytes()
    assert not any("call" in vars(layer) for layer in model.layers)


def test_dropout_does_not_draw(backend: Any, model: Any) -> None:
    assert backend.run(model, SAMPLE).tobytes() == backend.run(model, SAMPLE).tobytes()


class Restless(L.Layer):
    """Counts its calls and draws noise, also in inference."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds = keras.random.SeedGenerator(1)
        self.count = self.add_weight((), dtype="int32", trainable=False, name="count", initializer="zeros")

    def call(self, x: Any) -> Any:
        self.count.assign_add(1)
        return x + keras.random.normal(keras.ops.shape(x), seed=self.seeds)


def test_counters_and_seeds_are_put_back_and_each_run_draws_numbers_of_its_own(backend: Any) -> None:
    model = keras.Sequential([keras.Input((3,)), Restless()])
    before = state(model)
    first = backend.run(model, SAMPLE)
    assert state(model) == before
    assert first.tobytes() != backend.run(model, SAMPLE).tobytes()


class TrainsItsNorm(keras.Model):
    """Updates its moving statistics in inference too."""

    def __init__(self) -> None:
        super().__init__()
        self.n = L.BatchNormalization(name="n")

    def call(self, x: Any) -> Any:
        return self.n(x, training=True)


class HoldsTrainsItsNorm(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n = L.BatchNormalization(name="n")
        self.n.build((None, 3))

    def __call__(self, x: Any) -> Any:
        return self.n(x, training=True)


@pytest.mark.parametrize("kind", [TrainsItsNorm, HoldsTrainsItsNorm])
def test_statistics_that_a_model_writes_in_inference_are_put_back_also_after_a_write(
    backend: Any, randomised: Any, kind: Any
) -> None:
    model = kind()
    model(SAMPLE)
    randomised(model.n)
    backend.run(model, SAMPLE)
    backend.write(model, {"n/moving_mean": np.full(3, 7, np.float32)})  # before the run, not during it
    before = [v.numpy().tobytes() for v in model.n.weights]
    backend.run(model, SAMPLE)
    backend.run(model, SAMPLE, Watch())
    assert [v.numpy().tobytes() for v in model.n.weights] == before


def test_a_statistic_that_a_watcher_wrote_stays_as_it_was_written_though_the_run_moves_it_on(
    backend: Any, randomised: Any
) -> None:
    model = TrainsItsNorm()
    model(SAMPLE)
    mean = {"n/moving_mean": np.full(3, 7, np.float32)}
    randomised(model)
    variance = model.n.moving_variance.numpy()
    backend.run(model, SAMPLE, Watch(before=lambda *_: backend.write(model, mean)))
    np.testing.assert_array_equal(model.n.moving_mean.numpy(), mean["n/moving_mean"])
    np.testing.assert_array_equal(model.n.moving_variance.numpy(), variance)


def test_weights_written_before_a_layer_take_effect_and_stay(backend: Any, model: Any) -> None:
    zeros = {"a/kernel": np.zeros((3, 4), np.float32), "n/moving_mean": np.full(4, 7, np.float32)}
    write = lambda layer, _: backend.write(model, zeros) if layer == "a" else None  # noqa: E731
    watch = Watch(before=write)
    backend.run(model, SAMPLE, watch)
    np.testing.assert_array_equal(watch.outputs["a"], np.tile(model.get_layer("a").bias.numpy(), (2, 1)))
    read = backend.read(model, list(zeros))
    assert all(np.array_equal(read[name], value) for name, value in zeros.items())


def test_another_run_inside_a_watcher_changes_nothing_of_that(backend: Any, model: Any) -> None:
    mean, other = {"n/moving_mean": np.full(4, 7, np.float32)}, branching()

    def write_and_run(layer: str, _: Any) -> None:
        if layer == "a":
            backend.write(model, mean)
            backend.run(other, SAMPLE)

    backend.run(model, SAMPLE, Watch(before=write_and_run))
    assert np.array_equal(backend.read(model, list(mean))["n/moving_mean"], mean["n/moving_mean"])


def test_what_flows_can_be_replaced(backend: Any, model: Any) -> None:
    ones, output = np.ones((2, 3), np.float64), np.full((2, 4), 0.5)
    watch = Watch(
        before=lambda layer, _: [ones] if layer == "a" else None,
        after=lambda layer, _: output if layer == "n" else None,
    )
    result = backend.run(model, SAMPLE, watch)
    assert (result.dtype, result.tolist()) == (np.float32, output.tolist())
    np.testing.assert_array_equal(watch.outputs["a"], model.get_layer("a")(np.float32(ones)))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failing_watcher_is_heard_and_leaves_the_model_as_it_was(backend: Any, model: Any, when: str) -> None:
    class Stop(Exception):
        def __init__(self, place: str, more: int) -> None:
            super().__init__(place)

    def fail(layer: str, _: Any) -> None:
        if layer == "b":
            raise Stop(layer, 1)

    before = state(model)
    with pytest.raises(Stop):
        backend.run(model, SAMPLE, Watch(**{when: fail}))
    assert state(model) == before
    assert not any("call" in vars(layer) for layer in model.layers)
    assert not tf.config.functions_run_eagerly()


def test_a_sample_of_the_wrong_shape_is_one_sentence(backend: Any, model: Any) -> None:
    with pytest.raises(cc.InvalidInput, match=r"failed on the sample \(float32 \(2, 5\)\): ") as caught:
        backend.run(model, np.zeros((2, 5)))
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_shared_layer_is_seen_at_each_call(backend: Any) -> None:
    shared, x = L.Dense(3, name="shared"), keras.Input((3,))
    watch = Watch()
    backend.run(keras.Model(x, shared(shared(x))), SAMPLE, watch)
    assert watch.seen == [("before", "shared"), ("after", "shared")] * 2


def test_several_inputs_come_as_a_tuple_a_list_or_a_dict(backend: Any, randomised: Any) -> None:
    a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b")
    model = randomised(keras.Model([a, b], L.Concatenate()([L.Dense(2)(a), b])))
    named = keras.Model({"a": a, "b": b}, model.output)
    first, second = SAMPLE, np.ones((2, 2))
    outputs = [
        backend.run(model, (first, second)),
        backend.run(model, [first, second]),
        backend.run(named, {"a": first, "b": second}),
    ]
    assert all(np.array_equal(output, outputs[0]) for output in outputs)


def test_outputs_keep_their_structure(backend: Any) -> None:
    x = keras.Input((3,))
    model = keras.Model(x, {"a": L.Dense(2)(x), "b": [x, L.Dense(1)(x)]})
    output = backend.run(model, SAMPLE)
    assert output["a"].shape == (2, 2)
    assert [array.shape for array in output["b"]] == [(2, 3), (2, 1)]


class Attending(keras.Model):
    """Positional arguments, keyword tensors, `training`, and a traced call."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = L.MultiHeadAttention(2, 4)
        self.memory = L.LSTM(3)
        self.dropout = L.Dropout(0.5)

    @tf.function
    def call(self, query: Any, value: Any, training: bool = True) -> Any:
        x = self.attention(query, value=value)
        return self.dropout(self.memory(x), training=training)


def test_subclassed_models_take_positional_arguments_and_run_as_python(backend: Any, randomised: Any) -> None:
    rng = np.random.default_rng(0)
    query, value = rng.normal(size=(2, 3, 5)).astype(np.float32), rng.normal(size=(2, 4, 5)).astype(np.float32)
    model = Attending()
    tf.config.run_functions_eagerly(True)  # Keras layers that are built in a trace keep their first weights there
    model(query, value, training=False)
    tf.config.run_functions_eagerly(False)
    randomised(model)
    watch = Watch()
    output = backend.run(model, (query, value), watch)
    np.testing.assert_allclose(output, model(query, value, training=False), rtol=1e-5)
    called = [name for when, name in watch.seen if when == "before"]
    assert called[-3:] == ["multi_head_attention/attention_output", "lstm", "dropout"]
    assert all(isinstance(array, np.ndarray) for arrays in watch.inputs.values() for array in arrays)
    assert np.array_equal(watch.outputs["lstm"], output)


def test_mixed_precision_is_watched_in_its_compute_dtype_and_written_in_its_own(backend: Any, randomised: Any) -> None:
    keras.config.set_dtype_policy("mixed_float16")
    model = randomised(keras.Sequential([keras.Input((3,)), L.Dense(2, name="d")]))
    read: list[np.ndarray] = []
    watch = Watch(before=lambda *_: read.append(backend.read(model, ["d/kernel"])["d/kernel"]))
    assert backend.run(model, SAMPLE, watch).dtype == np.float16
    assert (watch.inputs["d"][0].dtype, read[0].dtype) == (np.float16, np.float32)


def test_integers_stay_integers_and_floats_take_the_models_dtype(backend: Any) -> None:
    model = keras.Sequential([keras.Input((3,), dtype="int32"), L.Embedding(9, 2, name="e"), L.Dense(1, name="d")])
    watch = Watch()
    backend.run(model, np.array([[1, 2, 8]]), watch)
    assert watch.inputs["e"][0].dtype.kind == "i"
    wide = Watch()
    backend.run(branching(), SAMPLE.astype(np.float64), wide)
    assert wide.inputs["a"][0].dtype == np.float32


class Affine(tf.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = tf.Variable(np.random.default_rng(size).normal(size=(size, size)), dtype=tf.float32)

    def __call__(self, x: Any) -> Any:
        return x @ self.w


class Twice(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.dense = Affine(3), L.Dense(3, name="dense")
        self.dense.build((None, 3))
        self.calls = tf.Variable(0, trainable=False)

    @tf.function
    def __call__(self, x: Any, training: bool = True) -> Any:
        self.calls.assign_add(1)
        return self.dense(self.first(x)) if not training else x


def test_modules_are_watched_through_their_class(backend: Any) -> None:
    model, watch = Twice(), Watch()
    output = backend.run(model, SAMPLE, watch)
    assert [name for when, name in watch.seen if when == "before"] == ["first", "dense"]
    np.testing.assert_allclose(watch.outputs["first"], SAMPLE @ model.first.w.numpy(), rtol=1e-6)
    assert np.array_equal(output, watch.outputs["dense"])
    assert (type(model), type(model.first)) == (Twice, Affine)
    assert int(model.calls) == 0


class PartlyBuilt(keras.Model):
    """Its first layer has weights; the second is reached without, and the others never are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = L.Dense(3, name="first"), L.Dense(3, name="second")
        self.never, self.nor = L.LSTM(3), L.Concatenate()
        self.first.build((None, 3))
        self.built = True

    def call(self, x: Any) -> Any:
        return self.second(self.first(x))


class ModuleOfPartlyBuilt(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = {"a": [PartlyBuilt()]}

    def __call__(self, x: Any) -> Any:
        return self.parts["a"][0](x)


@pytest.mark.parametrize("kind", [PartlyBuilt, ModuleOfPartlyBuilt])
def test_a_layer_that_is_reached_before_it_has_weights_is_refused_and_not_built(backend: Any, kind: Any) -> None:
    model = kind()
    inner = model if kind is PartlyBuilt else model.parts["a"][0]
    for watch in (None, Watch()):
        with pytest.raises(cc.InvalidInput, match="layer 'second' has no weights yet; call the model once") as caught:
            backend.run(model, SAMPLE, watch)
        assert "\n" not in str(caught.value)
        assert not inner.second.built
    wanted = np.asarray(model(SAMPLE))  # builds the layer, as Keras does
    np.testing.assert_array_equal(backend.run(model, SAMPLE), wanted)
    assert not inner.never.built


def test_a_module_that_cannot_be_called_is_refused(backend: Any) -> None:
    with pytest.raises(cc.InvalidInput, match="has no __call__"):
        backend.run(tf.Module(name="silent"), SAMPLE)
