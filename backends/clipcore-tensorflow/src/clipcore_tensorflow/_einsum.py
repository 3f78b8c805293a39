"""EinsumDense: which equations are a plain product over the input's last axes, and how the kernel is stored then."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from clipcore_tensorflow._canonical import Block, Canonical, NotDescribedError, Shapes
from clipcore_tensorflow._functions import activation_name


@dataclass(frozen=True)
class Product:
    """An equation that multiplies the last axes of the input, `ins`, by a kernel, and gives `outs` in their place."""

    ins: str
    outs: str
    kernel: str

    def layout(self, letters: str) -> str:
        """The layout of a tensor with these axes."""
        return " ".join(map(self._word, letters))

    def _word(self, letter: str) -> str:
        word, letters = ("in", self.ins) if letter in self.ins else ("out", self.outs)
        return word if len(letters) == 1 else f"{word}{letters.index(letter)}"


def parse(equation: str) -> Product:
    """The product that an equation is.

    Raises:
        NotDescribedError: it is none.

    >>> parse("...ab,abcd->...cd").layout("abcd"), parse("abc,dc->abd").layout("dc")
    ('in0 in1 out0 out1', 'out in')
    """
    ins, kernel, outs = (re.findall(r"\.\.\.|\w", text) for text in re.split(",|->", equation.replace(" ", "")))
    shared = 0
    while shared < min(len(ins), len(outs)) and ins[shared] == outs[shared] and ins[shared] not in kernel:
        shared += 1
    product = Product("".join(ins[shared:]), "".join(outs[shared:]), "".join(kernel))
    letters = product.ins + product.outs
    in_order = all("".join(a for a in kernel if a in side) == side for side in (product.ins, product.outs))
    plain = "..." not in letters and len(set(letters)) == len(letters) and sorted(letters) == sorted(kernel)
    if not (product.ins and product.outs and plain and in_order):
        raise NotDescribedError(
            f"an EinsumDense with the equation {equation!r}, no plain product over its input's last axes"
        )
    return product


def einsum(layer: Any, shapes: Shapes) -> list[Canonical]:
    """The linear layer that an EinsumDense is; see `parse` for NotDescribedError."""
    product = parse(layer.equation)
    extra = set(shapes) - {"kernel", "bias"}
    if extra:
        raise NotDescribedError(f"an EinsumDense with {', '.join(sorted(extra))}")
    blocks = {"kernel": (Block("kernel", product.layout(product.kernel)),)}
    if "bias" in shapes:
        if set(layer.bias_axes) != set(product.outs):
            raise NotDescribedError(f"an EinsumDense with a bias over {layer.bias_axes!r} of {product.outs!r} alone")
        blocks["bias"] = (Block("bias", product.layout(product.outs)),)
    sizes = dict(zip(product.kernel, shapes["kernel"], strict=True))
    settings: dict[str, Any] = {"activation": activation_name(layer.activation)}
    divided = next((axes for axes in (product.outs, product.ins) if len(axes) == 2), None)
    if divided:
        settings["heads"] = int(sizes[divided[0]])
    return [Canonical("linear", blocks, settings, view=Folded(len(product.ins), len(product.outs)))]


@dataclass(frozen=True)
class Folded:
    """The view of a layer that acts on several last axes, which are one to the watcher."""

    ins: int
    outs: int

    def seen(self, inputs: list[Any]) -> list[Any]:
        return [_fold(inputs[0], self.ins), *inputs[1:]]

    def back(self, seen: list[Any], inputs: list[Any]) -> list[Any]:
        return [_unfold(seen[0], inputs[0], self.ins), *seen[1:]]

    def shown(self, output: Any) -> Any:
        return _fold(output, self.outs)

    def given(self, shown: Any, output: Any) -> Any:
        return _unfold(shown, output, self.outs)


def _fold(tensor: Any, axes: int) -> Any:
    shape = tuple(tensor.shape)
    return tensor if axes == 1 else tf.reshape(tensor, (*shape[:-axes], -1))


def _unfold(tensor: Any, like: Any, axes: int) -> Any:
    """Batch and time are those of what stands there now, the last axes those of what stood there."""
    return tensor if axes == 1 else tf.reshape(tensor, (*tensor.shape[:-1], *like.shape[-axes:]))
