"""What a caller can get wrong is one clear sentence, and nothing is changed."""

import dataclasses
import itertools
import math
import re
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clipcore as cc

POLICY = cc.ClipByGlobalNorm(1.0)


@pytest.mark.parametrize(
    ("grads", "error", "said"),
    [
        (np.array([1, 2]), cc.InvalidInput, ["grads has dtype int64", "float32"]),
        ({"w": [np.array([True])]}, cc.InvalidInput, ["grads['w'][0] has dtype bool"]),
        ([np.ones(2), 3.0], cc.InvalidInput, ["grads[1]", "3.0", "float"]),
        ([3.0], cc.InvalidInput, ["grads[0]", "3.0"]),
        ("gradients", cc.InvalidInput, ["grads", "'gradients'"]),
        ((np.ones(2) for _ in range(2)), cc.InvalidInput, ["grads", "generator"]),
        ([np.ones(2), object()], cc.InvalidInput, ["grads[1]", "object"]),
        (np.array(["a"]), cc.InvalidInput, ["dtype"]),
        ({"w": np.ma.array([3.0, 4.0], mask=[0, 1])}, cc.InvalidInput, ["grads['w'] is a masked array", "filled(0)"]),
        (np.ones(2, np.longdouble), cc.InvalidInput, ["dtype"]),
    ],
)
def test_what_is_no_floating_tensor_is_refused_with_its_place(grads, error, said):
    with pytest.raises(error) as caught:
        cc.clip(grads, POLICY)
    for part in said:
        assert part in str(caught.value)


@pytest.mark.parametrize("policy", [None, 1.0, cc.ClipByNorm, "norm"])
def test_what_is_no_policy_is_refused(policy):
    with pytest.raises(cc.InvalidPolicy, match="expected a policy"):
        cc.clip(np.ones(2), policy)


def test_a_read_only_array_cannot_be_clipped_in_place():
    array = np.full(4, 3.0)
    array.flags.writeable = False
    with pytest.raises(cc.InvalidInput, match="read-only"):
        cc.clip_(array, POLICY)
    clipped, _ = cc.clip(array, POLICY)
    np.testing.assert_array_equal(clipped, np.full(4, 0.5))


def test_raise_names_the_first_faulty_tensor_and_changes_nothing():
    grads = {"a": np.array([3.0]), "b": np.array([np.inf, np.nan, 1.0])}
    with pytest.raises(cc.NonFinite, match=r"2 elements are inf or NaN \(first in grads\['b'\], 1 of 2 tensors\)"):
        cc.clip_(grads, cc.ClipByGlobalNorm(1.0, nonfinite="raise"))
    np.testing.assert_array_equal(grads["a"], [3.0])


def test_one_memory_under_two_names_is_scaled_once_in_place():
    grad = np.array([3.0, 4.0])
    report = cc.clip_([grad, grad], POLICY)
    np.testing.assert_array_equal(grad, [3 * 0.2, 4 * 0.2])
    assert report.norm == 5


def test_no_tensors_at_all_have_the_norm_zero():
    for grads in ([], {}, None, [None, {}]):
        clipped, report = cc.clip(grads, POLICY)
        assert clipped == grads
        assert (report.norm, report.scale, report.clipped, report.nonfinite) == (0.0, 1.0, False, 0)


@pytest.mark.parametrize("nothing", [list, tuple, lambda: iter(()), lambda: [None, []]])
@pytest.mark.parametrize("verb", [cc.clip_grads_, cc.limit_])
def test_no_parameters_at_all_have_the_norm_zero_in_any_framework(verb, nothing):
    report = verb(nothing(), POLICY)
    assert (report.norm, report.scale, report.clipped, report.nonfinite) == (0.0, 1.0, False, 0)


def test_numpy_keeps_no_gradients_and_no_models():
    with pytest.raises(cc.InvalidInput, match=r"cc\.clip"):
        cc.clip_grads_([np.ones(2)], POLICY)
    with pytest.raises(cc.InvalidInput, match=r"cc\.clip_"):
        cc.limit_([np.ones(2)], POLICY)
    with pytest.raises(cc.InvalidInput, match=r"cc\.clip"):
        cc.attach(np.ones(2), POLICY)


def test_a_report_per_group_and_the_joint_norm_by_hand():
    _, report = cc.clip([np.array([3.0, 4.0]), np.array([12.0])], cc.ClipByNorm(6.0))
    assert report.norms == (5.0, 12.0)
    assert report.scales == (1.0, 0.5)
    assert report.norm == 13.0
    assert report.scale == 0.5
    assert report.clipped is True


def test_threads_clip_at_the_same_time():
    rng = np.random.default_rng(0)
    grads = [rng.standard_normal(50_000).astype(np.float32) for _ in range(4)]
    expected = [cc.clip(grad, POLICY)[0].tobytes() for grad in grads]
    results = [None] * 4

    def work(index):
        for _ in range(20):
            results[index] = cc.clip(grads[index], POLICY)[0].tobytes()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == expected


@pytest.mark.parametrize(
    ("grad", "view"),
    [
        (np.ones((2, 2)), lambda x: x.T),
        (np.ones((2, 2)), lambda x: x[::-1]),
        (np.ones((2, 2)), lambda x: x.reshape(-1)),
        (np.ones((2, 4))[:, ::2], lambda x: x.T),
        (np.ones((2, 4))[:, ::2], lambda x: x[::-1, None, ::-1]),
        (np.ones((2, 4))[:, ::2], lambda x: x.reshape(4)),
    ],
)
def test_a_view_of_the_same_memory_is_scaled_once_in_place(grad, view):
    grad[...] = 3
    report = cc.clip_([grad, view(grad)], POLICY)
    assert report.norm == 6
    np.testing.assert_array_equal(grad, np.full((2, 2), 3 * (1 / 6)))


def test_memories_that_overlap_in_part_are_refused_and_left_alone():
    grad = np.full(6, 3.0)
    with pytest.raises(cc.InvalidInput, match=r"grads\[0\] and grads\[1\] overlap"):
        cc.clip_([grad[:4], grad[2:]], POLICY)
    np.testing.assert_array_equal(grad, np.full(6, 3.0))
    cc.clip_([grad[::2], grad[1::2]], POLICY)
    np.testing.assert_allclose(grad, np.full(6, 6**-0.5))


def test_memories_that_overlap_are_refused_with_others_lying_between_them():
    grad = np.ones(60, np.float32)
    with pytest.raises(cc.InvalidInput, match=r"grads\[1\] and grads\[2\] overlap"):
        cc.clip_([grad[0::2], grad[1:50:2], grad[3:60:2]], POLICY)
    np.testing.assert_array_equal(grad, np.ones(60, np.float32))


@given(st.data())
def test_an_array_whose_own_elements_overlap_is_refused_in_place_and_no_other(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 4), min_size=0, max_size=3)))
    strides = tuple(4 * data.draw(st.integers(0, 9)) for _ in shape)
    memory = np.ones(200, np.float32)
    array = np.lib.stride_tricks.as_strided(memory, shape, strides, writeable=True)
    places = [sum(i * stride for i, stride in zip(index, strides, strict=True)) for index in np.ndindex(shape)]
    if len(set(places)) < len(places):
        with pytest.raises(cc.InvalidInput, match="its elements share memory"):
            cc.clip_(array, cc.ClipByValue(0.5))
        assert (memory == 1).all()
    else:
        cc.clip_(array, cc.ClipByValue(0.5))
        assert (memory == 0.5).sum() == array.size


SLICES = st.builds(slice, st.integers(0, 11), st.integers(0, 12), st.sampled_from([-3, -2, -1, 1, 2, 3]))


@given(st.lists(SLICES, min_size=1, max_size=5))
def test_no_element_is_ever_scaled_twice_in_place(slices):
    grad = np.ones(12)
    views = [grad[where] for where in slices]
    try:
        report = cc.clip_(views, POLICY)
    except cc.InvalidInput:
        np.testing.assert_array_equal(grad, np.ones(12))
        shared = [np.shares_memory(a, b) for a, b in itertools.combinations(views, 2)]
        assert any(shared)
    else:
        assert set(grad) <= {1.0, report.scale}


class Tagged(np.ndarray):
    """An array that carries something besides, as NumPy's guide to subclasses has it."""

    def __array_finalize__(self, obj):
        self.tag = getattr(obj, "tag", None)


def test_a_clipped_array_is_of_the_class_that_was_given():
    matrix, tagged = np.ones((1, 2)).view(np.matrix), np.ones(2).view(Tagged)
    tagged.tag = "w"
    clipped, _ = cc.clip([matrix, tagged, np.ones(1)], POLICY)
    assert [type(array) for array in clipped] == [np.matrix, Tagged, np.ndarray]
    assert clipped[1].tag == "w"


@pytest.mark.parametrize("verb", [cc.clip, cc.clip_, cc.clip_grads_, cc.limit_])
def test_a_structure_that_contains_itself_is_refused(verb):
    tree = [np.ones(2)]
    tree.append((tree, None))
    with pytest.raises(cc.InvalidInput, match="this list contains itself"):
        verb(tree, POLICY)


@pytest.mark.parametrize("verb", [cc.clip_grads_, cc.limit_])
@pytest.mark.parametrize(
    ("strangers", "said"),
    [
        ({"0.weight": np.ones(2)}, r"is of type dict; expected a model or its parameters, say model\.parameters\(\)"),
        ("weights", "is of type str; expected a model"),
        (object(), "is of type object; expected a model"),
        ([("0.weight", np.ones(2))], r"params\[0\]\[0\] is '0.weight', no tensor"),
        ((3.0,), r"params\[0\] is 3.0, no tensor"),
    ],
)
def test_what_is_neither_a_model_nor_parameters_is_refused_with_its_place(verb, strangers, said):
    with pytest.raises(cc.InvalidInput, match=said):
        verb(strangers, POLICY)


@pytest.mark.parametrize("stranger", ["adam", None, object, 0.1], ids=repr)
def test_what_is_no_optimizer_or_no_model_is_refused_with_its_value(stranger):
    with pytest.raises(cc.InvalidInput, match=r"optimizer is .*; expected an optimizer of an installed backend"):
        cc.attach(stranger, POLICY)
    with pytest.raises(cc.InvalidInput, match=r"model is .*; expected a model of an installed backend"):
        cc.compile(stranger, None, "adam", clip=POLICY)


def test_a_backend_can_be_named():
    clipped, _ = cc.clip([np.array([3.0, 4.0])], POLICY, backend="numpy")
    np.testing.assert_array_equal(clipped[0], [3 * 0.2, 4 * 0.2])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cc.scale_for("5", POLICY), "norm is '5'"),
        (lambda: cc.scale_for(None, POLICY), "norm is None"),
        (lambda: cc.scale_for(math.inf, POLICY), "norm is inf"),
        (lambda: cc.combine(3.0), "norms is 3.0"),
        (lambda: cc.combine([1.0, None]), r"norms\[1\] is None"),
        (lambda: cc.apply_scale([np.ones(2)], "x"), "scale is 'x'"),
        (lambda: cc.clip([np.ones(2)], cc.AdaptiveClip(), params=[3]), r"params\[0\] is 3 of type int"),
        (lambda: cc.clip([np.ones(2)], cc.AdaptiveClip(), params=[np.ones(2, int)]), r"params\[0\] has dtype int64"),
        (lambda: cc.AutoClip(window=2).update([np.ones(2)], {"norms": [1.0, 2.0], "count": 1}), "of type list"),
    ],
)
def test_what_is_no_number_tensor_or_state_is_refused_in_a_sentence(call, words):
    with pytest.raises(cc.InvalidInput, match=words):
        call()


def test_names_are_the_keys_as_they_are():
    for name in ("it's", "a][b", r"a\b"):
        policy = cc.PerGroup({f"^{re.escape(name)}$": cc.ClipByValue(0.1)})
        assert cc.clip({name: np.ones(2)}, policy)[0][name].tolist() == [0.1, 0.1]
    nested = {"block": [{"w": np.ones(1)}]}
    assert cc.clip(nested, cc.PerGroup({r"^block\.0\.w$": cc.ClipByValue(0.1)}))[0]["block"][0]["w"] == 0.1
    together, _ = cc.clip_together({0: [np.ones(1)], 1: np.ones(1)}, cc.PerGroup({r"^0\.0$": cc.ClipByValue(0.1)}))
    assert (together[0][0].tolist(), together[1].tolist()) == ([0.1], [1.0])


def test_infinities_that_the_first_policy_of_a_chain_allows_are_faults_to_the_next():
    grads, policies = [np.array([-5.0, np.inf])], (cc.ClipByValue(-1.0, math.inf), cc.ClipByGlobalNorm(1.0))
    clipped, report = cc.clip(grads, cc.Chain(policies))
    assert np.isnan(clipped[0]).all()
    assert report.nonfinite == 1
    with pytest.raises(cc.NonFinite, match="after its first policies"):
        cc.clip(grads, cc.Chain([dataclasses.replace(policy, nonfinite="raise") for policy in policies]))
