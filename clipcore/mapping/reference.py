"""What each kind of layer computes, in float64, written from the definitions: slow, and always right.

Data has the channel axis first, (batch, channel, *spatial); linear and layer norm act on the last axes. Tensors are in
the canonical layouts of `clipcore.mapping.kinds`, settings by the names that stand there. It imports NumPy alone and
shares no line with the code that moves weights: agreement between the two is evidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Forward = Callable[[Array, Mapping[str, Array], Mapping[str, Any]], Array]

_PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def linear(x: Array, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Array:
    """y[..., o] = sum over i of x[..., i] * kernel[o, i], plus bias[o].

    >>> linear(np.array([[1.0, 2.0]]), {"kernel": np.array([[3.0, 4.0]]), "bias": np.array([5.0])}, {})
    array([[16.]])
    """
    kernel = _double(tensors["kernel"])
    y = np.einsum("...i,oi->...o", _double(x), kernel) + _optional(tensors, "bias", 0.0)
    return activate(y, settings.get("activation"), axis=-1)


def conv(x: Array, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Array:
    """In groups: y[n, g o, q] = sum over i, k of x[n, g i, q stride + k dilation] kernel[g, o, i, k], plus bias[g o].

    Args:
        x: (batch, group in, *spatial), with as many spatial axes as the kernel.
        tensors: kernel (group, out, in, *window), bias (group out).
        settings: stride, padding, padding_mode, dilation, groups, activation.

    >>> kernel = np.array([1.0, 10.0]).reshape(1, 1, 1, 2)
    >>> settings = {"stride": (1,), "padding": ((1, 0),), "padding_mode": "zeros", "dilation": (1,), "groups": 1}
    >>> conv(np.array([[[1.0, 2.0, 3.0]]]), {"kernel": kernel}, settings)
    array([[[10., 21., 32.]]])
    """
    kernel = _double(tensors["kernel"])
    groups, outs, ins, *window = kernel.shape
    stride, dilation = settings["stride"], settings["dilation"]
    pads = paddings(settings["padding"], x.shape[2:], window, stride, dilation)
    mode: Any = _PAD_MODES[settings["padding_mode"]]
    padded = np.pad(_double(x), [(0, 0), (0, 0), *pads], mode=mode)
    batch, _, *sizes = padded.shape
    grouped = padded.reshape(batch, groups, ins, *sizes)
    reach = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    counts = [(size - r) // s + 1 for size, r, s in zip(sizes, reach, stride, strict=True)]
    y = np.zeros((batch, groups, outs, *counts))
    for tap in np.ndindex(*window):
        starts = [k * d for k, d in zip(tap, dilation, strict=True)]
        seen: Any = [slice(at, at + s * (c - 1) + 1, s) for at, s, c in zip(starts, stride, counts, strict=True)]
        weights: Any = (..., *tap)
        y += np.einsum("ngi...,goi->ngo...", grouped[:, :, :, *seen], kernel[weights])
    y = y.reshape(batch, groups * outs, *counts) + _per_channel(_optional(tensors, "bias", 0.0), y.ndim - 1)
    return activate(y, settings.get("activation"), axis=1)


def paddings(
    padding: Any, sizes: Sequence[int], window: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """(before, after) per spatial axis; of "same", as TensorFlow defines it, with the odd one after.

    >>> paddings("same", [4], [3], [2], [1]), paddings("same", [5], [3], [2], [1])
    ([(0, 1)], [(1, 1)])
    """
    if padding != "same":
        return [(int(before), int(after)) for before, after in padding]
    totals = [
        max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
        for size, k, s, d in zip(sizes, window, stride, dilation, strict=True)
    ]
    return [(total // 2, total - total // 2) for total in totals]


def batch_norm(x: Array, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Array:
    """Per channel (axis 1): y = (x - running_mean) / sqrt(running_var + eps) * scale + bias.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167, in inference.

    >>> tensors = {"running_mean": np.array([1.0]), "running_var": np.array([3.0]), "scale": np.array([10.0])}
    >>> batch_norm(np.array([[3.0]]), tensors, {"eps": 1.0})
    array([[10.]])
    """
    mean, variance, scale, bias = (
        _per_channel(_optional(tensors, role, default), x.ndim)
        for role, default in (("running_mean", 0.0), ("running_var", 1.0), ("scale", 1.0), ("bias", 0.0))
    )
    result: Array = (_double(x) - mean) / np.sqrt(variance + settings["eps"]) * scale + bias
    return result


def layer_norm(x: Array, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Array:
    """Over the axes that scale and bias have: y = (x - mean) / sqrt(variance + eps) * scale + bias.

    Mean and variance are those of the data over these axes; without scale and bias, over the last one.
    Source: Ba et al. 2016, arXiv:1607.06450.

    >>> layer_norm(np.array([[1.0, 3.0]]), {"scale": np.array([2.0, 2.0])}, {"eps": 3.0})
    array([[-1.,  1.]])
    """
    scale, bias = _optional(tensors, "scale", 1.0), _optional(tensors, "bias", 0.0)
    axes = tuple(range(-max(scale.ndim, bias.ndim, 1), 0))
    wide = _double(x)
    centred = wide - wide.mean(axes, keepdims=True)
    variance = np.square(centred).mean(axes, keepdims=True)
    result: Array = centred / np.sqrt(variance + settings["eps"]) * scale + bias
    return result


def embedding(x: Array, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Array:
    """y[..., :] = kernel[x[...], :], the rows that the integers name.

    >>> embedding(np.array([1, 0]), {"kernel": np.array([[1.0], [2.0]])}, {})
    array([[2.],
           [1.]])
    """
    return _double(tensors["kernel"])[np.asarray(x).astype(np.int64)]


FORWARD: dict[str, Forward] = {
    "linear": linear,
    "conv": conv,
    "batch_norm": batch_norm,
    "layer_norm": layer_norm,
    "embedding": embedding,
}


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -x))


def _log_softmax(x: Array, axis: int) -> Array:
    shifted = x - x.max(axis, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis, keepdims=True))
    return result


# SELU's constants are those of Klambauer et al. 2017, arXiv:1706.02515
_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805

# name -> what it does to an array whose channel axis is `axis`
ACTIVATIONS: dict[str, Callable[[Array, int], Array]] = {
    "relu": lambda x, axis: np.maximum(x, 0.0),
    "relu6": lambda x, axis: np.clip(x, 0.0, 6.0),
    "elu": lambda x, axis: np.where(x > 0, x, np.expm1(np.minimum(x, 0.0))),
    "selu": lambda x, axis: _SELU_SCALE * np.where(x > 0, x, _SELU_ALPHA * np.expm1(np.minimum(x, 0.0))),
    "gelu": lambda x, axis: x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))) / 2,
    "silu": lambda x, axis: x * _sigmoid(x),
    "mish": lambda x, axis: x * np.tanh(np.logaddexp(0.0, x)),
    "sigmoid": lambda x, axis: _sigmoid(x),
    "hard_sigmoid": lambda x, axis: np.clip(x + 3, 0.0, 6.0) / 6,
    "tanh": lambda x, axis: np.tanh(x),
    "softplus": lambda x, axis: np.logaddexp(0.0, x),
    "softsign": lambda x, axis: x / (1 + np.abs(x)),
    "exponential": lambda x, axis: np.exp(x),
    "softmax": lambda x, axis: np.exp(_log_softmax(x, axis)),
    "log_softmax": _log_softmax,
}


def activate(x: Array, name: str | None, axis: int) -> Array:
    """The named activation of `x`; softmax runs along `axis`.

    >>> activate(np.array([-1.0, 2.0]), "relu", axis=-1)
    array([0., 2.])
    """
    return x if name is None else ACTIVATIONS[name](x, axis)


def _double(array: Array) -> Array:
    return np.asarray(array).astype(np.float64)


def _optional(tensors: Mapping[str, Array], role: str, default: float) -> Array:
    return _double(tensors[role]) if role in tensors else np.array(default)


def _per_channel(values: Array, ndim: int) -> Array:
    """One value per channel, shaped to stand on axis 1 of `ndim` axes."""
    return values.reshape(-1, *[1] * (ndim - 2)) if values.ndim else values
