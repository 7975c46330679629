"""Schemes: how a segment of the token lattice is cut into units, and their names. No torch.

A new scheme is a frozen dataclass with `frames` and `segment`: see `docs/extending.md`. Nothing
but this file and the recipes knows which schemes there are.
"""

import itertools
import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

from videoar.checks import build_named, check_options, checked, hint

Cells = tuple[tuple[int, int, int, int], ...]
"""The tokens of one unit: (t, h, w, level) indices into the grid of that level, the latents pooled
by 2**level in height and width. The video is read from level 0, the lattice itself."""

ORDERS: dict[str, Callable[[int, int, int, int], Any]] = {
    "raster": lambda r, c, *_: (r, c),
    "snake": lambda r, c, *_: (r, c * (-1) ** r),
    "wavefront": lambda r, c, *_: r + c,
    "spiral": lambda r, c, rows, columns: _spiral(r, c, rows, columns),
    "random": lambda r, c, *_: random.Random(f"{r} {c}").random(),
    "far-first": lambda r, c, *_: [((r ^ c) >> bit & 1, r >> bit & 1) for bit in range(20)],
}
"""By what the blocks of a segment are sorted, of row, column and how many there are of both; equals
are generated together. `far-first` is the order of Bayer's matrices: neighbours come last."""
MAX_LEVELS = 5


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
        kind, stated = type(self), [(field, getattr(self, field.name)) for field in fields(self)]
        if kind.__module__ == "__main__" or "<" in kind.__qualname__:
            raise ValueError(
                f"{kind.__qualname__} is defined where no other program finds it: put it into a"
                " module of its own, and import it from there."
            )
        changed = [f"/{f.name}={json.dumps(v)}" for f, v in stated if v != f.default]
        return f"{kind.__module__}:{kind.__qualname__}{''.join(changed)}"


@dataclass(frozen=True)
class Blocks(Scheme):
    """Blocks of `t x h x w` cells: frames, chunks of frames, cubes, and the whole clip.

    Sizes that do not divide the lattice leave smaller blocks at its border; None spans it.
    """

    frames: int | None = 1
    h: int | None = None
    w: int | None = None
    order: str = "raster"

    def __post_init__(self):
        listed = sorted(_numbers(self.order)) == list(range(len(_numbers(self.order))))
        right = self.order in ORDERS or bool(_numbers(self.order) and listed)
        order = ("order", right, f"one of {', '.join(ORDERS)}, or all numbers from 0, as 2,0,1,3")
        check_options(self, order, least={"frames": 1, "h": 1, "w": 1})

    def segment(self, frames: int, height: int, width: int) -> list[list[Cells]]:
        rows, columns = (
            [range(start, min(start + step, size)) for start in range(0, size, step)]
            for size, step in ((height, self.h or height), (width, self.w or width))
        )
        size, numbers = (len(rows), len(columns)), _numbers(self.order)
        if numbers and len(numbers) != size[0] * size[1]:
            raise ValueError(
                f"The order {self.order} is of {len(numbers)} blocks, but a segment has"
                f" {size[0]}x{size[1]}: number these, or use another order."
            )

        def key(place: tuple[int, int]) -> Any:
            r, c = place
            return numbers.index(r * size[1] + c) if numbers else ORDERS[self.order](r, c, *size)

        places = itertools.product(range(size[0]), range(size[1]))
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


def _spiral(r: int, c: int, rows: int, columns: int) -> tuple[int, int, int]:
    """Run along the border from the first corner, clockwise, and then along the next ring."""
    ring = min(r, c, rows - 1 - r, columns - 1 - c)
    sides = (r == ring, c), (c == columns - 1 - ring, r), (r == rows - 1 - ring, -c), (True, -r)
    return next((ring, side, at) for side, (here, at) in enumerate(sides) if here)


def _numbers(order: str) -> list[int]:
    """Return the places of blocks in an order that is written out; none if it is a name."""
    return list(map(int, order.split(","))) if re.fullmatch(r"\d+(,\d+)*", order) else []


def box(t: range, h: range, w: range, *, level: int = 0) -> Cells:
    """All cells of a box, in raster order."""
    return tuple((*cell, level) for cell in itertools.product(t, h, w))


# An example of each kind, how it is written, and what it builds.
_KINDS: tuple[tuple[str, str, Callable[..., Scheme]], ...] = (
    ("frame", r"frame", lambda: Blocks(1)),
    ("chunk:3", r"chunk:(\d+)", lambda t: Blocks(int(t))),
    ("key-detail:4", r"key-detail:(\d+)", lambda t: KeyDetail(int(t))),
    (
        "multiscale:4,2,1",
        r"multiscale:(\d+(?:,\d+)*)(?:/frames=(\d+))?",
        lambda factors, t: Pyramid(int(t or 2), tuple(map(int, factors.split(",")))),
    ),
    (
        "cube:1x2x2",
        r"cube:(\d+)x(\d+)x(\d+)(?:/([a-z-]+|\d+(?:,\d+)*))?",
        lambda t, h, w, order: Blocks(int(t), int(h), int(w), order or "raster"),
    ),
    ("full", r"full", lambda: Blocks(None)),
)


@checked
def parse(text: str) -> Scheme:
    """Read a scheme from its name, as `chunk:3`.

    Others are `frame`, `key-detail:4`, `multiscale:4,2,1`, `cube:1x2x2`, `full`; options follow a
    slash, as in `cube:1x2x2/wavefront` and `multiscale:2,1/frames=4`. A class of one's own is
    `module:Class`, with its fields after slashes: `rows:Rows/frames=2`. Else raises ValueError.
    """
    if re.fullmatch(r"[\w.]+:[A-Z]\w*(/\w+=[^/]+)*", text.strip()):
        return build_named(text.strip(), Scheme, "Units {!r}")
    if len(text) <= 100:
        for _, pattern, build in _KINDS:
            if match := re.fullmatch(pattern, text.strip()):
                return build(*match.groups())
    names = {example.partition(":")[0]: example for example, _, _ in _KINDS}
    kind = hint(re.split("[:/]", text[:100])[0], names, "{}")
    close = f" Did you mean {names[kind]}?" if kind else ""
    known = ", ".join(names.values())
    raise ValueError(f"Unknown units {text[:100]!r}: use one of {known}.{close}")


def names(units: Iterable[str | Scheme]) -> tuple[str, ...]:
    """Return the names of schemes, of each in the one way in which it writes itself."""
    return tuple((parse(each) if isinstance(each, str) else each).name for each in units)


KINDS = ("frame", "chunk:2", "key-detail:4", "multiscale:4,2,1", "cube:1x2x2")
