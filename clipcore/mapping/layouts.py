"""Carrying a tensor from one layout to another: einops executes, this file composes and explains."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from einops import EinopsError, rearrange

from clipcore.backend import Layer, Tensor
from clipcore.errors import MappingError
from clipcore.mapping.kinds import KINDS

Array = np.ndarray[Any, np.dtype[Any]]


def axis_sizes(layer: Layer) -> dict[str, int]:
    """Lengths of the axes that only a layer's settings tell (of a convolution: the groups)."""
    kind = KINDS.get(layer.kind)
    return {axis: int(layer.settings[setting]) for axis, setting in kind.sizes.items()} if kind else {}


def canonical_layout(layer: Layer, role: str) -> str:
    """The canonical axes of one role; of a layer of no known kind, the axes as they are."""
    kind = KINDS.get(layer.kind)
    return kind.roles[role] if kind else "..."


def canonical_shape(layer: Layer, role: str) -> tuple[int, ...]:
    """The shape that a layer's tensor has in the canonical layout.

    Raises:
        MappingError: the tensor's shape does not fit the layout that the backend declares for it.
    """
    tensor = layer.tensors[role]
    # one number with strides of 0 stands for the whole tensor, so that nothing is allocated
    stand_in = np.broadcast_to(np.zeros((), np.int8), tensor.shape)
    pattern = f"{tensor.layout} -> {canonical_layout(layer, role)}"
    shape: tuple[int, ...] = apply_pattern(stand_in, pattern, axis_sizes(layer), f"{layer.name}: {role}").shape
    return shape


def transformation(source: Layer, target: Layer, role: str) -> tuple[str, dict[str, int]]:
    """(pattern, sizes) that carry a role's tensor from the source's layout into the target's."""
    pattern = f"{source.tensors[role].layout} -> {target.tensors[role].layout}"
    return pattern, _used(pattern, axis_sizes(source))


def _used(pattern: str, sizes: Mapping[str, int]) -> dict[str, int]:
    names = set(re.findall(r"\w+", pattern))
    return {axis: size for axis, size in sizes.items() if axis in names}


def apply_pattern(array: Array, pattern: str, sizes: Mapping[str, int], place: str) -> Array:
    """The array rearranged by an einops pattern, as a view where that is possible.

    Raises:
        MappingError: naming `place`, where the array's shape does not fit the pattern.
    """
    try:
        # einops warns of axes that are named like a keyword of Python
        result: Array = rearrange(array, re.sub(r"\bin\b", "input", pattern), **_used(pattern, sizes))
    except EinopsError as err:
        raise MappingError(
            f"{place}: a tensor of shape {array.shape} does not fit {pattern!r} with {dict(sizes)}; "
            f"the layout that its backend declares must match the stored shape"
        ) from err
    return result


def stored(tensor: Tensor, layer: Layer, canonical: Array) -> Array:
    """A canonical array in the layout in which the tensor's framework stores it."""
    pattern = f"{canonical_layout(layer, tensor.role)} -> {tensor.layout}"
    return apply_pattern(canonical, pattern, axis_sizes(layer), tensor.name)
