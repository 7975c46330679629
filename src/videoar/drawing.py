"""Pictures of partitions: the order of generation, who reads whom, and a lattice that fills.

All of it is read from `Units`; a scheme that does not exist yet is drawn as well as those that do.
"""

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from videoar.units import Unit, Units, Visible, parse, token_mask

Color = tuple[int, int, int]
Place = tuple[int, int]


@dataclass(frozen=True)
class Paint:
    """What a cell of a picture shows."""

    unit: int
    """Cells of one unit lie close together."""
    token: Hashable
    """Cells of one token run into each other."""
    color: Color
    working: bool = False
    """Whether the unit gets a frame."""


PAPER, EMPTY, GREY, INK = (252, 252, 250), (233, 234, 231), (120, 123, 128), (32, 34, 40)
MAX_TOKENS = 4096
"""More cannot be told apart on a screen, and the mask grows with the square."""
FRAMES_PER_SECOND, FILL_SECONDS, HOLD_SECONDS = 12, 5.0, 1.5


def color(share: float) -> Color:
    """Return the colour of a place in the order: 0 is light yellow, 1 dark violet.

    Lightness falls evenly in OKLab (Ottosson 2020), so that equal distances look equal, in print
    and to colour-blind eyes too.
    """
    lightness, chroma = 0.89 - 0.47 * share, 0.125 + 0.03 * share
    hue = math.radians(95 + 200 * share)
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    red, green, blue = (
        12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055
        for x in (min(max(x, 0.0), 1.0) for x in linear)
    )
    return round(255 * red), round(255 * green), round(255 * blue)


def mix(under: Color, over: Color, share: float) -> Color:
    """Lay a colour over another."""
    red, green, blue = (round(u + (o - u) * share) for u, o in zip(under, over, strict=True))
    return red, green, blue


def check_size(units: Units) -> None:
    """Raise if a partition has too many tokens to be drawn."""
    if sum(units.sizes) > MAX_TOKENS:
        raise ValueError(
            f"{sum(units.sizes)} tokens are too many to draw: choose a smaller lattice, of up to "
            f"{MAX_TOKENS} tokens"
        )


def order(units: Units, *, title: str) -> Image.Image:
    """Draw every latent frame as a grid of cells in the colour and number of their unit.

    Coarse levels stand above the finest, as grids of their own.
    """
    check_size(units)
    grids: dict[tuple[int, int], dict[Place, Paint]] = {}
    for unit in units:
        shade = color(unit.index / max(1, len(units.sizes) - 1))
        for t, h, w, level in unit.cells:
            grids.setdefault((level, t), {})[h, w] = Paint(unit.index, (h, w), shade)
    assert units.frames is not None
    columns = min(units.frames, 16)
    cell = max(12, min(40, 1500 // (columns * (units.width + 1))))
    rows = _rows_of_grids(grids, columns)
    heights = [cell * max(1 + h for key in row for h, _ in grids[key]) + cell + 16 for row in rows]
    picture = Image.new("RGB", (90 + columns * cell * (units.width + 1), 60 + sum(heights)), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((20, 18), title, fill=INK, font=_font(18))
    top = 56
    for row, height in zip(rows, heights, strict=True):
        level = row[0][0]
        name = f"pooled {2**level}x" if level else "latents"
        draw.text((20, top + 16), name, fill=GREY, font=_font(12))
        for key in row:
            left = 84 + key[1] % columns * cell * (units.width + 1)
            draw.text((left, top), f"t={key[1]}", fill=GREY, font=_font(11))
            _draw_grid(draw, grids[key], left=left, top=top + 16, cell=cell)
            _number(draw, grids[key], left=left, top=top + 16, cell=cell)
        top += height
    return picture


def _rows_of_grids(keys: Mapping[tuple[int, int], object], columns: int) -> list[list]:
    """Coarse levels first, so many frames in a row."""
    ordered = sorted(keys, key=lambda key: (key[1] // columns, -key[0], key[1]))
    return [list(row) for _, row in itertools.groupby(ordered, lambda k: (k[1] // columns, k[0]))]


def _draw_grid(
    draw: ImageDraw.ImageDraw, grid: Mapping[Place, Paint], *, left: int, top: int, cell: int
) -> None:
    """Draw cells: wide gaps between units, hair lines between the tokens of one."""
    gap = max(1, cell // 12)
    for (h, w), paint in grid.items():
        x, y = left + w * cell, top + h * cell
        box = [x, y, x + cell - 1, y + cell - 1]
        lines = []
        for side, (dh, dw) in enumerate(((0, -1), (-1, 0), (0, 1), (1, 0))):
            other = grid.get((h + dh, w + dw))
            if other is None or other.unit != paint.unit:
                box[side] += gap if side < 2 else -gap
                lines.append((side, gap, INK if paint.working else paint.color))
            elif other.token != paint.token and side < 2:
                # First, so that a frame lies on top.
                lines.insert(0, (side, 1, mix(paint.color, PAPER, 0.3)))
        draw.rectangle(box, fill=paint.color)
        for side, width, shade in lines:
            edge = box.copy()
            edge[(side + 2) % 4] = box[side] + (width - 1 if side < 2 else 1 - width)
            first, last = (edge[:2], edge[2:]) if side < 2 else (edge[2:], edge[:2])
            draw.rectangle([*map(min, first, last), *map(max, first, last)], fill=shade)


def _number(
    draw: ImageDraw.ImageDraw, grid: Mapping[Place, Paint], *, left: int, top: int, cell: int
) -> None:
    """Write its number into the middle of every unit, or its cell nearest to the middle."""
    places: dict[int, list[Place]] = {}
    for place, paint in grid.items():
        places.setdefault(paint.unit, []).append(place)
    for index, own in places.items():
        middle = (sum(h for h, _ in own) / len(own), sum(w for _, w in own) / len(own))
        nearest = min(own, key=lambda place, middle=middle: math.dist(place, middle))
        h, w = middle if math.dist(nearest, middle) < 0.75 else nearest
        size = max(8, min(15, 2 * cell // (1 + max(2, len(str(index))))))
        shade = INK if sum(grid[nearest].color) > 390 else PAPER
        spot = (left + (w + 0.5) * cell, top + (h + 0.5) * cell)
        draw.text(spot, str(index), fill=shade, font=_font(size), anchor="mm")


def mask(units: Units, visible: Visible, *, title: str) -> Image.Image:
    """Draw who reads whom: a row for every token that reads, a column for every token that is read.

    A dot has the colour of the unit that is read.
    """
    check_size(units)
    reads = token_mask(
        visible.matrix(torch.arange(len(units.sizes)), units.waves), units.unit, units.unit
    ).numpy()
    last = max(1, len(units.sizes) - 1)
    ramp = np.array([color(index / last) for index in range(len(units.sizes))], dtype=np.uint8)
    dots = np.where(
        reads[..., None], ramp[units.unit.numpy()][None], np.array(EMPTY, dtype=np.uint8)
    )
    scale = max(1, 760 // len(dots))
    square = Image.fromarray(dots).resize((len(dots) * scale,) * 2, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(square)
    edges = list(itertools.accumulate(units.sizes, initial=0))
    for edge in edges[1:-1]:
        if min(units.sizes) * scale >= 6:
            draw.line((edge * scale, 0, edge * scale, square.height), fill=PAPER)
            draw.line((0, edge * scale, square.width, edge * scale), fill=PAPER)
    if square.width > 1520:
        square = square.resize((1520, 1520), Image.Resampling.BOX)
    factor = square.width / edges[-1]
    picture = Image.new("RGB", (square.width + 90, square.height + 110), PAPER)
    picture.paste(square, (64, 84))
    draw = ImageDraw.Draw(picture)
    draw.text((20, 18), title, fill=INK, font=_font(18))
    draw.text((64, 48), "unit that is read", fill=GREY, font=_font(12))
    reader = Image.new("RGB", (140, 16), PAPER)
    ImageDraw.Draw(reader).text((140, 0), "unit that reads", fill=GREY, font=_font(12), anchor="ra")
    picture.paste(reader.rotate(90, expand=True), (18, 84))
    free = 0.0
    for index, (start, end) in enumerate(itertools.pairwise(edges)):
        middle = (start + end) / 2 * factor
        if middle < free:
            continue
        free = middle + 20
        draw.text((64 + middle, 76), str(index), fill=GREY, font=_font(10), anchor="mm")
        draw.text((58, 84 + middle), str(index), fill=GREY, font=_font(10), anchor="rm")
    return picture


@dataclass(frozen=True, kw_only=True)
class _Track:
    """A scheme in an animation: its units, and when each is at work, as a share of the whole."""

    name: str
    units: tuple[Unit, ...]
    spans: tuple[tuple[float, float], ...]


def _track(name: str, *, frames: int, height: int, width: int) -> _Track:
    """Give every wave time by the root of its tokens, so that small units can be seen too."""
    units = Units(parse(name), frames, height, width)
    check_size(units)
    waves = [list(wave) for _, wave in itertools.groupby(units, key=lambda unit: unit.wave)]
    times = [math.sqrt(sum(len(unit.cells) for unit in wave)) for wave in waves]
    ends = list(itertools.accumulate(times, initial=0.0))
    spans: list[tuple[float, float]] = []
    for wave, (start, end) in zip(waves, itertools.pairwise(ends), strict=True):
        spans += [(start / ends[-1], end / ends[-1])] * len(wave)
    return _Track(name=name, units=tuple(units), spans=tuple(spans))


def filling(
    schemes: Sequence[str], *, frames: int, height: int, width: int, steps: int = 4
) -> list[Image.Image]:
    """Draw lattices that fill unit by unit, one row for each scheme, on one clock.

    All end at the same moment. The unit at work is framed and takes on its colour in as many steps
    as it is denoised in; coarse tokens lie as pale large blocks where the finest will be.
    """
    tracks = [_track(name, frames=frames, height=height, width=width) for name in schemes]
    cell = max(4, min(20, 1000 // (frames * (width + 1))))
    high = max(46, cell * height) + 20
    size = (156 + frames * cell * (width + 1), 44 + high * len(tracks))
    pictures = []
    for tick in range(int(FRAMES_PER_SECOND * FILL_SECONDS) + 1):
        now = tick / (FRAMES_PER_SECOND * FILL_SECONDS)
        picture = Image.new("RGB", size, PAPER)
        draw = ImageDraw.Draw(picture)
        draw.text((16, 12), "latent frame", fill=GREY, font=_font(12))
        for t in range(frames):
            left = 146 + t * cell * (width + 1)
            place = (left + cell * width / 2, 20)
            draw.text(place, str(t), fill=GREY, font=_font(12), anchor="mm")
        for row, track in enumerate(tracks):
            top = 38 + row * high
            done = sum(end <= now + 1e-9 for _, end in track.spans)
            draw.text((16, top), track.name, fill=INK, font=_font(16))
            count = f"{done} of {len(track.units)} unit{'s' * (len(track.units) > 1)}"
            draw.text((16, top + 24), count, fill=GREY, font=_font(12))
            painted = _painted(track, now=now, steps=steps)
            for t in range(frames):
                grid = {
                    place: painted.get((t, *place), Paint(-1, place, EMPTY))
                    for place in itertools.product(range(height), range(width))
                }
                left = 146 + t * cell * (width + 1)
                _draw_grid(draw, grid, left=left, top=top, cell=cell)
        pictures.append(picture)
    return pictures


def _painted(track: _Track, *, now: float, steps: int) -> dict[tuple[int, int, int], Paint]:
    """Return what the cells of the finest lattice show at a moment."""
    painted: dict[tuple[int, int, int], Paint] = {}
    for unit, (start, end) in zip(track.units, track.spans, strict=True):
        if start >= now:
            break
        share = min(1.0, math.ceil(steps * (now - start) / (end - start)) / steps)
        working = end > now + 1e-9
        shade = color(unit.index / max(1, len(track.units) - 1))
        for t, h, w, level in unit.cells:
            # A finished unit is opaque; the coarser, the paler.
            strength = (0.2 + 0.8 * share * (0.8 if working else 1.0)) * 0.7**level
            paint = Paint(unit.index, (h, w, level), mix(EMPTY, shade, strength), working)
            for dh, dw in itertools.product(range(2**level), repeat=2):
                painted[t, h * 2**level + dh, w * 2**level + dw] = paint
    return painted


def save_animation(pictures: Sequence[Image.Image], path: Path) -> None:
    """Write an animated WebP that rests on its last picture and begins again."""
    pace = round(1000 / FRAMES_PER_SECOND)
    durations = [pace] * (len(pictures) - 1) + [round(1000 * HOLD_SECONDS)]
    first, *rest = pictures
    first.save(
        path,
        save_all=True,
        append_images=rest,
        duration=durations,
        loop=0,
        lossless=True,
        quality=50,
        method=4,
        minimize_size=True,
    )


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
