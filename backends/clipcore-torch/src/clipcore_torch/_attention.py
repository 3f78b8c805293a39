"""MultiheadAttention: four linear layers around what has no tensors, and run so while it is watched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipcore.backend import Layer
from clipcore_torch._composites import OTHERWISE_MADE, Composite, Tell
from clipcore_torch._described import Names, joined

_PARTS = ("query", "key", "value")
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_BARE = ("bias_k", "bias_v")


def _unlike(module: nn.MultiheadAttention, held: Mapping[str, Tensor]) -> str:
    """Why a module is not made of four linear layers; "" where it is."""
    expected = {"in_proj_weight"} if module._qkv_same_embed_dim else set(_SEPARATE)
    expected |= {name for name in ("in_proj_bias", *_BARE) if getattr(module, name, None) is not None}
    return "" if expected == held.keys() else OTHERWISE_MADE


def _describe(name: str, module: nn.MultiheadAttention, held: Mapping[str, Tensor], names: Names) -> list[Layer]:
    """Query, key and value; the output's projection is a submodule."""
    found = []
    for at, part in enumerate(_PARTS):
        rows = (at * module.embed_dim, (at + 1) * module.embed_dim)
        fused = module._qkv_same_embed_dim
        kernel = held["in_proj_weight"] if fused else held[_SEPARATE[at]]
        tensors = {"kernel": names.describe(kernel, "kernel", "out in", rows if fused else None)}
        if "in_proj_bias" in held:
            tensors["bias"] = names.describe(held["in_proj_bias"], "bias", "out", rows)
        settings = {"activation": None, "heads": module.num_heads}
        found.append(Layer(joined(name, part), "linear", tensors, settings))
    return found


def _inner(module: nn.MultiheadAttention) -> dict[str, dict[str, Any]]:
    return {"out_proj": {"heads": module.num_heads}}


def _apart(name: str, module: nn.MultiheadAttention, tell: Tell) -> Callable[..., Any]:
    """The module's forward, projection by projection, in inference."""
    whole = module.forward

    def forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        inputs = (query, key, value)
        if any(x.is_nested or x.dim() not in (2, 3) for x in inputs):
            return whole(query, key, value, *args, **kwargs)
        swapped = query.dim() == 3 and not module.batch_first
        projected = [
            _told(tell, joined(name, part), _batch_first(x, swapped), *_projection(module, at))
            for at, (part, x) in enumerate(zip(_PARTS, inputs, strict=True))
        ]
        context, weights = _attend(module, projected, query.dim() == 3, *args, **kwargs)
        out = module.out_proj
        output = _told(tell, joined(name, "out_proj"), context, out.weight, out.bias)
        return (output[0] if query.dim() == 2 else output.transpose(0, 1) if swapped else output), weights

    return forward


def _batch_first(x: Tensor, swapped: bool) -> Tensor:
    return x.transpose(0, 1) if swapped else x.unsqueeze(0) if x.dim() == 2 else x


def _projection(module: nn.MultiheadAttention, at: int) -> tuple[Tensor, Tensor | None]:
    rows = slice(at * module.embed_dim, (at + 1) * module.embed_dim)
    fused = module._qkv_same_embed_dim
    weight: Tensor = module.in_proj_weight[rows] if fused else getattr(module, _SEPARATE[at])
    return weight, None if module.in_proj_bias is None else module.in_proj_bias[rows]


def _told(tell: Tell, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer that a watcher sees."""
    (x,) = tell.before(name, [x])
    return tell.after(name, functional.linear(x, weight, bias))


def _attend(
    module: nn.MultiheadAttention,
    projected: list[Tensor],
    batched: bool,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(context with the batch first, attention weights) of what is projected already.

    torch's function projects always: by identities, which changes no bit of a finite number.
    """
    identity = torch.eye(module.embed_dim, dtype=projected[0].dtype, device=projected[0].device)
    context, weights = functional.multi_head_attention_forward(
        *(x.transpose(0, 1) if batched else x[0] for x in projected),
        module.embed_dim,
        module.num_heads,
        None,
        None,
        module.bias_k,
        module.bias_v,
        module.add_zero_attn,
        0.0,
        identity,
        None,  # type: ignore[arg-type]
        training=False,
        key_padding_mask=key_padding_mask,
        need_weights=need_weights,
        attn_mask=attn_mask,
        use_separate_proj_weight=True,
        q_proj_weight=identity,
        k_proj_weight=identity,
        v_proj_weight=identity,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
    )
    return context.transpose(0, 1) if batched else context.unsqueeze(0), weights


ATTENTION = Composite((nn.MultiheadAttention,), _unlike, _describe, _apart, _inner, _BARE)
