"""The demo where something that it needs is missing."""

import importlib.util

import numpy as np
from typer.testing import CliRunner

import clipcore as cc
from clipcore.cli import app, demo


def found_without(*missing):
    return lambda name, package=None: None if name in missing else object()


def test_missing_packages_are_named_with_what_installs_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", found_without("sklearn", "matplotlib"))
    answer = CliRunner().invoke(app, ["demo"])

    assert answer.exit_code == 2
    assert answer.stderr == (
        "clipcore: the demo needs scikit-learn and matplotlib: pip install scikit-learn matplotlib\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_missing_backend_is_named_with_what_installs_it(tmp_path, monkeypatch):
    def missing(name):
        raise cc.BackendError(f"backend {name!r} is not installed: pip install clipcore-{name}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", found_without())
    monkeypatch.setattr(cc, "get_backend", missing)
    answer = CliRunner().invoke(app, ["demo"])

    assert answer.exit_code == 2
    assert answer.stderr == "clipcore: backend 'torch' is not installed: pip install clipcore-torch\n"
    assert list(tmp_path.iterdir()) == []


def test_batches_are_whole_and_in_an_order_that_the_seed_alone_decides():
    images, labels = np.arange(10), np.arange(10) * 2

    first, again, other = (
        [batch[0].tolist() for batch in demo._batches(images, labels, 2, 4, seed)] for seed in (0, 0, 1)
    )

    assert first == again != other
    assert [len(batch) for batch in first] == [4, 4, 4, 4]
    assert all(np.array_equal(y, 2 * x) for x, y in demo._batches(images, labels, 2, 4, 0))
