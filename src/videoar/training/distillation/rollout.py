"""The student's own videos, made by the sampler, and their last step with gradients."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from videoar.core.attention import attention_mask
from videoar.core.cache import KVCache
from videoar.core.flow import clean_of, renoise_step
from videoar.core.loss import layout, on
from videoar.core.sampler import Sampler, SamplerConfig
from videoar.core.transformer import TextContext, VideoTransformer
from videoar.core.units import Units, Visible
from videoar.training.distillation.scores import FIELDS


@dataclass(frozen=True)
class Rollout:
    """A clip that the student made."""

    clean: Float[Tensor, FIELDS]
    before: Float[Tensor, FIELDS]
    """The units before their last step."""
    sigma: float
    """The sigma there."""


@torch.no_grad()
def rollout(
    student: VideoTransformer,
    units: Units,
    text: TextContext,
    *,
    sigmas: tuple[float, ...],
    rng: torch.Generator,
) -> Rollout:
    """Make clips with the sampler, one per prompt, at the falling `sigmas` down to 0."""
    device, batch = text[0][0].device, len(text[0][0])
    seeds = torch.randint(2**62, (batch,), **on(rng)).tolist()
    config = SamplerConfig(sigmas=sigmas, step=renoise_step)
    sampler = Sampler(student, units, text, config, seeds=seeds, device=device)
    finished = list(sampler)
    clean = torch.cat([unit.tokens for unit in finished], dim=1)
    before = torch.cat([unit.before for unit in finished if unit.before is not None], dim=1)
    return Rollout(clean, before, sigmas[-2])


def last_step(
    student: VideoTransformer,
    units: Units,
    text: TextContext,
    made: Rollout,
    *,
    chosen: Bool[Tensor, " units"],
) -> Float[Tensor, FIELDS]:
    """Take the last step of a rollout again, of the chosen units side by side, with gradients.

    The result equals `made.clean` up to rounding, and it is that for the other units.
    """
    device, batch = made.clean.device, len(made.clean)
    plan, coords = layout(units, Visible(), copies=True), units.coords.to(device)
    own, tokens = units.unit, len(units.unit)
    cache = KVCache()
    with torch.no_grad():
        student(
            made.clean,
            coords=coords,
            sigma=made.clean.new_zeros(1, 1),
            unit=torch.zeros_like(own).to(device),
            text=[(key.detach(), value.detach()) for key, value in text],
            mask=attention_mask(plan.visible, own, own, device=device),
            cache=cache,
        )
    cache.commit(list(enumerate(units.sizes)))
    rows = chosen[own].nonzero()[:, 0]
    reads = torch.cat([own, plan.unit[tokens + rows]])
    output = student(
        made.before[:, rows],
        coords=coords[rows],
        sigma=made.clean.new_full((batch, 1), made.sigma),
        unit=torch.zeros_like(rows).to(device),
        text=text,
        mask=attention_mask(plan.visible, plan.unit[tokens + rows], reads, device=device),
        cache=cache,
    )
    clean = clean_of(made.before[:, rows], output.velocity.float(), made.sigma)
    return made.clean.index_copy(1, rows.to(device), clean.to(made.clean))
