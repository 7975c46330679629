"""The options of every command, and how they are read. No torch: help must be instant."""

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

KINDS = ("frame", "chunk:2", "key-detail:4", "multiscale:4,2,1", "cube:1x2x2")
Checkpoint = Annotated[str, arg(metavar="CHECKPOINT")]


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Generate a video from a sentence; Ctrl-C leaves what was finished so far."""

    prompt: Positional[Annotated[str, arg(metavar="PROMPT")]]
    """What to show."""
    units: str | None = None
    """Unit scheme, such as cube:1x2x2; this and others: the checkpoint's own by default."""
    seconds: float | None = None
    """Length of the video; 4 by default."""
    num_frames: int | None = None
    """Length in frames, instead of seconds."""
    seed: int = 0
    """Seed of the noise; the same seed gives the same video."""
    out: Path = Path("video.mp4")
    """File to write: .mp4, .mkv (lossless), .webp, .gif, .png (contact sheet)."""
    model: str = "toy"
    """Checkpoint: a bundled name or a folder."""
    num_inference_steps: int | None = None
    """Denoising steps per unit."""
    shift: float | None = None
    """Shift of the noise levels towards noise."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 for none, which is twice as fast."""
    negative_prompt: str | None = None
    """What guidance leads away from."""
    window: int | Literal["all"] | None = None
    """Latent frames that a unit may read, the sinks included."""
    sink: int | None = None
    """First latent frames that stay readable for ever."""
    lag: int | None = None
    """Steps between the starts of two units; the number of steps is one after the other."""
    threads: int | None = None
    """CPU threads."""
    report: Path | None = None
    """JSON file for the figures that are printed at the end."""
    force: bool = False
    """Replace the file if it exists."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a recipe, or go on with its run: `videoar train RECIPE --help` shows all its fields."""

    recipe: Positional[Annotated[str | None, arg(metavar="RECIPE")]] = None
    """A name, or package.module:function; fields of its configuration follow: --steps 100."""
    list: bool = False
    """List the recipes."""
    export: bool = False
    """Write the checkpoint of a run that is not finished, and train no further."""


@dataclass(frozen=True, kw_only=True)
class Info:
    """Say what a checkpoint is, how it was trained, and what memory it needs."""

    checkpoint: Positional[Checkpoint]
    """A bundled name or a folder."""
    seconds: float = 60.0
    """Length of the video to forecast."""
    window: int | None = None
    """Latent frames that a unit may read; the checkpoint's own by default."""


@dataclass(frozen=True, kw_only=True)
class DrawUnits:
    """Print how schemes cut a lattice into units, and draw it."""

    schemes: Positional[Annotated[tuple[str, ...], arg(metavar="SCHEME ...")]]
    """Such as frame, chunk:3, key-detail:4, multiscale:4,2,1, cube:1x2x2/wavefront."""
    frames: int = 8
    """Latent frames of the lattice."""
    height: int = 4
    """Rows of tokens."""
    width: int = 4
    """Columns of tokens."""
    window: int | None = None
    """Latent frames that a unit may read; all by default."""
    sink: int = 0
    """First latent frames that stay readable for ever."""
    steps: int = 4
    """Denoising steps per unit."""
    out: Path | None = None
    """Folder for order.png, mask.png and filling.webp, or units.webp with several schemes."""
    force: bool = False
    """Replace files that exist."""


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
    long_seconds: float = 0.0
    """Length of a video that shows whether cost and memory stay flat, 30 or more; 0: none."""
    uncached_seconds: float = 2.0
    """Length of the video that is also generated without a cache; 0: none."""
    num_inference_steps: int = 4
    """Denoising steps per unit."""
    repeats: int = 3
    """How often the short videos are generated."""
    threads: int | None = None
    """CPU threads."""
    out: Path | None = None
    """JSON file of the report."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Judge on the procedural world whether videos show what their prompts say, and go on to."""

    checkpoint: Positional[Checkpoint] = "toy"
    """A bundled name or a folder."""
    units: tuple[str, ...] = KINDS
    """Kinds of unit; differences are taken to the first."""
    num_prompts: int = 200
    """Prompts per kind."""
    seconds: float = 3.0
    """Length of the videos: 2 to 4."""
    long_prompts: int = 0
    """Prompts per kind for long videos, which show drift; 0: none."""
    long_seconds: float = 60.0
    """Length of the long videos."""
    seed: int = 0
    """Of the scenes; video i has the seed `seed + i`."""
    batch_size: int = 16
    """Videos that are generated side by side."""
    num_inference_steps: int | None = None
    """Denoising steps per unit; this and the next two: the checkpoint's own by default."""
    shift: float | None = None
    """Shift of the noise levels towards noise."""
    guidance_scale: float | None = None
    """Classifier-free guidance."""
    out: Path | None = None
    """JSON file with the scores of every video; kinds that it holds are not computed again."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Generate a minute of video, and one prompt under all five kinds of unit."""

    out: Path = Path("demo")
    """Folder; the files of an earlier demo in it are replaced."""
    model: str = "toy"
    """Checkpoint: a bundled name or a folder."""
    seconds: float = 60.0
    """Length of the long video."""


def read(kind: type, words: Sequence[str], *, prog: str, default: Any = None) -> Any:
    """Read options into a dataclass; tyro's boxes become sentences."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            options, unknown = tyro.cli(
                kind,
                args=words,
                prog=prog,
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.FlagCreatePairsOff,),
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = (line.strip(" │") for line in box.getvalue().splitlines()[1:-1])
        text = re.split(r" ?(?:─{3,}|Got errors:)", " ".join(filter(None, lines)))[0].rstrip(".")
        raise ValueError(f"{text} (see `{prog} --help`)") from stop
    if unknown:
        name = next((word for word in unknown if word.startswith("-")), unknown[0])
        close = hint(name.partition("=")[0].replace("_", "-"), _names(default or kind))
        raise ValueError(f"unknown option {name!r}{close} (see `{prog} --help`)")
    return options


def _names(options: Any, prefix: str = "--") -> Iterator[str]:
    """Yield the options of a dataclass, those of nested ones after a dot."""
    for field in dataclasses.fields(options):
        name, value = prefix + field.name.replace("_", "-"), getattr(options, field.name, None)
        yield from _names(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]


def hint(word: str, known: Iterable[str]) -> str:
    """Return the known word that is closest, as the end of a sentence; nothing if none is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
