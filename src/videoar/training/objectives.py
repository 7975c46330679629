"""Objectives: which module is trained, and by which loss. No loop, no files."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from videoar.checks import Count, Options
from videoar.core.loss import FlowMatchingConfig, flow_matching_loss, on
from videoar.core.schemes import Scheme, parse
from videoar.core.tokens import Latents
from videoar.core.transformer import TextContext, VideoTransformer
from videoar.core.units import Units
from videoar.encoders.text_encoder import StoredText, TextEncoder
from videoar.training.optimizer import OptimizerConfig

Named = dict[str, Tensor]
"""A batch, or the terms of its loss."""


class Objective(ABC):
    """What a training loop needs to know: the module it updates, and the loss of a batch.

    As it stands here everything moves in every step.
    """

    module: Any
    """What the optimizers update."""
    frozen: tuple[Any, ...] = ()
    """Networks that are asked and not trained."""

    @property
    def result(self) -> nn.Module:
        """The part of it that is wanted in the end: its weights are averaged and exported."""
        return self.module

    def optimizers(self, config: OptimizerConfig) -> dict[str, OptimizerConfig]:
        """Return the optimizers of children of the module, or of "" for all of it.

        `config` is that of the run.
        """
        return {"": config}

    def group_of(self, step: int) -> str:
        """Return whose optimizer moves in a step."""
        return ""

    @abstractmethod
    def loss(self, batch: Named, rng: torch.Generator, *, step: int = 0) -> Named:
        """Return scalar tensors; `loss` is minimised, the others are logged.

        What counts them adds the `tokens` of the batch, and the `flops` forward and backward.

        The number and the shapes of passes depend on `step` alone: ranks keep in step.
        """


class TextToVideo(nn.Module):
    """A transformer and the encoder of its prompts, trained together unless that is frozen."""

    def __init__(self, transformer: VideoTransformer, text: TextEncoder | StoredText):
        super().__init__()
        self.transformer, self.text = transformer, text

    def context(self, words: Tensor) -> TextContext:
        """What the transformer reads of prompts: token ids, or stored rows."""
        return self.transformer.encode_text(self.text(words))

    def without(self, words: Tensor, dropped: Bool[Tensor, " batch"]) -> Tensor:
        """Return the prompts, empty where `dropped`."""
        dropped = dropped.view(-1, *[1] * (words.ndim - 1))
        return torch.where(dropped, self.text.empty, words)


@dataclass(frozen=True, kw_only=True)
class StageConfig(Options):
    """The first steps of a run, with clips of their own."""

    steps: Count
    """Optimizer steps."""
    flow: FlowMatchingConfig
    """Its objective, and the length of its clips."""
    draws: Count = 1
    """Clips cut of each sample of a batch: short ones cost little, and many are wanted."""
    units: tuple[str, ...] = ()
    """Unit schemes; those of the run, if none is named."""


def draw_clip(
    latents: Latents, scheme: Scheme, config: FlowMatchingConfig, rng: torch.Generator
) -> Float[Tensor, "batch clip channels height width"]:
    """Cut training clips: the sinks, then consecutive frames from anywhere behind them."""
    batch, frames = latents.shape[:2]
    length = min(config.clip_frames, frames)
    units = Units(scheme, length, 1, 1)  # for its segments alone
    head = units.whole_segments(config.sink_frames, window=length)
    start = torch.randint(head, frames - (length - head) + 1, (batch,), **on(rng))
    near = torch.rand(batch, **on(rng)) >= config.far_probability
    offset = (start - head).masked_fill(near, 0).to(latents.device)
    place = torch.arange(length, device=latents.device)
    index = place + offset[:, None] * (place >= head)
    return latents[torch.arange(batch, device=latents.device)[:, None], index]


class FlowMatching(Objective):
    """Train one transformer, and its text encoder, on several schemes in turn.

    Args:
        module: the model and its text encoder.
        schemes: drawn from at every step.
        config: see `FlowMatchingConfig`.
        stages: what is done otherwise at first, one after the other.
    """

    def __init__(
        self,
        module: TextToVideo,
        *,
        schemes: tuple[Scheme, ...],
        config: FlowMatchingConfig,
        stages: tuple[StageConfig, ...] = (),
    ):
        self.module, self.schemes, self.config = module, schemes, config
        self._stages = [(stage, tuple(map(parse, stage.units)) or schemes) for stage in stages]

    def _at(self, step: int) -> tuple[tuple[Scheme, ...], FlowMatchingConfig, int]:
        """Return schemes, objective and clips per sample of a step."""
        for stage, schemes in self._stages:
            if step < stage.steps:
                return schemes, stage.flow, stage.draws
            step -= stage.steps
        return self.schemes, self.config, 1

    def loss(self, batch: Named, rng: torch.Generator, *, step: int = 0) -> Named:
        schemes, config, draws = self._at(step)
        scheme = schemes[int(torch.randint(len(schemes), (), **on(rng)))]
        dropped = torch.rand(len(batch["text"]), **on(rng)) < config.text_dropout
        words = self.module.without(batch["text"], dropped)
        latents, short = batch["latents"], config.short_probability
        if short and torch.rand((), **on(rng)) < short:
            first = 1 + int(torch.randint(2, (), **on(rng)))
            draws *= max(1, min(config.clip_frames, latents.shape[1]) // first)
            latents = latents[:, :first]
        # A prompt is encoded once for all its clips, which stand side by side.
        clip = draw_clip(latents.repeat_interleave(draws, 0), scheme, config, rng)
        text = self.module.context(words)
        model = self.module.transformer
        loss = flow_matching_loss(model, clip, text, scheme=scheme, config=config, rng=rng)
        lattice = (side // model.config.patch for side in clip.shape[3:])
        size = sum(Units(scheme, clip.shape[1], *lattice).sizes)
        size *= 2 if config.context == "clean" else 1
        counts = {"tokens": size, "flops": 3 * model.flops(size, keys=size, words=words.shape[1])}
        return {"loss": loss} | {k: torch.tensor(len(clip) * float(v)) for k, v in counts.items()}


def seeded(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return random numbers that depend on these alone: none have to be kept to go on exactly."""
    words = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(words[0]) >> 1)


def own_weights(module: nn.Module) -> None:
    """Copy the weights into memory of their own, in float32; they may be mapped from a file."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.float32, copy=True)
