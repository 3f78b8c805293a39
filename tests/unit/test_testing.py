"""Every check of clipcore.testing can fail, the strategies draw what they promise, and the plugin refuses to guess."""

import math
import os
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

import clipcore as cc
from clipcore.numpy_backend import NumpyBackend
from clipcore.structure import leaves
from clipcore.testing import checks
from clipcore.testing import strategies as s
from clipcore.testing.tensors import as_arrays, as_tensors

F32 = np.float32
ONE = np.array([1.0, 2.0], F32)
UP = np.nextafter(ONE, F32(9))


@pytest.mark.parametrize(
    ("actual", "wanted"),
    [
        ([UP], [ONE]),
        ([ONE.astype(np.float64)], [ONE]),
        ([ONE.reshape(1, 2)], [ONE]),
        ([ONE, ONE], [ONE]),
        ([np.array([-0.0])], [np.array([0.0])]),
        ([np.array([math.nan])], [np.array([1.0])]),
        ([np.array([1.0])], [np.array([math.nan])]),
        ([np.array([1 + 0j])], [np.array([complex(1, -0.0)])]),
        ([np.array([1.0], ml_dtypes.bfloat16)], [np.array([1.0078125], ml_dtypes.bfloat16)]),
    ],
)
def test_different_bits_are_no_same_bits(actual, wanted):
    with pytest.raises(AssertionError):
        checks.assert_same_bits(actual, wanted)


def test_the_same_bits_are_and_one_nan_is_like_another():
    other = -np.array([math.nan])
    checks.assert_same_bits([ONE, other, np.zeros((0, 2))], [ONE.copy(), np.array([math.nan]), np.zeros((0, 2))])


def test_the_first_different_element_is_named():
    with pytest.raises(AssertionError, match=r"tensor 1: .* 1 of 2 elements, first at \(1,\): .*3\.0.*expected .*2\.0"):
        checks.assert_same_bits([ONE, np.array([1, 3], F32)], [ONE, ONE])


def test_one_unit_in_the_last_place_is_close_and_two_are_not():
    checks.assert_close([UP], [ONE], absolute=0)
    with pytest.raises(AssertionError, match="off by more than"):
        checks.assert_close([np.nextafter(UP, F32(9))], [ONE], absolute=0)


def test_closeness_of_float64_takes_the_relative_bound():
    checks.assert_close([np.array([1 + 1e-15])], [np.array([1.0])], relative=1e-14, absolute=0)
    with pytest.raises(AssertionError):
        checks.assert_close([np.array([1 + 1e-13])], [np.array([1.0])], relative=1e-14, absolute=0)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_close_to_itself_alone(wrong):
    checks.assert_close([np.array([wrong])], [np.array([wrong])], absolute=0)
    for a, b in ((wrong, 1.0), (1.0, wrong)):
        with pytest.raises(AssertionError):
            checks.assert_close([np.array([a])], [np.array([b])], absolute=1.0)


@pytest.mark.parametrize(("value", "wanted"), [(5.0 * (1 + 1e-12), 5.0), (math.nan, 5.0), (5.0, math.inf), (0.0, 1e-9)])
def test_a_wrong_norm_is_found(value, wanted):
    with pytest.raises(AssertionError):
        checks.assert_norm(value, wanted)


def test_a_norm_over_its_bound_is_found():
    checks.assert_bounded([ONE], 5**0.5, 2.0)
    with pytest.raises(AssertionError, match="more than one rounding"):
        checks.assert_bounded([ONE * F32(1.000001)], 5**0.5, 2.0)


@pytest.mark.parametrize("other", [[None, {"a": ONE}], [{"a": ONE}, ONE], ({"a": ONE}, None), [{"b": ONE}, None], []])
def test_another_structure_is_found(other):
    checks.assert_same_structure([{"a": UP}, None], [{"a": ONE}, None])
    with pytest.raises(AssertionError, match="the structure is"):
        checks.assert_same_structure(other, [{"a": ONE}, None])


def test_a_copy_is_not_the_same_object():
    checks.assert_same_objects([ONE], [ONE])
    with pytest.raises(AssertionError, match=r"grads\[0\] is a new object"):
        checks.assert_same_objects([ONE.copy()], [ONE])


def test_what_differs_from_the_reference_is_found():
    policy = cc.ClipByGlobalNorm(1.0)
    clipped, _ = cc.clip([ONE], policy)
    checks.assert_like_reference(clipped, policy, [ONE])
    with pytest.raises(AssertionError):
        checks.assert_like_reference([np.nextafter(clipped[0], F32(0))], policy, [ONE])


def test_what_lies_outside_two_results_is_found():
    low, high = np.array([1.0, -0.0, -2.0]), np.array([1.0, -0.0, -1.0])
    checks.assert_between([np.array([1.0, -0.0, -1.5])], [low], [high])
    checks.assert_between([np.array([math.nan])], [np.array([math.nan])], [np.array([math.nan])])
    for wrong in ([1.1, -0.0, -1.5], [1.0, 0.0, -1.5], [1.0, -0.0, -0.9], [math.nan, -0.0, -1.5]):
        with pytest.raises(AssertionError, match="differs in 1 of 3"):
            checks.assert_between([np.array(wrong)], [low], [high])


def test_a_norm_over_its_bound_is_found_to_the_last_digit():
    checks.assert_within([np.array([3.0]), np.array([4j])], 5.0)
    checks.assert_within([np.array([1.0])], math.inf)
    # sqrt(2) in float64 is a little over the root
    checks.assert_within([np.array([1.0, 1.0])], math.sqrt(2))
    for arrays, bound in (([np.array([3.0, 4.0])], math.nextafter(5.0, 0.0)), ([np.ones(3)], math.sqrt(3))):
        with pytest.raises(AssertionError, match="over the bound"):
            checks.assert_within(arrays, bound)


def test_the_reference_of_a_policy_that_it_does_not_have_is_an_error():
    class Other(cc.Policy):
        pass

    with pytest.raises(TypeError, match="has no Other"):
        checks.expected(Other(), [ONE])


def test_a_layer_that_is_off_by_more_than_noise_is_found():
    wanted = np.array([1.0, -4.0])
    checks.assert_close_to_forward(wanted.astype(F32), wanted)
    for wrong in (wanted + 1e-4, wanted[:1], wanted * math.nan):
        with pytest.raises(AssertionError):
            checks.assert_close_to_forward(wrong, wanted)


def example(strategy, condition):
    """An example under the condition; NoSuchExample where the strategy draws none."""
    first = settings(
        max_examples=1000,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    return find(strategy, condition, settings=first)


@pytest.mark.parametrize("dtype", s.DTYPES)
@pytest.mark.parametrize(
    "condition",
    [
        lambda a: a.size == 0,
        lambda a: a.ndim == 0,
        lambda a: a.size > 1 and not a.flags.c_contiguous,
        lambda a: (np.abs(a.real.astype(float)) > 0.9 * float(ml_dtypes.finfo(a.real.dtype).max)).any(),
        lambda a: ((a.real != 0) & (np.abs(a.real.astype(float)) < float(ml_dtypes.finfo(a.real.dtype).tiny))).any(),
        lambda a: a.size > 3 and len({math.frexp(float(x))[1] for x in a.real.ravel()}) == 1,
    ],
    ids=["empty", "0-d", "not contiguous", "near overflow", "subnormal", "of one magnitude"],
)
def test_arrays_of_every_dtype_are_drawn_in_all_their_forms(dtype, condition):
    array = example(s.arrays(st.just(dtype)), condition)
    assert array.dtype.name == dtype


@given(s.arrays())
def test_arrays_are_finite_unless_asked_for(array):
    assert np.isfinite(array).all()


def test_what_is_not_finite_is_drawn_on_request():
    assert np.isnan(example(s.arrays(nonfinite=True), lambda a: np.isnan(a).any())).any()
    assert np.isinf(example(s.arrays(nonfinite=True), lambda a: np.isinf(a).any())).any()


@pytest.mark.parametrize("form", [list, tuple, dict, type(None)])
def test_structures_are_drawn_in_all_their_forms(form):
    tree = example(s.structures(s.arrays()), lambda t: isinstance(t, list) and any(isinstance(x, form) for x in t))
    assert isinstance(tree, list)


@pytest.mark.parametrize("exact", [True, False])
def test_norm_cases_have_policies_on_either_side_of_the_limit(exact):
    def is_clipped(case):
        return cc.clip(case.tensors, case.policy)[1].clipped

    for wanted in (True, False):
        case = example(
            s.norm_cases(exact=exact), lambda c, wanted=wanted: is_clipped(c) == wanted and len(c.tensors) > 1
        )
        assert checks.is_exact(case.policy, case.tensors) or not exact


@given(s.structures(s.arrays()))
def test_tensors_have_the_values_and_the_memory_of_their_arrays(tree):
    backend = cc.get_backend("numpy")
    arrays = [leaf for _, leaf in leaves(tree)]
    tensors = as_tensors(backend, tree)
    checks.assert_same_bits(as_arrays(backend, tensors), arrays)
    for (_, tensor), array in zip(leaves(tensors), arrays, strict=True):
        assert not np.shares_memory(tensor, array)
        assert tensor.flags.c_contiguous == array.flags.c_contiguous or array.size < 2


def test_values_are_read_of_tensors_that_only_their_backend_can_read():
    class Far:
        """What lies on a device, out of NumPy's reach."""

        def __array__(self, dtype=None, copy=None):
            raise TypeError("convert it to a CPU tensor first")

    class FarBackend(NumpyBackend):
        def is_tensor(self, obj):
            return isinstance(obj, Far)

        def to_host(self, tensors, *, writable=False):
            return None

        def to_numpy(self, tensor):
            return ONE

    checks.assert_same_bits(as_arrays(FarBackend(), [Far(), UP]), [ONE, UP])


def pytest_status(folder, *arguments):
    """The exit status and the output of pytest in a folder of its own."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--pyargs", "clipcore.testing.conformance"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
    done = subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


PLUGIN = ("-p", "clipcore.testing.plugin")


def test_no_backend_is_a_usage_error_that_lists_the_installed_ones(tmp_path):
    status, output = pytest_status(tmp_path, *PLUGIN)
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "--backend is missing: name the backend to test (installed: numpy" in output


def test_an_unknown_backend_is_a_usage_error_that_says_how_to_install_it(tmp_path):
    status, output = pytest_status(tmp_path, *PLUGIN, "--backend", "abacus")
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "backend 'abacus' is not installed: pip install clipcore-abacus (installed: numpy" in output


def test_the_suite_without_its_plugin_says_what_is_missing(tmp_path):
    status, output = pytest_status(tmp_path)
    assert status != pytest.ExitCode.OK
    assert "pytest -p clipcore.testing.plugin --backend NAME" in output


def test_what_a_backend_does_not_offer_is_said_with_the_number_of_checks(tmp_path):
    status, output = pytest_status(tmp_path, *PLUGIN, "--backend", "numpy", "-q", "-k", "plain_layer")
    assert status == pytest.ExitCode.OK
    (said,) = re.findall(r"(\d+) checks were skipped: not offered: backend 'numpy' has no models", output)
    assert f"{said} skipped" in output
    assert int(said) > 1
