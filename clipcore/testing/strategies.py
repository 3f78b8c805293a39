"""Hypothesis strategies: what gradients and policies can be, the odd ones included."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clipcore.backend import NonFiniteMode
from clipcore.clipping import reference
from clipcore.clipping.adaptive import AdaGC, AutoClip, SpikeClip, ZClip
from clipcore.clipping.examples import PerExampleClip, QuantileClip
from clipcore.clipping.limits import MaxNorm, MinMaxNorm, SpectralLimit, UnitNorm
from clipcore.clipping.policies import (
    AdaptiveClip,
    ClipByAverageNorm,
    ClipByBlockRMS,
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    Policy,
)
from clipcore.structure import leaves

REAL_DTYPES = ("float16", "bfloat16", "float32", "float64")
COMPLEX_DTYPES = ("complex64", "complex128")
DTYPES = REAL_DTYPES + COMPLEX_DTYPES

Array = np.ndarray[Any, np.dtype[Any]]

_finfo: Any = ml_dtypes.finfo

_PARTS = {"complex64": "float32", "complex128": "float64"}


@dataclass(frozen=True)
class _Format:
    """A floating format by the bits of some of its numbers, without the sign."""

    width: int
    mantissa: int
    one: int
    infinity: int

    @classmethod
    def of(cls, dtype: str) -> _Format:
        info = _finfo(np.dtype(dtype))
        exponents = (1 << (info.bits - 1 - info.nmant)) - 1
        return cls(info.bits, info.nmant, (exponents >> 1) << info.nmant, exponents << info.nmant)


def dtypes(*, complex_allowed: bool = True) -> st.SearchStrategy[str]:
    """NumPy's names of the dtypes that can be clipped."""
    return st.sampled_from(DTYPES if complex_allowed else REAL_DTYPES)


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of 0 to 3 axes, lengths of 0 included, and longer vectors."""
    return hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3) | st.tuples(st.integers(4, 40))


@st.composite
def arrays(
    draw: st.DrawFn,
    dtype: st.SearchStrategy[str] | None = None,
    *,
    shape: st.SearchStrategy[tuple[int, ...]] | None = None,
    nonfinite: bool = False,
    strided: bool = True,
) -> Array:
    """Floating and complex arrays: any magnitudes, subnormal ones and those near overflow included.

    Args:
        draw: hypothesis's own.
        dtype: their dtypes; any by default.
        shape: their shapes; those of `shapes` by default.
        nonfinite: whether some elements may be inf or NaN.
        strided: whether the array may be a view that is not contiguous.
    """
    name = draw(dtypes() if dtype is None else dtype)
    size = draw(shapes() if shape is None else shape)
    part = _PARTS.get(name, name)
    pattern_shape = (*size, 2) if name in _PARTS else size
    patterns = draw(_patterns(_Format.of(part), pattern_shape, nonfinite))
    array: Array = patterns.view(part)
    if name in _PARTS:
        array = array.view(name)[..., 0]
    array = np.ascontiguousarray(array).reshape(size)
    return _as_view(array, draw(st.sampled_from(["contiguous", "every other", "transposed"]))) if strided else array


@st.composite
def _patterns(draw: st.DrawFn, form: _Format, shape: tuple[int, ...], nonfinite: bool) -> Array:
    """Bits of numbers: all over the range, all of one magnitude, or those that people write."""
    one, ulp, top = form.one, 1 << form.mantissa, form.infinity - 1
    exponent = draw(st.integers(0, (form.infinity >> form.mantissa) - 1)) << form.mantissa
    special = st.sampled_from([0, 1, ulp - 1, ulp, one - 1, one, one + 1, one + ulp, top - 1, top])
    choices = [
        st.integers(0, top) | special,
        st.integers(exponent, exponent + ulp - 1),
        st.sampled_from([0, one, one + ulp, one + ulp + ulp // 2, one + 2 * ulp]),  # 0, 1, 2, 3, 4
    ]
    magnitude = choices[draw(st.integers(0, len(choices) - 1))]
    if nonfinite:
        magnitude = magnitude | st.sampled_from([form.infinity, form.infinity + ulp // 2])
    sign = 1 << (form.width - 1)
    elements = st.builds(int.__or__, magnitude, st.sampled_from([0, sign]))
    return draw(hnp.arrays(np.dtype(f"u{form.width // 8}"), shape, elements=elements, fill=st.nothing()))


def _as_view(array: Array, how: str) -> Array:
    if how == "contiguous" or array.ndim == 0:
        return array
    if how == "transposed":
        return np.ascontiguousarray(array.T).T
    return np.repeat(array, 2, axis=-1)[..., ::2]


def lists_of(tensors: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    """Lists of one to four tensors."""
    return st.lists(tensors, min_size=1, max_size=4)


def structures(tensors: st.SearchStrategy[Any], *, max_leaves: int = 4) -> st.SearchStrategy[Any]:
    """Lists, tuples and dicts of tensors and `None`, nested."""

    def nest(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        lists = st.lists(children, max_size=3)
        return lists | lists.map(tuple) | st.dictionaries(st.sampled_from(["a", "w", "layer.1", "é"]), children)

    return st.recursive(tensors | st.none(), nest, max_leaves=max_leaves)


def norm_orders(dtypes: Sequence[str] = ()) -> st.SearchStrategy[float]:
    """The p of p-norms: 1, 2, inf, and those between; for `dtypes` of float64 only the ones that are exact."""
    exact = st.sampled_from([2.0, 1.0, math.inf])
    if {"float64", "complex128"} & set(dtypes):
        return exact
    return exact | st.floats(1.0, 12.0) | st.sampled_from([1.0 + 2**-52, 1e5, 1e300])


@st.composite
def limits(draw: st.DrawFn, tensors: Sequence[Array], p: float) -> float:
    """A max_norm for these tensors: far below their norm, just at it, above it, 0, inf, or anything."""
    _, norm = reference.clip_by_global_norm(tensors, math.inf, p, nonfinite="zero")
    if not 0 < norm < math.inf or draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from([0.0, math.inf]) | st.floats(min_value=0.0, allow_nan=False))
    near = st.sampled_from([norm, math.nextafter(norm, 0.0), math.nextafter(norm, math.inf)])
    return draw(near | st.floats(0.0, 1.0, exclude_max=True).map(lambda part: norm * part) | st.just(norm / 2))


@dataclass(frozen=True)
class Case:
    """Gradients, nested and as a flat list, a policy for them, and the weights beside them where it needs those."""

    grads: Any
    tensors: list[Array]
    policy: Any
    params: list[Array] | None = None


@st.composite
def norm_cases(
    draw: st.DrawFn,
    *,
    policies: Sequence[type[ClipByNorm] | type[ClipByGlobalNorm]] = (ClipByNorm, ClipByGlobalNorm),
    grads: st.SearchStrategy[Any] | None = None,
    exact: bool = False,
    nonfinite: NonFiniteMode = "propagate",
) -> Case:
    """Gradients and a policy that bounds their norm; with `exact`, one whose every bit the contract fixes."""
    tree = draw(lists_of(arrays()) if grads is None else grads)
    tensors = [leaf for _, leaf in leaves(tree)]
    p = draw(norm_orders([t.dtype.name for t in tensors] if exact else []))
    max_norm = draw(limits(tensors, p))
    return Case(tree, tensors, draw(st.sampled_from(policies))(max_norm, p=p, nonfinite=nonfinite))


@st.composite
def value_policies(draw: st.DrawFn, nonfinite: NonFiniteMode = "propagate") -> ClipByValue:
    """ClipByValue with any range: empty to unbounded, beyond what a dtype holds, signed zeros, subnormal."""
    usual = st.sampled_from([0.0, -0.0, 0.5, 1.0, -1.0, 1e-45, 1e5, -1e5, 3.5e38, 1e300, math.inf, -math.inf])
    bounds = sorted(draw(st.tuples(*[usual | st.floats(allow_nan=False)] * 2)))
    return ClipByValue(*bounds, nonfinite=nonfinite)


@st.composite
def value_cases(
    draw: st.DrawFn, grads: st.SearchStrategy[Any] | None = None, nonfinite: NonFiniteMode = "propagate"
) -> Case:
    """Real gradients, infinities included, and a ClipByValue policy."""

    def without_nan(array: Array) -> Array:
        array[np.isnan(array)] = 1
        return array

    real = arrays(dtypes(complex_allowed=False), nonfinite=True).map(without_nan)
    tree = draw(lists_of(real) if grads is None else grads)
    return Case(tree, [leaf for _, leaf in leaves(tree)], draw(value_policies(nonfinite=nonfinite)))


@st.composite
def block_cases(draw: st.DrawFn, nonfinite: NonFiniteMode = "propagate") -> Case:
    """Gradients and a policy that bounds each tensor by its number of elements."""
    tensors = draw(lists_of(arrays()))
    kind = draw(st.sampled_from([ClipByAverageNorm, ClipByBlockRMS]))
    sizes = [max(t.size, 1) for t in tensors]
    norms = reference.clip_by_norm(tensors, math.inf)[1]
    parts = [n / (size if kind is ClipByAverageNorm else math.sqrt(size)) for n, size in zip(norms, sizes, strict=True)]
    return Case(tensors, tensors, kind(draw(_near(parts)), nonfinite=nonfinite))


@st.composite
def _near(draw: st.DrawFn, norms: Sequence[float]) -> float:
    """A limit just at one of these norms, below it, above it, 0, inf, or anything."""
    norm = draw(st.sampled_from([0.0, *norms]))
    if not 0 < norm < math.inf:
        return draw(st.sampled_from([0.0, 1.0, math.inf]) | st.floats(min_value=0.0, allow_nan=False))
    near = st.sampled_from([norm, math.nextafter(norm, 0.0), math.nextafter(norm, math.inf)])
    return draw(near | st.floats(0.0, 1.0).map(lambda part: norm * part) | st.just(norm / 2))


def unit_axes(arrays: Sequence[Array], declared: int | None) -> list[tuple[int, ...]]:
    """Of each array, the axes that run over its units where no layout tells: none where it has one axis alone."""
    return [(int(declared or 0) % array.ndim,) if array.ndim > 1 else () for array in arrays]


def _matrices(dtype: st.SearchStrategy[str] | None = None) -> st.SearchStrategy[list[Array]]:
    """Lists of one to three arrays, of two or three axes or of any shape."""
    return st.lists(
        arrays(dtype, shape=hnp.array_shapes(min_dims=2, max_dims=3, max_side=3) | shapes()), min_size=1, max_size=3
    )


@st.composite
def agc_cases(draw: st.DrawFn, nonfinite: NonFiniteMode = "propagate") -> Case:
    """Gradients, the weights beside them, and an AdaptiveClip policy."""
    tensors = draw(_matrices())
    params = [draw(arrays(st.just(t.dtype.name), shape=st.just(t.shape))) for t in tensors]
    policy = AdaptiveClip(
        draw(st.sampled_from([0.01, 0.25, 1.0, 0.0, math.inf])),
        eps=draw(st.sampled_from([1e-3, 1.0, 1e-30])),
        unit_axis=draw(st.sampled_from([0, -1])),
        nonfinite=nonfinite,
    )
    return Case(tensors, tensors, policy, params)


@st.composite
def max_norm_cases(
    draw: st.DrawFn, nonfinite: NonFiniteMode = "propagate", dtype: st.SearchStrategy[str] | None = None
) -> Case:
    """Weights and a MaxNorm limit."""
    tensors, axis = draw(_matrices(dtype)), draw(st.sampled_from([0, -1]))
    norms = reference.max_norm(tensors, unit_axes(tensors, axis), math.inf)[1]
    return Case(tensors, tensors, MaxNorm(draw(_near(norms)), unit_axis=axis, nonfinite=nonfinite))


@st.composite
def min_max_cases(draw: st.DrawFn, nonfinite: NonFiniteMode = "propagate") -> Case:
    """Weights and a limit that also scales up: MinMaxNorm or UnitNorm."""
    tensors, axis = draw(_matrices()), draw(st.sampled_from([0, -1]))
    if draw(st.booleans()):
        return Case(tensors, tensors, UnitNorm(unit_axis=axis, nonfinite=nonfinite))
    norms = reference.max_norm(tensors, unit_axes(tensors, axis), math.inf)[1]
    most = draw(_near(norms))
    # no dtype overflows where a unit is scaled up
    least = min(most, draw(st.sampled_from([0.0, 1e-3, 1.0, 50.0, *(2 * norm for norm in norms if norm < 50)])))
    return Case(tensors, tensors, MinMaxNorm(least, most, unit_axis=axis, nonfinite=nonfinite))


@st.composite
def spectral_cases(draw: st.DrawFn, dtype: st.SearchStrategy[str] | None = None) -> Case:
    """Weights and a SpectralLimit."""
    tensors, axis = draw(_matrices(dtype)), draw(st.sampled_from([0, -1]))
    values = reference.spectral_limit(tensors, unit_axes(tensors, axis), math.inf)[1]
    part = draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 2.0, math.inf]) | st.floats(1e-6, 1.0))
    return Case(tensors, tensors, SpectralLimit(part * max([1e-300, *values]) if part else 0.0, unit_axis=axis))


@st.composite
def example_cases(
    draw: st.DrawFn,
    nonfinite: NonFiniteMode = "propagate",
    *,
    dtype: st.SearchStrategy[str] | None = None,
    examples: st.SearchStrategy[int] | None = None,
) -> Case:
    """Gradients per example, and a PerExampleClip policy."""
    count = draw(st.integers(0, 3) if examples is None else examples)
    rest = hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3) | st.tuples(st.integers(4, 12))
    tensors = draw(st.lists(arrays(dtype, shape=rest.map(lambda shape: (count, *shape))), min_size=1, max_size=3))
    per_layer = draw(st.booleans())
    norms = reference.per_example_clip(tensors, math.inf, per_layer)[1]
    limit = draw(_near(norms))
    limit = limit * math.sqrt(len(tensors)) if per_layer and math.isfinite(limit) else limit
    return Case(tensors, tensors, PerExampleClip(limit, per_layer=per_layer, nonfinite=nonfinite))


@dataclass(frozen=True)
class Run:
    """Gradients step by step, all of the same shapes, and an adaptive policy for them.

    Attributes:
        steps: spikes, zeros and, where asked for, steps with a fault among them.
        faulty: which steps have a fault.
    """

    policy: Any
    steps: list[list[Array]]
    faulty: list[bool]


@st.composite
def runs(
    draw: st.DrawFn,
    policies: Sequence[type[Policy]] = (),
    *,
    nonfinite: NonFiniteMode = "propagate",
    faults: bool = True,
    spikes: bool = True,
) -> Run:
    """Steps of gradients and an adaptive policy whose warm-up ends among them."""
    kind = draw(st.sampled_from(list(policies or ADAPTIVE)))
    names = st.sampled_from(REAL_DTYPES if kind is SpikeClip else DTYPES)
    shape = st.sampled_from([(), (3,), (2, 2), (0,), (5,) if kind is QuantileClip else (17,)])
    forms = draw(st.lists(st.tuples(names, shape), min_size=1, max_size=3))
    usual, odd = [1.0, 1.5, 0.5], [0.0, *([1000.0] if spikes else [])]
    sizes = draw(st.lists(st.sampled_from([*usual, *usual, *odd]), min_size=3, max_size=10))
    magnitude = draw(st.sampled_from([1e-2, 1.0, 8.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch = (2,) if kind is QuantileClip else ()
    steps = [[_normal(rng, name, (*batch, *shape), size * magnitude) for name, shape in forms] for size in sizes]
    faulty = [faults and draw(st.integers(0, 3)) == 0 and any(t.size for t in step) for step in steps]
    for step, has_fault in zip(steps, faulty, strict=True):
        if has_fault:
            full = draw(st.sampled_from([t for t in step if t.size]))
            full[draw(st.sampled_from(list(np.ndindex(full.shape))))] = draw(st.sampled_from([math.nan, math.inf]))
    return Run(draw(ADAPTIVE[kind](nonfinite)), steps, faulty)


def _normal(rng: np.random.Generator, dtype: str, shape: tuple[int, ...], size: float) -> Array:
    values = np.asarray(rng.standard_normal(shape) * size)
    if dtype in COMPLEX_DTYPES:
        values = values + 1j * rng.standard_normal(shape) * size
    return np.asarray(values).astype(dtype)


_warmups = st.integers(1, 4)
_decays = st.sampled_from([0.0, 0.5, 0.9, 0.97])

ADAPTIVE: Mapping[type[Policy], Callable[[NonFiniteMode], st.SearchStrategy[Policy]]] = {
    AutoClip: lambda mode: st.builds(
        AutoClip,
        st.sampled_from([0.0, 10.0, 37.5, 50.0, 100.0]),
        window=st.integers(1, 5) | st.just(1000),
        nonfinite=st.just(mode),
    ),
    ZClip: lambda mode: st.builds(
        ZClip, st.sampled_from([0.5, 1.0, 2.5]), decay=_decays, warmup=_warmups, nonfinite=st.just(mode)
    ),
    AdaGC: lambda mode: st.builds(
        AdaGC,
        st.sampled_from([0.5, 5.0, math.inf]),
        ratio=st.sampled_from([0.5, 1.05, 2.0]),
        decay=_decays,
        warmup=_warmups,
        nonfinite=st.just(mode),
    ),
    SpikeClip: lambda mode: st.builds(
        SpikeClip, st.sampled_from([0.5, 4.0, 50.0]), decay=_decays, warmup=_warmups, nonfinite=st.just(mode)
    ),
    QuantileClip: lambda mode: st.builds(
        QuantileClip,
        st.sampled_from([0.1, 1.0, 10.0]),
        quantile=st.sampled_from([0.0, 0.5, 0.9]),
        learning_rate=st.sampled_from([0.0, 0.2, 1.0]),
        nonfinite=st.just(mode),
    ),
}
