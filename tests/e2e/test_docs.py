"""The programs that the README and the pages show run as they stand."""

import importlib
import pathlib
import re
import runpy
import tomllib

import keras
import numpy as np
import pytest
import torch
from e2e_models import assert_bitwise_equal, contents, randomised

import clipcore as cc
from clipcore.mapping import kinds, registry
from clipcore.mapping.operations import OPERATIONS
from clipcore.mapping.repairs import REPAIRS

ROOT = pathlib.Path(__file__).parents[2]
PLUGIN = ROOT / "docs" / "examples" / "clipcore-gain"
PAGES = [
    "README.md",
    "docs/howto/clip-gradients.md",
    "docs/howto/layers.md",
    "docs/howto/limit-what-moves.md",
    "docs/tutorial/first-migration.md",
]


def program(page):
    """A page's Python, with blank lines in place of the rest, so that an error names the page's line."""
    lines, inside = [], False
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = (line == "```python") if fence else inside
    return "\n".join(lines)


@pytest.fixture
def own_kinds():
    """Layer kinds that a test registers are gone after it."""
    tables = kinds._REGISTERED, registry._stored
    before = [dict(table) for table in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


@pytest.mark.usefixtures("own_kinds")
@pytest.mark.parametrize("page", PAGES)
def test_the_program_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = compile(program(page), page, "exec")

    assert code.co_names
    exec(code, {"__name__": "page"})


def test_every_page_with_a_program_is_listed_here():
    written = [path for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")] if "```python" in path.read_text()]

    assert sorted(PAGES) == sorted(path.relative_to(ROOT).as_posix() for path in written)


def test_the_readme_has_two_commands_and_an_api_of_about_twenty_lines():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    (\S.*)$", text, flags=re.MULTILINE)

    assert [command.split(" && ")[-1] for command in commands[:2]] == ["clipcore demo", "python -m tox run-parallel"]
    assert sum(bool(line) for line in program("README.md").splitlines()) <= 22


def test_the_table_of_layers_is_what_its_script_writes_now():
    written = (ROOT / "docs" / "reference" / "layers.md").read_text(encoding="utf-8")

    assert written == runpy.run_path(str(ROOT / "docs" / "mkdocs" / "layers.py"))["page"]()


def test_every_operation_of_a_plan_is_in_the_table_of_layers():
    with_another = {"scaled": "scaled_mean", "left_vector": "right_vector"}

    assert {with_another.get(name, name) for name in OPERATIONS} == REPAIRS.keys()


@pytest.fixture
def plugin(own_kinds, monkeypatch):
    """The modules that the example distribution's entry point names, and the two that hold its layers."""
    monkeypatch.syspath_prepend(PLUGIN)
    entry = tomllib.loads((PLUGIN / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    importlib.reload(importlib.import_module(entry[registry.GROUP]["gain"]))
    return importlib.import_module("gain_torch"), importlib.import_module("gain_keras")


def test_the_example_plugin_moves_its_layer_there_and_back(plugin):
    of_torch, of_keras = plugin
    source = randomised(torch.nn.Sequential(torch.nn.Linear(5, 3), of_torch.Gain(3, 0.5)).eval(), 1)
    target = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3), of_keras.Gain(0.5, name="gain")])
    back = torch.nn.Sequential(torch.nn.Linear(5, 3), of_torch.Gain(3, 0.5)).eval()
    x = np.random.default_rng(0).standard_normal((4, 5)).astype("float32")

    there = cc.migrate(source, target, sample=x)
    cc.migrate(target, back, sample=x)

    assert {row.evidence for row in there.plan.rows} == {"proven"}
    assert cc.verify(source, target, sample=x, plan=there.plan).ok
    assert_bitwise_equal(contents(source), contents(back))


def test_a_setting_of_the_example_plugin_is_a_difference(plugin):
    of_torch, of_keras = plugin
    source = torch.nn.Sequential(torch.nn.Linear(5, 3), of_torch.Gain(3, 0.5)).eval()
    target = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3), of_keras.Gain(0.25, name="gain")])

    assert [(d.layer, d.setting, d.source, d.target) for d in cc.diff(source, target)] == [("gain", "shift", 0.5, 0.25)]
