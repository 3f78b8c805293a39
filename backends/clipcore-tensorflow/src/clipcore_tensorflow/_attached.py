"""A policy on a Keras optimizer: what it knows of the variables, what it has learned, and one step of it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from clipcore.backend import Axes
from clipcore.clipping.api import bound
from clipcore.clipping.call import Call
from clipcore.clipping.combine import PerGroup
from clipcore.clipping.given import Given, Spec, map_state
from clipcore.clipping.policies import Policy
from clipcore.clipping.report import ClipReport
from clipcore.clipping.states import check_dtypes, check_flat_state, flat_state, nested_state, saved_state
from clipcore.errors import InvalidInput
from clipcore.mapping.layouts import unit_axes
from clipcore.training import Attachment
from clipcore_tensorflow._figures import Figures
from clipcore_tensorflow._layers import describe
from clipcore_tensorflow._primitives import RaiseInGraph, TensorFlowPrimitives
from clipcore_tensorflow._tensors import dtype_name, tf_variable, to_array


class Attached:
    """What an optimizer with a policy carries.

    Attributes:
        policy: what bounds the gradients.
        attachment: where reports go; None of an optimizer that was loaded from a file, until it is attached to.
        names, axes: of the trainable variables in the optimizer's order, once it is built; see `Given`.
        variables: what the policy has learned, by the names that `Clipper.state_dict` uses.
        stepping: the variables whose gradients are under way.
        skip: whether the step under way is skipped: a bool, or inside a graph a tensor; None where none can be.
        start: what the optimizer's counter was before a step under way that may be skipped.
        figures: the sums that a ClipLogger reads; None where there is none.
    """

    def __init__(
        self,
        policy: Policy,
        model: Any = None,
        names: Sequence[str] | None = None,
        axes: Sequence[Axes | None] | None = None,
    ) -> None:
        self.policy = policy
        self.attachment: Attachment | None = None
        self.names, self.axes = names, axes
        self.variables: dict[str, Any] = {}
        self.stepping: Sequence[Any] = ()
        self.skip: Any = None
        self.start: Any = None
        self.figures: Figures | None = None
        self._model = weakref.ref(model) if model is not None else None
        self._built = False
        self._loaded: dict[str, np.ndarray] | None = None  # until there are variables for it

    def check(self, optimizer: Any) -> None:
        """Refuse a policy that asks for what the optimizer and the model do not tell.

        Raises:
            InvalidInput: it asks for a model that was not passed, or a pattern of names is found in none.
        """
        model = self._model() if self._model is not None else None
        if optimizer.built:
            self._start(optimizer._trainable_variables)
        elif model is not None and model.built:
            self._start(model.trainable_variables)
        elif model is None and (names := [type(m).__name__ for m in _members(self.policy) if _needs_layout(m)]):
            raise InvalidInput(
                f"{names[0]} acts on each unit of a layer, and no layout tells where those are: pass model= to "
                f"cc.attach, or {names[0]}(unit_axis=…)"
            )

    def first_state(self, variables: Sequence[Any]) -> dict[str, np.ndarray]:
        """What the policy knows before the first step of these variables: what was loaded, else nothing yet.

        Raises:
            InvalidInput: what was loaded is of other variables.
        """
        state = flat_state(self.policy, self._start(variables))
        if self._loaded is None:
            return state
        check_flat_state(self.policy, self._loaded, state)
        check_dtypes(self._loaded, state)
        return {name: self._loaded[name] for name in state}

    def build(self, optimizer: Any, state: Mapping[str, np.ndarray]) -> None:
        """Give the optimizer variables for what the policy learns.

        They have the state from the start: an assignment beside it would be part of the step that `fit` traces to find
        out which variables there are, and TensorFlow throws that trace away.
        """
        for name, value in state.items():
            self.variables[name] = optimizer.add_variable(
                shape=value.shape,
                initializer=_constant(value),
                dtype=value.dtype.name,
                # replicas compute the same, since they clip the sum of their gradients
                aggregation="only_first_replica",
                name=f"clip_{name.replace('.', '_')}",
            )
        self._built, self._loaded = True, None

    def take_off(self, optimizer: Any) -> None:
        """Take the variables from the optimizer again."""
        for variable in self.variables.values():
            optimizer._untrack_variable(variable)

    def state_dict(self) -> dict[str, np.ndarray]:
        """See `clipcore.training.Attachment.state_dict`."""
        if not self._built:
            return dict(self._loaded or {})
        return {name: np.array(to_array(variable)) for name, variable in self.variables.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `clipcore.training.Attachment.load_state_dict`."""
        arrays = saved_state(self.policy, state)
        if not self._built:
            self._loaded = arrays
            return
        check_flat_state(self.policy, arrays, self.variables)
        check_dtypes(arrays, self.variables)
        for name, variable in self.variables.items():
            tf_variable(variable).assign(arrays[name])

    def clip(self, optimizer: Any, grads: Sequence[Any]) -> tuple[list[Any], ClipReport]:
        """Bound the gradients of `stepping`; the state moves on."""
        variables = [tf_variable(variable) for variable in optimizer._trainable_variables]
        places: list[Any] = [None] * len(variables)
        slots = [optimizer._get_variable_index(variable) for variable in self.stepping]
        for slot, grad in zip(slots, grads, strict=True):
            places[slot] = _shaped(grad, variables[slot])
        call = Call.of(places, self.policy, variables, None, "tensorflow")
        assert self.names is not None
        call = replace(
            call,
            names=[self.names[slot] for slot in call.slots],
            axes=[self.axes[slot] for slot in call.slots] if self.axes is not None else None,
            all_names=self.names,
        )
        before = {name: tf.convert_to_tensor(tf_variable(variable)) for name, variable in self.variables.items()}
        state = nested_state(self.policy, before) if before else self.policy.start(call.specs())
        bounded, state, report = bound(call, self.policy, state)
        for name, value in flat_state(self.policy, state).items():
            if value is not before[name]:
                tf_variable(self.variables[name]).assign(value)
        if self.figures is not None:
            self.figures.add(report)
        by_slot = dict(zip(call.slots, bounded, strict=True))
        return [by_slot[slot] for slot in slots], report

    def _start(self, variables: Sequence[Any]) -> Any:
        """The state before the first step of these variables, whose names and axes are found."""
        if self._model is not None or self.names is None or len(self.names) != len(variables):
            model = self._model() if self._model is not None else None
            self.names, self.axes = _names_and_axes(variables, model)
        specs = [
            Spec(name, tuple(variable.shape), dtype_name(variable))
            for name, variable in zip(self.names, variables, strict=True)
        ]
        state = self.policy.start(specs)
        if any(hasattr(m, "unit_axis") or isinstance(m, PerGroup) for m in _members(self.policy)):
            self._trace(specs, state)
        return state

    def _trace(self, specs: Sequence[Spec], state: Any) -> None:
        """Bound gradients of these shapes in a graph that never runs, for what the policy finds to be missing."""
        # "raise" is refused in every graph, this one too
        with tf.Graph().as_default(), contextlib.suppress(RaiseInGraph):
            tensors = [tf.zeros(spec.shape, spec.dtype) for spec in specs]
            places = range(len(specs))
            given = Given(tensors, TensorFlowPrimitives(), tensors, self.names, self.axes, places)
            self.policy.bound(given, map_state(tf.convert_to_tensor, state))


def _members(policy: Policy) -> list[Policy]:
    """The policy and those that it is made of."""
    return [policy, *(inner for member in policy.members for inner in _members(member))]


def _needs_layout(policy: Policy) -> bool:
    return getattr(policy, "unit_axis", 0) is None


def _names_and_axes(variables: Sequence[Any], model: Any) -> tuple[list[str], list[Axes | None] | None]:
    """Names and axes as the model's layers have them; of variables that no layer has, the path and no axes. Without a
    model there are no axes at all.
    """
    known: dict[int, tuple[str, Axes | None]] = {}
    for listed in describe(model) if model is not None else ():
        for role, tensor in listed.layer.tensors.items():
            known[id(listed.variables[role])] = tensor.name, unit_axes(listed.layer, role)
    found = [known.get(id(tf_variable(variable)), (_path(variable), None)) for variable in variables]
    return [name for name, _ in found], None if model is None else [axes for _, axes in found]


def _path(variable: Any) -> str:
    return str(variable.path if isinstance(variable, keras.Variable) else variable.name.removesuffix(":0"))


def _shaped(grad: Any, variable: tf.Variable) -> Any:
    """A sparse gradient that says its shape, which inside a graph it may not."""
    if not isinstance(grad, tf.IndexedSlices):
        return grad
    return tf.IndexedSlices(grad.values, grad.indices, tf.constant(variable.shape.as_list(), grad.indices.dtype))


def _constant(value: np.ndarray) -> Any:
    return lambda shape, dtype=None: tf.constant(value)
