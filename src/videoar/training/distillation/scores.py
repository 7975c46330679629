"""Scores: what a network takes the noise in a clip for, and the losses that are made of them.

A score is the mean of passes that read different parts of the clip (`PASSES`). The functions know a
network as a `Predict` alone, so that they can be checked where everything is known.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from videoar.core.loss import Reads, layout, velocities
from videoar.core.transformer import TextContext
from videoar.core.units import Units, Visible

Critics = Literal["full", "causal", "symmetric"]
PASSES: dict[str, tuple[Reads, ...]] = {
    "full": ("all",),
    "causal": ("past",),
    "symmetric": ("past", "future"),
}
"""What is read in the passes whose mean is a critic's score."""
Context = Literal["full", "clean", "noisy"]
"""What a scorer of clips reads: see `FlowMatchingConfig.context`."""
Predict = Callable[[Tensor, Tensor, Reads], Tensor]
"""(noisy tokens, sigma of every unit, what is read) -> velocity."""
FIELDS = "batch tokens features"


@dataclass(frozen=True)
class Scorer:
    """A `Predict`: a transformer with its prompts, and the clip that it reads."""

    model: nn.Module
    text: TextContext
    """Of the prompts; with guidance followed by those of empty ones."""
    units: Units
    guidance: float = 1.0
    copies: tuple[Tensor, Tensor] | None = None
    """Clean copies and their sigmas, for a scorer that was trained by teacher forcing."""
    direction: Float[Tensor, "directions channels"] | None = None
    """What tells passes over the past and over the future apart."""

    def __call__(
        self, x: Float[Tensor, FIELDS], sigma: Float[Tensor, "batch units"], reads: Reads
    ) -> Float[Tensor, FIELDS]:
        plan = layout(self.units, Visible(), copies=self.copies is not None, reads=reads)
        offset = None
        if self.direction is not None and reads != "all":
            offset = self.direction[("past", "future").index(reads)]
        if self.guidance == 1:
            copies = self.copies
            return velocities(self.model, x, sigma, plan, self.text, copies=copies, offset=offset)
        copies = self.copies and (torch.cat([self.copies[0]] * 2), torch.cat([self.copies[1]] * 2))
        twice = torch.cat([x] * 2), torch.cat([sigma] * 2)
        both = velocities(self.model, *twice, plan, self.text, copies=copies).float()
        conditional, unconditional = both.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)


def score(predict: Predict, x: Tensor, sigma: Tensor, *, critic: Critics) -> Tensor:
    """Return the velocity that a critic sees: the mean of its passes."""
    return torch.stack([predict(x, sigma, reads).float() for reads in PASSES[critic]]).mean(0)


def critic_loss(
    predict: Predict,
    x: Float[Tensor, FIELDS],
    velocity: Float[Tensor, FIELDS],
    sigma: Float[Tensor, "batch units"],
    *,
    critic: Critics,
) -> Float[Tensor, ""]:
    """Regress the velocity on noisy videos of the student.

    What a symmetric critic must get right is the *mean* of its two passes: each alone would be the
    expectation given half of the video, and the mean of two such is not that given all of it.
    """
    return (score(predict, x, sigma, critic=critic) - velocity).square().mean()


def matching_loss(
    clean: Float[Tensor, FIELDS],
    fake: Float[Tensor, FIELDS],
    real: Float[Tensor, FIELDS],
    unit: Int[Tensor, " tokens"],
    *,
    normalise: bool = True,
) -> Float[Tensor, ""]:
    """Return the loss whose gradient is `(fake - real) / n` per element, divided by their number.

    DMD, eq. 7 and 8: `n` is the mean distance of the sample from the teacher's estimate, here of
    each unit, whose sigmas and difficulty may differ.

    Args:
        clean: the student's sample; gradients flow into it alone.
        fake: the critic's estimate of the clean sample.
        real: the teacher's.
        unit: of every token.
        normalise: whether to divide by `n`.
    """
    gradient = fake.detach() - real.detach()
    if normalise:
        distance, count = (clean - real).detach().abs().mean(2), torch.bincount(unit)
        total = distance.new_zeros(len(clean), len(count)).index_add(1, unit, distance)
        gradient = gradient / (total / count).clamp(min=1e-6)[:, unit, None]
    gradient = torch.nan_to_num(gradient)
    return 0.5 * (clean - (clean - gradient).detach()).square().mean()
