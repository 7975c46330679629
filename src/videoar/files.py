"""What is written whole or not at all: folders, JSON, files of figures."""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Json = dict[str, Any]
# Of larger files so many pieces are read: they tell weights apart in a second, not in minutes.
MAX_WHOLE_BYTES, PIECES, PIECE_BYTES = 64 << 20, 1024, 4096


def contents(file: Path) -> bytes:
    """Return what tells a file from others: all of it, or evenly spaced pieces of a large one."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= MAX_WHOLE_BYTES:
            return opened.read()
        places = (k * (size - PIECE_BYTES) // (PIECES - 1) for k in range(PIECES))
        return b"".join(opened.read(PIECE_BYTES) for at in places if opened.seek(at) == at)


# What lies where a file should be, by its first bytes.
_PAGE = "is a page of a web site, not the file: download it again, signed in if need be"
MISTAKEN = {
    b"version https://git-lfs": "is a pointer of git-LFS, not the file: run `git lfs pull` there",
    **dict.fromkeys((b"<!doctype", b"<html", b"<?xml", b"entry not found"), _PAGE),
    b"gguf": "is a GGUF file, whose quantised weights are not read: use safetensors",
}


def to_json(value: Any) -> Any:
    """Return a configuration as plain JSON values; a dataclass also names its class."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__qualname__} | fields
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def mistaken(head: bytes) -> str:
    """Say what a file is by its first bytes, if that is not what it should be; else nothing."""
    if not head:
        return "is empty (0 bytes): copy or download it again"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((says for kind, says in MISTAKEN.items() if start.startswith(kind)), "")


def check_kind(file: Path) -> bytes:
    """Return the first bytes of a file; raise if they are those of something else."""
    with file.open("rb") as opened:
        head = opened.read(64)
    if says := mistaken(head):
        raise ValueError(f"{file} {says}")
    return head


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a hidden name beside `path`: what is written there gets that name when it is whole."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, allow_nan: bool = True) -> None:
    """Write a file that is complete as soon as it exists; dataclasses are dicts."""
    text = json.dumps(value, indent=2, allow_nan=allow_nan, default=vars)
    with written_whole(path) as partial:
        partial.write_text(f"{text}\n", encoding="utf-8")


def first_written(path: Path, value: Any) -> Any:
    """Return what a JSON file holds; of processes that find none, the first one writes `value`."""
    if not path.exists():
        mine = path.with_name(f".{path.stem}-{socket.gethostname()}-{os.getpid()}.json")
        write_json(mine, value)
        try:
            os.link(mine, path)
        except OSError:  # another was first, or there are no links on this disk
            if not path.exists():
                os.replace(mine, path)
        mine.unlink(missing_ok=True)
    return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def replaced_folder(folder: Path, *, marker: str, overwrite: bool) -> Iterator[Path]:
    """Yield a new folder that takes the name `folder` when all is written, and vanishes if not.

    Raises:
        ValueError: the folder exists and has no file `marker`, or is not to be overwritten.
    """
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (folder / marker).is_file():
            raise ValueError(f"{folder} is no checkpoint, so it is left alone; choose another")
        if not overwrite:
            raise ValueError(f"{folder} exists already; choose another or pass overwrite=True")
    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def check_place(folder: Path) -> None:
    """Raise unless files can be written to a folder that is there."""
    if not folder.is_dir():
        raise ValueError(f"the folder {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"the folder {folder} is not writable; choose another one")


def check_folder(path: Path) -> None:
    """Raise unless files can be written to a folder that is there or can be made."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; name a folder")
    check_place(path if path.is_dir() else path.parent)


def load(path: Path | None, key: str, *, kind: str) -> dict[str, Any]:
    """Return what a file that was saved earlier holds under a key; nothing if there is none."""
    if path is not None:
        check_place(path.parent)
    if path is None or not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))[key])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} holds no {kind}: name another file.") from error


def save(path: Path | None, value: Any) -> None:
    """Keep figures, all of them numbers, if there is a file to keep them in."""
    if path is not None:
        write_json(path, value, allow_nan=False)
