"""The reference of layer kinds, written from the spec and from what the backends say of their layers.

Run `python docs/mkdocs/layers.py` where both frameworks are installed; a test compares the page with what this writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import clipcore as cc
from clipcore.backend import Tensor
from clipcore.mapping.kinds import KINDS, Kind
from clipcore.mapping.reference import ACTIVATIONS
from clipcore.mapping.repairs import REPAIRS
from clipcore.testing.conformance.test_layers import PLAIN
from clipcore.testing.layers import ATTENTION, LayerConfiguration

PAGE = Path(__file__).parents[1] / "reference" / "layers.md"
FRAMEWORKS = {"torch": "PyTorch", "tensorflow": "Keras 3"}

BEFORE = """\
# Layers

Written by `python docs/mkdocs/layers.py`, from the spec of layer kinds and what the backends say of layers they built.

Axes are named as einops writes them: "(group out)" is one stored axis, "..." stands for the axes of space, or for all
that there are. A framework's cell names a class, then for each role the stored tensor and the order of its axes. Where
one stored tensor holds several roles, they stand in it in the order shown, along the axis named. A class stands for all
of its kind: of one to three axes of space, and subclasses that compute the same.

"""
AFTER = """
A bias that the source's layer lacks is filled with 0, a scale with 1.

## Repairs in training

A repair is exact in inference, up to rounding. When the target trains on:

REPAIRS

## Settings

- `stride`, `dilation`, `window`: one number per axis of space. `padding`: a pair (before, after) per axis of space, or
  "same" where TensorFlow's rule makes it depend on the size of the input.
- `crop`: what a transposed convolution cuts from its whole result, a pair (before, after) per axis of space. torch's
  padding p and output_padding o are (p, p - o).
- `eps` is added to the variance, under the root. `momentum` is the weight of the new value in the running statistics:
  torch's convention; Keras's is 1 minus it.
- `activation`: what a layer applies to its result; one in the layer and one right behind it are the same.
- `reset_after`: whether a GRU's reset gate acts on what the recurrent kernel gives. `reverse`: whether a recurrent
  layer reads the sequence from its end.
- `heads`: how many heads a projection of attention is divided into.

## Layers of several layers

A stacked or bidirectional recurrent layer is one layer per level and direction: `lstm.l0`, `lstm.l0_reverse`. A
separable convolution is two of kind `conv`. Keras's `EinsumDense` is `linear` where its equation is one. tf_keras
(Keras 2) layers are described like those of Keras 3. A class that is not described is carried as *raw* tensors; see
[When a layer is not found](../howto/layers.md).
"""


def page() -> str:
    """The page as it should be."""
    head = ("kind", "roles and their axes", *FRAMEWORKS.values(), "settings", "repairs")
    rows = [head, ("-",) * len(head), *map(_row, (*KINDS.values(), _attention()))]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    training = "\n".join(f"- {repair.done}: {repair.training}." for repair in REPAIRS.values())
    return BEFORE + table + AFTER.replace("REPAIRS", training)


def _attention() -> Kind:
    """Attention as a row: no kind of its own, but what the conformance suite builds as one."""
    settings = tuple(PLAIN["attention"][0].settings)
    return Kind("attention", dict.fromkeys(ATTENTION, "a `linear` layer"), settings=settings)


def _row(kind: Kind) -> tuple[str, ...]:
    stored = [_lines(_stored(kind.name, framework)) for framework in FRAMEWORKS]
    return f"`{kind.name}`", _lines(_roles(kind)), *stored, _lines(_settings(kind)), _lines(_repairs(kind.name))


def _lines(lines: Iterable[str]) -> str:
    return "<br>".join(dict.fromkeys(lines)) or "-"


def _roles(kind: Kind) -> Iterator[str]:
    """The roles, parts of one role in one line."""
    alike: dict[str, list[str]] = {}
    for role in kind.roles:
        alike.setdefault(role.partition(".")[0], []).append(role)
    for roles in alike.values():
        yield f"{_together(roles)}: {kind.roles[roles[0]]}{', optional' if roles[0] in kind.optional else ''}"


def _bases(roles: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(role.partition(".")[0] for role in roles))


def _together(roles: Sequence[str]) -> str:
    """Roles in one phrase: "kernel of input, forget" for "kernel.input" and "kernel.forget"."""
    if len(roles) == 1:
        return roles[0]
    parts = dict.fromkeys(role.partition(".")[2] for role in roles)
    return f"{', '.join(_bases(roles))} of {', '.join(parts)}" if any(parts) else ", ".join(roles)


def _stored(kind: str, framework: str) -> Iterator[str]:
    """How a framework stores the kind, as its backend describes each plain configuration."""
    backend = cc.get_backend(framework)
    shown: set[tuple[str, str]] = set()
    for form in (form for forms in PLAIN.values() for form in forms if form.kind == kind):
        try:
            model = backend.build_layer(kind, form.settings, form.shapes)
        except cc.MappingError:
            continue
        cls, place = _owner(framework, model)
        lines = [line for line in _tensors(backend, model, form, place) if (cls, line) not in shown]
        if lines or (cls, "") not in shown:
            yield f"`{cls}`"
        shown |= {(cls, line) for line in ("", *lines)}
        yield from lines


def _owner(framework: str, model: Any) -> tuple[str, str]:
    """The name of the framework's class that a model of one layer is, and what the names of its tensors begin with."""
    if framework == "tensorflow":
        layer = next(layer for layer in model.layers if type(layer).__name__ != "InputLayer")
        return type(layer).__name__, f"{layer.name}/"
    for path, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__module__.startswith("torch.nn.modules.") and cls.__name__ != "Module":
                return cls.__name__, f"{path}." if path else ""
    raise AssertionError(f"{model} is no module of torch.nn")


def _tensors(backend: Any, model: Any, form: LayerConfiguration, place: str) -> Iterator[str]:
    layers = [layer for layer in backend.layers(model) if not layer.settings.get("reverse")]
    held: dict[str, list[tuple[str, Tensor]]] = {}
    for part, layer in zip(form.parts, layers, strict=False):
        for role, tensor in layer.tensors.items():
            # "query.kernel" reads as "kernel.query", in the way of "kernel.forget"
            held.setdefault(tensor.name, []).append((f"{role}.{part}" if part else role, tensor))
    for name, parts in held.items():
        parts.sort(key=lambda pair: pair[1].within)
        roles = [role for role, _ in parts]
        yield f"{_together(roles)}: `{name.removeprefix(place)}`, {parts[0][1].layout}{_along(parts)}"


def _along(parts: Sequence[tuple[str, Tensor]]) -> str:
    """The axis along which the parts of one stored tensor stand."""
    places = zip(*(tensor.within for _, tensor in parts), strict=True)
    axes = [axis for axis, bounds in zip(parts[0][1].layout.split(), places, strict=False) if len(set(bounds)) > 1]
    return f" (along {' and '.join('rows' if axis == '1' else axis for axis in axes)})" if axes else ""


def _settings(kind: Kind) -> Iterator[str]:
    if kind.settings:
        yield ", ".join(f"`{setting}`" for setting in kind.settings)
    if "function" in kind.settings:
        yield f"functions: {', '.join(sorted(ACTIVATIONS))}"
    if kind.training_settings:
        yield f"in training: {', '.join(f'`{setting}`' for setting in kind.training_settings)}"


def _repairs(kind: str) -> Iterator[str]:
    for repair in REPAIRS.values():
        if kind in repair.kinds:
            yield f"{repair.setting}: {repair.done}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
