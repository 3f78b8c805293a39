"""What the command line prints: tables or one JSON object on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from typing import Any, TextIO

import typer
from rich.console import Console, RenderableType
from rich.table import Table

import clipcore as cc

OK, NOT_VERIFIED, BAD_INPUT = 0, 1, 2

_PIPE_WIDTH = 240


class Session:
    """One command at work. While it runs, stdout is its own: what frameworks and factories print goes to stderr."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        # in a file or a pipe a row stays one line
        self._stdout = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
        self._stderr = Console(file=_own_stderr())

    def step(self, text: str) -> AbstractContextManager[Any]:
        """Progress: a spinner with `text` while the block runs, on a terminal."""
        return self._stderr.status(f"{text} …")

    def answer(self, document: Mapping[str, Any], *tables: RenderableType) -> None:
        """Print the result: the document as JSON where that is asked for, else the tables."""
        if self.as_json:
            # the console would wrap and colour it
            print(json.dumps(_plain(document), ensure_ascii=False), file=self._stdout.file)
        else:
            for table in tables:
                self._stdout.print(table)


@contextmanager
def session(*, as_json: bool, debug: bool) -> Iterator[Session]:
    """Run a command; an error becomes one sentence on stderr and exit code 2, with the traceback under `debug`."""
    running = Session(as_json)
    try:
        with redirect_stdout(sys.stderr):
            yield running
    except typer.Exit:
        raise
    except Exception as err:
        if debug:
            traceback.print_exc()
        print(f"clipcore: {_sentence(err, debug)}", file=sys.stderr)
        raise typer.Exit(BAD_INPUT) from err


def _sentence(err: Exception, debug: bool) -> str:
    text = " ".join(str(err).split())
    if isinstance(err, cc.ClipcoreError):
        return text
    hint = "" if debug else "; --debug shows where"
    return f"unexpected {type(err).__name__}: {text}{hint}"


@contextmanager
def hushed() -> Iterator[None]:
    """Hold back what native code writes to stderr while a framework is imported; it is shown if the import fails."""
    # TensorFlow greets before it reads TF_CPP_MIN_LOG_LEVEL: github.com/tensorflow/tensorflow/issues/100442
    try:
        kept = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    with tempfile.TemporaryFile() as held:
        sys.stderr.flush()
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(kept, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)


def _own_stderr() -> TextIO:
    """A stderr that `hushed` does not hold back, for progress."""
    try:
        return os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding=sys.stderr.encoding, errors="replace")
    except (OSError, ValueError):  # stderr is not a file, as under a test's capture
        return sys.stderr


def table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table that never cuts a name short."""
    made = Table(title=title, title_justify="left")
    for column in columns:
        made.add_column(column, overflow="fold", justify="right" if column in right else "left")
    return made


def _plain(value: Any) -> Any:
    """The value in what JSON has; inf and NaN, which it lacks, become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    return _plain(value.item()) if hasattr(value, "item") else str(value)
