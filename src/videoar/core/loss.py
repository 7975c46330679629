"""The loss of a training clip, whatever its partition: flow matching."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from videoar.checks import Count, Finite, Limit, Natural, Options, Share
from videoar.core.attention import Mask, attention_mask
from videoar.core.flow import add_noise, random_sigmas, velocity_of
from videoar.core.schemes import Scheme
from videoar.core.tokens import Latents, Tokens, to_tokens
from videoar.core.transformer import Network, TextContext
from videoar.core.units import Units, Visible, clean_copies

Floor = Annotated[float, Limit(lambda sigma: sigma >= 0, "0 or more")]
Noise = Annotated[float, Limit(lambda sigma: 0 <= sigma < 1, "0 to below 1")]


@dataclass(frozen=True, kw_only=True)
class FlowMatchingConfig(Options):
    """Flow matching over a mix of unit schemes (Lipman et al. 2022, arXiv:2210.02747)."""

    context: Literal["clean", "noisy", "full"] = "clean"
    """`clean`: teacher forcing, every unit reads clean copies of those before it. `noisy`:
    diffusion forcing (Chen et al. 2024, arXiv:2407.01392), every unit at its own sigma; needed for
    `lag < steps`. `full`: one sigma, everything reads everything: a teacher for distillation."""
    clip_frames: Count = 8
    """Latent frames per training clip, cut from longer ones: the window of the generation."""
    sink_frames: Natural = 2
    """First frames of a clip that may stand apart from the rest, in whole segments that fit: what
    a unit sees when the window has moved away from the sinks."""
    far_probability: Share = 0.5
    """How often the frames behind the sinks come from anywhere in the video."""
    short_probability: Share = 0.0
    """How often clips are cut to their one or two first latent frames, each as often as fits into
    a whole clip, with other noise. The first is one picture: there alone must the prompt say where
    things go; later frames read it in their context (`docs/log.md`)."""
    shift: Finite = 5.0
    """Shift of the training sigmas towards noise: few steps are spent at high sigmas."""
    sigma_floor: Floor = 0.4
    """Below this sigma an error of the clean data counts as it does here. The error of the velocity
    is that of the clean data over sigma: a few nearly clean units would drown the rest."""
    context_noise: Noise = 0.15
    """Clean copies are noised up to this sigma, told to the model: its own output is not
    perfect."""
    text_dropout: Share = 0.1
    """How often the prompt is empty, for guidance."""


@dataclass(frozen=True, eq=False)
class Layout:
    """A training clip's sequence: what the tokens are, and who reads whom."""

    coords: Float[Tensor, "tokens 4"]
    unit: Int[Tensor, " tokens"]
    visible: Bool[Tensor, "units units"]


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)  # kept: what is made while measuring must serve training too
def mask_of(plan: Layout, device: torch.device) -> Mask | None:
    """Return who reads whom in a clip, in the form in which a device is fast."""
    return attention_mask(plan.visible, plan.unit, plan.unit, device=device)


Reads = Literal["past", "future", "all"]
"""What a unit reads besides itself: what is visible to it, the transpose of that, or everything."""


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def layout(units: Units, visible: Visible, *, copies: bool, reads: Reads = "past") -> Layout:
    """The lattice once, or twice with the clean copies in front (teacher forcing)."""
    index = torch.arange(len(units.sizes))
    past = visible.matrix(index, units.waves)
    seen = {"past": past, "future": past.T, "all": torch.ones_like(past)}[reads]
    coords, unit = units.coords, units.unit
    if copies:
        seen = clean_copies(seen)
        coords, unit = torch.cat([coords] * 2), torch.cat([unit, unit + len(index)])
    return Layout(coords, unit, seen)


def velocities(
    model: Callable[..., Any],
    tokens: Tokens,
    sigma: Float[Tensor, "batch units"],
    plan: Layout,
    text: TextContext,
    *,
    copies: tuple[Tensor, Tensor] | None = None,
    offset: Tensor | None = None,
) -> Tokens:
    """Predict the velocities of a clip in one pass, beside its clean copies and their sigmas."""
    device, both = tokens.device, tokens
    if copies is not None:
        both, sigma = torch.cat([copies[0], tokens], dim=1), torch.cat([copies[1], sigma], dim=1)
    output = model(
        both,
        coords=plan.coords.to(device),
        sigma=sigma,
        unit=plan.unit.to(device),
        text=text,
        mask=mask_of(plan, device),
        offset=offset,
    )
    return output.velocity[:, -tokens.shape[1] :]


def flow_matching_loss(
    model: Network,
    latents: Latents,
    text: TextContext,
    *,
    scheme: Scheme,
    config: FlowMatchingConfig,
    rng: torch.Generator,
) -> Float[Tensor, ""]:
    """Return the loss of one scheme on clips of any length.

    Every unit of every sample has its own sigma, and all units count alike: it is the mean over
    factors p(unit | units before), whatever their sizes.
    """
    device, patch = latents.device, model.config.patch
    height, width = latents.shape[3] // patch, latents.shape[4] // patch
    units = Units(scheme, latents.shape[1], height, width)
    reads: Reads = "all" if config.context == "full" else "past"
    plan = layout(units, Visible(), copies=config.context == "clean", reads=reads)
    clean = to_tokens(latents, units, patch=patch)

    batch, unit, count = len(clean), units.unit.to(device), len(units.sizes)
    drawn = 1 if config.context == "full" else count
    sigma = random_sigmas((batch, drawn), rng, shift=config.shift).to(device)
    sigma = sigma.expand(batch, count)
    noise = torch.randn(clean.shape, **on(rng)).to(clean)
    tokens, copies = add_noise(clean, noise, sigma[:, unit, None]), None
    if config.context == "clean":
        low = config.context_noise * torch.rand(sigma.shape, **on(rng)).to(device)
        other = torch.randn(clean.shape, **on(rng)).to(clean)
        copies = add_noise(clean, other, low[:, unit, None]), low
    velocity = velocities(model, tokens, sigma, plan, text, copies=copies)
    weight = (sigma / sigma.clamp(min=config.sigma_floor)).square()[:, unit, None]
    error = (velocity.float() - velocity_of(clean, noise)).square()
    error = (weight * error).mean(dim=(0, 2))
    per_unit = torch.zeros(count, device=device).index_add(0, unit, error)
    return (per_unit / torch.tensor(units.sizes, device=device)).mean()


def on(rng: torch.Generator) -> dict[str, Any]:
    """Return where and from what to draw: keywords of torch's random functions."""
    return {"generator": rng, "device": rng.device}
