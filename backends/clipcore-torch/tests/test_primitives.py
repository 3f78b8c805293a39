"""The policies as torch operations: compiled, under autograd, and as the reference says. Conformance has the rest."""

import math
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import clipcore as cc
from clipcore.clipping.given import Given
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


@pytest.mark.parametrize("clip", [cc.clip, torch.func.grad(lambda grads, policy: cc.clip(grads, policy)[0]["b"].sum())])
def test_raising_on_tensors_that_only_torch_can_read_names_the_first_with_a_fault(clip):
    grads = {"a": torch.ones(2, requires_grad=True), "b": torch.tensor([1.0, math.inf])}
    wanted = (
        r"^1 elements are inf or NaN \(first in grads\['b'\], 1 of 2 tensors\), and the policy has nonfinite='raise'"
    )
    with pytest.raises(cc.NonFinite, match=wanted):
        clip(grads, cc.ClipByGlobalNorm(1.0, nonfinite="raise"))


def test_an_error_of_the_device_is_reported_as_it_is(monkeypatch):
    def failing(self):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.Tensor, "__int__", failing)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        cc.clip(torch.ones(2, requires_grad=True), cc.ClipByGlobalNorm(1.0, nonfinite="raise"))


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
        (clipped,), _, report = policy.bound(Given([sparse], backend.primitives()), {})
        assert torch.equal(clipped.to_dense(), torch.tensor([1.0, 0, 0, 0]))
        assert float(report.norm) == 7.0


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (-0.0, 1.0), (-1.0, 0.0), (-1.0, -0.0), (1e-60, 1.0), (-1.0, -1e-60)]
)
def test_a_clamp_keeps_the_sign_of_zeros_and_of_bounds_that_round_to_zero(backend, low, high):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        grads = [torch.tensor([-0.0, 0.0, -2.0, 2.0] * 5, dtype=dtype)]
        (clipped,), _ = backend.primitives().clamp(grads, low, high)
        (wanted,), _ = cc.clip(grads, cc.ClipByValue(low, high))
        assert torch.equal(clipped, wanted)
        assert torch.equal(torch.signbit(clipped), torch.signbit(wanted))


def test_meta_tensors_run_through_the_primitives_without_a_value_being_read(backend):
    grads = [torch.ones(3, device="meta"), torch.ones(2, dtype=torch.float16, device="meta")]
    for policy in POLICIES:
        clipped, report = cc.clip(grads, policy)
        assert [(t.shape, t.dtype) for t in clipped] == [(t.shape, t.dtype) for t in grads]
        assert report.norm.device.type == "meta"


class CopiesToDevice(TorchDispatchMode):
    """Whether each copy from the CPU to the meta device goes on without waiting, as it would on a real one."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].is_cpu and result.is_meta:
            self.waits.append(not (kwargs or {}).get("non_blocking", False))
        return result


def test_the_power_method_does_not_wait_for_the_device():
    with CopiesToDevice() as copies:
        cc.clip([torch.ones(3, 2, device="meta")], cc.SpectralLimit(1.0, method="power", unit_axis=0))
    assert copies.waits
    assert not any(copies.waits)


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
    for module in ("_numbers", "_tensors"):
        monkeypatch.setattr(f"clipcore_torch.{module}.DEVICES_WITHOUT_FLOAT64", ("cpu",))
    for values, limit in (([1e20] * 3, 1.0), ([3e-30, 4e-30], 1e-30), ([3e-22, 4e-22], 1e-22), ([3.0, 4.0], 5.0)):
        grads = [torch.tensor(values), torch.tensor([1.0, 0.0], dtype=torch.float16) * 0]
        for policy in (cc.ClipByGlobalNorm(limit), cc.ClipByGlobalNorm(limit, p=3.0)):
            clipped, _, report = policy.bound(Given(grads, backend.primitives()), {})
            wanted, exact = cc.clip(grads, policy)
            assert_close(flat(clipped), flat(wanted), ulps=4, absolute=0.0)
            assert report.norm.dtype == torch.float32
            assert float(report.norm) == pytest.approx(exact.norm, rel=1e-6)


UNITS = {"unit_axis": 0}
NEW_POLICIES = [
    cc.ClipByAverageNorm(0.1),
    cc.ClipByBlockRMS(0.5),
    cc.AdaptiveClip(0.1, **UNITS),
    cc.AutoClip(30.0, window=3),
    cc.ZClip(0.1, warmup=2),
    cc.AdaGC(1.0, warmup=2),
    cc.SpikeClip(0.5, decay=0.5, warmup=1),
    cc.MinMaxNorm(0.6, 0.9, **UNITS),
    cc.UnitNorm(**UNITS),
    cc.Box(0.3),
    cc.Chain([cc.ClipByValue(0.5), cc.AutoClip(window=4), cc.ClipByNorm(0.5)]),
    cc.PerGroup({"a": cc.ClipByNorm(0.3), "b": cc.AdaGC(0.5, warmup=1)}),
    cc.PerGroup({"a": cc.SpikeClip(0.5, warmup=1, decay=0.5)}, default=cc.AutoClip(30.0)),
    cc.AutoClip(30.0, nonfinite="skip"),
    cc.AdaGC(1.0, warmup=1, nonfinite="zero"),
]
# on a CPU the largest factors, elsewhere factors that may be lower by two units of the dtype
HARD_POLICIES = [
    cc.PerExampleClip(1.0),
    cc.PerExampleClip(1.0, per_layer=True),
    cc.QuantileClip(1.0),
    cc.MaxNorm(0.5, **UNITS),
    cc.SpectralLimit(1.0, **UNITS),
    cc.SpectralLimit(1.0, method="power", **UNITS),
]


def named_gradients(dtypes=(torch.float32, torch.float64, torch.bfloat16)):
    shapes = {"a": (4, 5), "b": (4, 3, 2), "d": (4,)}
    grads = {name: torch.randn(shape).to(dtype) for (name, shape), dtype in zip(shapes.items(), dtypes, strict=True)}
    return {"a": grads["a"], "c": None, "b": grads["b"], "d": grads["d"]}


def steps_of(policy, clip, dtypes, poison=None):
    """Four steps of a policy by a compiled function and by an eager one: pairs of results, states and reports."""
    torch.manual_seed(0)
    params = named_gradients(dtypes)
    states = [policy.init(params, params)] * 2
    for index in range(4):
        grads = named_gradients(dtypes)
        if index == poison:
            grads["a"][1, 2] = math.nan
        results = [update(grads, state, params) for update, state in zip((clip, policy.update), states, strict=True)]
        states = [state for _, state, _ in results]
        yield results


def assert_states_agree(policy, state, wanted):
    from clipcore.clipping.states import flat_state

    flat_wanted = flat_state(policy, wanted)
    for name, value in flat_state(policy, state).items():
        tolerance = 2e-7 if "moment" in name else 1e-13
        np.testing.assert_allclose(to_array(torch.as_tensor(value)), flat_wanted[name], tolerance)


def compiled(policy, **options):
    return torch.compile(lambda grads, state, params: policy.update(grads, state, params), fullgraph=True, **options)


@pytest.mark.parametrize("poison", [None, 2])
@pytest.mark.parametrize("policy", NEW_POLICIES, ids=repr)
def test_every_policy_compiled_agrees_with_the_eager_one_step_by_step(policy, poison):
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    for (actual, state, report), (wanted, exact_state, exact) in steps_of(
        policy, compiled(policy, backend="aot_eager"), dtypes, poison
    ):
        assert_close(flat(actual), flat(wanted), relative=NORM_TOLERANCE, absolute=0.0)
        assert_states_agree(policy, state, exact_state)
        for field in ("norm", "scale", "limit"):
            value = float(getattr(report, field))
            assert value == pytest.approx(getattr(exact, field), rel=NORM_TOLERANCE, nan_ok=True)
        assert int(report.nonfinite) == exact.nonfinite
        # a limit that is the norm itself may be one rounding below it
        assert bool(report.clipped) == exact.clipped or exact.scale == pytest.approx(1.0, rel=NORM_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", HARD_POLICIES, ids=repr)
def test_hard_bounds_compiled_are_at_most_two_units_below_the_largest(policy, dtype):
    for (actual, _, report), (wanted, _, exact) in steps_of(policy, compiled(policy, backend="aot_eager"), [dtype] * 3):
        unit = torch.finfo(dtype).eps
        # a sum over examples may cancel, and then has fewer digits than its terms, each at most 1
        absolute = 0.0 if policy.keeps_shapes else 3 * unit
        assert_close(flat(actual), flat(wanted), relative=5e-14, ulps=3, absolute=absolute)
        assert bool(report.clipped) == exact.clipped
        assert exact.scale * (1 - max(3 * unit, 5e-14)) <= float(report.scale) <= exact.scale * (1 + max(unit, 5e-14))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # inductor's own
def test_inductor_compiles_what_policies_with_state_and_units_are_made_of():
    spikes, units = cc.SpikeClip(0.5, decay=0.5, warmup=1), cc.AdaptiveClip(0.1, unit_axis=0)
    policy = cc.PerGroup({"a": cc.Chain([spikes, units])}, default=cc.AutoClip(30.0))
    dtypes = (torch.float32, torch.float64, torch.float32)
    for (actual, state, _), (wanted, exact_state, _) in steps_of(policy, compiled(policy), dtypes):
        # two policies in a chain round twice
        assert_close(flat(actual), flat(wanted), relative=NORM_TOLERANCE, ulps=2, absolute=0.0)
        assert_states_agree(policy, state, exact_state)


def stored_norm(policy, tensor):
    """The norm that a policy bounds, of a tensor as it is stored, exactly enough to see one unit of float64."""
    values = to_array(tensor).astype(np.longdouble)
    if isinstance(policy, cc.SpectralLimit):
        return np.linalg.norm(values.astype(np.float64), 2)
    return np.sqrt(np.square(values).sum(1)).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [0.7, 3e-5, 1e-6])  # of the latter, most of what float16 stores is subnormal
@pytest.mark.parametrize("kind", [cc.MaxNorm, cc.SpectralLimit])
def test_what_a_hard_bound_stores_never_exceeds_it(backend, kind, limit, dtype):
    policy = kind(limit, unit_axis=0)
    for size in (2, 3, 17, 300):
        tensor = torch.randn(20, size, dtype=torch.float64).to(dtype)
        (bounded,), _, report = policy.bound(Given([tensor], backend.primitives(), slots=[0]), {})
        assert stored_norm(policy, bounded) <= limit
        assert torch.isfinite(bounded).all()
        assert bool(report.clipped)
        assert dtype is torch.float16 or stored_norm(policy, bounded) >= limit * (
            1 - 4 * torch.finfo(dtype).eps - 1e-13
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_units_of_subnormal_numbers_are_raised_to_their_norm(backend, dtype):
    smallest = 2.0 ** {torch.float32: -149, torch.float64: -1074, torch.bfloat16: -133}[dtype]
    units = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]], dtype=dtype) * smallest
    (raised,), _, _ = cc.UnitNorm(unit_axis=0).bound(Given([units], backend.primitives(), slots=[0]), {})
    (wanted,), _ = cc.clip([units], cc.UnitNorm(unit_axis=0))
    assert_close([to_array(raised)], [to_array(wanted)], absolute=0.0)


def test_examples_over_several_tensors_never_exceed_their_bound(backend):
    policy = cc.PerExampleClip(1.0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        tensors = [torch.randn(30, 50).to(dtype), torch.randn(30, 2, 7).to(dtype)]
        primitives = backend.primitives()
        _, measure = primitives.measure(tensors, 2.0, [(0,), (0,)])
        stored, _ = primitives.within(tensors, primitives.join(measure), 1.0, policy.nonfinite)
        rows = torch.cat([tensor.flatten(1) for tensor in stored], 1)
        assert stored_norm(policy, rows) <= 1.0


def test_lists_are_scaled_together_where_a_launch_is_dear(backend, monkeypatch):
    grads = [torch.randn(3), torch.randn(2, 2), torch.randn(4).bfloat16(), torch.randn(2, dtype=torch.float64)] * 2
    for policy in (
        cc.ClipByGlobalNorm(0.1),
        cc.ClipByNorm(0.1),
        cc.ClipByGlobalNorm(0.0),
        cc.ClipByGlobalNorm(1.0, p=1.0),
    ):
        apart, _, report = policy.bound(Given(grads, backend.primitives()), {})
        monkeypatch.setattr("clipcore_torch._together._DEVICES", ("cpu",))
        together, _, same = policy.bound(Given(grads, backend.primitives()), {})
        monkeypatch.undo()
        assert_close(flat(together), flat(apart), relative=NORM_TOLERANCE, absolute=0.0)
        assert float(same.norm) == pytest.approx(float(report.norm), rel=NORM_TOLERANCE)


def test_per_example_bounds_work_under_vmap_and_are_differentiable():
    batch = torch.randn(2, 5, 3) * 3
    summed = torch.vmap(lambda x: cc.clip(x, cc.PerExampleClip(1.0))[0])(batch)
    apart = torch.stack([cc.clip(x.requires_grad_(), cc.PerExampleClip(1.0))[0] for x in batch.unbind()])
    torch.testing.assert_close(summed, apart.detach())
    tensors = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True)]
    for policy in (cc.PerExampleClip(1.0), cc.SpectralLimit(1.0, unit_axis=0), cc.MaxNorm(0.5, unit_axis=0)):
        assert torch.autograd.gradcheck(lambda *x, policy=policy: tuple(cc.clip(list(x), policy)[0]), tensors)


def test_the_percentile_is_numpys():
    from clipcore_torch._arithmetic import TorchArithmetic

    values = torch.rand(50, dtype=torch.float64)
    for count in (1, 2, 3, 10, 49, 50):
        for q in (0.0, 10.0, 33.3, 50.0, 97.5, 100.0):
            found = TorchArithmetic().percentile(values, torch.tensor(count), q)
            assert float(found) == np.percentile(values[:count].numpy(), q)


def test_second_moments_are_of_what_is_stored(backend):
    grads, moments = [torch.tensor([3.0, -0.5], dtype=torch.bfloat16)], [torch.tensor([0.3, 0.3])]
    (stored,), (after,), changed = backend.primitives().spike(grads, moments, 2.0, 0.5, True)
    assert torch.equal(stored.float(), torch.tensor([math.sqrt(0.6), -0.5]).bfloat16().float())
    assert torch.equal(after, 0.5 * moments[0] + 0.5 * stored.float().square())
    assert bool(changed)


@pytest.fixture
def _dear_launches(monkeypatch):
    """The CPU taken for a device, and portions so small that a tensor has several."""
    monkeypatch.setattr("clipcore_torch._together._DEVICES", ("cpu",))
    monkeypatch.setattr("clipcore_torch._together._PORTION", 3)


class Operations(TorchDispatchMode):
    """Which operations torch was asked for, and how often."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("_dear_launches")
def test_norms_of_a_dtype_are_taken_together_in_whatever_order_they_come(backend):
    shapes = [(2,), (3, 4), (), (5,), (1, 1), (0,), (7,), (2, 2)]
    dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.float32, torch.bfloat16]
    grads = [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, [*dtypes, torch.float32], strict=True)]
    with Operations() as seen:
        _, measure = backend.primitives().measure(grads, 2.0)
    norms = backend.primitives().norms(measure)
    assert_close(
        [to_array(norms)], [np.array([float(x.double().norm()) for x in grads])], relative=NORM_TOLERANCE, absolute=0.0
    )
    with Operations() as more:
        backend.primitives().measure(grads + [torch.ones(3)] * 16, 2.0)
    assert more.counts[torch.ops.aten.__rshift__] == seen.counts[torch.ops.aten.__rshift__]


def faulty_gradients():
    last = [(2, torch.float32, 1), (9, torch.float32, math.inf), (1, torch.bfloat16, math.nan), (0, torch.float32, 1)]
    last += [(1, torch.complex64, complex(1, math.nan)), (7, torch.complex64, complex(math.inf, math.nan))]
    grads = [torch.ones(size, dtype=dtype) for size, dtype, _ in last] + [torch.full((4, 3), -math.inf).t()]
    for grad, (_, _, fault) in zip(grads, last, strict=False):
        grad[-1:] = fault
    return grads


@pytest.mark.usefixtures("_dear_launches")
def test_faults_of_a_dtype_are_counted_together(backend):
    grads, primitives = faulty_gradients(), backend.primitives()
    with Operations() as seen:
        found = [int(primitives.screen(grads, "zero", nan_alone=alone)[1]) for alone in (False, True)]
    assert found == [
        sum(int(is_fault(x).sum()) for x in grads) for is_fault in (lambda x: ~torch.isfinite(x), torch.isnan)
    ]
    with Operations() as more:
        primitives.screen(grads + [torch.ones(0)] * 16, "propagate", nan_alone=False)
    assert more.counts[torch.ops.aten.sum] < seen.counts[torch.ops.aten.sum]


@pytest.mark.usefixtures("_dear_launches")
def test_results_are_written_in_one_launch_for_each_dtype(backend):
    tensors = [torch.zeros(2), torch.zeros(1, 2), torch.zeros(2).bfloat16(), torch.zeros(2).bfloat16(), torch.zeros(3)]
    tensors += [torch.zeros(2, dtype=torch.float64), torch.zeros(2).to_sparse()]
    values = [torch.ones_like(tensor.to_dense()) for tensor in tensors[:-1]] + [torch.ones(2).to_sparse()]
    with Operations() as seen:
        backend.assign_(tensors, values)
    assert all(torch.equal(tensor.to_dense(), value.to_dense()) for tensor, value in zip(tensors, values, strict=True))
    assert seen.counts[torch.ops.aten._foreach_copy_] == 2
