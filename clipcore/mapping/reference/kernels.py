"""Layers with a kernel: linear, convolution, transposed convolution, embedding; and how a kernel may be made."""

from __future__ import annotations

from typing import Any

import numpy as np

from clipcore.mapping.reference.activations import activate
from clipcore.mapping.reference.arrays import Array, Settings, Tensors, double, optional, per_channel
from clipcore.mapping.reference.windows import paddings, reaches, taps

_PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def kernel_of(tensors: Tensors, settings: Settings) -> Array:
    """A layer's kernel: as it is, or made of the tensors that a reparametrised layer has in its place.

    Weight norm: kernel.direction * kernel.magnitude / norm(kernel.direction), the L2 norm over the axes on which the
    magnitude has one place. Spectral norm: kernel.original / (u kernel.original v), the original as a matrix whose rows
    are its axis settings["spectral_axis"]; a convolution's axes of group and what follows it count as one.

    Source: Salimans and Kingma 2016, arXiv:1602.07868, equation 2; Miyato et al. 2018, arXiv:1802.05957, equation 8
    and algorithm 1.

    >>> direction, magnitude = np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([[10.0], [1.0]])
    >>> kernel_of({"kernel.direction": direction, "kernel.magnitude": magnitude}, {})
    array([[6., 8.],
           [0., 1.]])
    >>> tensors = {"kernel.original": direction, "kernel.u": np.array([1.0, 0.0]), "kernel.v": np.array([0.0, 1.0])}
    >>> kernel_of(tensors, {"spectral_axis": 0})
    array([[0.75, 1.  ],
           [0.  , 0.5 ]])
    """
    if "kernel.direction" in tensors:
        direction, magnitude = double(tensors["kernel.direction"]), double(tensors["kernel.magnitude"])
        axes = tuple(axis for axis, size in enumerate(magnitude.shape) if size == 1)
        return np.asarray(direction * magnitude / np.sqrt(np.square(direction).sum(axes, keepdims=True)))
    if "kernel.original" in tensors:
        original, u, v = (double(tensors[f"kernel.{part}"]) for part in ("original", "u", "v"))
        return np.asarray(original / (u.ravel() @ _matrix(original, settings["spectral_axis"]) @ v.ravel()))
    return double(tensors["kernel"])


def _matrix(kernel: Array, axis: int) -> Array:
    joined = kernel if kernel.ndim == 2 else kernel.reshape(-1, *kernel.shape[2:])
    return np.moveaxis(joined, axis, 0).reshape(joined.shape[axis], -1)


def linear(x: Array, tensors: Tensors, settings: Settings) -> Array:
    """y[..., o] = sum over i of x[..., i] * kernel[o, i], plus bias[o].

    >>> linear(np.array([[1.0, 2.0]]), {"kernel": np.array([[3.0, 4.0]]), "bias": np.array([5.0])}, {})
    array([[16.]])
    """
    kernel = kernel_of(tensors, settings)
    y = np.einsum("...i,oi->...o", double(x), kernel) + optional(tensors, "bias", 0.0)
    return activate(y, settings.get("activation"), axis=-1)


def conv(x: Array, tensors: Tensors, settings: Settings) -> Array:
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
    kernel = kernel_of(tensors, settings)
    groups, outs, ins, *window = kernel.shape
    stride, dilation = settings["stride"], settings["dilation"]
    pads = paddings(settings["padding"], x.shape[2:], window, stride, dilation)
    mode: Any = _PAD_MODES[settings["padding_mode"]]
    padded = np.pad(double(x), [(0, 0), (0, 0), *pads], mode=mode)
    batch, _, *sizes = padded.shape
    grouped = padded.reshape(batch, groups, ins, *sizes)
    counts = [(size - r) // s + 1 for size, r, s in zip(sizes, reaches(window, dilation), stride, strict=True)]
    y = np.zeros((batch, groups, outs, *counts))
    for tap, places in taps(window, stride, dilation, counts):
        y += np.einsum("ngi...,goi->ngo...", grouped[places], kernel[tap])
    return _finished(y, tensors, settings)


def conv_transpose(x: Array, tensors: Tensors, settings: Settings) -> Array:
    """In groups: each x[n, g i, q] kernel[g, i, o, k] is added to y[n, g o, q stride + k dilation]; then y is cropped,
    and bias[g o] added. It is the transpose of the linear map that `conv` is; the kernel is not flipped.

    Args:
        x: (batch, group in, *spatial), with as many spatial axes as the kernel.
        tensors: kernel (group, in, out, *window), bias (group out).
        settings: stride, crop (before, after per spatial axis; negative where zeros are added), dilation, groups,
            activation.
    Source: Dumoulin and Visin 2016, arXiv:1603.07285, chapter 4.

    >>> kernel = np.array([1.0, 10.0]).reshape(1, 1, 1, 2)
    >>> settings = {"stride": (1,), "crop": ((0, -1),), "dilation": (1,), "groups": 1}
    >>> conv_transpose(np.array([[[1.0, 2.0]]]), {"kernel": kernel, "bias": np.array([0.5])}, settings)
    array([[[ 1.5, 12.5, 20.5,  0.5]]])
    """
    kernel = kernel_of(tensors, settings)
    groups, ins, outs, *window = kernel.shape
    stride, dilation = settings["stride"], settings["dilation"]
    batch, _, *counts = x.shape
    grouped = double(x).reshape(batch, groups, ins, *counts)
    sizes = [(c - 1) * s + r for c, s, r in zip(counts, stride, reaches(window, dilation), strict=True)]
    whole = np.zeros((batch, groups, outs, *sizes))
    for tap, places in taps(window, stride, dilation, counts):
        whole[places] += np.einsum("ngi...,gio->ngo...", grouped, kernel[tap])
    return _finished(_cropped(whole, settings["crop"]), tensors, settings)


def _cropped(whole: Array, crop: Any) -> Array:
    added = [(max(-before, 0), max(-after, 0)) for before, after in crop]
    wide = np.pad(whole, [(0, 0)] * 3 + added)
    kept: Any = [slice(max(b, 0), size - max(a, 0)) for (b, a), size in zip(crop, wide.shape[3:], strict=True)]
    return wide[(..., *kept)]


def _finished(y: Array, tensors: Tensors, settings: Settings) -> Array:
    """The groups' channels side by side, plus the bias, activated."""
    batch, groups, outs, *counts = y.shape
    joined = y.reshape(batch, groups * outs, *counts)
    joined = joined + per_channel(optional(tensors, "bias", 0.0), joined.ndim)
    return activate(joined, settings.get("activation"), axis=1)


def embedding(x: Array, tensors: Tensors, settings: Settings) -> Array:
    """y[..., :] = kernel[x[...], :], the rows that the integers name.

    >>> embedding(np.array([1, 0]), {"kernel": np.array([[1.0], [2.0]])}, {})
    array([[2.],
           [1.]])
    """
    return double(tensors["kernel"])[np.asarray(x).astype(np.int64)]
