"""Objectives: which module is trained, and by which loss. No loop, no files."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from videoar.core.loss import FlowMatchingConfig, draw_clip, flow_matching_loss, on
from videoar.core.schemes import Scheme
from videoar.core.transformer import TextContext, VideoTransformer
from videoar.encoders.text_encoder import StoredText, TextEncoder
from videoar.training.optimizer import OptimizerConfig


class Objective:
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

    def optimizers(self, config: OptimizerConfig) -> Mapping[str, OptimizerConfig]:
        """Return the optimizers of children of the module, or of "" for all of it.

        `config` is that of the run.
        """
        return {"": config}

    def group_of(self, step: int) -> str:
        """Return whose optimizer moves in a step."""
        return ""

    def loss(
        self, batch: dict[str, Tensor], rng: torch.Generator, *, step: int = 0
    ) -> dict[str, Tensor]:
        """Return scalar tensors; `loss` is minimised, the others are logged.

        The number and the shapes of passes depend on `step` alone: ranks keep in step.
        """
        raise NotImplementedError


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


class FlowMatching(Objective):
    """Train one transformer, and its text encoder, on several schemes in turn.

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
        scheme = self.schemes[int(torch.randint(len(self.schemes), (), **on(rng)))]
        dropped = torch.rand(len(batch["text"]), **on(rng)) < self.config.text_dropout
        words = self.module.without(batch["text"], dropped)
        latents, short = batch["latents"], self.config.short_probability
        if short and torch.rand((), **on(rng)) < short:
            latents = latents[:, :2]
        clip, text = draw_clip(latents, scheme, self.config, rng), self.module.context(words)
        loss = flow_matching_loss(
            self.module.transformer, clip, text, scheme=scheme, config=self.config, rng=rng
        )
        return {"loss": loss}


def seeded(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return random numbers that depend on these alone: none have to be kept to go on exactly."""
    words = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(words[0]) >> 1)


def own_weights(module: nn.Module) -> None:
    """Copy the weights into memory of their own, in float32; they may be mapped from a file."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.float32, copy=True)
