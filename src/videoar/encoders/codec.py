"""Codecs: videos to latents and back, whole or as a stream.

A clip of `1 + stride * k` pixel frames has `1 + k` latent frames: the first latent frame is one
picture, each later one a group. Whole clips and streams walk one latent frame at a time, or as
many as move no bit, so they agree bit for bit; only training (`TinyCodec.reconstruct`) takes all at
once.
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from videoar.checks import Count, Options

Memory = list[Tensor]
"""What a network remembers of the frames before; None stands for the beginning of a clip. A step
may use it up, so that old and new do not fill the memory at once."""

Video = Float[Tensor, "batch frames channels height width"]
"""Pixels in [-1, 1]."""
Padded = Float[Tensor, "batch padded channels height width"]
Latents = Float[Tensor, "batch latent_frames latent_channels rows columns"]


class Codec(nn.Module, ABC):
    """What the rest of the program knows of a codec. Modules hold weights, never a stream's state.

    `stride` counts the pixels per latent in time, height and width; `config` is a dataclass.
    """

    def __init__(self, config: Any, *, stride: tuple[int, int, int], latent_channels: int) -> None:
        super().__init__()
        self.config = config
        self.stride = stride
        self.latent_channels = latent_channels

    @abstractmethod
    def encode_step(self, frames: Video, memory: Memory | None) -> tuple[Latents, Memory]:
        """Turn groups of `stride[0]` pixel frames into a latent frame each."""

    @abstractmethod
    def decode_step(self, latents: Latents, memory: Memory | None) -> tuple[Video, Memory]:
        """Turn latent frames into a group of `stride[0]` pixel frames each."""

    def fast_step(self) -> Callable[..., tuple[Tensor, Memory]]:
        """Return `decode_step` for a stream, during which the weights do not change."""
        return self.decode_step

    def together(self, latents: Latents) -> int:
        """Return how many latent frames a stream decodes at once: as many as move no bit."""
        return 1

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the deviation of each channel of the latents inside the network."""
        # No buffers: keys of the state dict are given by the public weights, and others would be
        # lost when a module is built on the meta device.
        mean = like.new_tensor(self.config.latents_mean or (0.0,) * self.latent_channels)
        std = like.new_tensor(self.config.latents_std or (1.0,) * self.latent_channels)
        return mean.view(-1, 1, 1), std.view(-1, 1, 1)

    def pad(self, video: Video) -> Padded:
        """Repeat the first picture of a clip until its group is full."""
        return torch.cat([video[:, :1].repeat(1, self.stride[0] - 1, 1, 1, 1), video], dim=1)

    @torch.no_grad()
    def encode(self, video: Video, *, beat: Callable[[Any], None] = lambda _: None) -> Latents:
        """Encode whole clips, without gradient; `beat` is called after every latent frame."""
        self.check_video(video)
        memory, latents = None, []
        for group in self.pad(video).split(self.stride[0], dim=1):
            frame, memory = self.encode_step(group, memory)
            latents.append(frame)
            beat(None)
        return torch.cat(latents, dim=1)

    def decode(self, latents: Latents) -> Video:
        """Decode whole clips, without gradient."""
        return StreamDecoder(self)(latents)

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
        count, (stride, *sides) = video.shape[1], self.stride
        groups, rest = divmod(count - 1, stride)
        if rest or not count:
            fits = [str(1 + stride * k) for k in (groups, groups + 1) if k >= 0]
            raise ValueError(
                f"{count} frames are not 1 + {stride} * k, so no latent frame ends "
                f"with the last one: give {' or '.join(fits)} frames."
            )
        for name, side, size in zip(("height", "width"), sides, video.shape[-2:], strict=True):
            if size % side:
                raise ValueError(
                    f"A {name} of {size} pixels is not a multiple of {side}: "
                    f"crop or resize the video to {max(size // side, 1) * side}."
                )


class StreamDecoder:
    """Decodes latent frames as they come, any number per call; many may take turns on one codec."""

    def __init__(self, codec: Codec) -> None:
        self._codec, self._step = codec, codec.fast_step()
        self._memory: Memory | None = None

    @torch.no_grad()
    def __call__(self, latents: Latents) -> Video:
        """Return the pixel frames that these latent frames finish."""
        codec, frames = self._codec, []
        num_frames, channels = latents.shape[1:3]
        if num_frames == 0 or channels != codec.latent_channels:
            raise ValueError(
                f"Latents of {num_frames} frames and {channels} channels cannot be decoded: "
                f"give at least 1 frame, of {codec.latent_channels} channels."
            )
        # The frames before the first picture only fill the memory; they are never shown.
        unseen = codec.stride[0] - 1 if self._memory is None else 0
        for some in latents.split(codec.together(latents), dim=1):
            group, self._memory = self._step(some, self._memory)
            frames.append(group)
        return torch.cat(frames, dim=1)[:, unseen:]

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
        self._memory = kept if state else None


@dataclass(frozen=True, kw_only=True)
class PatchCodecConfig(Options):
    """Shape of a `PatchCodec`."""

    stride: tuple[Count, Count, Count] = (4, 8, 8)
    """Pixels per latent in time, height and width."""
    image_channels: int = 3


class PatchCodec(Codec):
    """Lossless space-time to depth: nothing to learn, so tests can tell codec from model errors."""

    PIXELS, PATCHES = "b (f t) c (h y) (w x)", "b f (c t y x) h w"

    def __init__(self, config: PatchCodecConfig) -> None:
        channels = config.image_channels * math.prod(config.stride)
        super().__init__(config, stride=config.stride, latent_channels=channels)
        self._sides = dict(zip("tyx", config.stride, strict=True))

    def encode_step(self, frames: Video, memory: Memory | None) -> tuple[Latents, Memory]:
        return rearrange(frames, f"{self.PIXELS} -> {self.PATCHES}", **self._sides), []

    def decode_step(self, latents: Latents, memory: Memory | None) -> tuple[Video, Memory]:
        return rearrange(latents, f"{self.PATCHES} -> {self.PIXELS}", **self._sides), []


def to_frames(
    video: Float[Tensor, "*batch 3 height width"],
) -> UInt8[np.ndarray, "*batch height width 3"]:
    """Turn floats in [-1, 1] into pixels."""
    pixels = ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(pixels, "... c h w -> ... h w c").cpu().numpy()


def from_frames(
    frames: UInt8[np.ndarray, "*batch height width 3"],
) -> Float[Tensor, "*batch 3 height width"]:
    """Turn pixels into floats in [-1, 1]."""
    return rearrange(torch.from_numpy(frames).float() / 127.5 - 1, "... h w c -> ... c h w")
