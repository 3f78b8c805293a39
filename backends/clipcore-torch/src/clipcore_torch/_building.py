"""Models from outside: one layer built from its canonical description, a factory's model with a weight file."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipcore.errors import InvalidInput, MappingError

Shapes = Mapping[str, tuple[int, ...]]

_PICKLED = (".pt", ".pth", ".bin")  # names of torch's own format
WEIGHT_FILES = (*_PICKLED, ".safetensors")
_CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def build_layer(kind: str, settings: Mapping[str, Any], shapes: Shapes) -> nn.Module:
    """A module that is one layer of `kind`; see `clipcore.backend.ModelBackend.build_layer`.

    Raises:
        MappingError: torch has no such layer.
    """
    if kind not in _BUILDERS:
        raise MappingError(f"torch builds no layer of kind {kind!r}; expected one of {sorted(_BUILDERS)}")
    if (activation := settings.get("activation")) is not None:
        raise MappingError(f"{kind}: activation is {activation!r}; torch's layers have none, it is a module of its own")
    return _BUILDERS[kind](settings, shapes)


def _linear(settings: Mapping[str, Any], shapes: Shapes) -> nn.Module:
    outs, ins = shapes["kernel"]
    return nn.Linear(ins, outs, bias="bias" in shapes)


def _conv(settings: Mapping[str, Any], shapes: Shapes) -> nn.Module:
    groups, outs, ins, *window = shapes["kernel"]
    build: Callable[..., nn.Module] = _CONVS[len(window)]
    return build(
        groups * ins,
        groups * outs,
        tuple(window),
        stride=tuple(settings["stride"]),
        padding=_padding(settings, window),
        dilation=tuple(settings["dilation"]),
        groups=groups,
        bias="bias" in shapes,
        padding_mode=settings["padding_mode"],
    )


def _padding(settings: Mapping[str, Any], window: Sequence[int]) -> Any:
    padding, stride, dilation = settings["padding"], settings["stride"], settings["dilation"]
    if padding != "same" and all(before == after for before, after in padding):
        return tuple(before for before, _ in padding)
    totals = [d * (k - 1) for k, d in zip(window, dilation, strict=True)]
    same = tuple((total // 2, total - total // 2) for total in totals)
    if set(stride) == {1} and (padding == "same" or tuple(map(tuple, padding)) == same):
        return "same"
    raise MappingError(
        f"conv: padding {padding!r} with stride {tuple(stride)} is not symmetric; torch's layers pad both sides alike "
        f"(stride 1 apart): put an nn.ZeroPad before the layer"
    )


def _batch_norm(settings: Mapping[str, Any], shapes: Shapes) -> nn.Module:
    _refuse_half_affine("batch_norm", shapes)
    (channels,) = shapes["running_mean"]
    # SyncBatchNorm is the one class that takes data of any rank; in a single process it is the plain layer
    return nn.SyncBatchNorm(channels, settings["eps"], settings.get("momentum", 0.1), affine="scale" in shapes)


def _layer_norm(settings: Mapping[str, Any], shapes: Shapes) -> nn.Module:
    if "scale" not in shapes:
        raise MappingError("layer_norm: torch's layer has no bias without a scale: set the scale to ones")
    return nn.LayerNorm(shapes["scale"], settings["eps"], bias="bias" in shapes)


def _embedding(settings: Mapping[str, Any], shapes: Shapes) -> nn.Module:
    num, dim = shapes["kernel"]
    return nn.Embedding(num, dim)


def _refuse_half_affine(kind: str, shapes: Shapes) -> None:
    if ("scale" in shapes) != ("bias" in shapes):
        raise MappingError(f"{kind}: torch's layer has scale and bias both or neither; got {sorted(shapes)}")


_BUILDERS: dict[str, Callable[[Mapping[str, Any], Shapes], nn.Module]] = {
    "linear": _linear,
    "conv": _conv,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "embedding": _embedding,
}


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
