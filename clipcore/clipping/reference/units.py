"""Bounds on the units of a layer: what feeds one output of it, wherever its layout has it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from clipcore.clipping.reference.arithmetic import (
    LARGEST,
    UNBOUNDED,
    Array,
    clip_finite,
    faults,
    filled,
    hold,
    norm_of,
    not_finite,
    round_to,
    scaled,
    to_float,
)
from clipcore.clipping.reference.norms import clip_by_value

Axes = tuple[int, ...]


def adaptive_clip(
    tensors: Sequence[Array],
    params: Sequence[Array],
    axes: Sequence[Axes],
    clipping: float = 0.01,
    eps: float = 1e-3,
    nonfinite: str = "propagate",
) -> tuple[list[Array], list[float]]:
    """Shrink the gradient of each unit relative to the norm of the unit's weights.

    Per unit: as `clip_by_norm` to limit = clipping * max(||w||_2, eps), the norm rounded to float64,
    the largest where it is beyond, and so is their product.

    Args:
        tensors: gradients; not modified.
        params: the weights beside them, of the same shapes.
        axes: of each tensor, those that run over its units; () where it is one unit.
        clipping, eps: see the formula.
        nonfinite: as for `clip_by_global_norm`.
    Returns:
        (clipped, norms): one norm per unit, tensor by tensor, in the order of `axes`.
    Source: Brock et al. 2021, arXiv:2102.06171, section 4.1.

    >>> grads, params = np.array([[3.0, 4.0], [0.0, 0.1]]), np.array([[6.0, 8.0], [1.0, 0.0]])
    >>> adaptive_clip([grads], [params], [(0,)], 0.25)[0][0].tolist()
    [[1.5, 2.0], [0.0, 0.1]]
    """
    weights = [[param[place] for place in _units(param, own)] for param, own in zip(params, axes, strict=True)]

    def bound(unit: Array, tensor: int, place: int) -> Array:
        weight = min(to_float(norm_of([weights[tensor][place]], 2.0)), LARGEST["float64"])
        return clip_finite([unit], clipping * max(weight, eps), 2.0)[0][0]

    return _by_unit(tensors, axes, bound, nonfinite)


def max_norm(
    tensors: Sequence[Array], axes: Sequence[Axes], max_norm: float, nonfinite: str = "propagate"
) -> tuple[list[Array], list[float]]:
    """Shrink each unit so that the L2 norm of what is stored is at most `max_norm`, by the largest factor that does.

    Args:
        tensors: weights; not modified.
        axes: of each tensor, those that run over its units; one without any is left as it is.
        max_norm: >= 0. The bound is one of real arithmetic: the sum of the stored elements' squares is at most its
            square.
        nonfinite: as for `clip_by_global_norm`.
    Returns:
        (limited, norms): one norm per unit, before.
    Source: Srivastava et al. 2014, JMLR 15, section 5.1.

    >>> max_norm([np.array([[3.0, 4.0], [0.0, 1.0]])], [(0,)], 2.5)[0][0].tolist()
    [[1.5, 2.0], [0.0, 1.0]]
    """
    return _by_unit(tensors, axes, lambda unit, i, _: hold([unit], max_norm)[0] if axes[i] else unit, nonfinite)


def min_max_norm(
    tensors: Sequence[Array], axes: Sequence[Axes], min_norm: float, max_norm: float, nonfinite: str = "propagate"
) -> tuple[list[Array], list[float]]:
    """Scale each unit so that its L2 norm lies in [min_norm, max_norm]; zeros stay zeros. See `max_norm`.

    Per unit: * max_norm / norm where norm > max_norm, * min_norm / norm where 0 < norm < min_norm, multiplied as in
    `clip_by_global_norm`; in float64 also where the factor is beyond float32.

    >>> min_max_norm([np.array([[3.0, 4.0], [0.0, 0.5], [0.0, 0.0]])], [(0,)], 1.0, 2.5)[0][0].tolist()
    [[1.5, 2.0], [0.0, 1.0], [0.0, 0.0]]
    """

    def bound(unit: Array, tensor: int, place: int) -> Array:
        norm = norm_of([unit], 2.0)
        if not axes[tensor] or not 0 < norm < Fraction(min_norm):
            return clip_finite([unit], max_norm if axes[tensor] else math.inf, 2.0)[0][0]
        return scaled(unit, round_to(Fraction(min_norm) / norm, 53, UNBOUNDED))

    return _by_unit(tensors, axes, bound, nonfinite)


def unit_norm(
    tensors: Sequence[Array], axes: Sequence[Axes], nonfinite: str = "propagate"
) -> tuple[list[Array], list[float]]:
    """Scale each unit to an L2 norm of 1; see `min_max_norm`.

    >>> unit_norm([np.array([[3.0, 4.0], [0.0, 0.5]])], [(0,)])[0]
    [array([[0.6, 0.8],
           [0. , 1. ]])]
    """
    return min_max_norm(tensors, axes, 1.0, 1.0, nonfinite)


def spectral_limit(
    tensors: Sequence[Array], axes: Sequence[Axes], max_norm: float, nonfinite: str = "propagate"
) -> tuple[list[Array], list[float]]:
    """Shrink each tensor, as a matrix of units by what feeds them, so that its largest singular value is in bounds.

    W * min(1, max_norm / sigma_1), multiplied as in `clip_by_global_norm`; the singular value is float64's. What is
    stored may be over the bound by one rounding: a policy that promises it takes a factor that is a little smaller.

    Args:
        tensors, axes, nonfinite: as for `max_norm`.
        max_norm: >= 0.
    Returns:
        (limited, singular values): the largest one of each tensor that has units.
    Source: Yoshida and Miyato 2017, arXiv:1705.10941.

    >>> spectral_limit([np.diag([4.0, 1.0])], [(0,)], 2.0)
    ([array([[2. , 0. ],
           [0. , 0.5]])], [4.0])
    """
    tensors, verdict = faults(tensors, nonfinite, not_finite)
    if verdict is not None:
        return [filled(t, verdict) for t in tensors], [math.nan for own in axes if own]
    values = [_singular_value(t, own) if own else Fraction(0) for t, own in zip(tensors, axes, strict=True)]
    limited = [
        t
        if max_norm == math.inf or value <= Fraction(max_norm)
        else scaled(t, round_to(Fraction(max_norm) / value, 53, UNBOUNDED))
        for t, value in zip(tensors, values, strict=True)
    ]
    return limited, [to_float(value) for value, own in zip(values, axes, strict=True) if own]


def box(
    tensors: Sequence[Array], min_value: float, max_value: float, nonfinite: str = "propagate"
) -> tuple[list[Array], float]:
    """Hold every weight in [min_value, max_value]: `clip_by_value`.

    Source: Arjovsky et al. 2017, arXiv:1701.07875, algorithm 1.

    >>> box([np.array([-3.0, 0.2])], -0.5, 0.5)[0]
    [array([-0.5,  0.2])]
    """
    return clip_by_value(tensors, min_value, max_value, nonfinite)


def _units(tensor: Array, axes: Axes) -> list[tuple[Any, ...]]:
    """What each unit is indexed by."""
    steps = [
        [slice(i, i + 1) for i in range(size)] if axis in axes else [slice(None)]
        for axis, size in enumerate(tensor.shape)
    ]
    order = list(axes) + [axis for axis in range(tensor.ndim) if axis not in axes]
    places = itertools.product(*(steps[axis] for axis in order))
    return [tuple(place[order.index(axis)] for axis in range(tensor.ndim)) for place in places]


def _by_unit(
    tensors: Sequence[Array], axes: Sequence[Axes], bound: Callable[[Array, int, int], Array], nonfinite: str
) -> tuple[list[Array], list[float]]:
    """Each unit bounded by itself; a tensor of which no unit changes is the same object."""
    tensors, verdict = faults(tensors, nonfinite, not_finite)
    units = [_units(tensor, own) for tensor, own in zip(tensors, axes, strict=True)]
    if verdict is not None:
        return [filled(t, verdict) for t in tensors], [math.nan for own in units for _ in own]
    results, norms = [], []
    for index, tensor in enumerate(tensors):
        result = tensor
        for number, place in enumerate(units[index]):
            unit = tensor[place]
            norms.append(to_float(norm_of([unit], 2.0)))
            bounded = bound(unit, index, number)
            if bounded is not unit:
                result = tensor.copy() if result is tensor else result
                result[place] = bounded
        results.append(result)
    return results, norms


def _singular_value(tensor: Array, axes: Axes) -> Fraction:
    rows = [tensor[place].ravel() for place in _units(tensor, axes)]
    if not tensor.any():
        return Fraction(0)
    matrix = np.array(rows, np.complex128 if tensor.dtype.kind == "c" else np.float64)
    peak = max(max(abs(z.real), abs(z.imag)) for z in matrix.ravel().tolist())
    exponent = math.frexp(peak)[1]
    parts = [np.ldexp(part, -exponent) for part in (matrix.real, matrix.imag)]
    largest = np.linalg.svd(parts[0] + 1j * parts[1], compute_uv=False)[0]
    return Fraction(float(largest)) * Fraction(2) ** exponent
