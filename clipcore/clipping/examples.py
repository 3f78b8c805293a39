"""Policies for gradients per example, as differential privacy needs them: each example is bounded, then all are summed.

Every tensor has the examples of one batch along its first axis; what comes out has lost that axis.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np

from clipcore.backend import NonFiniteMode
from clipcore.clipping.given import Given, Spec, State, learned, shape_of
from clipcore.clipping.policies import Bounded, Policy, check_number
from clipcore.errors import InvalidInput

_NO_EXAMPLES = (
    "it bounds the gradient of each example, and an optimizer has their sum alone: compute them with "
    "cc.per_example_grads, clip them with cc.clip, and give the optimizer the result"
)


def _sum_of_bounded(given: Given, nonfinite: NonFiniteMode, limit: Any, *, joint: bool) -> tuple[list[Any], Any, Any]:
    """(the sums of the bounded examples, their measure, the factors)"""
    primitives = given.primitives
    batches = {tuple(tensor.shape)[:1] for tensor in given.tensors}
    if len(batches) > 1 or () in batches:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in given.tensors)
        raise InvalidInput(
            f"gradients per example have the examples along their first axis, as many in each; got {shapes}"
        )
    axes = [(0,)] * len(given)
    tensors, measure = primitives.measure(given.tensors, 2.0, axes, zero_nonfinite=nonfinite == "zero")
    measure = primitives.join(measure) if joint else measure
    bounded, scale = primitives.within(tensors, measure, limit, nonfinite)
    return primitives.total(bounded), measure, scale


def _share(max_norm: float, count: int) -> float:
    """max_norm / sqrt(count), rounded down: `count` norms of it are within `max_norm` together."""
    if max_norm == math.inf:
        return max_norm
    share = min(math.nextafter(max_norm / math.sqrt(count), math.inf), max_norm)
    while count * Fraction(share) ** 2 > Fraction(max_norm) ** 2:
        share = math.nextafter(share, 0.0)
    return share


@dataclass(frozen=True)
class PerExampleClip(Policy):
    """Shrink each example's gradient so that its L2 norm is at most `max_norm`, then sum over the examples.

    sum over i of g_i * min(1, max_norm / ||g_i||_2), the norm over all tensors, or with `per_layer` each of K tensors
    held to max_norm / sqrt(K) on its own. The factor is the largest for which the example as it is stored keeps the
    bound, in every dtype, so that a sensitivity of `max_norm` is a fact and not an approximation. The sum is computed
    in float64 and rounded once. Noise is yours to add.

    Args:
        max_norm: >= 0, in the unit of the gradients.
        per_layer: whether each tensor has a bound of its own.
        nonfinite: see Policy; "zero" leaves a faulty example's finite elements in.
    Raises:
        InvalidPolicy: max_norm is negative or NaN. InvalidInput: at the call, tensors of unequal first axes.
    Source: Abadi et al. 2016, arXiv:1607.00133, algorithm 1; per layer: McMahan et al. 2018, arXiv:1710.06963.

    >>> import numpy as np
    >>> import clipcore as cc
    >>> cc.clip(np.array([[3.0, 4.0], [0.0, 1.0]]), PerExampleClip(2.5))[0]
    array([1.5, 3. ])
    """

    refuses_attach: ClassVar[str] = _NO_EXAMPLES
    keeps_shapes: ClassVar[bool] = False
    dense: ClassVar[bool] = True

    max_norm: float
    _: KW_ONLY
    per_layer: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "max_norm", 0.0)

    def bound(self, given: Given, state: State) -> Bounded:
        limit = _share(self.max_norm, max(len(given), 1)) if self.per_layer else self.max_norm
        sums, measure, scale = _sum_of_bounded(given, self.nonfinite, limit, joint=not self.per_layer)
        return sums, state, given.primitives.report(measure, scale)


@dataclass(frozen=True)
class QuantileClip(Policy):
    """PerExampleClip whose bound follows a quantile of the examples' norms.

    With b, the share of the examples whose norm is at most the bound C, C becomes
    C * exp(-learning_rate * (b - quantile)) after the step. For a private bound add noise to the share yourself: here
    none is.

    Args:
        max_norm: > 0, the bound of the first step, in the unit of the gradients.
        quantile: in [0, 1], the share of examples that shall stay as they are.
        learning_rate: >= 0.
        nonfinite: see Policy.
    Raises:
        InvalidPolicy: an argument is out of range. InvalidInput: at the call, tensors of unequal first axes.
    Source: Andrew et al. 2021, arXiv:1905.03871, section 2.

    >>> import numpy as np
    >>> import clipcore as cc
    >>> clipper = cc.Clipper(QuantileClip(1.0, learning_rate=1.0))
    >>> [clipper.clip(np.array([[8.0], [4.0]]))[1].limit for _ in range(2)]
    [1.0, 1.6487212707001282]
    """

    refuses_attach: ClassVar[str] = _NO_EXAMPLES
    keeps_shapes: ClassVar[bool] = False
    dense: ClassVar[bool] = True
    stateful: ClassVar[bool] = True

    max_norm: float
    _: KW_ONLY
    quantile: float = 0.5
    learning_rate: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "max_norm", math.ulp(0.0))
        check_number(self, "quantile", 0.0, 1.0)
        check_number(self, "learning_rate", 0.0, sys.float_info.max)

    def start(self, specs: Sequence[Spec | None]) -> State:
        return {"limit": np.array(self.max_norm)}

    def bound(self, given: Given, state: State) -> Bounded:
        primitives, arithmetic = given.primitives, given.primitives.arithmetic
        sums, measure, scale = _sum_of_bounded(given, self.nonfinite, state["limit"], joint=True)
        report = primitives.report(measure, scale)
        if not sums or shape_of(given.tensors[0])[0] == 0:
            return sums, state, report  # a step without examples teaches nothing
        share = arithmetic.mean(primitives.norms(measure) <= state["limit"])
        limit = state["limit"] * arithmetic.exp(-self.learning_rate * (share - self.quantile))
        limit = arithmetic.minimum(limit, np.finfo(np.float64).max)  # a state stays finite
        return sums, learned(given, self.nonfinite, measure.nonfinite, state, {"limit": limit}), report
