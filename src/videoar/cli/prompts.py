"""What `videoar generate --prompts FILE` is to make: prompts, names of files, seeds. No torch."""

import csv
import io
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videoar.checks import check, explained, hint
from videoar.data.sources import name_problem
from videoar.data.video import PICTURES, STREAMS

KEYS = ("prompt", "name", "seed")
MAX_NAME_BYTES = 220  # hidden names have 23 more, and file systems take 255


@dataclass(frozen=True)
class Wanted:
    """One video to make."""

    prompt: str
    name: str
    """Of the file, without a folder."""
    seed: int


def wanted(prompt: str | Path, *, seed: int, count: int) -> list[Wanted]:
    """Return what is to be made of a prompt, or of a file of them, `count` videos of each.

    Lines of a text are prompts; rows of `.jsonl` and `.csv` have a `prompt`, and may have a `name`
    and a `seed`. Other names are numbers, other seeds are counted from `seed`.

    Raises:
        ValueError: a line cannot be used, or two have one name; nothing has been made then.
    """
    rows = [(1, {"prompt": prompt})] if isinstance(prompt, str) else _rows(prompt)
    return listed(rows, of=prompt, seed=seed, count=count)


def listed(
    rows: Iterable[tuple[int, Any]], *, of: str | Path, seed: int = 0, count: int = 1
) -> list[Wanted]:
    """Return what is to be made of rows, and the lines they stand in: see `wanted`."""
    found = dict[str, Wanted]()
    for row, (line, values) in enumerate(rows):
        with explained(f"{of}, line {line}: {{}}"):
            text, name, first = _read(values, default=f"{line:04d}", seed=seed + row * count)
            for k in range(count):
                stem, suffix = os.path.splitext(name)
                file = f"{stem}-{k}{suffix}" if count > 1 else name
                if file.casefold() in found:  # the same file, on some systems
                    raise ValueError(f"{file} is the name of another video, too: change one")
                found[file.casefold()] = Wanted(text, file, first + k)
    if not found:
        raise ValueError(f"{of} holds no prompt: write one in each line")
    return list(found.values())


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a file, those of JSON as they are written, and the lines they end in."""
    kind, text = path.suffix.lower(), read_text(path)
    with explained(f"{path} cannot be read ({{}}): save it as CSV", csv.Error):
        if kind == ".csv":
            table = csv.DictReader(io.StringIO(text))
            yield from ((table.line_num, {k: v for k, v in row.items() if v}) for row in table)
    for number, line in [] if kind == ".csv" else lines_of(text):
        yield number, line if kind == ".jsonl" else {"prompt": line}


def read_text(path: Path) -> str:
    """Return what a file of text holds."""
    with explained(f"{path} cannot be read ({{}}): save it as UTF-8", UnicodeDecodeError):
        return path.read_text("utf-8-sig")


def lines_of(text: str) -> list[tuple[int, str]]:
    """Return the lines that say something, with their numbers; those after a # are remarks."""
    lines = enumerate(map(str.strip, text.split("\n")), start=1)
    return [(number, line) for number, line in lines if line and line[0] != "#"]


def _read(values: Any, *, default: str, seed: int) -> tuple[str, str, int]:
    """Read a row: its prompt, name and seed."""
    values = json.loads(values) if isinstance(values, str) else values
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise ValueError('there is no prompt: write {"prompt": "..."}, or a column prompt')
    for key in values:
        if key not in KEYS:
            raise ValueError(f"{key!r} is none of {', '.join(KEYS)}{hint(str(key), KEYS)}")
    name = unicodedata.normalize("NFC", str(values.get("name", default)))
    plain = 0 < len(os.fsencode(name)) <= MAX_NAME_BYTES and not set(name) & {"/", "\\"}
    if not plain or name_problem(name):
        raise ValueError(f"{name!r} cannot name a file in the folder: choose a short, plain one")
    if os.path.splitext(name)[1].lower() not in (*STREAMS, *PICTURES):
        name += ".mp4"
    first = values.get("seed", seed)
    first = int(first) if isinstance(first, str) and first.isdecimal() else first
    check("seed", repr(first), isinstance(first, int), "a whole number")
    check("seed", first, first >= 0, "0 or more")
    return values["prompt"], name, first
