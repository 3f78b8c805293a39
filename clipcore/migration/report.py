"""The page that shows a verification: both models' layers side by side, with their agreement."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipcore.migration.side_by_side import Step
    from clipcore.migration.verify import Verification

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
th, td { border-bottom: 1px solid #8884; padding: .25rem .6rem; text-align: left; vertical-align: top }
td.number { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap }
code { font: 13px ui-monospace, monospace; overflow-wrap: anywhere }
.good { color: #16803c } .bad { color: #c02626 } .none { color: #888 }
tr.differs { background: #c0262618 }
"""


def page(check: Verification) -> str:
    """A whole HTML document, without anything from elsewhere."""
    verdict = '<span class="good">verified</span>' if check.ok else '<span class="bad">not verified</span>'
    body = [
        f"<h1>{verdict}</h1>",
        f"<p>{escape(str(check))}</p>",
        *_differences(check),
        *_steps(check),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>clipcore: verification</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{chr(10).join(body)}\n</body></html>\n"
    )


def _differences(check: Verification) -> Iterator[str]:
    if not check.differences:
        yield "<p>No layer differs in any setting.</p>"
        return
    yield "<h2>Differences</h2>"
    yield from _table(
        ("layer", "setting", "source", "target", "how it is known", "what mends it"),
        (
            (
                f"<tr><td><code>{escape(d.layer)}</code></td><td>{escape(d.setting)}</td>"
                f"<td>{escape(str(d.source))}</td><td>{escape(str(d.target))}</td>"
                f"<td>{'tested' if d.tested else 'settings alone'}</td><td>{escape(d.repair or '')}</td></tr>"
            )
            for d in check.differences
        ),
    )


def _steps(check: Verification) -> Iterator[str]:
    if not check.steps:
        return
    seen = [d for d in check.differences if d.tested or d.setting in ("input", "output")]
    known = {difference.layer: str(difference) for difference in seen}
    yield "<h2>Layers, in order of execution</h2>"
    yield "<p>Where the two differ, the source's values went on in the target, so that each row stands for itself.</p>"
    head = ("source", "target", "kind", "error of the input", "error of the output")
    yield from _table(head, (_step(step, known.get(step.target, "")) for step in check.steps))


def _table(head: tuple[str, ...], rows: Iterator[str]) -> Iterator[str]:
    yield f"<table><thead><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr></thead><tbody>"
    yield from rows
    yield "</tbody></table>"


def _step(step: Step, note: str) -> str:
    names = "".join(
        f"<td><code>{escape(name)}</code></td>" if name else '<td class="none">none</td>'
        for name in (step.source, step.target)
    )
    errors = "".join(f'<td class="number">{_error(error)}</td>' for error in (step.input_error, step.output_error))
    differs = f' class="differs" title="{escape(note)}"' if note else ""
    return f"<tr{differs}>{names}<td>{escape(step.kind)}</td>{errors}</tr>"


def _error(error: float) -> str:
    if math.isnan(error):
        return '<span class="none">none</span>'
    return "another shape" if math.isinf(error) else f"{error:.1e}"
