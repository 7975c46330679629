"""Tables for people, and files of the figures behind them."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return rows by column as cells, the names of the columns first."""
    return [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Write rows of cells, the first of them the head, as Markdown."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def columns(rows: Iterable[Sequence[str]]) -> str:
    """Lay rows of cells out in columns."""
    lines = list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (map(str.ljust, line, widths) for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def load(path: Path | None, key: str, *, kind: str) -> dict[str, Any]:
    """Return what a file that was saved earlier holds under a key; nothing if there is none."""
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"the folder {path.parent} does not exist; create it first")
    if path is None or not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))[key])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no {kind}: name another file.") from error


def save(path: Path | None, value: Any) -> None:
    """Replace the file as a whole, so that it is complete at any moment; dataclasses are dicts."""
    if path is not None:
        partial = path.with_name(f".{path.name}.partial")
        text = json.dumps(value, allow_nan=False, default=vars)
        partial.write_text(f"{text}\n", encoding="utf-8")
        os.replace(partial, path)
