"""Which dtype holds what another held: bit for bit, or rounded on request."""

from __future__ import annotations

from typing import Any

import numpy as np

from clipcore.clipping.kernels import round_once
from clipcore.errors import InvalidInput, MigrationError
from clipcore.mapping.rows import numpy_dtype

Array = np.ndarray[Any, np.dtype[Any]]

_FLOATS = ("float16", "bfloat16", "float32", "float64")
TARGET = "target"


def check_dtype(dtype: str | None) -> None:
    """Refuse what is neither None, "target" nor a floating dtype's name."""
    if dtype is not None and dtype != TARGET and dtype not in _FLOATS:
        raise InvalidInput(f"dtype is {dtype!r}; expected None, {TARGET!r} or one of {', '.join(_FLOATS)}")


def converted(value: Array, held: str, dtype: str | None, place: str) -> tuple[Array, float]:
    """A value in the dtype that the target holds, and by how much that rounds it.

    Args:
        value: what moves.
        held: the target's dtype.
        dtype: None, where nothing may be rounded; "target", to round to what the target holds; or a floating dtype that
            everything floating is rounded to first.
        place: for a message, what moves where.
    Returns:
        (converted, the largest rounding error relative to the largest magnitude).
    Raises:
        MigrationError: the target's dtype would lose digits, overflow, or is of another nature (integers and 8-bit
            floats move as they are or not at all).
    """
    theirs = numpy_dtype(held)
    if value.dtype == theirs and dtype in (None, TARGET, held):
        return value, 0.0
    if _is_raw(value.dtype) or _is_raw(theirs):
        if value.dtype != theirs:
            raise MigrationError(
                f"{place}: {value.dtype.name} moves as it is or not at all, and the target holds {held}; nothing was "
                f"written: build both sides in one dtype, or write the tensor's true values into the source"
            )
        return value, 0.0
    wanted = numpy_dtype(dtype) if dtype in _FLOATS and _is_float(value.dtype) else value.dtype
    rounded = _rounded(value, wanted, place)
    if dtype == TARGET and _is_float(value.dtype) and _is_float(theirs):
        rounded = _rounded(value, theirs, place)
    result = rounded.astype(theirs, copy=False)
    if result.dtype != rounded.dtype and not _same(result, rounded):
        raise MigrationError(
            f"{place}: {rounded.dtype.name} would be rounded to {held}; nothing was written: build the target in "
            f"{rounded.dtype.name}, or ask for the rounding with dtype={TARGET!r}"
        )
    return result, _error(value, rounded) if rounded.dtype != value.dtype else 0.0


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.name in _FLOATS


def _is_raw(dtype: np.dtype[Any]) -> bool:
    """Whether numbers of a dtype mean nothing without a scale beside them: 8 bits and less."""
    return dtype.itemsize == 1 and dtype != np.bool_


def _rounded(value: Array, dtype: np.dtype[Any], place: str) -> Array:
    if value.dtype == dtype:
        return value
    rounded = round_once(np.ascontiguousarray(value, np.float64), dtype)
    if np.isinf(rounded).any() and not np.isinf(value.astype(np.float64)).any():
        largest = float(np.abs(value.astype(np.float64)).max())
        raise MigrationError(
            f"{place}: {largest:g} is beyond {dtype.name}; nothing was written: choose a wider dtype, or a limit"
        )
    return rounded


def _same(result: Array, value: Array) -> bool:
    """Whether a conversion kept every number."""
    back = result.astype(value.dtype)
    return bool(np.array_equal(back, value, equal_nan=value.dtype.kind in "fc"))


def _error(value: Array, rounded: Array) -> float:
    wide = value.astype(np.float64)
    largest = float(np.abs(wide).max(initial=0.0))
    return float(np.abs(rounded.astype(np.float64) - wide).max(initial=0.0)) / largest if largest else 0.0
