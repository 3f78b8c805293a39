"""Clipping inside training loops: a policy attached to an optimizer acts on every step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from clipcore.clipping.policies import Policy, check_policy
from clipcore.clipping.report import ClipReport
from clipcore.errors import BackendError, InvalidInput
from clipcore.plugins import backend_of

OnReport = Callable[[ClipReport], None]


class Attachment:
    """A policy that acts on every step of an optimizer, until it is removed.

    Attributes:
        policy: what bounds the gradients.
        reports: the reports of the latest 10,000 steps, oldest first. Where the step runs inside a compiled
            function, none are kept.
    """

    def __init__(
        self,
        policy: Policy,
        detach: Callable[[], None],
        *,
        on_report: OnReport | None = None,
        state_dict: Callable[[], dict[str, np.ndarray]] = dict,
        load_state_dict: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.policy = policy
        self.reports: deque[ClipReport] = deque(maxlen=10_000)
        self._detach: Callable[[], None] | None = detach
        self._on_report = on_report
        self._state_dict, self._load_state_dict = state_dict, load_state_dict

    def keep(self, report: ClipReport) -> None:
        """Take in the report of a step; for backends."""
        self.reports.append(report)
        if self._on_report is not None:
            self._on_report(report)

    def state_dict(self) -> dict[str, np.ndarray]:
        """What the policy has learned, as NumPy arrays by the names of `Clipper.state_dict`; empty before it began."""
        return self._state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave, here or in another framework.

        Raises:
            InvalidInput: it is of another policy, or, here or with the next step, of tensors of other shapes.
        """
        if self._load_state_dict is not None:
            self._load_state_dict(state)

    def remove(self) -> None:
        """Take the policy off the optimizer; a second call does nothing."""
        if self._detach is not None:
            self._detach()
        self._detach = None


def attach(optimizer: Any, policy: Policy, model: Any = None, *, on_report: OnReport | None = None) -> Attachment:
    """Clip the gradients of every step from now on: after accumulation, unscaling and aggregation, before the update.

    The policy acts on this optimizer. A copy of a torch optimizer (`copy.deepcopy`, pickle) has none until one is
    attached to it; a copy of a Keras optimizer, whose config has the policy, clips as well.

    Args:
        optimizer: a torch or Keras optimizer; it stays the object that you have. In Keras what an adaptive policy
            learns lives in variables of the optimizer, and is saved with the model.
        policy: what bounds the gradients, all those of one step together.
        model: the model that it trains: for policies that ask for names or layouts, and where a Keras model was
            compiled before (its train step is traced anew). Without it Keras's parameters have the names of their
            paths.
        on_report: called with the report of each step, where reports are kept; see `to_tensorboard`.
    Returns:
        An Attachment: `reports`, `state_dict()`, `load_state_dict(state)`, `remove()`.
    Raises:
        InvalidPolicy: `policy` is none.
        InvalidInput: `optimizer` is none, or has a policy or clipping of its own already; the policy cannot act on an
            optimizer's gradients, or asks for a model that was not passed.
    """
    _check_attachable(policy)
    backend = _backend_of(optimizer, "optimizer", "an optimizer of an installed backend")
    if not hasattr(backend, "attach"):
        raise InvalidInput(f"backend {backend.name!r} has no optimizers; clip in the loop with cc.clip")
    attachment: Attachment = backend.attach(optimizer, policy, model, on_report)
    return attachment


def compile(
    model: Any, loss_fn: Any, optimizer: Any, clip: Policy | None = None, *, on_report: OnReport | None = None
) -> tuple[Any, Any, Any]:
    """Make a model ready to train under a policy: `attach`, and for Keras `model.compile` as well.

    Args:
        model: a torch or Keras model.
        loss_fn: what the framework takes as a loss; it comes back as it is.
        optimizer: as for `attach`; for Keras also its name ("adam").
        clip: the policy, or None for none.
        on_report: as for `attach`.
    Returns:
        (model, loss_fn, optimizer): what to use from now on.
    Raises:
        InvalidPolicy, InvalidInput: as for `attach`.
    """
    if clip is not None:
        _check_attachable(clip)
    backend = _backend_of(model, "model", "a model of an installed backend")
    if not hasattr(backend, "compile"):
        raise InvalidInput(f"backend {backend.name!r} has no models to compile")
    compiled: tuple[Any, Any, Any] = backend.compile(model, loss_fn, optimizer, clip, on_report)
    return compiled


def _backend_of(obj: Any, role: str, expected: str) -> Any:
    try:
        return backend_of(obj)
    except BackendError as err:
        raise InvalidInput(f"{role} is {obj!r:.60} of type {type(obj).__name__}; expected {expected}: {err}") from err


def per_example_grads(model: Any, loss_fn: Any, batch: Any) -> dict[str, Any]:
    """The gradient of each example's loss, for `PerExampleClip` and `QuantileClip`.

    Args:
        model: a torch or Keras model. Nothing in it may mix examples, as batch normalisation does while it trains.
        loss_fn: called as its framework does: loss_fn(output, target) for torch, loss_fn(target, output) for Keras,
            where it may also be a loss's name. It sees one example at a time, as a batch of one.
        batch: (inputs, targets), tensors or arrays with the examples along their first axes, nested as the model takes
            them.
    Returns:
        The gradients of the trainable parameters by their names, the examples along the first axis: what
        `cc.clip(grads, PerExampleClip(1.0))` bounds and sums.
    Raises:
        InvalidInput: `model` is none of an installed backend, or mixes examples; `batch` is no pair.
    """
    backend = _backend_of(model, "model", "a model of an installed backend")
    if not hasattr(backend, "per_example_grads"):
        raise InvalidInput(f"backend {backend.name!r} has no models; compute gradients per example yourself")
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise InvalidInput(f"batch is {batch!r:.60}; expected (inputs, targets)")
    grads: dict[str, Any] = backend.per_example_grads(model, loss_fn, tuple(batch))
    return grads


def to_tensorboard(writer: Any, prefix: str = "clip") -> OnReport:
    """What to pass as `on_report`: each step's figures become scalars of TensorBoard, or of anything with its method.

    Scalars: "norm" before clipping, the smallest "limit" and "scale" of the step, and "share_clipped", the share of
    clipped ones among the steps so far. Writing them reads the report, which waits for a device.

    Args:
        writer: has `add_scalar(tag, value, step)`, as torch.utils.tensorboard.SummaryWriter.
        prefix: of the tags: "clip/norm".
    Raises:
        InvalidInput: `writer` has no such method.
    """
    if not callable(getattr(writer, "add_scalar", None)):
        raise InvalidInput(
            f"writer is {writer!r:.60}; expected one with add_scalar(tag, value, step), as SummaryWriter"
        )
    steps = clipped = 0

    def write(report: ClipReport) -> None:
        nonlocal steps, clipped
        steps, clipped = steps + 1, clipped + bool(report.clipped)
        figures = {"norm": report.norm, "limit": report.limit, "scale": report.scale, "share_clipped": clipped / steps}
        for name, value in figures.items():
            writer.add_scalar(f"{prefix}/{name}", float(value), steps)

    return write


def _check_attachable(policy: Policy) -> None:
    check_policy(policy)
    if policy.refuses_attach:
        raise InvalidInput(f"{type(policy).__name__} cannot be attached to an optimizer: {policy.refuses_attach}")
