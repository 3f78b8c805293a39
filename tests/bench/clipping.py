"""Clipping beside its peers, in one run: medians, and ratios to each peer and to what the memory itself takes.

    python tests/bench/clipping.py [--repeat 15] [--output table.md] [--only gpt2,resnet50,small] [--device cuda]

Gradients of the sizes of GPT-2 and ResNet-50, and 1,000 small ones; in range and clipped; float32 and bfloat16. All
contenders take turns, so that noise falls on all alike, and each is called twice, so that what its predecessor left in
the caches is not measured. "read" is a flat sum of as much memory, "read and write" a flat multiply in place, both by
torch. Peers that are not installed are left out, and said so. A ratio that misses its aim is followed by the aim.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import ml_dtypes
import numpy as np
import torch

import clipcore as cc

Times = dict[str, float]
DTYPES = {"float32": (np.float32, torch.float32), "bfloat16": (ml_dtypes.bfloat16, torch.bfloat16)}


def gpt2() -> list[tuple[int, ...]]:
    """The parameters of GPT-2 (124M): 148 tensors, 498 MB in float32."""
    norm = [(768,), (768,)]
    attention = [(768, 2304), (2304,), (768, 768), (768,)]
    block = [*norm, *attention, *norm, (768, 3072), (3072,), (3072, 768), (768,)]
    return [(50257, 768), (1024, 768), *block * 12, *norm]


def resnet50() -> list[tuple[int, ...]]:
    """The parameters of ResNet-50: 161 tensors, 102 MB in float32."""

    def conv(outs: int, ins: int, size: int) -> list[tuple[int, ...]]:
        return [(outs, ins, size, size), (outs,), (outs,)]

    shapes, ins = conv(64, 3, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += conv(width, ins, 1) + conv(width, width, 3) + conv(4 * width, width, 1)
            shapes += conv(4 * width, ins, 1) if block == 0 else []
            ins = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


SETS = {"gpt2": gpt2(), "resnet50": resnet50(), "small": [(1024,)] * 1000}


def medians(functions: dict[str, Callable[[], object]], repeat: int) -> Times:
    """Milliseconds per call, the functions taking turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeat + 2):
        for name, function in functions.items():
            function()
            _wait()
            start = time.perf_counter()
            function()
            _wait()
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def arrays(shapes: list[tuple[int, ...]], dtype: str) -> list[np.ndarray]:
    """Normal gradients of these shapes."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype=np.float32).astype(DTYPES[dtype][0]) for shape in shapes]


def torch_contenders(
    values: list[np.ndarray], dtype: str, clipped: bool, device: str
) -> dict[str, Callable[[], object]]:
    """The clipping of torch and clipcore's, in place, on gradients of their own; and the memory itself."""
    limit = 1e-3 if clipped else 1e9

    def fresh() -> list[torch.Tensor]:
        return [torch.from_numpy(v.astype(np.float32)).to(device, DTYPES[dtype][1]) for v in values]

    def params() -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(torch.empty_like(t)) for t in fresh()]
        for param, grad in zip(made, fresh(), strict=True):
            param.grad = grad
        return made

    ours, theirs = fresh(), {True: params(), False: params()}
    flat = torch.empty(sum(t.numel() for t in ours), dtype=DTYPES[dtype][1], device=device).fill_(1.0)
    words = flat[: flat.numel() // 2 * 2].view(torch.float32)
    # each call makes the gradients smaller, and the limit follows, so that every call clips
    state = {"limit": limit, True: limit, False: limit}

    def next_limit(key: object) -> float:
        state[key] *= 0.5 if clipped else 1.0
        return state[key]

    def peer(foreach: bool) -> Callable[[], object]:
        return lambda: torch.nn.utils.clip_grad_norm_(theirs[foreach], next_limit(foreach), foreach=foreach)

    return {
        "read": lambda: words.sum(),
        "read and write": lambda: words.mul_(1.0),
        "torch foreach": peer(True),
        "torch": peer(False),
        "clipcore on torch": lambda: cc.clip_(ours, cc.ClipByGlobalNorm(next_limit("limit"))),
    }


def tensorflow_contenders(values: list[np.ndarray], clipped: bool) -> dict[str, Callable[[], object]]:
    """TensorFlow's clipping, eager and traced, and clipcore's."""
    if importlib.util.find_spec("tensorflow") is None:
        return {}
    import tensorflow as tf

    limit = 1.0 if clipped else 1e9
    tensors, policy = [tf.constant(v) for v in values], cc.ClipByGlobalNorm(limit)
    traced = tf.function(lambda grads: tf.clip_by_global_norm(grads, limit))
    ours = tf.function(lambda grads: cc.clip(grads, policy))
    return {
        "tensorflow": lambda: tf.clip_by_global_norm(tensors, limit)[1].numpy(),
        "tensorflow traced": lambda: traced(tensors)[1].numpy(),
        "clipcore on tensorflow": lambda: cc.clip(tensors, policy),
        "clipcore on tensorflow, traced": lambda: ours(tensors)[1].norm.numpy(),
    }


def optax_contender(values: list[np.ndarray], clipped: bool) -> dict[str, Callable[[], object]]:
    """Clipping by optax, under jit."""
    if importlib.util.find_spec("optax") is None:
        return {}
    import jax
    import optax

    transform = optax.clip_by_global_norm(1.0 if clipped else 1e9)
    grads = [jax.numpy.asarray(v) for v in values]
    state = transform.init(grads)
    update = jax.jit(lambda g: transform.update(g, state)[0])
    return {"optax": lambda: jax.block_until_ready(update(grads))}


def smartclip_contender(values: list[np.ndarray], dtype: str) -> dict[str, Callable[[], object]]:
    """AutoClip of smartclip, whose cost is that of a norm and a few numbers, beside clipcore's."""
    if importlib.util.find_spec("smartclip") is None:
        return {}
    import smartclip

    model = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(v.shape, dtype=DTYPES[dtype][1])) for v in values)
    for param, value in zip(model, values, strict=True):
        param.grad = torch.from_numpy(value.astype(np.float32)).to(DTYPES[dtype][1])
    clipper = smartclip.AutoClip()
    ours, grads = cc.Clipper(cc.AutoClip(100.0)), [param.grad for param in model]
    return {
        "smartclip": lambda: smartclip.apply(model, clipper),
        "clipcore AutoClip": lambda: ours.clip_(grads),
    }


def policy_contenders(values: list[np.ndarray]) -> dict[str, Callable[[], object]]:
    """Policies beside ClipByGlobalNorm, timm's AGC, and the memory that each of them must move."""
    grads = [torch.from_numpy(v) for v in values]
    params = [torch.from_numpy(np.full(v.shape, 1e3, np.float32)) for v in values]
    flat = torch.ones(sum(g.numel() for g in grads))
    other = torch.ones_like(flat)
    contenders: dict[str, Callable[[], object]] = {
        "read": lambda: flat.sum(),
        "read two, write one": lambda: torch.add(flat, other, out=other),
        "ClipByGlobalNorm": lambda: cc.clip_(grads, cc.ClipByGlobalNorm(1e9)),
    }
    for policy in (cc.AutoClip(100.0), cc.ZClip(), cc.AdaGC(1e9, ratio=2.0, warmup=1), cc.SpikeClip(1e9, warmup=1)):
        clipper = cc.Clipper(policy)
        contenders[type(policy).__name__] = lambda clipper=clipper: clipper.clip_(grads)
    agc = cc.AdaptiveClip(1.0, unit_axis=0)
    contenders["AdaptiveClip"] = lambda: cc.clip_(grads, agc, params=params)
    if (timm := timm_agc()) is not None:
        theirs = [torch.nn.Parameter(p.clone()) for p in params]
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad.clone()
        contenders["timm's AGC"] = lambda: timm.adaptive_clip_grad(theirs, 1.0)
    return contenders


def timm_agc() -> object:
    """The module of timm that has AGC, alone: the package needs a torchvision that fits torch."""
    try:
        files = importlib.metadata.files("timm") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    path = next(str(file.locate()) for file in files if str(file).endswith("timm/utils/agc.py"))
    spec = importlib.util.spec_from_file_location("agc", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


def global_norm_rows(name: str, repeat: int, device: str) -> Iterator[list[str]]:
    """One row per dtype and case: milliseconds, and clipcore's time as a part of each peer's."""
    for dtype in DTYPES:
        for clipped in (False, True):
            values = arrays(SETS[name], dtype)
            times = medians(torch_contenders(values, dtype, clipped, device), repeat)
            if device == "cpu":
                times |= medians(tensorflow_contenders(values, clipped), repeat)
                times |= medians(optax_contender(values, clipped), repeat)
                times |= medians(smartclip_contender(values, dtype), repeat) if not clipped else {}
            own = times["clipcore on torch"]
            least = times["read"] + (times["read and write"] if clipped else 0.0)
            memory, torchs = AIMS["small" if name == "small" else "large", clipped]
            cells = [
                (own, least, memory),
                (own, times["torch foreach"], torchs),
                (own, times["torch"], torchs),
                (times.get("clipcore on tensorflow"), times.get("tensorflow"), 1.0),
                (times.get("clipcore on tensorflow, traced"), times.get("tensorflow traced"), 1.0),
                (own, times.get("optax"), 1.0),
                (times.get("clipcore AutoClip"), times.get("smartclip"), 1.0),
            ]
            yield [name, dtype, "clipped" if clipped else "in range", f"{own:.2f}", *(ratio(*cell) for cell in cells)]


# clipcore's time at most as a part of the memory's and of torch's, by the size of the gradients and whether they clip
AIMS = {
    ("large", False): (1.25, 0.5),
    ("large", True): (1.25, 1.0),
    ("small", False): (1.25, 0.2),
    ("small", True): (1.25, 0.25),
}


def ratio(ours: float | None, theirs: float | None, aim: float) -> str:
    """A cell of a table; one that misses its aim says so."""
    if ours is None or theirs is None:
        return "-"
    missed = f", aim {aim:g}" if ours / theirs > aim else ""
    return f"{ours / theirs:.2f} of {theirs:.2f}{missed}"


def policy_rows(name: str, repeat: int) -> Iterator[list[str]]:
    """One row per policy, in range, float32."""
    times = medians(policy_contenders(arrays(SETS[name], "float32")), repeat)
    traffic = {"SpikeClip": "read two, write one", "AdaptiveClip": None}
    for policy in ("AutoClip", "ZClip", "AdaGC", "SpikeClip", "AdaptiveClip"):
        least = times[traffic[policy]] if traffic.get(policy) else times["read"] * (2 if policy in traffic else 1)
        peer = times.get("timm's AGC") if policy == "AdaptiveClip" else None
        own, reads_more = times[policy], policy in traffic
        cells = [
            (own, times["ClipByGlobalNorm"], math.inf if reads_more else 1.1),
            (own, least, 1.5 if reads_more else math.inf),
            (own, peer, 0.5),
        ]
        yield [name, policy, f"{own:.2f}", *(ratio(*cell) for cell in cells)]


def table(titles: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [titles, ["-"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines) + "\n"


def main() -> None:
    """Print two tables, and save them where that is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--only", default=",".join(SETS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    names = options.only.split(",")
    rows = [row for name in names for row in global_norm_rows(name, options.repeat, options.device)]
    text = "# Clipping, measured\n\nWritten by tests/bench/clipping.py.\n\n"
    text += f"ClipByGlobalNorm, {options.device}; times in ms, clipcore's as a part of the other's\n\n" + table(
        [
            "gradients", "dtype", "case", "clipcore on torch", "the memory", "torch foreach", "torch",
            "tensorflow", "tensorflow traced", "optax jit", "smartclip",
        ],
        rows,
    )  # fmt: skip
    if options.device == "cpu":
        rows = [row for name in names for row in policy_rows(name, options.repeat)]
        titles = ["gradients", "policy", "ms", "ClipByGlobalNorm", "the memory", "timm's AGC"]
        text += "\nOther policies, in range, float32\n\n" + table(titles, rows)
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
