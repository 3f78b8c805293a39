"""Clipping in place: the same bits as `clip`, in the same memory; what cannot be written is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clipcore as cc
from clipcore.backend import Backend
from clipcore.testing import checks
from clipcore.testing.strategies import DTYPES, Case, norm_cases, value_cases
from clipcore.testing.tensors import as_arrays, as_tensor, as_tensors


@pytest.fixture(scope="module")
def mutable(backend: Backend) -> bool:
    """Whether the framework's plain tensors can be written: it is the framework that says so."""
    try:
        cc.clip_(as_tensor(backend, np.array([3.0, 4.0])), cc.ClipByGlobalNorm(1.0), backend=backend.name)
    except cc.InvalidInput:
        return False
    return True


def check_in_place(backend: Backend, mutable: bool, case: Case) -> None:
    """Written with the bits that `clip` gives, or refused and left alone."""
    tensors = as_tensors(backend, case.tensors)
    if mutable:
        report = cc.clip_(tensors, case.policy, backend=backend.name)
        wanted, other = cc.clip(as_tensors(backend, case.tensors), case.policy, backend=backend.name)
        checks.assert_same_bits(as_arrays(backend, tensors), as_arrays(backend, wanted))
        assert (bool(report.clipped), int(report.nonfinite)) == (bool(other.clipped), int(other.nonfinite))
        checks.assert_norm(report.norm, float(other.norm))
    else:
        with pytest.raises(cc.InvalidInput):
            cc.clip_(tensors, case.policy, backend=backend.name)
        checks.assert_same_bits(as_arrays(backend, tensors), case.tensors)


@given(case=norm_cases())
def test_clipping_norms_in_place_gives_the_same_bits(backend: Backend, mutable: bool, case: Case) -> None:
    check_in_place(backend, mutable, case)


@given(case=value_cases())
def test_clipping_values_in_place_gives_the_same_bits(backend: Backend, mutable: bool, case: Case) -> None:
    check_in_place(backend, mutable, case)


@pytest.mark.parametrize("mode", ["propagate", "zero", "skip"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_faults_in_place_give_the_same_bits(backend: Backend, mutable: bool, mode: Any, dtype: str) -> None:
    tensors = [np.array([math.inf, 3.0, -4.0], dtype), np.array([[1.0], [2.0]], dtype)]
    check_in_place(backend, mutable, Case(tensors, tensors, cc.ClipByGlobalNorm(1.0, nonfinite=mode)))


def test_raise_in_place_changes_nothing(backend: Backend) -> None:
    inputs = [np.array([3.0, 4.0]), np.array([math.nan])]
    tensors = as_tensors(backend, inputs)
    with pytest.raises((cc.NonFinite, cc.InvalidInput)):
        cc.clip_(tensors, cc.ClipByGlobalNorm(1.0, nonfinite="raise"), backend=backend.name)
    checks.assert_same_bits(as_arrays(backend, tensors), inputs)


def test_one_memory_in_two_places_is_scaled_once(backend: Backend, mutable: bool) -> None:
    tensor = as_tensor(backend, np.array([3.0, 4.0]))
    if not mutable:
        with pytest.raises(cc.InvalidInput):
            cc.clip_([tensor, tensor], cc.ClipByGlobalNorm(1.0), backend=backend.name)
        return
    cc.clip_([tensor, tensor], cc.ClipByNorm(2.5), backend=backend.name)
    checks.assert_same_bits(as_arrays(backend, tensor), [np.array([1.5, 2.0])])


@pytest.mark.parametrize("policy", [cc.ClipByGlobalNorm(1.0), cc.ClipByNorm(1.0)], ids=repr)
def test_one_weight_in_two_places_counts_once(models: Any, policy: cc.Policy) -> None:
    model = models.build_layer("linear", {"activation": None}, {"kernel": (1, 2), "bias": (1,)})
    (layer,) = models.layers(model)
    values = {"kernel": np.array([3.0, 4.0], np.float32), "bias": np.zeros(1, np.float32)}
    models.write(model, {t.name: values[role].reshape(t.shape) for role, t in layer.tensors.items()})
    weights = [models.detached(weight) for weight in models.weights(model)]
    report = cc.clip_([*weights, *weights], policy, backend=models.name)
    checks.assert_norm(report.norm, 5.0)


@pytest.mark.parametrize("policy", [cc.ClipByGlobalNorm(0.5), cc.ClipByNorm(0.5), cc.ClipByValue(0.25)], ids=repr)
@given(seed=st.integers(0, 2**32 - 1))
def test_limiting_the_weights_of_a_model_gives_the_same_bits(models: Any, policy: cc.Policy, seed: int) -> None:
    shapes = {"kernel": (3, 2), "bias": (3,)}
    model = models.build_layer("linear", {"activation": None}, shapes)
    rng = np.random.default_rng(seed)
    (layer,) = models.layers(model)
    values = {t.name: rng.uniform(0.5, 1.0, t.shape).astype(np.float32) for t in layer.tensors.values()}
    models.write(model, values)
    report = cc.limit_(model, policy)
    assert report.clipped
    read = models.read(model, list(values))
    checks.assert_like_reference([np.array(read[name]) for name in values], policy, list(values.values()))


RAISING: list[cc.Policy] = [
    cc.PerGroup({"a": cc.ClipByNorm(1.0, nonfinite="raise")}, default=cc.ClipByNorm(1.0, nonfinite="raise")),
    cc.Chain([cc.ClipByValue(1.0, nonfinite="raise"), cc.ClipByGlobalNorm(1.0, nonfinite="raise")]),
    cc.AdaptiveClip(exclude=("b",), unit_axis=0, nonfinite="raise"),
    cc.MaxNorm(1.0, unit_axis=0, nonfinite="raise"),
]


@pytest.mark.parametrize("policy", RAISING, ids=lambda policy: type(policy).__name__)
def test_a_fault_in_the_last_part_leaves_the_first_as_it_was(
    backend: Backend, mutable: bool, policy: cc.Policy
) -> None:
    inputs = {"a": np.array([[3.0, 4.0]]), "b": np.array([math.nan])}
    tensors = as_tensors(backend, inputs)
    with pytest.raises(cc.NonFinite if mutable else (cc.NonFinite, cc.InvalidInput)):
        cc.clip_(tensors, policy, params=tensors if policy.asks else None, backend=backend.name)
    checks.assert_same_bits(as_arrays(backend, tensors), list(inputs.values()))
