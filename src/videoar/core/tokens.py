"""Latents to tokens in unit order; tokens that are known."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from videoar.core.units import Units

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
    return gather(latents, torch.cat([unit.grid_index for unit in units.clip]), patch)


def gather(latents: Latents, cells: Int[Tensor, "tokens 4"], patch: int) -> Tokens:
    """Return the tokens of (t, h, w, level) indices."""
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
