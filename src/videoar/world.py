"""The procedural world: endless moving shapes, their captions, and a judge that reads them back.

Frame k of a scene is a closed form of k, so a clip may start anywhere in an endless video. Lengths
are units of 1/64 frame, y points down, and opposite edges are glued: the world is a torus.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

Frames = UInt8[np.ndarray, "frames height width 3"]
Masks = Float[np.ndarray, "frames height width"]
Series = Float[np.ndarray, " frames"]
Path = Float[np.ndarray, "frames 3"]  # centre x, centre y and radius; centres are not wrapped

EXTENT = 64.0
SHAPES = ("ball", "square", "triangle", "cross")
SIZES = {"small": 8.0, "large": 12.0}
MOTIONS = {
    "left": ("moves left", "is moving to the left", "drifts leftwards", "slides left"),
    "right": ("moves right", "is moving to the right", "drifts rightwards", "slides right"),
    "up": ("moves up", "is drifting upwards", "rises", "floats up"),
    "down": ("moves down", "is drifting downwards", "falls", "sinks down"),
    "bouncing": ("bounces up and down", "bounces", "is bouncing", "hops up and down"),
    "circling": ("moves in a circle", "circles around", "is circling", "goes round and round"),
    "growing": ("grows and shrinks", "is growing and shrinking", "pulses", "swells and shrinks"),
    "still": ("stays still", "stands still", "does not move", "is at rest"),
}
COLORS = {
    "red": (230, 40, 40),
    "green": (30, 185, 50),
    "blue": (40, 80, 255),
    "yellow": (245, 220, 40),
    "cyan": (40, 220, 235),
    "magenta": (225, 50, 220),
}
BACKGROUNDS = {"black": (5,) * 3, "white": (245,) * 3, "grey": (125,) * 3, "navy": (12, 18, 80)}
WORDS = {"color": COLORS, "shape": SHAPES, "motion": MOTIONS, "size": SIZES}

DRIFTS = {"left": (-20.0, 0.0), "right": (20.0, 0.0), "up": (0.0, -20.0), "down": (0.0, 20.0)}
"""In units per second: once across a frame in 3.2 s."""
PERIODS = {"bouncing": 1.25, "circling": 2.0, "growing": 2.0}
BOUNCE_HEIGHT, ORBIT_RADIUS, GROWTH_MEAN, GROWTH_SWING = 24.0, 12.0, 0.875, 0.325
SQUARE, BAR = 0.9, 0.36  # half width of a square and of a bar of the cross, in radii
AREAS = {"ball": np.pi, "square": 4 * SQUARE**2, "triangle": 2.0, "cross": 4 * BAR * (2 - BAR)}
"""Of shapes of radius 1."""
LANE_MOTIONS = {
    "rows": ("left", "right", "growing", "still"),
    "columns": ("up", "down", "bouncing", "growing", "still"),
}


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One moving shape, in words of `SHAPES`, `COLORS`, `SIZES` and `MOTIONS`."""

    shape: str
    color: str
    size: str
    motion: str
    x: float
    y: float
    """Centre at frame 0; of the orbit for a circling thing, the bottom of a bounce."""
    phase: float = 0.0
    """Share of the period that has passed at frame 0, for motions that have one."""

    def __post_init__(self) -> None:
        for name, known in WORDS.items():
            _check(name, getattr(self, name), known)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Things of different colours on a plain background: all there is to an endless video."""

    things: tuple[Thing, ...]
    background: str

    def __post_init__(self) -> None:
        _check("background", self.background, BACKGROUNDS)
        colors = [thing.color for thing in self.things]
        if not colors or len(set(colors)) < len(colors):
            raise ValueError(f"things have the colors {colors}; give at least one, no color twice")

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict that `from_json` turns back into this scene."""
        return {"background": self.background, "things": [asdict(thing) for thing in self.things]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Scene":
        """Build the scene that `to_json` described."""
        return cls(**data | {"things": tuple(Thing(**thing) for thing in data["things"])})


def _check(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")


def _pick(rng: np.random.Generator, options: Collection[str]) -> str:
    return list(options)[int(rng.integers(len(options)))]


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene: one thing anywhere, or two small things in lanes where they never meet."""
    lanes, sizes, motions = [(0.0, 0.0, EXTENT, EXTENT)], list(SIZES), MOTIONS
    if rng.random() < 0.25:
        split = _pick(rng, LANE_MOTIONS)
        right, down = (EXTENT, EXTENT / 2) if split == "rows" else (EXTENT / 2, EXTENT)
        lanes = [(0.0, 0.0, right, down), (EXTENT - right, EXTENT - down, EXTENT, EXTENT)]
        sizes, motions = ["small"], LANE_MOTIONS[split]
    colors = rng.permutation(list(COLORS)).tolist()
    things = []
    for lane, color in zip(lanes, colors, strict=False):
        size, motion = _pick(rng, sizes), _pick(rng, motions)
        radius = SIZES[size] * (GROWTH_MEAN + GROWTH_SWING if motion == "growing" else 1.0)
        reach = radius + 2 + (ORBIT_RADIUS if motion == "circling" else 0)  # 2: blur needs room
        low, high = np.array(lane[:2]) + reach, np.array(lane[2:]) - reach
        low[1] += BOUNCE_HEIGHT if motion == "bouncing" else 0.0
        x, y = rng.uniform(low, high)
        if motion in DRIFTS:  # it comes by every place on its way, so it may start at any
            x, y = np.where(DRIFTS[motion], rng.uniform(0.0, EXTENT), (x, y))
        phase = rng.random() if motion in PERIODS else 0.0
        kind = {"shape": _pick(rng, SHAPES), "color": color, "size": size, "motion": motion}
        things.append(Thing(**kind, x=round(float(x), 2), y=round(float(y), 2), phase=phase))
    return Scene(things=tuple(things), background=_pick(rng, BACKGROUNDS))


def render(
    scene: Scene, *, num_frames: int, start: int = 0, size: int = 64, fps: int = 16
) -> Frames:
    """Draw frames ``start .. start + num_frames - 1`` of the endless video of a scene."""
    if size < EXTENT:
        raise ValueError(f"size is {size}; shapes need 64 pixels to be distinct, ask for those")
    seconds = np.arange(start, start + num_frames) / fps
    ground = np.array(BACKGROUNDS[scene.background], np.float32)
    frames = np.broadcast_to(ground + 0.5, (num_frames, size, size, 3))  # + 0.5: uint8 truncates
    for thing in scene.things:
        mask = coverage(thing.shape, path=find_path(thing, seconds), size=size)
        frames = frames + mask[..., None] * (np.array(COLORS[thing.color], np.float32) - ground)
    return frames.astype(np.uint8)


def find_path(thing: Thing, seconds: Series) -> Path:
    """Return where a thing is, and how big, at the given times."""
    drift_x, drift_y = DRIFTS.get(thing.motion, (0.0, 0.0))
    x, y = thing.x + drift_x * seconds, thing.y + drift_y * seconds
    radius = np.full_like(seconds, SIZES[thing.size])
    turn = seconds / PERIODS.get(thing.motion, 1.0) + thing.phase
    angle = 2.0 * np.pi * turn
    if thing.motion == "bouncing":
        y = y - BOUNCE_HEIGHT * 4.0 * (turn % 1.0) * (1.0 - turn % 1.0)
    elif thing.motion == "circling":  # clockwise, as y points down
        x, y = x + ORBIT_RADIUS * np.cos(angle), y + ORBIT_RADIUS * np.sin(angle)
    elif thing.motion == "growing":
        radius = radius * (GROWTH_MEAN + GROWTH_SWING * np.sin(angle))
    return np.stack([x, y, radius], axis=-1)


def coverage(shape: str, *, path: Path, size: int) -> Masks:
    """Return the share of every pixel that a shape covers, from its signed distance to the edge."""
    scale = size / EXTENT
    places = (np.arange(size) + 0.5) / scale
    right = _wrap(places - path[:, :1])[:, None, :].astype(np.float32)
    down = _wrap(places - path[:, 1:2])[:, :, None].astype(np.float32)
    radius = path[:, 2, None, None].astype(np.float32)
    across, along = np.abs(right), np.abs(down)
    if shape == "ball":
        outside = np.sqrt(across**2 + along**2) - radius
    elif shape == "square":
        outside = np.maximum(across, along) - SQUARE * radius
    elif shape == "triangle":
        sides = (2.0 * across - (down + radius)) * np.float32(0.2**0.5)
        outside = np.maximum(sides, down - radius)
    else:
        flat = np.maximum(across - radius, along - BAR * radius)
        outside = np.minimum(flat, np.maximum(along - radius, across - BAR * radius))
    return np.clip(0.5 - outside * np.float32(scale), 0.0, 1.0)


def _wrap(distance: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Return the shortest way around the torus."""
    return (distance + EXTENT / 2) % EXTENT - EXTENT / 2


SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
SHAPE_WORDS = {"ball": ("ball", "disc", "circle"), "square": ("square", "box")}
GROUND_PHRASES = ("on a {} background", "over {}", "against a {} backdrop", "in front of a {} wall")
NOUN_PHRASES = ("a {0} {1} {2}", "one {0} {1} {2}", "a {0}, {1} {2}", "a {1} {2} of {3} size")


def plain_caption(scene: Scene) -> str:
    """Return the canonical caption of a scene."""
    things = [f"a {x.size} {x.color} {x.shape} {MOTIONS[x.motion][0]}" for x in scene.things]
    return f"{' and '.join(things)} on a {scene.background} background"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Describe a scene in one of many phrasings that all name every attribute."""
    words = ("grey", "gray") if scene.background == "grey" else (scene.background,)
    ground = _pick(rng, GROUND_PHRASES).format(_pick(rng, words))
    clauses = []
    for index in rng.permutation(len(scene.things)):
        thing = scene.things[index]
        size = _pick(rng, SIZE_WORDS[thing.size])
        shape = _pick(rng, SHAPE_WORDS.get(thing.shape, (thing.shape,)))
        noun = _pick(rng, NOUN_PHRASES).format(size, thing.color, shape, thing.size)
        clauses.append(f"{noun} {_pick(rng, MOTIONS[thing.motion])}")
    text = _pick(rng, (" while ", " and ")).join(clauses)
    text = f"{text} {ground}" if rng.random() < 0.7 else f"{ground}, {text}"
    text = text[0].upper() + text[1:] if rng.random() < 0.2 else text
    return f"{text}." if rng.random() < 0.2 else text


MIN_SECONDS = 1.5  # shorter clips do not tell a bounce from a drift
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
    far, nearest = min((np.linalg.norm(ground - rgb), name) for name, rgb in BACKGROUNDS.items())
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
    track[:, 2] = radius = np.sqrt(blobs[shown, 2] / AREAS[shape])
    motion = _name_motion(shown / fps, track)
    middle = (radius.min() + radius.max()) / 2.0 / GROWTH_MEAN
    usual = middle if motion == "growing" else np.median(radius)
    return Seen(
        color=color,
        shape=shape if overlap > 0.5 else None,
        size="small" if usual < np.sqrt(SIZES["small"] * SIZES["large"]) else "large",
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
        right, down = _wrap(places - x[:, None]), _wrap(places - y[:, None])
        near = mask * (np.abs(right) < 20.0)[:, None, :] * (np.abs(down) < 20.0)[:, :, None]
        area = np.maximum(near.sum(axis=(1, 2)), 1e-6)
        x = x + (near.sum(axis=1) * right).sum(axis=1) / area
        y = y + (near.sum(axis=2) * down).sum(axis=1) / area
    return np.stack([x, y, area * (EXTENT / size) ** 2], axis=-1)


def _overlap(shape: str, mask: Masks, *, blobs: Float[np.ndarray, "frames 3"]) -> float:
    """Return the mean IoU of a mask with a shape of its place and area, at the blur that fits best.

    Without the blur every soft corner looks round: a tenth of blurred small crosses read as balls.
    """
    path = np.concatenate([blobs[:, :2], np.sqrt(blobs[:, 2:] / AREAS[shape])], axis=-1)
    if shape == "triangle":  # its centroid lies below its centre
        path[:, 1] -= path[:, 2] / 3.0
    drawn = coverage(shape, path=path, size=mask.shape[1])
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
    for motion, (speed_x, speed_y) in DRIFTS.items():
        gain, (speed,) = _explain(x if speed_x else y, seconds)
        if speed / (speed_x + speed_y) > MIN_SPEED:
            gains.append((gain - 0.5, motion))
    for stretch in (0.8, 0.9, 1.0, 1.1, 1.2):  # a generated motion may be a little slow or fast
        for phase in np.arange(0.0, 1.0, 0.05):
            turn = (seconds / (stretch * PERIODS["bouncing"]) + phase) % 1.0
            gain, (height,) = _explain(y, -4.0 * turn * (1.0 - turn))
            if height > MIN_BOUNCE:
                gains.append((gain - 1.0, "bouncing"))
        angle = 2.0 * np.pi * seconds / (stretch * PERIODS["circling"])
        gain, swing = _explain(track[:, :2], np.cos(angle), np.sin(angle))
        if np.hypot(*swing).min() > MIN_ORBIT:
            gains.append((gain - 1.0, "circling"))
        angle = 2.0 * np.pi * seconds / (stretch * PERIODS["growing"])
        gain, swing = _explain(radius, np.cos(angle), np.sin(angle))
        if np.hypot(*swing) > MIN_GROWTH * np.mean(radius):
            gains.append((4.0 * gain - 1.0, "growing"))
    gain, motion = max(gains)
    return motion if np.var(x) + np.var(y) - gain < MAX_STRAY else None


def _explain(values: Float[np.ndarray, "..."], *laws: Series) -> tuple[float, np.ndarray]:
    """Fit laws plus a constant; return the variance explained and the amplitude of each law."""
    basis = np.stack([np.ones(len(values)), *laws], axis=-1)
    amplitudes = np.linalg.lstsq(basis, values, rcond=None)[0]
    return float(np.var(basis @ amplitudes, axis=0).sum()), amplitudes[1:]


def score(reading: Reading, scene: Scene) -> dict[str, float]:
    """Return the share of a scene's attributes that a reading got right, each in [0, 1].

    Things are matched by colour first and then by order, never by place: where a thing starts is
    the generator's choice. Missing things are wrong in everything, and spurious ones cost as much.
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
