"""Streams give the bits of whole clips, time runs one way, and the public weights fit."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from videoar.encoders.codec import Codec, PatchCodec, PatchCodecConfig
from videoar.encoders.convolution import Convolution
from videoar.encoders.tiny_codec import TinyCodec, TinyCodecConfig

TINY = TinyCodecConfig(
    latent_channels=4,
    encoder_channels=(4, 6, 8),
    decoder_channels=(8, 6, 4, 4),
    num_blocks=2,
    pixel_range="signed",
    time_padding="front",
    latents_mean=(0.1, -0.2, 0.0, 0.3),
    latents_std=(0.5, 1.5, 1.0, 2.0),
)
PUBLIC_LIKE = replace(TINY, pixel_range="unit", time_padding="end", patch_size=2)
SPLITS = [[1] * 5, [2, 3], [1, 3, 1], [5]]


def tiny_codec(config: TinyCodecConfig = TINY) -> TinyCodec:
    """A tiny codec whose every weight counts: fresh blocks would hide what they remember."""
    torch.manual_seed(0)
    codec = TinyCodec(config).eval().requires_grad_(False)
    for parameter in codec.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape))
    return codec


def patch_codec() -> PatchCodec:
    """A lossless codec."""
    return PatchCodec(PatchCodecConfig(stride=(4, 8, 8)))


CODECS = pytest.mark.parametrize("codec", [tiny_codec(), patch_codec()], ids=["tiny", "patch"])


def random_video(num_frames: int = 17, *, batch: int = 2) -> Tensor:
    """Noise in [-1, 1]: every pixel counts."""
    return torch.rand(batch, num_frames, 3, 16, 24) * 2 - 1


def random_latents(codec: Codec, num_frames: int = 5, *, batch: int = 2) -> Tensor:
    """Latents of a clip of 16x24 pixels."""
    return torch.randn(batch, num_frames, codec.latent_channels, 2, 3)


@CODECS
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_a_decoded_stream_has_the_bits_of_the_whole(codec: Codec, split: list[int]) -> None:
    """What is shown while it is generated is what a saved file holds."""
    latents = random_latents(codec)
    decode = codec.stream_decoder()
    parts = [decode(part) for part in latents.split(split, dim=1)]
    assert [part.shape[1] for part in parts] == [4 * split[0] - 3] + [4 * n for n in split[1:]]
    assert torch.equal(torch.cat(parts, dim=1), codec.decode(latents))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_any_split_of_a_stream_has_the_bits_of_the_whole(split: list[int]) -> None:
    """Units may finish any number of latent frames at once."""
    codec = tiny_codec()
    latents = random_latents(codec, sum(split), batch=1)
    decode = codec.stream_decoder()
    parts = [decode(part) for part in latents.split(split, dim=1)]
    assert torch.equal(torch.cat(parts, dim=1), codec.decode(latents))


@CODECS
def test_interleaved_streams_do_not_mix(codec: Codec) -> None:
    """A server decodes many sessions on one module; one user must not see another's past."""
    first, second = random_latents(codec), random_latents(codec)
    decoders = codec.stream_decoder(), codec.stream_decoder()
    pairs = list(zip(first.split(1, dim=1), second.split(1, dim=1), strict=True))
    shown = [[decode(part) for decode, part in zip(decoders, pair, strict=True)] for pair in pairs]
    assert torch.equal(torch.cat([pair[0] for pair in shown], dim=1), codec.decode(first))
    assert torch.equal(torch.cat([pair[1] for pair in shown], dim=1), codec.decode(second))


@CODECS
@pytest.mark.parametrize("saved_after", [0, 1, 3])
def test_a_saved_stream_goes_on_as_if_never_stopped(codec: Codec, saved_after: int) -> None:
    """A session survives a restart, wherever it was; and what was saved is a copy."""
    latents = random_latents(codec)
    stopped = codec.stream_decoder()
    shown = [stopped(part) for part in latents[:, :saved_after].split(1, dim=1) if saved_after]
    state = stopped.state_dict()
    stopped(random_latents(codec))
    resumed = codec.stream_decoder()
    resumed(random_latents(codec))
    resumed.load_state_dict(state)
    shown.append(resumed(latents[:, saved_after:]))
    assert torch.equal(torch.cat(shown, dim=1), codec.decode(latents))
    assert all(tensor.is_contiguous() for tensor in state.values())


def test_a_stream_begun_in_inference_mode_goes_on_outside_of_it() -> None:
    """What a stream remembers is usable in whatever mode the next call comes."""
    codec = tiny_codec().requires_grad_(True)
    latents = random_latents(codec)
    decode = codec.stream_decoder()
    with torch.inference_mode():
        first = decode(latents[:, :2])
    rest = decode(latents[:, 2:])
    assert torch.equal(torch.cat([first, rest], dim=1), codec.decode(latents))
    assert not rest.requires_grad


def test_later_pixels_do_not_change_earlier_latents() -> None:
    """Latent k ends with pixel frame 4k; else a stream would have to look ahead."""
    codec, video = tiny_codec(), random_video()
    latents = codec.encode(video)
    for k in range(4):
        changed = video.clone()
        changed[:, 4 * k + 1 :] = 0.0
        other = codec.encode(changed)
        assert torch.equal(other[:, : k + 1], latents[:, : k + 1])
        assert not torch.equal(other[:, k + 1], latents[:, k + 1])


def test_later_latents_do_not_change_earlier_frames() -> None:
    """Shown frames stay true; and frames remember earlier latents, or motion would flicker."""
    codec = tiny_codec()
    latents = random_latents(codec)
    video = codec.decode(latents)
    for k in range(4):
        changed = latents.clone()
        changed[:, k + 1 :] = 0.0
        other = codec.decode(changed)
        assert torch.equal(other[:, : 4 * k + 1], video[:, : 4 * k + 1])
        assert not torch.equal(other[:, 4 * k + 1], video[:, 4 * k + 1])
    changed = latents.clone()
    changed[:, 0] = 0.0
    assert not torch.equal(codec.decode(changed)[:, 1:5], video[:, 1:5])


@pytest.mark.parametrize("config", [TINY, PUBLIC_LIKE], ids=["front", "end"])
def test_the_path_for_training_agrees_with_the_steps(config: TinyCodecConfig) -> None:
    """What is trained on all frames at once is what runs one latent frame at a time."""
    codec = tiny_codec(config)
    video = torch.rand(2, 9, 3, 32, 16) * 2 - 1
    reconstruction, latents = codec.reconstruct(video)
    torch.testing.assert_close(latents, codec.encode(video))
    torch.testing.assert_close(reconstruction.clamp(-1, 1), codec.decode(latents))


def test_reconstruction_carries_gradients_to_every_weight_and_repeats_its_noise() -> None:
    """No layer is left out of training, and the same generator gives the same step."""
    codec, video = tiny_codec().requires_grad_(True), random_video(9)
    runs = [
        codec.reconstruct(video, noise_std=0.1, generator=torch.Generator().manual_seed(seed))[0]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    F.mse_loss(runs[0], video).backward()
    for name, parameter in codec.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_statistics_normalise_latents_and_leave_frames_alone() -> None:
    """Diffusion wants unit variance; measured twice, the second measure changes nothing."""
    codec, video = tiny_codec(), random_video()
    raw = codec.encode(video)
    mean, std = raw.mean((0, 1, 3, 4)), raw.std((0, 1, 3, 4))
    normalised = codec.with_statistics(mean, std)
    latents = normalised.encode(video)
    torch.testing.assert_close(latents.mean((0, 1, 3, 4)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std((0, 1, 3, 4)), torch.ones(4))
    torch.testing.assert_close(normalised.decode(latents), codec.decode(raw))
    assert TinyCodec(normalised.config).state_dict().keys() == codec.state_dict().keys()


def test_an_untrained_codec_shows_the_picture_small_and_in_mixed_colours() -> None:
    """Its weights begin as a linear map, so a flat picture stays flat and brightness adds up.

    Training depends on it: with ordinary random weights it first has to undo a random texture.
    """
    codec = TinyCodec(TinyCodecConfig.toy()).requires_grad_(False)

    def flat(*color: float) -> Tensor:
        return torch.tensor(color).view(1, 1, 3, 1, 1).expand(1, 5, 3, 128, 128)

    # Small values: the clamp of the latents is only linear near zero. Edges see zero padding.
    one, other, both = (
        codec.reconstruct(flat(*color))[0][0, 0, :, 56:72, 56:72]
        for color in ((0.02, 0.0, 0.01), (0.0, 0.03, 0.01), (0.02, 0.03, 0.02))
    )
    assert one.std(dim=(1, 2)).max() < 1e-6
    assert (one[:, 0, 0] - other[:, 0, 0]).norm() > 1e-3
    torch.testing.assert_close(one + other, both, atol=1e-5, rtol=1e-3)


def naive_decode(codec: TinyCodec, latents: Tensor) -> Tensor:
    """The public decoder, derived anew: frame by frame, enlarging before the frames are split."""
    past: dict[int, Tensor] = {}
    shown: list[Tensor] = []

    def walk(x: Tensor, index: int) -> None:
        if index == len(codec.decoder):
            shown.append(F.pixel_shuffle(x, codec.config.patch_size))
            return
        layer = codec.decoder[index]
        weights = dict(layer.named_parameters())
        frames = [x]
        if index == 0:
            frames = [3 * torch.tanh(x / 3)]
        elif "conv.0.weight" in weights:
            y = torch.cat([x, past.get(index, torch.zeros_like(x))], dim=1)
            past[index] = x
            for k in (0, 2, 4):
                y = F.conv2d(y, weights[f"conv.{k}.weight"], weights[f"conv.{k}.bias"], padding=1)
                y = y.relu() if k < 4 else y
            frames = [(x + y).relu()]
        elif "conv.weight" in weights:
            large = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            frames = list(F.conv2d(large, weights["conv.weight"]).split(x.shape[1], dim=1))
        elif weights:
            frames = [F.conv2d(x, weights["weight"], weights.get("bias"), padding=1)]
        elif isinstance(layer, nn.ReLU):
            frames = [x.relu()]
        for frame in frames:
            walk(frame, index + 1)

    mean, std = (torch.tensor(v) for v in (codec.config.latents_mean, codec.config.latents_std))
    for latent in latents.unbind(1):
        walk(latent * std.view(-1, 1, 1) + mean.view(-1, 1, 1), 0)
    return (torch.stack(shown[3:], dim=1) * 2 - 1).clamp(-1, 1)


def test_the_decoder_equals_the_public_one_frame_by_frame() -> None:
    """Public weights would load but show something else if an order or a memory were wrong."""
    codec = tiny_codec(PUBLIC_LIKE)
    latents = random_latents(codec, 3)
    torch.testing.assert_close(codec.decode(latents), naive_decode(codec, latents))


def test_padding_at_the_end_repeats_the_last_picture() -> None:
    """The public encoder reads groups 0-3, 4-7, ...: a longer clip changes only the last latent."""
    codec = tiny_codec(PUBLIC_LIKE)
    video = random_video(9, batch=1).repeat(1, 1, 1, 1, 2)[..., :16, :32]
    longer = torch.cat([video, video[:, -1:].repeat(1, 4, 1, 1, 1)], dim=1)
    latents = codec.encode(video)
    assert torch.equal(codec.encode(longer)[:, :3], latents)


def public_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of `taew2_1`, written down layer by layer."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, shape: tuple[int, ...], *, bias: bool) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    def blocks(part: str, indices: range, channels: int) -> None:
        for index in indices:
            conv(f"{part}.{index}.conv.0", (channels, 2 * channels, 3, 3), bias=True)
            conv(f"{part}.{index}.conv.2", (channels, channels, 3, 3), bias=True)
            conv(f"{part}.{index}.conv.4", (channels, channels, 3, 3), bias=True)

    conv("encoder.0", (64, 3, 3, 3), bias=True)
    for index, merged in ((2, 128), (7, 128), (12, 64)):
        conv(f"encoder.{index}.conv", (64, merged, 1, 1), bias=False)
        conv(f"encoder.{index + 1}", (64, 64, 3, 3), bias=False)
        blocks("encoder", range(index + 2, index + 5), 64)
    conv("encoder.17", (16, 64, 3, 3), bias=True)
    conv("decoder.1", (256, 16, 3, 3), bias=True)
    blocks("decoder", range(3, 6), 256)
    conv("decoder.7.conv", (256, 256, 1, 1), bias=False)
    conv("decoder.8", (128, 256, 3, 3), bias=False)
    blocks("decoder", range(9, 12), 128)
    conv("decoder.13.conv", (256, 128, 1, 1), bias=False)
    conv("decoder.14", (64, 128, 3, 3), bias=False)
    blocks("decoder", range(15, 18), 64)
    conv("decoder.19.conv", (128, 64, 1, 1), bias=False)
    conv("decoder.20", (64, 64, 3, 3), bias=False)
    conv("decoder.22", (3, 64, 3, 3), bias=True)
    return shapes


def test_the_default_codec_takes_the_public_weights() -> None:
    """Every name and shape of `taew2_1` is there and none beside, so they load strictly."""
    with torch.device("meta"):
        codec = TinyCodec(TinyCodecConfig())
    assert {name: tuple(v.shape) for name, v in codec.state_dict().items()} == public_shapes()


def test_weights_of_another_shape_do_not_load() -> None:
    """Half-loaded weights would decode to noise."""
    state = tiny_codec(replace(TINY, decoder_channels=(8, 6, 4, 6))).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for decoder"):
        tiny_codec().load_state_dict(state)


@pytest.mark.parametrize("stride", [(4, 8, 8), (1, 2, 2), (2, 1, 4), (3, 4, 2)], ids=str)
def test_patches_are_lossless_at_any_stride(stride: tuple[int, int, int]) -> None:
    """Every pixel comes back, so what a test sees behind this codec is the model's doing."""
    codec = PatchCodec(PatchCodecConfig(stride=stride))
    video = random_video(1 + 3 * stride[0])
    latents = codec.encode(video)
    assert torch.equal(codec.decode(latents), video)
    assert latents.shape[1:3] == (4, codec.latent_channels)


def test_a_patch_is_a_place_of_the_video() -> None:
    """A pixel lands in the latent of its own time, row and column."""
    codec = patch_codec()
    video = torch.zeros(1, 9, 3, 16, 24)
    video[0, 6, 1, 9, 20] = 1.0
    (place,) = codec.encode(video).sum(dim=2).nonzero().tolist()
    assert place == [0, 2, 1, 2]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 18, 3, 16, 16), r"18 frames are not 1 \+ 4 \* k, .* give 17 or 21 frames"),
        ((1, 0, 3, 16, 16), r"0 frames are not 1 \+ 4 \* k, .* give 1 frames"),
        ((1, 5, 3, 20, 16), r"height of 20 pixels is not a multiple of 8: .* to 16"),
        ((1, 5, 3, 16, 7), r"width of 7 pixels is not a multiple of 8: .* to 8"),
    ],
    ids=str,
)
@CODECS
def test_clips_that_do_not_fit_are_refused(
    codec: Codec, shape: tuple[int, ...], message: str
) -> None:
    """Silent cropping would lose what the user gave; the message says what fits."""
    with pytest.raises(ValueError, match=message):
        codec.encode(torch.zeros(shape))


def test_latents_of_another_codec_are_refused() -> None:
    """They would end inside a layer."""
    with pytest.raises(ValueError, match=r"1 frames and 5 channels .* of 4 channels"):
        tiny_codec().stream_decoder()(torch.zeros(1, 1, 5, 2, 2))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("latents_std", (1.0,), "latents_std is .*: use 16 values, one per"),
        ("num_blocks", 0, "num_blocks is 0: use 1 or more"),
        ("encoder_channels", (16, 15, 16), "encoder_channels is .*: use even widths"),
    ],
)
def test_impossible_configs_are_refused(field: str, value: object, message: str) -> None:
    """They would fail later, inside a layer."""
    with pytest.raises(ValueError, match=message):
        replace(TinyCodecConfig(), **{field: value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("relu", [True, False])
def test_a_convolution_in_one_kernel_is_the_one_in_three(dtype: torch.dtype, relu: bool) -> None:
    """Other processors and GPUs take the three: a picture must not depend on which."""
    weight, bias = torch.randn(6, 4, 3, 3, dtype=dtype), torch.randn(6, dtype=dtype)
    x, add = torch.randn(2, 4, 8, 6, dtype=dtype), torch.randn(2, 6, 8, 6, dtype=dtype)
    x, add = (part.contiguous(memory_format=torch.channels_last) for part in (x, add))
    joined = Convolution(weight, bias, relu=relu)
    plain = Convolution(weight, bias, relu=relu)
    plain.one_kernel = False
    exact = {} if dtype == torch.float32 else {"atol": 0.2, "rtol": 0.02}
    torch.testing.assert_close(joined(x), plain(x), **exact)
    torch.testing.assert_close(joined(x, add), plain(x, add), **exact)
