"""The callback that logs what a policy did: the figures of eager reports, from training that is compiled as well."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L
from keras import optimizers as O

import clipcore as cc
from clipcore_tensorflow import ClipLogger

X = np.random.default_rng(0).normal(size=(32, 5)).astype(np.float32)
Y = np.linspace(-3, 30, 32, dtype=np.float32)[:, None]
WAYS = {"xla": {"jit_compile": True}, "graph": {"jit_compile": False}, "eager": {"run_eagerly": True}}
every_way = pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)


def network(policy: cc.Policy, optimizer: Any = None, **how: Any) -> tuple[keras.Model, cc.Attachment]:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((5,)), L.Dense(3, activation="tanh"), L.Dense(1)])
    optimizer = optimizer or O.SGD(0.01)
    attachment = cc.attach(optimizer, policy, model)
    if "run_eagerly" not in how:
        optimizer.build(model.trainable_variables)  # else the step is traced twice
    model.compile(optimizer, "mse", **how)
    return model, attachment


def fit(model: keras.Model, *callbacks: Any, epochs: int = 2, x: np.ndarray = X) -> dict[str, list[float]]:
    history = model.fit(x, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks))
    return {name: values for name, values in history.history.items() if name.startswith("clip/")}


def expected(policy: cc.Policy, optimizer: Any = None) -> dict[str, list[float]]:
    model, attachment = network(policy, optimizer, run_eagerly=True)
    fit(model)
    reports = list(attachment.reports)
    epochs = [reports[: len(reports) // 2], reports[len(reports) // 2 :]]
    limits = [[r.limit for r in epoch if math.isfinite(r.limit)] or [math.inf] for epoch in epochs]
    return {
        "clip/norm": [float(np.mean([r.norm for r in epoch])) for epoch in epochs],
        "clip/limit": [float(np.mean(own)) for own in limits],
        "clip/scale": [float(np.mean([r.scale for r in epoch])) for epoch in epochs],
        "clip/share_clipped": [float(np.mean([r.clipped for r in epoch])) for epoch in epochs],
    }


@every_way
@pytest.mark.parametrize("policy", [cc.ClipByGlobalNorm(10.0), cc.ZClip(0.5, warmup=5), cc.ClipByValue(3.0)], ids=repr)
def test_each_epoch_logs_the_means_of_its_reports(policy: cc.Policy, how: dict[str, Any]) -> None:
    model, _ = network(policy, **how)
    figures, wanted = fit(model, ClipLogger()), expected(policy)
    assert figures.keys() == wanted.keys()
    for name, values in wanted.items():
        assert figures[name] == pytest.approx(values, rel=1e-5), name


@every_way
def test_accumulation_and_scaled_losses_are_logged_by_the_real_step(how: dict[str, Any]) -> None:
    def optimizer() -> Any:
        return O.LossScaleOptimizer(O.SGD(0.01, gradient_accumulation_steps=2))

    policy = cc.ClipByGlobalNorm(10.0)
    model, _ = network(policy, optimizer(), **how)
    figures = fit(model, ClipLogger())
    for name, values in expected(policy, optimizer()).items():
        assert figures[name] == pytest.approx(values, rel=1e-5), name


def test_a_logger_can_come_later_and_again() -> None:
    model, _ = network(cc.ClipByGlobalNorm(10.0))
    assert fit(model) == {}
    logger = ClipLogger()
    assert all(map(math.isfinite, fit(model, logger, epochs=1)["clip/norm"]))
    before = len(model.optimizer.variables)
    assert len(fit(model, logger, epochs=3)["clip/norm"]) == 3
    assert len(model.optimizer.variables) == before


def test_a_faulty_step_counts_in_the_share_alone() -> None:
    x = X.copy()
    x[:8] = np.nan
    model, _ = network(cc.ClipByGlobalNorm(1e6, nonfinite="skip"))
    figures = fit(model, ClipLogger(), epochs=1, x=x)
    assert figures["clip/share_clipped"] == [0.25]
    assert figures["clip/scale"] == [1.0]
    assert math.isfinite(figures["clip/norm"][0])


def scalars(folder: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for path in sorted(folder.glob("events*")):
        for raw in tf.data.TFRecordDataset(str(path)):
            for value in tf.compat.v1.Event.FromString(raw.numpy()).summary.value:
                found.setdefault(value.tag, []).append(float(tf.make_ndarray(value.tensor)))
    return found


@pytest.mark.parametrize("how", ["folder", "writer"])
def test_the_figures_go_to_tensorboard(tmp_path: Path, how: str) -> None:
    model, _ = network(cc.ClipByGlobalNorm(10.0))
    if how == "folder":
        logger = ClipLogger(str(tmp_path))
    else:
        logger = ClipLogger(writer=tf.summary.create_file_writer(str(tmp_path)))
    figures = fit(model, logger)
    written = scalars(tmp_path)
    assert written.keys() == figures.keys()
    for name, values in figures.items():
        assert written[name] == pytest.approx(values, rel=1e-6)


def test_replicas_are_logged_once(strategy: Any) -> None:
    policy = cc.ClipByGlobalNorm(10.0)
    with strategy.scope():
        model, _ = network(policy, jit_compile=False)
    figures = fit(model, ClipLogger())
    for name, values in expected(policy).items():
        assert figures[name] == pytest.approx(values, rel=1e-5), name


def test_an_optimizer_without_a_policy_is_refused() -> None:
    model = keras.Sequential([keras.Input((5,)), L.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(cc.InvalidInput, match=r"has no policy; attach one first"):
        fit(model, ClipLogger())
    with pytest.raises(cc.InvalidInput, match="both log_dir and writer"):
        ClipLogger("folder", writer=object())
