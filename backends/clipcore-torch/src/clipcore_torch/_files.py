"""Models from files: a factory's model with a weight file, and back."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipcore.errors import InvalidInput

_PICKLED = (".pt", ".pth", ".bin")  # names of torch's own format
WEIGHT_FILES = (*_PICKLED, ".safetensors")


def load_model(factory: Any, weights: str | None) -> nn.Module:
    """The model that `factory` makes (or is), with the weights of a .pt, .pth, .bin or .safetensors file.

    Raises:
        InvalidInput: the factory makes no model, the file cannot be read, or its tensors are not the model's.
    """
    model = factory if isinstance(factory, nn.Module) else _made(factory)
    if weights is not None:
        state = _read(Path(weights))
        try:
            _load_state(model, state)
        except RuntimeError as err:
            raise InvalidInput(f"weights {weights!r} are not those of {type(model).__name__}: {err}") from err
    return model


def _load_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a state dict, where of tied tensors one name is enough (safetensors keeps one)."""
    own = model.state_dict(keep_vars=True)
    given = {id(tensor): state[name] for name, tensor in own.items() if name in state}
    model.load_state_dict({**{name: given[id(t)] for name, t in own.items() if id(t) in given}, **state})


def save_weights(model: nn.Module, path: str) -> None:
    """Write the model's state dict as .pt, .pth, .bin or .safetensors, as the name says.

    Raises:
        InvalidInput: the name has another ending, or safetensors is not installed.
    """
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        _safetensors().save_model(model, path)
    elif suffix in _PICKLED:
        torch.save(model.state_dict(), path)
    else:
        raise InvalidInput(f"output {path!r}: expected a file named {', '.join(WEIGHT_FILES)}")


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as err:
        raise InvalidInput("a .safetensors file needs safetensors: pip install safetensors") from err
    return safetensors.torch


def _made(factory: Any) -> nn.Module:
    name = getattr(factory, "__qualname__", repr(factory))
    try:
        model = factory()
    except Exception as err:
        raise InvalidInput(f"factory {name} must build a model when called without arguments: {err}") from err
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"factory {name} made a {type(model).__name__}; expected a torch.nn.Module")
    return model


def _read(path: Path) -> Mapping[str, Any]:
    """The state dict in a file; code in it is never run."""
    if not path.is_file():
        raise InvalidInput(f"weights {str(path)!r}: there is no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix not in _PICKLED:
        raise InvalidInput(f"weights {str(path)!r}: expected a file named {', '.join(WEIGHT_FILES)}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as err:
        raise InvalidInput(
            f"weights {str(path)!r} cannot be read as tensors alone: {err}; save model.state_dict() with torch.save"
        ) from err
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise InvalidInput(f"weights {str(path)!r} hold a {type(state).__name__}; expected a state dict")
    return state


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    safetensors = _safetensors()
    from safetensors import SafetensorError

    try:
        state: Mapping[str, Any] = safetensors.load_file(path)
        return state
    except SafetensorError as err:
        raise InvalidInput(f"weights {str(path)!r} are no safetensors file: {err}") from err
