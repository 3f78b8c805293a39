"""The policies as torch operations: compiled, under autograd, and as the reference says. Conformance has the rest."""

import math
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn

import clipcore as cc
from clipcore.testing import strategies
from clipcore.testing.checks import NORM_TOLERANCE, assert_close, coarsest, expected, smallest_normal
from clipcore_torch._tensors import as_tensor, to_array

POLICIES = [
    cc.ClipByGlobalNorm(1.0),
    cc.ClipByNorm(1.0),
    cc.ClipByGlobalNorm(1.0, p=math.inf),
    cc.ClipByGlobalNorm(1.0, p=3.0),
    cc.ClipByNorm(1.0, p=1.0, nonfinite="zero"),
    cc.ClipByGlobalNorm(1.0, nonfinite="skip"),
    cc.ClipByGlobalNorm(math.inf),
    cc.ClipByGlobalNorm(0.0),
    cc.ClipByValue(0.3),
    cc.ClipByValue(0.3, nonfinite="zero"),
]


def gradients():
    return {
        "a": [torch.tensor([3.0, 4.0]), None, torch.tensor([1.0, -0.5], dtype=torch.bfloat16)],
        "b": (torch.randn(5, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float16), torch.ones(0, 3)),
    }


def complex_gradients():
    return [torch.randn(4, dtype=torch.complex64), torch.randn(2, 2)]


def flat(tree):
    from clipcore.structure import leaves

    return [to_array(leaf) for _, leaf in leaves(tree)]


def assert_agrees(compiled, eager):
    (actual, report), (wanted, exact) = compiled, eager
    assert_close(flat(actual), flat(wanted), relative=NORM_TOLERANCE, absolute=0.0)
    assert isinstance(report, cc.ClipReport)
    for field in ("norm", "scale"):
        assert float(getattr(report, field)) == pytest.approx(getattr(exact, field), rel=NORM_TOLERANCE, nan_ok=True)
    assert bool(report.clipped) == exact.clipped
    assert int(report.nonfinite) == exact.nonfinite
    assert report.norm.dtype == report.scale.dtype == torch.float64
    assert (report.clipped.dtype, report.nonfinite.dtype) == (torch.bool, torch.int64)
    assert report.norm.ndim == report.scale.ndim == report.clipped.ndim == report.nonfinite.ndim == 0
    np.testing.assert_allclose(report.norms, exact.norms, NORM_TOLERANCE)
    np.testing.assert_allclose(report.scales, exact.scales, NORM_TOLERANCE)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_function_clips_in_one_graph_and_returns_the_report(compiler, policy):
    @torch.compile(fullgraph=True, backend=compiler)
    def clip(grads):
        return cc.clip(grads, policy)

    grads = gradients()
    assert_agrees(clip(grads), cc.clip(grads, policy))
    grads["a"][0][1] = math.inf
    grads["b"][0][2] = math.nan
    assert_agrees(clip(grads), cc.clip(grads, policy))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # inductor's own
def test_inductor_compiles_what_clipping_is_made_of():
    policies = (cc.ClipByGlobalNorm(1.0), cc.ClipByNorm(1.0, p=3.0), cc.ClipByValue(0.3))

    @torch.compile(fullgraph=True)
    def clip(grads):
        return [cc.clip(grads, policy) for policy in policies]

    grads = gradients()
    for compiled, policy in zip(clip(grads), policies, strict=True):
        assert_agrees(compiled, cc.clip(grads, policy))


def test_complex_gradients_are_clipped_inside_a_compiled_function():
    grads = complex_gradients()
    for policy in (cc.ClipByGlobalNorm(1.0), cc.ClipByNorm(1.0, p=1.0), cc.ClipByNorm(1.0, p=math.inf)):
        compiled = torch.compile(lambda grads, policy=policy: cc.clip(grads, policy), fullgraph=True, backend="eager")
        assert_agrees(compiled(grads), cc.clip(grads, policy))


def test_a_compiled_function_takes_limits_that_change():
    @torch.compile(fullgraph=True, backend="eager")
    def clip(grads, limit):
        return cc.clip(grads, cc.ClipByGlobalNorm(limit)), cc.clip(grads, cc.ClipByValue(limit))

    grads = gradients()
    for limit in (1.0, 2.0, 0.1, math.inf, 0.0, 3.0):
        by_norm, by_value = clip(grads, limit)
        assert_agrees(by_norm, cc.clip(grads, cc.ClipByGlobalNorm(limit)))
        assert_agrees(by_value, cc.clip(grads, cc.ClipByValue(limit)))


def test_a_compiled_function_takes_sizes_that_change():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def clip(grads):
        return cc.clip(grads, cc.ClipByGlobalNorm(1.0))

    for size in (3, 5, 3000):
        grads = [torch.randn(size), torch.randn(2, size)]
        assert_agrees(clip(grads), cc.clip(grads, cc.ClipByGlobalNorm(1.0)))


def test_a_compiled_function_may_be_the_first_to_ask_for_the_backend():
    import subprocess
    import sys

    script = (
        "import torch, clipcore as cc\n"
        "clip = torch.compile(lambda g: cc.clip(g, cc.ClipByGlobalNorm(1.0)), fullgraph=True, backend='eager')\n"
        "assert abs(float(clip([torch.tensor([3.0, 4.0])])[1].norm) - 5.0) < 1e-12\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_gradients_are_clipped_in_place_inside_a_compiled_function():
    layer = nn.Linear(3, 2)
    layer(torch.randn(4, 3)).square().sum().backward()
    wanted, exact = cc.clip([p.grad.clone() for p in layer.parameters()], cc.ClipByGlobalNorm(0.1))
    clip = torch.compile(lambda: cc.clip_grads_(layer, cc.ClipByGlobalNorm(0.1)), backend="eager")
    assert float(clip().norm) == pytest.approx(exact.norm, rel=NORM_TOLERANCE)
    assert_close([to_array(p.grad) for p in layer.parameters()], flat(wanted), absolute=0.0)


@pytest.mark.parametrize(
    "given_as", [list, tuple, iter, lambda params: [params, None], lambda params: (p for p in params)]
)
@pytest.mark.parametrize("fullgraph", [False, True])
def test_parameters_in_any_iterable_are_clipped_and_limited_inside_a_compiled_function(given_as, fullgraph):
    params = [nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([4.0]))]
    for param in params:
        param.grad = 2 * param.detach()
    clip = torch.compile(
        lambda: cc.clip_grads_(given_as(params), cc.ClipByGlobalNorm(1.0)), fullgraph=fullgraph, backend="aot_eager"
    )
    limit = torch.compile(
        lambda: cc.limit_(given_as(params), cc.ClipByGlobalNorm(1.0)), fullgraph=fullgraph, backend="aot_eager"
    )
    assert (float(clip().norm), float(limit().norm)) == (10.0, 5.0)
    for tensors in ([p.grad for p in params], [p.detach() for p in params]):
        assert_close([to_array(t) for t in tensors], [np.float32([0.6]), np.float32([0.8])], absolute=0.0)


def test_one_tensor_in_two_places_is_clipped_once_inside_a_compiled_function():
    grads = [torch.tensor([3.0]), torch.tensor([4.0])]
    clip = torch.compile(
        lambda a, b: cc.clip_([a, b, a], cc.ClipByGlobalNorm(1.0)), fullgraph=True, backend="aot_eager"
    )
    assert float(clip(*grads).norm) == 5.0
    assert_close([to_array(grad) for grad in grads], [np.float32([0.6]), np.float32([0.8])], absolute=0.0)


@pytest.mark.parametrize("cls", [lambda **grads: defaultdict(list, grads), OrderedDict, Counter])
def test_a_compiled_function_keeps_the_class_of_a_dict(cls):
    grads = cls(a=torch.tensor([3.0]), b=torch.tensor([4.0]))
    clip = torch.compile(lambda grads: cc.clip(grads, cc.ClipByGlobalNorm(1.0))[0], fullgraph=True, backend="eager")
    clipped = clip(grads)
    assert type(clipped) is type(grads)
    assert getattr(clipped, "default_factory", None) is getattr(grads, "default_factory", None)
    assert_close(flat(clipped), [np.float32([0.6]), np.float32([0.8])], absolute=0.0)


def test_raising_is_refused_where_gradients_cannot_be_read():
    policy = cc.ClipByGlobalNorm(1.0, nonfinite="raise")
    compiled = torch.compile(lambda grads: cc.clip(grads, policy), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="nonfinite='raise' reads the gradients"):
        compiled([torch.ones(3)])
    with pytest.raises(cc.InvalidInput, match="nonfinite='raise' reads the gradients"):
        torch.vmap(lambda x: cc.clip(x, policy)[0])(torch.ones(2, 3))


def test_raising_under_autograd_raises():
    policy = cc.ClipByGlobalNorm(1.0, nonfinite="raise")
    with pytest.raises(cc.NonFinite, match="1 elements are inf or NaN"):
        cc.clip(torch.tensor([1.0, math.inf], requires_grad=True), policy)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_clipping_is_differentiable_and_its_derivative_right(policy):
    def clip(*tensors):
        return tuple(cc.clip(list(tensors), policy)[0])

    for scale in (0.01, 1.0):
        tensors = [torch.randn(3, dtype=torch.float64) * scale, torch.randn(2, 2, dtype=torch.float64) * scale]
        assert torch.autograd.gradcheck(clip, [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_derivative_at_zero_is_finite(dtype, p):
    zeros = torch.zeros(3, dtype=dtype, requires_grad=True)
    for limit in (1.0, 0.0):
        (clipped,), _ = cc.clip([zeros], cc.ClipByGlobalNorm(limit, p=p))
        (derivative,) = torch.autograd.grad(clipped.sum(), zeros)
        assert torch.equal(derivative, torch.ones(3, dtype=dtype))


def test_policies_work_under_vmap():
    batch = torch.randn(5, 3) * 3
    policy = cc.ClipByGlobalNorm(1.0)
    clipped = torch.vmap(lambda x: cc.clip(x, policy)[0])(batch)
    assert_close([to_array(clipped)], [np.stack([cc.clip(row.numpy(), policy)[0] for row in batch])], absolute=0.0)


def test_sparse_gradients_pass_through_the_primitives(backend):
    indices, values = torch.tensor([[0, 2, 0]]), torch.tensor([3.0, 0.0, 4.0])
    sparse = torch.sparse_coo_tensor(indices, values, (4,), check_invariants=True)
    for policy in (cc.ClipByGlobalNorm(1.0), cc.ClipByValue(1.0), cc.ClipByGlobalNorm(1.0, nonfinite="zero")):
        (clipped,), report = policy.bound([sparse], backend.primitives())
        assert torch.equal(clipped.to_dense(), torch.tensor([1.0, 0, 0, 0]))
        assert float(report.norm) == 7.0


def test_meta_tensors_run_through_the_primitives_without_a_value_being_read(backend):
    grads = [torch.ones(3, device="meta"), torch.ones(2, dtype=torch.float16, device="meta")]
    for policy in POLICIES:
        clipped, report = cc.clip(grads, policy)
        assert [(t.shape, t.dtype) for t in clipped] == [(t.shape, t.dtype) for t in grads]
        assert report.norm.device.type == "meta"


@given(case=strategies.norm_cases(nonfinite="zero", grads=strategies.lists_of(strategies.arrays(nonfinite=True))))
def test_autograd_and_the_reference_agree_within_one_ulp(case):
    tensors = [as_tensor(array.copy()).requires_grad_() for array in case.tensors]
    clipped, _ = cc.clip(tensors, case.policy)
    wanted, _ = expected(case.policy, case.tensors)
    lost = coarsest(smallest_normal, case.tensors) * (1 + sum(t.size for t in case.tensors))
    assert_close([to_array(t) for t in clipped], wanted, relative=NORM_TOLERANCE, absolute=lost)


def test_long_sums_are_exact_to_the_contract():
    grads = [torch.full((3_000_001,), 0.1, requires_grad=True)]
    _, report = cc.clip(grads, cc.ClipByGlobalNorm(1.0))
    exact = math.sqrt(3_000_001) * float(np.float32(0.1))
    assert float(report.norm.detach()) == pytest.approx(exact, rel=NORM_TOLERANCE)


def test_without_float64_the_same_policies_hold_in_float32(backend, monkeypatch):
    for module in ("_primitives", "_tensors"):
        monkeypatch.setattr(f"clipcore_torch.{module}.DEVICES_WITHOUT_FLOAT64", ("cpu",))
    for values, limit in (([1e20] * 3, 1.0), ([3e-30, 4e-30], 1e-30), ([3e-22, 4e-22], 1e-22), ([3.0, 4.0], 5.0)):
        grads = [torch.tensor(values), torch.tensor([1.0, 0.0], dtype=torch.float16) * 0]
        for policy in (cc.ClipByGlobalNorm(limit), cc.ClipByGlobalNorm(limit, p=3.0)):
            clipped, report = policy.bound(grads, backend.primitives())
            wanted, exact = cc.clip(grads, policy)
            assert_close(flat(clipped), flat(wanted), ulps=4, absolute=0.0)
            assert report.norm.dtype == torch.float32
            assert float(report.norm) == pytest.approx(exact.norm, rel=1e-6)
