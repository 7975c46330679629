"""Video files and pictures of videos: read, write as a stream, contact sheet, side by side.

Frames are uint8 arrays, `frames height width 3`. Nothing here knows of tensors or models.
"""

import base64
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
from av.container import Flags, InputContainer
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from videoar.checks import check_types, checked
from videoar.files import check_place

Frames = UInt8[np.ndarray, "frames height width 3"]
Picture = UInt8[np.ndarray, "rows columns 3"]

STREAMS = (".mp4", ".mkv")
PICTURES = (".webp", ".gif", ".png")
PAPER, INK = 224, 0  # not white: a white clip must have an edge


@dataclass(frozen=True, kw_only=True, eq=False)
class Video:
    """Frames, at least one, and how many pass in a second."""

    frames: Frames
    fps: float
    seed: int | None = None
    """Of its noise, if it was generated."""

    def __post_init__(self) -> None:
        check_types(self)
        if len(self.frames) == 0:
            raise ValueError("the video has 0 frames; it needs at least 1")
        if not self.fps > 0:
            raise ValueError(f"fps is {self.fps}; it must be above 0")

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


class VideoWriter:
    """A video file that is written frame by frame, in bounded memory.

    Frames go to a hidden file beside the target. At the end, also when the user interrupts, that
    file is closed properly and gets its name, so what was generated can be watched. After any other
    error it keeps its hidden name. Without a single frame there is no file. Animations and contact
    sheets are written in one piece: until the end their frames are held in memory.
    """

    @checked
    def __init__(self, path: str | Path, *, fps: float, overwrite: bool = False) -> None:
        self.path = check_output(path, overwrite=overwrite)
        # Its suffix says of what kind it is.
        self.partial = self.path.with_name(f".{self.path.name}.partial{self.path.suffix}")
        self.fps, self.num_frames = fps, 0
        self._size, self._held = (0, 0), list[Frames]()
        self._container, kind = None, self.path.suffix.lower()
        if kind not in STREAMS:
            return
        rate = Fraction(fps).limit_denominator(1001)  # 23.976 is meant as 24000/1001
        # Nothing is written before the first frame, which gives the size.
        self._container = av.open(str(self.partial), "w")
        self._container.flags |= Flags.bitexact.value  # no date, no random name
        if kind == ".mkv":
            self._stream = self._container.add_stream("ffv1", rate=rate)
            self._stream.pix_fmt = "bgr0"
        else:
            # crf 16 shows no artefacts on flat colours; 4,400 frames/s of 64x64 on one core
            # (preset ultrafast: 6,700 frames/s in three times the size).
            options = {"crf": "16", "preset": "veryfast"}
            self._stream = self._container.add_stream("libx264", rate=rate, options=options)
            self._stream.pix_fmt = "yuv420p"
            # Untagged files are shown in one matrix by some players and in another by others.
            context = self._stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
            context.color_range = 1  # luma in 16..235

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        watched = kind is None or issubclass(kind, KeyboardInterrupt)
        if self._container is not None:
            with self._container:
                if self.num_frames:
                    self._container.mux(self._stream.encode())
        elif self.num_frames and watched:
            _save_picture(np.concatenate(self._held), self.fps, self.partial)
        if self.num_frames == 0:
            self.partial.unlink(missing_ok=True)
        elif watched:
            os.replace(self.partial, self.path)

    def write(self, frames: Frames) -> None:
        """Append frames; all must have the size of the first."""
        if self._container is None:
            self._held.append(frames)
            self.num_frames += len(frames)
            return
        stream, lossy = self._stream, self.path.suffix.lower() == ".mp4"
        for frame in frames:
            height, width = frame.shape[:2]
            # Halved chroma needs even sizes. One more row or column is cheaper than 4:4:4, which
            # browsers and phones do not play.
            below, right = (height % 2, width % 2) if lossy else (0, 0)
            if self.num_frames == 0:
                self._size = (height, width)
                stream.height, stream.width = height + below, width + right
            if self._size != (height, width):
                raise ValueError(
                    f"a frame of {width}x{height} does not fit into a video of "
                    f"{self._size[1]}x{self._size[0]}; resize it or write another file"
                )
            if below or right:
                frame = np.pad(frame, ((0, below), (0, right), (0, 0)), mode="edge")
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if lossy:
                picture = picture.reformat(
                    format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
                )
            self._container.mux(stream.encode(picture))
            self.num_frames += 1


def check_output(path: str | Path, *, overwrite: bool) -> Path:
    """Return the path of a file that can be written; raise before any work if it cannot."""
    target = Path(path).expanduser()
    known, suffix = STREAMS + PICTURES, target.suffix or "no suffix"
    if suffix.lower() not in known:
        raise ValueError(f"{target.name!r} ends in {suffix!r}; use one of {', '.join(known)}")
    if target.is_dir():
        raise ValueError(f"{target} is a folder; give the name of a file in it")
    check_place(target.parent)
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists already; choose another name or pass overwrite=True")
    return target


def decode_frames(path: str | Path) -> Iterator[Picture]:
    """Yield the frames of a video file one after the other."""
    with _open_input(path) as container:
        try:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
        except av.FFmpegError as error:
            raise ValueError(f"{path} is damaged ({error.strerror}); copy it again") from error


def read_video(path: str | Path, *, max_frames: int = 10_000) -> Video:
    """Read a whole video file into memory; one with more than `max_frames` frames is refused."""
    with _open_input(path) as container:
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


def upscale(frames: Frames, factor: int) -> UInt8[np.ndarray, "frames rows columns 3"]:
    """Enlarge every pixel to a square: small frames stay sharp where players would blur them."""
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def contact_sheet(frames: Frames, *, columns: int = 8, gap: int = 2) -> Picture:
    """Lay frames out on one picture in the order of reading."""
    columns = min(columns, len(frames))
    empty = -len(frames) % columns
    # Every tile brings a margin above and to the left; the picture one below and to the right.
    tiles = np.pad(frames, ((0, empty), (gap, 0), (gap, 0), (0, 0)), constant_values=PAPER)
    sheet = rearrange(tiles, "(y x) h w c -> (y h) (x w) c", x=columns)
    return np.pad(sheet, ((0, gap), (0, gap), (0, 0)), constant_values=PAPER)


def side_by_side(videos: Sequence[Video], labels: Sequence[str], *, scale: int = 1) -> Video:
    """Show videos beside each other, enlarged, below their labels; short ones hold their end."""
    if len(videos) != len(labels):
        raise ValueError(f"{len(videos)} videos have {len(labels)} labels; give one to each video")
    kinds = sorted({(*video.frames.shape[1:3], video.fps) for video in videos})
    if len(kinds) > 1:
        raise ValueError(f"the videos must agree in (height, width, fps), but have {kinds}")
    moments = np.arange(max(len(video.frames) for video in videos))
    tiles = []
    for video, label in zip(videos, labels, strict=True):
        frames = upscale(video.frames[np.minimum(moments, len(video.frames) - 1)], scale)
        tiles.append(np.pad(frames, ((0, 0), (20, 0), (0, 0), (0, 0))))
        tiles[-1][:, :20] = _label(label, width=frames.shape[2])
    sheets = [contact_sheet(row, columns=len(videos), gap=4) for row in np.stack(tiles, axis=1)]
    return Video(frames=np.stack(sheets), fps=videos[0].fps)


def _label(text: str, *, width: int) -> Picture:
    """Draw one line of text, smaller if it is long, cut if it is longer still."""
    picture = Image.new("RGB", (width, 20), (PAPER,) * 3)
    draw = ImageDraw.Draw(picture)
    fonts = [ImageFont.load_default(size) for size in range(14, 7, -1)]
    font = next((font for font in fonts if draw.textlength(text, font) <= width), fonts[-1])
    draw.text((0, 10), text, fill=(INK,) * 3, font=font, anchor="lm")
    return np.asarray(picture)


def _save_picture(frames: Frames, fps: float, path: Path) -> None:
    count, kind = len(frames), path.suffix.lower()
    if kind == ".png":
        chosen = np.linspace(0, count - 1, min(count, 32)).round().astype(int)
        Image.fromarray(contact_sheet(frames[chosen])).save(path)
        return
    # These formats count whole milliseconds or hundredths of a second: round the moments and not
    # the durations, so that the error does not add up.
    unit = 10 if kind == ".gif" else 1
    moments = (np.arange(count + 1) * 1000 / fps / unit).round().astype(int) * unit
    durations = np.diff(moments).tolist()
    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0)


def _open_input(path: str | Path) -> InputContainer:
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


MAX_PICTURES = 1000  # of an animation or contact sheet, which is held in memory until complete


def open_output(path: Path, *, num_frames: int, fps: float) -> VideoWriter:
    """Return what writes a file of this kind; one that exists is replaced."""
    if path.suffix.lower() in PICTURES and num_frames > MAX_PICTURES:
        raise ValueError(
            f"a {path.suffix} of {num_frames} frames would be held in memory: make it "
            f"{MAX_PICTURES} frames or fewer, or write {' or '.join(STREAMS)}"
        )
    return VideoWriter(path, fps=fps, overwrite=True)
