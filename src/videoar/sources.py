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
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

VIDEOS = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .gif .webp .ts .m2ts .mpg .mpeg .flv .wmv .ogv .3gp".split()
)
PICTURES = frozenset(".png .jpg .jpeg .bmp .tif .tiff".split())
METADATA = ("metadata.jsonl", "metadata.csv")
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
Kind = Literal["video", "pictures"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One video: where it is and what it shows."""

    name: str
    """Path below the folder of videos; for a member of a tar, its name below that of the tar."""
    path: str
    kind: Kind
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
        self.texts = defaultdict[str, list[str]](list)
        self.rejected: dict[str, str] = {}
        for folder, folders, files in os.walk(self.root, onerror=self._unreadable):
            for name in sorted(folders):
                problem = name_problem(name)
                if os.path.islink(os.path.join(folder, name)):
                    problem = "a symbolic link to a folder: move the folder here"
                if problem:
                    self.rejected[self._name(folder, name)] = problem
                    folders.remove(name)
            # Pictures beside a video are posters of it, and not a video of their own.
            posters = any(_suffix(name) in VIDEOS for name in files)
            sequence = []
            for path in sorted(os.path.join(folder, name) for name in files):
                try:
                    if problem := self._problem(path):
                        self.rejected[self._name(path)] = problem
                    elif _suffix(path) in PICTURES and not posters:
                        sequence.append(path)
                    else:
                        self._add(path)
                except OSError as error:
                    self._unreadable(error)
            if sequence:
                self._add_video(self._name(folder), folder, sequence, kind="pictures")

    def _name(self, *parts: str) -> str:
        """Return a path below the root as it is printed: readable and in one line."""
        name = os.path.relpath(os.path.join(*parts), self.root).replace(os.sep, "/")
        name = os.fsencode(name).decode("utf-8", "backslashreplace")
        return CONTROL.sub(lambda found: repr(found[0])[1:-1], name)

    def _unreadable(self, error: OSError) -> None:
        self.rejected[self._name(error.filename)] = f"cannot be read: {error.strerror}"

    def _problem(self, path: str) -> str:
        """Return why no file is read; nothing if it is."""
        if problem := name_problem(os.path.basename(path)):
            return problem
        if os.path.islink(path) and not Path(path).resolve().is_relative_to(self.root.resolve()):
            return "a symbolic link out of the folder"
        # Opening a pipe would wait for a writer for ever.
        return "" if stat.S_ISREG(os.stat(path).st_mode) else "not a regular file"

    def _add(self, path: str) -> None:
        name, suffix = self._name(path), _suffix(path)
        if os.path.basename(path) in METADATA:
            self._add_metadata(Path(path), name)
        elif suffix == ".txt":
            self.texts[name].append(_one_line(Path(path).read_bytes()))
        elif suffix == ".tar":
            self._add_tar(path, name)
        elif suffix in VIDEOS:
            self._add_video(name, path, [path], kind="video")
        elif suffix in PICTURES:
            self.rejected[name] = "a picture beside videos: put sequences into own folders"
        else:
            self.rejected[name] = f"not a video: its name ends in {suffix or 'no suffix'}"

    def _add_video(self, name: str, path: str, files: list[str], *, kind: Kind) -> None:
        stats = [os.stat(file) for file in files]
        size, modified = sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats)
        self.videos[name] = Source(
            name=name, path=path, kind=kind, captions=(), size=size, modified=modified
        )

    def _add_metadata(self, path: Path, shown: str) -> None:
        """Add the captions of a table; a line that cannot be read is rejected, the others count."""
        content = path.read_text(encoding="utf-8-sig", errors="replace")
        try:
            table = csv.DictReader(io.StringIO(content))
            rows = list(table) if path.suffix == ".csv" else content.split("\n")
        except csv.Error as error:
            self.rejected[shown] = f"not a table ({error})"
            return
        for number, line in enumerate(rows, start=1):
            try:
                row = json.loads(line) if isinstance(line, str) else line
                name = posixpath.join(posixpath.dirname(shown), row["file_name"])
                self.texts[posixpath.normpath(name)] += _captions_in(row)
            except (ValueError, KeyError, TypeError, AttributeError):
                if line:
                    self.rejected[f"{shown}, row {number}"] = "no file_name"

    def _add_tar(self, path: str, shown: str) -> None:
        """Add the videos of a WebDataset tar: members of one name up to the first dot belong."""
        modified, found = os.stat(path).st_mtime_ns, list[tuple[str, Source]]()
        texts = defaultdict[str, list[str]](list)
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    head, tail = posixpath.split(member.name)
                    stem, _, suffix = tail.partition(".")
                    key, name = posixpath.join(head, stem), posixpath.join(shown, member.name)
                    if member.isdir():
                        continue
                    problem = name_problem(tail) if member.isfile() else "not a regular file"
                    if problem:
                        self.rejected[name] = problem
                    elif suffix in ("txt", "json") and member.size < 2**20:
                        content = tar.extractfile(member)
                        assert content is not None
                        with contextlib.suppress(ValueError, AttributeError):
                            texts[key] += _captions_of(content.read(), suffix)
                    elif f".{suffix.lower()}" in VIDEOS:
                        place = {"size": member.size, "offset": member.offset_data}
                        about = {"name": name, "path": path, "modified": modified}
                        found.append((key, Source(kind="video", captions=(), **about, **place)))
                    else:
                        self.rejected[name] = f"not a video: its name ends in .{suffix}"
        except (tarfile.TarError, OSError, EOFError) as error:
            self.rejected[shown] = f"no tar, or cut short after {len(found)} videos ({error})"
        for key, source in found:
            self.videos[source.name] = replace(source, captions=tuple(texts[key]))


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def name_problem(name: str) -> str:
    """Return why no file of this name is read; nothing if it is."""
    if CONTROL.search(name):
        return "its name holds a line break or another control character: rename it"
    if name != name.encode("utf-8", "replace").decode():
        return "its name is not UTF-8: rename it"
    return "hidden" if name.startswith(".") else ""


def _one_line(text: bytes) -> str:
    return " ".join(text.decode("utf-8-sig", "replace").split())


def _captions_of(content: bytes, suffix: str) -> list[str]:
    return _captions_in(json.loads(content)) if suffix == "json" else [_one_line(content)]


def _captions_in(row: dict[str, Any]) -> list[str]:
    said = row.get("text", row.get("caption"))
    return [text for text in (said if isinstance(said, list) else [said]) if isinstance(text, str)]
