"""Footage with labels: words for what is there, for what happens, and for how things stand.

`labels.jsonl` has a line per video: `file_name`, the number of `frames`, and words for what is
there all along, such as `"color": "blue"`; lists of one word per frame for how things stand, null
where nobody can say; `captions`; `held_out`, if it is decided, true or false; and `parts`, from
frame `first` to `last`, with words for what happens there, and captions of their own. A video
without `parts` is one part.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from jaxtyping import Int, UInt8

from videoar.data.video import Frames, read_video
from videoar.encoders.codec import from_frames, to_frames
from videoar.evaluation.judge import Size
from videoar.files import Json

LABELS = "labels.jsonl"
TEXTS = {"file_name", "caption"}  # strings that are no words for what is seen
Words = dict[str, tuple[str, ...]]
"""Of each attribute, sorted."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a labelled video, or all of it."""

    path: Path
    first: int
    last: int
    things: dict[str, str] = field(default_factory=dict)
    """Words for what is there all along."""
    deeds: dict[str, str] = field(default_factory=dict)
    """Words for what happens."""
    states: dict[str, list[str | None]] = field(default_factory=dict)
    """For each frame from `first` to `last`."""
    caption: str
    held_out: bool

    def clip(self, count: int, *, size: int | Size, fps: float | None = None) -> Frames:
        """Return so many frames of a size: at a rate, or from the first to the last one.

        Where the part is over, its last frame is held.
        """
        video, last = read_video(self.path), self.last - self.first
        moments = spread(last, count)
        if fps is not None:
            moments = np.round(np.arange(count) * video.fps / fps).astype(int).clip(max=last)
        return shrunk(video.frames[self.first + moments], size)

    def told(self) -> Json:
        """Return what a video of this part has to show."""
        stand = {name: outline(words) for name, words in self.states.items()}
        return self.things | self.deeds | stand


def spread(last: int, count: int) -> Int[np.ndarray, " count"]:
    """Return so many numbers from 0 to `last`."""
    return np.linspace(0, last, count).round().astype(int)


def shrunk(frames: Frames, size: int | Size) -> UInt8[np.ndarray, "frames _ _ 3"]:
    """Return frames of a height and width, or as squares."""
    if frames.shape[1:3] == tuple(np.broadcast_to(size, 2)):
        return frames
    video = from_frames(np.ascontiguousarray(frames))
    return to_frames(F.interpolate(video, size, mode="bilinear", antialias=True))


def outline(states: Sequence[str | None]) -> list[str]:
    """Return the first word, and the last other one: what a change led to, if it did not stay."""
    known = [word for word in states if word is not None]
    return known[:1] + [word for word in known if word != known[0]][-1:]


def read_labels(
    folder: Path, *, only: Sequence[str] = (), apart: Sequence[str] = (), share: float = 0.0
) -> list[Part]:
    """Read the labels of a folder.

    Args:
        folder: that holds `labels.jsonl` and the videos.
        only: attributes to read; all by default.
        apart: attributes of a whole video; videos that agree in them are held out together. By
            default each is for itself.
        share: of the videos to hold out. Which these are does not depend on what else is there.

    Raises:
        ValueError: what is missing or cannot be read.
    """
    file, parts = folder / LABELS, list[Part]()
    if not file.is_file():
        raise ValueError(
            f"{file} is missing: write a line for each video, with its file_name, the number of its"
            " frames, and words for what it shows"
        )
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            key = "/".join(row[name] for name in apart or ("file_name",))
            drawn = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) / 2**32
            held_out = row.get("held_out", drawn < share)
            parts += _parts(row, folder, held_out=held_out, only=only)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"line {number} of {file} labels no video ({what})") from error
    return parts


def _parts(row: Json, folder: Path, *, held_out: bool, only: Sequence[str]) -> Iterator[Part]:
    def words(values: Json) -> dict[str, str]:
        names = (set(only) or values.keys()) - TEXTS
        return {k: v for k, v in values.items() if k in names and isinstance(v, str)}

    lists = {k: v for k, v in row.items() if isinstance(v, list) and len(v) == row["frames"]}
    states = {k: v for k, v in lists.items() if words({k: next(filter(None, v), None)})}
    for part in row.get("parts") or [{}]:
        first, last = part.get("first", 0), part.get("last", row["frames"] - 1)
        if not 0 <= first < last < row["frames"]:
            raise ValueError(f"frames {first} to {last} of {row['frames']}")
        yield Part(
            path=folder / row["file_name"],
            first=first,
            last=last,
            things={k: v for k, v in words(row).items() if k not in part},
            deeds=words(part),
            states={k: v[first : last + 1] for k, v in states.items()},
            caption=(part.get("captions") or row.get("captions") or [""])[0],
            held_out=held_out,
        )


def vocabulary(parts: Sequence[Part], kind: str) -> Words:
    """Return the words of `things`, `deeds` or `states`; what is always the same is left out."""
    found: dict[str, set[str]] = {}
    for part in parts:
        for name, value in getattr(part, kind).items():
            words = {value} if isinstance(value, str) else set(value) - {None}
            found.setdefault(name, set()).update(words)
    return {name: tuple(sorted(words)) for name, words in found.items() if len(words) > 1}
