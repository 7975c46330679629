"""Units: ordered partitions of a token lattice. All geometry of VideoAR lives here.

A video's latents are patchified into a lattice of `frames x height x width` cells. A **scheme**
says how one *segment* of that lattice (a few latent frames) falls into **units**, and in which
order they are generated; a clip, or an endless stream, is that segment again and again. Everything
above this file (mask, cache, sampler, losses, streaming) reads a partition through four things and
never asks which scheme made it:

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

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from videoar.checks import check_options, check_types
from videoar.core.schemes import Cells, Scheme, box

MAX_SEGMENT, MAX_CLIP = 2**20, 2**22  # tokens that are held as lists, of a segment and in all


@dataclass(frozen=True, eq=False)
class Unit:
    """One unit of a clip or stream."""

    index: int
    wave: int
    """Units of the same wave are generated together."""
    grid_index: Int[Tensor, "tokens 4"]
    """(t, h, w, level) of its tokens, t counted from the start of the stream."""
    coords: Float[Tensor, "tokens 4"]
    """The same in coordinates of level 0: a coarse token sits at the centre of what it covers."""
    complete_frames: int
    """Latent frames of the stream that are finished once this unit is."""
    frame_start: int
    """Smallest t of its cells."""

    @property
    def size(self) -> int:
        """Its number of tokens."""
        return len(self.coords)

    @property
    def cells(self) -> Cells:
        """The same as `grid_index`, to be read by people and programs without tensors."""
        return tuple((t, h, w, level) for t, h, w, level in self.grid_index.tolist())


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
        check_types(self)
        if self.frames is None and self.scheme.frames is None:
            raise ValueError("One unit cannot span an endless stream: give a number of frames.")
        check_options(self, least={"frames": 1, "height": 1, "width": 1})
        if (size := self.segment_frames * self.height * self.width) > MAX_SEGMENT:
            raise ValueError(f"A segment has {size} tokens of {MAX_SEGMENT}: use smaller units.")

    @cached_property
    def segment_frames(self) -> int:
        """Latent frames of a full segment, or of a clip that is shorter."""
        return min(size for size in (self.scheme.frames, self.frames) if size is not None)

    def whole_segments(self, frames: int, *, window: int) -> int:
        """Of the first frames, those in whole segments that leave a window room for one more."""
        segment = self.segment_frames
        return max(0, min(frames, window - segment)) // segment * segment

    @property
    def units_per_segment(self) -> int:
        return len(self._whole)

    @cached_property
    def _whole(self) -> tuple[Unit, ...]:
        """A segment in full length."""
        return self._segment(self.segment_frames)

    @cached_property
    def count(self) -> int | None:
        """Number of units; None if endless."""
        if self.frames is None:
            return None
        whole, rest = divmod(self.frames, self.segment_frames)
        return whole * self.units_per_segment + (len(self._segment(rest)) if rest else 0)

    def at(self, index: int) -> Unit:
        """Return unit `index`; raises IndexError past the end of a clip."""
        if index < 0 or (self.count is not None and index >= self.count):
            raise IndexError(f"Unit {index} of {self.count}.")
        unit, start = self._local(index)
        moved = unit.grid_index.clone(), unit.coords.clone()
        for places in moved:
            places[:, 0] += start
        return replace(
            unit,
            index=index,
            wave=self.wave_of(index),
            grid_index=moved[0],
            coords=moved[1],
            complete_frames=start + unit.complete_frames,
            frame_start=start + unit.frame_start,
        )

    def wave_of(self, index: int) -> int:
        """The wave of unit `index`."""
        segments = index // self.units_per_segment
        return segments * (self._whole[-1].wave + 1) + self._local(index)[0].wave

    def start_of(self, index: int) -> int:
        """The first frame of unit `index`."""
        unit, start = self._local(index)
        return start + unit.frame_start

    def _local(self, index: int) -> tuple[Unit, int]:
        """A unit counted from the start of its segment, and the first frame of that segment."""
        segment, local = divmod(index, self.units_per_segment)
        start = segment * self.segment_frames
        if self.frames is None or self.frames - start >= self.segment_frames:
            return self._whole[local], start
        return self._segment(self.frames - start)[local], start

    def _segment(self, frames: int) -> tuple[Unit, ...]:
        return _template(self.scheme, frames, self.height, self.width)

    def __iter__(self) -> Iterator[Unit]:
        indices = itertools.count() if self.count is None else range(self.count)
        return (self.at(index) for index in indices)

    @cached_property
    def clip(self) -> tuple[Unit, ...]:
        return tuple(map(self.at, range(len(self.sizes))))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Tokens per unit."""
        if self.frames is None or self.count is None:
            raise ValueError("An endless stream has no last unit: give a number of frames.")
        if (size := self.frames * self.height * self.width) > MAX_CLIP:
            raise ValueError(f"A clip has {size} tokens of {MAX_CLIP}: make it smaller.")
        return tuple(self._local(index)[0].size for index in range(self.count))

    @cached_property
    def coords(self) -> Float[Tensor, "tokens 4"]:
        return torch.cat([unit.coords for unit in self.clip])

    @cached_property
    def unit(self) -> Int[Tensor, " tokens"]:
        return torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))

    @cached_property
    def waves(self) -> Int[Tensor, " units"]:
        return torch.tensor([self.wave_of(index) for index in range(len(self.sizes))])

    def units_of(self, frames: int) -> int:
        """Units of the whole segments that span at least `frames` latent frames."""
        return math.ceil(frames / self.segment_frames) * self.units_per_segment


@lru_cache(maxsize=256)
def _template(scheme: Scheme, frames: int, height: int, width: int) -> tuple[Unit, ...]:
    """The units of one segment, counted from 0."""
    missing = {cell[:3] for cell in box(range(frames), range(height), range(width))}
    left, done, units = [height * width] * frames, 0, list[Unit]()
    for wave, blocks in enumerate(scheme.segment(frames, height, width)):
        for cells in blocks:
            finest = [cell[:3] for cell in cells if cell[3] == 0]
            fresh = missing.issuperset(finest) and len(set(finest)) == len(finest)
            if not fresh:
                raise ValueError(f"{scheme} is not a partition: unit {len(units)} repeats a cell.")
            missing.difference_update(finest)
            for t, _, _ in finest:
                left[t] -= 1
            while done < frames and not left[done]:
                done += 1
            grid_index = torch.tensor(cells)
            units.append(
                Unit(
                    index=len(units),
                    wave=wave,
                    grid_index=grid_index,
                    coords=_centres(grid_index, height, width),
                    complete_frames=done,
                    frame_start=min(cell[0] for cell in cells),
                )
            )
    if missing:
        raise ValueError(f"{scheme} is not a partition: {len(missing)} cells are in no unit.")
    return tuple(units)


def _centres(cells: Tensor, height: int, width: int) -> Float[Tensor, "tokens 4"]:
    t, h, w, level = cells.unbind(1)

    def centre(index: Tensor, limit: int) -> Tensor:
        first, last = index * 2**level, ((index + 1) * 2**level).clamp(max=limit) - 1
        return (first + last) / 2

    return torch.stack([t, centre(h, height), centre(w, width), level], dim=1)


@dataclass(frozen=True, kw_only=True)
class Visible:
    """Causal visibility over units: itself, earlier waves inside the window, and the sinks.

    Sinks are the first units of a stream (Xiao et al. 2023, arXiv:2309.17453).
    """

    window: int | None = None
    """Units that a unit may read, itself included; None: all before it."""
    sink: int = 0
    """First units of the stream that stay readable for ever."""

    def __post_init__(self):
        check_types(self)
        check_options(self, least={"window": 1, "sink": 0})

    def matrix(
        self, index: Int[Tensor, " units"], wave: Int[Tensor, " units"]
    ) -> Bool[Tensor, "units units"]:
        """Row i says which of the given units unit i may read."""
        reader, read = index[:, None], index[None, :]
        earlier = wave[None, :] < wave[:, None]
        if self.window is not None:
            earlier &= (read < self.sink) | (reader - read < self.window)
        return earlier | (reader == read)

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


UnitMask = Bool[Tensor, "readers reads"]
Queries = Int[Tensor, " queries"]
"""For every query, the row of its unit in a `UnitMask`."""
Keys = Int[Tensor, " keys"]
"""For every key, the column of its unit."""


def token_mask(visible: UnitMask, reader: Queries, read: Keys) -> Bool[Tensor, "queries keys"]:
    """Expand a unit matrix to tokens: `visible[reader[q], read[k]]`."""
    return visible[reader[:, None], read[None, :]]
