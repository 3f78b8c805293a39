"""Policies that learn, step by step: against the reference, their states, and what must not enter these."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clipcore as cc
from clipcore.backend import Backend
from clipcore.clipping import reference
from clipcore.clipping.given import Given, Spec
from clipcore.testing import checks
from clipcore.testing.strategies import ADAPTIVE, REAL_DTYPES, Run, runs
from clipcore.testing.tensors import as_arrays, as_tensor, as_tensors

Array = np.ndarray[Any, np.dtype[Any]]

# of a limit, which comes from norms that are known to 1e-14, and for ZClip from their differences
LIMIT_TOLERANCE = 1e-13


def clip(backend: Backend, clipper: cc.Clipper, arrays: Any) -> tuple[list[Array], cc.ClipReport]:
    clipped, report = clipper.clip(as_tensors(backend, arrays))
    return as_arrays(backend, clipped), report


def between(policy: Any, arrays: list[Array], limit: Any) -> list[list[Array]]:
    """What the reference makes of a step with a limit that is a little lower, and a little higher."""
    ends = []
    for sign in (-1, 1):
        if isinstance(limit, list):
            moved = [own * (1 + sign * LIMIT_TOLERANCE) for own in limit]
            ends.append([reference.clip_by_norm([t], own)[0][0] for t, own in zip(arrays, moved, strict=True)])
        elif isinstance(policy, cc.QuantileClip):
            ends.append(reference.per_example_clip(arrays, limit * (1 + sign * LIMIT_TOLERANCE))[0])
        else:
            ends.append(reference.clip_by_global_norm(arrays, limit * (1 + sign * LIMIT_TOLERANCE))[0])
    return ends


def same(actual: list[Array], wanted: list[Array]) -> bool:
    return all(a.dtype == w.dtype and np.array_equal(a, w) for a, w in zip(actual, wanted, strict=True))


def check_step(policy: Any, arrays: list[Array], actual: list[Array], wanted: list[Array], limit: Any) -> None:
    if isinstance(policy, cc.SpikeClip) or math.isnan(np.min(limit, initial=math.inf)) or same(actual, wanted):
        checks.assert_same_bits(actual, wanted)
    elif isinstance(policy, cc.QuantileClip):
        # a sum of several examples need not lie between two others
        room = LIMIT_TOLERANCE * sum(float(np.abs(t).astype(np.float64).sum()) for t in arrays)
        checks.assert_close(actual, wanted, ulps=4, relative=LIMIT_TOLERANCE, absolute=room)
        for a, low, high in zip(actual, *between(policy, arrays, limit), strict=True):
            assert not np.array_equal(low, high) or same([a], [low])
    else:
        checks.assert_between(actual, *between(policy, arrays, limit))


def check_run(backend: Backend, run: Run) -> None:
    clipper = cc.Clipper(run.policy, backend=backend.name)
    state: Any = []
    for arrays in run.steps:
        wanted, state, limit = checks.expected_step(run.policy, arrays, state)
        finite = [np.where(np.isfinite(t), t, np.zeros_like(t)) for t in arrays]
        actual, report = clip(backend, clipper, arrays)
        check_step(run.policy, finite if run.policy.nonfinite == "zero" else arrays, actual, wanted, limit)
        if not (isinstance(run.policy, cc.SpikeClip) or math.isnan(np.min(limit, initial=math.inf))):
            assert float(report.limit) == pytest.approx(np.min(limit, initial=math.inf), rel=LIMIT_TOLERANCE)
        assert int(report.nonfinite) == sum(int((~np.isfinite(t)).sum()) for t in arrays)


@pytest.mark.parametrize("kind", ADAPTIVE, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_every_step_equals_the_reference(backend: Backend, kind: Any, data: st.DataObject) -> None:
    check_run(backend, data.draw(runs([kind], faults=False)))


@pytest.mark.parametrize("mode", ["propagate", "zero", "skip"])
@given(data=st.data())
def test_steps_with_faults_equal_the_reference(backend: Backend, mode: Any, data: st.DataObject) -> None:
    check_run(backend, data.draw(runs(nonfinite=mode)))


@given(run=runs(faults=False))
def test_the_reported_norm_of_every_step_is_within_1e_14(backend: Backend, run: Run) -> None:
    clipper = cc.Clipper(run.policy, backend=backend.name)
    for arrays in run.steps:
        _, report = clip(backend, clipper, arrays)
        checks.assert_norm(report.norm, reference.clip_by_global_norm(arrays, math.inf)[1])


def assert_same_state(actual: dict[str, Array], wanted: dict[str, Array]) -> None:
    assert list(actual) == list(wanted)
    checks.assert_same_bits(list(actual.values()), list(wanted.values()))


@pytest.mark.parametrize("mode", ["propagate", "skip", "raise"])
@given(data=st.data())
def test_a_step_with_a_fault_never_changes_the_state(backend: Backend, mode: Any, data: st.DataObject) -> None:
    run = data.draw(runs(nonfinite=mode))
    clipper = cc.Clipper(run.policy, backend=backend.name)
    for arrays, faulty in zip(run.steps, run.faulty, strict=True):
        before = clipper.state_dict()
        if faulty and mode == "raise":
            with pytest.raises(cc.NonFinite, match=r"first in grads\[\d\]"):
                clip(backend, clipper, arrays)
        else:
            clip(backend, clipper, arrays)
        if faulty and before:
            assert_same_state(clipper.state_dict(), before)


@given(run=runs())
def test_a_state_is_numpy_arrays_that_are_finite(backend: Backend, run: Run) -> None:
    clipper = cc.Clipper(run.policy, backend=backend.name)
    assert clipper.state_dict() == {}
    for arrays in run.steps:
        clip(backend, clipper, arrays)
        for name, value in clipper.state_dict().items():
            assert name.startswith(f"{type(run.policy).__name__}.")
            assert type(value) is np.ndarray
            assert np.isfinite(value).all()


@pytest.mark.parametrize("dtype", REAL_DTYPES)
@pytest.mark.parametrize("kind", ADAPTIVE, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_gradients_at_the_ends_of_their_range_leave_the_state_finite(
    backend: Backend, kind: Any, dtype: str, data: st.DataObject
) -> None:
    policy = data.draw(ADAPTIVE[kind]("propagate"))
    clipper = cc.Clipper(policy, backend=backend.name)
    ends = checks.finfo(np.dtype(dtype))
    values = st.sampled_from([ends.max, ends.min, ends.tiny, 0.0, 1.0])
    for step in data.draw(st.lists(st.lists(values, min_size=3, max_size=3), min_size=2, max_size=6)):
        clip(backend, clipper, [np.array(step).astype(dtype)[:, None]])
        for name, value in clipper.state_dict().items():
            assert np.isfinite(value).all(), name


@given(run=runs(), data=st.data())
def test_saved_and_loaded_at_any_step_it_goes_on_with_the_same_bits(
    backend: Backend, run: Run, data: st.DataObject
) -> None:
    stop = data.draw(st.integers(0, len(run.steps) - 1))
    whole, first, second = (cc.Clipper(run.policy, backend=backend.name) for _ in range(3))
    for arrays in run.steps[:stop]:
        clip(backend, whole, arrays)
        clip(backend, first, arrays)
    second.load_state_dict(first.state_dict())
    assert_same_state(second.state_dict(), first.state_dict())
    for arrays in run.steps[stop:]:
        checks.assert_same_bits(clip(backend, second, arrays)[0], clip(backend, whole, arrays)[0])
    assert_same_state(second.state_dict(), whole.state_dict())


@given(run=runs())
def test_neither_gradients_nor_the_state_are_modified(backend: Backend, run: Run) -> None:
    tensors = as_tensors(backend, run.steps[0])
    state: Any = run.policy.init(tensors, backend=backend.name)
    for arrays in run.steps:
        tensors = as_tensors(backend, arrays)
        before = {
            name: np.array(backend.to_numpy(value) if backend.is_tensor(value) else value)
            for name, value in state.items()
        }
        kept = dict(state)
        _, after, _ = run.policy.update(tensors, state, backend=backend.name)
        checks.assert_same_bits(as_arrays(backend, tensors), arrays)
        assert state == kept or all(state[name] is kept[name] for name in kept)
        held = [np.array(backend.to_numpy(v) if backend.is_tensor(v) else v) for v in state.values()]
        checks.assert_same_bits(held, list(before.values()))
        state = after


@pytest.mark.parametrize("kind", ADAPTIVE, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_update_and_clipper_are_one(backend: Backend, kind: Any, data: st.DataObject) -> None:
    run = data.draw(runs([kind]))
    clipper = cc.Clipper(run.policy, backend=backend.name)
    state: Any = run.policy.init(as_tensors(backend, run.steps[0]), backend=backend.name)
    for arrays in run.steps:
        clipped, state, _ = run.policy.update(as_tensors(backend, arrays), state, backend=backend.name)
        checks.assert_same_bits(as_arrays(backend, clipped), clip(backend, clipper, arrays)[0])


@pytest.mark.parametrize(
    "policy",
    [
        cc.AutoClip(100.0),
        cc.ZClip(warmup=2),
        cc.AdaGC(math.inf, warmup=2),
        cc.AdaGC(warmup=5),
        cc.SpikeClip(warmup=2),
        cc.SpikeClip(0.01, warmup=5),
    ],
    ids=repr,
)
def test_steps_in_range_come_back_as_the_same_tensors(backend: Backend, policy: cc.Policy) -> None:
    clipper = cc.Clipper(policy, backend=backend.name)
    for size in (0.1, 0.11, 0.1, 0.105):
        tensors = as_tensors(backend, [np.full(7, size, np.float32), np.full((2, 2), -size)])
        clipped, report = clipper.clip(tensors)
        checks.assert_same_objects(clipped, tensors)
        assert (float(report.scale), bool(report.clipped)) == (1.0, False)


@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(["float32", "float64"]))
def test_a_norm_that_is_the_percentile_is_in_range(backend: Backend, seed: int, dtype: str) -> None:
    """The first norm is: whichever way it was summed, it is the same number."""
    arrays = [np.random.default_rng(seed).standard_normal(37).astype(dtype)]
    tensors = as_tensors(backend, arrays)
    clipped, _ = cc.Clipper(cc.AutoClip(), backend=backend.name).clip(tensors)
    checks.assert_same_objects(clipped, tensors)


@pytest.mark.parametrize(
    "policy",
    [cc.ZClip(warmup=3), cc.AdaGC(10.0, warmup=3), cc.SpikeClip(4.0, decay=0.5, warmup=3)],
    ids=lambda policy: type(policy).__name__,
)
def test_a_spike_does_not_enter_its_own_threshold(backend: Backend, policy: cc.Policy) -> None:
    """After it the state is within what usual steps make of it, and a second spike is clipped as well."""
    clipper, usual = cc.Clipper(policy, backend=backend.name), np.array([1.0, -1.1, 0.9])
    for size in (1.0, 1.1, 0.9, 1.0):
        clip(backend, clipper, usual * size)
    for _ in range(3):
        (clipped,), report = clip(backend, clipper, usual * 1e6)
        assert bool(report.clipped)
        assert np.abs(clipped).max() < 10
    (clipped,), _ = clip(backend, clipper, usual)
    np.testing.assert_allclose(clipped, usual, rtol=0.1)


def test_a_spike_enters_the_percentile_of_autoclip(backend: Backend) -> None:
    clipper = cc.Clipper(cc.AutoClip(100.0), backend=backend.name)
    for norm in (1.0, 1e6):
        _, report = clip(backend, clipper, [np.array([norm])])
        assert (float(report.limit), bool(report.clipped)) == (norm, False)


def test_the_window_of_autoclip_forgets(backend: Backend) -> None:
    clipper = cc.Clipper(cc.AutoClip(50.0, window=3), backend=backend.name)
    found = [float(clip(backend, clipper, [np.array([norm])])[1].limit) for norm in (9.0, 1.0, 2.0, 8.0, 4.0)]
    assert found == [9.0, 5.0, 2.0, 2.0, 4.0]


def test_a_step_of_zeros_does_not_make_adagc_forget(backend: Backend) -> None:
    clipper = cc.Clipper(cc.AdaGC(math.inf, ratio=1.0, warmup=3), backend=backend.name)
    for norm in (2.0, 0.0, 8.0):
        clip(backend, clipper, [np.array([norm])])
    (clipped,), _ = clip(backend, clipper, [np.array([8.0])])
    assert clipped.tolist() == [2.0]


def test_a_tensor_without_a_gradient_keeps_its_average(backend: Backend) -> None:
    policy = cc.AdaGC(10.0, ratio=0.5, decay=0.5, warmup=2)
    steps: list[list[float | None]] = [[6.0, 8.0], [None, 4.0], [5.0, None], [5.0, 4.0], [None, 4.0], [9.0, 9.0]]
    weights = as_tensors(backend, [np.zeros(1), np.zeros(1)])
    clipper = cc.Clipper(policy, backend=backend.name)
    state: Any = []
    for step in steps:
        arrays: list[Any] = [None if value is None else np.array([value]) for value in step]
        wanted, state, _ = checks.expected_step(policy, arrays, state)
        clipped, _ = clipper.clip(as_tensors(backend, arrays), weights)
        assert [w is None for w in wanted] == [c is None for c in clipped]
        checks.assert_close(
            as_arrays(backend, clipped), [w for w in wanted if w is not None], relative=LIMIT_TOLERANCE, absolute=0.0
        )


def test_the_quantile_moves_the_limit(backend: Backend) -> None:
    clipper = cc.Clipper(cc.QuantileClip(1.0, learning_rate=1.0), backend=backend.name)
    found = [float(clip(backend, clipper, [np.array([[8.0], [4.0]])])[1].limit) for _ in range(2)]
    assert found == pytest.approx([1.0, math.exp(0.5)])


@given(run=runs(faults=False))
def test_primitives_are_within_one_ulp_at_every_step(backend: Backend, run: Run) -> None:
    primitives, state = backend.primitives(), cast(Any, [])
    own: Any = run.policy.start([Spec(None, t.shape, t.dtype.name) for t in run.steps[0]])
    for arrays in run.steps:
        wanted, state, _ = checks.expected_step(run.policy, arrays, state)
        tensors = as_tensors(backend, arrays)
        given = Given(tensors, primitives, slots=range(len(tensors)))
        adopted = {name: primitives.adopt(value, tensors[0]) for name, value in own.items()}
        bounded, own, _ = run.policy.bound(given, adopted)
        # a hard bound may be kept by up to two units more, by each of the examples that are summed
        ulps, total = (
            (4, sum(float(np.abs(t).astype(np.float64).sum()) for t in arrays))
            if run.policy.refuses_attach
            else (1.01, 0.0)
        )
        room = max((checks.epsilon(w) for w in wanted), default=0.0) * 3 * total
        smallest = checks.coarsest(checks.smallest_normal, arrays)
        checks.assert_close(
            as_arrays(backend, bounded), wanted, ulps=ulps, relative=LIMIT_TOLERANCE, absolute=room + smallest
        )
        own = {
            name: np.array(
                value if isinstance(value, np.ndarray | np.generic | float | int) else backend.to_numpy(value)
            )
            for name, value in own.items()
        }


def test_the_state_of_another_policy_is_refused_naming_both(backend: Backend) -> None:
    tensors = as_tensors(backend, [np.ones(2)])
    first, second = cc.Clipper(cc.ZClip(), backend=backend.name), cc.Clipper(cc.AutoClip(), backend=backend.name)
    first.clip(tensors)
    with pytest.raises(cc.InvalidInput, match=r"ZClip\.mean.*AutoClip"):
        second.load_state_dict(first.state_dict())
    with pytest.raises(cc.InvalidInput, match=r"mean.*AutoClip has.*AutoClip\.norms"):
        cc.AutoClip().update(tensors, cc.ZClip().init(tensors, backend=backend.name), backend=backend.name)


@pytest.mark.parametrize(
    ("policy", "others"),
    [
        (cc.AdaGC(), [np.ones(2), np.ones(2)]),
        (cc.SpikeClip(), [np.ones((3, 2))]),
        (cc.SpikeClip(), [np.ones(2), np.ones(2)]),
    ],
    ids=repr,
)
def test_the_state_of_tensors_of_other_shapes_is_refused_naming_both(
    backend: Backend, policy: cc.Policy, others: list[Array]
) -> None:
    clipper, loaded = (cc.Clipper(policy, backend=backend.name) for _ in range(2))
    clip(backend, clipper, [np.ones(2)])
    words = r"\(1,\).*\(2,\)|\(2,\).*\(3, 2\)|moment\.0.*moment\.1"
    with pytest.raises(cc.InvalidInput, match=words):
        clip(backend, clipper, others)
    loaded.load_state_dict(clipper.state_dict())
    with pytest.raises(cc.InvalidInput, match=words):
        clip(backend, loaded, others)


def test_a_window_of_another_length_is_refused_naming_both(backend: Backend) -> None:
    tensor = as_tensor(backend, np.ones(2))
    state = cc.AutoClip(window=3).init(tensor, backend=backend.name)
    with pytest.raises(cc.InvalidInput, match=r"AutoClip\.norms.*\(3,\).*\(1000,\)"):
        cc.AutoClip().update(tensor, state, backend=backend.name)


@pytest.mark.parametrize("kind", ADAPTIVE, ids=lambda kind: kind.__name__)
def test_one_call_alone_is_refused_with_the_remedy(backend: Backend, kind: Any) -> None:
    policy = cc.QuantileClip(1.0) if kind is cc.QuantileClip else kind()
    with pytest.raises(cc.InvalidInput, match=rf"{kind.__name__} learns.*cc\.Clipper\({kind.__name__}"):
        cc.clip(as_tensor(backend, np.ones((2, 2))), policy, backend=backend.name)


@pytest.mark.parametrize("kind", [cc.AdaGC, cc.SpikeClip], ids=lambda kind: kind.__name__)
def test_a_dict_may_come_in_another_order(backend: Backend, kind: Any) -> None:
    steps = [{"a": np.full(2, 100.0 * size), "b": np.full(2, 0.01 * size)} for size in (1.0, 1.1, 0.9)]
    clippers = [cc.Clipper(kind(warmup=1), backend=backend.name) for _ in range(2)]
    for step in steps:
        shuffled = step if step is steps[0] else dict(reversed(step.items()))
        one, other = (c.clip(as_tensors(backend, s))[0] for c, s in zip(clippers, (step, shuffled), strict=True))
        assert list(other) == list(shuffled)
        checks.assert_same_bits(as_arrays(backend, other["a"]), as_arrays(backend, one["a"]))
        checks.assert_same_bits(as_arrays(backend, other["b"]), as_arrays(backend, one["b"]))
    assert_same_state(*(clipper.state_dict() for clipper in clippers))


def test_a_step_without_examples_teaches_the_quantile_nothing(backend: Backend) -> None:
    clipper = cc.Clipper(cc.QuantileClip(1.0), backend=backend.name)
    (total,), _ = clip(backend, clipper, [np.ones((0, 3))])
    checks.assert_same_bits([total], [np.zeros(3)])
    assert clipper.state_dict()["QuantileClip.limit"] == 1.0


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"AutoClip.count": np.array(-1), "AutoClip.norms": np.ones(3)}, "AutoClip.count.*at least 0"),
        ({"AutoClip.count": np.array(1), "AutoClip.norms": np.array([math.nan, 1, 2])}, "AutoClip.norms.*finite"),
        ({"AutoClip.count": np.array(1.5), "AutoClip.norms": np.ones(3)}, "AutoClip.count.*float64.*int64"),
        ({1: np.ones(3)}, "arrays by name"),
        (None, "arrays by name"),
    ],
)
def test_a_state_that_no_policy_can_have_is_refused(backend: Backend, state: Any, words: str) -> None:
    clipper = cc.Clipper(cc.AutoClip(window=3), backend=backend.name)

    def go_on_from_it() -> None:
        clipper.load_state_dict(state)
        clip(backend, clipper, [np.ones(2)])

    with pytest.raises(cc.InvalidInput, match=words):
        go_on_from_it()
