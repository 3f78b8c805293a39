"""The layers of a framework: as it stores, describes and runs them, against the NumPy forward of each kind."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

import clipcore as cc
from clipcore.backend import Layer, Tensor
from clipcore.mapping.kinds import GRU_GATES, KINDS, LSTM_GATES
from clipcore.mapping.layouts import apply_pattern, canonical_layout, canonical_shape, sizes_of, stored
from clipcore.mapping.reference import FORWARD
from clipcore.testing import checks
from clipcore.testing.layers import LayerConfiguration, attention_shapes, layer_configurations, recurrent_shapes

Array = np.ndarray[Any, np.dtype[Any]]

_CONV = {
    "stride": (1, 1),
    "padding": ((0, 0), (0, 0)),
    "padding_mode": "zeros",
    "dilation": (1, 1),
    "groups": 1,
    "activation": None,
}
_TRANSPOSE = {"stride": (1, 1), "crop": ((0, 0), (0, 0)), "dilation": (1, 1), "groups": 1, "activation": None}
_POOL = {"window": (3, 2), "stride": (2, 1), "padding": ((0, 0), (0, 0)), "ceil": False}
_BIASES = ("bias", "recurrent_bias")


def _recurrent(kind: str, ins: int = 2, units: int = 3, *, reverse: bool = False) -> tuple[LayerConfiguration, ...]:
    """With two biases, and with the one that is their sum: a framework has the one or the other."""
    gates = {"lstm": LSTM_GATES, "gru": GRU_GATES, "rnn": ()}[kind]
    known = {"activation": "tanh", "recurrent_activation": "sigmoid", "reset_after": True, "reverse": reverse}
    settings = {name: known[name] for name in KINDS[kind].settings}
    return tuple(
        LayerConfiguration(kind, settings, recurrent_shapes(gates, ins, units, biases), (2, 4, ins))
        for biases in (_BIASES, _BIASES[:1])
    )


def _attention(heads: int, size: int, features: Mapping[str, int]) -> LayerConfiguration:
    wide = heads * size
    outs = dict.fromkeys(("query", "key", "value", "output"), wide)
    shapes = attention_shapes({"query": wide, "output": wide, **features}, outs, bias=True)
    return LayerConfiguration("attention", {"heads": heads}, shapes, (2, 3, 4))


# What every framework that has models and layers of the kind is expected to have, in one form of several where
# frameworks differ; the properties draw the others.
PLAIN: dict[str, tuple[LayerConfiguration, ...]] = {
    "linear": (LayerConfiguration("linear", {"activation": None}, {"kernel": (4, 3), "bias": (4,)}, (2, 3)),),
    "square linear": (LayerConfiguration("linear", {"activation": None}, {"kernel": (3, 3), "bias": (3,)}, (2, 3)),),
    "conv": (LayerConfiguration("conv", _CONV, {"kernel": (1, 4, 3, 3, 2), "bias": (4,)}, (2, 3, 6, 5)),),
    "square conv": (LayerConfiguration("conv", _CONV, {"kernel": (1, 3, 3, 3, 3), "bias": (3,)}, (2, 3, 5, 6)),),
    "depthwise conv": (
        LayerConfiguration("conv", {**_CONV, "groups": 3}, {"kernel": (3, 2, 1, 2, 3), "bias": (6,)}, (2, 3, 5, 6)),
    ),
    "conv_transpose": (
        LayerConfiguration(
            "conv_transpose", {**_TRANSPOSE, "stride": (2, 2)}, {"kernel": (1, 3, 4, 3, 2), "bias": (4,)}, (2, 3, 4, 5)
        ),
    ),
    "square conv_transpose": (
        LayerConfiguration("conv_transpose", _TRANSPOSE, {"kernel": (1, 3, 3, 3, 3), "bias": (3,)}, (2, 3, 5, 4)),
    ),
    "cropped conv_transpose": tuple(
        LayerConfiguration(
            "conv_transpose",
            {**_TRANSPOSE, "stride": (2, 2), "crop": (crop, crop)},
            {"kernel": (1, 2, 2, 3, 3), "bias": (2,)},
            (2, 2, 4, 5),
        )
        for crop in ((1, 0), (0, 1))
    ),
    "batch_norm": (
        LayerConfiguration(
            "batch_norm",
            {"eps": 0.25, "momentum": 0.25},
            dict.fromkeys(("scale", "bias", "running_mean", "running_var"), (3,)),
            (2, 3, 4, 5),
        ),
    ),
    "layer_norm": (LayerConfiguration("layer_norm", {"eps": 0.25}, {"scale": (5,), "bias": (5,)}, (2, 3, 5)),),
    "group_norm": (
        LayerConfiguration("group_norm", {"groups": 2, "eps": 0.25}, {"scale": (6,), "bias": (6,)}, (2, 6, 3, 2)),
    ),
    "instance norm": (
        LayerConfiguration("group_norm", {"groups": 3, "eps": 0.25}, {"scale": (3,), "bias": (3,)}, (2, 3, 4, 5)),
    ),
    "rms_norm": (LayerConfiguration("rms_norm", {"eps": 0.25}, {"scale": (5,)}, (2, 3, 5)),),
    "embedding": (LayerConfiguration("embedding", {}, {"kernel": (5, 5)}, (2, 3)),),
    "lstm": _recurrent("lstm"),
    "square lstm": _recurrent("lstm", 3, 3),
    "reversed lstm": _recurrent("lstm", reverse=True),
    "gru": _recurrent("gru"),
    "square gru": _recurrent("gru", 3, 3),
    "reversed gru": _recurrent("gru", reverse=True),
    "rnn": _recurrent("rnn"),
    "square rnn": _recurrent("rnn", 3, 3),
    "reversed rnn": _recurrent("rnn", reverse=True),
    "prelu": (LayerConfiguration("prelu", {}, {"slope": (3,)}, (2, 3, 4, 3)),),
    "relu": (LayerConfiguration("activation", {"function": "relu"}, {}, (4, 5)),),
    "leaky_relu": (LayerConfiguration("activation", {"function": "leaky_relu", "slope": 0.25}, {}, (4, 5)),),
    "softmax": (LayerConfiguration("activation", {"function": "softmax", "axis": -1}, {}, (4, 5)),),
    "avg_pool": (LayerConfiguration("avg_pool", {**_POOL, "count_include_pad": False}, {}, (2, 3, 6, 5)),),
    "max_pool": (LayerConfiguration("max_pool", {**_POOL, "dilation": (1, 1)}, {}, (2, 3, 6, 5)),),
    "dropout": (LayerConfiguration("dropout", {"rate": 0.25}, {}, (2, 3)),),
    "attention": (_attention(2, 3, {"key": 6, "value": 6}),),
    "attention with other features": (_attention(2, 3, {"key": 5, "value": 4}),),
    "linear with weight norm": (
        LayerConfiguration(
            "linear",
            {"activation": None},
            {"kernel.direction": (3, 3), "kernel.magnitude": (3, 1), "bias": (3,)},
            (2, 3),
        ),
    ),
    "conv with weight norm": (
        LayerConfiguration(
            "conv",
            {**_CONV, "groups": 2},
            {"kernel.direction": (2, 2, 4, 3, 2), "kernel.magnitude": (2, 2, 1, 1, 1), "bias": (4,)},
            (2, 8, 6, 5),
        ),
    ),
    "linear with spectral norm": (
        LayerConfiguration(
            "linear",
            {"activation": None, "spectral_axis": 0},
            {"kernel.original": (4, 3), "kernel.u": (4,), "kernel.v": (3,), "bias": (4,)},
            (2, 3),
        ),
    ),
}
OWNING = [name for name, forms in PLAIN.items() if forms[0].shapes]
SINGLE = [name for name, forms in PLAIN.items() if forms[0].kind != "attention"]
ATTENTION = [name for name in PLAIN if name not in SINGLE]

# What a framework says of a layer that it computes all the same, and once in a process, is no fault of the backend.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
plain = pytest.mark.parametrize("name", PLAIN)
plain_owning = pytest.mark.parametrize("name", OWNING)
plain_single = pytest.mark.parametrize("name", SINGLE)
plain_attention = pytest.mark.parametrize("name", ATTENTION)
every_kind = pytest.mark.parametrize("kind", FORWARD)
every_owning_kind = pytest.mark.parametrize("kind", list(dict.fromkeys(PLAIN[name][0].kind for name in OWNING)))


@pytest.fixture(scope="module")
def tracing(models: Any) -> Any:
    """The backend, where it can run models."""
    if not hasattr(models, "run"):
        pytest.skip(f"not offered: backend {models.name!r} runs no models; it ends with models, the second tier")
    return models


@dataclass(frozen=True)
class Built:
    """A model that is one layer, as the backend describes it; attention is four, by their names."""

    backend: Any
    model: Any
    configuration: LayerConfiguration
    layers: Mapping[str, Layer]

    @property
    def layer(self) -> Layer:
        """The layer, the last of several."""
        return list(self.layers.values())[-1]

    def tensors(self) -> Iterator[tuple[str, Layer, Tensor]]:
        """(role in the configuration, layer, tensor) for every tensor that the configuration has."""
        for role in self.configuration.shapes:
            part, _, rest = role.partition(".")
            layer, own = (self.layers[part], rest) if part in self.layers else (self.layers[""], role)
            assert own in layer.tensors, f"layer {layer.name!r} is described without {own}, which it was built with"
            yield role, layer, layer.tensors[own]

    def read(self) -> dict[str, Array]:
        """Copies of the stored tensors by name."""
        names = list(dict.fromkeys(tensor.name for _, _, tensor in self.tensors()))
        return {name: np.array(array) for name, array in self.backend.read(self.model, names).items()}

    def as_stored(self) -> dict[str, Array]:
        """The configuration's weights by the names and in the layouts of the framework."""
        weights, values = self.configuration.weights(), self.read()
        for role, layer, tensor in self.tensors():
            piece = stored(tensor, layer, weights[role])
            assert piece.shape == tensor.shape, f"{role} has shape {tensor.shape}, and {piece.shape} by its layout"
            values[tensor.name][_bounds(tensor)] = piece
        return values

    def as_canonical(self) -> dict[str, Array]:
        """What the framework has stored, in the configuration's words."""
        values = self.read()
        return {
            role: apply_pattern(
                values[tensor.name][_bounds(tensor)],
                f"{tensor.layout} -> {canonical_layout(layer, tensor.role)}",
                sizes_of(layer, tensor),
                role,
            )
            for role, layer, tensor in self.tensors()
        }

    def sample(self) -> Any:
        """The configuration's data, with the channel axis where the layer has it."""
        x = self.configuration.data()
        return np.moveaxis(x, 1, -1).copy() if self._channels_last else x

    def run(self, watcher: Any = None) -> Array:
        """The model's output on that, with the channel axis first."""
        output = self.backend.run(self.model, self.sample(), watcher)
        assert isinstance(output, np.ndarray), f"the output is a {type(output).__name__}; expected an array"
        return np.moveaxis(output, -1, 1) if self._channels_last else output

    @property
    def _channels_last(self) -> bool:
        return self.layer.settings.get("channels") == "last"


def _bounds(tensor: Tensor) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in tensor.within)


def build(backend: Any, configuration: LayerConfiguration) -> Built:
    """A model of one layer with the configuration's weights in it."""
    model = backend.build_layer(configuration.kind, configuration.settings, configuration.shapes)
    listed = [layer for layer in backend.layers(model) if layer.tensors]
    if not configuration.shapes:
        listed = backend.operations(model)
    kind = "linear" if configuration.kind == "attention" else configuration.kind
    reverse = configuration.settings.get("reverse")
    found = [layer for layer in listed if layer.kind == kind and layer.settings.get("reverse") == reverse]
    assert len(found) == len(configuration.parts), f"described as {listed}"
    built = Built(backend, model, configuration, dict(zip(configuration.parts, found, strict=True)))
    backend.write(model, built.as_stored())
    return built


def build_plain(backend: Any, name: str) -> Built:
    """The layer of that name in the first form that the framework has; it has one, or no layer of the family at all."""
    refusals = [_refusal(backend, name, form) for form in range(len(PLAIN[name]))]
    if None in refusals:
        return build(backend, PLAIN[name][refusals.index(None)])
    family = PLAIN[name][0].family
    assert not _offers(backend, family), f"{family} is refused, and others are not: {refusals}"
    pytest.skip(f"not offered: backend {backend.name!r} builds no layer of kind {family!r}")


@functools.cache
def _refusal(backend: Any, name: str, form: int) -> str | None:
    """What a backend says that refuses a plain layer."""
    configuration = PLAIN[name][form]
    try:
        backend.build_layer(configuration.kind, configuration.settings, configuration.shapes)
    except cc.MappingError as err:
        return str(err)
    return None


def _offers(backend: Any, family: str) -> bool:
    """Whether a backend builds any of the plain layers of a family."""
    forms = [(name, n) for name, forms in PLAIN.items() for n, form in enumerate(forms) if form.family == family]
    return any(_refusal(backend, name, n) is None for name, n in forms)


def build_any(backend: Any, configuration: LayerConfiguration) -> Built:
    """The layer; one that the framework does not have is no example, and none of its kind a reason to skip."""
    if not _offers(backend, configuration.kind):
        pytest.skip(f"not offered: backend {backend.name!r} builds no layer of kind {configuration.kind!r}")
    try:
        return build(backend, configuration)
    except cc.MappingError:
        reject()


def forward(configuration: LayerConfiguration) -> Array:
    return FORWARD[configuration.kind](configuration.data(), configuration.weights(), configuration.settings)


def snapshot(built: Built) -> dict[str, Array]:
    names = [t.name for layer in built.backend.layers(built.model) for t in layer.tensors.values()]
    return {name: np.array(array) for name, array in built.backend.read(built.model, names).items()}


def assert_unchanged(built: Built, before: dict[str, Array]) -> None:
    after = snapshot(built)
    assert after.keys() == before.keys()
    for name in before:
        equal = after[name].tobytes() == before[name].tobytes()
        assert equal, f"{name} is {after[name]}, and was {before[name]}"


def assert_holds(built: Built, values: Mapping[str, Array]) -> None:
    read = built.backend.read(built.model, list(values))
    checks.assert_same_bits([np.asarray(read[name]) for name in values], list(values.values()))


@plain
def test_a_plain_layer_computes_what_the_reference_says(tracing: Any, name: str) -> None:
    built = build_plain(tracing, name)
    checks.assert_close_to_forward(built.run(), forward(built.configuration))


@every_kind
@given(data=st.data())
def test_any_layer_of_a_kind_computes_what_the_reference_says(tracing: Any, kind: str, data: st.DataObject) -> None:
    built = build_any(tracing, data.draw(layer_configurations(kind)))
    checks.assert_close_to_forward(built.run(), forward(built.configuration))


@every_owning_kind
@given(data=st.data())
def test_weights_are_read_back_as_they_were_written(models: Any, kind: str, data: st.DataObject) -> None:
    built = build_any(models, data.draw(layer_configurations(kind)))
    assert_holds(built, built.as_stored())
    wanted, canonical = built.configuration.weights(), built.as_canonical()
    checks.assert_same_bits([np.ascontiguousarray(canonical[role]) for role in wanted], list(wanted.values()))


@every_owning_kind
@given(data=st.data())
def test_parts_of_a_stored_tensor_are_apart_and_fill_it(models: Any, kind: str, data: st.DataObject) -> None:
    built = build_any(models, data.draw(layer_configurations(kind)))
    covered = {name: np.zeros(array.shape, np.int64) for name, array in built.read().items()}
    for _, _, tensor in built.tensors():
        assert tensor.stored_shape == covered[tensor.name].shape
        covered[tensor.name][_bounds(tensor)] += 1
    for name, times in covered.items():
        assert (times == 1).all(), f"elements of {name} are in {times.min()} to {times.max()} roles"


@every_kind
@given(data=st.data())
def test_a_layer_is_described_with_the_settings_it_was_built_with(models: Any, kind: str, data: st.DataObject) -> None:
    built = build_any(models, data.draw(layer_configurations(kind)))
    wanted = {name: value for name, value in built.configuration.settings.items() if _matters(name, built)}
    for layer in built.layers.values():
        described = {name: layer.settings.get(name, "missing") for name in wanted}
        assert _alike(described, wanted), f"described with {described}, and built with {wanted}"


def _matters(name: str, built: Built) -> bool:
    """Whether a setting can change anything; and of attention, the heads are not alike in all parts."""
    settings = built.configuration.settings
    if name == "count_include_pad":
        return settings["padding"] == "same" or any(map(any, settings["padding"]))
    return name != "heads"


def _alike(described: Any, wanted: Any) -> bool:
    """Equal, lists and tuples alike, and numbers as a framework keeps them: 1 - 0.99 is not 0.01 to the last bit."""
    if isinstance(wanted, Mapping):
        return all(_alike(described[name], wanted[name]) for name in wanted)
    if isinstance(wanted, list | tuple):
        same = isinstance(described, list | tuple) and len(described) == len(wanted)
        return same and all(map(_alike, described, wanted))
    return bool(described == pytest.approx(wanted, rel=1e-6) if isinstance(wanted, float) else described == wanted)


@given(data=st.data())
def test_projections_of_attention_are_described_with_their_heads(models: Any, data: st.DataObject) -> None:
    built = build_any(models, data.draw(layer_configurations("attention")))
    heads, shapes = built.configuration.settings["heads"], built.configuration.shapes
    fewer = shapes["key.kernel"][0] * heads // shapes["query.kernel"][0]
    wanted = {"query": heads, "key": fewer, "value": fewer, "output": heads}
    assert {part: layer.settings["heads"] for part, layer in built.layers.items()} == wanted


@plain_owning
def test_tensors_are_described_with_the_role_layout_and_shape_they_have(models: Any, name: str) -> None:
    built = build_plain(models, name)
    owned = [role for layer in built.layers.values() for role in layer.tensors if role != "batch_count"]
    assert len(owned) == len(built.configuration.shapes)
    values = built.read()
    for role, layer, tensor in built.tensors():
        assert layer.tensors[tensor.role] is tensor
        assert tensor.dtype == "float32"
        assert canonical_shape(layer, tensor.role) == built.configuration.shapes[role]
        assert values[tensor.name].shape == tensor.stored_shape
        assert values[tensor.name][_bounds(tensor)].shape == tensor.shape
        assert tensor.trainable == (tensor.role not in _BUFFERS)


_BUFFERS = ("running_mean", "running_var", "kernel.u", "kernel.v")


@plain_owning
def test_a_model_keeps_no_reference_to_what_was_written(models: Any, name: str) -> None:
    built = build_plain(models, name)
    values = built.as_stored()
    models.write(built.model, values)
    before = snapshot(built)
    for array in values.values():
        array[...] = 77
    assert_unchanged(built, before)


@plain_owning
def test_what_is_read_to_keep_stays_as_it_was(models: Any, name: str) -> None:
    built = build_plain(models, name)
    values = built.as_stored()
    models.write(built.model, values)
    kept = models.read(built.model, list(values), keep=True)
    models.write(built.model, {tensor: array + 1 for tensor, array in values.items()})
    checks.assert_same_bits([np.asarray(kept[tensor]) for tensor in values], list(values.values()))


@plain_owning
def test_a_write_of_another_shape_is_refused_and_writes_nothing(models: Any, name: str) -> None:
    built = build_plain(models, name)
    before = snapshot(built)
    values = {tensor: array + 1 for tensor, array in built.as_stored().items()}
    *_, last = values
    values[last] = np.zeros((*values[last].shape, 2), np.float32)
    with pytest.raises(cc.ClipcoreError, match=re.escape(last)):
        models.write(built.model, values)
    assert_unchanged(built, before)


@plain_owning
def test_an_unknown_name_is_refused_on_reading_and_writing(models: Any, name: str) -> None:
    built = build_plain(models, name)
    before = snapshot(built)
    with pytest.raises(cc.ClipcoreError, match="no such tensor"):
        models.read(built.model, ["no such tensor"])
    with pytest.raises(cc.ClipcoreError, match="no such tensor"):
        models.write(built.model, {"no such tensor": np.zeros(1, np.float32)})
    assert_unchanged(built, before)


def test_a_kind_that_no_one_knows_is_refused(models: Any) -> None:
    with pytest.raises(cc.MappingError, match="no such kind"):
        models.build_layer("no such kind", {}, {})


@plain
def test_running_a_model_changes_none_of_its_tensors(tracing: Any, name: str) -> None:
    built = build_plain(tracing, name)
    before = snapshot(built)
    first = built.run()
    assert_unchanged(built, before)
    checks.assert_same_bits([built.run()], [first])


class Witness:
    """A watcher that keeps what it sees, and replaces what it is told to.

    Args:
        layer: the layer of which it replaces something; None for any.
        inputs: what takes the place of its inputs.
        output: makes what takes the place of its output.
    """

    def __init__(
        self, layer: str | None = None, inputs: Any = None, output: Callable[[Any], Any] | None = None
    ) -> None:
        self.layer, self.inputs, self.output = layer, inputs, output
        self.seen: list[tuple[str, str, Any]] = []

    def before(self, layer: str, inputs: list[Array]) -> list[Array] | None:
        self.seen.append(("before", layer, [np.array(x) for x in inputs]))
        return self.inputs if self.layer in (None, layer) else None

    def after(self, layer: str, output: Any) -> Any:
        self.seen.append(("after", layer, np.array(output)))
        return self.output(output) if self.output and self.layer in (None, layer) else None

    def of(self, layer: Layer) -> tuple[Array, Array]:
        """What flowed in and out of a layer that ran once and takes one input."""
        seen = [(when, what) for when, name, what in self.seen if name == layer.name]
        assert [when for when, _ in seen] == ["before", "after"], f"{layer.name!r} was seen {[w for w, _ in seen]}"
        (inputs,) = seen[0][1]
        return inputs, seen[1][1]


@plain_single
def test_a_watcher_sees_what_flows_in_and_out_of_a_layer(tracing: Any, name: str) -> None:
    built, witness = build_plain(tracing, name), Witness()
    output = tracing.run(built.model, built.sample(), witness)
    inputs, given_back = witness.of(built.layer)
    np.testing.assert_array_equal(inputs, built.sample())
    np.testing.assert_array_equal(given_back, output)


@plain_single
def test_a_watcher_replaces_what_flows_in_and_out(tracing: Any, name: str) -> None:
    built = build_plain(tracing, name)
    sample = built.sample()
    plain_output = tracing.run(built.model, sample)
    other = np.ascontiguousarray(np.flip(sample, 0))
    into = tracing.run(built.model, sample, Witness(built.layer.name, inputs=[other]))
    checks.assert_same_bits([into], [tracing.run(built.model, other)])
    out = tracing.run(built.model, sample, Witness(built.layer.name, output=lambda output: output + 1))
    checks.assert_same_bits([out], [plain_output + 1])


@plain_attention
def test_a_watcher_sees_the_four_linear_layers_of_attention(tracing: Any, name: str) -> None:
    built, witness = build_plain(tracing, name), Witness()
    output = tracing.run(built.model, built.sample(), witness)
    weights, samples = built.configuration.weights(), built.sample()
    for part, layer in built.layers.items():
        inputs, given_back = witness.of(layer)
        tensors = {role: weights[f"{part}.{role}"] for role in layer.tensors}
        checks.assert_close_to_forward(given_back, FORWARD["linear"](inputs, tensors, {}))
    for part, sample in zip(("query", "key", "value"), samples, strict=True):
        np.testing.assert_array_equal(witness.of(built.layers[part])[0], sample)
    np.testing.assert_array_equal(witness.of(built.layers["output"])[1], output)


@plain_attention
@pytest.mark.parametrize("part", ["query", "key", "value", "output"])
def test_a_watcher_replaces_what_flows_in_the_layers_of_attention(tracing: Any, name: str, part: str) -> None:
    built = build_plain(tracing, name)
    layer, weights = built.layers[part].name, built.configuration.weights()
    out = built.run(Witness(layer, output=lambda output: output * 2))
    doubled = {role: array * 2 if role.startswith(f"{part}.") else array for role, array in weights.items()}
    data, settings = built.configuration.data(), built.configuration.settings
    checks.assert_close_to_forward(out, FORWARD["attention"](data, doubled, settings))
    seen = Witness()
    built.run(seen)
    inputs, _ = seen.of(built.layers[part])
    bias = weights[f"{part}.bias"]
    only_bias = {**weights, f"{part}.kernel": weights[f"{part}.kernel"] * 0, f"{part}.bias": bias}
    into = built.run(Witness(layer, inputs=[np.zeros_like(inputs)]))
    checks.assert_close_to_forward(into, FORWARD["attention"](data, only_bias, settings))


class Writer(Witness):
    """A watcher that writes weights as a layer is about to run."""

    def __init__(self, built: Built, values: dict[str, Array]) -> None:
        super().__init__()
        self.built, self.values = built, values

    def before(self, layer: str, inputs: list[Array]) -> None:
        self.built.backend.write(self.built.model, self.values)


@plain_owning
def test_weights_written_as_a_layer_is_about_to_run_take_effect(tracing: Any, name: str) -> None:
    built = build_plain(tracing, name)
    values = built.as_stored()
    tracing.write(built.model, {tensor: np.ones_like(array) for tensor, array in values.items()})
    output = built.run(Writer(built, values))
    checks.assert_close_to_forward(output, forward(built.configuration))
    assert_holds(built, values)


class Thrower(Witness):
    """A watcher that fails."""

    def after(self, layer: str, output: Any) -> Any:
        raise ZeroDivisionError("the watcher failed")


@plain
def test_a_watcher_that_fails_leaves_the_model_as_it_was(tracing: Any, name: str) -> None:
    built = build_plain(tracing, name)
    before = snapshot(built)
    output = built.run()
    with pytest.raises(ZeroDivisionError, match="the watcher failed"):
        built.run(Thrower())
    assert_unchanged(built, before)
    checks.assert_same_bits([built.run()], [output])


@plain_owning
def test_a_float64_copy_computes_the_reference_to_rounding(tracing: Any, name: str) -> None:
    built = build_plain(tracing, name)
    before = snapshot(built)
    double = tracing.double(built.model)
    if double is None:
        pytest.skip(f"not offered: backend {tracing.name!r} makes no float64 copy of this layer")
    output = replace(built, model=double).run()
    assert output.dtype == np.float64
    np.testing.assert_allclose(output, forward(built.configuration), rtol=1e-12, atol=1e-12)
    assert_unchanged(built, before)
