"""Two matched layers become rows: rearranged, computed, filled, in the order of precedence of the recipes."""

import numpy as np
import pytest

import clipcore as cc
from clipcore.backend import Layer, Tensor
from clipcore.mapping.align import SAME
from clipcore.mapping.kinds import GRU_GATES
from clipcore.mapping.layouts import unit_axes
from clipcore.mapping.rows import fits, rows_between, signature, values_for


def layer(kind, name="layer", settings=None, **tensors):
    """A layer whose tensors are given as role=(layout, shape), or (layout, shape, name, within, whole)."""
    made = {}
    for role, (layout, shape, *place) in tensors.items():
        role = role.replace("__", ".")
        stored, within, whole = place or (f"{name}.{role}", (), ())
        made[role] = Tensor(stored, role, layout, shape, "float32", True, within, whole)
    return Layer(name, kind, made, settings or {})


def carried(source, target, values):
    """What the target's tensors get."""
    tensors = {}
    for tensor in target.tensors.values():
        shape = tensor.whole or tensor.shape
        tensors[tensor.name] = Tensor(tensor.name, tensor.role, "...", shape, "float32")
    return values_for(rows_between(source, target, SAME), tensors, values)


def gru(name, order, transposed=False, units=2, ins=3):
    """A GRU whose gates lie in a stored kernel one behind the other, in this order."""
    tensors = {}
    for place, gate in enumerate(order):
        start, stop = place * units, (place + 1) * units
        if transposed:
            bounds, whole, layout, shape = ((0, ins), (start, stop)), (ins, 3 * units), "in unit", (ins, units)
        else:
            bounds, whole, layout, shape = ((start, stop), (0, ins)), (3 * units, ins), "unit in", (units, ins)
        tensors[f"kernel__{gate}"] = (layout, shape, f"{name}.kernel", bounds, whole)
    return layer("gru", name, **tensors)


def test_gates_change_places_by_hand():
    source, target = gru("a", GRU_GATES), gru("b", ("update", "reset", "new"), transposed=True)
    kernel = np.arange(18.0, dtype=np.float32).reshape(6, 3)
    (result,) = carried(source, target, {"a.kernel": kernel}).values()
    reset, update, new = kernel[:2], kernel[2:4], kernel[4:]
    np.testing.assert_array_equal(result, np.concatenate([update, reset, new]).T)


def test_two_biases_are_summed_where_the_target_has_one_and_filled_where_the_source_has():
    two = layer("rnn", "two", bias=("unit", (2,)), recurrent_bias=("unit", (2,)))
    one = layer("rnn", "one", bias=("unit", (2,)))
    biases = {"two.bias": np.float32([1, 2]), "two.recurrent_bias": np.float32([10, 20])}
    assert carried(two, one, biases)["one.bias"].tolist() == [11, 22]
    back = carried(one, two, {"one.bias": np.float32([11, 22])})
    assert back["two.bias"].tolist() == [11, 22]
    assert back["two.recurrent_bias"].tolist() == [0, 0]
    (row,) = [row for row in rows_between(two, one, SAME) if row.target == "one.bias"]
    assert not row.reversible


def test_heads_are_split_and_put_together_again_bit_for_bit():
    fused = layer("linear", "q", kernel=("out in", (6, 4)), bias=("out", (6,)))
    split = layer("linear", "h", kernel=("in out0 out1", (4, 2, 3)), bias=("out0 out1", (2, 3)))
    kernel, bias = np.arange(24.0, dtype=np.float32).reshape(6, 4), np.arange(6.0, dtype=np.float32)
    there = carried(fused, split, {"q.kernel": kernel, "q.bias": bias})
    np.testing.assert_array_equal(there["h.kernel"], kernel.reshape(2, 3, 4).transpose(2, 0, 1))
    np.testing.assert_array_equal(there["h.bias"], bias.reshape(2, 3))
    back = carried(split, fused, there)
    np.testing.assert_array_equal(back["q.kernel"], kernel)
    np.testing.assert_array_equal(back["q.bias"], bias)


def test_two_ways_to_store_one_axis_as_several_are_met_by_way_of_the_canonical_one():
    first = layer("linear", "a", kernel=("in out0 out1", (4, 2, 3)))
    second = layer("linear", "b", kernel=("out0 out1 in", (3, 2, 4)))
    kernel = np.arange(24.0, dtype=np.float32).reshape(4, 2, 3)
    (result,) = carried(first, second, {"a.kernel": kernel}).values()
    np.testing.assert_array_equal(result, kernel.reshape(4, 6).T.reshape(3, 2, 4))


def test_a_weight_norm_is_baked_and_taken_apart():
    made = layer("linear", "w", kernel__direction=("out in", (2, 2)), kernel__magnitude=("out in", (2, 1)))
    plain = layer("linear", "p", kernel=("in out", (2, 2)))
    tensors = {"w.kernel.direction": np.float32([[3, 4], [6, 8]]), "w.kernel.magnitude": np.float32([[10], [5]])}
    kernel = carried(made, plain, tensors)["p.kernel"]
    np.testing.assert_allclose(kernel.T, [[6, 8], [3, 4]], rtol=1e-7)
    back = carried(plain, made, {"p.kernel": kernel})
    np.testing.assert_array_equal(back["w.kernel.direction"], kernel.T)
    np.testing.assert_allclose(back["w.kernel.magnitude"], [[10], [5]], rtol=1e-7)


def conv_transpose(name, groups, layout, shape):
    return layer("conv_transpose", name, {"groups": groups}, kernel=(layout, shape))


def test_a_grouped_kernel_goes_onto_the_diagonal_of_a_dense_one_and_back():
    grouped = conv_transpose("g", 2, "(group in) out ...", (4, 3, 5))
    dense = conv_transpose("d", 1, "... out (group in)", (5, 6, 4))
    assert fits(grouped, dense)
    assert fits(dense, grouped)
    kernel = np.arange(60.0, dtype=np.float32).reshape(4, 3, 5) + 1
    there = carried(grouped, dense, {"g.kernel": kernel})["d.kernel"]
    np.testing.assert_array_equal(there[:, :3, :2], kernel[:2].transpose(2, 1, 0))
    assert not there[:, 3:, :2].any()
    np.testing.assert_array_equal(carried(dense, grouped, {"d.kernel": there})["g.kernel"], kernel)


def test_layers_of_another_kind_shape_or_number_of_groups_do_not_fit():
    assert not fits(gru("a", GRU_GATES), gru("b", GRU_GATES, units=3))
    two, three = (conv_transpose("x", groups, "(group in) out ...", (6, 6 // groups, 1)) for groups in (2, 3))
    assert signature(two) == signature(three)
    assert not fits(two, three)


def test_tensors_of_no_known_kind_are_paired_by_name_then_by_shape_and_unit_axes_do_not_count():
    source = layer("raw", "s", scale=("...", (3, 1, 1)), shift=("...", (3,)), table=("...", (2, 3)))
    target = layer("raw", "t", shift=("...", (1, 3)), scale=("...", (3,)), weights=("...", (2, 3)))
    values = {
        "s.scale": np.float32([[[1]], [[2]], [[3]]]),
        "s.shift": np.float32([4, 5, 6]),
        "s.table": np.ones((2, 3), "f"),
    }
    result = carried(source, target, values)
    assert result["t.scale"].tolist() == [1, 2, 3]
    assert result["t.shift"].tolist() == [[4, 5, 6]]
    assert result["t.weights"].tolist() == [[1, 1, 1]] * 2


def test_tensors_of_no_known_kind_that_nothing_tells_apart_are_refused_with_the_rule_that_would():
    source, target = (layer("raw", n, **{f"{n}1": ("...", (3,)), f"{n}2": ("...", (3,))}) for n in "ab")
    with pytest.raises(cc.MappingError, match=r"may come from a1 or a2.*rules="):
        rows_between(source, target, SAME)


def test_the_units_of_a_transposed_convolution_are_its_outputs():
    assert unit_axes(conv_transpose("a", 1, "(group in) out ...", (4, 3, 5)), "kernel") == (1,)
    assert unit_axes(conv_transpose("a", 1, "... out (group in)", (5, 3, 4)), "kernel") == (1,)
    # an axis over groups and inputs at once is no axis of units
    assert unit_axes(conv_transpose("a", 2, "(group in) out ...", (4, 3, 5)), "kernel") is None
    assert unit_axes(conv_transpose("a", 4, "(group in) out ...", (4, 3, 5)), "kernel") == (0, 1)
    assert unit_axes(layer("linear", kernel=("in out0 out1", (4, 2, 3))), "kernel") == (1, 2)
