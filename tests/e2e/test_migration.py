"""Weights move between PyTorch and Keras models that were built apart, in every direction, and the result is proved."""

import keras
import numpy as np
import pytest
import torch
from e2e_models import assert_bitwise_equal, assert_proven_throughout, contents, randomised
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import clipcore as cc

L = keras.layers
KERAS_CONV = {1: L.Conv1D, 2: L.Conv2D, 3: L.Conv3D}
KERAS_DEPTHWISE = {1: L.DepthwiseConv1D, 2: L.DepthwiseConv2D}
KERAS_PAD = {1: L.ZeroPadding1D, 2: L.ZeroPadding2D, 3: L.ZeroPadding3D}
KERAS_POOL = {1: L.AveragePooling1D, 2: L.AveragePooling2D, 3: L.AveragePooling3D}
TORCH_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TORCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
TORCH_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


@st.composite
def networks(draw):
    """A recipe that both frameworks can build: rank, channels, size, blocks, and what follows them."""
    rank = draw(st.integers(1, 3))
    channels = draw(st.sampled_from([2, 3, 4]))
    size = draw(st.sampled_from([7, 8]))
    blocks = []
    width = channels
    for _ in range(draw(st.integers(1, 3))):
        depthwise = rank < 3 and draw(st.booleans())
        # TensorFlow has no grouped 3-D convolution on a CPU
        groups = width if depthwise else draw(st.sampled_from([g for g in (1, 2)[: 4 - rank] if width % g == 0]))
        out = width * draw(st.integers(1, 2)) if depthwise else 2 * draw(st.integers(1, 3))
        kernel = draw(st.sampled_from([1, 3]))
        blocks.append(
            {
                "depthwise": depthwise,
                "groups": groups,
                "out": out,
                "kernel": kernel,
                "padding": draw(st.sampled_from([0, (kernel - 1) // 2])),
                "stride": draw(st.sampled_from([1, 2])) if size > 5 else 1,
                "bias": draw(st.booleans()),
                "norm": draw(st.booleans()),
                "activation": draw(st.sampled_from([None, "relu", "tanh"])),
            }
        )
        block = blocks[-1]
        size = (size + 2 * block["padding"] - kernel) // block["stride"] + 1
        width = out
        if size < 3:
            break
    return {
        "rank": rank,
        "channels": channels,
        "blocks": blocks,
        "pool": size >= 4 and draw(st.booleans()),
        "flatten": draw(st.booleans()),
        "dense": draw(st.lists(st.integers(2, 5), min_size=1, max_size=2)),
    }


TORCH_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "softmax": lambda: nn.Softmax(-1)}


class MeanOverPlaces(nn.Module):
    def forward(self, x):
        return x.flatten(2).mean(2)


def build_torch(recipe, shape):
    rank, width, layers = recipe["rank"], recipe["channels"], []
    for block in recipe["blocks"]:
        options = {key: block[key] for key in ("padding", "stride", "groups", "bias")}
        layers.append(TORCH_CONV[rank](width, block["out"], block["kernel"], **options))
        if block["norm"]:
            layers.append(TORCH_NORM[rank](block["out"], eps=1e-3))
        if block["activation"]:
            layers.append(TORCH_ACTIVATIONS[block["activation"]]())
        width = block["out"]
    if recipe["pool"]:
        layers.append(TORCH_POOL[rank](2))
    layers.append(nn.Flatten() if recipe["flatten"] else MeanOverPlaces())
    width = nn.Sequential(*layers).eval()(torch.zeros(shape)).shape[1]
    for out in recipe["dense"]:
        layers += [nn.Linear(width, out), nn.Tanh()]
        width = out
    return nn.Sequential(*layers[:-1]).eval()


def build_keras(recipe, shape):
    rank = recipe["rank"]
    x = inputs = keras.Input((*shape[2:], shape[1]))
    for block in recipe["blocks"]:
        # the padding stands in a layer of its own, the activation inside the convolution: other habits, same function
        if block["padding"]:
            x = KERAS_PAD[rank](block["padding"])(x)
        options = {"strides": block["stride"], "use_bias": block["bias"]}
        if not block["norm"]:
            options["activation"] = block["activation"]
        if block["depthwise"]:
            multiplier = block["out"] // block["groups"]
            x = KERAS_DEPTHWISE[rank](block["kernel"], depth_multiplier=multiplier, **options)(x)
        else:
            x = KERAS_CONV[rank](block["out"], block["kernel"], groups=block["groups"], **options)(x)
        if block["norm"]:
            x = L.BatchNormalization(epsilon=1e-3)(x)
            x = L.Activation(block["activation"])(x) if block["activation"] else x
    if recipe["pool"]:
        x = KERAS_POOL[rank](2)(x)
    x = L.Flatten()(x) if recipe["flatten"] else x
    if not recipe["flatten"]:
        x = keras.ops.mean(x, axis=tuple(range(1, rank + 1)))
    for place, out in enumerate(recipe["dense"]):
        x = L.Dense(out, activation="tanh" if place + 1 < len(recipe["dense"]) else None)(x)
    return keras.Model(inputs, x)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(networks(), st.sampled_from(["torch to keras", "keras to torch", "torch to torch", "keras to keras"]), st.data())
def test_any_convolutional_network_moves_between_any_two_frameworks_and_computes_the_same(recipe, direction, data):
    size = data.draw(st.sampled_from([7, 8]))
    shape = (2, recipe["channels"], *[size] * recipe["rank"])
    try:
        # a size that the recipe was not drawn for can leave nothing after the strides
        reference = build_torch(recipe, shape)
    except RuntimeError:
        return
    first, second = direction.split(" to ")
    build = {"torch": build_torch, "keras": build_keras}
    source = randomised(reference if first == "torch" else build_keras(recipe, shape), 1)
    target = randomised(build[second](recipe, shape), 2)
    sample = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    sample = sample if first == "torch" else np.moveaxis(sample, 1, -1)
    kept, before = contents(source), contents(target)

    plan = cc.plan(source, target, sample=sample)
    assert_bitwise_equal(before, contents(target))
    assert not cc.verify(source, target, sample=sample, plan=plan).ok
    cc.migrate(source, target, plan=plan)
    check = cc.verify(source, target, sample=sample, plan=plan)

    assert check.ok, check
    assert check.max_rel_error <= 1e-5
    assert {row.evidence for row in plan.rows} == {"proven"}
    assert_bitwise_equal(kept, contents(source))
    if first == second:
        floats = [pair for pair in zip(kept, contents(target), strict=True) if pair[0].dtype.kind == "f"]
        assert_bitwise_equal([a for a, _ in floats], [b for _, b in floats])


def small_torch(padding=1, eps=1e-5):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=padding),
        nn.BatchNorm2d(4, eps=eps),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 5),
        nn.ReLU(),
        nn.Linear(5, 2),
    ).eval()


def small_keras(padding="explicit", eps=1e-5, dtype="float32"):
    inputs = keras.Input((8, 8, 3), dtype=dtype)
    x = L.ZeroPadding2D(1, dtype=dtype)(inputs) if padding == "explicit" else inputs
    mode = "valid" if padding == "explicit" else padding
    x = L.Conv2D(4, 3, strides=2, padding=mode, name="conv", dtype=dtype)(x)
    x = L.BatchNormalization(epsilon=eps, name="norm", dtype=dtype)(x)
    x = L.Flatten(dtype=dtype)(L.ReLU(dtype=dtype)(x))
    x = L.Dense(5, activation="relu", name="hidden", dtype=dtype)(x)
    return keras.Model(inputs, L.Dense(2, name="head", dtype=dtype)(x))


SAMPLE = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)


def test_fresh_models_whose_biases_and_statistics_would_hide_an_error_are_mapped_and_left_as_they_are():
    source, target = small_torch(), small_keras()
    kept, before = contents(source), contents(target)
    plan = cc.plan(source, target, sample=SAMPLE)
    assert_bitwise_equal(kept, contents(source))
    assert_bitwise_equal(before, contents(target))
    assert {row.evidence for row in plan.rows} == {"proven"}


def test_the_kernel_behind_a_flatten_is_carried_in_the_order_of_the_features_and_no_plain_transpose():
    source, target = randomised(small_torch(), 1), randomised(small_keras(), 2)
    cc.migrate(source, target, sample=SAMPLE)
    kernel = source[4].weight.detach().numpy()
    by_hand = kernel.reshape(5, 4, 4, 4).transpose(2, 3, 1, 0).reshape(64, 5)
    np.testing.assert_array_equal(target.get_layer("hidden").kernel.numpy(), by_hand)
    target.get_layer("hidden").kernel.assign(kernel.T)
    check = cc.verify(source, target, sample=SAMPLE)
    assert not check.ok
    assert check.first_divergence.layer == "hidden"


def test_another_epsilon_of_a_layer_norm_is_no_error_of_the_plan_and_is_named_by_verify():
    source = randomised(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4, eps=0.1), nn.Linear(4, 2)).eval(), 1)
    layers = [L.Dense(4), L.LayerNormalization(epsilon=1e-3, name="norm"), L.Dense(2)]
    target = randomised(keras.Sequential([L.Input((3,)), *layers]), 2)
    x = np.random.default_rng(3).standard_normal((5, 3)).astype("float32")
    plan = cc.plan(source, target, sample=x)
    cc.migrate(source, target, plan=plan)
    check = cc.verify(source, target, sample=x, plan=plan)
    assert not check.ok
    assert check.first_divergence.layer == "norm"
    assert "eps" in check.first_divergence.reason
    assert any(d.setting == "eps" and d.source == 0.1 and d.target == 1e-3 for d in check.differences)


def test_a_stride_two_padding_same_is_named_with_both_paddings():
    source, target = randomised(small_torch(), 1), randomised(small_keras(padding="same"), 2)
    plan = cc.plan(source, target, sample=SAMPLE)
    cc.migrate(source, target, plan=plan)
    check = cc.verify(source, target, sample=SAMPLE, plan=plan)
    assert not check.ok
    assert check.first_divergence.layer == "conv"
    assert "((0, 1), (0, 1))" in check.first_divergence.reason
    assert "((1, 1), (1, 1))" in check.first_divergence.reason


def test_one_wrong_weight_anywhere_is_found_and_its_layer_named():
    source, target = randomised(small_torch(), 1), randomised(small_keras(), 2)
    plan = cc.plan(source, target, sample=SAMPLE)
    for name in ("conv", "norm", "hidden", "head"):
        cc.migrate(source, target, plan=plan)
        variable = target.get_layer(name).weights[0]
        value = variable.numpy().copy()
        value.flat[0] += 1
        variable.assign(value)
        check = cc.verify(source, target, sample=SAMPLE, plan=plan)
        assert check.first_divergence.layer == name
        assert variable.path in check.first_divergence.reason


def test_verify_without_a_plan_finds_one():
    source, target = randomised(small_torch(), 1), randomised(small_keras(), 2)
    cc.migrate(source, target, sample=SAMPLE)
    assert cc.verify(source, target, sample=SAMPLE).ok


def test_a_network_without_flatten_is_verified_at_even_and_odd_sizes():
    source = randomised(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)).eval(), 1
    )
    inputs = keras.Input((None, None, 3))
    x = L.Conv2D(4, 3, padding="same", activation="relu")(inputs)
    target = keras.Model(inputs, L.Conv2D(2, 3, padding="same")(x))
    cc.migrate(source, target, sample=SAMPLE)
    check = cc.verify(source, target, sample=SAMPLE)
    assert check.ok
    assert check.shapes == ("(2, 3, 8, 8)", "(2, 3, 7, 7)")


@pytest.mark.parametrize("seed", range(4))
def test_as_many_channels_as_places_do_not_turn_what_flows_on_behind_a_difference(seed):
    source, target = randomised(small_torch(), seed), randomised(small_keras(padding="same"), 2)
    sample = np.random.default_rng(seed).standard_normal((2, 3, 8, 8)).astype(np.float32)
    plan = cc.plan(source, target, sample=sample)
    assert {row.target_layer for row in plan.rows if row.evidence != "proven"} == {"conv"}
    sizes = {row.target: dict(row.sizes) for row in plan.rows}
    assert sizes["hidden/kernel"] == {"channel": 4}


def test_as_many_features_as_steps_do_not_turn_what_flows_on_behind_a_difference():
    source = randomised(nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5, eps=0.5), nn.Linear(5, 5), nn.Linear(5, 2)), 1)
    layers = [L.Dense(5), L.LayerNormalization(epsilon=1e-5, name="norm"), L.Dense(5), L.Dense(2)]
    target = randomised(keras.Sequential([keras.Input((5, 5)), *layers]), 2)
    plan = cc.plan(source, target, sample=np.random.default_rng(0).standard_normal((2, 5, 5)).astype(np.float32))
    assert {row.target_layer for row in plan.rows if row.evidence != "proven"} == {"norm"}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(30, 8), nn.LayerNorm(8)
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, tokens):
        x = self.norm(self.embedding(tokens))
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        return self.out(torch.softmax(scores, -1) @ self.value(x))


class AttentionInKeras(keras.Model):
    """The same function; its layers run in another order and carry no names."""

    def __init__(self):
        super().__init__()
        self.table, self.scale = L.Embedding(30, 8), L.LayerNormalization(epsilon=1e-5)
        self.a, self.b, self.c, self.d = (L.Dense(8) for _ in range(4))

    def call(self, tokens):
        x = self.scale(self.table(tokens))
        value, key, query = self.a(x), self.b(x), self.c(x)
        scores = keras.ops.softmax(keras.ops.matmul(query, keras.ops.transpose(key, (0, 2, 1))))
        return self.d(keras.ops.matmul(scores, value))


def test_query_key_and_value_see_the_same_input_and_are_told_apart_by_what_follows():
    tokens = np.random.default_rng(0).integers(0, 30, (2, 6))
    target = AttentionInKeras()
    target(tokens)
    source = randomised(Attention(), 1)
    randomised(target, 2)
    plan = cc.plan(source, target, sample=tokens)
    cc.migrate(source, target, plan=plan)
    assert cc.verify(source, target, sample=tokens, plan=plan).ok
    np.testing.assert_array_equal(target.c.kernel.numpy(), source.query.weight.detach().numpy().T)
    assert {row.evidence for row in plan.rows} == {"proven"}


class Towers(nn.Module):
    def __init__(self, names):
        super().__init__()
        self.names = names
        for name in names:
            self.add_module(name, nn.Linear(6, 6))

    def forward(self, x):
        return sum(torch.tanh(getattr(self, name)(x)) for name in self.names)


def test_towers_that_compute_the_same_are_settled_by_name_and_shown_as_such():
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    source, target = Towers(["image", "text"]), Towers(["text", "image"])
    plan = cc.plan(randomised(source, 1), randomised(target, 2), sample=x)
    assert {row.target: row.sources[0] for row in plan.rows} == {row.target: row.target for row in plan.rows}
    assert {row.evidence for row in plan.rows} == {"name"}


def test_towers_that_nothing_tells_apart_are_an_error_that_lists_them():
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    source, target = randomised(Towers(["one", "two"]), 1), randomised(Towers(["xxxx", "yyyy"]), 2)
    before = contents(target)
    with pytest.raises(cc.MappingError, match="'one', 'two'"):
        cc.plan(source, target, sample=x)
    assert_bitwise_equal(before, contents(target))


POLICIES = [cc.ClipByValue(0.3), cc.ClipByNorm(0.7), cc.ClipByGlobalNorm(2.0)]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_a_limit_bounds_the_weights_that_move_never_the_statistics_and_verify_knows_the_limited_source(policy):
    source, target = randomised(small_torch(), 1), randomised(small_keras(), 2)
    kept = contents(source)
    result = cc.migrate(source, target, sample=SAMPLE, limit=policy)
    assert_bitwise_equal(kept, contents(source))
    assert any(tensor.clipped for tensor in result.tensors)
    np.testing.assert_array_equal(target.get_layer("norm").moving_mean.numpy(), source[1].running_mean.numpy())
    trainable = [variable.numpy() for variable in target.trainable_variables]
    bounded, _ = cc.clip(trainable, policy)
    for first, second in zip(trainable, bounded, strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-6)
    assert cc.verify(source, target, sample=SAMPLE, plan=result.plan).ok
    plain = cc.Plan(result.plan.source, result.plan.target, result.plan.rows)
    assert not cc.verify(source, target, sample=SAMPLE, plan=plain).ok


LIMITS = [
    *POLICIES,
    cc.MaxNorm(0.7),
    cc.UnitNorm(),
    cc.SpectralLimit(0.5),
    cc.Chain([cc.MaxNorm(0.9), cc.ClipByValue(0.2)]),
    cc.PerGroup({"weight|kernel": cc.MaxNorm(0.7)}),
]


@pytest.mark.parametrize("limit", LIMITS, ids=repr)
@pytest.mark.parametrize("build", [small_torch, small_keras])
def test_what_moves_under_a_limit_is_what_arrives_when_the_target_is_limited_afterwards(build, limit):
    source, limited, plain = randomised(small_torch(), 1), randomised(build(), 2), randomised(build(), 2)
    result = cc.migrate(source, limited, sample=SAMPLE, limit=limit)
    cc.migrate(source, plain, sample=SAMPLE)
    cc.limit_(plain, limit)
    assert_bitwise_equal(contents(limited), contents(plain))
    assert any(tensor.clipped and tensor.scale != 1 for tensor in result.tensors)
    assert cc.verify(source, limited, sample=SAMPLE, plan=result.plan).ok


def test_a_limit_on_the_difference_acts_on_the_units_of_the_targets_layers():
    source, target = randomised(small_torch(), 1), randomised(small_torch(), 2)
    before = contents_by_name(target)
    result = cc.migrate(source, target, sample=SAMPLE, limit=cc.Delta(cc.MaxNorm(0.3)))
    kernels = [t.target for t in result.tensors if before[t.target].ndim > 1]
    assert kernels
    for name in kernels:
        moved = (contents_by_name(target)[name] - before[name]).reshape(len(before[name]), -1)
        np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 0.3, rtol=1e-5)
    assert cc.verify(source, target, sample=SAMPLE, plan=result.plan).ok


@pytest.mark.parametrize(
    ("policy", "message"), [(cc.PerExampleClip(1.0), "sums over examples"), (cc.AutoClip(), "learns from step to step")]
)
def test_a_policy_that_cannot_limit_what_moves_is_refused_before_anything_is_written(policy, message):
    source, target = randomised(small_torch(), 1), randomised(small_keras(), 2)
    before = contents(target)
    with pytest.raises(cc.InvalidInput, match=message):
        cc.migrate(source, target, sample=SAMPLE, limit=policy)
    assert_bitwise_equal(before, contents(target))


@pytest.mark.parametrize("limit", [cc.ClipByNorm(0.7), cc.Delta(cc.ClipByGlobalNorm(0.5))], ids=["weights", "delta"])
@pytest.mark.parametrize("build", [small_torch, small_keras])
def test_a_limit_acts_on_frozen_tensors_of_the_target_as_on_others(build, limit):
    source, free, frozen = randomised(small_torch(), 1), randomised(build(), 2), randomised(build(), 2)
    if isinstance(frozen, keras.Model):
        frozen.trainable = False
    else:
        frozen.requires_grad_(False)
    first, second = (cc.migrate(source, target, sample=SAMPLE, limit=limit) for target in (free, frozen))
    assert [tensor.clipped for tensor in first.tensors] == [tensor.clipped for tensor in second.tensors]
    assert any(tensor.clipped for tensor in first.tensors)
    assert_bitwise_equal(contents(free), contents(frozen))
    assert cc.verify(source, frozen, sample=SAMPLE, plan=second.plan).ok


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_a_limit_on_the_difference_keeps_the_target_near_what_it_was(policy):
    source, target = randomised(small_torch(), 1), randomised(small_keras(), 2)
    before = [variable.numpy().astype(np.float64) for variable in target.trainable_variables]
    result = cc.migrate(source, target, sample=SAMPLE, limit=cc.Delta(policy))
    moved = [v.numpy().astype(np.float64) - old for v, old in zip(target.trainable_variables, before, strict=True)]
    _, report = cc.clip(moved, policy)
    if isinstance(policy, cc.ClipByValue):
        assert max(np.abs(step).max() for step in moved) <= 0.3 * (1 + 1e-6)
    else:
        assert max(report.norms) <= policy.max_norm * (1 + 1e-6)
    assert cc.verify(source, target, sample=SAMPLE, plan=result.plan).ok


class Reader(nn.Module):
    """Embedding, norm and head; the head may be tied to the embedding, and biases may be missing."""

    def __init__(self, tied, bias):
        super().__init__()
        self.table, self.norm = nn.Embedding(9, 4), nn.LayerNorm(4, bias=bias)
        self.head = nn.Linear(4, 9, bias=bias)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.norm(self.table(tokens))))


TOKENS = np.arange(9)[None]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
UNITS = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}


@st.composite
def readers(draw):
    """A source and a target that can take its weights: as wide, with no tie of its own, and with all that it has."""
    narrow, wide = sorted(draw(st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES))), key=DTYPES.index)
    if (narrow, wide) == (torch.bfloat16, torch.float16):
        narrow = wide
    bias = draw(st.booleans())
    source = randomised(Reader(draw(st.booleans()), bias).to(narrow), 1)
    return source, randomised(Reader(False, bias or draw(st.booleans())).to(wide), 2), UNITS[wide]


def contents_by_name(model):
    return {name: tensor.detach().double().clone().numpy() for name, tensor in model.state_dict().items()}


@given(readers(), st.sampled_from([cc.ClipByValue, cc.ClipByNorm, cc.ClipByGlobalNorm]), st.sampled_from([0, 0.01, 1]))
def test_a_limit_on_the_difference_bounds_what_moves_in_every_tensor_of_the_target(models, policy, bound):
    source, target, unit = models
    kept, before = contents_by_name(source), contents_by_name(target)
    result = cc.migrate(source, target, sample=TOKENS, limit=cc.Delta(policy(bound)))
    after = contents_by_name(target)
    moved = {name: after[name] - before[name] for name in after}
    rounding = unit * max(np.abs(value).max() for value in after.values())
    if policy is cc.ClipByValue:
        assert max(np.abs(step).max() for step in moved.values()) <= bound + 2 * rounding
    else:
        norms = [np.linalg.norm(step) for step in moved.values()]
        largest = np.linalg.norm(norms) if policy is cc.ClipByGlobalNorm else max(norms)
        elements = sum(step.size for step in moved.values())
        assert largest <= bound * (1 + 1e-12) + rounding * np.sqrt(elements)
    if bound == 0:
        assert not any(step.any() for step in moved.values())
    assert all(np.array_equal(value, kept[name]) for name, value in contents_by_name(source).items())
    assert cc.verify(source, target, sample=TOKENS, plan=result.plan).ok


def test_a_tied_tensor_and_a_filled_one_are_limited_where_they_arrive_and_each_is_checked_by_verify():
    source, target = randomised(Reader(True, False), 1), randomised(Reader(False, True), 2)
    before = contents_by_name(target)
    result = cc.migrate(source, target, sample=TOKENS, limit=cc.Delta(cc.ClipByNorm(0.01)))
    for tensor in result.tensors:
        moved = np.linalg.norm(contents_by_name(target)[tensor.target] - before[tensor.target])
        assert moved == pytest.approx(0.01, rel=1e-4)
        assert moved == pytest.approx(tensor.norm * tensor.scale, rel=1e-4)
    assert {tensor.source for tensor in result.tensors} == {"table.weight", "norm.weight", ""}
    assert cc.verify(source, target, sample=TOKENS, plan=result.plan).ok
    for name in ("table.weight", "head.weight", "head.bias", "norm.bias"):
        with torch.no_grad():
            target.get_parameter(name).view(-1)[0] += 1
        check = cc.verify(source, target, sample=TOKENS, plan=result.plan)
        assert not check.ok
        assert f"'{name}' is not what the plan carries" in check.reason
        with torch.no_grad():
            target.get_parameter(name).copy_(torch.from_numpy(result.plan.limited[name]))
    assert cc.verify(source, target, sample=TOKENS, plan=result.plan).ok


def test_a_limit_on_the_weights_bounds_a_filled_tensor_as_well():
    inputs = keras.Input((6,))
    source = randomised(keras.Model(inputs, L.LayerNormalization(scale=False, epsilon=1e-5)(inputs)), 1)
    target, sample = randomised(nn.LayerNorm(6), 2), np.random.default_rng(0).standard_normal((3, 6))
    result = cc.migrate(source, target, sample=sample, limit=cc.ClipByNorm(0.5))
    np.testing.assert_allclose(target.weight.detach().numpy(), np.full(6, 0.5 / np.sqrt(6)), rtol=1e-6)
    assert cc.verify(source, target, sample=sample, plan=result.plan).ok


def test_a_wide_source_whose_values_a_narrow_target_holds_exactly_moves_under_a_limit_too():
    source, target = randomised(Reader(False, True), 1).double(), randomised(Reader(False, True), 2)
    for limit in (cc.ClipByNorm(0.5), cc.Delta(cc.ClipByNorm(0.5))):
        result = cc.migrate(source, target, sample=TOKENS, limit=limit)
        assert any(tensor.clipped for tensor in result.tensors)
        assert cc.verify(source, target, sample=TOKENS, plan=result.plan).ok


@pytest.mark.parametrize("nonfinite", ["propagate", "raise", "zero", "skip"])
def test_a_difference_to_a_target_that_holds_nan_is_refused_before_anything_is_written(nonfinite):
    source, target = randomised(small_torch(), 1), randomised(small_keras(), 2)
    kernel = target.get_layer("head").kernel.numpy().copy()
    kernel[0] = [np.nan, np.inf]
    target.get_layer("head").kernel.assign(kernel)
    plan, before = cc.plan(source, target, sample=SAMPLE), contents(target)
    with pytest.raises(cc.InvalidInput, match=r"the target's tensor 'head/kernel' holds 2 elements .* without Delta"):
        cc.migrate(source, target, plan=plan, limit=cc.Delta(cc.ClipByGlobalNorm(1.0, nonfinite=nonfinite)))
    assert_bitwise_equal(before, contents(target))
    cc.migrate(source, target, plan=plan, limit=cc.ClipByGlobalNorm(1.0, nonfinite=nonfinite))


def test_a_difference_that_leaves_the_range_of_float64_is_refused_before_anything_is_written():
    source, target = (randomised(Reader(False, True), seed).double() for seed in (1, 2))
    with torch.no_grad():
        source.head.bias[0], target.head.bias[0] = 1.7e308, -1.7e308
    plan, before = cc.plan(source, target, sample=TOKENS), contents(target)
    with pytest.raises(cc.InvalidInput, match=r"under the limit the target's tensor .* nothing was written"):
        cc.migrate(source, target, plan=plan, limit=cc.Delta(cc.ClipByNorm(1.0)))
    assert_bitwise_equal(before, contents(target))


def test_a_difference_in_range_moves_the_source_bit_for_bit():
    source, target = randomised(small_torch(), 1), randomised(small_keras(), 2)
    result = cc.migrate(source, target, sample=SAMPLE, limit=cc.Delta(cc.ClipByNorm(1e6)))
    assert not any(tensor.clipped for tensor in result.tensors)
    np.testing.assert_array_equal(target.get_layer("head").kernel.numpy(), source[6].weight.detach().numpy().T)


def test_a_plan_is_saved_read_and_applied_again(tmp_path):
    source, target = randomised(small_torch(), 1), randomised(small_keras(), 2)
    cc.plan(source, target, sample=SAMPLE).save(tmp_path / "first.plan.json")
    cc.plan(source, target, sample=SAMPLE).save(tmp_path / "again.plan.json")
    assert (tmp_path / "first.plan.json").read_bytes() == (tmp_path / "again.plan.json").read_bytes()
    cc.migrate(source, target, plan=cc.Plan.load(tmp_path / "first.plan.json"))
    assert cc.verify(source, target, sample=SAMPLE).ok


@pytest.mark.parametrize("failing", [1, 3, 7])
def test_a_write_that_fails_in_the_middle_leaves_the_target_bitwise_as_it_was(monkeypatch, failing):
    source, target = randomised(small_keras(), 1), randomised(small_torch(), 2)
    plan = cc.plan(source, target, sample=np.moveaxis(SAMPLE, 1, -1))
    before = contents(target)
    copy_, calls = torch.Tensor.copy_, []

    def failing_copy(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == failing:
            raise RuntimeError("disk on fire")
        return copy_(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", failing_copy)
    with pytest.raises(cc.MigrationError, match=r"disk on fire.*put back"):
        cc.migrate(source, target, plan=plan)
    monkeypatch.undo()
    assert len(calls) > failing
    assert_bitwise_equal(before, contents(target))


@pytest.mark.parametrize("failing", [1, 3, 7])
def test_a_write_into_keras_that_fails_in_the_middle_leaves_the_target_bitwise_as_it_was(monkeypatch, failing):
    source, target = randomised(small_torch(), 1), randomised(small_keras(), 2)
    plan = cc.plan(source, target, sample=SAMPLE)
    before = contents(target)
    kind = type(target.variables[0].value)  # TensorFlow's, which every way to write a Keras variable ends in
    assign, calls = kind.assign, []

    def failing_assign(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == failing:
            raise RuntimeError("disk on fire")
        return assign(self, *args, **kwargs)

    monkeypatch.setattr(kind, "assign", failing_assign)
    with pytest.raises(cc.MigrationError, match=r"disk on fire.*put back"):
        cc.migrate(source, target, plan=plan)
    monkeypatch.undo()
    assert len(calls) > failing
    assert_bitwise_equal(before, contents(target))


def on_one_backbone(framework):
    """Two models around one layer, each with a head of its own."""
    if framework == "torch":
        backbone = nn.Linear(4, 4)
        return [randomised(nn.Sequential(backbone, nn.ReLU(), nn.Linear(4, 3)), seed) for seed in (1, 2)]
    backbone = L.Dense(4, activation="relu")
    return [
        randomised(keras.Sequential([keras.Input((4,)), backbone, L.Dense(3, name="head")]), seed) for seed in (1, 2)
    ]


X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_a_target_that_shares_memory_with_the_source_is_refused_where_the_source_would_change(framework):
    source, target = on_one_backbone(framework)
    plan, kept, before = cc.plan(source, target, sample=X), contents(source), contents(target)
    for options in ({"plan": plan, "target": target}, {"sample": X, "target": source}):
        with pytest.raises(cc.MigrationError, match=r"are one memory.*nothing was written"):
            cc.migrate(source, limit=cc.ClipByNorm(0.5), **options)
        assert_bitwise_equal(kept, contents(source))
        assert_bitwise_equal(before, contents(target))


@pytest.mark.parametrize("limit", [None, cc.Delta(cc.ClipByNorm(0.1))], ids=["unlimited", "delta"])
@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_a_target_that_shares_memory_with_the_source_is_written_where_what_they_share_stays(framework, limit):
    source, target = on_one_backbone(framework)
    kept, before = contents(source), contents(target)
    result = cc.migrate(source, target, sample=X, limit=limit)
    assert_bitwise_equal(kept, contents(source))
    assert not np.array_equal(before[-1], contents(target)[-1])
    assert cc.verify(source, target, sample=X, plan=result.plan).ok


def test_a_target_whose_tensor_is_a_view_of_another_one_of_the_source_is_refused():
    source, target = (randomised(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)), seed) for seed in (1, 2))
    target[1].weight = nn.Parameter(source[0].weight.detach().t())
    plan, kept = cc.plan(source, target, sample=X), contents(source)
    with pytest.raises(cc.MigrationError, match=r"target's tensor '1\.weight' and the source's '0\.weight' are one"):
        cc.migrate(source, target, plan=plan)
    assert_bitwise_equal(kept, contents(source))


def test_a_nan_in_the_source_is_refused_by_name_and_nothing_is_written():
    source, target = randomised(small_torch(), 1), randomised(small_keras(), 2)
    plan = cc.plan(source, target, sample=SAMPLE)
    before = contents(target)
    with torch.no_grad():
        source[4].weight[0, 0] = float("nan")
    with pytest.raises(cc.InvalidInput, match=r"4\.weight.*1 elements.*NaN"):
        cc.migrate(source, target, plan=plan)
    assert_bitwise_equal(before, contents(target))


def test_models_that_share_no_layer_are_refused():
    source = nn.Sequential(nn.Linear(3, 4)).eval()
    with pytest.raises(cc.MappingError, match=r"share no layer"):
        cc.plan(source, small_keras(), sample=np.zeros((1, 3), np.float32))


def test_a_sample_of_the_wrong_shape_is_refused_with_its_shape():
    with pytest.raises(cc.InvalidInput, match=r"source.*\(2, 5, 8, 8\)"):
        cc.plan(small_torch(), small_keras(), sample=np.zeros((2, 5, 8, 8), np.float32))


def test_a_sample_with_a_nan_is_refused():
    with pytest.raises(cc.InvalidInput, match="NaN"):
        cc.plan(small_torch(), small_keras(), sample=SAMPLE * np.nan)


def test_a_target_without_room_is_refused_and_named():
    target = keras.Sequential([keras.Input((8, 8, 3)), *small_keras().layers[1:-1]])
    before = contents(target)
    with pytest.raises(cc.MappingError, match=r"no room.*'6'"):
        cc.plan(randomised(small_torch(), 1), target, sample=SAMPLE)
    assert_bitwise_equal(before, contents(target))


def test_a_layer_of_another_width_is_refused_and_both_shapes_named():
    source = nn.Sequential(*list(small_torch())[:-1], nn.Linear(5, 3))
    with pytest.raises(cc.MappingError, match=r"'head'.*\(2, 5\).*\(3, 5\)"):
        cc.plan(randomised(source.eval(), 1), small_keras(), sample=SAMPLE)


def test_a_dtype_that_would_lose_digits_is_refused_and_one_that_keeps_them_is_converted():
    wide = randomised(small_torch().double(), 1)
    target = randomised(small_keras(), 2)
    plan = cc.plan(wide, target, sample=SAMPLE)
    before = contents(target)
    with pytest.raises(cc.MigrationError, match=r"float64.*float32"):
        cc.migrate(wide, target, plan=plan)
    assert_bitwise_equal(before, contents(target))
    narrow, double = randomised(small_torch(), 1), randomised(small_keras(dtype="float64"), 2)
    cc.migrate(narrow, double, sample=SAMPLE)
    np.testing.assert_array_equal(double.get_layer("head").bias.numpy(), narrow[6].bias.detach().numpy())


def test_models_are_as_they_were_after_an_exception_in_the_middle():
    class Failing(nn.Sequential):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("no further")

    source, target = randomised(small_torch(), 1), randomised(Failing(*small_torch()), 2)
    target.train()
    kept, before = contents(source), contents(target)
    with pytest.raises(cc.InvalidInput, match="no further"):
        cc.plan(source, target, sample=SAMPLE)
    assert_bitwise_equal(kept, contents(source))
    assert_bitwise_equal(before, contents(target))
    assert target.training


def test_a_plan_for_other_models_is_refused():
    plan = cc.plan(small_torch(), small_keras(), sample=SAMPLE)
    with pytest.raises(cc.MappingError, match="'torch'"):
        cc.migrate(small_keras(), small_keras(), plan=plan)
    with pytest.raises(cc.MappingError, match="does not have"):
        cc.migrate(nn.Sequential(nn.Linear(3, 3)), small_keras(), plan=plan)


def test_neither_a_plan_nor_a_sample_is_refused():
    with pytest.raises(cc.InvalidInput, match="plan or a sample"):
        cc.migrate(small_torch(), small_keras())


class Branches(nn.Module):
    """Two convolutions side by side, flattened together."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 1), nn.Linear(6 * 16, 2)

    def forward(self, x):
        return self.last(torch.cat([self.left(x), self.right(x)], 1).flatten(1))


def branches_in_keras():
    inputs = keras.Input((4, 4, 3))
    x = L.Concatenate()([L.Conv2D(2, 1)(inputs), L.Conv2D(4, 1)(inputs)])
    return keras.Model(inputs, L.Dense(2)(L.Flatten()(x)))


def test_the_order_behind_a_flatten_is_found_without_a_layer_that_tells_the_channels():
    sample = SAMPLE[:, :, :4, :4]
    for source, target in (
        (Branches(), branches_in_keras()),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(48, 2)),
            keras.Sequential([keras.Input((4, 4, 3)), L.Flatten(), L.Dense(2)]),
        ),
    ):
        plan = cc.plan(randomised(source, 1), randomised(target, 2), sample=sample)
        cc.migrate(source, target, plan=plan)
        assert cc.verify(source, target, sample=sample, plan=plan).ok
        assert {row.evidence for row in plan.rows} == {"proven"}


def test_features_that_the_sample_does_not_tell_apart_are_an_error_and_no_guess():
    source, target = randomised(small_torch(), 1), randomised(small_keras(), 2)
    with torch.no_grad():
        source[1].weight.fill_(1e-3)
        source[1].weight[0] = 2e-3
        source[1].bias.copy_(torch.tensor([-50.0, -60.0, -70.0, -80.0]))
    with pytest.raises(cc.MappingError, match=r"order.*cannot be seen; give another sample"):
        cc.plan(source, target, sample=SAMPLE)


class Tied(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.table(tokens)))


def test_tied_weights_take_equal_tensors_and_refuse_different_ones():
    tokens = np.arange(9)[None]
    for first, second in ((True, True), (True, False)):
        source, target = randomised(Tied(first), 1), randomised(Tied(second), 2)
        cc.migrate(source, target, sample=tokens)
        assert cc.verify(source, target, sample=tokens).ok
    with pytest.raises(cc.MappingError, match=r"ties 'table\.weight'"):
        cc.plan(randomised(Tied(False), 1), Tied(True), sample=tokens)


class Named(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.mean, self.spread, self.order = nn.Linear(4, 3), nn.Linear(4, 3), order

    def forward(self, x):
        results = {"mean": self.mean(x), "spread": self.spread(x)}
        return {name: results[name] for name in self.order}


def test_outputs_with_names_are_compared_by_name():
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    source, target = randomised(Named(["mean", "spread"]), 1), randomised(Named(["spread", "mean"]), 2)
    plan = cc.plan(source, target, sample=x)
    cc.migrate(source, target, plan=plan)
    assert {row.target: row.sources[0] for row in plan.rows} == {row.target: row.target for row in plan.rows}
    assert cc.verify(source, target, sample=x).ok
    target.mean, target.spread = target.spread, target.mean
    assert not cc.verify(source, target, sample=x).ok


def test_outputs_that_are_the_same_everywhere_or_nan_prove_nothing():
    first, second = randomised(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), 1), nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    for model in (first, randomised(second, 2)):
        model[0].bias.data.fill_(-100.0)
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    assert not cc.verify(first, second, sample=x).ok
    first[0].bias.data.fill_(float("nan"))
    second[0].bias.data.fill_(float("nan"))
    assert not cc.verify(first, second, sample=x).ok
    with pytest.raises(cc.InvalidInput, match="no element"):
        cc.verify(first, second, sample=x[:0])


def test_an_edited_plan_is_refused_before_anything_is_written(tmp_path):
    source, target = randomised(small_torch(), 1), randomised(small_keras(), 2)
    plan, before = cc.plan(source, target, sample=SAMPLE), contents(target)
    for rows in (plan.rows[1:], (*plan.rows, plan.rows[0])):
        with pytest.raises(cc.MappingError, match="rows for the target's 'conv/kernel'"):
            cc.migrate(source, target, plan=cc.Plan(plan.source, plan.target, rows))
    with pytest.raises(cc.InvalidInput, match="a sample goes as sample="):
        cc.migrate(source, target, SAMPLE)
    assert_bitwise_equal(before, contents(target))


class Gated(nn.Module):
    """Two layers on one input that only their roles in the product tell apart."""

    def __init__(self, strength=1.0, rest=0.0):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.strength, self.rest = strength, rest

    def forward(self, x):
        return self.o(self.rest * x + self.strength * torch.tanh(self.q(x)) * torch.sigmoid(self.k(x)))


def gated_in_keras(names=("first", "second"), dtype="float32", strength=1.0, rest=0.0):
    """The same; the gate runs first."""
    inputs = keras.Input((8,), dtype=dtype)
    gate = L.Dense(8, "sigmoid", name=names[0], dtype=dtype)(inputs)
    value = L.Dense(8, "tanh", name=names[1], dtype=dtype)(inputs)
    product = rest * inputs + strength * L.Multiply(dtype=dtype)([gate, value])
    return keras.Model(inputs, L.Dense(3, name="out", dtype=dtype)(product))


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(
    ("narrow", "dtype"), [(torch.bfloat16, "float32"), (torch.bfloat16, "bfloat16"), (torch.float16, "float32")]
)
def test_a_narrow_source_is_compared_within_its_own_rounding_whatever_the_target_is(narrow, dtype, rounded):
    x = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    x = torch.from_numpy(x).to(narrow).float().numpy() if rounded else x
    source, target = randomised(Gated(), 1).to(narrow), randomised(gated_in_keras(dtype=dtype), 2)
    plan = assert_proven_throughout(source, target, x)
    assert {row.target_layer: row.source_layer for row in plan.rows} == {"first": "k", "second": "q", "out": "o"}
    assert not plan.differences


def one_live_channel(activation="relu"):
    """A convolution of which a positive sample leaves one channel alive, flattened; in both frameworks."""
    source = randomised(
        nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval(), 1
    )
    with torch.no_grad():
        source[0].weight.copy_(torch.tensor([1.0, -1.0, -1.0, -1.0]).reshape(4, 1, 1, 1))
    layers = [keras.Input((4, 4, 1)), L.Conv2D(4, 1, use_bias=False, activation=activation), L.Flatten(), L.Dense(3)]
    return source, randomised(keras.Sequential(layers), 2)


def test_sparse_features_that_fit_in_two_orders_are_an_error_and_no_guess():
    source, target = one_live_channel()
    impulse = np.zeros((1, 1, 4, 4), np.float32)
    impulse[0, 0, 0, 0] = 1
    with pytest.raises(cc.MappingError, match=r"order.*cannot be seen; give another sample"):
        cc.plan(source, target, sample=impulse)
    telling = np.random.default_rng(0).uniform(0.5, 1.5, (2, 1, 4, 4)).astype(np.float32)
    cc.migrate(source, target, sample=telling)
    signed = np.random.default_rng(1).standard_normal((2, 1, 4, 4)).astype(np.float32)
    assert cc.verify(source, target, sample=signed).ok


def test_hidden_units_that_are_dead_on_the_sample_leave_no_doubt_about_an_order_that_nothing_flattened():
    source = randomised(
        nn.Sequential(
            nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(32, 4), nn.BatchNorm1d(4, eps=1e-3), nn.ReLU(), nn.Linear(4, 3)
        ).eval(),
        1,
    )
    with torch.no_grad():
        source[2].weight.mul_(0.01)
        source[3].bias.copy_(torch.tensor([1.0, -9.0, -9.0, 1.0]))
    layers = [L.Conv2D(2, 1), L.Flatten(), L.Dense(4), L.BatchNormalization(epsilon=1e-3), L.ReLU(), L.Dense(3)]
    target = randomised(keras.Sequential([keras.Input((4, 4, 3)), *layers]), 2)
    plan = cc.plan(source, target, sample=SAMPLE[:, :, :4, :4])
    assert {row.evidence for row in plan.rows} == {"proven"}


class Talking(nn.Module):
    """Gives `extra` beside its result, and so does its layer."""

    def __init__(self, extra):
        super().__init__()
        self.inner, self.extra = TalkingLayer(4, 3), extra

    def forward(self, x):
        y, _ = self.inner(x)
        return y, self.extra


class TalkingLayer(nn.Linear):
    def forward(self, x):
        return super().forward(x), 7


@pytest.mark.parametrize("extra", [7, 3.0, True, "name", b"bytes", None, object(), {"steps": 2}])
def test_what_a_model_gives_beside_tensors_is_compared_where_it_is_a_number_or_a_text(extra):
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    source, target = randomised(Talking(extra), 1), randomised(Talking(extra), 2)
    cc.migrate(source, target, sample=x)
    assert cc.verify(source, target, sample=x).ok


@pytest.mark.parametrize(("ours", "theirs"), [(7, 8), (3.0, 3.5), ("name", "other"), ("name", 7), (7, None)])
def test_another_number_or_text_beside_the_tensors_is_not_ok(ours, theirs):
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    source, target = randomised(Talking(ours), 1), randomised(Talking(theirs), 2)
    cc.migrate(source, target, sample=x)
    assert not cc.verify(source, target, sample=x).ok


class TiedInKeras(keras.Model):
    """As one writes it in Keras: no layer for the head, but an operation on the table."""

    def __init__(self):
        super().__init__()
        self.table = L.Embedding(9, 4)

    def call(self, tokens):
        return keras.ops.matmul(keras.ops.tanh(self.table(tokens)), keras.ops.transpose(self.table.embeddings))


def test_a_tied_head_that_the_other_framework_has_no_layer_for_is_placed_with_the_table():
    tokens = np.arange(9)[None]
    model = TiedInKeras()
    model(tokens)
    for source, target in ((Tied(True), model), (model, Tied(True))):
        cc.migrate(randomised(source, 1), randomised(target, 2), sample=tokens)
        assert cc.verify(source, target, sample=tokens).ok
    equal = randomised(Tied(False), 3)
    equal.head.weight.data.copy_(equal.table.weight.data)
    cc.migrate(equal, model, sample=tokens)
    assert cc.verify(equal, model, sample=tokens).ok
    with pytest.raises(cc.MappingError, match="no room for the source's layer 'head'"):
        cc.plan(randomised(Tied(False), 3), model, sample=tokens)


class Twice(nn.Module):
    """Two layers that may be one."""

    def __init__(self, shared):
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = self.first if shared else nn.Linear(5, 5)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def twice_in_keras(shared):
    first = L.Dense(5)
    inputs = keras.Input((5,))
    return keras.Model(inputs, (first if shared else L.Dense(5))(L.ReLU()(first(inputs))))


@pytest.mark.parametrize("to_keras", [True, False])
@pytest.mark.parametrize("shared", ["source", "target", "both", "equal", "tied"])
def test_a_layer_that_is_called_twice_may_be_two_layers_of_the_other_model(shared, to_keras):
    x = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    build = [Twice, twice_in_keras] if to_keras else [twice_in_keras, Twice]
    source = randomised(build[0](shared in ("source", "both")), 1)
    target = randomised(build[1](shared not in ("source",)), 2)
    if shared == "target":
        with pytest.raises(cc.MappingError):
            cc.plan(source, target, sample=x)
        return
    if shared in ("equal", "tied") and to_keras:
        source.second.load_state_dict(source.first.state_dict())
        if shared == "tied":
            source.second.weight, source.second.bias = source.first.weight, source.first.bias
    elif shared in ("equal", "tied"):
        source.layers[-1].set_weights(source.layers[1].get_weights())
    assert_proven_throughout(source, target, x)


class Senses(nn.Module):
    """An image and a sequence."""

    def __init__(self):
        super().__init__()
        self.eye, self.ear, self.mouth = nn.Conv2d(3, 4, 3), nn.Linear(5, 4), nn.Linear(8, 2)

    def forward(self, image, sound):
        return self.mouth(torch.cat([self.eye(image).mean((2, 3)), self.ear(sound).mean(1)], 1))


def senses_in_keras(image=(6, 6, 3), sound=(7, 5)):
    inputs = [keras.Input(image), keras.Input(sound)]
    seen = L.GlobalAveragePooling2D()(L.Conv2D(4, 3)(inputs[0]))
    return keras.Model(inputs, L.Dense(2)(L.Concatenate()([seen, keras.ops.mean(L.Dense(4)(inputs[1]), axis=1)])))


IMAGE, SOUND = SAMPLE[:, :, :6, :6], np.random.default_rng(3).standard_normal((2, 7, 5)).astype(np.float32)


@pytest.mark.parametrize("container", [tuple, list])
@pytest.mark.parametrize("free", [False, True])
def test_of_several_inputs_those_that_are_images_have_their_channels_moved(container, free):
    model = senses_in_keras((None, None, 3), (None, 5)) if free else senses_in_keras()
    for source, target, image in (
        (Senses(), model, IMAGE),
        (model, Senses(), np.moveaxis(IMAGE, 1, -1)),
    ):
        sample = container([image, SOUND])
        assert_proven_throughout(randomised(source, 1), randomised(target, 2), sample)


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x.float() / 255)


@pytest.mark.parametrize("size", [6, None])
def test_an_image_of_bytes_has_its_channels_moved(size):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 6, 6)).astype(np.uint8)
    layers = [keras.Input((size, size, 3), dtype="uint8"), L.Rescaling(1 / 255), L.Conv2D(4, 3)]
    source, target = randomised(Pixels(), 1), randomised(keras.Sequential(layers), 2)
    cc.migrate(source, target, sample=images)
    assert cc.verify(source, target, sample=images).ok
    cc.migrate(randomised(target, 3), source, sample=np.moveaxis(images, 1, -1))
    assert cc.verify(target, source, sample=np.moveaxis(images, 1, -1)).ok


@pytest.mark.parametrize("size", [8, None])
def test_channels_are_moved_between_keras_models_that_have_them_in_other_places(size):
    source = keras.Sequential([keras.Input((3, 8, 8)), L.Conv2D(4, 3, data_format="channels_first")])
    target = keras.Sequential([keras.Input((size, size, 3)), L.Conv2D(4, 3)])
    cc.migrate(randomised(source, 1), randomised(target, 2), sample=SAMPLE)
    check = cc.verify(source, target, sample=SAMPLE)
    assert check.ok, check


def test_a_sample_under_differentiation_is_taken_as_it_is():
    source, target = randomised(small_torch(), 1), randomised(small_keras(), 2)
    sample = torch.from_numpy(SAMPLE).requires_grad_() * 1
    cc.migrate(source, target, sample=sample)
    assert cc.verify(source, target, sample=sample).ok
    assert sample.requires_grad


def test_a_list_of_arrays_of_one_shape_is_several_inputs_and_a_list_of_numbers_one():
    inputs = [keras.Input((4,)), keras.Input((4,))]
    source = keras.Model(inputs, L.Dense(3)(inputs[0]) - L.Dense(2)(inputs[1])[:, :1])
    target = keras.models.clone_model(source)
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    cc.migrate(randomised(source, 1), randomised(target, 2), sample=list(x))
    assert cc.verify(source, target, sample=list(x)).ok
    single = nn.Linear(4, 3)
    assert cc.verify(single, single, sample=x[0].tolist()).ok


def test_a_ragged_list_is_refused_by_name():
    with pytest.raises(cc.InvalidInput, match=r"\[\[1, 2\], \[3\]\].*differ in length"):
        cc.plan(small_torch(), small_keras(), sample=[[1, 2], [3]])


def test_where_no_form_of_the_sample_fits_the_error_shows_those_tried_and_names_target_sample():
    source, sample = nn.Sequential(*list(small_torch())[:2]), SAMPLE[..., :6]
    for call in (cc.plan, cc.verify):
        with pytest.raises(cc.InvalidInput, match=r"tried as \(2, 8, 6, 3\).*target_sample="):
            call(source, small_keras(), sample)
        with pytest.raises(cc.InvalidInput) as refused:
            call(source, small_keras(), sample, target_sample=sample)
        assert "target_sample=" not in str(refused.value)


@pytest.mark.parametrize("size", [9, 8])
def test_a_padding_that_differs_at_even_sizes_alone_is_named_with_the_size_that_shows_it(size):
    source = randomised(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1)), 1)
    layers = [L.Conv2D(4, 3, strides=2, padding="same", activation="relu", name="conv"), L.Conv2D(4, 1)]
    target = randomised(keras.Sequential([keras.Input((None, None, 3)), *layers]), 2)
    sample = np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)
    cc.migrate(source, target, sample=sample)
    for plan in (None, cc.plan(source, target, sample=sample)):
        check = cc.verify(source, target, sample=sample, plan=plan)
        assert not check.ok
        assert check.first_divergence.layer == "conv"
        assert "padding: the target has ((0, 1), (0, 1)), the source ((1, 1), (1, 1))" in check.reason
        assert check.reason.startswith("on a sample of shape (2, 3, 8, 8) alone: conv")
        assert [(d.layer, d.setting) for d in check.differences] == [("conv", "padding")]


@pytest.mark.parametrize("names", [("q", "k"), ("first", "second")])
def test_a_branch_of_small_weight_is_told_apart_by_execution_and_not_by_names_that_mislead(names):
    x = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    source = randomised(Gated(strength=2e-4, rest=1.0), 1)
    target = randomised(gated_in_keras(names, strength=2e-4, rest=1.0), 2)
    plan = assert_proven_throughout(source, target, x)
    assert {row.target_layer: row.source_layer for row in plan.rows} == {names[0]: "k", names[1]: "q", "out": "o"}


class Residual(nn.Module):
    """Blocks that add little to what flows: a gate of three layers each, called in another order in the target."""

    def __init__(self, order, blocks=3, strength=2e-4):
        super().__init__()
        self.order, self.strength = order, strength
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(6, 6) for _ in range(3)) for _ in range(blocks))
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        for block in self.blocks:
            given = {}
            for place, role in enumerate(self.order):
                given[role] = block[place](x)
            x = x + self.strength * torch.tanh(given["a"]) * torch.sigmoid(given["b"]) * given["c"]
        return self.out(x)


@pytest.mark.parametrize("order", ["abc", "bca", "cab", "cba"])
@pytest.mark.parametrize("strength", [1.0, 1e-2, 2e-4])
def test_many_branches_of_small_weight_are_each_told_apart(order, strength):
    x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    source = randomised(Residual("abc", strength=strength), 1)
    target = randomised(Residual(order, strength=strength), 2)
    plan = cc.plan(source, target, sample=x)
    for row in plan.rows:
        _, *place = row.target_layer.split(".")
        origin = f"blocks.{place[0]}.{'abc'.index(order[int(place[1])])}" if place else "out"
        assert row.source_layer == origin
        assert row.evidence == "proven"


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.out = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 2)

    def forward(self, x):
        for layer in self.layers:
            x = x + 1e-6 * layer(x)
        return self.out(x)


def test_layers_of_a_stack_whose_inputs_are_nearly_the_same_are_told_apart():
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    inputs = y = keras.Input((6,))
    for _ in range(3):
        y = y + 1e-6 * L.Dense(6)(y)
    source, target = randomised(Stack(), 1), randomised(keras.Model(inputs, L.Dense(2)(y)), 2)
    plan = cc.plan(source, target, sample=x)
    assert [row.source_layer for row in plan.rows if row.role == "kernel"] == [
        "layers.0",
        "layers.1",
        "layers.2",
        "out",
    ]
    cc.migrate(source, target, plan=plan)
    assert cc.verify(source, target, sample=x, plan=plan).ok


@pytest.mark.parametrize("count", [3, 4])
def test_more_towers_that_compute_the_same_are_settled_by_name_in_another_framework_too(count):
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    names = ["image", "text", "sound", "smell"][:count]
    inputs = keras.Input((6,))
    towers = [L.Dense(6, "tanh", name=name)(inputs) for name in reversed(names)]
    source, target = randomised(Towers(names), 1), randomised(keras.Model(inputs, L.Add()(towers)), 2)
    plan = cc.plan(source, target, sample=x)
    assert all(row.source_layer == row.target_layer and row.evidence == "name" for row in plan.rows)


class Pooled(nn.Module):
    """Two layers on one pooled input, told apart by their activations or by nothing."""

    def __init__(self, gate=torch.sigmoid, names=("q", "k")):
        super().__init__()
        self.names, self.gate = names, gate
        for name in names:
            self.add_module(name, nn.Conv2d(3, 3, 1))
        self.o = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        x = nn.functional.max_pool2d(x, 2)
        q, k = (getattr(self, name) for name in self.names)
        return self.o(torch.tanh(q(x)) * self.gate(k(x)))


def pooled_in_keras(gate="sigmoid", names=("first", "second")):
    """The same behind another pooling; the gate runs first."""
    inputs = keras.Input((8, 8, 3))
    x = L.AveragePooling2D(2)(inputs)
    first, second = (
        L.Conv2D(3, 1, activation=gate, name=names[0])(x),
        L.Conv2D(3, 1, activation="tanh", name=names[1])(x),
    )
    return keras.Model(inputs, L.Conv2D(2, 1, name="o")(L.Multiply()([first, second])))


@pytest.mark.parametrize("names", [("first", "second"), ("q", "k")])
def test_layers_behind_a_difference_that_saw_one_input_are_told_apart_by_what_follows(names):
    source, target = randomised(Pooled(), 1), randomised(pooled_in_keras(names=names), 2)
    plan = cc.plan(source, target, sample=SAMPLE)
    assert {row.target_layer: row.source_layer for row in plan.rows} == {names[0]: "k", names[1]: "q", "o": "o"}
    assert {row.evidence for row in plan.rows if row.target_layer != "o"} == {"structure"}
    assert {difference.layer for difference in plan.differences} == set(names)


def test_layers_behind_a_difference_that_compute_the_same_are_an_error_unless_named():
    source = randomised(Pooled(torch.tanh, ("alpha", "omega")), 1)
    with pytest.raises(cc.MappingError, match="'alpha', 'omega'"):
        cc.plan(source, randomised(pooled_in_keras("tanh"), 2), sample=SAMPLE)
    plan = cc.plan(source, randomised(pooled_in_keras("tanh", ("omega", "alpha")), 2), sample=SAMPLE)
    assert all(row.source_layer == row.target_layer for row in plan.rows)
    assert {row.evidence for row in plan.rows if row.target_layer != "o"} == {"name"}


class Forked(nn.Module):
    """A map of 4 channels flattened, beside a later one of 8 that is averaged."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.d, self.e = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 8, 3), nn.Linear(64, 3), nn.Linear(8, 3)

    def forward(self, x):
        y, z = torch.relu(self.a(x)), torch.relu(self.b(x))
        return self.d(y.flatten(1)) + self.e(z.mean((2, 3)))


def forked_in_keras(activation):
    inputs = keras.Input((6, 6, 3))
    y, z = (L.Conv2D(width, 3, activation=activation, name=name)(inputs) for width, name in ((4, "a"), (8, "b")))
    d, e = L.Dense(3, name="d")(L.Flatten()(y)), L.Dense(3, name="e")(L.GlobalAveragePooling2D()(z))
    return keras.Model(inputs, d + e)


@pytest.mark.parametrize("activation", ["relu", "tanh", "softplus"])
def test_the_order_of_features_behind_a_difference_is_the_one_in_which_they_are_alike(activation):
    sample = np.random.default_rng(0).standard_normal((8, 3, 6, 6)).astype(np.float32)
    plan = cc.plan(randomised(Forked(), 1), randomised(forked_in_keras(activation), 2), sample=sample)
    sizes = {row.target_layer: dict(row.sizes) for row in plan.rows if row.role == "kernel"}
    assert sizes["d"] == {"channel": 4}
    assert sizes["e"] == {}


def test_an_order_of_features_behind_a_difference_that_nothing_tells_is_an_error_and_no_guess():
    source = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(64, 2))
    layers = [L.Conv2D(4, 1), L.Flatten(), L.Lambda(lambda x: keras.ops.cos(100 * x)), L.Dense(2, name="last")]
    target = keras.Sequential([keras.Input((4, 4, 3)), *layers])
    with pytest.raises(cc.MappingError, match=r"64 features .*'last'.*cannot be seen"):
        cc.plan(randomised(source, 1), randomised(target, 2), sample=SAMPLE[:, :, :4, :4])


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.l, self.o = nn.Conv2d(3, 4, 3), nn.Linear(16, 5), nn.Linear(5, 2)

    def forward(self, a, b):
        first, second = (self.l(nn.functional.max_pool2d(self.c(x), 2).flatten(1)) for x in (a, b))
        return self.o(first - second)


def test_each_call_of_a_shared_layer_behind_a_difference_has_its_own_input():
    inputs = [keras.Input((6, 6, 3)), keras.Input((6, 6, 3))]
    c, dense = L.Conv2D(4, 3, name="c"), L.Dense(5, name="l")
    first, second = (dense(L.Flatten()(L.AveragePooling2D(2)(c(x)))) for x in inputs)
    target = keras.Model(inputs, L.Dense(2, name="o")(first - second))
    sample = tuple(np.random.default_rng(0).standard_normal((2, 4, 3, 6, 6)).astype(np.float32))
    plan = cc.plan(randomised(Siamese(), 1), randomised(target, 2), sample=sample)
    assert [(difference.layer, difference.setting) for difference in plan.differences] == [("l", "input")]
    assert {row.target_layer: row.evidence for row in plan.rows} == {"c": "proven", "l": "structure", "o": "proven"}
    assert all(row.source_layer == row.target_layer for row in plan.rows)


class Joined(nn.Module):
    """Two flattened feature maps, a table's columns and a hidden layer's, one behind the other."""

    def __init__(self, norm):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 6, 3, stride=2), nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(93, eps=1e-3) if norm else nn.Identity()
        self.d = nn.Linear(93, 5)

    def forward(self, image, table):
        image = [self.a(image).relu().flatten(1), table, self.b(image).tanh().flatten(1), self.c(table)]
        return self.d(self.norm(torch.cat(image, 1)))


def joined_in_keras(norm):
    inputs = [keras.Input((6, 6, 3)), keras.Input((2,))]
    a = L.Flatten()(L.Conv2D(4, 3, activation="relu")(inputs[0]))
    b = L.Flatten()(L.Conv2D(6, 3, strides=2, activation="tanh")(inputs[0]))
    x = L.Concatenate()([a, inputs[1], b, L.Dense(3, name="c")(inputs[1])])
    return keras.Model(inputs, L.Dense(5, name="d")(L.BatchNormalization(epsilon=1e-3)(x) if norm else x))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("to_keras", [True, False])
def test_features_put_together_from_flattened_and_plain_ones_keep_their_own_orders(norm, to_keras, tmp_path):
    image, table = IMAGE, np.random.default_rng(1).standard_normal((2, 2)).astype(np.float32)
    source, target = randomised(Joined(norm), 1), randomised(joined_in_keras(norm), 2)
    if not to_keras:
        source, target, image = target, source, np.moveaxis(image, 1, -1)
    plan = cc.plan(source, target, sample=(image, table))
    assert {row.evidence for row in plan.rows} == {"proven"}
    plan.save(tmp_path / "plan.json")
    plan = cc.Plan.load(tmp_path / "plan.json")
    result = cc.migrate(source, target, plan=plan, limit=cc.Delta(cc.ClipByNorm(1e9)))
    other = np.random.default_rng(2).standard_normal(image.shape).astype(np.float32)
    assert cc.verify(source, target, sample=(image, table), plan=result.plan).ok
    assert cc.verify(source, target, sample=(other, -table)).ok


def test_features_put_together_behind_a_difference_are_an_error_and_no_guess():
    inputs = [keras.Input((6, 6, 3)), keras.Input((2,))]
    a = L.Flatten()(L.Conv2D(4, 3, activation="relu")(inputs[0]))
    b = L.Flatten()(L.Conv2D(6, 3, strides=2)(inputs[0]))
    x = L.Concatenate()([a, inputs[1], b, L.Dense(3)(inputs[1])])
    target = randomised(keras.Model(inputs, L.Dense(5, name="d")(x)), 2)
    sample = IMAGE, np.random.default_rng(1).standard_normal((2, 2)).astype(np.float32)
    with pytest.raises(cc.MappingError, match=r"93 features .*'d'.*cannot be seen"):
        cc.plan(randomised(Joined(False), 1), target, sample=sample)
