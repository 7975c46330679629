"""Codecs: videos to latents and back, whole or as a stream.

A clip of `1 + stride * k` pixel frames has `1 + k` latent frames: the first latent frame is one
picture, each later one a group. Everything here walks one latent frame at a time, so a stream
gives the bits of the whole clip by construction; only training (`TinyCodec.reconstruct`) works on
all frames at once. No weights are fetched here and nothing is known of text, units or sampling.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

Memory = tuple[Tensor, ...]


class Codec(nn.Module, ABC):
    """What the rest of the program knows of a codec. Modules hold weights, never a stream's state.

    A codec defines how one latent frame is made and read, given what its network remembers of the
    frames before (`None` at the beginning of a clip); whole clips and streams follow from that.

    Args:
        stride: pixels per latent in time, height and width.
        latent_channels: channels of a latent frame.
    """

    def __init__(self, *, stride: tuple[int, int, int], latent_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.latent_channels = latent_channels

    @abstractmethod
    def encode_step(
        self, frames: Float[Tensor, "batch frames channels height width"], memory: Memory | None
    ) -> tuple[Float[Tensor, "batch 1 latent_channels rows columns"], Memory]:
        """Encode the pixel frames of one latent frame: 1 if `memory` is None, else `stride[0]`."""

    @abstractmethod
    def decode_step(
        self, latents: Float[Tensor, "batch 1 channels height width"], memory: Memory | None
    ) -> tuple[Float[Tensor, "batch frames image_channels rows columns"], Memory]:
        """Decode one latent frame: to 1 pixel frame if `memory` is None, else to `stride[0]`."""

    def encode(
        self, video: Float[Tensor, "batch frames channels height width"]
    ) -> Float[Tensor, "batch latent_frames latent_channels rows columns"]:
        """Encode whole clips with values in [-1, 1]; deterministic, without gradient."""
        return self.stream_encoder()(video)

    def decode(
        self, latents: Float[Tensor, "batch frames channels height width"]
    ) -> Float[Tensor, "batch pixel_frames image_channels rows columns"]:
        """Decode whole clips to values in [-1, 1]; deterministic, without gradient."""
        return self.stream_decoder()(latents)

    def stream_encoder(self) -> "StreamEncoder":
        """Begin to encode a stream."""
        return StreamEncoder(self)

    def stream_decoder(self) -> "StreamDecoder":
        """Begin to decode a stream."""
        return StreamDecoder(self)

    def check_video(self, video: Float[Tensor, "batch frames channels height width"]) -> None:
        """Raise `ValueError` if these pixel frames are not whole latent frames of a new clip."""
        _check_frames(video.shape[1], stride=self.stride[0], first=True)
        for name, pixels, step in zip(
            ("height", "width"), video.shape[-2:], self.stride[1:], strict=True
        ):
            if pixels % step:
                raise ValueError(
                    f"A {name} of {pixels} pixels does not divide into latents of {step}: "
                    f"crop or resize the video to {max(pixels // step, 1) * step}."
                )


class _Stream:
    """What one stream remembers between calls; several may run on one codec in turns."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._memory: Memory | None = None

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the stream's memory, empty if the stream has not begun."""
        if self._memory is None:
            return {}
        # The count tells a stream that remembers nothing from one that has not begun.
        state = {"count": torch.tensor(len(self._memory))}
        for index, tensor in enumerate(self._memory):
            state[f"memory.{index}"] = tensor.clone(memory_format=torch.contiguous_format)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where the stream that gave `state` stood."""
        if not state:
            self._memory = None
            return
        self._memory = tuple(state[f"memory.{index}"] for index in range(int(state["count"])))


class StreamEncoder(_Stream):
    """Encodes a stream of pixel frames: `1 + stride * k` at first, then `stride * k` per call."""

    @torch.no_grad()
    def __call__(
        self, video: Float[Tensor, "batch frames channels height width"]
    ) -> Float[Tensor, "batch latent_frames latent_channels rows columns"]:
        """Return the latents that end with these frames."""
        stride = self._codec.stride[0]
        if self._memory is None:
            self._codec.check_video(video)
        else:
            _check_frames(video.shape[1], stride=stride, first=False)
        head = 1 if self._memory is None else stride
        latents = []
        for frames in (video[:, :head], *video[:, head:].split(stride, dim=1)):
            if frames.shape[1]:
                latent, self._memory = self._codec.encode_step(frames, self._memory)
                latents.append(latent)
        return torch.cat(latents, dim=1)


class StreamDecoder(_Stream):
    """Decodes a stream of latent frames, any number per call, to the pixel frames they finish."""

    @torch.no_grad()
    def __call__(
        self, latents: Float[Tensor, "batch frames channels height width"]
    ) -> Float[Tensor, "batch pixel_frames image_channels rows columns"]:
        """Return the newly finished pixel frames, in [-1, 1]."""
        if latents.shape[1] == 0 or latents.shape[2] != self._codec.latent_channels:
            raise ValueError(
                f"Latents of {latents.shape[1]} frames and {latents.shape[2]} channels cannot be "
                f"decoded: give at least 1 frame of {self._codec.latent_channels} channels."
            )
        video = []
        for latent in latents.split(1, dim=1):
            frames, self._memory = self._codec.decode_step(latent, self._memory)
            video.append(frames)
        return torch.cat(video, dim=1)


def _check_frames(num_frames: int, *, stride: int, first: bool) -> None:
    rest = int(first)
    if num_frames > 0 and num_frames % stride == rest % stride:
        return
    below = (num_frames - rest) // stride * stride + rest
    choices = f"{below} or {below + stride}" if below > 0 else f"{below + stride}"
    rule = f"1 + {stride} * k" if first else f"{stride} * k"
    raise ValueError(
        f"{num_frames} frames are not {rule}, so they end inside a latent frame: "
        f"give {choices} frames."
    )


@dataclass(frozen=True, kw_only=True)
class PatchCodecConfig:
    """Shape of a lossless codec."""

    stride: tuple[int, int, int] = (4, 8, 8)
    """Pixels per latent in time, height and width."""
    image_channels: int = 3
    """Channels of the video."""

    def __post_init__(self) -> None:
        """Check the values."""
        if min(self.stride) < 1:
            raise ValueError(f"Strides are {self.stride}, but must be at least 1: raise them.")

    @property
    def latent_channels(self) -> int:
        """Every pixel of a patch becomes a channel."""
        return self.image_channels * math.prod(self.stride)


class PatchCodec(Codec):
    """Lossless space-time to depth: nothing to learn, so tests can tell codec from model errors.

    The first latent frame holds the first picture `stride[0]` times.
    """

    def __init__(self, config: PatchCodecConfig) -> None:
        super().__init__(stride=config.stride, latent_channels=config.latent_channels)
        self.config = config

    def encode_step(
        self, frames: Float[Tensor, "batch frames channels height width"], memory: Memory | None
    ) -> tuple[Float[Tensor, "batch 1 latent_channels rows columns"], Memory]:
        """Move the pixels of each patch to channels."""
        time, height, width = self.stride
        if memory is None:
            frames = frames.expand(-1, time, -1, -1, -1)
        pattern = "b (f t) c (h y) (w x) -> b f (c t y x) h w"
        return rearrange(frames, pattern, t=time, y=height, x=width), ()

    def decode_step(
        self, latents: Float[Tensor, "batch 1 channels height width"], memory: Memory | None
    ) -> tuple[Float[Tensor, "batch frames image_channels rows columns"], Memory]:
        """Move the channels of each patch to pixels."""
        time, height, width = self.stride
        pattern = "b f (c t y x) h w -> b (f t) c (h y) (w x)"
        frames = rearrange(latents, pattern, t=time, y=height, x=width)
        return frames[:, -1:] if memory is None else frames, ()


@dataclass(frozen=True, kw_only=True)
class TinyCodecConfig:
    """Shape of a `TinyCodec`; the defaults are those of the public `taew2_1` weights."""

    image_channels: int = 3
    """Channels of the video."""
    latent_channels: int = 16
    """Channels of a latent frame."""
    encoder_channels: tuple[int, int, int] = (64, 64, 64)
    """Width of the encoder at strides 2, 4 and 8."""
    decoder_channels: tuple[int, int, int, int] = (256, 128, 64, 64)
    """Width of the decoder at strides 8, 4, 2 and 1."""
    num_blocks: int = 3
    """Memory blocks at each stride of 2 and more."""
    patch_size: int = 1
    """Side of the pixel squares that enter and leave the network as channels."""
    pixel_range: Literal["unit", "signed"] = "unit"
    """Pixel values inside the network: [0, 1] or [-1, 1]. Outside they are always [-1, 1]."""
    time_padding: Literal["front", "end"] = "end"
    """Which picture is repeated to fill the first or last group of frames. `front` needs no frame
    after the 4k-th for the k-th latent, so it can stream; the public weights want `end`."""
    latents_mean: tuple[float, ...] | None = None
    """Mean of each channel of the latents inside the network, zero if None."""
    latents_std: tuple[float, ...] | None = None
    """Standard deviation of each channel of the latents inside the network, one if None."""

    def __post_init__(self) -> None:
        """Check the values."""
        sizes = (*self.encoder_channels, *self.decoder_channels, self.num_blocks, self.patch_size)
        if min(sizes) < 1:
            raise ValueError(f"Channels, blocks and patch are {sizes}: raise them to at least 1.")
        for name, values in (("mean", self.latents_mean), ("std", self.latents_std)):
            if values is not None and len(values) != self.latent_channels:
                raise ValueError(
                    f"latents_{name} has {len(values)} values for {self.latent_channels} latent "
                    "channels: give one value per channel."
                )

    @classmethod
    def toy(cls) -> "TinyCodecConfig":
        """Return the codec of the embedded default: narrow, causal, for real time on one core."""
        return cls(
            encoder_channels=(16, 16, 32),
            decoder_channels=(64, 32, 16, 16),
            num_blocks=2,
            pixel_range="signed",
            time_padding="front",
        )


class TinyCodec(Codec):
    """Causal tiny autoencoder: 2D convolutions, and blocks that remember one frame.

    Architecture and key names are those of TAEHV (https://github.com/madebyollin/taehv), so that
    its weights load strictly. A latent frame is 4 pixel frames of squares of 8 times `patch_size`.
    """

    def __init__(self, config: TinyCodecConfig) -> None:
        side = 8 * config.patch_size
        super().__init__(stride=(4, side, side), latent_channels=config.latent_channels)
        self.config = config
        pixel_channels = config.image_channels * config.patch_size**2
        self.encoder = nn.Sequential(*_encoder_layers(config, pixel_channels))
        self.decoder = nn.Sequential(*_decoder_layers(config, pixel_channels))

    def encode(
        self, video: Float[Tensor, "batch frames channels height width"]
    ) -> Float[Tensor, "batch latent_frames latent_channels rows columns"]:
        """Encode whole clips with values in [-1, 1]; deterministic, without gradient."""
        if self.config.time_padding == "front":
            return super().encode(video)
        self.check_video(video)
        padded = torch.cat([video, video[:, -1:].expand(-1, self.stride[0] - 1, -1, -1, -1)], dim=1)
        memory, latents = None, []
        with torch.no_grad():
            for frames in padded.split(self.stride[0], dim=1):
                latent, memory = self._encode(frames, memory)
                latents.append(latent)
        return torch.cat(latents, dim=1)

    def stream_encoder(self) -> StreamEncoder:
        """Begin to encode a stream."""
        if self.config.time_padding == "end":
            raise ValueError(
                "A codec with time_padding 'end' reads 3 frames ahead and cannot encode a stream: "
                "encode the whole clip, or train a codec with time_padding 'front'."
            )
        return super().stream_encoder()

    def encode_step(
        self, frames: Float[Tensor, "batch frames channels height width"], memory: Memory | None
    ) -> tuple[Float[Tensor, "batch 1 latent_channels rows columns"], Memory]:
        """Encode the pixel frames of one latent frame: 1 if `memory` is None, else `stride[0]`."""
        if memory is None:
            frames = frames.expand(-1, self.stride[0], -1, -1, -1)
        return self._encode(frames, memory)

    def decode_step(
        self, latents: Float[Tensor, "batch 1 channels height width"], memory: Memory | None
    ) -> tuple[Float[Tensor, "batch frames image_channels rows columns"], Memory]:
        """Decode one latent frame: to 1 pixel frame if `memory` is None, else to `stride[0]`."""
        frames, kept = self._decode(latents, memory)
        # The three frames before the first picture fill the memory and are never shown.
        frames = frames[:, -1:] if memory is None else frames
        return frames.clamp(-1, 1), kept

    def reconstruct(
        self,
        video: Float[Tensor, "batch frames channels height width"],
        *,
        noise_std: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[
        Float[Tensor, "batch frames channels height width"],
        Float[Tensor, "batch latent_frames latent_channels rows columns"],
    ]:
        """Encode and decode all frames at once, with gradient: the path for training.

        Args:
            video: clips with values in [-1, 1].
            noise_std: deviation of the noise added to the latents before they are decoded, so that
                the decoder forgives the errors of a generative model.
            generator: source of that noise.

        Returns:
            The reconstruction, not clamped, and the latents without noise.
        """
        self.check_video(video)
        repeats = (1, self.stride[0] - 1, 1, 1, 1)
        if self.config.time_padding == "front":
            padded = torch.cat([video[:, :1].repeat(repeats), video], dim=1)
        else:
            padded = torch.cat([video, video[:, -1:].repeat(repeats)], dim=1)
        latents, _ = self._encode(padded, None)
        noisy = latents
        if noise_std > 0:
            noise = torch.empty_like(latents).normal_(generator=generator)
            noisy = latents + noise_std * noise
        frames, _ = self._decode(noisy, None)
        return frames[:, self.stride[0] - 1 :], latents

    def with_statistics(
        self,
        mean: Float[Tensor, " latent_channels"],
        std: Float[Tensor, " latent_channels"],
    ) -> Self:
        """Return a copy whose latents are normalised.

        Args:
            mean: mean of each channel of the latents that this codec encodes.
            std: their standard deviation.
        """
        old_mean, old_std = self._statistics(mean)
        config = replace(
            self.config,
            latents_mean=tuple((old_mean.flatten() + old_std.flatten() * mean).tolist()),
            latents_std=tuple((old_std.flatten() * std).tolist()),
        )
        copy = type(self)(config).to(next(self.parameters()))
        copy.load_state_dict(self.state_dict())
        return copy

    def _encode(
        self, frames: Float[Tensor, "batch frames channels height width"], memory: Memory | None
    ) -> tuple[Float[Tensor, "batch latent_frames latent_channels rows columns"], Memory]:
        if self.config.pixel_range == "unit":
            frames = frames * 0.5 + 0.5
        x = rearrange(frames, "b t c h w -> (t b) c h w")
        x = F.pixel_unshuffle(x, self.config.patch_size)
        x, kept = _run(self.encoder, x, memory, batch=frames.shape[0])
        mean, std = self._statistics(x)
        return rearrange((x - mean) / std, "(t b) c h w -> b t c h w", b=frames.shape[0]), kept

    def _decode(
        self, latents: Float[Tensor, "batch frames channels height width"], memory: Memory | None
    ) -> tuple[Float[Tensor, "batch pixel_frames image_channels rows columns"], Memory]:
        x = rearrange(latents, "b t c h w -> (t b) c h w")
        mean, std = self._statistics(x)
        x, kept = _run(self.decoder, x * std + mean, memory, batch=latents.shape[0])
        x = F.pixel_shuffle(x, self.config.patch_size)
        frames = rearrange(x, "(t b) c h w -> b t c h w", b=latents.shape[0])
        return frames * 2 - 1 if self.config.pixel_range == "unit" else frames, kept

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        # Read from the config at each use: a buffer outside the state dict, whose keys are fixed
        # by the public weights, would be lost when a module is built on the meta device.
        channels = self.config.latent_channels
        mean = like.new_tensor(self.config.latents_mean or (0.0,) * channels)
        std = like.new_tensor(self.config.latents_std or (1.0,) * channels)
        return mean.view(-1, 1, 1), std.view(-1, 1, 1)


def _run(
    layers: nn.Sequential,
    x: Float[Tensor, "time_batch channels height width"],
    memory: Memory | None,
    *,
    batch: int,
) -> tuple[Float[Tensor, "out_time_batch out_channels out_height out_width"], Memory]:
    """Apply layers to frames in (time, batch) order; return also what each memory block keeps.

    Channels last is 3.5 times as fast as channels first on a CPU (16 channels, 64x64 pixels).
    """
    x = x.contiguous(memory_format=torch.channels_last)
    past = None if memory is None else iter(memory)
    kept = []
    for layer in layers:
        if isinstance(layer, MemBlock):
            last = torch.zeros_like(x[:batch]) if past is None else next(past)
            kept.append(x[-batch:])
            x = layer(x, torch.cat([last, x[:-batch]]))
        elif isinstance(layer, TPool | TGrow):
            x = layer(x, batch=batch)
        else:
            x = layer(x)
    return x, tuple(kept)


def _conv(channels_in: int, channels_out: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    conv = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=bias)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class MemBlock(nn.Module):
    """Residual block that sees a frame and the one before."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * channels, channels),
            nn.ReLU(inplace=True),
            _conv(channels, channels),
            nn.ReLU(inplace=True),
            _conv(channels, channels),
        )
        nn.init.zeros_(self.conv[4].weight)

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat([x, past], dim=1)) + x)


class TPool(nn.Module):
    """Merge each `stride` frames into one."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels * stride, channels, 1, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="linear")

    def forward(self, x: Tensor, *, batch: int) -> Tensor:
        if self.stride > 1:
            x = rearrange(x, "(t s b) c h w -> (t b) (s c) h w", s=self.stride, b=batch)
            x = x.contiguous(memory_format=torch.channels_last)
        return self.conv(x)


class TGrow(nn.Module):
    """Split each frame into `stride` frames, of twice the height and width."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, channels * stride, 1, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="linear")

    def forward(self, x: Tensor, *, batch: int) -> Tensor:
        x = self.conv(x)
        if self.stride > 1:
            x = rearrange(x, "(t b) (s c) h w -> (t s b) c h w", s=self.stride, b=batch)
            x = x.contiguous(memory_format=torch.channels_last)
        # The layer of the public weights works on the larger frames; copies and a 1x1 convolution
        # commute, and on the smaller frames it is a quarter of the work.
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Clamp(nn.Module):
    """Bound values smoothly to (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def _encoder_layers(config: TinyCodecConfig, pixel_channels: int) -> list[nn.Module]:
    width = config.encoder_channels[0]
    layers: list[nn.Module] = [_conv(pixel_channels, width), nn.ReLU(inplace=True)]
    for channels, time_stride in zip(config.encoder_channels, (2, 2, 1), strict=True):
        layers += [TPool(width, time_stride), _conv(width, channels, stride=2, bias=False)]
        layers += [MemBlock(channels) for _ in range(config.num_blocks)]
        width = channels
    return [*layers, _conv(width, config.latent_channels)]


def _decoder_layers(config: TinyCodecConfig, pixel_channels: int) -> list[nn.Module]:
    width, *rest = config.decoder_channels
    layers = [Clamp(), _conv(config.latent_channels, width), nn.ReLU(inplace=True)]
    for channels, time_stride in zip(rest, (1, 2, 2), strict=True):
        layers += [MemBlock(width) for _ in range(config.num_blocks)]
        # The identity keeps the place of the upsampling layer in the numbering of the weights.
        layers += [nn.Identity(), TGrow(width, time_stride), _conv(width, channels, bias=False)]
        width = channels
    return [*layers, nn.ReLU(inplace=True), _conv(width, pixel_channels)]


def reconstruction_loss(
    video: Float[Tensor, "batch frames channels height width"],
    reconstruction: Float[Tensor, "batch frames channels height width"],
) -> Float[Tensor, ""]:
    """Measure the error of pixels: absolute, plus twice the squared one.

    The absolute error alone is content with the background for a long time: objects are small.
    """
    error = video - reconstruction
    return error.abs().mean() + 2 * error.square().mean()
