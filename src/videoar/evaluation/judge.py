"""The judge of the procedural world: what a video shows, and whether its prompt says so."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

from videoar.data import world
from videoar.data.world import COLORS, EXTENT, SHAPES, WORDS, Frames, Masks, Path, Series, wrap
from videoar.files import Json

MIN_SECONDS = 1.5  # shorter clips do not tell a bounce from a drift
WINDOW_SECONDS = 4.0  # in which long videos are judged
DRAWN = 512  # frames at once
MIN_SPEED, MIN_BOUNCE, MIN_ORBIT, MIN_GROWTH = 0.4, 6.0, 4.0, 0.12
"""Slower (as a share), lower, tighter or weaker is called still: a generated thing trembles."""
MAX_STRAY = 16.0  # variance, in square units, by which a track may miss its motion's law
FAINT = 0.2  # coverage below this is noise


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One thing that the judge found, in the words of `Thing`; None where it cannot tell."""

    color: str
    shape: str | None
    """None where no shape overlaps by half."""
    size: str
    motion: str | None
    """None in a clip under `MIN_SECONDS` or where no motion fits."""
    track: Path = field(repr=False, compare=False)
    """The path through the frames that show the thing."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the judge saw in a clip; the things in the order of `COLORS`."""

    background: str | None
    """None for a colour far from all of `BACKGROUNDS`."""
    things: tuple[Seen, ...]


def read(frames: Frames, *, fps: int = 16) -> Reading:
    """Tell from pixels alone what a clip shows.

    The judge looks for blobs of the palette's colours on the clip's median colour, follows each on
    the torus, compares it with drawn shapes of its area, and fits every motion to its track. Read
    long videos in windows of 2 to 4 s: a generated motion may lose its phase over a minute.
    """
    height, width = frames.shape[1:3]
    if height != width or height < EXTENT:
        raise ValueError(f"frames are {height}x{width}; the judge needs squares of 64 or more")
    step = height // 64
    video = frames[:, ::step, ::step].astype(np.float32)
    ground = np.median(video[:, ::2, ::2].reshape(-1, 3), axis=0)
    colours = world.BACKGROUNDS.items()
    far, nearest = min((np.linalg.norm(ground - rgb), name) for name, rgb in colours)
    masks = _find_masks(video - ground, palette=np.array(list(COLORS.values())) - ground)
    things = tuple(_see(color, mask, fps=fps) for color, mask in masks.items())
    return Reading(background=nearest if far < 80.0 else None, things=things)


def _find_masks(
    offset: Float[np.ndarray, "frames height width 3"], *, palette: Float[np.ndarray, "colors 3"]
) -> dict[str, Masks]:
    """Return the soft mask of every colour that the clip shows as a solid blob.

    An edge pixel mixes a colour with the background, so the direction of its offset from the
    background tells the colour, and the length the coverage.
    """
    length = np.linalg.norm(offset, axis=-1)
    reach = np.maximum(np.linalg.norm(palette, axis=-1), 1.0)
    cosine = offset @ (palette / reach[:, None]).T / np.maximum(length, 1.0)[..., None]
    label = cosine.argmax(axis=-1)
    solid = (length > np.maximum(40.0, 0.5 * reach[label])) & (cosine.max(axis=-1) > 0.8)
    alphas, rests = {}, []
    for index, name in enumerate(COLORS):
        core = solid & (label == index)
        for axis in (1, 2):  # erosion: the tinted rim of a compressed thing is no thing
            core = core & np.roll(core, 1, axis) & np.roll(core, -1, axis)
        if np.median(core.sum(axis=(1, 2))) * (EXTENT / len(length[0])) ** 2 < 10.0:
            continue
        observed = np.median(offset[core], axis=0)
        alphas[name] = alpha = offset @ (observed / (observed @ observed))
        rests.append(np.linalg.norm(offset - alpha[..., None] * observed, axis=-1))
    return {
        name: np.where((np.argmin(rests, 0) == index) & (alpha > FAINT), np.minimum(alpha, 1), 0.0)
        for index, (name, alpha) in enumerate(alphas.items())
    }


def _see(color: str, mask: Masks, *, fps: int) -> Seen:
    """Name the shape, size and motion of one soft mask."""
    blobs = _follow(mask)
    shown = np.flatnonzero(blobs[:, 2] > 0.25 * np.median(blobs[:, 2]))
    few = shown[:: max(1, len(shown) // 16)]
    overlap, shape = max((_overlap(name, mask[few], blobs=blobs[few]), name) for name in SHAPES)
    track = np.unwrap(blobs[shown], axis=0, period=EXTENT)
    track[:, 2] = radius = np.sqrt(blobs[shown, 2] / world.AREAS[shape])
    motion = _name_motion(shown / fps, track)
    middle = (radius.min() + radius.max()) / 2.0 / world.GROWTH_MEAN
    usual = middle if motion == "growing" else np.median(radius)
    return Seen(
        color=color,
        shape=shape if overlap > 0.5 else None,
        size="small" if usual < np.sqrt(world.SIZES["small"] * world.SIZES["large"]) else "large",
        motion=motion if len(mask) >= MIN_SECONDS * fps else None,
        track=track,
    )


def _follow(mask: Masks) -> Float[np.ndarray, "frames 3"]:
    """Return centroid x, centroid y and area of a soft mask, frame by frame."""
    size = mask.shape[1]
    places = (np.arange(size) + 0.5) * EXTENT / size
    turn = np.exp(2j * np.pi * places / EXTENT)
    x, y = (np.angle(mask.sum(axis=axis) @ turn) * EXTENT / (2 * np.pi) for axis in (1, 2))
    for _ in range(2):  # a plain mean around the circular one: exact, and blind to distant specks
        right, down = wrap(places - x[:, None]), wrap(places - y[:, None])
        near = mask * (np.abs(right) < 20.0)[:, None, :] * (np.abs(down) < 20.0)[:, :, None]
        area = np.maximum(near.sum(axis=(1, 2)), 1e-6)
        x = x + (near.sum(axis=1) * right).sum(axis=1) / area
        y = y + (near.sum(axis=2) * down).sum(axis=1) / area
    return np.stack([x, y, area * (EXTENT / size) ** 2], axis=-1)


def _overlap(shape: str, mask: Masks, *, blobs: Float[np.ndarray, "frames 3"]) -> float:
    """Return the mean IoU of a mask with a shape of its place and area, at the blur that fits best.

    Without the blur every soft corner looks round: a tenth of blurred small crosses read as balls.
    """
    path = np.concatenate([blobs[:, :2], np.sqrt(blobs[:, 2:] / world.AREAS[shape])], axis=-1)
    if shape == "triangle":  # its centroid lies below its centre
        path[:, 1] -= path[:, 2] / 3.0
    drawn = world.coverage(shape, path=path, size=mask.shape[1])
    best = 0.0
    for _ in range(4):
        seen = np.where(drawn > FAINT, drawn, 0.0)
        shared, joint = (f(seen, mask).sum(axis=(1, 2)) for f in (np.minimum, np.maximum))
        best = max(best, float(np.mean(shared / np.maximum(joint, 1e-6))))
        for axis in (1, 2, 1, 2):
            drawn = (np.roll(drawn, 1, axis) + 2.0 * drawn + np.roll(drawn, -1, axis)) / 4.0
    return best


def _name_motion(seconds: Series, track: Path) -> str | None:
    """Return the motion whose law explains most of a track's variance, or None if all miss it.

    A drift must explain 0.5 square units and a periodic law 1: more than trembling alone offers.
    """
    x, y, radius = track.T
    gains = [(0.0, "still")]
    for motion, (speed_x, speed_y) in world.DRIFTS.items():
        gain, (speed,) = _explain(x if speed_x else y, seconds)
        if speed / (speed_x + speed_y) > MIN_SPEED:
            gains.append((gain - 0.5, motion))
    periodic = {"circling": (track[:, :2], MIN_ORBIT, 1.0)}
    periodic |= {"growing": (radius, MIN_GROWTH * np.mean(radius), 4.0)}
    for stretch in (0.8, 0.9, 1.0, 1.1, 1.2):  # a generated motion may be a little slow or fast
        for phase in np.arange(0.0, 1.0, 0.05):
            turn = (seconds / (stretch * world.PERIODS["bouncing"]) + phase) % 1.0
            gain, (height,) = _explain(y, -4.0 * turn * (1.0 - turn))
            if height > MIN_BOUNCE:
                gains.append((gain - 1.0, "bouncing"))
        for motion, (values, least, worth) in periodic.items():
            angle = 2.0 * np.pi * seconds / (stretch * world.PERIODS[motion])
            gain, swing = _explain(values, np.cos(angle), np.sin(angle))
            if np.hypot(*swing).min() > least:
                gains.append((worth * gain - 1.0, motion))
    gain, motion = max(gains)
    return motion if np.var(x) + np.var(y) - gain < MAX_STRAY else None


def _explain(values: Float[np.ndarray, "..."], *laws: Series) -> tuple[float, np.ndarray]:
    """Fit laws plus a constant; return the variance explained and the amplitude of each law."""
    basis = np.stack([np.ones(len(values)), *laws], axis=-1)
    amplitudes = np.linalg.lstsq(basis, values, rcond=None)[0]
    return float(np.var(basis @ amplitudes, axis=0).sum()), amplitudes[1:]


def score(reading: Reading, scene: world.Scene) -> dict[str, float]:
    """Return the share of a scene's attributes that a reading got right, each in [0, 1].

    Things are matched by colour first and then by order, never by place: where a thing starts is
    the generator's choice. Missing things are wrong in everything, and spurious ones cost as much.
    `count` is right if nothing else is there: noise shows every colour.
    """
    seen = {thing.color: thing for thing in reading.things}
    same = [(thing, seen.pop(thing.color, None)) for thing in scene.things]
    others = iter(seen.values())
    pairs = [(thing, other) for thing, match in same if (other := match or next(others, None))]
    most = max(len(scene.things), len(reading.things))
    right = {key: sum(getattr(a, key) == getattr(b, key) for a, b in pairs) / most for key in WORDS}
    right["background"] = float(reading.background == scene.background)
    right["count"] = float(len(reading.things) == len(scene.things))
    return right


Clips = UInt8[np.ndarray, "batch frames height width 3"]
Size = tuple[int, int]


@runtime_checkable
class Judge(Protocol):
    """Who asks for videos of a world, has real ones of them, and says what others show."""

    def prompts(self, count: int, *, seed: int) -> list[Json]:
        """Return what no training has seen; prompt i does not depend on their number."""

    def real(self, prompts: list[Json], *, num_frames: int, size: Size, fps: int) -> Clips:
        """Return real clips of what is asked for, of a height and width."""

    def look(self, clips: Clips, prompts: list[Json], *, fps: int) -> list[Json]:
        """Return what is `seen` in each clip, and its `scores`."""


class WorldJudge:
    """The judge of the procedural world, which is exact."""

    def prompts(self, count: int, *, seed: int) -> list[Json]:
        return world.held_out_prompts(count, seed=seed)

    def real(self, prompts: list[Json], *, num_frames: int, size: Size, fps: int) -> Clips:
        scenes = [world.Scene.from_json(prompt["scene"]) for prompt in prompts]
        clips = np.empty((len(scenes), num_frames, *size, 3), dtype=np.uint8)
        for start in range(0, num_frames, DRAWN):  # an hour in floats would fill the memory
            part = clips[:, start : start + DRAWN]
            how = {"num_frames": part.shape[1], "start": start, "size": size[0], "fps": fps}
            part[:] = [world.render(scene, **how) for scene in scenes]
        return clips

    def look(self, clips: Clips, prompts: list[Json], *, fps: int) -> list[Json]:
        found = list[Json]()
        for clip, prompt in zip(clips, prompts, strict=True):
            reading = read(clip, fps=fps)
            things = [{name: getattr(thing, name) for name in WORDS} for thing in reading.things]
            right = score(reading, world.Scene.from_json(prompt["scene"]))
            right["all"] = float(min(right.values()) == 1)
            seen = {"background": reading.background, "things": things}
            found.append({"scores": right, "seen": seen})
        return found


WORLD = WorldJudge()


def windows(blocks: Iterator[Clips], *, size: int) -> Iterator[Clips]:
    """Cut a stream of frames anew, into windows of `size` frames and a rest."""
    frames = (frame for block in blocks for frame in block.swapaxes(0, 1))
    while window := list(itertools.islice(frames, size)):
        yield np.stack(window, axis=1)
