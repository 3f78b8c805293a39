"""The public API as a whole: documented, importable without a framework, and tested as installed."""

import inspect
import os
import pathlib
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata

import pytest

import clipcore as cc

REFERENCE = pathlib.Path(__file__).parents[2] / "docs" / "reference"
FRAMEWORKS = ["torch", "tensorflow", "keras", "tf_keras", "jax", "flax"]


def undocumented(name: str, obj: object) -> Iterator[str]:
    """Names of `obj` and its public members that have no docstring of their own or, for members, of a base."""
    # a dataclass or named tuple without a docstring is given its signature as one
    if not inspect.getdoc(obj) or (inspect.isclass(obj) and (obj.__doc__ or "").startswith(f"{obj.__name__}(")):
        yield name
    for member, value in vars(obj).items() if inspect.isclass(obj) else ():
        is_code = inspect.isroutine(value) or isinstance(value, property | classmethod | staticmethod)
        if is_code and not member.startswith("_") and not inspect.getdoc(getattr(obj, member)):
            yield f"{name}.{member}"


@pytest.mark.parametrize("name", cc.__all__)
def test_every_public_name_is_documented(name):
    assert list(undocumented(name, getattr(cc, name))) == []


@pytest.mark.parametrize("name", cc.__all__)
def test_every_public_name_stands_in_the_reference_once(name):
    pages = "".join(page.read_text(encoding="utf-8") for page in REFERENCE.glob("*.md"))

    assert pages.splitlines().count(f"::: clipcore.{name}") == 1


def test_a_missing_docstring_is_found():
    class Bare:
        def method(self):
            pass

        def _private(self):
            pass

    Bare.__doc__ = "Bare(x)"

    assert list(undocumented("Bare", Bare)) == ["Bare", "Bare.method"]


def test_importing_clipcore_imports_no_framework():
    code = f"import sys, clipcore; print(sorted(set({FRAMEWORKS}) & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert answer.stdout.strip() == "[]"


def test_under_tox_the_installed_wheel_is_tested():
    installed = pathlib.Path(cc.__file__).is_relative_to(sysconfig.get_path("purelib"))

    assert installed or "TOX_ENV_NAME" not in os.environ


def test_the_wheel_says_that_it_is_typed():
    assert (pathlib.Path(cc.__file__).parent / "py.typed").exists()


def test_the_version_is_the_distributions():
    assert metadata.version("clipcore") == cc.__version__
