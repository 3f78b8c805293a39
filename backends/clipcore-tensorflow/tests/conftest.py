"""TensorFlow on the CPU and quiet, before anything imports it."""

import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ["KERAS_BACKEND"] = "tensorflow"

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import settings

import clipcore as cc

settings.register_profile("clipcore", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("clipcore")


def pytest_configure(config: pytest.Config) -> None:
    # two devices on one CPU, for tf.distribute; they must be named before TensorFlow starts
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)


@pytest.fixture(scope="session")
def backend() -> Any:
    return cc.get_backend("tensorflow")


@pytest.fixture(scope="session")
def strategy() -> Any:
    """One for the process: TensorFlow numbers what replicas do together, and a second strategy begins at 0 again."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture(autouse=True)
def _fresh_names() -> Iterator[None]:
    # without the garbage, of which every trace of every test so far would be gone through each time
    keras.backend.clear_session(free_memory=False)
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def randomised() -> Callable[..., Any]:
    """Gives every variable of a model random values: zeros and ones would hide mistakes."""

    def randomise(model: Any, seed: int = 0) -> Any:
        rng = np.random.default_rng(seed)
        for variable in model.weights if isinstance(model, keras.layers.Layer) else model.variables:
            variable.assign(rng.uniform(0.5, 1.5, tuple(variable.shape)))
        return model

    return randomise
