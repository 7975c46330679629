"""The options of what is measured. No torch."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from videoar.checks import Count, Finite, Limit, Natural, Options, check_options
from videoar.core.schemes import KINDS
from videoar.data.options import ALL, Turn

Checkpoint = Annotated[str, arg(metavar="CHECKPOINT")]


ONCE = Limit(lambda names: len(set(names)) == len(names), "each once, none twice")
Prompts = Annotated[int, Limit(lambda count: count >= 2, "2 or more, as an interval needs")]
Names = Annotated[
    tuple[str, ...],
    Limit(lambda names: 0 < len(names) == len(set(names)), "one or more, none twice"),
]


SHAPE_KINDS = ("frame", "chunk:3", "cube:3x15x13", "cube:3x5x13", "cube:1x5x13")


@dataclass(frozen=True, kw_only=True)
class Bench(Options):
    """Measure speed and memory, end to end, for every kind of unit, and passes beside others'."""

    checkpoint: Positional[Checkpoint] = "toy"
    """A bundled name or a folder."""
    shape: Literal["wan-1.3b"] | None = None
    """Instead of a checkpoint random weights of this shape, 15 x 26 tokens a frame, a window of 6
    latent frames, in float32 and bfloat16: passes alone."""
    layers: Count | None = None
    """Of the shape; 2 by default."""
    units: tuple[str, ...] = ()
    """Kinds of unit; none: those that most models know, or frame, chunk:3 and cubes of a shape."""
    prompt: str = "a large red ball moves left on a black background"
    """What is generated."""
    seconds: Finite = 20.0
    """Length of the video that is timed."""
    num_inference_steps: Count | None = None
    """Denoising steps per unit; by default the checkpoint's own, and 4 of a shape."""
    repeats: Count = 3
    """How often the videos are generated, and passes are timed."""
    threads: Count | None = None
    """CPU threads."""
    out: Path | None = None
    """JSON file of the report."""

    def __post_init__(self) -> None:
        super().__post_init__()
        idle = ("layers",) if self.shape is None else ("checkpoint", "prompt", "seconds")
        says = "it with --shape" if self.shape is None else "it without --shape"
        rules = [(name, getattr(self, name) == getattr(Bench, name), says) for name in idle]
        check_options(self, *rules)


@dataclass(frozen=True, kw_only=True)
class Judged(Options):
    """What may be said of a study, whoever makes its videos."""

    seed: Natural = 0
    """Of the scenes and of the noise; video i has the seed `seed + i`."""
    batch_size: Count = 16
    """Videos that are generated side by side."""
    judge: str | None = None
    """Checkpoint of `videoar train judge`; by default the judge that the checkpoint brings along,
    or that of the procedural world."""
    footage: Path | None = None
    """Labelled videos of a judge that was trained; those held out are asked for."""
    nearest: Path | None = None
    """Latents that were trained on: the nearest clip of them is shown beside each video, and how
    much nearer it is than to real clips. A study that is finished can be given it, too."""
    out: Path = Path("study")
    """Folder of the report, the figures and the videos; what it holds is kept, and goes on."""
    share: Turn = ALL
    """K/N in the K-th of N processes that share the folder, on one machine or several; torchrun
    says it by itself. Who is last writes the report."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(Judged):
    """Judge whether videos show what their prompts say, and go on to: a study of one checkpoint."""

    checkpoint: Positional[Checkpoint] = "toy"
    """A bundled name or a folder."""
    units: tuple[str, ...] = ()
    """Kinds of unit, by default those it was trained on; differences are taken to the first."""
    num_prompts: Prompts = 200
    """Prompts per kind."""
    seconds: float = 3.0
    """Length of the videos; from 8 on, their last 4 s are compared with the first."""
    num_inference_steps: int | None = None
    """Denoising steps per unit; this and the next two: the checkpoint's own by default."""
    shift: float | None = None
    """Shift of the sigmas towards noise."""
    guidance_scale: float | None = None
    """Classifier-free guidance."""


@dataclass(frozen=True, kw_only=True)
class Study(Judged):
    """Compare units, or checkpoints, by a design: videos, figures, statistics, one report."""

    design: Positional[Annotated[str, arg(metavar="NAME|FILE")]]
    """One that is shipped: units, sizes, orders, critics, context, long, checkpoints; or one of
    your own, .json or .yaml."""
    checkpoint: tuple[Annotated[str, arg(metavar="NAME=CHECKPOINT")], ...] = ()
    """What makes the videos, `toy` by default; fields of the sampling may follow, as in
    `toy?guidance_scale=1`; NAME=A,B,C are checkpoints that differ in their seed of training."""
    quick: bool = False
    """A small version of the design: few prompts, one video each, no more than 9 seconds."""
    units: tuple[str, ...] = ()
    """Kinds of unit; this and the next three: those of the design by default."""
    num_prompts: Prompts | None = None
    """Prompts."""
    seeds: int | None = None
    """Videos per prompt."""
    seconds: float | None = None
    """Length of the videos."""


@dataclass(frozen=True, kw_only=True)
class HeldOut(Options):
    """Measure codec and generators, in pairs, on the clips that prepared videos hold out."""

    checkpoints: Positional[Annotated[Names, arg(metavar="CHECKPOINT ...")]] = ("toy",)
    """Bundled names or folders, one or more of one codec."""
    data: Path
    """Folder of prepared videos."""
    units: Names | None = None
    """Kinds of unit, by default those it was trained on; differences are taken to the first."""
    seed: Natural = 0
    """Of the noise."""
    out: Path | None = None
    """JSON file with the figures of every clip; it must not exist."""


@dataclass(frozen=True, kw_only=True)
class VBench(Options):
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
    limit: Count | None = None
    """Only the first prompts of every dimension, so many, to try it."""
    seed: Natural = 0
    """Video j of prompt i, both from 0, has the seed 100000 * i + j + this; VBench fixes none."""


@dataclass(frozen=True, kw_only=True)
class VBenchScore(VBench):
    """Have VBench score the videos of a run, dimension by dimension; goes on where it stopped."""

    folder: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of the run; its videos are in `videos`, named as VBench names them."""
    device: str = "cpu"
    """Where VBench computes, such as cuda."""
    timeout: Finite = 21600.0
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


@dataclass(frozen=True, kw_only=True)
class PrintUnits(Options):
    """Print how schemes cut a lattice into units: how many, how large, and what they cost."""

    schemes: Positional[Annotated[tuple[str, ...], arg(metavar="SCHEME ...")]] = ()
    """Such as frame, chunk:3, key-detail:4, multiscale:4,2,1, cube:1x2x2/wavefront."""
    frames: int = 8
    """Latent frames of the lattice."""
    height: int = 4
    """Rows of tokens."""
    width: int = 4
    """Columns of tokens."""
    model: str | None = None
    """Checkpoint whose steps, window and sinks are the defaults; 4 and all without."""
    window: int | None = None
    """Latent frames that a unit may read."""
    sink: int | None = None
    """First latent frames that stay readable for ever."""
    steps: Count | None = None
    """Denoising steps per unit."""
    first_steps: tuple[int, ...] | None = None
    """Steps of the first units, if they need more."""
    schedule: int | float | str | None = None
    """Draw the matrix of sigmas: rows between the starts of two waves, or a name, as rolling."""
    search: Annotated[tuple[str, Path] | None, arg(metavar="CHECKPOINT CLIPS")] = None
    """Find the partitions of --frames that cost a checkpoint least on prepared videos, for every
    number of passes; the schemes, by default its own, are what they are made of."""
    clips: Annotated[int, Limit(lambda count: count >= 4, "4 or more")] = 32
    """Clips that are searched on."""
    draws: Annotated[int, Limit(lambda count: count >= 2, "2 or more")] = 4
    """Videos of every clip."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.schemes and self.search is None:
            raise ValueError(f"no scheme is given: name one or more, such as {' '.join(KINDS)}")

    @property
    def changes(self) -> dict[str, Any]:
        """Fields of `GenerationConfig` that are given."""
        given = {"num_inference_steps": self.steps, "first_steps": self.first_steps}
        given |= {"window_frames": self.window, "sink_frames": self.sink, "lag": self.schedule}
        return {name: value for name, value in given.items() if value is not None}
