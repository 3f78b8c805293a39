"""What the commands answer, as tables for a reader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from clipcore.cli.output import table


def backends(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per installed backend."""
    shown = table("Backends", "backend", "does", "state")
    for name, state in found.items():
        shown.add_row(name, ", ".join(state["does"]), state["error"] or "works")
    return shown


def plan(found: Any) -> Iterator[Table | Text]:
    """The rows of a plan, then what it leaves over."""
    shown = table(f"Plan: {found.source} to {found.target}", "target", "from", "pattern", "evidence")
    for row in found.rows:
        origin = ", ".join(dict.fromkeys(part.formula for part in row.parts))
        shown.add_row(row.target, Text(origin), Text(row.pattern), f"{row.evidence}: {row.reason}")
    yield shown
    yield from differences(found)
    if found.unused:
        yield Text(f"The source's tensors that nothing takes: {', '.join(found.unused)}")
    if found.kept:
        yield Text(f"The target's tensors that are left as they are: {', '.join(found.kept)}")


def migration(result: Any, output: str) -> Iterator[Table | Text]:
    """Where each tensor came from and, under a limit, what was clipped."""
    limited = result.report is not None
    titles = ("target", "from", *(("norm", "scale") if limited else ()))
    shown = table("Migrated", *titles, right=("norm", "scale"))
    for tensor in result.tensors:
        figures = (number(tensor.norm), number(tensor.scale)) if limited else ()
        shown.add_row(tensor.target, _origin(tensor.source), *figures)
    yield shown
    if limited:
        clipped = sum(bool(tensor.clipped) for tensor in result.tensors)
        yield Text(f"The limit clipped {clipped} of {len(result.tensors)} tensors.")
    yield from differences(result.plan)
    yield Text(f"The target's weights are in {output}.")


def verification(check: Any) -> Iterator[Table | Text]:
    """The verdict, layer by layer."""
    shown = table("Layer by layer", "source", "target", "relative error", right=("relative error",))
    for layer in check.layers:
        shown.add_row(layer.source, layer.target, number(layer.rel_error))
    yield shown
    if check.reason:
        yield Text(f"Why: {check.reason}")
    verdict = "Verified" if check.ok else "Not verified"
    yield Text(
        f"{verdict}: relative error {number(check.max_rel_error)}, noise floor {number(check.noise_floor)}, "
        f"inputs {', '.join(check.shapes)}",
        style="green" if check.ok else "red",
    )


def differences(found: Any) -> Iterator[Text]:
    """The settings in which matched layers differ, of a plan or a verification."""
    for difference in found.differences:
        yield Text(f"Difference{' (tested)' if difference.tested else ''}: {difference}")


def listed(found: Sequence[Any]) -> Iterator[Text]:
    """What `cc.diff` gave."""
    yield from (Text(f"Difference: {difference}") for difference in found)
    yield Text(f"{len(found)} settings differ." if found else "No setting differs.")


def _origin(source: str) -> str:
    return source or "filled"


def number(value: Any) -> str:
    """A figure as the tables show it."""
    return "-" if value is None else f"{float(value):.3g}"
