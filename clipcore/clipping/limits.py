"""Limits: policies for weights, held to a bound unit by unit, matrix by matrix or element by element.

A unit is what feeds one output of a layer, wherever its layout has it. Limits on units act on kernels, that is on
tensors that have units; biases, scales and running statistics are left as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

from clipcore.clipping.given import Given, State
from clipcore.clipping.policies import Bounded, ClipByValue, Policy, bound_parts, check_axis, check_number
from clipcore.clipping.report import ClipReport
from clipcore.errors import InvalidPolicy


@dataclass(frozen=True)
class _UnitPolicy(Policy):
    """What limits on units have in common: which tensors they act on, and where their units are."""

    dense: ClassVar[bool] = True
    asks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_axis(self)

    def bound(self, given: Given, state: State) -> Bounded:
        axes = given.unit_axes(getattr(self, "unit_axis", None), type(self).__name__)
        kernels = [index for index, own in enumerate(axes) if own]

        def bound(part: Given) -> tuple[list[Any], ClipReport]:
            return self._bound_units(part, [axes[index] for index in kernels])

        bounded, report = bound_parts(given, [(kernels, bound)], self.nonfinite)
        return bounded, state, report

    def _bound_units(self, given: Given, axes: Sequence[Any]) -> tuple[list[Any], ClipReport]:
        raise NotImplementedError


@dataclass(frozen=True)
class MaxNorm(_UnitPolicy):
    """Shrink each unit's weights so that their L2 norm is at most `max_norm`.

    Per unit: w * max_norm / ||w||_2 where ||w||_2 > max_norm, else w itself, bit for bit. The factor is the largest for
    which the unit as it is stored keeps the bound.

    Args:
        max_norm: >= 0, in the unit of the weights.
        unit_axis: see AdaptiveClip.
        nonfinite: see Policy.
    Raises:
        InvalidPolicy: max_norm is negative or NaN. InvalidInput: at the call, a layout is missing.
    Source: Srivastava et al. 2014, "Dropout", JMLR 15, section 5.1.

    >>> import numpy as np
    >>> import clipcore as cc
    >>> cc.clip(np.array([[3.0, 4.0], [0.0, 1.0]]), MaxNorm(2.5, unit_axis=0))[0]
    array([[1.5, 2. ],
           [0. , 1. ]])
    """

    max_norm: float
    _: KW_ONLY
    unit_axis: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "max_norm", 0.0)

    def _bound_units(self, given: Given, axes: Sequence[Any]) -> tuple[list[Any], ClipReport]:
        primitives = given.primitives
        tensors, measure = primitives.measure(given.tensors, 2.0, axes, zero_nonfinite=self.nonfinite == "zero")
        bounded, scale = primitives.within(tensors, measure, self.max_norm, self.nonfinite)
        return bounded, primitives.report(measure, scale)


@dataclass(frozen=True)
class MinMaxNorm(_UnitPolicy):
    """Scale each unit's weights so that their L2 norm lies in [min_norm, max_norm]; a unit in range is left as it is.

    Per unit: w * max_norm / ||w||_2 where ||w||_2 > max_norm, w * min_norm / ||w||_2 where ||w||_2 < min_norm. A unit
    of zeros stays zeros.

    Args:
        min_norm, max_norm: 0 <= min_norm <= max_norm, in the unit of the weights.
        unit_axis: see AdaptiveClip.
        nonfinite: see Policy.
    Raises:
        InvalidPolicy: the range is empty. InvalidInput: at the call, a layout is missing.
    Source: keras.constraints.MinMaxNorm at rate 1, without its epsilon.

    >>> import numpy as np
    >>> import clipcore as cc
    >>> cc.clip(np.array([[3.0, 4.0], [0.0, 0.5], [0.0, 0.0]]), MinMaxNorm(1.0, 2.5, unit_axis=0))[0]
    array([[1.5, 2. ],
           [0. , 1. ],
           [0. , 0. ]])
    """

    min_norm: float
    max_norm: float
    _: KW_ONLY
    unit_axis: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "min_norm", 0.0)
        check_number(self, "max_norm", self.min_norm)

    def _bound_units(self, given: Given, axes: Sequence[Any]) -> tuple[list[Any], ClipReport]:
        primitives = given.primitives
        tensors, measure = primitives.measure(given.tensors, 2.0, axes, zero_nonfinite=self.nonfinite == "zero")
        scale = primitives.decide(measure, self.max_norm, self.nonfinite, at_least=self.min_norm)
        return primitives.apply(tensors, scale), primitives.report(measure, scale)


@dataclass(frozen=True)
class UnitNorm(MinMaxNorm):
    """Scale each unit's weights to an L2 norm of one: MinMaxNorm(1, 1).

    Args:
        unit_axis: see AdaptiveClip.
        nonfinite: see Policy.

    >>> import numpy as np
    >>> import clipcore as cc
    >>> cc.clip(np.array([[3.0, 4.0], [0.0, 0.5]]), UnitNorm(unit_axis=0))[0]
    array([[0.6, 0.8],
           [0. , 1. ]])
    """

    min_norm: float = 1.0
    max_norm: float = 1.0


@dataclass(frozen=True)
class SpectralLimit(_UnitPolicy):
    """Shrink each layer's kernel so that its largest singular value is at most `max_norm`.

    W * min(1, max_norm / sigma_1), the kernel as a matrix of units by what feeds them.

    Args:
        max_norm: >= 0, in the unit of the weights.
        method: "svd" is exact, and the kernel as it is stored keeps the bound; "power" is quicker on large kernels: 30
            steps of the power method, whose sigma_1 is a little small.
        unit_axis: see AdaptiveClip.
        nonfinite: see Policy.
    Raises:
        InvalidPolicy: an argument is out of range. InvalidInput: at the call, a layout is missing.
    Source: Yoshida and Miyato 2017, arXiv:1705.10941, in the form of a bound.

    >>> import numpy as np
    >>> import clipcore as cc
    >>> cc.clip(np.diag([4.0, 1.0]), SpectralLimit(2.0, unit_axis=0))[0]
    array([[2. , 0. ],
           [0. , 0.5]])
    """

    max_norm: float
    _: KW_ONLY
    method: Literal["svd", "power"] = "svd"
    unit_axis: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "max_norm", 0.0)
        if self.method not in ("svd", "power"):
            raise InvalidPolicy(f"SpectralLimit: method is {self.method!r}; expected 'svd' or 'power'")

    def _bound_units(self, given: Given, axes: Sequence[Any]) -> tuple[list[Any], ClipReport]:
        primitives = given.primitives
        tensors, measure = primitives.measure_spectra(
            given.tensors, axes, exact=self.method == "svd", zero_nonfinite=self.nonfinite == "zero"
        )
        bounded, scale = primitives.within(tensors, measure, self.max_norm, self.nonfinite)
        return bounded, primitives.report(measure, scale)


@dataclass(frozen=True)
class Box(ClipByValue):
    """Hold every weight in [min_value, max_value], as WGAN's critic; ClipByValue under the name that weights have.

    Args:
        min_value, max_value, nonfinite: see ClipByValue.
    Source: Arjovsky et al. 2017, arXiv:1701.07875, algorithm 1.

    >>> import numpy as np
    >>> import clipcore as cc
    >>> cc.clip(np.array([-3.0, 0.2]), Box(0.5))[0]
    array([-0.5,  0.2])
    """
