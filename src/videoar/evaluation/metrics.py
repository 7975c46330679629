"""Metrics: pure functions from frames and numbers to numbers. No files, no pretrained networks.

What compares two generators gives an interval.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import av
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

Frames = UInt8[np.ndarray, "frames height width 3"]
Values = Sequence[float] | Float[np.ndarray, " values"]
Places = Bool[np.ndarray, "frames height width"]
Pictures = Float[np.ndarray, "videos _ features"]
Features = Float[np.ndarray, "_ features"]
PixelUnits = Int[np.ndarray, "frames height width"]
PEAK = 255.0
RESAMPLES = 2000
"""How often values are drawn anew for an interval of their mean."""
LUMA = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)
X264 = "keyint=infinite:scenecut=0:bframes=0:ref=1:threads=1:weightp=0"
"""Every frame is told by the one before: what jumps costs bits."""


def psnr(reference: Frames, other: Frames, *, where: Places | None = None) -> float:
    """Return the peak signal-to-noise ratio over all pixels, or some, in decibels; or infinity."""
    squares = (reference.astype(np.float64) - other) ** 2
    error = np.mean(squares if where is None else squares[where])
    return math.inf if error == 0 else float(10 * np.log10(PEAK**2 / error))


def ssim(reference: Frames, other: Frames) -> float:
    """Return the mean structural similarity of frames and channels.

    Wang et al. 2004, "Image quality assessment": Gaussian window of 11 pixels and sigma 1.5,
    K1 = 0.01, K2 = 0.03, only where the whole window fits.
    """
    height, width = reference.shape[1:3]
    if min(height, width) < 11:
        raise ValueError(f"frames of {width}x{height} are too small for SSIM; it needs 11 pixels")
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2

    def blur(values: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        for axis in (0, 1):
            values = np.lib.stride_tricks.sliding_window_view(values, 11, axis=axis) @ window
        return values

    scores = []
    for frames in zip(reference, other, strict=True):  # one by one: the products need much memory
        a, b = (frame.astype(np.float64) for frame in frames)
        mean_a, mean_b = blur(a), blur(b)
        var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
        covariance = blur(a * b) - mean_a * mean_b
        luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        scores.append(np.mean(luminance * (2 * covariance + c2) / (var_a + var_b + c2)))
    return float(np.mean(scores))


def xpsnr(reference: Frames, other: Frames) -> float | None:
    """Return FFmpeg's XPSNR of the luma in decibels; None if FFmpeg lacks it or the size is small.

    Helmrich et al. 2020: errors count less where a picture is busy or moves, as the eye sees them.
    """
    height, width = reference.shape[1:3]
    # Below that its blocks have no pixels, and FFmpeg ends the process with a division by zero.
    if "xpsnr" not in av.filter.filters_available or height * width < 2025:
        return None
    graph = av.filter.Graph()
    about = f"video_size={width}x{height}:pix_fmt=yuv420p:time_base=1/16"
    sources = [graph.add("buffer", about) for _ in range(2)]
    judge, sink = graph.add("xpsnr"), graph.add("buffersink")
    for place, source in enumerate(sources):
        source.link_to(judge, 0, place)
    judge.link_to(sink)
    graph.configure()
    errors = []
    for moment, pictures in enumerate(zip(reference, other, strict=True)):
        for source, picture in zip(sources, pictures, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts = moment
            source.push(frame)
        errors.append(10 ** (-float(sink.pull().metadata["lavfi.xpsnr.xpsnr.y"]) / 10))
    error = np.mean(errors)
    return math.inf if error == 0 else float(-10 * np.log10(error))


def edges(frames: Frames) -> Places:
    """Return where the brightness changes most from pixel to pixel: at a twentieth of all."""
    grey = frames.astype(np.float32).mean(-1)
    return _most(np.hypot(*np.gradient(grey, axis=(1, 2))))


def moving(frames: Frames) -> Places:
    """Return where the brightness changes most from frame to frame: at a twentieth of all."""
    grey = frames.astype(np.float32).mean(-1)
    return _most(np.abs(np.diff(grey, axis=0, prepend=grey[:1])))


def _most(values: Float[np.ndarray, "frames height width"]) -> Places:
    return values >= np.quantile(values, 0.95)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean, and the range in which the true mean lies with 95 % confidence."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """Write `mean [low, high]`, all in one format, none as -0; without one, as `str` does."""
        if not spec:
            return str(self)
        mean, low, high = (format(value, f"z{spec}") for value in vars(self).values())
        return f"{mean} [{low}, {high}]"

    def __str__(self) -> str:
        """Write it as tables show a share or score, in hundredths."""
        return f"{self.times(100):.1f}"

    def times(self, factor: float) -> "Interval":
        """Return the interval of values that are so many times as large."""
        return Interval(**{name: factor * value for name, value in vars(self).items()})

    def within(self, limit: float) -> "Interval":
        """Return the interval of what cannot be farther than this from zero."""
        return replace(self, low=max(self.low, -limit), high=min(self.high, limit))


def bootstrap_interval(values: Values, *, clusters: Sequence[int | str] | None = None) -> Interval:
    """Return the expanded percentile bootstrap interval of a mean, of 95 %.

    Hesterberg 2015, arXiv:1411.5279: the plain percentiles are too narrow for few values. Measured
    with 10 normal values: of 90 % intervals the plain ones held the true mean in 84 %, these in 90.

    Args:
        values: one score per video.
        clusters: the group of each value, such as its prompt. Whole groups are drawn: videos of
            one prompt resemble each other, and would pass for more evidence than they are.
    """
    scores = np.asarray(values, dtype=np.float64)
    labels = np.arange(len(scores)) if clusters is None else np.asarray(clusters)
    _, group = np.unique(labels, return_inverse=True)
    sums, counts = np.bincount(group, weights=scores), np.bincount(group)
    size, freedom = len(counts), len(counts) - 1
    if size < 2:
        raise ValueError(f"{size} independent values have no spread; evaluate at least 2 prompts")
    drawn = np.random.default_rng(0).integers(size, size=(RESAMPLES, size))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    # Few values get the width of Student's t.
    tail = NormalDist().cdf(math.sqrt(size / freedom) * student(0.025, freedom))
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean=float(scores.mean()), low=float(low), high=float(high))


def student(share: float, freedom: float) -> float:
    """Return a quantile of Student's t (Wallace 1959), 1 % too far at 3 degrees of freedom."""
    z = NormalDist().inv_cdf(share)
    told = z * (8 * freedom + 3) / (8 * freedom + 1)
    return math.copysign(math.sqrt(freedom * math.expm1(told**2 / freedom)), z)


def frechet_distance(first: Features, second: Features) -> float:
    """Return the Fréchet distance of Gaussians fitted to features (Heusel et al. 2017, eq. 6)."""
    means = first.mean(0) - second.mean(0)
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    # The product of two covariances has the eigenvalues of a positive matrix, up to rounding.
    root = np.sqrt(np.linalg.eigvals(a @ b).real.clip(min=0)).sum()
    return float(means @ means + np.trace(a) + np.trace(b) - 2 * root)


def frechet_interval(first: Features, second: Features) -> Interval:
    """Return a Fréchet distance with a 95 % bootstrap interval, of 200 draws.

    Drawing anew adds distance, as fewer different videos do: what the median adds is taken off. The
    bias that the distance itself has is not; it is the same for the same number of videos.
    """
    rng, found = np.random.default_rng(0), frechet_distance(first, second)
    draws = [
        frechet_distance(*(x[rng.integers(len(x), size=len(x))] for x in (first, second)))
        for _ in range(200)
    ]
    low, middle, high = np.quantile(draws, [0.025, 0.5, 0.975])
    low, high = max(0.0, float(found + low - middle)), float(found + high - middle)
    return Interval(mean=found, low=low, high=high)


def kid(made: Pictures, real: Pictures) -> Interval:
    """Return the Kernel Inception Distance of frames, with a 95 % interval of 1000 draws.

    Binkowski et al. 2018, arXiv:1801.01401: the unbiased estimate of the squared MMD under the
    kernel (x . y / d + 1)^3; it may be below zero. Video i of both sets answers the same prompt.
    Only frames of different prompts are compared, so those of one may resemble each other, and
    the interval draws whole prompts.
    """
    count, _, size = made.shape

    def alike(a: Pictures, b: Pictures) -> Float[np.ndarray, "videos videos"]:
        x, y = (np.concatenate(list(s.astype(np.float64).swapaxes(0, 1))) for s in (a, b))
        kernel = (x @ y.T / size + 1) ** 3
        return kernel.reshape(-1, count, len(y) // count, count).mean((0, 2))

    cross = alike(made, real)
    pairs = alike(made, made) + alike(real, real) - cross - cross.T
    np.fill_diagonal(pairs, 0)
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), 1000)
    weights = np.concatenate([np.ones((1, count)), drawn])
    drawn_pairs = count**2 - (weights**2).sum(1)  # none if one prompt was drawn all along
    values = ((weights @ pairs) * weights).sum(1) / drawn_pairs.clip(min=1)
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Interval(mean=float(values[0]), low=float(low), high=float(high))


def motion(frames: Frames) -> dict[str, float]:
    """Measure how a video moves, by what x264 makes of it.

    Returns:
        `amount`: the mean length of motion vectors, where nothing moves included, in thousandths
        of the width per frame; `right` and `down`: the mean vector; `bits` per pixel of all frames
        but the first: what vectors do not explain; `jump`: by how many at most a frame has more
        than both beside it. On a flat ground vectors say little, as any of them is right there.
    """
    height, width = (side // 2 * 2 for side in frames.shape[1:3])
    file, steps, bits = io.BytesIO(), [], list[float]()
    with av.open(file, "w", format="matroska") as container:
        options = {"crf": "23", "preset": "fast", "x264-params": X264}
        stream = container.add_stream("libx264", rate=16, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames[:, :height, :width]:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    file.seek(0)
    with av.open(file, "r") as written:
        video = written.streams.video[0]
        video.codec_context.options = {"flags2": "+export_mvs"}
        for packet in written.demux(video):
            bits += [8 * packet.size / (height * width)] if packet.size else []
            for frame in packet.decode():
                found: Any = frame.side_data.get("MOTION_VECTORS")
                steps.append(_vector(found.to_ndarray()) if found else np.zeros(3))
    amount, x, y = 1000 / (height * width**2) * np.mean(steps[1:] or [np.zeros(3)], axis=0)
    told = np.array(bits[1:] or [0.0])
    beside = np.maximum(np.append(told[1:], told[-1]), np.append(told[0], told[:-1]))
    moved = {"amount": amount, "right": x, "down": y}
    values = moved | {"bits": told.mean(), "jump": (told - beside).max()}
    return {name: float(value) for name, value in values.items()}


def _vector(blocks: np.ndarray) -> Float[np.ndarray, "3"]:
    """Return the sum over pixels of the length, and of both parts, of what moves, in pixels."""
    area = blocks["w"].astype(float) * blocks["h"]
    # Vectors point from where a block goes to where it comes from.
    x, y = (-blocks[f"motion_{axis}"] / blocks["motion_scale"] for axis in "xy")
    return np.array([area @ np.hypot(x, y), area @ x, area @ y])


def seams(frames: Frames, units: PixelUnits) -> dict[str, float | None]:
    """Return how much more the luma changes across the borders of units than inside them.

    Args:
        frames: of a video.
        units: the number of the unit that every pixel is made in.

    Returns:
        The ratio of mean changes to the next pixel, in `space`, and to the next frame, in `time`; 1
        is no seam, None where there is no border, or nothing else. Things that end, and borders of
        what the codec decodes, are in it: compare it with that of real clips through the codec.
    """
    luma, found = frames.astype(np.float32) @ LUMA, dict[str, float | None]()
    for name, axes in {"space": (1, 2), "time": (0,)}.items():
        change = np.concatenate([np.abs(np.diff(luma, axis=axis)).ravel() for axis in axes])
        border = np.concatenate([np.diff(units, axis=axis).ravel() != 0 for axis in axes])
        mixed = border.any() and not border.all()
        inside = max(float(change[~border].mean()), 0.1) if mixed else 1.0
        found[name] = float(change[border].mean()) / inside if mixed else None
    return found


def motion_distance(made: Sequence[dict[str, float]], real: Sequence[dict[str, float]]) -> Interval:
    """Return the Fréchet distance of how videos move, in deviations of real ones.

    Amounts and bits are compared by their logarithm: that of frozen videos is far below all.
    """
    values = []
    for videos in (made, real):
        table = np.array([[video[name] for name in videos[0]] for video in videos])
        table[:, [0, 3, 4]] = np.log(1e-3 + table[:, [0, 3, 4]].clip(min=0))
        values.append(table)
    scale = np.maximum(values[1].std(0), 1e-3)
    first, second = (table / scale for table in values)
    return frechet_interval(first, second)


def properties(frames: Frames, *, fps: float, window_seconds: float) -> dict[str, list[float]]:
    """Return the mean of properties in every window of a video; a rest that fills none is left.

    Brightness and contrast are mean and deviation of the luma in [0, 1]; sharpness the mean
    gradient of the luma per contrast; colourfulness after Hasler and Süsstrunk 2003; flicker the
    mean change of brightness from frame to frame; change that of a pixel.
    """
    size = round(window_seconds * fps)
    starts = range(0, len(frames) - size + 1, size)
    windows = [_window_properties(frames[start : start + size]) for start in starts]
    return {name: [window[name] for window in windows] for name in windows[0]}


def slope(values: Values, *, window_seconds: float) -> float:
    """Return the change per second of a straight line through one value per window: a drift."""
    return float(np.polyfit(np.arange(len(values)) * window_seconds, values, 1)[0])


def _window_properties(frames: Frames) -> dict[str, float]:
    x = frames.astype(np.float32) / PEAK
    luma = x @ LUMA
    brightness, contrast = luma.mean((1, 2)), luma.std((1, 2))
    gradient = np.abs(np.diff(luma, axis=1)).mean() + np.abs(np.diff(luma, axis=2)).mean()
    opponents = np.stack([x[..., 0] - x[..., 1], (x[..., 0] + x[..., 1]) / 2 - x[..., 2]])
    spread = np.hypot(*opponents.std((2, 3))) + 0.3 * np.hypot(*opponents.mean((2, 3)))
    means = {
        "brightness": brightness.mean(),
        "contrast": contrast.mean(),
        "sharpness": gradient / max(contrast.mean(), 1e-6),
        "colourfulness": spread.mean(),
        "flicker": np.abs(np.diff(brightness)).mean(),
        "change": np.abs(np.diff(x, axis=0)).mean(),
    }
    return {name: float(value) for name, value in means.items()}
