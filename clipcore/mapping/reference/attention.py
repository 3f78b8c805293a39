"""Attention: four linear layers, and how values are weighed between them."""

from __future__ import annotations

import math

import numpy as np

from clipcore.mapping.reference.activations import activate
from clipcore.mapping.reference.arrays import Array, Settings, Tensors
from clipcore.mapping.reference.kernels import linear


def attention(x: tuple[Array, Array, Array], tensors: Tensors, settings: Settings) -> Array:
    """In each head: softmax(q k^T / sqrt(size of q)) v; the heads side by side, through the output's linear layer.

    q, k, v are what the linear layers query, key and value give, their features divided into heads (the head is the
    slower axis). Where key and value have fewer heads, as many neighbouring heads of the query share each.

    Args:
        x: (query, key, value), each (batch, time, features); key and value have one length.
        tensors: query.kernel (heads size, features), query.bias (heads size), and so on of key, value and output.
        settings: heads, of the query.
    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2; with fewer heads Ainslie et al. 2023, arXiv:2305.13245.

    >>> one = np.array([[1.0]])
    >>> tensors = {f"{part}.kernel": one for part in ("query", "key", "value", "output")}
    >>> x = (np.array([[[1.0]]]), np.array([[[0.0], [np.log(3.0)]]]), np.array([[[4.0], [8.0]]]))
    >>> attention(x, tensors, {"heads": 1})
    array([[[7.]]])
    """
    query, key, value = (
        linear(data, _part(tensors, name), {}) for data, name in zip(x, ("query", "key", "value"), strict=True)
    )
    heads = settings["heads"]
    size = query.shape[-1] // heads
    fewer = key.shape[-1] // size
    q = _divided(query, heads)
    k, v = (np.repeat(_divided(data, fewer), heads // fewer, axis=2) for data in (key, value))
    weights = activate(np.einsum("bqhs,bkhs->bhqk", q, k) / math.sqrt(size), "softmax", axis=-1)
    y = np.einsum("bhqk,bkhs->bqhs", weights, v)
    return linear(y.reshape(*y.shape[:2], -1), _part(tensors, "output"), {})


def _part(tensors: Tensors, name: str) -> Tensors:
    return {role.removeprefix(f"{name}."): array for role, array in tensors.items() if role.startswith(f"{name}.")}


def _divided(data: Array, heads: int) -> Array:
    return data.reshape(*data.shape[:-1], heads, -1)
