"""Policies attached to optimizers: every step clipped once, after accumulation and unscaling."""

import copy
import importlib.util
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import clipcore as cc

_spec = importlib.util.spec_from_file_location("data_parallel", pathlib.Path(__file__).with_name("data_parallel.py"))
data_parallel = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(data_parallel)

POLICY = cc.ClipByGlobalNorm(0.01)
SKIP = cc.ClipByGlobalNorm(0.01, nonfinite="skip")


def model(dtype=torch.float32):
    layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    with torch.no_grad():
        for param in layers.parameters():
            param.copy_(torch.randn(param.shape))
    return layers


def batch(dtype=torch.float32):
    return torch.randn(8, 4).to(dtype) * 10


def loss_of(network, x):
    return network(x).square().mean()


def fill(network, x):
    network.zero_grad()
    loss_of(network, x).backward()


def grads(network):
    return [param.grad for param in network.parameters()]


def snapshot(network, optimizer):
    """Parameters and optimizer state, to be compared in every bit."""
    state = copy.deepcopy(optimizer.state_dict()["state"])
    return {name: t.clone() for name, t in network.state_dict().items()}, state


def assert_same(before, after):
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def sgd(network, **options):
    return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, **options)


def adamw(network, **options):
    return torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1, **options)


FORMS = [
    (sgd, {}),
    (sgd, {"foreach": True}),
    (sgd, {"foreach": False}),
    (sgd, {"fused": True}),
    (adamw, {}),
    (adamw, {"foreach": True}),
    (adamw, {"fused": True}),
    (adamw, {"amsgrad": True}),
]
forms = pytest.mark.parametrize(("make", "options"), FORMS)


@forms
def test_every_step_uses_clipped_gradients(make, options):
    network = model()
    twin = copy.deepcopy(network)
    optimizer, manual = make(network, **options), make(twin, **options)
    attachment = cc.attach(optimizer, POLICY)
    for _ in range(3):
        x = batch()
        fill(network, x)
        fill(twin, x)
        expected = cc.clip_grads_(twin, POLICY)
        optimizer.step()
        manual.step()
        assert_same(snapshot(twin, manual), snapshot(network, optimizer))
        assert attachment.reports[-1] == expected
    assert len(attachment.reports) == 3


def test_a_differentiable_step_differentiates_through_the_clip():
    start = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    param = start.clone()
    optimizer = torch.optim.SGD([param], lr=1.0, differentiable=True)
    cc.attach(optimizer, cc.ClipByGlobalNorm(1.0))
    param.grad = 2 * param
    optimizer.step()
    assert torch.allclose(param, start - start / 5)
    (derivative,) = torch.autograd.grad(param[0], start)
    # d/dx of x - x / |x|, by hand, at (3, 4)
    assert torch.allclose(derivative, torch.tensor([1 - 16 / 125, 12 / 125], dtype=torch.float64))


def test_gradients_accumulate_unclipped_until_the_step():
    network = model()
    optimizer = sgd(network)
    attachment = cc.attach(optimizer, POLICY)
    for _ in range(3):
        loss_of(network, batch()).backward()
    total = cc.clip([g.clone() for g in grads(network)], POLICY)[1].norm
    optimizer.step()
    assert [report.norm for report in attachment.reports] == [total]


def test_parameters_without_a_gradient_are_passed_over():
    network = model()
    optimizer = sgd(network)
    attachment = cc.attach(optimizer, POLICY)
    optimizer.step()
    network[0].weight.grad = torch.ones(5, 4)
    optimizer.step()
    assert [report.norm for report in attachment.reports] == [math.sqrt(20)]


def test_all_parameter_groups_are_clipped_together():
    network = model()
    groups = [{"params": network[0].parameters()}, {"params": network[2].parameters(), "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    attachment = cc.attach(optimizer, POLICY)
    fill(network, batch())
    wanted = cc.clip([g.clone() for g in grads(network)], POLICY)[1]
    optimizer.step()
    assert attachment.reports[0] == wanted


@pytest.mark.parametrize("keyword", [False, True])
def test_a_closure_is_clipped_after_each_evaluation(keyword):
    network = model(torch.float64)
    x, seen, norms = batch(torch.float64), [], []

    class Recorder(torch.optim.LBFGS):
        def _gather_flat_grad(self):
            flat = super()._gather_flat_grad()
            seen.append(float(flat.norm()))
            return flat

    optimizer = Recorder(network.parameters(), max_iter=6, line_search_fn="strong_wolfe")
    attachment = cc.attach(optimizer, POLICY)

    def closure():
        fill(network, x)
        norms.append(cc.clip([g.clone() for g in grads(network)], POLICY)[1].norm)
        return loss_of(network, x)

    before = loss_of(network, x).item()
    loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    assert loss.item() == before
    assert len(norms) > 6
    assert [report.norm for report in attachment.reports] == norms
    assert all(norm > 1 for norm in norms)
    assert all(norm == pytest.approx(0.01) for norm in seen)


def test_a_closure_of_a_first_order_optimizer_is_clipped_once():
    network = model()
    optimizer = sgd(network)
    attachment = cc.attach(optimizer, POLICY)
    x = batch()

    def closure():
        fill(network, x)
        return loss_of(network, x)

    optimizer.step(closure)
    assert len(attachment.reports) == 1
    assert math.isclose(math.sqrt(sum(float(g.square().sum()) for g in grads(network))), 0.01, rel_tol=1e-6)


class Outer(torch.optim.SGD):
    """An optimizer whose step calls its base's, so that torch calls the hooks twice."""

    fail = False

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad.mul_(3.0)  # a second clip would take this back
        if self.fail:
            raise RuntimeError("injected")
        return super().step(closure)


def test_a_step_inside_a_step_is_clipped_once():
    sgd(model())  # torch adds the hooks to a class when it is first used
    network = model()
    optimizer = Outer(network.parameters(), lr=1.0)
    attachment = cc.attach(optimizer, cc.ClipByGlobalNorm(0.01))
    before = [p.detach().clone() for p in network.parameters()]
    fill(network, batch())
    optimizer.step()
    moved = math.sqrt(sum((p - b).square().sum().item() for p, b in zip(network.parameters(), before, strict=True)))
    assert len(attachment.reports) == 1
    assert moved == pytest.approx(0.03, rel=1e-4)

    def closure():
        fill(network, batch())
        return torch.zeros(())

    optimizer.step(closure)
    assert len(attachment.reports) == 2


@pytest.mark.parametrize("policy", [POLICY, SKIP])
def test_a_step_that_raised_does_not_disable_clipping(policy):
    sgd(model())
    network = model()
    optimizer = Outer(network.parameters(), lr=1.0)
    attachment = cc.attach(optimizer, policy)
    for optimizer.fail in (True, True, False):
        fill(network, batch())
        if policy is SKIP and optimizer.fail:
            network[0].weight.grad[0, 0] = math.nan
        if optimizer.fail:
            with pytest.raises(RuntimeError, match="injected"):
                optimizer.step()
        else:
            optimizer.step()
    assert len(attachment.reports) == 3
    assert attachment.reports[-1].clipped
    assert all(g is not None for g in grads(network))


@pytest.mark.parametrize("again", [True, False])
def test_gradients_withheld_from_a_step_that_raised_come_back_when_it_is_tried_again(again):
    class Failing(torch.optim.SGD):
        fail = True

        def step(self, closure=None):
            if self.fail:
                raise RuntimeError("injected")
            return super().step(closure)

    network = model()
    optimizer = Failing(network.parameters(), lr=1.0, weight_decay=0.1)
    attachment = cc.attach(optimizer, SKIP)
    fill(network, torch.full((8, 4), math.inf))
    before = snapshot(network, optimizer)
    with pytest.raises(RuntimeError, match="injected"):
        optimizer.step()
    optimizer.fail = False
    if again:
        optimizer.step()
        assert_same(before, snapshot(network, optimizer))
        assert len(attachment.reports) == 1
        assert all(torch.equal(g, torch.zeros_like(g)) for g in grads(network))
    else:  # a new gradient, of one parameter alone: what was withheld is of the past
        network[2].bias.grad = torch.ones(2)
        optimizer.step()
        assert [g is not None for g in grads(network)] == [False, False, False, True]


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
@forms
def test_a_skipped_step_does_not_happen_at_all(make, options, fault):
    network = model()
    optimizer = make(network, **options)
    attachment = cc.attach(optimizer, SKIP)
    x = batch()

    def step(poison, closure):
        def evaluate():
            fill(network, x)
            if poison:
                network[2].weight.grad[1, 2] = fault
            return torch.zeros(())

        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()

    step(poison=False, closure=False)
    before = snapshot(network, optimizer)
    for closure in (False, True):
        step(poison=True, closure=closure)
        assert_same(before, snapshot(network, optimizer))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in grads(network))
        assert attachment.reports[-1].nonfinite == 1
    step(poison=False, closure=True)
    assert not torch.equal(network[0].weight, before[0]["0.weight"])
    assert len(attachment.reports) == 4


def test_the_very_first_step_can_be_skipped():
    network = model()
    optimizer = adamw(network)
    cc.attach(optimizer, SKIP)
    fill(network, torch.full((8, 4), math.inf))
    before = snapshot(network, optimizer)
    optimizer.step()
    assert_same(before, snapshot(network, optimizer))
    assert not optimizer.state


class Poisoned:
    """A closure that gives a NaN in the call of number `poison`."""

    def __init__(self, network):
        self.network, self.x, self.calls, self.poison = network, batch(torch.float64), 0, math.inf

    def __call__(self):
        fill(self.network, self.x)
        if self.calls == self.poison:
            self.network[0].bias.grad[0] = math.nan
        self.calls += 1
        return loss_of(self.network, self.x)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_lbfgs_is_put_back_where_an_evaluation_is_not_finite(search, at):
    network = model(torch.float64)
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=5, line_search_fn=search)
    cc.attach(optimizer, SKIP)
    closure = Poisoned(network)
    optimizer.step(closure)
    before = snapshot(network, optimizer)
    closure.poison = closure.calls + at
    optimizer.step(closure)
    assert closure.calls > closure.poison
    assert_same(before, snapshot(network, optimizer))


def test_propagate_spoils_the_step_in_full_view():
    network = model()
    optimizer = sgd(network)
    cc.attach(optimizer, POLICY)
    fill(network, batch())
    network[0].weight.grad[0, 0] = math.inf
    optimizer.step()
    assert all(torch.isnan(p).all() for p in network.parameters())


def test_raise_leaves_parameters_and_gradients_as_they_were():
    network = model()
    optimizer = sgd(network)
    cc.attach(optimizer, cc.ClipByGlobalNorm(0.01, nonfinite="raise"))
    fill(network, batch())
    network[0].weight.grad[0, 0] = math.inf
    before, kept = snapshot(network, optimizer), [g.clone() for g in grads(network)]
    with pytest.raises(cc.NonFinite, match="1 elements are inf or NaN"):
        optimizer.step()
    assert_same(before, snapshot(network, optimizer))
    assert_same(kept, grads(network))


def scaled_steps(make, options, *, explicit, dtype=torch.float32, scale=2.0**12, policy=POLICY, steps=3, poison=None):
    """Steps under a GradScaler; the network, the reports, and the gradients as the last step left them."""
    torch.manual_seed(0)
    network = model(dtype)
    optimizer = make(network, **options)
    attachment = cc.attach(optimizer, policy)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=scale, growth_interval=2)
    for index in range(steps):
        optimizer.zero_grad()
        scaler.scale(loss_of(network, batch(dtype) / 100)).backward()
        if index == poison:
            network[0].weight.grad[0, 0] = math.inf
        if explicit:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return network, optimizer, list(attachment.reports)


def unscaled_steps(make, options, policy=POLICY):
    torch.manual_seed(0)
    network = model()
    optimizer = make(network, **options)
    attachment = cc.attach(optimizer, policy)
    for _ in range(3):
        fill(network, batch() / 100)
        optimizer.step()
    return network, optimizer, list(attachment.reports)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("policy", [POLICY, cc.ClipByGlobalNorm(1e9), cc.ClipByValue(1e-3), SKIP])
@forms
def test_scaled_gradients_are_unscaled_exactly_once(make, options, policy, explicit):
    plain, plain_optimizer, wanted = unscaled_steps(make, options, policy)
    network, optimizer, reports = scaled_steps(make, options, policy=policy, explicit=explicit)
    assert [report.norm for report in reports] == [report.norm for report in wanted]
    assert_same(snapshot(plain, plain_optimizer), snapshot(network, optimizer))
    assert_same(grads(plain), grads(network))
    assert not hasattr(optimizer, "grad_scale")


@pytest.mark.parametrize("policy", [POLICY, SKIP, cc.ClipByGlobalNorm(0.01, nonfinite="raise")])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize(("make", "options"), [(sgd, {}), (sgd, {"fused": True}), (adamw, {"fused": True})])
def test_a_step_that_the_scaler_skips_is_left_to_it(make, options, explicit, policy):
    network, optimizer, reports = scaled_steps(make, options, explicit=explicit, policy=policy, poison=1)
    assert len(reports) == 2
    assert all(torch.isfinite(p).all() for p in network.parameters())
    # AdamW's count says that one of three steps did not happen
    for state in optimizer.state.values():
        assert float(state.get("step", 2.0)) == 2.0


def test_small_half_precision_gradients_survive_the_clip_of_a_fused_step():
    param = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    optimizer = torch.optim.SGD([param], lr=2.0**20, fused=True)
    attachment = cc.attach(optimizer, cc.ClipByGlobalNorm(2.0**-26))
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**16)
    scaler.scale(torch.zeros(()))
    param.grad = torch.tensor([0.0, 2.0**-9], dtype=torch.float16)  # 2**-25 unscaled: below float16's smallest number
    scaler.step(optimizer)
    assert attachment.reports[0].norm == 2.0**-25
    assert attachment.reports[0].scale == 0.5
    assert torch.equal(param, torch.tensor([0.0, -(2.0**-6)], dtype=torch.float16))


def test_a_copy_of_an_optimizer_has_no_policy_until_one_is_attached():
    network = model()
    optimizer = sgd(network)
    attachment = cc.attach(optimizer, POLICY)
    copied_network, copied = copy.deepcopy((network, optimizer))
    fill(copied_network, batch())
    kept = [g.clone() for g in grads(copied_network)]
    copied.step()
    assert_same(kept, grads(copied_network))
    assert not attachment.reports
    own = cc.attach(copied, POLICY)
    copied.step()
    assert (len(own.reports), len(attachment.reports)) == (1, 0)


def test_removing_gives_the_optimizer_back():
    network = model()
    optimizer = sgd(network)
    attachment = cc.attach(optimizer, POLICY)
    attachment.remove()
    attachment.remove()
    fill(network, batch())
    kept = [g.clone() for g in grads(network)]
    optimizer.step()
    assert_same(kept, grads(network))
    assert not attachment.reports
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    cc.attach(optimizer, POLICY)


def test_a_second_policy_is_refused():
    optimizer = sgd(model())
    cc.attach(optimizer, POLICY)
    with pytest.raises(cc.InvalidInput, match=r"this SGD has a policy already; remove that first"):
        cc.attach(optimizer, POLICY)


def test_an_attachment_does_not_keep_its_optimizer_alive():
    import gc
    import weakref

    optimizer = sgd(model())
    attachment = cc.attach(optimizer, POLICY)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    attachment.remove()


def test_a_scheduler_and_a_state_dict_work_beside_a_policy():
    network = model()
    optimizer = sgd(network)
    attachment = cc.attach(optimizer, POLICY)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    fill(network, batch())
    optimizer.step()
    scheduler.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert len(attachment.reports) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # dynamo's own
@pytest.mark.parametrize(
    ("dtype", "gradient"),
    [(torch.float64, 1e60), (torch.bfloat16, 3.0), (torch.float32, 3.0), (torch.complex64, 3 + 4j)],
)
def test_gradients_beside_float16_are_scaled_and_clipped_in_a_dtype_that_holds_them(dtype, gradient):
    class Unscaling(torch.optim.SGD):  # as fused optimizers do, which have no kernels for complex parameters
        def step(self):
            pass

    narrow = nn.Parameter(torch.zeros(1, dtype=torch.float16))
    other = nn.Parameter(torch.zeros(1, dtype=dtype))
    optimizer = Unscaling([narrow, other], lr=1.0)
    attachment = cc.attach(optimizer, cc.ClipByGlobalNorm(1.0))
    narrow.grad, other.grad = torch.ones_like(narrow), torch.full_like(other, gradient * 1024)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    optimizer.step()
    assert attachment.reports[-1].norm == pytest.approx(abs(gradient), rel=1e-6)
    clipped = other.grad.to(torch.complex128).item() / 1024
    assert clipped == pytest.approx(gradient / abs(gradient), rel=1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
def test_a_step_inside_a_compiled_function_is_clipped():
    network = model()
    twin = copy.deepcopy(network)
    optimizer, manual = adamw(network), adamw(twin)
    attachment = cc.attach(optimizer, POLICY)
    x = batch()
    train = torch.compile(lambda: (fill(network, x), optimizer.step()), backend="eager")
    for _ in range(2):
        train()
        fill(twin, x)
        cc.clip_grads_(twin, POLICY)
        manual.step()
    torch.testing.assert_close(snapshot(network, optimizer), snapshot(twin, manual))
    assert all(float(g.norm()) <= 0.0101 for g in grads(network))
    assert len(attachment.reports) == 2


def test_sparse_gradients_are_clipped_before_the_step():
    table = nn.Embedding(6, 2, sparse=True)
    with torch.no_grad():
        table.weight.fill_(1.0)
    optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
    attachment = cc.attach(optimizer, cc.ClipByGlobalNorm(1.0))
    table(torch.tensor([1, 1, 4])).sum().backward()
    optimizer.step()
    assert attachment.reports[0].norm == pytest.approx(math.sqrt(10))
    moved = 1.0 - table.weight.detach()
    assert float(moved.norm()) == pytest.approx(1.0)
    assert torch.count_nonzero(moved) == 4


def test_compile_attaches_and_gives_back_what_it_was_given():
    network, loss_fn = model(), nn.MSELoss()
    optimizer = sgd(network)
    assert cc.compile(network, loss_fn, optimizer) == (network, loss_fn, optimizer)
    assert cc.compile(network, loss_fn, optimizer, clip=POLICY) == (network, loss_fn, optimizer)
    with pytest.raises(cc.InvalidInput, match="has a policy already"):
        cc.attach(optimizer, POLICY)


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(cc.InvalidInput, match=r"optimizer is 'adam'; torch needs an optimizer that holds"):
        cc.compile(model(), nn.MSELoss(), "adam", clip=POLICY)
    with pytest.raises(cc.InvalidInput, match=r"of type Linear; expected a torch\.optim\.Optimizer"):
        cc.attach(nn.Linear(1, 1), POLICY)


LEARNING = [
    cc.AutoClip(30.0, window=4),
    cc.ZClip(0.1, warmup=2),
    cc.AdaGC(1.0, warmup=2),
    cc.SpikeClip(0.5, decay=0.5, warmup=1),
    cc.AdaptiveClip(0.01),
    cc.PerGroup({"bias$": cc.ClipByValue(0.01)}, default=cc.AutoClip(50.0)),
    cc.Chain([cc.ClipByValue(5.0), cc.AdaGC(1.0, warmup=1)]),
]


def assert_same_learning(state, wanted):
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(state[name], value, name)


@pytest.mark.parametrize("policy", LEARNING, ids=repr)
def test_every_policy_acts_as_a_clipper_would_with_gradients_missing_now_and_then(policy):
    network = model()
    twin = copy.deepcopy(network)
    optimizer, manual = adamw(network), adamw(twin)
    attachment = cc.attach(optimizer, policy, network)
    clipper = cc.Clipper(policy, twin)
    for index in range(5):
        x = batch()
        fill(network, x)
        fill(twin, x)
        if index in (0, 3):
            network[0].bias.grad = twin[0].bias.grad = None
        with torch.no_grad():  # else the weights beside the gradients are part of a graph
            report = clipper.clip_(grads(twin), list(twin.parameters()))
        optimizer.step()
        manual.step()
        assert attachment.reports[-1] == report
        assert_same(snapshot(twin, manual), snapshot(network, optimizer))
    assert_same_learning(attachment.state_dict(), clipper.state_dict())


@pytest.mark.parametrize("policy", LEARNING, ids=repr)
def test_training_goes_on_from_a_saved_state_bit_for_bit(policy):
    network = model()
    optimizer = sgd(network)
    attachment = cc.attach(optimizer, policy, network)
    batches = [batch() for _ in range(6)]
    for x in batches[:3]:
        fill(network, x)
        optimizer.step()
    twin = copy.deepcopy(network)
    other = sgd(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed = cc.attach(other, policy, twin)
    resumed.load_state_dict(attachment.state_dict())
    for x in batches[3:]:
        for net, opt in ((network, optimizer), (twin, other)):
            fill(net, x)
            opt.step()
        assert resumed.reports[-1] == attachment.reports[-1]
    assert_same_learning(resumed.state_dict(), attachment.state_dict())


def test_a_state_saved_before_the_first_step_is_one_to_start_from():
    network = model()
    optimizer = sgd(network)
    attachment = cc.attach(optimizer, cc.AutoClip())
    attachment.load_state_dict(attachment.state_dict())
    fill(network, batch())
    optimizer.step()
    assert len(attachment.reports) == 1
    with pytest.raises(cc.InvalidInput, match="another"):
        attachment.load_state_dict({"ZClip.mean": np.zeros(())})


@pytest.mark.parametrize("policy", [*LEARNING[:4], LEARNING[-1]], ids=repr)
def test_a_step_that_is_skipped_teaches_nothing(policy):
    import dataclasses

    def skipping(policy):
        if isinstance(policy, cc.Chain):
            return cc.Chain([skipping(member) for member in policy.policies])
        return dataclasses.replace(policy, nonfinite="skip")

    network = model()
    optimizer = sgd(network)
    attachment = cc.attach(optimizer, skipping(policy))
    for poison in (False, True, False):
        before = attachment.state_dict()
        fill(network, batch())
        if poison:
            network[0].weight.grad[0, 0] = math.nan
        optimizer.step()
        if poison:
            assert_same_learning(attachment.state_dict(), before)
    assert int(attachment.state_dict()[next(k for k in before if k.endswith("count"))]) == 2


@pytest.mark.parametrize(("make", "options"), [(sgd, {}), (sgd, {"fused": True})])
@pytest.mark.parametrize("mode", ["propagate", "skip", "zero"])
def test_a_step_that_the_scaler_skips_teaches_nothing(make, options, mode):
    policy = cc.AutoClip(50.0, nonfinite=mode)
    torch.manual_seed(0)
    network = model()
    optimizer = make(network, **options)
    attachment = cc.attach(optimizer, policy)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**12)
    for poison in (False, True, False):
        optimizer.zero_grad()
        scaler.scale(loss_of(network, batch() / 100)).backward()
        if poison:
            network[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    assert int(attachment.state_dict()["AutoClip.count"]) == len(attachment.reports) == 2


@pytest.mark.parametrize("policy", LEARNING, ids=repr)
def test_every_policy_sees_unscaled_gradients_in_a_fused_step(policy):
    results = []
    for scale in (None, 2.0**12):
        torch.manual_seed(0)
        network = model()
        optimizer = sgd(network, fused=True)
        attachment = cc.attach(optimizer, policy, network)
        scaler = torch.amp.GradScaler(device="cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(network, batch() / 100)).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append((snapshot(network, optimizer), list(attachment.reports)))
    assert_same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_lbfgs_puts_back_what_the_policy_learned_in_a_step_that_is_skipped():
    network = model(torch.float64)
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=5)
    attachment = cc.attach(optimizer, cc.AutoClip(50.0, nonfinite="skip"))
    closure = Poisoned(network)
    optimizer.step(closure)
    before = attachment.state_dict()
    assert int(before["AutoClip.count"]) == closure.calls
    closure.poison = closure.calls + 2
    optimizer.step(closure)
    assert_same_learning(attachment.state_dict(), before)


def test_groups_of_parameters_have_policies_of_their_own_by_name():
    network = model()
    groups = [{"params": network[0].parameters(), "lr": 0.1}, {"params": network[2].parameters(), "lr": 0.5}]
    optimizer = torch.optim.SGD(groups)
    policy = cc.PerGroup({r"^0\.": cc.ClipByGlobalNorm(0.01), r"^2\.weight": cc.ClipByValue(1e-4)})
    attachment = cc.attach(optimizer, policy, network)
    fill(network, batch())
    bias = network[2].bias.grad.clone()
    optimizer.step()
    first = math.sqrt(sum(float(p.grad.square().sum()) for p in network[0].parameters()))
    assert first == pytest.approx(0.01, rel=1e-6)
    assert float(network[2].weight.grad.abs().max()) == np.float32(1e-4)
    assert torch.equal(network[2].bias.grad, bias)
    assert len(attachment.reports[0].norms) == 3


def test_an_optimizer_of_a_part_of_the_model_knows_its_names():
    network = model()
    optimizer = sgd(network[2])
    attachment = cc.attach(optimizer, cc.PerGroup({r"^2\.bias$": cc.ClipByNorm(0.01)}), network)
    fill(network, batch())
    optimizer.step()
    assert float(network[2].bias.grad.norm()) == pytest.approx(0.01, rel=1e-6)
    assert len(attachment.reports) == 1


def test_what_a_policy_misses_is_said_when_it_is_attached():
    network = model()
    with pytest.raises(cc.InvalidInput, match="pass model="):
        cc.attach(sgd(network), cc.PerGroup({"bias": cc.ClipByValue(1.0)}))
    with pytest.raises(cc.InvalidInput, match="pass model="):
        cc.attach(sgd(network), cc.AdaptiveClip())
    with pytest.raises(cc.InvalidInput, match="found in none of the names"):
        cc.attach(sgd(network), cc.PerGroup({"no such": cc.ClipByValue(1.0)}), network)
    with pytest.raises(cc.InvalidInput, match="is no parameter of the model"):
        cc.attach(sgd(network), cc.AdaptiveClip(), model())
    optimizer = sgd(network)
    with pytest.raises(cc.InvalidInput, match=r"PerExampleClip cannot be attached to an optimizer: it bounds the grad"):
        cc.attach(optimizer, cc.PerExampleClip(1.0))
    cc.attach(optimizer, cc.AdaptiveClip(unit_axis=0, nonfinite="raise"))  # what was refused left nothing behind


def test_sparse_gradients_become_dense_for_a_policy_that_compares_elements():
    table = nn.Embedding(6, 2, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
    attachment = cc.attach(optimizer, cc.AdaptiveClip(1e-6), table)
    before = table.weight.detach().clone()
    table(torch.tensor([1, 1, 4])).sum().backward()
    optimizer.step()
    assert attachment.reports[0].clipped
    moved = (table.weight.detach() - before).norm(dim=1)
    assert float(moved.max()) <= 1e-5
    assert torch.count_nonzero(table.weight.grad) == 4


def test_reports_are_handed_on_step_by_step():
    network, seen = model(), []
    optimizer = sgd(network)
    _, _, same = cc.compile(network, nn.MSELoss(), optimizer, clip=POLICY, on_report=seen.append)
    assert same is optimizer
    for _ in range(2):
        fill(network, batch())
        optimizer.step()
    assert [report.clipped for report in seen] == [True, True]


class Writer:
    """What SummaryWriter is to cc.to_tensorboard."""

    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))


def test_tensorboard_gets_norm_limit_scale_and_the_share_of_clipped_steps():
    writer = Writer()
    param = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([param], lr=1.0)
    cc.attach(optimizer, cc.ClipByGlobalNorm(1.0), on_report=cc.to_tensorboard(writer, prefix="p"))
    for grad in ([3.0, 4.0], [0.5, 0.0]):
        param.grad = torch.tensor(grad)
        optimizer.step()
    names = ("p/norm", "p/limit", "p/scale", "p/share_clipped")
    first = list(zip(names, (5.0, 1.0, 0.2, 1.0), (1,) * 4, strict=True))
    second = list(zip(names, (0.5, 1.0, 1.0, 0.5), (2,) * 4, strict=True))
    assert writer.scalars == first + second
    with pytest.raises(cc.InvalidInput, match="add_scalar"):
        cc.to_tensorboard("runs")


def test_accumulated_gradients_are_clipped_as_those_of_the_whole_batch():
    network = model(torch.float64)
    twin = copy.deepcopy(network)
    results = []
    for net, parts in ((network, 4), (twin, 1)):
        torch.manual_seed(1)
        optimizer = adamw(net)
        attachment = cc.attach(optimizer, cc.AutoClip(50.0))
        for _ in range(3):
            x = batch(torch.float64)
            net.zero_grad()
            for part in x.chunk(parts):
                (loss_of(net, part) / parts).backward()
            optimizer.step()
        results.append([report.norm for report in attachment.reports])
    assert results[0] == pytest.approx(results[1], rel=1e-12)
    torch.testing.assert_close(network.state_dict(), twin.state_dict())


@pytest.mark.parametrize(
    "policy", [cc.ClipByGlobalNorm(0.5), cc.PerGroup({"weight$": cc.AutoClip(50.0)}, default=cc.AdaptiveClip(0.01))]
)
def test_two_processes_clip_alike_and_as_one_on_the_joint_batch(policy, tmp_path):
    config = json.dumps(policy.to_config())
    command = [sys.executable, str(pathlib.Path(__file__).with_name("data_parallel.py")), str(tmp_path), config]
    ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    first, second = (dict(np.load(tmp_path / f"{rank}.npz")) for rank in range(2))
    assert_same_learning(first, second)
    alone = data_parallel.train(policy, rank=0, size=1)
    assert alone.keys() == first.keys()
    for name, value in alone.items():
        np.testing.assert_allclose(value, first[name], rtol=1e-9, err_msg=name)
