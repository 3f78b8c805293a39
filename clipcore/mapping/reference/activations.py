"""Functions of single numbers or along one axis: fused into layers, as layers of their own, and with learned slopes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clipcore.mapping.reference.arrays import Array, Settings, Tensors, double, per_channel


@dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        function: an array, and the numbers by name, to an array.
        numbers: those numbers, with the values that Keras's function of that name has where none are given.
    """

    function: Callable[..., Array]
    numbers: Mapping[str, Any] = field(default_factory=dict)


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -x))


def _log_softmax(x: Array, axis: int) -> Array:
    shifted = x - x.max(axis, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis, keepdims=True))
    return result


def _relu(x: Array, slope: float, threshold: float, high: float) -> Array:
    return np.where(x > threshold, np.minimum(x, high), slope * (x - threshold)) + 0.0  # no negative zeros


def _elu(x: Array, alpha: float) -> Array:
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0.0)))


def _gelu_tanh(x: Array) -> Array:
    return np.asarray(x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2)


def _hard_sigmoid(x: Array) -> Array:
    return np.asarray(np.clip(x + 3, 0.0, 6.0) / 6)


def _threshold(x: Array, threshold: float, low: float) -> Array:
    return np.where(x > threshold, x, low)


# SELU's constants are those of Klambauer et al. 2017, arXiv:1706.02515
_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805
_AXIS = {"axis": -1}

# By Keras's names, where both frameworks have the function (hard_silu is torch's Hardswish, exponential its exp).
ACTIVATIONS: dict[str, Activation] = {
    # with the numbers of Keras's layer: from `threshold` up to `high` the identity, a slope below
    "relu": Activation(_relu, {"slope": 0.0, "threshold": 0.0, "high": math.inf}),
    "relu6": Activation(lambda x: np.clip(x, 0.0, 6.0)),
    # Maas et al. 2013; its slope is 0.2 in Keras's function, 0.3 in Keras's layer, 0.01 in torch
    "leaky_relu": Activation(lambda x, slope: np.where(x > 0, x, slope * x), {"slope": 0.2}),
    "elu": Activation(_elu, {"alpha": 1.0}),  # Clevert et al. 2015, arXiv:1511.07289
    "celu": Activation(lambda x, alpha: _elu(x / alpha, 1.0) * alpha, {"alpha": 1.0}),  # Barron 2017, arXiv:1704.07483
    "selu": Activation(lambda x: _SELU_SCALE * _elu(x, _SELU_ALPHA)),
    # Hendrycks and Gimpel 2016, arXiv:1606.08415: x times the normal distribution, and its approximation
    "gelu": Activation(lambda x: x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))) / 2),
    "gelu_tanh": Activation(_gelu_tanh),
    "silu": Activation(lambda x: x * _sigmoid(x)),
    "hard_silu": Activation(lambda x: x * _hard_sigmoid(x)),  # Howard et al. 2019, arXiv:1905.02244
    "mish": Activation(lambda x: x * np.tanh(np.logaddexp(0.0, x))),  # Misra 2019, arXiv:1908.08681
    "sigmoid": Activation(_sigmoid),
    "hard_sigmoid": Activation(_hard_sigmoid),
    "log_sigmoid": Activation(lambda x: -np.logaddexp(0.0, -x)),
    "tanh": Activation(np.tanh),
    "hard_tanh": Activation(lambda x, low, high: np.clip(x, low, high), {"low": -1.0, "high": 1.0}),
    "tanh_shrink": Activation(lambda x: x - np.tanh(x)),
    "hard_shrink": Activation(lambda x, threshold: np.where(np.abs(x) > threshold, x, 0.0), {"threshold": 0.5}),
    "soft_shrink": Activation(
        lambda x, threshold: np.sign(x) * np.maximum(np.abs(x) - threshold, 0.0), {"threshold": 0.5}
    ),
    # what is not above the threshold becomes `low`
    "threshold": Activation(_threshold, {"threshold": 0.0, "low": 0.0}),
    "softplus": Activation(lambda x: np.logaddexp(0.0, x)),
    "softsign": Activation(lambda x: x / (1 + np.abs(x))),
    "exponential": Activation(np.exp),
    "softmax": Activation(lambda x, axis: np.exp(_log_softmax(x, axis)), _AXIS),
    "log_softmax": Activation(_log_softmax, _AXIS),
}


def activate(x: Array, name: str | None, axis: int, **numbers: Any) -> Array:
    """The named activation of `x`; softmax runs along `axis`.

    >>> activate(np.array([-1.0, 2.0]), "relu", axis=-1)
    array([0., 2.])
    >>> activate(np.array([-1.0, 2.0]), "leaky_relu", axis=-1, slope=0.5)
    array([-0.5,  2. ])
    """
    if name is None:
        return x
    known = ACTIVATIONS[name]
    given = {"axis": axis, **numbers}
    numbers = {number: given.get(number, usual) for number, usual in known.numbers.items()}
    return known.function(x, **numbers)


def activation(x: Array, tensors: Tensors, settings: Settings) -> Array:
    """The function that the settings name, y = function(x), with the numbers that they give.

    >>> settings = {"function": "threshold", "threshold": 1.0, "low": -5.0}
    >>> activation(np.array([0.5, 1.0, 1.5]), {}, settings)
    array([-5. , -5. ,  1.5])
    """
    numbers = {name: value for name, value in settings.items() if name != "function"}
    return activate(double(x), settings["function"], **{**_AXIS, **numbers})


def prelu(x: Array, tensors: Tensors, settings: Settings) -> Array:
    """Per channel (axis 1): y = x where x > 0, else slope * x; one slope may stand for all channels.

    Args:
        x: (batch, channel, *spatial).
        tensors: slope (channel) or (1).
        settings: none.
    Source: He et al. 2015, arXiv:1502.01852, section 2.1.

    >>> prelu(np.array([[-2.0, -2.0], [3.0, 3.0]]), {"slope": np.array([0.5, 2.0])}, {})
    array([[-1., -4.],
           [ 3.,  3.]])
    """
    wide = double(x)
    return np.where(wide > 0, wide, per_channel(double(tensors["slope"]), wide.ndim) * wide)


def dropout(x: Array, tensors: Tensors, settings: Settings) -> Array:
    """Nothing is dropped in inference, and nothing scaled: y = x.

    Source: Srivastava et al. 2014, JMLR 15, in the form that scales in training ("inverted").

    >>> dropout(np.array([1.0, 2.0]), {}, {"rate": 0.5})
    array([1., 2.])
    """
    return double(x)
