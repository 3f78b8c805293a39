"""Gradients per example: what a loop over the examples gives, and what cannot be computed said clearly."""

import numpy as np
import pytest
import torch
from torch import nn

import clipcore as cc


def network():
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 2))


def data(count=5):
    return torch.randn(count, 1, 4, 4), torch.randint(2, (count,))


def one_by_one(model, loss_fn, inputs, targets):
    grads = []
    for x, target in zip(inputs, targets, strict=True):
        model.zero_grad()
        loss_fn(model(x[None]), target[None]).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    return {name: torch.stack([grad[name] for grad in grads]) for name in grads[0]}


def test_gradients_per_example_are_those_of_a_loop_over_the_examples():
    model, loss_fn, batch = network(), nn.CrossEntropyLoss(), data()
    grads = cc.per_example_grads(model, loss_fn, batch)
    wanted = one_by_one(model, loss_fn, *batch)
    assert list(grads) == [name for name, _ in model.named_parameters()]
    torch.testing.assert_close(grads, wanted)


def test_their_clipped_sum_keeps_the_bound_for_each_example():
    grads = cc.per_example_grads(network(), nn.CrossEntropyLoss(), data())
    clipped, report = cc.clip(grads, cc.PerExampleClip(0.1))
    norms = torch.cat([grad.flatten(1) for grad in grads.values()], 1).double().norm(dim=1)
    wanted = sum((grad.flatten(1).double() * (0.1 / norms)[:, None]).sum(0).square().sum() for grad in grads.values())
    assert float(report.norm) > 0.1
    found = sum(tensor.double().square().sum() for tensor in clipped.values())
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    assert {name: t.shape for name, t in clipped.items()} == {n: p.shape for n, p in network().named_parameters()}


def test_frozen_parameters_have_none_and_nothing_of_the_model_changes():
    model = network()
    model[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = cc.per_example_grads(model, nn.CrossEntropyLoss(), data())
    assert "0.weight" not in grads
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


class TwoInputs(nn.Module):
    """Takes two tensors by name."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, a, b):
        return self.linear(a) * b


def test_inputs_may_be_arrays_tuples_and_dicts():
    model, a, b = TwoInputs(), torch.randn(4, 3), torch.randn(4, 2)
    targets = torch.zeros(4, 2)
    wanted = cc.per_example_grads(model, nn.MSELoss(), ((a, b), targets))
    named = cc.per_example_grads(model, nn.MSELoss(), ({"b": b, "a": a}, targets))
    arrays = cc.per_example_grads(model, nn.MSELoss(), ((a.numpy(), b.numpy()), targets.numpy()))
    torch.testing.assert_close(named, wanted, rtol=0, atol=0)
    torch.testing.assert_close(arrays, wanted, rtol=0, atol=0)


def test_dropout_draws_anew_for_each_example():
    model = nn.Sequential(nn.Linear(3, 40, bias=False), nn.Dropout(0.5))
    grads = cc.per_example_grads(model, lambda y, target: y.sum(), (torch.ones(2, 3), torch.zeros(2)))
    assert not torch.equal(*grads["0.weight"])


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False).eval()])
def test_batch_norm_over_the_batch_is_refused_by_name(norm):
    model = nn.Sequential(nn.Conv2d(1, 3, 2), norm, nn.Flatten(), nn.Linear(27, 2))
    model[1].train(norm.training)
    with pytest.raises(cc.InvalidInput, match=r"layer '1' \(BatchNorm2d\) normalises over the examples"):
        cc.per_example_grads(model, nn.CrossEntropyLoss(), data())


def test_batch_norm_in_eval_mode_is_a_layer_like_others():
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 2)).eval()
    batch = data()
    grads = cc.per_example_grads(model, nn.CrossEntropyLoss(), batch)
    torch.testing.assert_close(grads, one_by_one(model, nn.CrossEntropyLoss(), *batch))


class Branching(nn.Linear):
    """A branch on values, which vmap cannot follow."""

    def forward(self, x):
        return super().forward(x if x.sum().item() > 0 else -x)


def test_what_vmap_refuses_is_said_with_the_model_and_the_reason():
    with pytest.raises(cc.InvalidInput, match=r"Branching cannot be mapped over examples by torch\.func\.vmap: .*item"):
        cc.per_example_grads(Branching(3, 2), nn.MSELoss(), (torch.ones(4, 3), torch.ones(4, 2)))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.ones(4, 3), torch.ones(3, 2)), r"shapes \(4, 3\), \(3, 2\); expected as many examples in each"),
        ((torch.ones(0, 3), torch.ones(0, 2)), "has no examples"),
        ((torch.ones(4, 3), 7), "expected tensors with the examples along their first axes"),
        (torch.ones(4, 3), r"expected \(inputs, targets\)"),
    ],
)
def test_what_is_no_batch_is_refused(batch, message):
    with pytest.raises(cc.InvalidInput, match=message):
        cc.per_example_grads(nn.Linear(3, 2), nn.MSELoss(), batch)


def test_a_loss_that_is_not_one_number_is_refused():
    with pytest.raises(cc.InvalidInput, match=r"loss_fn gave \(1, 2\) for one example; expected one number"):
        cc.per_example_grads(
            nn.Linear(3, 2), nn.MSELoss(reduction="none"), (torch.ones(4, 3), np.ones((4, 2), np.float32))
        )
