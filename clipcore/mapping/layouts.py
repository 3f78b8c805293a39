"""Carrying a tensor from one layout to another: einops executes, this file composes and explains."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from einops import EinopsError

from clipcore.backend import Axes, Layer, Tensor
from clipcore.errors import MappingError
from clipcore.mapping.align import SAME, Arrangement, carried
from clipcore.mapping.kinds import kind_of

Array = np.ndarray[Any, np.dtype[Any]]


def axis_sizes(layer: Layer) -> dict[str, int]:
    """Lengths of the axes that only a layer's settings tell (of a convolution: the groups)."""
    kind = kind_of(layer.kind)
    return {axis: int(layer.settings[setting]) for axis, setting in kind.sizes.items()} if kind else {}


def sizes_of(layer: Layer, tensor: Tensor) -> dict[str, int]:
    """The same, and those of the numbered axes in which a tensor stores one canonical axis."""
    numbered = {}
    if _NUMBERED.search(tensor.layout):
        numbered = {
            axis: size for axis, size in zip(tensor.layout.split(), tensor.shape, strict=True) if _NUMBERED.match(axis)
        }
    return axis_sizes(layer) | numbered


_NUMBERED = re.compile(r"\b([a-z]+)\d+")


def canonical_layout(layer: Layer, role: str) -> str:
    """The canonical axes of one role, a numbered one composed: "(out0 out1) in"; of a layer of no known kind, the axes
    as they are.
    """
    kind = kind_of(layer.kind)
    if kind is None:
        return "..."
    layout = kind.roles.get(role) or (kind.roles["kernel"] if role in _LIKE_A_KERNEL else "...")
    parts: dict[str, list[str]] = {}
    for match in _NUMBERED.finditer(layer.tensors[role].layout):
        parts.setdefault(match[1], []).append(match[0])
    for axis, numbered in parts.items():
        layout = _replace(layout, axis, f"({' '.join(numbered)})")
    return layout


_LIKE_A_KERNEL = ("kernel.direction", "kernel.magnitude", "kernel.original")


def canonical_shape(layer: Layer, role: str) -> tuple[int, ...]:
    """The shape that a layer's tensor has in the canonical layout.

    Raises:
        MappingError: the tensor's shape does not fit the layout that the backend declares for it.
    """
    tensor = layer.tensors[role]
    # one number with strides of 0 stands for the whole tensor, so that nothing is allocated
    stand_in = np.broadcast_to(np.zeros((), np.int8), tensor.shape)
    pattern = f"{tensor.layout} -> {canonical_layout(layer, role)}"
    shape: tuple[int, ...] = apply_pattern(stand_in, pattern, sizes_of(layer, tensor), f"{layer.name}: {role}").shape
    return shape


def unit_axes(layer: Layer, role: str) -> Axes | None:
    """The axes of a stored tensor that run over the layer's units; () where it is one unit, None where its kind is
    unknown and it has more than one axis, or where an axis runs over units and more.

    >>> from clipcore.backend import Tensor
    >>> kernel = Tensor("conv/kernel", "kernel", "... in (group out)", (3, 3, 4, 8), "float32")
    >>> unit_axes(Layer("conv", "conv", {"kernel": kernel}, {"groups": 2}), "kernel")
    (3,)
    """
    tensor = layer.tensors[role]
    kind = kind_of(layer.kind)
    if kind is None:
        return () if len(tensor.shape) <= 1 else None
    units = set((kind.units.get(role) or kind.units.get(_plain(role), "")).split())
    ones = {axis for axis, size in axis_sizes(layer).items() if size == 1}
    before, _, after = tensor.layout.partition("...")
    axes = []
    for side, start in ((before, 0), (after, len(tensor.shape) - len(_stored_axes(after)))):
        for index, stored_axis in enumerate(_stored_axes(side), start):
            names = set(re.findall("[a-z]+", stored_axis)) - ones
            length = math.prod(size for axis, size in axis_sizes(layer).items() if axis in names & units)
            if names & units and names - units and tensor.shape[index] != length:
                return None  # an axis that runs over units and over something else
            if names & units:
                axes.append(index)
    return tuple(axes)


def _plain(role: str) -> str:
    return "kernel" if role in _LIKE_A_KERNEL else role


def _stored_axes(layout: str) -> list[str]:
    """The axes of a layout as they are stored: a composed one, "(group out)", is one."""
    return re.findall(r"\([^)]*\)|\w+", layout)


def transformation(
    source: Layer, target: Layer, role: str, arrangement: Arrangement = SAME, *, origin: str | None = None
) -> tuple[str, dict[str, int]]:
    """(pattern, sizes) that carry a role's tensor from the source's layout into the target's.

    Args:
        arrangement: how the target holds the layer's input; where it flattens a feature map in another order, the
            axis over the input's features follows.
        origin: the source's role, where it has another name there.
    """
    ours, theirs = source.tensors[origin or role], target.tensors[role]
    before, after = ours.layout, theirs.layout
    sizes = sizes_of(source, ours) | dict(arrangement.sizes)
    kind = kind_of(source.kind)
    axis = kind.features.get(_plain(role)) if kind else None
    if axis and arrangement is not SAME:
        before, after = _following(before, after, axis, arrangement, len(ours.shape))
    numbered = [set(_NUMBERED.findall(layout)) for layout in (before, after)]
    if numbered[0] or numbered[1]:
        return _regrouped(source, target, (origin or role, role), (before, after), sizes)
    pattern = f"{before} -> {after}"
    return pattern, _used(pattern, sizes)


def _regrouped(
    source: Layer, target: Layer, roles: tuple[str, str], layouts: tuple[str, str], sizes: dict[str, int]
) -> tuple[str, dict[str, int]]:
    """Where one canonical axis is stored as several, by way of the canonical layout."""
    before, after = layouts
    ours, theirs = canonical_layout(source, roles[0]), canonical_layout(target, roles[1])
    others = {axis: size for axis, size in sizes_of(target, target.tensors[roles[1]]).items() if _NUMBERED.match(axis)}
    if not others:
        pattern = f"{before} -> {_composed(after, ours)}"
    elif not _NUMBERED.search(before):
        pattern = f"{_composed(before, theirs)} -> {after}"
    else:
        # the target's numbered axes are others than the source's of the same name
        after, theirs = (_NUMBERED.sub(r"new_\g<0>", layout) for layout in (after, theirs))
        others = {f"new_{axis}": size for axis, size in others.items()}
        pattern = f"{before} -> {ours}; {theirs} -> {after}"
    return pattern, _used(pattern, sizes | others)


def _composed(layout: str, canonical: str) -> str:
    """A plain layout with those axes composed that the canonical layout of the other side composes."""
    for match in re.finditer(r"\(([a-z]+)\d[^)]*\)", canonical):
        layout = _replace(layout, match[1], match[0])
    return layout


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
    return apply_pattern(canonical, pattern, sizes_of(layer, tensor), tensor.name)
