"""Videos as people keep them: which there are, what they are called, and what is no video.

A source is a file, a member of a tar or a folder of pictures. Nothing here decodes one.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import posixpath
import re
import stat
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

VIDEOS = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .gif .webp .ts .m2ts .mpg .mpeg .flv .wmv .ogv .3gp".split()
)
PICTURES = frozenset(".png .jpg .jpeg .bmp .tif .tiff".split())
METADATA = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One video: where it is and what it shows."""

    name: str
    """Path below the folder of videos; for a member of a tar, its name below that of the tar."""
    path: str
    kind: Literal["video", "pictures"]
    captions: tuple[str, ...]
    size: int
    """Bytes."""
    offset: int = 0
    """Where the bytes begin in the file."""
    modified: int = 0
    """Of the file, in nanoseconds."""

    @property
    def key(self) -> str:
        """A file name for what is made of this source, as long as it does not change."""
        about = [self.name, self.captions, self.size, self.modified]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Listing:
    """What a folder holds."""

    sources: list[Source] = field(default_factory=list)
    """Sorted by name."""
    rejected: dict[str, str] = field(default_factory=dict)
    """Reasons, by name."""


def list_sources(root: Path, *, captions: Literal["auto", "none"]) -> Listing:
    """Find all videos below a folder, their captions, and everything that is neither.

    Captions are in `metadata.jsonl` or `.csv` (`file_name`, `text`), beside the video in a `.txt`
    of the same name, or in a tar as in WebDataset. With `none` all captions are empty.
    """
    walk = _Walk(root)
    found = Listing(rejected=walk.rejected)
    for name, source in sorted(walk.videos.items()):
        beside = f"{name if source.kind == 'pictures' else posixpath.splitext(name)[0]}.txt"
        said = [*source.captions, *walk.texts.pop(name, []), *walk.texts.pop(beside, [])]
        said = [""] if captions == "none" else list(filter(None, said))
        if source.size == 0:
            found.rejected[name] = "0 bytes"
        elif not said:
            found.rejected[name] = "no caption: add it to metadata.jsonl or a .txt of the same name"
        else:
            found.sources.append(replace(source, captions=tuple(said)))
    for name in walk.texts.keys() - found.rejected.keys():
        found.rejected[name] = "a caption of no video"
    return found


class _Walk:
    """What is found on a walk through a folder, by name."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))
        self.videos: dict[str, Source] = {}
        self.texts: dict[str, list[str]] = {}
        self.rejected: dict[str, str] = {}
        for folder, folders, files in os.walk(self.root, onerror=self._unreadable):
            for name in sorted(folders):
                if reason := _folder_problem(folder, name):
                    self.rejected[_name(self.root, folder, name)] = reason
                    folders.remove(name)
            # Pictures beside a video are posters of it, and not a video of their own.
            posters = any(_suffix(name) in VIDEOS for name in files)
            sequence = []
            for path in sorted(os.path.join(folder, name) for name in files):
                if reason := _file_problem(self.root, path):
                    self.rejected[_name(self.root, path)] = reason
                elif _suffix(path) in PICTURES and not posters:
                    sequence.append(path)
                else:
                    try:
                        self._add(path)
                    except OSError as error:
                        self._unreadable(error)
            if sequence:
                here = _name(self.root, folder)
                self.videos[here] = _source(here, folder, sequence, kind="pictures")

    def _unreadable(self, error: OSError) -> None:
        self.rejected[_name(self.root, error.filename)] = f"cannot be read: {error.strerror}"

    def _add(self, path: str) -> None:
        name, suffix = _name(self.root, path), _suffix(path)
        if os.path.basename(path) in METADATA:
            _read_metadata(Path(path), posixpath.dirname(name), self.texts, self.rejected)
        elif suffix == ".txt":
            self.texts.setdefault(name, []).append(_one_line(Path(path).read_bytes()))
        elif suffix == ".tar":
            members = _tar_members(Path(path), name, self.rejected)
            self.videos |= {source.name: source for source in members}
        elif suffix in VIDEOS:
            self.videos[name] = _source(name, path, [path], kind="video")
        elif suffix in PICTURES:
            self.rejected[name] = "a picture beside videos: put sequences into own folders"
        else:
            self.rejected[name] = f"not a video: its name ends in {suffix or 'no suffix'}"


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _name(root: Path, *parts: str) -> str:
    """Return a path below the root as it is printed: readable and in one line."""
    name = os.path.relpath(os.path.join(*parts), root).replace(os.sep, "/")
    name = os.fsencode(name).decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: repr(found[0])[1:-1], name)


def name_problem(name: str) -> str:
    """Return why no file of this name is read; nothing if it is."""
    if re.search(r"[\x00-\x1f\x7f]", name):
        return "its name holds a line break or another control character: rename it"
    if name != name.encode("utf-8", "replace").decode():
        return "its name is not UTF-8: rename it"
    return "hidden" if name.startswith(".") else ""


def _folder_problem(folder: str, name: str) -> str:
    if os.path.islink(os.path.join(folder, name)):
        return "a symbolic link to a folder: move the folder here"
    return name_problem(name)


def _file_problem(root: Path, path: str) -> str:
    if problem := name_problem(os.path.basename(path)):
        return problem
    if os.path.islink(path) and not Path(path).resolve().is_relative_to(root.resolve()):
        return "a symbolic link out of the folder"
    try:
        # Opening a pipe would wait for a writer for ever.
        return "" if stat.S_ISREG(os.stat(path).st_mode) else "not a regular file"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _source(
    name: str, path: str, files: Iterable[str], *, kind: Literal["video", "pictures"]
) -> Source:
    stats = [os.stat(file) for file in files]
    size, modified = sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats)
    return Source(name=name, path=path, kind=kind, captions=(), size=size, modified=modified)


def _one_line(text: bytes) -> str:
    return " ".join(text.decode("utf-8-sig", "replace").split())


def _captions_in(row: dict[str, Any]) -> list[str]:
    said = row.get("text", row.get("caption"))
    return [text for text in (said if isinstance(said, list) else [said]) if isinstance(text, str)]


def _read_metadata(
    path: Path, folder: str, texts: dict[str, list[str]], rejected: dict[str, str]
) -> None:
    """Add the captions of a table; a line that cannot be read is rejected, the others count."""
    content = path.read_text(encoding="utf-8-sig", errors="replace")
    try:
        table = csv.DictReader(io.StringIO(content))
        rows = list(table) if path.suffix == ".csv" else content.split("\n")
    except csv.Error as error:
        rejected[posixpath.join(folder, path.name)] = f"not a table ({error})"
        return
    for number, line in enumerate(rows, start=1):
        try:
            row = json.loads(line) if isinstance(line, str) else line
            name = posixpath.normpath(posixpath.join(folder, row["file_name"]))
            texts.setdefault(name, []).extend(_captions_in(row))
        except (ValueError, KeyError, TypeError, AttributeError):
            if line:
                rejected[f"{posixpath.join(folder, path.name)}, row {number}"] = "no file_name"


def _tar_members(path: Path, shown: str, rejected: dict[str, str]) -> Iterator[Source]:
    """Yield the videos of a WebDataset tar: members of one name up to the first dot belong."""
    modified, found, texts = path.stat().st_mtime_ns, list[tuple[str, Source]](), {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                head, tail = posixpath.split(member.name)
                stem, _, suffix = tail.partition(".")
                key, name = posixpath.join(head, stem), posixpath.join(shown, member.name)
                if not member.isfile() or (problem := name_problem(tail)):
                    if not member.isdir():
                        rejected[name] = problem if member.isfile() else "not a regular file"
                elif suffix in ("txt", "json") and member.size < 2**20:
                    content = tar.extractfile(member)
                    assert content is not None
                    texts.setdefault(key, []).append((suffix, content.read()))
                elif f".{suffix.lower()}" in VIDEOS:
                    place = {"size": member.size, "offset": member.offset_data}
                    about = {"name": name, "path": str(path), "modified": modified}
                    found.append((key, Source(kind="video", captions=(), **about, **place)))
                else:
                    rejected[name] = f"not a video: its name ends in .{suffix}"
    except (tarfile.TarError, OSError, EOFError) as error:
        rejected[shown] = f"no tar, or cut short after {len(found)} videos ({error})"
    for key, source in found:
        said = []
        for suffix, content in texts.get(key, []):
            with contextlib.suppress(ValueError, AttributeError):
                said += (
                    _captions_in(json.loads(content)) if suffix == "json" else [_one_line(content)]
                )
        yield replace(source, captions=tuple(said))
