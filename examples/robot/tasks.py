"""What the robot does, and how it is said: tasks, scenes, captions, positions, order of work.

Nothing here needs a simulator.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Vector = tuple[float, float, float]
FPS = 16

# Red is the arm's, brown the table's.
COLORS: dict[str, Vector] = {
    "green": (0.10, 0.70, 0.15),
    "blue": (0.10, 0.25, 0.90),
    "yellow": (0.95, 0.85, 0.05),
    "purple": (0.55, 0.15, 0.75),
    "white": (0.97, 0.97, 0.97),
    "black": (0.04, 0.04, 0.04),
}

POSITIONS = {
    "left": ("on the left", "on the left side", "at the left"),
    "middle": ("in the middle", "in the centre", "in the center"),
    "right": ("on the right", "on the right side", "at the right"),
}
# Shares of the width of the picture. Between the bands nothing is drawn, so that nobody has to
# argue whether an object is still on the left.
BANDS = {"left": (0.26, 0.39), "middle": (0.46, 0.56), "right": (0.63, 0.76)}

SUBJECTS = ("the robot arm", "a robot arm", "the robot", "the arm")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What stands on the table."""

    thing: str
    """Its name in captions."""
    bodies: tuple[str, ...]
    """Roots of the tree of bodies: they are moved together."""
    painted: tuple[str, ...]
    """Bodies that take the colour, with all that hangs on them."""
    bare: tuple[str, ...] = ()
    """Materials that keep theirs."""
    grey: tuple[str, ...] = ()
    """Materials that become grey, so that the painted part stands out, whatever its colour."""
    moving: str
    """The body whose joint, or that of what hangs on it, tells the state."""
    joint: int = 0
    """Which of its joints."""
    states: dict[str, float]
    """Words for how it stands, and what its joint says then."""
    centre: Vector = (0.0, 0.0, 0.0)
    """From the mean of `bodies` to what one would point at, in metres."""
    home: Vector = (-0.06, 0.52, 0.26)
    """Where the hand waits, if the thing is in the middle of the table."""


SCENES = {
    "drawer": Scene(
        thing="drawer",
        bodies=("drawer",),
        painted=("drawer_link",),
        grey=("drawer_beige",),
        moving="drawer_link",
        states={"closed": 0.0, "open": -0.15},
        centre=(0.0, -0.1, 0.09),
    ),
    "door": Scene(
        thing="door",
        bodies=("door",),
        painted=("door_link",),
        bare=("dl_metal",),
        grey=("dl_metal2",),
        moving="door_link",
        states={"closed": 0.0, "open": -1.4},
        centre=(-0.12, -0.15, 0.0),
        home=(0.2, 0.46, 0.28),
    ),
    "window": Scene(
        thing="window",
        bodies=("window",),
        painted=("window",),
        bare=("window_white", "window_glass"),
        moving="windowb_a",
        states={"closed": 0.0, "open": 0.2},
    ),
    "faucet": Scene(
        thing="faucet",
        bodies=("faucetBase",),
        painted=("faucet_link",),
        moving="faucet_link2",
        states={"left": -1.5, "middle": 0.0, "right": 1.5},
        centre=(0.0, -0.06, 0.1),
    ),
    "handle": Scene(
        thing="handle",
        bodies=("box",),
        painted=("handle_link",),
        grey=("hdlprs_metal0",),
        moving="handle_link",
        states={"up": -0.02, "down": -0.1},
        centre=(0.0, -0.1, 0.1),
    ),
    "side handle": Scene(
        thing="side handle",
        bodies=("box",),
        painted=("handle_link",),
        grey=("hdlprs_metal0",),
        moving="handle_link",
        states={"up": -0.02, "down": -0.1},
        centre=(0.1, 0.0, 0.1),
    ),
    "plate": Scene(
        thing="plate",
        bodies=("puck_channel", "puck_goal"),
        painted=("puck_channel",),
        moving="puck_channel",
        joint=1,
        states={"out": 0.0, "in": 0.18},
    ),
    "lock": Scene(
        thing="lock",
        bodies=("door",),
        painted=("lock_link",),
        grey=("dl_metal2",),
        moving="lock_link",
        states={"unlocked": 0.0, "locked": 1.4},
        centre=(0.0, -0.12, 0.06),
        home=(-0.15, 0.5, 0.24),
    ),
    "lever": Scene(
        thing="lever",
        bodies=("lever",),
        painted=("lever_link1",),
        moving="lever_link1",
        states={"down": 0.0, "up": -1.5},
        centre=(0.06, -0.05, 0.2),
        home=(0.0, 0.42, 0.22),
    ),
    "dial": Scene(
        thing="dial",
        bodies=("dial",),
        painted=("dial",),
        moving="dial",
        states={"unturned": 0.0, "turned": -1.6},
        centre=(0.0, 0.0, 0.03),
    ),
    "button": Scene(
        thing="button",
        bodies=("box",),
        painted=("button",),
        grey=("btn_yellow",),
        moving="button",
        states={"out": 0.0, "in": -0.08},
        centre=(0.0, -0.1, 0.0),
    ),
    "upper button": Scene(
        thing="button",
        bodies=("box",),
        painted=("button",),
        grey=("btn_yellow",),
        moving="button",
        states={"out": 0.0, "in": -0.08},
        centre=(0.0, 0.0, 0.1),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing that an expert of Meta-World can do."""

    scene: str
    action: str
    phrases: tuple[str, ...]
    """Ways to say it in the third person; `{}` stands for the coloured thing."""
    retreat: Vector
    """How the hand gets clear of the thing afterwards, in metres; then it returns home."""
    goal: str = ""
    """The body that is the goal, where Meta-World's goal may be beside it."""
    undone_by: str = ""
    """The task that starts where this one ends, if there is one on the same scene."""


UP: Vector = (0.0, 0.0, 0.15)
BACK: Vector = (0.0, -0.12, 0.0)
TASKS = {
    "drawer-open": Task(
        scene="drawer",
        action="open",
        phrases=("opens {}", "pulls {} open", "pulls {} out"),
        retreat=UP,
        undone_by="drawer-close",
    ),
    "drawer-close": Task(
        scene="drawer",
        action="close",
        phrases=("closes {}", "pushes {} shut", "shuts {}", "pushes {} in"),
        retreat=BACK,
        undone_by="drawer-open",
    ),
    "door-open": Task(
        scene="door",
        action="open",
        phrases=("opens {}", "pulls {} open", "swings {} open"),
        retreat=(0.0, 0.0, 0.28),
        undone_by="door-close",
    ),
    "door-close": Task(
        scene="door",
        action="close",
        phrases=("closes {}", "pushes {} shut", "shuts {}", "swings {} shut"),
        retreat=BACK,
        undone_by="door-open",
    ),
    "window-open": Task(
        scene="window",
        action="open",
        phrases=("opens {}", "slides {} open", "pushes {} open"),
        retreat=BACK,
        undone_by="window-close",
    ),
    "window-close": Task(
        scene="window",
        action="close",
        phrases=("closes {}", "slides {} shut", "shuts {}"),
        retreat=BACK,
        undone_by="window-open",
    ),
    "faucet-open": Task(
        scene="faucet",
        action="open",
        phrases=("opens {}", "turns {} on", "turns {} to the right"),
        retreat=UP,
        undone_by="faucet-close",
    ),
    "faucet-close": Task(
        scene="faucet",
        action="close",
        phrases=("closes {}", "turns {} off", "turns {} to the left"),
        retreat=UP,
        undone_by="faucet-open",
    ),
    "handle-press": Task(
        scene="handle",
        action="press",
        phrases=("presses {} down", "pushes {} down", "lowers {}"),
        retreat=UP,
        undone_by="handle-pull",
    ),
    "handle-pull": Task(
        scene="handle",
        action="pull",
        phrases=("pulls {} up", "lifts {}", "raises {}"),
        retreat=BACK,
        undone_by="handle-press",
    ),
    "handle-press-side": Task(
        scene="side handle",
        action="press",
        phrases=("presses {} down", "pushes {} down", "lowers {}"),
        retreat=UP,
        undone_by="handle-pull-side",
    ),
    "handle-pull-side": Task(
        scene="side handle",
        action="pull",
        phrases=("pulls {} up", "lifts {}", "raises {}"),
        retreat=(0.12, 0.0, 0.0),
        undone_by="handle-press-side",
    ),
    "plate-slide": Task(
        scene="plate",
        action="slide in",
        phrases=("slides {} into the goal", "pushes {} into the goal", "shoves {} into the net"),
        retreat=(0.0, -0.1, 0.1),
        goal="puck_goal",
        undone_by="plate-slide-back",
    ),
    "plate-slide-back": Task(
        scene="plate",
        action="slide out",
        phrases=(
            "slides {} out of the goal",
            "pulls {} out of the goal",
            "takes {} out of the net",
        ),
        retreat=UP,
        undone_by="plate-slide",
    ),
    "door-lock": Task(
        scene="lock",
        action="lock",
        phrases=("locks the door with {}", "turns {} down", "closes {}"),
        retreat=BACK,
        undone_by="door-unlock",
    ),
    "door-unlock": Task(
        scene="lock",
        action="unlock",
        phrases=("unlocks the door with {}", "turns {} up", "opens {}"),
        retreat=BACK,
        undone_by="door-lock",
    ),
    "lever-pull": Task(
        scene="lever",
        action="pull",
        phrases=("pulls {} up", "raises {}", "lifts {}"),
        retreat=BACK,
    ),
    "dial-turn": Task(
        scene="dial",
        action="turn",
        phrases=("turns {}", "rotates {}", "twists {}"),
        retreat=UP,
    ),
    "button-press": Task(
        scene="button",
        action="press",
        phrases=("presses {}", "pushes {}", "pushes {} in"),
        retreat=BACK,
    ),
    "button-press-topdown": Task(
        scene="upper button",
        action="press",
        phrases=("presses {} from above", "pushes {} down", "presses {} down"),
        retreat=UP,
    ),
}
# One scene each, in the order of the table.
PAIRS = [
    (name, task.undone_by)
    for name, task in TASKS.items()
    if task.undone_by and list(TASKS).index(name) < list(TASKS).index(task.undone_by)
]


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole in MuJoCo's terms, for square pictures; it never moves."""

    lookat: Vector = (-0.02, 0.72, 0.13)
    distance: float = 1.0
    azimuth: float = 125.0
    """From behind the right shoulder: it sees the fronts of things, and the hand before them."""
    elevation: float = -33.0
    fovy: float = 45.0

    def axes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return forward, right and up."""
        azimuth, elevation = math.radians(self.azimuth), math.radians(self.elevation)
        flat = np.array([math.cos(azimuth), math.sin(azimuth), 0.0])
        forward = math.cos(elevation) * flat + np.array([0.0, 0.0, math.sin(elevation)])
        right = np.array([flat[1], -flat[0], 0.0])
        return forward, right, np.cross(right, forward)

    def project(self, point: Sequence[float] | np.ndarray) -> tuple[float, float]:
        """Return where a point is seen: shares of width and height from the upper left corner."""
        forward, right, up = self.axes()
        offset = np.asarray(point) - np.array(self.lookat) + self.distance * forward
        scale = 2 * math.tan(math.radians(self.fovy) / 2) * float(offset @ forward)
        return 0.5 + float(offset @ right) / scale, 0.5 - float(offset @ up) / scale

    def shift_to(self, point: Sequence[float] | np.ndarray, share: float) -> float:
        """Return how far along x a point has to move to be seen at a share of the width."""
        forward, right, _ = self.axes()
        offset = np.asarray(point) - np.array(self.lookat) + self.distance * forward
        slope = (share - 0.5) * 2 * math.tan(math.radians(self.fovy) / 2)
        # right . (offset + x) = slope * forward . (offset + x), solved for x.
        rest = slope * float(offset @ forward) - float(offset @ right)
        return rest / float(right[0] - slope * forward[0])


CAMERA = Camera()


def random(*keys: int | str) -> np.random.Generator:
    """Return numbers that depend on the keys alone, not on the order of work or the machine."""
    text = "/".join(map(str, keys)).encode()
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text).digest()[:8]))


def draw_look(seed: int, scene: str, index: int) -> tuple[str, str]:
    """Return colour and position number `index` of a scene: each pair of them equally often."""
    pairs = [(color, position) for color in COLORS for position in POSITIONS]
    turn = random(seed, scene, "look", index // len(pairs)).permutation(len(pairs))
    return pairs[int(turn[index % len(pairs)])]


def captions(
    task: str, color: str, position: str, rng: np.random.Generator, *, count: int = 4
) -> list[str]:
    """Return different sentences about a clip: the last one is short, the others tell all."""
    about, said = TASKS[task], list[str]()
    thing = SCENES[about.scene].thing
    while len(said) < count:
        last = len(said) == count - 1
        named = f"the {thing}" if last else f"the {color} {thing}"
        verb = about.phrases[int(rng.integers(len(about.phrases)))].format(named)
        subject = SUBJECTS[int(rng.integers(len(SUBJECTS)))]
        place = POSITIONS[position][int(rng.integers(len(POSITIONS[position])))]
        orders = (f"{subject} {verb}, {place}", f"{subject} {verb} {place}")
        text = f"{subject} {verb}" if last else orders[int(rng.integers(len(orders)))]
        if text not in said:
            said.append(text)
    return said


def joined_captions(
    parts: Sequence[str], color: str, position: str, rng: np.random.Generator, *, count: int = 4
) -> list[str]:
    """Return sentences about a clip in which one task follows another; the last one is short."""
    said = list[str]()
    thing = SCENES[TASKS[parts[0]].scene].thing
    while len(said) < count:
        last = len(said) == count - 1
        subject = SUBJECTS[int(rng.integers(len(SUBJECTS)))]
        place = POSITIONS[position][int(rng.integers(len(POSITIONS[position])))]
        clauses = []
        for number, part in enumerate(parts):
            phrases = TASKS[part].phrases
            named = f"the {thing}" if last else f"the {color} {thing}"
            clause = phrases[int(rng.integers(len(phrases)))].format("it" if number else named)
            clauses.append(clause + ("" if last or number else f", {place}"))
        text = f"{subject} " + ", then ".join(clauses)
        if text not in said:
            said.append(text)
    return said


def state_words(scene: str, states: Sequence[float]) -> list[str | None]:
    """Return how a thing stands, frame by frame; None where it is on its way."""
    words, values = list(SCENES[scene].states), np.array(list(SCENES[scene].states.values()))
    said = list[str | None]()
    for away in np.abs(np.asarray(states)[:, None] - values):
        near, next_near = np.argsort(away)[:2]
        apart = abs(values[near] - values[next_near])
        said.append(words[near] if away[near] < 0.35 * apart else None)
    return said


def jobs(episodes: int, long: int) -> Iterator[tuple[str, int]]:
    """Yield tasks and indices so that any beginning is balanced.

    Long clips are spread evenly among the others. They are called by the task of their first part,
    "long" before it.
    """
    singles = [(task, index) for index in range(episodes) for task in TASKS]
    starts = [f"long {task}" for pair in PAIRS for task in pair]
    # Both tasks of a scene begin a clip in turn, scenes change first.
    starts = starts[::2] + starts[1::2]
    done = 0
    for number, single in enumerate(singles, start=1):
        yield single
        while done * len(singles) < long * number:
            yield starts[done % len(starts)], done // len(starts)
            done += 1
    for rest in range(done, long):
        yield starts[rest % len(starts)], rest // len(starts)


def clip_name(task: str, index: int) -> str:
    """Return the path of a clip without its suffix."""
    if task.startswith("long "):
        return f"long/{index:05d}-{task.removeprefix('long ')}"
    return f"single/{index:05d}-{task}"
