"""Running a model and watching its layers; afterwards the model is what it was, also after an exception."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipcore.backend import Watcher
from clipcore.errors import ClipcoreError, InvalidInput
from clipcore.structure import leaves, map_leaves, rebuild
from clipcore_torch._listing import Entry, entries, first_floating
from clipcore_torch._precision import full_precision
from clipcore_torch._reparametrised import recompute
from clipcore_torch._tensors import as_tensor, to_array


def run(model: nn.Module, sample: Any, watcher: Watcher | None = None) -> Any:
    """The outputs on `sample` as nested arrays; see `clipcore.backend.TracingBackend.run`.

    Raises:
        InvalidInput: the model does not run on the sample.
    """
    args, kwargs = _arguments(sample, first_floating(model))
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_eager())
        stack.enter_context(_module_by_module())
        stack.enter_context(_random_state(model))
        stack.enter_context(full_precision())
        stack.enter_context(_inference_mode(model))
        buffers = stack.enter_context(_buffers(model))
        watched = _Watched(watcher, buffers) if watcher is not None else None
        if watched is not None:
            stack.enter_context(watched.watching(model))
        try:
            return to_arrays(model(*args, **kwargs))
        except Exception as err:
            if isinstance(err, ClipcoreError) or (watched is not None and err is watched.error):
                raise
            shapes = [tuple(leaf.shape) for _, leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            raise InvalidInput(
                f"{type(model).__name__} does not run on a sample of shapes {shapes}: {type(err).__name__}: {err}"
            ) from err


def double(model: nn.Module) -> nn.Module | None:
    """A float64 copy of the model; None where it cannot be copied."""
    try:
        return copy.deepcopy(model, _computed(model)).double()
    except Exception:  # a model may hold anything: locks, files, non-leaf tensors
        return None


def _computed(model: nn.Module) -> dict[int, Any]:
    """Copies of the tensors that modules keep as they computed them, as a weight norm of the old form does: torch's own
    copying refuses those that have a graph.
    """
    values = (value for module in model.modules() for value in vars(module).values())
    return {id(value): value.detach().clone() for value in values if isinstance(value, Tensor) and not value.is_leaf}


def to_arrays(tree: Any) -> Any:
    """Nested outputs with every tensor as an array of its own; mappings and dataclasses become dicts."""
    if isinstance(tree, Tensor):
        return to_array(tree).copy()
    if isinstance(tree, Mapping):
        return {key: to_arrays(value) for key, value in tree.items()}
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return {field.name: to_arrays(getattr(tree, field.name)) for field in dataclasses.fields(tree)}
    if isinstance(tree, list | tuple):
        items = [to_arrays(value) for value in tree]
        return items if isinstance(tree, list) else tuple(items)
    return tree


def _arguments(sample: Any, like: Tensor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for the model: tensors of its own, on its device, in its floating dtype."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray | np.generic):
            leaf = as_tensor(np.array(leaf))
        elif isinstance(leaf, Tensor):
            leaf = leaf.detach().clone()
        else:
            return leaf
        if like is None:
            return leaf
        return leaf.to(like.device, like.dtype if leaf.is_floating_point() else leaf.dtype)

    converted = map_leaves(convert, sample)
    if isinstance(sample, dict):
        return (), converted
    return (converted if isinstance(sample, tuple) else (converted,)), {}


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Compiled modules run as written, so that hooks on the layers inside them are seen."""
    if hasattr(torch.compiler, "set_stance"):  # torch 2.6
        stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return contextlib.nullcontext()


@contextlib.contextmanager
def _module_by_module() -> Iterator[None]:
    """Without torch's fast path of a transformer, in which no module of it is called and padded places become 0."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


_SEEDS = itertools.count()


@contextlib.contextmanager
def _random_state(model: nn.Module) -> Iterator[None]:
    """Random numbers of each run's own, so that a model which draws some shows it; afterwards the user's go on."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    with torch.random.fork_rng([device.index for device in devices if device.type == "cuda"]):
        torch.manual_seed(next(_SEEDS))
        yield


@contextlib.contextmanager
def _inference_mode(model: nn.Module) -> Iterator[None]:
    """Every submodule in evaluation mode, and back in its own.

    The flags are set one by one: `model.eval()` calls `train`, which modules override to merge weights or stay frozen.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags:
            module.training = flag


class _Buffers:
    """A model's buffers as they shall be after the run: as before it, but for what a watcher writes."""

    def __init__(self, model: nn.Module) -> None:
        self._places = [
            (module, name, buffer)
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
        ]
        self._copies = [buffer.detach().clone() for _, _, buffer in self._places]

    def _versions(self) -> list[int]:
        return [0 if buffer.is_inference() else buffer._version for _, _, buffer in self._places]

    @contextlib.contextmanager
    def writes_stay(self) -> Iterator[None]:
        before = self._versions()
        yield
        for index, (old, new) in enumerate(zip(before, self._versions(), strict=True)):
            if old != new:
                self._copies[index].copy_(self._places[index][2])

    def restore(self) -> None:
        for (module, name, buffer), copied in zip(self._places, self._copies, strict=True):
            if getattr(module, name) is not buffer:
                setattr(module, name, buffer)
            # the values tell, not the version: torch's batch_norm writes running statistics without counting it
            if not _same_bits(buffer, copied):
                # past the version counter, so that no graph of the user's, nor a run around this one, sees a write
                buffer.data.copy_(copied)


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if first.layout is not torch.strided:  # a sparse tensor has no memory of its own to compare
        return False
    plain = (tensor.resolve_conj().resolve_neg().contiguous().reshape(-1) for tensor in (first, second))
    return torch.equal(*(tensor.view(torch.uint8) for tensor in plain))


@contextlib.contextmanager
def _buffers(model: nn.Module) -> Iterator[_Buffers]:
    buffers = _Buffers(model)
    try:
        yield buffers
    finally:
        buffers.restore()


@contextlib.contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for one module, whose hooks stay."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


class _Watched:
    """A watcher behind the hooks of modules: tensors become arrays for it, and its arrays tensors."""

    def __init__(self, watcher: Watcher, buffers: _Buffers) -> None:
        self._watcher = watcher
        self._buffers = buffers
        self.error: Exception | None = None

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Every module whose call is a layer's tells of it, and one that is several layers runs layer by layer."""
        with contextlib.ExitStack() as stack:
            for entry in list(entries(model)):
                if entry.composite is not None:
                    stack.enter_context(_forward(entry.module, entry.composite.apart(entry.name, entry.module, self)))
                elif entry.watched:
                    stack.enter_context(self._hooks(entry))
            yield

    @contextlib.contextmanager
    def _hooks(self, entry: Entry) -> Iterator[None]:
        handles = (
            entry.module.register_forward_pre_hook(self._before(entry.name), with_kwargs=True),
            entry.module.register_forward_hook(self._after(entry.name), with_kwargs=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def before(self, layer: str, inputs: list[Tensor]) -> list[Tensor]:
        answer = self._ask(self._watcher.before, layer, to_arrays(inputs))
        if answer is None:
            return inputs
        return [_tensor_like(array, old) for array, old in zip(answer, inputs, strict=True)]

    def after(self, layer: str, output: Tensor) -> Tensor:
        answer = self._ask(self._watcher.after, layer, to_arrays(output))
        return output if answer is None else _tensor_like(answer, output)

    def _ask(self, question: Callable[..., Any], *facts: Any) -> Any:
        try:
            with self._buffers.writes_stay():
                return question(*facts)
        except Exception as err:
            self.error = err
            raise

    def _before(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            inputs = [leaf for _, leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            told = self.before(name, inputs)
            recompute(module, args)
            if told is inputs:
                return None
            new = iter(told)
            return map_leaves(lambda leaf: next(new) if isinstance(leaf, Tensor) else leaf, (args, kwargs))

        return hook

    def _after(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            answer = self._ask(self._watcher.after, name, to_arrays(output))
            if answer is None:
                return None
            new = zip(leaves(answer), leaves(output), strict=True)
            return rebuild(output, (_tensor_like(array, old) for (_, array), (_, old) in new))

        return hook


def _tensor_like(array: Any, old: Any) -> Any:
    """An array as a tensor of the dtype and on the device of the one whose place it takes."""
    return as_tensor(np.array(array)).to(old.device, old.dtype) if isinstance(old, Tensor) else array
