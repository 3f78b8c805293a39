"""Wrong rules that look right: the shapes agree, nothing complains, and `verify` says that they are wrong."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import pytest
import torch
from e2e_models import randomised
from torch import nn

import clipcore as cc

L = keras.layers
WRONG = 1e-3  # a wrong rule shows in the outputs by more than this
rng = np.random.default_rng(0)
STEPS = rng.standard_normal((3, 5, 6)).astype("float32")
IMAGES = rng.standard_normal((3, 6, 5, 5)).astype("float32")


class First(nn.Module):
    """A module, of whose outputs the first is the model's."""

    def __init__(self, net, inputs=1):
        super().__init__()
        self.net, self.inputs = net, inputs

    def forward(self, x):
        return self.net(*[x] * self.inputs)[0]


def on_steps(call, width=6):
    inputs = keras.Input((None, width))
    return keras.Model(inputs, call(inputs))


def on_images(*layers):
    return keras.Sequential([L.Input((5, 5, 6)), *layers])


def images(*layers):
    return nn.Sequential(*layers).eval()


def rule(change, role="", target=""):
    """The plan with `change` made to the parts of this role, in the target's tensors of this name."""

    def wrong(plan):
        def changed(row):
            return replace(row, parts=tuple(change(p) if p.role.startswith(role) else p for p in row.parts))

        rows = tuple(changed(row) if target in row.target else row for row in plan.rows)
        assert rows != plan.rows, str(plan)
        return replace(plan, rows=rows)

    return wrong


def pattern(text, **sizes):
    return lambda part: replace(part, pattern=text, sizes=sizes)


def filled(value):
    return lambda part: replace(part, terms=(), fill=value, operation="", pattern="")


def first_alone(part):
    return replace(part, terms=part.terms[:1], operation="")


def exchanged(*pairs, name=lambda row, part: part.role):
    """The plan with the sources of parts exchanged, by what they are called."""
    other = {**dict(pairs), **{second: first for first, second in pairs}}

    def wrong(plan):
        parts = {name(row, part): part for row in plan.rows for part in row.parts}
        found = set(parts) & set(other)
        assert found == set(other), (set(parts), str(plan))

        def changed(row):
            taken = [parts[other[name(row, part)]] if name(row, part) in other else part for part in row.parts]
            pairs = zip(row.parts, taken, strict=True)
            return replace(row, parts=tuple(replace(p, terms=t.terms, operation=t.operation) for p, t in pairs))

        return replace(plan, rows=tuple(map(changed, plan.rows)))

    return wrong


def gates(*pairs):
    """Gates exchanged in every role that has them."""

    def wrong(plan):
        roles = {part.role.partition(".")[0] for row in plan.rows for part in row.parts}
        return exchanged(*[(f"{role}.{a}", f"{role}.{b}") for role in roles for a, b in pairs])(plan)

    return wrong


def summed_bias(plan):
    """A GRU's two biases added into the first, as an LSTM's are."""
    terms = {part.role: part.terms for row in plan.rows for part in row.parts}

    def changed(part):
        if part.role.startswith("recurrent_bias"):
            return filled(0.0)(part)
        if part.role.startswith("bias"):
            return replace(part, terms=(*part.terms, *terms[f"recurrent_{part.role}"]), operation="sum")
        return part

    return rule(changed, target="bias")(plan)


def assigned(change):
    """The target after the migration, its kernel changed by hand: for what no pattern says."""

    def write(target):
        kernel = next(v for v in target.variables if v.path.endswith("kernel"))
        kernel.assign(change(kernel.numpy()))

    return write


@dataclass(frozen=True)
class Mutation:
    """A pair of models, their data, and a wrong rule: a change to the plan, or to what was written."""

    source: Callable[[], nn.Module]
    target: Callable[[], keras.Model]
    sample: np.ndarray
    plan: Callable[[Any], Any] = lambda plan: plan
    write: Callable[[Any], None] | None = None


def gru():
    return First(nn.GRU(6, 4, batch_first=True)).eval()


def keras_gru():
    return on_steps(L.GRU(4, return_sequences=True))


def lstm(**options):
    return First(nn.LSTM(6, options.pop("units", 4), batch_first=True, **options)).eval()


def keras_lstm():
    return on_steps(L.LSTM(4, return_sequences=True))


def attention():
    return First(nn.MultiheadAttention(6, 2, batch_first=True), inputs=3).eval()


def keras_attention():
    return on_steps(lambda x: L.MultiHeadAttention(2, 3)(x, x))


def depthwise():
    return images(nn.Conv2d(6, 12, 3, groups=6))


def flattened():
    return images(nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(36, 3))


def batch():
    return images(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))


def stacked_in_keras(x):
    return L.LSTM(6, return_sequences=True)(L.LSTM(6, return_sequences=True)(x))


MUTATIONS = {
    "GRU without the swap of gates": Mutation(gru, keras_gru, STEPS, gates(("reset", "update"))),
    "GRU with summed biases": Mutation(gru, keras_gru, STEPS, summed_bias),
    "GRU with the input's biases alone": Mutation(gru, keras_gru, STEPS, rule(filled(0.0), "recurrent_bias")),
    "LSTM with the input's biases alone": Mutation(lstm, keras_lstm, STEPS, rule(first_alone, "bias")),
    "LSTM with the gates of another order": Mutation(lstm, keras_lstm, STEPS, gates(("forget", "cell"))),
    "LSTM with input and output gates swapped": Mutation(lstm, keras_lstm, STEPS, gates(("input", "output"))),
    "LSTM with the recurrent kernel not transposed": Mutation(
        lstm, keras_lstm, STEPS, rule(pattern("unit state -> unit state"), "recurrent_kernel")
    ),
    "stacked LSTMs in another order": Mutation(
        lambda: lstm(units=6, num_layers=2),
        lambda: on_steps(stacked_in_keras),
        STEPS,
        lambda plan: exchanged_layers(plan),
    ),
    "directions swapped": Mutation(
        lambda: lstm(bidirectional=True),
        lambda: on_steps(L.Bidirectional(L.LSTM(4, return_sequences=True))),
        STEPS,
        lambda plan: exchanged_layers(plan),
    ),
    "SimpleRNN with the input's biases alone": Mutation(
        lambda: First(nn.RNN(6, 4, batch_first=True)).eval(),
        lambda: on_steps(L.SimpleRNN(4, return_sequences=True)),
        STEPS,
        rule(first_alone, "bias"),
    ),
    "heads and dims swapped": Mutation(
        attention, keras_attention, STEPS, rule(pattern("(d h) i -> i h d", h=2, d=3), "kernel", "query/kernel")
    ),
    "heads and dims swapped in the output": Mutation(
        attention, keras_attention, STEPS, rule(pattern("o (d h) -> h d o", h=2, d=3), "kernel", "output/kernel")
    ),
    "query, key and value by position": Mutation(
        attention,
        keras_attention,
        STEPS,
        exchanged(
            *[(f"multi_head_attention/key/{w}", f"multi_head_attention/value/{w}") for w in ("kernel", "bias")],
            name=lambda row, part: "/".join(["multi_head_attention", *row.target.split("/")[-2:]]),
        ),
    ),
    "an output projection not transposed": Mutation(
        attention, keras_attention, STEPS, rule(pattern("(h d) o -> h d o", h=2, d=3), "kernel", "output/kernel")
    ),
    "depthwise as (multiplier, channel)": Mutation(
        depthwise,
        lambda: on_images(L.DepthwiseConv2D(3, depth_multiplier=2)),
        IMAGES,
        rule(pattern("(m c) 1 x y -> x y c m", c=6, m=2), "kernel"),
    ),
    "groups interleaved": Mutation(
        lambda: images(nn.Conv2d(6, 4, 3, groups=2)),
        lambda: on_images(L.Conv2D(4, 3, groups=2)),
        IMAGES,
        rule(pattern("(g o) i x y -> x y i (o g)", g=2), "kernel"),
    ),
    "a kernel flipped": Mutation(
        lambda: images(nn.Conv2d(6, 4, 3)),
        lambda: on_images(L.Conv2D(4, 3)),
        IMAGES,
        write=assigned(lambda kernel: kernel[::-1, ::-1]),
    ),
    "a transposed convolution flipped": Mutation(
        lambda: images(nn.ConvTranspose2d(6, 4, 3)),
        lambda: on_images(L.Conv2DTranspose(4, 3)),
        IMAGES,
        write=assigned(lambda kernel: kernel[::-1, ::-1]),
    ),
    "a transposed convolution as a convolution": Mutation(
        lambda: images(nn.ConvTranspose2d(6, 6, 3)),
        lambda: on_images(L.Conv2DTranspose(6, 3)),
        IMAGES,
        rule(pattern("o i x y -> x y o i"), "kernel"),
    ),
    "height and width swapped": Mutation(
        lambda: images(nn.Conv2d(6, 4, 3)),
        lambda: on_images(L.Conv2D(4, 3)),
        IMAGES,
        rule(pattern("o i x y -> y x i o"), "kernel"),
    ),
    "in and out of a square kernel swapped": Mutation(
        lambda: images(nn.Conv2d(6, 6, 3)),
        lambda: on_images(L.Conv2D(6, 3)),
        IMAGES,
        rule(pattern("o i x y -> x y o i"), "kernel"),
    ),
    "a square linear kernel not transposed": Mutation(
        lambda: images(nn.Linear(6, 6)), lambda: on_steps(L.Dense(6)), STEPS, rule(pattern("o i -> o i"), "kernel")
    ),
    "a plain transpose behind a Flatten": Mutation(
        flattened,
        lambda: on_images(L.Conv2D(4, 3), L.Flatten(), L.Dense(3, name="last")),
        IMAGES,
        rule(pattern("o i -> i o"), "kernel", "last"),
    ),
    "an eps left as it is": Mutation(
        batch,
        lambda: on_images(L.Conv2D(4, 3), L.BatchNormalization(epsilon=0.1)),
        IMAGES,
        rule(first_alone, "scale"),
    ),
    "running statistics lost": Mutation(
        batch,
        lambda: on_images(L.Conv2D(4, 3), L.BatchNormalization(epsilon=1e-5)),
        IMAGES,
        lambda plan: rule(filled(0.0), "running_mean")(rule(filled(1.0), "running_var")(plan)),
    ),
    "a running mean lost": Mutation(
        batch,
        lambda: on_images(L.Conv2D(4, 3), L.BatchNormalization(epsilon=1e-5)),
        IMAGES,
        rule(filled(0.0), "running_mean"),
    ),
    "batch norm in another order": Mutation(
        lambda: images(nn.BatchNorm2d(6)),
        lambda: on_images(L.BatchNormalization(epsilon=1e-5)),
        IMAGES,
        exchanged(("bias", "running_mean"), ("scale", "running_var")),
    ),
    "scale and bias of a layer norm swapped": Mutation(
        lambda: images(nn.LayerNorm(6)),
        lambda: on_steps(L.LayerNormalization(epsilon=1e-5)),
        STEPS,
        exchanged(("scale", "bias")),
    ),
    "weight norm without its magnitude": Mutation(
        lambda: images(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))),
        lambda: on_steps(L.Dense(4)),
        STEPS,
        rule(first_alone, "kernel"),
    ),
    "spectral norm not divided by": Mutation(
        lambda: images(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4))),
        lambda: on_steps(L.Dense(4)),
        STEPS,
        rule(first_alone, "kernel"),
    ),
    "a square embedding transposed": Mutation(
        lambda: nn.Embedding(6, 6).eval(),
        lambda: keras.Sequential([L.Input((None,), dtype="int32"), L.Embedding(6, 6)]),
        np.arange(6).reshape(2, 3),
        rule(pattern("num dim -> dim num"), "kernel"),
    ),
    "slopes of a PReLU in another order": Mutation(
        lambda: images(nn.PReLU(6)),
        lambda: on_images(L.PReLU(shared_axes=[1, 2])),
        IMAGES,
        rule(pattern("(a b) -> 1 1 (b a)", a=2), "slope"),
    ),
}


def exchanged_layers(plan):
    """The two layers of a plan exchanged, role by role."""
    names = list(dict.fromkeys(part.target_layer for row in plan.rows for part in row.parts))
    roles = {part.role for row in plan.rows for part in row.parts}
    pairs = [((names[0], role), (names[1], role)) for role in roles]
    return exchanged(*pairs, name=lambda row, part: (part.target_layer, part.role))(plan)


def settled(model, sample):
    """Random weights; what a spectral norm keeps beside them belongs to them."""
    randomised(model, 1)
    model.train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Module) and hasattr(module, "parametrizations"):
                for _ in range(9):
                    module.weight  # noqa: B018  each look at it in training is a step of the power iteration
    return model.eval()


def mutated(mutation):
    """Source, target, the right plan and the wrong one, the latter applied."""
    source, target = settled(mutation.source(), mutation.sample), randomised(mutation.target(), 2)
    right = cc.plan(source, target, sample=mutation.sample)
    cc.migrate(source, target, plan=right)
    assert cc.verify(source, target, sample=mutation.sample, plan=right).ok
    wrong = mutation.plan(right)
    cc.migrate(source, target, plan=wrong)
    if mutation.write:
        mutation.write(target)
    return source, target, right, wrong


def back(sample):
    return np.moveaxis(sample, 1, -1) if sample.ndim == 4 else sample


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_verify_says_that_a_wrong_rule_is_wrong_with_any_plan_and_without(mutation):
    source, target, right, wrong = mutated(mutation)
    for plan in (right, wrong, None):
        check = cc.verify(source, target, sample=mutation.sample, plan=plan)
        assert not check.ok
        assert check.max_rel_error > WRONG, check
        assert check.first_divergence is not None
        assert check.first_divergence.layer
    # and the other way: a source in Keras, whose weights a torch model was given by the same wrong rule
    check = cc.verify(target, source, sample=back(mutation.sample))
    assert not check.ok
    assert check.max_rel_error > WRONG, check


def test_a_gru_whose_reset_acts_before_the_recurrent_kernel_is_another_function_and_named():
    source, target = randomised(gru(), 1), on_steps(L.GRU(4, return_sequences=True, reset_after=False, name="g"))
    plan = cc.plan(source, target, sample=STEPS)
    assert {(d.layer, d.setting, d.source, d.target) for d in plan.differences} == {("g", "reset_after", True, False)}
    cc.migrate(source, target, plan=plan)
    for given in (plan, None):
        check = cc.verify(source, target, sample=STEPS, plan=given)
        assert not check.ok
        assert check.max_rel_error > WRONG
        assert "reset_after" in check.reason


def test_a_transposed_convolution_of_the_same_shapes_but_another_crop_is_another_function_and_named():
    source = randomised(images(nn.ConvTranspose2d(6, 4, 3, 2, 1, 1)), 1)
    target = on_images(L.Conv2DTranspose(4, 3, 2, "same", name="up"))
    plan = cc.plan(source, target, sample=IMAGES)
    assert [(d.layer, d.setting) for d in plan.differences] == [("up", "crop")]
    cc.migrate(source, target, plan=plan)
    check = cc.verify(source, target, sample=IMAGES, plan=plan)
    assert not check.ok
    assert check.max_rel_error > WRONG
    assert "crop" in check.reason


# Weights as they are before training: the mistake changes no output.
INVISIBLE = {
    "LSTM gates of biases": (
        lambda: zeroed(lstm(), "bias"),
        keras_lstm,
        STEPS,
        exchanged(("bias.forget", "bias.cell")),
    ),
    "GRU gates of biases": (
        lambda: zeroed(gru(), "bias"),
        keras_gru,
        STEPS,
        exchanged(("bias.reset", "bias.update"), ("recurrent_bias.reset", "recurrent_bias.new")),
    ),
    "GRU with summed biases": (lambda: zeroed(gru(), "bias"), keras_gru, STEPS, summed_bias),
    "biases of query, key and value": (
        lambda: zeroed(attention(), "bias"),
        keras_attention,
        STEPS,
        exchanged(("query", "value"), name=lambda row, part: f"{row.target.split('/')[-2]}" * (part.role == "bias")),
    ),
    "scale and variance of a fresh batch norm": (
        lambda: images(nn.BatchNorm2d(6)),
        lambda: on_images(L.BatchNormalization(epsilon=1e-5)),
        IMAGES,
        exchanged(("bias", "running_mean"), ("scale", "running_var")),
    ),
    "a bias turned round": (
        lambda: zeroed(images(nn.Linear(6, 4)), "bias"),
        lambda: on_steps(L.Dense(4)),
        STEPS,
        rule(pattern("(a b) -> (b a)", a=2), "bias"),
    ),
    "a scale turned round": (
        lambda: images(nn.LayerNorm(6)),
        lambda: on_steps(L.LayerNormalization(epsilon=1e-5)),
        STEPS,
        rule(pattern("(a b) -> (b a)", a=2), "scale"),
    ),
}


def zeroed(model, name):
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if name in key:
                tensor.zero_()
    return model


@pytest.mark.parametrize(("source", "target", "sample", "wrong"), INVISIBLE.values(), ids=INVISIBLE)
def test_a_mistake_that_fresh_weights_hide_is_seen_by_verify_with_the_plan(source, target, sample, wrong):
    source, target = source(), target()
    plan = wrong(cc.plan(source, target, sample=sample))
    cc.migrate(source, target, plan=plan)
    assert cc.verify(source, target, sample=sample).ok, "the outputs do not show it"
    check = cc.verify(source, target, sample=sample, plan=plan)
    assert not check.ok
    assert check.max_rel_error > WRONG
