"""What a source shows: frames at one rate and size, upright, one after the other.

Nothing here keeps a whole video or knows of latents.
"""

import contextlib
import io
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from PIL import Image, ImageOps

from videoar.data import containers
from videoar.data.colour import HLG, PQ, has_alpha, over_black, tone_map, without_unused
from videoar.data.containers import MAX_PIXELS, AbsurdSize, Unusable, check_size
from videoar.data.sources import Source
from videoar.data.video import Frames, Picture
from videoar.files import mistaken

MIN_KEPT = 0.25  # share of the picture that a crop must leave
# To shrink, means over areas alias as little as the bicubic filter and take half the time. Without
# the flag everything grey comes out darker by up to 2 of 255 levels.
SHRINK = Interpolation.AREA | Interpolation.FULL_CHR_H_INT
ENLARGE = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT
UNTAGGED = 2  # FFmpeg's number of the unspecified colour matrix
MAX_GAP = 10  # seconds; what timestamps skip beyond that was never filmed
ROUNDING = 1e-6  # of a frame: moments half-way between two frames fall to the same side
INTERLACED = "interlaced: used as it is, every other line a moment later; ffmpeg -vf bwdif mends it"
GUESSED = "time stamps that are missing or run backwards: counted on there, at the average rate"

Size = tuple[int, int]
"""Width and height."""
Fit = Literal["crop", "letterbox"]
"""How another shape is brought to a size: cut at the sides, or shown whole between bars."""


class _Raw(NamedTuple):
    """A frame as it is decoded; most are never looked at, so all else is found out later."""

    time: float
    duration: float
    frame: av.VideoFrame
    aspect: float
    """Width of a sample on the screen, of its height."""
    reach: float = MAX_GAP
    """Seconds after the frame before in which it goes on from it; below 0 where some are lost."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A frame at the wanted rate and size."""

    time: float
    """Seconds from the start of the source."""
    picture: Picture
    cut: bool
    """Whether it does not go on from the frame before."""


def read(
    source: Source,
    *,
    fps: float,
    sizes: Sequence[Size],
    fit: Fit = "crop",
    scene_cut: float | None = None,
    picture_fps: float | None = None,
    notes: list[str] | None = None,
) -> Iterator[Shown]:
    """Yield the frames of a source at `fps`, in the size of nearest shape.

    A frame of the result shows the source at its moment, by timestamps: the last frame that is at
    most half a frame later.

    Args:
        source: What to read.
        fps: Frames per second of the result.
        sizes: Widths and heights to choose from.
        fit: Whether frames are cropped at the centre, or as large as they fit into the size whole.
        scene_cut: Mean change of a pixel, of 1, that begins a new scene; None: only jumps of time.
        picture_fps: Pictures of a sequence per second; `fps` by default.
        notes: Where to add what is not as it should be, though it is used.

    Raises:
        Unusable: what comes next cannot be used; frames before that are right.
    """
    if source.pictures:
        raws = _sequence(source, _rate(picture_fps or fps))
    elif containers.is_webp(source.path, source.offset):
        raws = _animation(source)
    else:
        raws = _decode(source, [] if notes is None else notes)
    size, last, picture, scaler = None, None, None, VideoReformatter()
    for moment, raw, cut in _resample(raws, _rate(fps)):
        size = size or _choose(sizes, *_shape(raw), fit)
        if raw is not last:
            before, picture = picture, _fit(raw, *size, scaler)
            if scene_cut is not None and before is not None:
                change = np.abs(picture.astype(np.int16) - before).mean() / 255
                cut = cut or bool(change > scene_cut)
        assert picture is not None
        yield Shown(time=moment, picture=picture, cut=cut)
        last = raw


def _rate(fps: float) -> float:
    return float(Fraction(fps).limit_denominator(1001))  # 23.976 is meant as 24000/1001


def _resample(raws: Iterator[_Raw], fps: float) -> Iterator[tuple[float, _Raw, bool]]:
    """Yield moment, frame and whether time jumped, for every frame at the new rate."""
    begin = start = 0.0  # of the source, and of what goes on without a jump
    held, slot, count = None, 0, 0
    for raw in itertools.chain(raws, [None]):
        jump = held is None or raw is None or not -1 <= raw.time - held.time <= raw.reach
        if raw is None and count < 2:
            raise Unusable("a single frame" if count else "no frame that can be decoded")
        if held is not None:
            end = held.time + min(held.duration, MAX_GAP) if jump else raw.time
            until = max(slot, math.floor((end - start) * fps + 0.5 + ROUNDING))
            for k in range(slot, until):
                yield start - begin + k / fps, held, k == 0
            slot = until
        if jump and raw is not None:
            start, slot = raw.time, 0
            begin = begin if count else start
        held, count = raw, count + 1


def _shape(raw: _Raw) -> tuple[float, float]:
    """Return the width and height of the upright picture on a screen with square pixels."""
    width, height = raw.frame.width * raw.aspect, float(raw.frame.height)
    return (height, width) if _turns(raw) % 2 else (width, height)


def _turns(raw: _Raw) -> int:
    """Return by how many quarters the picture is to be turned."""
    return round(raw.frame.rotation / 90)


def _mirrored(raw: _Raw) -> bool:
    """Return whether the picture is to be turned upside down, before it is turned by quarters."""
    matrix: Any = raw.frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5] / 65536
    return bool(a * d < b * c)


def _choose(sizes: Sequence[Size], width: float, height: float, fit: Fit) -> Size:
    """Return the size whose shape is nearest, of which the crop leaves most; or what fits there."""

    def distance(size: Size) -> float:
        return abs(math.log(size[0] / size[1] / (width / height)))

    best = min(sizes, key=distance)
    if fit == "letterbox":
        scale = min(best[0] / width, best[1] / height)
        best = max(1, round(width * scale)), max(1, round(height * scale))
    if (kept := math.exp(-distance(best))) < MIN_KEPT:
        raise Unusable(
            f"absurd size: {width:.0f}x{height:.0f} cropped to the shape of"
            f" {best[0]}x{best[1]} leaves {kept:.0%} of the picture"
        )
    return best


def _fit(raw: _Raw, width: int, height: int, scaler: VideoReformatter) -> Picture:
    """Scale a frame so that it covers the size, and crop what stands over at both sides."""
    frame, (wide, high) = raw.frame, _shape(raw)
    scale = max(width / wide, height / high)
    wide, high = max(width, round(wide * scale)), max(height, round(high * scale))
    left, top = (wide - width) // 2, (high - height) // 2
    turns = _turns(raw)
    columns, rows = (high, wide) if turns % 2 else (wide, high)
    # Untagged videos are in the matrix of their time: BT.709 since there is HD.
    hd = frame.colorspace == UNTAGGED and frame.height >= 720
    matrix = Colorspace.ITU709 if hd else None
    flags = ENLARGE if 1.5 * columns >= frame.width else SHRINK
    if has_alpha(frame):  # what is transparent has a colour, too, that must not run into others
        size = frame.width, frame.height
        frame = over_black(scaler.reformat(frame, *size, "rgba", matrix, None, flags, threads=1))
    hdr = frame.color_trc in (PQ, HLG)
    if hdr and frame.colorspace == UNTAGGED:
        matrix = Colorspace.BT2020
    # Planes take half the time of packed pixels, and the result is the same.
    kind = "rgb48le" if hdr else "gbrp"
    small = scaler.reformat(frame, columns, rows, kind, matrix, None, flags, threads=1)
    seen = small.to_ndarray()
    seen = (tone_map(seen, frame) if hdr else seen)[:: -1 if _mirrored(raw) else 1]
    return np.rot90(seen, turns)[top : top + height, left : left + width]


def _decode(source: Source, notes: list[str]) -> Iterator[_Raw]:
    """Yield the frames of a container."""
    seconds = 0.0
    try:
        with containers.open_container(*source.place) as container:
            stream = containers.pictured(container)
            rate, unit = stream.average_rate or stream.guessed_rate or 25, float(stream.time_base)
            step = 1 / float(rate)
            aspect = float(stream.sample_aspect_ratio or 1)
            time, first = -step, None
            for frame, broken in containers.frames_of(stream, notes):
                at = math.nan if frame.pts is None else frame.pts * unit
                # Farther back another recording begins; a little, and its stamp is wrong.
                guessed = first is not None and not (at >= time or at < time - 1)
                time = time + step if guessed or math.isnan(at) else at
                for note, holds in ((INTERLACED, frame.interlaced_frame), (GUESSED, guessed)):
                    notes += [note] * (holds and note not in notes)
                first = time if first is None else first
                duration = frame.duration * unit or step
                seconds = time + duration - first
                check_size(frame.width, frame.height)
                if container.format.name == "avi":
                    frame = without_unused(frame)
                yield _Raw(time, duration, frame, aspect, -math.inf if broken else MAX_GAP)
            alone = len(container.streams) == 1  # else the length may be that of the sound
            declared = (stream.duration or 0) * unit
            declared = declared or (container.duration or 0) * alone / av.time_base
            if seconds < 0.9 * declared - 1:
                raise Unusable(f"cut short: it ends after {seconds:.1f} of {declared:.1f} s")
    except av.FFmpegError as error:
        after = f"damaged after {seconds:.1f} s" if seconds else "not a video, or damaged"
        other = mistaken(containers.first_bytes(source.path, source.offset))
        raise Unusable(other or f"{after} ({error.strerror})") from error
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror}") from error


def upright(image: Image.Image) -> Picture:
    """Return a picture as viewers show it: turned as its camera says, transparency on black."""
    check_size(*image.size)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, of which Pillow would cut the upper half
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGBA")
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return np.asarray(Image.alpha_composite(black, image).convert("RGB"))


def _still(image: Image.Image, time: float, duration: float) -> _Raw:
    return _Raw(time, duration, av.VideoFrame.from_ndarray(upright(image), "rgb24"), 1.0)


@contextlib.contextmanager
def readable(otherwise: str) -> Iterator[None]:
    """Say what a picture is if it cannot be read."""
    try:
        yield
    except Unusable:
        raise
    except Image.DecompressionBombError as error:
        raise AbsurdSize(f"absurd size: above {MAX_PIXELS / 1e6:.0f} million pixels") from error
    except Exception as error:  # Pillow's readers raise whatever a damaged file makes them
        raise Unusable(f"{otherwise} ({error})") from error


def _animation(source: Source) -> Iterator[_Raw]:
    """Yield the frames of an animated WebP, which FFmpeg does not read."""
    time = 0.0
    with readable("damaged after 0.0 s"), open(source.path, "rb") as file:
        file.seek(source.offset)
        with Image.open(io.BytesIO(file.read(source.size))) as image:
            for number in range(getattr(image, "n_frames", 1)):
                with readable(f"damaged after {time:.1f} s"):
                    image.seek(number)
                    image.load()
                    duration = (round(image.info.get("duration", 0)) or 100) / 1000
                    yield _still(image, time, duration)
                    time += duration


def _sequence(source: Source, fps: float) -> Iterator[_Raw]:
    """Yield the pictures of a folder in the order of their numbers."""

    def numbers(name: str) -> list[Any]:  # texts and numbers in turn, so that like meets like
        return [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", name)]

    for number, name in enumerate(sorted(source.pictures, key=numbers)):
        with readable(f"damaged at {name}"), Image.open(os.path.join(source.path, name)) as image:
            yield _still(image, number / fps, 1 / fps)


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
