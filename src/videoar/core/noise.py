"""Noise of units: a function of (seed, unit, draw), the same in a stream as offline."""

import torch
from jaxtyping import Float
from torch import Tensor

_MASK64 = (1 << 64) - 1


def mixed(*values: int) -> int:
    """Make a seed of several numbers."""
    state = 0
    # splitmix64 (Steele et al. 2014): seeds that are close give unrelated streams.
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


def unit_noise(
    seeds: tuple[int, ...], unit: int, shape: tuple[int, ...], *, draw: int = 0
) -> Float[Tensor, "batch tokens features"]:
    """Standard normal noise of one unit for a batch of seeds; the same bits on every device.

    A function of (seed, unit, draw) alone: so a stream equals the offline run bit for bit, and can
    go on from a file.

    Args:
        seeds: the user's, one per video.
        unit: index of the unit in its stream.
        shape: tokens, features.
        draw: 0 for the starting noise, r for the fresh noise of step r.
    """
    rngs = [torch.Generator().manual_seed(mixed(seed, unit, draw)) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=rng) for rng in rngs])
