"""The lists of a model's layers and operations: what each module is, and how it is watched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from clipcore.backend import Layer, Stored
from clipcore_torch import _reparametrised
from clipcore_torch._attention import ATTENTION
from clipcore_torch._composites import OTHERWISE_MADE, Composite
from clipcore_torch._described import Names, joined
from clipcore_torch._layers import class_of, named, registered, row_of
from clipcore_torch._operations import operation
from clipcore_torch._recurrent import RECURRENT

_COMPOSITES = {cls: composite for composite in (RECURRENT, ATTENTION) for cls in composite.classes}


@dataclass(frozen=True)
class Entry:
    """What one module of a model is to clipcore.

    Attributes:
        layers: that its tensors make up.
        watched: whether its call says what these layers take and give.
        composite: where they are several, what runs it layer by layer.
        inner: submodules whose layers are listed here.
        operation: what a module without tensors is.
    """

    name: str
    module: nn.Module
    layers: tuple[Layer, ...] = ()
    watched: bool = True
    composite: Composite | None = None
    inner: tuple[nn.Module, ...] = ()
    operation: Layer | None = None


def layers(model: nn.Module) -> list[Layer]:
    """Every layer that owns tensors, each once, in the order of `named_modules`.

    Raises:
        InvalidInput: a lazy module has not seen its first input, so that it has no tensors yet.
    """
    return [layer for entry in entries(model) for layer in entry.layers]


def operations(model: nn.Module) -> list[Layer]:
    """Every layer without tensors that a module is, each once, in the same order."""
    return [entry.operation for entry in entries(model) if entry.operation is not None]


def entries(model: nn.Module) -> Iterator[Entry]:
    """The modules that are layers or operations, or hold tensors."""
    names = Names(model)
    inner: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inner:
            continue
        inner |= {id(part) for part in _makers(module)}
        entry = _entry(name, module, names)
        if entry is not None:
            inner |= {id(part) for part in entry.inner}
            yield entry


def _makers(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that make a parametrized module's tensors: they are no layers of the model."""
    lists = module._modules.get("parametrizations")
    if lists is not None:
        yield from lists.modules()


def _entry(name: str, module: nn.Module, names: Names) -> Entry | None:
    held = names.held_by(module)
    if not held:
        found = operation(name, module)
        return Entry(name, module, operation=found) if found else None
    composite, why = _composite(module, held)
    if composite is not None:
        return _composed(name, module, composite, held, names)
    layer = _layer(name, module, held, names)
    if layer.kind == "raw" and _is_container(module):
        return Entry(name, module, tuple(_bare(name, module, held, names, why)), watched=False)
    return Entry(name, module, (replace(layer, why=why or layer.why),))


def _composite(module: nn.Module, held: Mapping[str, Tensor]) -> tuple[Composite | None, str]:
    """(what takes the module apart, ""), or (None, why nothing does; "" where it is of no such class)."""
    base = next((base for base in _COMPOSITES if isinstance(module, base)), None)
    if base is None or registered(class_of(module)) is not None:
        return None, ""
    if class_of(module).forward is not base.forward:
        return None, f"{named(base)} whose forward is its own"
    unlike = _COMPOSITES[base].unlike(module, held)
    return (None, f"{named(base)} {unlike}") if unlike else (_COMPOSITES[base], "")


def _composed(name: str, module: nn.Module, composite: Composite, held: Mapping[str, Tensor], names: Names) -> Entry:
    found, inner = composite.describe(name, module, held, names), []
    for path, settings in composite.inner(module).items():
        part = module.get_submodule(path)
        layer = _layer(joined(name, path), part, names.held_by(part), names)
        if layer.kind != "raw":
            found.append(replace(layer, settings={**layer.settings, **settings}))
            inner.append(part)
    bare = {path: tensor for path, tensor in held.items() if path in composite.bare}
    found += _bare(name, module, bare, names)
    return Entry(name, module, tuple(found), composite=composite, inner=tuple(inner))


def _layer(name: str, module: nn.Module, held: Mapping[str, Tensor], names: Names) -> Layer:
    """The one layer that a module with a row, or without children, is."""
    row, roles, why = _roles(module, held)
    described = (names.describe(tensor, *roles[path]) for path, tensor in held.items())
    tensors = {tensor.role: tensor for tensor in described}
    if row is None:
        return Layer(name, "raw", tensors, why=why)
    made = _reparametrised.of_weight(module)
    return Layer(name, row.kind, tensors, {**(row.settings(module) or {}), **(made.settings if made else {})})


def _roles(module: nn.Module, held: Mapping[str, Tensor]) -> tuple[Stored | None, Mapping[str, tuple[str, str]], str]:
    """(row, role and layout by path, ""), or (None, the paths themselves, why)."""
    made = _reparametrised.of_weight(module)
    replaced = made.parts if made else {}
    row, why = row_of(module, (held.keys() - replaced.keys()) | ({"weight"} if made else set()))
    if row is not None and made is None:
        return row, row.roles, ""
    kernel = _reparametrised.roles(made, row, held) if row is not None and made is not None else None
    if row is not None and kernel is not None:
        return row, {**row.roles, **kernel}, ""
    if any(path.startswith("parametrizations.") for path in held) or made is not None:
        why = f"{named(class_of(module))} {OTHERWISE_MADE}"
    return None, {path: (path, "...") for path in held}, why


def _is_container(module: nn.Module) -> bool:
    """Whether a module's tensors may be used anywhere in its parent, or between its children."""
    children = set(module._modules) - {"parametrizations"}
    return bool(children) or isinstance(module, nn.ParameterList | nn.ParameterDict)


def _bare(name: str, module: nn.Module, held: Mapping[str, Tensor], names: Names, why: str = "") -> Iterator[Layer]:
    """One layer per tensor that a container holds, under the tensor's name."""
    for path, tensor in held.items():
        what = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
        reason = why or f"a bare {what} of {named(class_of(module))}, whose call does not say where it is used"
        yield Layer(joined(name, path), "raw", {path: names.describe(tensor, path, "...")}, why=reason, bare=True)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter once, by its first name."""
    return dict(model.named_parameters())


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names."""
    named_: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named_.update(model.named_buffers(remove_duplicate=False))
    return named_


def first_floating(model: nn.Module) -> Tensor | None:
    """The model's first floating parameter, else buffer, whose dtype and device its inputs take."""
    return next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), None)
