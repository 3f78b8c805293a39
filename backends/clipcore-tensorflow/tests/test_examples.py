"""Gradients per example: those of one example after the other, by name, ready to be clipped and summed."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L

import clipcore as cc

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(6, 5, 5, 2)).astype(np.float32)
WORDS = RNG.integers(0, 7, (6, 4))
TARGETS = RNG.normal(size=(6, 1)).astype(np.float32)


def convolutional() -> keras.Model:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 5, 2))
    x = L.LayerNormalization(name="norm")(L.Conv2D(3, 3, activation="tanh", name="conv")(inputs))
    return keras.Model(inputs, L.Dense(1, name="out")(L.Flatten()(x)))


def textual() -> keras.Model:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,), dtype="int64")
    return keras.Model(inputs, L.Dense(1, name="out")(L.Flatten()(L.Embedding(7, 3, name="table")(inputs))))


CASES: dict[str, tuple[Any, Any]] = {"conv": (convolutional, IMAGES), "table": (textual, WORDS)}


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_each_row_is_the_gradient_of_one_example(case: str, graph: bool) -> None:
    make, inputs = CASES[case]
    model = make()

    def compute() -> Any:
        return cc.per_example_grads(model, "mse", (inputs, TARGETS))

    grads = (tf.function(compute) if graph else compute)()
    assert list(grads) == [
        {id(v): name for name, v in cc.get_backend("tensorflow").parameters(model).items()}[id(v)]
        for v in model.trainable_variables
    ]
    for index in range(len(inputs)):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(inputs[index : index + 1]) - TARGETS[index]))
        wanted = tape.gradient(loss, model.trainable_variables)
        for grad, target in zip(grads.values(), wanted, strict=True):
            np.testing.assert_allclose(grad[index], tf.convert_to_tensor(target), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "loss", [keras.losses.MeanSquaredError(), keras.losses.mean_squared_error], ids=["class", "fn"]
)
def test_a_loss_is_given_as_keras_takes_it(loss: Any) -> None:
    model = convolutional()
    named, given = (cc.per_example_grads(model, one, (IMAGES, TARGETS)) for one in ("mse", loss))
    for name, grad in named.items():
        np.testing.assert_allclose(given[name], grad, rtol=1e-6)


def test_clipped_examples_are_bounded_and_summed() -> None:
    model = convolutional()
    grads = cc.per_example_grads(model, "mse", (IMAGES, TARGETS))
    clipped, report = cc.clip(grads, cc.PerExampleClip(0.1))
    assert {name: tuple(g.shape) for name, g in clipped.items()} == {
        name: tuple(g.shape[1:]) for name, g in grads.items()
    }
    assert report.clipped
    total = math.sqrt(sum(float(np.square(np.asarray(g, np.float64)).sum()) for g in clipped.values()))
    assert 0 < total <= 0.1 * len(IMAGES)


def test_each_example_draws_the_units_that_it_drops() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((5, 5, 2)), L.Flatten(), L.Dropout(0.5, seed=1), L.Dense(1, name="out")])
    zeros = np.asarray(cc.per_example_grads(model, "mse", (IMAGES, TARGETS))["out/kernel"]) == 0
    assert zeros.any()
    assert not (zeros == zeros[0]).all()


class Unusual(L.Layer):
    """A layer of an operation that has no form over many examples."""

    def call(self, x: Any) -> Any:
        return x + tf.stop_gradient(tf.reshape(tf.py_function(np.square, [x], tf.float32), tf.shape(x)))


def test_what_cannot_run_at_once_runs_one_after_the_other() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((5, 5, 2)), Unusual(), L.Flatten(), L.Dense(1, name="out", use_bias=False)])
    (grads,) = cc.per_example_grads(model, "mse", (IMAGES, TARGETS)).values()
    inputs = (IMAGES + IMAGES**2).reshape(6, -1)
    errors = inputs @ model.get_weights()[0] - TARGETS
    np.testing.assert_allclose(grads[..., 0], 2 * errors * inputs, rtol=1e-4, atol=1e-5)


def test_frozen_parameters_have_no_gradients() -> None:
    model = convolutional()
    model.get_layer("conv").trainable = False
    assert list(cc.per_example_grads(model, "mse", (IMAGES, TARGETS))) == [
        "norm/gamma",
        "norm/beta",
        "out/kernel",
        "out/bias",
    ]


def test_batch_normalisation_is_refused_unless_it_is_frozen() -> None:
    model = keras.Sequential([keras.Input((5, 5, 2)), L.BatchNormalization(name="bn"), L.Flatten(), L.Dense(1)])
    with pytest.raises(cc.InvalidInput, match=r"layer 'bn' normalises over the examples.*trainable = False"):
        cc.per_example_grads(model, "mse", (IMAGES, TARGETS))
    model.get_layer("bn").trainable = False
    assert len(cc.per_example_grads(model, "mse", (IMAGES, TARGETS))) == 2


def test_what_is_no_model_loss_or_batch_is_refused() -> None:
    model = convolutional()
    with pytest.raises(cc.InvalidInput, match=r"Module is no keras.Model"):
        cc.per_example_grads(tf.Module(), "mse", (IMAGES, TARGETS))
    with pytest.raises(cc.InvalidInput, match="loss_fn is 'no such loss'"):
        cc.per_example_grads(model, "no such loss", (IMAGES, TARGETS))
    with pytest.raises(cc.InvalidInput, match=r"expected \(inputs, targets\)"):
        cc.per_example_grads(model, "mse", IMAGES)
