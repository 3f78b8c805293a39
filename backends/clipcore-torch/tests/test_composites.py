"""Modules that are several layers: how they are described, and run one by one while they are watched."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from clipcore.backend import Tensor
from clipcore.mapping.kinds import KINDS
from clipcore.mapping.plan import cut

GATES = {"lstm": ["input", "forget", "cell", "output"], "gru": ["reset", "update", "new"], "rnn": [None]}


class Record:
    """A watcher that keeps what it saw, and replaces what it is given for a layer."""

    def __init__(self, inputs=None, outputs=None):
        self.seen, self.given, self.order = {}, {}, []
        self.inputs, self.outputs = inputs or {}, outputs or {}

    def before(self, layer, inputs):
        self.order.append(layer)
        self.seen[layer] = inputs
        return self.inputs.get(layer)

    def after(self, layer, output):
        self.given[layer] = output
        return self.outputs.get(layer)


def randomised(module):
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.copy_(torch.randn(tensor.shape) / 2)
    return module


def flat(tree):
    return [tree] if isinstance(tree, np.ndarray) or tree is None else [leaf for part in tree for leaf in flat(part)]


def assert_same_bits(first, second):
    for one, other in zip(flat(first), flat(second), strict=True):
        assert (one is None) == (other is None)
        assert one is None or np.array_equal(one, other)


def roles_of(backend, model, layer):
    arrays = backend.read(model, [tensor.name for tensor in layer.tensors.values()])
    return {role: cut(arrays[t.name], t.within).astype(np.float64) for role, t in layer.tensors.items()}


COMPOSITES = {
    "lstm": nn.LSTM(3, 4, 2, bidirectional=True),
    "lstm without bias": nn.LSTM(3, 4, bias=False),
    "gru": nn.GRU(3, 4, 3),
    "rnn": nn.RNN(3, 4, nonlinearity="relu", bidirectional=True),
    "attention": nn.MultiheadAttention(4, 2),
    "attention without bias": nn.MultiheadAttention(4, 2, bias=False),
    "attention on other features": nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True),
    "encoder": nn.TransformerEncoderLayer(4, 2, 8),
}
composites = pytest.mark.parametrize("module", COMPOSITES.values(), ids=COMPOSITES)


@composites
@pytest.mark.parametrize("outer", [False, True], ids=["alone", "inside"])
def test_the_roles_cover_every_stored_tensor_exactly_once(backend, module, outer):
    model = nn.Sequential(module) if outer else module
    covered = {name: np.zeros(tensor.shape, int) for name, tensor in model.state_dict().items()}
    for layer in backend.layers(model):
        for tensor in layer.tensors.values():
            part = cut(covered[tensor.name], tensor.within)
            assert part.shape == tensor.shape
            assert tensor.stored_shape == covered[tensor.name].shape
            part += 1
    assert all((count == 1).all() for count in covered.values())


@composites
def test_writing_back_what_was_read_of_every_role_is_the_identity(backend, module):
    randomised(module)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    whole = {name: np.full(tensor.shape, np.nan, np.float32) for name, tensor in before.items()}
    for layer in backend.layers(module):
        for tensor in layer.tensors.values():
            cut(whole[tensor.name], tensor.within)[...] = cut(
                backend.read(module, [tensor.name])[tensor.name], tensor.within
            )
    for tensor in module.parameters():
        tensor.data.zero_()
    backend.write(module, whole)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


@composites
def test_a_layer_has_roles_and_settings_of_its_kind(backend, module):
    layers = backend.layers(module)
    assert len({layer.name for layer in layers}) == len(layers)
    for layer in layers:
        if layer.kind != "raw":
            kind = KINDS[layer.kind]
            assert set(kind.roles) - set(kind.optional) <= set(layer.tensors) <= set(kind.roles)
            assert set(layer.settings) <= {*kind.settings, *kind.training_settings, "channels"}


def test_recurrent_layers_are_named_in_the_order_of_execution(backend):
    layers = backend.layers(nn.ModuleDict({"rnn": nn.LSTM(3, 4, 2, bidirectional=True)}))
    assert [(layer.name, layer.kind, layer.settings["reverse"]) for layer in layers] == [
        ("rnn.l0", "lstm", False),
        ("rnn.l0_reverse", "lstm", True),
        ("rnn.l1", "lstm", False),
        ("rnn.l1_reverse", "lstm", True),
    ]
    assert layers[3].tensors["kernel.cell"] == Tensor(
        "rnn.weight_ih_l1_reverse",
        "kernel.cell",
        "unit in",
        (4, 8),
        "float32",
        within=((8, 12), (0, 8)),
        whole=(16, 8),
    )
    assert layers[0].tensors["recurrent_bias.output"].within == ((12, 16),)
    assert [layer.name for layer in backend.layers(nn.GRU(3, 4))] == ["l0"]
    (plain,) = backend.layers(nn.RNN(3, 4))
    assert plain.tensors["kernel"] == Tensor("weight_ih_l0", "kernel", "unit in", (4, 3), "float32")


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        (nn.LSTM(2, 3), {"activation": "tanh", "recurrent_activation": "sigmoid", "reverse": False}),
        (
            nn.GRU(2, 3),
            {"activation": "tanh", "recurrent_activation": "sigmoid", "reset_after": True, "reverse": False},
        ),
        (nn.RNN(2, 3), {"activation": "tanh", "reverse": False}),
        (nn.RNN(2, 3, nonlinearity="relu"), {"activation": "relu", "reverse": False}),
    ],
)
def test_a_recurrent_layer_has_the_settings_of_its_function(backend, module, settings):
    assert [layer.settings for layer in backend.layers(module)] == [settings]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def sequence(kind, x, w, settings, h, c):
    """The outputs of one direction in the order of processing, from the definitions."""
    if settings["reverse"]:
        x = x[:, ::-1]
    act = {"tanh": np.tanh, "relu": lambda z: np.maximum(z, 0)}[settings["activation"]]
    outputs = []
    for t in range(x.shape[1]):
        given, kept = {}, {}
        for gate in GATES[kind]:
            end = f".{gate}" if gate else ""
            given[gate] = x[:, t] @ w[f"kernel{end}"].T + w.get(f"bias{end}", 0)
            kept[gate] = h @ w[f"recurrent_kernel{end}"].T + w.get(f"recurrent_bias{end}", 0)
        z = {gate: given[gate] + kept[gate] for gate in given}
        if kind == "rnn":
            h = act(z[None])
        elif kind == "gru":
            r, u = sigmoid(z["reset"]), sigmoid(z["update"])
            h = (1 - u) * act(given["new"] + r * kept["new"]) + u * h
        else:
            c = sigmoid(z["forget"]) * c + sigmoid(z["input"]) * act(z["cell"])
            h = sigmoid(z["output"]) * act(c)
        outputs.append(h)
    return np.stack(outputs, 1)


def recurrent(kind, **options):
    cls = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[kind]
    return randomised(cls(3, 4, **options))


def states_for(module, batch):
    count = module.num_layers * (2 if module.bidirectional else 1)
    shape = (count, 4) if batch is None else (count, batch, 4)
    h, c = torch.randn(shape), torch.randn(shape)
    return (h, c) if isinstance(module, nn.LSTM) else h


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("bias", [True, False])
def test_each_layer_and_direction_computes_what_its_description_says(backend, kind, bias):
    module = recurrent(kind, num_layers=2, bidirectional=True, batch_first=True, bias=bias)
    x, states = np.random.default_rng(0).standard_normal((2, 5, 3)), states_for(module, 2)
    record = Record()
    backend.run(module, (x, states), record)
    layers = backend.layers(module)
    assert record.order == [layer.name for layer in layers]
    for index, layer in enumerate(layers):
        given, *start = record.seen[layer.name]
        assert len(start) == (2 if kind == "lstm" else 1)
        h, c = states if kind == "lstm" else (states, states)
        assert np.array_equal(start[0], h[index])
        wanted = sequence(
            kind, given, roles_of(backend, module, layer), layer.settings, h[index].numpy(), c[index].numpy()
        )
        assert np.abs(record.given[layer.name] - wanted).max() < 1e-5
    assert np.array_equal(record.seen["l0"][0], x.astype(np.float32))
    forward, back = record.given["l0"], record.given["l0_reverse"][:, ::-1]
    assert np.array_equal(record.seen["l1"][0], np.concatenate([forward, back], -1))


OPTIONS = list(itertools.product([1, 3], [False, True], [False, True], [None, 2], [False, True]))


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize(("layers", "both", "batch_first", "batch", "given"), OPTIONS)
def test_watching_a_recurrent_module_changes_no_bit(backend, kind, layers, both, batch_first, batch, given):
    module = recurrent(kind, num_layers=layers, bidirectional=both, batch_first=batch_first, dropout=0.5 * (layers > 1))
    shape = (5, 3) if batch is None else (batch, 5, 3) if batch_first else (5, batch, 3)
    sample = (torch.randn(shape), states_for(module, batch)) if given else (torch.randn(shape),)
    record = Record()
    plain = backend.run(module, sample)
    assert_same_bits(plain, backend.run(module, sample, record))
    assert len(record.order) == layers * (1 + both)
    assert record.given["l0"].shape == (batch or 1, 5, 4)
    assert len(record.seen["l0"]) == 1 + given * (2 if kind == "lstm" else 1)


@pytest.mark.parametrize("kind", GATES)
def test_a_watcher_replaces_what_flows_into_and_out_of_one_direction(backend, kind):
    module = recurrent(kind, num_layers=2, bidirectional=True, batch_first=True)
    x = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    plain, other = Record(), Record()
    backend.run(module, x, plain)
    backend.run(module, x + 1, other)
    into = Record(inputs={"l0_reverse": [x + 1]})
    backend.run(module, x, into)
    assert np.array_equal(into.given["l0"], plain.given["l0"])
    assert np.array_equal(into.given["l0_reverse"], other.given["l0_reverse"])
    new = np.random.default_rng(1).standard_normal((2, 5, 4)).astype(np.float32)
    out = Record(outputs={"l0_reverse": new, "l1": new})
    output, states = backend.run(module, x, out)
    assert np.array_equal(out.seen["l1"][0][..., 4:], new[:, ::-1])
    assert np.array_equal(output[..., :4], new)
    hidden = states[0] if kind == "lstm" else states
    assert np.array_equal(hidden[1], new[:, -1])
    assert np.array_equal(hidden[2], new[:, -1])
    assert np.array_equal(hidden[3], out.given["l1_reverse"][:, -1])


def test_weights_that_a_watcher_writes_into_one_direction_take_effect(backend):
    module = recurrent("gru", batch_first=True)
    x = np.ones((1, 3, 3), np.float32)

    class Writer(Record):
        def before(self, layer, inputs):
            super().before(layer, inputs)
            backend.write(module, {name: np.zeros_like(a) for name, a in backend.read(module, list(names)).items()})

    names = dict(module.named_parameters())
    assert not backend.run(module, x, Writer())[0].any()


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x):
        output, states = self.lstm(pack_padded_sequence(x, [4, 2], batch_first=True))
        return output.data, states


def test_a_packed_sequence_runs_unwatched(backend):
    model, x, record = randomised(Packed()), torch.randn(2, 4, 3), Record()
    assert_same_bits(backend.run(model, x), backend.run(model, x, record))
    assert record.order == []


@pytest.mark.parametrize(
    ("shape", "states"), [((2, 5, 2), None), ((5,), None), ((2, 5, 3), (1, 3, 4)), ((2, 5, 3), (1, 4))]
)
def test_a_recurrent_module_refuses_the_same_watched_and_unwatched(backend, shape, states):
    module = recurrent("gru", batch_first=True)
    sample = (torch.ones(shape),) if states is None else (torch.ones(shape), torch.ones(states))
    messages = []
    for watcher in (None, Record()):
        with pytest.raises(Exception, match="GRU does not run on a sample") as caught:
            backend.run(module, sample, watcher)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_a_module_runs_as_before_after_it_was_watched(backend):
    module = nn.Sequential(nn.LSTM(3, 4))
    module[0].forward = own = module[0].forward
    backend.run(module, torch.ones(2, 3), Record())
    assert module[0].forward is own
    del module[0].forward
    backend.run(module, torch.ones(2, 3), Record())
    assert "forward" not in vars(module[0])


class Own(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


def test_a_composite_that_is_another_function_is_raw_and_says_why(backend):
    (normed,) = backend.layers(nn.utils.parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"))
    assert normed.kind == "raw"
    assert normed.why == "an LSTM whose tensors are made of others in a way that no rule describes"
    *own, out = backend.layers(Own(4, 2))
    assert [(layer.name, layer.kind, layer.why) for layer in own] == [
        ("in_proj_weight", "raw", "a MultiheadAttention whose forward is its own"),
        ("in_proj_bias", "raw", "a MultiheadAttention whose forward is its own"),
    ]
    assert (out.name, out.kind) == ("out_proj", "linear")
    record = Record()
    backend.run(Own(4, 2), torch.ones(3, 4), record)
    assert record.order == []


def attention(**options):
    return randomised(nn.MultiheadAttention(8, 2, **options))


def test_attention_is_four_linear_layers(backend):
    fused = backend.layers(nn.ModuleDict({"attn": attention()}))
    assert [(layer.name, layer.kind) for layer in fused] == [
        ("attn.query", "linear"),
        ("attn.key", "linear"),
        ("attn.value", "linear"),
        ("attn.out_proj", "linear"),
    ]
    assert all(layer.settings == {"activation": None, "heads": 2} for layer in fused)
    assert fused[1].tensors["kernel"] == Tensor(
        "attn.in_proj_weight", "kernel", "out in", (8, 8), "float32", within=((8, 16), (0, 8)), whole=(24, 8)
    )
    assert fused[2].tensors["bias"].within == ((16, 24),)
    assert fused[3].tensors["kernel"].name == "attn.out_proj.weight"
    separate = backend.layers(attention(kdim=6, vdim=5, add_bias_kv=True))
    assert [(layer.name, layer.kind) for layer in separate[4:]] == [("bias_k", "raw"), ("bias_v", "raw")]
    assert separate[1].tensors["kernel"] == Tensor("k_proj_weight", "kernel", "out in", (8, 6), "float32")
    assert separate[1].tensors["bias"].name == "in_proj_bias"


MASKS = {
    "none": {},
    "boolean": {"attn_mask": torch.ones(4, 3).triu(2).bool()},
    "floating": {"attn_mask": torch.randn(4, 3), "key_padding_mask": torch.tensor([[0.0, 0, -1], [0, 0, 0]])},
    "padding": {"key_padding_mask": torch.tensor([[False, False, True], [False, False, False]])},
    "causal": {"attn_mask": torch.ones(4, 3).triu(1).bool(), "is_causal": True, "need_weights": False},
    "weights of heads": {"average_attn_weights": False},
}
VARIANTS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "other features": {"kdim": 6, "vdim": 5},
    "bias_kv": {"add_bias_kv": True, "bias": False},
    "zero": {"add_zero_attn": True, "batch_first": True, "dropout": 0.5},
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("batched", [True, False])
def test_watching_attention_changes_nothing_that_it_gives(backend, mask, options, batched):
    module = attention(**options)

    def data(time, features):
        x = torch.randn(2, time, features)
        return x[0] if not batched else x if module.batch_first else x.transpose(0, 1)

    mask = {k: v[0] if k == "key_padding_mask" and not batched else v for k, v in mask.items()}
    sample = {"query": data(4, 8), "key": data(3, module.kdim), "value": data(3, module.vdim), **mask}
    record = Record()
    plain, watched = backend.run(module, sample), backend.run(module, sample, record)
    for one, other in zip(plain, watched, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.shape == other.shape and np.abs(one - other).max() < 1e-5)
    assert record.order == ["query", "key", "value", "out_proj"]
    batch = 2 if batched else 1
    for layer in backend.layers(module)[:4]:
        (x,), y = record.seen[layer.name], record.given[layer.name]
        assert x.shape[:2] == y.shape[:2] == (batch, 3 if layer.name in ("key", "value") else 4)
        roles = roles_of(backend, module, layer)
        assert np.abs(x @ roles["kernel"].T + roles.get("bias", 0) - y).max() < 1e-5


def test_a_watcher_replaces_what_flows_into_and_out_of_a_projection(backend):
    module, x = attention(batch_first=True), np.random.default_rng(0).standard_normal((2, 4, 8)).astype(np.float32)
    for part, place in (("query", 0), ("key", 1), ("value", 2)):
        other = [x, x, x]
        other[place] = x + 1
        wanted = backend.run(module, tuple(other), Record())
        assert_same_bits(backend.run(module, (x, x, x), Record(inputs={part: [x + 1]})), wanted)
    plain = Record()
    output, _ = backend.run(module, (x, x, x), plain)
    assert_same_bits(backend.run(module, (x, x, x), Record(outputs=plain.given))[0], output)
    for part in ("query", "key", "value"):
        changed, _ = backend.run(module, (x, x, x), Record(outputs={part: plain.given[part] * 3}))
        assert not np.allclose(changed, output)
    assert np.array_equal(backend.run(module, (x, x, x), Record(outputs={"out_proj": output * 3}))[0], output * 3)
    doubled = Record(inputs={"out_proj": [plain.seen["out_proj"][0] * 2]})
    backend.run(module, (x, x, x), doubled)
    assert not np.allclose(doubled.given["out_proj"], output)


def test_every_layer_of_a_transformer_is_watched_and_the_fast_path_is_as_it_was(backend):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = randomised(nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)).double()
    padding = torch.tensor([[False] * 3 + [True] * 2, [False] * 5])
    sample = {"src": torch.randn(2, 5, 8), "src_key_padding_mask": padding}
    for enabled in (False, True):
        torch.backends.mha.set_fastpath_enabled(enabled)
        record = Record()
        # in float64, where no order of summation that a CPU's kernels choose can hide another function
        np.testing.assert_allclose(
            backend.run(model, sample, record), backend.run(model, sample), rtol=1e-12, atol=1e-13
        )
        assert torch.backends.mha.get_fastpath_enabled() == enabled
        owning = {layer.name for layer in backend.layers(model)}
        assert {name for name in record.order if name in owning} == owning


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_a_recurrent_layer_is_built_and_gives_the_sequence_alone(backend, kind, reverse, bias):
    like = backend.layers(recurrent(kind, bidirectional=True, bias=bias))[reverse]
    shapes = {role: tensor.shape for role, tensor in like.tensors.items()}
    model = randomised(backend.build_layer(kind, like.settings, shapes))
    built = backend.layers(model)
    assert len(built) == 1 + reverse
    layer = built[reverse]
    assert (layer.kind, layer.settings) == (like.kind, like.settings)
    assert {role: tensor.shape for role, tensor in layer.tensors.items()} == shapes
    x, record = np.random.default_rng(0).standard_normal((2, 5, 3)), Record()
    output, zeros = backend.run(model, x), np.zeros((2, 4))
    assert (
        np.abs(output - sequence(kind, x, roles_of(backend, model, layer), layer.settings, zeros, zeros)).max() < 1e-5
    )
    backend.run(model, x, record)
    assert np.array_equal(record.given[layer.name], output)


@pytest.mark.parametrize(("keys", "values"), [(8, 8), (6, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_built_and_gives_the_output_alone(backend, keys, values, bias):
    shapes = {"query.kernel": (8, 8), "key.kernel": (8, keys), "value.kernel": (8, values), "output.kernel": (8, 8)}
    if bias:
        shapes |= {role.replace("kernel", "bias"): (8,) for role in list(shapes)}
    model = randomised(backend.build_layer("attention", {"heads": 2}, shapes))
    q, k, v, o = (roles_of(backend, model, layer) for layer in backend.layers(model))
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((2, 4, 8)), rng.standard_normal((2, 3, keys)), rng.standard_normal((2, 3, values))
    query, key, value = (
        (x @ r["kernel"].T + r.get("bias", 0)).reshape(2, -1, 2, 4) for x, r in zip(sample, (q, k, v), strict=True)
    )
    scores = np.exp(np.einsum("bthd,bshd->bhts", query, key) / 2)
    context = np.einsum("bhts,bshd->bthd", scores / scores.sum(-1, keepdims=True), value).reshape(2, 4, 8)
    wanted = context @ o["kernel"].T + o.get("bias", 0)
    assert np.abs(backend.run(model, sample) - wanted).max() < 1e-5
