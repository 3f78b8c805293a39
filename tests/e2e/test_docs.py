"""The programs that the README and the pages show run as they stand."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [
    "README.md",
    "docs/howto/clip-gradients.md",
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

    assert [command.split(" && ")[-1] for command in commands[:2]] == ["clipcore demo", "python -m tox"]
    assert sum(bool(line) for line in program("README.md").splitlines()) <= 22
