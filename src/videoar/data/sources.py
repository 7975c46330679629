"""Videos as people keep them: which there are, what they are called, and what is no video.

A source is a file, a member of a tar or a folder of pictures. Nothing here decodes one.
"""

import csv
import hashlib
import io
import json
import os
import posixpath
import re
import stat
import tarfile
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from videoar.checks import explained
from videoar.data.containers import is_video

# So named, a file is tried even where it does not look like a video; all others if they do.
VIDEOS = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .gif .webp .ts .m2ts .mpg .mpeg .flv .wmv .ogv .3gp".split()
)
PICTURES = frozenset(".png .jpg .jpeg .bmp .tif .tiff".split())
METADATA = ("metadata.jsonl", "metadata.csv")
TWICE = "its key came before in the tar, and the first is used: give each sample a key of its own"
CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One video: where it is and what it shows."""

    name: str
    """Path below the folder of videos; for a member of a tar, its name below that of the tar."""
    path: str
    captions: tuple[str, ...]
    size: int
    """Bytes."""
    pictures: tuple[str, ...] = ()
    """File names of the frames in the folder `path`, if it is one."""
    offset: int = 0
    """Where the bytes begin in the file."""
    modified: int = 0
    """Of the file, in nanoseconds."""

    @property
    def place(self) -> tuple[str, int, int]:
        """Where the bytes are: file, first of them, and how many."""
        return self.path, self.offset, self.size

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

    Raises:
        ValueError: there is no such folder.
    """
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}: name the folder of your videos")
    walk = _Walk(root)
    found = Listing(rejected=walk.rejected)
    for name, source in sorted(walk.videos.items()):
        beside = f"{name if source.pictures else posixpath.splitext(name)[0]}.txt"
        keys = (_key(name), _key(beside))
        said = [text for key in keys for _, text in walk.texts.get(key, []) if text]
        said = [""] if captions == "none" else said
        if source.size == 0:
            found.rejected[name] = "0 bytes"
        elif not said:
            found.rejected[name] = "no caption: add it to metadata.jsonl or a .txt of the same name"
        else:
            found.sources.append(replace(source, captions=tuple(said)))
    # What is said of a rejected video needs no reason of its own.
    names = {*walk.videos, *found.rejected}
    names |= {f"{stem}.txt" for name in names for stem in (name, posixpath.splitext(name)[0])}
    for key in walk.texts.keys() - set(map(_key, names)):
        found.rejected.update((name, "a caption of no video") for name, _ in walk.texts[key])
    return found


class _Walk:
    """What is found on a walk through a folder, by name."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))
        self.videos: dict[str, Source] = {}
        self.texts = defaultdict[str, list[tuple[str, str]]](list)
        """Origins and captions, by the name of the video, or by that with the suffix .txt."""
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
            sequence, paths = [], sorted(os.path.join(folder, name) for name in files)
            for path in sorted(paths, key=lambda path: _suffix(path) in PICTURES):
                try:
                    if problem := self._problem(path):
                        self.rejected[self._name(path)] = problem
                    elif _suffix(path) in PICTURES and not posters:
                        sequence.append(os.path.basename(path))
                    else:
                        self._add(path)
                        posters = posters or self._name(path) in self.videos
                except OSError as error:
                    self._unreadable(error)
                except (ValueError, csv.Error) as error:
                    self.rejected[self._name(path)] = str(error)
            if sequence:
                self._add_video(self._name(folder), folder, tuple(sequence))

    def _name(self, *parts: str) -> str:
        """Return a path below the root as it is printed: readable and in one line."""
        return _printable(os.path.relpath(os.path.join(*parts), self.root).replace(os.sep, "/"))

    def _unreadable(self, error: OSError) -> None:
        self.rejected[self._name(error.filename)] = f"cannot be read: {error.strerror}"

    def _problem(self, path: str) -> str:
        """Return why no file is read; nothing if it is."""
        if problem := name_problem(os.path.basename(path)):
            return problem
        if os.path.islink(path):
            if not os.path.exists(path):
                return "a symbolic link whose target is missing: put the file in its place"
            if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.root)):
                return "a symbolic link out of the folder"
        # Opening a pipe would wait for a writer for ever.
        return "" if stat.S_ISREG(os.stat(path).st_mode) else "not a regular file"

    def _add(self, path: str) -> None:
        name, suffix = self._name(path), _suffix(path)
        if os.path.basename(path) in METADATA:
            self._add_metadata(_text(Path(path).read_bytes()), name)
        elif suffix == ".txt":
            self._add_text(posixpath.splitext(name)[0], name, Path(path).read_bytes(), suffix)
        elif suffix == ".tar":
            self._add_tar(path, name)
        elif suffix in PICTURES:
            self.rejected[name] = "a picture beside videos: put sequences into own folders"
        elif suffix in VIDEOS or is_video(path, 0, os.stat(path).st_size):
            self._add_video(name, path)
        else:
            self.rejected[name] = f"not a video: its name ends in {suffix or 'no suffix'}"

    def _add_video(self, name: str, path: str, pictures: tuple[str, ...] = ()) -> None:
        stats = [os.stat(os.path.join(path, file)) for file in pictures or [path]]
        size, modified = sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats)
        about = {"name": name, "path": path, "pictures": pictures}
        self.videos[name] = Source(captions=(), size=size, modified=modified, **about)

    def _add_metadata(self, content: str, shown: str) -> None:
        """Add the captions of a table; a line that cannot be read is rejected, the others count."""
        rows: list[Any] = content.split("\n")
        if shown.endswith(".csv"):
            table = csv.DictReader(io.StringIO(content))
            if "file_name" not in (table.fieldnames or ()):
                columns = ", ".join(table.fieldnames or ())
                raise ValueError(f"no column file_name, but {columns}: put commas between columns")
            rows = list(table)
        for number, line in enumerate(rows, start=1):
            try:
                row = _parse(line) if isinstance(line, str) else line
                if not isinstance(row.get("file_name"), str):
                    raise ValueError("no file_name")
                name = posixpath.join(posixpath.dirname(shown), row["file_name"])
                name = posixpath.normpath(name)
                self.texts[_key(name)] += [(name, text) for text in _captions_in(row)]
            except ValueError as error:
                if line:
                    self.rejected[f"{shown}, row {number}"] = str(error)

    def _add_tar(self, path: str, shown: str) -> None:
        """Add the videos of a WebDataset tar: members of one name up to the first dot belong.

        Where a member comes again, a second sample of the name begins, of which nothing is used.
        """
        modified, before = os.stat(path).st_mtime_ns, len(self.videos)
        seen, again = Counter[str](), set[str]()
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    inside = posixpath.normpath(member.name).lstrip("/")
                    name = _printable(f"{shown}/{inside}")
                    head, tail = posixpath.split(name)
                    stem, _, suffix = tail.partition(".")
                    suffix = f".{suffix.lower()}"
                    if member.isdir():
                        continue
                    seen[name] += 1
                    if seen[name] > 1 or posixpath.join(head, stem) in again:
                        again.add(posixpath.join(head, stem))
                        self.rejected[f"{name}, time {seen[name]}"] = TWICE
                        continue
                    problems = filter(None, map(name_problem, inside.split("/")))
                    if problem := next(problems, "" if member.isfile() else "not a regular file"):
                        self.rejected[name] = problem
                    elif suffix in (".txt", ".json") and member.size < 2**20:
                        content = tar.extractfile(member)
                        assert content is not None
                        self._add_text(posixpath.join(head, stem), name, content.read(), suffix)
                    elif suffix in VIDEOS or is_video(path, member.offset_data, member.size):
                        place = {"size": member.size, "offset": member.offset_data}
                        about = {"name": name, "path": path, "modified": modified}
                        self.videos[name] = Source(captions=(), **about, **place)
                    else:
                        self.rejected[name] = f"not a video: its name ends in {suffix}"
        except (tarfile.TarError, OSError, EOFError) as error:
            found = len(self.videos) - before
            self.rejected[shown] = f"no tar, or cut short after {found} videos ({error})"

    def _add_text(self, stem: str, name: str, content: bytes, suffix: str) -> None:
        """Add the captions of a file beside the video."""
        try:
            text = _text(content)
            said = _captions_in(_parse(text)) if suffix == ".json" else [" ".join(text.split())]
            self.texts[_key(f"{stem}.txt")] += [(name, caption) for caption in said]
        except ValueError as error:
            self.rejected[name] = str(error)


def _key(name: str) -> str:
    """Return a name in one form: disks and tables write accents in two, which look alike."""
    return unicodedata.normalize("NFC", name)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def name_problem(name: str) -> str:
    """Return why no file of this name is read; nothing if it is."""
    if CONTROL.search(name):
        return "its name holds a line break or another control character: rename it"
    if name != name.encode("utf-8", "replace").decode():
        return "its name is not UTF-8: rename it"
    return "hidden" if name.startswith(".") else ""


def _printable(name: str) -> str:
    name = os.fsencode(name).decode("utf-8", "backslashreplace")
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], name)


def _text(content: bytes) -> str:
    with explained("not UTF-8: save it in this encoding"):
        return content.decode("utf-8-sig").replace("\r\n", "\n")


def _parse(text: str) -> dict[str, Any]:
    with explained("not JSON that can be read ({})", ValueError, RecursionError):
        row = json.loads(text)
        json.dumps(row, ensure_ascii=False).encode()  # not so half a character
    return row if isinstance(row, dict) else {}


def _captions_in(row: dict[str, Any]) -> list[str]:
    said = row.get("text", row.get("caption"))
    return [text for text in (said if isinstance(said, list) else [said]) if isinstance(text, str)]
