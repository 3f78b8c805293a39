"""The same training in both frameworks: initial weights, data, SGD with momentum, and clipping policy are shared.

    python tests/bench/parity.py [--output parity.png] [--steps 300]

Draws the float32 loss curves and how far they part. In float64 they agree to 1e-9 over 50 steps, which
tests/e2e/test_training_parity.py asserts of the functions below.
"""

from __future__ import annotations

import argparse
import os
from contextlib import contextmanager
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import clipcore as cc

POLICY = cc.ClipByGlobalNorm(0.25)
BATCH = 32
# exact in float32: Keras rounds Python numbers to that before it widens them, and 0.9 would cost 2.6e-8 per step
LEARNING_RATE, MOMENTUM = 0.0625, 0.875


class Curves(NamedTuple):
    """Losses per step in both frameworks, and whether the policy shrank the step's gradients in torch."""

    torch: np.ndarray
    keras: np.ndarray
    clipped: np.ndarray


def batches(steps, dtype):
    """Batches of scikit-learn's digits, images (n, 8, 8), in one order for both frameworks."""
    digits = load_digits()
    rng = np.random.default_rng(0)
    for _ in range(steps):
        chosen = rng.choice(len(digits.images), BATCH, replace=False)
        yield (digits.images[chosen] / 16).astype(dtype), digits.target[chosen]


def torch_model(dtype):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    ).to(getattr(torch, dtype))


def keras_model(dtype):
    return keras.Sequential(
        [
            keras.Input((8, 8, 1), dtype=dtype),
            keras.layers.Conv2D(8, 3, padding="same", dtype=dtype),
            keras.layers.BatchNormalization(epsilon=1e-5, momentum=0.9, dtype=dtype),
            keras.layers.ReLU(dtype=dtype),
            keras.layers.Flatten(dtype=dtype),
            keras.layers.Dense(32, activation="relu", dtype=dtype),
            keras.layers.Dense(10, dtype=dtype),
        ]
    )


def train_torch(model, data):
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    clipping = cc.attach(optimizer, POLICY)
    losses = []
    model.train()
    for images, labels in data:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.from_numpy(images[:, None])), torch.from_numpy(labels))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses), np.array([bool(report.clipped) for report in clipping.reports])


def train_keras(model, data):
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM)
    model, _, _ = cc.compile(model, loss_fn, optimizer, clip=POLICY)
    losses = []
    for images, labels in data:
        model.reset_metrics()  # else the loss would be the mean over all steps so far
        losses.append(float(model.train_on_batch(images[..., None], labels)))
    return np.array(losses)


@contextmanager
def keras_precision(dtype):
    """Keras computes losses and learning rates in its default precision, whatever the model's."""
    before = keras.config.floatx()
    keras.config.set_floatx(dtype)
    try:
        yield
    finally:
        keras.config.set_floatx(before)


def curves(dtype, steps):
    """Train the same network in both frameworks; clipcore carries the initial weights."""
    source = torch_model(dtype)
    with keras_precision(dtype):
        target = keras_model(dtype)
        sample = next(batches(1, dtype))[0][:, None]
        cc.migrate(source, target, sample=sample)
        keras_losses = train_keras(target, batches(steps, dtype))
    torch_losses, clipped = train_torch(source, batches(steps, dtype))
    return Curves(torch_losses, keras_losses, clipped)


def draw(found, path):
    """The two curves above, their relative difference below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=[2, 1])
    above.plot(found.torch, color="#4477aa", linewidth=2.5, label="PyTorch")
    above.plot(found.keras, color="#ee7733", linewidth=1, linestyle="--", label="Keras")
    above.set(ylabel="loss", yscale="log", title=f"float32, SGD with momentum, {POLICY.__class__.__name__}(0.25)")
    above.legend(frameon=False)
    below.plot(np.abs(found.torch - found.keras) / np.abs(found.torch), color="#888888", linewidth=1)
    below.set(ylabel="relative difference", xlabel="step", yscale="log")
    FigureCanvasAgg(figure).print_png(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="parity.png")
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    found = curves("float32", arguments.steps)
    draw(found, arguments.output)
    apart = np.abs(found.torch - found.keras) / np.abs(found.torch)
    print(f"{arguments.output}: {arguments.steps} steps, clipping acted in {found.clipped.mean():.0%} of them")
    print(f"relative difference of the losses: median {np.median(apart):.1e}, largest {apart.max():.1e}")


if __name__ == "__main__":
    main()
