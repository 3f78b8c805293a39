"""Hypothesis strategies: what layers of every kind can be, the odd ones included."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from clipcore.mapping.kinds import GRU_GATES, KINDS, LSTM_GATES
from clipcore.mapping.reference import ACTIVATIONS

Array = np.ndarray[Any, np.dtype[Any]]
Shape = tuple[int, ...]

ATTENTION = ("query", "key", "value", "output")  # the parts of attention, in the order in which they are listed

# what must not be near zero: variances, and what a kernel is divided by
_POSITIVE = frozenset({"running_var", "kernel.original", "kernel.u", "kernel.v"})


@dataclass(frozen=True)
class LayerConfiguration:
    """One layer: canonical settings, canonical shapes of its tensors by role, and the shape of data for it.

    `input_shape` has the channel axis first; of attention it is (batch, length of the query, length of key and value).
    Where no tensor's shape tells, data has the form (batch, feature), of pools three channels, of norms over channels
    and of prelu two spatial axes.
    `seed` is what weights and data are drawn from.
    """

    kind: str
    settings: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    input_shape: Shape
    seed: int = 0

    @property
    def parts(self) -> tuple[str, ...]:
        """The layers that a model lists for it: one without a name, or the parts of attention."""
        return ATTENTION if self.kind == "attention" else ("",)

    @property
    def family(self) -> str:
        """What a framework has or has not: the kind, with how its kernel is made."""
        made = {role.partition(".")[2] for role in self.shapes} & {"direction", "original"}
        return self.kind + {"direction": " with weight norm", "original": " with spectral norm"}.get(
            min(made, default=""), ""
        )

    def weights(self) -> dict[str, Array]:
        """Random canonical tensors in float32, nothing left at 0 or 1; variances are positive."""
        rng = np.random.default_rng(self.seed)
        # 1 - a gate that is all but shut has few digits in float32
        spread = 0.5 if "recurrent_activation" in self.settings else 1.0
        return {
            role: rng.uniform(0.5, 2.0, shape).astype(np.float32)
            if role in _POSITIVE
            else (rng.standard_normal(shape) * spread).astype(np.float32)
            for role, shape in self.shapes.items()
        }

    def data(self) -> Any:
        """Random input: float32, or the integers that an embedding takes; of attention a tuple of three arrays."""
        rng = np.random.default_rng([self.seed, 1])
        if self.kind == "embedding":
            return rng.integers(0, self.shapes["kernel"][0], self.input_shape)
        if self.kind == "attention":
            batch, queries, keys = self.input_shape
            lengths = {"query": queries, "key": keys, "value": keys}
            shapes = [(batch, length, self.shapes[f"{part}.kernel"][1]) for part, length in lengths.items()]
            return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)
        # beyond 6, where some activations bend
        spread = 4 if self.kind == "activation" else 1
        return (rng.standard_normal(self.input_shape) * spread).astype(np.float32)


def layer_configurations(kind: str) -> st.SearchStrategy[LayerConfiguration]:
    """Layers of a kind of `clipcore.mapping.kinds`, or "attention", with every setting that it has."""
    return _CONFIGURATIONS[kind]()


_small = st.integers(1, 5)
_seeds = st.integers(0, 2**32 - 1)
_eps = st.floats(1e-5, 0.5)


def _activations() -> st.SearchStrategy[str | None]:
    # a name does not tell the slope of the one, nor the threshold of the other
    return st.none() | st.sampled_from(sorted(set(ACTIVATIONS) - {"leaky_relu", "threshold"}))


def _some(draw: st.DrawFn, shapes: Mapping[str, Shape], kind: str) -> dict[str, Shape]:
    """The shapes, where each role that a layer may lack is there or not."""
    return {role: s for role, s in shapes.items() if role not in KINDS[kind].optional or draw(st.booleans())}


def _made(draw: st.DrawFn, kernel: Shape, rows: int | None = None) -> tuple[dict[str, Shape], dict[str, Any]]:
    """The tensors that a layer has for its kernel, and the settings that say how they make it.

    Args:
        draw: hypothesis's own.
        kernel: its canonical shape.
        rows: the axis of the matrix's rows that spectral norm takes, where a convolution's group and the axis after it
            are one.
    """
    how = draw(st.sampled_from(["plain", "plain", "plain", "weight norm", "spectral norm"]))
    if how == "weight norm":
        # torch's own choice, the first stored axis, or any other axes
        whole = len(kernel) - (0 if len(kernel) == 2 else 1)
        kept = draw(st.just([True] + [False] * (whole - 1)) | st.lists(st.booleans(), min_size=whole, max_size=whole))
        if len(kernel) > 2:
            kept = [kept[0], *kept]
        magnitude = tuple(size if keep else 1 for size, keep in zip(kernel, kept, strict=True))
        return {"kernel.direction": kernel, "kernel.magnitude": magnitude}, {}
    if how == "spectral norm" and rows is not None:
        joined = kernel if len(kernel) == 2 else (kernel[0] * kernel[1], *kernel[2:])
        columns = math.prod(joined) // joined[rows]
        shapes = {"kernel.original": kernel, "kernel.u": (joined[rows],), "kernel.v": (columns,)}
        return shapes, {"spectral_axis": rows}
    return {"kernel": kernel}, {}


@st.composite
def _linear(draw: st.DrawFn) -> LayerConfiguration:
    ins, outs = draw(_small), draw(_small)
    made, settings = _made(draw, (outs, ins), rows=0)
    given = {**made, **_some(draw, {"bias": (outs,)}, "linear")}
    settings["activation"] = draw(_activations())
    return LayerConfiguration("linear", settings, given, (3, ins), draw(_seeds))


@st.composite
def _conv(draw: st.DrawFn) -> LayerConfiguration:
    axes, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    outs, ins = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    window, stride, dilation = draw(_windows(axes))
    made, settings = _made(draw, (groups, outs, ins, *window), rows=0)
    settings |= {
        "stride": stride,
        "padding": draw(_paddings(window, stride, dilation)),
        "padding_mode": "zeros",
        "dilation": dilation,
        "groups": groups,
        "activation": draw(_activations()),
    }
    given = {**made, **_some(draw, {"bias": (groups * outs,)}, "conv")}
    sizes = [(k - 1) * d + 1 + draw(st.integers(0, 5)) for k, d in zip(window, dilation, strict=True)]
    return LayerConfiguration("conv", settings, given, (2, groups * ins, *sizes), draw(_seeds))


@st.composite
def _windows(draw: st.DrawFn, axes: int) -> tuple[Shape, Shape, Shape]:
    """Window, stride and dilation, alike on all axes or not."""
    window = draw(st.tuples(*[st.integers(1, 3)] * axes))
    stride = draw(st.just((1,) * axes) | st.just((2,) * axes) | st.tuples(*[st.integers(1, 3)] * axes))
    dilation = draw(st.just((1,) * axes) | st.just((2,) * axes) | st.tuples(*[st.integers(1, 2)] * axes))
    return window, stride, dilation


def _paddings(window: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> st.SearchStrategy[Any]:
    """None, what keeps the size, and pairs: equal ones and others."""
    totals = [(k - 1) * d for k, d in zip(window, dilation, strict=True)]
    keeping: Any = tuple((total // 2, total - total // 2) for total in totals) if max(stride) == 1 else "same"
    pair = st.integers(0, 2).map(lambda n: (n, n)) | st.tuples(st.integers(0, 2), st.integers(0, 2))
    return st.just(((0, 0),) * len(window)) | st.just(keeping) | st.tuples(*[pair] * len(window))


@st.composite
def _conv_transpose(draw: st.DrawFn) -> LayerConfiguration:
    axes, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    outs, ins = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    window, stride, dilation = draw(_windows(axes))
    made, settings = _made(draw, (groups, ins, outs, *window), rows=1)
    sizes = draw(st.tuples(*[st.integers(2, 5)] * axes))
    settings |= {
        "stride": stride,
        "crop": draw(_crops(sizes, window, stride, dilation)),
        "dilation": dilation,
        "groups": groups,
        "activation": draw(_activations()),
    }
    given = {**made, **_some(draw, {"bias": (groups * outs,)}, "conv_transpose")}
    return LayerConfiguration("conv_transpose", settings, given, (2, groups * ins, *sizes), draw(_seeds))


@st.composite
def _crops(
    draw: st.DrawFn, sizes: Sequence[int], window: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Nothing, torch's (p, p - output_padding), TensorFlow's SAME, or any pairs that leave a place."""
    how = draw(st.sampled_from(["none", "torch", "same", "any"]))
    pairs = []
    for size, k, s, d in zip(sizes, window, stride, dilation, strict=True):
        reach = (k - 1) * d + 1
        whole = (size - 1) * s + reach
        most = (whole - 1) // 2
        cut = max(reach - s, 0) // 2
        padding = draw(st.integers(0, min(2, most)))
        before, after = {
            "none": (0, min(reach - s, 0)),  # TensorFlow's VALID has no fewer places than size times stride
            "torch": (padding, padding - draw(st.integers(0, max(s, d) - 1))),
            "same": (cut, reach - s - cut),
            "any": draw(st.tuples(st.integers(-1, min(2, most)), st.integers(-1, min(2, most)))),
        }[how]
        pairs.append((before, after))
    return tuple(pairs)


@st.composite
def _batch_norm(draw: st.DrawFn) -> LayerConfiguration:
    channels = draw(_small)
    roles = ("scale", "bias", "running_mean", "running_var")
    given = _some(draw, dict.fromkeys(roles, (channels,)), "batch_norm")
    settings = {"eps": draw(_eps), "momentum": draw(st.floats(0.01, 0.5))}
    sizes = draw(st.tuples(_small, _small))
    return LayerConfiguration("batch_norm", settings, given, (2, channels, *sizes), draw(_seeds))


@st.composite
def _layer_norm(draw: st.DrawFn) -> LayerConfiguration:
    # with one number alone nothing is left but the bias
    normalised = draw(st.tuples(st.integers(2, 6)) | st.tuples(st.integers(2, 4), st.integers(2, 4)))
    given = _some(draw, dict.fromkeys(("scale", "bias"), normalised), "layer_norm") or {"scale": normalised}
    return LayerConfiguration("layer_norm", {"eps": draw(_eps)}, given, (2, 3, *normalised), draw(_seeds))


@st.composite
def _group_norm(draw: st.DrawFn) -> LayerConfiguration:
    groups, each = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    channels = groups * each
    sizes = draw(st.tuples(st.integers(2, 4), st.integers(1, 4)))
    given = _some(draw, dict.fromkeys(("scale", "bias"), (channels,)), "group_norm") or {"scale": (channels,)}
    settings = {"groups": groups, "eps": draw(_eps)}
    return LayerConfiguration("group_norm", settings, given, (2, channels, *sizes), draw(_seeds))


@st.composite
def _rms_norm(draw: st.DrawFn) -> LayerConfiguration:
    normalised = draw(st.tuples(st.integers(1, 6)) | st.tuples(st.integers(2, 4), st.integers(2, 4)))
    return LayerConfiguration("rms_norm", {"eps": draw(_eps)}, {"scale": normalised}, (2, 3, *normalised), draw(_seeds))


@st.composite
def _embedding(draw: st.DrawFn) -> LayerConfiguration:
    return LayerConfiguration("embedding", {}, {"kernel": (draw(_small), draw(_small))}, (2, 3), draw(_seeds))


_USUAL: Mapping[str, Any] = {"activation": "tanh", "recurrent_activation": "sigmoid", "reset_after": True}
_UNUSUAL: Mapping[str, st.SearchStrategy[Any]] = {
    "activation": st.sampled_from(["relu", "softsign", "sigmoid"]),
    "recurrent_activation": st.sampled_from(["hard_sigmoid", "tanh"]),
    "reset_after": st.just(False),
}


def _recurrent(kind: str, gates: Sequence[str]) -> Callable[[], st.SearchStrategy[LayerConfiguration]]:
    @st.composite
    def configurations(draw: st.DrawFn) -> LayerConfiguration:
        ins, units = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        biases = draw(st.sampled_from([("bias", "recurrent_bias"), ("bias",), ()]))
        usual = draw(st.booleans())
        settings = {
            name: value if usual else draw(st.just(value) | _UNUSUAL[name])
            for name, value in _USUAL.items()
            if name in KINDS[kind].settings
        }
        shapes = recurrent_shapes(gates, ins, units, biases)
        data = (draw(st.integers(2, 3)), draw(st.integers(1, 5)), ins)
        return LayerConfiguration(kind, {**settings, "reverse": draw(st.booleans())}, shapes, data, draw(_seeds))

    return configurations


def recurrent_shapes(gates: Sequence[str], ins: int, units: int, biases: Sequence[str]) -> dict[str, Shape]:
    """The canonical shapes of a recurrent layer's tensors, gate by gate."""
    each = {"kernel": (units, ins), "recurrent_kernel": (units, units), **dict.fromkeys(biases, (units,))}
    parts = [f".{gate}" for gate in gates] or [""]
    return {f"{role}{part}": shape for role, shape in each.items() for part in parts}


@st.composite
def _prelu(draw: st.DrawFn) -> LayerConfiguration:
    channels, sizes = draw(_small), draw(st.tuples(_small, _small))
    slopes = draw(st.sampled_from([(1,), (channels,)]))
    return LayerConfiguration("prelu", {}, {"slope": slopes}, (2, channels, *sizes), draw(_seeds))


_NUMBERS: Mapping[str, st.SearchStrategy[Any]] = {
    "slope": st.floats(0.01, 2.0),
    "alpha": st.floats(0.1, 2.0),
    "threshold": st.floats(0.1, 2.0),
    "low": st.floats(-2.0, 0.0),
    "high": st.floats(2.5, 5.0),  # above any threshold
    "axis": st.sampled_from([-1, 0]),
}


# a relu has the numbers that change it; with a slope alone it has a name of its own
_RELUS = ((), ("high",), ("threshold",), ("slope", "high"), ("slope", "threshold"), ("slope", "threshold", "high"))


@st.composite
def _activation(draw: st.DrawFn) -> LayerConfiguration:
    function = draw(st.sampled_from(sorted(ACTIVATIONS)))
    names = draw(st.sampled_from(_RELUS)) if function == "relu" else tuple(ACTIVATIONS[function].numbers)
    numbers = {name: draw(_NUMBERS[name]) for name in names}
    return LayerConfiguration("activation", {"function": function, **numbers}, {}, (4, 5), draw(_seeds))


@st.composite
def _pool(draw: st.DrawFn, kind: str) -> LayerConfiguration:
    axes = draw(st.integers(1, 3))
    window, stride, dilation = draw(_windows(axes))
    dilation = dilation if kind == "max_pool" else (1,) * axes
    padding = draw(_pool_paddings(window, stride, dilation))
    settings = {
        "window": window,
        "stride": stride,
        "padding": padding,
        "ceil": padding != "same" and draw(st.booleans()),
    }
    if kind == "max_pool":
        settings["dilation"] = dilation
    else:
        # by TensorFlow's rule what is padded never counts
        settings["count_include_pad"] = padding != "same" and draw(st.booleans())
    sizes = [(k - 1) * d + 1 + draw(st.integers(0, 5)) for k, d in zip(window, dilation, strict=True)]
    return LayerConfiguration(kind, settings, {}, (2, 3, *sizes), draw(_seeds))


def _pool_paddings(window: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> st.SearchStrategy[Any]:
    """As of convolutions, and no window without a place that is not padded."""
    totals = [(k - 1) * d for k, d in zip(window, dilation, strict=True)]
    keeping: Any = tuple((total // 2, total - total // 2) for total in totals) if max(stride) == 1 else "same"
    sides = [st.integers(0, k // 2) for k in window]
    pairs = [side.map(lambda n: (n, n)) | st.tuples(side, side) for side in sides]
    return st.just(((0, 0),) * len(window)) | st.just(keeping) | st.tuples(*pairs)


@st.composite
def _dropout(draw: st.DrawFn) -> LayerConfiguration:
    return LayerConfiguration("dropout", {"rate": draw(st.floats(0.1, 0.9))}, {}, (2, 3), draw(_seeds))


@st.composite
def _attention(draw: st.DrawFn) -> LayerConfiguration:
    heads, size = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    query, key, value = (draw(st.integers(1, 5)) for _ in range(3))
    shared, value_size, outs = 1, draw(st.integers(1, 3)), draw(st.integers(1, 5))
    how = draw(st.sampled_from(["one size", "own features of key and value", "own sizes", "fewer heads"]))
    if how != "own sizes":
        value_size, query, outs = size, heads * size, heads * size
    if how == "one size":
        key = value = query
    if how == "fewer heads":
        value_size, shared = size, draw(st.sampled_from([n for n in (1, 2, 3) if heads % n == 0]))
        value = query
    fewer = heads // shared
    shapes = attention_shapes(
        {"query": query, "key": key, "value": value, "output": heads * value_size},
        {"query": heads * size, "key": fewer * size, "value": fewer * value_size, "output": outs},
        bias=draw(st.booleans()),
    )
    lengths = draw(st.tuples(st.integers(2, 3), st.integers(1, 4), st.integers(1, 4)))
    return LayerConfiguration("attention", {"heads": heads}, shapes, lengths, draw(_seeds))


def attention_shapes(ins: Mapping[str, int], outs: Mapping[str, int], *, bias: bool) -> dict[str, Shape]:
    """The canonical shapes of the tensors of attention, part by part."""
    shapes: dict[str, Shape] = {}
    for part in ATTENTION:
        shapes[f"{part}.kernel"] = (outs[part], ins[part])
        if bias:
            shapes[f"{part}.bias"] = (outs[part],)
    return shapes


_CONFIGURATIONS: Mapping[str, Callable[[], st.SearchStrategy[LayerConfiguration]]] = {
    "linear": _linear,
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "rms_norm": _rms_norm,
    "embedding": _embedding,
    "lstm": _recurrent("lstm", LSTM_GATES),
    "gru": _recurrent("gru", GRU_GATES),
    "rnn": _recurrent("rnn", ()),
    "prelu": _prelu,
    "activation": _activation,
    "avg_pool": lambda: _pool("avg_pool"),
    "max_pool": lambda: _pool("max_pool"),
    "dropout": _dropout,
    "attention": _attention,
}
