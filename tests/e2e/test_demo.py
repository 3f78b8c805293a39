"""`clipcore demo` as a new user runs it: the table, the pictures, the figures."""

import json
import subprocess
import sysconfig
from pathlib import Path

import pytest

CLIPCORE = Path(sysconfig.get_path("scripts")) / "clipcore"
PICTURES = ["agreement.png", "gradient-norms.png"]
ARMS = ["A from scratch", "A with B's", "A, B's limited"]


def run(folder, *arguments):
    return subprocess.run([CLIPCORE, "demo", *arguments], cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    ran = run(folder)
    assert ran.returncode == 0, ran.stderr
    return ran, folder / "clipcore-demo"


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo-json")
    ran = run(folder, "--json", "--output", "here")
    assert ran.returncode == 0, ran.stderr
    assert sorted(path.name for path in (folder / "here").iterdir()) == PICTURES
    return json.loads(ran.stdout)


def test_it_prints_one_table_and_says_that_both_compute_the_same(answer):
    ran, _ = answer

    assert ran.stdout.count("┏") == 1
    assert all(arm in ran.stdout for arm in ARMS)
    assert "A computes what B computes" in ran.stdout


def test_it_writes_two_pictures_and_nothing_else(answer):
    _, folder = answer

    assert sorted(path.name for path in folder.iterdir()) == PICTURES
    for path in folder.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000


def test_it_is_quiet_on_stderr(answer):
    ran, _ = answer

    assert ran.stderr == ""


def test_the_relative_error_is_at_most_1e_5_with_and_without_a_limit(figures):
    assert figures["ok"] is True
    assert 0 < figures["rel_error"] <= 1e-5
    assert 0 < figures["rel_error_limited"] <= 1e-5
    assert all(layer["rel_error"] <= 1e-5 for layers in figures["layers"].values() for layer in layers)


def test_the_policy_acted_in_training_and_the_limit_on_the_weights(figures):
    assert 0 < figures["clipped_steps"] < len(figures["norms"])
    assert 0 < len(figures["clipped_tensors"]) < figures["tensors"]
    assert all(norm > 4 for norm in figures["clipped_tensors"].values())


def test_b_learned_the_digits_and_a_brings_them_along(figures):
    arms = figures["arms"]

    assert figures["accuracy_b"] > 0.95
    assert arms["unlimited"]["old_before"] == pytest.approx([figures["accuracy_b"]] * 3)
    assert max(arms["scratch"]["old_before"]) < 0.5
    assert all(min(arm["new"]) > max(arm["new_before"]) for arm in arms.values())


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").touch()
    ran = run(tmp_path, "--output", "taken")

    assert ran.returncode == 2
    assert ran.stderr == "clipcore: output 'taken' is a file; name a folder for the pictures\n"
