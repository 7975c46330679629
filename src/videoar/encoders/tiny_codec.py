"""The layers of the tiny codec: 2D convolutions on frames, and blocks that remember one frame.

Order and names of the layers are those of TAEHV (https://github.com/madebyollin/taehv).

Weights begin as a linear map, "looks linear" of Balduzzi et al. 2017 (arXiv:1702.08591): channels
come in mirrored halves, so that after a ReLU the difference of the halves is the value before it.
The untrained codec shrinks a picture, mixes its colours and enlarges it again. Training that has to
undo a random texture first ends, after 125 steps of 4 clips of 9 frames, at 10.7 dB and not 23.0.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from videoar.checks import Count, Limit, Options, check
from videoar.encoders.codec import Codec, Latents, Memory, Padded, Video
from videoar.encoders.convolution import Convolution, one_kernel

SMALL = 256  # latent pixels; of larger frames one alone is as fast, and takes less memory
TOGETHER = 4  # latent frames

Pair = tuple[int, int]
Frames = Float[Tensor, "time_batch _ _ _"]
"""Feature maps in (time, batch) order: the frames of one time are neighbours."""


def run(
    layers: nn.Sequential, clips: Float[Tensor, "batch time _ _ _"], memory: Memory | None
) -> tuple[Float[Tensor, "batch time_out _ _ _"], Memory]:
    """Apply layers to groups of frames; return also what each block remembers of them."""
    batch = len(clips)
    clips = clips.to(next(layers.parameters()).dtype)
    x = rearrange(clips, "batch time c h w -> (time batch) c h w")
    # 3.5 times as fast as channels first on a CPU (16 channels, 64x64 pixels).
    x = x.contiguous(memory_format=torch.channels_last)
    past = None if memory is None else iter(memory)
    kept = []
    for layer in layers:
        if isinstance(layer, MemBlock):
            last = torch.zeros_like(x[:batch]) if past is None else next(past)
            # A stream that was saved comes back channels first, which rounds differently.
            last = last.contiguous(memory_format=torch.channels_last)
            kept.append(x[-batch:])
            x = layer(x, torch.cat([last, x[:-batch]]) if len(x) > batch else last)
        elif isinstance(layer, TPool | TGrow):
            x = layer(x, batch=batch)
        else:
            x = layer(x)
    return rearrange(x, "(time batch) c h w -> batch time c h w", batch=batch), kept


def build_encoder(widths: tuple[int, ...], *, num_blocks: int) -> nn.Sequential:
    """Build the encoder; widths of pixels, of strides 2, 4 and 8, and of latents."""
    pixels, *inner, latents = widths
    width = inner[0]
    layers = [_mirrored(nn.Conv2d(pixels, width, 3, padding=1), halves=(2, 1)), nn.ReLU()]
    for channels, time_stride in zip(inner, (2, 2, 1), strict=True):
        shrink = nn.Conv2d(width, channels, 3, stride=2, padding=1, bias=False)
        layers += [TPool(width, time_stride), _mirrored(shrink, gain=0.5)]
        layers += [MemBlock(channels) for _ in range(num_blocks)]
        width = channels
    last = _mirrored(nn.Conv2d(width, latents, 3, padding=1), gain=2.0, halves=(1, 2))
    return nn.Sequential(*layers, last)


def build_decoder(widths: tuple[int, ...], *, num_blocks: int) -> nn.Sequential:
    """Build the decoder; widths of latents, of strides 8, 4, 2 and 1, and of pixels."""
    latents, width, *inner, pixels = widths
    first = _mirrored(nn.Conv2d(latents, width, 3, padding=1), gain=0.5, halves=(2, 1))
    layers = [Clamp(), first, nn.ReLU()]
    for channels, time_stride in zip(inner, (1, 2, 2), strict=True):
        layers += [MemBlock(width) for _ in range(num_blocks)]
        # The identity stands where the original enlarges, so that the numbers of layers agree.
        conv = nn.Conv2d(width, channels, 3, padding=1, bias=False)
        layers += [nn.Identity(), TGrow(width, time_stride), _mirrored(conv, gain=0.5)]
        width = channels
    last = _mirrored(nn.Conv2d(width, pixels, 3, padding=1), halves=(1, 2))
    return nn.Sequential(*layers, nn.ReLU(), last)


class MemBlock(nn.Module):
    """Residual block that sees a frame and the one before; the identity until it is trained."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (2 * channels, channels, channels)
        first, second, last = (nn.Conv2d(width, channels, 3, padding=1) for width in widths)
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)
        for values in self.conv.parameters():
            nn.init.zeros_(values)
        for conv in (first, second):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")

    def forward(self, x: Frames, past: Frames) -> Tensor:
        return F.relu(self.conv(torch.cat([x, past], dim=1)) + x)


class TPool(nn.Module):
    """Merges each `stride` frames into one; at first their mean."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        conv = nn.Conv2d(channels * stride, channels, 1, bias=False)
        self.conv = _mirrored(conv, gain=1 / stride, groups=(1, stride))

    def forward(self, x: Frames, *, batch: int) -> Tensor:
        x = rearrange(x, "(t s b) c h w -> (t b) (s c) h w", s=self.stride, b=batch)
        return self.conv(x.contiguous(memory_format=torch.channels_last))


class TGrow(nn.Module):
    """Splits each frame into `stride` frames of twice the height and width; at first alike."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        conv = nn.Conv2d(channels, channels * stride, 1, bias=False)
        self.conv = _mirrored(conv, groups=(stride, 1))

    def forward(self, x: Frames, *, batch: int) -> Tensor:
        x = rearrange(self.conv(x), "(t b) (s c) h w -> (t s b) c h w", s=self.stride, b=batch)
        # The original repeats pixels before this convolution. With a kernel of one pixel the order
        # does not matter, and this one is a quarter of the work.
        x = x.contiguous(memory_format=torch.channels_last)
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class JoinedMemBlock(MemBlock):
    """The same in three kernels."""

    def __init__(self, block: MemBlock) -> None:
        nn.Module.__init__(self)
        convs: Any = block.conv
        parts = [Convolution(convs[k].weight, convs[k].bias, relu=True) for k in (0, 2, 4)]
        self.first, self.second, self.last = parts

    def forward(self, x: Frames, past: Frames) -> Tensor:
        return self.last(self.second(self.first(torch.cat([x, past], dim=1))), x)


class JoinedGrow(TGrow):
    """`TGrow` and the convolution after it, as one.

    Behind an enlargement a 3x3 kernel sees 2x2 different pixels, and which of its weights fall on
    one depends on row and column being even or odd: four kernels of 2x2 on the small picture do the
    same with 4/9 of the arithmetic, and those of the layer before are multiplied into them.
    """

    def __init__(self, grow: TGrow, conv: Any, *, relu: bool) -> None:
        nn.Module.__init__(self)
        self.stride, self.channels = grow.stride, conv.out_channels
        narrow = grow.conv.weight[:, :, 0, 0].unflatten(0, (self.stride, -1)).float()
        weight = torch.einsum("ochw,sci->soihw", conv.weight.float(), narrow)
        for axis in (-2, -1):
            first, middle, last = weight.unbind(axis)
            even, odd = [first, middle + last], [first + middle, last]
            weight = torch.stack([torch.stack(even, axis), torch.stack(odd, axis)], 1)
        # Each step put its parity in front of the last one's: (stride, column, row, out, in, 2, 2).
        weight = weight.transpose(1, 2).flatten(0, 3).type_as(conv.weight)
        self.conv: Any = Convolution(weight, None, relu=relu)

    def forward(self, x: Frames, *, batch: int) -> Tensor:
        height, width = x.shape[2:]
        y = self.conv(x).permute(0, 2, 3, 1)
        y = y.unflatten(0, (-1, batch)).unflatten(-1, (self.stride, 2, 2, self.channels))
        sizes = (y.shape[0], self.stride, batch, height, 2, width, 2, self.channels)
        out = y.new_empty(sizes)
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
            part = y[:, :, row : row + height, column : column + width, :, row, column]
            out[:, :, :, :, row, :, column] = part.permute(0, 4, 1, 2, 3, 5)
        return out.view(-1, 2 * height, 2 * width, self.channels).permute(0, 3, 1, 2)


@torch.no_grad()
def joined(layers: nn.Sequential) -> nn.Sequential:
    """Return the same decoder for inference, in kernels as few as can be."""
    found, left = list[nn.Module](), list(layers)
    while left:
        layer = left.pop(0)
        if isinstance(layer, MemBlock):
            layer = JoinedMemBlock(layer)
        elif isinstance(layer, TGrow | nn.Conv2d):
            conv: Any = left.pop(0) if isinstance(layer, TGrow) else layer
            relu = bool(left) and isinstance(left[0], nn.ReLU)
            left = left[relu:]
            if isinstance(layer, TGrow):
                layer = JoinedGrow(layer, conv, relu=relu)
            else:
                layer = Convolution(conv.weight, conv.bias, relu=relu)
        found.append(layer)
    return nn.Sequential(*found)


class Clamp(nn.Module):
    """Bounds values smoothly to (-3, 3)."""

    def forward(self, x: Frames) -> Tensor:
        return torch.tanh(x / 3) * 3


def _mirrored(
    conv: nn.Conv2d, *, gain: float = 1.0, groups: Pair = (1, 1), halves: Pair = (2, 2)
) -> nn.Conv2d:
    """Make a convolution mix the values of one pixel, the mean of four at stride 2, orthogonally.

    Groups of channels, such as frames, are treated alike; their numbers, as those of the halves,
    are of channels that come out and that go in. Pixels and latents have one half, which mirrors
    nothing. The gain is 1 after a ReLU and 1/2 without one, where the difference of the halves is
    twice a value.
    """
    if conv.weight.is_meta:  # it is about to be loaded
        return conv
    channels = zip((conv.out_channels, conv.in_channels), groups, halves, strict=True)
    sizes = [count // alike // parts for count, alike, parts in channels]
    mix = nn.init.orthogonal_(torch.empty(sizes), gain)
    for axis, parts in enumerate(halves):
        mix = torch.cat([mix, -mix][:parts], dim=axis)
    mix = mix.repeat(groups)[:, :, None, None]
    with torch.no_grad():
        conv.weight.zero_()
        side, centre = conv.stride[0], conv.kernel_size[0] // 2
        middle = slice(centre, centre + side)
        conv.weight[:, :, middle, middle] = mix / side**2
        if conv.bias is not None:
            conv.bias.zero_()
    return conv


PerChannel = Float[Tensor, " latent_channels"]
Width = Annotated[int, Limit(lambda width: width > 0 and width % 2 == 0, "even widths")]


@dataclass(frozen=True, kw_only=True)
class TinyCodecConfig(Options):
    """Shape of a `TinyCodec`; the defaults are those of the public `taew2_1` weights."""

    image_channels: Count = 3
    latent_channels: Count = 16
    encoder_channels: tuple[Width, Width, Width] = (64, 64, 64)
    """Width of the encoder at strides 2, 4 and 8."""
    decoder_channels: tuple[Width, Width, Width, Width] = (256, 128, 64, 64)
    """Width of the decoder at strides 8, 4, 2 and 1."""
    num_blocks: Count = 3
    """Memory blocks at each stride of 2 and more."""
    patch_size: Count = 1
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
        super().__post_init__()
        for name in ("latents_mean", "latents_std"):
            values, count = getattr(self, name), self.latent_channels
            fits = values is None or len(values) == count
            check(name, values, fits, f"{count} values, one per latent channel")

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

    @classmethod
    def wide(cls) -> "TinyCodecConfig":
        """Return the same with a decoder twice as wide, for pictures of real things."""
        return replace(cls.toy(), decoder_channels=(128, 64, 32, 16))


class TinyCodec(Codec):
    """Causal tiny autoencoder: 2D convolutions, and blocks that remember one frame.

    Architecture and key names are those of TAEHV (https://github.com/madebyollin/taehv), so that
    its weights load strictly. A latent is 4 frames of squares with a side of 8 * `patch_size`.
    """

    def __init__(self, config: TinyCodecConfig) -> None:
        side, latents = 8 * config.patch_size, config.latent_channels
        super().__init__(config, stride=(4, side, side), latent_channels=latents)
        pixels, blocks = config.image_channels * config.patch_size**2, config.num_blocks
        self.encoder = build_encoder((pixels, *config.encoder_channels, latents), num_blocks=blocks)
        self.decoder = build_decoder((latents, *config.decoder_channels, pixels), num_blocks=blocks)

    def pad(self, video: Video) -> Padded:
        if self.config.time_padding == "front":
            return super().pad(video)
        return torch.cat([video, video[:, -1:].repeat(1, self.stride[0] - 1, 1, 1, 1)], dim=1)

    def encode_step(self, frames: Video, memory: Memory | None) -> tuple[Latents, Memory]:
        if self.config.pixel_range == "unit":
            frames = frames * 0.5 + 0.5
        x, kept = run(self.encoder, F.pixel_unshuffle(frames, self.config.patch_size), memory)
        mean, std = self.statistics(frames)
        return (x.type_as(frames) - mean) / std, kept

    def decode_step(
        self, latents: Latents, memory: Memory | None, layers: nn.Sequential | None = None
    ) -> tuple[Video, Memory]:
        video, kept = self._decode(latents, memory, layers or self.decoder)
        return video.clamp(-1, 1), kept

    def fast_step(self) -> Callable[..., tuple[Tensor, Memory]]:
        return partial(self.decode_step, layers=joined(self.decoder))

    def together(self, latents: Latents) -> int:
        small = latents[0, 0, 0].numel() <= SMALL and one_kernel(next(self.decoder.parameters()))
        return TOGETHER if small else 1

    def _decode(
        self, latents: Latents, memory: Memory | None, layers: nn.Sequential
    ) -> tuple[Video, Memory]:
        mean, std = self.statistics(latents)
        x, kept = run(layers, latents * std + mean, memory)
        video = x.type_as(latents)
        if self.config.patch_size > 1:
            video = F.pixel_shuffle(video, self.config.patch_size)
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
        frames, _ = self._decode(latents + noise_std * noise, None, self.decoder)
        return frames[:, self.stride[0] - 1 :], latents

    def with_statistics(self, mean: PerChannel, std: PerChannel) -> "TinyCodec":
        """Return a copy that normalises latents; the statistics are of what is encoded now."""
        old_mean, old_std = (values.flatten() for values in self.statistics(mean))
        new_mean, new_std = (old_mean + old_std * mean).tolist(), (old_std * std).tolist()
        copy = deepcopy(self)
        copy.config = replace(self.config, latents_mean=tuple(new_mean), latents_std=tuple(new_std))
        return copy

    def with_decoder(self, channels: tuple[int, int, int, int]) -> "TinyCodec":
        """Return a copy with the same encoder and a new decoder of these widths."""
        copy = TinyCodec(replace(self.config, decoder_channels=channels))
        copy.encoder.load_state_dict(self.encoder.state_dict())
        return copy
