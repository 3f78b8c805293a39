"""What a backend implements, in three tiers: clipping, models, tracing. A backend may stop after the first.

Tensors are the framework's own (`T`); at the edges they become NumPy arrays (bfloat16 as `ml_dtypes.bfloat16`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from clipcore.clipping.report import ClipReport

NonFiniteMode = Literal["propagate", "raise", "zero", "skip"]


Axes = tuple[int, ...]  # axes of a tensor, counted from the first


class Memory(NamedTuple):
    """Where contiguous tensors of one dtype lie in the CPU's memory.

    Attributes:
        dtype: "float16", "bfloat16", "float32" or "float64".
        addresses: of the first element of each, in bytes, int64.
        sizes: the number of elements of each, int64.
    """

    dtype: str
    addresses: np.ndarray
    sizes: np.ndarray

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[self.dtype]

    @property
    def is_aligned(self) -> bool:
        """Whether every tensor starts at a multiple of its elements' size."""
        return not (self.addresses % self.itemsize).any()

    @property
    def overlaps(self) -> bool:
        """Whether two tensors have an element in common."""
        order = np.argsort(self.addresses, kind="stable")
        starts, sizes = self.addresses[order], self.sizes[order]
        return bool((starts[:-1] + sizes[:-1] * self.itemsize > starts[1:]).any())


class Arithmetic(Protocol):
    """Functions of the numbers that norms and states are: float64 or integer arrays, or tensors, of few elements.

    Each does what NumPy's function of its name does; operators work on the numbers as they are.
    """

    def array(self, value: Any) -> Any: ...
    def where(self, condition: Any, yes: Any, no: Any) -> Any: ...
    def sqrt(self, x: Any) -> Any: ...
    def exp(self, x: Any) -> Any: ...
    def hypot(self, x: Any, y: Any) -> Any: ...
    def minimum(self, x: Any, y: Any) -> Any: ...
    def maximum(self, x: Any, y: Any) -> Any: ...
    def mean(self, x: Any) -> Any: ...
    def arange(self, count: int) -> Any: ...

    def percentile(self, values: Any, count: Any, q: float) -> Any:
        """numpy.percentile of the first `count` values, which are at least one."""

    def take(self, values: Any, places: Sequence[int]) -> Any:
        """The values at these places of a vector."""

    def put(self, values: Any, places: Sequence[int], new: Any) -> Any:
        """The vector with other values at these places; it is not modified."""


class Primitives(Protocol):
    """What a policy is written over: measure, decide, apply, over flat lists of floating tensors.

    clipcore has them for NumPy arrays, exact to the last bit, and runs every eager CPU tensor through those. A
    backend's own run where that is impossible: on devices, in traced functions, under differentiation. They never
    branch on data in Python, never wait for a device, and are within 1 ulp of the tensor's dtype.
    """

    arithmetic: Arithmetic

    def adopt(self, value: Any, like: Any) -> Any:
        """A number or array of a state as these primitives take it, on the device of the tensor `like` (or None)."""

    def measure(
        self, tensors: Sequence[Any], p: float, axes: Sequence[Axes] | None = None, *, zero_nonfinite: bool = False
    ) -> tuple[list[Any], Any]:
        """The p-norm of each tensor, or, with p = 2, of each unit of it; and how many elements are not finite.

        Args:
            axes: of each tensor, those that run over its units; () where it is one unit.
            zero_nonfinite: those elements count as 0, and the returned tensors have 0 in their place; else the tensors
                come back as they are.
        Returns:
            (tensors, measure): a measure that `join`, `norms`, `decide` and `report` take; its attribute `nonfinite` is
            the count.
        """

    def measure_spectra(
        self, tensors: Sequence[Any], axes: Sequence[Axes], *, exact: bool, zero_nonfinite: bool = False
    ) -> tuple[list[Any], Any]:
        """As `measure`, the largest singular value of each tensor as a matrix of units; inexact by power iteration."""

    def join(self, measure: Any) -> Any:
        """The joint norm of all tensors; of units, unit by unit, all tensors having as many."""

    def norms(self, measure: Any, against: tuple[Any, float] | None = None) -> Any:
        """The norms as a vector of float64: tensor by tensor, unit by unit; the largest float64 where one is beyond.

        Args:
            against: another measure, and the number by which these norms become its limits: on a CPU they are exact
                where it depends on them what is decided.
        """

    def decide(self, measure: Any, limits: Any, nonfinite: NonFiniteMode, *, at_least: float = 0.0) -> Any:
        """One factor per norm: limit / norm where norm > limit, at_least / norm where 0 < norm < at_least, else 1.

        Where the measure counts non-finite elements, unless they count as 0: all NaN for "propagate", all 0 for "skip",
        and NonFinite is raised for "raise".
        Args:
            limits: one number, or one per norm.
        """

    def uniform(self, factor: float, tensors: Sequence[Any]) -> Any:
        """A scale with one factor for all of these tensors."""

    def choose(self, condition: Any, yes: tuple[Any, Any], no: tuple[Any, Any]) -> tuple[Any, ClipReport]:
        """Of two pairs (scale, measure), the one that the condition says, with its factors tensor by tensor: the scale,
        and the report. One of the two may be joint.
        """

    def factors(self, scale: Any) -> Any:
        """The factors as a vector of float64: tensor by tensor, unit by unit."""

    def apply(self, tensors: Sequence[Any], scale: Any) -> list[Any]:
        """Each tensor, or unit, times its factor: unchanged for 1, zeros for 0 and NaN for NaN, whatever it held."""

    def within(
        self, tensors: Sequence[Any], measure: Any, limits: Any, nonfinite: NonFiniteMode
    ) -> tuple[list[Any], Any]:
        """`decide` and `apply`, with factors for which what is stored keeps the limits: on a CPU the largest ones."""

    def report(self, measure: Any, scale: Any) -> ClipReport:
        """What was measured and decided."""

    def screen(self, tensors: Sequence[Any], nonfinite: NonFiniteMode, *, nan_alone: bool) -> tuple[list[Any], Any]:
        """(tensors, number of elements that are inf or NaN): 0 in their place under "zero", NonFinite under "raise"."""

    def clamp(self, tensors: Sequence[Any], low: float, high: float) -> tuple[list[Any], Any]:
        """Each element bounded to [low, high], a bound rounded to the tensor's dtype (a finite one stays finite); and
        whether any was outside.
        """

    def spike(
        self, tensors: Sequence[Any], moments: Sequence[Any], threshold: float, decay: float, acts: Any
    ) -> tuple[list[Any], list[Any], Any]:
        """Where `acts`, elements with g**2 > threshold * moment become sign(g) * sqrt(threshold * moment); the moments
        decay * moment + (1 - decay) * g**2 of what is stored, in float64 and rounded to the moments' dtype; and whether
        any element was changed.
        """

    def overrule(self, tensors: Sequence[Any], faults: Any, nonfinite: NonFiniteMode) -> list[Any]:
        """All NaN under "propagate" and all 0 under "skip" where there are faults, else the tensors."""

    def summary(self, tensors: Sequence[Any], faults: Any, nonfinite: NonFiniteMode) -> ClipReport:
        """The report on tensors before they are bounded element by element; `clipped` where faults overrule that."""

    def total(self, tensors: Sequence[Any]) -> list[Any]:
        """The sum of each tensor over its first axis, in float64, rounded once."""


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

    def memory(self, tensors: Sequence[Any], *, writable: bool = False) -> Memory | None:
        """Where the tensors lie, if they are ordinary: all on the CPU, contiguous, of one real floating dtype.

        A short cut for many tensors, taken in place of every check and of `to_host`; None sends the call there. With
        `writable`, they may be written.
        """

    def lies_at(self, tensor: Any) -> Any:
        """What two tensors have in common that are the same elements of a memory, a device's too; hashable.

        At least the tensor's identity, where more cannot be seen.
        """

    def written(self, tensors: Sequence[Any]) -> None:
        """Called after the memory of tensors was written: tells the framework what it would not see (autograd)."""

    def from_host(self, array: np.ndarray, like: Any) -> Any:
        """A tensor with the values of `array`, of the class of `like` (its device, sparsity and indices).

        `like` may be None, as in the conformance suite: then a plain tensor on the CPU.
        It may take the array's memory as its own: the caller gives it up. Fresh arrays are aligned to 64 bytes.
        """

    def to_numpy(self, tensor: Any) -> np.ndarray:
        """A tensor's values as a dense array, of any device, waiting for it, and under differentiation as well;
        possibly a view of its memory.
        """

    def detached(self, tensor: Any) -> Any:
        """The tensor, its memory and not a copy, out of sight of what differentiates."""

    def to_dense(self, tensor: Any) -> Any:
        """A sparse tensor as a dense one, duplicates summed; a dense one itself."""

    def primitives(self) -> Primitives:
        """The framework's own primitives, for tensors that `to_host` cannot show."""

    def assign_(self, tensors: Sequence[Any], values: Sequence[Any]) -> None:
        """Overwrite each tensor with the tensor at its place in `values`; InvalidInput where one cannot be written."""

    def gradients(self, model_or_params: Any) -> tuple[list[Any], list[Any]]:
        """(parameters, the gradients that the framework keeps beside them, None where there is none), each once."""

    def weights(self, model_or_params: Any) -> list[Any]:
        """The trainable tensors of a model (never running statistics), each once: those that `parameters` names."""


Bounds = tuple[tuple[int, int], ...]  # (start, stop) for each axis of a stored tensor; () for all of it


@dataclass(frozen=True)
class Tensor:
    """One tensor of a layer, as its framework stores it: a whole stored tensor, or a part of one.

    Attributes:
        name: of the stored tensor, unique in the model, as the framework's users know it ("conv1.weight").
        role: what it is to its layer: "kernel", "bias", "scale", "running_mean" …
        layout: the order of its named axes, as einops writes it: "(group out) in ...", "... in (group out)". A
            canonical axis that is stored as several is numbered: "in out0 out1".
        shape: of this tensor.
        dtype: NumPy's name of it.
        trainable: by its role, frozen now or not: False for running statistics and other buffers.
        within: where a stored tensor holds several (gates, fused query, key and value), the bounds of this one in it.
        whole: the shape of that stored tensor.
    """

    name: str
    role: str
    layout: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool = True
    within: Bounds = ()
    whole: tuple[int, ...] = ()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the stored tensor that this one is, or is a part of."""
        return self.whole if self.within else self.shape


@dataclass(frozen=True)
class Layer:
    """One layer of a model: what kind it is, its tensors by role, its settings by canonical name.

    Attributes:
        name: unique in the model. A module that computes several layers (a stacked LSTM, attention with one fused
            projection) lists each of them, under names that begin with its own.
        kind: a word of `clipcore.mapping.kinds.KINDS`; "raw" for tensors of a class that no rule describes.
        why: for "raw", why no rule describes it, for a message ("an LSTM with projections").
        bare: whether its tensors are used without a call that a watcher is told of.
    """

    name: str
    kind: str
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    bare: bool = False


def no_settings(layer: Any) -> dict[str, Any]:
    """The settings of a layer that has none."""
    return {}


@dataclass(frozen=True)
class Stored:
    """How one class of a framework stores a kind of layer: a row of a backend's table, or of `cc.register_kind`.

    Attributes:
        kind: the name of the kind.
        roles: by the framework's name of each tensor (an attribute, a variable), the role and the layout.
        settings: the layer's settings in canonical words; None where the kind has no word for one of them.
        required: names of tensors without which the class computes something else than the kind does.
    """

    kind: str
    roles: Mapping[str, tuple[str, str]]
    settings: Callable[[Any], dict[str, Any] | None] = no_settings
    required: frozenset[str] = frozenset()


class ModelBackend(Backend, Protocol):
    """Tier 2, models: describe a model's layers, read and write their tensors."""

    channels: Literal["first", "last"]  # where the framework's convolutions have the channel axis by default
    weight_files: tuple[str, ...]  # endings of the files that `save_weights` writes and `load_model` reads

    def is_model(self, obj: Any) -> bool:
        """Whether `obj` is a model of this framework."""

    def parameters(self, model: Any) -> dict[str, Any]:
        """The model's parameters by the names that `layers` gives them, each once, frozen ones too."""

    def load_model(self, factory: Any, weights: str | None) -> Any:
        """Call `factory`, and load the framework's own weight file into the model where one is named."""

    def save_weights(self, model: Any, path: str) -> None:
        """Write the model's weights in the framework's own format that the file's name says."""

    def layers(self, model: Any) -> list[Layer]:
        """Every layer that owns tensors, each once, in the order in which the model lists them.

        A layer of no known kind is listed with kind "raw" and layout "..." for each tensor, by the framework's names.
        """

    def operations(self, model: Any) -> list[Layer]:
        """The layers without tensors of a known kind (activations, pooling, dropout), in the same order."""

    def read(self, model: Any, names: Sequence[str], *, keep: bool = False) -> dict[str, np.ndarray]:
        """The named tensors as arrays in their stored layout, possibly views of the model's memory, not to be written.

        With `keep`, later writes to the model leave the arrays as they are.
        """

    def write(self, model: Any, values: Mapping[str, np.ndarray]) -> None:
        """Overwrite the named tensors, shapes and dtypes as stored; never keeps a reference to an array."""

    def holding(self, model: Any) -> AbstractContextManager[None]:
        """A context in which no layer of the model comes or goes, so that its tensors need be looked for but once."""

    def build_layer(self, kind: str, settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Any:
        """A model that is one layer of `kind`, for conformance: canonical settings, canonical shapes by role.

        MappingError where the framework has no such layer (asymmetric padding, a fused activation).
        """


class TrainingBackend(Backend, Protocol):
    """Optimizers that a policy can be attached to."""

    def attach(self, optimizer: Any, policy: Any, model: Any, on_report: Any) -> Any:
        """A `clipcore.training.Attachment`: from now on every step's gradients are clipped, see `clipcore.attach`."""

    def compile(self, model: Any, loss_fn: Any, optimizer: Any, policy: Any, on_report: Any) -> tuple[Any, Any, Any]:
        """See `clipcore.compile`."""

    def per_example_grads(self, model: Any, loss_fn: Any, batch: tuple[Any, Any]) -> dict[str, Any]:
        """See `clipcore.per_example_grads`."""


class Watcher(Protocol):
    """Sees a model run, layer by layer, in order of execution; may replace what flows.

    It is told of layers and operations, by the names that `layers` and `operations` give them. The arrays are its own:
    nothing writes into them later.
    """

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

    def input_shapes(self, model: Any) -> list[tuple[int | None, ...]] | None:
        """The shapes that the model declares for its inputs (None for a free axis); None where it declares none."""

    def double(self, model: Any) -> Any | None:
        """A float64 copy of the model, to measure rounding against; None where the framework cannot make one."""
