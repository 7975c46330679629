"""Objectives: which module is trained, and by which loss. No loop, no optimizer, no files."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from videoar.attention import Mask, attention_mask
from videoar.flow import add_noise, random_sigmas, velocity_of
from videoar.model import TextContext, VideoTransformer
from videoar.text import PAD, Rows
from videoar.tokens import to_tokens
from videoar.units import Scheme, Units, Visible, clean_copies


@runtime_checkable
class Objective(Protocol):
    """What a training loop needs to know: the module it updates, and the loss of a batch."""

    @property
    def module(self) -> nn.Module:
        """What the optimizers update."""
        ...

    @property
    def result(self) -> nn.Module:
        """The part of it that is wanted in the end: its weights are averaged and exported."""
        ...

    @property
    def frozen(self) -> tuple[nn.Module, ...]:
        """Networks that are asked and not trained."""
        ...

    @property
    def players(self) -> tuple[str, ...]:
        """Children of the module with optimizers of their own, or "" for all of it."""
        ...

    def turn(self, step: int) -> str:
        """Return the player that moves in a step."""
        ...

    def loss(
        self, batch: dict[str, Tensor], rng: torch.Generator, *, step: int
    ) -> dict[str, Tensor]:
        """Return scalar tensors; `loss` is minimised, the others are logged.

        The number and the shapes of passes depend on `step` alone: ranks keep in step.
        """
        ...


class Alone:
    """An objective that moves everything in every step."""

    module: Any
    frozen: tuple[Any, ...] = ()
    players = ("",)

    @property
    def result(self) -> nn.Module:
        return self.module

    def turn(self, step: int) -> str:
        return ""


@dataclass(frozen=True, kw_only=True)
class FlowMatchingConfig:
    """Flow matching over a mix of unit schemes (Lipman et al. 2022, arXiv:2210.02747)."""

    context: Literal["clean", "noisy", "full"] = "clean"
    """`clean`: teacher forcing, every unit reads clean copies of those before it. `noisy`:
    diffusion forcing (Chen et al. 2024, arXiv:2407.01392), every unit at its own sigma; needed for
    `lag < steps`. `full`: one sigma, everything reads everything: a teacher for distillation."""
    clip_frames: int = 8
    """Latent frames per training clip, cut from longer ones: the window of the generation."""
    sink_frames: int = 2
    """First frames of a clip that may stand apart from the rest, in whole segments that fit: what
    a unit sees when the window has moved away from the sinks."""
    far_probability: float = 0.5
    """How often the frames behind the sinks come from anywhere in the video."""
    short_probability: float = 0.0
    """How often clips are cut to two latent frames. The first is one picture, so there alone must
    the prompt say where things go; later frames read it in their context (`docs/log.md`)."""
    shift: float = 5.0
    """Shift of the training sigmas towards noise: few steps are spent at high sigmas."""
    sigma_floor: float = 0.4
    """Below this sigma an error of the clean data counts as it does here. The error of the velocity
    is that of the clean data over sigma: a few nearly clean units would drown the rest."""
    context_noise: float = 0.15
    """Clean copies are noised up to this sigma, told to the model: its own output is not
    perfect."""
    text_dropout: float = 0.1
    """How often the prompt is empty, for guidance."""


@dataclass(frozen=True, eq=False)
class Layout:
    """A training clip's sequence: what the tokens are, and who reads whom."""

    units: Units
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
    return Layout(units, coords, unit, seen)


class StoredText(nn.Module):
    """Stands for an encoder too large to run in training: prompts come as the rows it made."""

    empty: Tensor

    def __init__(self, empty: Float[Tensor, "words channels"]):
        super().__init__()
        self.register_buffer("empty", empty, persistent=False)

    def forward(self, rows: Rows) -> Rows:
        return rows


class TextToVideo(nn.Module):
    """A transformer and the encoder of its prompts, trained together unless that is frozen."""

    def __init__(self, transformer: VideoTransformer, text: nn.Module):
        super().__init__()
        self.transformer, self.text = transformer, text

    def context(self, words: Tensor) -> TextContext:
        """What the transformer reads of prompts: token ids, or stored rows."""
        return self.transformer.encode_text(self.text(words))

    def without(self, words: Tensor, dropped: Bool[Tensor, " batch"]) -> Tensor:
        """Return the prompts, empty where `dropped`."""
        if isinstance(self.text, StoredText):
            return torch.where(dropped[:, None, None], self.text.empty.to(words), words)
        return words.masked_fill(dropped[:, None], PAD)


def velocities(
    model: nn.Module,
    tokens: Float[Tensor, "batch tokens features"],
    sigma: Float[Tensor, "batch units"],
    plan: Layout,
    text: TextContext,
    *,
    copies: tuple[Tensor, Tensor] | None = None,
    offset: Tensor | None = None,
) -> Float[Tensor, "batch tokens features"]:
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


class FlowMatching(Alone):
    """Train one transformer, and its text encoder, on several schemes in turn.

    Every unit of every sample has its own sigma, and all units count alike: the loss is the mean
    over factors p(unit | units before), whatever their sizes.

    Args:
        module: the model and its text encoder.
        schemes: drawn from at every step.
        config: see `FlowMatchingConfig`.
    """

    def __init__(
        self,
        module: TextToVideo,
        *,
        schemes: tuple[Scheme, ...],
        config: FlowMatchingConfig,
    ):
        self.module, self.schemes, self.config = module, schemes, config

    def loss(
        self, batch: dict[str, Tensor], rng: torch.Generator, *, step: int = 0
    ) -> dict[str, Tensor]:
        scheme = self.schemes[int(torch.randint(len(self.schemes), (), **_on(rng)))]
        dropped = torch.rand(len(batch["text"]), **_on(rng)) < self.config.text_dropout
        words = self.module.without(batch["text"], dropped)
        latents, short = batch["latents"], self.config.short_probability
        if short and torch.rand((), **_on(rng)) < short:
            latents = latents[:, :2]
        return self.scheme_loss(self.clip(latents, scheme, rng), words, scheme, rng)

    def clip(
        self,
        latents: Float[Tensor, "batch frames channels height width"],
        scheme: Scheme,
        rng: torch.Generator,
    ) -> Float[Tensor, "batch clip channels height width"]:
        """Cut training clips: the sinks, then consecutive frames from anywhere behind them."""
        batch, frames = latents.shape[:2]
        length = min(self.config.clip_frames, frames)
        units = Units(scheme, length, 1, 1)  # for its segments alone
        head = units.whole_segments(self.config.sink_frames, window=length)
        start = torch.randint(head, frames - (length - head) + 1, (batch,), **_on(rng))
        near = torch.rand(batch, **_on(rng)) >= self.config.far_probability
        offset = (start - head).masked_fill(near, 0).to(latents.device)
        place = torch.arange(length, device=latents.device)
        index = place + offset[:, None] * (place >= head)
        return latents[torch.arange(batch, device=latents.device)[:, None], index]

    def scheme_loss(
        self,
        latents: Float[Tensor, "batch frames channels height width"],
        words: Tensor,
        scheme: Scheme,
        rng: torch.Generator,
    ) -> dict[str, Tensor]:
        """The loss of one scheme on clips of any length."""
        config, device, model = self.config, latents.device, self.module.transformer
        patch = model.config.patch
        height, width = latents.shape[3] // patch, latents.shape[4] // patch
        units = Units(scheme, latents.shape[1], height, width)
        reads: Reads = "all" if config.context == "full" else "past"
        plan = layout(units, Visible(), copies=config.context == "clean", reads=reads)
        clean = to_tokens(latents, units, patch=patch)

        batch, unit, count = len(clean), units.unit.to(device), len(units.sizes)
        levels = 1 if config.context == "full" else count
        sigma = random_sigmas((batch, levels), rng, shift=config.shift).to(device)
        sigma = sigma.expand(batch, count)
        noise = torch.randn(clean.shape, **_on(rng)).to(clean)
        tokens, copies = add_noise(clean, noise, sigma[:, unit, None]), None
        if config.context == "clean":
            low = config.context_noise * torch.rand(sigma.shape, **_on(rng)).to(device)
            other = torch.randn(clean.shape, **_on(rng)).to(clean)
            copies = add_noise(clean, other, low[:, unit, None]), low
        text = self.module.context(words)
        velocity = velocities(model, tokens, sigma, plan, text, copies=copies)
        weight = (sigma / sigma.clamp(min=config.sigma_floor)).square()[:, unit, None]
        error = (velocity.float() - velocity_of(clean, noise)).square()
        error = (weight * error).mean(dim=(0, 2))
        per_unit = torch.zeros(len(units.sizes), device=device).index_add(0, unit, error)
        return {"loss": (per_unit / torch.tensor(units.sizes, device=device)).mean()}


def _on(rng: torch.Generator) -> dict[str, Any]:
    return {"generator": rng, "device": rng.device}
