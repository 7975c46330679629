"""Codecs: videos to latents and back, whole or as a stream.

A clip of `1 + stride * k` pixel frames has `1 + k` latent frames: the first latent frame is one
picture, each later one a group. Whole clips and streams walk one latent frame at a time, so they
agree bit for bit by construction; only training (`TinyCodec.reconstruct`) takes all at once.
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from videoar.codec_layers import Memory, build_decoder, build_encoder, run

Video = Float[Tensor, "batch frames channels height width"]
"""Pixels in [-1, 1]."""
Padded = Float[Tensor, "batch padded channels height width"]
Latents = Float[Tensor, "batch latent_frames latent_channels rows columns"]
PerChannel = Float[Tensor, " latent_channels"]


class Codec(nn.Module, ABC):
    """What the rest of the program knows of a codec. Modules hold weights, never a stream's state.

    `stride` counts the pixels per latent in time, height and width; `config` is a dataclass.
    """

    config: Any

    def __init__(self, *, stride: tuple[int, int, int], latent_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.latent_channels = latent_channels

    @abstractmethod
    def encode_step(self, frames: Video, memory: Memory | None) -> tuple[Latents, Memory]:
        """Turn groups of `stride[0]` pixel frames into a latent frame each."""

    @abstractmethod
    def decode_step(self, latents: Latents, memory: Memory | None) -> tuple[Video, Memory]:
        """Turn latent frames into a group of `stride[0]` pixel frames each."""

    def pad(self, video: Video) -> Padded:
        """Repeat the first picture of a clip until its group is full."""
        return torch.cat([video[:, :1].repeat(1, self.stride[0] - 1, 1, 1, 1), video], dim=1)

    def encode(self, video: Video) -> Latents:
        """Encode whole clips, without gradient."""
        return StreamEncoder(self)(video)

    def decode(self, latents: Latents) -> Video:
        """Decode whole clips, without gradient."""
        return StreamDecoder(self)(latents)

    def stream_encoder(self) -> "StreamEncoder":
        return StreamEncoder(self)

    def stream_decoder(self) -> "StreamDecoder":
        return StreamDecoder(self)

    def fingerprint(self) -> str:
        """Name what the latents mean: the same for codecs that differ in their decoders alone."""
        values = {k: v for k, v in asdict(self.config).items() if "decoder" not in k}
        digest = hashlib.sha256(json.dumps(values).encode())
        for name, tensor in sorted(self.state_dict().items()):
            if "decoder" not in name:
                digest.update(name.encode() + tensor.float().cpu().contiguous().numpy().tobytes())
        return f"{type(self).__name__}-{digest.hexdigest()[:12]}"

    def check_video(self, video: Video) -> None:
        """Raise `ValueError` unless these pixels are whole latent frames of a new clip."""
        _check_frames(video.shape[1], stride=self.stride[0], first=1)
        sides = {"height": self.stride[1], "width": self.stride[2]}
        for (name, side), size in zip(sides.items(), video.shape[-2:], strict=True):
            if size % side:
                raise ValueError(
                    f"A {name} of {size} pixels is not a multiple of {side}: "
                    f"crop or resize the video to {max(size // side, 1) * side}."
                )


def _check_frames(num_frames: int, *, stride: int, first: int) -> None:
    groups, rest = divmod(num_frames - first, stride)
    if num_frames == 0 or rest:
        fits = [str(first + stride * k) for k in (groups, groups + 1) if first + stride * k > 0]
        raise ValueError(
            f"{num_frames} frames are not {'1 + ' * first}{stride} * k, so no latent frame ends "
            f"with the last one: give {' or '.join(fits)} frames."
        )


class _Stream:
    """What one stream remembers between calls; many may take turns on one codec."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._memory: Memory | None = None

    def _walk(self, step: Callable[..., tuple[Tensor, Memory]], groups: Iterable[Tensor]) -> Tensor:
        results = []
        for group in groups:
            result, self._memory = step(group, self._memory)
            results.append(result)
        return torch.cat(results, dim=1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of what the stream remembers: nothing if it has not begun."""
        if self._memory is None:
            return {}
        kept = (tensor.clone(memory_format=torch.contiguous_format) for tensor in self._memory)
        # The count tells a stream that needs no memory from one that has not begun.
        count = {"count": torch.tensor(len(self._memory))}
        return count | {f"memory.{index}": tensor for index, tensor in enumerate(kept)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where the stream that gave `state` stood."""
        kept = [state[f"memory.{index}"] for index in range(len(state) - 1)]
        self._memory = tuple(kept) if state else None


class StreamEncoder(_Stream):
    """Encodes pixel frames as they come: `1 + stride * k` at first, then `stride * k` per call."""

    @torch.no_grad()
    def __call__(self, video: Video) -> Latents:
        """Return the latent frames that end with these pixel frames."""
        codec = self._codec
        if self._memory is None:
            codec.check_video(video)
            video = codec.pad(video)
        else:
            _check_frames(video.shape[1], stride=codec.stride[0], first=0)
        return self._walk(codec.encode_step, video.split(codec.stride[0], dim=1))


class StreamDecoder(_Stream):
    """Decodes latent frames as they come, any number per call."""

    @torch.no_grad()
    def __call__(self, latents: Latents) -> Video:
        """Return the pixel frames that these latent frames finish."""
        codec = self._codec
        num_frames, channels = latents.shape[1:3]
        if num_frames == 0 or channels != codec.latent_channels:
            raise ValueError(
                f"Latents of {num_frames} frames and {channels} channels cannot be decoded: "
                f"give at least 1 frame, of {codec.latent_channels} channels."
            )
        # The frames before the first picture only fill the memory; they are never shown.
        unseen = codec.stride[0] - 1 if self._memory is None else 0
        return self._walk(codec.decode_step, latents.split(1, dim=1))[:, unseen:]


@dataclass(frozen=True, kw_only=True)
class PatchCodecConfig:
    """Shape of a `PatchCodec`."""

    stride: tuple[int, int, int] = (4, 8, 8)
    """Pixels per latent in time, height and width."""
    image_channels: int = 3

    def __post_init__(self) -> None:
        if min(self.stride) < 1:
            raise ValueError(f"The stride {self.stride} is below 1: raise it to at least 1.")


class PatchCodec(Codec):
    """Lossless space-time to depth: nothing to learn, so tests can tell codec from model errors."""

    PIXELS, PATCHES = "b (f t) c (h y) (w x)", "b f (c t y x) h w"

    def __init__(self, config: PatchCodecConfig) -> None:
        channels = config.image_channels * math.prod(config.stride)
        super().__init__(stride=config.stride, latent_channels=channels)
        self.config = config
        self._sides = dict(zip("tyx", config.stride, strict=True))

    def encode_step(self, frames: Video, memory: Memory | None) -> tuple[Latents, Memory]:
        return rearrange(frames, f"{self.PIXELS} -> {self.PATCHES}", **self._sides), ()

    def decode_step(self, latents: Latents, memory: Memory | None) -> tuple[Video, Memory]:
        return rearrange(latents, f"{self.PATCHES} -> {self.PIXELS}", **self._sides), ()


@dataclass(frozen=True, kw_only=True)
class TinyCodecConfig:
    """Shape of a `TinyCodec`; the defaults are those of the public `taew2_1` weights."""

    image_channels: int = 3
    latent_channels: int = 16
    encoder_channels: tuple[int, int, int] = (64, 64, 64)
    """Width of the encoder at strides 2, 4 and 8."""
    decoder_channels: tuple[int, int, int, int] = (256, 128, 64, 64)
    """Width of the decoder at strides 8, 4, 2 and 1."""
    num_blocks: int = 3
    """Memory blocks at each stride of 2 and more."""
    patch_size: int = 1
    """Side of the squares of pixels that enter and leave the network as channels."""
    pixel_range: Literal["unit", "signed"] = "unit"
    """Pixels inside the network: [0, 1] or [-1, 1]. Outside they are always [-1, 1]."""
    time_padding: Literal["front", "end"] = "end"
    """Where the outermost picture is repeated to fill a group of frames. With `front`, latent k
    needs no pixel frame after 4k, so it can stream; the public weights were trained with `end`."""
    latents_mean: tuple[float, ...] | None = None
    """Mean of each channel of the latents inside the network; None: they leave as they are."""
    latents_std: tuple[float, ...] | None = None
    """Their standard deviation."""

    def __post_init__(self) -> None:
        sizes = (self.image_channels, self.latent_channels, self.num_blocks, self.patch_size)
        if min(*sizes, *self.encoder_channels, *self.decoder_channels) < 1:
            raise ValueError(f"A size of {self} is below 1: raise it to at least 1.")
        if any(width % 2 for width in self.encoder_channels + self.decoder_channels):
            raise ValueError(f"Some channels of {self} are odd: make them even.")
        for values in (self.latents_mean, self.latents_std):
            if values is not None and len(values) != self.latent_channels:
                raise ValueError(
                    f"The latent statistics have {len(values)} values, but there are "
                    f"{self.latent_channels} latent channels: give one value per channel."
                )

    @classmethod
    def toy(cls) -> "TinyCodecConfig":
        """Return the codec of the embedded default: narrow and causal."""
        return cls(
            encoder_channels=(16, 32, 64),
            decoder_channels=(64, 32, 16, 16),
            num_blocks=2,
            pixel_range="signed",
            time_padding="front",
        )


class TinyCodec(Codec):
    """Causal tiny autoencoder: 2D convolutions, and blocks that remember one frame.

    Architecture and key names are those of TAEHV (https://github.com/madebyollin/taehv), so that
    its weights load strictly. A latent is 4 frames of squares with a side of 8 * `patch_size`.
    """

    def __init__(self, config: TinyCodecConfig) -> None:
        side, latents = 8 * config.patch_size, config.latent_channels
        super().__init__(stride=(4, side, side), latent_channels=latents)
        self.config = config
        pixels, blocks = config.image_channels * config.patch_size**2, config.num_blocks
        self.encoder = build_encoder((pixels, *config.encoder_channels, latents), num_blocks=blocks)
        self.decoder = build_decoder((latents, *config.decoder_channels, pixels), num_blocks=blocks)

    def pad(self, video: Video) -> Padded:
        if self.config.time_padding == "front":
            return super().pad(video)
        return torch.cat([video, video[:, -1:].repeat(1, self.stride[0] - 1, 1, 1, 1)], dim=1)

    def stream_encoder(self) -> StreamEncoder:
        if self.config.time_padding == "end":
            raise ValueError(
                "A codec with time_padding 'end' reads 3 frames ahead and cannot encode a stream: "
                "encode the whole clip, or train a codec with time_padding 'front'."
            )
        return super().stream_encoder()

    def encode_step(self, frames: Video, memory: Memory | None) -> tuple[Latents, Memory]:
        if self.config.pixel_range == "unit":
            frames = frames * 0.5 + 0.5
        x, kept = run(self.encoder, F.pixel_unshuffle(frames, self.config.patch_size), memory)
        mean, std = self._statistics(x)
        return (x - mean) / std, kept

    def decode_step(self, latents: Latents, memory: Memory | None) -> tuple[Video, Memory]:
        video, kept = self._decode(latents, memory)
        return video.clamp(-1, 1), kept

    def _decode(self, latents: Latents, memory: Memory | None) -> tuple[Video, Memory]:
        mean, std = self._statistics(latents)
        x, kept = run(self.decoder, latents * std + mean, memory)
        video = F.pixel_shuffle(x, self.config.patch_size)
        return video * 2 - 1 if self.config.pixel_range == "unit" else video, kept

    def reconstruct(
        self, video: Video, *, noise_std: float = 0.0, generator: torch.Generator | None = None
    ) -> tuple[Video, Latents]:
        """Encode and decode all frames at once, with gradient: the path for training.

        Noise of this deviation is added to the latents on the way, so that the decoder forgives the
        errors of a generative model. Returns the pixels, not clamped, and latents without noise.
        """
        self.check_video(video)
        latents, _ = self.encode_step(self.pad(video), None)
        noise = torch.empty_like(latents).normal_(generator=generator) if noise_std else 0.0
        frames, _ = self._decode(latents + noise_std * noise, None)
        return frames[:, self.stride[0] - 1 :], latents

    def with_statistics(self, mean: PerChannel, std: PerChannel) -> "TinyCodec":
        """Return a copy that normalises latents; the statistics are of what is encoded now."""
        old_mean, old_std = (values.flatten() for values in self._statistics(mean))
        new_mean, new_std = (old_mean + old_std * mean).tolist(), (old_std * std).tolist()
        copy = deepcopy(self)
        copy.config = replace(self.config, latents_mean=tuple(new_mean), latents_std=tuple(new_std))
        return copy

    def with_decoder(self, channels: tuple[int, int, int, int]) -> "TinyCodec":
        """Return a copy with the same encoder and a new decoder of these widths."""
        copy = TinyCodec(replace(self.config, decoder_channels=channels))
        copy.encoder.load_state_dict(self.encoder.state_dict())
        return copy

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        # No buffers: keys of the state dict are given by the public weights, and others would be
        # lost when a module is built on the meta device.
        channels = self.config.latent_channels
        mean = like.new_tensor(self.config.latents_mean or (0.0,) * channels)
        std = like.new_tensor(self.config.latents_std or (1.0,) * channels)
        return mean.view(-1, 1, 1), std.view(-1, 1, 1)
