"""Eager CPU tensors: their memory as arrays, and clipping through the public verbs."""

import math
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import clipcore as cc
from clipcore.clipping.given import Given
from clipcore.clipping.kernels import round_once
from clipcore.testing import strategies
from clipcore.testing.checks import assert_like_reference, assert_same_bits
from clipcore_torch._tensors import as_tensor, to_array, values_of
from clipcore_torch.backend import TorchBackend

POLICY = cc.ClipByGlobalNorm(1.0)
REAL = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FLOATING = [*REAL, torch.complex64, torch.complex128]


def bits(tensor):
    return to_array(tensor).tobytes()


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)


def test_the_plugin_imports_no_torch():
    script = (
        "import sys, clipcore as cc, clipcore_torch.plugin as plugin\n"
        "assert 'torch' in cc.backends() and plugin.clipcore_root_modules() == ['torch']\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("dtype", [*FLOATING, torch.int64, torch.int32, torch.uint8, torch.bool, torch.float8_e5m2])
def test_an_array_is_the_memory_of_its_tensor(backend, dtype):
    tensor = torch.ones(3, 2).to(dtype)
    (array,) = backend.to_host([tensor])
    assert array.__array_interface__["data"][0] == tensor.data_ptr()
    assert array.dtype.name == backend.dtype_name(tensor)
    assert array.shape == (3, 2)


@given(array=strategies.arrays(nonfinite=True))
def test_arrays_go_to_torch_and_back_in_every_bit_without_a_copy(backend, array):
    tensor = backend.from_host(array, None)
    assert_same_bits(backend.to_host([tensor]), [array])
    if array.size:
        assert tensor.data_ptr() == array.__array_interface__["data"][0]


def test_every_bfloat16_goes_to_torch_and_back():
    patterns = np.arange(1 << 16, dtype=np.uint16)
    tensor = as_tensor(patterns.view(ml_dtypes.bfloat16))
    assert tensor.dtype == torch.bfloat16
    assert np.array_equal(to_array(tensor).view(np.uint16), patterns)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t[:, ::2],
        lambda t: t.transpose(0, 3),
        lambda t: t.flip(0)[1:],
        lambda t: t[0, 0, 0, 0],
        lambda t: t[:0],
    ],
)
def test_views_of_any_strides_are_clipped_where_they_lie(backend, view):
    tensor = view(torch.randn(4, 4, 4, 4))
    (array,) = backend.to_host([tensor], writable=True)
    wanted = cc.clip(to_array(tensor).copy(), cc.ClipByGlobalNorm(1e-3))[0]
    report = cc.clip_([tensor], cc.ClipByGlobalNorm(1e-3))
    assert_same_bits([to_array(tensor)], [wanted])
    assert_same_bits([array], [wanted])
    assert report.clipped or not tensor.numel()


def test_a_clipped_tensor_keeps_its_order_of_axes():
    tensor = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    (clipped,), _ = cc.clip([tensor], POLICY)
    assert clipped.stride() == tensor.stride()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_conjugated_and_negated_views_are_clipped_as_what_they_show(dtype):
    plain = randn(5, dtype=dtype)
    for lazy in (plain.conj(), plain.conj().imag, plain.conj().real):
        wanted = cc.clip(lazy.resolve_conj().resolve_neg().clone(), POLICY)[0]
        assert bits(cc.clip(lazy, POLICY)[0]) == bits(wanted)
        cc.clip_(lazy, POLICY)
        assert torch.equal(lazy, wanted)


def test_memory_is_not_shown_of_what_has_none_of_its_own(backend):
    from torch._subclasses import FakeTensorMode

    class Wrapped(torch.Tensor):
        pass

    with FakeTensorMode():
        fake = torch.ones(3)
    for tensor in (torch.ones(3, device="meta"), fake, torch.ones(3).as_subclass(Wrapped)):
        assert backend.to_host([torch.ones(3), tensor]) is None
    seen = []
    torch.vmap(lambda x: seen.append(backend.to_host([x])) or x)(torch.ones(2, 3))
    torch.func.grad(lambda x: seen.append(backend.to_host([x])) or x.sum())(torch.ones(3))
    assert seen == [None, None]


def test_memory_is_not_shown_where_a_derivative_is_wanted(backend):
    param = nn.Parameter(torch.ones(3))
    assert backend.to_host([param]) is None
    with torch.no_grad():
        assert backend.to_host([param]) is not None
    assert backend.to_host([param], writable=True) is not None


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("view", [lambda t: t[:1].expand(4, 1), lambda t: t.unfold(0, 3, 1)])
def test_writing_into_shared_elements_is_refused(dtype, view):
    memory = torch.ones(40_000, dtype=dtype)
    gradient = view(memory)
    with pytest.raises(cc.InvalidInput, match=r"grads\[1\] has shape .* share memory.*cc\.clip"):
        cc.clip_([torch.ones(2), gradient], POLICY)
    assert torch.equal(memory, torch.ones_like(memory))
    assert bits(cc.clip(gradient, POLICY)[0]) == bits(cc.clip(gradient.clone(), POLICY)[0])


@given(case=strategies.norm_cases(exact=True) | strategies.value_cases())
def test_tensors_are_clipped_as_the_reference_says(case):
    tensors = [as_tensor(array.copy()) for array in case.tensors]
    clipped, _ = cc.clip(tensors, case.policy)
    assert_like_reference([to_array(t) for t in clipped], case.policy, case.tensors)
    cc.clip_(tensors, case.policy)
    assert_like_reference([to_array(t) for t in tensors], case.policy, case.tensors)


def test_tensors_in_range_come_back_themselves_in_their_structure():
    grads = {"a": [torch.ones(2), None], "b": (torch.tensor(0.5),)}
    clipped, report = cc.clip(grads, cc.ClipByGlobalNorm(10.0))
    assert clipped["a"][0] is grads["a"][0]
    assert clipped["a"][1] is None
    assert clipped["b"][0] is grads["b"][0]
    assert (report.clipped, report.scale) == (False, 1.0)


def test_parameters_are_refused_by_clip_in_place_and_named_the_other_verbs():
    with pytest.raises(cc.InvalidInput, match=r"cc\.clip_grads_ .* cc\.limit_"):
        cc.clip_([nn.Parameter(torch.ones(3))], POLICY)


def test_gradients_of_a_model_are_clipped_each_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model(torch.randn(5, 3)).square().sum().backward()
    model[1].bias.grad = None
    grads = [model[0].weight.grad, model[0].bias.grad]
    wanted, _ = cc.clip([g.clone() for g in grads], POLICY)
    report = cc.clip_grads_(model, POLICY)
    assert len(report.norms) == 1
    assert [bits(g) for g in grads] == [bits(w) for w in wanted]
    assert cc.clip_grads_(model.parameters(), cc.ClipByGlobalNorm(10.0)).norm == pytest.approx(1.0)
    assert cc.clip_grads_(model[0].weight, cc.ClipByNorm(0.25)).scale < 1


def test_gradients_that_share_memory_are_scaled_once():
    first, second = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    first.grad = second.grad = torch.full((4,), 2.0)
    cc.clip_grads_([first, second], cc.ClipByNorm(1.0))
    assert torch.equal(first.grad, torch.full((4,), 0.5))


def test_one_memory_counts_once_beside_a_tensor_that_cannot_be_written_where_it_lies():
    uncoalesced = torch.sparse_coo_tensor(torch.tensor([[0, 0]]), torch.zeros(2), (2,), check_invariants=True)
    for other in (uncoalesced, torch.zeros(2, dtype=torch.complex64).conj()):
        grad = torch.tensor([[3.0, 4.0]])
        report = cc.clip_([grad, other, other, grad, grad.view(2)], POLICY)
        assert report.norm == 5.0
        assert bits(grad) == bits(cc.clip(torch.tensor([[3.0, 4.0]]), POLICY)[0])


def test_weights_are_limited_in_place_and_statistics_are_not_touched():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(torch.rand(tensor.shape) * 9 + 1)
    model[0].bias.requires_grad = False
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = [p.data_ptr() for p in model.parameters()]
    cc.limit_(model, cc.ClipByValue(0.5))
    untouched = ["0.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name in untouched), name
    assert [p.data_ptr() for p in model.parameters()] == places
    cc.limit_([model[0].bias], cc.ClipByValue(0.5))
    assert torch.equal(model[0].bias, torch.full((3,), 0.5))


def test_autograd_notices_weights_that_were_limited_between_forward_and_backward():
    layer = nn.Linear(3, 3)
    loss = layer(torch.randn(2, 3, requires_grad=True)).sum()
    cc.limit_(layer, cc.ClipByValue(1e-3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", FLOATING)
def test_sparse_gradients_are_summed_first(dtype):
    indices = torch.tensor([[0, 2, 0]])
    values = torch.tensor([[3.0, 0], [0, 0], [4.0, 0]], dtype=dtype)
    for policy in (POLICY, cc.ClipByNorm(3.0, p=1)):
        sparse = torch.sparse_coo_tensor(indices, values, (4, 2), check_invariants=True)
        wanted, expected = cc.clip(sparse.to_dense(), policy)
        (clipped,), report = cc.clip([sparse], policy)
        assert clipped.is_sparse
        assert clipped.is_coalesced()
        assert bits(clipped) == bits(wanted)
        assert report.norm == expected.norm == 7.0
        for other in (sparse.clone(), sparse.coalesce()):
            assert cc.clip_([other], policy).scale == report.scale
            assert bits(other) == bits(wanted)
        assert cc.clip([sparse], cc.ClipByGlobalNorm(100.0))[0][0] is sparse


def repeated(values, dtype):
    """A sparse tensor that has all its values at one index."""
    values = torch.tensor(values, dtype=dtype)
    return torch.sparse_coo_tensor(torch.zeros(1, len(values), dtype=torch.long), values, (3,), check_invariants=True)


@pytest.mark.parametrize(
    ("values", "dtype", "total"),
    [
        ([1.0] * 3000, torch.float16, 3000.0),
        ([1.0] * 3000, torch.bfloat16, 3008.0),  # the nearest bfloat16
        ([6e4, 6e4, -6e4], torch.float16, 6e4),
        ([1e8, 1.0, -1e8], torch.float32, 1.0),
        ([1e8, 1j, -1e8], torch.complex64, 1.0),
        ([6e4, 6e4], torch.float16, math.inf),
    ],
)
def test_duplicates_are_summed_in_float64_and_rounded_once(backend, values, dtype, total):
    policy = cc.ClipByValue(1e9) if total == math.inf else cc.ClipByGlobalNorm(1e9)
    assert cc.clip(repeated(values, dtype), policy)[1].norm == total
    assert float(policy.bound(Given([repeated(values, dtype)], backend.primitives()), {})[2].norm) == total


@given(st.lists(st.floats(-4.0, 4.0, width=16), min_size=2, max_size=5), st.sampled_from(REAL))
def test_the_sum_of_duplicates_is_the_one_that_the_core_rounds(values, dtype):
    shown = to_array(values_of(repeated(values, dtype)))
    exact = to_array(torch.tensor(values, dtype=dtype)).astype(np.float64).sum(keepdims=True)
    assert np.array_equal(shown, round_once(exact, shown.dtype))  # but for the sign of a zero


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_a_sparse_gradient_in_place_is_refused_where_the_result_is_dense():
    layer = nn.Embedding(5, 3, sparse=True)
    layer(torch.tensor([1, 2])).sum().backward()
    before = layer.weight.grad.to_dense()
    with pytest.raises(cc.InvalidInput, match=r"grads\[0\] is sparse, and AdaptiveClip .*cc\.clip"):
        cc.clip_grads_(layer, cc.AdaptiveClip(1e-3))
    assert torch.equal(layer.weight.grad.to_dense(), before)
    (clipped,), report = cc.clip([layer.weight.grad], cc.AdaptiveClip(1e-3), model=layer)
    (dense,), _ = cc.clip([before], cc.AdaptiveClip(1e-3), model=layer)
    assert report.clipped
    assert torch.equal(clipped, dense)


def test_unaligned_memory_is_clipped_as_any():
    odd = torch.frombuffer(bytearray(41), dtype=torch.float32, offset=1, count=10).fill_(3.0)
    assert odd.data_ptr() % 4
    wanted = cc.clip([torch.full((10,), 3.0)], cc.ClipByNorm(1.0))[0][0]
    assert torch.equal(cc.clip([odd], cc.ClipByNorm(1.0))[0][0], wanted)
    cc.clip_([odd], cc.ClipByNorm(1.0))
    assert torch.equal(odd, wanted)


def test_an_empty_sparse_gradient_is_in_range():
    indices = torch.zeros(1, 0, dtype=torch.long)
    empty = torch.sparse_coo_tensor(indices, torch.zeros(0, 2), (4, 2), check_invariants=True)
    assert cc.clip_([empty], cc.ClipByGlobalNorm(0.0)).norm == 0.0


@given(data=st.data())
def test_clipping_never_modifies_its_input(data):
    case = data.draw(strategies.norm_cases())
    tensors = [as_tensor(array.copy()) for array in case.tensors]
    before = [bits(tensor) for tensor in tensors]
    cc.clip(tensors, case.policy)
    assert [bits(tensor) for tensor in tensors] == before


def test_inference_tensors_are_clipped_in_place():
    with torch.inference_mode():
        tensor = torch.tensor([3.0, 4.0])
    cc.clip_([tensor], POLICY)
    assert torch.allclose(tensor, torch.tensor([0.6, 0.8]))


@pytest.mark.filterwarnings("ignore:.*beta state|.*nested tensors.*prototype")
@pytest.mark.parametrize("policy", [POLICY, cc.ClipByValue(0.5)], ids=repr)
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.eye(4).to_sparse_csr(), r"layout torch\.sparse_csr"),
        (lambda: torch.eye(4).to_sparse_csc(), r"layout torch\.sparse_csc"),
        (lambda: torch.eye(4).to_sparse_bsr((2, 2)), r"layout torch\.sparse_bsr"),
        (lambda: torch.ones(3).to_mkldnn(), r"layout torch\._mkldnn"),
        (lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]), "nested tensor"),
        (lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged), "nested tensor"),
    ],
)
def test_layouts_that_show_no_elements_are_refused_by_name_and_place(make, kind, policy):
    for verb in (cc.clip, cc.clip_):
        with pytest.raises(cc.InvalidInput, match=rf"grads\['w'\] is a (tensor of )?{kind}; expected a dense one"):
            verb({"w": make()}, policy)


def test_parameters_of_lazy_modules_are_refused_until_they_have_a_shape():
    lazy = nn.LazyLinear(3)
    with pytest.raises(cc.InvalidInput, match=r"uninitialised parameter of a lazy module.*call the module once"):
        cc.limit_(lazy, POLICY)
    assert cc.clip_grads_(lazy, POLICY).norm == 0.0
    lazy(torch.ones(1, 2))
    assert cc.limit_(lazy, cc.ClipByValue(1e-6)).clipped


def test_integers_and_strangers_are_refused():
    with pytest.raises(cc.InvalidInput, match=r"grads\[1\] has dtype int64"):
        cc.clip([torch.ones(2), torch.ones(2, dtype=torch.int64)], POLICY)
    with pytest.raises(cc.InvalidInput, match=r"grads\[1\] is a tensor of backend 'numpy', and grads\[0\] of 'torch'"):
        cc.clip([torch.ones(2), np.ones(2)], POLICY)
    with pytest.raises(cc.InvalidInput, match="expected a module or its parameters"):
        cc.clip_grads_([nn.Parameter(torch.ones(2)), "weight"], POLICY)


def test_views_of_one_gradient_that_carries_a_graph_count_once_in_place():
    x = torch.tensor([3.0, 4.0], requires_grad=True) * 1
    assert cc.clip_([x, x.view(2)], cc.ClipByGlobalNorm(1.0)).norm == 5.0
    assert torch.equal(x, torch.tensor([0.6, 0.8]))
    with pytest.raises(cc.InvalidInput, match="elements share memory"):
        cc.clip_([x, torch.tensor(3.0).expand(2)], cc.ClipByGlobalNorm(0.1))


def test_autograd_hears_of_writes_alone():
    grads = [torch.ones(3), torch.ones(2)]
    cc.clip_(grads, cc.ClipByGlobalNorm(10.0))
    with pytest.raises(cc.NonFinite):
        cc.clip_([*grads, torch.tensor([math.nan])], cc.ClipByGlobalNorm(10.0, nonfinite="raise"))
    assert [grad._version for grad in grads] == [0, 0]
    cc.clip_(grads, cc.ClipByGlobalNorm(1.0))
    assert [grad._version for grad in grads] == [1, 1]


def test_a_sparse_gradient_is_bounded_where_it_holds_nothing_as_well():
    sparse = torch.sparse_coo_tensor([[0, 1]], torch.tensor([3.0, 0.2]), (4,), check_invariants=True)
    assert torch.equal(cc.clip(sparse, cc.ClipByValue(0.5, 1.0))[0], torch.tensor([1.0, 0.5, 0.5, 0.5]))
    assert cc.clip(sparse, cc.ClipByValue(-1.0, 1.0))[0].is_sparse


def test_gradients_by_names_that_the_model_does_not_have_are_refused():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    for policy in (cc.PerGroup({"0": cc.ClipByValue(0.1)}), cc.AdaptiveClip()):
        with pytest.raises(cc.InvalidInput, match=r"'module\.0\.weight'.*no parameter of that name.*'0\.weight'"):
            cc.clip({"module.0.weight": torch.ones(2, 2)}, policy, model=model)


def test_a_layer_whose_layout_is_unknown_is_named_with_what_helps():
    with pytest.raises(cc.InvalidInput, match=r"weight_ih_l0.*whose layout clipcore does not know.*PerGroup"):
        cc.limit_(nn.LSTM(4, 3, proj_size=2), cc.MaxNorm(1.0))


@pytest.fixture
def _out_of_sight(monkeypatch):
    """As of a device, whose memory NumPy does not reach."""
    monkeypatch.setattr(TorchBackend, "to_host", lambda self, tensors, *, writable=False: None)
    monkeypatch.setattr(TorchBackend, "memory", lambda self, tensors, *, writable=False: None)


@pytest.mark.usefixtures("_out_of_sight")
@pytest.mark.parametrize("view", [torch.detach, torch.t, lambda x: x[:2], lambda x: x.t().unsqueeze(0)])
@pytest.mark.parametrize("memory", [[[3.0, 4.0], [0.0, 0.0]], [[3.0, 0.0, 7.0], [4.0, 0.0, 7.0]]])
def test_one_memory_out_of_sight_is_scaled_once(memory, view):
    memory = torch.tensor(memory)
    gradient = memory[:, :2]
    report = cc.clip_([gradient, view(gradient)], cc.ClipByGlobalNorm(2.5))
    assert float(report.norm) == 5.0
    assert gradient.norm() == 2.5
    assert (memory[:, 2:] == 7.0).all()


@pytest.mark.usefixtures("_out_of_sight")
def test_what_lies_elsewhere_is_counted_apart():
    for grads in (
        [torch.ones(2), torch.ones(2)],
        torch.ones(4).split(2),
        [torch.ones(2, 2)[:, i] for i in (0, 1)],
        [torch.ones(2, device="meta"), torch.ones(2, device="meta")],
        [torch.ones(2).requires_grad_().sqrt(), torch.ones(2).sqrt(), torch.ones(0), torch.ones(0)],
        [torch.ones(2).to_sparse(), torch.ones(2).to_sparse()],
    ):
        assert len(cc.clip_(grads, cc.ClipByNorm(9.0)).norms) == len(grads)


@pytest.mark.usefixtures("_out_of_sight")
def test_of_memory_out_of_sight_one_tensor_is_asked_for_all(monkeypatch):
    seen, detached = [], TorchBackend.detached
    monkeypatch.setattr(TorchBackend, "detached", lambda self, tensor: seen.append(tensor) or detached(self, tensor))
    cc.clip_([torch.ones(2) for _ in range(9)], cc.ClipByNorm(1.0))
    assert len(seen) == 1
