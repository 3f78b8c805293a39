"""Hugging Face's PyTorch and TensorFlow classes of one architecture, written apart: mapped without rules, both ways."""

import os
import warnings

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of old names in what the library imports
    import tensorflow as tf
    import transformers as hf
    from transformers.modeling_tf_pytorch_utils import load_pytorch_model_in_tf2_model

import clipcore as cc

pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own, in the classes that it is about to drop

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
}
BART = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
    "max_position_embeddings": 40,
}
VIT = {k: TEXT[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}


def ids(*lengths):
    rng = np.random.default_rng(0)
    values = [rng.integers(3, 90, (2, length)) for length in lengths]
    return values[0] if len(values) == 1 else dict(zip(("input_ids", "decoder_input_ids"), values, strict=True))


def image():
    return np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)


# name: configuration, and one sample or two of other lengths (verify itself tries images one smaller)
PAIRS = {
    "Bert": (hf.BertConfig(**TEXT), [ids(9), ids(6)]),
    "GPT2": (hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=40), [ids(9), ids(6)]),
    "T5": (hf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4), [ids(9, 5), ids(6, 7)]),
    "Bart": (hf.BartConfig(**BART), [ids(9, 5), ids(6, 7)]),
    "ViT": (hf.ViTConfig(**VIT, image_size=32, patch_size=8), [image()]),
    "ResNet": (hf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[2, 2]), [image()]),
    "ConvNext": (hf.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]), [image()]),
    "Swin": (
        hf.SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4),
        [image()],
    ),
}


def drawn(rng, name, shape, is_scale):
    """Scales and variances near 1, kernels by their fan-in, so that nothing is drowned or saturated."""
    if is_scale or "var" in name:
        return rng.uniform(0.5, 1.5, shape)
    return (
        rng.normal(0, 0.3, shape)
        if len(shape) < 2
        else rng.normal(0, max(1, np.prod(shape) / max(shape)) ** -0.5, shape)
    )


def torch_model(name, seed):
    model = getattr(hf, f"{name}Model")(PAIRS[name][0]).eval()
    rng = np.random.default_rng(seed)
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            values = drawn(rng, key, tuple(tensor.shape), key.endswith("weight") and tensor.ndim == 1)
            tensor.copy_(torch.from_numpy(np.asarray(values)))
    return model


def keras_model(name, seed):
    model = getattr(hf, f"TF{name}Model")(PAIRS[name][0])
    sample = PAIRS[name][1][0]
    model({k: tf.constant(v) for k, v in sample.items()} if isinstance(sample, dict) else tf.constant(sample))
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if variable.dtype.is_floating:
            scale = "gamma" in variable.name or (variable.name.endswith("weight:0") and len(variable.shape) == 1)
            variable.assign(drawn(rng, variable.name, tuple(variable.shape), scale))
    return model


def contents(model):
    if isinstance(model, torch.nn.Module):
        return [tensor.numpy().tobytes() for tensor in model.state_dict().values()]
    return [variable.numpy().tobytes() for variable in model.weights]


def assert_mapped(source, target, samples):
    before = contents(source), contents(target)
    plan = cc.plan(source, target, sample=samples[0])
    assert (contents(source), contents(target)) == before
    cc.migrate(source, target, plan=plan)
    for sample in samples:
        check = cc.verify(source, target, sample=sample, plan=plan)
        assert check.ok, check
        assert check.max_rel_error <= 1e-5
    assert contents(source) == before[0]


@pytest.mark.parametrize("name", PAIRS)
def test_pytorch_goes_to_tensorflow_as_the_librarys_own_loader_carries_it(name):
    source, target = torch_model(name, 1), keras_model(name, 2)
    assert_mapped(source, target, PAIRS[name][1])
    loaded = keras_model(name, 3)
    load_pytorch_model_in_tf2_model(loaded, source, allow_missing_keys=True)
    for ours, theirs in zip(target.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy(), err_msg=ours.name)


@pytest.mark.parametrize("name", PAIRS)
def test_tensorflow_goes_to_pytorch(name):
    assert_mapped(keras_model(name, 1), torch_model(name, 2), PAIRS[name][1])
