"""Compiling: what Numba is to compile, and has to be taught first; each kernel once for each dtype, cached on disk.

Nothing here imports Numba before the first call.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from clipcore.clipping.fast.elements import Elements
from clipcore.clipping.kernels import Array

Function = Callable[..., Any]
F = TypeVar("F", bound=Function)

# A zero-size array tells a kernel its dtype. Numba computes with neither of the two of 16 bits: they are their bits.
LIKE: dict[str, Array] = {
    "float16": np.empty(0, np.uint16),
    "bfloat16": np.empty(0, np.int16),
    "float32": np.empty(0, np.float32),
    "float64": np.empty(0, np.float64),
}
# the same for the dtype in which it is multiplied
MULTIPLIED = {name: LIKE["float64" if name == "float64" else "float32"] for name in LIKE}

lock = threading.RLock()  # held while Numba compiles
_kernels: dict[Function, str] = {}
_helpers: list[Function] = []
_instructions: dict[Function, int] = {}
_ready: dict[tuple[Function, str], Function] = {}


def kernel(letters: str) -> Callable[[F], F]:
    """What `compiled` may be asked for, its arguments of the types in `_signature`, a letter each."""

    def declare(function: F) -> F:
        _kernels[function] = letters
        return function

    return declare


def helper(function: F) -> F:
    """What kernels call, compiled with them."""
    _helpers.append(function)
    return function


def instruction(lanes: int = 1) -> Callable[[F], F]:
    """A stub that kernels call, carried out by the method of `Elements` with its name."""

    def declare(function: F) -> F:
        _instructions[function] = lanes
        return function

    return declare


def compiled(function: Function, dtype: str = "float64") -> Function:
    """A kernel for a dtype (of some, every dtype's), compiled on first use."""
    key = function, dtype
    if key not in _ready:
        with lock:
            if key not in _ready:
                _ready[key] = _compile(function, dtype)
    return _ready[key]


def _compile(function: Function, dtype: str) -> Function:
    import numba

    _teach()
    # A name of its own for each dtype: two processes that add to one cache file at a time can mix up their entries.
    name = f"{function.__name__}_{dtype}_{_version()}"
    own = types.FunctionType(function.__code__, function.__globals__, name)
    own.__qualname__, own.__module__ = name, function.__module__
    signature = _signature(_kernels[function], dtype)
    result: Function
    try:
        result = numba.njit(signature, nogil=True, cache=True)(own)
    except Exception:  # no folder to write to, or a damaged file in it
        result = numba.njit(signature, nogil=True)(own)
    return result


@functools.cache
def _version() -> str:
    """What this package's files hold, as a digest: of them, Numba's cache watches only the one with the kernel."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _signature(letters: str, dtype: str) -> tuple[Any, ...]:
    import numba

    argument = {
        "l": numba.typeof(LIKE[dtype]),
        "m": numba.typeof(MULTIPLIED[dtype]),
        "s": numba.typeof(LIKE["float32"]),  # single
        "b": numba.int64,  # block, or another integer
        "d": numba.float64,
        "c": numba.boolean,  # condition
        "i": numba.int64[::1],
        "f": numba.float64[::1],
        "t": numba.int64[:, ::1],  # table
    }
    return tuple(argument[letter] for letter in letters)


@functools.cache
def _teach() -> None:
    """Let Numba compile what the kernels call: the helpers as they are, the instructions in LLVM's terms."""
    from numba.extending import register_jitable

    _check_compiler()
    for function in _helpers:
        register_jitable(function)
    for function, lanes in _instructions.items():
        _teach_instruction(function, lanes)


def _check_compiler() -> None:
    import numba
    from numba.core.registry import cpu_target

    if numba.config.DISABLE_JIT:
        raise RuntimeError("NUMBA_DISABLE_JIT is set, and these kernels work only when compiled: unset it")
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    if triple.startswith(("x86", "i686")) and "+f16c" not in features:
        # LLVM would call a function for each float16, does not find it, and ends the process
        raise RuntimeError(f"Numba compiles for a processor without F16C ({features or 'NUMBA_CPU_FEATURES is empty'})")


def _teach_instruction(function: Function, lanes: int) -> None:
    from numba import types as nb
    from numba.extending import lower_builtin, type_callable

    signature = inspect.signature(function)

    def result(like: Any, *_: Any) -> Any:
        return {"Array": like, "float": nb.float64, "None": nb.none}[signature.return_annotation]

    def emit(context: Any, builder: Any, typed: Any, arguments: Any) -> Any:
        like, *kinds = typed.args
        # of an array, the address of its elements
        values = [
            context.make_array(kind)(context, builder, value).data if isinstance(kind, nb.Array) else value
            for kind, value in zip(kinds, arguments[1:], strict=True)
        ]
        if typed.return_type == like:
            values.insert(0, context.make_array(like)(context, builder))
        value = getattr(Elements(builder, like.dtype.name, lanes), function.__name__)(*values)
        return context.get_dummy_value() if value is None else value

    result.__signature__ = signature  # type: ignore[attr-defined]
    type_callable(function)(lambda context: result)
    lower_builtin(function, nb.VarArg(nb.Any))(emit)
