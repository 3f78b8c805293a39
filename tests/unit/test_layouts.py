"""Layouts compose: a tensor goes from one framework's order of axes to another's by way of the canonical one."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clipcore as cc
from clipcore.backend import Layer, Tensor
from clipcore.mapping.layouts import apply_pattern, canonical_layout, canonical_shape, stored, transformation

TORCH = {"linear": "out in", "conv": "(group out) in ..."}
KERAS = {"linear": "in out", "conv": "... in (group out)"}
DEPTHWISE = "... (group in) out"


def layer(kind, layout, shape, groups=1, name="layer"):
    tensor = Tensor(f"{name}.kernel", "kernel", layout, shape, "float32")
    return Layer(name, kind, {"kernel": tensor}, {"groups": groups})


def carried(array, source, target):
    pattern, sizes = transformation(source, target, "kernel")
    return apply_pattern(array, pattern, sizes, "kernel")


def test_a_linear_kernel_is_transposed():
    array = np.arange(6.0).reshape(2, 3)
    source, target = layer("linear", TORCH["linear"], (2, 3)), layer("linear", KERAS["linear"], (3, 2))
    np.testing.assert_array_equal(carried(array, source, target), array.T)


def test_the_axes_of_a_grouped_kernel_by_the_rule_that_was_measured():
    array = np.arange(4 * 3 * 5 * 6.0).reshape(4, 3, 5, 6)
    source = layer("conv", TORCH["conv"], array.shape, groups=2)
    target = layer("conv", KERAS["conv"], (5, 6, 3, 4), groups=2)
    np.testing.assert_array_equal(carried(array, source, target), array.transpose(2, 3, 1, 0))


def test_a_depthwise_kernel_by_the_rule_that_was_measured():
    channels, multiplier = 3, 2
    array = np.arange(channels * multiplier * 4 * 5.0).reshape(channels * multiplier, 1, 4, 5)
    source = layer("conv", TORCH["conv"], array.shape, groups=channels)
    target = layer("conv", DEPTHWISE, (4, 5, channels, multiplier), groups=channels)
    wanted = array.reshape(channels, multiplier, 4, 5).transpose(2, 3, 0, 1)
    np.testing.assert_array_equal(carried(array, source, target), wanted)


@given(
    groups=st.integers(1, 3),
    outs=st.integers(1, 3),
    ins=st.integers(1, 3),
    window=st.lists(st.integers(1, 3), min_size=1, max_size=3),
)
def test_there_and_back_is_the_same_tensor(groups, outs, ins, window):
    array = np.arange(float(groups * outs * ins * np.prod(window))).reshape(groups * outs, ins, *window)
    source = layer("conv", TORCH["conv"], array.shape, groups)
    target = layer("conv", KERAS["conv"], (*window, ins, groups * outs), groups)
    there = carried(array, source, target)
    assert there.shape == target.tensors["kernel"].shape
    np.testing.assert_array_equal(carried(there, target, source), array)
    assert canonical_shape(source, "kernel") == canonical_shape(target, "kernel") == (groups, outs, ins, *window)


def test_a_canonical_tensor_is_stored_as_the_framework_keeps_it():
    kernel = np.arange(12.0).reshape(2, 3, 2, 1)  # group out in window
    one = layer("conv", KERAS["conv"], (1, 2, 6), groups=2)
    np.testing.assert_array_equal(
        stored(one.tensors["kernel"], one, kernel), kernel.reshape(6, 2, 1).transpose(2, 1, 0)
    )


def test_rearranging_copies_nothing_where_a_view_will_do():
    array = np.arange(6.0).reshape(2, 3)
    assert np.shares_memory(apply_pattern(array, "out in -> in out", {}, "kernel"), array)


def test_the_canonical_shape_of_a_huge_tensor_allocates_nothing():
    huge = layer("linear", KERAS["linear"], (10**9, 10**9))
    assert canonical_shape(huge, "kernel") == (10**9, 10**9)


def test_a_shape_that_does_not_fit_names_the_place_the_shape_and_the_layout():
    wrong = layer("conv", TORCH["conv"], (7, 3, 2), groups=2, name="conv1")
    with pytest.raises(cc.MappingError, match=r"conv1: kernel: .*\(7, 3, 2\).*\(group out\) in \.\.\.") as caught:
        canonical_shape(wrong, "kernel")
    assert "the layout that its backend declares" in str(caught.value)


def test_a_layer_of_no_known_kind_keeps_its_axes():
    unknown = layer("torch:LSTM", "...", (4, 5, 6))
    assert canonical_layout(unknown, "kernel") == "..."
    assert canonical_shape(unknown, "kernel") == (4, 5, 6)


def test_an_axis_named_like_a_keyword_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert apply_pattern(np.ones((2, 3)), "out in -> in out", {}, "kernel").shape == (3, 2)
