"""Migration beside its floor and its peer, in one run: medians, ratios with their aims, and peak memory.

    python tests/bench/migration.py [--repeat 9] [--output table.md] [--size base|small]

A model of BERT-base's size (12 layers of 768, a vocabulary of 30,522: 199 tensors, 438 MB) that torch and Keras 3 each
build of their own layers, and Hugging Face's TFBertModel of the same sizes on tf_keras. All contenders take turns, so
that noise falls on all alike. The floor is the fastest loop known that rearranges each tensor and assigns it, checking
nothing and keeping nothing to go back to; "NumPy's floor" rearranges by NumPy. Of a floor, a cell says clipcore's time
as a part of it; of Hugging Face's loader, the loader's time as a multiple of clipcore's. Memory is the peak of the
process during one call, in a fresh process that migrated narrow models before, beyond what it held before; the biggest
tensor is 94 MB. What is not installed is left out, and said so.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["TF_USE_LEGACY_KERAS"] = "1"  # what transformers asks for; Keras 3 does not look at it

import keras
import numpy as np
import tensorflow as tf
import torch
from torch import nn

import clipcore as cc
from clipcore.mapping.plan import Part, Row, Term

Size = dict[str, int]
Call = Callable[[], object]
SIZES: dict[str, Size] = {
    "base": {"layers": 12, "width": 768, "inner": 3072, "heads": 12, "words": 30522, "places": 512},
    "small": {"layers": 2, "width": 96, "inner": 384, "heads": 12, "words": 1000, "places": 64},
}
NARROW = {"width": 48, "inner": 96, "words": 1000, "places": 64}  # on which a plan is found quickly; names are the same
EPS = 1e-12


class TorchBlock(nn.Module):
    """Attention and what follows it, each with a norm after the sum."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=EPS) for _ in range(2))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        weights = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, -1)
        x = self.norm1(x + self.output((weights @ v).transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))


class TorchBert(nn.Module):
    """Three embeddings, the blocks, and a pooled first place."""

    def __init__(self, layers: int, width: int, inner: int, heads: int, words: int, places: int) -> None:
        super().__init__()
        self.words, self.places, self.kinds = (nn.Embedding(count, width) for count in (words, places, 2))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.blocks = nn.ModuleList(TorchBlock(width, inner, heads) for _ in range(layers))
        self.pooler = nn.Linear(width, width)

    def forward(self, words: torch.Tensor, places: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.words(words) + self.places(places) + self.kinds(kinds))
        for block in self.blocks:
            x = block(x)
        return torch.tanh(self.pooler(x[:, 0]))


class Split(keras.layers.Layer):
    """Features split by head, heads before places."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def call(self, x: tf.Tensor) -> tf.Tensor:
        batch, length, width = keras.ops.shape(x)
        return keras.ops.transpose(keras.ops.reshape(x, (batch, length, self.heads, width // self.heads)), (0, 2, 1, 3))


class Attend(keras.layers.Layer):
    """What the heads attend to, joined again."""

    def call(self, q: tf.Tensor, k: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
        weights = keras.ops.softmax(keras.ops.matmul(q, keras.ops.swapaxes(k, 2, 3)) / q.shape[-1] ** 0.5)
        x = keras.ops.transpose(keras.ops.matmul(weights, v), (0, 2, 1, 3))
        batch, length, heads, width = keras.ops.shape(x)
        return keras.ops.reshape(x, (batch, length, heads * width))


def keras_bert(layers: int, width: int, inner: int, heads: int, words: int, places: int) -> keras.Model:
    """The same architecture of Keras's layers; their names are those of torch's, so that every size has the same."""
    dense = keras.layers.Dense

    def norm(x: tf.Tensor, name: str) -> tf.Tensor:
        return keras.layers.LayerNormalization(epsilon=EPS, name=name)(x)

    def block(x: tf.Tensor, name: str) -> tf.Tensor:
        parts = [Split(heads)(dense(width, name=f"{name}_{part}")(x)) for part in ("query", "key", "value")]
        x = norm(x + dense(width, name=f"{name}_output")(Attend()(*parts)), f"{name}_norm1")
        inside = keras.activations.gelu(dense(inner, name=f"{name}_up")(x), approximate=False)
        return norm(x + dense(width, name=f"{name}_down")(inside), f"{name}_norm2")

    inputs = [keras.Input((None,), dtype="int32") for _ in range(3)]
    counts = {"words": words, "places": places, "kinds": 2}
    embeddings = [keras.layers.Embedding(count, width, name=name) for name, count in counts.items()]
    x = norm(sum(embedding(given) for embedding, given in zip(embeddings, inputs, strict=True)), "norm")
    for number in range(layers):
        x = block(x, f"block{number}")
    return keras.Model(inputs, dense(width, activation="tanh", name="pooler")(x[:, 0]))


def sample(length: int = 6) -> tuple[np.ndarray, ...]:
    """A short one."""
    rng = np.random.default_rng(0)
    return (
        rng.integers(0, 1000, (1, length)).astype(np.int32),
        np.arange(length, dtype=np.int32)[None],
        rng.integers(0, 2, (1, length)).astype(np.int32),
    )


def find_plan(size: Size) -> tuple[cc.Plan, float]:
    """The plan from torch to Keras, and the seconds that finding it took."""
    models = TorchBert(**size).eval(), keras_bert(**size)
    start = time.perf_counter()
    plan: cc.Plan = cc.plan(*models, sample())
    return plan, time.perf_counter() - start


class Models:
    """The two models, and the plans between them."""

    def __init__(self, size: Size, plan: cc.Plan) -> None:
        torch.manual_seed(0)
        self.to_keras = plan
        self.to_torch = reversed_plan(self.to_keras)
        self.torch, self.keras = TorchBert(**size).eval(), keras_bert(**size)
        tensors, variables = dict(self.torch.named_parameters()), {v.path: v for v in self.keras.variables}
        self.pairs = [
            (tensors[row.sources[0]].detach(), variables[row.target].value, _turned(row.pattern))
            for row in self.to_keras.rows
        ]

    @property
    def megabytes(self) -> float:
        return sum(tensor.numel() for tensor, _, _ in self.pairs) * 4e-6


def _turned(pattern: str) -> bool:
    before, _, after = pattern.partition(" -> ")
    return before != after


def reversed_plan(plan: cc.Plan) -> cc.Plan:
    """The way back: every row of it is one tensor, rearranged."""
    rows = [(row, row.parts[0]) for row in plan.rows]
    assert all(row.reversible and len(row.parts) == 1 for row, _ in rows)
    back = [
        Row(
            part.terms[0].name,
            (
                Part(
                    part.role,
                    part.target_layer,
                    part.source_layer,
                    (Term(row.target),),
                    " -> ".join(reversed(part.pattern.split(" -> "))),
                    part.sizes,
                    part.evidence,
                    part.reason,
                ),
            ),
        )
        for row, part in rows
    ]
    return cc.Plan(plan.target, plan.source, tuple(back))


def _as_tf(tensor: torch.Tensor) -> tf.Tensor:
    return tf.experimental.dlpack.from_dlpack(tensor.__dlpack__())


def contenders_to_keras(models: Models) -> dict[str, Call]:
    """Torch to Keras."""

    def floor() -> None:
        for tensor, variable, turned in models.pairs:
            variable.assign(tf.transpose(_as_tf(tensor)) if turned else tf.raw_ops.DeepCopy(x=_as_tf(tensor)))

    def numpy_floor() -> None:
        for tensor, variable, turned in models.pairs:
            array = tensor.numpy()
            variable.assign(np.ascontiguousarray(array.T) if turned else array)

    return {
        "floor": floor,
        "NumPy's floor": numpy_floor,
        "clipcore": lambda: cc.migrate(models.torch, models.keras, plan=models.to_keras),
    }


def contenders_to_torch(models: Models) -> dict[str, Call]:
    """Keras to torch."""

    def floor() -> None:
        for tensor, variable, turned in models.pairs:
            value = torch.from_dlpack(variable.value())
            tensor.copy_(value.t() if turned else value)

    def numpy_floor() -> None:
        for tensor, variable, turned in models.pairs:
            array = variable.numpy()
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(array.T) if turned else array))

    return {
        "floor": floor,
        "NumPy's floor": numpy_floor,
        "clipcore": lambda: cc.migrate(models.keras, models.torch, plan=models.to_torch),
    }


def hugging_face(size: Size) -> dict[str, Call]:
    """Its loader, from a torch model of its own into a tf_keras one: as it is called, and without its forward pass."""
    if not all(map(importlib.util.find_spec, ("transformers", "tf_keras"))):
        return {}
    import transformers
    from transformers.modeling_tf_pytorch_utils import load_pytorch_state_dict_in_tf2_model

    transformers.logging.set_verbosity_error()
    config = transformers.BertConfig(
        vocab_size=size["words"],
        hidden_size=size["width"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        intermediate_size=size["inner"],
        max_position_embeddings=size["places"],
    )
    source, target = transformers.BertModel(config), transformers.TFBertModel(config)
    target(target.dummy_inputs, training=False)
    state = {name: tensor for name, tensor in source.state_dict().items() if "position_ids" not in name}
    return {
        "Hugging Face": lambda: load_pytorch_state_dict_in_tf2_model(target, state),
        "without forward": lambda: load_pytorch_state_dict_in_tf2_model(target, state, tf_inputs={}),
    }


def medians(calls: dict[str, Call], repeat: int) -> dict[str, float]:
    """Milliseconds per call, the calls taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeat + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= 1:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def _kilobytes(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak(call: Call) -> float:
    """Megabytes that this process holds during one call beyond those before it."""
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    before = _kilobytes("VmRSS")
    call()
    return (_kilobytes("VmHWM") - before) * 1.024e-3


MEMORY = {"to keras": contenders_to_keras, "to torch": contenders_to_torch}


def peak_apart(size: str, plan: str, direction: str, name: str) -> float:
    """The same, in a fresh process."""
    command = [sys.executable, *(["-I"] if sys.flags.isolated else []), __file__, "--size", size, "--plan", plan]
    result = subprocess.run([*command, "--peak", direction, name], capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


def against(ours: float, theirs: float | None, aim: float, *, at_least: bool = False) -> str:
    """A ratio, of ours to theirs or, `at_least`, of theirs to ours, and whether it reaches its aim."""
    if theirs is None:
        return "not installed"
    ratio = theirs / ours if at_least else ours / theirs
    reached = ratio >= aim if at_least else ratio <= aim
    return f"{ratio:.2f} of {theirs:.0f}; aim {'≥' if at_least else '≤'} {aim:g}: {'reached' if reached else 'missed'}"


def time_rows(models: Models, size: Size, repeat: int) -> list[list[str]]:
    """One row per direction."""
    peers, rows = hugging_face(size), []
    for title, make in (("torch to Keras", contenders_to_keras), ("Keras to torch", contenders_to_torch)):
        times = medians(make(models) | (peers if title == "torch to Keras" else {}), repeat)
        ours = times["clipcore"]
        floors = [against(ours, times[name], 1.5) for name in ("floor", "NumPy's floor")]
        faster = [against(ours, times.get(name), 3.5, at_least=True) for name in ("Hugging Face", "without forward")]
        rows.append([title, f"{ours:.0f}", *floors, *(faster if title == "torch to Keras" else ["-", "-"])])
    return rows


def memory_rows(size: str, plan: str, megabytes: float) -> list[list[str]]:
    """One row per direction: at most one copy of the target."""
    rows = []
    for title, direction in (("torch to Keras", "to keras"), ("Keras to torch", "to torch")):
        ours, floor = (peak_apart(size, plan, direction, name) for name in ("clipcore", "floor"))
        rows.append([title, f"{ours:.0f}", against(ours, megabytes, 1.05), f"{floor:.0f}"])
    return rows


def table(titles: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [titles, ["-"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines) + "\n"


def main() -> None:
    """Print two tables, and save them where that is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--size", default="base", choices=SIZES)
    parser.add_argument(
        "--planning", action="store_true", help="find the plan on the models themselves as well: minutes"
    )
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=pathlib.Path, help="a plan that was saved before; left out, it is found")
    options = parser.parse_args()
    size = SIZES[options.size]
    if options.peak:
        direction, name = options.peak
        plan, make = cc.Plan.load(options.plan), MEMORY[direction]
        make(Models(size | NARROW, plan))[name]()  # what the libraries load is loaded
        print(peak(make(Models(size, plan))[name]))
        return
    text = "# Migration, measured\n\nWritten by tests/bench/migration.py"
    with tempfile.TemporaryDirectory() as folder:
        path = options.plan or pathlib.Path(folder, "plan.json")
        found = ""
        if not options.plan:
            plan, seconds = find_plan(size | NARROW)
            plan.save(path)
            found += f"Finding the plan on models of as many layers, 48 wide, took {seconds:.1f} s. "
        if options.planning:
            found += f"Finding it on the models themselves took {find_plan(size)[1]:.1f} s. "
        models = Models(size, cc.Plan.load(path))
        rows = time_rows(models, size, options.repeat)
        memory = memory_rows(options.size, str(path), models.megabytes)
    text += (
        f": {len(models.pairs)} tensors, {models.megabytes:.0f} MB. {found}".rstrip()
        + "\n\nWith a plan in hand, times in ms\n\n"
    )
    titles = [
        "direction",
        "clipcore",
        "of the floor",
        "of NumPy's floor",
        "Hugging Face's loader",
        "without its forward pass",
    ]
    text += table(titles, rows)
    text += "\nPeak memory beyond both models, in MB\n\n"
    text += table(["direction", "clipcore", "one copy of the target", "the floor"], memory)
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
