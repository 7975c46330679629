"""What a viewer and the server say to each other, as JSON between fragments of video. No torch.

A viewer sends `Control`, the server answers with `Event`. After each `Begin` the binary messages
are one fragmented MP4, its head first: what came before is of another way, and forgotten.
"""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Model:
    """What can be asked for."""

    prompts: list[str]
    """Some that the model was trained with, if it says."""
    kinds: list[str]
    """Units that the model was trained with, or some, if it does not say."""
    units: str
    """Those without another word, as the steps are."""
    num_inference_steps: int
    height: int
    width: int
    fps: int


@dataclass(frozen=True, kw_only=True)
class Start:
    """Begin a session, or begin it anew; None: as the checkpoint says."""

    type: Literal["start"] = "start"
    prompt: str
    units: str | None = None
    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    given: bool = False
    """Whether it begins with the picture or clip that was sent before."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """Ask for something else from the next unit on: see `Generation.change`."""

    type: Literal["change"] = "change"
    id: int = 0
    """Comes back in `Changed`."""
    prompt: str | None = None
    units: str | None = None
    seed: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    recompute: bool | None = None
    over: int = 1


@dataclass(frozen=True, kw_only=True)
class Pause:
    """Stop, or go on."""

    type: Literal["pause"] = "pause"
    paused: bool


@dataclass(frozen=True, kw_only=True)
class Seek:
    """Go back to a moment, in seconds of the session."""

    type: Literal["seek"] = "seek"
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Say what was played since `Begin`: the server stays a little ahead of that, and no more."""

    type: Literal["seen"] = "seen"
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Ask for another session that goes on from here on its own: `Branched` names it."""

    type: Literal["branch"] = "branch"


Control = Start | Change | Pause | Seek | Seen | Branch


@dataclass(frozen=True, kw_only=True)
class Begin:
    """A new way begins: the video of it follows."""

    type: Literal["begin"] = "begin"
    mime: str
    """For MediaSource."""
    seconds: float
    """Where it begins in the session."""
    oldest: float
    """The oldest moment to which one can go back."""
    fps: int
    width: int
    height: int
    lattice: tuple[int, int]
    """Rows and columns of tokens."""
    prompt: str
    units: str
    seed: int
    num_inference_steps: int
    notes: list[str]
    """What of this the model's training did not know, in sentences."""


@dataclass(frozen=True, kw_only=True)
class Computed:
    """A unit is computed. Cells are runs (frame, row, first column, last column, level)."""

    type: Literal["unit"] = "unit"
    index: int
    cells: list[list[int]]
    next: list[list[int]]
    """Cells of the unit that comes now."""
    cached: list[list[int]]
    """Cells whose keys later units read."""
    seconds: float
    """Video so far."""
    unit_ms: float
    fps: float
    """Frames per second of computing, this session alone."""
    units: str
    cache_bytes: int
    process_bytes: int


@dataclass(frozen=True, kw_only=True)
class Changed:
    """The fragment that follows is the first that a change shows in."""

    type: Literal["changed"] = "changed"
    ids: list[int]
    ms: float
    """Since the server had it."""
    notes: list[str]
    """As in `Begin`."""


@dataclass(frozen=True, kw_only=True)
class Branched:
    """The branch that was asked for."""

    type: Literal["branched"] = "branched"
    session: str


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A sentence: what was asked for cannot be, and all stays as it was."""

    type: Literal["refused"] = "refused"
    message: str
    id: int = 0
    fatal: bool = False
    """Whether the session is over."""


Event = Begin | Computed | Changed | Branched | Refused


def plain(message: Any) -> dict[str, Any]:
    """Return a message as JSON values, without what is not said."""
    return {name: value for name, value in vars(message).items() if value is not None}
