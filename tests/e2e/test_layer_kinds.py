"""Every kind of layer, written by hand in torch and in Keras, moves in both directions and computes the same."""

import os
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tf_keras
import torch
from e2e_models import Pair, assert_bitwise_equal, contents, randomised, relative_error, sample_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import clipcore as cc

L = keras.layers
ops = keras.ops
RANKS = {
    name: dict(enumerate(classes, start=1))
    for name, classes in {
        "conv": [(nn.Conv1d, L.Conv1D), (nn.Conv2d, L.Conv2D), (nn.Conv3d, L.Conv3D)],
        "depthwise": [(nn.Conv1d, L.DepthwiseConv1D), (nn.Conv2d, L.DepthwiseConv2D)],
        "separable": [(nn.Conv1d, L.SeparableConv1D), (nn.Conv2d, L.SeparableConv2D)],
        "transposed": [
            (nn.ConvTranspose1d, L.Conv1DTranspose),
            (nn.ConvTranspose2d, L.Conv2DTranspose),
            (nn.ConvTranspose3d, L.Conv3DTranspose),
        ],
        "pad": [(nn.ZeroPad1d, L.ZeroPadding1D), (nn.ZeroPad2d, L.ZeroPadding2D), (nn.ZeroPad3d, L.ZeroPadding3D)],
        "crop": [(None, L.Cropping1D), (None, L.Cropping2D), (None, L.Cropping3D)],
        "batch": [(nn.BatchNorm1d, None), (nn.BatchNorm2d, None), (nn.BatchNorm3d, None)],
        "instance": [(nn.InstanceNorm1d, None), (nn.InstanceNorm2d, None), (nn.InstanceNorm3d, None)],
    }.items()
}
widths = st.integers(1, 5)
several = st.integers(2, 5)
epsilons = st.sampled_from([1e-5, 1e-3, 0.1])


def torch_model(*layers):
    return nn.Sequential(*layers).eval()


def keras_model(call, *shapes, dtype="float32"):
    """A functional model of inputs of these shapes."""
    inputs = [keras.Input(shape, dtype=dtype) for shape in shapes]
    return keras.Model(inputs[0] if len(inputs) == 1 else inputs, call(*inputs))


def data_of(*sizes, batch=3):
    """One input of this shape; its sizes after the first are those that may be smaller."""

    def data(rng, smaller):
        return (rng.standard_normal((batch, sizes[0], *[size - smaller for size in sizes[1:]])),)

    return data


def sequences(steps, features):
    def data(rng, smaller):
        return (rng.standard_normal((3, steps - smaller, features)),)

    return data


@st.composite
def linear(draw):
    """Linear: Dense, and EinsumDense with one or two output axes, or two input axes."""
    ins, heads, bias = draw(several), draw(several), draw(st.booleans())
    form = draw(st.sampled_from(["dense", "einsum", "two out", "two in"]))
    # keras.ops.add takes a bias of shape (n, 1) for one of the second axis where that has n places (Keras 3.15)
    outs = draw(several if form == "two out" else widths)
    activation = draw(st.sampled_from([None, "tanh", "relu"]))

    def in_torch():
        wide = outs * heads if form == "two out" else outs
        before = [nn.Flatten(2)] if form == "two in" else []
        after = {"tanh": [nn.Tanh()], "relu": [nn.ReLU()], None: []}[activation]
        after += [nn.Unflatten(2, (heads, outs))] if form == "two out" else []
        return torch_model(*before, nn.Linear(ins * (heads if form == "two in" else 1), wide, bias), *after)

    def in_keras():
        if form == "dense":
            layer = L.Dense(outs, activation, use_bias=bias)
        else:
            equation, shape, axes = {
                "einsum": ("abc,cd->abd", (None, outs), "d"),
                "two out": ("abc,cde->abde", (None, heads, outs), "de"),
                "two in": ("abcd,cde->abe", (None, outs), "e"),
            }[form]
            layer = L.EinsumDense(equation, shape, activation, bias_axes=axes if bias else None)
        return keras_model(layer, (None, heads, ins) if form == "two in" else (None, ins))

    def data(rng, smaller):
        return (rng.standard_normal((3, 5 - smaller, *([heads] if form == "two in" else []), ins)),)

    return Pair(f"linear {form} {ins} {heads} {outs} {bias=} {activation=}", in_torch, in_keras, data)


def divisors(*numbers):
    return [n for n in range(1, min(numbers) + 1) if all(number % n == 0 for number in numbers)]


@st.composite
def conv(draw):
    """Convolutions: padding in torch's layer, in a layer of its own in Keras; or one before both; or "same"."""
    rank = draw(st.integers(1, 3))
    ins, outs = draw(st.sampled_from([2, 3, 4])), draw(st.sampled_from([2, 4, 6]))
    # TensorFlow has no grouped 3-D convolution on a CPU
    groups = draw(st.sampled_from(divisors(ins, outs))) if rank < 3 else 1
    window = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    form = draw(st.sampled_from(["none", "inside", "before", "same"]))
    dilation = draw(st.sampled_from([1, 2]))
    stride = 1 if dilation > 1 or form == "same" else draw(st.sampled_from([1, 2]))
    pads = [(draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(rank)]
    inside = tuple(before for before, _ in pads)
    bias, size = draw(st.booleans()), draw(st.sampled_from([7, 8]))
    options = {"groups": groups}
    (conv_torch, conv_keras), (pad_torch, pad_keras) = RANKS["conv"][rank], RANKS["pad"][rank]

    def in_torch():
        padding = {"inside": inside, "same": "same"}.get(form, 0)
        layer = conv_torch(ins, outs, window, stride, padding, dilation, bias=bias, **options)
        flat = [n for pair in reversed(pads) for n in pair]
        return torch_model(*([pad_torch(tuple(flat))] if form == "before" else []), layer)

    def in_keras():
        def call(x):
            if form in ("inside", "before"):
                each = [(n, n) for n in inside] if form == "inside" else pads
                x = pad_keras(each if rank > 1 else each[0])(x)
            padding = "same" if form == "same" else "valid"
            return conv_keras(outs, window, stride, padding, dilation_rate=dilation, use_bias=bias, **options)(x)

        return keras_model(call, (*[None] * rank, ins))

    what = f"conv{rank}d {form} {ins}->{outs} {window=} {stride=} {dilation=} {groups=} {pads=} {bias=} {size=}"
    return Pair(what, in_torch, in_keras, data_of(ins, *[size] * rank), images=True)


@st.composite
def depthwise(draw):
    """Depthwise convolutions with several outputs per channel."""
    rank, channels, multiplier = draw(st.integers(1, 2)), draw(st.integers(2, 4)), draw(st.integers(1, 3))
    window = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    dilation = draw(st.sampled_from([1, 2]))
    stride = draw(st.sampled_from([1, 2])) if dilation == 1 else 1
    bias, size = draw(st.booleans()), draw(st.sampled_from([6, 7]))
    in_groups = draw(st.booleans())  # Keras has a word for it, and a convolution with as many groups as channels
    conv_torch, conv_keras = RANKS["conv"][rank]

    def in_torch():
        wide = channels * multiplier
        return torch_model(conv_torch(channels, wide, window, stride, 0, dilation, groups=channels, bias=bias))

    def in_keras():
        options = {"strides": stride, "dilation_rate": dilation, "use_bias": bias}
        if in_groups:
            layer = conv_keras(channels * multiplier, window, groups=channels, **options)
        else:
            layer = RANKS["depthwise"][rank][1](window, depth_multiplier=multiplier, **options)
        return keras_model(layer, (*[None] * rank, channels))

    what = f"depthwise{rank}d {channels} times {multiplier} {window=} {stride=} {dilation=} {bias=} {in_groups=}"
    return Pair(what, in_torch, in_keras, data_of(channels, *[size] * rank), images=True)


@st.composite
def separable(draw):
    """A depthwise convolution and a pointwise one, a single layer in Keras."""
    rank, channels, multiplier = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    outs, window, bias = draw(several), draw(st.integers(1, 3)), draw(st.booleans())
    stride = draw(st.sampled_from([1, 2]))
    conv_torch, wide = RANKS["conv"][rank][0], channels * multiplier

    def in_torch():
        first = conv_torch(channels, wide, window, stride, groups=channels, bias=False)
        return torch_model(first, conv_torch(wide, outs, 1, bias=bias))

    def in_keras():
        layer = RANKS["separable"][rank][1](outs, window, stride, depth_multiplier=multiplier, use_bias=bias)
        return keras_model(layer, (*[None] * rank, channels))

    what = f"separable{rank}d {channels} times {multiplier} to {outs} {window=} {stride=} {bias=}"
    return Pair(what, in_torch, in_keras, data_of(channels, *[7] * rank), images=True)


@st.composite
def transposed(draw):
    """Transposed convolutions: cropped by a layer of Keras's, by its "same", or not at all; torch's groups."""
    rank, ins, outs = draw(st.integers(1, 3)), draw(st.sampled_from([2, 4])), draw(st.sampled_from([2, 4, 6]))
    groups, bias = draw(st.sampled_from([1, 1, 2])), draw(st.booleans())
    form = draw(st.sampled_from(["valid", "more", "same", "cropped"]))
    dilation = draw(st.sampled_from([1, 2])) if form != "same" and rank < 3 else 1
    stride = draw(st.sampled_from([1, 2, 3])) if dilation == 1 else 1
    window = stride + 2 * draw(st.integers(0, 1)) if form == "same" else draw(st.integers(max(1, stride), 4))
    # Keras keeps what the last stride reaches beyond the window; torch, output_padding places
    more = draw(st.integers(0, stride - 1)) if form in ("more", "cropped") else 0
    cut = (
        draw(st.integers(more, max(more, 1))) if form == "cropped" else (window - stride) // 2 if form == "same" else 0
    )
    size = draw(st.sampled_from([4, 5]))
    convs, crop = RANKS["transposed"][rank], RANKS["crop"][rank][1]

    def in_torch():
        return torch_model(convs[0](ins, outs, window, stride, cut, more, groups, bias, dilation))

    def in_keras():
        padding = "same" if form == "same" else "valid"
        wanted = more if form == "more" and more else None
        layer = convs[1](outs, window, stride, padding, output_padding=wanted, dilation_rate=dilation, use_bias=bias)
        cuts = (cut, cut - more)
        behind = crop([cuts] * rank if rank > 1 else cuts) if form == "cropped" and cut else None
        return keras_model(lambda x: behind(layer(x)) if behind else layer(x), (*[None] * rank, ins))

    what = f"transposed{rank}d {form} {ins}->{outs} {window=} {stride=} {dilation=} {groups=} {more=} {cut=} {bias=}"
    # what a layer of its own cuts, torch's layer cuts itself: then the two give different outputs
    evidence = frozenset({"structure" if form == "cropped" and cut else "proven"})
    data = data_of(ins, *[size] * rank)
    return Pair(what, in_torch, in_keras, data, images=True, evidence=evidence, both=groups == 1)


@st.composite
def batch_norm(draw):
    rank, channels = draw(st.integers(0, 3)), draw(several)
    affine, eps = draw(st.booleans()), draw(epsilons)
    norm = RANKS["batch"][max(rank, 1)][0]

    def in_keras():
        layer = L.BatchNormalization(epsilon=eps, scale=affine, center=affine)
        return keras_model(layer, (*[None] * rank, channels))

    what = f"batch norm {rank=} {channels=} {affine=} {eps=}"
    data = data_of(channels, *[5] * rank)
    sizes = 2 if rank else 1
    return Pair(what, lambda: torch_model(norm(channels, eps, affine=affine)), in_keras, data, sizes, images=True)


@st.composite
def layer_norm(draw):
    axes, bias, eps = draw(st.integers(1, 2)), draw(st.booleans()), draw(epsilons)
    shape = tuple(draw(several) for _ in range(axes))

    def in_keras():
        layer = L.LayerNormalization(list(range(-axes, 0)), eps, center=bias)
        return keras_model(layer, (None, *shape))

    def data(rng, smaller):
        return (rng.standard_normal((3, 5 - smaller, *shape)),)

    what = f"layer norm over {shape} {bias=} {eps=}"
    return Pair(what, lambda: torch_model(nn.LayerNorm(shape, eps, bias=bias)), in_keras, data)


@st.composite
def group_norm(draw):
    rank, groups, each = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    eps, channels = draw(epsilons), groups * each

    def in_keras():
        return keras_model(L.GroupNormalization(groups, epsilon=eps), (*[None] * rank, channels))

    what = f"group norm {rank=} {groups=} of {each} {eps=}"
    data = data_of(channels, *[5] * rank)
    return Pair(what, lambda: torch_model(nn.GroupNorm(groups, channels, eps)), in_keras, data, images=True)


@st.composite
def instance_norm(draw):
    rank, channels, eps = draw(st.integers(1, 3)), draw(several), draw(epsilons)
    norm = RANKS["instance"][rank][0]

    def in_keras():
        return keras_model(L.GroupNormalization(-1, epsilon=eps), (*[None] * rank, channels))

    what = f"instance norm {rank=} {channels=} {eps=}"
    data = data_of(channels, *[5] * rank)
    return Pair(what, lambda: torch_model(norm(channels, eps, affine=True)), in_keras, data, images=True)


@st.composite
def rms_norm(draw):
    features, eps = draw(several), draw(epsilons)

    def in_keras():
        return keras_model(L.RMSNormalization(epsilon=eps), (None, features))

    what = f"rms norm {features=} {eps=}"
    return Pair(what, lambda: torch_model(nn.RMSNorm(features, eps)), in_keras, sequences(5, features))


@st.composite
def embedding(draw):
    rows, width, padding = draw(several), draw(widths), draw(st.sampled_from([None, 0]))

    def data(rng, smaller):
        return (rng.integers(0, rows, (4, 6 - smaller)),)

    def in_keras():
        return keras_model(L.Embedding(rows, width), (None,), dtype="int32")

    what = f"embedding {rows} {width} {padding=}"
    return Pair(what, lambda: torch_model(nn.Embedding(rows, width, padding)), in_keras, data)


class Recurrent(nn.Module):
    """A recurrent module of torch's on sequences that come batch first; states come one by one, (batch, unit)."""

    def __init__(self, cls, batch_first, last, *sizes, **options):
        super().__init__()
        self.net, self.last = getattr(nn, cls)(*sizes, batch_first=batch_first, **options), last

    def forward(self, x, *states):
        lstm = isinstance(self.net, nn.LSTM)
        given = [torch.stack(states[place :: 2 if lstm else 1]) for place in range(2 if lstm else 1)] if states else []
        arguments = [] if not given else [tuple(given)] if lstm else given
        output, kept = self.net(x if self.net.batch_first else x.transpose(0, 1), *arguments)
        if not self.last:
            return output if self.net.batch_first else output.transpose(0, 1)
        hidden = kept[0] if lstm else kept
        return torch.cat([hidden[-2], hidden[-1]], -1) if self.net.bidirectional else hidden[-1]


@st.composite
def recurrent(draw, cls):
    """LSTM, GRU and simple RNN: stacked, in both directions, with the states given, as layers and as cells."""
    ins, units, layers = draw(several), draw(several), draw(st.integers(1, 3))
    both, bias, batch_first, last = (draw(st.booleans()) for _ in range(4))
    states = draw(st.booleans())
    cells = not both and not states and draw(st.booleans())
    relu = cls == "RNN" and not last and draw(st.booleans())  # a last step may be all zeros
    name = "SimpleRNN" if cls == "RNN" else cls
    count = (2 if cls == "LSTM" else 1) * (1 + both)

    def in_torch():
        options = {"nonlinearity": "relu"} if relu else {}
        net = Recurrent(cls, batch_first, last, ins, units, layers, bias=bias, bidirectional=both, **options)
        return net.eval()

    def in_keras():
        options = {"use_bias": bias, "activation": "relu" if relu else "tanh"}

        def call(x, *given):
            for place in range(layers):
                whole = {"return_sequences": not last or place + 1 < layers}
                cell = getattr(L, f"{name}Cell")(units, **options) if cells else None
                layer = L.RNN(cell, **whole) if cells else getattr(L, name)(units, **whole, **options)
                layer = L.Bidirectional(layer) if both else layer
                start = given[place * count : (place + 1) * count]
                x = layer(x, initial_state=list(start) if count > 1 else start[0]) if start else layer(x)
            return x

        return keras_model(call, (None, ins), *[(units,)] * (layers * count if states else 0))

    def data(rng, smaller):
        given = [rng.standard_normal((3, units)) for _ in range(layers * count if states else 0)]
        return (rng.standard_normal((3, 5 - smaller, ins)), *given)

    what = f"{cls} {ins} {units} {layers=} {both=} {bias=} {batch_first=} {last=} {states=} {cells=} {relu=}"
    return Pair(what, in_torch, in_keras, data)


class Attention(nn.Module):
    """torch's attention; of one input, or of query, key and value; an input that is boolean says whom to look at."""

    def __init__(self, causal=False, *sizes, **options):
        super().__init__()
        self.net, self.causal = nn.MultiheadAttention(*sizes, batch_first=True, **options), causal

    def forward(self, *inputs):
        seen = {"key_padding_mask": ~inputs[-1]} if inputs[-1].dtype == torch.bool else {}
        inputs = inputs[:-1] if seen else inputs
        query, key, value = inputs if len(inputs) == 3 else inputs * 3
        if self.causal:
            seen["attn_mask"] = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).triu(1)
        return self.net(query, key, value, need_weights=False, **seen)[0]


class ByHand(nn.Module):
    """Attention of four linear layers, whose keys and values may have fewer heads."""

    def __init__(self, features, heads, groups, size, causal, bias, ins):
        super().__init__()
        self.heads, self.groups, self.causal = heads, groups, causal
        self.wq, self.wk = nn.Linear(features, heads * size, bias), nn.Linear(ins[0], groups * size, bias)
        self.wv, self.wo = nn.Linear(ins[1], groups * size, bias), nn.Linear(heads * size, features, bias)

    def forward(self, *inputs):
        seen = inputs[-1] if inputs[-1].dtype == torch.bool else None
        inputs = inputs if seen is None else inputs[:-1]
        query, key, value = inputs if len(inputs) == 3 else inputs * 3
        query = self.wq(query).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = (
            layer(x).unflatten(-1, (self.groups, -1)).transpose(1, 2).repeat_interleave(self.heads // self.groups, 1)
            for layer, x in ((self.wk, key), (self.wv, value))
        )
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        if seen is not None:
            scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
        if self.causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        return self.wo((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


@st.composite
def attention(draw, by_hand):
    """Attention: self and cross, with other features for keys and values, with masks, with fewer heads for keys."""
    groups, each, size, bias = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(several), draw(st.booleans())
    heads = groups * each
    features = heads * size
    grouped = by_hand and draw(st.booleans())
    groups = groups if grouped else heads
    inputs = draw(st.sampled_from([1, 3]))
    ins = (draw(several), draw(several)) if inputs == 3 and draw(st.booleans()) else (features, features)
    ins = (ins[0], features) if grouped else ins  # Keras's grouped attention takes values as wide as queries
    mask = draw(st.sampled_from([None, "padding", "causal"]))

    def in_torch():
        if by_hand:
            return ByHand(features, heads, groups, size, mask == "causal", bias, ins).eval()
        return Attention(mask == "causal", features, heads, bias=bias, kdim=ins[0], vdim=ins[1]).eval()

    def in_keras():
        def call(*given):
            seen, given = (given[-1], given[:-1]) if mask == "padding" else (None, given)
            query, key, value = given if len(given) == 3 else given * 3
            if grouped:
                layer = L.GroupQueryAttention(size, heads, groups, use_bias=bias)
            else:
                layer = L.MultiHeadAttention(heads, size, use_bias=bias, output_shape=features)
            seen = None if seen is None else ops.cast(seen[:, None], "bool")
            # Keras asks for query, value, key
            return layer(query, value, key, attention_mask=seen, use_causal_mask=mask == "causal")

        shapes = [features, *ins][:inputs]
        given = [keras.Input((None, width)) for width in shapes]
        given += [keras.Input((None,), dtype="bool")] if mask == "padding" else []
        return keras.Model(given if len(given) > 1 else given[0], call(*given))

    def data(rng, smaller):
        steps = [4, 6, 6][:inputs]
        given = [rng.standard_normal((3, n - smaller, w)) for n, w in zip(steps, [features, *ins], strict=False)]
        seen = rng.random((3, steps[-1] - smaller)) < 0.7
        seen[:, 0] = True
        return (*given, seen) if mask == "padding" else tuple(given)

    what = f"attention {by_hand=} {heads=} {groups=} {size=} {ins=} {inputs=} {mask=} {bias=}"
    return Pair(what, in_torch, in_keras, data)


@st.composite
def prelu(draw):
    """A slope per channel, or one for all; of images, or of features alone."""
    rank, channels, one = draw(st.integers(0, 2)), draw(several), draw(st.booleans())

    def in_keras():
        layer = L.PReLU(shared_axes=[*range(1, rank + 1)] or None)
        return keras_model(layer, (*[4] * rank, channels))

    what = f"prelu {rank=} {channels=} {one=}"
    data = data_of(channels, *[4] * rank)
    return Pair(
        what,
        lambda: torch_model(nn.PReLU(1 if one else channels)),
        in_keras,
        data,
        sizes=1,
        images=True,
        both=not one,
    )


NORMS = {
    "weight": nn.utils.parametrizations.weight_norm,
    "old weight": nn.utils.weight_norm,
    "spectral": nn.utils.parametrizations.spectral_norm,
    "old spectral": nn.utils.spectral_norm,
}


@st.composite
def reparametrised(draw, norm):
    """Weight norm and spectral norm of torch's, in both forms, against plain layers and Keras's wrapper."""
    form = draw(st.sampled_from([name for name in NORMS if norm in name]))
    layer = draw(st.sampled_from(["linear", "conv", "transposed"]))
    rank, ins, outs, bias = draw(st.integers(1, 2)), draw(several), draw(several), draw(st.booleans())
    wrapped = norm == "spectral" and layer != "transposed" and draw(st.booleans())

    def in_torch():
        plain = {
            "linear": lambda: nn.Linear(ins, outs, bias),
            "conv": lambda: RANKS["conv"][rank][0](ins, outs, 3, bias=bias),
            "transposed": lambda: RANKS["transposed"][rank][0](ins, outs, 3, bias=bias),
        }[layer]
        return torch_model(NORMS[form](plain()))

    def in_keras():
        plain = {
            "linear": lambda: L.Dense(outs, use_bias=bias),
            "conv": lambda: RANKS["conv"][rank][1](outs, 3, use_bias=bias),
            "transposed": lambda: RANKS["transposed"][rank][1](outs, 3, use_bias=bias),
        }[layer]()
        shape = (ins,) if layer == "linear" else (*[None] * rank, ins)
        return keras_model(L.SpectralNormalization(plain) if wrapped else plain, shape)

    what = f"{form} norm of {layer} {rank=} {ins} {outs} {bias=} {wrapped=}"
    data = data_of(ins, *([] if layer == "linear" else [6] * rank))
    sizes = 1 if layer == "linear" else 2
    return Pair(what, in_torch, in_keras, data, sizes, images=True, settle=9 if norm == "spectral" else 0)


class Tied(nn.Module):
    """A table that is read at the entrance and multiplied with at the exit, as a layer or by hand, then with a bias."""

    def __init__(self, rows, width, bias):
        super().__init__()
        self.table, self.middle = nn.Embedding(rows, width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None
        self.head = None if bias else nn.Linear(width, rows, bias=False)
        if self.head:
            self.head.weight = self.table.weight

    def forward(self, tokens):
        x = torch.tanh(self.middle(self.table(tokens)))
        return self.head(x) if self.head else x @ self.table.weight.T + self.bias


class KerasTied(keras.Model):
    def __init__(self, rows, width, bias):
        super().__init__()
        self.table, self.middle = L.Embedding(rows, width), L.Dense(width, "tanh")
        self.bias = self.add_weight(shape=(rows,), name="bias") if bias else None

    def call(self, tokens):
        x = ops.matmul(self.middle(self.table(tokens)), ops.transpose(self.table.embeddings))
        return x if self.bias is None else x + self.bias


@st.composite
def tied(draw):
    rows, width, bias = draw(st.integers(3, 7)), draw(several), draw(st.booleans())

    def data(rng, smaller):
        return (rng.integers(0, rows, (4, 6 - smaller)),)

    def in_keras():
        model = KerasTied(rows, width, bias)
        model(np.zeros((1, 2), "int32"))
        return model

    return Pair(f"tied {rows} {width} {bias=}", lambda: Tied(rows, width, bias).eval(), in_keras, data)


class Scale(nn.Module):
    """A learnable scale with a shift, as a module of its own."""

    def __init__(self, shape):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        return x * self.gain + self.shift


class KerasScale(L.Layer):
    def __init__(self, shape):
        super().__init__()
        self.gain = self.add_weight(shape=shape, name="gain", initializer="ones")
        self.shift = self.add_weight(shape=shape, name="shift", initializer="zeros")

    def call(self, x):
        return x * self.gain + self.shift


@st.composite
def scales(draw):
    """A learnable scale as a layer, its axes of one place where each framework wants them."""
    width, image, ones = draw(several), draw(st.booleans()), draw(st.booleans())

    def in_torch():
        scale = Scale((width, 1, 1) if image else (width,))
        return torch_model(nn.Conv2d(2, width, 1) if image else nn.Linear(2, width), nn.Tanh(), scale)

    def in_keras():
        scale = KerasScale((1, *[1] * (2 * image), width) if ones else (width,))
        first = L.Conv2D(width, 1, activation="tanh") if image else L.Dense(width, "tanh")
        return keras_model(lambda x: scale(first(x)), (None, None, 2) if image else (2,))

    data = data_of(2, *([5, 6] if image else []))
    what = f"scale {width=} {image=} {ones=}"
    return Pair(what, in_torch, in_keras, data, sizes=2 if image else 1, images=True)


class Bare(nn.Module):
    """Parameters of the model's own: a class token's row, positions, and a gain of no axes."""

    def __init__(self, steps, width):
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, 2)
        self.positions, self.gain = nn.Parameter(torch.zeros(1, steps, width)), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.last(torch.tanh(self.first(x) + self.positions) * self.gain)


class KerasBare(keras.Model):
    def __init__(self, steps, width):
        super().__init__()
        self.first, self.last = L.Dense(width), L.Dense(2)
        self.positions = self.add_weight(shape=(steps, width), name="positions")
        self.gain = self.add_weight(shape=(), name="gain", initializer="ones")

    def call(self, x):
        return self.last(ops.tanh(self.first(x) + self.positions) * self.gain)


@st.composite
def bare(draw):
    steps, width = draw(st.integers(2, 6)), draw(several)

    def in_keras():
        model = KerasBare(steps, width)
        model(np.zeros((1, steps, width), "float32"))
        return model

    what = f"bare parameters {steps=} {width=}"
    return Pair(what, lambda: Bare(steps, width).eval(), in_keras, sequences(steps, width), sizes=1)


class Repeated(nn.Module):
    """One layer, called several times, between others."""

    def __init__(self, width, calls):
        super().__init__()
        self.start, self.again, self.end, self.calls = nn.Linear(3, width), nn.Linear(width, width), None, calls
        self.end = nn.Linear(width, 2)

    def forward(self, x):
        x = self.start(x)
        for _ in range(self.calls):
            x = torch.tanh(self.again(x))
        return self.end(x)


@st.composite
def repeated(draw):
    width, calls = draw(several), draw(st.integers(2, 4))

    def in_keras():
        start, again, end = L.Dense(width), L.Dense(width, "tanh"), L.Dense(2)

        def call(x):
            x = start(x)
            for _ in range(calls):
                x = again(x)
            return end(x)

        return keras_model(call, (3,))

    return Pair(f"repeated {width=} {calls=}", lambda: Repeated(width, calls).eval(), in_keras, data_of(3), sizes=1)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh())
        self.out = nn.ModuleDict({"projection": nn.Linear(2 * width, width)})

    def forward(self, x):
        return x + self.out["projection"](self.inner(self.norm(x)))


class KerasBlock(L.Layer):
    def __init__(self, width):
        super().__init__()
        self.norm = L.LayerNormalization(epsilon=1e-5)
        self.inner = [L.Dense(2 * width, "tanh"), L.Dense(width)]

    def build(self, shape):
        self.norm.build(shape)
        for layer in self.inner:
            layer.build(shape)
            shape = layer.compute_output_shape(shape)
        super().build(shape)

    def call(self, x):
        y = self.norm(x)
        for layer in self.inner:
            y = layer(y)
        return x + y


class KerasNested(keras.Model):
    def __init__(self, width, depth):
        super().__init__()
        self.blocks, self.head = keras.Sequential([KerasBlock(width) for _ in range(depth)]), L.Dense(2)

    def call(self, x):
        return self.head(self.blocks(x))


@st.composite
def nested(draw):
    """Blocks in blocks: modules in a Sequential, a subclassed model around a Sequential of subclassed layers."""
    width, depth, functional = draw(several), draw(st.integers(1, 3)), draw(st.booleans())

    def in_torch():
        return torch_model(nn.Sequential(*[Block(width) for _ in range(depth)]), nn.Linear(width, 2))

    def in_keras():
        if functional:
            inner = keras_model(lambda x: x + L.Dense(width)(L.Dense(2 * width, "tanh")(x)), (None, width))
            del inner  # built and thrown away: names of layers are then counted on
        model = KerasNested(width, depth)
        model(np.zeros((1, 2, width), "float32"))
        return model

    return Pair(f"nested {width=} {depth=} {functional=}", in_torch, in_keras, sequences(5, width))


class Mixer(nn.Module):
    """A layer of a class that no rule describes, with the same names and layouts on both sides."""

    def __init__(self, steps, width):
        super().__init__()
        self.mix, self.turn = nn.Parameter(torch.zeros(steps, steps)), nn.Parameter(torch.zeros(width, width))
        self.register_buffer("offset", torch.zeros(width))

    def forward(self, x):
        return self.mix @ torch.tanh(x) @ self.turn + self.offset


class KerasMixer(L.Layer):
    def __init__(self, steps, width):
        super().__init__()
        self.mix = self.add_weight(shape=(steps, steps), name="mix")
        self.turn = self.add_weight(shape=(width, width), name="turn")
        self.offset = self.add_weight(shape=(width,), name="offset", trainable=False)

    def call(self, x):
        return ops.matmul(ops.matmul(self.mix, ops.tanh(x)), self.turn) + self.offset


@st.composite
def raw(draw):
    steps, width = draw(several), draw(several)  # equal ones too: then names alone tell the two matrices apart

    def in_keras():
        return keras_model(lambda x: L.Dense(2)(KerasMixer(steps, width)(x)), (steps, width))

    def in_torch():
        return torch_model(Mixer(steps, width), nn.Linear(width, 2))

    return Pair(f"raw {steps=} {width=}", in_torch, in_keras, sequences(steps, width), sizes=1)


KINDS = {
    "linear": linear(),
    "convolution": conv(),
    "depthwise convolution": depthwise(),
    "separable convolution": separable(),
    "transposed convolution": transposed(),
    "batch norm": batch_norm(),
    "layer norm": layer_norm(),
    "group norm": group_norm(),
    "instance norm": instance_norm(),
    "RMS norm": rms_norm(),
    "embedding": embedding(),
    "LSTM": recurrent("LSTM"),
    "GRU": recurrent("GRU"),
    "simple RNN": recurrent("RNN"),
    "torch's attention": attention(by_hand=False),
    "attention by hand": attention(by_hand=True),
    "PReLU": prelu(),
    "weight norm": reparametrised("weight"),
    "spectral norm": reparametrised("spectral"),
    "tied weights": tied(),
    "learnable scales": scales(),
    "bare parameters": bare(),
    "layers called several times": repeated(),
    "nested models": nested(),
    "raw tensors": raw(),
}
# no shrinking: where every example builds models, it takes minutes
EXAMPLES = settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]


def assert_arrives(source, target, sample, pair):
    """The target gets the source's weights by a plan whose evidence is as expected, and verify agrees; the plan."""
    kept = contents(source)
    plan = cc.plan(source, target, sample=sample)
    assert {row.evidence for row in plan.rows} == pair.evidence, str(plan)
    cc.migrate(source, target, plan=plan)
    for given_plan in (plan, None):
        check = cc.verify(source, target, sample=sample, plan=given_plan)
        assert check.ok, (check, str(plan))
    assert_bitwise_equal(kept, contents(source))
    return plan


def assert_comes_back(first, back, plans, pair):
    """Bitwise what it was if every row is a rearrangement; else the same function, and the plan says "one way"."""
    if all(row.reversible for plan in plans for row in plan.rows):
        for ours, theirs in zip(contents(first), contents(back), strict=True):
            assert ours.dtype.kind in "iub" or ours.tobytes() == theirs.tobytes()
        return
    for plan in plans:
        one_way = [row for row in plan.rows if row.sources and not row.reversible]
        assert ("one way" in str(plan)) == bool(one_way)
    inputs = pair.inputs(98)
    allowed = max(1e-5, 10 * pair.floor(first, inputs))
    assert relative_error(pair.torch_output(first, inputs), pair.torch_output(back, inputs)) <= allowed


@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(data=st.data())
def test_a_layer_moves_from_torch_to_keras_and_back_and_computes_the_same(kind, data):
    pair = data.draw(KINDS[kind])
    first, in_keras, back = pair.trained_torch(1), pair.trained_keras(2), pair.trained_torch(3)
    inputs = pair.inputs(0)
    assert pair.error(first, in_keras) > 1e-3
    there = assert_arrives(first, in_keras, sample_of(inputs), pair)
    pair.assert_same_function(first, in_keras)
    back_again = assert_arrives(in_keras, back, sample_of(pair.for_keras(inputs)), pair)
    pair.assert_same_function(back, in_keras)
    assert_comes_back(first, back, [there, back_again], pair)


@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(data=st.data())
def test_a_layer_moves_from_keras_to_torch_and_computes_the_same(kind, data):
    pair = data.draw(KINDS[kind].filter(lambda pair: pair.both))
    in_keras, in_torch = pair.trained_keras(1), pair.trained_torch(2)
    assert pair.error(in_torch, in_keras) > 1e-3
    assert_arrives(in_keras, in_torch, sample_of(pair.for_keras(pair.inputs(0))), pair)
    pair.assert_same_function(in_torch, in_keras)


def test_as_many_channels_as_steps_leave_one_form_of_the_sample_that_both_models_agree_on():
    pair = Pair(
        "instance norm",
        lambda: torch_model(nn.InstanceNorm1d(5, affine=True, eps=1e-3)),
        lambda: keras_model(L.GroupNormalization(-1, epsilon=1e-3), (None, 5)),
        data_of(5, 5),
        images=True,
    )
    first, second = pair.trained_torch(1), pair.trained_keras(2)
    assert_arrives(first, second, sample_of(pair.inputs(0)), pair)


def test_one_slope_goes_into_one_per_channel_and_comes_back_and_several_do_not_fit_into_one():
    x = np.random.default_rng(0).standard_normal((5, 3)).astype("float32")
    source, target = randomised(torch_model(nn.PReLU()), 1), randomised(keras_model(L.PReLU(), (3,)), 2)
    back = randomised(torch_model(nn.PReLU()), 3)
    with pytest.raises(cc.MappingError, match="do not fit into one"):
        cc.plan(target, back, sample=x)
    cc.migrate(source, target, sample=x)
    cc.migrate(target, back, sample=x)
    assert_bitwise_equal(contents(source), contents(back))


def test_a_dense_kernel_goes_into_groups_only_if_it_mixes_none():
    source = randomised(keras_model(L.Conv1DTranspose(4, 3), (None, 2)), 1)
    target = torch_model(nn.ConvTranspose1d(2, 4, 3, groups=2))
    with pytest.raises(cc.MappingError, match="mixes what the target's 2 groups keep apart"):
        cc.plan(source, target, sample=np.ones((1, 5, 2), "float32"))


def test_cells_stacked_in_one_layer_are_refused_and_the_error_says_what_would_do():
    source = Recurrent("LSTM", True, False, 3, 4, 2).eval()
    target = keras_model(L.RNN([L.LSTMCell(4), L.LSTMCell(4)], return_sequences=True), (None, 3))
    with pytest.raises(cc.MappingError, match="an RNN around each would be described"):
        cc.plan(source, target, sample=np.ones((1, 5, 3), "float32"))


def projected():
    return Recurrent("LSTM", True, False, 3, 4, 2, proj_size=2).eval()


def test_an_lstm_with_projections_moves_between_torch_models_and_is_refused_clearly_for_keras():
    x = np.random.default_rng(0).standard_normal((2, 5, 3)).astype("float32")
    source, target = randomised(projected(), 1), randomised(projected(), 2)
    cc.migrate(source, target, sample=x)
    assert_bitwise_equal(contents(source), contents(target))
    assert cc.verify(source, target, sample=x).ok
    in_keras = keras_model(lambda x: L.LSTM(4, return_sequences=True)(x), (None, 3))
    with pytest.raises(cc.MappingError, match="an LSTM with projections"):
        cc.plan(source, in_keras, sample=x)
    with pytest.raises(cc.MappingError, match="an LSTM with projections"):
        cc.plan(in_keras, target, sample=x)


def legacy(library, call, *shapes, dtype="float32"):
    inputs = [library.Input(shape, dtype=dtype) for shape in shapes]
    return library.Model(inputs, call(*inputs))


LEGACY = {
    "Dense": (lambda: torch_model(nn.Linear(3, 4)), lambda L: (L.Dense(4), (3,)), data_of(3)),
    "Conv2D": (
        lambda: torch_model(nn.Conv2d(2, 4, 3, stride=2, groups=2)),
        lambda L: (L.Conv2D(4, 3, 2, groups=2), (None, None, 2)),
        data_of(2, 8, 7),
    ),
    "DepthwiseConv2D": (
        lambda: torch_model(nn.Conv2d(3, 6, 3, groups=3)),
        lambda L: (L.DepthwiseConv2D(3, depth_multiplier=2), (None, None, 3)),
        data_of(3, 6, 7),
    ),
    "Conv2DTranspose": (
        lambda: torch_model(nn.ConvTranspose2d(2, 3, 4, 2, 1)),
        lambda L: (L.Conv2DTranspose(3, 4, 2, "same"), (None, None, 2)),
        data_of(2, 5, 4),
    ),
    "BatchNormalization": (
        lambda: torch_model(nn.BatchNorm2d(3, 1e-3)),
        lambda L: (L.BatchNormalization(epsilon=1e-3), (None, None, 3)),
        data_of(3, 5, 4),
    ),
    "LayerNormalization": (
        lambda: torch_model(nn.LayerNorm(4)),
        lambda L: (L.LayerNormalization(epsilon=1e-5), (None, 4)),
        sequences(5, 4),
    ),
    "LSTM": (
        lambda: Recurrent("LSTM", True, False, 3, 4, 1).eval(),
        lambda L: (L.LSTM(4, return_sequences=True), (None, 3)),
        sequences(5, 3),
    ),
    "GRU": (
        lambda: Recurrent("GRU", True, True, 3, 4, 1).eval(),
        lambda L: (L.GRU(4, reset_after=True), (None, 3)),
        sequences(5, 3),
    ),
    "Bidirectional": (
        lambda: Recurrent("LSTM", True, True, 3, 4, 1, bidirectional=True).eval(),
        lambda L: (L.Bidirectional(L.LSTM(4)), (None, 3)),
        sequences(5, 3),
    ),
    "MultiHeadAttention": (
        lambda: Attention(False, 6, 2).eval(),
        lambda L: (lambda x: L.MultiHeadAttention(2, 3)(x, x), (None, 6)),
        sequences(5, 6),
    ),
    "Embedding": (
        lambda: torch_model(nn.Embedding(6, 3)),
        lambda L: (L.Embedding(6, 3), (None,)),
        lambda rng, smaller: (rng.integers(0, 6, (3, 5 - smaller)),),
    ),
}


@pytest.mark.parametrize("layer", LEGACY)
def test_a_layer_of_keras_2_moves_from_torch_and_back(layer):
    in_torch, in_keras, data = LEGACY[layer]

    def built():
        made, shape = in_keras(tf_keras.layers)
        return legacy(tf_keras, made, shape, dtype="int32" if layer == "Embedding" else "float32")

    pair = Pair(layer, in_torch, built, data, images="Conv" in layer or "Batch" in layer)
    first, second, back = pair.trained_torch(1), pair.trained_keras(2), pair.trained_torch(3)
    there = assert_arrives(first, second, sample_of(pair.inputs(0)), pair)
    pair.assert_same_function(first, second)
    back_again = assert_arrives(second, back, sample_of(pair.for_keras(pair.inputs(0))), pair)
    assert_comes_back(first, back, [there, back_again], pair)


def test_a_model_of_keras_2_moves_where_the_user_imports_tf_keras_alone():
    code = """
        import numpy as np, tf_keras, torch
        import clipcore as cc
        L = tf_keras.layers
        source = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.ReLU(), torch.nn.Conv2d(3, 2, 1)).eval()
        target = tf_keras.Sequential([L.Input((6, 6, 2)), L.Conv2D(3, 3, activation="relu"), L.Conv2D(2, 1)])
        x = np.random.default_rng(0).standard_normal((2, 2, 6, 6)).astype("float32")
        cc.migrate(source, target, sample=x)
        assert cc.verify(source, target, sample=x).ok
        assert np.array_equal(target.layers[0].kernel, source[0].weight.detach().permute(2, 3, 1, 0))
        print("moved")
    """
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["moved"]
