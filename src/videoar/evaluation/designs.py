"""Designs of studies: what is compared. Those of `designs.json` are shipped; a file is the same."""

import itertools
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from videoar.checks import Count, Natural, Options, check, explained, hint, import_extra, typed
from videoar.evaluation.judge import MIN_SECONDS
from videoar.evaluation.options import ONCE, Prompts, Study
from videoar.files import Json
from videoar.generation.config import scheme_of


@dataclass(frozen=True, kw_only=True)
class Design(Options):
    """What is compared, and on how many videos; where a field is empty, checkpoints say it."""

    about: str = ""
    """The question, for the report."""
    checkpoints: Annotated[tuple[str, ...], ONCE] = ("toy",)
    """As `NAME=CHECKPOINT,CHECKPOINT`, see `videoar study --help`."""
    at_least: int = 1
    """Fewer checkpoints make no such study."""
    units: Annotated[tuple[str, ...], ONCE] = ()
    """Kinds of unit; the first is what others are compared with."""
    steps: tuple[Count, ...] = ()
    """Denoising steps; kinds of unit are compared at each."""
    equal: tuple[Literal["passes", "seconds"], ...] = ()
    """What is made equal among kinds of unit by their number of steps."""
    budget: Count = 4
    """Steps of the first kind of unit, whose cost the others get."""
    windows: Annotated[tuple[int | Literal["all"], ...], ONCE] = ()
    """Latent frames that a unit may read, the sinks included."""
    sinks: tuple[int, ...] = ()
    """First latent frames that stay readable for ever."""
    num_prompts: Prompts = 96
    seeds: Count = 2
    """Videos per prompt."""
    seconds: float = 1.8
    """Length of the videos."""
    keep: Natural = 4
    """Prompts of which the videos are kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        enough, fits = len(self.checkpoints) >= self.at_least, not self.equal or bool(self.units)
        check("checkpoints", self.checkpoints, enough, f"{self.at_least} or more")
        check("equal", self.equal, fits, "units beside it, or leave it empty")
        read = MIN_SECONDS <= self.seconds < 36000
        check("seconds", self.seconds, read, "1.5 or more, as the judge needs")
        for name in self.units:
            scheme_of(name)

    def cells(self) -> list[Json]:
        """Return what is overridden in each cell of the design but for the steps."""
        windows = tuple(None if window == "all" else window for window in self.windows)
        factors = {"units": self.units, "window_frames": windows, "sink_frames": self.sinks}
        named = {name: values for name, values in factors.items() if values}
        return [dict(zip(named, cell, strict=True)) for cell in itertools.product(*named.values())]


QUICK: dict[str, Any] = {"num_prompts": 12, "seeds": 1, "seconds": 9.0, "keep": 2}
"""The most that `--quick` leaves of what a design asks for, or its default."""


def shipped() -> dict[str, Json]:
    """Return the designs that are shipped, by name."""
    return json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))


def find(config: Study) -> Design:
    """Return the design that is asked for, with what else is said.

    Raises:
        ValueError: there is none of this name, or the file holds none.
    """
    path, known = Path(config.design), shipped()
    if config.design in known:
        chosen = known[config.design]
    elif path.suffix in (".json", ".yaml", ".yml") and path.is_file():
        chosen = _read(path)
    else:
        close = hint(config.design, known)
        raise ValueError(
            f"no study is called {config.design!r}: use one of {', '.join(known)}, or a .json or"
            f" .yaml file that is there{close}"
        )
    changes: dict[str, Any] = {"checkpoints": config.checkpoint, "units": config.units}
    changes |= {name: getattr(config, name) for name in ("num_prompts", "seeds", "seconds")}
    chosen |= {name: value for name, value in changes.items() if value not in (None, ())}
    for name, most in QUICK.items() if config.quick else ():
        chosen[name] = min(most, chosen.get(name, getattr(Design, name)))
    return Design(**typed(Design, chosen))


def _read(path: Path) -> Json:
    text = path.read_text(encoding="utf-8")
    with explained(f"{path} cannot be read: {{}}", Exception):  # those of YAML are no ValueError
        if path.suffix == ".json":
            value = json.loads(text)
        else:
            value = import_extra("yaml", "YAML needs PyYAML ({}): install it.").safe_load(text)
    known = [field.name for field in fields(Design)]
    if not isinstance(value, dict) or (new := value.keys() - set(known)):
        named = f" ({', '.join(sorted(new))})" if isinstance(value, dict) else ""
        raise ValueError(f"{path} holds no design{named}: write some of {', '.join(known)}")
    return value
