"""Models run with all digits of float32, whatever the speed of training asks for; torch's flags for that."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

# where torch 2.9 and newer keep the precision of each kind of operation, in `torch.backends`
_OPERATIONS = ("cudnn.conv", "cudnn.rnn", "cuda.matmul", "mkldnn.conv", "mkldnn.rnn", "mkldnn.matmul")


class _Flag(NamedTuple):
    read: Callable[[], Any]
    write: Callable[[Any], None]
    full: Any  # its value for full precision


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """float32 with its 24 digits: on a device torch's convolutions have 11 by default (TF32), and its products may."""
    flags = list(_flags())
    before = [flag.read() for flag in flags]
    try:
        for flag in flags:
            flag.write(flag.full)
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.write(value)


def _flags() -> Iterator[_Flag]:
    """The older flags first, since each of these writes newer ones as well."""
    older = (
        _attribute(torch.backends.cudnn, "allow_tf32", False),
        _Flag(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    )
    yield from filter(_is_readable, older)
    for path in _OPERATIONS:
        place = functools.reduce(lambda found, name: getattr(found, name, None), path.split("."), torch.backends)
        if hasattr(place, "fp32_precision"):
            yield _attribute(place, "fp32_precision", "ieee")


def _attribute(place: Any, name: str, full: Any) -> _Flag:
    return _Flag(functools.partial(getattr, place, name), functools.partial(setattr, place, name), full)


def _is_readable(flag: _Flag) -> bool:
    try:
        flag.read()
    except RuntimeError:  # torch reads an older flag no more once newer ones say something else
        return False
    return True
