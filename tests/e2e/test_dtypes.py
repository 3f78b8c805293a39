"""Every dtype moves bit for bit, or is refused, or is rounded because the user asked for it."""

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
import torch
from e2e_models import assert_bitwise_equal, contents, randomised
from torch import nn

import clipcore as cc

L = keras.layers
SAMPLE = np.random.default_rng(1).standard_normal((4, 5)).astype("float32")
DTYPES = ["float16", "bfloat16", "float32", "float64"]


def torch_model(dtype):
    return randomised(nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)).to(getattr(torch, dtype)).eval(), 1)


def keras_model(dtype):
    return keras.Sequential([L.Input((5,), dtype=dtype), L.Dense(3, dtype=dtype), L.Dense(2, dtype=dtype)])


def raw(tensor):
    return tensor.detach().to(torch.float64).numpy()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_that_both_sides_have_moves_exactly_in_both_directions(dtype):
    source, target, back = torch_model(dtype), keras_model(dtype), torch_model(dtype)
    randomised(back, 7)
    result = cc.migrate(source, target, sample=SAMPLE)
    assert {tensor.rounding for tensor in result.tensors} == {0.0}
    kernel = target.layers[0].kernel.numpy()
    assert kernel.dtype.name == dtype
    np.testing.assert_array_equal(kernel.astype(np.float64), raw(source[0].weight).T)
    cc.migrate(target, back, sample=SAMPLE)
    for first, second in zip(source.parameters(), back.parameters(), strict=True):
        np.testing.assert_array_equal(raw(first), raw(second))


@pytest.mark.parametrize("narrow", DTYPES[:2])
def test_rounding_happens_on_request_alone_and_is_reported(narrow):
    source, target = torch_model("float32"), keras_model(narrow)
    plan = cc.plan(source, target, sample=SAMPLE)
    before = contents(target)
    with pytest.raises(cc.MigrationError, match=f"float32 would be rounded to {narrow}.*dtype='target'"):
        cc.migrate(source, target, plan=plan)
    assert_bitwise_equal(before, contents(target))
    result = cc.migrate(source, target, plan=plan, dtype="target")
    wanted = source[0].weight.detach().numpy().T.astype(ml_dtypes.bfloat16 if narrow == "bfloat16" else narrow)
    np.testing.assert_array_equal(target.layers[0].kernel.numpy(), wanted)
    eps = float(ml_dtypes.finfo(wanted.dtype).eps)
    assert all(0 < tensor.rounding <= eps for tensor in result.tensors)
    check = cc.verify(source, target, sample=SAMPLE, plan=result.plan)
    assert check.max_rel_error <= 4 * eps  # the target computes in its own dtype, from weights that are as planned
    assert check.first_divergence is None or not check.first_divergence.stale


def test_a_dtype_by_name_rounds_what_a_wider_target_holds():
    source, target = torch_model("float32"), keras_model("float32")
    cc.migrate(source, target, sample=SAMPLE, dtype="bfloat16")
    wanted = source[0].weight.detach().to(torch.bfloat16).to(torch.float32).numpy().T
    np.testing.assert_array_equal(target.layers[0].kernel.numpy(), wanted)


def test_what_is_beyond_the_narrower_dtype_is_refused_before_anything_is_written():
    source, target = torch_model("float32"), keras_model("float16")
    plan = cc.plan(source, target, sample=SAMPLE)
    with torch.no_grad():
        source[1].weight[0, 0] = 1e6
    before = contents(target)
    with pytest.raises(cc.MigrationError, match=r"1e\+06 is beyond float16"):
        cc.migrate(source, target, plan=plan, dtype="target")
    assert_bitwise_equal(before, contents(target))


@pytest.mark.parametrize("dtype", ["int8", "float7", 3])
def test_a_dtype_that_is_none_is_refused(dtype):
    with pytest.raises(cc.InvalidInput, match="dtype is"):
        cc.migrate(torch_model("float32"), keras_model("float32"), sample=SAMPLE, dtype=dtype)


class Codes(nn.Module):
    """A table of 8-bit codes with its scale."""

    def __init__(self, dtype):
        super().__init__()
        codes = (torch.arange(15, dtype=torch.float32) % 4).reshape(5, 3).to(dtype)
        self.register_buffer("codes", codes)
        self.scale = nn.Parameter(torch.tensor([0.5, 0.25, 2.0]))

    def forward(self, x):
        return x @ (self.codes.to(torch.float32) * self.scale)


class KerasCodes(L.Layer):
    """The same."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def build(self, shape):
        self.codes = self.add_weight(
            shape=(5, 3),
            dtype=self.kind,
            initializer=lambda *_, **__: tf.cast(tf.zeros((5, 3)), self.kind),
            trainable=False,
            name="codes",
        )
        self.scale = self.add_weight(shape=(3,), name="scale")

    def call(self, x):
        return tf.matmul(x, tf.cast(self.codes, "float32") * self.scale)


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_tensors_of_8_bits_move_as_they_are(kind):
    source = Codes(getattr(torch, kind)).eval()
    target = keras.Sequential([L.Input((5,)), KerasCodes(kind)])
    cc.migrate(source, target, sample=SAMPLE)
    np.testing.assert_array_equal(
        target.layers[0].codes.numpy().astype(np.float32), (np.arange(15, dtype=np.float32) % 4).reshape(5, 3)
    )
    assert cc.verify(source, target, sample=SAMPLE).ok


def test_tensors_of_8_bits_are_refused_where_the_other_side_has_none():
    source, target = Codes(torch.int8).eval(), keras.Sequential([L.Input((5,)), KerasCodes("float32")])
    plan = cc.plan(source, target, sample=SAMPLE)
    with pytest.raises(cc.MigrationError, match="int8 moves as it is or not at all"):
        cc.migrate(source, target, plan=plan)
