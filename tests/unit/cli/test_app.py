"""The command line without a framework: help, exit codes, JSON, errors."""

import json
import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import clipcore as cc
from clipcore.cli import app
from clipcore.cli.output import BAD_INPUT, hushed, session

COMMANDS = ["demo", "backends", "plan", "migrate", "verify"]
FRAMEWORKS = ["torch", "tensorflow", "keras", "sklearn", "matplotlib"]


def run(*arguments):
    return CliRunner().invoke(app, arguments)


def test_help_imports_no_framework():
    code = (
        "import sys, clipcore.cli\n"
        "sys.argv = ['clipcore', '--help']\n"
        "try:\n    clipcore.cli.main()\n"
        f"finally: print(sorted(set({FRAMEWORKS}) & set(sys.modules)), file=sys.stderr)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert all(command in answer.stdout for command in COMMANDS)
    assert answer.stderr.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_commands_help_has_an_example(command):
    answer = run(command, "--help")

    assert answer.exit_code == 0
    assert f"Example: clipcore {command}" in answer.stdout


def test_backends_lists_numpy():
    answer = run("backends")

    assert answer.exit_code == 0
    assert "numpy" in answer.stdout


def test_json_is_one_object_on_stdout_and_nothing_else():
    answer = run("backends", "--json")

    assert json.loads(answer.stdout)["backends"]["numpy"] == {"works": True, "does": ["clip"], "error": None}


@pytest.mark.parametrize("command", [["plan"], ["plan", "a"], ["migrate", "a", "b"], ["nothing"], ["plan", "--no"]])
def test_bad_usage_exits_with_2(command):
    assert run(*command).exit_code == BAD_INPUT


@pytest.mark.parametrize("command", [["plan"], ["migrate", "--output", "w.pt"], ["verify"]])
def test_a_negative_seed_is_bad_usage_and_named(command):
    answer = run(*command, "nowhere:a:b", "nowhere:c:d", "--sample", "1,2", "--seed", "-1")

    assert answer.exit_code == BAD_INPUT
    assert "--seed" in answer.stderr
    assert "unexpected" not in answer.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "nowhere:a:b", "nowhere:c:d", "--sample", "1,2"],
        ["plan", "numpy:a:b", "numpy:c:d"],
        ["verify", "nowhere:a:b", "nowhere:c:d", "--sample", "none.npy"],
        ["verify", "nowhere:a:b", "nowhere:c:d", "--sample", "1,2", "--plan", "none.json"],
        ["migrate", "nowhere:a:b", "nowhere:c:d", "--output", "w.pt"],
        ["migrate", "nowhere:a:b", "nowhere:c:d", "--sample", "1,2", "--output", "no/such/folder/w.pt"],
        ["migrate", "nowhere:a:b", "nowhere:c:d", "--sample", "1,2", "--output", "w.pt", "--limit", "cube:1"],
    ],
)
def test_bad_input_is_one_sentence_on_stderr(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = run(*arguments)

    assert answer.exit_code == BAD_INPUT
    assert answer.stdout == ""
    assert answer.stderr.startswith("clipcore: ")
    assert answer.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback_as_well():
    answer = run("plan", "nowhere:a:b", "nowhere:c:d", "--sample", "1,2", "--debug")

    assert answer.exit_code == BAD_INPUT
    assert "Traceback" in answer.stderr
    assert "BackendError: backend 'nowhere' is not installed" in answer.stderr


def test_an_unexpected_error_names_itself_and_where_to_see_more(capsys):
    with pytest.raises(typer.Exit) as caught, session(as_json=False, debug=False):
        raise KeyError("width")

    assert caught.value.exit_code == BAD_INPUT
    assert capsys.readouterr().err == "clipcore: unexpected KeyError: 'width'; --debug shows where\n"


def test_what_a_factory_prints_goes_to_stderr(capsys):
    with session(as_json=True, debug=False) as running:
        print("a factory's chatter")
        running.answer({"norm": float("nan"), "shape": (1, 2)})

    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"norm": None, "shape": [1, 2]}
    assert "chatter" in printed.err


def test_native_chatter_is_held_back_unless_the_import_fails(capfd):
    with hushed():
        os.write(2, b"greetings\n")
    assert capfd.readouterr().err == ""

    def fail():
        os.write(2, b"no such symbol\n")
        raise cc.BackendError("broken")

    with pytest.raises(cc.BackendError), hushed():
        fail()
    assert capfd.readouterr().err == "no such symbol\n"
