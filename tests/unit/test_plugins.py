"""Backends are found by name, by object or by environment; a broken one is a clear error that harms no other."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest

import clipcore as cc


def plugin(folder, name, source, *, distribution=None, module=None):
    """A distribution with one backend, as an installer leaves it: a module and a dist-info folder."""
    distribution, module = distribution or f"clipcore-{name}", module or f"{name}_plugin"
    (folder / f"{module}.py").write_text(textwrap.dedent(source))
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[clipcore]\n{name} = {module}\n")


HEALTHY = """
    import clipcore as cc
    from clipcore.numpy_backend import NumpyBackend

    class Tensor:
        pass

    class Backend(NumpyBackend):
        name = "healthy"

    @cc.hookimpl
    def clipcore_root_modules():
        return ["healthy_plugin"]

    @cc.hookimpl
    def clipcore_backend():
        return Backend()
"""


def run(folder, code, **environment):
    """What a fresh interpreter prints that has the folder's distributions installed."""
    import os

    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or result.stderr.strip().splitlines()[-1]


def test_numpy_is_a_backend_like_any_other():
    assert "numpy" in cc.backends()
    assert cc.get_backend("numpy").name == "numpy"
    assert cc.backend_of(np.zeros(3)).name == "numpy"
    assert cc.backend_of(np.float32(1)).name == "numpy"


def test_a_missing_backend_is_named_with_the_command_that_installs_it():
    with pytest.raises(cc.BackendError, match=r"'jax' is not installed: pip install clipcore-jax \(installed: .*numpy"):
        cc.get_backend("jax")


def test_an_object_of_no_backend_is_named_with_its_type():
    with pytest.raises(cc.BackendError, match=r"type builtins\.object.*installed: "):
        cc.backend_of(object())


def test_a_plugin_is_found_by_name_and_by_object_and_listing_imports_none(tmp_path):
    plugin(tmp_path, "healthy", HEALTHY)
    code = """
        import sys
        import clipcore as cc
        names = cc.backends()
        assert "healthy_plugin" not in sys.modules
        import healthy_plugin
        print("healthy" in names, cc.get_backend("healthy").name, cc.backend_of(healthy_plugin.Tensor()).name)
    """
    assert run(tmp_path, code) == "True healthy healthy"


def test_the_environment_names_the_default(tmp_path):
    plugin(tmp_path, "healthy", HEALTHY)
    code = "import clipcore as cc; print(cc.get_backend().name)"
    assert run(tmp_path, code, CLIPCORE_BACKEND="healthy") == "healthy"
    assert run(tmp_path, code, CLIPCORE_BACKEND="") == "numpy"
    assert "'nonsense' is not installed" in run(tmp_path, code, CLIPCORE_BACKEND="nonsense")


@pytest.mark.parametrize("fault", ["raise RuntimeError('no driver')", "import a_module_that_is_not_there"])
def test_a_backend_that_breaks_at_import_is_named_and_the_others_keep_working(tmp_path, fault):
    plugin(tmp_path, "broken", fault)
    plugin(tmp_path, "healthy", HEALTHY)
    code = """
        import clipcore as cc
        import numpy as np
        assert {"broken", "healthy", "numpy"} <= set(cc.backends())
        try:
            cc.get_backend("broken")
        except cc.BackendError as err:
            print(err)
        assert cc.get_backend("healthy").name == "healthy"
        assert cc.clip(np.array([3.0, 4.0]), cc.ClipByNorm(1.0))[1].norm == 5
        import healthy_plugin
        assert cc.backend_of(healthy_plugin.Tensor()).name == "healthy"
    """
    said = run(tmp_path, code)
    assert "'broken' is installed (by clipcore-broken) but cannot be imported" in said
    assert "no driver" in said or "a_module_that_is_not_there" in said


def test_a_plugin_without_hooks_is_told_which_one_it_lacks(tmp_path):
    plugin(tmp_path, "empty", "x = 1")
    code = "import clipcore as cc; cc.get_backend('empty')"
    assert "does not implement clipcore_backend" in run(tmp_path, code)


def test_a_backend_named_twice_is_an_error_that_names_both_owners_and_the_others_keep_working(tmp_path):
    plugin(tmp_path, "healthy", HEALTHY)
    plugin(tmp_path, "healthy", HEALTHY, distribution="clipcore-other", module="other_plugin")
    code = """
        import clipcore as cc
        assert cc.backends().count("healthy") == 1
        assert cc.get_backend("numpy").name == "numpy"
        cc.get_backend("healthy")
    """
    said = run(tmp_path, code)
    assert "'healthy' is named twice" in said
    assert "clipcore-healthy" in said
    assert "clipcore-other" in said


@pytest.mark.parametrize(
    "fault",
    [
        "raise SystemExit('no GPU')",
        "import clipcore as cc\n@cc.hookimpl\ndef clipcore_backend(surprise): pass",
        "import clipcore as cc\n@cc.hookimpl\ndef clipcore_root_modules(): return 5\n"
        "@cc.hookimpl\ndef clipcore_backend(): return 5",
    ],
)
def test_whatever_a_plugin_does_wrong_is_its_own_backend_error(tmp_path, fault):
    plugin(tmp_path, "faulty", fault)
    code = """
        import clipcore as cc
        for ask in (lambda: cc.get_backend("faulty"), lambda: cc.backend_of(object())):
            try:
                ask()
            except cc.BackendError as err:
                assert "faulty" in str(err), err
        print(cc.get_backend("numpy").name)
    """
    assert run(tmp_path, code) == "numpy"


def test_two_threads_may_be_the_first_to_ask(tmp_path):
    source = textwrap.dedent(HEALTHY).replace('"healthy"', '"slow"')
    plugin(tmp_path, "slow", f"import time; time.sleep(0.2)\n{source}")
    code = """
        import threading
        import clipcore as cc
        names = []
        threads = [threading.Thread(target=lambda: names.append(cc.get_backend("slow").name)) for _ in range(6)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(len(names))
    """
    assert run(tmp_path, code) == "6"


def claiming(name, *roots):
    """A healthy plugin of another name that claims other root modules."""
    source = HEALTHY.replace('["healthy_plugin"]', repr(list(roots)))
    return source.replace('"healthy"', repr(name)) + "    class Array(np.ndarray):\n        pass\n"


LOOKUPS = {
    "at once": "",
    "after one that finds nothing": "    try: cc.backend_of(object())\n    except cc.BackendError: pass\n",
    "after the stranger was asked for": "    cc.get_backend('stranger')\n",
    "after an object of the stranger": "    cc.backend_of(stranger_plugin.Tensor())\n",
}


@pytest.mark.parametrize("before", LOOKUPS.values(), ids=LOOKUPS)
def test_no_backend_takes_over_a_framework_whatever_was_asked_before(tmp_path, before):
    plugin(tmp_path, "stranger", "    import numpy as np\n" + claiming("stranger", "numpy", "stranger_plugin"))
    code = f"""
    import clipcore as cc, numpy as np, stranger_plugin
{before}
    print(cc.backend_of(np.ones(1)).name, cc.backend_of(np.ones(1).view(stranger_plugin.Array)).name)
    """
    assert run(tmp_path, code) == "numpy stranger"


@pytest.mark.parametrize("before", ["", "cc.backend_of(first_plugin.Array(1))"])
def test_a_module_that_two_backends_claim_is_an_error_that_names_both(tmp_path, before):
    plugin(tmp_path, "first", "    import numpy as np\n" + claiming("first", "first_plugin", "fractions"))
    plugin(tmp_path, "second", claiming("second", "fractions").partition("    class Array")[0])
    code = f"""
        import clipcore as cc, first_plugin, fractions
        {before}
        cc.backend_of(fractions.Fraction(1))
    """
    assert "'fractions' are claimed by the backends 'first' and 'second': uninstall" in run(tmp_path, code)


def test_a_backend_of_another_name_than_its_entry_point_is_refused(tmp_path):
    plugin(tmp_path, "other", HEALTHY)
    said = run(tmp_path, "import clipcore as cc; cc.get_backend('other')")
    assert "backend 'other': clipcore_backend returned one whose name is 'healthy'" in said


def test_a_backend_that_is_installed_meanwhile_is_found(tmp_path):
    plugin(tmp_path, "healthy", HEALTHY)
    (tmp_path / "clipcore_healthy-1.0.dist-info").rename(tmp_path / "elsewhere")
    code = f"""
        import clipcore as cc, healthy_plugin, pathlib
        try:
            cc.backend_of(healthy_plugin.Tensor())
        except cc.BackendError:
            pathlib.Path({str(tmp_path / "elsewhere")!r}).rename({str(tmp_path / "clipcore_healthy-1.0.dist-info")!r})
        print(cc.backend_of(healthy_plugin.Tensor()).name)
    """
    assert run(tmp_path, code) == "healthy"
