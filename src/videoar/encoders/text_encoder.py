"""Text: prompts to token ids and to the rows of channels that a transformer attends to."""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Complex, Float, Int
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor, nn

from videoar.checks import Count, Natural, Options, Positive, check, explained
from videoar.core.attention import rotate
from videoar.weights import Device, load_component, save_component, usable

PAD = 0
"""Token id of the places behind the end of a prompt."""
Rows = Float[Tensor, "batch words channels"]
Reads = Bool[Tensor, "batch 1 words words"]
Rotations = Complex[Tensor, "words pairs"] | None


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 512) -> Tokenizer:
    """Learn byte-level BPE of a corpus: any text becomes ids of 1 and more, and comes back exactly.

    The same corpus gives the same tokenizer.
    """
    room = "257 or more: there are 256 bytes and the padding token"
    check("vocab_size", vocab_size, vocab_size > 256, room)
    backend = ByteLevelBPETokenizer()
    how = {"vocab_size": vocab_size, "min_frequency": 0, "special_tokens": ["<pad>"]}
    backend.train_from_iterator(texts, show_progress=False, **how)
    assert backend.token_to_id("<pad>") == PAD
    return Tokenizer.from_str(backend.to_str())


def as_read(text: str) -> str:
    """Return what a tiny encoder reads of a text: small letters, each in its one form."""
    return unicodedata.normalize("NFC", text.lower())


def words_of(texts: Iterable[str]) -> set[str]:
    """Return the words of texts, in small letters."""
    return {word for text in texts for word in re.findall(r"\w+", as_read(text))}


def check_text(text: str) -> str:
    """Return a text; raise if it holds what is no character, as bytes of another encoding."""
    with explained(f"The prompt {text[:40]!a} is not UTF-8: encode it so."):
        text.encode()
    return text


def check_length(ids: list[int], prompt: str, *, limit: int) -> list[int]:
    """Return the ids of a prompt; raise if they are more than an encoder takes."""
    if len(ids) > limit:
        raise ValueError(
            f"The prompt that begins with {prompt[:40]!r} has {len(ids)} tokens, "
            f"but the limit is {limit}: shorten it."
        )
    return ids


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig(Options):
    """Shape of a `TextEncoder`."""

    vocab_size: Count = 512
    hidden_size: Count = 128
    """Channels of a row."""
    num_layers: Natural = 2
    num_heads: Count = 4
    max_tokens: Count = 48
    """Longest prompt, in tokens."""
    rope_theta: Positive | None = None
    """Base of rotary positions beside the learned ones, with which words are sooner bound to each
    other (`docs/log.md`); None: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        pairs = self.rope_theta is not None  # which are rotated
        right = self.hidden_size % ((1 + pairs) * self.num_heads) == 0
        says = f"a multiple of {'twice ' * pairs}num_heads {self.num_heads}"
        check("hidden_size", self.hidden_size, right, says)


class TextEncoder(nn.Module):
    """Bidirectional transformer with learned positions, trained with the video transformer."""

    empty = PAD
    """What all of an empty prompt is."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_tokens, config.hidden_size)
        for table in (self.embedding, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, token_ids: Int[Tensor, "batch words"]) -> Rows:
        """Encode prompts; the rows of padding are zero and no other row reads them."""
        num_words = token_ids.shape[1]
        assert num_words <= self.config.max_tokens
        # No row reads padding: what all prompts of a batch are padded with need not be computed.
        longest = max(1, int((token_ids != PAD).sum(dim=1).max()))
        token_ids = token_ids[:, :longest]
        real = token_ids != PAD
        # A row may always read itself: the softmax of an empty prompt must not be empty.
        itself = torch.eye(longest, dtype=torch.bool, device=token_ids.device)
        mask = rearrange(real, "batch words -> batch 1 1 words") | itself
        x, table = self.embedding(token_ids) + self.positions.weight[:longest], None
        if (theta := self.config.rope_theta) is not None:
            steps = torch.arange(0, size := x.shape[2] // self.config.num_heads, 2) / size
            table = torch.exp(1j * torch.outer(torch.arange(longest), theta**-steps)).to(x.device)
        for layer in self.layers:
            x = layer(x, mask, table)
        return F.pad(self.norm(x) * real[..., None], (0, 0, 0, num_words - longest))


class _Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        size, self.num_heads = config.hidden_size, config.num_heads
        self.norm1 = nn.LayerNorm(size)
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)
        self.norm2 = nn.LayerNorm(size)
        gelu = nn.GELU(approximate="tanh")
        self.ffn = nn.Sequential(nn.Linear(size, 4 * size), gelu, nn.Linear(4 * size, size))

    def forward(self, x: Rows, mask: Reads, table: Rotations) -> Rows:
        pattern = "batch words (three heads channels) -> three batch heads words channels"
        q, k, v = rearrange(self.qkv(self.norm1(x)), pattern, three=3, heads=self.num_heads)
        if table is not None:
            q, k = rotate(torch.stack([q, k]), table)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        attended = rearrange(attended, "batch heads words channels -> batch words (heads channels)")
        x = x + self.out(attended)
        return x + self.ffn(self.norm2(x))


@runtime_checkable
class PromptEncoder(Protocol):
    """What a pipeline, and the training of its transformer, know of the text side."""

    @property
    def trainable(self) -> TextEncoder | None:
        """What learns along; None: rows of captions are kept with the latents, made only once."""

    @property
    def tokenize(self) -> Callable[[list[str]], Int[Tensor, "batch words"]] | None:
        """What makes token ids of captions, cut to its limit, for `trainable`."""

    def too_long(self, captions: set[str]) -> str:
        """Say how many captions are longer than what is read; nothing if none is."""

    def with_trained(self, module: nn.Module) -> "PromptEncoder":
        """Return the same with what was trained."""

    def fingerprint(self) -> str:
        """Name what token ids, or rows, mean."""

    def encode(self, prompts: list[str]) -> Rows:
        """Encode prompts to rows of channels; those behind the end of a prompt are zero."""

    def save(self, folder: Path) -> None:
        """Write what is needed to load it again."""

    def tensors(self) -> Sequence[Tensor]:
        """Return the parameters: for counting."""

    def to(self, device: Device | None, dtype: torch.dtype | None) -> None:
        """Move it to a device or a precision, where they are not None."""


@dataclass(frozen=True)
class TinyPromptEncoder:
    """A tokenizer and the encoder trained with it; capitals are read as small letters."""

    tokenizer: Tokenizer
    encoder: TextEncoder

    def __post_init__(self) -> None:
        ids, rows = self.tokenizer.get_vocab_size(), self.encoder.config.vocab_size
        few = f"the {rows} or fewer that the encoder knows: load both from one checkpoint"
        check("the number of ids of the tokenizer", ids, ids <= rows, few)
        # Else a prompt that happens to spell the padding token would end there.
        self.tokenizer.encode_special_tokens = True

    @property
    def trainable(self) -> TextEncoder:
        return self.encoder

    @property
    def limit(self) -> int:
        """Longest prompt, in tokens."""
        return self.encoder.config.max_tokens

    def fingerprint(self) -> str:
        words = hashlib.sha256(self.tokenizer.to_str(pretty=True).encode()).hexdigest()[:12]
        return f"{self.limit} tokens of the vocabulary {words}"

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text of any length."""
        return self.tokenizer.encode(as_read(check_text(text))).ids

    def _padded(self, rows: list[list[int]]) -> Int[Tensor, "batch words"]:
        return torch.tensor([ids + [PAD] * (self.limit - len(ids)) for ids in rows])

    def tokenize(self, captions: list[str]) -> Int[Tensor, "batch words"]:
        """Return token ids; the end of a caption beyond the encoder's limit is left out."""
        return self._padded([self.ids(caption)[: self.limit] for caption in captions])

    def too_long(self, captions: set[str]) -> str:
        long = sum(len(self.ids(caption)) > self.limit for caption in captions)
        cut = f"{long} of {len(captions)} captions are longer than the {self.limit} tokens"
        return cut if long else ""

    def with_trained(self, module: nn.Module) -> "TinyPromptEncoder":
        assert isinstance(module, TextEncoder)
        return TinyPromptEncoder(self.tokenizer, module)

    def encode(self, prompts: list[str]) -> Rows:
        """Encode prompts, each to the encoder's limit of rows, the empty one to zeros.

        Raises:
            ValueError: a prompt is longer.
        """
        rows = [check_length(self.ids(text), text, limit=self.limit) for text in prompts]
        return self.encoder(self._padded(rows).to(self.encoder.norm.weight.device))

    @classmethod
    def load(cls, folder: Path, *, device: Device = "cpu") -> "TinyPromptEncoder":
        """Load what `save` wrote."""
        encoder = load_component(folder, TextEncoder, device=device)
        with usable(file := folder / "tokenizer.json"):
            tokenizer = Tokenizer.from_str(file.read_text("utf-8"))
        return cls(tokenizer, encoder.float().eval())

    def save(self, folder: Path) -> None:
        save_component(folder, self.encoder)
        (folder / "tokenizer.json").write_text(self.tokenizer.to_str(pretty=True), "utf-8")

    def tensors(self) -> Sequence[Tensor]:
        return list(self.encoder.parameters())

    def to(self, device: Device | None, dtype: torch.dtype | None) -> None:
        self.encoder.to(device, dtype)


class StoredText(nn.Module):
    """Stands for an encoder too large to run in training: prompts come as the rows it made."""

    empty: Tensor

    def __init__(self, empty: Float[Tensor, "words channels"]):
        super().__init__()
        self.register_buffer("empty", empty, persistent=False)

    def forward(self, rows: Rows) -> Rows:
        return rows
