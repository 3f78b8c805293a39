"""What a clipping call reports."""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class ClipReport(NamedTuple):
    """The figures of one clipping call.

    On a CPU the fields are Python numbers. On a device, or inside a traced function, they are 0-d tensors: making
    the report waits for nothing, and reading one (`float(report.norm)`, `if report.clipped:`) may. A report is a
    plain tuple, so `tf.function` and `torch.compile` can return it.

    Attributes:
        norm: joint norm of all tensors before clipping, in the policy's p (L2 for ClipByValue), in the unit of the
            gradients; inf where the true norm leaves the range of float64; NaN where an element is not finite and
            the policy does not replace it.
        scale: the smallest factor that was applied; 1 in range, 0 for a skipped call, NaN for a propagated fault.
        clipped: whether the policy bounded anything.
        nonfinite: number of elements that were inf or NaN (for ClipByValue: NaN).
        norms: one norm per group of the policy, in order (ClipByNorm: per tensor).
        scales: one factor per group of the policy, in order.
        limit: the smallest limit on a norm that was in force; inf for a policy that has none.
    """

    norm: Any
    scale: Any
    clipped: Any
    nonfinite: Any
    norms: Any = ()
    scales: Any = ()
    limit: Any = math.inf
