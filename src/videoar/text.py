"""Text: a byte-level BPE tokenizer and a small transformer encoder, trained jointly with the generator."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

PAD = 0


class Tokenizer:
    """Byte-level BPE: any UTF-8 text has tokens, and id 0 is padding."""

    def __init__(self, backend: Backend):
        self._backend = backend

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int) -> "Tokenizer":
        """Learn merges from texts; the result does not depend on their order."""
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(sorted(texts), trainer)
        return cls(backend)

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Read what `to_json` wrote."""
        return cls(Backend.from_str(text))

    def to_json(self) -> str:
        """Return the content of `tokenizer.json`."""
        return self._backend.to_str()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""
        return self._backend.decode(ids)


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Size of a `TextEncoder`."""

    vocab_size: int = 512
    """Tokens of the vocabulary; the 256 bytes and padding are among them."""
    hidden_size: int = 128
    """Channels of the embeddings."""
    num_layers: int = 2
    """Transformer layers."""
    num_heads: int = 4
    """Attention heads."""
    max_tokens: int = 48
    """Longest prompt in tokens."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.vocab_size < 257:
            raise ValueError(f"vocab_size is {self.vocab_size}: use at least 257, bytes and padding.")
        if min(self.num_layers, self.num_heads, self.max_tokens) < 1:
            raise ValueError("num_layers, num_heads and max_tokens must be 1 or more: raise them.")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of {self.num_heads} heads: make it one."
            )


class TextEncoder(nn.Module):
    """A small bidirectional transformer over token ids; rows of padding come out as zeros."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Parameter(0.02 * torch.randn(config.max_tokens, config.hidden_size))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.hidden_size,
                config.num_heads,
                4 * config.hidden_size,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, ids: Int[Tensor, "batch words"]) -> Float[Tensor, "batch words channels"]:
        """Embed token ids; a text never reads its padding."""
        padding = ids == PAD
        x = self.embedding(ids) + self.position[: ids.shape[1]]
        # An empty prompt has nothing to read: let it read its padding rather than divide by zero.
        ignored = padding & ~padding.all(dim=1, keepdim=True)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=ignored)
        return self.norm(x).masked_fill(padding[..., None], 0.0)


class PromptEncoder:
    """Prompts to text embeddings: a tokenizer and its encoder."""

    def __init__(self, tokenizer: Tokenizer, encoder: TextEncoder):
        self.tokenizer, self.encoder = tokenizer, encoder

    def tokenize(self, prompts: list[str]) -> Int[Tensor, "batch words"]:
        """Return token ids, padded to the longest prompt the encoder takes.

        Raises:
            ValueError: a prompt is too long.
        """
        limit = self.encoder.config.max_tokens
        ids = torch.full((len(prompts), limit), PAD)
        for row, prompt in enumerate(prompts):
            tokens = self.tokenizer.encode(prompt) if prompt else []
            if len(tokens) > limit:
                raise ValueError(
                    f"The prompt has {len(tokens)} tokens, but the text encoder takes {limit}: shorten it."
                )
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        return ids

    def encode(self, prompts: list[str]) -> Float[Tensor, "batch words channels"]:
        """Embed prompts; the empty prompt gives zeros, the unconditional embedding."""
        device = next(self.encoder.parameters()).device
        return self.encoder(self.tokenize(prompts).to(device))
