"""One block of the transformer: attention over tokens, attention to text, feed-forward.

There is one set of equations. What they call is either the layers, with whatever wraps and hooks
them, or the same as one product of matrices that lie as it reads them (`Linears`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn

from videoar.checks import check_options, check_types
from videoar.core.attention import Mask, attend, rotate
from videoar.core.cache import KeyValue, KVCache
from videoar.weights import side_by_side


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
        even = [(n, getattr(self, n) % 2 == 0, "an even number") for n in ("head_dim", "freq_dim")]
        check_options(self, *even, least=dict.fromkeys(counts, 1) | {"head_dim": 6})

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def token_dim(self) -> int:
        """Features of one token: channels x rows x columns of a patch."""
        return self.latent_channels * self.patch**2


class Attention(nn.Module):
    """Weights of multi-head attention: queries and keys are normalised over all heads together."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        size = config.hidden_size
        self.to_q = nn.Linear(size, size)
        self.to_k = nn.Linear(size, size)
        self.to_v = nn.Linear(size, size)
        self.to_out = nn.ModuleList([nn.Linear(size, size)])
        self.norm_q = nn.RMSNorm(size)
        self.norm_k = nn.RMSNorm(size)


Runs = list[tuple[slice, tuple[Tensor, ...]]]
"""Runs of tokens and what modulates them, a vector each or one for every token: shift, 1 + scale
and gate, of attention and then of the feed-forward layers."""
LARGEST_KEPT = 2**16  # values of a modulation per token; in a wide model every unit has its own


Linears = tuple[Any, ...]
"""The linear maps of a block as functions, and the weights of its norms: see `Block.linears`."""


def vectors(table: Tensor, modulation: list[tuple[slice, Tensor]]) -> Runs:
    """Add what a layer learned itself, in float32; one vector for all tokens has one axis."""
    found = []
    for rows, given in modulation:
        parts = (table.float() + given.float()).unbind(2)
        if given.shape[:2] == (1, 1):
            parts = [part[0, 0] for part in parts]
        found.append((rows, tuple(p + 1 if k % 3 == 1 else p for k, p in enumerate(parts))))
    return found


def _by_runs(function: Callable[..., Tensor], runs: Runs, *tensors: Tensor) -> Tensor:
    """Apply a function of vectors and tensors to every run."""
    if len(runs) == 1:
        return function(runs[0][1], *tensors)
    parts = [function(each, *(x[:, rows] for x in tensors)) for rows, each in runs]
    return torch.cat(parts, dim=1)


def modulated(x: Tensor, runs: Runs, first: int, eps: float) -> Tensor:
    """Normalise in float32, scale and shift."""

    def each(vectors: tuple[Tensor, ...], x: Tensor) -> Tensor:
        shift, scale, size = vectors[first], vectors[first + 1], x.shape[-1:]
        if shift.ndim == 1:
            return F.layer_norm(x.float(), size, scale, shift, eps).type_as(x)
        return torch.addcmul(shift, F.layer_norm(x.float(), size, eps=eps), scale).type_as(x)

    return _by_runs(each, runs, x)


def _gated(x: Tensor, update: Tensor, runs: Runs, at: int) -> Tensor:
    """Add an update through a gate, in float32."""

    def each(vectors: tuple[Tensor, ...], x: Tensor, update: Tensor) -> Tensor:
        return torch.addcmul(x.float(), update.float(), vectors[at]).type_as(x)

    return _by_runs(each, runs, x, update)


def _rms(weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return what `_rms_normed` needs: root of the channels times weight and of `eps`."""
    root = weight.shape[-1] ** 0.5
    return weight.float() * root, weight.new_full((), root * eps**0.5, dtype=torch.float32)


def _rms_normed(x: Tensor, weight: Tensor, floor: Tensor) -> Tensor:
    """Return the root-mean-square norm, in float32 and in kernels as few as can be."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return x / torch.hypot(length, floor) * weight


class Block(nn.Module):
    """Self-attention over tokens, cross-attention to text, feed-forward.

    The first and last are modulated by sigma.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        size, ffn_dim = config.hidden_size, config.ffn_dim
        self.attn1 = Attention(config)
        self.norm2 = nn.LayerNorm(size)
        self.attn2 = Attention(config)
        # Under the names of diffusers: `net.0.proj` and `net.2`.
        up = nn.ModuleDict({"proj": nn.Linear(size, ffn_dim)})
        layers = nn.ModuleList([up, nn.Identity(), nn.Linear(ffn_dim, size)])
        self.ffn: Any = nn.ModuleDict({"net": layers})
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, size))
        nn.init.normal_(self.scale_shift_table, std=size**-0.5)
        self.num_heads, self.eps = config.num_heads, config.eps

    def linears(self, call: Callable[..., Callable[[Tensor], Tensor]]) -> Linears:
        """Return the maps and norms that `forward` names; `call` makes a function of layers."""
        own, text, (up, _, down) = self.attn1, self.attn2, self.ffn.net
        return (
            *(call(own.to_q, own.to_k, own.to_v), call(own.to_out[0])),
            *(call(text.to_q), call(text.to_out[0]), call(up["proj"]), call(down)),
            _rms(torch.stack([own.norm_q.weight, own.norm_k.weight]), self.eps),
            _rms(text.norm_q.weight, self.eps),
            (self.norm2.weight.float(), self.norm2.bias.float()),
        )

    def text(self, hidden: Float[Tensor, "batch words channels"]) -> KeyValue:
        """Return the keys and values of the text: FSDP gathers weights for methods."""
        attention, shape = self.attn2, (*hidden.shape[:2], self.num_heads, -1)
        key, value = attention.to_k(hidden), attention.to_v(hidden)
        key = _rms_normed(key, *_rms(attention.norm_k.weight, self.eps)).type_as(key)
        return key.view(shape).transpose(1, 2), value.view(shape).transpose(1, 2)

    def forward(
        self,
        x: Float[Tensor, "batch tokens channels"],
        table: Complex[Tensor, "*#batch tokens 1 1 pairs"],
        text: KeyValue,
        mask: Mask | None,
        cache: KVCache | None,
        layer: int,
        linears: Linears | None,
        runs: Any,
    ) -> Float[Tensor, "batch tokens channels"]:
        if linears is None:
            linears, runs = self.linears(side_by_side), vectors(self.scale_shift_table, runs)
        own, own_out, ask, text_out, up, down, qk_norm, query_norm, norm2 = linears
        heads = (*x.shape[:2], self.num_heads, -1)

        qkv = own(modulated(x, runs, 0, self.eps)).view(*x.shape[:2], 3, -1)
        query_key = _rms_normed(qkv[:, :, :2], *qk_norm)
        query_key = rotate(query_key.view(*x.shape[:2], 2, *heads[2:]), table).type_as(x)
        query, key = query_key.transpose(1, 3).unbind(2)
        value = qkv[:, :, 2].view(heads).transpose(1, 2)
        read = attend if cache is None else partial(cache.attend, layer)
        attended = read(query, key, value, mask).transpose(1, 2).flatten(2)
        x = _gated(x, own_out(attended), runs, 2)

        normed = F.layer_norm(x.float(), x.shape[-1:], norm2[0], norm2[1], self.eps)
        query = _rms_normed(ask(normed.type_as(x)), *query_norm).type_as(x)
        # Videos of one prompt, side by side, are queries of its one row.
        query = query.view(len(text[0]), -1, x.shape[-1]).unflatten(2, heads[2:]).transpose(1, 2)
        attended = attend(query, *text).transpose(1, 2).reshape(x.shape)
        x = x + text_out(attended)

        normed = modulated(x, runs, 3, self.eps)
        return _gated(x, down(F.gelu(up(normed), approximate="tanh")), runs, 5)
