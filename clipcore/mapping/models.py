"""What finding and verifying a plan do to models for a moment: run, record, randomise, and put back bitwise."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, islice, product
from typing import Any

import numpy as np

from clipcore.backend import Layer, TracingBackend
from clipcore.errors import ClipcoreError, InvalidInput
from clipcore.mapping.align import moved
from clipcore.mapping.apart import Apart, Parts
from clipcore.mapping.kinds import base_role, kernel_role
from clipcore.mapping.layouts import apply_pattern, canonical_layout, sizes_of
from clipcore.mapping.plan import cut
from clipcore.plugins import backend_of
from clipcore.structure import leaves, map_leaves, rebuild

Array = np.ndarray[Any, np.dtype[Any]]


class Side:
    """One of the two models, with its backend, its layers by name, and its tensors' layers."""

    def __init__(self, model: Any, which: str) -> None:
        self.model, self.which = model, which
        self.backend: TracingBackend = _tracing_backend(model, which)
        self.layers: dict[str, Layer] = {layer.name: layer for layer in self.backend.layers(model)}
        if not self.layers:
            raise InvalidInput(f"the {which} ({type(model).__name__}) has no layer that owns tensors: nothing to map")

        self._fused: Parts = {}
        parts = [t for layer in self.layers.values() for t in layer.tensors.values()]
        self.tensors = {t.name: replace(t, shape=t.stored_shape, within=(), whole=()) for t in parts}

    def take_apart(self, parts: Parts) -> None:
        """From now on these layers are their parts."""
        self._fused = parts
        whole = list(self.layers.values())
        self.layers = {part.name: part for layer in whole for part in parts.get(layer.name, (layer,))}

    def canonical(self, layer: Layer) -> dict[str, Array]:
        """A layer's tensors by role, in the canonical layouts."""
        stored = self.backend.read(self.model, [tensor.name for tensor in layer.tensors.values()])
        return {
            role: apply_pattern(
                cut(stored[tensor.name], tensor.within),
                f"{tensor.layout} -> {canonical_layout(layer, role)}",
                sizes_of(layer, tensor),
                tensor.name,
            )
            for role, tensor in layer.tensors.items()
        }

    @property
    def channels(self) -> str:
        """Where the model's data has the channel axis: as its layers are set, else as is usual in its framework."""
        found = {layer.settings["channels"] for layer in self.layers.values() if "channels" in layer.settings}
        return found.pop() if len(found) == 1 else self.backend.channels

    def run(self, sample: Any, watcher: Any = None) -> Any:
        """The outputs on `sample`, as far as they can be compared; a failure names the sample's shape."""
        if watcher is not None and self._fused:
            watcher = Apart(watcher, self._fused)
        try:
            with _hosts_generators():
                return comparable(self.backend.run(self.model, sample, watcher))
        except ClipcoreError as err:
            raise InvalidInput(f"the {self.which}: {one_line(err)}") from err
        except Exception as err:
            raise InvalidInput(
                f"the {self.which} ({type(self.model).__name__}) does not run on a sample of shape "
                f"{describe(sample)}: {type(err).__name__}: {one_line(err)}; give a sample as this model takes it"
            ) from err

    @contextmanager
    def restored(self, names: Iterable[str] | None = None) -> Iterator[None]:
        """On leaving, also after an exception, the named tensors (all, by default) are bitwise what they were."""
        before = self.copies(self.tensors if names is None else names)
        try:
            yield
        finally:
            self.backend.write(self.model, before)

    def copies(self, names: Iterable[str]) -> dict[str, Array]:
        """The named tensors as they are now, whatever is written later."""
        return self.backend.read(self.model, list(names), keep=True)

    def hiding(self) -> dict[str, Array]:
        """Random values for tensors that would hide an error: all elements equal, as fresh biases and scales are."""
        rng = np.random.default_rng(0)
        arrays = self.backend.read(self.model, list(self.tensors))
        values: dict[str, Array] = {}
        for tensor in (t for layer in self.layers.values() for t in layer.tensors.values()):
            part = cut(values.get(tensor.name, arrays[tensor.name]), tensor.within)
            if part.size and tensor.dtype in _RANDOMISED and (part == part.ravel()[0]).all():
                whole = values.setdefault(tensor.name, np.array(arrays[tensor.name]))
                cut(whole, tensor.within)[...] = _random(rng, base_role(tensor.role), part)
        return values


_RANDOMISED = ("float16", "bfloat16", "float32", "float64")


def _random(rng: np.random.Generator, role: str, array: Array) -> Array:
    if role == "slope":
        # one for all channels, as it was: the other model may have a single one
        return np.full(array.shape, rng.normal(0.0, 0.3), array.dtype)
    # scales and variances stay near 1, so that no layer's result is drowned by another's
    near_one = role in ("scale", "running_var")
    values = rng.uniform(0.5, 1.5, array.shape) if near_one else rng.normal(0.0, 0.3, array.shape)
    return np.asarray(values, array.dtype)


def _tracing_backend(model: Any, which: str) -> TracingBackend:
    backend: Any = backend_of(model)
    if not hasattr(backend, "run") or not backend.is_model(model):
        raise InvalidInput(
            f"the {which} is an object of type {type(model).__name__}; expected a model of a backend that has models"
        )
    tracing: TracingBackend = backend
    return tracing


@contextmanager
def written(side: Side, values: Mapping[str, Array]) -> Iterator[None]:
    """The named tensors hold other values for a moment."""
    with side.restored(values):
        if values:
            side.backend.write(side.model, values)
        yield


_SEEDS = count()


@contextmanager
def _hosts_generators() -> Iterator[None]:
    """Python's and NumPy's global random numbers: other ones in each run, so that a model which draws some shows it;
    afterwards the user's go on.
    """
    python, numpy, seed = random.getstate(), np.random.get_state(), next(_SEEDS)
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def comparable(outputs: Any) -> Any:
    """A model's outputs with its plain numbers and texts as arrays; any other object, a cache say, is left out."""
    return map_leaves(_comparable, outputs)


def _comparable(leaf: Any) -> Array | None:
    return np.asarray(leaf) if isinstance(leaf, np.ndarray | np.generic | int | float | complex | str | bytes) else None


def describe(sample: Any) -> str:
    """The shapes of a sample, for a message."""
    shapes = [str(tuple(np.shape(leaf))) for _, leaf in leaves(sample)]
    return shapes[0] if len(shapes) == 1 else f"({', '.join(shapes)})"


def one_line(err: Exception, longest: int = 400) -> str:
    """What a framework said, on one line, without colours."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(err)).split())
    return text if len(text) <= longest else f"{text[:longest]} …"


def as_arrays(sample: Any) -> Any:
    """The sample with every tensor as a NumPy array; a list of numbers is one array, a list of arrays several inputs.

    Raises:
        InvalidInput: it holds no numbers, or a NaN or inf.
    """
    if isinstance(sample, list):
        numbers = all(isinstance(leaf, int | float | complex | np.generic) for _, leaf in leaves(sample))
        sample = _rectangular(sample) if numbers else tuple(sample)
    arrays = map_leaves(_to_array, sample)
    if not list(leaves(arrays)):
        raise InvalidInput(f"sample is {sample!r}; expected an array or tensor, or a tuple or dict of them")
    for path, array in leaves(arrays):
        if array.size == 0:
            raise InvalidInput(f"sample{path} has shape {array.shape}, no element: nothing would be compared")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InvalidInput(f"sample{path} holds NaN or inf: no comparison would mean anything; give finite numbers")
    return arrays


def _rectangular(numbers: list[Any]) -> Array:
    try:
        return np.asarray(numbers)
    except ValueError as err:
        raise InvalidInput(f"sample is {numbers!r:.60}, a list whose rows differ in length; give one array") from err


def _to_array(leaf: Any) -> Array:
    if isinstance(leaf, np.ndarray):
        return leaf
    if isinstance(leaf, int | float | bool):
        return np.asarray(leaf)
    try:
        return backend_of(leaf).to_numpy(leaf)
    except Exception as err:
        raise InvalidInput(f"the sample is of type {type(leaf).__name__}; expected arrays or tensors: {err}") from err


_MOST_FORMS = 16


def target_samples(sample: Any, source: Side, target: Side) -> list[Any]:
    """The forms in which the target may want the sample, the likeliest first: each input as it is, or with its channel
    axis moved, as the target declares it.
    """
    arrays = [leaf for _, leaf in leaves(sample)]
    declared: Sequence[tuple[int | None, ...] | None] | None = target.backend.input_shapes(target.model)
    if declared is None or len(declared) != len(arrays):
        declared = [None] * len(arrays)
    ways = [_ways(array, shape, source, target) for array, shape in zip(arrays, declared, strict=True)]
    return [rebuild(sample, iter(form)) for form in islice(product(*ways), _MOST_FORMS)]


def _ways(array: Array, declared: tuple[int | None, ...] | None, source: Side, target: Side) -> list[Array]:
    """The ways in which the target may want one input, the likeliest first."""
    as_it_is, *to_last_or_first = [arrangement.apply(array) for arrangement in moved(array.ndim)]
    usual = [as_it_is]
    if to_last_or_first and source.channels != target.channels:
        # an input with as many axes as a convolution's kernel is what it runs over: an image, and no sequence
        convolutions = [layer for layer in source.layers.values() if layer.kind in ("conv", "conv_transpose")]
        place = 0 if any(len(layer.tensors[kernel_role(layer)].shape) == array.ndim for layer in convolutions) else 1
        usual.insert(place, to_last_or_first[0 if target.channels == "last" else 1])
    if declared is None:
        return usual
    return _fitting(usual, declared) or _fitting([as_it_is, *to_last_or_first], declared) or usual


def _fitting(arrays: Sequence[Array], declared: tuple[int | None, ...]) -> list[Array]:
    fitting = [array for array in arrays if array.ndim == len(declared)]
    return [a for a in fitting if all(want in (None, have) for want, have in zip(declared, a.shape, strict=True))]


def none_taken(forms: Sequence[Any], refusal: ClipcoreError) -> InvalidInput:
    """The error for a sample that the target takes in none of the forms that were worked out for it."""
    tried = " or ".join(map(describe, forms))
    error: InvalidInput = InvalidInput(
        f"{refusal}; tried as {tried}: give target_sample=, the same input as the target takes it"
    )
    return error
