"""Which numbers of a vector belong to which tensor: one for each, one for each unit of it, or the same for all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from clipcore.backend import Axes


class Groups(NamedTuple):
    """Where a vector's numbers belong: to tensors or their units, one after the other, or joined, to those of all.

    Attributes:
        axes: of each tensor, those that run over its units; () where it is one unit.
        counts: how many units each has.
    """

    axes: Sequence[Axes]
    counts: Sequence[Any]
    joined: bool = False

    def parts(self, vector: tf.Tensor) -> list[tf.Tensor]:
        """Each tensor's own numbers."""
        if self.joined:
            return [vector] * len(self.counts)
        if all(isinstance(count, int) and count == 1 for count in self.counts):
            return [number[None] for number in tf.unstack(vector, len(self.counts))]
        return list(tf.split(vector, tf.stack(self.counts), num=len(self.counts)))

    def spread(self, vector: tf.Tensor, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Each tensor's own numbers, in a shape in which they multiply it."""
        if self.joined and not any(self.axes):
            return [vector[0]] * len(tensors)
        return [
            tf.reshape(
                part, [product(x, [axis]) if axis in axes else 1 for axis in range(x.shape.rank)] if axes else []
            )
            for part, axes, x in zip(self.parts(vector), self.axes, tensors, strict=True)
        ]

    def each(self, vector: tf.Tensor) -> tf.Tensor:
        """The numbers tensor by tensor, joined ones repeated."""
        return tf.tile(vector, [len(self.counts)]) if self.joined else vector


def product(x: tf.Tensor, axes: Sequence[int]) -> Any:
    """The number of elements along some axes: an integer where the shape says it."""
    sizes = [x.shape[axis] for axis in axes]
    return math.prod(sizes) if None not in sizes else tf.reduce_prod([tf.shape(x)[axis] for axis in axes])
