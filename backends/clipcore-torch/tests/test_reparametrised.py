"""Weight norm and spectral norm in both forms: described by their tensors, and run with what is written to them."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from clipcore.backend import Tensor
from clipcore.mapping.kinds import base_role
from clipcore.mapping.operations import compute

MODULES = {
    "linear": (lambda: nn.Linear(3, 4), (2, 3)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False), (2, 4, 5)),
    "embedding": (lambda: nn.Embedding(5, 3), None),
}
NEW = "parametrizations.weight"
FORMS = {
    "weight norm": (
        parametrizations.weight_norm,
        {"kernel.magnitude": f"{NEW}.original0", "kernel.direction": f"{NEW}.original1"},
    ),
    "old weight norm": (
        nn.utils.weight_norm,
        {"kernel.magnitude": "weight_g", "kernel.direction": "weight_v"},
    ),
    "spectral norm": (
        parametrizations.spectral_norm,
        {"kernel.original": f"{NEW}.original", "kernel.u": f"{NEW}.0._u", "kernel.v": f"{NEW}.0._v"},
    ),
    "old spectral norm": (
        nn.utils.spectral_norm,
        {"kernel.original": "weight_orig", "kernel.u": "weight_u", "kernel.v": "weight_v"},
    ),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


every_module = pytest.mark.parametrize(("build", "shape"), MODULES.values(), ids=MODULES)


def sample_of(shape):
    return torch.tensor([0, 4, 2]) if shape is None else torch.randn(shape)


def baked(arrays, layer):
    """The kernel that the roles say, in float64."""
    roles = {role.removeprefix("kernel."): arrays[t.name].astype(np.float64) for role, t in layer.tensors.items()}
    if "direction" in roles:
        return compute("weight_norm", [roles["direction"], roles["magnitude"]], {})
    axis = {"axis": layer.settings["spectral_axis"]}
    return compute("spectral_norm", [roles["original"], roles["u"], roles["v"]], axis)


def rewritten(backend, model, layers):
    """Other values for every tensor of these layers, written into the model."""
    arrays = backend.read(model, [tensor.name for layer in layers for tensor in layer.tensors.values()])
    rng = np.random.default_rng(3)
    values = {name: rng.uniform(0.5, 1.5, array.shape).astype(array.dtype) for name, array in arrays.items()}
    backend.write(model, values)
    return values


@every_form
@every_module
def test_the_roles_are_the_tensors_that_make_the_kernel(backend, build, shape, form):
    plain, module = build(), form[0](build())
    (like,), (layer,) = backend.layers(plain), backend.layers(module)
    assert layer.kind == like.kind
    assert {role: t.name for role, t in layer.tensors.items() if role != "bias"} == form[1]
    assert {t.name for t in layer.tensors.values()} == set(module.state_dict())
    extra = set(layer.settings) - set(like.settings)
    assert extra == ({"spectral_axis"} if "kernel.u" in layer.tensors else set())
    assert {name: layer.settings[name] for name in like.settings} == like.settings
    for role, tensor in layer.tensors.items():
        vector = role in ("kernel.u", "kernel.v")
        assert tensor.trainable == (not vector)
        assert tensor.layout == ("..." if vector else like.tensors[base_role(role)].layout)


@every_form
@every_module
def test_the_module_computes_with_what_was_written_to_them(backend, build, shape, form):
    plain, module, sample = build(), form[0](build()), sample_of(shape)
    (layer,) = backend.layers(module)
    values = rewritten(backend, module, [layer])
    weights = {"weight": baked(values, layer).astype(np.float32)}
    backend.write(plain, weights | ({"bias": values["bias"]} if "bias" in values else {}))
    wanted = backend.run(plain, sample)
    assert np.allclose(backend.run(module, sample), wanted, atol=1e-5)
    assert np.allclose(module.eval()(sample).detach().numpy(), wanted, atol=1e-5)
    for name, value in values.items():
        assert np.array_equal(backend.read(module, [name])[name], value), name


class Writer:
    """Writes a layer's tensors as it is about to run."""

    def __init__(self, backend, model):
        self.backend, self.model, self.seen = backend, model, []

    def before(self, name, inputs):
        (layer,) = (layer for layer in self.backend.layers(self.model) if layer.name == name)
        rewritten(self.backend, self.model, [layer])

    def after(self, name, output):
        self.seen.append((name, output))


@every_form
@every_module
def test_what_a_watcher_writes_as_the_layer_is_about_to_run_takes_effect(backend, build, shape, form):
    model, sample = nn.Sequential(form[0](build())), sample_of(shape)
    writer = Writer(backend, model)
    output = backend.run(model, sample, writer)
    assert [name for name, _ in writer.seen] == ["0"]
    assert np.array_equal(writer.seen[0][1], output)
    assert np.array_equal(backend.run(model, sample), output)


@every_form
def test_training_goes_on_after_a_watched_run(backend, form):
    model, x = nn.Sequential(form[0](nn.Linear(3, 4)), nn.ReLU()), torch.randn(2, 3)
    backend.run(model, x)
    model(x).sum().backward()
    assert all(tensor.grad is not None for tensor in model.parameters())


@pytest.mark.parametrize("form", ["spectral norm", "weight norm"])
def test_inner_modules_of_a_parametrization_are_no_layers(backend, form):
    model = nn.Sequential(FORMS[form][0](nn.Linear(3, 4)), nn.Linear(4, 2))
    assert [layer.name for layer in backend.layers(model)] == ["0", "1"]
    (first, _) = backend.layers(model)
    assert first.tensors["bias"] == Tensor("0.bias", "bias", "out", (4,), "float32")


def test_a_norm_along_another_axis_is_described_where_the_groups_allow_it(backend):
    (linear,) = backend.layers(parametrizations.weight_norm(nn.Linear(3, 4), dim=1))
    assert (linear.kind, linear.tensors["kernel.magnitude"].shape) == ("linear", (1, 3))
    (grouped,) = backend.layers(parametrizations.weight_norm(nn.Conv1d(4, 4, 3, groups=2), dim=1))
    (all_of_it,) = backend.layers(parametrizations.weight_norm(nn.Linear(3, 4), dim=None))
    (transposed,) = backend.layers(parametrizations.spectral_norm(nn.ConvTranspose1d(4, 6, 3)))
    assert (grouped.kind, all_of_it.kind) == ("raw", "raw")
    assert transposed.settings["spectral_axis"] == 1


class Halved(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.tensor(0.5))

    def forward(self, weight):
        return weight * self.by


def twice(module):
    return parametrizations.spectral_norm(parametrizations.weight_norm(module))


def of_the_bias(module):
    return parametrizations.weight_norm(module, "bias")


def halved(module):
    parametrize.register_parametrization(module, "weight", Halved())
    return module


@pytest.mark.parametrize("change", [twice, of_the_bias, halved, parametrizations.orthogonal])
def test_any_other_parametrization_is_one_raw_layer_with_all_its_tensors(backend, change):
    model = nn.Sequential(change(nn.Linear(3, 3)))
    (layer,) = backend.layers(model)
    assert (layer.name, layer.kind) == ("0", "raw")
    assert layer.why == "a Linear whose tensors are made of others in a way that no rule describes"
    assert {t.name for t in layer.tensors.values()} == set(model.state_dict())
    assert {f"0.{role}" for role in layer.tensors} == set(model.state_dict())
    writer = Writer(backend, model)
    writer.before = lambda name, inputs: None
    backend.run(model, torch.randn(2, 3), writer)
    assert [name for name, _ in writer.seen] == ["0"]


@every_form
def test_a_float64_copy_is_made(backend, form):
    module, x = nn.Sequential(form[0](nn.Linear(3, 4))), np.ones((2, 3))
    wide = backend.double(module)
    output = backend.run(wide, x)
    assert output.dtype == np.float64
    assert np.allclose(output, backend.run(module, x), atol=1e-6)
