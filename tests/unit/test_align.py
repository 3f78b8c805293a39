"""Values that flow in two models are compared up to the arrangement of their axes."""

import numpy as np
import pytest
from einops import EinopsError
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from clipcore.errors import MappingError
from clipcore.mapping.align import (
    SAME,
    agree,
    carried,
    flattened,
    joined,
    likely,
    other_order_fits,
    relative_error,
    resembling,
)
from clipcore.mapping.layouts import apply_pattern

RNG = np.random.default_rng(0)


def test_relative_error_is_the_largest_difference_over_the_largest_magnitude():
    assert relative_error(np.array([4.0, -8.0]), np.array([4.0, -7.0])) == 1 / 8


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (np.array([1.0, np.nan]), np.array([1.0, 2.0])),
        (np.array([1.0, 2.0]), np.array([1.0, np.inf])),
        (np.array([1, 2]), np.array([1, 3])),
        (np.zeros(2), np.ones(2)),
        (np.ones(2), np.ones(3)),
    ],
)
def test_what_cannot_be_close_is_infinitely_far(source, target):
    assert relative_error(source, target) == np.inf


def test_the_same_faults_in_the_same_places_agree():
    assert relative_error(np.array([1.0, np.nan, np.inf]), np.array([1.0, np.nan, np.inf])) == 0


def test_a_moved_channel_axis_is_found_by_value():
    source = RNG.standard_normal((2, 3, 4, 5))
    found = agree(source, source.transpose(0, 2, 3, 1))
    assert found.error == 0
    assert found.arrangement.target == "batch ... channel"


def orders(features, channels):
    return lambda: flattened(features, channels, first=True)


def test_the_order_of_a_flattened_feature_map_is_found_by_value_and_not_taken_for_a_plain_one():
    feature_map = RNG.standard_normal((2, 3, 4, 5))
    source = feature_map.reshape(2, -1)
    target = feature_map.transpose(0, 2, 3, 1).reshape(2, -1)
    found = agree(source, target, orders(60, [3]))
    assert found.error == 0
    assert dict(found.arrangement.sizes) == {"channel": 3}
    assert agree(source, source, orders(60, [3])).arrangement == SAME


def test_a_number_of_channels_that_no_one_expected_is_found_as_well():
    feature_map = RNG.standard_normal((2, 6, 10))
    source, target = feature_map.reshape(2, -1), feature_map.transpose(0, 2, 1).reshape(2, -1)
    for ours, theirs in ((source, target), (target, source)):
        found = agree(ours, theirs, orders(60, [4]))
        assert found.error == 0
        np.testing.assert_array_equal(found.arrangement.apply(ours), theirs)


@pytest.mark.parametrize("telling", [[], [0], [11], [0, 11]])
def test_features_whose_telling_ones_no_order_moves_leave_their_order_open(telling):
    source = np.zeros((2, 12))
    source[:, telling] = RNG.standard_normal((2, len(telling)))
    found = agree(source, source, orders(12, [3]))
    assert other_order_fits(source, source, found, orders(12, [3])())
    source[0, 1] = 1
    assert not other_order_fits(source, source, found, orders(12, [3])())


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 5), st.integers(2, 5), st.data())
def test_an_order_is_open_if_and_only_if_the_features_come_out_the_same_in_another(channels, places, data):
    values = st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=channels * places, max_size=channels * places)
    source = np.array([data.draw(values)])
    found = agree(source, source, orders(channels * places, [channels]))
    exchanged = source.reshape(1, channels, places).transpose(0, 2, 1).reshape(1, -1)
    # in an order that moves nothing at all there is no other one
    expected = channels > 1 and places > 1 and np.array_equal(source, exchanged)
    assert other_order_fits(source, source, found, likely(channels * places, [channels], first=True)) == expected


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([2, 3, 4, 6, 8, 12]), st.sampled_from([np.tanh, np.exp, lambda x: np.maximum(x, 0)]))
def test_values_that_another_function_has_changed_are_alike_in_their_own_order(channels, function):
    feature_map = np.random.default_rng(channels).standard_normal((16, channels, 24 // channels))
    source = feature_map.reshape(16, 24)
    target = function(feature_map).transpose(0, 2, 1).reshape(16, 24)
    candidates = [SAME, *likely(24, [2, 3, 4, 6, 8, 12], first=True)]
    assert dict(resembling(source, target, candidates).sizes) == {"channel": channels}
    assert resembling(source, function(source), candidates) == SAME
    assert resembling(source, np.random.default_rng(1).standard_normal((16, 24)), candidates) is None


segments = st.lists(st.tuples(st.sampled_from([1, 3, 4, 6]), st.integers(1, 5)), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(segments, st.booleans())
def test_flattened_feature_maps_one_behind_the_other_are_each_found_in_their_own_order(parts, first):
    features = sum(c * places for c, places in parts)
    assume(features >= 4)  # fewer have no other order
    source = np.random.default_rng(0).standard_normal((2, features))
    ends = np.cumsum([c * places for c, places in parts])[:-1]
    target = np.concatenate(
        [
            part.reshape((2, c, places) if first else (2, places, c)).swapaxes(1, 2).reshape(2, -1)
            for part, (c, places) in zip(np.split(source, ends, axis=1), parts, strict=True)
        ],
        axis=1,
    )
    (found,) = joined(source, target, [3, 4, 6], first, 1e-6)
    np.testing.assert_array_equal(found.apply(source), target)
    back = carried(target, f"{found.target} -> {found.source}", dict(found.sizes))
    np.testing.assert_array_equal(back, source)


def test_values_that_do_not_tell_where_a_feature_map_begins_give_two_orders():
    source = np.zeros((1, 20))
    source[0, 0] = 1
    assert len(joined(source, source, [4], True, 1e-6)) == 2
    assert joined(source, source[:, ::-1], [4], True, 1e-6) == []


def test_segments_that_do_not_make_up_the_axis_are_refused():
    with pytest.raises(EinopsError, match="do not make up"):
        carried(np.arange(7), "(a b + c) -> (b a + c)", {"a": 2, "b": 2, "c": 2})
    with pytest.raises(MappingError, match="does not fit"):
        apply_pattern(np.arange(7), "(a b + c) -> (b a + c)", {"a": 2, "b": 2, "c": 2}, "kernel")
    with pytest.raises(MappingError, match="does not fit"):
        apply_pattern(np.arange(6), "(a b + c) -> (b a + c)", {"a": 2, "b": 2}, "kernel")
