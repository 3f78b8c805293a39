"""Policies on Keras optimizers: after accumulation, unscaling and aggregation; before the step; kept by model.save."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
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
from clipcore_tensorflow import clipped_class

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 5)).astype(np.float32)
Y = (100 * RNG.normal(size=(32, 1))).astype(np.float32)
POLICY = cc.ClipByGlobalNorm(0.5)
WAYS = {"xla": {"jit_compile": True}, "graph": {"jit_compile": False}, "eager": {"run_eagerly": True}}
every_way = pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)


def network() -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((5,)), L.Dense(4, activation="tanh", name="a"), L.Dense(1, name="b")])


def fit(model: keras.Model, epochs: int = 1, x: np.ndarray = X) -> None:
    model.fit(x, Y[: len(x)], batch_size=8, epochs=epochs, shuffle=False, verbose=0)


def trained(optimizer: Any, policy: cc.Policy = POLICY, epochs: int = 2, **how: Any) -> tuple[Any, cc.Attachment]:
    model = network()
    attachment = cc.attach(optimizer, policy)
    if "run_eagerly" not in how:
        optimizer.build(model.trainable_variables)  # else the step is traced twice
    model.compile(optimizer, "mse", **how)
    fit(model, epochs)
    return model, attachment


def by_hand(optimizer: Any, policy: cc.Policy = POLICY, epochs: int = 2, parts: int = 1) -> list[np.ndarray]:
    """The weights after the same training, the gradients clipped by NumPy."""
    model = network()
    held: list[list[np.ndarray]] = []
    for step in range(epochs * 4):
        rows = slice(step % 4 * 8, step % 4 * 8 + 8)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(X[rows], training=True) - Y[rows]))
        held.append([g.numpy() for g in tape.gradient(loss, model.trainable_variables)])
        if len(held) == parts:
            mean = [sum(parts_of_one) / parts for parts_of_one in zip(*held, strict=True)]
            held = []
            clipped, _ = cc.clip([np.asarray(g, np.float32) for g in mean], policy)
            optimizer.apply_gradients(zip(map(tf.constant, clipped), model.trainable_variables, strict=True))
    return model.get_weights()


def assert_same_weights(model: Any, weights: list[np.ndarray], tolerance: float = 1e-6) -> None:
    for actual, wanted in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=tolerance, atol=tolerance)


def values(variables: Any) -> list[bytes]:
    return [v.numpy().tobytes() for v in variables]


@every_way
def test_fit_steps_as_by_hand(how: dict[str, Any]) -> None:
    model, _ = trained(O.Adam(0.01), **how)
    assert_same_weights(model, by_hand(O.Adam(0.01)))


def test_eager_steps_are_exact_and_reported() -> None:
    model, attachment = trained(O.SGD(0.01, momentum=0.9), run_eagerly=True)
    wanted = by_hand(O.SGD(0.01, momentum=0.9))
    assert [w.tobytes() for w in model.get_weights()] == [w.tobytes() for w in wanted]
    assert len(attachment.reports) == 8
    assert all(isinstance(report.norm, float) and report.clipped for report in attachment.reports)


def test_compiled_steps_keep_no_report() -> None:
    _, attachment = trained(O.SGD(0.01))
    assert not attachment.reports


@every_way
def test_accumulated_gradients_are_clipped_once(how: dict[str, Any]) -> None:
    model, _ = trained(O.SGD(0.01, momentum=0.9, gradient_accumulation_steps=4), **how)
    assert_same_weights(model, by_hand(O.SGD(0.01, momentum=0.9), parts=4))


@every_way
@pytest.mark.parametrize(
    "scaled",
    [lambda: O.Adam(0.01, loss_scale_factor=1024.0), lambda: O.LossScaleOptimizer(O.Adam(0.01))],
    ids=["fixed", "dynamic"],
)
def test_scaled_gradients_are_clipped_after_unscaling(scaled: Callable[[], Any], how: dict[str, Any]) -> None:
    model, _ = trained(scaled(), **how)
    assert_same_weights(model, by_hand(O.Adam(0.01)))


def test_mixed_precision_clips_unscaled_gradients() -> None:
    keras.config.set_dtype_policy("mixed_float16")
    model, _, optimizer = cc.compile(network(), "mse", "sgd", clip=cc.ClipByGlobalNorm(1e-3))
    assert isinstance(optimizer, O.LossScaleOptimizer)
    assert optimizer is model.optimizer
    before = model.get_weights()
    model.fit(X, Y / 100, batch_size=32, verbose=0)
    moved = np.sqrt(sum(np.square(a - b).sum() for a, b in zip(before, model.get_weights(), strict=True)))
    assert moved == pytest.approx(0.01 * 1e-3, rel=1e-2)  # learning rate times the limit


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "AdamW with averages": lambda: O.AdamW(0.01, weight_decay=0.1, use_ema=True, ema_overwrite_frequency=1),
    "SGD with accumulation": lambda: O.SGD(0.1, momentum=0.9, weight_decay=0.1, gradient_accumulation_steps=2),
    "Nadam": lambda: O.Nadam(0.01),
}


@every_way
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_does_not_happen_at_all(name: str, how: dict[str, Any]) -> None:
    optimizer = OPTIMIZERS[name]()
    model, _ = trained(optimizer, cc.ClipByGlobalNorm(1.0, nonfinite="skip"), epochs=1, **how)
    weights, slots = values(model.weights), values(optimizer.variables)
    fit(model, x=X[:16] * np.float32(np.nan))
    assert values(model.weights) == weights
    assert values(optimizer.variables) == slots
    fit(model)
    assert values(model.weights) != weights
    assert all(np.isfinite(w).all() for w in model.get_weights())


@every_way
def test_a_skipped_step_does_not_constrain_weights_either(how: dict[str, Any]) -> None:
    model = network()
    for variable in model.trainable_variables:
        variable.constraint = keras.constraints.MaxNorm(0.1)
    cc.compile(model, "mse", O.SGD(0.1), clip=cc.ClipByGlobalNorm(1.0, nonfinite="skip"))
    model.compile(model.optimizer, "mse", **how)
    weights = values(model.weights)
    fit(model, x=X[:16] * np.float32(np.nan))
    assert values(model.weights) == weights
    fit(model)
    assert all(np.linalg.norm(w, axis=0).max() <= 0.1 + 1e-6 for w in model.get_weights())


@pytest.mark.parametrize("traced", [False, True])
def test_the_last_part_of_a_skipped_accumulation_changes_no_average(traced: bool) -> None:
    variable = keras.Variable(np.array([1.0, 2.0], np.float32))
    optimizer = O.SGD(0.1, use_ema=True, ema_momentum=0.5, gradient_accumulation_steps=2)
    optimizer.build([variable])
    cc.attach(optimizer, cc.ClipByGlobalNorm(1.0, nonfinite="skip"))

    def step(gradient: Any) -> None:
        optimizer.apply([gradient], [variable])

    apply = tf.function(step) if traced else step
    for gradient in ([1.0, 1.0], [1.0, 1.0], [np.nan, 1.0]):
        apply(tf.constant(gradient))
    before = values([variable, *optimizer._model_variables_moving_average])
    apply(tf.constant([1.0, 1.0]))
    assert values([variable, *optimizer._model_variables_moving_average]) == before
    assert int(optimizer.iterations) == 1


def test_faults_propagate_by_default() -> None:
    model, _ = trained(O.SGD(0.1), epochs=1)
    fit(model, x=X[:8] * np.float32(np.nan))
    assert all(np.isnan(w).all() for w in model.get_weights())


def test_raising_works_eagerly_and_is_refused_in_a_graph() -> None:
    policy = cc.ClipByGlobalNorm(1.0, nonfinite="raise")
    model, _ = trained(O.SGD(0.1), policy, epochs=1, run_eagerly=True)
    before = values(model.weights)
    with pytest.raises(cc.NonFinite):
        fit(model, x=X[:8] * np.float32(np.nan))
    assert values(model.weights) == before
    with pytest.raises(cc.InvalidInput, match="which a traced function cannot"):
        trained(O.SGD(0.1), policy)


def test_sparse_gradients_are_clipped_with_duplicates_summed() -> None:
    optimizer, table = O.SGD(1.0), keras.Variable(np.zeros((4, 1), np.float32))
    attachment = cc.attach(optimizer, cc.ClipByGlobalNorm(3.5))
    sparse = tf.IndexedSlices(tf.constant([[3.0], [4.0]]), tf.constant([1, 1]), tf.constant([4, 1]))
    optimizer.apply_gradients([(sparse, table)])
    assert table.numpy().ravel().tolist() == [0, -3.5, 0, 0]
    assert attachment.reports[0].norm == 7.0


BUILTIN = ["Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Ftrl", "Lion", "Nadam", "RMSprop", "SGD"]


@pytest.mark.parametrize("name", BUILTIN)
def test_a_builtin_optimizer_can_be_attached_to(name: str) -> None:
    model, _ = trained(getattr(O, name)(0.01), epochs=1, jit_compile=False)
    assert type(model.optimizer).__name__ == f"Clipped{name}"
    assert all(np.isfinite(w).all() for w in model.get_weights())


def test_removing_gives_the_optimizer_back_and_retraces(backend: Any) -> None:
    optimizer = O.SGD(0.01)
    model = network()
    model.compile(optimizer, "mse")
    fit(model)
    plain = values(model.weights)
    attachment = cc.attach(optimizer, cc.ClipByGlobalNorm(0.0), model)
    fit(model)
    assert values(model.weights) == plain
    attachment.remove()
    attachment.remove()
    assert type(optimizer) is O.SGD
    assert "clip_policy" not in optimizer.get_config()
    fit(model)
    assert values(model.weights) != plain
    cc.attach(optimizer, POLICY).remove()


@pytest.mark.parametrize("argument", ["clipnorm", "global_clipnorm", "clipvalue"])
def test_two_clippings_are_refused(argument: str) -> None:
    optimizer = O.SGD(0.1, **{argument: 1.0})
    with pytest.raises(cc.InvalidInput, match=rf"{argument}=1.0, so that gradients would be clipped twice"):
        cc.attach(optimizer, POLICY)
    assert type(optimizer) is O.SGD


def test_a_second_policy_is_refused() -> None:
    optimizer = O.SGD(0.1)
    cc.attach(optimizer, POLICY)
    with pytest.raises(cc.InvalidInput, match="has a policy already; remove that first"):
        cc.attach(O.LossScaleOptimizer(optimizer), POLICY)


def test_what_is_no_optimizer_is_refused(backend: Any) -> None:
    with pytest.raises(cc.InvalidInput, match="expected a Keras 3 optimizer"):
        backend.attach(network(), POLICY, None, None)
    with pytest.raises(cc.InvalidInput, match="expected a Keras optimizer or its name, say 'adam'"):
        cc.compile(network(), "mse", "no such optimizer", clip=POLICY)
    with pytest.raises(cc.InvalidInput, match=r"is no keras.Model"):
        cc.compile(tf.Module(), "mse", "sgd", clip=POLICY)


@pytest.mark.skipif(not hasattr(O, "MultiOptimizer"), reason="Keras before 3.15 has no MultiOptimizer")
def test_an_optimizer_of_several_is_refused() -> None:
    with pytest.raises(cc.InvalidInput, match="attach a policy to each"):
        cc.attach(O.MultiOptimizer(O.OptimizerMap(O.SGD(0.1))), POLICY)


def test_compiling_attaches_and_compiles() -> None:
    model = network()
    loss = keras.losses.MeanSquaredError()
    same, loss_fn, optimizer = cc.compile(model, loss, "sgd", clip=cc.ClipByGlobalNorm(0.0))
    assert (same, loss_fn, optimizer) == (model, loss, model.optimizer)
    before = values(model.weights)
    fit(model)
    assert values(model.weights) == before
    cc.compile(model, loss, "sgd")
    fit(model)
    assert values(model.weights) != before


def replicated(optimizer: Any, policy: cc.Policy, strategy: Any, **how: Any) -> keras.Model:
    with strategy.scope() if strategy else nullcontext():
        model, made = network(), optimizer()
        cc.attach(made, policy)
        model.compile(made, "mse", **how)
    fit(model, 2)
    return model


@pytest.mark.parametrize("how", [{"jit_compile": False}, {"run_eagerly": True}], ids=["graph", "eager"])
@pytest.mark.parametrize("name", ["SGD", "dynamic"])
def test_replicas_clip_the_sum_of_their_gradients(strategy: Any, name: str, how: dict[str, Any]) -> None:
    make = {
        "SGD": lambda: O.SGD(0.01, momentum=0.9, weight_decay=0.1),
        "dynamic": lambda: O.LossScaleOptimizer(O.SGD(0.01)),
    }[name]
    assert_same_weights(replicated(make, POLICY, strategy, **how), replicated(make, POLICY, None, **how).get_weights())


@pytest.mark.parametrize("how", [{"jit_compile": False}, {"run_eagerly": True}], ids=["graph", "eager"])
def test_replicas_skip_together(strategy: Any, how: dict[str, Any]) -> None:
    skip = cc.ClipByGlobalNorm(0.5, nonfinite="skip")
    model = replicated(lambda: O.SGD(0.01, momentum=0.9, weight_decay=0.1), skip, strategy, **how)
    weights, slots = values(model.weights), values(model.optimizer.variables)
    half_bad = X[:8].copy()
    half_bad[7] = np.nan  # a fault of one replica
    fit(model, x=half_bad)
    assert values(model.weights) == weights
    assert values(model.optimizer.variables) == slots


class Signs(O.SGD):
    """A user's own optimizer."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        super().update_step(keras.ops.sign(gradient), variable, learning_rate)


@pytest.mark.parametrize("copied", [lambda o: pickle.loads(pickle.dumps(o)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_a_copy_of_an_optimizer_has_its_policy(copied: Callable[[Any], Any]) -> None:
    optimizer = O.SGD(1.0)
    cc.attach(optimizer, cc.ClipByGlobalNorm(0.5))
    variable = keras.Variable(np.zeros(2, np.float32))
    twin = copied(optimizer)
    twin.apply([tf.constant([3.0, 4.0])], [variable])
    np.testing.assert_allclose(variable.numpy(), [-0.3, -0.4], rtol=1e-6)
    assert cc.attach(twin, cc.ClipByGlobalNorm(0.5)).policy == cc.ClipByGlobalNorm(0.5)


def test_an_optimizer_of_ones_own_is_saved_with_its_policy(tmp_path: Path) -> None:
    model, attachment = trained(Signs(0.01), cc.ClipByNorm(1.0, p=3.0))
    model.save(tmp_path / "m.keras")
    assert clipped_class(Signs) is type(model.optimizer)
    loaded = keras.models.load_model(tmp_path / "m.keras").optimizer
    assert loaded.get_config() == model.optimizer.get_config()
    attachment.remove()
    assert type(model.optimizer) is Signs


def test_a_loaded_policy_can_be_taken_over_but_not_replaced(tmp_path: Path) -> None:
    model, _ = trained(O.SGD(0.01))
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    with pytest.raises(cc.InvalidInput, match="was saved with ClipByGlobalNorm"):
        cc.attach(loaded.optimizer, cc.ClipByGlobalNorm(9.0))
    cc.attach(loaded.optimizer, POLICY, loaded).remove()
    assert type(loaded.optimizer) is O.SGD


RESUME = """
    import sys
    import keras, numpy as np
    import clipcore as cc
    cc.get_backend("tensorflow")
    model = keras.models.load_model(sys.argv[1] + "/m.keras")
    data = np.load(sys.argv[1] + "/data.npz")
    model.fit(data["x"], data["y"], batch_size=8, shuffle=False, verbose=0)
    np.savez(sys.argv[1] + "/resumed.npz", *model.get_weights())
    print(model.optimizer.get_config()["clip_policy"])
"""


def test_training_resumes_exactly_in_a_fresh_process(tmp_path: Path) -> None:
    model, _ = trained(O.Adam(0.01), cc.ClipByGlobalNorm(0.5, p=3.0, nonfinite="skip"))
    model.save(tmp_path / "m.keras")
    np.savez(tmp_path / "data.npz", x=X, y=Y)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RESUME), str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "{'policy': 'ClipByGlobalNorm', 'nonfinite': 'skip', 'max_norm': 0.5, 'p': 3.0}" in done.stdout
    fit(model)
    resumed = np.load(tmp_path / "resumed.npz")
    assert [w.tobytes() for w in model.get_weights()] == [resumed[name].tobytes() for name in resumed.files]
