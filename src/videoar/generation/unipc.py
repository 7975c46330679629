"""Schedulers of diffusers: their grids, and UniPC of order 2, which samples Wan.

A predictor goes to the next sigma; what the model then says there corrects that step before the
next one is made (Zhao et al. 2023, arXiv:2302.04867, the variant B_2(h) that predicts clean data).
It works along lambda = log((1 - sigma) / sigma), which is infinite at the ends.
"""

import math

import numpy as np
import torch
from torch import Tensor

from videoar.core.flow import Memory, Sigmas, shifted

GRIDS = ("unipc", "flow-match-euler")
MOST = 1 - 1e-6  # of a sigma, there too


def grid(step: str, num_inference_steps: int, *, shift: float) -> Sigmas:
    """The falling sigmas of one unit; they end above 0 at the least of training, 0.001.

    Those of `unipc` end without it, those of `flow-match-euler` with it, but shifted twice.
    """
    least = 0.001 if step == "unipc" else shift / (999 + shift)
    sigmas = np.linspace(1, least, num_inference_steps + (step == "unipc"))[:num_inference_steps]
    return (*shifted(torch.from_numpy(sigmas), shift).tolist(), 0.0)


def timestep(sigma: float) -> float:
    """Return a sigma as the model is told it: whole timesteps, cut off."""
    return int(1000 * min(sigma, MOST)) / 1000


def unipc_step(
    x: Tensor, velocity: Tensor, sigmas: Sigmas, memory: Memory, _: object
) -> tuple[Tensor, Memory]:
    """Correct the step before, then predict: see `core.sampler.Step`.

    What is kept between steps are corrected tokens and two estimates of the clean data.
    """
    sigmas = tuple(torch.tensor(sigmas[-4:]).clamp(max=MOST).tolist())  # in float32
    clean = x - sigmas[-2] * velocity
    before = [] if memory is None else list(memory)
    if not sigmas[-1]:
        return clean, None
    if before:
        x = _update(before[0], sigmas[:-1], before[1:], clean)
    known = [clean, *before[1:2]]
    return _update(x, sigmas, known), torch.stack([x, *known])


def _update(x: Tensor, sigmas: Sigmas, known: list[Tensor], new: Tensor | None = None) -> Tensor:
    """Go from the sigma before the last to the last, by the clean data known at it and before.

    With `new`, the clean data at the last sigma itself, it is the corrector.
    """
    end, start, *earlier = (math.log((1 - sigma) / sigma) for sigma in sigmas[::-1])
    h = end - start
    phi = math.expm1(-h)
    first = (phi / -h - 1) / phi
    second = 2 * ((phi / -h - 1) / -h - 0.5) / phi
    mean, last = known[0], 0.5
    if known[1:]:
        ratio = (earlier[0] - start) / h
        weight = 0.5 if new is None else (first - second) / (1 - ratio)
        mean, last = mean + weight / ratio * (known[1] - known[0]), first - weight
    if new is not None:
        mean = mean + last * (new - known[0])
    return sigmas[-1] / sigmas[-2] * x - (1 - sigmas[-1]) * phi * mean
