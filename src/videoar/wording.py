"""The text side of training: an encoder that learns along, or rows that were encoded once."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn

from videoar.data import EMPTY_TEXT, read_info
from videoar.objectives import StoredText
from videoar.pipeline import VideoPipeline
from videoar.text import PAD, PromptEncoder, Prompts
from videoar.umt5 import UMT5PromptEncoder
from videoar.weights import read_weights


@dataclass(frozen=True)
class Wording:
    """How the words of a run become what a transformer reads."""

    prompts: Prompts
    """As the checkpoint has them."""
    module: nn.Module
    """Takes token ids, or stored rows."""
    tokenize: Callable[[list[str]], Tensor] | None
    """Captions to ids; None if rows are stored."""

    @classmethod
    def of(cls, prompts: Prompts, latents: Path) -> "Wording":
        """Find how the captions of a folder reach a transformer with these prompts.

        Raises:
            ValueError: a frozen encoder, and a folder without its rows.
        """
        if isinstance(prompts, PromptEncoder):
            return cls(prompts, prompts.encoder, functools.partial(tokenize_cut, prompts))
        assert isinstance(prompts, UMT5PromptEncoder)
        stored, wanted = read_info(latents).text, prompts.fingerprint()
        if stored != wanted:
            raise ValueError(
                f"{latents} has captions encoded by {stored or 'nothing'}, but the checkpoint's"
                f" text encoder is {wanted}: prepare the videos again, with that checkpoint as"
                " --codec"
            )
        return cls(prompts, StoredText(read_weights(latents / EMPTY_TEXT)["rows"]), None)

    def along(self, module: nn.Module) -> Prompts:
        """Return the prompts with what was trained."""
        if isinstance(self.prompts, PromptEncoder):
            return PromptEncoder(self.prompts.tokenizer, module)  # type: ignore[arg-type]
        return self.prompts

    def too_long(self, captions: set[str]) -> str:
        """Say how many captions are cut; nothing if none is."""
        if not isinstance(self.prompts, PromptEncoder):
            return ""
        limit, encode = self.prompts.encoder.config.max_tokens, self.prompts.tokenizer.encode
        long = sum(len(encode(caption)) > limit for caption in captions)
        cut = f"{long} of {len(captions)} captions are longer than {limit} tokens and are cut"
        return cut if long else ""


def tokenize_cut(prompts: PromptEncoder, captions: list[str]) -> Int[Tensor, "batch words"]:
    """Return token ids; the end of a caption beyond the encoder's limit is left out."""
    limit = prompts.encoder.config.max_tokens
    ids = [prompts.tokenizer.encode(caption)[:limit] for caption in captions]
    return torch.tensor([row + [PAD] * (limit - len(row)) for row in ids])


def own_weights(module: nn.Module) -> nn.Module:
    """Copy the weights into memory of their own, in float32; they may be mapped from a file."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.float32, copy=True)
    return module


def fitting(pipe: VideoPipeline) -> str:
    """Return what must agree where two transformers are to take the same words."""
    prompts = pipe.prompt_encoder
    if isinstance(prompts, UMT5PromptEncoder):
        return prompts.fingerprint()
    assert isinstance(prompts, PromptEncoder)
    limit = prompts.encoder.config.max_tokens
    return f"{limit} tokens of the vocabulary {prompts.tokenizer.fingerprint()}"
