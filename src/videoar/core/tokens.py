"""Latents to tokens in unit order, and back; tokens that are known."""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
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
    return _gather(latents, torch.cat([unit.grid_index for unit in units.clip]), patch)


def _gather(latents: Latents, cells: Int[Tensor, "tokens 4"], patch: int) -> Tokens:
    t, h, w, level = cells.unbind(1)
    grids, index, start = [], torch.zeros_like(t), 0
    for n in level.unique().tolist():
        pooled = _pooled(latents, 2**n, patch)
        grid = rearrange(pooled, "b t c (h p) (w q) -> b t h w (c p q)", p=patch, q=patch)
        place = start + (t * grid.shape[2] + h) * grid.shape[3] + w
        index = torch.where(level == n, place, index)
        grids.append(grid.flatten(1, 3))
        start += grids[-1].shape[1]
    return torch.cat(grids, dim=1)[:, index.to(latents.device)]


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
        mask = unit.grid_index[:, 0] < frames
        if mask.any():
            start = torch.tensor([unit.frame_start, 0, 0, 0])
            cells = (unit.grid_index - start) * mask[:, None]  # any that is there, for the others
            near = latents[:, unit.frame_start : unit.frame_start + units.segment_frames]
            mask = mask.to(latents.device)
            known[unit.index] = Known(mask, _gather(near, cells, patch) * mask[:, None])
    return known


class Assembler:
    """Collect the tokens of finished units and hand out the latent frames that are complete."""

    def __init__(self, units: Units, *, patch: int = 2):
        self.units, self.patch, self.done = units, patch, 0
        self._open: Float[Tensor, "batch cells features"] | None = None
        """The cells of a segment, whose frames are overwritten by those of the next one."""

    def add(self, unit: Unit, tokens: Tokens) -> Latents | None:
        """Store a unit; return the newly complete latent frames, None if there are none."""
        height, width, segment = self.units.height, self.units.width, self.units.segment_frames
        area = height * width
        if self._open is None:
            self._open = tokens.new_zeros(len(tokens), area * segment, tokens.shape[2])
        t, h, w, level = unit.grid_index.to(tokens.device).unbind(1)
        finest, places = level == 0, (t % segment * height + h) * width + w
        self._open[:, places[finest]] = tokens[:, finest]
        start, count = self.done % segment, unit.complete_frames - self.done
        if not count:
            return None
        self.done = unit.complete_frames
        axes = "b (t h w) (c p q) -> b t c (h p) (w q)"
        grid = self._open[:, area * start : area * (start + count)].clone()
        return rearrange(grid, axes, h=height, w=width, p=self.patch, q=self.patch)

    def state_dict(self) -> dict[str, Tensor]:
        """The frames that are begun but not complete."""
        begun = {} if self._open is None else {"open": self._open.clone()}
        return {"done": torch.tensor(self.done)} | begun

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on like the one that gave `state`."""
        self.done, begun = int(state["done"]), state.get("open")
        self._open = None if begun is None else begun.clone()
