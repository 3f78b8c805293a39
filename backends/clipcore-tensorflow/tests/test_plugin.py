"""The plugin: found without TensorFlow, and clear where Keras runs on something else."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import keras
import pytest
import tensorflow as tf

import clipcore as cc


def test_the_plugin_imports_no_tensorflow() -> None:
    code = (
        "import sys, clipcore_tensorflow.plugin as p; roots = p.clipcore_root_modules(); "
        "print(roots, [name for name in roots if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['tensorflow', 'keras', 'tf_keras'] []"


def test_keras_on_another_framework_is_refused(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = keras.layers.Dense(1)
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    for refused in (lambda: backend.layers(layer), lambda: backend.attach(keras.optimizers.SGD(), None, None, None)):
        with pytest.raises(cc.InvalidInput, match=r"Keras runs on 'jax'.*set KERAS_BACKEND=tensorflow"):
            refused()


def test_objects_find_the_backend() -> None:
    sparse = tf.IndexedSlices(tf.ones([1, 1]), tf.constant([0]))
    objects = [tf.constant(1.0), tf.Variable(1.0), sparse, keras.Variable(1.0), keras.layers.Dense(1), tf.Module()]
    objects.append(keras.optimizers.SGD())
    assert {cc.backend_of(obj).name for obj in objects} == {"tensorflow"}
