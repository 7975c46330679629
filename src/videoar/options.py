"""The options of every command, and how they are read. No torch: help must be instant."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

KINDS = ("frame", "chunk:2", "key-detail:4", "multiscale:4,2,1", "cube:1x2x2")
WINDOW_SECONDS = 4.0  # of the first and last window in which long videos are judged
Checkpoint = Annotated[str, arg(metavar="CHECKPOINT")]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What may be said of a checkpoint beside its name: see docs/wan.md."""

    base: str | None = None
    """Folder or Hugging Face repository with the codec and text encoder, for files of weights."""
    lora: Path | None = None
    """File of low-rank updates to merge."""
    preset: str | None = None
    """Family whose settings are the defaults: wan, rcm, self-forcing, causvid, longlive, ..."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision; as it is stored by default."""


@dataclass(frozen=True, kw_only=True)
class Generate(Weights):
    """Generate a video from a sentence; Ctrl-C leaves what was finished so far."""

    prompt: Positional[Annotated[str, arg(metavar="PROMPT")]]
    """What to show."""
    units: str | None = None
    """Unit scheme, such as cube:1x2x2; this and others: the checkpoint's own by default."""
    image: Path | None = None
    """Picture to begin with."""
    video: Path | None = None
    """Video to go on from; its frames come first in the result."""
    keep: float | None = None
    """Seconds of it to go on after; all by default."""
    fit: Literal["crop", "letterbox"] = "crop"
    """How a picture or video of another shape is brought to the model's size."""
    seconds: float | None = None
    """Length of the video, what is kept included; by default 4 more than that."""
    num_frames: int | None = None
    """Length in frames, instead of seconds."""
    seed: int = 0
    """Seed of the noise; the same seed gives the same video."""
    out: Path = Path("video.mp4")
    """File to write: .mp4, .mkv (lossless), .webp, .gif, .png (contact sheet)."""
    model: str = "toy"
    """Checkpoint: a bundled name, a folder, a file, or a Hugging Face repository."""
    codec: str | None = None
    """Another codec: a checkpoint, or a file such as taew2_1.pth."""
    height: int | None = None
    """Rows of pixels."""
    width: int | None = None
    """Columns of pixels."""
    device: str = "cpu"
    """Where to compute, such as cuda."""
    offload: bool = False
    """Keep transformer and text encoder on the host, but for the layer that computes."""
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
class Distill(Train):
    """Distil a teacher into few steps: as `train`, for the recipes that do this."""


@dataclass(frozen=True, kw_only=True)
class Convert(Weights):
    """Write a checkpoint in another format, with every tensor accounted for."""

    source: Positional[Annotated[str, arg(metavar="SOURCE")]]
    """Checkpoint of any format; FILE#ENTRY picks an entry of a file."""
    target: Positional[Annotated[Path, arg(metavar="TARGET")]]
    """Folder to write."""
    format: Literal["videoar", "diffusers", "wan"] = "videoar"
    """Ours, that of diffusers, or the transformer alone under the names of the original."""
    force: bool = False
    """Replace the folder if it is a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Info(Weights):
    """Say what a checkpoint is, how it was trained, and what memory it needs."""

    checkpoint: Positional[Checkpoint]
    """A bundled name, a folder, a file, or a Hugging Face repository."""
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

    def __post_init__(self) -> None:
        long = self.long_seconds == 0 or 30 <= self.long_seconds < math.inf
        _check(
            self,
            ("units", len(self.units) > 0, "at least one kind"),
            ("seconds", 0 < self.seconds < math.inf, "a positive number, such as 20"),
            ("long_seconds", long, "0, or 30 or more"),
            ("uncached_seconds", 0 <= self.uncached_seconds < math.inf, "0 or more"),
            ("num_inference_steps", self.num_inference_steps >= 1, "1 or more"),
            ("repeats", self.repeats >= 1, "1 or more"),
            ("threads", self.threads is None or self.threads >= 1, "1 or more"),
        )


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Turn a folder of videos and captions into latents to train on; goes on where it stopped."""

    videos: Positional[Annotated[Path, arg(metavar="VIDEOS")]]
    """Folder with video files, folders of pictures, WebDataset tars."""
    latents: Positional[Annotated[Path, arg(metavar="LATENTS")]]
    """Folder to write."""
    codec: str = "toy-base"
    """Checkpoint whose codec encodes: a bundled name or a folder."""
    captions: Literal["auto", "none"] = "auto"
    """From metadata.jsonl, metadata.csv, .txt beside the video or in the tar; none: without."""
    fps: float = 16.0
    """Frames per second of the clips."""
    num_frames: tuple[int, ...] = (61, 29)
    """Lengths of clips, 1 + 4k: the longest, and shorter ones for what is left of a scene."""
    stride: int | None = None
    """Frames from one clip to the next; by default the longest length."""
    sizes: tuple[str, ...] = ("64x64",)
    """Widths and heights of clips; each video is cropped to the one of nearest shape."""
    scene_cut: float | None = None
    """Mean change of a pixel, from 0 to 1, that ends a scene, such as 0.1; none is looked for."""
    picture_fps: float | None = None
    """Pictures per second in folders of pictures; `fps` by default."""
    held_out: float = 0.05
    """Share of the videos that are kept out of training, to evaluate on; two clips or more."""
    max_seconds: float = 14400.0
    """What is later in a video is not used."""
    timeout: float = 120.0
    """Seconds without a clip or a latent frame after which a video is given up."""
    workers: int | None = None
    """Processes; by default one per core."""
    device: str = "cpu"
    """Where to encode."""
    engine: Literal["local", "ray"] = "local"
    """Processes of this machine, or Ray Data (extra `dist`) on many that share the folders."""

    def __post_init__(self) -> None:
        _check(
            self,
            ("fps", 0 < self.fps <= 240, "a number above 0, up to 240"),
            ("num_frames", min(self.num_frames, default=0) > 1, "lengths above 1, such as 61"),
            ("stride", self.stride is None or self.stride >= 1, "1 or more"),
            ("sizes", self.pixels is not None, "widths and heights, such as 64x64 96x64"),
            ("scene_cut", self.scene_cut is None or 0 < self.scene_cut < 1, "between 0 and 1"),
            ("picture_fps", 0 < (self.picture_fps or 1) <= 240, "a number above 0, up to 240"),
            ("held_out", 0 <= self.held_out <= 0.5, "0 to 0.5"),
            ("max_seconds", self.max_seconds > 0, "a number above 0"),
            ("timeout", 0 < self.timeout < math.inf, "a number above 0"),
            ("workers", self.workers is None or self.workers >= 1, "1 or more"),
        )

    @property
    def pixels(self) -> list[tuple[int, int]] | None:
        """Return the sizes as numbers; None if one of them is none."""
        found = [re.fullmatch(r"([1-9]\d{1,3})x([1-9]\d{1,3})", size) for size in self.sizes]
        return [(int(m[1]), int(m[2])) for m in found if m] if found and all(found) else None


@dataclass(frozen=True, kw_only=True)
class BenchPrepare:
    """Measure what preparation costs beside decoding the same videos, and the loader."""

    videos: Positional[Annotated[Path, arg(metavar="VIDEOS")]]
    """Folder with video files."""
    codec: str = "toy-base"
    """Checkpoint whose codec encodes."""
    fps: float = 16.0
    """Frames per second of the clips."""
    num_frames: tuple[int, ...] = (61, 29)
    """Lengths of clips."""
    sizes: tuple[str, ...] = ("64x64",)
    """Widths and heights of clips."""
    repeats: int = 3
    """How often the videos are read."""
    weights: bool = False
    """Also load 2.6 GiB of random weights, which are made for it and deleted."""

    def __post_init__(self) -> None:
        _check(self, ("repeats", self.repeats >= 1, "1 or more"))


@dataclass(frozen=True, kw_only=True)
class BenchDistill:
    """Measure what the parts of a step of distillation cost."""

    checkpoint: Positional[Checkpoint] = "toy"
    """Network that plays teacher, critic and student."""
    units: str = "cube:1x2x2"
    """Kind of unit."""
    batch_size: int = 16
    """Videos per batch."""
    latent_frames: int = 8
    """Their length."""
    size: int = 64
    """Their height and width in pixels."""
    repeats: int = 5
    """How often each part is timed."""
    threads: int | None = None
    """CPU threads."""

    def __post_init__(self) -> None:
        names = ("batch_size", "latent_frames", "size", "repeats")
        _check(self, *((name, getattr(self, name) >= 1, "1 or more") for name in names))


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
    data: Path | None = None
    """Prepared videos: measure reconstruction and loss on what they hold out, and nothing else."""

    def __post_init__(self) -> None:
        _check(
            self,
            ("units", 0 < len(self.units) == len(set(self.units)), "one or more kinds, none twice"),
            ("num_prompts", self.num_prompts >= 2, "2 or more, as an interval needs"),
            ("long_prompts", self.long_prompts == 0 or self.long_prompts >= 2, "0, or 2 or more"),
            ("seconds", 2 <= self.seconds <= WINDOW_SECONDS, "2 to 4, as the judge needs"),
            ("long_seconds", 2 * WINDOW_SECONDS <= self.long_seconds < math.inf, "8 or more"),
            ("seed", self.seed >= 0, "0 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
        )


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Judge checkpoints beside each other on the procedural world, in pairs and with intervals."""

    entries: Positional[tuple[Annotated[str, arg(metavar="NAME=CHECKPOINT")], ...]]
    """What is compared; NAME=A,B,C are checkpoints that differ in their seed of training."""
    units: str | None = None
    """Kind of unit of all; each checkpoint's own by default."""
    num_prompts: int = 96
    """Prompts."""
    seeds: int = 2
    """Videos per prompt."""
    seconds: float = 1.8
    """Length of the videos."""
    long_prompts: int = 0
    """Prompts for long videos, which show drift; 0: none."""
    long_seconds: float = 60.0
    """Length of the long videos."""
    seed: int = 0
    """Of the scenes and of the noise."""
    batch_size: int = 16
    """Videos that are generated side by side."""
    out: Path | None = None
    """JSON file with the scores of every video; what it holds is not computed again."""

    def __post_init__(self) -> None:
        _check(
            self,
            ("entries", len(self.entries) > 0, "one or more, such as toy"),
            ("num_prompts", self.num_prompts >= 2, "2 or more, as an interval needs"),
            ("seeds", self.seeds >= 1, "1 or more"),
            ("seconds", 1.5 <= self.seconds <= WINDOW_SECONDS, "1.5 to 4, as the judge needs"),
            ("long_prompts", self.long_prompts == 0 or self.long_prompts >= 2, "0, or 2 or more"),
            ("long_seconds", 2 * WINDOW_SECONDS <= self.long_seconds < math.inf, "8 or more"),
            ("seed", self.seed >= 0, "0 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
        )


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Generate a minute of video, and one prompt under all five kinds of unit."""

    out: Path = Path("demo")
    """Folder; the files of an earlier demo in it are replaced."""
    model: str = "toy"
    """Checkpoint: a bundled name or a folder."""
    seconds: float = 60.0
    """Length of the long video."""


def _check(options: Any, *rules: tuple[str, bool, str]) -> None:
    """Raise for the first field whose rule does not hold; a rule ends in what to use instead."""
    for name, right, remedy in rules:
        if not right:
            raise ValueError(f"{name} is {getattr(options, name)}: use {remedy}.")
