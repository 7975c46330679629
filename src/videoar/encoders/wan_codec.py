"""Wan's codec behind our interface. diffusers is imported where it is used, and nowhere else."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from videoar.encoders.codec import Codec, Latents, Memory, Video
from videoar.weights import library


@dataclass(frozen=True, kw_only=True)
class WanCodecConfig:
    """Shape of a `WanCodec`, under the names of diffusers; the defaults are Wan 2.1."""

    base_dim: int = 96
    z_dim: int = 16
    """Latent channels."""
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    # fmt: off
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )
    # fmt: on

    @property
    def stride(self) -> tuple[int, int, int]:
        """Pixels per latent in time, height and width."""
        side = 2 ** (len(self.dim_mult) - 1)
        return 2 ** sum(self.temperal_downsample), side, side


class WanCodec(Codec):
    """`AutoencoderKLWan` of diffusers, whose memory is held outside of it.

    The first latent frame is one picture. `Codec` counts it as a group that repeats this picture,
    so the repetitions are left out before the network and put in after it.
    """

    def __init__(self, config: WanCodecConfig) -> None:
        super().__init__(config, stride=config.stride, latent_channels=config.z_dim)
        stated = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
        self.vae = library("diffusers").AutoencoderKLWan(**stated)

    def encode_step(self, frames: Video, memory: Memory | None) -> tuple[Latents, Memory]:
        frames = frames[:, -1:] if memory is None else frames
        x, kept = self._run("encoder", rearrange(frames, "b t c h w -> b c t h w"), memory)
        # The mode of the posterior: its mean, which comes before its log variance.
        latents = self.vae.quant_conv(x).chunk(2, dim=1)[0].float()
        mean, std = self.statistics(latents)
        return (rearrange(latents, "b c t h w -> b t c h w") - mean) / std, kept

    def decode_step(self, latents: Latents, memory: Memory | None) -> tuple[Video, Memory]:
        latents = latents.float()
        mean, std = self.statistics(latents)
        x = rearrange(latents * std + mean, "b t c h w -> b c t h w")
        x, kept = self._run("decoder", x, memory, first_chunk=memory is None)
        video = rearrange(x.float().clamp(-1, 1), "b c t h w -> b t c h w")
        return video.expand(-1, self.stride[0], -1, -1, -1) if memory is None else video, kept

    def _run(
        self, part: str, x: Tensor, memory: Memory | None, **options: bool
    ) -> tuple[Tensor, Memory]:
        x = x.to(self.vae.quant_conv.weight.dtype)
        if x.dtype != torch.float32:  # there it takes more memory for 5 % of the time, here 11 %
            x = x.contiguous(memory_format=torch.channels_last_3d)
        if part == "decoder":
            x = self.vae.post_quant_conv(x)
        # A saved stream holds tensors only: what is empty or a word there is an empty tensor here.
        words, count = {1: None, 2: "Rep"}, self.vae._cached_conv_counts[part]
        past: list[Any] = [None] * count if memory is None else memory
        past[:] = [t if t is None else words.get(t.ndim, t) for t in past]
        # The list is written entry by entry, so that no more than one is there twice.
        x = getattr(self.vae, part)(x, feat_cache=past, feat_idx=[0], **options)
        kept = {type(None): x.new_empty(0), str: x.new_empty(1, 0)}
        past[:] = [kept.get(type(t), t) for t in past]
        return x, past
