"""Units: ordered partitions of a token lattice. All geometry of VideoAR lives here, and nowhere else.

A video's latents are patchified into a lattice of `frames x height x width` cells. A **scheme** says how
one *segment* of that lattice (a few latent frames) falls into **units**, and in which order they are
generated; a clip, or an endless stream, is that segment again and again. Everything above this file
(mask, cache, sampler, losses, streaming) reads a partition through four things and never asks which
scheme made it:

    coords    (t, h, w, level) of every token, tokens stored in unit order
    unit      the index of every token's unit
    wave      units of one wave are generated side by side and do not see each other
    visible   may unit i read unit j?

For example `cube:1x2x2` on a lattice of 2 x 4 x 4 cells, the digit being the unit:

    t=0  0 0 1 1    t=1  4 4 5 5
         0 0 1 1         4 4 5 5
         2 2 3 3         6 6 7 7
         2 2 3 3         6 6 7 7

A new scheme is a frozen dataclass with `frames` and `segment`: see `docs/extending.md`.
"""

import difflib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

Cells = tuple[tuple[int, int, int, int], ...]
"""The tokens of one unit: (t, h, w, level) indices into the grid of that level. Level n is the latents
pooled by 2**n in height and width; level 0 is the lattice itself, from which the video is read."""

ORDERS = ("raster", "snake", "wavefront")
MAX_LEVELS = 5


class Scheme(ABC):
    """How one segment of a lattice is cut into units."""

    frames: int | None
    """Latent frames per segment; None if the whole clip is one segment."""

    @abstractmethod
    def segment(self, frames: int, height: int, width: int) -> list[list[Cells]]:
        """Cut a segment into waves of units.

        Args:
            frames: latent frames of this segment: `self.frames`, or fewer at the end of a clip.
            height: cells of the lattice.
            width: cells of the lattice.

        Returns:
            Waves in order of generation. A wave lists the units that are generated side by side,
            most often one. Every cell of level 0 stands in exactly one unit.
        """


@dataclass(frozen=True)
class Blocks(Scheme):
    """Blocks of `t x h x w` cells: frames, chunks of frames, cubes, and the whole clip.

    Sizes that do not divide the lattice leave smaller blocks at its border; None spans it.
    """

    t: int | None = 1
    h: int | None = None
    w: int | None = None
    order: str = "raster"

    def __post_init__(self):
        for axis, size in (("t", self.t), ("h", self.h), ("w", self.w)):
            if size is not None and size < 1:
                raise ValueError(f"A block needs {axis} >= 1, got {size}: give a positive size.")
        if self.order not in ORDERS:
            raise ValueError(f"Unknown order {self.order!r}: use one of {', '.join(ORDERS)}.")

    @property
    def frames(self) -> int | None:
        return self.t

    def segment(self, frames: int, height: int, width: int) -> list[list[Cells]]:
        h, w = self.h or height, self.w or width
        rows, columns = math.ceil(height / h), math.ceil(width / w)
        blocks = list(itertools.product(range(rows), range(columns)))
        if self.order == "snake":
            blocks.sort(key=lambda rc: (rc[0], rc[1] if rc[0] % 2 == 0 else -rc[1]))
        waves = [[block] for block in blocks]
        if self.order == "wavefront":
            diagonals = range(rows + columns - 1)
            waves = [[(r, c) for r, c in blocks if r + c == d] for d in diagonals]
        return [
            [
                box(
                    range(frames),
                    range(r * h, min((r + 1) * h, height)),
                    range(c * w, min((c + 1) * w, width)),
                )
                for r, c in wave
            ]
            for wave in waves
        ]


@dataclass(frozen=True)
class KeyDetail(Scheme):
    """A key frame first, then the frames before it, as a video codec does with its B-frames.

    The key is the *last* frame of its segment: then all segments are alike, and the details are
    interpolated between the key of the segment before and their own.
    """

    frames: int = 4

    def __post_init__(self):
        if self.frames < 2:
            raise ValueError(
                f"key-detail needs segments of >= 2 latent frames, got {self.frames}: use frame."
            )

    def segment(self, frames: int, height: int, width: int) -> list[list[Cells]]:
        h, w = range(height), range(width)
        details = box(range(frames - 1), h, w)
        return [[box(range(frames - 1, frames), h, w)], *([[details]] if details else [])]


@dataclass(frozen=True)
class Pyramid(Scheme):
    """Multiscale refinement: the segment's latents pooled by each factor, coarse to fine."""

    factors: tuple[int, ...] = (4, 2, 1)
    frames: int = 2

    def __post_init__(self):
        shrinking = all(a > b for a, b in itertools.pairwise(self.factors))
        powers = all(f > 0 and f & (f - 1) == 0 for f in self.factors)
        if not self.factors or not (shrinking and powers and self.factors[-1] == 1):
            raise ValueError(
                f"multiscale needs falling powers of two that end in 1, got "
                f"{','.join(map(str, self.factors))}: use for example multiscale:4,2,1."
            )
        if self.factors[0] >= 2**MAX_LEVELS or self.frames < 1:
            raise ValueError(
                f"multiscale takes factors below {2**MAX_LEVELS} and segments of >= 1 frames, got "
                f"factor {self.factors[0]} and {self.frames} frames: use smaller factors."
            )

    def segment(self, frames: int, height: int, width: int) -> list[list[Cells]]:
        return [
            [
                box(
                    range(frames),
                    range(math.ceil(height / factor)),
                    range(math.ceil(width / factor)),
                    level=factor.bit_length() - 1,
                )
            ]
            for factor in self.factors
        ]


def box(t: range, h: range, w: range, *, level: int = 0) -> Cells:
    """All cells of a box, in raster order."""
    return tuple((*cell, level) for cell in itertools.product(t, h, w))


# ---------------------------------------------------------------- names


def parse(text: str) -> Scheme:
    """Read a scheme from its name, as `frame`, `chunk:3`, `key-detail:4`, `multiscale:4,2,1`,
    `cube:1x2x2`, `full`; options follow a slash: `cube:1x2x2/wavefront`, `multiscale:4,2,1/frames=4`.

    Raises:
        ValueError: unknown name, missing or impossible sizes.
    """
    head, *options = text.strip().split("/")
    name, _, sizes = head.partition(":")
    known = {
        "full": (r"full", lambda: Blocks(None)),
        "frame": (r"frame", lambda: Blocks(1)),
        "chunk": ("chunk:3", lambda: Blocks(_numbers(sizes, ",", count=1)[0])),
        "key-detail": ("key-detail:4", lambda: KeyDetail(_numbers(sizes, ",", count=1)[0])),
        "multiscale": ("multiscale:4,2,1", lambda: Pyramid(_numbers(sizes, ","), **_frames(options))),
        "cube": ("cube:1x2x2", lambda: Blocks(*_numbers(sizes, "x", count=3), *options)),
    }
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {known[close[0]][0]}?" if close else ""
        examples = ", ".join(example for example, _ in known.values())
        raise ValueError(f"Unknown units {text!r}: use one of {examples}.{hint}")
    example, build = known[name]
    takes_options = name in ("cube", "multiscale")
    if (sizes and ":" not in example) or (options and not takes_options) or len(options) > 1:
        raise ValueError(f"Units {text!r} have parts that {name} does not take: write {example}.")
    try:
        return build()
    except _Malformed as error:
        raise ValueError(f"Units {text!r} are malformed: write them as {example}.") from error


class _Malformed(Exception):
    """The sizes of a unit string do not parse."""


def _numbers(sizes: str, separator: str, count: int | None = None) -> tuple[int, ...]:
    parts = sizes.split(separator)
    if not all(part.isdecimal() and len(part) < 7 for part in parts) or count not in (None, len(parts)):
        raise _Malformed
    return tuple(int(part) for part in parts)


def _frames(options: list[str]) -> dict[str, int]:
    if not options:
        return {}
    key, _, value = options[0].partition("=")
    if key != "frames":
        raise _Malformed
    return {"frames": _numbers(value, ",", count=1)[0]}


# ---------------------------------------------------------------- partitions


@dataclass(frozen=True)
class Unit:
    """One unit of a clip or stream."""

    index: int
    wave: int
    """Units of the same wave are generated together."""
    cells: Cells
    """(t, h, w, level) of its tokens, t counted from the start of the stream."""
    coords: Float[Tensor, "tokens 4"]
    """(t, h, w, level) in finest-lattice coordinates: a coarse token sits at the centre of what it
    covers."""
    complete_frames: int
    """Latent frames of the stream that are finished once this unit is."""
    frame_start: int
    """Smallest t of its cells."""


@dataclass(frozen=True)
class Units:
    """A scheme laid over a lattice.

    Finite (`frames` given): `coords`, `unit`, `waves` describe the whole clip. Endless (`frames` is
    None): only `at` and iteration work.
    """

    scheme: Scheme
    frames: int | None
    height: int
    width: int

    def __post_init__(self):
        if self.frames is None and self.scheme.frames is None:
            raise ValueError("One unit cannot span an endless stream: give a number of frames.")
        for axis, size in (("frames", self.frames), ("height", self.height), ("width", self.width)):
            if size is not None and size < 1:
                raise ValueError(f"A lattice needs {axis} >= 1, got {size}.")

    @property
    def segment_frames(self) -> int:
        """Latent frames of a full segment."""
        frames = self.scheme.frames or self.frames
        assert frames is not None
        return frames

    @property
    def units_per_segment(self) -> int:
        return len(_template(self.scheme, self.segment_frames, self.height, self.width))

    @cached_property
    def count(self) -> int | None:
        """Number of units; None if endless."""
        if self.frames is None:
            return None
        whole, rest = divmod(self.frames, self.segment_frames)
        tail = len(_template(self.scheme, rest, self.height, self.width)) if rest else 0
        return whole * self.units_per_segment + tail

    def at(self, index: int) -> Unit:
        """Return unit `index`; raises IndexError past the end of a clip."""
        if index < 0 or (self.count is not None and index >= self.count):
            raise IndexError(f"Unit {index} of {self.count}.")
        unit, start = self._local(index)
        return Unit(
            index=index,
            wave=self.wave_of(index),
            cells=tuple((t + start, h, w, level) for t, h, w, level in unit.cells),
            coords=unit.coords + torch.tensor([start, 0, 0, 0], dtype=unit.coords.dtype),
            complete_frames=start + unit.complete_frames,
            frame_start=start + unit.frame_start,
        )

    def wave_of(self, index: int) -> int:
        """The wave of unit `index`."""
        template = _template(self.scheme, self.segment_frames, self.height, self.width)
        return index // len(template) * (template[-1].wave + 1) + self._local(index)[0].wave

    def start_of(self, index: int) -> int:
        """The first frame of unit `index`."""
        unit, start = self._local(index)
        return start + unit.frame_start

    def _local(self, index: int) -> tuple[Unit, int]:
        """A unit counted from the start of its segment, and the first frame of that segment."""
        segment, local = divmod(index, self.units_per_segment)
        start, frames = segment * self.segment_frames, self.segment_frames
        if self.frames is not None:
            frames = min(frames, self.frames - start)
        return _template(self.scheme, frames, self.height, self.width)[local], start

    def __iter__(self) -> Iterator[Unit]:
        indices = itertools.count() if self.count is None else range(self.count)
        return (self.at(index) for index in indices)

    @cached_property
    def _all(self) -> tuple[Unit, ...]:
        assert self.frames is not None, "an endless stream has no last unit"
        return tuple(self)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Tokens per unit."""
        return tuple(len(unit.cells) for unit in self._all)

    @cached_property
    def coords(self) -> Float[Tensor, "tokens 4"]:
        return torch.cat([unit.coords for unit in self._all])

    @cached_property
    def unit(self) -> Int[Tensor, " tokens"]:
        return torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))

    @cached_property
    def waves(self) -> Int[Tensor, " units"]:
        return torch.tensor([unit.wave for unit in self._all])

    @cached_property
    def complete_frames(self) -> tuple[int, ...]:
        """Latent frames that are finished after each unit."""
        return tuple(unit.complete_frames for unit in self._all)

    def units_of(self, frames: int) -> int:
        """Units that span at least `frames` latent frames: whole segments, for windows and sinks."""
        return math.ceil(frames / self.segment_frames) * self.units_per_segment


@lru_cache(maxsize=256)
def _template(scheme: Scheme, frames: int, height: int, width: int) -> tuple[Unit, ...]:
    """The units of one segment, counted from 0."""
    missing = {cell[:3] for cell in box(range(frames), range(height), range(width))}
    units: list[Unit] = []
    for wave, blocks in enumerate(scheme.segment(frames, height, width)):
        for cells in blocks:
            finest = [cell[:3] for cell in cells if cell[3] == 0]
            assert len(set(finest)) == len(finest) and missing.issuperset(finest), (
                f"{scheme} is not a partition: unit {len(units)} repeats or leaves the lattice"
            )
            missing.difference_update(finest)
            units.append(
                Unit(
                    index=len(units),
                    wave=wave,
                    cells=cells,
                    coords=_centres(cells, height, width),
                    complete_frames=min((t for t, _, _ in missing), default=frames),
                    frame_start=min(cell[0] for cell in cells),
                )
            )
    assert not missing, f"{scheme} is not a partition: {len(missing)} cells are in no unit"
    return tuple(units)


def _centres(cells: Cells, height: int, width: int) -> Float[Tensor, "tokens 4"]:
    def centre(index: int, level: int, limit: int) -> float:
        return (index * 2**level + min((index + 1) * 2**level, limit) - 1) / 2

    return torch.tensor(
        [(t, centre(h, n, height), centre(w, n, width), n) for t, h, w, n in cells],
        dtype=torch.float32,
    )


# ---------------------------------------------------------------- visibility


@dataclass(frozen=True, kw_only=True)
class Visible:
    """Causal visibility over units: a unit reads itself, the units of earlier waves inside its window,
    and the sinks (Xiao et al. 2023, arXiv:2309.17453)."""

    window: int | None = None
    """Units that a unit may read, itself included; None: all before it."""
    sink: int = 0
    """First units of the stream that stay readable for ever."""

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(f"A window holds at least one unit, got {self.window}: use 1 or more.")
        if self.sink < 0:
            raise ValueError(f"A sink holds >= 0 units, got {self.sink}.")

    def matrix(
        self, index: Int[Tensor, " units"], wave: Int[Tensor, " units"]
    ) -> Bool[Tensor, "units units"]:
        """Row i says which of the given units unit i may read."""
        reader, read = index[:, None], index[None, :]
        kept = read < self.sink
        if self.window is None:
            kept = torch.ones_like(kept)
        else:
            kept = kept | (reader - read < self.window)
        return ((wave[None, :] < wave[:, None]) & kept) | (reader == read)

    def expired(self, index: int, newest: int) -> bool:
        """Say whether no unit from `newest` on can read unit `index`."""
        return self.window is not None and index >= self.sink and newest - index >= self.window


def clean_copies(visible: Bool[Tensor, "units units"]) -> Bool[Tensor, "doubled doubled"]:
    """Visibility for teacher forcing over [clean units, noisy units].

    Clean i reads clean j where visible; noisy i reads the same clean units except its own copy, and
    itself:          clean  noisy
            clean  |  V      0   |
            noisy  |  V-I    I   |
    """
    own = torch.eye(len(visible), dtype=torch.bool, device=visible.device)
    top = torch.cat([visible, torch.zeros_like(visible)], dim=1)
    return torch.cat([top, torch.cat([visible & ~own, own], dim=1)])


def token_mask(
    visible: Bool[Tensor, "readers reads"],
    reader: Int[Tensor, " queries"],
    read: Int[Tensor, " keys"],
) -> Bool[Tensor, "queries keys"]:
    """Expand a unit matrix to tokens: `visible[reader[q], read[k]]`."""
    return visible[reader[:, None], read[None, :]]


# ---------------------------------------------------------------- latents <-> tokens


def to_tokens(
    latents: Float[Tensor, "batch frames channels height width"], units: Units, *, patch: int = 2
) -> Float[Tensor, "batch tokens features"]:
    """Patchify latents and store the tokens in unit order; features are ordered (channel, row, column).

    Raises:
        ValueError: the latents do not cover the lattice of `units`.
    """
    expected = (units.frames, units.height * patch, units.width * patch)
    given = (latents.shape[1], *latents.shape[3:])
    if given != expected:
        raise ValueError(f"Latents of {given} (t, h, w) do not fit units over {expected}.")
    levels = sorted({cell[3] for unit in units._all for cell in unit.cells})
    grids, starts, start = [], {}, 0
    for level in levels:
        grid = _patchify(_pooled(latents, 2**level, patch), patch)
        starts[level], start = (start, *grid.shape[2:4]), start + math.prod(grid.shape[1:4])
        grids.append(rearrange(grid, "b t h w c -> b (t h w) c"))
    index = [
        starts[n][0] + (t * starts[n][1] + h) * starts[n][2] + w
        for unit in units._all
        for t, h, w, n in unit.cells
    ]
    return torch.cat(grids, dim=1)[:, torch.tensor(index, device=latents.device)]


def to_latents(
    tokens: Float[Tensor, "batch tokens features"], units: Units, *, patch: int = 2
) -> Float[Tensor, "batch frames channels height width"]:
    """Inverse of `to_tokens`: read the latents from the tokens of the finest level."""
    cells = [cell for unit in units._all for cell in unit.cells]
    where = {cell[:3]: position for position, cell in enumerate(cells) if cell[3] == 0}
    lattice = box(range(units.frames or 0), range(units.height), range(units.width))
    index = torch.tensor([where[cell[:3]] for cell in lattice], device=tokens.device)
    grid = rearrange(
        tokens[:, index], "b (t h w) c -> b t h w c", h=units.height, w=units.width
    )
    return rearrange(grid, "b t h w (c p q) -> b t c (h p) (w q)", p=patch, q=patch)


def _patchify(
    latents: Float[Tensor, "batch frames channels height width"], patch: int
) -> Float[Tensor, "batch frames rows columns features"]:
    return rearrange(latents, "b t c (h p) (w q) -> b t h w (c p q)", p=patch, q=patch)


def _pooled(
    latents: Float[Tensor, "batch frames channels height width"], factor: int, patch: int
) -> Float[Tensor, "batch frames channels rows columns"]:
    if factor == 1:
        return latents
    batch, step = len(latents), factor * patch
    flat = rearrange(latents, "b t c h w -> (b t) c h w")
    below, right = (-flat.shape[2]) % step, (-flat.shape[3]) % step
    flat = F.avg_pool2d(F.pad(flat, (0, right, 0, below), mode="replicate"), factor)
    return rearrange(flat, "(b t) c h w -> b t c h w", b=batch)


class Assembler:
    """Collect the tokens of finished units and hand out the latent frames that are complete."""

    def __init__(self, units: Units, *, patch: int = 2):
        self.units, self.patch, self.done = units, patch, 0
        self._open: dict[int, Tensor] = {}

    def add(
        self, unit: Unit, tokens: Float[Tensor, "batch tokens features"]
    ) -> Float[Tensor, "batch frames channels height width"] | None:
        """Store a unit; return the newly complete latent frames, None if there are none."""
        finest = [i for i, cell in enumerate(unit.cells) if cell[3] == 0]
        for t, group in itertools.groupby(finest, key=lambda i: unit.cells[i][0]):
            rows = list(group)
            frame = self._open.setdefault(
                t, tokens.new_empty(len(tokens), self.units.height, self.units.width, tokens.shape[2])
            )
            h, w = zip(*(unit.cells[i][1:3] for i in rows), strict=True)
            frame[:, list(h), list(w)] = tokens[:, rows]
        if unit.complete_frames == self.done:
            return None
        grid = torch.stack([self._open.pop(t) for t in range(self.done, unit.complete_frames)], dim=1)
        self.done = unit.complete_frames
        return rearrange(
            grid, "b t h w (c p q) -> b t c (h p) (w q)", p=self.patch, q=self.patch
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The frames that are begun but not complete."""
        return {"done": torch.tensor(self.done)} | {str(t): f for t, f in self._open.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.done = int(state["done"])
        self._open = {int(t): frame for t, frame in state.items() if t != "done"}
