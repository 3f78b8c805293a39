"""Layers that bring their data to one mean and deviation."""

from __future__ import annotations

import numpy as np

from clipcore.mapping.reference.arrays import Array, Settings, Tensors, double, optional, per_channel


def batch_norm(x: Array, tensors: Tensors, settings: Settings) -> Array:
    """Per channel (axis 1): y = (x - running_mean) / sqrt(running_var + eps) * scale + bias.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167, in inference.

    >>> tensors = {"running_mean": np.array([1.0]), "running_var": np.array([3.0]), "scale": np.array([10.0])}
    >>> batch_norm(np.array([[3.0]]), tensors, {"eps": 1.0})
    array([[10.]])
    """
    mean, variance, scale, bias = (
        per_channel(optional(tensors, role, default), x.ndim)
        for role, default in (("running_mean", 0.0), ("running_var", 1.0), ("scale", 1.0), ("bias", 0.0))
    )
    result: Array = (double(x) - mean) / np.sqrt(variance + settings["eps"]) * scale + bias
    return result


def layer_norm(x: Array, tensors: Tensors, settings: Settings) -> Array:
    """Over the axes that scale and bias have: y = (x - mean) / sqrt(variance + eps) * scale + bias.

    Mean and variance are those of the data over these axes; without scale and bias, over the last one.
    Source: Ba et al. 2016, arXiv:1607.06450.

    >>> layer_norm(np.array([[1.0, 3.0]]), {"scale": np.array([2.0, 2.0])}, {"eps": 3.0})
    array([[-1.,  1.]])
    """
    scale, bias = optional(tensors, "scale", 1.0), optional(tensors, "bias", 0.0)
    axes = tuple(range(-max(scale.ndim, bias.ndim, 1), 0))
    return np.asarray(_standardised(double(x), axes, settings["eps"]) * scale + bias)


def group_norm(x: Array, tensors: Tensors, settings: Settings) -> Array:
    """In each of `groups` groups of channels of one example: y = (x - mean) / sqrt(variance + eps) * scale + bias.

    Mean and variance are over the group's channels and places; scale and bias are per channel (axis 1).

    Args:
        x: (batch, channel, *spatial).
        tensors: scale (channel), bias (channel).
        settings: groups, eps.
    Source: Wu and He 2018, arXiv:1803.08494; with as many groups as channels Ulyanov et al. 2016, arXiv:1607.08022.

    >>> x = np.array([[1.0, 3.0, 5.0, 9.0]])
    >>> group_norm(x, {"scale": np.array([1.0, 1.0, 1.0, 10.0])}, {"groups": 2, "eps": 0.0})
    array([[-1.,  1., -1., 10.]])
    """
    grouped = double(x).reshape(len(x), settings["groups"], -1)
    y = _standardised(grouped, (-1,), settings["eps"]).reshape(x.shape)
    scale, bias = (per_channel(optional(tensors, role, value), x.ndim) for role, value in (("scale", 1.0), ("bias", 0)))
    return np.asarray(y * scale + bias)


def rms_norm(x: Array, tensors: Tensors, settings: Settings) -> Array:
    """Over the axes that scale has: y = x / sqrt(mean(x ** 2) + eps) * scale.

    Args:
        x: (..., *normalised).
        tensors: scale (*normalised).
        settings: eps.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467, with eps under the root.

    >>> rms_norm(np.array([[1.0, 7.0]]), {"scale": np.array([2.0, 1.0])}, {"eps": 24.0})
    array([[0.28571429, 1.        ]])
    """
    scale, wide = double(tensors["scale"]), double(x)
    axes = tuple(range(-max(scale.ndim, 1), 0))
    return np.asarray(wide / np.sqrt(np.square(wide).mean(axes, keepdims=True) + settings["eps"]) * scale)


def _standardised(x: Array, axes: tuple[int, ...], eps: float) -> Array:
    """The data less its mean, divided by its deviation: of the variance that divides by the number of elements."""
    centred = x - x.mean(axes, keepdims=True)
    return np.asarray(centred / np.sqrt(np.square(centred).mean(axes, keepdims=True) + eps))
