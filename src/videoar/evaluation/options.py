"""The options of what is measured. No torch."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from videoar.checks import check_options, check_positive
from videoar.core.schemes import KINDS
from videoar.evaluation.lengths import MIN_SECONDS, WINDOW_SECONDS

Checkpoint = Annotated[str, arg(metavar="CHECKPOINT")]


def distinct(names: tuple[str, ...]) -> bool:
    """Say whether there are names, and none twice."""
    return 0 < len(names) == len(set(names))


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure speed and memory, end to end, for every kind of unit."""

    checkpoint: Positional[Checkpoint] = "toy"
    """A bundled name or a folder."""
    units: tuple[str, ...] = KINDS
    """Kinds of unit."""
    prompt: str = "a large red ball moves left on a black background"
    """What is generated."""
    seconds: float = 20.0
    """Length of the video that is timed."""
    num_inference_steps: int | None = None
    """Denoising steps per unit; by default the checkpoint's own."""
    repeats: int = 3
    """How often the short videos are generated."""
    threads: int | None = None
    """CPU threads."""
    out: Path | None = None
    """JSON file of the report."""

    def __post_init__(self) -> None:
        check_positive(self, "seconds")
        least = {"num_inference_steps": 1, "repeats": 1, "threads": 1}
        check_options(self, ("units", len(self.units) > 0, "at least one kind"), least=least)


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """What may be said of videos that are judged, whoever makes them."""

    long_prompts: int = 0
    """Prompts for long videos, which show drift; 0: none."""
    long_seconds: float = 60.0
    """Length of the long videos."""
    seed: int = 0
    """Of the scenes and of the noise; video i has the seed `seed + i`."""
    batch_size: int = 16
    """Videos that are generated side by side."""
    judge: str | None = None
    """Checkpoint of `videoar train judge`; by default the judge that the checkpoint brings along,
    or that of the procedural world."""
    footage: Path | None = None
    """Labelled videos of a judge that was trained; those held out are asked for."""
    out: Path | None = None
    """JSON file with all scores; what it holds is kept, and other settings are refused."""

    def check(self, *rules: tuple[str, bool, str]) -> None:
        """Raise for the first field whose rule does not hold, here or in `rules`."""
        check_options(
            self,
            *rules,
            ("long_prompts", self.long_prompts == 0 or self.long_prompts >= 2, "0, or 2 or more"),
            ("long_seconds", 2 * WINDOW_SECONDS <= self.long_seconds < math.inf, "8 or more"),
            least={"seed": 0, "batch_size": 1},
        )


@dataclass(frozen=True, kw_only=True)
class Evaluate(StudyOptions):
    """Judge whether videos show what their prompts say, and go on to."""

    checkpoint: Positional[Checkpoint] = "toy"
    """A bundled name or a folder."""
    units: tuple[str, ...] | None = None
    """Kinds of unit, by default those it was trained on; differences are taken to the first."""
    num_prompts: int = 200
    """Prompts per kind."""
    seconds: float = 3.0
    """Length of the videos: 2 to 4."""
    num_inference_steps: int | None = None
    """Denoising steps per unit; this and the next two: the checkpoint's own by default."""
    shift: float | None = None
    """Shift of the sigmas towards noise."""
    guidance_scale: float | None = None
    """Classifier-free guidance."""

    def __post_init__(self) -> None:
        self.check(
            ("units", self.units is None or distinct(self.units), "one or more kinds, none twice"),
            ("num_prompts", self.num_prompts >= 2, "2 or more, as an interval needs"),
            ("seconds", 2 <= self.seconds <= WINDOW_SECONDS, "2 to 4, as the judge needs"),
        )


@dataclass(frozen=True, kw_only=True)
class Compare(StudyOptions):
    """Judge checkpoints beside each other, in pairs and with intervals."""

    entries: Positional[tuple[Annotated[str, arg(metavar="NAME=CHECKPOINT")], ...]]
    """What is compared; NAME=A,B,C are checkpoints that differ in their seed of training."""
    units: str | None = None
    """Kind of unit of all; each checkpoint's own by default."""
    num_prompts: int = 96
    """Prompts."""
    seeds: int = 2
    """Videos per prompt."""
    seconds: float = 1.8
    """Length of the videos: 1.5 to 4."""

    def __post_init__(self) -> None:
        right = MIN_SECONDS <= self.seconds <= WINDOW_SECONDS
        self.check(
            ("entries", len(self.entries) > 0, "one or more, such as toy"),
            ("num_prompts", self.num_prompts >= 2, "2 or more, as an interval needs"),
            ("seeds", self.seeds >= 1, "1 or more"),
            ("seconds", right, "1.5 to 4, as the judge needs"),
        )


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Measure codec and generators, in pairs, on the clips that prepared videos hold out."""

    checkpoints: Positional[tuple[Checkpoint, ...]] = ("toy",)
    """Bundled names or folders, one or more of one codec."""
    data: Path
    """Folder of prepared videos."""
    units: tuple[str, ...] | None = None
    """Kinds of unit, by default those it was trained on; differences are taken to the first."""
    seed: int = 0
    """Of the noise."""
    out: Path | None = None
    """JSON file with the figures of every clip; it must not exist."""

    def __post_init__(self) -> None:
        check_options(
            self,
            ("units", self.units is None or distinct(self.units), "one or more kinds, none twice"),
            ("checkpoints", distinct(self.checkpoints), "one or more, none twice"),
            ("seed", self.seed >= 0, "0 or more"),
        )


@dataclass(frozen=True, kw_only=True)
class VBench:
    """Where VBench is, and what of it is asked for."""

    python: Path = Path(sys.executable)
    """Python of the environment in which `vbench` is installed."""
    info: Path | None = None
    """Its list of prompts, VBench_full_info.json; by default that of the package."""
    dimensions: tuple[str, ...] = ()
    """Only these, such as temporal_flickering; all 16 by default."""


@dataclass(frozen=True, kw_only=True)
class Suite(VBench):
    """List the videos that VBench asks for, as `generate --prompts` reads them."""

    extended: Path | None = None
    """Longer prompts to generate from: a line for each of the list, in its order."""
    limit: int | None = None
    """Only the first prompts of every dimension, so many, to try it."""
    seed: int = 0
    """Video j of prompt i, both from 0, has the seed 100000 * i + j + this; VBench fixes none."""


@dataclass(frozen=True, kw_only=True)
class VBenchScore(VBench):
    """Have VBench score the videos of a run, dimension by dimension; goes on where it stopped."""

    folder: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of the run; its videos are in `videos`, named as VBench names them."""
    device: str = "cpu"
    """Where VBench computes, such as cuda."""
    timeout: float = 21600.0
    """Seconds after which a dimension is given up."""
    static_filter: bool = False
    """Score temporal flickering on the first 5 still videos of a prompt, as published scores are;
    it takes a GPU."""


@dataclass(frozen=True, kw_only=True)
class VBenchTable:
    """Print the scores of a run, their protocol, and what differs from another run."""

    folder: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of the run."""
    against: Path | None = None
    """Folder of another run, that is subtracted prompt by prompt."""
