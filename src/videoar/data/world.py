"""The procedural world: endless moving shapes and their captions; `evaluation/judge.py` reads them.

Frame k of a scene is a closed form of k, so a clip may start anywhere in an endless video. Lengths
are units of 1/64 frame, y points down, and opposite edges are glued: the world is a torus.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float, UInt8

from videoar.checks import Options, one_of

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


TWO_THINGS = 0.25
"""How many of the scenes have two things."""


@dataclass(frozen=True, kw_only=True)
class Thing(Options):
    """One moving shape, in words of `SHAPES`, `COLORS`, `SIZES` and `MOTIONS`."""

    shape: Annotated[str, one_of(SHAPES)]
    color: Annotated[str, one_of(COLORS)]
    size: Annotated[str, one_of(SIZES)]
    motion: Annotated[str, one_of(MOTIONS)]
    x: float
    y: float
    """Centre at frame 0; of the orbit for a circling thing, the bottom of a bounce."""
    phase: float = 0.0
    """Share of the period that has passed at frame 0, for motions that have one."""


@dataclass(frozen=True, kw_only=True)
class Scene(Options):
    """Things of different colours on a plain background: all there is to an endless video."""

    things: tuple[Thing, ...]
    background: Annotated[str, one_of(BACKGROUNDS)]

    def __post_init__(self) -> None:
        super().__post_init__()
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


Drawn = tuple[Scene, np.random.Generator]
"""A scene, and the generator for what else is random about it."""


def _pick(rng: np.random.Generator, options: Collection[str]) -> str:
    return list(options)[int(rng.integers(len(options)))]


def sample_scene(rng: np.random.Generator, *, two_things: float = TWO_THINGS) -> Scene:
    """Draw a scene: one thing anywhere, or two small things in lanes where they never meet.

    `two_things` is the share of the scenes with two.
    """
    lanes, sizes, motions = [(0.0, 0.0, EXTENT, EXTENT)], list(SIZES), MOTIONS
    if rng.random() < two_things:
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


def random_clip(scene: Scene, rng: np.random.Generator, *, num_frames: int) -> Frames:
    """Draw frames of a scene from a random moment on."""
    return render(scene, num_frames=num_frames, start=int(rng.integers(1000)))


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
    right = wrap(places - path[:, :1])[:, None, :].astype(np.float32)
    down = wrap(places - path[:, 1:2])[:, :, None].astype(np.float32)
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


def wrap(distance: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Return the shortest way around the torus."""
    return (distance + EXTENT / 2) % EXTENT - EXTENT / 2


SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
SHAPE_WORDS = {"ball": ("ball", "disc", "circle"), "square": ("square", "box")}
GROUND_PHRASES = ("on a {} background", "over {}", "against a {} backdrop", "in front of a {} wall")
NOUN_PHRASES = ("a {0} {1} {2}", "one {0} {1} {2}", "a {0}, {1} {2}", "a {1} {2} of {3} size")


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


FIRST_HELD_OUT = 1_000_000
"""Scenes from this index on are never trained on."""


def scene_of(index: int, *, seed: int, two_things: float = TWO_THINGS) -> Drawn:
    """Scene number `index` of a world, and the generator for what else is random about it."""
    rng = np.random.default_rng([seed, index])
    return sample_scene(rng, two_things=two_things), rng


FIRST_SCENE = 2 * FIRST_HELD_OUT  # training ends below `FIRST_HELD_OUT`, validation soon after it


def held_out_prompts(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Return scenes that no training has seen, with a caption and a seed each."""
    scenes = (scene_of(FIRST_SCENE + i, seed=seed) for i in range(count))
    return [
        {"prompt": caption(scene, rng), "seed": seed + i, "scene": scene.to_json()}
        for i, (scene, rng) in enumerate(scenes)
    ]
