"""Importing the core imports no framework, and the two halves that check each other share nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import clipcore

PACKAGE = Path(clipcore.__file__).parent
FRAMEWORKS = ("torch", "tensorflow", "keras", "tf_keras", "jax", "numba", "scipy", "sklearn", "matplotlib", "pandas")


@pytest.mark.parametrize(
    "use",
    [
        "import clipcore",
        "import clipcore as cc; [getattr(cc, name) for name in cc.__all__]",
        "import clipcore as cc, numpy as np; cc.backends(); cc.clip(np.ones(3), cc.ClipByNorm(1.0))",
        "import clipcore.cli",
    ],
)
def test_using_the_core_imports_no_framework(use):
    code = f"{use}\nimport sys\nprint([name for name in {FRAMEWORKS} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def imports(path):
    """Every module that a file imports, with the packages of what it imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("reference", ["clipping/reference.py", "mapping/reference.py"])
def test_a_reference_imports_numpy_and_the_standard_library_alone(reference):
    roots = {name.partition(".")[0] for name in imports(PACKAGE / reference)}
    assert roots - set(sys.stdlib_module_names) == {"numpy"}


@pytest.mark.parametrize("user", ["policies.py", "kernels.py", "host.py", "api.py"])
def test_what_users_run_does_not_import_the_definition_of_clipping(user):
    assert not [name for name in imports(PACKAGE / "clipping" / user) if "clipping.reference" in name]


def test_no_file_of_the_core_names_a_framework_in_an_import():
    for path in PACKAGE.rglob("*.py"):
        roots = {name.partition(".")[0] for name in imports(path)}
        assert not roots & {"torch", "tensorflow", "keras", "tf_keras", "jax"}, path


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        clipcore.nonsense  # noqa: B018
