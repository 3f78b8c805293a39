"""Two writers of one architecture, which share nothing but its nodes: torch's by modules, Keras's by a graph."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import keras
import numpy as np
import torch
from architecture_nodes import (
    Activation,
    Architecture,
    Attention,
    BatchNorm,
    Concat,
    Conv,
    Dense,
    Embedding,
    Flatten,
    GroupNorm,
    Layer,
    LayerNorm,
    Node,
    Nodes,
    Pool,
    Residual,
    every,
)
from torch import nn
from torch.nn import functional as F

L = keras.layers


def torch_network(architecture: Architecture) -> tuple[nn.Module, dict[int, str]]:
    """A model in torch, and its layers' names by key."""
    names = dict(zip(architecture.order, architecture.names[0], strict=True))
    return TorchNetwork(architecture, names).eval(), names


class TorchNetwork(nn.Module):
    """Layers in submodules that say nothing of their order, which `forward` reads from the tree."""

    def __init__(self, architecture: Architecture, names: dict[int, str]) -> None:
        super().__init__()
        self.nodes, self.places = architecture.nodes, names
        layers = architecture.layers()
        for key in architecture.order:
            *outer, name = names[key].split(".")
            module: nn.Module = self
            for step in outer:
                if not hasattr(module, step):
                    module.add_module(step, nn.Module())
                module = getattr(module, step)
            module.add_module(name, torch_layer(layers[key]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.through(self.nodes, x)

    def through(self, nodes: Nodes, x: torch.Tensor) -> torch.Tensor:
        for node in nodes:
            x = self.step(node, x)
        return x

    def step(self, node: Node, x: torch.Tensor) -> torch.Tensor:
        match node:
            case Layer():
                return self.get_submodule(self.places[node.key])(x)
            case Activation():
                return getattr(torch if node.function == "tanh" else F, node.function)(x)
            case Pool(window=0):
                places = (1,) if x.ndim == 3 else (2, 3)
                return x.amax(places) if node.function == "max" else x.mean(places)
            case Pool():
                return (F.max_pool2d if node.function == "max" else F.avg_pool2d)(x, node.window)
            case Flatten():
                return torch.flatten(x, 1)
            case Residual():
                return self.through(node.body, x) + self.through(node.shortcut, x)
            case Concat():
                return torch.cat([self.through(branch, x) for branch in node.branches], 1)
            case Attention():
                return self.attend(node, x)
        raise TypeError(node)

    def attend(self, node: Attention, x: torch.Tensor) -> torch.Tensor:
        query, keys, value = (
            self.step(projection, x).unflatten(-1, (node.heads, -1)).transpose(1, 2)
            for projection in (node.query, node.keys, node.value)
        )
        scores = query @ keys.transpose(-1, -2) / query.shape[-1] ** 0.5
        return self.step(node.out, (scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


def torch_layer(node: Layer) -> nn.Module:
    match node:
        case Conv():
            return nn.Conv2d(
                node.inputs, node.units, node.kernel, node.stride, node.padding, groups=node.groups, bias=node.bias
            )
        case BatchNorm():
            return nn.BatchNorm2d(node.units, node.eps)
        case GroupNorm():
            return nn.GroupNorm(node.groups, node.units, node.eps)
        case LayerNorm():
            return nn.LayerNorm(node.units, node.eps)
        case Dense():
            return nn.Linear(node.inputs, node.units, node.bias)
        case Embedding():
            return nn.Embedding(node.count, node.units)
    raise TypeError(node)


def keras_network(architecture: Architecture) -> tuple[keras.Model, dict[int, str]]:
    """A model in Keras, channels last, and its layers' names by key."""
    names = {key: name.replace(".", "_") for key, name in zip(architecture.order, architecture.names[1], strict=True)}
    shape: tuple[int | None, ...] = architecture.shape
    if len(shape) == 3:
        fixed = any(isinstance(node, Flatten) for node in every(architecture.nodes))
        shape = (*(shape[1:] if fixed else (None, None)), shape[0])
    inputs = keras.Input(shape, dtype="int64" if architecture.tokens else "float32")
    return keras.Model(inputs, KerasWriter(names, architecture.habits).through(architecture.nodes, inputs)), names


class KerasWriter:
    """Writes nodes behind a tensor of the graph; a layer that comes again is called again."""

    def __init__(self, names: dict[int, str], habits: frozenset[str]) -> None:
        self.names, self.habits = names, habits
        self.made: dict[int, L.Layer] = {}

    def through(self, nodes: Nodes, x: Any) -> Any:
        fused = False
        for node, following in pairwise((*nodes, None)):
            fuses = "fuses" in self.habits and isinstance(node, Conv | Dense) and isinstance(following, Activation)
            if not fused:
                x = self.step(node, x, following.function if fuses else None)
            fused = fuses
        return x

    def step(self, node: Node, x: Any, activation: str | None = None) -> Any:
        match node:
            case Layer():
                return self.call(node, x, activation)
            case Activation():
                return getattr(keras.activations, node.function)(x)
            case Pool():
                return keras_pool(node, x.ndim)(x)
            case Flatten():
                return L.Flatten()(x)
            case Residual():
                shortcut, body = self.all_through((node.shortcut, node.body), x)
                return L.Add()([shortcut, body])
            case Concat():
                return L.Concatenate()(self.all_through(node.branches, x))
            case Attention():
                return self.attend(node, x)
        raise TypeError(node)

    def all_through(self, branches: tuple[Nodes, ...], x: Any) -> list[Any]:
        """What each branch gives, built in the order that is this writer's habit."""
        if "last first" in self.habits:
            return [self.through(branch, x) for branch in reversed(branches)][::-1]
        return [self.through(branch, x) for branch in branches]

    def call(self, node: Layer, x: Any, activation: str | None) -> Any:
        options: dict[str, Any] = {"name": self.names[node.key]}
        if activation:
            options["activation"] = activation
        if isinstance(node, Conv):
            options["padding"] = node.padding if isinstance(node.padding, str) else "valid"
            if node.padding == node.kernel // 2 and node.stride == 1 and "pads apart" not in self.habits:
                options["padding"] = "same"
            elif node.padding not in (0, "same"):
                x = L.ZeroPadding2D(node.padding)(x)
        if node.key not in self.made:
            self.made[node.key] = keras_layer(node, options)
        return self.made[node.key](x)

    def attend(self, node: Attention, x: Any) -> Any:
        branches = tuple((projection,) for projection in (node.query, node.keys, node.value))
        steps, width = x.shape[1:]
        query, keys, value = (
            keras.ops.reshape(projected, (-1, steps, node.heads, width // node.heads))
            for projected in self.all_through(branches, x)
        )
        scores = keras.ops.einsum("bqhd,bkhd->bhqk", query, keys) * (width // node.heads) ** -0.5
        mixed = keras.ops.einsum("bhqk,bkhd->bqhd", keras.ops.softmax(scores), value)
        return self.step(node.out, keras.ops.reshape(mixed, (-1, steps, width)))


def keras_layer(node: Layer, options: dict[str, Any]) -> L.Layer:
    match node:
        case Conv(groups=groups, inputs=inputs) if 1 < groups == inputs:
            multiplier = node.units // inputs
            return L.DepthwiseConv2D(
                node.kernel, node.stride, depth_multiplier=multiplier, use_bias=node.bias, **options
            )
        case Conv():
            return L.Conv2D(node.units, node.kernel, node.stride, groups=node.groups, use_bias=node.bias, **options)
        case BatchNorm():
            return L.BatchNormalization(epsilon=node.eps, **options)
        case GroupNorm():
            return L.GroupNormalization(node.groups, epsilon=node.eps, **options)
        case LayerNorm():
            return L.LayerNormalization(epsilon=node.eps, **options)
        case Dense():
            return L.Dense(node.units, use_bias=node.bias, **options)
        case Embedding():
            return L.Embedding(node.count, node.units, **options)
    raise TypeError(node)


def keras_pool(node: Pool, axes: int) -> L.Layer:
    if axes == 3:
        return L.GlobalAveragePooling1D()
    if not node.window:
        return L.GlobalMaxPooling2D() if node.function == "max" else L.GlobalAveragePooling2D()
    return L.MaxPooling2D(node.window) if node.function == "max" else L.AveragePooling2D(node.window)


def randomise(model: nn.Module | keras.Model, seed: int) -> None:
    """Give every parameter and statistic random values that let signals through: kernels by their fan-in."""
    rng = np.random.default_rng(seed)
    if isinstance(model, nn.Module):
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if tensor.is_floating_point():
                    tensor.copy_(torch.from_numpy(_drawn(rng, name, tuple(tensor.shape), tensor[0].numel())))
        return
    for variable in model.variables:
        shape = tuple(variable.shape)
        variable.assign(_drawn(rng, variable.name, shape, int(np.prod(shape[:-1]))))


def _drawn(rng: np.random.Generator, name: str, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
    if "var" in name or (len(shape) == 1 and ("weight" in name or "gamma" in name)):
        return rng.uniform(0.5, 1.5, shape)
    return rng.normal(0, 0.3 if len(shape) == 1 else (2 / fan_in) ** 0.5, shape)
