"""Torch tensors as NumPy arrays over the same memory, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin

from clipcore.backend import Memory
from clipcore.clipping.overlaps import footprint
from clipcore.errors import InvalidInput

Array = np.ndarray[Any, np.dtype[Any]]

# dtypes that torch has and NumPy gets from ml_dtypes under the same name, and the integers through which they pass
_EXTENDED: dict[torch.dtype, tuple[torch.dtype, np.dtype[Any]]] = {
    torch.bfloat16: (torch.int16, np.dtype(ml_dtypes.bfloat16)),
    torch.float8_e4m3fn: (torch.uint8, np.dtype(ml_dtypes.float8_e4m3fn)),
    torch.float8_e5m2: (torch.uint8, np.dtype(ml_dtypes.float8_e5m2)),
    torch.float8_e4m3fnuz: (torch.uint8, np.dtype(ml_dtypes.float8_e4m3fnuz)),
    torch.float8_e5m2fnuz: (torch.uint8, np.dtype(ml_dtypes.float8_e5m2fnuz)),
}
DEVICES_WITHOUT_FLOAT64 = ("mps",)
_TORCH_DTYPES = {array_dtype: dtype for dtype, (_, array_dtype) in _EXTENDED.items()}


def dtype_name(tensor: Tensor) -> str:
    """NumPy's name of a tensor's dtype, which is torch's own but for "bool".

    Raises:
        InvalidInput: its elements do not lie in an array, nor at the indices of one.
    """
    if tensor.is_nested or tensor.layout not in (torch.strided, torch.sparse_coo):
        kind = "nested tensor" if tensor.is_nested else f"tensor of layout {tensor.layout}"
        raise InvalidInput(f"a {kind}; expected a dense one, or one of layout torch.sparse_coo: convert it first")
    if isinstance(tensor, UninitializedTensorMixin):
        raise InvalidInput(
            "an uninitialised parameter of a lazy module; expected one that has its shape: call the module once first"
        )
    return str(tensor.dtype).removeprefix("torch.")


def to_host(tensors: Sequence[Tensor], *, writable: bool = False) -> list[Array] | None:
    """The memory of eager CPU tensors as arrays; see `clipcore.Backend.to_host`."""
    if torch.compiler.is_compiling():
        return None
    arrays = []
    for tensor in tensors:
        if not _is_on_host(tensor):
            return None
        if writable:
            if tensor.is_conj() or tensor.is_neg() or (tensor.is_sparse and not tensor.is_coalesced()):
                return None  # what can be seen of these is a copy
        elif tensor.requires_grad and torch.is_grad_enabled():
            return None
        try:
            arrays.append(memory(tensor))
        except RuntimeError:  # a tensor wrapped by vmap or torch.func.grad has no memory of its own
            return None
    return arrays


_ORDINARY = {torch.float32, torch.float64, torch.float16, torch.bfloat16}
# what is asked of each tensor, as functions for `map`: in a loop the asking would take longer than small gradients do
_DTYPE, _ON_CPU, _IN_GRAPH = Tensor.dtype.__get__, Tensor.is_cpu.__get__, Tensor.requires_grad.__get__


def lie_in_memory(tensors: Sequence[Tensor], *, writable: bool = False) -> Memory | None:
    """Where ordinary tensors lie; see `clipcore.Backend.memory`."""
    if torch.compiler.is_compiling() or not tensors:
        return None
    first, count = tensors[0], len(tensors)
    # a parameter is refused where it would be written, by name
    if set(map(type, tensors)) != {Tensor} or first.dtype not in _ORDINARY or first.is_nested:
        return None
    if set(map(_DTYPE, tensors)) != {first.dtype} or not all(map(_ON_CPU, tensors)):
        return None
    if torch.is_grad_enabled() and not writable and any(map(_IN_GRAPH, tensors)):
        return None
    try:
        if not all(map(Tensor.is_contiguous, tensors)) or any(map(Tensor.is_neg, tensors)):
            return None
        addresses = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, count)
    except RuntimeError:  # sparse, or wrapped by vmap or torch.func.grad
        return None
    return Memory(dtype_name(first), addresses, np.fromiter(map(Tensor.numel, tensors), np.int64, count))


def lies_at(tensor: Tensor) -> Any:
    """The bytes of a tensor's elements, on whatever device; see `clipcore.Backend.lies_at`."""
    start = 0 if torch.compiler.is_compiling() or not is_plain(tensor) else tensor.data_ptr()
    if not start:  # no elements, or none that are anywhere (meta)
        return id(tensor)
    if tensor.is_contiguous():  # the usual case, quick for a thousand small tensors
        return tensor.device, start, (1, tensor.nbytes)
    strides = [stride * tensor.itemsize for stride in tensor.stride()]
    return tensor.device, *footprint(start, tensor.shape, strides, tensor.itemsize)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense and of torch's own class, and no transformation is looking at it."""
    return (
        _is_ordinary(tensor)
        and tensor.layout is torch.strided
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _is_ordinary(tensor: Tensor) -> bool:
    # a subclass (FakeTensor, DTensor, a quantised tensor) may have no memory, or give it another meaning
    return type(tensor) in (Tensor, torch.nn.Parameter)


def _is_on_host(tensor: Tensor) -> bool:
    return _is_ordinary(tensor) and tensor.is_cpu and (tensor.layout is torch.strided or tensor.is_sparse)


def announce_writes(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that the tensors changed, as in-place operations do: it then refuses what it saved of them."""
    torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def memory(tensor: Tensor) -> Array:
    """A CPU tensor's elements as an array, without a copy unless conjugation or coalescing needs one."""
    return _as_array(values_of(tensor.detach() if tensor.requires_grad else tensor))


def values_of(tensor: Tensor) -> Tensor:
    """The tensor itself, or of a sparse one its values, duplicates summed in float64 and rounded once."""
    if not tensor.is_sparse:
        return tensor
    if tensor.is_coalesced() or tensor.device.type in DEVICES_WITHOUT_FLOAT64:
        return tensor.coalesce().values()
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return _round_once(tensor.to(wide).coalesce().values(), tensor.dtype)


def _round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 or complex128 values rounded once to another dtype.

    Torch goes through float32 and rounds twice; setting the last bit of an inexact float32 prevents that.
    """
    if dtype not in (torch.float16, torch.bfloat16) or values.requires_grad:  # bits have no derivative
        return values.to(dtype)
    narrow = values.to(torch.float32)
    bits = narrow.view(torch.int32)
    towards_zero = bits - (narrow.abs() > values.abs()).to(torch.int32)
    return torch.where(narrow == values, bits, towards_zero | 1).view(torch.float32).to(dtype)


def with_values(like: Tensor | None, values: Tensor) -> Tensor:
    """A tensor with other values: for a sparse `like` at its coalesced indices, else `values` itself."""
    if like is None or not like.is_sparse:
        return values
    indices = like.coalesce().indices()
    return torch.sparse_coo_tensor(indices, values, like.shape, is_coalesced=True, check_invariants=False)


def map_values(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """`function` of the tensor, or of the values of a sparse one."""
    return with_values(tensor, function(values_of(tensor)))


def from_host(array: Array, like: Tensor | None) -> Tensor:
    """A tensor that owns the array's memory, or a copy of it on the device of `like`."""
    return with_values(like, as_tensor(array).to(like.device if like is not None else "cpu"))


def to_array(tensor: Tensor) -> Array:
    """A tensor of any device and layout as a dense array, possibly a view of its memory."""
    return _as_array(to_dense(tensor.detach()).cpu())


def to_dense(tensor: Tensor) -> Tensor:
    """A sparse tensor of any layout as a dense one, duplicates summed; a dense one itself."""
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _as_array(tensor: Tensor) -> Array:
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    if tensor.dtype not in _EXTENDED:
        return tensor.numpy()
    integers, dtype = _EXTENDED[tensor.dtype]
    return tensor.view(integers).numpy().view(dtype)


def as_tensor(array: Array) -> Tensor:
    """A CPU tensor over an array's memory; a copy where torch cannot hold it (read-only, negative strides)."""
    array = np.asarray(array)
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    dtype = _TORCH_DTYPES.get(array.dtype)
    if dtype is None:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(f"int{8 * array.itemsize}")).view(dtype)
