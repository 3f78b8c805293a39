"""Whole lists of arrays: the same bits with the fast kernels and without, and nothing is written that need not be."""

import math

import ml_dtypes
import numpy as np
import pytest

from clipcore.clipping import fast, kernels, lists
from clipcore.clipping.host import HostPrimitives

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
SPIKE = {"threshold": 4.0, "decay": 0.75}


@pytest.fixture(params=["fast", "plain"])
def way(request, monkeypatch):
    """The fast kernels, or NumPy."""
    if request.param == "plain":
        monkeypatch.setattr(fast, "available", lambda: False)
    return request.param


def gradients(dtype, spikes=()):
    """Three gradients with moments that hold all their elements, spikes aside, within the threshold."""
    rng = np.random.default_rng(0)
    arrays = [rng.uniform(-1, 1, shape).astype(dtype) for shape in ((300, 70), (), (20_000,))]
    for place in spikes:
        arrays[place].flat[0] = 9
    wide = np.float64 if dtype is np.float64 else np.float32
    return arrays, [np.full(array.shape, 0.5, wide) for array in arrays]


def unaligned(array):
    copy = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    copy[...] = array
    assert not copy.flags.aligned
    return copy


def awkward():
    """Arrays and moments that the fast kernels cannot take, or not together, all with spikes."""
    rng = np.random.default_rng(1)
    plain = (rng.standard_normal((60, 50)) * 3).astype(np.float32)
    one = np.ones(plain.shape, np.float32)
    return {
        "in Fortran's order": (np.asfortranarray(plain), one),
        "moments in Fortran's order": (plain, np.asfortranarray(one)),
        "every other column": (plain[:, ::2], one[:, ::2]),
        "other bytes first": (plain.astype(">f4"), one),
        "moments of float64": (plain, one.astype(np.float64)),
        "moments of float16": (plain, one.astype(np.float16)),
        "float64 with moments of float32": (plain.astype(np.float64), one),
        "unaligned": (unaligned(plain), one),
        "unaligned moments": (plain, unaligned(one)),
    }


@pytest.mark.parametrize("kind", ["every other column", "other bytes first", "unaligned"])
def test_norms_and_products_of_what_the_fast_kernels_cannot_take_go_the_plain_way(monkeypatch, kind):
    array, _ = awkward()[kind]
    for verb in ("unit_sums_of_squares", "scale_units"):
        monkeypatch.setattr(fast, verb, lambda *arguments: pytest.fail("went the fast way"))
    norms, places = lists.norms([array], 2.0, [()])
    out = np.empty_like(array)
    lists.scale([array], [out], kernels.Wide.of(np.array([0.5])), places, [()])
    assert np.array_equal(out, array * np.float32(0.5))
    assert float(norms[0]) == pytest.approx(np.linalg.norm(array.astype(np.float64)))


def bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def assert_same(actual, expected):
    assert actual.dtype == expected.dtype
    assert np.array_equal(bits(actual), bits(expected))


def by_hand(array, moment, threshold, decay):
    g, v = array.astype(np.float64), moment.astype(np.float64)
    over = g * g > threshold * v
    stored = kernels.round_once(np.where(over, np.sign(g) * np.sqrt(threshold * v), g), array.dtype)
    return stored, (decay * v + (1 - decay) * stored.astype(np.float64) ** 2).astype(moment.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "fresh"])
def test_spikes_are_clipped_and_the_moments_move_on_with_what_is_stored(way, dtype, in_place):
    arrays, moments = gradients(dtype, spikes=[0, 1])
    expected = [by_hand(array, moment, **SPIKE) for array, moment in zip(arrays, moments, strict=True)]
    before = [moment.copy() for moment in moments]
    clipped, after, changed = HostPrimitives(in_place).spike(arrays, moments, acts=True, **SPIKE)
    assert changed is True
    for result, new, (stored, moment) in zip(clipped, after, expected, strict=True):
        assert_same(result, stored)
        assert_same(new, moment)
    assert all(map(np.array_equal, moments, before))
    same = [result is array for result, array in zip(clipped, arrays, strict=True)]
    assert same == ([True] * 3 if in_place else [False, False, True])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "fresh"])
@pytest.mark.parametrize(("spikes", "acts"), [([], True), ([2], False)], ids=["none", "none that counts"])
def test_where_nothing_is_clipped_the_same_arrays_come_back(way, dtype, in_place, spikes, acts):
    arrays, moments = gradients(dtype, spikes)
    before = [array.copy() for array in arrays]
    expected = [by_hand(array, moment, math.inf, 0.75)[1] for array, moment in zip(arrays, moments, strict=True)]
    clipped, after, changed = HostPrimitives(in_place).spike(arrays, moments, acts=acts, **SPIKE)
    assert changed is False
    assert all(result is array for result, array in zip(clipped, arrays, strict=True))
    for array, old, new, moment in zip(arrays, before, after, expected, strict=True):
        assert_same(array, old)
        assert_same(new, moment)


@pytest.mark.parametrize("kind", awkward())
def test_what_the_fast_kernels_cannot_take_goes_the_plain_way(way, kind):
    array, moment = awkward()[kind]
    expected = by_hand(array, moment, **SPIKE)
    clipped, after, changed = HostPrimitives().spike([array], [moment], acts=True, **SPIKE)
    assert changed
    assert_same(clipped[0], expected[0])
    assert_same(after[0], expected[1])


def test_the_fast_kernels_take_ordinary_spikes(monkeypatch):
    monkeypatch.setattr(kernels, "despike", lambda *arguments: pytest.fail("went the plain way"))
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
        arrays, moments = gradients(dtype, spikes=[2])
        assert HostPrimitives().spike(arrays, moments, acts=True, **SPIKE)[2]


def test_spikes_are_counted_array_by_array(way):
    arrays, moments = gradients(np.float32, spikes=[0, 2])
    assert lists.despike(arrays, moments, arrays, moments, 4.0, 0.75, True).tolist() == [1, 0, 1]
