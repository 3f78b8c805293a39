"""What the multi-array CPU kernels cost beside torch and beside plain passes over the same memory.

    python tests/bench/kernels.py [--rounds 15]

Every comparison runs its peers in turn, round by round, and prints medians: times in ms, GB/s of the elements' bytes
(read once, written once where something is written), and the ratio to each peer of the same round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from clipcore.clipping import fast

GPT2 = [(50257, 768), (1024, 768)] + 12 * [(768, 2304), (2304,), (768, 768), (768, 3072), (3072,), (3072, 768), (768,)]
SMALL = 1000 * [(1024,)]


def tensors(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [(torch.randn(shape) * 1e-2).to(dtype) for shape in shapes]


def memory(arrays: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([a.data_ptr() for a in arrays]), np.array([a.numel() for a in arrays])


def compare(title: str, size: int, peers: dict[str, Callable[[], object]], rounds: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in peers}
    for call in peers.values():
        call()
    for _ in range(rounds):
        for name, call in peers.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    print(title)
    ours = next(iter(times.values()))
    for name, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(ours, taken, strict=True))
        middle = statistics.median(taken)
        print(f"  {name:28} {middle * 1e3:9.3f} ms {size / middle / 1e9:7.1f} GB/s   ours / this: {ratio:.2f}")


def lists(name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, rounds: int) -> None:
    arrays = tensors(shapes, dtype)
    addresses, sizes = memory(arrays)
    whole = np.ones_like(sizes), np.ones_like(sizes), sizes  # one unit each
    kind = str(dtype).removeprefix("torch.")
    total = sum(a.numel() * a.element_size() for a in arrays)
    flat = torch.zeros(total // 8, dtype=torch.int64)  # the same amount of memory, in one piece
    halves, out = np.full(len(arrays), 0.999755859375), [torch.empty_like(a) for a in arrays]
    targets, _ = memory(out)
    moments, _ = memory(squares := [a.float().square() for a in arrays])
    after, _ = memory(new := [torch.empty_like(a) for a in squares])
    compare(
        f"{name} {kind}: sums of squares",
        total,
        {
            "unit_sums_of_squares": lambda: fast.unit_sums_of_squares(addresses, *whole, kind),
            "flat int64 sum": lambda: flat.sum(),
            "torch _foreach_norm": lambda: torch._foreach_norm(arrays),
        },
        rounds,
    )
    compare(
        f"{name} {kind}: scale in place",
        2 * total,
        {
            "scale_units": lambda: fast.scale_units(addresses, addresses, *whole, kind, halves),
            "scale into other tensors": lambda: fast.scale_units(addresses, targets, *whole, kind, halves),
            "flat int64 mul_": lambda: flat.mul_(1),
            "torch _foreach_mul_": lambda: torch._foreach_mul_(arrays, 0.999755859375),
            "spike": lambda: fast.spike(addresses, moments, addresses, after, sizes, kind, 50.0, 0.999, True),
        },
        rounds,
    )
    del squares, new


def units(shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> None:
    arrays = tensors(8 * [shape], dtype)
    addresses, _ = memory(arrays)
    kind = str(dtype).removeprefix("torch.")
    total = sum(a.numel() * a.element_size() for a in arrays)
    one, rows, columns = (np.full(8, n) for n in (1, *shape))
    layouts = {"units are rows": (one, rows, columns), "units are columns": (rows, columns, one)}
    compare(
        f"8 tensors {shape} {kind}: sums of squares per unit",
        total,
        {n: lambda s=s: fast.unit_sums_of_squares(addresses, *s, kind) for n, s in reversed(layouts.items())},
        rounds,
    )
    factors = np.full(8 * max(shape), 0.999755859375)
    compare(
        f"8 tensors {shape} {kind}: scale per unit",
        2 * total,
        {
            n: lambda s=s: fast.scale_units(addresses, addresses, *s, kind, factors)
            for n, s in reversed(layouts.items())
        },
        rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        lists("GPT-2", GPT2, dtype, rounds)
        lists("small", SMALL, dtype, 10 * rounds)
        units((3072, 4096), dtype, rounds)
        units((300000, 10), dtype, rounds)


if __name__ == "__main__":
    main()
