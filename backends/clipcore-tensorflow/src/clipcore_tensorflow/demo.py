"""Network A of `clipcore demo`, and how it goes on training: the Keras half, written in Keras terms throughout."""

from __future__ import annotations

from collections.abc import Iterable

import keras
import numpy as np
from keras import layers

import clipcore as cc


def build(seed: int) -> keras.Model:
    """Network A with fresh weights: two convolutions with batch norm, two dense layers, on (n, 8, 8, 1)."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", name="strokes"),
            layers.BatchNormalization(epsilon=1e-5, momentum=0.9, name="strokes_norm"),
            layers.ReLU(),
            layers.Conv2D(32, 2, strides=2, name="shapes"),
            layers.BatchNormalization(epsilon=1e-5, momentum=0.9, name="shapes_norm"),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(64, activation="relu", name="mix"),
            layers.Dense(10, name="digit"),
        ],
        name="a",
    )


def as_input(images: np.ndarray) -> np.ndarray:
    """Images (n, 8, 8) as the network takes them: (n, 8, 8, 1)."""
    return np.ascontiguousarray(images[..., None], dtype=np.float32)


def train(
    model: keras.Model,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    policy: cc.Policy,
    learning_rate: float,
    momentum: float,
) -> None:
    """One step of SGD per batch of (images, labels) under the policy; batches of one size are traced once."""
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(learning_rate, momentum=momentum)
    model, _, _ = cc.compile(model, loss_fn, optimizer, clip=policy)
    for images, labels in batches:
        model.train_on_batch(as_input(images), labels)


def accuracy(model: keras.Model, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images (n, 8, 8) whose largest logit is that of their label."""
    logits = np.asarray(model(as_input(images), training=False))
    return float(np.mean(logits.argmax(1) == labels))
