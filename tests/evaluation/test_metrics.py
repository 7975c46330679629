"""Metrics: known values, and intervals that hold what they promise."""

import math

import numpy as np
import pytest
from jaxtyping import Float, UInt8

from videoar.evaluation.looks import pictures
from videoar.evaluation.metrics import (
    Interval,
    bootstrap_interval,
    kid,
    motion,
    motion_distance,
    properties,
    psnr,
    slope,
    ssim,
    xpsnr,
)


def _noise(rng: np.random.Generator, *shape: int) -> UInt8[np.ndarray, "*axes"]:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def test_psnr_of_a_known_error() -> None:
    """A constant error of 16 levels is 20 log10(255 / 16) dB, whatever the types can hold."""
    dark = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(dark, dark + 16) == pytest.approx(20 * math.log10(255 / 16))
    assert psnr(dark + 16, dark) == psnr(dark, dark + 16)
    assert psnr(dark, dark) == math.inf


def test_ssim_of_flat_pictures_is_the_luminance_term() -> None:
    """Without structure only the means count, and the formula can be evaluated by hand."""
    a, b = np.full((1, 16, 16, 3), 100, np.uint8), np.full((1, 16, 16, 3), 150, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(a, b) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))


def test_ssim_equals_the_definition_window_by_window(rng: np.random.Generator) -> None:
    """The separable sums equal the weighted moments of every window, computed one at a time."""
    a, b = _noise(rng, 2, 13, 14, 3), _noise(rng, 2, 13, 14, 3)
    y, x = np.mgrid[-5:6, -5:6]
    window = np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    scores = []
    for frame, top, left, channel in np.ndindex(2, 3, 4, 3):
        p, q = (
            clip[frame, top : top + 11, left : left + 11, channel].astype(float) for clip in (a, b)
        )
        mean_p, mean_q = (window * p).sum(), (window * q).sum()
        var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
        both = (window * (p - mean_p) * (q - mean_q)).sum()
        luminance = (2 * mean_p * mean_q + c1) / (mean_p**2 + mean_q**2 + c1)
        scores.append(luminance * (2 * both + c2) / (var_p + var_q + c2))
    assert ssim(a, b) == pytest.approx(np.mean(scores), abs=1e-9)
    assert ssim(a, a) == pytest.approx(1)


def test_small_frames_have_no_ssim() -> None:
    """A frame smaller than the window is an error and not a score of nothing."""
    tiny = np.zeros((1, 10, 20, 3), np.uint8)
    with pytest.raises(ValueError, match="20x10"):
        ssim(tiny, tiny)


def _holds(interval: Interval, value: float) -> bool:
    return interval.low <= value <= interval.high


def test_an_interval_in_a_sentence_is_written_as_in_a_table() -> None:
    """A share in hundredths; with a format in its own unit."""
    interval = Interval(mean=0.109375, low=0.04, high=0.178)
    assert f"{interval}" == str(interval) == "10.9 [4.0, 17.8]"
    assert f"{interval:.2f}" == "0.11 [0.04, 0.18]"


@pytest.mark.parametrize("count", [10, 60])
def test_intervals_hold_the_true_mean_as_often_as_they_say(
    rng: np.random.Generator, count: int
) -> None:
    """Of 400 samples about 95 % of the intervals hold the truth; 3 deviations are allowed."""
    intervals = [bootstrap_interval(rng.normal(1.0, 2.0, count)) for _ in range(400)]
    share = np.mean([_holds(interval, 1.0) for interval in intervals])
    assert share == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 400))


def test_an_interval_has_the_width_of_the_normal_one(rng: np.random.Generator) -> None:
    """For many values the bootstrap agrees with mean +- 1.96 standard errors within 10 %."""
    values = rng.normal(0.0, 1.0, 500)
    interval = bootstrap_interval(values)
    assert interval.mean == pytest.approx(values.mean())
    width = 2 * 1.96 * values.std() / math.sqrt(500)
    assert interval.high - interval.low == pytest.approx(width, rel=0.1)


def test_clusters_widen_the_interval_by_what_they_share(rng: np.random.Generator) -> None:
    """Four equal scores per prompt are one score: the interval is that of the prompts alone."""
    prompts = rng.normal(0.0, 1.0, 50)
    alone = bootstrap_interval(prompts)
    repeated = bootstrap_interval(prompts.repeat(4), clusters=np.arange(50).repeat(4).tolist())
    assert repeated == alone
    naive = bootstrap_interval(prompts.repeat(4))
    assert naive.high - naive.low < 0.6 * (alone.high - alone.low)


def test_pairing_finds_what_separate_intervals_hide(rng: np.random.Generator) -> None:
    """A small constant gain on prompts of very different difficulty is seen, with its sign."""
    difficulty = rng.normal(0.0, 10.0, 100)
    better = difficulty + 0.5 + rng.normal(0.0, 0.1, 100)
    gain = bootstrap_interval(better - difficulty)
    assert not _holds(gain, 0.0)
    assert gain.low < 0.5 < gain.high
    assert _holds(bootstrap_interval(better), difficulty.mean())


def test_intervals_refuse_what_has_no_spread() -> None:
    """One prompt gives no interval, however often it is repeated."""
    with pytest.raises(ValueError, match="at least 2"):
        bootstrap_interval([1.0, 2.0], clusters=["a", "a"])


def _grey(levels: Float[np.ndarray, " frames"]) -> UInt8[np.ndarray, "frames height width 3"]:
    """Return frames with a checkerboard around the given levels."""
    board = np.where(np.indices((8, 8)).sum(0) % 2, 10, -10)
    frames = levels[:, None, None, None] + board[None, :, :, None]
    return np.broadcast_to(frames, (len(levels), 8, 8, 3)).round().astype(np.uint8)


def test_drift_of_a_still_video_is_nothing() -> None:
    """What does not change has slope 0 and neither flicker nor motion."""
    values = properties(_grey(np.full(67, 128.0)), fps=8, window_seconds=2.0)
    for known in values.values():
        assert slope(known, window_seconds=2.0) == pytest.approx(0, abs=1e-6)
    assert values["flicker"] == [0] * 4
    assert values["change"] == [0] * 4
    assert values["colourfulness"] == pytest.approx([0] * 4, abs=1e-6)
    assert values["contrast"] == pytest.approx([10 / 255] * 4, abs=1e-5)


def test_drift_measures_a_fade_per_second() -> None:
    """One level per frame at 8 frames per second is 8 / 255 per second, and shows as flicker."""
    values = properties(_grey(40 + np.arange(128.0)), fps=8, window_seconds=2.0)
    assert slope(values["brightness"], window_seconds=2.0) == pytest.approx(8 / 255, rel=1e-3)
    assert slope(values["contrast"], window_seconds=2.0) == pytest.approx(0, abs=1e-3)
    assert values["flicker"] == pytest.approx([1 / 255] * 8, rel=1e-3)


def test_drift_sees_blur_and_lost_colour(rng: np.random.Generator) -> None:
    """A clip that turns soft and grey has falling sharpness, contrast and colourfulness."""
    start = _noise(rng, 1, 16, 16, 3).astype(np.float32)
    frames = [start]
    for _ in range(63):
        soft = frames[-1]
        for axis in (1, 2):
            soft = (np.roll(soft, 1, axis) + 6 * soft + np.roll(soft, -1, axis)) / 8
        frames.append(soft + 0.02 * (soft.mean(-1, keepdims=True) - soft))
    values = properties(np.concatenate(frames).astype(np.uint8), fps=8, window_seconds=1.0)
    for name in ("sharpness", "contrast", "colourfulness"):
        assert slope(values[name], window_seconds=1.0) < 0, name
        assert values[name][0] > 1.5 * values[name][-1], name


def test_xpsnr_falls_with_noise_and_is_infinite_without() -> None:
    """FFmpeg's measure of what an eye sees; where its build lacks it there is none."""
    frames = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), np.uint8)
    if (same := xpsnr(frames, frames)) is None:
        pytest.skip("this FFmpeg has no xpsnr")
    little, much = (xpsnr(frames, frames ^ np.uint8(bits)) for bits in (1, 15))
    assert same == math.inf
    assert little > much > 0
    assert xpsnr(frames[:, :16, :16], frames[:, :16, :16]) is None


def _crossing(rng: np.random.Generator) -> np.ndarray:
    """A textured square that goes to the right at its own height, on a ground with a grain."""
    frames = rng.integers(90, 130, (1, 64, 64, 3), dtype=np.uint8).repeat(24, axis=0)
    square, y = rng.integers(256, size=(16, 16, 3), dtype=np.uint8), int(rng.integers(8, 40))
    for t, frame in enumerate(frames):
        frame[y : y + 16, 2 * t : 2 * t + 16] = square
    return frames


def test_motion_vectors_tell_amount_and_direction(rng: np.random.Generator) -> None:
    """A square goes right by two pixels a frame; the blocks that hold it are up to 4 as large."""
    frames = _crossing(rng)
    right, left, still = motion(frames), motion(frames[::-1]), motion(frames[:1].repeat(9, 0))
    assert 0.7 < right["right"] / (1000 * 2 / 64 / 16) < 4.0
    assert left["right"] == pytest.approx(-right["right"], rel=0.3)
    assert abs(right["down"]) < 0.2 * right["amount"]
    assert still["amount"] < 0.01 * right["amount"]


def test_frozen_shuffled_and_jumping_videos_are_far_from_real_motion(
    rng: np.random.Generator,
) -> None:
    """Each is farther than other real ones by far: KID, which sees single frames, praises all."""
    real, other = ([_crossing(rng) for _ in range(12)] for _ in range(2))
    known = [motion(frames) for frames in real]

    def far(videos: list[np.ndarray]) -> Interval:
        return motion_distance([motion(frames) for frames in videos], known)

    same = far(other)
    for spoilt in (
        [frames[:1].repeat(24, 0) for frames in other],
        [rng.permutation(frames) for frames in other],
        [np.roll(frames, 12, axis=0) for frames in other],
    ):
        assert far(spoilt).low > same.high + 1


def test_kid_is_unbiased_and_orders_what_is_worse(rng: np.random.Generator) -> None:
    """Over many small sets of one kind it is zero in the mean; the more is changed, the higher."""
    mixing = rng.standard_normal((8, 8))

    def features(shift: float = 0.0) -> np.ndarray:
        return rng.standard_normal((12, 2, 8)) @ mixing + shift

    same = [kid(features(), features()).mean for _ in range(60)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(60)
    near, far = (kid(features(shift), features()) for shift in (1.0, 3.0))
    assert near.mean < far.mean
    assert far.low > 0


def test_pictures_see_what_a_codec_loses(rng: np.random.Generator) -> None:
    """Blocks of eight pixels are far from the frames that they are made of."""
    pytest.importorskip("efficientnet_lite_pytorch")
    real, other = (np.stack([_crossing(rng) for _ in range(6)]) for _ in range(2))
    blocks = other[:, :, ::8, ::8].repeat(8, 2).repeat(8, 3)
    near, far = (kid(pictures(clips), pictures(real)) for clips in (other, blocks))
    assert near.mean < 0.3 * far.mean
