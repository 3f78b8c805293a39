"""The command line on models of both frameworks: each command, what it prints, and its exit codes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import clipcore as cc
from clipcore.cli import app

OK, NOT_VERIFIED, BAD_INPUT = 0, 1, 2

TORCH_NETS = """
import torch
from torch import nn

def build(seed=0, classes=5):
    torch.manual_seed(seed)
    print("building", classes)
    stem = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*stem, nn.Flatten(), nn.Linear(288, classes))

def other(): return build(seed=1)

def more_classes(): return build(classes=7)

def poisoned():
    model = build()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("nan")
    return model

def stranger(): return nn.Sequential(nn.Embedding(7, 3))

def fail(): raise KeyError("width")

def leave(): raise SystemExit(3)
"""

KERAS_NETS = """
import keras
from keras import layers

def build(epsilon=1e-5, slope=0.0):
    keras.utils.set_random_seed(1)
    stem = [layers.Conv2D(8, 3, padding="same", name="stem"), layers.BatchNormalization(epsilon=epsilon, name="norm")]
    return keras.Sequential([
        keras.Input((6, 6, 3)), *stem, layers.ReLU(negative_slope=slope), layers.Flatten(),
        layers.Dense(5, name="head"),
    ], name="a")

def other_eps(): return build(epsilon=0.5)

def other_slope(): return build(slope=0.5)
"""

B, A = "torch:cli_nets_torch:build", "tensorflow:cli_nets_keras:build"
SAMPLE = ["--sample", "4,3,6,6"]


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """A folder with a module of models for each framework."""
    folder = tmp_path_factory.mktemp("nets")
    (folder / "cli_nets_torch.py").write_text(TORCH_NETS)
    (folder / "cli_nets_keras.py").write_text(KERAS_NETS)
    return folder


@pytest.fixture
def run(modules, tmp_path, monkeypatch):
    """Run the command line in an empty folder, with the models importable."""
    monkeypatch.setattr(sys, "path", [str(modules), *sys.path])
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, arguments)


@pytest.fixture
def migrated(run):
    """The file of A's weights after B's were migrated, from a B that is not the fresh one."""
    answer = run("migrate", "torch:cli_nets_torch:other", A, *SAMPLE, "--output", "a.weights.h5")
    assert answer.exit_code == OK, answer.stderr
    return "a.weights.h5"


def test_backends_lists_both_frameworks_and_what_they_do(run):
    found = json.loads(run("backends", "--json").stdout)["backends"]

    for name in ("torch", "tensorflow"):
        assert found[name] == {"works": True, "does": ["clip", "train", "migrate", "verify"], "error": None}


def test_plan_shows_each_tensor_of_the_target_and_writes_a_plan(run):
    answer = run("plan", B, A, *SAMPLE, "--output", "plan.json")

    assert answer.exit_code == OK, answer.stderr
    found = cc.Plan.load("plan.json")
    assert len(found.rows) == 8
    assert all(row.target in answer.stdout for row in found.rows)


def test_plan_as_json_is_the_plan_though_the_factory_prints(run):
    answer = run("plan", B, A, *SAMPLE, "--output", "plan.json", "--json")

    with open("plan.json", encoding="utf-8") as file:
        assert json.loads(answer.stdout) == json.load(file)
    assert "building 5" in answer.stderr


def test_plan_in_a_pipe_has_neither_colour_nor_progress(modules):
    answer = subprocess.run(
        [sys.executable, "-m", "clipcore.cli", "plan", B, B, *SAMPLE],
        capture_output=True,
        text=True,
        cwd=modules,
        env=os.environ | {"NO_COLOR": "1"},
    )

    assert answer.returncode == OK, answer.stderr
    assert "\x1b" not in answer.stdout + answer.stderr
    assert answer.stderr == "building 5\nbuilding 5\n"


def test_migrate_writes_weights_that_verify(run, migrated):
    answer = run("verify", "torch:cli_nets_torch:other", A, "--target-weights", migrated, *SAMPLE, "--json")

    assert answer.exit_code == OK, answer.stderr
    check = json.loads(answer.stdout)
    assert check["ok"] is True
    assert check["max_rel_error"] <= 1e-5


def test_verify_says_with_exit_code_1_that_two_models_differ(run):
    answer = run("verify", B, A, *SAMPLE)

    assert answer.exit_code == NOT_VERIFIED, answer.stderr
    assert "Not verified" in answer.stdout


def test_verify_explains_what_differs_and_writes_a_page_of_it(run, tmp_path):
    target = "tensorflow:cli_nets_keras:other_slope"
    answer = run("verify", B, target, *SAMPLE, "--explain", "--report", "report.html", "--json")
    assert answer.exit_code == NOT_VERIFIED
    check = json.loads(answer.stdout)
    tested = [(d["setting"], d["source"], d["target"]) for d in check["differences"] if d["tested"]]
    assert tested == [("activation before it", "relu", "leaky_relu with slope 0.5")]
    assert check["steps"]
    page = (tmp_path / "report.html").read_text()
    assert "activation before it" in page
    text = run("verify", B, target, *SAMPLE, "--explain").stdout
    assert "Difference (tested): " in " ".join(text.split())
    assert run("verify", B, target, *SAMPLE, "--report", "none/report.html").exit_code == BAD_INPUT


def test_parts_that_one_model_lacks_are_kept_on_request_and_strict_takes_proof_alone(run):
    other = "torch:cli_nets_torch:more_classes"
    assert run("plan", B, other, *SAMPLE).exit_code == BAD_INPUT
    answer = run("plan", B, other, *SAMPLE, "--unmapped", "keep", "--strict", "--json")
    assert answer.exit_code == OK
    assert json.loads(answer.stdout)["kept"]
    assert run("plan", B, other, *SAMPLE, "--unmapped", "drop").exit_code == BAD_INPUT


def test_migrate_to_a_model_that_differs_writes_it_and_says_what_differs(run):
    answer = run("migrate", B, "tensorflow:cli_nets_keras:other_slope", *SAMPLE, "--output", "a.weights.h5")

    assert answer.exit_code == NOT_VERIFIED, answer.stderr
    assert os.path.exists("a.weights.h5")
    assert "head: input: not the same" in answer.stdout


def test_migrate_makes_up_for_another_eps_and_says_how(run):
    answer = run("migrate", B, "tensorflow:cli_nets_keras:other_eps", *SAMPLE, "--output", "a.weights.h5")

    assert answer.exit_code == OK, answer.stderr
    assert "norm: eps: the target has 0.5, the source 1e-05; repaired" in " ".join(answer.stdout.split())


def test_migrate_applies_a_saved_plan_without_a_sample(run):
    run("plan", B, A, *SAMPLE, "--output", "plan.json")
    answer = run("migrate", B, A, "--plan", "plan.json", "--no-verify", "--output", "a.keras", "--json")

    assert answer.exit_code == OK, answer.stderr
    assert json.loads(answer.stdout)["verification"] is None
    assert os.path.exists("a.keras")


def test_a_rule_places_a_layer_and_is_shown_as_given(run):
    answer = run("plan", B, A, *SAMPLE, "--rule", "4=head", "--output", "plan.json")

    assert answer.exit_code == OK, answer.stderr
    rows = {row.target: row.evidence for row in cc.Plan.load("plan.json").rows}
    assert rows["head/kernel"] == "given"
    assert rows["stem/kernel"] == "proven"


def test_migrate_rounds_on_request(run):
    answer = run("migrate", B, A, *SAMPLE, "--dtype", "bfloat16", "--no-verify", "--output", "a.weights.h5", "--json")

    assert answer.exit_code == OK, answer.stderr
    assert all(
        tensor["rounding"] > 0 for tensor in json.loads(answer.stdout)["tensors"] if "kernel" in tensor["target"]
    )


def test_diff_lists_the_settings_that_differ_with_and_without_running_the_models(run):
    for sample in ([], SAMPLE):
        answer = run("diff", B, "tensorflow:cli_nets_keras:other_eps", *sample, "--json")
        assert answer.exit_code == OK, answer.stderr
        found = {d["setting"]: (d["layer"], d["source"], d["target"]) for d in json.loads(answer.stdout)["differences"]}
        assert found["eps"] == ("norm", 1e-05, 0.5)
        assert found["momentum"] == ("norm", 0.1, 0.01)
    assert "No setting differs." in run("diff", B, B).stdout


@pytest.mark.parametrize("name", ["b.pt", "b.safetensors"])
def test_migrate_goes_the_other_way_too(run, migrated, name):
    np.save("x.npy", np.random.default_rng(0).standard_normal((4, 6, 6, 3)).astype(np.float32))
    sample = ["--sample", "x.npy"]
    answer = run("migrate", A, B, "--source-weights", migrated, *sample, "--output", name)

    assert answer.exit_code == OK, answer.stderr
    assert run("verify", A, B, "--source-weights", migrated, "--target-weights", name, *sample).exit_code == OK


def test_migrate_under_a_limit_is_verified_against_the_limited_source(run):
    answer = run("migrate", B, A, *SAMPLE, "--limit", "norm:0.5", "--output", "a.weights.h5", "--json")

    assert answer.exit_code == OK, answer.stderr
    document = json.loads(answer.stdout)
    clipped = [tensor for tensor in document["tensors"] if tensor["clipped"]]
    assert clipped
    assert all(tensor["norm"] > 0.5 and tensor["scale"] < 1 for tensor in clipped)
    assert document["verification"]["ok"] is True


def test_migrate_under_a_limit_says_how_many_tensors_it_clipped(run):
    answer = run("migrate", B, A, *SAMPLE, "--limit", "delta:global_norm:1e9", "--output", "a.weights.h5")

    assert answer.exit_code == OK, answer.stderr
    assert "clipped 0 of 8 tensors" in answer.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "jax:nets:build", A, *SAMPLE], "'jax' is not installed"),
        (["plan", "torch:no_such_module:build", A, *SAMPLE], "'no_such_module' cannot be imported"),
        (["plan", "torch:cli_nets_torch:missing", A, *SAMPLE], "has no 'missing'"),
        (["plan", "torch:cli_nets_torch:fail", A, *SAMPLE], "'width'"),
        (["plan", "torch:cli_nets_torch:TORCH", A, *SAMPLE], "has no 'TORCH'"),
        (["plan", "torch:cli_nets_torch:stranger", A, "--sample", "1,3"], ""),
        (["plan", B, A, "--sample", "4,3,9,6"], "sample"),
        (["plan", B, A, "--sample", "none.npy"], "none.npy"),
        (["verify", B, A, *SAMPLE, "--source-weights", "none.pt"], "none.pt"),
        (["verify", B, A, *SAMPLE, "--source-weights", "text.pt"], "text.pt"),
        (["verify", B, A, *SAMPLE, "--target-weights", "text.weights.h5"], "text.weights.h5"),
        (["verify", B, A, *SAMPLE, "--plan", "text.pt"], "text.pt"),
        (["migrate", "torch:no_such_module:build", A, *SAMPLE, "--output", "w.xyz"], "output 'w.xyz': backend"),
        (["migrate", "torch:no_such_module:build", A, *SAMPLE, "--output", "a.pt"], "named .weights.h5, .keras"),
        (["migrate", "torch:no_such_module:build", B, *SAMPLE, "--output", "a.keras"], "named .pt, .pth, .bin"),
        (["migrate", B, A, *SAMPLE, "--output", "there.keras"], "'there.keras' is a folder"),
        (["plan", B, A, *SAMPLE, "--output", "there.keras"], "'there.keras' is a folder"),
        (["plan", "torch:cli_nets_torch:leave", A, *SAMPLE], "cannot be made: SystemExit: 3"),
        (["migrate", B, A, *SAMPLE, "--output", "no/folder/w.h5"], "does not exist"),
        (["migrate", B, A, *SAMPLE, "--output", "w.weights.h5", "--limit", "cube:1"], "cube:1"),
        (["migrate", B, A, *SAMPLE, "--output", "w.weights.h5", "--limit", "norm:-1"], "-1"),
        (["migrate", "torch:cli_nets_torch:poisoned", A, *SAMPLE, "--output", "w.weights.h5"], "NaN"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2_and_writes_nothing(run, tmp_path, arguments, message):
    for name in ("text.pt", "text.weights.h5"):
        (tmp_path / name).write_text("no weights")
    (tmp_path / "there.keras").mkdir()
    answer = run(*arguments)

    said = [line for line in answer.stderr.splitlines() if not line.startswith("building")]
    assert answer.exit_code == BAD_INPUT, answer.output
    assert answer.stdout == ""
    assert len(said) == 1
    assert said[0].startswith("clipcore: ")
    assert "unexpected" not in said[0]
    assert message in said[0]
    assert sorted(os.listdir()) == ["text.pt", "text.weights.h5", "there.keras"]
