"""The flow-matching conventions, stated once.

    sigma in [0, 1], 1 is pure noise
    x        = (1 - sigma) * clean + sigma * noise
    velocity = noise - clean
    clean    = x - sigma * velocity

(rectified flow, Liu et al. 2022, arXiv:2209.03003; the signs of SD3, FLUX and Wan.) Sampling is a
matrix of sigmas, rows x waves of units; `Rows` evaluates it, for a clip as for a stream.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

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


Schedule = Callable[[int, int, int], tuple[int, int]]
"""(wave, number of waves, steps) -> the row of its first step, and rows from one to the next."""


@dataclass(frozen=True)
class Rows:
    """The matrix of sigmas: what every wave has before every row."""

    sigmas: tuple[Sigmas, ...]
    """Of the first waves; those of all others come last."""
    lag: float | Schedule
    """Rows between the starts of two waves, or what says when each takes its steps."""
    waves: int | None
    """Of a clip; None: of an endless stream."""

    def of(self, wave: int) -> Sigmas:
        """Return the sigmas of a wave."""
        return self.sigmas[min(wave, len(self.sigmas) - 1)]

    def steps(self, wave: int) -> range:
        """Return the rows in which a wave takes its steps.

        It waits for those that earlier waves have more than the rest.
        """
        rest, count, lag = len(self.sigmas[-1]), self.waves or 0, self.lag
        start, stride = lag(wave, count, rest - 1) if callable(lag) else (int(lag * wave), 1)
        start += stride * sum(len(sigmas) - rest for sigmas in self.sigmas[:wave])
        return range(start, start + stride * (len(self.of(wave)) - 1), stride)

    def done(self, row: int, wave: int) -> int:
        """Return the number of steps that a wave has taken before a row."""
        rows = self.steps(wave)
        return len(range(rows.start, min(row, rows.stop), rows.step))

    def enters(self, wave: int) -> int:
        """Return the row in which it starts, or the last one, which reads it: none is earlier."""
        return min(self.steps(each).start for each in (wave, (self.waves or wave + 1) - 1))

    @property
    def in_flight(self) -> int:
        """The most waves in one pass, the finished one in front included."""
        first = min(len(self.sigmas), self.waves or MAX_STEPS) - 1  # all behind it are alike
        waves = itertools.islice(itertools.count(first), self.waves and self.waves - first)
        end = self.steps(first).stop
        return len(list(itertools.takewhile(lambda wave: self.enters(wave) <= end, waves)))


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
