"""What the tests of migration share: random weights, models in two frameworks, and proof that a plan is right."""

from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
import torch
from torch import nn

import clipcore as cc


def randomised(model, seed=0):
    """The model with every parameter and statistic random; variances positive."""
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        return rng.uniform(0.5, 1.5, shape) if "var" in name else rng.normal(0, 0.4, shape)

    if isinstance(model, torch.nn.Module):
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if tensor.is_floating_point():
                    tensor.copy_(torch.from_numpy(np.asarray(draw(name, tuple(tensor.shape)))))
        return model
    for variable in model.variables:
        if "float" in str(variable.dtype):
            name = variable.path if isinstance(model, keras.Model) else variable.name
            variable.assign(draw(name.split("/")[-1], variable.shape))
    return model


def contents(model):
    """Every tensor of a model, copied."""
    if isinstance(model, torch.nn.Module):
        return [tensor.clone().numpy() for tensor in model.state_dict().values()]
    return [variable.numpy().copy() for variable in model.variables]


def assert_bitwise_equal(before, after):
    assert len(before) == len(after)
    for first, second in zip(before, after, strict=True):
        assert first.tobytes() == second.tobytes()


def assert_proven_throughout(source, target, sample, **options):
    """Every row of the plan is proven, and after the migration both compute the same; the plan."""
    plan = cc.plan(source, target, sample=sample, **options)
    assert {row.evidence for row in plan.rows} == {"proven"}, str(plan)
    cc.migrate(source, target, plan=plan)
    check = cc.verify(source, target, sample=sample, plan=plan)
    assert check.ok, check
    return plan


@dataclass(frozen=True)
class Pair:
    """One model, written by hand for both frameworks, and data for it.

    Attributes:
        what: for a reader of a failure.
        torch, keras: build it.
        data: from random numbers and how much smaller than the largest size, the inputs as torch takes them.
        sizes: how many sizes it takes.
        images: whether the channel axis is the second in torch and the last in Keras.
        evidence: how the plans know.
        settle: calls in training mode that a source in torch needs before it is trained (spectral norm).
        both: whether any weights of Keras's fit into torch's; else those alone that came from there.
    """

    what: str
    torch: Callable[[], nn.Module]
    keras: Callable[[], keras.Model]
    data: Callable[[np.random.Generator, int], tuple[np.ndarray, ...]]
    sizes: int = 2
    images: bool = False
    evidence: frozenset[str] = frozenset({"proven"})
    settle: int = 0
    both: bool = True

    def __repr__(self):
        return f"Pair({self.what})"

    def inputs(self, seed, smaller=0):
        """Random data: floats are of float32."""
        drawn = self.data(np.random.default_rng(seed), smaller)
        return tuple(x.astype(np.float32) if x.dtype.kind == "f" else x for x in drawn)

    def for_keras(self, inputs):
        return tuple(np.moveaxis(x, 1, -1).copy() if self.images and x.ndim > 2 else x for x in inputs)

    def trained_torch(self, seed):
        """A model in torch with random weights, in inference mode."""
        model = randomised(self.torch(), seed)
        model.train()
        with torch.no_grad():
            for _ in range(self.settle):
                model(*map(torch.from_numpy, self.inputs(seed)))
        return model.eval()

    def trained_keras(self, seed):
        """A model in Keras with random weights."""
        return randomised(self.keras(), seed)

    def torch_output(self, model, inputs):
        with torch.no_grad():
            return model(*map(torch.from_numpy, inputs)).numpy()

    def keras_output(self, model, inputs):
        """What the Keras model gives, with the axes in torch's order."""
        given = self.for_keras(inputs)
        output = np.asarray(model(given[0] if len(given) == 1 else list(given), training=False))
        return np.moveaxis(output, -1, 1) if self.images and output.ndim > 2 else output

    def floor(self, model, inputs):
        """The error of the model in torch in float32 against float64."""
        wide = self.torch()
        wide.load_state_dict(model.state_dict())
        exact = self.torch_output(
            wide.double().eval(), [x.astype(np.float64) if x.dtype.kind == "f" else x for x in inputs]
        )
        return relative_error(exact, self.torch_output(model, inputs))

    def assert_same_function(self, in_torch, in_keras):
        """On fresh data of each size both give the same, up to 1e-5 or ten times torch's own rounding."""
        for smaller in range(self.sizes):
            inputs = self.inputs(99, smaller)
            allowed = max(1e-5, 10 * self.floor(in_torch, inputs))
            error = relative_error(self.torch_output(in_torch, inputs), self.keras_output(in_keras, inputs))
            assert error <= allowed, (self, inputs[0].shape, error, allowed)

    def error(self, in_torch, in_keras):
        """The relative error of their outputs on fresh data."""
        inputs = self.inputs(99)
        return relative_error(self.torch_output(in_torch, inputs), self.keras_output(in_keras, inputs))


def relative_error(ours, theirs):
    """max|ours - theirs| / max|ours|; the shapes must be the same."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours.astype(np.float64) - theirs).max() / np.abs(ours).max())


def sample_of(inputs):
    """Inputs as clipcore takes them."""
    return inputs[0] if len(inputs) == 1 else inputs
