"""From two matched layers to the rows of a plan: what each tensor of the target is made of, and its values."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from clipcore.backend import Layer, Tensor
from clipcore.errors import MappingError
from clipcore.mapping.align import Arrangement
from clipcore.mapping.kinds import base_role, kernel_role, kind_of
from clipcore.mapping.layouts import axis_sizes, canonical_layout, canonical_shape, transformation
from clipcore.mapping.plan import Evidence, Part, Row, Term, cut

Array = np.ndarray[Any, np.dtype[Any]]

_FILL = {"bias": 0.0, "recurrent_bias": 0.0, "scale": 1.0}  # what a tensor holds where the source's layer has none


@dataclass(frozen=True)
class Recipe:
    """How a role of the target is made of roles of the source.

    Attributes:
        roles: of the source; the first one's layout is the one that is carried.
        operation, then, numbers: see `clipcore.mapping.plan.Part`.
        canonical: whether the operation takes the source's tensors, and gives the result, in the canonical layout.
    """

    roles: tuple[str, ...]
    operation: str = ""
    then: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    canonical: bool = False


def recipe(role: str, source: Layer, target: Layer) -> Recipe | None:
    """How the target's layer gets a role from the source's; None where the source has nothing for it."""
    for rule in _RULES:
        found = rule(role, source, target)
        if found is not None:
            return found
    return Recipe((role,)) if role in source.tensors else None


def _summed_bias(role: str, source: Layer, target: Layer) -> Recipe | None:
    """Two biases that are added anyway, where the target has one."""
    other = role.replace("bias", "recurrent_bias", 1)
    if base_role(role) != "bias" or other not in source.tensors or other in target.tensors:
        return None
    return Recipe((role, other), "sum") if role in source.tensors else Recipe((other,))


def _baked_kernel(role: str, source: Layer, target: Layer) -> Recipe | None:
    """The kernel that a weight norm or a spectral norm makes of its tensors."""
    if role != "kernel" or role in source.tensors:
        return None
    if {"kernel.direction", "kernel.magnitude"} <= set(source.tensors):
        return Recipe(("kernel.direction", "kernel.magnitude"), "weight_norm")
    if {"kernel.original", "kernel.u", "kernel.v"} <= set(source.tensors):
        axis = source.settings.get("spectral_axis", 0)
        return Recipe(("kernel.original", "kernel.u", "kernel.v"), "spectral_norm", numbers={"axis": axis})
    return None


def _reparametrised(role: str, source: Layer, target: Layer) -> Recipe | None:
    """The tensors of which a weight norm or a spectral norm makes the kernel that the source has."""
    # the vectors of a kernel that is divided by their product must be its own
    another = "kernel.original" in target.tensors and "kernel.original" not in source.tensors
    if role not in _FROM_KERNEL or (role in source.tensors and not another):
        return None
    kernel = recipe("kernel", source, target)
    if kernel is None:
        return None
    then = _FROM_KERNEL[role]
    numbers: dict[str, Any] = dict(kernel.numbers)
    if then == "norm":
        numbers["axes"] = tuple(axis for axis, size in enumerate(target.tensors[role].shape) if size == 1)
    elif then:
        numbers |= {"axis": target.settings.get("spectral_axis", 0), "shape": target.tensors[role].shape}
    return replace(kernel, then=then, numbers=numbers)


_FROM_KERNEL = {
    "kernel.direction": "",
    "kernel.original": "",
    "kernel.magnitude": "norm",
    "kernel.u": "left_vector",
    "kernel.v": "right_vector",
}


def _dense(role: str, source: Layer, target: Layer) -> Recipe | None:
    """The kernel of a grouped convolution for a layer without groups, or back."""
    if role != "kernel" or source.settings.get("groups", 1) == target.settings.get("groups", 1):
        return None
    if source.kind not in ("conv", "conv_transpose") or role not in source.tensors:
        return None
    if target.settings.get("groups", 1) == 1:
        return Recipe(("kernel",), "block_diagonal", canonical=True)
    return Recipe(("kernel",), "diagonal_blocks", numbers={"groups": int(target.settings["groups"])}, canonical=True)


def _repeated(role: str, source: Layer, target: Layer) -> Recipe | None:
    """One slope for every channel, or of equal ones for all channels."""
    if source.kind != "prelu" or role not in source.tensors:
        return None
    (ours,), (theirs,) = (canonical_shape(layer, role) for layer in (source, target))
    if ours == theirs:
        return None
    return Recipe((role,), "repeat", numbers={"count": theirs}) if ours == 1 else Recipe((role,), "the_one")


def _batch_norm(role: str, source: Layer, target: Layer) -> Recipe | None:
    """What makes up for another eps, a missing scale or a missing bias of a batch norm."""
    if source.kind != "batch_norm":
        return None
    eps = {"source_eps": float(source.settings["eps"]), "target_eps": float(target.settings["eps"])}
    differs = not np.isclose(eps["source_eps"], eps["target_eps"], rtol=1e-6, atol=0)
    if role == "scale" and differs:
        have = "scale" in source.tensors
        roles = ("scale", "running_var") if have else ("running_var",)
        return Recipe(roles, "rescaled" if have else "scale_for_eps", numbers=eps)
    if role == "running_var" and differs and not {"scale"} & (set(source.tensors) | set(target.tensors)):
        return Recipe(("running_var",), "moved_variance", numbers=eps)
    needed = ("running_mean", "running_var", "scale", "bias")
    if role == "running_mean" and "bias" not in target.tensors and set(needed) <= set(source.tensors):
        return Recipe(needed, "mean_without_bias", numbers={"eps": eps["source_eps"]})
    return None


_RULES: tuple[Callable[[str, Layer, Layer], Recipe | None], ...] = (
    _summed_bias,
    _baked_kernel,
    _reparametrised,
    _dense,
    _repeated,
    _batch_norm,
)


def given_part(source_layer: str, target: Layer, role: str, origin: str, pattern: str) -> Part:
    """A whole tensor of the target from the one of the source that a rule names."""
    return Part(role, source_layer, target.name, (Term(origin),), pattern, {}, "given", "a rule of yours")


def same_roles(source: Layer, target: Layer, given: Collection[str] = ()) -> dict[str, str]:
    """For layers of no known kind, the source's role for each of the target's: of an equal name, else the only one of
    that shape.

    Raises:
        MappingError: several have the shape, and no name tells them apart.
    """
    wanted = {role: tensor for role, tensor in target.tensors.items() if tensor.name not in given}
    named = {role: role for role, tensor in wanted.items() if _shape(source, role) == _squeezed(tensor.shape)}
    for role, tensor in wanted.items():
        free = [r for r in source.tensors if r not in named.values() and _shape(source, r) == _squeezed(tensor.shape)]
        if role not in named:
            if len(free) != 1:
                raise MappingError(
                    f"layer {target.name!r}: {role} of shape {tensor.shape} may come from "
                    f"{' or '.join(free) or 'nothing'} of the source's {source.name!r}; "
                    f"give rules=[(source tensor, {tensor.name!r})]"
                )
            named[role] = free[0]
    return named


def _shape(layer: Layer, role: str) -> tuple[int, ...] | None:
    return _squeezed(layer.tensors[role].shape) if role in layer.tensors else None


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its axes of one place, which frameworks put where they need them."""
    return tuple(size for size in shape if size != 1)


def parts_between(
    source: Layer,
    target: Layer,
    arrangement: Arrangement,
    evidence: Evidence,
    reason: str,
    given: Mapping[str, tuple[str, str]] = MappingProxyType({}),
) -> dict[str, list[Part]]:
    """The parts that carry one layer's tensors into another's, by the target's stored tensor.

    Args:
        given: for tensors of the target that a rule names, the tensor of the source, and a pattern.
    """
    parts: dict[str, list[Part]] = {}
    one_is_raw = kind_of(target.kind) is None or kind_of(source.kind) is None
    renamed = same_roles(source, target, given) if one_is_raw else {}
    for role, tensor in target.tensors.items():
        if tensor.name in given:
            parts.setdefault(tensor.name, [given_part(source.name, target, role, *given[tensor.name])])
            continue
        made = Recipe((renamed[role],)) if role in renamed else recipe(role, source, target)
        if made is not None:
            part, why = _carried(made, role, source, target, arrangement), reason
        elif base_role(role) in _FILL:
            fill = _FILL[base_role(role)]
            part = Part(role, source.name, target.name, (), "", {}, evidence, "", fill=fill)
            why = f"the source's layer has no {role}: {fill:g} has no effect"
        else:
            continue
        part = replace(part, into=tensor.within, evidence=evidence, reason=why)
        parts.setdefault(tensor.name, []).append(part)
    return parts


def _carried(made: Recipe, role: str, source: Layer, target: Layer, arrangement: Arrangement) -> Part:
    """A part by its recipe."""
    ours = [source.tensors[origin] for origin in made.roles]
    if made.canonical:
        canonical = canonical_layout(source, role)
        # of the two sides one is dense and has a group of its own
        before, after = ("group", "whole") if axis_sizes(target)["group"] == 1 else ("whole", "group")
        first, pattern = f"{ours[0].layout} -> {canonical}", f"{canonical} -> {target.tensors[role].layout}"
        terms: tuple[Term, ...] = (Term(ours[0].name, ours[0].within, re.sub(r"\bgroup\b", before, first)),)
        pattern = re.sub(r"\bgroup\b", after, pattern)
        sizes = {"group": max(axis_sizes(source)["group"], axis_sizes(target)["group"]), "whole": 1}
    else:
        terms = tuple(Term(tensor.name, tensor.within) for tensor in ours)
        pattern, sizes = _pattern(source, target, made.roles[0], role, arrangement)
    return Part(
        role,
        source.name,
        target.name,
        terms,
        pattern,
        sizes,
        "proven",
        "",
        operation=made.operation,
        then=made.then,
        numbers=made.numbers,
    )


def _pattern(
    source: Layer, target: Layer, origin: str, role: str, arrangement: Arrangement
) -> tuple[str, dict[str, int]]:
    if kind_of(source.kind) is None or kind_of(target.kind) is None:
        ours, theirs = source.tensors[origin].shape, target.tensors[role].shape
        return ("", {}) if ours == theirs else (f"{_axes(ours)} -> {_axes(theirs)}", {})
    if role in ("kernel.magnitude", "kernel.u", "kernel.v") and origin != role:
        role = kernel_role(target)  # made of the kernel in the layout in which the target keeps it
    elif role in ("kernel.u", "kernel.v"):
        return f"{_axes(source.tensors[origin].shape)} -> {_axes(target.tensors[role].shape)}", {}
    return transformation(source, target, role, arrangement, origin=origin)


def _axes(shape: tuple[int, ...]) -> str:
    """The axes of a shape, those of one place as "1"."""
    names = iter(range(len(shape)))
    return " ".join("1" if size == 1 else f"axis{next(names)}" for size in shape)


def rows_between(
    source: Layer, target: Layer, arrangement: Arrangement, given: Mapping[str, tuple[str, str]] = MappingProxyType({})
) -> list[Row]:
    """The rows, or the parts of rows that this layer is, that carry one layer's tensors into another's."""
    parts = parts_between(source, target, arrangement, "proven", "", given)
    return [Row(name, tuple(found)) for name, found in parts.items()]


def values_for(
    rows: Iterable[Row],
    tensors: Mapping[str, Tensor],
    sources: Mapping[str, Array],
    held: Callable[[list[str]], Mapping[str, Array]] | None = None,
) -> dict[str, Array]:
    """The arrays that rows write into the target's tensors, in their dtypes, rounded where those are narrower.

    Args:
        held: what the target's tensors hold, for rows that are not all of their tensor.
    """
    values: dict[str, Array] = {}
    for row in rows:
        tensor = tensors[row.target]
        dtype = numpy_dtype(tensor.dtype)
        if held is not None and any(part.into for part in row.parts):
            whole = np.array(held([row.target])[row.target])
            for part in row.parts:
                carried = part.carry(sources, repr(row.target))
                cut(whole, part.into)[...] = part.fill if carried is None else carried.astype(dtype)
            values[row.target] = whole
            continue
        carried = row.carry(sources)
        values[row.target] = np.full(tensor.shape, row.fill, dtype) if carried is None else carried.astype(dtype)
    return values


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of that name, those of ml_dtypes included."""
    import ml_dtypes  # here, so that `import clipcore` does not pay for it

    return np.dtype(getattr(ml_dtypes, name, None) or name)


def signature(layer: Layer) -> tuple[Any, ...]:
    """What two layers must have in common to be matched: kind, and the canonical shapes of the tensors it must have.

    A convolution's is that of the dense one. Of a kind that may lack any of its tensors (layer norm), the number of
    elements of those that it has.
    """
    kind = kind_of(layer.kind)
    if kind is None:
        return layer.kind, *sorted(_squeezed(tensor.shape) for tensor in layer.tensors.values())
    if layer.kind == "prelu":
        return (layer.kind,)
    needed = {role: role for role in layer.tensors if role in kind.roles and role not in kind.optional}
    if "kernel" in kind.roles:
        needed["kernel"] = kernel_role(layer)
    if not needed:
        return layer.kind, *{int(np.prod(tensor.shape)) for tensor in layer.tensors.values()}
    shapes = {role: canonical_shape(layer, stored) for role, stored in needed.items()}
    if "groups" in layer.settings and "kernel" in shapes:
        group, first, second, *window = shapes["kernel"]
        shapes["kernel"] = (group * first, group * second, *window)
    return layer.kind, *sorted(shapes.items())


def fits(source: Layer, target: Layer) -> bool:
    """Whether the target's layer can hold what the source's does: both of one signature, and a grouped kernel in one
    with as many groups, or none, or the other way round, if the dense one mixes no groups.
    """
    return signature(source) == signature(target) and holds(source, target)


def holds(source: Layer, target: Layer) -> bool:
    """The same of two layers whose signatures are known to be equal."""
    if source.kind == "prelu":
        ours, theirs = (canonical_shape(layer, "slope") for layer in (source, target))
        return theirs in (ours, (1,)) or ours == (1,)
    if source.settings.get("groups") == target.settings.get("groups") or source.kind not in ("conv", "conv_transpose"):
        return True
    dense = 1 in (source.settings["groups"], target.settings["groups"])
    return dense and "kernel" in source.tensors and "kernel" in target.tensors


# kinds whose tensors every framework stores in one layout
_ONE_LAYOUT = frozenset({"embedding", "batch_norm", "layer_norm", "group_norm", "rms_norm"})


def may_be(source: Layer, target: Layer) -> bool:
    """Whether one of two layers is of no known kind, and may be of the other's: it holds tensors of the same shapes.
    What both compute must then tell.
    """
    kinds = {source.kind, target.kind}
    if "raw" not in kinds or not kinds & _ONE_LAYOUT:
        return False
    ours, theirs = (sorted(tensor.shape for tensor in layer.tensors.values()) for layer in (source, target))
    return ours == theirs


def describe_layer(layer: Layer) -> str:
    """A layer for a message: its kind, and the canonical shapes of its tensors."""
    shapes = ", ".join(f"{role} {canonical_shape(layer, role)}" for role in layer.tensors)
    sizes = axis_sizes(layer)
    return f"{layer.why or layer.kind}{f' {sizes}' if sizes else ''}: {shapes}"
