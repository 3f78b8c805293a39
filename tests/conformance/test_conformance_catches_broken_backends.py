"""Conformance is run against backends that are wrong on purpose: each must fail, and in the check that names its fault.

Each stands in a folder as an installed distribution does, and is found, imported and tested in a process of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BROKEN = Path(__file__).parent / "broken"
SUITE = "clipcore.testing.conformance"

# the class of the backend, and the check that must fail, with the module that it is in
TENSORS = {
    "NegatesWhatIsClipped": "test_norms::test_clip_by_global_norm_equals_the_reference_in_every_bit",
    "WidensWhatIsClipped": "test_norms::test_clip_by_norm_equals_the_reference_in_every_bit",
    "WritesIntoTheInput": "test_norms::test_the_input_is_not_modified",
    "CopiesInRange": "test_norms::test_in_range_the_same_tensors_come_back",
    "SwallowsNan": "test_nonfinite::test_propagate_makes_every_element_of_every_tensor_nan",
    "CountsTensorsNotElements": "test_nonfinite::test_the_report_counts_the_faults[propagate]",
    "WritesIntoCopies": "test_in_place::test_clipping_norms_in_place_gives_the_same_bits",
    "ForgetsTheSignOfZero": "test_values::test_a_zero_in_range_keeps_its_sign[float32]",
    "SumsInHalfPrecision": "test_primitives::test_primitives_sum_squares_in_float64[float32]",
    "AddsAnEpsilonToTheNorm": "test_primitives::test_primitives_clip_mixed_dtypes_within_one_ulp",
    "PrimitivesWriteIntoTheInput": "test_primitives::test_primitives_do_not_modify_the_input",
    "ExceedsTheLimitOfNone": "test_primitives::test_primitives_leave_what_is_in_range_in_every_bit",
    "TakesColumnsForRows": "test_units::test_each_unit_is_held_to_its_own_weights",
    "HoldsALittleLower": "test_units::test_equal_elements_at_the_threshold_of_their_rms_are_in_range[3-float64]",
    "KeepsBoundsAlmost": "test_examples::test_the_bound_is_never_exceeded_by_what_is_stored[float32]",
    "PrimitivesKeepBoundsAlmost": "test_limits::test_primitives_keep_max_norm_and_are_near_the_largest",
    "KeepsBoundsByFar": "test_limits::test_max_norm_equals_the_reference_in_every_bit[float32]",
    "ForgetsTheFloor": "test_limits::test_units_below_and_above_the_range_are_scaled_into_it",
    "SumsExamplesNarrowly": "test_examples::test_sums_are_those_of_float64_example_after_example[float32]",
    "AveragesExamples": "test_examples::test_each_example_is_bounded_and_then_all_are_summed",
    "LearnsFromFaults": "test_adaptive::test_a_step_with_a_fault_never_changes_the_state[skip]",
    "TakesTheNearestPercentile": "test_adaptive::test_every_step_equals_the_reference[AutoClip]",
    "LearnsFromSpikes": "test_adaptive::test_a_spike_does_not_enter_its_own_threshold[SpikeClip]",
    "OverwritesTheState": "test_adaptive::test_neither_gradients_nor_the_state_are_modified",
    "LetsOtherGroupsPass": "test_combine::test_a_fault_in_one_group_acts_on_all[propagate]",
}
COMPUTES = "test_layers::test_a_plain_layer_computes_what_the_reference_says"
LAYERS = {
    "TransposesLinearKernels": f"{COMPUTES}[square linear]",
    "TransposesEmbeddings": f"{COMPUTES}[embedding]",
    "SwapsGroupsAndOutputs": f"{COMPUTES}[depthwise conv]",
    "SwapsScaleAndBias": f"{COMPUTES}[batch_norm]",
    "IgnoresEps": f"{COMPUTES}[layer_norm]",
    "IgnoresDilation": "test_layers::test_any_layer_of_a_kind_computes_what_the_reference_says[conv]",
    "DropsBiases": "test_layers::test_weights_are_read_back_as_they_were_written[linear]",
    "RunsInTrainingMode": "test_layers::test_running_a_model_changes_none_of_its_tensors[batch_norm]",
    "KeepsWhatIsWritten": "test_layers::test_a_model_keeps_no_reference_to_what_was_written[linear]",
    "KeepsViews": "test_layers::test_what_is_read_to_keep_stays_as_it_was[linear]",
    "WritesBeforeItChecks": "test_layers::test_a_write_of_another_shape_is_refused_and_writes_nothing[conv]",
    "IgnoresWhatAWatcherGivesBack": "test_layers::test_a_watcher_replaces_what_flows_in_and_out[linear]",
    "TakesTheResetGateForTheUpdateGate": f"{COMPUTES}[square gru]",
    "SumsTheBiasesOfAGru": f"{COMPUTES}[gru]",
    "KeepsOneBiasOfTwo": f"{COMPUTES}[lstm]",
    "OrdersGatesAsInputForgetOutputCell": f"{COMPUTES}[square lstm]",
    "TakesOneGateTwice": "test_layers::test_parts_of_a_stored_tensor_are_apart_and_fill_it[lstm]",
    "GivesReversedSequencesInTheOrderOfTime": f"{COMPUTES}[reversed rnn]",
    "SwapsHeadsAndTheirSizes": f"{COMPUTES}[attention]",
    "ListsValueBeforeKey": "test_layers::test_a_watcher_sees_the_four_linear_layers_of_attention[attention]",
    "FlipsTransposedKernels": f"{COMPUTES}[square conv_transpose]",
    "SwapsInAndOutOfTransposedKernels": f"{COMPUTES}[square conv_transpose]",
    "NormalisesEachChannelAlone": f"{COMPUTES}[group_norm]",
    "DividesByTheRootWithoutEps": f"{COMPUTES}[rms_norm]",
    "PutsSlopesOnTheLastAxis": f"{COMPUTES}[prelu]",
    "NormalisesWeightsOverTheOutputs": f"{COMPUTES}[linear with weight norm]",
    "HasOneSlopeForAll": f"{COMPUTES}[leaky_relu]",
    "AlwaysCountsWhatIsPadded": "test_layers::test_any_layer_of_a_kind_computes_what_the_reference_says[avg_pool]",
}


def install(folder: Path, module: str, name: str) -> None:
    """A distribution with one plugin, as pip leaves it in a folder of sys.path."""
    (folder / "broken_plugin.py").write_text(
        f"""
from clipcore import hookimpl


@hookimpl
def clipcore_root_modules():
    return ["{module}"]


@hookimpl
def clipcore_backend():
    import {module}

    return {module}.{name}()
"""
    )
    metadata = folder / "clipcore_broken-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: clipcore-broken\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[clipcore]\nbroken = broken_plugin\n")


def conformance(
    folder: Path, name: str, module: str = "", check: str = "", **variables: str
) -> tuple[int, set[str], str]:
    """The exit status, the tests that failed or could not run, and the output: of the suite, a module, or one check."""
    command = [sys.executable, "-m", "pytest", "-p", "clipcore.testing.plugin", "-p", "no:cacheprovider", "-q", "-rfE"]
    command += ["--tb=no", "--hypothesis-profile=clipcore-quick", "--pyargs", f"{SUITE}{module}", "--backend", name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(BROKEN)]), **variables}
    command += ["-k", check] if check else []
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    failed = re.findall(r"^(?:FAILED|ERROR) \S*::(test_\w+(?:\[.*?\])?)", done.stdout, re.MULTILINE)
    return done.returncode, set(failed), done.stdout + done.stderr


def assert_caught(folder: Path, plugin: str, name: str, check: str) -> None:
    install(folder, plugin, name)
    module, _, test = check.partition("::")
    status, failed, output = conformance(folder, "broken", f".{module}", test.partition("[")[0])
    assert status == 1, output
    assert test in failed, output


@pytest.mark.parametrize(("name", "check"), TENSORS.items(), ids=TENSORS)
def test_a_broken_backend_fails_the_check_that_names_its_fault(tmp_path, name, check):
    assert_caught(tmp_path, "broken_tensors", name, check)


@pytest.mark.needs("torch")
@pytest.mark.parametrize(("name", "check"), LAYERS.items(), ids=LAYERS)
def test_broken_layers_fail_the_check_that_names_their_fault(tmp_path, name, check):
    assert_caught(tmp_path, "broken_layers", name, check)


def test_the_backend_that_the_broken_ones_are_made_of_passes_everything(tmp_path):
    install(tmp_path, "broken_tensors", "Healthy")
    status, failed, output = conformance(tmp_path, "broken")
    assert (status, failed) == (0, set()), output


@pytest.mark.needs("torch")
def test_the_layers_that_the_broken_ones_are_made_of_pass_everything(tmp_path):
    install(tmp_path, "broken_layers", "Healthy")
    status, failed, output = conformance(tmp_path, "broken", ".test_layers")
    assert (status, failed) == (0, set()), output


@pytest.mark.parametrize("plain", ["0", "1"], ids=["fast kernels", "NumPy's"])
def test_an_installed_backend_passes_everything(tmp_path, backend, plain):
    status, failed, output = conformance(tmp_path, backend.name, NUMBA_DISABLE_JIT=plain)
    assert (status, failed) == (0, set()), output
