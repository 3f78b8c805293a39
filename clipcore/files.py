"""Files written whole: after a failure the old one stands, or none."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from clipcore.errors import InvalidInput


def write_whole(path: str | Path, text: str, what: str) -> None:
    """Write a text, and put it in its place only when all of it is there.

    Raises:
        InvalidInput: `what` cannot be written to `path`.
    """
    part = Path(f"{path}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as err:
        raise InvalidInput(f"{what} cannot be written to {path}: {err}; name a file in a folder that is there") from err
    finally:
        with suppress(OSError):
            part.unlink()
