"""Policies that learn from the gradients that they see: their limits follow the norms, or the squares, of the past.

A step with non-finite elements teaches them nothing. Except in AutoClip, what a policy learns of a step is what it
left of it, so that a spike never enters its own threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np

from clipcore.backend import NonFiniteMode
from clipcore.clipping.given import Given, Spec, State, learned
from clipcore.clipping.policies import Bounded, Policy, check_count, check_number
from clipcore.clipping.report import ClipReport

_LARGEST = float(np.finfo(np.float64).max)  # what a state stays at, so that it is finite
_LARGEST_ROOT = math.sqrt(_LARGEST)  # whose square is finite


def _joint_norm(given: Given, nonfinite: NonFiniteMode) -> tuple[list[Any], Any, Any]:
    """(tensors, measure, norm) of all tensors together; the norm of none is 0."""
    primitives = given.primitives
    tensors, measure = primitives.measure(given.tensors, 2.0, zero_nonfinite=nonfinite == "zero")
    measure = primitives.join(measure)
    return tensors, measure, primitives.norms(measure)[0] if tensors else primitives.arithmetic.array(0.0)


@dataclass(frozen=True)
class AutoClip(Policy):
    """Hold the joint norm of all tensors to a percentile of the norms seen so far, the current one included.

    limit = percentile(the latest `window` norms, of which the current one is the last), as numpy.percentile has it;
    then as ClipByGlobalNorm.

    Args:
        percentile: in [0, 100].
        window: >= 1, how many norms are remembered; the current one is among them.
        nonfinite: see Policy.
    Raises:
        InvalidPolicy: an argument is out of range.
    Source: Seetharaman et al. 2020, arXiv:2007.14469, which remembers all norms.

    >>> import numpy as np
    >>> import clipcore as cc
    >>> clipper = cc.Clipper(AutoClip(50.0))
    >>> [float(clipper.clip(np.array([norm]))[0][0]) for norm in (4.0, 2.0, 8.0)]
    [4.0, 2.0, 4.0]
    """

    stateful: ClassVar[bool] = True

    percentile: float = 10.0
    _: KW_ONLY
    window: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "percentile", 0.0, 100.0)
        check_count(self, "window", 1)

    def start(self, specs: Sequence[Spec | None]) -> State:
        return {"norms": np.zeros(self.window), "count": np.zeros((), np.int64)}

    def bound(self, given: Given, state: State) -> Bounded:
        primitives, arithmetic = given.primitives, given.primitives.arithmetic
        tensors, measure, norm = _joint_norm(given, self.nonfinite)
        here = arithmetic.arange(self.window) == state["count"] % self.window
        seen = {"norms": arithmetic.where(here, norm, state["norms"]), "count": state["count"] + 1}
        limit = arithmetic.percentile(seen["norms"], arithmetic.minimum(seen["count"], self.window), self.percentile)
        # a norm that is itself the percentile is in range, whatever its last digits are when it is summed exactly
        scale = primitives.decide(measure, arithmetic.where(norm <= limit, math.inf, limit), self.nonfinite)
        state = learned(given, self.nonfinite, measure.nonfinite, state, seen)
        report = primitives.report(measure, scale)._replace(limit=limit)
        return primitives.apply(tensors, scale), state, report


@dataclass(frozen=True)
class ZClip(Policy):
    """Hold the joint norm of all tensors to what is usual: mean and variance of past norms tell a spike.

    The first `warmup` norms give a mean m and a variance s**2, and nothing is clipped. Then, for a norm n with
    z = (n - m) / (s + eps) > threshold, the limit is m + threshold**2 / z * s; else n is in range. With what is left of
    it, n', m becomes decay * m + (1 - decay) * n' and s**2 becomes decay * s**2 + (1 - decay) * (n' - m)**2.

    Args:
        threshold: >= 0, the z-score above which a norm is a spike.
        decay: in [0, 1), of the moving averages.
        warmup: >= 1, in steps.
        eps: >= 0, in the unit of the gradients.
        nonfinite: see Policy.
    Raises:
        InvalidPolicy: an argument is out of range.
    Source: Kumar et al. 2025, arXiv:2504.02507.

    >>> import numpy as np
    >>> import clipcore as cc
    >>> clipper = cc.Clipper(ZClip(1.0, warmup=2, eps=0.0))
    >>> [float(clipper.clip(np.array([norm]))[0][0]) for norm in (1.0, 3.0, 6.0)]
    [1.0, 3.0, 2.25]
    """

    stateful: ClassVar[bool] = True

    threshold: float = 2.5
    _: KW_ONLY
    decay: float = 0.97
    warmup: int = 25
    eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "threshold", 0.0, _LARGEST_ROOT)
        check_number(self, "decay", 0.0, math.nextafter(1.0, 0.0))
        check_count(self, "warmup", 1)
        check_number(self, "eps", 0.0, _LARGEST)

    def start(self, specs: Sequence[Spec | None]) -> State:
        return {"mean": np.zeros(()), "variance": np.zeros(()), "count": np.zeros((), np.int64)}

    def bound(self, given: Given, state: State) -> Bounded:
        primitives, arithmetic = given.primitives, given.primitives.arithmetic
        where, minimum, maximum = arithmetic.where, arithmetic.minimum, arithmetic.maximum
        tensors, measure, norm = _joint_norm(given, self.nonfinite)
        mean, variance, count = state["mean"], state["variance"], state["count"]
        warm = count >= self.warmup
        deviation = arithmetic.sqrt(variance)
        # n - m > threshold * (s + eps), since a deviation of 0 has no z-score
        over = warm & (norm - mean > self.threshold * (deviation + self.eps))
        excess = where(over, norm - mean, 1.0)
        bound = mean + self.threshold**2 * deviation * ((deviation + self.eps) / excess)
        limit = where(over, bound, math.inf)
        scale = primitives.decide(measure, limit, self.nonfinite)
        left = minimum(norm, limit)
        moved = self.decay * mean + (1 - self.decay) * left
        spread = self.decay * variance + (1 - self.decay) * (left - moved) ** 2
        # until then, the mean and variance of all norms so far (Welford); the count as a float, since not every
        # framework divides a float by an integer
        seen = maximum(count + 1, 1.0)
        first = mean + (left - mean) / seen
        early = variance + ((left - mean) * (left - first) - variance) / seen
        new = {
            "mean": where(warm, moved, first),
            "variance": minimum(maximum(where(warm, spread, early), 0.0), _LARGEST),
            "count": count + 1,
        }
        state = learned(given, self.nonfinite, measure.nonfinite, state, new)
        return primitives.apply(tensors, scale), state, primitives.report(measure, scale)


@dataclass(frozen=True)
class AdaGC(Policy):
    """Hold each tensor's norm to a little more than the moving average of its own past norms.

    For the first `warmup` steps all tensors are held to the joint norm `max_norm`, and a tensor's average a is the
    smallest norm other than 0 that it was left with. Then its limit is ratio * a, and a becomes
    decay * a + (1 - decay) * n' with n', the norm that it is left with. A tensor without a
    gradient so far (a = 0) is not clipped.

    Args:
        max_norm: >= 0, for the steps of the warm-up, in the unit of the gradients.
        ratio: >= 0, the limit in units of the average.
        decay: in [0, 1), of the averages.
        warmup: >= 1, in steps.
        nonfinite: see Policy.
    Raises:
        InvalidPolicy: an argument is out of range.
    Source: Wang et al. 2025, arXiv:2502.11034, algorithm 1.

    >>> import numpy as np
    >>> import clipcore as cc
    >>> clipper = cc.Clipper(AdaGC(5.0, ratio=1.5, warmup=1))
    >>> [float(clipper.clip(np.array([norm]))[0][0]) for norm in (10.0, 10.0, 2.0)]
    [5.0, 7.5, 2.0]
    """

    stateful: ClassVar[bool] = True

    max_norm: float = 1.0
    _: KW_ONLY
    ratio: float = 1.05
    decay: float = 0.98
    warmup: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "max_norm", 0.0)
        check_number(self, "ratio", 0.0, _LARGEST)
        check_number(self, "decay", 0.0, math.nextafter(1.0, 0.0))
        check_count(self, "warmup", 1)

    def start(self, specs: Sequence[Spec | None]) -> State:
        return {"averages": np.zeros(len(specs)), "count": np.zeros((), np.int64)}

    def bound(self, given: Given, state: State) -> Bounded:
        primitives, arithmetic = given.primitives, given.primitives.arithmetic
        where = arithmetic.where
        tensors, each = primitives.measure(given.tensors, 2.0, zero_nonfinite=self.nonfinite == "zero")
        if not tensors:
            return [], state, ClipReport(0.0, 1.0, False, 0)
        warming = state["count"] < self.warmup
        before = arithmetic.take(state["averages"], given.slots)
        limits = where(before > 0, self.ratio * before, math.inf)
        joint = primitives.join(each)
        scale, report = primitives.choose(
            warming,
            (primitives.decide(joint, self.max_norm, self.nonfinite), joint),
            (primitives.decide(each, limits, self.nonfinite), each),
        )
        norms = primitives.norms(each)
        factors = primitives.factors(scale)
        left = where(warming, norms * factors, arithmetic.minimum(norms, limits))
        smallest = where((before > 0) & (left > 0), arithmetic.minimum(before, left), arithmetic.maximum(before, left))
        moved = where(before > 0, self.decay * before + (1 - self.decay) * left, left)
        averages = arithmetic.minimum(where(warming, smallest, moved), _LARGEST)
        averages = arithmetic.put(state["averages"], given.slots, averages)
        new = {"averages": averages, "count": state["count"] + 1}
        state = learned(given, self.nonfinite, each.nonfinite, state, new)
        return primitives.apply(tensors, scale), state, report


@dataclass(frozen=True)
class SpikeClip(Policy):
    """SPAM's spike clip: hold each element to a multiple of the root of its own second moment.

    Elements with g**2 > threshold * v become sign(g) * sqrt(threshold * v), v from before this step. With what is left
    of them, g', v becomes decay * v + (1 - decay) * g'**2. Nothing is clipped in the first `warmup` steps. An element
    that was 0 in all of them is held to 0 from then on, by the method's definition: for an embedding's rare rows choose
    `warmup` accordingly, or leave the embedding out by PerGroup.

    Args:
        threshold: >= 0.
        decay: in [0, 1), of the second moment; as the optimizer's beta2.
        warmup: >= 1, in steps: a second moment that has seen little makes everything a spike.
        nonfinite: see Policy.
    Raises:
        InvalidPolicy: an argument is out of range. InvalidInput: at the call, a tensor is complex.
    Source: Huang et al. 2025, arXiv:2501.06842, section 3.1.

    >>> import numpy as np
    >>> import clipcore as cc
    >>> clipper = cc.Clipper(SpikeClip(4.0, decay=0.75, warmup=1))
    >>> [float(clipper.clip(np.array([g]))[0][0]) for g in (2.0, -8.0)]
    [2.0, -2.0]
    """

    complex_allowed: ClassVar[bool] = False
    stateful: ClassVar[bool] = True
    dense: ClassVar[bool] = True

    threshold: float = 5000.0
    _: KW_ONLY
    decay: float = 0.999
    warmup: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "threshold", 0.0)
        check_number(self, "decay", 0.0, math.nextafter(1.0, 0.0))
        check_count(self, "warmup", 1)

    def start(self, specs: Sequence[Spec | None]) -> State:
        moments = {
            f"moment.{slot}": np.zeros(spec.shape, np.float64 if spec.dtype == "float64" else np.float32)
            for slot, spec in enumerate(specs)
            if spec is not None
        }
        return {"count": np.zeros((), np.int64), **moments}

    def bound(self, given: Given, state: State) -> Bounded:
        primitives = given.primitives
        names = [f"moment.{slot}" for slot in given.slots]
        # the norm tells whether there are faults
        tensors, measure, _ = _joint_norm(given, self.nonfinite)
        report = primitives.report(measure, primitives.decide(measure, math.inf, self.nonfinite))
        if isinstance(measure.nonfinite, int) and measure.nonfinite and self.nonfinite != "zero":
            return primitives.overrule(tensors, measure.nonfinite, self.nonfinite), state, report
        moments = [state[name] for name in names]
        active = state["count"] >= self.warmup
        clipped, after, changed = primitives.spike(tensors, moments, self.threshold, self.decay, active)
        report = report._replace(clipped=report.clipped | changed)
        new = {**state, "count": state["count"] + 1, **dict(zip(names, after, strict=True))}
        state = learned(given, self.nonfinite, measure.nonfinite, state, new)
        return primitives.overrule(clipped, measure.nonfinite, self.nonfinite), state, report
