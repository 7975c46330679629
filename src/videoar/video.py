"""Video files and pictures of videos: read, write as a stream, contact sheet, side by side.

Frames are uint8 arrays, `frames height width 3`. Nothing here knows of tensors or models.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from av.container import OutputContainer
from av.video.stream import VideoStream
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

STREAMS = (".mp4", ".mkv")
PICTURES = (".webp", ".gif", ".png")
BT709 = 1  # the number of this standard in H.264 and FFmpeg: matrix, primaries and transfer
LIMITED = 1  # luma in 16..235
PAPER, INK = 224, 0  # not white: a white clip must have an edge


@dataclass(frozen=True, kw_only=True, eq=False)
class Video:
    """Frames and how fast they go."""

    frames: UInt8[np.ndarray, "frames height width 3"]
    """At least one."""
    fps: float
    """Frames per second."""

    def __post_init__(self) -> None:
        if len(self.frames) == 0:
            raise ValueError("the video has 0 frames; it needs at least 1")
        if not self.fps > 0:
            raise ValueError(f"fps is {self.fps}; it must be above 0")

    @property
    def seconds(self) -> float:
        """Return the duration."""
        return len(self.frames) / self.fps

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a file of the kind that its suffix names.

        `.mp4` is H.264, `.mkv` lossless, `.webp` and `.gif` are animations for web pages, `.png`
        is a contact sheet of up to 32 frames in the order of reading.
        """
        target = check_output(path, overwrite=overwrite)
        if target.suffix.lower() in STREAMS:
            with VideoWriter(target, fps=self.fps, overwrite=overwrite) as writer:
                writer.write(self.frames)
            return target
        partial = _partial(target)
        try:
            _save_picture(self, partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        return target


class VideoWriter:
    """A video file that is written frame by frame, in bounded memory.

    Frames go to a hidden file beside the target. At the end, also when the user interrupts, that
    file is closed properly and gets its name, so what was generated can be watched. After any other
    error it keeps its hidden name. Without a single frame there is no file.
    """

    def __init__(self, path: str | Path, *, fps: float, overwrite: bool = False) -> None:
        self.path = check_output(path, overwrite=overwrite)
        if self.path.suffix.lower() not in STREAMS:
            raise ValueError(
                f"{self.path.name} cannot be written frame by frame; use {' or '.join(STREAMS)}"
            )
        self.partial = _partial(self.path)
        self.num_frames = 0
        # 23.976 is meant as 24000/1001.
        self._rate = Fraction(fps).limit_denominator(1001)
        self._size: tuple[int, int] | None = None
        self._container: OutputContainer | None = None
        self._stream: VideoStream | None = None

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._container is None:
            return
        try:
            if self._stream is not None:
                self._container.mux(self._stream.encode())
        finally:
            self._container.close()
        if self.num_frames == 0:
            self.partial.unlink(missing_ok=True)
        elif kind is None or issubclass(kind, KeyboardInterrupt):
            os.replace(self.partial, self.path)

    def write(self, frames: UInt8[np.ndarray, "frames height width 3"]) -> None:
        """Append frames; all must have the size of the first."""
        for frame in frames:
            height, width = frame.shape[:2]
            if self._size is None:
                self._size = (height, width)
                self._open(height=height, width=width)
            if self._size != (height, width):
                raise ValueError(
                    f"a frame of {width}x{height} does not fit into a video of "
                    f"{self._size[1]}x{self._size[0]}; resize it or write another file"
                )
            self._encode(frame)

    def _open(self, *, height: int, width: int) -> None:
        self._container = av.open(str(self.partial), "w")
        if self.path.suffix.lower() == ".mkv":
            stream = self._container.add_stream("ffv1", rate=self._rate)
            stream.pix_fmt = "bgr0"
        else:
            # crf 16 shows no artefacts on flat colours; 4,400 frames/s of 64x64 on one core
            # (preset ultrafast: 6,700 frames/s in three times the size).
            options = {"crf": "16", "preset": "veryfast"}
            stream = self._container.add_stream("libx264", rate=self._rate, options=options)
            stream.pix_fmt = "yuv420p"
            # Untagged files are shown in one matrix by some players and in another by others.
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = LIMITED
            # Halved chroma needs even sizes. One more row or column is cheaper than 4:4:4, which
            # browsers and phones do not play.
            height, width = height + height % 2, width + width % 2
        stream.height, stream.width = height, width
        self._stream = stream

    def _encode(self, frame: UInt8[np.ndarray, "height width 3"]) -> None:
        assert self._container is not None
        assert self._stream is not None
        below, right = self._stream.height - frame.shape[0], self._stream.width - frame.shape[1]
        if below or right:
            frame = np.pad(frame, ((0, below), (0, right), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        if self._stream.pix_fmt == "yuv420p":
            picture = picture.reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
            )
        self._container.mux(self._stream.encode(picture))
        self.num_frames += 1


def check_output(path: str | Path, *, overwrite: bool) -> Path:
    """Return the path of a file that can be written; raise before any work if it cannot."""
    target = Path(path).expanduser()
    known = STREAMS + PICTURES
    if target.suffix.lower() not in known:
        raise ValueError(
            f"{target.name!r} ends in {target.suffix or 'no suffix'!r}, which is no kind of video; "
            f"use one of {', '.join(known)}"
        )
    if target.is_dir():
        raise ValueError(f"{target} is a folder; give the name of a file in it")
    if not target.parent.is_dir():
        raise ValueError(f"the folder {target.parent} does not exist; create it first")
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"the folder {target.parent} is not writable; choose another one")
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists already; choose another name or pass --force")
    return target


def decode_frames(path: str | Path) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """Yield the frames of a video file one after the other."""
    with _open_input(path) as container:
        try:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
        except av.FFmpegError as error:
            raise ValueError(
                f"{path} is damaged ({error.strerror}); copy or encode it again"
            ) from error


def read_video(path: str | Path, *, max_frames: int = 10_000) -> Video:
    """Read a whole video file into memory; one with more than `max_frames` frames is refused."""
    with _open_input(path) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
    if rate is None:
        raise ValueError(f"{path} does not give its frames per second; encode it again")
    frames: list[UInt8[np.ndarray, "height width 3"]] = []
    for frame in decode_frames(path):
        if len(frames) == max_frames:
            raise ValueError(
                f"{path} has more than {max_frames} frames; raise max_frames or read it in parts "
                f"with decode_frames"
            )
        frames.append(frame)
    if not frames:
        raise ValueError(f"{path} has no frame that can be decoded; encode it again")
    return Video(frames=np.stack(frames), fps=float(rate))


def upscale(
    frames: UInt8[np.ndarray, "frames height width 3"], factor: int
) -> UInt8[np.ndarray, "frames rows columns 3"]:
    """Enlarge every pixel to a square: small frames stay sharp where players would blur them."""
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def contact_sheet(
    frames: UInt8[np.ndarray, "frames height width 3"], *, columns: int = 8, gap: int = 2
) -> UInt8[np.ndarray, "rows columns 3"]:
    """Lay frames out on one picture in the order of reading."""
    columns = min(columns, len(frames))
    empty = -len(frames) % columns
    # Every tile brings a margin above and to the left; the picture one below and to the right.
    tiles = np.pad(frames, ((0, empty), (gap, 0), (gap, 0), (0, 0)), constant_values=PAPER)
    if empty:
        tiles[-empty:] = PAPER
    sheet = rearrange(tiles, "(y x) h w c -> (y h) (x w) c", x=columns)
    return np.pad(sheet, ((0, gap), (0, gap), (0, 0)), constant_values=PAPER)


def side_by_side(
    videos: Sequence[Video], labels: Sequence[str], *, columns: int | None = None, scale: int = 1
) -> Video:
    """Show videos of one size beside each other, each below its label; short ones hold their end.

    Args:
        videos: of one frame size and speed.
        labels: one for each.
        columns: videos in a row; all of them by default.
        scale: pixels are enlarged to squares of this size.
    """
    if not videos or len(videos) != len(labels):
        raise ValueError(
            f"{len(videos)} videos have {len(labels)} labels; give one label to each video, and at "
            f"least one video"
        )
    kinds = sorted({(*video.frames.shape[1:3], video.fps) for video in videos})
    if len(kinds) > 1:
        raise ValueError(
            f"the videos differ in (height, width, fps): {kinds[0]} and {kinds[1]}; show only "
            f"videos of one size and speed side by side"
        )
    length = max(len(video.frames) for video in videos)
    tiles = []
    for video, label in zip(videos, labels, strict=True):
        frames = upscale(video.frames[np.minimum(np.arange(length), len(video.frames) - 1)], scale)
        bar = np.broadcast_to(
            _label(label, width=frames.shape[2]), (length, 20, frames.shape[2], 3)
        )
        tiles.append(np.concatenate([bar, frames], axis=1))
    sheets = [
        contact_sheet(moment, columns=columns or len(videos), gap=4)
        for moment in np.stack(tiles, axis=1)
    ]
    return Video(frames=np.stack(sheets), fps=videos[0].fps)


def _label(text: str, *, width: int) -> UInt8[np.ndarray, "20 width 3"]:
    """Draw one line of text, smaller if it is long, cut if it is longer still."""
    picture = Image.new("RGB", (width, 20), (PAPER,) * 3)
    draw = ImageDraw.Draw(picture)
    sizes = [size for size in range(14, 7, -1) if draw.textlength(text, _font(size)) <= width]
    draw.text((0, 10), text, fill=(INK,) * 3, font=_font(max(sizes, default=8)), anchor="lm")
    return np.asarray(picture)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _save_picture(video: Video, path: Path) -> None:
    count = len(video.frames)
    kind = path.suffix.lower().lstrip(".").upper()
    if kind == "PNG":
        chosen = np.linspace(0, count - 1, min(count, 32)).round().astype(int)
        Image.fromarray(contact_sheet(video.frames[chosen])).save(path)
        return
    # These formats count whole milliseconds or hundredths of a second: round the moments and not
    # the durations, so that the error does not add up.
    unit = 10 if kind == "GIF" else 1
    moments = (np.arange(count + 1) * 1000 / video.fps / unit).round().astype(int) * unit
    first, *rest = [Image.fromarray(frame) for frame in video.frames]
    durations = np.diff(moments).tolist()
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0)


def _partial(path: Path) -> Path:
    """Return the hidden name of a file in the making; it ends in the suffix that gives the kind."""
    return path.with_name(f".{path.name}.partial{path.suffix}")


def _open_input(path: str | Path) -> av.container.InputContainer:
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}; give the path of a video")
    try:
        container = av.open(str(path))
    except av.FFmpegError as error:
        raise ValueError(
            f"{path} is no video that FFmpeg knows ({error.strerror}); convert it to MP4 first"
        ) from error
    if not container.streams.video:
        container.close()
        raise ValueError(f"{path} has no video stream; give a file with pictures")
    return container
