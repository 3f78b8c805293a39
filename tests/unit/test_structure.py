"""Nested structures keep their classes, their order and their Nones."""

from collections import Counter, OrderedDict, defaultdict, namedtuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import clipcore as cc
from clipcore.structure import leaves, map_leaves, plain

Pair = namedtuple("Pair", "first second")
TREES = st.recursive(
    st.none() | st.integers(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=10,
)


@given(TREES)
def test_mapping_by_identity_gives_an_equal_structure_of_the_same_classes(tree):
    result = map_leaves(lambda leaf: leaf, tree)
    assert result == tree
    assert type(result) is type(tree)


@given(TREES)
def test_every_leaf_is_visited_once_and_in_order(tree):
    found = [leaf for _, leaf in leaves(tree)]
    counter = iter(range(len(found)))
    assert [leaf for _, leaf in leaves(map_leaves(lambda _: next(counter), tree))] == list(range(len(found)))


def test_paths_read_as_python_would_index():
    assert [path for path, _ in leaves({"a": [1, (2, None, 3)]})] == ["['a'][0]", "['a'][1][0]", "['a'][1][2]"]


def test_clipping_keeps_the_structure_with_its_classes():
    grads = OrderedDict(a=np.array([3.0]), b=[None, Pair(np.array([4.0]), None)], c=defaultdict(list, d=np.zeros(2)))
    clipped, _ = cc.clip(grads, cc.ClipByGlobalNorm(1.0))
    assert type(clipped) is OrderedDict
    assert type(clipped["b"][1]) is Pair
    assert clipped["b"][0] is None
    assert clipped["c"].default_factory is list
    np.testing.assert_array_equal(clipped["b"][1].first, [0.8])


class Ranked(Pair):
    """A tuple whose constructor takes something else than its elements, and that carries an attribute."""

    def __new__(cls, first):
        return super().__new__(cls, first, None)


class Tagged(tuple):
    def __new__(cls, first, second, *, tag):
        made = super().__new__(cls, (first, second))
        made.tag = tag
        return made


def test_a_tuple_of_a_class_with_a_constructor_of_its_own_is_rebuilt():
    tree = [Ranked(1), Tagged(2, None, tag="x")]
    ranked, tagged = map_leaves(lambda leaf: leaf * 10, tree)
    assert (type(ranked), ranked) == (Ranked, (10, None))
    assert (type(tagged), tagged, tagged.tag) == (Tagged, (20, None), "x")


def test_the_leaves_of_a_counter_are_replaced_and_not_added():
    grads = Counter(a=np.array([3.0]), b=np.array([4.0]))
    clipped, _ = cc.clip(grads, cc.ClipByGlobalNorm(1.0))
    assert type(clipped) is Counter
    assert (clipped["a"][0], clipped["b"][0], grads["a"][0]) == (3 * 0.2, 4 * 0.2, 3.0)


def test_what_json_lacks_becomes_none():
    assert plain({"a": [float("nan"), 1.0, float("inf")], "b": "text"}) == {"a": [None, 1.0, None], "b": "text"}
