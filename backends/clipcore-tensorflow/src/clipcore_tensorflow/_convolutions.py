"""Convolutions: how Keras pads and crops, in canonical words, and the two steps of a separable one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from clipcore_tensorflow._canonical import Block, Canonical, Shapes
from clipcore_tensorflow._keras import is_keras_3

Pairs = tuple[tuple[int, int], ...]


def pair_up(value: Any, rank: int) -> tuple[int, ...]:
    """One integer per spatial axis."""
    return (int(value),) * rank if isinstance(value, int) else tuple(map(int, value))


def padding_pairs(padding: str, window: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Any:
    """Keras's padding as one (before, after) pair per spatial axis, or "same" where it depends on the input's size."""
    totals = [rate * (size - 1) for size, rate in zip(window, dilation, strict=True)]
    if padding == "valid":
        return tuple((0, 0) for _ in totals)
    if padding == "causal":
        return tuple((total, 0) for total in totals)
    if any(step > 1 for step in stride):
        return "same"
    return tuple((total // 2, total - total // 2) for total in totals)


def crop_pairs(
    padding: str, window: Sequence[int], stride: Sequence[int], dilation: Sequence[int], output_padding: Any
) -> Pairs:
    """What Keras's transposed convolution cuts from the whole result, per spatial axis, (before, after).

    TensorFlow computes the gradient of the convolution that would give the input from the output, so that the cut is
    what that one pads: for "same" of a total of reach - stride (at least 0), the odd one after.
    """
    extra = (None,) * len(window) if output_padding is None else pair_up(output_padding, len(window))
    pairs = []
    for size, step, rate, more in zip(window, stride, dilation, extra, strict=True):
        reach = (size - 1) * rate + 1
        if padding == "valid":
            pairs.append((0, -(max(step - reach, 0) if more is None else more)))
            continue
        cut = reach - step if more is None else reach - reach % 2 - more
        before = max(cut, 0) // 2
        pairs.append((before, cut - before))
    return tuple(pairs)


def convolution(layer: Any, activation: str | None) -> dict[str, Any]:
    """The settings that all convolutions have."""
    rank = len(layer.kernel_size)
    stride, dilation = pair_up(layer.strides, rank), pair_up(layer.dilation_rate, rank)
    return {
        "stride": stride,
        "padding": padding_pairs(layer.padding, layer.kernel_size, stride, dilation),
        "padding_mode": "zeros",
        "dilation": dilation,
        "activation": activation,
        "channels": layer.data_format.removeprefix("channels_"),
    }


def transposed(layer: Any, activation: str | None) -> dict[str, Any]:
    """The settings of a transposed convolution."""
    rank = len(layer.kernel_size)
    # Keras 2 takes no notice of a dilation of three axes
    ignored = rank == 3 and not is_keras_3(layer)
    stride, dilation = pair_up(layer.strides, rank), (1,) * rank if ignored else pair_up(layer.dilation_rate, rank)
    return {
        "stride": stride,
        "crop": crop_pairs(layer.padding, layer.kernel_size, stride, dilation, layer.output_padding),
        "dilation": dilation,
        "groups": 1,
        "activation": activation,
        "channels": layer.data_format.removeprefix("channels_"),
    }


def separable(layer: Any, shapes: Shapes, activation: str | None) -> list[Canonical]:
    """A depthwise convolution, and a pointwise one, which has the bias and the activation."""
    *window, channels, _ = shapes["depthwise_kernel"]
    rank = len(window)
    ones: Mapping[str, Any] = {"stride": (1,) * rank, "dilation": (1,) * rank, "padding": ((0, 0),) * rank}
    first = {**convolution(layer, None), "groups": int(channels)}
    blocks = {"pointwise_kernel": (Block("kernel", "... in (group out)"),)}
    if "bias" in shapes:
        blocks["bias"] = (Block("bias", "(group out)"),)
    depthwise = {"depthwise_kernel": (Block("kernel", "... (group in) out"),)}
    return [
        Canonical("conv", depthwise, first, "depthwise", step=_depthwise_step),
        Canonical(
            "conv", blocks, {**first, **ones, "groups": 1, "activation": activation}, "pointwise", step=_pointwise_step
        ),
    ]


def _depthwise_step(layer: Any, x: Any) -> Any:
    """The first half of a separable convolution; TensorFlow has it for two spatial axes, channels last."""
    x = _channels_last(layer, x)
    kernel = tf.cast(tf.convert_to_tensor(layer.depthwise_kernel), x.dtype)
    rank = len(layer.kernel_size)
    stride, dilation = pair_up(layer.strides, rank), pair_up(layer.dilation_rate, rank)
    padding = layer.padding
    if padding == "causal":
        x = tf.pad(x, [[0, 0], [(kernel.shape[0] - 1) * dilation[0], 0], [0, 0]])
        padding = "valid"
    if rank == 1:
        x, kernel, stride, dilation = x[:, None], kernel[None], stride * 2, (1, *dilation)
    y = tf.nn.depthwise_conv2d(x, kernel, (1, *stride, 1), padding.upper(), dilations=dilation)
    return _channels_back(layer, y[:, 0] if rank == 1 else y)


def _pointwise_step(layer: Any, x: Any) -> Any:
    """The second half."""
    x = _channels_last(layer, x)
    y = tf.nn.convolution(x, tf.cast(tf.convert_to_tensor(layer.pointwise_kernel), x.dtype), padding="VALID")
    if layer.use_bias:
        y += tf.cast(tf.convert_to_tensor(layer.bias), y.dtype)
    y = _channels_back(layer, y)
    return y if layer.activation is None else layer.activation(y)


def _channels_last(layer: Any, x: Any) -> Any:
    last = layer.data_format == "channels_last"
    return x if last else tf.transpose(x, [0, *range(2, x.shape.rank), 1])


def _channels_back(layer: Any, x: Any) -> Any:
    last = layer.data_format == "channels_last"
    return x if last else tf.transpose(x, [0, x.shape.rank - 1, *range(1, x.shape.rank - 1)])
