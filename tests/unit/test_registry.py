"""A layer kind of one's own is registered once, and refused where it could not be carried out."""

import pytest

import clipcore as cc
from clipcore.mapping import kinds, registry


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_stored", dict(registry._stored))
    known = dict(kinds.KINDS)
    yield
    for name in set(kinds.KINDS) - set(known):
        del kinds._REGISTERED[name]


class Mine:
    """A class of some framework."""


class Derived(Mine):
    """A subclass of it."""


KIND = cc.Kind("shifted", {"kernel": "out in", "shift": "out"}, optional=frozenset({"shift"}))
STORED = cc.Stored("shifted", {"w": ("kernel", "in out"), "s": ("shift", "out")})


@pytest.mark.parametrize("key", [Mine, f"{Mine.__module__}.Mine"])
def test_a_class_and_its_subclasses_are_found_by_themselves_or_by_their_full_name(key):
    assert registry.stored_by(Mine) is None
    cc.register_kind(KIND, {key: STORED})
    assert cc.layer_kinds()["shifted"] == KIND
    assert registry.stored_by(Mine) is STORED
    assert registry.stored_by(Derived) is STORED
    assert registry.stored_by(int) is None


def test_the_same_kind_is_registered_twice_and_another_one_of_its_name_refused():
    cc.register_kind(KIND, {Mine: STORED})
    cc.register_kind(KIND, {Derived: STORED})
    with pytest.raises(cc.MappingError, match="'shifted' already"):
        cc.register_kind(cc.Kind("shifted", {"kernel": "in out"}), {})


def test_a_class_may_be_a_layer_of_a_kind_that_is_built_in():
    linear = cc.Stored("linear", {"w": ("kernel", "in out")})
    cc.register_kind(cc.layer_kinds()["linear"], {Mine: linear})
    assert registry.stored_by(Mine) is linear
    with pytest.raises(cc.MappingError, match="'linear' already"):
        cc.register_kind(cc.Kind("linear", {}), {})


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (cc.Stored("other", {}), "under kind 'shifted'"),
        (cc.Stored("shifted", {"w": ("weight", "in out")}), r"role 'weight'; expected one of \['kernel', 'shift'\]"),
        (cc.Stored("shifted", {"w": ("kernel", "in units")}), "expected the same axes in any order"),
    ],
)
def test_a_table_that_cannot_be_carried_out_is_refused(stored, message):
    with pytest.raises(cc.MappingError, match=message):
        cc.register_kind(KIND, {Mine: stored})
    assert registry.stored_by(Mine) is None
    assert "shifted" not in cc.layer_kinds()


def test_what_is_no_kind_is_refused():
    with pytest.raises(cc.MappingError, match=r"expected a cc\.Kind"):
        cc.register_kind("linear", {})


def test_a_plugin_that_cannot_be_imported_is_named(monkeypatch):
    class Broken:
        name, value = "mine", "nowhere.plugin"

        def load(self):
            raise ImportError("no module named nowhere")

    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [Broken()])
    registry._load_plugins.cache_clear()
    try:
        with pytest.raises(cc.MappingError, match=r"nowhere\.plugin .*'mine'.*no module named nowhere"):
            cc.layer_kinds()
    finally:
        monkeypatch.undo()
        registry._load_plugins.cache_clear()
