"""Pictures of partitions: the order of generation, who reads whom, and a lattice that fills.

All of it is read from `Units`; a scheme that does not exist yet is drawn as well as those that do.
"""

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from videoar.core.units import Unit, Units, Visible, token_mask

Color = tuple[int, int, int]
Place = tuple[int, int]
Track = list[tuple[Unit, float, float]]  # units, and when each is at work, from 0 to 1

PAPER, EMPTY, GREY, INK = (252, 252, 250), (233, 234, 231), (120, 123, 128), (32, 34, 40)
MAX_TOKENS = 4096  # more cannot be told apart on a screen, and the mask grows with the square
FRAMES_PER_SECOND, FILL_SECONDS, HOLD_SECONDS = 12, 5.0, 1.5
LAB_TO_CONES = (  # OKLab (Ottosson 2020)
    (1, 0.3963377774, 0.2158037573),
    (1, -0.1055613458, -0.0638541728),
    (1, -0.0894841775, -1.2914855480),
)
CONES_TO_RGB = (
    (4.0767416621, -3.3077115913, 0.2309699292),
    (-1.2684380046, 2.6097574011, -0.3413193965),
    (-0.0041960863, -0.7034186147, 1.7076147010),
)


class Paint(NamedTuple):
    """What a cell of a picture shows."""

    unit: int  # its cells lie close together,
    token: Hashable  # and those of one token run into each other
    color: Color
    working: bool = False  # the unit gets a frame


def color(share: float) -> Color:
    """Return the colour of a place in the order: 0 is light yellow, 1 dark violet.

    Lightness falls evenly, so that equal distances look equal, in print and to colour-blind eyes.
    """
    hue, chroma = math.radians(95 + 200 * share), 0.125 + 0.03 * share
    lab = (0.89 - 0.47 * share, chroma * math.cos(hue), chroma * math.sin(hue))
    linear = np.clip(np.dot(CONES_TO_RGB, np.dot(LAB_TO_CONES, lab) ** 3), 0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    red, green, blue = (255 * srgb).round().astype(int).tolist()
    return red, green, blue


def colors(count: int) -> list[Color]:
    """Return the colours of so many units."""
    return [color(index / max(1, count - 1)) for index in range(count)]


def mix(under: Color, over: Color, share: float) -> Color:
    """Lay a colour over another."""
    red, green, blue = (round(u + (o - u) * share) for u, o in zip(under, over, strict=True))
    return red, green, blue


def check_size(units: Units) -> None:
    """Raise if a partition has too many tokens to be drawn."""
    if (count := sum(units.sizes)) > MAX_TOKENS:
        raise ValueError(
            f"{count} tokens are too many to draw: choose a lattice of up to {MAX_TOKENS} tokens"
        )


def order(units: Units, *, title: str) -> Image.Image:
    """Draw every latent frame as a grid of cells in the colour and number of their unit.

    Coarse levels stand above the finest, as grids of their own.
    """
    ramp, grids = colors(len(units.sizes)), {}  # grids by level and frame
    for unit in units.clip:
        shade = ramp[unit.index]
        for t, h, w, level in unit.cells:
            grids.setdefault((level, t), {})[h, w] = Paint(unit.index, (h, w), shade)
    columns = min(units.clip[-1].complete_frames, 16)
    cell = max(12, min(40, 1500 // (columns * (units.width + 1))))

    def row_of(key: tuple[int, int]) -> tuple[int, int]:
        return key[1] // columns, -key[0]

    rows = [list(row) for _, row in itertools.groupby(sorted(sorted(grids), key=row_of), row_of)]
    heights = [cell * max(2 + h for key in row for h, _ in grids[key]) + 16 for row in rows]
    picture = Image.new("RGB", (90 + columns * cell * (units.width + 1), 60 + sum(heights)), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((20, 18), title, fill=INK, font_size=18)
    for row, top in zip(rows, itertools.accumulate(heights, initial=56), strict=False):
        level = row[0][0]
        name = f"pooled {2**level}x" if level else "latents"
        draw.text((20, top + 16), name, fill=GREY, font_size=12)
        for key in row:
            left = 84 + key[1] % columns * cell * (units.width + 1)
            draw.text((left, top), f"t={key[1]}", fill=GREY, font_size=11)
            _draw_grid(draw, grids[key], left=left, top=top + 16, cell=cell)
            _draw_numbers(draw, grids[key], left=left, top=top + 16, cell=cell)
    return picture


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
            x0, y0, x1, y1 = edge
            draw.rectangle((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), fill=shade)


def _draw_numbers(
    draw: ImageDraw.ImageDraw, grid: Mapping[Place, Paint], *, left: int, top: int, cell: int
) -> None:
    """Write its number into the middle of every unit, or its cell nearest to the middle."""
    for index in dict.fromkeys(paint.unit for paint in grid.values()):
        own = [place for place, paint in grid.items() if paint.unit == index]
        middle = tuple(np.mean(own, axis=0).tolist())
        distance, nearest = min((math.dist(place, middle), place) for place in own)
        h, w = middle if distance < 0.75 else nearest
        size = max(8, min(15, 2 * cell // (1 + max(2, len(str(index))))))
        shade = INK if sum(grid[nearest].color) > 390 else PAPER
        spot = (left + (w + 0.5) * cell, top + (h + 0.5) * cell)
        draw.text(spot, str(index), fill=shade, font_size=size, anchor="mm")


def mask(units: Units, visible: Visible, *, title: str) -> Image.Image:
    """Draw who reads whom: a row for every token that reads, a column for every token that is read.

    A dot has the colour of the unit that is read.
    """
    count = len(units.sizes)
    matrix = visible.matrix(torch.arange(count), units.waves)
    reads = token_mask(matrix, units.unit, units.unit).numpy()
    shades = np.array(colors(count))[units.unit.numpy()]
    dots = np.where(reads[..., None], shades, EMPTY).astype(np.uint8)
    scale = max(1, 760 // len(dots))
    square = Image.fromarray(dots).resize((len(dots) * scale,) * 2, Image.Resampling.NEAREST)
    edges = list(itertools.accumulate(units.sizes, initial=0))
    if min(units.sizes) * scale >= 6:
        draw = ImageDraw.Draw(square)
        for edge in edges[1:-1]:
            draw.line((edge * scale, 0, edge * scale, square.height), fill=PAPER)
            draw.line((0, edge * scale, square.width, edge * scale), fill=PAPER)
    square.thumbnail((1520, 1520), Image.Resampling.BOX)
    picture = Image.new("RGB", (square.width + 90, square.height + 110), PAPER)
    picture.paste(square, (64, 84))
    draw = ImageDraw.Draw(picture)
    draw.text((20, 18), title, fill=INK, font_size=18)
    draw.text((64, 48), "row: unit that reads; column: unit that is read", fill=GREY, font_size=12)
    free = 0.0
    for index, (start, end) in enumerate(itertools.pairwise(edges)):
        middle = (start + end) / 2 * square.width / edges[-1]
        if middle >= free:
            free = middle + 20
            draw.text((64 + middle, 76), str(index), fill=GREY, font_size=10, anchor="mm")
            draw.text((58, 84 + middle), str(index), fill=GREY, font_size=10, anchor="rm")
    return picture


def _track(units: Units) -> Track:
    """Give every wave time by the root of its tokens, so that small units can be seen too."""
    waves = [list(wave) for _, wave in itertools.groupby(units.clip, key=lambda unit: unit.wave)]
    times = [math.sqrt(sum(len(unit.cells) for unit in wave)) for wave in waves]
    ends = [end / sum(times) for end in itertools.accumulate(times, initial=0.0)]
    spans = zip(waves, itertools.pairwise(ends), strict=True)
    return [(unit, start, end) for wave, (start, end) in spans for unit in wave]


def filling(lattices: Mapping[str, Units], *, steps: int) -> list[Image.Image]:
    """Draw lattices of one size that fill unit by unit, a row for each by name, on one clock.

    All end at the same moment. The unit at work is framed and takes on its colour in as many steps
    as it is denoised in; coarse tokens lie as pale large blocks where the finest will be.
    """
    units = next(iter(lattices.values()))
    frames, height, width = units.clip[-1].complete_frames, units.height, units.width
    cell = max(4, min(20, 1000 // (frames * (width + 1))))
    lefts = [146 + t * cell * (width + 1) for t in range(frames)]
    tops = [38 + row * (max(46, cell * height) + 20) for row in range(len(lattices) + 1)]
    empty = Image.new("RGB", (156 + frames * cell * (width + 1), tops[-1] + 6), PAPER)
    draw = ImageDraw.Draw(empty)
    draw.text((16, 12), "latent frame", fill=GREY, font_size=12)
    for t, left in enumerate(lefts):
        draw.text((left + cell * width / 2, 20), str(t), fill=GREY, font_size=12, anchor="mm")
    for top, name in zip(tops, lattices, strict=False):
        draw.text((16, top), name, fill=INK, font_size=16)
    tracks = [_track(units) for units in lattices.values()]
    pictures = []
    for now in np.linspace(0, 1, int(FRAMES_PER_SECOND * FILL_SECONDS) + 1):
        picture = empty.copy()
        draw = ImageDraw.Draw(picture)
        for top, track in zip(tops, tracks, strict=False):
            done = sum(end <= now + 1e-9 for _, _, end in track)
            count = f"{done} of {len(track)} unit{'s' * (len(track) > 1)}"
            draw.text((16, top + 24), count, fill=GREY, font_size=12)
            painted = _painted(track, now=now, steps=steps)
            for t, left in enumerate(lefts):
                places = itertools.product(range(height), range(width))
                grid = {p: painted.get((t, *p), Paint(-1, p, EMPTY)) for p in places}
                _draw_grid(draw, grid, left=left, top=top, cell=cell)
        pictures.append(picture)
    return pictures


def _painted(track: Track, *, now: float, steps: int) -> dict[tuple[int, int, int], Paint]:
    """Return what the cells of the finest lattice show at a moment."""
    painted, shades = {}, colors(len(track))
    for unit, start, end in track:
        if start >= now:
            break
        share = min(1.0, math.ceil(steps * (now - start) / (end - start)) / steps)
        working = end > now + 1e-9
        for t, h, w, level in unit.cells:
            # A finished unit is opaque; the coarser, the paler.
            strength = (0.2 + 0.8 * share * (0.8 if working else 1.0)) * 0.7**level
            paint = Paint(
                unit.index, (h, w, level), mix(EMPTY, shades[unit.index], strength), working
            )
            for dh, dw in itertools.product(range(2**level), repeat=2):
                painted[t, h * 2**level + dh, w * 2**level + dw] = paint
    return painted


def save_animation(pictures: Sequence[Image.Image], path: Path) -> None:
    """Write an animated WebP that rests on its last picture and begins again."""
    durations = [round(1000 / FRAMES_PER_SECOND)] * len(pictures)
    durations[-1] = round(1000 * HOLD_SECONDS)
    how = {"duration": durations, "loop": 0, "lossless": True, "method": 4, "minimize_size": True}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], **how)
