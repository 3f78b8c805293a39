"""Clipping across frameworks: one layer, one state, several networks, and norms that were taken apart."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from torch import nn

import clipcore as cc

L = keras.layers
SAMPLE = np.random.default_rng(3).standard_normal((2, 2, 9, 9)).astype(np.float32)

# per tensor of the torch model, where Keras has the same axes
TO_KERAS = {"0.weight": (2, 3, 1, 0), "0.bias": (0,), "2.weight": (1, 0), "2.bias": (0,)}


class Pooled(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def one_model_twice():
    """A convolution and a linear layer in torch, and the same in Keras with the same weights."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(2, 6, 3), Pooled(), nn.Linear(6, 4))
    inputs = keras.Input((9, 9, 2))
    second = keras.Model(inputs, L.Dense(4)(L.GlobalAveragePooling2D()(L.Conv2D(6, 3)(inputs))))
    cc.migrate(first, second, sample=SAMPLE)
    return first, second


def gradients(size=1.0):
    """Gradients of the torch model and the same of the Keras one, in the order in which each lists its parameters."""
    rng = np.random.default_rng(1)
    model, _ = one_model_twice()
    grads = {name: size * rng.standard_normal(p.shape).astype(np.float32) for name, p in model.named_parameters()}
    return grads, [grads[name].transpose(axes) for name, axes in TO_KERAS.items()]


def assert_same_bits(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


BY_LAYOUT = [
    cc.AdaptiveClip(0.5),
    cc.AdaptiveClip(0.5, exclude=(r"^2\.bias|dense.*bias",)),
    cc.MaxNorm(0.9),
    cc.MinMaxNorm(0.5, 0.7),
    cc.UnitNorm(),
    cc.PerGroup({"bias": cc.ClipByValue(0.1)}, default=cc.AdaptiveClip(0.2)),
]


@pytest.mark.parametrize("policy", BY_LAYOUT, ids=repr)
def test_the_same_layer_is_clipped_alike_in_both_frameworks(policy):
    torch_model, keras_model = one_model_twice()
    first, second = gradients()
    ours, one = cc.clip([torch.from_numpy(g) for g in first.values()], policy, model=torch_model)
    named, _ = cc.clip({name: torch.from_numpy(g) for name, g in first.items()}, policy, model=torch_model)
    theirs, other = cc.clip([tf.constant(g) for g in second], policy, model=keras_model)
    assert_same_bits(ours, list(named.values()))
    assert_same_bits([x.numpy().transpose(axes) for x, axes in zip(ours, TO_KERAS.values(), strict=True)], theirs)
    assert float(one.norm) == pytest.approx(float(other.norm), rel=1e-14)
    assert bool(one.clipped)
    assert bool(other.clipped)


@pytest.mark.parametrize(
    "limit", [cc.MaxNorm(0.3), cc.MinMaxNorm(0.5, 0.7), cc.UnitNorm(), cc.SpectralLimit(0.4), cc.Box(0.1)], ids=repr
)
def test_the_same_layer_is_limited_alike_in_both_frameworks(limit):
    torch_model, keras_model = one_model_twice()
    assert cc.limit_(torch_model, limit).clipped
    assert cc.limit_(keras_model, limit).clipped
    ours = [
        p.detach().numpy().transpose(axes) for p, axes in zip(torch_model.parameters(), TO_KERAS.values(), strict=True)
    ]
    # singular values are those of a transposed matrix up to rounding
    unit = 1 if isinstance(limit, cc.SpectralLimit) else 0
    for one, other in zip(ours, keras_model.trainable_variables, strict=True):
        np.testing.assert_array_max_ulp(one, other.numpy(), unit)


LEARNING = [cc.AutoClip(40.0, window=5), cc.ZClip(1.0, warmup=4), cc.AdaGC(2.0, warmup=4), cc.SpikeClip(2.0, warmup=4)]


@pytest.mark.parametrize("policy", [*LEARNING, cc.Chain([*LEARNING[:2], cc.ClipByValue(1.0)])], ids=repr)
@pytest.mark.parametrize("stop", [2, 6])
def test_warmed_up_in_torch_it_goes_on_in_tensorflow_with_the_same_bits(policy, stop, tmp_path):
    rng = np.random.default_rng(stop)
    steps = [
        [scale * rng.standard_normal(s).astype(np.float32) for s in ((3, 4), (5,))]
        for scale in (1, 2, 1, 3, 1, 9, 1, 9, 2)
    ]
    alone, first, second = (cc.Clipper(policy) for _ in range(3))
    wanted = [alone.clip([torch.from_numpy(g) for g in grads])[0] for grads in steps]
    actual = [first.clip([torch.from_numpy(g) for g in grads])[0] for grads in steps[:stop]]
    save_file(first.state_dict(), tmp_path / "state.safetensors")
    second.load_state_dict(load_file(tmp_path / "state.safetensors"))
    actual += [second.clip([tf.constant(g) for g in grads])[0] for grads in steps[stop:]]
    for one, other in zip(actual, wanted, strict=True):
        assert_same_bits(one, other)
    one, other = alone.state_dict(), second.state_dict()
    assert list(one) == list(other)
    assert_same_bits(list(one.values()), list(other.values()))


TOGETHER = [
    cc.ClipByGlobalNorm(1.0),
    cc.ClipByGlobalNorm(1.0, p=3.0),
    cc.ClipByNorm(0.5),
    cc.ClipByValue(0.4),
    cc.Chain([cc.ClipByValue(0.9), cc.ClipByGlobalNorm(1.0)]),
    cc.PerGroup({r"^a\.": cc.ClipByGlobalNorm(1.0)}, default=cc.ClipByGlobalNorm(2.0)),
]


@pytest.mark.parametrize("policy", TOGETHER, ids=repr)
def test_networks_of_both_frameworks_are_clipped_as_one(policy):
    rng = np.random.default_rng(0)
    a = {"w": rng.standard_normal((3, 4)).astype(np.float32), "b": rng.standard_normal(3)}
    b = [rng.standard_normal((2, 5)).astype(np.float32), rng.standard_normal(7).astype(np.float16)]
    grads = {
        "a": {name: torch.from_numpy(x) for name, x in a.items()},
        "b": [tf.constant(b[0]), None, tf.constant(b[1])],
    }
    clipped, report = cc.clip_together(grads, policy)
    wanted, exact = cc.clip({**{f"a.{name}": x for name, x in a.items()}, "b.0": b[0], "b.1": b[1]}, policy)
    found = [*clipped["a"].values(), *(x for x in clipped["b"] if x is not None)]
    assert clipped["b"][1] is None
    assert isinstance(found[0], torch.Tensor)
    assert isinstance(found[-1], tf.Tensor)
    assert_same_bits([x.numpy() for x in found], list(wanted.values()))
    assert (report.norm, report.scale, report.clipped) == (exact.norm, exact.scale, exact.clipped)


@pytest.mark.parametrize("policy", LEARNING, ids=repr)
def test_a_clipper_learns_from_networks_of_both_frameworks_as_from_one(policy):
    rng = np.random.default_rng(0)
    together, alone = cc.Clipper(policy), cc.Clipper(policy)
    for size in (1, 2, 1, 3, 9, 1, 9):
        a, b = (size * rng.standard_normal(shape).astype(np.float32) for shape in ((3, 4), (5,)))
        clipped, report = together.clip_together({"a": torch.from_numpy(a), "b": [tf.constant(b)]})
        wanted, exact = alone.clip([a, b])
        assert_same_bits([clipped["a"], *clipped["b"]], wanted)
        assert (report.norm, report.limit) == (exact.norm, exact.limit)
    assert_same_bits(list(together.state_dict().values()), list(alone.state_dict().values()))


def test_networks_that_grads_does_not_have_are_refused():
    grads = {"a": np.ones(2), "b": np.ones(2)}
    for arguments in ({"params": {"c": np.ones(2)}}, {"models": {"c": None}}):
        with pytest.raises(cc.InvalidInput, match=r"has 'c', and grads has \['a', 'b'\]"):
            cc.clip_together(grads, cc.ClipByNorm(1.0), **arguments)
    with pytest.raises(cc.InvalidInput, match="expected a dict"):
        cc.clip_together([np.ones(2)], cc.ClipByNorm(1.0))


def test_networks_with_their_models_are_clipped_by_their_layouts():
    torch_model, keras_model = one_model_twice()
    first, second = gradients()
    policy = cc.AdaptiveClip(0.5)
    grads = {"a": [torch.from_numpy(g) for g in first.values()], "b": [tf.constant(g) for g in second]}
    clipped, _ = cc.clip_together(grads, policy, models={"a": torch_model, "b": keras_model})
    assert_same_bits(clipped["a"], cc.clip(grads["a"], policy, model=torch_model)[0])
    assert_same_bits(clipped["b"], cc.clip(grads["b"], policy, model=keras_model)[0])


@given(seed=st.integers(0, 2**32 - 1), parts=st.integers(1, 5), p=st.sampled_from([1.0, 2.0, 3.0, np.inf]))
def test_norms_taken_apart_and_combined_give_what_one_call_gives(seed, parts, p):
    rng = np.random.default_rng(seed)
    grads = [rng.standard_normal(rng.integers(1, 40)).astype(np.float32) for _ in range(2 * parts)]
    policy = cc.ClipByGlobalNorm(1.0, p=p)
    wanted, report = cc.clip(grads, policy)
    ranks = [
        [torch.from_numpy(g) if rank % 2 else tf.constant(g) for g in grads[2 * rank : 2 * rank + 2]]
        for rank in range(parts)
    ]
    norm = cc.combine([cc.norm(rank, p) for rank in ranks], p)
    assert norm == pytest.approx(report.norm, rel=1e-14)
    scale = cc.scale_for(norm, policy)
    for one, other in zip([x for rank in ranks for x in cc.apply_scale(rank, scale)], wanted, strict=True):
        np.testing.assert_array_max_ulp(np.asarray(one), other, 1)
