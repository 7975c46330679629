"""The layers of the tiny codec: 2D convolutions on frames, and blocks that remember one frame.

Only the network lives here; what a clip, a stream or a pixel value is belongs to `codecs.py`.
The order of layers and the names of weights are those of TAEHV
(https://github.com/madebyollin/taehv).

Weights begin as a linear map, "looks linear" of Balduzzi et al. 2017 (arXiv:1702.08591): channels
come in mirrored halves, so that after a ReLU the difference of the halves is the value before it.
Pictures pass through the untrained codec shrunk, in mixed colours, and enlarged again, and training
starts from there. With the usual random weights it has to undo a random texture first: 125 steps
(batch 4 of 9 frames, AdamW) end at 10.7 dB instead of 23.0 dB.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

Frames = Float[Tensor, "time_batch _ _ _"]
"""Feature maps in (time, batch) order: the frames of one time are neighbours."""
Memory = tuple[Tensor, ...]
"""What a network remembers of the frames before; None stands for the beginning of a clip."""


def run(
    layers: nn.Sequential, x: Frames, memory: Memory | None, *, batch: int
) -> tuple[Tensor, Memory]:
    """Apply layers to a group of frames; return also what each block remembers of it.

    Channels last is 3.5 times as fast as channels first on a CPU (16 channels, 64x64 pixels).
    """
    x = x.contiguous(memory_format=torch.channels_last)
    past = None if memory is None else iter(memory)
    kept = []
    for layer in layers:
        if isinstance(layer, MemBlock):
            last = torch.zeros_like(x[:batch]) if past is None else next(past)
            # A stream that was saved comes back channels first, which rounds differently.
            last = last.contiguous(memory_format=torch.channels_last)
            kept.append(x[-batch:])
            x = layer(x, torch.cat([last, x[:-batch]]))
        elif isinstance(layer, TPool | TGrow):
            x = layer(x, batch=batch)
        else:
            x = layer(x)
    return x, tuple(kept)


def build_encoder(widths: tuple[int, ...], *, num_blocks: int) -> nn.Sequential:
    """Build the encoder; widths of pixels, of strides 2, 4 and 8, and of latents."""
    pixels, *inner, latents = widths
    width = inner[0]
    layers = [_mirrored(nn.Conv2d(pixels, width, 3, padding=1), plain_in=True), nn.ReLU()]
    for channels, time_stride in zip(inner, (2, 2, 1), strict=True):
        shrink = nn.Conv2d(width, channels, 3, stride=2, padding=1, bias=False)
        layers += [TPool(width, time_stride), _mirrored(shrink, gain=0.5)]
        layers += [MemBlock(channels) for _ in range(num_blocks)]
        width = channels
    last = _mirrored(nn.Conv2d(width, latents, 3, padding=1), gain=2.0, plain_out=True)
    return nn.Sequential(*layers, last)


def build_decoder(widths: tuple[int, ...], *, num_blocks: int) -> nn.Sequential:
    """Build the decoder; widths of latents, of strides 8, 4, 2 and 1, and of pixels."""
    latents, width, *inner, pixels = widths
    first = _mirrored(nn.Conv2d(latents, width, 3, padding=1), gain=0.5, plain_in=True)
    layers = [Clamp(), first, nn.ReLU()]
    for channels, time_stride in zip(inner, (1, 2, 2), strict=True):
        layers += [MemBlock(width) for _ in range(num_blocks)]
        # The identity stands where the original enlarges, so that the numbers of layers agree.
        conv = nn.Conv2d(width, channels, 3, padding=1, bias=False)
        layers += [nn.Identity(), TGrow(width, time_stride), _mirrored(conv, gain=0.5)]
        width = channels
    last = _mirrored(nn.Conv2d(width, pixels, 3, padding=1), plain_out=True)
    return nn.Sequential(*layers, nn.ReLU(), last)


class MemBlock(nn.Module):
    """Residual block that sees a frame and the one before; the identity until it is trained."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, second, last = (
            nn.Conv2d(width, channels, 3, padding=1) for width in (2 * channels, channels, channels)
        )
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)
        for conv in (first, second):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        nn.init.zeros_(last.weight)
        for name, bias in self.conv.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(bias)

    def forward(self, x: Frames, past: Frames) -> Tensor:
        """Add what the frame and the one before say to the frame."""
        return F.relu(self.conv(torch.cat([x, past], dim=1)) + x)


class TPool(nn.Module):
    """Merges each `stride` frames into one; at first their mean."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        conv = nn.Conv2d(channels * stride, channels, 1, bias=False)
        self.conv = _mirrored(conv, gain=1 / stride, groups_in=stride)

    def forward(self, x: Frames, *, batch: int) -> Tensor:
        """Turn frames into channels and mix them."""
        x = rearrange(x, "(t s b) c h w -> (t b) (s c) h w", s=self.stride, b=batch)
        return self.conv(x.contiguous(memory_format=torch.channels_last))


class TGrow(nn.Module):
    """Splits each frame into `stride` frames of twice the height and width; at first alike."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        conv = nn.Conv2d(channels, channels * stride, 1, bias=False)
        self.conv = _mirrored(conv, groups_out=stride)

    def forward(self, x: Frames, *, batch: int) -> Tensor:
        """Turn channels into frames and repeat each pixel."""
        x = rearrange(self.conv(x), "(t b) (s c) h w -> (t s b) c h w", s=self.stride, b=batch)
        # The original repeats pixels before this convolution. With a kernel of one pixel the order
        # does not matter, and this one is a quarter of the work.
        x = x.contiguous(memory_format=torch.channels_last)
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Clamp(nn.Module):
    """Bounds values smoothly to (-3, 3)."""

    def forward(self, x: Frames) -> Tensor:
        """Squash values."""
        return torch.tanh(x / 3) * 3


def _mirrored(
    conv: nn.Conv2d,
    *,
    gain: float = 1.0,
    groups_in: int = 1,
    groups_out: int = 1,
    plain_in: bool = False,
    plain_out: bool = False,
) -> nn.Conv2d:
    """Make a convolution mix the values of one pixel, the mean of four at stride 2, orthogonally.

    Args:
        conv: the convolution to initialise; its bias becomes zero.
        gain: 1 after a ReLU; 1/2 without one, where the difference of the halves is twice a value.
        groups_in: groups of input channels that are treated alike, such as frames.
        groups_out: groups of output channels that are treated alike.
        plain_in: the input is pixels or latents, without mirrored halves.
        plain_out: the output is pixels or latents.
    """
    rows = conv.out_channels // groups_out // (1 if plain_out else 2)
    columns = conv.in_channels // groups_in // (1 if plain_in else 2)
    mix = nn.init.orthogonal_(torch.empty(rows, columns), gain)
    if not plain_in:
        mix = torch.cat([mix, -mix], dim=1)
    if not plain_out:
        mix = torch.cat([mix, -mix], dim=0)
    mix = mix.repeat(groups_out, groups_in)[:, :, None, None]
    with torch.no_grad():
        conv.weight.zero_()
        centre = conv.kernel_size[0] // 2
        side = conv.stride[0]
        conv.weight[:, :, centre : centre + side, centre : centre + side] = mix / side**2
        if conv.bias is not None:
            conv.bias.zero_()
    return conv
