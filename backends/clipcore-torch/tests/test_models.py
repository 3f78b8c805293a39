"""Describing, reading, writing and building models; every row of the table against the canonical layouts."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import clipcore as cc
from clipcore.backend import Layer, Stored, Tensor
from clipcore.mapping import reference
from clipcore.mapping.kinds import KINDS
from clipcore.mapping.layouts import apply_pattern, axis_sizes, canonical_layout, canonical_shape, stored
from clipcore_torch._layers import TABLE


def randomised(model):
    """Every parameter and statistic random, so that no mistake hides behind a zero or a one."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
            else:
                tensor.fill_(7)
    return model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), groups=2, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("kept", torch.zeros(2))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x):
        return self.bn(self.conv(x)) * self.scale


MODULES = [
    (nn.Linear(3, 5), (2, 3)),
    (nn.Linear(3, 5, bias=False), (2, 4, 3)),
    (nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), groups=2), (2, 4, 7, 6)),
    (nn.Conv2d(4, 12, 3, groups=4, bias=False), (2, 4, 7, 6)),
    (nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)), (2, 3, 8, 9)),
    (nn.Conv2d(3, 4, 3, padding="valid", dilation=2), (2, 3, 8, 9)),
    (nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"), (2, 3, 8, 9)),
    (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 8, 9)),
    (nn.Conv1d(3, 4, 3, padding=1, padding_mode="replicate"), (2, 3, 8)),
    (nn.Conv3d(2, 4, (2, 3, 1), padding=(1, 0, 0), dilation=(1, 1, 1), groups=2), (2, 2, 4, 5, 3)),
    (nn.BatchNorm1d(3, eps=0.3), (4, 3)),
    (nn.BatchNorm1d(3), (4, 3, 5)),
    (nn.BatchNorm2d(3, momentum=0.3, affine=False), (4, 3, 5, 2)),
    (nn.BatchNorm3d(3), (4, 3, 5, 2, 2)),
    (nn.SyncBatchNorm(3), (4, 3, 5)),
    (nn.LayerNorm(4, eps=0.2), (2, 3, 4)),
    (nn.LayerNorm((3, 4), bias=False), (2, 3, 4)),
    (nn.Embedding(7, 3), None),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 5)),
    (nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 3), bias=False), (2, 4, 3, 4)),
    (nn.ConvTranspose2d(2, 3, 2, stride=3, output_padding=(2, 1)), (2, 2, 3, 4)),
    (nn.ConvTranspose3d(4, 2, 2, stride=2, groups=2, padding=1), (2, 4, 3, 2, 3)),
    (nn.InstanceNorm1d(4, affine=True, eps=0.3), (2, 4, 5)),
    (nn.InstanceNorm2d(3, affine=True), (2, 3, 5, 4)),
    (nn.InstanceNorm3d(3, affine=True), (2, 3, 5, 4, 2)),
    (nn.InstanceNorm2d(3, track_running_stats=True, momentum=0.3), (2, 3, 5, 4)),
    (nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (2, 3, 5, 4)),
    (nn.GroupNorm(2, 6, eps=0.2), (2, 6, 5, 4)),
    (nn.GroupNorm(3, 6), (2, 6)),
    (nn.RMSNorm(4, eps=0.2), (2, 3, 4)),
    (nn.RMSNorm((3, 4)), (2, 3, 4)),
    (nn.PReLU(), (2, 3, 4)),
    (nn.PReLU(3), (2, 3, 4)),
]


def conv_transpose(x, tensors, settings):
    """Every place of the input adds its kernel to the output, of which the crop is cut."""
    kernel = tensors["kernel"].astype(np.float64)
    groups, ins, outs, *window = kernel.shape
    stride, dilation, crop = (settings[name] for name in ("stride", "dilation", "crop"))
    sizes = x.shape[2:]
    counts = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(sizes, stride, window, dilation, strict=True)]
    kept = tuple(slice(before, n - after) for (before, after), n in zip(crop, counts, strict=True))
    more = [max(0, -after) for _, after in crop]
    y = np.zeros((x.shape[0], groups, outs, *map(sum, zip(counts, more, strict=True))))
    grouped = x.reshape(x.shape[0], groups, ins, *sizes).astype(np.float64)
    for place in np.ndindex(*sizes):
        for tap in np.ndindex(*window):
            at = tuple(p * s + t * d for p, s, t, d in zip(place, stride, tap, dilation, strict=True))
            y[(..., *at)] += np.einsum("ngi,gio->ngo", grouped[(..., *place)], kernel[(..., *tap)])
    y = y[(..., *kept)]
    y = y.reshape(x.shape[0], groups * outs, *y.shape[3:])
    return y + tensors.get("bias", np.zeros(groups * outs)).reshape(-1, *[1] * len(sizes))


def group_norm(x, tensors, settings):
    grouped = x.reshape(x.shape[0], settings["groups"], -1).astype(np.float64)
    mean, variance = grouped.mean(-1, keepdims=True), grouped.var(-1, keepdims=True)
    y = ((grouped - mean) / np.sqrt(variance + settings["eps"])).reshape(x.shape)
    scale, bias = (tensors[role].reshape(-1, *[1] * (x.ndim - 2)) for role in ("scale", "bias"))
    return y * scale + bias


def rms_norm(x, tensors, settings):
    axes = tuple(range(-tensors["scale"].ndim, 0))
    return x / np.sqrt(np.square(x).mean(axes, keepdims=True) + settings["eps"]) * tensors["scale"]


def prelu(x, tensors, settings):
    return np.where(x > 0, x, x * tensors["slope"].reshape(-1, *[1] * (x.ndim - 2)))


# written here once more, so that the table is held against two definitions
FORMULAS = {"conv_transpose": conv_transpose, "group_norm": group_norm, "rms_norm": rms_norm, "prelu": prelu}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("module", "shape"), MODULES, ids=lambda value: str(value))
def test_a_layer_computes_what_its_description_says(backend, module, shape):
    randomised(module).eval()
    (layer,) = backend.layers(module)
    x = np.random.default_rng(0).standard_normal(shape) if shape else np.array([[0, 6], [3, 3]])
    arrays = backend.read(module, [tensor.name for tensor in layer.tensors.values()])
    canonical = {
        role: apply_pattern(
            arrays[tensor.name], f"{tensor.layout} -> {canonical_layout(layer, role)}", axis_sizes(layer), role
        )
        for role, tensor in layer.tensors.items()
    }
    definitions = [table[layer.kind] for table in (reference.FORWARD, FORMULAS) if layer.kind in table]
    assert definitions
    actual = backend.run(module, x)
    for forward in definitions:
        wanted = forward(x, canonical, layer.settings)
        assert actual.shape == wanted.shape
        assert np.abs(actual - wanted).max() <= 1e-5 * np.abs(wanted).max()
    for role, tensor in layer.tensors.items():
        assert canonical_shape(layer, role) == canonical[role].shape
        assert np.array_equal(stored(tensor, layer, canonical[role]), arrays[tensor.name])


@pytest.mark.parametrize(("module", "shape"), MODULES, ids=lambda value: str(value))
def test_a_built_layer_is_described_as_it_was_asked_for(backend, module, shape):
    (layer,) = backend.layers(module)
    shapes = {role: canonical_shape(layer, role) for role in layer.tensors if role != "batch_count"}
    built = backend.build_layer(layer.kind, layer.settings, shapes)
    (again,) = backend.layers(built)
    assert again.kind == layer.kind
    assert again.settings == layer.settings
    assert again.tensors == layer.tensors


def test_the_table_has_every_module_that_the_tests_build():
    assert {type(module) for module, _ in MODULES} == set(TABLE)
    for row in (row for rows in TABLE.values() for row in rows):
        assert {role for role, _ in row.roles.values()} <= set(KINDS[row.kind].roles)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_rms_norm_without_an_eps_is_described_with_the_one_it_takes(backend, dtype):
    module = nn.RMSNorm(8, dtype=dtype)
    eps = backend.layers(module)[0].settings["eps"]
    x = torch.full((8,), eps**0.5).to(dtype)
    assert module(x).tolist() == pytest.approx([0.5**0.5] * 8, rel=1e-2)


def test_a_batch_norm_without_momentum_stays_without(backend):
    (layer,) = backend.layers(nn.BatchNorm1d(3, momentum=None))
    assert layer.settings["momentum"] is None


def test_a_quantizable_linear_is_linear(backend):
    module = nn.modules.linear.NonDynamicallyQuantizableLinear(3, 2)
    assert [layer.kind for layer in backend.layers(module)] == ["linear"]


def test_layers_stand_in_the_order_and_under_the_names_of_the_model(backend):
    model = Net()
    layers = backend.layers(model)
    assert [(layer.name, layer.kind) for layer in layers] == [
        ("scale", "raw"),
        ("kept", "raw"),
        ("embed", "embedding"),
        ("conv", "conv"),
        ("bn", "batch_norm"),
        ("head", "linear"),
    ]
    scale, kept, embed, conv, norm, head = layers
    assert scale.tensors == {"scale": Tensor("scale", "scale", "...", (1,), "float32")}
    assert kept.tensors == {"kept": Tensor("kept", "kept", "...", (2,), "float32", trainable=False)}
    assert scale.why == "a bare parameter of a Net, whose call does not say where it is used"
    assert conv == Layer(
        "conv",
        "conv",
        {"kernel": Tensor("conv.weight", "kernel", "(group out) in ...", (6, 2, 3, 2), "float32")},
        {
            "stride": (1, 2),
            "padding": ((1, 1), (0, 0)),
            "padding_mode": "zeros",
            "dilation": (1, 1),
            "groups": 2,
            "activation": None,
            "channels": "first",
        },
    )
    assert norm.tensors["running_var"] == Tensor("bn.running_var", "running_var", "channel", (6,), "float32", False)
    assert norm.tensors["batch_count"] == Tensor(
        "bn.num_batches_tracked", "batch_count", "...", (), "int64", trainable=False
    )
    assert norm.settings == {"eps": 1e-5, "momentum": 0.1, "channels": "first"}
    assert head.tensors["kernel"] == Tensor("embed.weight", "kernel", "out in", (5, 4), "float32")
    assert embed.tensors["kernel"].name == "embed.weight"


def test_the_names_of_all_layers_are_those_of_the_state_dict(backend):
    model = Net()
    names = {tensor.name for layer in backend.layers(model) for tensor in layer.tensors.values()}
    assert names == set(model.state_dict()) - {"head.weight"}


def test_a_shared_module_is_one_layer(backend):
    layer = nn.Linear(3, 3)
    assert [layer.name for layer in backend.layers(nn.Sequential(layer, nn.ReLU(), layer))] == ["0"]


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Named(nn.Linear):
    pass


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))
        self.register_buffer("kept", torch.ones(2))

    def forward(self, x):
        return x * self.gain


def untracked(module):
    module.track_running_stats = False
    return module


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Scaled(3, 3), "a Linear whose forward is its own"),
        (Gain(), "a Gain, which no rule describes"),
        (nn.BatchNorm1d(3, track_running_stats=False), "a BatchNorm1d with the tensors bias, weight, which no rule"),
        (untracked(nn.InstanceNorm1d(3, track_running_stats=True)), "an InstanceNorm1d with settings that no rule"),
        (nn.Embedding(3, 3, max_norm=1.0), "an Embedding with settings that no rule describes"),
        (nn.EmbeddingBag(3, 3), "an EmbeddingBag, which no rule describes"),
        (nn.LSTMCell(3, 3), "an LSTMCell, which no rule describes"),
        (nn.LSTM(3, 4, proj_size=2), "an LSTM with projections"),
    ],
)
def test_a_layer_that_computes_something_else_is_raw_and_says_why(backend, module, why):
    (layer,) = backend.layers(module)
    assert (layer.name, layer.kind, layer.settings) == ("", "raw", {})
    assert layer.why.startswith(why)
    assert set(layer.tensors) == set(module.state_dict())
    assert all(t.role == role and t.layout == "..." and t.within == () for role, t in layer.tensors.items())


def test_a_subclass_with_the_forward_of_its_base_is_of_its_kind(backend):
    assert [layer.kind for layer in backend.layers(Named(3, 3))] == ["linear"]


class Vision(nn.Module):
    """Tensors of its own beside children, which its call uses in between."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.ones(1, 1, 4))
        self.register_buffer("ids", torch.arange(3))
        self.register_buffer("scratch", torch.arange(3), persistent=False)
        self.extra = nn.ParameterDict({"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(3))})
        self.more = nn.ParameterList([torch.ones(2), torch.ones(1)])
        self.gain = Gain()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.cat([self.cls_token.expand(len(x), 1, 4), x], 1)) * self.extra["a"]


def test_bare_tensors_beside_children_and_in_lists_are_raw_layers_of_their_own(backend):
    model = nn.Sequential(Vision())
    layers = {layer.name: (layer.kind, sorted(layer.tensors)) for layer in backend.layers(model)}
    assert layers == {
        "0.cls_token": ("raw", ["cls_token"]),
        "0.ids": ("raw", ["ids"]),
        "0.extra.a": ("raw", ["a"]),
        "0.extra.b": ("raw", ["b"]),
        "0.more.0": ("raw", ["0"]),
        "0.more.1": ("raw", ["1"]),
        "0.gain": ("raw", ["gain", "kept"]),
        "0.head": ("linear", ["bias", "kernel"]),
    }
    for layer in backend.layers(model):
        if layer.name in model.state_dict():
            assert [tensor.name for tensor in layer.tensors.values()] == [layer.name]


class Doubled(nn.Linear):
    """Of a kind that a user registers, which its forward alone would not say."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_kind_that_a_user_registered_comes_before_the_table(backend, monkeypatch):
    rows = {Doubled: Stored("doubled", {"weight": ("gain", "b a"), "bias": ("shift", "b")}, lambda m: {"by": 2})}
    monkeypatch.setattr("clipcore.mapping.registry.stored_by", rows.get)
    (layer,) = backend.layers(Doubled(3, 2))
    assert (layer.kind, layer.settings, layer.why) == ("doubled", {"by": 2}, "")
    assert [(t.name, role, t.layout) for role, t in layer.tensors.items()] == [
        ("weight", "gain", "b a"),
        ("bias", "shift", "b"),
    ]
    assert [layer.kind for layer in backend.layers(nn.Linear(3, 2))] == ["linear"]


def test_a_lazy_module_without_tensors_is_refused(backend):
    with pytest.raises(cc.InvalidInput, match=r"tensor '0.weight' belongs to a lazy module .* run the model once"):
        backend.layers(nn.Sequential(nn.LazyLinear(3)))


def test_what_is_read_is_what_the_model_holds(backend):
    model = randomised(Net()).to(torch.bfloat16)
    names = ["conv.weight", "bn.num_batches_tracked", "bn.running_mean", "head.weight", "embed.weight"]
    arrays = backend.read(model, names)
    assert list(arrays) == names
    assert arrays["conv.weight"].dtype == ml_dtypes.bfloat16
    assert arrays["bn.num_batches_tracked"] == 7
    for name, array in arrays.items():
        assert np.array_equal(array.astype(np.float32), model.state_dict()[name].float().numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_written_is_what_is_read_and_the_tensors_stay_the_same(backend, dtype):
    model, source = Net().to(dtype), randomised(Net()).to(dtype)
    names = [tensor.name for layer in backend.layers(source) for tensor in layer.tensors.values()]
    before = {name: (tensor.data_ptr(), id(tensor)) for name, tensor in model.named_parameters()}
    values = {name: array.copy() for name, array in backend.read(source, names).items()}
    for value in values.values():
        value.flags.writeable = False
    backend.write(model, values)
    assert {name: (tensor.data_ptr(), id(tensor)) for name, tensor in model.named_parameters()} == before
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.head.weight is model.embed.weight
    assert all(param.requires_grad for param in model.parameters())


def test_writing_keeps_no_reference_to_an_array_and_takes_any_strides(backend):
    layer = nn.Linear(3, 2)
    array = np.arange(6, dtype=np.float32).reshape(3, 2)
    backend.write(layer, {"weight": array.T[::-1]})
    array[:] = -1
    assert layer.weight.tolist() == [[1, 3, 5], [0, 2, 4]]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("1.weight", np.zeros((2, 2), np.float32), r"'1.weight' has shape \(3, 2\) and dtype float32; got .* \(2, 2\)"),
        ("1.weight", np.zeros((3, 2)), r"'1.weight' has shape \(3, 2\) and dtype float32; got .* float64"),
        ("2.weight", np.zeros((3, 2), np.float32), r"Sequential has no tensor '2.weight'; .* state_dict: 0.weight"),
    ],
)
def test_nothing_is_written_where_anything_does_not_fit(backend, name, value, message):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(cc.InvalidInput, match=message):
        backend.write(model, {"0.weight": np.zeros((2, 2), np.float32), name: value})
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


def test_reading_an_unknown_name_is_refused(backend):
    with pytest.raises(cc.InvalidInput, match="Linear has no tensor 'kernel'"):
        backend.read(nn.Linear(2, 2), ["kernel"])


CROPPED = {"stride": (2,), "dilation": (1,), "groups": 1}
GRU = {"activation": "tanh", "recurrent_activation": "sigmoid", "reset_after": True}
HEADS = {f"{part}.kernel": (4, 4) for part in ("query", "key", "value", "output")}
POOL = {"window": (3,), "stride": (2,), "ceil": False, "dilation": (1,), "count_include_pad": True}
CONV = {"stride": (1,), "padding": ((1, 1),), "padding_mode": "zeros", "dilation": (1,), "groups": 1}


@pytest.mark.parametrize(
    ("kind", "settings", "shapes", "message"),
    [
        ("no such kind", {}, {}, "builds no layer of kind 'no such kind'"),
        ("linear", {"activation": "relu"}, {"kernel": (2, 2)}, "activation is 'relu'"),
        ("conv", {**CONV, "padding": ((0, 1),)}, {"kernel": (1, 2, 2, 3)}, "not symmetric"),
        ("conv", {**CONV, "padding": "same", "stride": (2,)}, {"kernel": (1, 2, 2, 3)}, "not symmetric"),
        ("batch_norm", {"eps": 1e-5}, {"running_mean": (2,), "running_var": (2,), "bias": (2,)}, "no bias without a"),
        ("group_norm", {"eps": 1e-5, "groups": 2}, {"bias": (2,)}, "no bias without a scale"),
        ("layer_norm", {"eps": 1e-5}, {}, "without scale and bias no shape says over which axes"),
        ("conv_transpose", {**CROPPED, "crop": ((0, 1),)}, {"kernel": (1, 2, 2, 3)}, r"crop \(0, 1\) with stride 2"),
        ("conv_transpose", {**CROPPED, "crop": ((-1, -1),)}, {"kernel": (1, 2, 2, 3)}, r"crop \(-1, -1\)"),
        ("conv_transpose", {**CROPPED, "crop": ((2, 0),)}, {"kernel": (1, 2, 2, 3)}, "up to 1 less"),
        ("gru", {**GRU, "reset_after": False}, {}, "reset_after is False; torch's layer has True"),
        ("gru", {**GRU, "recurrent_activation": "hard_sigmoid"}, {}, "recurrent_activation is 'hard_sigmoid'"),
        ("rnn", {"activation": "selu"}, {}, "activation is 'selu'; torch's layer has 'tanh' or 'relu'"),
        ("rnn", {"activation": "tanh"}, {"bias": (2,)}, r"or none; got \['bias'\]"),
        ("attention", {"heads": 2}, {**HEADS, "query.kernel": (4, 3)}, "as many features in all heads together"),
        ("attention", {"heads": 2}, {**HEADS, "key.bias": (4,)}, r"biases of \['key'\] alone"),
        ("attention", {"heads": 3}, HEADS, "4 features in 3 heads"),
        ("activation", {"function": "exponential"}, {}, "no module for 'exponential'"),
        ("avg_pool", {**POOL, "padding": "same"}, {}, "avg_pool: padding 'same'"),
        ("max_pool", {**POOL, "padding": ((0, 1),)}, {}, "pads both sides alike"),
        ("max_pool", {**POOL, "padding": ((2, 2),)}, {}, "by half of it at most"),
        ("layer_norm", {"eps": 1e-5}, {"bias": (2,)}, "no bias without a scale"),
    ],
)
def test_a_layer_that_torch_lacks_is_refused(backend, kind, settings, shapes, message):
    with pytest.raises(cc.MappingError, match=message):
        backend.build_layer(kind, settings, shapes)


@pytest.mark.parametrize("kind", ["batch_norm", "group_norm"])
def test_a_norm_with_a_scale_alone_is_built(backend, kind):
    shapes = {"scale": (4,), **({"running_mean": (4,), "running_var": (4,)} if kind == "batch_norm" else {})}
    model = randomised(backend.build_layer(kind, {"eps": 0.1, "groups": 2}, shapes))
    (layer,) = backend.layers(model)
    assert set(layer.tensors) - {"batch_count"} == set(shapes)
    x = np.random.default_rng(0).standard_normal((2, 4, 3)).astype(np.float32)
    first = backend.run(model, x)
    backend.write(model, {"weight": 2 * backend.read(model, ["weight"])["weight"]})
    assert np.allclose(backend.run(model, x), 2 * first)


def small():
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def tied():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("ending", [".pt", ".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("factory", [small, tied])
def test_weights_go_to_a_file_and_back(backend, tmp_path, ending, factory):
    model, path = randomised(factory()), str(tmp_path / f"weights{ending}")
    backend.save_weights(model, path)
    loaded = backend.load_model(factory, path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert backend.load_model(loaded, None) is loaded


def test_a_state_dict_inside_a_checkpoint_is_found(backend, tmp_path):
    model = randomised(small())
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, tmp_path / "a.pt")
    assert torch.equal(backend.load_model(small, str(tmp_path / "a.pt"))[0].weight, model[0].weight)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code in a weight file was run')",)


def test_bad_factories_and_files_are_one_sentence_errors(backend, tmp_path):
    torch.save(Evil(), tmp_path / "evil.pt")
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "bad.safetensors").write_bytes(b"\x00" * 9)
    (tmp_path / "model.onnx").write_bytes(b"")
    expected = {
        "evil.pt": "cannot be read as tensors alone",
        "other.pt": "are not those of Sequential",
        "list.pt": "hold a list; expected a state dict",
        "cut.pt": "cannot be read as tensors alone",
        "empty.bin": "cannot be read as tensors alone",
        "bad.safetensors": "are no safetensors file",
        "model.onnx": "expected a file named",
        "missing.pt": "there is no such file",
    }
    for name, message in expected.items():
        with pytest.raises(cc.InvalidInput, match=message):
            backend.load_model(small, str(tmp_path / name))
    with pytest.raises(cc.InvalidInput, match=r"factory Linear must build a model when called without arguments"):
        backend.load_model(nn.Linear, None)
    with pytest.raises(cc.InvalidInput, match=r"made a dict; expected a torch\.nn\.Module"):
        backend.load_model(dict, None)
    with pytest.raises(cc.InvalidInput, match="expected a file named"):
        backend.save_weights(small(), str(tmp_path / "model.onnx"))


def test_saving_needs_no_safetensors_but_for_its_own_files():
    script = (
        "import sys; sys.modules['safetensors'] = None\n"
        "import clipcore as cc, pytest, torch\n"
        "with pytest.raises(cc.InvalidInput, match='pip install safetensors'):\n"
        "    cc.get_backend('torch').save_weights(torch.nn.Linear(1, 1), 'a.safetensors')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_models_are_recognised(backend):
    assert backend.is_model(nn.Linear(1, 1))
    assert not backend.is_model(torch.ones(1))
    assert not backend.is_model(nn.Linear)
    assert cc.backend_of(Net()) is backend
    assert backend.input_shapes(Net()) is None
    assert backend.channels == "first"
