"""Tensors and their memory: recognised, shown as NumPy arrays without a copy, and made of arrays again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

# There is no public way to ask whether a tf.GradientTape records a tensor.
from tensorflow.python.eager import record

from clipcore.clipping.kernels import empty_like, round_once
from clipcore.errors import InvalidInput
from clipcore.memory import lent
from clipcore_tensorflow._elements import coalesced

Array = np.ndarray[Any, np.dtype[Any]]

_Eager = type(tf.constant(0))
_ALIGNMENT = 64  # bytes; the process aborts where TensorFlow takes memory that is aligned to less


def is_variable(obj: Any) -> bool:
    """Whether `obj` is a variable of TensorFlow, or of Keras on TensorFlow."""
    return isinstance(obj, tf.Variable) or _is_keras_variable(obj)


def is_tensor(obj: Any) -> bool:
    """Whether `obj` is a dense or sparse tensor, eager or symbolic, or a variable; a KerasTensor holds no values."""
    return isinstance(obj, tf.Tensor | tf.IndexedSlices | tf.Variable) or _is_keras_variable(obj)


def _is_keras_variable(obj: Any) -> bool:
    return isinstance(obj, keras.Variable) and isinstance(tf_variable(obj), tf.Variable)


def tf_variable(variable: Any) -> Any:
    """The tf.Variable under a Keras variable, or the tf.Variable itself."""
    if not isinstance(variable, keras.Variable):
        # Keras 2's variable of mixed precision, which casts as well, is a tf.Variable around one
        inner = getattr(variable, "_variable", None)
        return inner if isinstance(variable, tf.Variable) and isinstance(inner, tf.Variable) else variable
    # `.value` casts to the compute dtype while a layer of mixed precision runs
    return variable.value if getattr(variable, "_value", None) is None else variable._value


def dtype_name(tensor: Any) -> str:
    """NumPy's name of the dtype of a tensor or variable."""
    return str(tf.as_dtype(tensor.dtype).name)


def to_array(tensor: Any) -> Array:
    """An eager tensor or variable as an array: its own memory on a CPU, a copy from a device or of a sparse one."""
    tensor = tf.convert_to_tensor(tensor) if isinstance(tensor, tf.IndexedSlices) else _value(tensor)
    return _view(tensor) if _on_cpu(tensor) else np.asarray(tensor.numpy())


def to_host(tensors: Sequence[Any], *, writable: bool = False) -> list[Array] | None:
    """See `clipcore.backend.Backend.to_host`."""
    if writable:
        for tensor in tensors:
            check_assignable(tensor)
        return None  # a variable's memory is TensorFlow's to write
    if not tf.executing_eagerly():
        return None
    plain = all(type(tensor) is _Eager for tensor in tensors)  # the usual case, quick for a thousand small tensors
    dense = list(tensors) if plain else [part for tensor in tensors for part in _dense_parts(tensor)]
    if not all(map(_on_cpu, dense)) or record.should_record_backprop(dense):
        return None
    return [_coalesced(t) if isinstance(t, tf.IndexedSlices) else _view(t) for t in map(_value, tensors)]


def to_dense(tensor: Any) -> Any:
    """See `clipcore.backend.Backend.to_dense`.

    Raises:
        InvalidInput: a sparse tensor that does not say its shape.
    """
    if not isinstance(tensor, tf.IndexedSlices):
        return tensor
    if tensor.dense_shape is None:
        raise InvalidInput(
            f"a tf.IndexedSlices with values of shape {tuple(tensor.values.shape)} has no dense_shape, and the policy "
            f"needs all of its elements: make it with dense_shape="
        )
    shape = tf.get_static_value(tensor.dense_shape)
    shape = tensor.dense_shape if shape is None else shape.tolist()
    host = to_host([tensor])
    if host is None:
        sums = coalesced(tensor)  # what is left over of duplicates is zeros, which change nothing
        return tf.tensor_scatter_nd_add(tf.zeros(shape, tensor.dtype), sums.indices[:, None], sums.values)
    unique, inverse = _unique(tensor)
    dense = empty_like(np.broadcast_to(np.zeros((), host[0].dtype), shape))
    dense[...] = 0
    dense[_view(tensor.indices) if inverse is None else unique] = host[0]
    return to_tensor(dense)


def check_assignable(tensor: Any) -> None:
    """Refuse what is no variable with InvalidInput."""
    if not is_variable(tensor):
        raise InvalidInput(f"a {type(tensor).__name__} cannot be changed in place: tf.Tensor is immutable; use cc.clip")


def from_host(array: Array, like: Any) -> Any:
    """See `clipcore.backend.Backend.from_host`; for a variable, a tensor that it can be assigned."""
    if isinstance(like, tf.IndexedSlices):
        indices, inverse = _unique(like)
        kept = like.indices if inverse is None else tf.constant(indices)
        return tf.IndexedSlices(to_tensor(array), kept, like.dense_shape)
    return to_tensor(array)


def to_tensor(array: Array) -> tf.Tensor:
    """An eager CPU tensor that takes the array's memory as its own where it can, else a copy."""
    takes_memory = array.size and array.__array_interface__["data"][0] % _ALIGNMENT == 0  # array.ctypes is slow
    if not (takes_memory and array.flags.c_contiguous and array.flags.writeable):
        with tf.device("CPU"):
            return tf.constant(array)
    if array.dtype.name == "bfloat16":  # unknown to NumPy's dlpack
        with tf.device("CPU"):
            return tf.bitcast(to_tensor(array.view(np.uint16)), tf.bfloat16)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def to_own_tensor(array: Array) -> tf.Tensor:
    """An eager CPU tensor with a copy of the array, rearranged on the way where the array is a rearranged view: by
    TensorFlow's threads, which are several times as fast as NumPy.
    """
    order = np.argsort([-stride for stride in array.strides])
    stored = array if array.flags.c_contiguous else array.transpose(order)
    if not stored.flags.c_contiguous or not (array.dtype.isbuiltin == 1 or array.dtype.name == "bfloat16"):
        return tf.constant(array)
    with tf.device("CPU"):
        tensor = to_tensor(lent(stored))
        # where only axes of length 1 change places, a transpose would be the memory that was lent
        return tf.raw_ops.DeepCopy(x=tensor) if stored is array else tf.transpose(tensor, np.argsort(order))


def _value(tensor: Any) -> Any:
    """A variable's value, which shares its memory; another tensor itself."""
    if type(tensor) is _Eager:
        return tensor
    plain = tf_variable(tensor)
    return plain.value() if isinstance(plain, tf.Variable) else plain


def _view(tensor: tf.Tensor) -> Array:
    """The memory of an eager CPU tensor."""
    try:
        return np.asarray(tensor)
    except ValueError:  # a bfloat16 scalar's __array__ gives no array (TensorFlow 2.21)
        return np.asarray(tensor.numpy())


def _dense_parts(tensor: Any) -> list[Any]:
    if isinstance(tensor, tf.IndexedSlices):
        return [tensor.values, tensor.indices]
    return [] if is_variable(tensor) and _on_cpu(tf_variable(tensor)) else [tf_variable(tensor)]


def _on_cpu(tensor: Any) -> bool:
    """Whether the values are there, and in the memory of the CPU."""
    if type(tensor) is _Eager:
        return "CPU" in tensor.backing_device
    if isinstance(tensor, tf.Variable):
        return "CPU" in tensor.device
    return not tf.is_symbolic_tensor(tensor) and "CPU" in tensor.backing_device


def _unique(slices: tf.IndexedSlices) -> tuple[Array, Array | None]:
    """The sorted indices without duplicates, and where each row goes; None where there are no duplicates."""
    indices = _view(slices.indices)
    unique, inverse = np.unique(indices, return_inverse=True)
    return unique, inverse.reshape(-1) if unique.size < indices.size else None


def _coalesced(slices: tf.IndexedSlices) -> Array:
    """The values, those of one index summed in float64 and rounded once."""
    values = _view(slices.values)
    unique, inverse = _unique(slices)
    if inverse is None:
        return values
    wide = np.complex128 if values.dtype.kind == "c" else np.float64
    total = np.zeros((unique.size, *values.shape[1:]), wide)
    with np.errstate(all="ignore"):
        np.add.at(total, inverse, values.astype(wide))
        return total.astype(values.dtype) if values.dtype.kind == "c" else round_once(total, values.dtype)
