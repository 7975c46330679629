"""Latents to tokens in unit order, and back; tokens that are known."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from videoar.core.units import Unit, Units

Latents = Float[Tensor, "batch frames channels height width"]
Tokens = Float[Tensor, "batch tokens features"]
"""In unit order; the features of a token are ordered (channel, row, column)."""


def to_tokens(latents: Latents, units: Units, *, patch: int = 2) -> Tokens:
    """Patchify latents and store the tokens in unit order.

    Raises:
        ValueError: the latents do not cover the lattice of `units`.
    """
    expected = (units.frames, units.height * patch, units.width * patch)
    found = (latents.shape[1], *latents.shape[3:])
    if found != expected:
        raise ValueError(f"Latents of {found} (t, h, w) do not fit units over {expected}.")
    return _gather(latents, [cell for unit in units.clip for cell in unit.cells], patch)


def _gather(latents: Latents, cells: Sequence[tuple[int, ...]], patch: int) -> Tokens:
    levels = sorted({cell[3] for cell in cells})
    grids, starts, start = [], {}, 0
    for level in levels:
        pooled = _pooled(latents, 2**level, patch)
        grid = rearrange(pooled, "b t c (h p) (w q) -> b t h w (c p q)", p=patch, q=patch)
        starts[level], start = (start, *grid.shape[2:4]), start + math.prod(grid.shape[1:4])
        grids.append(rearrange(grid, "b t h w c -> b (t h w) c"))
    index = [starts[n][0] + (t * starts[n][1] + h) * starts[n][2] + w for t, h, w, n in cells]
    return torch.cat(grids, dim=1)[:, torch.tensor(index, device=latents.device)]


def to_latents(tokens: Tokens, units: Units, *, patch: int = 2) -> Latents:
    """Inverse of `to_tokens`: read the latents from the tokens of the finest level."""
    assembler = Assembler(units, patch=patch)
    parts = map(assembler.add, units.clip, tokens.split(list(units.sizes), dim=1))
    return torch.cat([frames for frames in parts if frames is not None], dim=1)


def _pooled(
    latents: Latents, factor: int, patch: int
) -> Float[Tensor, "batch frames channels rows columns"]:
    if factor == 1:
        return latents
    batch, step = len(latents), factor * patch
    flat = rearrange(latents, "b t c h w -> (b t) c h w")
    below, right = (-flat.shape[2]) % step, (-flat.shape[3]) % step
    flat = F.avg_pool2d(F.pad(flat, (0, right, 0, below), mode="replicate"), factor)
    return rearrange(flat, "(b t) c h w -> b t c h w", b=batch)


@dataclass(frozen=True)
class Known:
    """What is known of one unit before it is generated."""

    mask: Bool[Tensor, " tokens"]
    """Which tokens: coarse ones too, where all they cover is known."""
    tokens: Tokens
    """Their values; 0 elsewhere."""


def known_tokens(latents: Latents, units: Units, *, patch: int = 2) -> dict[int, Known]:
    """Find the units that first latent frames of a clip or stream reach into."""
    frames, known = latents.shape[1], {}
    for unit in itertools.islice(units, units.units_of(frames)):
        # Levels pool height and width alone, so a token is known if its frame is.
        mask = torch.tensor([cell[0] < frames for cell in unit.cells], device=latents.device)
        if mask.any():
            start = unit.frame_start
            cells = [(t - start, *cell) for t, *cell in unit.cells if t < frames]
            end = start + 1 + max(cell[0] for cell in cells)
            values = _gather(latents[:, start:end], cells, patch)
            tokens = values.new_zeros(len(latents), len(mask), values.shape[2])
            tokens[:, mask] = values
            known[unit.index] = Known(mask, tokens)
    return known


class Assembler:
    """Collect the tokens of finished units and hand out the latent frames that are complete."""

    def __init__(self, units: Units, *, patch: int = 2):
        self.units, self.patch, self.done = units, patch, 0
        self._open: dict[int, Tensor] = {}

    def add(self, unit: Unit, tokens: Tokens) -> Latents | None:
        """Store a unit; return the newly complete latent frames, None if there are none."""
        finest = [i for i, cell in enumerate(unit.cells) if cell[3] == 0]
        for t, group in itertools.groupby(finest, key=lambda i: unit.cells[i][0]):
            rows = list(group)
            shape = len(tokens), self.units.height, self.units.width, tokens.shape[2]
            frame = self._open.setdefault(t, tokens.new_empty(shape))
            h, w = zip(*(unit.cells[i][1:3] for i in rows), strict=True)
            frame[:, list(h), list(w)] = tokens[:, rows]
        if unit.complete_frames == self.done:
            return None
        frames = [self._open.pop(t) for t in range(self.done, unit.complete_frames)]
        grid = torch.stack(frames, dim=1)
        self.done = unit.complete_frames
        return rearrange(grid, "b t h w (c p q) -> b t c (h p) (w q)", p=self.patch, q=self.patch)

    def state_dict(self) -> dict[str, Tensor]:
        """The frames that are begun but not complete."""
        return {"done": torch.tensor(self.done)} | {str(t): f for t, f in self._open.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.done = int(state["done"])
        self._open = {int(t): frame for t, frame in state.items() if t != "done"}
