"""What was migrated trains on as it would have where it came from: ten steps on both sides, the same weights."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from e2e_models import randomised
from torch import nn

import clipcore as cc

L = keras.layers
STEPS, RATE = 10, 0.05
rng = np.random.default_rng(0)
SEQUENCES, TOKENS = rng.standard_normal((8, 5, 6)), rng.integers(0, 9, (8, 5))
IMAGES = rng.standard_normal((8, 4, 6, 7))


class First(nn.Module):
    """A module of attention or a recurrent one, whose first output is the model's."""

    def __init__(self, net, inputs=1):
        super().__init__()
        self.net, self.inputs = net, inputs

    def forward(self, x):
        return self.net(*[x] * self.inputs)[0]


def sequential(shape, *layers):
    return keras.Sequential([L.Input(shape), *layers])


def attention_in_keras():
    inputs = keras.Input((None, 6))
    return keras.Model(inputs, L.Dense(2)(L.MultiHeadAttention(2, 3)(inputs, inputs)))


NETWORKS = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)),
        lambda: sequential((None, 6), L.Dense(5, "tanh"), L.Dense(2)),
        SEQUENCES,
    ),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(72, 2)),
        lambda: sequential(
            (6, 7, 4), L.ZeroPadding2D(1), L.Conv2D(6, 3, 2, groups=2, activation="tanh"), L.Flatten(), L.Dense(2)
        ),
        IMAGES,
    ),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Tanh(), nn.Conv2d(8, 2, 1)),
        lambda: sequential((6, 7, 4), L.DepthwiseConv2D(3, depth_multiplier=2, activation="tanh"), L.Conv2D(2, 1)),
        IMAGES,
    ),
    "transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.Tanh(), nn.Conv2d(3, 2, 1)),
        lambda: sequential((6, 7, 4), L.Conv2DTranspose(3, 4, 2, "same", activation="tanh"), L.Conv2D(2, 1)),
        IMAGES,
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2)),
        lambda: sequential((None, 6), L.Dense(5), L.LayerNormalization(epsilon=1e-5), L.Dense(2)),
        SEQUENCES,
    ),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.GroupNorm(3, 6), nn.Conv2d(6, 2, 1)),
        lambda: sequential((6, 7, 4), L.Conv2D(6, 1), L.GroupNormalization(3, epsilon=1e-5), L.Conv2D(2, 1)),
        IMAGES,
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(9, 4), nn.Tanh(), nn.Linear(4, 2)),
        lambda: sequential((None,), L.Embedding(9, 4), L.Activation("tanh"), L.Dense(2)),
        TOKENS,
    ),
    "LSTM without biases": (
        lambda: nn.Sequential(First(nn.LSTM(6, 4, batch_first=True, bias=False)), nn.Linear(4, 2)),
        lambda: sequential((None, 6), L.LSTM(4, return_sequences=True, use_bias=False), L.Dense(2)),
        SEQUENCES,
    ),
    "GRU": (
        lambda: nn.Sequential(First(nn.GRU(6, 4, batch_first=True)), nn.Linear(4, 2)),
        lambda: sequential((None, 6), L.GRU(4, return_sequences=True), L.Dense(2)),
        SEQUENCES,
    ),
    "attention": (
        lambda: nn.Sequential(First(nn.MultiheadAttention(6, 2, batch_first=True), 3), nn.Linear(6, 2)),
        attention_in_keras,
        SEQUENCES,
    ),
    "PReLU": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.PReLU(6), nn.Conv2d(6, 2, 1)),
        lambda: sequential((6, 7, 4), L.Conv2D(6, 1), L.PReLU(shared_axes=[1, 2]), L.Conv2D(2, 1)),
        IMAGES,
    ),
}


def for_keras(x):
    return np.moveaxis(x, 1, -1) if x.ndim == 4 else x


def as_floats(x, dtype):
    return x if x.dtype.kind == "i" else x.astype(dtype)


def wanted_like(output):
    return np.random.default_rng(1).standard_normal(output)


def train_torch(model, x, wanted):
    """Ten steps of gradient descent on the mean squared error; the losses."""
    optimizer, losses = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(torch.from_numpy(x)), torch.from_numpy(wanted))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_keras(model, x, wanted):
    optimizer, losses = keras.optimizers.SGD(RATE), []
    for _ in range(STEPS):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - wanted))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        losses.append(float(loss))
    return losses


def trained(in_torch, in_keras, x):
    """Both models after a migration and ten steps, the noise floor, and the trained model of torch's carried over.

    The floor is how far rounding drives the weights in ten steps: torch's in float32 against float64.
    """
    source, target = randomised(in_torch(), 1).eval(), randomised(in_keras(), 2)
    narrow = as_floats(x, "float32")
    plan = cc.plan(source, target, sample=narrow)
    cc.migrate(source, target, plan=plan)
    wide = in_torch()
    wide.load_state_dict(source.state_dict())
    wide.double()
    for ours, theirs in zip(source.parameters(), wide.parameters(), strict=True):
        theirs.requires_grad_(ours.requires_grad)
    wanted = wanted_like(tuple(source(torch.from_numpy(narrow)).shape))
    losses = train_torch(source.train(), narrow, wanted.astype("float32"))
    assert losses[-1] < losses[0]
    train_torch(wide.train(), as_floats(x, "float64"), wanted)
    pairs = [(a.detach(), b.detach()) for a, b in zip(source.parameters(), wide.parameters(), strict=True)]
    floor = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    theirs = train_keras(target, for_keras(narrow), for_keras(wanted).astype("float32"))
    np.testing.assert_allclose(theirs, losses, rtol=1e-4)
    expected = randomised(in_keras(), 3)
    cc.migrate(source.eval(), expected, plan=cc.plan(source, expected, sample=narrow))
    return source, target, expected, floor


def assert_same_weights(target, expected, floor, but=()):
    """Every variable, relative to its largest element, up to 20 noise floors, which is less than 1e-4."""
    assert floor < 2e-6, "ten steps amplify rounding too much for 1e-4 to say anything"
    for ours, theirs in zip(target.weights, expected.weights, strict=True):
        if not any(name in ours.path for name in but):
            difference = np.abs(ours.numpy() - theirs.numpy()).max() / np.abs(theirs.numpy()).max()
            assert difference <= max(1e-5, 20 * floor) <= 1e-4, (ours.path, difference, floor)


@pytest.mark.parametrize(("in_torch", "in_keras", "x"), NETWORKS.values(), ids=NETWORKS)
def test_ten_steps_after_a_migration_leave_the_same_weights_in_both_frameworks(in_torch, in_keras, x):
    _, target, expected, floor = trained(in_torch, in_keras, x)
    assert_same_weights(target, expected, floor)


@pytest.mark.parametrize("name", ["LSTM", "RNN"])
def test_the_sum_of_two_biases_of_torchs_is_trained_at_twice_the_rate_unless_one_is_frozen(name):
    def in_torch(frozen=True):
        net = getattr(nn, name)(6, 4, batch_first=True)
        net.bias_hh_l0.requires_grad_(not frozen)
        return nn.Sequential(First(net), nn.Linear(4, 2))

    def in_keras():
        layer = getattr(L, {"RNN": "SimpleRNN"}.get(name, name))
        return sequential((None, 6), layer(4, return_sequences=True), L.Dense(2))

    _, target, expected, floor = trained(in_torch, in_keras, SEQUENCES)
    assert_same_weights(target, expected, floor)
    source, target = randomised(in_torch(frozen=False), 1), in_keras()
    x = SEQUENCES.astype("float32")
    cc.migrate(source, target, sample=x)
    wanted = wanted_like((8, 5, 2)).astype("float32")
    before = next(v.numpy() for v in target.variables if v.path.endswith("cell/bias"))
    summed = source[0].net.bias_ih_l0.detach().numpy() + source[0].net.bias_hh_l0.detach().numpy()
    np.testing.assert_allclose(before, summed, rtol=1e-6)
    nn.functional.mse_loss(source(torch.from_numpy(x)), torch.from_numpy(wanted)).backward()
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(target(x, training=True) - wanted))
    (bias,) = [v for v in target.trainable_variables if v.path.endswith("cell/bias")]
    moved = source[0].net.bias_ih_l0.grad + source[0].net.bias_hh_l0.grad
    np.testing.assert_allclose(moved, 2 * tape.gradient(loss, bias.value).numpy(), rtol=1e-4, atol=1e-7)


def normalised():
    return nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3, momentum=0.1), nn.Conv2d(3, 2, 1))


def normalised_in_keras():
    norm = L.BatchNormalization(momentum=0.9, epsilon=1e-5, name="norm")
    return sequential((6, 7, 4), L.Conv2D(3, 1), norm, L.Conv2D(2, 1))


def test_batch_norm_trains_alike_but_for_the_running_variance_where_n_over_n_minus_1_of_torchs_is_new():
    source, target, expected, floor = trained(normalised, normalised_in_keras, IMAGES)
    assert_same_weights(target, expected, floor, but=["moving_variance"])
    start = randomised(normalised(), 1)[1].running_var.numpy() * 0.9**STEPS
    n = IMAGES[:, 0].size
    new_in_torch = source[1].running_var.numpy() - start
    new_in_keras = target.get_layer("norm").moving_variance.numpy() - start
    np.testing.assert_allclose(new_in_torch / new_in_keras, n / (n - 1), rtol=1e-5)
    # which is no rounding
    assert 1 / (n - 1) > 100 * 1e-5
