"""Kinds of the user's own, on Keras layers and on modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from clipcore.backend import Stored
from clipcore.mapping import kinds, registry


class Gain(keras.layers.Layer):
    def build(self, input_shape: Any) -> None:
        self.g = self.add_weight(input_shape[-1:])  # Keras numbers what has no name

    def call(self, x: Any) -> Any:
        return x * self.g


class ModuleGain(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = tf.Variable([1.0, 2.0])

    def __call__(self, x: Any) -> Any:
        return x * self.g


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kinds, "_REGISTERED", kinds._REGISTERED)
    before, stored = dict(kinds._REGISTERED), dict(registry._stored)
    kind = kinds.Kind("gain", {"gain": "channel"})
    row = Stored("gain", {"g": ("gain", "channel")}, lambda layer: {"channels": "last"})
    registry.register_kind(kind, {Gain: row, ModuleGain: row})
    yield
    for table, old in ((kinds._REGISTERED, before), (registry._stored, stored)):
        table.clear()
        table.update(old)  # type: ignore[arg-type]


@pytest.mark.usefixtures("registered")
def test_a_registered_class_is_described_by_its_attributes(backend: Any) -> None:
    model = keras.Sequential([keras.Input((2,)), Gain(name="mine")])
    (layer,) = backend.layers(model)
    assert (layer.name, layer.kind, layer.settings) == ("mine", "gain", {"channels": "last"})
    assert (layer.tensors["gain"].name, layer.tensors["gain"].layout) == ("mine/g", "channel")
    (layer,) = backend.layers(ModuleGain())
    assert (layer.kind, layer.tensors["gain"].name) == ("gain", "module_gain/g")


def test_it_is_raw_where_it_is_not_registered_and_its_tensor_has_its_attribute_s_name(backend: Any) -> None:
    model = keras.Sequential([keras.Input((2,)), Gain(name="mine")])
    (layer,) = backend.layers(model)
    assert (layer.kind, layer.why, list(layer.tensors)) == ("raw", "a Gain, which no rule describes", ["g"])
    seen = []

    class Watch:
        def before(self, name: str, inputs: Any) -> None:
            seen.append(name)

        def after(self, name: str, output: Any) -> None:
            pass

    backend.run(model, np.ones((1, 2)), Watch())
    assert seen == ["mine"]
