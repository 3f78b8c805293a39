"""Clipping beside its peers, in one run: medians, and ratios to each framework's own.

    python tests/bench/clipping.py [--repeat 15]

Gradients are float32: few large tensors, many small ones, and a mixture, in range and clipped. Peers and clipcore take
turns, so that noise falls on all alike. Below 1.0 clipcore is faster.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import numpy as np
import tensorflow as tf
import torch
from rich.console import Console
from rich.table import Table

import clipcore as cc

SETS = {
    "few large": [(4096, 4096)] * 4,
    "many small": [(1024,)] * 1000,
    "mixed": [(50257 // 4, 768), *[(768, 3072), (3072,), (768, 768), (768,)] * 6],
}


def medians(functions: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Seconds per call, the functions taking turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeat + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def contenders(shapes: list[tuple[int, ...]], clipped: bool) -> dict[str, Callable[[], object]]:
    """What is timed: each framework's own clipping by global norm, and clipcore's on the same tensors."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    limit = 1.0 if clipped else 1e9
    policy = cc.ClipByGlobalNorm(limit)
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for param, array in zip(params, arrays, strict=True):
        param.grad = torch.from_numpy(array.copy())
    ours = [torch.from_numpy(array.copy()) for array in arrays]
    tensors = [tf.constant(array) for array in arrays]
    # in place: torch's own takes the gradients as they are after its first call, so both scale by about 1 from then on
    return {
        "torch": lambda: torch.nn.utils.clip_grad_norm_(params, limit * (0.5 if clipped else 1)),
        "clipcore on torch": lambda: cc.clip(ours, policy),
        "tensorflow": lambda: tf.clip_by_global_norm(tensors, limit),
        "clipcore on tensorflow": lambda: cc.clip(tensors, policy),
        "clipcore on numpy": lambda: cc.clip(arrays, policy),
    }


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=15)
    repeat = parser.parse_args().repeat
    table = Table("gradients", "case", "torch ms", "clipcore / torch", "tensorflow ms", "clipcore / tensorflow")
    for name, shapes in SETS.items():
        for clipped in (False, True):
            times = medians(contenders(shapes, clipped), repeat)
            table.add_row(
                name,
                "clipped" if clipped else "in range",
                f"{1e3 * times['torch']:.2f}",
                f"{times['clipcore on torch'] / times['torch']:.2f}",
                f"{1e3 * times['tensorflow']:.2f}",
                f"{times['clipcore on tensorflow'] / times['tensorflow']:.2f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
