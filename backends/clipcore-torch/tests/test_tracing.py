"""Running and watching models: what a watcher sees and changes, and what is left as it was."""

import dataclasses
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import clipcore as cc


class Record:
    """A watcher that keeps what it saw."""

    def __init__(self):
        self.calls = []

    def before(self, layer, inputs):
        self.calls.append(("before", layer, inputs))

    def after(self, layer, output):
        self.calls.append(("after", layer, output))

    def names(self):
        return [(when, layer) for when, layer, _ in self.calls]


class Net(nn.Module):
    """Shared, in-place, random and stateful layers, and a module with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.gain = nn.Parameter(torch.ones(()))
        self.register_buffer("runs", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.last = nn.Linear(4, 2)
        self.norm.eval()

    def forward(self, x):
        self.runs += 1
        self.cache = torch.rand(2)
        x = functional.relu(self.first(x), inplace=True)
        x = self.drop(self.norm(functional.relu(self.first(x), inplace=True)))
        return self.last(x) * self.gain


@pytest.fixture
def model():
    net = Net()
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
    net.runs.fill_(3)
    return net


X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


def whole(net):
    """Everything that must be the same afterwards."""
    tensors = {n: (id(t), t.detach().clone()) for n, t in (*net.named_parameters(), *net.named_buffers())}
    flags = {name: module.training for name, module in net.named_modules()}
    hooks = {
        name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_with_kwargs))
        for name, m in net.named_modules()
    }
    return tensors, flags, hooks, torch.random.get_rng_state(), torch.is_grad_enabled()


def assert_unchanged(before, net):
    for old, new in zip(before, whole(net), strict=True):
        if isinstance(old, torch.Tensor):
            assert torch.equal(old, new)
        elif isinstance(old, dict) and isinstance(next(iter(old.values())), tuple) and "gain" in old:
            assert {n: i for n, (i, _) in old.items()} == {n: i for n, (i, _) in new.items()}
            for name, (_, tensor) in old.items():
                assert torch.equal(tensor, new[name][1]), name
        else:
            assert old == new


def test_the_model_runs_in_inference_mode(backend, model):
    eager = Net()
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        wanted = eager.eval()(torch.from_numpy(X.copy()))
    assert np.array_equal(backend.run(model, X), wanted.numpy())


def test_a_watcher_sees_every_call_in_order_and_values_that_later_writes_leave_alone(backend, model):
    record = Record()
    output = backend.run(model, X, record)
    assert record.names() == [
        ("before", "first"),
        ("after", "first"),
        ("before", "first"),
        ("after", "first"),
        ("before", "norm"),
        ("after", "norm"),
        ("before", "drop"),
        ("after", "drop"),
        ("before", "last"),
        ("after", "last"),
    ]
    calls = {}
    for when, layer, value in record.calls:
        calls.setdefault((when, layer), []).append(value)
    assert np.array_equal(calls["before", "first"][0][0], X)
    first = calls["after", "first"][0]
    assert np.allclose(first, X @ model.first.weight.detach().numpy().T + model.first.bias.detach().numpy())
    assert (first < 0).any()  # the ReLU that follows writes into the same memory
    assert np.array_equal(calls["before", "first"][1][0], np.maximum(first, 0))
    assert np.array_equal(calls["after", "last"][0] * model.gain.detach().numpy(), output)


@pytest.mark.parametrize("watcher", [None, Record])
def test_everything_is_afterwards_as_it_was(backend, model, watcher):
    before = whole(model)
    backend.run(model, X, watcher and watcher())
    assert_unchanged(before, model)


class TrainsItsNorm(nn.Module):
    """Writes its running statistics in inference too, which torch's own function does without counting a version."""

    def __init__(self, how):
        super().__init__()
        self.how, self.norm = how, nn.BatchNorm1d(4)
        self.register_buffer("waves", torch.complex(torch.rand(2), torch.rand(2)).conj(), persistent=False)
        self.register_buffer("zero", torch.zeros(()))
        self.register_buffer("pairs", torch.eye(2).to_sparse(), persistent=False)

    def forward(self, x):
        self.zero.mul_(-1)
        if self.how == "mode":
            return self.norm.train()(x)
        norm = self.norm
        return functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=True)


def bits_of_buffers(net):
    return {name: buffer.to_dense().resolve_conj().numpy().tobytes() for name, buffer in net.named_buffers()}


@pytest.mark.parametrize("how", ["mode", "function"])
def test_running_statistics_that_a_model_writes_in_inference_are_bitwise_put_back(backend, how):
    net = TrainsItsNorm(how)
    with torch.no_grad():
        for tensor in (*net.parameters(), net.norm.running_mean, net.norm.running_var):
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    before = bits_of_buffers(net)
    first = backend.run(net, X)
    assert bits_of_buffers(net) == before
    backend.run(net, X, Record())
    assert bits_of_buffers(net) == before
    assert np.array_equal(backend.run(net, X), first)


def test_a_graph_that_was_built_before_a_run_can_still_go_backward(backend):
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    loss = net(torch.from_numpy(X.copy())).square().sum()
    backend.run(net, X)
    loss.backward()
    assert net[0].weight.grad.abs().sum() > 0


def test_everything_is_as_it_was_after_an_exception_of_the_watcher_too(backend, model):
    class Broken(Record):
        def after(self, layer, output):
            if layer == "norm":
                raise KeyError("injected")

    before = whole(model)
    with pytest.raises(KeyError, match="injected"):
        backend.run(model, X, Broken())
    assert_unchanged(before, model)


def test_a_sample_that_the_model_does_not_take_is_refused_and_nothing_changes(backend, model):
    before = whole(model)
    with pytest.raises(cc.InvalidInput, match=r"Net does not run on a sample of shapes \[\(3, 5\)\]: RuntimeError"):
        backend.run(model, np.ones((3, 5), np.float32), Record())
    with pytest.raises(cc.InvalidInput, match="TypeError"):
        backend.run(model, (X, X))
    assert_unchanged(before, model)


def test_weights_and_statistics_that_a_watcher_writes_take_effect_and_stay(backend, model):
    weight = np.eye(4, dtype=np.float32) * 2

    class Writer(Record):
        def before(self, layer, inputs):
            super().before(layer, inputs)
            if layer == "first":
                backend.write(model, {"first.weight": weight, "first.bias": np.zeros(4, np.float32)})
            if layer == "norm":
                backend.write(model, {"norm.running_mean": np.full(4, 5, np.float32), "runs": np.array(9)})

    writer = Writer()
    backend.run(model, np.abs(X), writer)
    assert np.array_equal(writer.calls[1][2], 2 * np.abs(X))
    assert torch.equal(model.first.weight, torch.from_numpy(weight))
    assert torch.equal(model.norm.running_mean, torch.full((4,), 5.0))
    assert int(model.runs) == 9


def test_a_watcher_replaces_inputs_and_outputs(backend, model):
    class Replacer(Record):
        def before(self, layer, inputs):
            super().before(layer, inputs)
            if layer == "last":
                return [np.zeros_like(inputs[0])]
            return None

        def after(self, layer, output):
            super().after(layer, output)
            return np.full((3, 2), 7.0) if layer == "last" else None

    replacer = Replacer()
    output = backend.run(model, X, replacer)
    last = next(value for when, layer, value in replacer.calls if (when, layer) == ("after", "last"))
    assert np.array_equal(last, np.tile(model.last.bias.detach().numpy(), (3, 1)))
    assert np.array_equal(output, np.full((3, 2), 7.0, np.float32) * model.gain.detach().numpy())
    assert output.dtype == np.float32


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    hidden: tuple
    loss: None = None


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x, mask=None, *, extra=None):
        y, state = self.lstm(x if mask is None else x * mask)
        y = y if extra is None else y + extra["shift"]
        return Answer(y, state), OrderedDict(last=y[:, -1], none=None), [1, "a"]


def test_outputs_of_any_structure_become_arrays(backend):
    answer, last, rest = backend.run(Nested(), np.ones((2, 5, 4)))
    assert sorted(answer) == ["hidden", "logits", "loss"]
    assert answer["loss"] is None
    assert isinstance(answer["hidden"], tuple)
    assert isinstance(answer["hidden"][0], np.ndarray)
    assert type(last) is dict
    assert last["none"] is None
    assert np.array_equal(last["last"], answer["logits"][:, -1])
    assert rest == [1, "a"]


class Whole(nn.LSTM):
    """Of a forward of its own, so that it is watched as a whole."""

    def forward(self, x):
        return super().forward(x)


def test_a_watcher_replaces_nested_outputs(backend):
    class Zero(Record):
        def after(self, layer, output):
            y, (h, c) = output
            return np.zeros_like(y), (h, c)

    net = Nested()
    net.lstm = Whole(4, 3, batch_first=True)
    answer, _, _ = backend.run(net, np.ones((2, 5, 4)), Zero())
    assert not answer["logits"].any()
    assert answer["hidden"][0].any()


def test_a_tuple_is_positional_and_a_dict_keywords(backend):
    net, x, mask = Nested(), np.ones((2, 5, 4)), np.zeros((2, 5, 1))
    wanted = backend.run(net, x * 0)[0]["logits"]
    assert np.array_equal(backend.run(net, (x, mask))[0]["logits"], wanted)
    assert np.array_equal(backend.run(net, {"x": torch.ones(2, 5, 4), "mask": mask})[0]["logits"], wanted)
    shifted = backend.run(net, {"x": x * 0, "extra": {"shift": np.ones(3)}})[0]["logits"]
    assert np.allclose(shifted, wanted + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_floating_samples_take_the_dtype_of_the_model(backend, dtype):
    net = nn.Linear(4, 2).to(dtype)
    for sample in (X, X.astype(np.float64), torch.from_numpy(X.copy()).half()):
        assert backend.run(net, sample).dtype.name == backend.dtype_name(net.weight)


def test_integer_samples_stay_integers(backend):
    table = nn.Embedding(5, 3)
    assert backend.run(table, np.array([1, 4])).shape == (2, 3)
    assert backend.run(table, np.array([1, 4], np.int32)).shape == (2, 3)


def test_a_sample_is_never_written(backend):
    x, tensor = X.copy(), torch.from_numpy(X.copy())
    relu = nn.ReLU(inplace=True)
    assert backend.run(relu, x).min() == backend.run(relu, tensor).min() == 0
    assert np.array_equal(x, X)
    assert torch.equal(tensor, torch.from_numpy(X))


def test_outputs_and_arrays_of_the_watcher_are_not_the_memory_of_the_model(backend):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.ones(3))

        def forward(self):
            return self.value

    net = Constant()
    backend.run(net, ())[:] = 5
    assert torch.equal(net.value, torch.ones(3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # dynamo's own
def test_layers_inside_a_compiled_model_are_seen(backend):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    compiled = torch.compile(net, backend="eager")
    x = torch.from_numpy(X.copy())
    compiled(x)
    record = Record()
    backend.run(compiled, X, record)
    first, last = [layer.name for layer in backend.layers(compiled)]
    (between,) = [layer.name for layer in backend.operations(compiled)]
    assert [layer for when, layer in record.names() if when == "before"] == [first, between, last]


def test_the_users_own_hooks_stay_and_run_first(backend):
    net, seen = nn.Linear(4, 2), []
    handle = net.register_forward_hook(lambda module, args, output: seen.append(1) or output * 0 + 3)
    record = Record()
    assert (backend.run(net, X, record) == 3).all()
    assert (record.calls[1][2] == 3).all()
    assert seen == [1]
    handle.remove()


def test_double_is_a_copy_in_float64(backend, model):
    before = whole(model)
    wide = backend.double(model)
    assert {t.dtype for t in wide.parameters()} == {torch.float64}
    assert np.allclose(backend.run(wide, X), backend.run(model, X), rtol=1e-5)
    assert backend.run(wide, X).dtype == np.float64
    assert_unchanged(before, model)
    model.lock = (i for i in ())  # a generator cannot be copied
    assert backend.double(model) is None


def precisions():
    """What torch says of the digits of float32: the older flags, and the newer ones where it has them."""
    found = [torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32]
    newer = getattr(torch.backends.cudnn, "conv", None), getattr(torch.backends.mkldnn, "matmul", None)
    return [*found, *(place.fp32_precision for place in newer if place is not None)]


class Precise(nn.Module):
    """Keeps what torch said while it ran."""

    def forward(self, x):
        self.seen = precisions()
        if x.sum() < 0:
            raise ValueError("negative")
        return x


@pytest.fixture
def _hasty():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("_hasty")
def test_a_model_runs_in_full_precision_and_the_flags_come_back(backend):
    before, model = precisions(), Precise()
    backend.run(model, np.ones(2, np.float32))
    assert precisions() == before
    assert before[:2] == ["medium", True]
    assert model.seen == ["highest", False, "ieee", "ieee"][: len(before)]
    with pytest.raises(cc.InvalidInput, match="negative"):
        backend.run(model, -np.ones(2, np.float32))
    assert precisions() == before


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch 2.9 has a flag for each kind of operation")
def test_flags_of_single_operations_come_back_where_older_ones_cannot_be_read(backend):
    places = torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    model, before, seen = nn.Identity(), [place.fp32_precision for place in places], []
    model.register_forward_hook(lambda *_: seen.extend(place.fp32_precision for place in places))
    try:
        for place, value in zip(places, ("tf32", "ieee", "tf32"), strict=True):
            place.fp32_precision = value
        backend.run(model, np.ones(2, np.float32))
        assert seen == ["ieee"] * 3
        assert [place.fp32_precision for place in places] == ["tf32", "ieee", "tf32"]
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value
