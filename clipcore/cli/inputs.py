"""What is typed on the command line, made into what the public API takes."""

from __future__ import annotations

import importlib
import os
import re
import sys
import zipfile
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

import clipcore as cc
from clipcore.cli.output import hushed

LIMITS: dict[str, Callable[[float], cc.Policy]] = {
    "value": cc.ClipByValue,
    "norm": cc.ClipByNorm,
    "global_norm": cc.ClipByGlobalNorm,
}


def parse_limit(text: str) -> Any:
    """A limit from `value:0.5`, `norm:1.0`, `global_norm:1.0`, or `delta:` and one of these.

    Raises:
        InvalidInput: it is none of them. InvalidPolicy: the number is out of range.

    >>> parse_limit("global_norm:1.0")
    ClipByGlobalNorm(nonfinite='propagate', max_norm=1.0, p=2.0)
    """
    kind, _, rest = text.partition(":")
    if kind == "delta":
        return cc.Delta(parse_limit(rest))
    try:
        return LIMITS[kind](float(rest))
    except (KeyError, ValueError) as err:
        if isinstance(err, cc.ClipcoreError):
            raise
        raise cc.InvalidInput(
            f"limit {text!r} is not understood; expected value:NUMBER, norm:NUMBER, global_norm:NUMBER, "
            f"or delta: and one of these, say delta:global_norm:1.0"
        ) from err


def parse_sample(text: str, seed: int) -> Any:
    """A sample from a file (`x.npy` an array, `x.npz` a dict of them) or a shape (`1,3,224,224`: normal, float32).

    Raises:
        InvalidInput: no such file, not a file of arrays, or not a shape.
    """
    if re.fullmatch(r"\d+(,\d+)*", text):
        shape = [int(length) for length in text.split(",")]
        return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if Path(text).suffix not in (".npy", ".npz"):
        raise cc.InvalidInput(f"sample {text!r} is neither a shape, say 1,3,224,224, nor a .npy or .npz file")
    try:
        with open(text, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            return loaded if isinstance(loaded, np.ndarray) else dict(loaded)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as err:
        raise cc.InvalidInput(f"sample {text!r} cannot be read: {err}") from err


def load_model(name: str, weights: str | None = None) -> Any:
    """The model that `backend:package.module:factory` names; the current directory is importable.

    Args:
        name: the factory is called without arguments; a model in its place is taken as it is.
        weights: the framework's own file of weights to load into it.
    Raises:
        BackendError: no such backend. InvalidInput: no such module, factory or file, or the factory fails.
    """
    backend, factory = _find(name)
    if weights is not None and not os.path.exists(weights):
        raise cc.InvalidInput(f"model {name!r}: the file of weights {weights!r} does not exist")
    try:
        return backend.load_model((lambda: factory) if backend.is_model(factory) else factory, weights)
    except cc.ClipcoreError:
        raise
    except (Exception, SystemExit) as err:  # a script that exits says nothing about whether the models agree
        raise cc.InvalidInput(f"model {name!r} cannot be made: {type(err).__name__}: {err}") from err


def _find(name: str) -> tuple[Any, Any]:
    """The backend and the factory that a model's name names."""
    backend, module_name, attribute = _parts(name)
    module = _import(name, module_name)
    try:
        return backend, reduce(getattr, attribute.split("."), module)
    except AttributeError as err:
        raise cc.InvalidInput(
            f"model {name!r}: module {module_name!r} ({getattr(module, '__file__', None)}) has no {attribute!r}"
        ) from err


def _parts(name: str) -> tuple[Any, str, str]:
    """The backend of a model, its module and the factory's name."""
    if len(parts := name.split(":")) != 3 or not all(parts):
        raise cc.InvalidInput(f"model {name!r} is not of the form backend:module:factory, say torch:nets.small:build")
    backend_name, module_name, attribute = parts
    with hushed():
        backend: Any = cc.get_backend(backend_name)
    if not hasattr(backend, "load_model"):
        raise cc.InvalidInput(f"model {name!r}: backend {backend_name!r} has no models, it clips arrays alone")
    return backend, module_name, attribute


def _import(name: str, module_name: str) -> Any:
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as err:
        raise cc.InvalidInput(
            f"model {name!r}: module {module_name!r} cannot be imported from {here}: {type(err).__name__}: {err}"
        ) from err


def check_output(path: str) -> None:
    """Refuse a file that could not be written, before any work is done for it.

    Raises:
        InvalidInput: its folder does not exist, or it is a folder itself.
    """
    if os.path.isdir(path):
        raise cc.InvalidInput(f"output {path!r} is a folder; name a file in it")
    if not (folder := Path(path).resolve().parent).is_dir():
        raise cc.InvalidInput(f"output {path!r}: the folder {str(folder)!r} does not exist; make it first")


def check_weight_file(path: str, name: str) -> None:
    """Refuse a file whose name says no format in which the model's framework keeps weights.

    Args:
        path: where the weights shall go.
        name: the model, as backend:module:factory; nothing but the backend is imported.
    Raises:
        BackendError: no such backend. InvalidInput: the file's name has another ending.
    """
    backend, _, _ = _parts(name)
    if not path.endswith(backend.weight_files):
        raise cc.InvalidInput(
            f"output {path!r}: backend {backend.name!r} writes weights to files named {', '.join(backend.weight_files)}"
        )


def parse_rules(texts: list[str] | None) -> list[tuple[str, str]]:
    """The pairs of names that --rule gives.

    Raises:
        InvalidInput: one has no "=".
    """
    pairs = [text.partition("=") for text in texts or ()]
    for source, separator, target in pairs:
        if not (source and separator and target):
            raise cc.InvalidInput(f"--rule {source + separator + target!r}; expected SOURCE=TARGET")
    return [(source, target) for source, _, target in pairs]
