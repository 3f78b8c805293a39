"""Policies attached to torch optimizers, through the hooks around their steps."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from clipcore.clipping.call import Call
from clipcore.clipping.clipper import Clipper
from clipcore.clipping.given import map_state
from clipcore.clipping.policies import Policy
from clipcore.clipping.report import ClipReport
from clipcore.errors import InvalidInput
from clipcore.training import Attachment, OnReport
from clipcore_torch._primitives import TorchPrimitives

# what torch wraps every optimizer's `step` in, to call the hooks around it
_STEP = Optimizer.profile_hook_step(lambda self: None).__code__
_attached: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def attach(optimizer: Any, policy: Policy, model: Any = None, on_report: OnReport | None = None) -> Attachment:
    """Clip the gradients of every step of `optimizer`; see `clipcore.attach`.

    Raises:
        InvalidInput: it is no torch optimizer, or has a policy already; or the policy asks for a model.
    """
    if not isinstance(optimizer, Optimizer):
        raise InvalidInput(
            f"optimizer is {optimizer!r:.60} of type {type(optimizer).__name__}; expected a torch.optim.Optimizer, "
            f"say torch.optim.SGD(model.parameters(), lr=0.1)"
        )
    if optimizer in _attached:
        raise InvalidInput(
            f"this {type(optimizer).__name__} has a policy already; remove that first: attachment.remove()"
        )
    clipper = Clipper(policy, model, backend="torch")
    if policy.asks:
        _rehearse(_params(optimizer), policy, model)
    handles: list[torch.utils.hooks.RemovableHandle] = []
    owner = weakref.ref(optimizer)

    def detach() -> None:
        for handle in handles:
            handle.remove()
        if (attached := owner()) is not None:
            _attached.discard(attached)

    attachment = Attachment(
        policy,
        detach,
        on_report=on_report,
        state_dict=clipper.state_dict,
        load_state_dict=clipper.load_state_dict,
    )
    step = _Step(clipper, attachment.keep)
    handles.append(optimizer.register_step_pre_hook(step.before))
    handles.append(optimizer.register_step_post_hook(step.after))
    _attached.add(optimizer)
    return attachment


def _rehearse(params: list[Tensor], policy: Policy, model: Any) -> None:
    """Let a policy act on tensors without elements, so that what it misses is said now and not in the first step."""
    call = Call.of(params, policy, params, model, "torch")
    primitives = TorchPrimitives()
    tensors = [torch.empty_like(param, device="meta") for param in call.tensors]
    state = map_state(lambda value: primitives.adopt(value, next(iter(tensors), None)), policy.start(call.specs()))
    with torch.no_grad():
        policy.bound(call.given(tensors, tensors, primitives), state)


def compile(
    model: Any, loss_fn: Any, optimizer: Any, policy: Policy | None, on_report: OnReport | None = None
) -> tuple[Any, Any, Any]:
    """What to train with: the three as they are, the policy attached to the optimizer where there is one.

    Raises:
        InvalidInput: the optimizer is no torch optimizer (torch makes none from a name).
    """
    if not isinstance(optimizer, Optimizer):
        raise InvalidInput(
            f"optimizer is {optimizer!r:.60}; torch needs an optimizer that holds the model's parameters, "
            f"say torch.optim.SGD(model.parameters(), lr=0.1)"
        )
    if policy is not None:
        attach(optimizer, policy, model, on_report)
    return model, loss_fn, optimizer


class _Step:
    """What happens before and after one step of an optimizer."""

    def __init__(self, clipper: Clipper, keep: Callable[[ClipReport], None]) -> None:
        self._clipper = clipper
        self._policy = clipper.policy
        self._keep = keep
        self._withheld: list[tuple[Tensor, Tensor]] = []
        self._start: _State | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Clip what the step is about to use, or make its closure clip what it computes."""
        if _is_inside_step(optimizer):
            return None
        # of the positional arguments the first is the optimizer itself
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        # what a step that raised left withheld stays so while it is only tried again, and is then given back
        if callable(closure) or any(param.grad is not None for param, _ in self._withheld):
            self._withheld = []
        self._start = None
        if not callable(closure):
            self._clip(optimizer)
            return None
        if self._policy.nonfinite == "skip" and isinstance(optimizer, LBFGS):
            self._start = _State(optimizer, self._clipper)  # it moves the parameters between its evaluations

        def clipped_closure() -> Any:
            loss = closure()
            self._clip(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": clipped_closure}
        return (args[0], clipped_closure, *args[2:]), kwargs

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Give back the gradients that a skipped step was not to see."""
        if _is_inside_step(optimizer):
            return
        if self._withheld and self._start is not None:
            self._start.restore(optimizer)
        for param, grad in self._withheld:
            if param.grad is None:
                param.grad = grad
        self._withheld, self._start = [], None

    def _clip(self, optimizer: Optimizer) -> None:
        params = _params(optimizer)
        if all(param.grad is None for param in params) or _is_skipped_by_scaler(optimizer, self._policy):
            return
        report = _clip_scaled(optimizer, params, self._clipper)
        self._keep(report)
        # reading the count waits for a device, but skipping is a decision that Python has to make
        if self._policy.nonfinite == "skip" and int(report.nonfinite):
            for param in params:
                if param.grad is not None:
                    self._withheld.append((param, param.grad))
                    param.grad = None


class _State:
    """Parameters and state of an optimizer, and what its policy had learned, before a step."""

    def __init__(self, optimizer: Optimizer, clipper: Clipper) -> None:
        self._clipper, self._learned = clipper, clipper.state_dict()
        self._params = [(param, param.detach().clone()) for param in _params(optimizer)]
        self._state = {param: copy.deepcopy(state) for param, state in optimizer.state.items()}

    @torch.no_grad()
    def restore(self, optimizer: Optimizer) -> None:
        for param, value in self._params:
            param.copy_(value)
        optimizer.state.clear()
        optimizer.state.update(self._state)
        self._clipper.load_state_dict(self._learned)


def _is_inside_step(optimizer: Optimizer) -> bool:
    """Whether the step around a hook runs inside another step of the same optimizer (`super().step()`).

    Asked of the stack, since a flag would outlive a step that raised.
    """
    steps = 0
    frame: Any = sys._getframe()
    while frame is not None and steps < 2:
        steps += frame.f_code is _STEP and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return steps == 2


def _params(optimizer: Optimizer) -> list[Tensor]:
    return list({id(p): p for group in optimizer.param_groups for p in group["params"]}.values())


def _is_skipped_by_scaler(optimizer: Optimizer, policy: Policy) -> bool:
    """Whether a GradScaler found inf or NaN, so that the (fused) optimizer will not move.

    Others it does not even call then. On a device this is asked only where the policy reads it anyway.
    """
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    if found is None:
        return False
    learns = policy.stateful and policy.nonfinite == "zero"  # else faults alone keep a state as it is
    if found.device.type != "cpu" and policy.nonfinite not in ("raise", "skip") and not learns:
        return False
    return bool(found)


def _clip_scaled(optimizer: Optimizer, params: list[Tensor], clipper: Clipper) -> ClipReport:
    """Clip the gradients of `params`, which a GradScaler leaves scaled for fused optimizers."""
    if clipper.policy.dense:
        for param in params:
            if param.grad is not None and param.grad.layout is not torch.strided:
                param.grad = param.grad.to_dense()
    if not clipper.policy.stateful and not clipper.policy.asks:
        params = [param for param in params if param.grad is not None]
    # else None where there is no gradient, so that each parameter keeps its place in what the policy has learned
    grads = [param.grad for param in params]
    if optimizer.defaults.get("differentiable"):
        clipped, report = clipper.clip(grads, params)
        for param, grad in zip(params, clipped, strict=True):
            param.grad = grad
        return report
    factor: Tensor | None = getattr(optimizer, "grad_scale", None)
    with torch.no_grad():
        if factor is None:
            return clipper.clip_(grads, params)
        found = [grad for grad in grads if grad is not None]
        if any(grad.dtype == torch.float16 for grad in found):
            return _clip_and_rescale(grads, params, factor, clipper)
        for grad in found:
            grad.div_(factor.to(grad.device))
        # one, not None: the scaler multiplies with it if the step raises and is called again
        optimizer.grad_scale = torch.ones_like(factor)  # type: ignore[attr-defined]
        return clipper.clip_(grads, params)


def _clip_and_rescale(grads: list[Tensor | None], params: list[Tensor], factor: Tensor, clipper: Clipper) -> ClipReport:
    """Clip and leave the gradients scaled: unscaled ones, which float32 holds, would underflow in float16."""
    wide = [grad.float() if grad is not None and grad.dtype == torch.float16 else grad for grad in grads]
    unscaled = [None if grad is None else grad / factor.to(grad.device) for grad in wide]
    clipped, report = clipper.clip(unscaled, params)
    for grad, before, after in zip(grads, unscaled, clipped, strict=True):
        if grad is not None and after is not before:
            grad.copy_(after * factor.to(grad.device))
    return report
