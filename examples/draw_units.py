"""Pictures of partitions: `python examples/draw_units.py cube:1x2x2 --frames 8 --out FOLDER`.

One scheme gives the order of generation, who reads whom, and a lattice that fills; several fill
side by side. All of it is read from `Units`: a scheme of one's own is drawn as well as others.
"""

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageDraw
from tyro.conf import Positional, arg

from videoar.checks import check
from videoar.cli import arguments
from videoar.cli.main import exit_code
from videoar.cli.progress import say
from videoar.core.schemes import KINDS, parse
from videoar.core.units import Units, Visible, token_mask
from videoar.data.video import check_output
from videoar.files import check_folder
from videoar.generation.config import GenerationConfig

Colors = Float[np.ndarray, "count 3"]
Tokens = Int[np.ndarray, " tokens"]
Grid = Int[np.ndarray, "rows columns"]  # the number of the token in every cell; -1: none

PAPER, EMPTY, GREY, INK = (252, 252, 250), (233, 234, 231), (120, 123, 128), (32, 34, 40)
MAX_TOKENS = 4096  # more cannot be told apart on a screen, and the mask grows with the square
FRAMES_PER_SECOND, FILL_SECONDS, HOLD_SECONDS = 12, 5.0, 1.5
# Along these the lightness of OKLab (Ottosson 2020) falls evenly, from 0.89 to 0.42, so that equal
# distances look equal, in print and to colour-blind eyes.
RAMP = (
    (245, 189, 124, 29, 0, 0, 0, 61, 86),  # red
    (218, 212, 203, 189, 170, 145, 115, 83, 51),
    (117, 112, 127, 150, 171, 186, 189, 177, 151),
)


@dataclass(frozen=True, kw_only=True)
class DrawUnits:
    """Draw how schemes cut a lattice into units."""

    schemes: Positional[Annotated[tuple[str, ...], arg(metavar="SCHEME ...")]]
    """Such as frame, chunk:3, key-detail:4, multiscale:4,2,1, cube:1x2x2/wavefront."""
    frames: int = 8
    """Latent frames of the lattice."""
    height: int = 4
    """Rows of tokens."""
    width: int = 4
    """Columns of tokens."""
    window: int | None = None
    """Latent frames that a unit may read; all by default."""
    sink: int = 0
    """First latent frames that stay readable for ever."""
    steps: int = 4
    """Denoising steps per unit."""
    out: Path = Path("drawings")
    """Folder for order.png, mask.png and filling.webp, or units.webp with several schemes."""
    force: bool = False
    """Replace files that exist."""

    def __post_init__(self) -> None:
        check("steps", self.steps, self.steps > 0, "a number above 0, such as 4")
        if not self.schemes:
            raise ValueError(f"no scheme is given: name one or more, such as {' '.join(KINDS)}")


def color(share: float) -> tuple[int, int, int]:
    """Return the colour of a place in the order: 0 is light yellow, 1 dark violet."""
    places = np.linspace(0, 1, len(RAMP[0]))
    red, green, blue = (round(np.interp(share, places, channel)) for channel in RAMP)
    return red, green, blue


def colors(count: int) -> Colors:
    """Return the colours of so many units."""
    return np.array([color(share) for share in np.linspace(0, 1, count)], dtype=float)


def mix(under: Any, over: Any, share: Any) -> Colors:
    """Lay colours over others."""
    return np.round(under + (np.asarray(over) - under) * share)


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
    own, ramp = units.unit.numpy(), colors(len(units.sizes))
    columns = min(units.clip[-1].complete_frames, 16)
    cell = max(12, min(40, 1500 // (columns * (units.width + 1))))
    pitch = cell * (units.width + 1)
    grids: dict[tuple[int, int, int], Grid] = {}  # by row of the picture, level and frame
    for token, (t, h, w, level) in enumerate(c for unit in units.clip for c in unit.cells):
        empty = np.full((units.height, units.width), -1)
        grids.setdefault((t // columns, -level, t), empty)[h, w] = token
    rows = sorted({key[:2] for key in grids})
    heights = [cell * (1 + math.ceil(units.height * 2.0**level)) + 16 for _, level in rows]
    tops = dict(zip(rows, itertools.accumulate(heights, initial=56), strict=False))
    picture = Image.new("RGB", (90 + columns * pitch, 60 + sum(heights)), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((20, 18), title, fill=INK, font_size=18)
    for (_, level), top in tops.items():
        name = f"pooled {2**-level}x" if level else "latents"
        draw.text((20, top + 16), name, fill=GREY, font_size=12)
    for (row, level, t), grid in grids.items():
        left, top = 84 + t % columns * pitch, tops[row, level]
        draw.text((left, top), f"t={t}", fill=GREY, font_size=11)
        picture.paste(_picture(grid, own, ramp[own], cell=cell), (left, top + 16))
        unit = np.where(grid < 0, -1, own[grid])
        _draw_numbers(draw, unit, ramp, left=left, top=top + 16, cell=cell)
    return picture


def _picture(
    grid: Grid, unit: Tokens, shades: Colors, *, cell: int, framed: Sequence[int] = ()
) -> Image.Image:
    """Draw cells: wide gaps between units, framed or not, and hair lines between their tokens."""
    gap = max(1, cell // 12)
    token = np.pad(grid.repeat(cell, 0).repeat(cell, 1), gap, constant_values=-1)
    pixels, units = np.vstack([shades, PAPER])[token], np.append(unit, -1)[token]

    def edges(values: Grid, *reach: int) -> Bool[np.ndarray, "y x"]:
        shifted = (np.roll(values, by, axis) for by in reach for axis in (0, 1))
        return np.any([values != other for other in shifted], axis=0)

    hair, gaps = edges(token, 1), edges(units, gap, -gap)
    pixels[hair] = mix(pixels[hair], PAPER, 0.3)
    pixels[gaps] = np.where(np.isin(units[gaps], framed)[:, None], INK, PAPER)
    return Image.fromarray(pixels[gap:-gap, gap:-gap].astype(np.uint8))


def _draw_numbers(
    draw: ImageDraw.ImageDraw, unit: Grid, ramp: Colors, *, left: int, top: int, cell: int
) -> None:
    """Write its number into the middle of every unit, or its cell nearest to the middle."""
    for index in np.unique(unit[unit >= 0]).tolist():
        own = np.argwhere(unit == index)
        middle = own.mean(0)
        distances = np.linalg.norm(own - middle, axis=1)
        h, w = middle if distances.min() < 0.75 else own[distances.argmin()]
        size = max(8, min(15, 2 * cell // (1 + max(2, len(str(index))))))
        spot = (left + (w + 0.5) * cell, top + (h + 0.5) * cell)
        shade = INK if ramp[index].sum() > 390 else PAPER
        draw.text(spot, str(index), fill=shade, font_size=size, anchor="mm")


def mask(units: Units, visible: Visible, *, title: str) -> Image.Image:
    """Draw who reads whom: a row for every token that reads, a column for every token that is read.

    A dot has the colour of the unit that is read.
    """
    count = len(units.sizes)
    matrix = visible.matrix(torch.arange(count), units.waves)
    reads = token_mask(matrix, units.unit, units.unit).numpy()
    dots = np.where(reads[..., None], colors(count)[units.unit.numpy()], EMPTY).astype(np.uint8)
    scale = max(1, 760 // len(dots))
    dots = dots.repeat(scale, 0).repeat(scale, 1)
    edges = scale * np.cumsum((0, *units.sizes))
    if min(units.sizes) * scale >= 6:
        dots[edges[1:-1]] = dots[:, edges[1:-1]] = PAPER
    square = Image.fromarray(dots)
    square.thumbnail((1520, 1520), Image.Resampling.BOX)
    picture = Image.new("RGB", (square.width + 90, square.height + 110), PAPER)
    picture.paste(square, (64, 84))
    draw = ImageDraw.Draw(picture)
    draw.text((20, 18), title, fill=INK, font_size=18)
    draw.text((64, 48), "row: unit that reads; column: unit that is read", fill=GREY, font_size=12)
    free = 0.0
    middles = (edges[1:] + edges[:-1]) / 2 * square.width / edges[-1]
    for index, middle in enumerate(middles.tolist()):
        if middle >= free:
            free = middle + 20
            draw.text((64 + middle, 76), str(index), fill=GREY, font_size=10, anchor="mm")
            draw.text((58, 84 + middle), str(index), fill=GREY, font_size=10, anchor="rm")
    return picture


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
    pictures = []
    for now in np.linspace(0, 1, int(FRAMES_PER_SECOND * FILL_SECONDS) + 1):
        picture = empty.copy()
        draw = ImageDraw.Draw(picture)
        for top, units in zip(tops, lattices.values(), strict=False):
            start, end = _times(units)
            begun, done = start < now, end <= now + 1e-9
            count = f"{done.sum()} of {len(done)} unit{'s' * (len(done) > 1)}"
            draw.text((16, top + 24), count, fill=GREY, font_size=12)
            own, level = units.unit.numpy(), units.coords[:, 3].numpy()
            share = np.ceil(steps * (now - start) / (end - start)).clip(0, steps) / steps
            # A finished unit is opaque; the coarser, the paler.
            strength = begun * (0.2 + 0.8 * share * np.where(done, 1.0, 0.8))
            shades = mix(EMPTY, colors(len(done))[own], (strength[own] * 0.7**level)[:, None])
            unit = np.where(begun, np.arange(len(begun)), -2)[own]
            framed = np.flatnonzero(begun & ~done).tolist()
            for left, grid in zip(lefts, _shown(units, begun[own]), strict=True):
                picture.paste(_picture(grid, unit, shades, cell=cell, framed=framed), (left, top))
        pictures.append(picture)
    return pictures


def _times(units: Units) -> Float[np.ndarray, "2 units"]:
    """Return when units are at work, from 0 to 1.

    Every wave gets time by the root of its tokens, so that small units can be seen too.
    """
    waves = units.waves.numpy()
    ends = np.cumsum(np.bincount(waves, units.sizes) ** 0.5)
    ends = np.append(0.0, ends) / ends[-1]
    return np.stack([ends[waves], ends[waves + 1]])


def _shown(units: Units, begun: Bool[np.ndarray, " tokens"]) -> Int[np.ndarray, "frames h w"]:
    """Return the newest token in every cell of the finest lattice, or the one that will be last."""
    grids = np.full((units.clip[-1].complete_frames, units.height, units.width), -1)
    cells = [cell for unit in units.clip for cell in unit.cells]
    for token in np.argsort(begun, kind="stable"):  # over what has not begun
        t, h, w, level = cells[token]
        size = 2**level
        grids[t, h * size : (h + 1) * size, w * size : (w + 1) * size] = token
    return grids


def save_animation(pictures: Sequence[Image.Image], path: Path) -> None:
    """Write an animated WebP that rests on its last picture and begins again."""
    durations = [round(1000 / FRAMES_PER_SECOND)] * len(pictures)
    durations[-1] = round(1000 * HOLD_SECONDS)
    how = {"duration": durations, "loop": 0, "lossless": True, "method": 4, "minimize_size": True}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], **how)


def draw(args: DrawUnits) -> None:
    """Draw partitions into a folder."""
    names, folder = dict.fromkeys(args.schemes), args.out
    files = ["order.png", "mask.png", "filling.webp"] if len(names) == 1 else ["units.webp"]
    check_folder(folder)
    for file in files if folder.is_dir() else ():
        check_output(folder / file, overwrite=args.force)
    size = (args.frames, args.height, args.width)
    lattices = {name: Units(parse(name), *size) for name in names}
    for units in lattices.values():
        check_size(units)
    folder.mkdir(exist_ok=True)
    if len(lattices) == 1:
        ((name, units),) = lattices.items()
        sampling = GenerationConfig(units=name, window_frames=args.window, sink_frames=args.sink)
        title = "{} on {} x {} x {}".format(name, *size)
        order(units, title=title).save(folder / "order.png")
        mask(units, sampling.visible(units), title=title).save(folder / "mask.png")
    save_animation(filling(lattices, steps=args.steps), folder / files[-1])
    say(f"drawn in {folder}: {', '.join(files)}")


def main(words: Sequence[str]) -> int:
    """Draw; bad input is one sentence."""
    prog = "python examples/draw_units.py"
    return exit_code(lambda: draw(arguments.read(DrawUnits, words, prog=prog)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
