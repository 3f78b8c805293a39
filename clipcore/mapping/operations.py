"""What a plan does to values beyond rearranging them: each by name, in float64, with a formula that a reader can check.

An operation takes arrays in the layout in which they come to it and numbers by name; its result is rounded once, to the
dtype of the first array.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipcore.errors import MappingError

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        formula: what it computes, as a plan shows it.
        function: arrays and numbers to the result, in float64.
        numbers: the names of those.
    """

    formula: str
    function: Callable[..., Array]
    numbers: tuple[str, ...] = ()


def _weight_norm(direction: Array, magnitude: Array) -> Array:
    axes = [axis for axis, size in enumerate(magnitude.shape) if size == 1]
    return direction * (magnitude / _norm_over(direction, axes))


def _norm_over(array: Array, axes: Sequence[int]) -> Array:
    """The L2 norm over these axes, which stay, with one place each."""
    return np.asarray(np.sqrt(np.square(array).sum(tuple(axes), keepdims=True)))


def _spectral_norm(original: Array, u: Array, v: Array, axis: int = 0) -> Array:
    matrix = np.moveaxis(original, axis, 0).reshape(original.shape[axis], -1)
    return np.asarray(original / (u.ravel() @ matrix @ v.ravel()))


def _left_vector(kernel: Array, axis: int, shape: Sequence[int]) -> Array:
    matrix = np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1)
    return np.linalg.svd(matrix, full_matrices=False)[0][:, 0].reshape(shape)


def _right_vector(kernel: Array, axis: int, shape: Sequence[int]) -> Array:
    matrix = np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1)
    back = _left_vector(kernel, axis, [-1]) @ matrix
    return np.asarray(back / (back @ back)).reshape(shape)


def _rescaled(scale: Array, variance: Array, source_eps: float, target_eps: float) -> Array:
    return np.asarray(scale * np.sqrt((variance + target_eps) / (variance + source_eps)))


def _scale_for_eps(variance: Array, source_eps: float, target_eps: float) -> Array:
    return _rescaled(np.ones_like(variance), variance, source_eps, target_eps)


def _scaled(
    tensor: Array, scale: Array, variance: Array, source_eps: float, target_eps: float, axes: Sequence[int]
) -> Array:
    shape = [size if axis in axes else 1 for axis, size in enumerate(tensor.shape)]
    return tensor * _rescaled(scale, variance, source_eps, target_eps).reshape(shape)


def _scaled_mean(
    mean: Array,
    scale: Array,
    variance: Array,
    *biases: Array,
    source_eps: float,
    target_eps: float,
    less: Sequence[str],
) -> Array:
    further = dict(zip(less, biases, strict=True))
    scaled = _rescaled(scale, variance, source_eps, target_eps) * (mean - further.get("the bias before it", 0.0))
    return np.asarray(scaled - further.get("its own bias", 0.0) * np.sqrt(variance + target_eps))


def _mean_without_bias(mean: Array, variance: Array, scale: Array, bias: Array, *before: Array, eps: float) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        result = mean - sum(before) - np.where(bias == 0, 0.0, bias * np.sqrt(variance + eps) / scale)
    if not np.isfinite(result).all():
        raise MappingError(
            "a batch norm without bias cannot do what one with a bias and a scale of 0 does: build the target's layer "
            "with a bias"
        )
    return np.asarray(result)


def _moved_variance(variance: Array, source_eps: float, target_eps: float) -> Array:
    moved = variance + (source_eps - target_eps)
    if (moved < 0).any():
        raise MappingError(
            f"a running variance of {float(variance.min()):g} would become negative with the target's eps of "
            f"{target_eps:g}: build the target's layer with eps={source_eps:g}, or with a scale"
        )
    return np.asarray(moved)


def _block_diagonal(kernel: Array) -> Array:
    """(group, a, b, ...) to (1, group a, group b, ...), zeros between the groups."""
    groups, first, second, *window = kernel.shape
    whole = np.zeros((groups, first, groups, second, *window), kernel.dtype)
    for group in range(groups):
        whole[group, :, group] = kernel[group]
    return whole.reshape(1, groups * first, groups * second, *window)


def _diagonal_blocks(kernel: Array, groups: int) -> Array:
    """The inverse of `_block_diagonal`, of a kernel that is 0 between the groups."""
    _, first, second, *window = kernel.shape
    parts = kernel.reshape(groups, first // groups, groups, second // groups, *window)
    blocks = np.stack([parts[group, :, group] for group in range(groups)])
    if np.count_nonzero(blocks) != np.count_nonzero(kernel):
        raise MappingError(
            f"a dense kernel mixes what the target's {groups} groups keep apart: build the target without groups"
        )
    return blocks


def _the_one(values: Array) -> Array:
    if np.ptp(values):
        raise MappingError(
            f"{values.size} slopes from {values.min():g} to {values.max():g} do not fit into one: build the target's "
            f"layer with a slope per channel"
        )
    return values[..., :1]


_EPS = ("source_eps", "target_eps")

OPERATIONS: Mapping[str, Operation] = {
    "sum": Operation("{0} + {1}", lambda first, second: first + second),
    "repeat": Operation("{0} for each of {count}", lambda array, count: np.repeat(array, count, -1), ("count",)),
    "the_one": Operation("the one value of {0}", _the_one),
    "diagonal_blocks": Operation("the {groups} blocks on the diagonal of {0}", _diagonal_blocks, ("groups",)),
    "block_diagonal": Operation("{0}, its groups on the diagonal of a dense kernel", _block_diagonal),
    "weight_norm": Operation("{0} * {1} / norm({0})", _weight_norm),
    "norm": Operation("norm({0}) over the axes {axes}", _norm_over, ("axes",)),
    "spectral_norm": Operation("{0} / (u {0} v)", _spectral_norm, ("axis",)),
    "left_vector": Operation("u, the first left singular vector of {0}", _left_vector, ("axis", "shape")),
    "right_vector": Operation("v, of which u {0} v = 1", _right_vector, ("axis", "shape")),
    "rescaled": Operation("{0} * sqrt(({1} + {target_eps:g}) / ({1} + {source_eps:g}))", _rescaled, _EPS),
    "scale_for_eps": Operation("sqrt(({0} + {target_eps:g}) / ({0} + {source_eps:g}))", _scale_for_eps, _EPS),
    "moved_variance": Operation("{0} + {source_eps:g} - {target_eps:g}", _moved_variance, _EPS),
    "mean_of_biased": Operation("{0} - {1}", lambda mean, bias: mean - bias),
    "scaled": Operation("{0} * {1} * sqrt(({2} + {target_eps:g}) / ({2} + {source_eps:g}))", _scaled, (*_EPS, "axes")),
    "scaled_mean": Operation(
        "{0} * {1} * sqrt(({2} + {target_eps:g}) / ({2} + {source_eps:g})), less {less}",
        _scaled_mean,
        (*_EPS, "less"),
    ),
    "mean_without_bias": Operation("{0} - {3} * sqrt({1} + {eps:g}) / {2}", _mean_without_bias, ("eps",)),
}


def compute(name: str, arrays: Sequence[Array], numbers: Mapping[str, Any]) -> Array:
    """The operation's result, rounded once to the dtype of the first array."""
    from clipcore.clipping.kernels import round_once

    result = OPERATIONS[name].function(*(array.astype(np.float64) for array in arrays), **numbers)
    return np.asarray(round_once(np.ascontiguousarray(result), arrays[0].dtype))


def formula(name: str, names: Sequence[str], numbers: Mapping[str, Any]) -> str:
    """What the operation computes of the named tensors, for a reader."""
    shown = {key: " and ".join(map(str, n)) or "nothing" if isinstance(n, tuple) else n for key, n in numbers.items()}
    return OPERATIONS[name].formula.format(*names, **shown)
