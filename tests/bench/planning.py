"""Finding a plan beside what it must do at least, in one run: medians, passes of both models, and peak memory.

    python tests/bench/planning.py [--repeat 3] [--output table.md]

BERT-base on 128 places and ResNet50 on 224 pixels (Hugging Face's classes, PyTorch to TensorFlow, random weights), and
chains of up to 1,000 linear layers of one width, of which nothing but what flows tells one from another. The measure is
three times the forward passes of both models, and one copy of the weights. A pass is one run of a model by clipcore.
Memory is the peak of the process while a plan is found, beyond what it held before: the target's tensors are kept to be
put back, the source's to be carried, and what flows in the source to be compared.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import keras
import numpy as np
import tensorflow as tf
import torch
import transformers
from migration import medians, peak, table
from torch import nn

import clipcore as cc
from clipcore.mapping.models import Side

Pair = tuple[Any, Any, np.ndarray]
CHAINS = (10, 100, 1000)
_ROUNDS = 3  # of forward passes of both models that a plan may take


def bert() -> Pair:
    """BERT-base."""
    config = transformers.BertConfig()
    source, target = transformers.BertModel(config).eval(), transformers.TFBertModel(config)
    return _built(source, target, np.random.default_rng(0).integers(3, 30000, (1, 128)))


def resnet() -> Pair:
    """ResNet50, its statistics random as well."""
    config = transformers.ResNetConfig()
    source, target = transformers.ResNetModel(config).eval(), transformers.TFResNetModel(config)
    return _built(source, target, np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32))


def _built(source: nn.Module, target: Any, sample: np.ndarray) -> Pair:
    target(tf.constant(sample))
    return source, target, sample


def chain(layers: int) -> Pair:
    """Linear layers of one width, one after the other."""
    width = 16
    source = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    for layer in source:
        nn.init.orthogonal_(layer.weight)  # so that what flows stays as large as it was
    inputs = x = keras.Input((width,))
    for number in range(layers):
        x = keras.layers.Dense(width, name=f"d{(number * 7919) % 10007}")(x)
    return source, keras.Model(inputs, x), np.random.default_rng(0).standard_normal((4, width)).astype(np.float32)


def passes(call: Callable[[], object]) -> dict[str, int]:
    """How often each side ran during a call."""
    counts = {"source": 0, "target": 0}
    run = Side.run

    def counted(side: Side, *args: Any) -> Any:
        counts[side.which] += 1
        return run(side, *args)

    Side.run = counted  # type: ignore[method-assign]
    try:
        call()
    finally:
        Side.run = run  # type: ignore[method-assign]
    return counts


def measured(name: str, pair: Pair, repeat: int) -> list[str]:
    """One row: times in ms, the measure, passes and memory."""
    source, target, sample = pair
    tensor, ready = torch.from_numpy(sample), tf.constant(sample)
    weights = [value.numpy() for value in source.state_dict().values()]

    def forward() -> None:
        with torch.no_grad():
            source(tensor)

    def plan() -> None:
        cc.plan(source, target, sample=sample)

    counts: dict[str, int] = {}
    memory = peak(lambda: counts.update(passes(plan)))  # the first, since what is freed may stay the process's
    calls = {
        "source": forward,
        "target": lambda: target(ready, training=False),
        "copy": lambda: [value.copy() for value in weights],
        "plan": plan,
    }
    times = medians(calls, repeat)
    aim = _ROUNDS * (times["source"] + times["target"]) + times["copy"]
    megabytes = sum(value.nbytes for value in weights) * 1e-6
    return [
        name,
        *(f"{times[call]:.0f}" for call in calls),
        f"{times['plan'] / aim:.2f}; aim ≤ 1: {'reached' if times['plan'] <= aim else 'missed'}",
        f"{counts['source']} + {counts['target']}",
        f"{memory:.0f} of {megabytes:.0f}",
    ]


def grown(layers: int) -> list[str]:
    """One row of the curve."""
    source, target, sample = chain(layers)
    times: list[float] = []

    def plan() -> None:
        start = time.perf_counter()
        cc.plan(source, target, sample=sample)
        times.append(time.perf_counter() - start)

    counts = passes(plan)
    return [
        str(layers),
        f"{counts['source']} + {counts['target']}",
        f"{times[0]:.1f}",
        f"{1e3 * times[0] / layers:.1f}",
    ]


def main() -> None:
    """Print two tables, and save them where that is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    sys.setrecursionlimit(20_000)  # Keras walks the graph of a functional model by recursion
    text = "# Finding a plan, measured\n\nWritten by tests/bench/planning.py: times in ms, memory in MB.\n\n"
    titles = ["pair", "source", "target", "copy", "plan", "of the measure", "passes", "memory of the weights"]
    text += table(titles, [measured(name, make(), options.repeat) for name, make in PAIRS.items()])
    text += "\nChains of linear layers of one width\n\n"
    text += table(["layers", "passes", "seconds", "ms per layer"], [grown(layers) for layers in CHAINS])
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


PAIRS = {"BERT-base": bert, "ResNet50": resnet}

if __name__ == "__main__":
    main()
