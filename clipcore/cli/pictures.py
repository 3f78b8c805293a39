"""The demo's two pictures. They need matplotlib, which is imported when they are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BLUE, ORANGE, GREY = "#4477aa", "#ee7733", "#888888"


def gradient_norms(norms: Sequence[float], limit: float, folder: Path) -> str:
    """The norm of B's gradients before clipping, step by step, with the limit; returns the file's name."""
    figure = _figure()
    axes = figure.add_subplot()
    values, steps = np.asarray(norms), np.arange(len(norms))
    over = values > limit
    axes.plot(steps[~over], values[~over], ".", color=BLUE, markersize=4, label="in range, left as it is")
    axes.plot(steps[over], values[over], ".", color=ORANGE, markersize=5, label="shrunk to the limit")
    axes.axhline(limit, color=GREY, linewidth=1, label=f"limit {limit:g}")
    axes.set(yscale="log", xlabel="step", ylabel="norm before clipping", title="B's gradients in PyTorch")
    axes.legend(frameon=False)
    return _save(figure, folder / "gradient-norms.png")


def agreement(layers: Mapping[str, Sequence[Any]], tolerance: float, folder: Path) -> str:
    """Layer by layer, how far A's output is from B's, for each way of migrating; returns the file's name."""
    figure = _figure()
    axes = figure.add_subplot()
    smallest = 1e-9  # equal bits have no place on a logarithmic axis
    for name, marker, color in zip(layers, "os", (BLUE, ORANGE), strict=True):
        errors = [max(layer.rel_error, smallest) for layer in layers[name]]
        axes.plot(errors, np.arange(len(errors)), marker, color=color, label=f"B's weights, {name}", fillstyle="none")
    names = [f"{layer.source} = {layer.target}" for layer in next(iter(layers.values()))]
    axes.axvline(tolerance, color=GREY, linewidth=1, label=f"at most {tolerance:g}")
    axes.set(xscale="log", xlim=(smallest / 2, 10 * tolerance), xlabel="relative error (1e-9: none)")
    axes.set(yticks=np.arange(len(names)), yticklabels=names, title="What A's layers compute, against B's")
    axes.invert_yaxis()
    axes.legend(frameon=False)
    return _save(figure, folder / "agreement.png")


def _figure() -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(8, 3.6), layout="constrained")


def _save(figure: Any, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return str(path)
