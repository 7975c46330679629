"""Video files and pictures of videos: read, write as a stream, contact sheet.

Frames are uint8 arrays, `frames height width 3`. Nothing here knows of tensors or models.
"""

import base64
import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from itertools import islice
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image

from videoar.checks import Finite, Options, checked
from videoar.data.fragments import Frames, encode, remux
from videoar.files import Json, check_place, written_whole

Picture = UInt8[np.ndarray, "rows columns 3"]

STREAMS = {".mp4": "mp4", ".mkv": "matroska"}
"""Suffixes, and the names of these containers."""
PICTURES = (".webp", ".gif", ".png")
GROUP = 32
"""Frames of a fragment: what is lost if the process is killed, and has no state."""
PAPER = 224  # not white: a white clip must have an edge


@dataclass(frozen=True, kw_only=True, eq=False)
class Video(Options):
    """Frames, at least one, and how many pass in a second."""

    frames: Frames
    fps: Finite
    seed: int | None = None
    """Of its noise, if it was generated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.frames) == 0:
            raise ValueError("the video has 0 frames; it needs at least 1")

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        noise = "" if self.seed is None else f", seed {self.seed}"
        size = f"{count} frames of {width}x{height}, {count / self.fps:.2f} s at {self.fps:g} fps"
        return f"<Video: {size}{noise}>"

    def _repr_html_(self) -> str:
        """Show it in a notebook."""
        with tempfile.TemporaryDirectory() as folder:
            data = self.save(Path(folder) / "video.mp4").read_bytes()
        url = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
        return f'<video controls loop width="{max(256, self.frames.shape[2])}" src="{url}"></video>'

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a file of the kind that its suffix names.

        `.mp4` is H.264, `.mkv` lossless, `.webp` and `.gif` are animations for web pages, `.png`
        is a contact sheet of up to 32 frames in the order of reading.
        """
        with VideoWriter(path, fps=self.fps, overwrite=overwrite) as writer:
            writer.write(self.frames)
        return writer.path


@dataclass(frozen=True)
class _Written:
    """What is whole in a file of fragments."""

    size: int = 0
    """Bytes."""
    frames: int = 0
    fragments: int = 0


class VideoWriter(AbstractContextManager["VideoWriter"]):
    """A video file that is written frame by frame, in bounded memory.

    Frames go to a hidden file beside the target, in fragments of `GROUP` frames, so that it plays
    at every moment. At the end it is written anew in one piece and gets its name. However it ends,
    on a full disk too, what was finished has that name and plays; without a frame there is no file.
    Animations and contact sheets are written in one piece: until then their frames are held in
    memory.

    Args:
        path: of the file to write.
        fps: frames per second.
        overwrite: replace what is there, and what a killed process left under the hidden name.
        state: from `state_dict`: go on with that file.

    Raises:
        ValueError: the file cannot be written, or is not that of the state.
    """

    @checked
    def __init__(
        self, path: str | Path, *, fps: float, overwrite: bool = False, state: Json | None = None
    ) -> None:
        self.path = check_output(path, overwrite=overwrite or state is not None)
        self.partial, self.kind = _partial(self.path), self.path.suffix.lower()
        self.fps, self._resumable = fps, False
        self._written, self._pending = _Written(), list[Picture]()  # frames not yet in the file
        self._size, self._file = tuple[int, int](), None
        if state is not None:
            self._written, self._pending = _Written(*state["written"]), list(state["pending"])
            os.replace(self._holding(state["tail"]), self.partial)
        if self.kind in STREAMS:
            self._file = FileIO(self.partial, "w+" if state is None else "r+")

    @property
    def num_frames(self) -> int:
        return self._written.frames + len(self._pending)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is None:
            if self._pending:
                with written_whole(self.path) as partial:
                    _save_picture(np.stack(self._pending), self.fps, partial, self.kind[1:])
            return
        try:
            if self._pending:
                self._put(self._file, len(self._pending))
        finally:
            self._pending.clear()
            self._file.truncate(self._written.size)
            self._file.close()
            self._name(in_one_piece=kind is None or not self._resumable)

    def _name(self, *, in_one_piece: bool) -> None:
        """Give what is written its name."""
        if not self._written.frames:
            self.partial.unlink()
            return
        try:
            if in_one_piece:  # if there is room for it
                full = suppress(OSError, av.FFmpegError)
                with full, written_whole(self.partial) as whole:
                    remux(self.partial, whole, STREAMS[self.kind])
        finally:
            os.replace(self.partial, self.path)

    def write(self, frames: Frames) -> None:
        """Append frames; all must have the size of the first."""
        height, width = frames.shape[1:3]
        self._size = self._size or (height, width)
        if self._size != (height, width):
            raise ValueError(
                f"a frame of {width}x{height} does not fit into a video of "
                f"{self._size[1]}x{self._size[0]}; resize it or write another file"
            )
        self._pending += list(frames)
        while self._file is not None and len(self._pending) >= GROUP:
            self._put(self._file, GROUP)

    def _put(self, file: FileIO, count: int) -> None:
        """Append the first frames that wait; all of them, or none, are in the file."""
        done, frames = self._written, np.stack(self._pending[:count])
        place = {"first": done.frames, "index": done.fragments}
        part = encode(frames, fps=self.fps, lossless=self.kind == ".mkv", **place)
        data = part.body if done.frames else part.head + part.body
        file.seek(done.size)
        left = memoryview(data)
        while left:
            left = left[file.write(left) :]
        written = _Written(done.size + len(data), done.frames + count, done.fragments + 1)
        # Nothing interrupts between these two, so every frame is counted once.
        self._pending, self._written = self._pending[count:], written

    def state_dict(self) -> Json | None:
        """Return what another process needs to go on with the file; None before its first fragment.

        That much is on the disk, and from then on a file that does not come to its end stays in
        fragments, which can be added to.
        """
        check_streamed(self.path)
        if self._file is None or not self._written.frames:
            return None
        os.fsync(self._file.fileno())
        self._resumable, written = True, dataclasses.astuple(self._written)
        tail = _tail(self.partial, self._written.size)
        return {"written": written, "tail": tail, "pending": [*self._pending]}

    def _holding(self, tail: str) -> Path:
        """Find the file of a state under the name that it has now."""
        for file in (self.partial, self.path):
            if file.is_file() and _tail(file, self._written.size) == tail:
                return file
        raise ValueError(
            f"neither {self.path} nor {self.partial.name} is the video that the state goes on with:"
            " put it back, or begin anew"
        )


def _tail(file: Path, size: int) -> str:
    """Return a hash of the last bytes before `size`: who has them has what lies before."""
    with file.open("rb") as read:
        read.seek(max(0, size - 2**16))
        return hashlib.sha256(read.read(min(size, 2**16))).hexdigest()


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial.mp4")


def check_output(path: str | Path, *, overwrite: bool) -> Path:
    """Return the path of a file that can be written; raise before any work if it cannot."""
    target = Path(path).expanduser()
    known, suffix = (*STREAMS, *PICTURES), target.suffix or "no suffix"
    if suffix.lower() not in known:
        raise ValueError(f"{target.name!r} ends in {suffix!r}; use one of {', '.join(known)}")
    if target.is_dir():
        raise ValueError(f"{target} is a folder; give the name of a file in it")
    check_place(target.parent)
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists already; choose another name or pass overwrite=True")
    if _partial(target).exists() and not overwrite:
        raise ValueError(
            f"{_partial(target)} is what another process writes, or left when it was killed (it"
            " plays): rename it, choose another name, or pass overwrite=True"
        )
    return target


def check_streamed(path: Path) -> None:
    """Raise unless a file of this kind can be gone on with."""
    if path.suffix.lower() not in STREAMS:
        raise ValueError(
            f"{path.name} is written in one piece at its end, so it has no state: write"
            f" {' or '.join(STREAMS)}"
        )


def decode_frames(path: str | Path) -> Iterator[Picture]:
    """Yield the frames of a video file one after the other."""
    with _opened(path) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def read_video(path: str | Path, *, max_frames: int = 10_000) -> Video:
    """Read a whole video file into memory; one with more than `max_frames` frames is refused."""
    with _opened(path) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
    if rate is None:
        raise ValueError(f"{path} does not give its frames per second; encode it again")
    frames = list(islice(decode_frames(path), max_frames + 1))
    if len(frames) > max_frames:
        raise ValueError(
            f"{path} has more than {max_frames} frames; raise max_frames or use decode_frames"
        )
    if not frames:
        raise ValueError(f"{path} has no frame that can be decoded; encode it again")
    return Video(frames=np.stack(frames), fps=float(rate))


def contact_sheet(frames: Frames, *, columns: int = 8, gap: int = 2) -> Picture:
    """Lay frames out on one picture in the order of reading."""
    columns = min(columns, len(frames))
    empty = -len(frames) % columns
    # Every tile brings a margin above and to the left; the picture one below and to the right.
    tiles = np.pad(frames, ((0, empty), (gap, 0), (gap, 0), (0, 0)), constant_values=PAPER)
    sheet = rearrange(tiles, "(y x) h w c -> (y h) (x w) c", x=columns)
    return np.pad(sheet, ((0, gap), (0, gap), (0, 0)), constant_values=PAPER)


def save_sheet(frames: Frames, path: Path, *, columns: int) -> None:
    """Write a contact sheet as a file of its own."""
    Image.fromarray(contact_sheet(frames, columns=columns)).save(path)


def _save_picture(frames: Frames, fps: float, path: Path, kind: str) -> None:
    count = len(frames)
    if kind == "png":
        chosen = np.linspace(0, count - 1, min(count, 32)).round().astype(int)
        Image.fromarray(contact_sheet(frames[chosen])).save(path, kind)
        return
    # These formats count whole milliseconds or hundredths of a second: round the moments and not
    # the durations, so that the error does not add up.
    unit = 10 if kind == "gif" else 1
    moments = (np.arange(count + 1) * 1000 / fps / unit).round().astype(int) * unit
    durations = np.diff(moments).tolist()
    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(path, kind, save_all=True, append_images=rest, duration=durations, loop=0)


@contextmanager
def _opened(path: str | Path) -> Iterator[InputContainer]:
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}; give the path of a video")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video stream; give a file with pictures")
            yield container
    except av.FFmpegError as error:
        raise ValueError(
            f"{path} is no video that FFmpeg knows, or damaged ({error.strerror}); convert it to"
            " MP4 or copy it again"
        ) from error


MAX_PICTURES = 1000  # of an animation or contact sheet, which is held in memory until complete


def open_output(path: Path, *, num_frames: int, fps: float) -> VideoWriter:
    """Return what writes a file of this kind; one that exists is replaced."""
    if path.suffix.lower() in PICTURES and num_frames > MAX_PICTURES:
        raise ValueError(
            f"a {path.suffix} of {num_frames} frames would be held in memory: make it "
            f"{MAX_PICTURES} frames or fewer, or write {' or '.join(STREAMS)}"
        )
    return VideoWriter(path, fps=fps, overwrite=True)
