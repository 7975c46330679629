"""Wan's codec behind our interface, and how the families of Wan are sampled.

diffusers is imported where it is used, and nowhere else.
"""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from videoar.checkpoint import (
    CONFIG,
    assign_weights,
    build_config,
    build_empty,
    library,
    read_json,
)
from videoar.codec_layers import Memory
from videoar.codecs import Codec, Latents, TinyCodec, TinyCodecConfig, Video
from videoar.weights import read_weights

# Where the codec lies: in a folder of diffusers, of the original.
CODECS = ("vae", "*VAE*.pth")
_ALL = {"height": 480, "width": 832, "fps": 16, "sink_frames": 0}
_WHOLE = {"units": "full", "window_frames": None}
_FEW = _ALL | {
    "units": "chunk:3",
    "num_inference_steps": 4,
    "shift": 5.0,
    "step": "renoise",
    "guidance_scale": 1.0,
    "context_noise": 0.0,
    "window_frames": 21,
}
# How each family was trained to be sampled: fields of `pipeline.Sampling`.
PRESETS: dict[str, dict[str, Any]] = {
    "wan": _ALL | _WHOLE | {"num_inference_steps": 50, "shift": 3.0, "guidance_scale": 5.0},
    "self-forcing": _FEW,
    # The timesteps 1000, 757 and 522 of its configuration, from a grid of shift 8.
    "causvid": _FEW | {"num_inference_steps": 3, "shift": 8.0, "sigmas": (1.0, 0.757, 0.522, 0.0)},
    "longlive": _FEW | {"window_frames": 12, "sink_frames": 3, "moving_sinks": False},
    "causal-forcing": _FEW,
    "causal-forcing-frame": _FEW | {"units": "frame"},
    # sin t / (sin t + cos t) of its angles 1.5, 1.4 and 1; it begins at sigma_max 80, so at 0.988.
    "rcm": _FEW | _WHOLE | {"sigmas": (1.0, 0.933781, 0.852895, 0.608979, 0.0)},
}


def sampling(folder: Path, preset: str | None) -> dict[str, Any]:
    """Return how a family is sampled, or else plain Wan with the shift of a folder's scheduler."""
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"no preset is called {preset!r}: use one of {', '.join(PRESETS)}")
    if preset is not None:
        return dict(PRESETS[preset])
    file = folder / "scheduler" / "scheduler_config.json"
    stated = read_json(file) if file.is_file() else {}
    shifts = (stated.get("flow_shift"), stated.get("shift"), PRESETS["wan"]["shift"])
    shift = next(value for value in shifts if isinstance(value, float | int) and value > 0)
    return PRESETS["wan"] | {"shift": float(shift)}


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
        super().__init__(stride=config.stride, latent_channels=config.z_dim)
        self.config = config
        stated = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
        self.vae = library("diffusers").AutoencoderKLWan(**stated)

    def encode_step(self, frames: Video, memory: Memory | None) -> tuple[Latents, Memory]:
        frames = frames[:, -1:] if memory is None else frames
        x, kept = self._run("encoder", rearrange(frames, "b t c h w -> b c t h w"), memory)
        # The mode of the posterior: its mean, which comes before its log variance.
        latents = self.vae.quant_conv(x).chunk(2, dim=1)[0].float()
        mean, std = self._statistics(x.device)
        return (rearrange(latents, "b c t h w -> b t c h w") - mean) / std, kept

    def decode_step(self, latents: Latents, memory: Memory | None) -> tuple[Video, Memory]:
        mean, std = self._statistics(latents.device)
        x = rearrange(latents.float() * std + mean, "b t c h w -> b c t h w")
        x, kept = self._run("decoder", x, memory, first_chunk=memory is None)
        video = rearrange(x.float().clamp(-1, 1), "b c t h w -> b t c h w")
        return video.expand(-1, self.stride[0], -1, -1, -1) if memory is None else video, kept

    def _run(
        self, part: str, x: Tensor, memory: Memory | None, **options: bool
    ) -> tuple[Tensor, Memory]:
        x = x.to(self.vae.quant_conv.weight.dtype)
        if part == "decoder":
            x = self.vae.post_quant_conv(x)
        # A saved stream holds tensors only: what is empty or a word there is an empty tensor here.
        words, count = {1: None, 2: "Rep"}, self.vae._cached_conv_counts[part]
        past = [None] * count if memory is None else [words.get(t.ndim, t) for t in memory]
        x = getattr(self.vae, part)(x, feat_cache=past, feat_idx=[0], **options)
        kept = {type(None): x.new_empty(0), str: x.new_empty(1, 0)}
        return x, tuple(kept.get(type(t), t) for t in past)

    def _statistics(self, device: torch.device) -> Tensor:
        config = self.config
        values = torch.tensor([config.latents_mean, config.latents_std], device=device)
        return values.view(2, 1, 1, -1, 1, 1)


def load_codec(source: Path, *, device: torch.device | str = "cpu") -> Codec:
    """Load a codec: a Wan folder, or a file of the original or of TAEHV (`taew2_1`)."""
    if source.is_dir():
        found = next((path for place in CODECS for path in sorted(source.glob(place))), None)
        if found is None:
            raise ValueError(
                f"{source} has no codec; pass a Wan folder with `vae/` or `Wan2.1_VAE.pth` as "
                "--base, or a codec as --codec"
            )
        source = found
    weights = {key: tensor.to(device) for key, tensor in read_weights(source).items()}
    if "decoder.22.weight" in weights:
        codec: Codec = build_empty(TinyCodec, TinyCodecConfig())
        assign_weights(codec, weights, file=source)
        return codec
    config = _codec_config(source / CONFIG) if source.is_dir() else WanCodecConfig()
    if {"encoder.conv1.weight", "conv2.weight"} <= weights.keys():  # names of the original
        dim, channels = len(weights["encoder.conv1.weight"]), len(weights["conv2.weight"])
        config = replace(config, base_dim=dim, z_dim=channels)
        names = library("diffusers.loaders.single_file_utils")
        weights = names.convert_wan_vae_to_diffusers(weights)
    codec = build_empty(WanCodec, config)
    assign_weights(codec, {f"vae.{key}": weights[key] for key in weights}, file=source)
    return codec


def _codec_config(file: Path) -> WanCodecConfig:
    """Read the config of diffusers; what ours does not know must be as in Wan 2.1."""
    stated = read_json(file)
    for name in ("is_residual", "patch_size"):
        if stated.get(name):
            raise ValueError(
                f"{file} gives {name} {stated[name]!r}, as the codec of Wan 2.2 has it, which is "
                "not supported; use the one of Wan 2.1"
            )
    names = {field.name for field in fields(WanCodecConfig)} & stated.keys()
    return build_config(WanCodecConfig, {name: stated[name] for name in names}, file=file)
