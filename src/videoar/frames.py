"""What a source shows: frames at one rate and size, upright, one after the other.

Nothing here keeps a whole video or knows of latents.
"""

import contextlib
import io
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from jaxtyping import UInt8
from PIL import Image, ImageOps

from videoar.sources import PICTURES, Source, name_problem
from videoar.video import Frames, Picture

# Playlists name other files and addresses, and a text may pass for a film: neither is opened.
DEMUXERS = "mov,matroska,avi,gif,mpegts,mpeg,mpegvideo,flv,asf,ogg"
MIN_SIDE, MAX_PIXELS = 16, 2**26
MIN_KEPT = 0.25  # share of the picture that a crop must leave
# To shrink, means over areas alias as little as the bicubic filter and take half the time. Without
# the flag everything grey comes out darker by up to 2 of 255 levels.
SHRINK = Interpolation.AREA | Interpolation.FULL_CHR_H_INT
ENLARGE = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT
UNTAGGED = 2  # FFmpeg's number of the unspecified colour matrix
MAX_GAP = 10  # seconds; what timestamps skip beyond that was never filmed


class Unusable(ValueError):
    """Why a source, or what is left of it, cannot be used; never a fault of the program."""


@dataclass(frozen=True, kw_only=True)
class Raw:
    """A frame of a source, before it is resized."""

    time: Fraction
    duration: Fraction
    width: float
    """Shape of the upright picture on a screen with square pixels."""
    height: float
    scaled: Callable[[int, int], Picture]
    """The upright picture at a width and height."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A frame at the wanted rate and size."""

    time: float
    """Seconds from the start of the source."""
    picture: Picture
    cut: bool
    """Whether it does not go on from the frame before."""


class _Part(io.RawIOBase):
    """The bytes of a member of a tar, as a file."""

    def __init__(self, source: Source) -> None:
        self._file, self._source, self._at = open(source.path, "rb"), source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._source.size)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._source.offset + self._at)
        count = max(0, min(len(buffer), self._source.size - self._at))
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def read(
    source: Source,
    *,
    fps: float,
    sizes: Sequence[tuple[int, int]],
    scene_cut: float | None = None,
    max_seconds: float = math.inf,
    picture_fps: float | None = None,
) -> Iterator[Shown]:
    """Yield the frames of a source at `fps`, in the size of nearest shape, cropped at the centre.

    A frame of the result shows the source at its moment, by timestamps: the last frame that is at
    most half a frame later.

    Args:
        source: What to read.
        fps: Frames per second of the result.
        sizes: Widths and heights to choose from.
        scene_cut: Mean change of a pixel, of 1, that begins a new scene; None: only jumps of time.
        max_seconds: What is later is not used.
        picture_fps: Pictures of a sequence per second; `fps` by default.

    Raises:
        Unusable: what comes next cannot be used; frames before that are right.
    """
    rate = Fraction(fps).limit_denominator(1001)  # 23.976 is meant as 24000/1001
    if source.kind == "pictures":
        raws = _sequence(source, Fraction(picture_fps or fps).limit_denominator(1001))
    elif source.name.lower().endswith(".webp"):
        raws = _animation(source)
    else:
        raws = _decode(source)
    size, last, picture = None, None, None
    for moment, raw, cut in _resample(_limited(raws, max_seconds), rate):
        size = size or _choose(sizes, raw)
        if raw is not last:
            before, picture = picture, _fit(raw, *size)
            if scene_cut is not None and before is not None:
                change = np.abs(picture.astype(np.int16) - before).mean() / 255
                cut = cut or bool(change > scene_cut)
        assert picture is not None
        yield Shown(time=moment, picture=picture, cut=cut)
        last = raw


def _limited(raws: Iterator[Raw], max_seconds: float) -> Iterator[Raw]:
    count, first = 0, None
    for raw in raws:
        first = raw.time if first is None else first
        if raw.time - first > max_seconds:
            raise Unusable(f"longer than {max_seconds:g} s: the rest is not used")
        yield raw
        count += 1
    if count < 2:
        raise Unusable("a single frame" if count else "no frame that can be decoded")


def _resample(raws: Iterator[Raw], fps: Fraction) -> Iterator[tuple[float, Raw, bool]]:
    """Yield moment, frame and whether time jumped, for every frame at the new rate."""
    shot, last, begin = 0, None, None

    def number(raw: Raw) -> int:
        nonlocal shot, last
        if last is not None and not -1 <= raw.time - last <= MAX_GAP:
            shot += 1
        last = raw.time
        return shot

    for _, run in itertools.groupby(raws, key=number):
        held = first = next(run)
        begin = first.time if begin is None else begin
        slot = 0
        for raw in itertools.chain(run, [None]):
            end = held.time + min(held.duration, MAX_GAP) if raw is None else raw.time
            until = max(slot, math.floor((end - first.time) * fps + Fraction(1, 2)))
            for k in range(slot, until):
                yield float(first.time - begin + k / fps), held, k == 0
            held, slot = raw or held, until


def _choose(sizes: Sequence[tuple[int, int]], raw: Raw) -> tuple[int, int]:
    """Return the size whose shape is nearest, of which the crop leaves most."""

    def distance(size: tuple[int, int]) -> float:
        return abs(math.log(size[0] / size[1] / (raw.width / raw.height)))

    best = min(sizes, key=distance)
    if (kept := math.exp(-distance(best))) < MIN_KEPT:
        raise Unusable(
            f"absurd size: {raw.width:.0f}x{raw.height:.0f} cropped to the shape of"
            f" {best[0]}x{best[1]} leaves {kept:.0%} of the picture"
        )
    return best


def _fit(raw: Raw, width: int, height: int) -> Picture:
    """Scale a frame so that it covers the size, and crop what stands over at both sides."""
    scale = max(width / raw.width, height / raw.height)
    wide = max(width, round(raw.width * scale))
    high = max(height, round(raw.height * scale))
    left, top = (wide - width) // 2, (high - height) // 2
    return raw.scaled(wide, high)[top : top + height, left : left + width]


def _check_size(width: int, height: int) -> None:
    if not (min(width, height) >= MIN_SIDE and width * height <= MAX_PIXELS):
        raise Unusable(
            f"absurd size: {width}x{height}, but sides of {MIN_SIDE} or more and at most"
            f" {MAX_PIXELS / 1e6:.0f} million pixels are read"
        )


def _open(source: Source, stack: contextlib.ExitStack) -> Any:
    file = stack.enter_context(_Part(source)) if source.offset else source.path
    return stack.enter_context(av.open(file, options={"format_whitelist": DEMUXERS}))


def _decode(source: Source) -> Iterator[Raw]:
    """Yield the frames of a container."""
    seconds = 0.0
    try:
        with contextlib.ExitStack() as stack:
            container = _open(source, stack)
            pictured = [s for s in container.streams.video if not _is_cover(s)]
            if not pictured:
                raise Unusable("audio only" if container.streams.audio else "not a video")
            stream = pictured[0]
            if stream.codec_context is None:
                raise Unusable("its codec is not known")
            _check_size(stream.codec_context.width, stream.codec_context.height)
            stream.codec_context.thread_count = 1  # one process per core decodes
            first = None
            for raw in _frames_of(container, stream):
                first = raw.time if first is None else first
                seconds = float(raw.time + raw.duration - first)
                yield raw
            alone = len(container.streams) == 1  # else the length may be that of the sound
            declared = float(stream.duration * stream.time_base if stream.duration else 0)
            declared = declared or (container.duration or 0) * alone / av.time_base
            if seconds < 0.9 * declared - 1:
                raise Unusable(f"cut short: it ends after {seconds:.1f} of {declared:.1f} s")
    except av.FFmpegError as error:
        after = f"damaged after {seconds:.1f} s" if seconds else "not a video, or damaged"
        raise Unusable(f"{after} ({error.strerror})") from error
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror}") from error


def _is_cover(stream: Any) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _frames_of(container: Any, stream: Any) -> Iterator[Raw]:
    reformatter, step = VideoReformatter(), Fraction(1, stream.average_rate or 25)
    time, good = -step, False
    for frame in container.decode(stream):
        if frame.is_corrupt:
            if good:
                raise Unusable(f"damaged after {float(time):.1f} s (a frame is incomplete)")
            continue  # a recording may begin between two key frames
        good = True
        time = time + step if frame.pts is None else frame.pts * frame.time_base
        duration = frame.duration * frame.time_base if frame.duration else step
        _check_size(frame.width, frame.height)
        aspect, turns = stream.sample_aspect_ratio or 1, round(frame.rotation / 90)
        width, height = float(frame.width * aspect), float(frame.height)
        if turns % 2:
            width, height = height, width

        def scaled(wide: int, high: int, frame: Any = frame, turns: int = turns) -> Picture:
            if turns % 2:
                wide, high = high, wide
            # Untagged videos are in the matrix of their time: BT.709 since there is HD.
            hd = frame.colorspace == UNTAGGED and frame.height >= 720
            source = Colorspace.ITU709 if hd else None
            scaler = SHRINK if 1.5 * wide < frame.width else ENLARGE
            small = reformatter.reformat(frame, wide, high, "rgb24", source, None, scaler)
            return np.rot90(small.to_ndarray(), turns)

        yield Raw(time=time, duration=duration, width=width, height=height, scaled=scaled)


def _of_image(image: Image.Image, *, time: Fraction, duration: Fraction) -> Raw:
    _check_size(*image.size)
    whole = image.convert("RGB")

    def scaled(wide: int, high: int) -> UInt8[np.ndarray, "rows columns 3"]:
        return np.asarray(whole.resize((wide, high), Image.Resampling.BICUBIC))

    width, height = whole.size
    return Raw(time=time, duration=duration, width=width, height=height, scaled=scaled)


def _animation(source: Source) -> Iterator[Raw]:
    """Yield the frames of an animated WebP, which FFmpeg does not read."""
    time = Fraction(0)
    try:
        with Image.open(io.BufferedReader(_Part(source))) as image:
            _check_size(*image.size)
            for number in range(getattr(image, "n_frames", 1)):
                image.seek(number)
                image.load()
                duration = Fraction(round(image.info.get("duration", 0)) or 100, 1000)
                yield _of_image(image, time=time, duration=duration)
                time += duration
    except Unusable:
        raise
    except Exception as error:  # Pillow's readers raise whatever a damaged file makes them
        raise Unusable(f"damaged after {float(time):.1f} s ({error})") from error


def _sequence(source: Source, fps: Fraction) -> Iterator[Raw]:
    """Yield the pictures of a folder in the order of their numbers."""

    def numbers(name: str) -> list[tuple[int, int | str]]:
        parts = re.findall(r"\d+|\D+", name)
        return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]

    names = [n for n in os.listdir(source.path) if Path(n).suffix.lower() in PICTURES]
    names = [name for name in names if not name_problem(name)]
    for number, name in enumerate(sorted(names, key=numbers)):
        try:
            with Image.open(os.path.join(source.path, name)) as image:
                _check_size(*image.size)
                upright = ImageOps.exif_transpose(image)
                yield _of_image(upright, time=number / fps, duration=1 / fps)
        except Unusable:
            raise
        except Exception as error:  # see above
            raise Unusable(f"damaged at {name} ({error})") from error


def cut(
    frames: Iterator[Shown], *, lengths: Sequence[int], stride: int
) -> Iterator[tuple[float, Frames]]:
    """Yield start and frames of clips: the longest length every `stride` frames of a scene.

    What is left at the end of a scene gives one clip more if a shorter length fits.
    """
    longest, kept, skip = max(lengths), list[Shown](), 0

    def clip(length: int) -> tuple[float, Frames]:
        return kept[0].time, np.stack([frame.picture for frame in kept[:length]])

    for frame in itertools.chain(frames, [None]):
        if frame is None or frame.cut:
            if fitting := [length for length in lengths if length <= len(kept)]:
                yield clip(max(fitting))
            kept, skip = [], 0
        if frame is None:
            return
        if skip:
            skip -= 1
            continue
        kept.append(frame)
        if len(kept) == longest:
            yield clip(longest)
            kept, skip = kept[stride:], max(0, stride - longest)


def duration(source: Source) -> float:
    """Return the seconds that the header of a source promises; 0 if it does not say."""
    if source.kind == "pictures" or source.name.lower().endswith(".webp"):
        return 0.0
    try:
        with contextlib.ExitStack() as stack:
            return (_open(source, stack).duration or 0) / av.time_base
    except (av.FFmpegError, OSError):
        return 0.0
