"""Gradients per example, by torch.func: one functional call of the model, mapped over the examples."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from clipcore.errors import InvalidInput
from clipcore_torch import _tensors
from clipcore_torch._listing import first_floating


def per_example_grads(model: Any, loss_fn: Any, batch: tuple[Any, Any]) -> dict[str, Tensor]:
    """See `clipcore.per_example_grads`; dropout draws anew for each example.

    Raises:
        InvalidInput: the model mixes examples, the batch is no batch, or torch.vmap cannot map the model.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"model is {model!r:.60} of type {type(model).__name__}; expected a torch.nn.Module")
    if not callable(loss_fn):
        raise InvalidInput(f"loss_fn is {loss_fn!r:.60}; expected a function of (output, target), say nn.MSELoss()")
    _check_apart(model)
    first = first_floating(model)
    inputs, targets = tree_map(lambda value: _as_tensor(value, first), batch)
    _check_batch(inputs, targets)
    trained = {name: param.detach() for name, param in model.named_parameters() if param.requires_grad}

    def loss_of(params: dict[str, Tensor], x: Any, target: Any) -> Tensor:
        # a batch of one, since the model takes batches; what is not trained stays the model's own
        x, target = tree_map(lambda value: value[None], (x, target))
        args, kwargs = ((), x) if isinstance(x, dict) else (x if isinstance(x, tuple | list) else (x,), {})
        loss = loss_fn(functional_call(model, params, tuple(args), kwargs), target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise InvalidInput(f"loss_fn gave {what} for one example; expected one number: reduce it, by its mean, say")
        return loss.reshape(())

    try:
        grads: dict[str, Tensor] = vmap(grad(loss_of), in_dims=(None, 0, 0), randomness="different")(
            trained, inputs, targets
        )
    except InvalidInput:
        raise
    except (RuntimeError, NotImplementedError) as err:
        raise InvalidInput(
            f"{type(model).__name__} cannot be mapped over examples by torch.func.vmap: {err}. Replace what it refuses "
            f"(a branch on values, an operation in place on a buffer), or compute the examples one by one"
        ) from err
    return grads


def _as_tensor(value: Any, first: Tensor | None) -> Any:
    """An array as a tensor where the model is, floating ones in its dtype; what is a tensor stays as it is."""
    if not isinstance(value, np.ndarray):
        return value
    tensor = _tensors.as_tensor(value)
    if first is None:
        return tensor
    return tensor.to(first.device, first.dtype if tensor.is_floating_point() else tensor.dtype)


def _check_batch(inputs: Any, targets: Any) -> None:
    tensors = tree_leaves((inputs, targets))
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.ndim == 0:
            raise InvalidInput(f"batch has {tensor!r:.60}; expected tensors with the examples along their first axes")
    if len({len(tensor) for tensor in tensors}) > 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise InvalidInput(f"batch has tensors of shapes {shapes}; expected as many examples in each")
    if not tensors or not len(tensors[0]):
        raise InvalidInput("batch has no examples; expected at least one")


def _check_apart(model: nn.Module) -> None:
    """Refuse a model that mixes examples."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise InvalidInput(
                f"layer {name!r} ({type(module).__name__}) normalises over the examples of a batch, so that the "
                f"gradient of one depends on the others: put it in eval mode, or use GroupNorm or LayerNorm"
            )
