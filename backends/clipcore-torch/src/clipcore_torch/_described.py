"""Torch tensors in clipcore's words: each by the name that the state dict gives it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from clipcore.backend import Bounds
from clipcore.backend import Tensor as Described
from clipcore.errors import InvalidInput
from clipcore_torch._tensors import dtype_name


class Names:
    """The name of each tensor that a model's state dict keeps, a tied one under its first name.

    Raises:
        InvalidInput: a lazy module has not seen its first input, so that it has no tensors yet.
    """

    def __init__(self, model: nn.Module) -> None:
        kept = model.state_dict(keep_vars=True)
        self._names: dict[int, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if is_lazy(tensor):
                raise InvalidInput(
                    f"tensor {name!r} belongs to a lazy module that has not seen its first input, so that it has no "
                    f"shape; run the model once on a sample"
                )
            if name in kept:
                self._names[id(tensor)] = name

    def held_by(self, module: nn.Module) -> dict[str, Tensor]:
        """A module's own tensors by attribute, and those of its parametrizations by their path from it."""
        held = dict(own_tensors(module))
        lists = module._modules.get("parametrizations")
        if lists is not None:
            inner = (*lists.named_parameters(remove_duplicate=False), *lists.named_buffers(remove_duplicate=False))
            held.update((f"parametrizations.{path}", tensor) for path, tensor in inner)
        return {path: tensor for path, tensor in held.items() if id(tensor) in self._names}

    def describe(self, tensor: Tensor, role: str, layout: str, rows: tuple[int, int] | None = None) -> Described:
        """The tensor, or some rows of it, as a role of a layer."""
        shape, within = tuple(tensor.shape), _rows_of(tensor, rows)
        return Described(
            name=self._names[id(tensor)],
            role=role,
            layout=layout,
            shape=tuple(stop - start for start, stop in within) if within else shape,
            dtype=dtype_name(tensor),
            trainable=isinstance(tensor, nn.Parameter),
            within=within,
            whole=shape if within else (),
        )


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(attribute, tensor) for the parameters and buffers that a module itself has."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)


def joined(name: str, part: str) -> str:
    """The name of a part of a module, which may be the model itself."""
    return f"{name}.{part}" if name else part


def _rows_of(tensor: Tensor, rows: tuple[int, int] | None) -> Bounds:
    return (rows, *((0, size) for size in tensor.shape[1:])) if rows else ()
