"""Rotary positions over coordinates, and `attend`: the one seam for attention kernels."""

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


@cache
def _frequencies(head_dim: int, theta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Angular frequencies per axis; t takes what h and w leave (Wan: 44, 42, 42 of 128 dims)."""
    side = 2 * (head_dim // 6)
    dims = (head_dim - 2 * side, side, side)
    t, h, w = (theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d) for d in dims)
    return t, h, w


def rope_table(
    coords: Float[Tensor, "*tokens 4"], *, head_dim: int, theta: float
) -> Float[Tensor, "2 *tokens pairs"]:
    """Cosines and sines for coordinates (t, h, w, level); the level takes no part.

    Angles are formed in float64: positions have no upper limit, as a table would impose. (Su et
    al. 2021, arXiv:2104.09864, split over three axes.)
    """
    frequencies = _frequencies(head_dim, theta)
    angles = torch.cat(
        [
            coords[..., axis, None].double() * f.to(coords.device)
            for axis, f in enumerate(frequencies)
        ],
        dim=-1,
    )
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(
    x: Float[Tensor, "*batch tokens head_dim"], table: Float[Tensor, "2 #tokens pairs"]
) -> Float[Tensor, "*batch tokens head_dim"]:
    """Rotate interleaved pairs (2i, 2i+1). Rotations compose, so cached keys can be moved again."""
    cos, sin = table
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).type_as(x)


def attend(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    value: Float[Tensor, "batch heads keys head_dim"],
    mask: Bool[Tensor, "queries keys"] | BlockMask | None = None,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Softmax attention.

    A dense mask runs on SDPA, a block mask on FlexAttention (CUDA), none on the fastest kernel that
    SDPA finds. There is no silent change of backend.
    """
    if isinstance(mask, BlockMask):
        return _compiled_flex()(query, key, value, block_mask=mask)
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # In training on a CPU the bfloat16 kernel's backward takes twice as long as the float32
        # one.
        with torch.autocast("cpu", enabled=False):
            wide = (part.float() for part in (query, key, value))
            return F.scaled_dot_product_attention(*wide, attn_mask=mask)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


@cache
def _compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


def block_mask(
    visible: Bool[Tensor, "units units"], unit: Tensor, *, device: torch.device | str
) -> BlockMask:
    """The block-sparse form of `token_mask(visible, unit, unit)` for FlexAttention."""
    visible, unit = visible.to(device), unit.to(device)

    def mask_mod(batch, head, query, key):
        return visible[unit[query], unit[key]]

    return create_block_mask(mask_mod, None, None, len(unit), len(unit), device=device)
