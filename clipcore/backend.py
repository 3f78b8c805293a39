"""What a backend implements, in three tiers: clipping, models, tracing. A backend may stop after the first.

Tensors are the framework's own (`T`); at the edges they become NumPy arrays (bfloat16 as `ml_dtypes.bfloat16`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from clipcore.clipping.report import ClipReport

NonFiniteMode = Literal["propagate", "raise", "zero", "skip"]


class Primitives(Protocol):
    """What a policy is written over: measure, decide, apply, over flat lists of floating tensors.

    clipcore has them for NumPy arrays, exact to the last bit, and runs every eager CPU tensor through those. A
    backend's own run where that is impossible: on devices, in traced functions, under differentiation. They never
    branch on data in Python, never wait for a device, and are within 1 ulp of the tensor's dtype.
    """

    def measure(self, tensors: Sequence[Any], p: float, *, zero_nonfinite: bool) -> tuple[list[Any], Any]:
        """The joint p-norm of `tensors`, and how many elements are not finite, as a value that `decide` takes.

        With `zero_nonfinite` those elements count as 0, and the returned tensors have 0 in their place; else the
        tensors come back as they are.
        """

    def decide(
        self, measures: Sequence[Any], max_norm: float, nonfinite: NonFiniteMode
    ) -> tuple[list[Any], ClipReport]:
        """One factor per measure: 1 where norm <= max_norm, else max_norm / norm.

        Where any measure counts non-finite elements: all NaN for "propagate", all 0 for "skip", and NonFinite is
        raised for "raise".
        """

    def apply(self, tensors: Sequence[Any], scale: Any) -> list[Any]:
        """Each tensor times one factor of `decide`: unchanged for 1, zeros for 0 and NaN for NaN, whatever it held."""

    def clamp(
        self, tensors: Sequence[Any], low: float, high: float, nonfinite: NonFiniteMode
    ) -> tuple[list[Any], ClipReport]:
        """Each element bounded to [low, high], a bound rounded to the tensor's dtype (a finite one stays finite)."""


@runtime_checkable
class Backend(Protocol):
    """Tier 1, clipping: recognise a framework's tensors, see their memory as NumPy arrays, make tensors of arrays."""

    name: str

    def is_tensor(self, obj: Any) -> bool:
        """Whether `obj` is a tensor of this framework (dense or sparse, variable or parameter)."""

    def is_parameter(self, tensor: Any) -> bool:
        """Whether `tensor` is a model's parameter, beside which the framework keeps a gradient (torch)."""

    def dtype_name(self, tensor: Any) -> str:
        """NumPy's name of the tensor's dtype: "float32", "bfloat16", "complex64", "int64" …

        Raises:
            InvalidInput: the tensor is of a kind that cannot be clipped, whatever its dtype: "a masked array; …".
        """

    def to_host(self, tensors: Sequence[Any], *, writable: bool = False) -> list[np.ndarray] | None:
        """The tensors' own memory as arrays, without a copy where the framework allows it; of a sparse tensor, its
        values after duplicates were summed.

        None where it cannot be had at once: a tensor on a device, in a traced function, or under differentiation.
        With `writable`, writing into the arrays must change the tensors; None where it would not.
        """

    def from_host(self, array: np.ndarray, like: Any) -> Any:
        """A tensor with the values of `array`, of the class of `like` (its device, sparsity and indices).

        `like` may be None, as in the conformance suite: then a plain tensor on the CPU.
        It may take the array's memory as its own: the caller gives it up. Fresh arrays are aligned to 64 bytes.
        """

    def primitives(self) -> Primitives:
        """The framework's own primitives, for tensors that `to_host` cannot show."""

    def assign_(self, tensor: Any, value: Any) -> None:
        """Overwrite `tensor` with the tensor `value`, in place; InvalidInput where tensors of this class cannot be."""

    def gradients(self, model_or_params: Any) -> list[Any]:
        """The gradients that the framework keeps beside the parameters, each once, for clipping in place."""

    def weights(self, model_or_params: Any) -> list[Any]:
        """The trainable tensors of a model (never running statistics), each once, for limiting in place."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a layer, as its framework stores it.

    Attributes:
        name: unique in the model, as the framework's users know it ("conv1.weight", "conv1/kernel").
        role: what it is to its layer: "kernel", "bias", "scale", "running_mean" …
        layout: the order of its named axes, as einops writes it: "(group out) in ...", "... in (group out)".
        shape: as stored.
        dtype: NumPy's name of it.
        trainable: by its role, frozen now or not: False for running statistics and other buffers.
    """

    name: str
    role: str
    layout: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool = True


@dataclass(frozen=True)
class Layer:
    """One layer of a model that owns tensors: what kind it is, its tensors by role, its settings by canonical name."""

    name: str
    kind: str
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)


class ModelBackend(Backend, Protocol):
    """Tier 2, models: describe a model's layers, read and write their tensors."""

    channels: Literal["first", "last"]  # where the framework's convolutions have the channel axis by default
    weight_files: tuple[str, ...]  # endings of the files that `save_weights` writes and `load_model` reads

    def is_model(self, obj: Any) -> bool:
        """Whether `obj` is a model of this framework."""

    def load_model(self, factory: Any, weights: str | None) -> Any:
        """Call `factory`, and load the framework's own weight file into the model where one is named."""

    def save_weights(self, model: Any, path: str) -> None:
        """Write the model's weights in the framework's own format that the file's name says."""

    def layers(self, model: Any) -> list[Layer]:
        """Every layer that owns tensors, each once, in the order in which the model lists them.

        A layer of no known kind is listed with kind "torch:ClassName" (its framework and class) and layout "..." for
        each tensor: it maps to a layer of the same class.
        """

    def read(self, model: Any, names: Sequence[str]) -> dict[str, np.ndarray]:
        """The named tensors as arrays in their stored layout, possibly views of the model's memory: copy to keep."""

    def write(self, model: Any, values: Mapping[str, np.ndarray]) -> None:
        """Overwrite the named tensors, shapes and dtypes as stored; never keeps a reference to an array."""

    def build_layer(self, kind: str, settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Any:
        """A model that is one layer of `kind`, for conformance: canonical settings, canonical shapes by role.

        MappingError where the framework has no such layer (asymmetric padding, a fused activation).
        """


class TrainingBackend(Backend, Protocol):
    """Optimizers that a policy can be attached to."""

    def attach(self, optimizer: Any, policy: Any, model: Any) -> Any:
        """A `clipcore.training.Attachment`: from now on every step's gradients are clipped, see `clipcore.attach`."""

    def compile(self, model: Any, loss_fn: Any, optimizer: Any, policy: Any) -> tuple[Any, Any, Any]:
        """See `clipcore.compile`."""


class Watcher(Protocol):
    """Sees a model run, layer by layer, in order of execution; may replace what flows."""

    def before(self, layer: str, inputs: list[np.ndarray]) -> list[np.ndarray] | None:
        """Called as the named layer is about to run; weights written here take effect. Arrays replace its inputs."""

    def after(self, layer: str, output: Any) -> Any | None:
        """Called with what the layer gave (an array, or nested arrays). A value replaces it."""


class TracingBackend(ModelBackend, Protocol):
    """Tier 3, tracing: run a model in inference mode and watch its layers."""

    def run(self, model: Any, sample: Any, watcher: Watcher | None = None) -> Any:
        """The model's outputs on `sample`, as (nested) arrays. Gradients are not built; modes, buffers and random
        state are afterwards what they were, also after an exception.

        sample: an array or tensor, a tuple of positional arguments, or a dict (keyword arguments of a torch module;
            the one dict input of a Keras or TensorFlow model).
        """

    def to_array(self, tensor: Any) -> np.ndarray:
        """The values of a tensor on any device, also of one under differentiation, possibly as a view of its memory."""

    def input_shapes(self, model: Any) -> list[tuple[int | None, ...]] | None:
        """The shapes that the model declares for its inputs (None for a free axis); None where it declares none."""

    def double(self, model: Any) -> Any | None:
        """A float64 copy of the model, to measure rounding against; None where the framework cannot make one."""
