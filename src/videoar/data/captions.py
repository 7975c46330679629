"""The text side of training: an encoder that learns along, or rows that were encoded once."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from videoar.data.latents import EMPTY_TEXT, read_info
from videoar.encoders.text_encoder import PromptEncoder, StoredText, TinyPromptEncoder, tokenize_cut
from videoar.encoders.umt5 import UMT5PromptEncoder
from videoar.weights import read_weights


@dataclass(frozen=True)
class Wording:
    """How the words of a run become what a transformer reads."""

    prompts: PromptEncoder
    """As the checkpoint has them."""
    module: nn.Module
    """Takes token ids, or stored rows."""
    tokenize: Callable[[list[str]], Tensor] | None
    """Captions to ids; None if rows are stored."""

    @classmethod
    def of(cls, prompts: PromptEncoder, latents: Path) -> "Wording":
        """Find how the captions of a folder reach a transformer with these prompts.

        Raises:
            ValueError: a frozen encoder, and a folder without its rows.
        """
        if isinstance(prompts, TinyPromptEncoder):
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

    def along(self, module: nn.Module) -> PromptEncoder:
        """Return the prompts with what was trained."""
        if isinstance(self.prompts, TinyPromptEncoder):
            return TinyPromptEncoder(self.prompts.tokenizer, module)  # type: ignore[arg-type]
        return self.prompts

    def too_long(self, captions: set[str]) -> str:
        """Say how many captions are cut; nothing if none is."""
        if not isinstance(self.prompts, TinyPromptEncoder):
            return ""
        limit, encode = self.prompts.encoder.config.max_tokens, self.prompts.tokenizer.encode
        long = sum(len(encode(caption)) > limit for caption in captions)
        cut = f"{long} of {len(captions)} captions are longer than {limit} tokens and are cut"
        return cut if long else ""
