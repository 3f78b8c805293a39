"""For authors of backends: hypothesis strategies, checks, and the conformance suite as a pytest plugin.

From any folder, against what is installed:

    pytest -p clipcore.testing.plugin --pyargs clipcore.testing.conformance --backend torch
"""

try:
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
except ImportError as err:
    raise ImportError(f"clipcore.testing needs {err.name}: pip install 'clipcore[testing]'") from err
