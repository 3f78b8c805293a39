"""Sums over the steps of a policy in a variable, where compiled training can add to them."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from clipcore.clipping.report import ClipReport


class Figures:
    """Norms, factors and limits of the steps since the last reset, summed up.

    A step with a norm that is not finite counts as a step alone; a step without a limit counts in no mean of limits.
    """

    def __init__(self, strategy: Any) -> None:
        with strategy.scope():
            self._sums = tf.Variable(
                tf.zeros([7], tf.float64),
                trainable=False,
                aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
                name="clip_figures",
            )

    def add(self, report: ClipReport) -> None:
        """Count a step in."""
        norm, scale, limit, clipped = (
            tf.cast(value, tf.float64) for value in (report.norm, report.scale, report.limit, report.clipped)
        )
        known, limited = tf.math.is_finite(norm), tf.math.is_finite(limit)
        one, zero = tf.ones([], tf.float64), tf.zeros([], tf.float64)
        self._sums.assign_add(
            tf.stack(
                [
                    one,
                    clipped,
                    tf.where(known, one, zero),
                    tf.where(known, norm, zero),
                    tf.where(known, scale, zero),
                    tf.where(limited, one, zero),
                    tf.where(limited, limit, zero),
                ]
            )
        )

    def reset(self) -> None:
        self._sums.assign(tf.zeros([7], tf.float64))

    def means(self) -> dict[str, float]:
        """The figures of the steps so far; NaN where no step had any, of the limit inf."""
        steps, clipped, known, norm, scale, limited, limit = self._sums.numpy().tolist()
        return {
            "norm": norm / known if known else math.nan,
            "limit": limit / limited if limited else math.inf,
            "scale": scale / known if known else math.nan,
            "share_clipped": clipped / steps if steps else math.nan,
        }
