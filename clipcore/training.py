"""Clipping inside training loops: a policy attached to an optimizer acts on every step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from clipcore.clipping.policies import Policy, check_policy
from clipcore.clipping.report import ClipReport
from clipcore.errors import BackendError, InvalidInput
from clipcore.plugins import backend_of


class Attachment:
    """A policy that acts on every step of an optimizer, until it is removed.

    Attributes:
        policy: what bounds the gradients.
        reports: the reports of the latest 10,000 steps, oldest first. Where the step runs inside a compiled
            function, none are kept.
    """

    def __init__(self, policy: Policy, detach: Callable[[], None]) -> None:
        self.policy = policy
        self.reports: deque[ClipReport] = deque(maxlen=10_000)
        self._detach: Callable[[], None] | None = detach

    def remove(self) -> None:
        """Take the policy off the optimizer; a second call does nothing."""
        if self._detach is not None:
            self._detach()
        self._detach = None


def attach(optimizer: Any, policy: Policy, model: Any = None) -> Attachment:
    """Clip the gradients of every step from now on: after accumulation, unscaling and aggregation, before the update.

    The policy acts on this optimizer. A copy of a torch optimizer (`copy.deepcopy`, pickle) has none until one is
    attached to it; a copy of a Keras optimizer, whose config has the policy, clips as well.

    Args:
        optimizer: a torch or Keras optimizer; it stays the object that you have.
        policy: what bounds the gradients, all those of one step together.
        model: the model that it trains, where it was compiled before (Keras: its train step is traced anew).
    Returns:
        An Attachment: `reports`, `remove()`.
    Raises:
        InvalidPolicy: `policy` is none.
        InvalidInput: `optimizer` is none, or has a policy or clipping of its own already.
    """
    check_policy(policy)
    backend = _backend_of(optimizer, "optimizer", "an optimizer of an installed backend")
    if not hasattr(backend, "attach"):
        raise InvalidInput(f"backend {backend.name!r} has no optimizers; clip in the loop with cc.clip")
    attachment: Attachment = backend.attach(optimizer, policy, model)
    return attachment


def compile(model: Any, loss_fn: Any, optimizer: Any, clip: Policy | None = None) -> tuple[Any, Any, Any]:
    """Make a model ready to train under a policy: `attach`, and for Keras `model.compile` as well.

    Args:
        model: a torch or Keras model.
        loss_fn: what the framework takes as a loss; it comes back as it is.
        optimizer: as for `attach`; for Keras also its name ("adam").
        clip: the policy, or None for none.
    Returns:
        (model, loss_fn, optimizer): what to use from now on.
    Raises:
        InvalidPolicy, InvalidInput: as for `attach`.
    """
    if clip is not None:
        check_policy(clip)
    backend = _backend_of(model, "model", "a model of an installed backend")
    if not hasattr(backend, "compile"):
        raise InvalidInput(f"backend {backend.name!r} has no models to compile")
    compiled: tuple[Any, Any, Any] = backend.compile(model, loss_fn, optimizer, clip)
    return compiled


def _backend_of(obj: Any, role: str, expected: str) -> Any:
    try:
        return backend_of(obj)
    except BackendError as err:
        raise InvalidInput(f"{role} is {obj!r:.60} of type {type(obj).__name__}; expected {expected}: {err}") from err
