"""Callbacks for Lightning and for the Hugging Face Trainer: `clipcore.attach` where those make their optimizers.

Both clip in the optimizer's own step: after unscaling, accumulation and reduction over processes, before the update.
Neither library is imported before its callback is made.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Mapping
from typing import Any

import torch

import clipcore as cc
from clipcore.training import OnReport

_LIGHTNING = ("lightning.pytorch", "pytorch_lightning")  # one library under two names, with a base class each


class _Clipping:
    """A policy, and its attachments to the optimizers of one training."""

    policy: cc.Policy
    on_report: OnReport | None
    attachments: list[cc.Attachment]

    def _start(self, policy: cc.Policy, on_report: OnReport | None) -> None:
        self.policy, self.on_report, self.attachments = policy, on_report, []

    def _attach(self, optimizers: list[Any], model: Any) -> None:
        self._remove()  # where the training before was broken off
        for optimizer in optimizers:
            attached = cc.attach(_innermost(optimizer), self.policy, model, on_report=self.on_report)
            self.attachments.append(attached)

    def _remove(self) -> None:
        for attachment in self.attachments:
            attachment.remove()
        self.attachments = []


class _LightningClip(_Clipping):
    """The hooks of Lightning; see `lightning_callback`."""

    _saved: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the policy to each optimizer."""
        if trainer.gradient_clip_val:
            raise cc.InvalidInput(
                f"the Trainer clips as well (gradient_clip_val={trainer.gradient_clip_val!r}): leave that out, so that "
                f"{type(self.policy).__name__} alone does"
            )
        self._attach(trainer.optimizers, pl_module)
        for index, attachment in enumerate(self.attachments):
            if self._saved and str(index) in self._saved:
                attachment.load_state_dict(self._saved[str(index)])
        self._saved = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the policy off again; what it has learned goes on with the next fit."""
        self._saved = self.state_dict()
        self._remove()

    def state_dict(self) -> dict[str, Any]:
        """What the policy has learned, optimizer by optimizer: Lightning saves it in its checkpoints."""
        if not self.attachments:
            return dict(self._saved or {})
        return {
            str(index): {name: torch.from_numpy(value) for name, value in attachment.state_dict().items()}
            for index, attachment in enumerate(self.attachments)
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up a checkpoint's state, when training starts."""
        self._saved = dict(state_dict)

    def __reduce__(self) -> Any:
        return functools.partial(lightning_callback, self.policy, on_report=self.on_report), ()


class _TrainerClip(_Clipping):
    """The hooks of the Hugging Face Trainer; see `trainer_callback`."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the policy to the optimizer, which accelerate has wrapped by now."""
        if args.max_grad_norm:
            raise cc.InvalidInput(
                f"the Trainer clips as well (max_grad_norm={args.max_grad_norm!r}, which is 1.0 by default): pass "
                f"TrainingArguments(max_grad_norm=0), so that {type(self.policy).__name__} alone does"
            )
        self._attach([kwargs["optimizer"]], kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the policy off again."""
        self._remove()


def lightning_callback(policy: cc.Policy, *, on_report: OnReport | None = None) -> Any:
    """A Lightning callback that clips by a policy, in automatic and manual optimization, each optimizer on its own.

    Names and layouts are those of the LightningModule. What the policy learns is saved in Lightning's checkpoints.

    Args:
        policy: as for `clipcore.attach`.
        on_report: as for `clipcore.attach`.
    Returns:
        A `Callback` of `lightning` or `pytorch_lightning`, whichever is imported by then; its `attachments` have the
        reports, one for each optimizer.
    Raises:
        ImportError: neither is installed. InvalidInput: when training starts, the Trainer has a gradient_clip_val, or
            as for `clipcore.attach`.
    """
    modules = [name for name in _LIGHTNING if name in sys.modules]
    bases = [importlib.import_module(name).Callback for name in modules] or [_first_lightning()]
    callback = _class(_LightningClip, tuple(dict.fromkeys(bases)))()
    callback._start(policy, on_report)
    return callback


def trainer_callback(policy: cc.Policy, *, on_report: OnReport | None = None) -> Any:
    """A callback of the Hugging Face Trainer that clips by a policy; pass `max_grad_norm=0` to the Trainer.

    It acts inside the optimizer's step and not in `on_pre_optimizer_step`, where gradients may still be scaled.

    Args:
        policy: as for `clipcore.attach`.
        on_report: as for `clipcore.attach`.
    Returns:
        A `transformers.TrainerCallback`; its `attachments` have the reports while it trains.
    Raises:
        ImportError: transformers is not installed. InvalidInput: when training begins, the Trainer clips as well, or
            as for `clipcore.attach`.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as err:
        raise ImportError("trainer_callback needs transformers: pip install 'transformers[torch]'") from err
    callback = _class(_TrainerClip, (TrainerCallback,))()
    callback._start(policy, on_report)
    return callback


def _first_lightning() -> Any:
    for name in _LIGHTNING:
        try:
            return importlib.import_module(name).Callback
        except ModuleNotFoundError:
            continue
    raise ImportError("lightning_callback needs Lightning: pip install lightning")


@functools.cache
def _class(hooks: type, bases: tuple[type, ...]) -> Any:
    return type(hooks.__name__.removeprefix("_"), (hooks, *bases), {"__module__": __name__, "__doc__": hooks.__doc__})


def _innermost(optimizer: Any) -> Any:
    """The optimizer that takes the step: accelerate's stands around it."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer
