"""`clipcore demo`: B is trained in PyTorch, its weights migrate into A in Keras, A goes on training on a new task.

The networks stand with their backends, in `clipcore_torch.demo` and `clipcore_tensorflow.demo`; nothing here imports a
framework.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

import clipcore as cc
from clipcore.cli.output import hushed, table
from clipcore.cli.views import number

Array = np.ndarray[Any, np.dtype[Any]]
Step = Callable[[str], AbstractContextManager[Any]]

POLICY = cc.ClipByGlobalNorm(1.0)
LIMIT = cc.ClipByNorm(4.0)  # no tensor that B brings may be larger than this
TRAINING = {"learning_rate": 0.05, "momentum": 0.9}
EPOCHS = 12
BATCH = 32
TRAINING_IMAGES = 1200  # of 1797; the rest is never trained on

NEW_EPOCHS = 10
NEW_BATCH = 10
LABELLED_PER_DIGIT = 5
SEEDS = 3
TOLERANCE = 1e-5
# how A starts on the new task, and what the table calls it
ARMS = {"scratch": "A from scratch", "unlimited": "A with B's", "limited": "A, B's limited"}


@dataclass(frozen=True)
class Digits:
    """scikit-learn's handwritten digits: images (n, 8, 8) in [0, 1] and labels, split once."""

    images: Array
    labels: Array
    test_images: Array
    test_labels: Array


@dataclass
class Arm:
    """One way for A to start on the new task; each list has one entry per seed.

    Attributes:
        new_before, new: accuracy on the new task's test images before and after training on it.
        old_before, old: accuracy on the old task's, before and after the same training.
    """

    new_before: list[float] = field(default_factory=list)
    new: list[float] = field(default_factory=list)
    old_before: list[float] = field(default_factory=list)
    old: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    """All figures of a run."""

    accuracy_b: float
    norms: list[float]
    clipped_tensors: dict[str, float]
    tensors: int
    rel_error: float
    rel_error_limited: float
    ok: bool
    layers: dict[str, list[Any]]
    arms: dict[str, Arm]
    pictures: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values."""
        return asdict(self) | {"policy": repr(POLICY), "limit": repr(LIMIT), "clipped_steps": self.clipped_steps}

    @property
    def clipped_steps(self) -> int:
        """Steps of B's training whose gradients the policy shrank."""
        return sum(norm > POLICY.max_norm for norm in self.norms)


def run(output: Path, step: Step) -> Outcome:
    """Do the whole job; write the two pictures into `output`.

    Raises:
        InvalidInput: `output` is a file, or scikit-learn or matplotlib is missing. BackendError: a backend is.
    """
    if output.exists() and not output.is_dir():
        raise cc.InvalidInput(f"output {str(output)!r} is a file; name a folder for the pictures")
    with step("importing PyTorch, TensorFlow and Keras"):
        torch_half, keras_half = _halves()
        digits = _digits()
    with step("training B in PyTorch"):
        b = torch_half.build(seed=0)
        order = _batches(digits.images, digits.labels, EPOCHS, BATCH, seed=0)
        norms = torch_half.train(b, order, POLICY, **TRAINING)
    with step("migrating B's weights into A in Keras, and verifying"):
        sample = torch_half.as_input(digits.test_images[:64])
        a = keras_half.build(seed=0)
        whole = cc.migrate(b, a, sample=sample)
        check = cc.verify(b, a, sample=sample, plan=whole.plan)
        limited = cc.migrate(b, a, plan=whole.plan, limit=LIMIT)
        check_limited = cc.verify(b, a, sample=sample, plan=limited.plan)
    arms = _go_on_training(keras_half, b, whole.plan, digits, step)
    outcome = Outcome(
        accuracy_b=torch_half.accuracy(b, digits.test_images, digits.test_labels),
        norms=norms,
        clipped_tensors={t.target: t.norm for t in limited.tensors if t.clipped},
        tensors=len(limited.tensors),
        rel_error=check.max_rel_error,
        rel_error_limited=check_limited.max_rel_error,
        ok=check.ok and check_limited.ok and max(check.max_rel_error, check_limited.max_rel_error) <= TOLERANCE,
        layers={"unlimited": list(check.layers), "limited": list(check_limited.layers)},
        arms=arms,
        pictures=[],
    )
    with step("drawing"):
        from clipcore.cli import pictures

        outcome.pictures = [
            pictures.gradient_norms(norms, POLICY.max_norm, output),
            pictures.agreement(outcome.layers, TOLERANCE, output),
        ]
    return outcome


def _halves() -> tuple[Any, Any]:
    """The two networks' modules, where everything that the demo needs is installed."""
    packages = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
    missing = [name for module, name in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise cc.InvalidInput(f"the demo needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    with hushed():
        for name in ("torch", "tensorflow"):
            cc.get_backend(name)
        return importlib.import_module("clipcore_torch.demo"), importlib.import_module("clipcore_tensorflow.demo")


def _digits() -> Digits:
    bundled = importlib.import_module("sklearn.datasets").load_digits()
    order = np.random.default_rng(0).permutation(len(bundled.images))
    images, labels = (bundled.images[order] / 16).astype(np.float32), bundled.target[order]
    return Digits(
        images[:TRAINING_IMAGES], labels[:TRAINING_IMAGES], images[TRAINING_IMAGES:], labels[TRAINING_IMAGES:]
    )


def _batches(images: Array, labels: Array, epochs: int, size: int, seed: int) -> Iterator[tuple[Array, Array]]:
    """Whole batches, in an order that the seed alone decides."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(images))
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            yield images[chosen], labels[chosen]


def _turned(images: Array) -> Array:
    """The new task's images: the digits lie on their side."""
    return np.ascontiguousarray(np.rot90(images, axes=(1, 2)))


def _go_on_training(half: Any, b: Any, plan: cc.Plan, digits: Digits, step: Step) -> dict[str, Arm]:
    """A on the new task from each start, with the same few labelled images in the same order for all of them."""
    arms = {name: Arm() for name in ARMS}
    for seed in range(SEEDS):
        few = _few(digits, seed)
        for name, arm in arms.items():
            with step(f"training {ARMS[name]} on the new task, {seed + 1} of {SEEDS}"):
                a = half.build(seed=seed)
                if name != "scratch":
                    cc.migrate(b, a, plan=plan, limit=LIMIT if name == "limited" else None)
                _measure(half, a, digits, arm.new_before, arm.old_before)
                half.train(a, _batches(*few, NEW_EPOCHS, NEW_BATCH, seed), POLICY, **TRAINING)
                _measure(half, a, digits, arm.new, arm.old)
    return arms


def _few(digits: Digits, seed: int) -> tuple[Array, Array]:
    """A few labelled images of each digit, turned."""
    rng = np.random.default_rng(seed)
    places = [np.flatnonzero(digits.labels == digit) for digit in range(10)]
    chosen = np.concatenate([rng.choice(of_one, LABELLED_PER_DIGIT, replace=False) for of_one in places])
    return _turned(digits.images[chosen]), digits.labels[chosen]


def _measure(half: Any, a: Any, digits: Digits, new: list[float], old: list[float]) -> None:
    new.append(half.accuracy(a, _turned(digits.test_images), digits.test_labels))
    old.append(half.accuracy(a, digits.test_images, digits.test_labels))


def tables(outcome: Outcome) -> Iterator[Table | Text]:
    """The one table, and what a reader should know of it."""
    measured = ("relative error", "upright", "turned", "turned, after", "upright, after")
    shown = table("Handwritten digits: B in PyTorch, A in Keras; accuracy in %", "network", *measured, right=measured)
    shown.add_row("B", "", f"{100 * outcome.accuracy_b:.1f}", "", "", "")
    errors = {"unlimited": number(outcome.rel_error), "limited": number(outcome.rel_error_limited)}
    for name, arm in outcome.arms.items():
        figures = (arm.old_before, arm.new_before, arm.new, arm.old)
        shown.add_row(ARMS[name], errors.get(name, ""), *(_mean(values) for values in figures))
    yield shown
    yield Text(_footnote(outcome))


def _mean(values: list[float]) -> str:
    return f"{100 * np.mean(values):.1f} ±{100 * np.std(values, ddof=1):.1f}"


def _footnote(outcome: Outcome) -> str:
    verdict = "A computes what B computes" if outcome.ok else "A does NOT compute what B computes"
    clipped = ", ".join(f"{name} ({norm:.2g})" for name, norm in outcome.clipped_tensors.items())
    return (
        f"{verdict}: largest relative error {number(max(outcome.rel_error, outcome.rel_error_limited))}, "
        f"at most {TOLERANCE:g} asked. With a limit, A is compared with B's limited weights.\n"
        f"{POLICY.__class__.__name__}({POLICY.max_norm:g}) shrank the gradients of {outcome.clipped_steps} of B's "
        f"{len(outcome.norms)} steps.\n"
        f"{LIMIT.__class__.__name__}({LIMIT.max_norm:g}) shrank {len(outcome.clipped_tensors)} of {outcome.tensors} "
        f"tensors (norm before): {clipped or 'none'}.\n"
        f"A's new task is digits turned by 90 degrees, with {10 * LABELLED_PER_DIGIT} labelled images: held-out images "
        f"upright and turned, before and after training on it, mean ± standard deviation over {SEEDS} seeds.\n"
        f"Pictures: {', '.join(outcome.pictures)}"
    )
