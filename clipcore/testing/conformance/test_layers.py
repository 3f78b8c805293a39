"""The layers of a framework: as it stores, describes and runs them, against the NumPy forward of each kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

import clipcore as cc
from clipcore.backend import Layer
from clipcore.mapping.kinds import KINDS
from clipcore.mapping.layouts import canonical_shape, stored
from clipcore.mapping.reference import FORWARD
from clipcore.testing import checks
from clipcore.testing.strategies import LayerConfiguration, layer_configurations

Array = np.ndarray[Any, np.dtype[Any]]

_CONV = {"stride": (1, 1), "padding": ((0, 0), (0, 0)), "padding_mode": "zeros", "dilation": (1, 1), "groups": 1}
# What every framework that has models is expected to have; the properties draw the others.
PLAIN = {
    "linear": LayerConfiguration("linear", {"activation": None}, {"kernel": (4, 3), "bias": (4,)}, (2, 3)),
    "square linear": LayerConfiguration("linear", {"activation": None}, {"kernel": (3, 3), "bias": (3,)}, (2, 3)),
    "conv": LayerConfiguration(
        "conv", {**_CONV, "activation": None}, {"kernel": (1, 4, 3, 3, 2), "bias": (4,)}, (2, 3, 6, 5)
    ),
    "square conv": LayerConfiguration(
        "conv", {**_CONV, "activation": None}, {"kernel": (1, 3, 3, 3, 3), "bias": (3,)}, (2, 3, 5, 6)
    ),
    "depthwise conv": LayerConfiguration(
        "conv", {**_CONV, "groups": 3, "activation": None}, {"kernel": (3, 2, 1, 2, 3), "bias": (6,)}, (2, 3, 5, 6)
    ),
    "batch_norm": LayerConfiguration(
        "batch_norm",
        {"eps": 0.25, "momentum": 0.25},
        dict.fromkeys(("scale", "bias", "running_mean", "running_var"), (3,)),
        (2, 3, 4, 5),
    ),
    "layer_norm": LayerConfiguration("layer_norm", {"eps": 0.25}, {"scale": (5,), "bias": (5,)}, (2, 3, 5)),
    "embedding": LayerConfiguration("embedding", {}, {"kernel": (5, 5)}, (2, 3)),
}
# What a framework says of a layer that it computes all the same, and once in a process, is no fault of the backend.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
plain = pytest.mark.parametrize("configuration", PLAIN.values(), ids=PLAIN)
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def tracing(models: Any) -> Any:
    """The backend, where it can run models."""
    if not hasattr(models, "run"):
        pytest.skip(f"not offered: backend {models.name!r} runs no models; it ends with models, the second tier")
    return models


def build(backend: Any, configuration: LayerConfiguration) -> tuple[Any, Layer]:
    """A model of one layer with the configuration's weights in it, and the layer as the backend describes it."""
    model = backend.build_layer(configuration.kind, configuration.settings, configuration.shapes)
    owning = [layer for layer in backend.layers(model) if layer.tensors]
    assert [layer.kind for layer in owning] == [configuration.kind], f"described as {owning}"
    (layer,) = owning
    backend.write(model, as_stored(layer, configuration))
    return model, layer


def build_or_reject(backend: Any, configuration: LayerConfiguration) -> tuple[Any, Layer]:
    """The same; a layer that the framework does not have is no example."""
    try:
        return build(backend, configuration)
    except cc.MappingError:
        reject()


def as_stored(layer: Layer, configuration: LayerConfiguration) -> dict[str, Array]:
    """The configuration's weights by the names and in the layouts of the framework."""
    weights = configuration.weights()
    missing = set(weights) - set(layer.tensors)
    assert not missing, f"the layer is described without {sorted(missing)}, which it was built with"
    return {
        layer.tensors[role].name: np.ascontiguousarray(stored(layer.tensors[role], layer, values))
        for role, values in weights.items()
    }


def run(backend: Any, model: Any, layer: Layer, configuration: LayerConfiguration, watcher: Any = None) -> Array:
    """The model's output on the configuration's data, with the channel axis first."""
    x, last = configuration.data(), layer.settings.get("channels") == "last"
    output = backend.run(model, np.moveaxis(x, 1, -1).copy() if last else x, watcher)
    assert isinstance(output, np.ndarray), f"the output is a {type(output).__name__}; expected an array"
    return np.moveaxis(output, -1, 1) if last else output


def forward(configuration: LayerConfiguration) -> Array:
    return FORWARD[configuration.kind](configuration.data(), configuration.weights(), configuration.settings)


def snapshot(backend: Any, model: Any) -> dict[str, Array]:
    names = [t.name for layer in backend.layers(model) for t in layer.tensors.values()]
    return {name: np.array(array) for name, array in backend.read(model, names).items()}


def assert_unchanged(backend: Any, model: Any, before: dict[str, Array]) -> None:
    after = snapshot(backend, model)
    assert after.keys() == before.keys()
    for name in before:
        equal = after[name].tobytes() == before[name].tobytes()
        assert equal, f"{name} is {after[name]}, and was {before[name]}"


@plain
def test_a_plain_layer_computes_what_the_reference_says(tracing: Any, configuration: LayerConfiguration) -> None:
    model, layer = build(tracing, configuration)
    checks.assert_close_to_forward(run(tracing, model, layer, configuration), forward(configuration))


@every_kind
@given(data=st.data())
def test_any_layer_of_a_kind_computes_what_the_reference_says(tracing: Any, kind: str, data: st.DataObject) -> None:
    configuration = data.draw(layer_configurations(kind))
    model, layer = build_or_reject(tracing, configuration)
    checks.assert_close_to_forward(run(tracing, model, layer, configuration), forward(configuration))


@every_kind
@given(data=st.data())
def test_weights_are_read_back_as_they_were_written(models: Any, kind: str, data: st.DataObject) -> None:
    configuration = data.draw(layer_configurations(kind))
    model, layer = build_or_reject(models, configuration)
    values = as_stored(layer, configuration)
    read = models.read(model, list(values))
    checks.assert_same_bits([np.asarray(read[name]) for name in values], list(values.values()))


@every_kind
@given(data=st.data())
def test_a_layer_is_described_with_the_settings_it_was_built_with(models: Any, kind: str, data: st.DataObject) -> None:
    configuration = data.draw(layer_configurations(kind))
    _, layer = build_or_reject(models, configuration)
    names = (*KINDS[kind].settings, *KINDS[kind].training_settings)
    described = {name: _plain(layer.settings[name]) for name in names}
    wanted = {name: _plain(configuration.settings[name]) for name in names}
    assert described == pytest.approx(wanted, rel=1e-6) if kind == "batch_norm" else described == wanted


def _plain(value: Any) -> Any:
    return tuple(_plain(v) for v in value) if isinstance(value, list | tuple) else value


@plain
def test_tensors_are_described_with_the_role_layout_and_shape_they_have(
    models: Any, configuration: LayerConfiguration
) -> None:
    model, layer = build(models, configuration)
    assert set(layer.tensors) - {"batch_count"} == set(configuration.shapes)
    for role, shape in configuration.shapes.items():
        tensor = layer.tensors[role]
        assert (tensor.role, tensor.dtype) == (role, "float32")
        assert canonical_shape(layer, role) == shape
        assert models.read(model, [tensor.name])[tensor.name].shape == tensor.shape
        assert tensor.trainable == (not role.startswith("running"))


@plain
def test_a_model_keeps_no_reference_to_what_was_written(models: Any, configuration: LayerConfiguration) -> None:
    model, layer = build(models, configuration)
    values = as_stored(layer, configuration)
    models.write(model, values)
    before = snapshot(models, model)
    for array in values.values():
        array[...] = 77
    assert_unchanged(models, model, before)


@plain
def test_a_write_of_another_shape_is_refused_and_writes_nothing(models: Any, configuration: LayerConfiguration) -> None:
    model, layer = build(models, configuration)
    before = snapshot(models, model)
    values = {name: array + 1 for name, array in as_stored(layer, configuration).items()}
    *_, last = values
    values[last] = np.zeros((*values[last].shape, 2), np.float32)
    with pytest.raises(cc.ClipcoreError, match=last.replace(".", r"\.")):
        models.write(model, values)
    assert_unchanged(models, model, before)


@plain
def test_an_unknown_name_is_refused_on_reading_and_writing(models: Any, configuration: LayerConfiguration) -> None:
    model, _ = build(models, configuration)
    before = snapshot(models, model)
    with pytest.raises(cc.ClipcoreError, match="no such tensor"):
        models.read(model, ["no such tensor"])
    with pytest.raises(cc.ClipcoreError, match="no such tensor"):
        models.write(model, {"no such tensor": np.zeros(1, np.float32)})
    assert_unchanged(models, model, before)


def test_a_kind_that_no_one_knows_is_refused(models: Any) -> None:
    with pytest.raises(cc.MappingError, match="no such kind"):
        models.build_layer("no such kind", {}, {})


@plain
def test_running_a_model_changes_none_of_its_tensors(tracing: Any, configuration: LayerConfiguration) -> None:
    model, layer = build(tracing, configuration)
    before = snapshot(tracing, model)
    first = run(tracing, model, layer, configuration)
    assert_unchanged(tracing, model, before)
    checks.assert_same_bits([run(tracing, model, layer, configuration)], [first])


class Witness:
    """A watcher that keeps what it sees, and replaces what it is told to."""

    def __init__(self, inputs: Any = None, output: Any = None) -> None:
        self.inputs, self.output = inputs, output
        self.seen: list[tuple[str, str, Any]] = []

    def before(self, layer: str, inputs: list[Array]) -> list[Array] | None:
        self.seen.append(("before", layer, [np.array(x) for x in inputs]))
        return None if self.inputs is None else self.inputs

    def after(self, layer: str, output: Any) -> Any:
        self.seen.append(("after", layer, np.array(output)))
        return self.output


def _sample(layer: Layer, configuration: LayerConfiguration) -> Array:
    x = configuration.data()
    return np.moveaxis(x, 1, -1).copy() if layer.settings.get("channels") == "last" else x


@plain
def test_a_watcher_sees_what_flows_in_and_out_of_a_layer(tracing: Any, configuration: LayerConfiguration) -> None:
    model, layer = build(tracing, configuration)
    sample, witness = _sample(layer, configuration), Witness()
    output = tracing.run(model, sample, witness)
    seen = [(when, what) for when, name, what in witness.seen if name == layer.name]
    assert [when for when, _ in seen] == ["before", "after"]
    np.testing.assert_array_equal(seen[0][1][0], sample)
    np.testing.assert_array_equal(seen[1][1], output)


@plain
def test_a_watcher_replaces_what_flows_in_and_out(tracing: Any, configuration: LayerConfiguration) -> None:
    model, layer = build(tracing, configuration)
    sample = _sample(layer, configuration)
    plain_output = tracing.run(model, sample)
    other = np.ascontiguousarray(np.flip(sample, 0))
    into = tracing.run(model, sample, Witness(inputs=[other]))
    checks.assert_same_bits([into], [tracing.run(model, other)])
    checks.assert_same_bits([tracing.run(model, sample, Witness(output=plain_output + 1))], [plain_output + 1])


class Writer(Witness):
    """A watcher that writes weights as a layer is about to run."""

    def __init__(self, backend: Any, model: Any, values: dict[str, Array]) -> None:
        super().__init__()
        self.backend, self.model, self.values = backend, model, values

    def before(self, layer: str, inputs: list[Array]) -> None:
        self.backend.write(self.model, self.values)


@plain
def test_weights_written_as_a_layer_is_about_to_run_take_effect(
    tracing: Any, configuration: LayerConfiguration
) -> None:
    model, layer = build(tracing, configuration)
    values = as_stored(layer, configuration)
    tracing.write(model, {name: np.ones_like(array) for name, array in values.items()})
    output = run(tracing, model, layer, configuration, Writer(tracing, model, values))
    checks.assert_close_to_forward(output, forward(configuration))
    read = tracing.read(model, list(values))
    checks.assert_same_bits([np.asarray(read[name]) for name in values], list(values.values()))


class Thrower(Witness):
    """A watcher that fails."""

    def after(self, layer: str, output: Any) -> Any:
        raise ZeroDivisionError("the watcher failed")


@plain
def test_a_watcher_that_fails_leaves_the_model_as_it_was(tracing: Any, configuration: LayerConfiguration) -> None:
    model, layer = build(tracing, configuration)
    before = snapshot(tracing, model)
    output = run(tracing, model, layer, configuration)
    with pytest.raises(ZeroDivisionError, match="the watcher failed"):
        run(tracing, model, layer, configuration, Thrower())
    assert_unchanged(tracing, model, before)
    checks.assert_same_bits([run(tracing, model, layer, configuration)], [output])


@plain
def test_a_float64_copy_computes_the_reference_to_rounding(tracing: Any, configuration: LayerConfiguration) -> None:
    model, layer = build(tracing, configuration)
    before = snapshot(tracing, model)
    double = tracing.double(model)
    if double is None:
        pytest.skip(f"not offered: backend {tracing.name!r} makes no float64 copy of this layer")
    output = run(tracing, double, layer, configuration)
    assert output.dtype == np.float64
    np.testing.assert_allclose(output, forward(configuration), rtol=1e-12, atol=1e-12)
    assert_unchanged(tracing, model, before)
