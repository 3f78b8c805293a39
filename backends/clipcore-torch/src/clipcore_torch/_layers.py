"""What torch's layers are to clipcore: a table of module classes, and the lists of layers made with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from clipcore.backend import Layer
from clipcore.backend import Tensor as Described
from clipcore.errors import InvalidInput
from clipcore_torch._tensors import dtype_name


@dataclass(frozen=True)
class Row:
    """How one module class stores a layer kind.

    Attributes:
        kind: the name in `clipcore.mapping.kinds`.
        roles: by the module's attribute, the role and the layout.
        settings: the module's settings in canonical words.
        required: attributes without which the module computes something else than the kind does.
    """

    kind: str
    roles: Mapping[str, tuple[str, str]]
    settings: Callable[[Any], dict[str, Any]]
    required: tuple[str, ...] = ("weight",)


def _linear(module: nn.Linear) -> dict[str, Any]:
    return {"activation": None}


def _conv(module: Any) -> dict[str, Any]:
    return {
        "stride": module.stride,
        "padding": _padding(module),
        "padding_mode": module.padding_mode,
        "dilation": module.dilation,
        "groups": module.groups,
        "activation": None,
        "channels": "first",
    }


def _padding(module: Any) -> tuple[tuple[int, int], ...]:
    """One (before, after) pair per spatial axis."""
    if module.padding == "valid":
        return tuple((0, 0) for _ in module.kernel_size)
    if module.padding == "same":
        # torch refuses strides with "same", so the total is the same for every size; the odd one comes after
        totals = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((size, size) for size in module.padding)


def _batch_norm(module: Any) -> dict[str, Any]:
    return {"eps": module.eps, "momentum": module.momentum, "channels": "first"}


def _layer_norm(module: nn.LayerNorm) -> dict[str, Any]:
    return {"eps": module.eps}


def _embedding(module: nn.Embedding) -> dict[str, Any]:
    return {}


_LINEAR = Row("linear", {"weight": ("kernel", "out in"), "bias": ("bias", "out")}, _linear)
_CONV = Row("conv", {"weight": ("kernel", "(group out) in ..."), "bias": ("bias", "(group out)")}, _conv)
_BATCH_NORM = Row(
    "batch_norm",
    {
        "weight": ("scale", "channel"),
        "bias": ("bias", "channel"),
        "running_mean": ("running_mean", "channel"),
        "running_var": ("running_var", "channel"),
        "num_batches_tracked": ("batch_count", "..."),
    },
    _batch_norm,
    required=("running_mean", "running_var"),
)
_LAYER_NORM = Row("layer_norm", {"weight": ("scale", "..."), "bias": ("bias", "...")}, _layer_norm)
_EMBEDDING = Row("embedding", {"weight": ("kernel", "num dim")}, _embedding)

TABLE: dict[type[nn.Module], Row] = {
    nn.Linear: _LINEAR,
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Conv3d: _CONV,
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.BatchNorm3d: _BATCH_NORM,
    nn.SyncBatchNorm: _BATCH_NORM,
    nn.LayerNorm: _LAYER_NORM,
    nn.Embedding: _EMBEDDING,
}


def layers(model: nn.Module) -> list[Layer]:
    """Every module that owns tensors, each once, in the order of `named_modules`.

    Raises:
        InvalidInput: a lazy module has not seen its first input, so that it has no tensors yet.
    """
    names = _names(model)
    return [_describe(name, module, names) for name, module in owners(model)]


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) for every module that owns parameters or persistent buffers itself."""
    names = _names(model)
    for name, module in model.named_modules():
        if any(id(tensor) in names for _, tensor in _own(module)):
            yield name, module


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)


def _names(model: nn.Module) -> dict[int, str]:
    """The name of each tensor that the state dict keeps, a tied one under its first name."""
    kept = model.state_dict(keep_vars=True)
    names: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise InvalidInput(
                f"tensor {name!r} belongs to a lazy module that has not seen its first input, so that it has no shape; "
                f"run the model once on a sample"
            )
        if name in kept:
            names[id(tensor)] = name
    return names


def _row(module: nn.Module) -> Row | None:
    """The table's row for a module, where its class computes what the row's class does."""
    for base, row in TABLE.items():
        if isinstance(module, base):
            same = type(module).forward is base.forward and getattr(module, "max_norm", None) is None
            own = {attribute for attribute, _ in _own(module)}
            return row if same and own <= set(row.roles) and own >= set(row.required) else None
    return None


def _describe(name: str, module: nn.Module, names: Mapping[int, str]) -> Layer:
    row = _row(module)
    described = {}
    for attribute, tensor in _own(module):
        if id(tensor) in names:
            role, layout = row.roles[attribute] if row else (attribute, "...")
            described[role] = Described(
                name=names[id(tensor)],
                role=role,
                layout=layout,
                shape=tuple(tensor.shape),
                dtype=dtype_name(tensor),
                trainable=isinstance(tensor, nn.Parameter),
            )
    kind = row.kind if row else f"torch:{type(module).__name__}"
    return Layer(name, kind, described, row.settings(module) if row else {})


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter once, by its first name."""
    return dict(model.named_parameters())


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))
    return named


def first_floating(model: nn.Module) -> Tensor | None:
    """The model's first floating parameter, else buffer, whose dtype and device its inputs take."""
    return next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), None)
