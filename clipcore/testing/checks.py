"""What conformance asserts. Each function raises AssertionError with the values and the place, or returns nothing."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np

from clipcore.clipping import adaptive, examples, limits, policies, reference
from clipcore.clipping.policies import Policy
from clipcore.structure import leaves
from clipcore.testing.strategies import unit_axes

Array = np.ndarray[Any, np.dtype[Any]]

finfo: Any = ml_dtypes.finfo  # of every dtype that clipcore takes

_LARGEST = float(np.finfo(np.float64).max)
NORM_TOLERANCE = 1e-14  # relative: of norms, and of float64 results that are not bound to the bit
LAYER_TOLERANCE = 1e-5  # of a layer's outputs in float32, relative to the largest


# The definition of each policy. Its arguments are the policy's fields by their names, and what stands beside the
# gradients: `params`, and the `axes` that run over units. One that learns takes a state after the gradients.
DEFINITIONS: Mapping[type[Policy], Callable[..., tuple[Any, ...]]] = {
    policies.ClipByValue: reference.clip_by_value,
    policies.ClipByNorm: reference.clip_by_norm,
    policies.ClipByGlobalNorm: reference.clip_by_global_norm,
    policies.ClipByAverageNorm: reference.clip_by_average_norm,
    policies.ClipByBlockRMS: reference.clip_by_block_rms,
    policies.AdaptiveClip: reference.adaptive_clip,
    adaptive.AutoClip: reference.auto_clip,
    adaptive.ZClip: reference.zclip,
    adaptive.AdaGC: reference.adagc,
    adaptive.SpikeClip: reference.spike_clip,
    examples.PerExampleClip: reference.per_example_clip,
    examples.QuantileClip: reference.quantile_clip,
    limits.MaxNorm: reference.max_norm,
    limits.MinMaxNorm: reference.min_max_norm,
    limits.UnitNorm: reference.unit_norm,
    limits.SpectralLimit: reference.spectral_limit,
    limits.Box: reference.box,
}


def expected(
    policy: Policy, arrays: Sequence[Array], params: Sequence[Array] | None = None
) -> tuple[list[Array], float]:
    """What the reference says: (clipped, joint norm before clipping)."""
    clipped, norm = _define(policy, arrays, params=params)[:2]
    if isinstance(norm, float):
        return clipped, norm
    p = getattr(policy, "p", 2.0)
    return clipped, reference.clip_by_global_norm(arrays, math.inf, p, policy.nonfinite)[1]


def expected_step(policy: Policy, arrays: Sequence[Array | None], state: Any) -> tuple[list[Any], Any, Any]:
    """What the reference says of a step under an adaptive policy: (clipped, state, limit); the first state is []."""
    clipped, state, limit = _define(policy, arrays, state)
    return clipped, state, limit


def _define(policy: Policy, *leading: Any, params: Any = None) -> tuple[Any, ...]:
    definition = DEFINITIONS.get(type(policy))
    if definition is None:
        raise TypeError(f"clipcore.clipping.reference has no {type(policy).__name__}")
    known = {field.name: getattr(policy, field.name) for field in fields(policy)}
    own = list(inspect.signature(definition).parameters)[len(leading) :]
    known |= {"params": params, "axes": unit_axes(leading[0], known.get("unit_axis")) if "axes" in own else None}
    return definition(*leading, **{name: known[name] for name in own})


def is_exact(policy: Policy, arrays: Sequence[Array]) -> bool:
    """Whether the contract fixes every bit: all but float64 under a p other than 1, 2 and inf, or scaled by units."""
    by_units = isinstance(policy, policies.AdaptiveClip | limits.MinMaxNorm)
    inexact = by_units or getattr(policy, "p", 2.0) not in (1.0, 2.0, math.inf)
    return not (inexact and any(real_dtype(a) == np.float64 for a in arrays))


def real_dtype(array: Array) -> np.dtype[Any]:
    """The dtype of the array's numbers: of a complex array, that of its parts."""
    return array.real.dtype


def smallest_normal(array: Array) -> float:
    """The smallest number of the array's dtype that is not subnormal."""
    return float(finfo(real_dtype(array)).tiny)


def smallest_subnormal(array: Array) -> float:
    """The smallest positive number of the array's dtype."""
    return float(finfo(real_dtype(array)).smallest_subnormal)


def epsilon(array: Array) -> float:
    """One unit in the last place of 1 in the array's dtype."""
    return float(finfo(real_dtype(array)).eps)


def assert_same_bits(actual: Sequence[Array], wanted: Sequence[Array]) -> None:
    """Equal shapes, dtypes and bits; a NaN equals any NaN."""
    _assert_same_form(actual, wanted)
    for index, (a, w) in enumerate(zip(actual, wanted, strict=True)):
        for x, y in zip(_reals(a), _reals(w), strict=True):
            differ = (_bits(x) != _bits(y)) & ~(np.isnan(x) & np.isnan(y))
            _assert_none(differ, x, y, f"tensor {index}: the bits differ")


def assert_close(
    actual: Sequence[Array], wanted: Sequence[Array], *, relative: float | None = None, ulps: float = 1, absolute: float
) -> None:
    """Equal shapes and dtypes, NaN where NaN is wanted, and numbers within a tolerance.

    Args:
        actual, wanted: finite or not; infinities must be equal.
        relative: of the wanted value, for float64 in place of `ulps`.
        ulps: units in the last place of the wanted value.
        absolute: added to it, in the unit of the arrays.
    """
    _assert_same_form(actual, wanted)
    for index, (a, w) in enumerate(zip(actual, wanted, strict=True)):
        for x, y in zip(_reals(a), _reals(w), strict=True):
            with np.errstate(all="ignore"):
                wide_x, wide_y = x.astype(np.float64), y.astype(np.float64)
                unit = relative if relative is not None and x.dtype == np.float64 else ulps * epsilon(y)
                # of an infinite value any other is within a part of it
                near = np.isfinite(wide_y) & (np.abs(wide_x - wide_y) <= unit * np.abs(wide_y) + absolute)
            same = (wide_x == wide_y) | (np.isnan(wide_x) & np.isnan(wide_y))
            _assert_none(~(near | same), x, y, f"tensor {index}: off by more than {unit:g} relative + {absolute:g}")


def assert_between(actual: Sequence[Array], one: Sequence[Array], other: Sequence[Array]) -> None:
    """Every number lies between those of two results, which differ in the last digits of a limit: in most elements they
    are the same, and so is then every bit.
    """
    _assert_same_form(actual, one)
    for index, (a, x, y) in enumerate(zip(actual, one, other, strict=True)):
        for part, low, high in zip(_reals(a), _reals(x), _reals(y), strict=True):
            wide, ends = part.astype(np.float64), [end.astype(np.float64) for end in (low, high)]
            inside = (np.minimum(*ends) <= wide) & (wide <= np.maximum(*ends))
            signs = (np.signbit(part) == np.signbit(low)) | (wide != 0)
            _assert_none(~(inside & signs | np.isnan(wide) & np.isnan(ends[0])), part, low, f"tensor {index}: differs")


def assert_like_reference(
    actual: Sequence[Array], policy: Policy, inputs: Sequence[Array], params: Sequence[Array] | None = None
) -> None:
    """`actual` is what the reference makes of `inputs`: in every bit, or as near as the contract asks."""
    wanted, _ = expected(policy, inputs, params)
    if is_exact(policy, inputs):
        assert_same_bits(actual, wanted)
    else:
        assert_close(actual, wanted, relative=NORM_TOLERANCE, absolute=coarsest(smallest_subnormal, inputs))


def assert_norm(actual: Any, wanted: float, absolute: float = 0.0) -> None:
    """A reported norm (or factor): a number within 1e-14 of the wanted one; NaN and inf as wanted."""
    # what rounds to infinity is within 1e-14 of the largest number
    value, wanted = (
        _LARGEST if _LARGEST * (1 - NORM_TOLERANCE) <= x < math.inf else x for x in (float(actual), wanted)
    )
    if math.inf in (value, wanted) and _LARGEST in (value, wanted):
        return
    if math.isnan(wanted) or math.isinf(wanted) or math.isnan(value):
        assert value == wanted or (math.isnan(value) and math.isnan(wanted)), f"{value!r}, expected {wanted!r}"
        return
    # a norm below the smallest normal float64 has fewer digits
    tolerance = NORM_TOLERANCE * wanted + absolute + math.ulp(0.0)
    assert abs(value - wanted) <= tolerance, f"{value!r}, expected {wanted!r} within {tolerance:g}"


def assert_bounded(arrays: Sequence[Array], max_norm: float, p: float) -> None:
    """The exact norm of the arrays is at most `max_norm`, but for one rounding of each element."""
    _, norm = reference.clip_by_global_norm(arrays, math.inf, p)
    elements = sum(a.size for a in arrays)
    rounding = coarsest(epsilon, arrays) + 2.0**-52
    room = max_norm * (1 + rounding) + 2 * elements * coarsest(smallest_subnormal, arrays)
    assert norm <= room, f"the norm of the result is {norm!r}, over {max_norm!r} by more than one rounding"


def assert_within(arrays: Sequence[Array], limit: float) -> None:
    """The L2 norm of the arrays, as a real number, is at most `limit`."""
    squares = _sum_of_squares(arrays)
    assert limit == math.inf or squares <= Fraction(limit) ** 2, (
        f"what is stored has the norm {reference.clip_by_global_norm(arrays, math.inf)[1]!r}, over the bound {limit!r}"
    )


def _sum_of_squares(arrays: Sequence[Array]) -> Fraction:
    numbers = [x for a in arrays for part in _reals(a) for x in part.astype(np.float64).ravel().tolist()]
    return sum((Fraction(x) ** 2 for x in numbers), Fraction(0))


def assert_same_structure(actual: Any, wanted: Any) -> None:
    """The same lists, tuples and dicts with the same keys in the same order, and `None` in the same places."""
    assert _skeleton(actual) == _skeleton(wanted), f"the structure is {_skeleton(actual)}, expected {_skeleton(wanted)}"


def assert_same_objects(actual: Any, wanted: Any) -> None:
    """Every leaf is the very object, not a copy."""
    for (path, a), (_, w) in zip(leaves(actual), leaves(wanted), strict=True):
        assert a is w, f"grads{path} is a new object; in range the tensor itself comes back"


def assert_close_to_forward(actual: Any, wanted: Array) -> None:
    """A layer's output in float32 is the reference's, within the noise of float32."""
    output = np.asarray(actual).astype(np.float64)
    assert output.shape == wanted.shape, f"the output has shape {output.shape}, expected {wanted.shape}"
    largest = float(np.max(np.abs(wanted), initial=0.0))
    error = float(np.max(np.abs(output - wanted), initial=0.0))
    assert error <= LAYER_TOLERANCE * largest, (
        f"the output is off by {error:.2e} where its largest value is {largest:g}"
    )


def coarsest(measure: Any, arrays: Sequence[Array]) -> float:
    """The largest of a dtype's measure (`epsilon`, `smallest_normal` …) among the arrays; 0 for none."""
    return max((measure(a) for a in arrays), default=0.0)


def _assert_same_form(actual: Sequence[Array], wanted: Sequence[Array]) -> None:
    assert len(actual) == len(wanted), f"{len(actual)} tensors, expected {len(wanted)}"
    for index, (a, w) in enumerate(zip(actual, wanted, strict=True)):
        assert (a.shape, a.dtype) == (w.shape, w.dtype), (
            f"tensor {index} is {a.dtype}{a.shape}, expected {w.dtype}{w.shape}"
        )


def _assert_none(wrong: Array, actual: Array, wanted: Array, what: str) -> None:
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what} in {int(wrong.sum())} of {wrong.size} elements, first at {place}: "
            f"{actual[place]!r}, expected {wanted[place]!r} ({actual.dtype})"
        )


def _reals(array: Array) -> list[Array]:
    return [array.real, array.imag] if array.dtype.kind == "c" else [array]


def _bits(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(array.shape).view(f"u{array.dtype.itemsize}")


def _skeleton(tree: Any) -> Any:
    if tree is None:
        return "None"
    if isinstance(tree, dict):
        return type(tree).__name__, [(key, _skeleton(value)) for key, value in tree.items()]
    if isinstance(tree, list | tuple):
        return type(tree).__name__, [_skeleton(value) for value in tree]
    return "leaf"
