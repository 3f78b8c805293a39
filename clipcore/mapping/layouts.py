"""Carrying a tensor from one layout to another: einops executes, this file composes and explains."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from einops import EinopsError

from clipcore.backend import Axes, Layer, Tensor
from clipcore.errors import MappingError
from clipcore.mapping.align import SAME, Arrangement, carried
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


def unit_axes(layer: Layer, role: str) -> Axes | None:
    """The axes of a stored tensor that run over the layer's units; () where it is one unit, None where its kind is
    unknown and it has more than one axis.

    >>> from clipcore.backend import Tensor
    >>> kernel = Tensor("conv/kernel", "kernel", "... in (group out)", (3, 3, 4, 8), "float32")
    >>> unit_axes(Layer("conv", "conv", {"kernel": kernel}), "kernel")
    (3,)
    """
    tensor = layer.tensors[role]
    kind = KINDS.get(layer.kind)
    if kind is None:
        return () if len(tensor.shape) <= 1 else None
    units = kind.units.get(role, "").split()
    before, _, after = tensor.layout.partition("...")
    axes = []
    for side, start in ((before, 0), (after, len(tensor.shape) - len(_stored_axes(after)))):
        names = _stored_axes(side)
        axes += [start + index for index, axis in enumerate(names) if set(re.findall(r"\w+", axis)) & set(units)]
    return tuple(axes)


def _stored_axes(layout: str) -> list[str]:
    """The axes of a layout as they are stored: a composed one, "(group out)", is one."""
    return re.findall(r"\([^)]*\)|\w+", layout)


def transformation(
    source: Layer, target: Layer, role: str, arrangement: Arrangement = SAME
) -> tuple[str, dict[str, int]]:
    """(pattern, sizes) that carry a role's tensor from the source's layout into the target's.

    Args:
        arrangement: how the target holds the layer's input; where it flattens a feature map in another order, the
            axis over the input's features follows.
    """
    before, after = source.tensors[role].layout, target.tensors[role].layout
    sizes = axis_sizes(source) | dict(arrangement.sizes)
    kind = KINDS.get(source.kind)
    axis = kind.features.get(role) if kind else None
    if axis and arrangement is not SAME:
        before, after = _following(before, after, axis, arrangement, len(source.tensors[role].shape))
    pattern = f"{before} -> {after}"
    return pattern, _used(pattern, sizes)


def _following(before: str, after: str, axis: str, arrangement: Arrangement, ndim: int) -> tuple[str, str]:
    """Two layouts of a tensor with `axis` in the order of the input's features."""
    if "(" in arrangement.source:
        ours, theirs = (side.removeprefix("... ") for side in (arrangement.source, arrangement.target))
    elif axis == "..." and ndim > 1:  # a norm over channels and places moves its channel axis with the data's
        ours, theirs = (side.removeprefix("batch ") for side in (arrangement.source, arrangement.target))
    else:
        return before, after
    return _replace(before, axis, ours), _replace(after, axis, theirs)


def _replace(layout: str, axis: str, axes: str) -> str:
    return " ".join(axes if name == axis else name for name in layout.split())


def _used(pattern: str, sizes: Mapping[str, int]) -> dict[str, int]:
    names = set(re.findall(r"\w+", pattern))
    return {axis: size for axis, size in sizes.items() if axis in names}


def apply_pattern(array: Array, pattern: str, sizes: Mapping[str, int], place: str) -> Array:
    """The array rearranged by an einops pattern (see `align.carried`), as a view where that is possible.

    Raises:
        MappingError: naming `place`, where the array's shape does not fit the pattern.
    """
    try:
        return carried(array, pattern, _used(pattern, sizes))
    except (EinopsError, KeyError) as err:
        raise MappingError(
            f"{place}: a tensor of shape {array.shape} does not fit {pattern!r} with {dict(sizes)}; "
            f"the layout that its backend declares must match the stored shape"
        ) from err


def stored(tensor: Tensor, layer: Layer, canonical: Array) -> Array:
    """A canonical array in the layout in which the tensor's framework stores it."""
    pattern = f"{canonical_layout(layer, tensor.role)} -> {tensor.layout}"
    return apply_pattern(canonical, pattern, axis_sizes(layer), tensor.name)
