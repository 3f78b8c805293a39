"""Importing the core imports no framework, and the two halves that check each other share nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import clipcore

PACKAGE = Path(clipcore.__file__).parent
FRAMEWORKS = ("torch", "tensorflow", "keras", "tf_keras", "jax", "sklearn", "matplotlib", "pandas")
COMPILER = ("numba", "llvmlite", "scipy")  # SciPy is imported by Numba where it is installed


def imported(use, names):
    """Which of the packages are imported after a use of the core."""
    code = f"{use}\nimport sys\nprint(*[name for name in {names} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(
    "use",
    [
        "import clipcore",
        "import clipcore as cc; [getattr(cc, name) for name in cc.__all__]",
        "import clipcore as cc; cc.backends()",
        "import clipcore.cli",
        "import clipcore.clipping.fast",
    ],
)
def test_using_the_core_imports_no_framework_and_no_compiler(use):
    assert imported(use, FRAMEWORKS + COMPILER) == []


def test_clipping_imports_no_framework():
    assert imported("import clipcore as cc, numpy as np; cc.clip(np.ones(3), cc.ClipByNorm(1.0))", FRAMEWORKS) == []


def imports(path):
    """Every module that a file imports, with the packages of what it imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


REFERENCES = sorted(path for part in ("mapping", "clipping") for path in (PACKAGE / part / "reference").glob("*.py"))


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_reference_imports_numpy_itself_and_the_standard_library_alone(reference):
    own = ".".join(("clipcore", *reference.parent.relative_to(PACKAGE).parts))
    others = {name for name in imports(reference) if not name.startswith(own)}
    assert {name.partition(".")[0] for name in others} - set(sys.stdlib_module_names) <= {"numpy"}


@pytest.mark.parametrize("user", sorted(path.name for path in (PACKAGE / "clipping").glob("*.py")))
def test_what_users_run_does_not_import_the_definition_of_clipping(user):
    assert not [name for name in imports(PACKAGE / "clipping" / user) if "clipping.reference" in name]


def test_no_file_of_the_core_names_a_framework_in_an_import():
    for path in PACKAGE.rglob("*.py"):
        roots = {name.partition(".")[0] for name in imports(path)}
        assert not roots & {"torch", "tensorflow", "keras", "tf_keras", "jax"}, path


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        clipcore.nonsense  # noqa: B018
