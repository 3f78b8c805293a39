"""Policies attached to Keras optimizers, as registered subclasses, so that they survive `model.save`.

In a step Keras accumulates, unscales, clips, decays weights, sums over replicas and updates, in this order. The
subclass sums over replicas before it clips, and leaves out the rest where the policy skips a step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from clipcore.backend import Axes
from clipcore.clipping.policies import Policy, policy_from_config
from clipcore.errors import InvalidInput
from clipcore.training import Attachment, OnReport
from clipcore_tensorflow._attached import Attached
from clipcore_tensorflow._keras import check_keras

_PACKAGE = "clipcore"
_KEY, _NAMES, _AXES = "clip_policy", "clip_names", "clip_axes"  # in an optimizer's config
_OWN_CLIPPING = ("clipnorm", "global_clipnorm", "clipvalue")
_classes: dict[type, type] = {}


class Clipped:
    """What a policy adds to an optimizer's class; it comes first among the bases."""

    clipcore_original: type  # the class without a policy
    _clipcore: Attached

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config()  # type: ignore[misc]
        attached = self._clipcore
        known = {} if attached.names is None else {_NAMES: list(attached.names), _AXES: _plain(attached.axes)}
        return {**config, _KEY: attached.policy.to_config(), **known}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        config = dict(config)
        policy = policy_from_config(config.pop(_KEY))
        names, axes = config.pop(_NAMES, None), config.pop(_AXES, None)
        extra = {} if custom_objects is None else {"custom_objects": custom_objects}
        optimizer = super().from_config(config, **extra)  # type: ignore[misc]
        axes = None if axes is None else [None if own is None else tuple(own) for own in axes]
        object.__setattr__(optimizer, "_clipcore", Attached(policy, names=names, axes=axes))
        return optimizer

    def build(self, variables: Any) -> None:
        # before Keras takes the variables: a state that is refused leaves the optimizer unbuilt, for the right one
        state = None if self.built else self._clipcore.first_state(variables)  # type: ignore[has-type]
        super().build(variables)  # type: ignore[misc]
        if state is not None:
            self._clipcore.build(self, state)

    def __reduce__(self) -> tuple[Any, ...]:
        # Keras gives a method of the class, which pickle would look up by a name that no module has
        _, arguments = super().__reduce__()  # type: ignore[misc]
        return _unpickled, (self.clipcore_original, *arguments)

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        if self._clipcore.policy.nonfinite != "skip":
            super().apply(grads, trainable_variables)  # type: ignore[misc]
            return
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
        variables = trainable_variables or self._trainable_variables  # type: ignore[attr-defined]
        constrained = [(v, tf.identity(v.value)) for v in variables if v.constraint is not None]
        self._clipcore.start = tf.identity(self._iterations.value)  # type: ignore[attr-defined]
        try:
            super().apply(grads, trainable_variables)  # type: ignore[misc]
            # `apply` has counted one more; it asks nobody before it constrains variables
            skipped = self._went_back(1)
            for variable, before in constrained:
                variable.assign(tf.where(skipped, before, variable.value))
        finally:
            self._clipcore.skip = self._clipcore.start = None  # in a graph tensors, which must not outlive the trace

    def _went_back(self, counted: int = 0) -> Any:
        """Whether the step under way was skipped, told from the counter: `skip` may be of a branch that has ended."""
        if self._clipcore.start is None:
            return None
        return self._iterations.value - counted < self._clipcore.start  # type: ignore[attr-defined]

    def _backend_apply_gradients(self, grads: Any, trainable_variables: Any) -> None:
        self._clipcore.stepping = trainable_variables
        try:
            super()._backend_apply_gradients(grads, trainable_variables)  # type: ignore[misc]
        finally:
            self._clipcore.stepping = ()

    @tf.autograph.experimental.do_not_convert
    def _clip_gradients(self, grads: Any) -> Any:
        if _replicas() > 1:
            grads = [grad for grad, _ in super()._all_reduce_sum_gradients([(g, None) for g in grads])]  # type: ignore[misc]
        attached = self._clipcore
        clipped, report = attached.clip(self, grads)
        if attached.attachment is not None and tf.executing_eagerly() and _is_first_replica():
            attached.attachment.keep(report)
        if attached.policy.nonfinite == "skip":
            attached.skip = report.nonfinite > 0
        return clipped

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        return grads_and_vars  # they were summed before they were clipped

    def _apply_weight_decay(self, variables: Any) -> None:
        if self.weight_decay is not None:  # type: ignore[attr-defined]
            _unless(self._clipcore.skip, super()._apply_weight_decay, variables)  # type: ignore[misc]

    def _backend_update_step(self, grads: Any, trainable_variables: Any, learning_rate: Any) -> None:
        skip = self._clipcore.skip
        _unless(skip, super()._backend_update_step, grads, trainable_variables, learning_rate)  # type: ignore[misc]
        if skip is None:
            return
        # `apply` counts the step that did not happen; with accumulation, all of its parts
        steps = self.gradient_accumulation_steps or 1  # type: ignore[attr-defined]
        counter = self._iterations  # type: ignore[attr-defined]
        counter.assign_sub(tf.cast(skip, counter.dtype) * steps)

    def _update_model_variables_moving_average(self, trainable_variables: Any) -> None:
        _unless(self._went_back(), super()._update_model_variables_moving_average, trainable_variables)  # type: ignore[misc]

    def _overwrite_model_variables_with_average_value(self, trainable_variables: Any) -> None:
        _unless(
            self._went_back(),
            super()._overwrite_model_variables_with_average_value,  # type: ignore[misc]
            trainable_variables,
        )


def _plain(axes: Sequence[Axes | None] | None) -> list[list[int] | None] | None:
    return None if axes is None else [None if own is None else list(own) for own in axes]


def _replicas() -> int:
    """How many replicas step together; 1 outside of them."""
    context = tf.distribute.get_replica_context()
    return int(context.num_replicas_in_sync) if context is not None else 1


def _is_first_replica() -> bool:
    context = tf.distribute.get_replica_context()
    return context is None or int(context.replica_id_in_sync_group) == 0


def _unless(skip: Any, act: Callable[..., Any], *args: Any) -> None:
    """Call `act`, but where `skip` holds: in Python where it is known, else as a branch of the graph."""
    if skip is None or isinstance(skip, bool):
        if not skip:
            act(*args)
    elif _replicas() == 1:
        tf.cond(skip, lambda: None, lambda: _nothing(act(*args)))
    else:
        tf.distribute.get_replica_context().merge_call(_unless_across, args=(skip, act, *args))


def _unless_across(strategy: Any, skip: Any, act: Callable[..., Any], *args: Any) -> None:
    """The branch for all replicas at once: what they do together cannot stand in a branch of one of them."""
    first = strategy.experimental_local_results(skip)[0]
    acts = strategy.experimental_local_results(act)[0]
    tf.cond(first, lambda: None, lambda: _nothing(strategy.extended.call_for_each_replica(acts, args=args)))


def _nothing(_: Any) -> None:
    return None


def clipped_class(cls: type) -> type:
    """The subclass of an optimizer's class that clips, registered with Keras under the package "clipcore".

    For Keras's own optimizers it is registered as the backend is imported; a model that was saved with an optimizer
    of your own loads after `clipped_class(YourOptimizer)`.
    """
    if cls not in _classes:
        # of two classes of one name, Keras's own keeps it
        package = _PACKAGE if cls.__module__.startswith("keras.") else f"{_PACKAGE}:{cls.__module__}"
        body = {"__module__": __name__, "__doc__": f"{cls.__name__} under a policy.", "clipcore_original": cls}
        name = f"Clipped{cls.__name__}"
        subclass = type(cls)(name, (Clipped, cls), body)
        _classes[cls] = keras.saving.register_keras_serializable(package, name)(subclass)
    return _classes[cls]


def _unpickled(cls: type, *arguments: Any) -> Any:
    """The optimizer that was pickled: its class must be registered before Keras can read it."""
    registered: Any = clipped_class(cls)
    return registered._unpickle_model(*arguments)


def register_builtin_optimizers() -> None:
    """Make models that were saved with an attached policy loadable."""
    if keras.backend.backend() != "tensorflow":
        return
    for cls in vars(keras.optimizers).values():
        if isinstance(cls, type) and issubclass(cls, keras.optimizers.Optimizer) and not _wraps_others(cls):
            clipped_class(cls)


def _wraps_others(cls: type) -> bool:
    """Whether a class steps by other optimizers, which do the work."""
    multi = getattr(keras.optimizers, "MultiOptimizer", None)  # Keras 3.15 has it
    return issubclass(cls, keras.optimizers.LossScaleOptimizer) or (multi is not None and issubclass(cls, multi))


def attach(optimizer: Any, policy: Policy, model: Any, on_report: OnReport | None) -> Attachment:
    """Clip the gradients of every step of `optimizer`, which changes its class; see `clipcore.attach`.

    Raises:
        InvalidInput: it is no Keras 3 optimizer, clips already, or steps by several optimizers; the policy asks for a
            model that was not passed.
    """
    check_keras()
    optimizer = inner_optimizer(optimizer)
    _check(optimizer, policy)
    compiled = weakref.ref(model) if model is not None else None
    if isinstance(optimizer, Clipped):  # loaded from a file, with what the policy has learned
        attached = optimizer._clipcore
    else:
        attached = Attached(policy, model)
        attached.check(optimizer)

    def detach() -> None:
        attached.take_off(optimizer)
        object.__setattr__(optimizer, "__class__", optimizer.clipcore_original)
        object.__delattr__(optimizer, "_clipcore")
        _retrace(compiled)

    attached.attachment = Attachment(
        policy,
        detach,
        on_report=on_report,
        state_dict=attached.state_dict,
        load_state_dict=attached.load_state_dict,
    )
    if not isinstance(optimizer, Clipped):
        object.__setattr__(optimizer, "_clipcore", attached)
        object.__setattr__(optimizer, "__class__", clipped_class(type(optimizer)))
        if optimizer.built:
            with optimizer._distribution_strategy.scope():
                attached.build(optimizer, attached.first_state(optimizer._trainable_variables))
    _retrace(compiled)
    return attached.attachment


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer that takes the steps: the one inside a LossScaleOptimizer gets unscaled gradients."""
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise InvalidInput(
            f"optimizer is {optimizer!r:.60} of type {type(optimizer).__name__}; expected a Keras 3 optimizer, "
            f"say keras.optimizers.SGD(0.1)"
        )
    while isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    if _wraps_others(type(optimizer)):
        raise InvalidInput(
            f"a {type(optimizer).__name__} steps by several optimizers, none of which sees all gradients: attach a "
            f"policy to each of them, or clip in the loop with cc.clip"
        )
    return optimizer


def _check(optimizer: Any, policy: Policy) -> None:
    name = type(optimizer).__name__
    if isinstance(optimizer, Clipped):
        attached = optimizer._clipcore
        if attached.attachment is not None:
            raise InvalidInput(f"this {name} has a policy already; remove that first: attachment.remove()")
        if attached.policy != policy:  # loaded from a file; with the same policy the attachment takes it over
            raise InvalidInput(
                f"this {name} was saved with {attached.policy} and clips by it: attach that policy, and remove it to "
                f"attach another"
            )
    for argument in _OWN_CLIPPING:
        if (value := getattr(optimizer, argument, None)) is not None:
            raise InvalidInput(
                f"this {name} has {argument}={value!r}, so that gradients would be clipped twice: make it without"
            )


def _retrace(model: weakref.ref[Any] | None) -> None:
    """Make `fit` trace anew, since the step that it traced knows nothing of a change."""
    if model is not None and (compiled := model()) is not None and hasattr(compiled, "train_function"):
        compiled.train_function = None


def compile(
    model: Any, loss_fn: Any, optimizer: Any, policy: Policy | None, on_report: OnReport | None
) -> tuple[Any, Any, Any]:
    """Compile a Keras model with the policy on its optimizer; see `clipcore.compile`.

    The optimizer comes back as the model has it: under mixed_float16 inside a LossScaleOptimizer.
    Raises:
        InvalidInput: it is no Keras model, or Keras knows no such optimizer.
    """
    if not isinstance(model, keras.Model):
        raise InvalidInput(
            f"{type(model).__name__} is no keras.Model, so that it cannot be compiled: cc.attach(optimizer, policy)"
        )
    check_keras()
    try:
        optimizer = keras.optimizers.get(optimizer)
    except ValueError as err:
        raise InvalidInput(
            f"optimizer is {optimizer!r:.60}; expected a Keras optimizer or its name, say 'adam'"
        ) from err
    attachment = attach(optimizer, policy, model, on_report) if policy is not None else None
    try:
        model.compile(optimizer=optimizer, loss=loss_fn)
    except Exception:
        if attachment is not None:
            attachment.remove()
        raise
    return model, loss_fn, model.optimizer
