"""Schemes: how a segment of the token lattice is cut into units, and their names. No torch.

A new scheme is a frozen dataclass with `frames` and `segment`: see `docs/extending.md`. Nothing
but this file and the recipes knows which schemes there are.
"""

import itertools
import math
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from videoar.checks import build_named, check, check_options, checked, explained, hint, name_of

Cells = tuple[tuple[int, int, int, int], ...]
"""The tokens of one unit: (t, h, w, level) indices into the grid of that level, the latents pooled
by 2**level in height and width. The video is read from level 0, the lattice itself."""

Grid = tuple[int, int]
"""Rows and columns of blocks, or the place of one of them."""
MAX_FAR = 4096  # blocks, as it takes the square of that


@cache
def _farthest(rows: int, columns: int) -> list[Grid]:
    """Order blocks so that each next one is the farthest from all before; a corner is the first."""
    check("The grid of far-first", (rows, columns), rows * columns <= MAX_FAR, f"{MAX_FAR} blocks")
    away, order = dict.fromkeys(itertools.product(range(rows), range(columns)), math.inf), []
    while away:
        order.append(far := max(away, key=away.__getitem__))
        away = {p: min(away[p], math.dist(p, far)) for p in away if p != far}
    return order


def _from_centre(down: int, right: int) -> tuple[int, float]:
    return max(abs(down), abs(right)), math.atan2(down, right)


ORDERS: dict[str, Callable[[Grid, Grid], Any]] = {
    "raster": lambda place, _: place,
    "snake": lambda place, _: (place[0], place[1] * (-1) ** place[0]),
    "wavefront": lambda place, _: sum(place),
    "spiral": lambda place, grid: _from_centre(*(2 * place[k] - grid[k] + 1 for k in (0, 1))),
    "random": lambda place, _: random.Random(str(place)).random(),
    "far-first": lambda place, grid: _farthest(*grid).index(place),
}
"""By what the blocks of a segment, (row, column) of a grid, are sorted; equals are generated
together. The spiral goes outwards, and what is random is the same in every program."""
MAX_LEVELS, MAX_NAME = 5, 10_000


@dataclass(frozen=True)
class Scheme(ABC):
    """How one segment of a lattice is cut into units."""

    frames: int | None
    """Latent frames per segment; None if the whole clip is one segment."""

    @property
    def short(self) -> str:
        """A name of its own for `parse`; nothing if there is none."""
        return ""

    @abstractmethod
    def segment(self, frames: int, height: int, width: int) -> list[list[Cells]]:
        """Cut a segment of `frames x height x width` cells into waves of units.

        There are `self.frames` frames, or fewer at the end of a clip. Waves come in order of
        generation; a wave lists the units that are generated side by side, most often one. Every
        cell of level 0 stands in exactly one unit.
        """

    @property
    def name(self) -> str:
        """What `parse` makes it of again: of a class of one's own `module:Class/field=value`."""
        if "short" in vars(type(self)) and self.short:  # a class derived from it is another one
            return self.short
        return name_of(self)


@dataclass(frozen=True)
class Blocks(Scheme):
    """Blocks of `t x h x w` cells: frames, chunks of frames, cubes, and the whole clip.

    Sizes that do not divide the lattice leave smaller blocks at its border; None spans it. An order
    of one's own is the turn of every block in raster order, as "0,1,1,2": a wavefront of four.
    """

    frames: int | None = 1
    h: int | None = None
    w: int | None = None
    order: str = "raster"

    def __post_init__(self):
        known = self.order in ORDERS or re.fullmatch(r"\d+(,\d+)*", self.order) is not None
        says = f"one of {', '.join(ORDERS)}, or the turn of every block, as 3,0,1,2"
        check_options(self, ("order", known, says), least={"frames": 1, "h": 1, "w": 1})

    def segment(self, frames: int, height: int, width: int) -> list[list[Cells]]:
        rows, columns = (
            [range(start, min(start + step, size)) for start in range(0, size, step)]
            for size, step in ((height, self.h or height), (width, self.w or width))
        )
        grid, order = (len(rows), len(columns)), ORDERS.get(self.order)
        places: list[Grid] = [(r, c) for r in range(grid[0]) for c in range(grid[1])]
        own = [int(turn) for turn in self.order.split(",") if not order]
        turns = [order(place, grid) for place in places] if order else own
        check(f"Turns of {self.order}", len(turns), len(turns) == len(places), f"{len(places)}")
        key = dict(zip(places, turns, strict=True)).__getitem__
        waves = itertools.groupby(sorted(places, key=key), key=key)
        return [[box(range(frames), rows[r], columns[c]) for r, c in wave] for _, wave in waves]

    @property
    def short(self) -> str:
        t, h, w = self.frames, self.h, self.w
        if (h, w, self.order) == (None, None, "raster"):
            return "full" if t is None else "frame" if t == 1 else f"chunk:{t}"
        if None in (t, h, w):
            return ""
        return f"cube:{t}x{h}x{w}" + ("" if self.order == "raster" else f"/{self.order}")


@dataclass(frozen=True)
class KeyDetail(Scheme):
    """A key frame first, then the frames before it, as a video codec does with its B-frames.

    The key is the *last* frame of its segment: then all segments are alike, and the details are
    interpolated between the key of the segment before and their own.
    """

    frames: int = 4

    def __post_init__(self):
        check_options(self, ("frames", self.frames >= 2, "2 or more, or the units `frame`"))

    def segment(self, frames: int, height: int, width: int) -> list[list[Cells]]:
        h, w = range(height), range(width)
        details = box(range(frames - 1), h, w)
        return [[box(range(frames - 1, frames), h, w)], *([[details]] if details else [])]

    @property
    def short(self) -> str:
        return f"key-detail:{self.frames}"


@dataclass(frozen=True)
class Pyramid(Scheme):
    """Multiscale refinement: the segment's latents pooled by each factor, coarse to fine."""

    frames: int = 2
    factors: tuple[int, ...] = (4, 2, 1)

    def __post_init__(self):
        shrinking = all(a > b for a, b in itertools.pairwise(self.factors))
        powers = all(f > 0 and f & (f - 1) == 0 for f in self.factors)
        ends = self.factors and self.factors[-1] == 1 and self.factors[0] < 2**MAX_LEVELS
        right = bool(ends and shrinking and powers)
        says = f"falling powers of two from below {2**MAX_LEVELS} to 1, as in multiscale:4,2,1"
        check_options(self, ("factors", right, says), least={"frames": 1})

    def segment(self, frames: int, height: int, width: int) -> list[list[Cells]]:
        levels = {factor.bit_length() - 1: factor for factor in self.factors}
        grids = {n: (range(-(-height // f)), range(-(-width // f))) for n, f in levels.items()}
        return [[box(range(frames), *grid, level=n)] for n, grid in grids.items()]

    @property
    def short(self) -> str:
        name = f"multiscale:{','.join(map(str, self.factors))}"
        return name if self.frames == 2 else f"{name}/frames={self.frames}"


@dataclass(frozen=True)
class Mixed(Scheme):
    """Segments of several schemes, one after the other, as one segment."""

    frames: int = field(init=False)
    parts: tuple[Scheme, ...]

    def __post_init__(self):
        lengths = [part.frames for part in self.parts]
        check_options(self, ("parts", None not in lengths, "schemes of a number of frames each"))
        object.__setattr__(self, "frames", sum(length or 0 for length in lengths))

    def segment(self, frames: int, height: int, width: int) -> list[list[Cells]]:
        waves, start = [], 0
        for part in self.parts:
            end = min(start + (part.frames or 0), frames)
            found = part.segment(end - start, height, width) if start < end else []
            waves += [[tuple((t + start, *c) for t, *c in unit) for unit in w] for w in found]
            start = end
        return waves

    @property
    def short(self) -> str:
        return "+".join(part.name for part in self.parts)


def box(t: range, h: range, w: range, *, level: int = 0) -> Cells:
    """All cells of a box, in raster order."""
    return tuple((*cell, level) for cell in itertools.product(t, h, w))


_SCALES, _CUBE = r"(\d+(?:,\d+)*)(?:/frames=(\d+))?", r"(\d+)x(\d+)x(\d+)(?:/([a-z-]+|[\d,]+))?"
# An example of each kind, how it is written, and what it builds.
_KINDS: tuple[tuple[str, str, Callable[..., Scheme]], ...] = (
    ("frame", "", lambda: Blocks(1)),
    ("chunk:3", r"(\d+)", lambda t: Blocks(int(t))),
    ("key-detail:4", r"(\d+)", lambda t: KeyDetail(int(t))),
    ("multiscale:4,2,1", _SCALES, lambda f, t: Pyramid(int(t or 2), tuple(map(int, f.split(","))))),
    ("cube:1x2x2", _CUBE, lambda t, h, w, o: Blocks(int(t), int(h), int(w), o or "raster")),
    ("full", "", lambda: Blocks(None)),
)


@checked
def parse(text: str) -> Scheme:
    """Read a scheme from its name, as `chunk:3`.

    Others are `frame`, `key-detail:4`, `multiscale:4,2,1`, `cube:1x2x2`, `full`; options follow a
    slash, as in `cube:1x2x2/wavefront` and `multiscale:2,1/frames=4`. A class of one's own is
    `module:Class`, with its fields after slashes: `rows:Rows/frames=2`. Segments of several follow
    each other with a plus, as in `frame+chunk:3`. Else raises ValueError.
    """
    if "+" in text:
        return Mixed(tuple(map(parse, text.split("+"))))
    if re.fullmatch(r"[\w.]+:[A-Z]\w*(/\w+=[^/]+)*", text.strip()):
        return build_named(text.strip(), Scheme, "Units {!r}")
    if len(text) <= MAX_NAME:
        for example, pattern, build in _KINDS:
            kind = re.sub(r"(?<=:).*", "", example)
            if match := re.fullmatch(kind + pattern, text.strip()):
                with explained(f"Units {text!r}: {{}}"):
                    return build(*match.groups())
    names = {example.partition(":")[0]: example for example, _, _ in _KINDS}
    kind = hint(re.split("[:/]", text[:100])[0], names, "{}")
    near = f" Did you mean {names[kind]}?" if kind else ""
    raise ValueError(f"Unknown units {text[:100]!r}: use one of {', '.join(names.values())}.{near}")


def names(units: Iterable[str | Scheme]) -> tuple[str, ...]:
    """Return the names of schemes, of each in the one way in which it writes itself."""
    return tuple((parse(each) if isinstance(each, str) else each).name for each in units)


KINDS = ("frame", "chunk:2", "key-detail:4", "multiscale:4,2,1", "cube:1x2x2")
