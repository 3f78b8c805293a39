"""What is typed on the command line, and how it is refused."""

import sys
import types

import numpy as np
import pytest

import clipcore as cc
from clipcore.cli.inputs import check_output, check_weight_file, load_model, parse_limit, parse_rules, parse_sample


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("value:0.5", cc.ClipByValue(0.5)),
        ("norm:2", cc.ClipByNorm(2.0)),
        ("global_norm:1e-3", cc.ClipByGlobalNorm(1e-3)),
        ("delta:global_norm:1.0", cc.Delta(cc.ClipByGlobalNorm(1.0))),
    ],
)
def test_a_limit_is_read_from_its_short_form(text, limit):
    assert parse_limit(text) == limit


@pytest.mark.parametrize("text", ["", "norm", "norm:", "norm:x", "cube:1", "delta:", "__import__('os'):1", "norm:1:2"])
def test_a_limit_that_is_not_understood_is_refused_with_the_forms_that_are(text):
    with pytest.raises(cc.InvalidInput, match="expected value:NUMBER, norm:NUMBER, global_norm:NUMBER"):
        parse_limit(text)


def test_rules_are_pairs_of_names():
    assert parse_rules(["a.b=c/d", r"(x)=\1=y"]) == [("a.b", "c/d"), ("(x)", r"\1=y")]
    assert parse_rules(None) == []


@pytest.mark.parametrize("text", ["", "a", "a=", "=b"])
def test_a_rule_without_two_names_is_refused(text):
    with pytest.raises(cc.InvalidInput, match="expected SOURCE=TARGET"):
        parse_rules([text])


def test_a_limit_out_of_range_is_refused_by_the_policy():
    with pytest.raises(cc.InvalidPolicy, match="max_norm is -1"):
        parse_limit("norm:-1")


def test_a_shape_gives_a_normal_sample_that_the_seed_decides():
    sample = parse_sample("2,3,4", seed=7)

    assert sample.shape == (2, 3, 4)
    assert sample.dtype == np.float32
    np.testing.assert_array_equal(sample, parse_sample("2,3,4", seed=7))
    assert not np.array_equal(sample, parse_sample("2,3,4", seed=8))


def test_a_npy_file_gives_its_array(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6).reshape(2, 3))

    np.testing.assert_array_equal(parse_sample(str(tmp_path / "x.npy"), seed=0), [[0, 1, 2], [3, 4, 5]])


def test_a_npz_file_gives_its_arrays_by_name(tmp_path):
    np.savez(tmp_path / "x.npz", ids=[1, 2], mask=[0.0, 1.0])
    sample = parse_sample(str(tmp_path / "x.npz"), seed=0)

    assert sorted(sample) == ["ids", "mask"]
    np.testing.assert_array_equal(sample["ids"], [1, 2])


@pytest.mark.parametrize("text", ["", "1,3,", "a,b", "1.5,2", "-1,3", "x.csv"])
def test_what_is_neither_shape_nor_file_is_refused(text):
    with pytest.raises(cc.InvalidInput, match="neither a shape"):
        parse_sample(text, seed=0)


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
@pytest.mark.parametrize("content", [None, b"", b"no array", b"PK\x03\x04 no archive"])
def test_a_sample_file_that_cannot_be_read_is_refused(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)

    with pytest.raises(cc.InvalidInput, match="cannot be read"):
        parse_sample(str(tmp_path / name), seed=0)


def test_a_pickle_in_a_sample_file_is_never_opened(tmp_path):
    np.save(tmp_path / "x.npy", np.array([print], dtype=object), allow_pickle=True)

    with pytest.raises(cc.InvalidInput, match="cannot be read"):
        parse_sample(str(tmp_path / "x.npy"), seed=0)


class ToyBackend:
    """A backend whose models are namespaces."""

    name = "toy"
    weight_files = (".toy", ".toy.gz")

    def is_model(self, obj):
        return isinstance(obj, types.SimpleNamespace)

    def load_model(self, factory, weights):
        model = factory()
        model.weights = weights
        return model


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The toy backend, and a folder to stand in that holds a module of models."""
    (tmp_path / "toy_nets.py").write_text(
        "from types import SimpleNamespace\n"
        "def build(): return SimpleNamespace(name='made')\n"
        "def fail(): raise KeyError('width')\n"
        "def leave(): raise SystemExit(3)\n"
        "ready = SimpleNamespace(name='ready')\n"
        "class Group: build = staticmethod(build)\n"
    )
    (tmp_path / "toy_broken.py").write_text("import no_such_package\n")
    (tmp_path / "toy_script.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(cc, "get_backend", lambda name: ToyBackend())
    yield tmp_path
    sys.modules.pop("toy_nets", None)


@pytest.mark.parametrize(("name", "made"), [("build", "made"), ("ready", "ready"), ("Group.build", "made")])
def test_a_model_is_made_by_a_factory_or_taken_as_it_is(toy, name, made):
    assert load_model(f"toy:toy_nets:{name}").name == made


def test_weights_are_passed_to_the_backend(toy):
    (toy / "w.pt").touch()

    assert load_model("toy:toy_nets:build", "w.pt").weights == "w.pt"


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("toy_nets:build", None, "not of the form backend:module:factory"),
        ("toy:toy_nets:", None, "not of the form backend:module:factory"),
        ("toy:no_such_module:build", None, "'no_such_module' cannot be imported"),
        ("toy:toy_broken:build", None, "No module named 'no_such_package'"),
        ("toy:toy_nets:missing", None, "has no 'missing'"),
        ("toy:toy_nets:fail", None, "cannot be made: KeyError: 'width'"),
        ("toy:toy_nets:leave", None, "cannot be made: SystemExit: 3"),
        ("toy:toy_script:build", None, "'toy_script' cannot be imported from .*: SystemExit: 0"),
        ("toy:toy_nets:build", "none.pt", "'none.pt' does not exist"),
    ],
)
def test_a_model_that_cannot_be_had_is_refused_by_its_name(toy, name, weights, message):
    with pytest.raises(cc.InvalidInput, match=message) as caught:
        load_model(name, weights)

    assert name in str(caught.value)


def test_a_backend_without_models_is_refused():
    with pytest.raises(cc.InvalidInput, match="backend 'numpy' has no models"):
        load_model("numpy:nets:build")


def test_an_output_in_a_folder_that_does_not_exist_is_refused(tmp_path):
    check_output(str(tmp_path / "plan.json"))
    with pytest.raises(cc.InvalidInput, match="does not exist; make it first"):
        check_output(str(tmp_path / "none" / "plan.json"))


def test_an_output_that_is_a_folder_is_refused(tmp_path):
    with pytest.raises(cc.InvalidInput, match="is a folder; name a file in it"):
        check_output(str(tmp_path))


def test_an_output_must_be_named_like_a_file_that_the_backend_writes(toy):
    for name in ("a.toy", "some/where/a.toy.gz"):
        check_weight_file(name, "toy:no_such_module:build")
    for name in ("a.pt", "a.gz", "toy", ""):
        with pytest.raises(cc.InvalidInput, match=r"backend 'toy' writes weights to files named \.toy, \.toy\.gz"):
            check_weight_file(name, "toy:no_such_module:build")
    with pytest.raises(cc.InvalidInput, match="not of the form backend:module:factory"):
        check_weight_file("a.toy", "toy")
