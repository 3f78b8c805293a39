"""Policies that learn, or ask for names and layouts, on Keras optimizers: what they learn is the optimizer's."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L
from keras import optimizers as O

import clipcore as cc

RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 6, 5)).astype(np.float32)
Y = (RNG.normal(size=(48, 1)) * 10.0 ** RNG.integers(-1, 3, (48, 1))).astype(np.float32)
XLA, GRAPH, EAGER = WAYS = [{"jit_compile": True}, {"jit_compile": False}, {"run_eagerly": True}]
POLICIES: dict[str, cc.Policy] = {
    "AutoClip": cc.AutoClip(40.0, window=5),
    "ZClip": cc.ZClip(0.25, warmup=3),
    "AdaGC": cc.AdaGC(5.0, warmup=3),
    "SpikeClip": cc.SpikeClip(1.5, decay=0.5, warmup=3),
    "AGC": cc.AdaptiveClip(0.05, exclude="last"),
    "chain": cc.Chain([cc.ClipByValue(50.0), cc.ZClip(0.5, warmup=2)]),
    "per group": cc.PerGroup({"conv/": cc.AdaptiveClip(0.05), "bias$": cc.ClipByNorm(0.5)}, default=cc.AutoClip(40.0)),
}
every_policy = pytest.mark.parametrize("name", POLICIES)


# Tracing and XLA take nearly all of the time here.
def pairs(first: Sequence[Any], second: Sequence[Any], third: Sequence[Any]) -> Any:
    """Every pair of the first two lists, with the third in turn so that each of its values meets each of theirs."""
    rows = [(a, b, third[(i + j) % len(third)]) for i, a in enumerate(first) for j, b in enumerate(second)]
    return [pytest.param(*row, id="-".join(map(_named, row))) for row in rows]


def _named(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join("eager" if name == "run_eagerly" else "xla" if on else "graph" for name, on in value.items())
    return value if isinstance(value, str) else value.__name__


def plain(optimizer: Any) -> Any:
    return optimizer


def network() -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6, 5)),
            L.Conv1D(4, 3, activation="tanh", name="conv"),
            L.Flatten(),
            L.Dense(1, name="last"),
        ]
    )


WORDS = np.arange(144).reshape(48, 3) % 7


def reader() -> keras.Model:
    """A network whose first gradient is of some rows of a table."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((3,), dtype="int32"), L.Embedding(7, 2, name="table"), L.Flatten(), L.Dense(1, name="last")]
    )


def fit(model: keras.Model, epochs: int = 1, x: np.ndarray = X, y: np.ndarray = Y, **more: Any) -> Any:
    return model.fit(x, y[: len(x)], batch_size=8, epochs=epochs, shuffle=False, verbose=0, **more)


def trained(
    optimizer: Any, policy: cc.Policy, epochs: int = 1, make: Any = network, x: np.ndarray = X, **how: Any
) -> tuple[Any, cc.Attachment]:
    model = make()
    attachment = cc.attach(optimizer, policy, model)
    if "run_eagerly" not in how:
        optimizer.build(model.trainable_variables)  # else the step is traced twice
    model.compile(optimizer, "mse", **how)
    fit(model, epochs, x)
    return model, attachment


def by_hand(
    optimizer: Any, policy: cc.Policy, epochs: int = 1, make: Any = network, x: np.ndarray = X, parts: int = 1
) -> tuple[Any, cc.Clipper]:
    """The same training, the gradients dense and clipped by a Clipper."""
    model = make()
    clipper = cc.Clipper(policy, model)
    held: list[list[tf.Tensor]] = []
    for step in range(epochs * 6):
        rows = slice(step % 6 * 8, step % 6 * 8 + 8)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x[rows], training=True) - Y[rows]))
        held.append([tf.convert_to_tensor(grad) for grad in tape.gradient(loss, model.trainable_variables)])
        if len(held) == parts:
            mean = [tf.add_n(parts_of_one) / parts for parts_of_one in zip(*held, strict=True)]
            held = []
            clipped, _ = clipper.clip(mean)
            optimizer.apply_gradients(zip(clipped, model.trainable_variables, strict=True))
    return model, clipper


def assert_alike(
    model: Any, attachment: cc.Attachment, wanted: Any, clipper: cc.Clipper, tolerance: float = 1e-5
) -> None:
    for actual, target in zip(model.get_weights(), wanted.get_weights(), strict=True):
        np.testing.assert_allclose(actual, target, rtol=tolerance, atol=tolerance)
    state, target = attachment.state_dict(), clipper.state_dict()
    assert state.keys() == target.keys()
    for name, value in state.items():
        assert (value.dtype, value.shape) == (target[name].dtype, target[name].shape)
        np.testing.assert_allclose(value, target[name], rtol=tolerance, atol=1e-9, err_msg=name)


def bits(variables: Any) -> list[bytes]:
    return [v.numpy().tobytes() for v in variables]


@pytest.mark.parametrize(
    ("name", "how"),
    # of the others, test_a_table_learns_in_compiled_training has XLA compile the step
    [*((name, how) for name in POLICIES for how in (GRAPH, EAGER)), ("SpikeClip", XLA), ("per group", XLA)],
    ids=_named,
)
def test_fit_steps_and_learns_as_by_hand(name: str, how: dict[str, Any]) -> None:
    policy = POLICIES[name]
    model, attachment = trained(O.SGD(0.01, momentum=0.5), policy, **how)
    wanted, clipper = by_hand(O.SGD(0.01, momentum=0.5), policy)
    assert_alike(model, attachment, wanted, clipper)
    if "run_eagerly" in how:
        assert any(report.clipped for report in attachment.reports)
        assert bits(model.weights) == bits(wanted.weights)


@pytest.mark.parametrize(("name", "how"), [("ZClip", GRAPH), ("SpikeClip", XLA), ("per group", EAGER)], ids=_named)
def test_accumulation_learns_from_the_real_steps(name: str, how: dict[str, Any]) -> None:
    model, attachment = trained(O.SGD(0.01, gradient_accumulation_steps=2), POLICIES[name], epochs=2, **how)
    assert_alike(model, attachment, *by_hand(O.SGD(0.01), POLICIES[name], epochs=2, parts=2))


@pytest.mark.parametrize("how", WAYS, ids=_named)
@pytest.mark.parametrize(
    "scaled",
    [lambda: O.Adam(0.01, loss_scale_factor=1024.0), lambda: O.LossScaleOptimizer(O.Adam(0.01))],
    ids=["fixed", "dynamic"],
)
def test_a_policy_learns_from_unscaled_gradients(scaled: Callable[[], Any], how: dict[str, Any]) -> None:
    policy = POLICIES["AutoClip"]
    model, attachment = trained(scaled(), policy, **how)
    assert_alike(model, attachment, *by_hand(O.Adam(0.01), policy))


@pytest.mark.parametrize(
    ("name", "how", "wrap"), pairs(["AutoClip", "ZClip", "AdaGC", "SpikeClip"], WAYS, [plain, O.LossScaleOptimizer])
)
def test_a_skipped_step_teaches_nothing(name: str, how: dict[str, Any], wrap: Any) -> None:
    kind = type(POLICIES[name])
    model, attachment = trained(wrap(O.Adam(0.01)), kind(nonfinite="skip"), **how)
    before, weights = attachment.state_dict(), bits(model.weights)
    fit(model, x=X[:16] * np.float32(np.nan))
    after = attachment.state_dict()
    assert before.keys() == after.keys()
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    assert bits(model.weights) == weights
    fit(model, x=X[:16])
    assert int(attachment.state_dict()[f"{name}.count"]) == 8


def scaled() -> Any:
    return O.LossScaleOptimizer(O.SGD(0.01))


def accumulating() -> Any:
    return O.SGD(0.01, gradient_accumulation_steps=2)


def on_replicas_and_alone(
    strategy: Any, policy: cc.Policy, make: Callable[[], Any], y: np.ndarray = Y, **how: Any
) -> Any:
    """(model, attachment) of the same training on the replicas of a strategy, and without one."""

    def run(scope: Any) -> tuple[Any, cc.Attachment]:
        with scope:
            model, optimizer = network(), make()
            attachment = cc.attach(optimizer, policy, model)
            model.compile(optimizer, "mse", **how)
        fit(model, y=y)
        return model, attachment

    return run(strategy.scope()), run(nullcontext())


@pytest.mark.parametrize(
    ("name", "how", "make"),
    [
        ("AutoClip", GRAPH, scaled),
        ("AdaGC", EAGER, scaled),
        ("SpikeClip", EAGER, O.SGD),
        ("per group", GRAPH, O.SGD),
        # in a graph Keras itself refuses to accumulate on replicas: "merge_call called while defining a new graph"
        ("AGC", EAGER, accumulating),
        ("ZClip", EAGER, accumulating),
    ],
    ids=_named,
)
def test_replicas_learn_the_same_from_the_sum_of_their_gradients(
    strategy: Any, name: str, how: dict[str, Any], make: Callable[[], Any]
) -> None:
    (model, attachment), (single, alone) = on_replicas_and_alone(strategy, POLICIES[name], make, **how)
    for actual, wanted in zip(model.get_weights(), single.get_weights(), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)
    state, target = attachment.state_dict(), alone.state_dict()
    assert all(np.allclose(state[key], target[key], rtol=1e-5, atol=1e-9) for key in target)
    assert state.keys() == target.keys()
    kept = [v for v in model.optimizer.variables if "clip_" in v.path]
    assert len(kept) == len(state)
    for variable in kept:
        first, second = (part.numpy() for part in strategy.experimental_local_results(variable.value))
        assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize(("name", "how"), [("AGC", GRAPH), ("ZClip", EAGER)], ids=_named)
def test_replicas_learn_from_unscaled_half_precision(strategy: Any, name: str, how: dict[str, Any]) -> None:
    keras.config.set_dtype_policy("mixed_float16")
    (model, attachment), (single, alone) = on_replicas_and_alone(strategy, POLICIES[name], scaled, Y / 100, **how)
    pairs_of_weights = zip(single.get_weights(), network().get_weights(), strict=True)
    moved = [np.abs(after - before).max() for after, before in pairs_of_weights]
    assert all(moved)
    for actual, wanted, size in zip(model.get_weights(), single.get_weights(), moved, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=0.02 * size)
    state, target = attachment.state_dict(), alone.state_dict()
    assert all(np.allclose(state[key], target[key], rtol=1e-2) for key in target)


def test_replicas_begin_with_the_state_that_was_loaded(strategy: Any) -> None:
    with strategy.scope():
        model, optimizer = network(), O.SGD(0.01)
        attachment = cc.attach(optimizer, POLICIES["ZClip"], model)
        model.compile(optimizer, "mse", **GRAPH)
    attachment.load_state_dict(by_hand(O.SGD(0.01), POLICIES["ZClip"])[1].state_dict())
    fit(model)
    assert int(attachment.state_dict()["ZClip.count"]) == 12


RESUME = """
    import sys
    import keras, numpy as np
    import clipcore as cc
    cc.get_backend("tensorflow")
    data = np.load(sys.argv[1] + "/data.npz")
    for name in sys.argv[2:]:
        model = keras.models.load_model(f"{sys.argv[1]}/{name}.keras")
        model.fit(data["x"], data["y"], batch_size=8, shuffle=False, verbose=0)
        np.savez(f"{sys.argv[1]}/{name}.npz", *model.get_weights(), *[v.numpy() for v in model.optimizer.variables])
"""


def test_training_resumes_exactly_in_mid_warm_up_in_a_fresh_process(tmp_path: Path) -> None:
    policies = {
        "SpikeClip": cc.SpikeClip(1.5, decay=0.5, warmup=9),
        "chain": cc.Chain([cc.ClipByValue(50.0), cc.ZClip(0.5, warmup=9)]),
        "per_group": POLICIES["per group"],
    }
    models = {}
    for place, (name, policy) in enumerate(policies.items()):
        wrap = [plain, O.LossScaleOptimizer][place % 2]
        models[name], _ = trained(wrap(O.Adam(0.01)), policy, **GRAPH)
        models[name].save(tmp_path / f"{name}.keras")
    np.savez(tmp_path / "data.npz", x=X, y=Y)
    command = [sys.executable, "-W", "error::UserWarning:keras", "-c", textwrap.dedent(RESUME), str(tmp_path), *models]
    subprocess.run(command, capture_output=True, text=True, check=True)
    for name, model in models.items():
        fit(model)
        resumed = np.load(tmp_path / f"{name}.npz")
        kept = [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables)]
        assert [value.tobytes() for value in kept] == [resumed[file].tobytes() for file in resumed.files], name


def test_a_loaded_model_goes_on_with_the_state_that_its_attachment_shows(tmp_path: Path) -> None:
    model, attachment = trained(O.SGD(0.01), POLICIES["per group"])
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    again = cc.attach(loaded.optimizer, POLICIES["per group"], loaded)
    state, wanted = again.state_dict(), attachment.state_dict()
    assert state.keys() == wanted.keys()
    assert all(state[key].tobytes() == wanted[key].tobytes() for key in wanted)
    assert loaded.optimizer.get_config() == model.optimizer.get_config()


@pytest.mark.parametrize("late", [False, True], ids=["before the first step", "later"])
def test_a_state_of_another_framework_is_taken_up(late: bool) -> None:
    elsewhere = cc.Clipper(POLICIES["AdaGC"])
    for size in (1.0, 2.0):
        elsewhere.clip([size * np.ones(tuple(v.shape), np.float32) for v in network().trainable_variables])
    model, optimizer = network(), O.SGD(0.01)
    attachment = cc.attach(optimizer, POLICIES["AdaGC"], model)
    model.compile(optimizer, "mse")
    if late:
        fit(model)
    assert ("AdaGC.count" in attachment.state_dict()) is late
    attachment.load_state_dict(elsewhere.state_dict())
    state, wanted = attachment.state_dict(), elsewhere.state_dict()
    assert all(np.array_equal(state[key], wanted[key]) for key in wanted)
    fit(model)
    assert int(attachment.state_dict()["AdaGC.count"]) == 8
    # and back
    going_on = cc.Clipper(POLICIES["AdaGC"])
    going_on.load_state_dict(attachment.state_dict())
    going_on.clip([np.ones(tuple(v.shape), np.float32) for v in model.trainable_variables])
    assert int(going_on.state_dict()["AdaGC.count"]) == 9


def test_a_state_of_another_policy_or_shape_is_refused() -> None:
    _, attachment = trained(O.SGD(0.01), POLICIES["AdaGC"])
    with pytest.raises(cc.InvalidInput, match=r"'ZClip.count'.*the policy here is AdaGC"):
        attachment.load_state_dict({"ZClip.count": np.zeros((), np.int64)})
    with pytest.raises(cc.InvalidInput, match=r"'AdaGC.averages' has shape \(2,\).*\(4,\)"):
        attachment.load_state_dict({"AdaGC.averages": np.zeros(2), "AdaGC.count": np.zeros((), np.int64)})
    unbuilt = network()
    optimizer = O.SGD(0.01)
    later = cc.attach(optimizer, POLICIES["AdaGC"])
    later.load_state_dict({"AdaGC.averages": np.zeros(2), "AdaGC.count": np.zeros((), np.int64)})
    with pytest.raises(cc.InvalidInput, match=r"'AdaGC.averages' has shape \(2,\)"):
        optimizer.build(unbuilt.trainable_variables)
    later.load_state_dict(attachment.state_dict())
    optimizer.build(unbuilt.trainable_variables)
    assert int(later.state_dict()["AdaGC.count"]) == 6


def test_a_policy_is_attached_in_the_middle_and_taken_off_with_its_variables() -> None:
    model, optimizer = network(), O.Adam(0.01)
    model.compile(optimizer, "mse")
    fit(model)
    before = [v.path for v in optimizer.variables]
    attachment = cc.attach(optimizer, POLICIES["per group"], model)
    assert len(optimizer.variables) == len(before) + 2
    fit(model)
    assert int(attachment.state_dict()["PerGroup.2.AutoClip.count"]) == 6
    attachment.remove()
    assert [v.path for v in optimizer.variables] == before
    fit(model)
    again = cc.attach(optimizer, POLICIES["AutoClip"], model)
    fit(model)
    assert int(again.state_dict()["AutoClip.count"]) == 6


def test_a_policy_on_examples_is_refused_with_the_reason() -> None:
    for policy in (cc.PerExampleClip(1.0), cc.QuantileClip(1.0), cc.Chain([cc.PerExampleClip(1.0)])):
        with pytest.raises(cc.InvalidInput, match=r"cannot be attached.*cc.per_example_grads"):
            cc.attach(O.SGD(0.1), policy)
        with pytest.raises(cc.InvalidInput, match=r"cannot be attached"):
            cc.compile(network(), "mse", "sgd", clip=policy)


@pytest.mark.parametrize("built", [False, True])
def test_a_policy_that_needs_layouts_asks_for_the_model_at_once(built: bool) -> None:
    optimizer = O.SGD(0.1)
    if built:
        optimizer.build(network().trainable_variables)
    for policy in (cc.AdaptiveClip(), cc.PerGroup({"": cc.AdaptiveClip()})):
        with pytest.raises(cc.InvalidInput, match=r"AdaptiveClip.*pass model="):
            cc.attach(optimizer, policy)
    assert type(optimizer) is O.SGD
    cc.attach(optimizer, cc.AdaptiveClip(unit_axis=-1))


def test_a_layer_whose_layout_is_unknown_is_refused_at_once() -> None:
    class Own(L.Layer):
        def build(self, shape: Any) -> None:
            self.w = self.add_weight(shape=(shape[-1], 2), name="w")

        def call(self, x: Any) -> Any:
            return x @ self.w

    model = keras.Sequential([keras.Input((3,)), Own(name="own")])
    with pytest.raises(cc.InvalidInput, match=r"'own/w' \(shape \(3, 2\)\).*unit_axis"):
        cc.attach(O.SGD(0.1), cc.AdaptiveClip(), model)


def test_a_pattern_that_is_found_in_no_name_is_refused_at_once() -> None:
    with pytest.raises(cc.InvalidInput, match=r"'encoder'.*'conv/kernel'"):
        cc.attach(O.SGD(0.1), cc.PerGroup({"encoder": cc.ClipByNorm(1.0)}), network())


def test_without_a_model_names_are_the_variables_paths() -> None:
    model, optimizer = network(), O.SGD(0.1)
    attachment = cc.attach(optimizer, cc.PerGroup({"/last/": cc.AdaGC()}))
    model.compile(optimizer, "mse")
    fit(model)
    assert attachment.state_dict()["PerGroup.0.AdaGC.averages"].astype(bool).tolist() == [False] * 2 + [True] * 2


def test_a_model_that_is_built_later_is_asked_then() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([L.Flatten(), L.Dense(1, name="only")])
    optimizer = O.SGD(0.1)
    cc.attach(optimizer, cc.PerGroup({"^only/kernel$": cc.AdaptiveClip()}), model)
    model.compile(optimizer, "mse")
    fit(model)
    assert optimizer.get_config()["clip_axes"] == [[1], []]


def test_raising_policies_and_missing_gradients_and_rows_of_tables() -> None:
    table, unused = keras.Variable(np.zeros((4, 1), np.float32), name="t"), keras.Variable([1.0], name="u")
    optimizer = O.SGD(1.0)
    attachment = cc.attach(optimizer, cc.SpikeClip(4.0, decay=0.75, warmup=1, nonfinite="raise"))
    for value, moved in ((2.0, -2.0), (-8.0, 0.0)):
        sparse = tf.IndexedSlices(tf.constant([[value]]), tf.constant([1]), tf.constant([4, 1]))
        with pytest.warns(UserWarning, match="Gradients do not exist"):
            optimizer.apply_gradients([(sparse, table), (None, unused)])
        assert table.numpy().ravel().tolist() == [0.0, moved, 0.0, 0.0]
    assert sorted(attachment.state_dict()) == ["SpikeClip.count", "SpikeClip.moment.0", "SpikeClip.moment.1"]


@every_policy
def test_a_table_learns_in_compiled_training(name: str) -> None:
    policy = POLICIES[name]
    if isinstance(policy, cc.PerGroup):
        policy = cc.PerGroup({"table": cc.SpikeClip(warmup=1)}, default=cc.AutoClip())
    model, attachment = trained(O.SGD(0.01), policy, make=reader, x=WORDS, **XLA)
    assert_alike(model, attachment, *by_hand(O.SGD(0.01), policy, make=reader, x=WORDS))


@pytest.mark.parametrize("how", [GRAPH, EAGER], ids=_named)
@pytest.mark.parametrize(
    "policy",
    [cc.AdaptiveClip(0.5), cc.SpikeClip(2.0, decay=0.5, warmup=2), cc.ClipByBlockRMS(0.5)],
    ids=lambda policy: type(policy).__name__,
)
def test_rows_of_a_table_are_clipped_as_the_whole_table_is(policy: cc.Policy, how: dict[str, Any]) -> None:
    model, attachment = trained(O.SGD(0.01), policy, make=reader, x=WORDS, **how)
    assert_alike(model, attachment, *by_hand(O.SGD(0.01), policy, make=reader, x=WORDS))
    if how is EAGER:
        assert any(report.clipped for report in attachment.reports)


def test_reports_are_handed_on() -> None:
    seen: list[cc.ClipReport] = []
    model, optimizer = network(), O.SGD(0.01)
    attachment = cc.attach(optimizer, POLICIES["ZClip"], model, on_report=seen.append)
    model.compile(optimizer, "mse", run_eagerly=True)
    fit(model)
    assert seen == list(attachment.reports)
    assert len(seen) == 6
    more: list[cc.ClipReport] = []
    model, _, _ = cc.compile(network(), "mse", "sgd", clip=cc.ClipByNorm(1.0), on_report=more.append)
    model.run_eagerly = True
    fit(model)
    assert len(more) == 6
