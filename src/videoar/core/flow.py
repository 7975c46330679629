"""The flow-matching conventions, stated once.

    sigma in [0, 1], 1 is pure noise
    x        = (1 - sigma) * clean + sigma * noise
    velocity = noise - clean
    clean    = x - sigma * velocity

(rectified flow, Liu et al. 2022, arXiv:2209.03003; the signs of SD3, FLUX and Wan.) Sampling is a
matrix of sigmas, rows x waves of units; `step_of` evaluates it, for a clip as for a stream.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from videoar.checks import check, checked

Sigmas = tuple[float, ...]
"""Falling levels of noise, of one unit."""
Memory = Tensor | None
"""What a step leaves for the next one of its unit; None: nothing, or there was none."""
MAX_STEPS = 10_000


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Move sigmas towards noise (Esser et al. 2024, arXiv:2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@checked
def sigma_steps(num_inference_steps: int, *, shift: float = 1.0) -> Sigmas:
    """The falling sigmas of one unit: 1 first, 0 last, `num_inference_steps + 1` values.

    Raises:
        ValueError: fewer than one step, or a shift that is not a positive number.
    """
    possible = 1 <= num_inference_steps <= MAX_STEPS
    check("num_inference_steps", num_inference_steps, possible, f"1 to {MAX_STEPS}")
    check("shift", shift, 0 < shift < math.inf, "a number above 0, such as 3.0")
    sigmas = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64)
    return tuple(shifted(sigmas, shift).tolist())


def step_of(row: int, wave: int, *, steps: int, lag: int) -> int:
    """Index into the sigmas of a wave before row `row`: `clamp(row - lag * wave, 0, steps)`.

    `lag = steps` is autoregressive, `0 < lag < steps` pipelined, `lag = 0` full sequence.
    """
    return max(0, min(row - lag * wave, steps))


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Mix clean data with noise; sigma broadcasts against them."""
    return (1 - sigma) * clean + sigma * noise


def velocity_of(clean: Tensor, noise: Tensor) -> Tensor:
    """The regression target of a flow-matching model."""
    return noise - clean


def clean_of(x: Tensor, velocity: Tensor, sigma: Tensor | float) -> Tensor:
    """Estimate the clean data from a noisy sample and its velocity."""
    return x - sigma * velocity


def euler_step(x: Tensor, velocity: Tensor, sigmas: Sigmas, *_: object) -> tuple[Tensor, Memory]:
    """Follow the probability-flow ODE; the arguments of every step: see `sampler.Step`."""
    return x + (sigmas[-1] - sigmas[-2]) * velocity, None


def renoise_step(
    x: Tensor, velocity: Tensor, sigmas: Sigmas, _: Memory, fresh: Callable[[], Tensor]
) -> tuple[Tensor, Memory]:
    """Predict the clean data and noise it again with fresh noise: for distilled models.

    Consistency sampling, Song et al. 2023, arXiv:2303.01469, algorithm 1.
    """
    clean = clean_of(x, velocity, sigmas[-2])
    return add_noise(clean, fresh(), sigmas[-1]) if sigmas[-1] else clean, None


def random_sigmas(shape: tuple[int, ...], generator: torch.Generator, *, shift: float) -> Tensor:
    """Draw training sigmas, uniform before the shift."""
    return shifted(torch.rand(shape, generator=generator, device=generator.device), shift)
