"""The transformer: tokens with coordinates and sigmas in, velocity out.

No word of frames here.

Block structure, numerics and key names are those of Wan2.1 in diffusers, so that public weights
load without a mapping of shapes; the zero-initialised `scale_embedding` is the only addition.
Causality is not a property of the network: it lies in the mask and in what the cache holds.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from videoar.checks import check_options, check_types
from videoar.core.attention import Mask, attend, rope_table, rotate
from videoar.core.cache import KeyValue, KVCache


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Size of a `VideoTransformer`; the defaults are Wan2.1-T2V-1.3B."""

    latent_channels: int = 16
    """Channels of the codec's latents."""
    patch: int = 2
    """Latent pixels per token in height and width."""
    num_layers: int = 30
    """Transformer blocks."""
    num_heads: int = 12
    """Attention heads."""
    head_dim: int = 128
    """Channels per head; even."""
    ffn_dim: int = 8960
    """Hidden channels of the feed-forward layers."""
    text_dim: int = 4096
    """Channels of the text embeddings."""
    freq_dim: int = 256
    """Channels of the sinusoidal embedding of sigma."""
    num_levels: int = 5
    """Rows of the scale embedding: levels of multiscale units."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    eps: float = 1e-6
    """Added to variances."""
    prediction: Literal["velocity", "clean"] = "velocity"
    """What the last layer says. `clean` suits small models: noise need not pass through the
    network (Li and He 2025, arXiv:2511.13720). The model returns a velocity either way."""
    min_sigma: float = 0.05
    """With `clean`, the smallest sigma that divides."""

    def __post_init__(self):
        check_types(self)
        counts = ("latent_channels", "patch", "num_layers", "num_heads", "ffn_dim", "num_levels")
        check_options(self, least=dict.fromkeys(counts, 1))
        if self.head_dim < 6 or self.head_dim % 2 or self.freq_dim % 2:
            sizes = f"head_dim {self.head_dim} (>= 6) and freq_dim {self.freq_dim}"
            raise ValueError(f"{sizes} must be even numbers.")

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def token_dim(self) -> int:
        """Features of one token: channels x rows x columns of a patch."""
        return self.latent_channels * self.patch**2


@dataclass(frozen=True)
class Output:
    """What one pass returns."""

    velocity: Float[Tensor, "batch tokens features"]
    key_values: list[KeyValue]
    """Per layer, keys and values of the tokens of this pass: what a cache may commit. They alias
    the pass's own tensors, never the cache."""


TextContext = list[KeyValue]
"""Per layer, keys and values of the text: computed once per prompt."""


@runtime_checkable
class Network(Protocol):
    """What sampler and loss call: a `VideoTransformer`, or something that wraps it."""

    @property
    def config(self) -> ModelConfig:
        """Its size."""

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """Return the `Output` of one pass."""


class VideoTransformer(nn.Module):
    """A diffusion transformer over any set of tokens (Peebles and Xie 2022, Wan 2025)."""

    blocks: Any  # a ModuleList, which would hide that it holds blocks

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        size = config.hidden_size
        kernel = (1, config.patch, config.patch)
        self.patch_embedding = nn.Conv3d(config.latent_channels, size, kernel, stride=kernel)
        self.condition_embedder = ConditionEmbedder(config)
        self.scale_embedding = nn.Embedding(config.num_levels, size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_out = LayerNorm(size, config.eps, elementwise_affine=False)
        self.proj_out = nn.Linear(size, config.token_dim)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, size))
        nn.init.normal_(self.scale_shift_table, std=size**-0.5)
        nn.init.zeros_(self.scale_embedding.weight)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def encode_text(self, embeddings: Float[Tensor, "batch words channels"]) -> TextContext:
        """Project text embeddings to the keys and values that every pass of a generation reuses."""
        hidden = self.condition_embedder.text_embedder(embeddings)
        return [block.text(hidden) for block in self.blocks]

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens features"],
        *,
        coords: Float[Tensor, "tokens 4"],
        sigma: Float[Tensor, "batch units"],
        unit: Int[Tensor, " tokens"],
        text: TextContext,
        mask: Mask | None = None,
        cache: KVCache | None = None,
        offset: Float[Tensor, " channels"] | None = None,
    ) -> Output:
        """Predict the velocity of every token.

        Args:
            tokens: noisy or clean tokens, features ordered (channel, row, column).
            coords: (t, h, w, level) of the tokens.
            sigma: the sigma of every unit in this pass.
            unit: for every token, the row of its unit in `sigma`.
            text: from `encode_text`.
            mask: which keys a token may read; keys are the cached tokens, then these tokens.
            cache: read, never written.
            offset: added to the embedding of sigma: what else a pass should know.
        """
        config = self.config
        if cache is not None:
            cache.reserve(tokens.shape[1])
        weight = self.patch_embedding.weight.flatten(1)
        # Latents stay in float32 through all steps, as in diffusers; only the network is narrower.
        x = F.linear(tokens.to(weight.dtype), weight, self.patch_embedding.bias)
        x = x + self.scale_embedding(coords[:, 3].long())
        embedded, modulation = self.condition_embedder(sigma, x.dtype, offset)
        if sigma.shape[1] > 1:  # gathered once for all layers: the backward of a gather is slow
            embedded, modulation = embedded[:, unit], modulation[:, unit]
        table = rope_table(coords, head_dim=config.head_dim, theta=config.rope_theta)
        key_values = []
        for layer, block in enumerate(self.blocks):
            x, key_value = block(x, modulation, table, text[layer], mask, cache, layer)
            key_values.append(key_value)
        shift, scale = (self.scale_shift_table.float() + embedded[:, :, None].float()).unbind(2)
        x = (self.norm_out(x.float()) * (1 + scale) + shift).type_as(x)
        # Wan's output features are ordered (row, column, channel), its inputs (channel, row,
        # column).
        out = rearrange(self.proj_out(x), "b n (p c) -> b n (c p)", c=config.latent_channels)
        if config.prediction == "clean":
            per_token = sigma[:, unit, None]
            out = (tokens - out) / per_token.clamp(min=config.min_sigma)
        return Output(out, key_values)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def flops(self, tokens: int, *, keys: int, words: int = 0) -> int:
        """Floating-point operations of one pass per sample, 2 per multiply-add.

        Args:
            tokens: tokens in the pass.
            keys: keys that a token reads on average, its own pass included.
            words: text rows read by cross-attention; their projection is done once and not counted.
        """
        config = self.config
        size = config.hidden_size
        linear = config.num_layers * (6 * size**2 + 2 * size * config.ffn_dim)
        attention = config.num_layers * 2 * size * (keys + words)
        return 2 * tokens * (linear + attention + 2 * size * config.token_dim)


class ConditionEmbedder(nn.Module):
    """Embeddings of sigma and of the text."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.freq_dim = config.freq_dim
        size = config.hidden_size
        self.time_embedder = TwoLayers(config.freq_dim, size, nn.SiLU())
        self.time_proj = nn.Linear(size, 6 * size)
        self.text_embedder = TwoLayers(config.text_dim, size, nn.GELU(approximate="tanh"))

    def forward(
        self,
        sigma: Float[Tensor, "batch units"],
        dtype: torch.dtype,
        offset: Float[Tensor, " channels"] | None = None,
    ) -> tuple[Float[Tensor, "batch units channels"], Float[Tensor, "batch units 6 channels"]]:
        """Embed sigma; Wan was trained on `timestep = 1000 * sigma`."""
        half = self.freq_dim // 2
        # In float32, as diffusers does, so that outputs can be compared bit for bit; the original
        # does this in float64, which differs by 1e-4 radians at most.
        steps = torch.arange(half, dtype=torch.float32, device=sigma.device)
        angles = (1000 * sigma.float())[..., None] * torch.exp(-math.log(10000) * steps / half)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        embedded = self.time_embedder(waves.to(self.time_embedder.linear_1.weight.dtype)).to(dtype)
        embedded = embedded if offset is None else embedded + offset.to(dtype)
        return embedded, self.time_proj(F.silu(embedded)).unflatten(-1, (6, -1))


class TwoLayers(nn.Module):
    """Linear, activation, linear, under Wan's key names."""

    def __init__(self, channels: int, size: int, activation: nn.Module):
        super().__init__()
        self.linear_1 = nn.Linear(channels, size)
        self.linear_2 = nn.Linear(size, size)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32, whatever goes in."""

    def forward(self, input: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        normed = F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps)
        return normed.to(input.dtype)


class Attention(nn.Module):
    """Multi-head attention with queries and keys normalised over all heads together."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.to_q = nn.Linear(size, size)
        self.to_k = nn.Linear(size, size)
        self.to_v = nn.Linear(size, size)
        self.to_out = nn.ModuleList([nn.Linear(size, size)])
        self.norm_q = nn.RMSNorm(size, eps=config.eps)
        self.norm_k = nn.RMSNorm(size, eps=config.eps)

    def query(self, x: Tensor) -> Float[Tensor, "batch heads tokens head_dim"]:
        return self._heads(_normed(self.norm_q, self.to_q(x)))

    def key_value(self, x: Tensor) -> KeyValue:
        return self._heads(_normed(self.norm_k, self.to_k(x))), self._heads(self.to_v(x))

    def output(self, x: Float[Tensor, "batch heads tokens head_dim"]) -> Tensor:
        return self.to_out[0](rearrange(x, "b h n d -> b n (h d)"))

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.num_heads)


def _normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """Normalise in one kernel: under autocast torch has none for wide weights of narrow inputs."""
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


class FeedForward(nn.Module):
    """GELU feed-forward layers under diffusers' key names `net.0.proj` and `net.2`."""

    def __init__(self, size: int, ffn_dim: int):
        super().__init__()
        self.net = nn.Sequential(Projection(size, ffn_dim), nn.Identity(), nn.Linear(ffn_dim, size))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Projection(nn.Module):
    """A linear layer and a tanh GELU."""

    def __init__(self, size: int, ffn_dim: int):
        super().__init__()
        self.proj = nn.Linear(size, ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class Block(nn.Module):
    """Self-attention over tokens, cross-attention to text, feed-forward.

    The first and last are modulated by sigma, one per token, or a single one.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        size = config.hidden_size
        self.norm1 = LayerNorm(size, config.eps, elementwise_affine=False)
        self.attn1 = Attention(config)
        self.norm2 = LayerNorm(size, config.eps, elementwise_affine=True)
        self.attn2 = Attention(config)
        self.norm3 = LayerNorm(size, config.eps, elementwise_affine=False)
        self.ffn = FeedForward(size, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, size))
        nn.init.normal_(self.scale_shift_table, std=size**-0.5)

    def text(self, hidden: Float[Tensor, "batch words channels"]) -> KeyValue:
        """Return the keys and values of the text: FSDP gathers weights for methods."""
        return self.attn2.key_value(hidden)

    def forward(
        self,
        x: Float[Tensor, "batch tokens channels"],
        modulation: Float[Tensor, "batch sigmas 6 channels"],
        table: Float[Tensor, "2 tokens pairs"],
        text: KeyValue,
        mask: Mask | None,
        cache: KVCache | None,
        layer: int,
    ) -> tuple[Float[Tensor, "batch tokens channels"], KeyValue]:
        modulated = self.scale_shift_table.float() + modulation.float()
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulated.unbind(2)

        normed = (self.norm1(x.float()) * (1 + scale) + shift).type_as(x)
        key, value = self.attn1.key_value(normed)
        own = rotate(key, table), value
        seen = own if cache is None else cache.extend(layer, *own)
        attended = self.attn1.output(attend(rotate(self.attn1.query(normed), table), *seen, mask))
        x = (x.float() + attended * gate).type_as(x)

        normed = self.norm2(x.float()).type_as(x)
        x = x + self.attn2.output(attend(self.attn2.query(normed), *text))

        normed = (self.norm3(x.float()) * (1 + ffn_scale) + ffn_shift).type_as(x)
        x = (x.float() + self.ffn(normed).float() * ffn_gate).type_as(x)
        return x, own
