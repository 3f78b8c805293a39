"""The models of torchvision and keras.applications, written apart: mapped without rules; one pair truly differs."""

import warnings

import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what the CUDA build does not find
    import keras
    import torchvision

import clipcore as cc

A = keras.applications


def image(size):
    return np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)


def build(name, *, size, include_top=True, seed=0):
    """The pair: every parameter and statistic random, scales and variances near 1, kernels by their fan-in."""
    model = getattr(torchvision.models, name.lower())(weights=None).eval()
    source = model if include_top else model.features
    options = {"weights": None, "include_top": include_top, "input_shape": (size, size, 3)}
    target = getattr(A, name)(**options, **({"classifier_activation": None} if include_top else {}))
    rng = np.random.default_rng(seed)
    for key, tensor in source.state_dict().items():
        if tensor.is_floating_point():
            scale = key.endswith("weight") and tensor.ndim == 1
            tensor.copy_(torch.from_numpy(np.asarray(drawn(rng, key, tuple(tensor.shape), scale))))
    for variable in target.weights:
        variable.assign(drawn(rng, variable.name, tuple(variable.shape), variable.name == "gamma"))
    return source, target


def drawn(rng, name, shape, is_scale):
    if is_scale or "var" in name:
        return rng.uniform(0.5, 1.5, shape)
    return rng.normal(0, 0.1, shape) if len(shape) < 2 else rng.normal(0, (np.prod(shape) / max(shape)) ** -0.5, shape)


def assert_mapped(source, target, sample):
    plan = cc.plan(source, target, sample=sample)
    assert {row.evidence for row in plan.rows} == {"proven"}, str(plan)
    cc.migrate(source, target, plan=plan)
    check = cc.verify(source, target, sample=sample, plan=plan)
    assert check.ok, check
    assert check.max_rel_error <= 1e-5
    return check


@pytest.mark.parametrize("size", [64, 96])
def test_vgg16_goes_to_keras_whatever_its_flatten_is_over(size):
    # torchvision pools to 7 places before the Flatten, which Keras has at 224 pixels alone
    source, target = build("VGG16", size=size, include_top=False)
    assert_mapped(source, target, image(size))


def test_vgg16_with_its_head_goes_to_keras_in_the_order_of_its_flatten():
    source, target = build("VGG16", size=224)
    assert_mapped(source, target, image(224))


def test_densenet121_goes_both_ways_at_two_sizes():
    source, target = build("DenseNet121", size=64)
    for size in (64, 96):
        fresh = build("DenseNet121", size=size, seed=size)[1]
        assert_mapped(source, fresh, image(size))
    back = build("DenseNet121", size=64, seed=5)[0]
    assert_mapped(target, back, image(64).transpose(0, 2, 3, 1))


def test_resnet50_is_placed_whole_and_the_stride_of_each_stage_named():
    source, target = build("ResNet50", size=64)
    plan = cc.plan(source, target, sample=image(64))
    assert not plan.unused or all("num_batches_tracked" in name for name in plan.unused)
    cc.migrate(source, target, plan=plan)
    check = cc.verify(source, target, sample=image(64), plan=plan, explain=True)
    assert not check.ok
    assert "stride" in check.reason
    tested = {(d.layer, d.setting, d.source, d.target) for d in check.differences if d.tested}
    # version 1.5 strides in the 3 x 3 convolution, version 1 in the first 1 x 1
    assert tested == {
        (f"conv{stage}_block1_{place}_conv", "stride", *strides)
        for stage in (3, 4, 5)
        for place, strides in ((1, ((1, 1), (2, 2))), (2, ((2, 2), (1, 1))))
    }
