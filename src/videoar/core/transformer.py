"""The transformer: tokens with coordinates and sigmas in, velocity out.

No word of frames here.

Block structure, numerics and key names are those of Wan2.1 in diffusers, so that public weights
load without a mapping of shapes; the zero-initialised `scale_embedding` is the only addition.
Causality is not a property of the network: it lies in the mask and in what the cache holds.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from videoar.core.attention import Mask, rope_table, runs
from videoar.core.block import LARGEST_KEPT, Block, ModelConfig, modulated, vectors
from videoar.core.cache import KeyValue, KVCache
from videoar.weights import as_one


@dataclass(frozen=True)
class Output:
    """What one pass returns; the keys and values of its tokens are in the cache."""

    velocity: Float[Tensor, "batch tokens features"]


TextContext = list[KeyValue]
"""Per layer, keys and values of the text: computed once per prompt."""


@runtime_checkable
class Network(Protocol):
    """What sampler and loss call: a `VideoTransformer`, or something that wraps it."""

    config: ModelConfig
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
        coords: Float[Tensor, "*rows tokens 4"],
        sigma: Float[Tensor, "#batch units"],
        unit: Int[Tensor, " tokens"],
        text: TextContext,
        mask: Mask | None = None,
        cache: KVCache | None = None,
        offset: Float[Tensor, " channels"] | None = None,
    ) -> Output:
        """Predict the velocity of every token.

        Without gradients, what depends on weights, `coords`, or `sigma` and `unit` alone is kept in
        the cache for later passes that bring the same tensors: weights must not change meanwhile.

        Args:
            tokens: noisy or clean tokens, features ordered (channel, row, column).
            coords: (t, h, w, level) of the tokens, alike for all rows or for each row its own.
            sigma: the sigma of every unit in this pass, one row for all videos or one for each.
            unit: for every token, the row of its unit in `sigma`.
            text: from `encode_text`; each of its rows is read by as many rows of `tokens`, in turn.
            mask: which keys a token may read; keys are the cached tokens, then these tokens.
            cache: read, and behind what is read the keys and values of these tokens are left.
            offset: added to the embedding of sigma: what else a pass should know.
        """
        config, (batch, count) = self.config, tokens.shape[:2]
        keep, linears = (lambda make, *given: make(*given)), None
        if cache is not None:
            shape = config.num_layers, 2, batch, config.num_heads, config.head_dim
            cache.reserve(count, shape=shape, like=text[0][0])
            if not torch.is_grad_enabled():
                keep, linears = cache.keep, cache.keep(self._linears, None)
        weight = self.patch_embedding.weight.flatten(1)
        # Latents stay in float32 through all steps, as in diffusers; only the network is narrower.
        x = F.linear(tokens.to(weight.dtype), weight, self.patch_embedding.bias)
        levels, table = keep(self._place, coords)
        x = x + levels
        runs, last, divisor = keep(self._modulation, sigma, unit, offset, linears is not None)
        for layer, block in enumerate(self.blocks):
            own = (None, runs) if linears is None else (linears[layer], runs[layer])
            x = block(x, table, text[layer], mask, cache, layer, *own)
        out = self.proj_out(modulated(x, last, 0, config.eps))
        # Wan's output features are ordered (row, column, channel), its inputs (channel, row,
        # column).
        out = out.view(batch, count, -1, config.latent_channels).transpose(2, 3).flatten(2)
        return Output((tokens - out) / divisor if config.prediction == "clean" else out)

    def _linears(self, _: None) -> list[Any] | None:
        """Return the fast linear maps of all blocks; None if FSDP gathers their weights."""
        hooked = any(module._forward_pre_hooks for module in (self, *self.blocks))
        return None if hooked else [block.linears(as_one) for block in self.blocks]

    def _place(self, coords: Tensor) -> tuple[Tensor, Tensor]:
        """Return what tokens get for their levels, and the rotations of their positions."""
        table = rope_table(coords, head_dim=self.config.head_dim, theta=self.config.rope_theta)
        return self.scale_embedding(coords[..., 3].long()), table[..., None, None, :]

    def _modulation(
        self, sigma: Tensor, unit: Tensor, offset: Tensor | None, apart: bool
    ) -> tuple[Any, Any, Tensor]:
        """Return what blocks, last layer and prediction need to know of sigma.

        Tokens have a modulation each, if that is not too much to keep; else every unit has one.
        """
        embedded, blocks = self.condition_embedder(sigma, offset)
        both, divisor = (embedded[:, :, None], blocks), sigma[:, :, None]
        rows: list[slice] = [slice(None)]
        at: list[Any] = [slice(None)]
        if sigma.shape[1] > 1:  # gathered once for all layers: the backward of a gather is slow
            at, divisor = [unit], divisor[:, unit]
            if apart and len(unit) * embedded.shape[-1] > LARGEST_KEPT:
                units, rows = runs(unit)
                at = list(units[:, None])
        whole, each = ([(r, part[:, i]) for r, i in zip(rows, at, strict=True)] for part in both)
        last = vectors(self.scale_shift_table, whole)
        own = [vectors(block.scale_shift_table, each) for block in self.blocks] if apart else each
        return own, last, divisor.clamp(min=self.config.min_sigma)

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
        config, size = self.config, self.config.hidden_size
        linear = config.num_layers * (6 * size**2 + 2 * size * config.ffn_dim)
        attention = config.num_layers * 2 * size * (keys + words)
        return 2 * tokens * (linear + attention + 2 * size * config.token_dim)


class ConditionEmbedder(nn.Module):
    """Embeddings of sigma and of the text."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.freq_dim, size = config.freq_dim, config.hidden_size
        self.time_embedder = _two_layers(config.freq_dim, size, nn.SiLU())
        self.time_proj = nn.Linear(size, 6 * size)
        self.text_embedder = _two_layers(config.text_dim, size, nn.GELU(approximate="tanh"))

    def forward(
        self,
        sigma: Float[Tensor, "batch units"],
        offset: Float[Tensor, " channels"] | None = None,
    ) -> tuple[Float[Tensor, "batch units channels"], Float[Tensor, "batch units 6 channels"]]:
        """Embed sigma; Wan was trained on `timestep = 1000 * sigma`."""
        half = self.freq_dim // 2
        # In float32, as diffusers does, so that outputs can be compared bit for bit; the original
        # does this in float64, which differs by 1e-4 radians at most.
        steps = torch.arange(half, dtype=torch.float32, device=sigma.device)
        angles = (1000 * sigma.float())[..., None] * torch.exp(-math.log(10000) * steps / half)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        embedded = self.time_embedder(waves.to(self.time_embedder.linear_1.weight.dtype))
        embedded = embedded.to(self.time_proj.weight.dtype)
        embedded = embedded if offset is None else embedded + offset.to(embedded.dtype)
        return embedded, self.time_proj(F.silu(embedded)).unflatten(-1, (6, -1))


def _two_layers(channels: int, size: int, activation: nn.Module) -> Any:
    """Linear, activation, linear, under Wan's key names."""
    layers = {"linear_1": nn.Linear(channels, size), "activation": activation}
    return nn.Sequential(OrderedDict(layers, linear_2=nn.Linear(size, size)))
