"""Options of commands; those of preparation and measurements lie in their rooms. No torch."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from videoar.checks import Count, Finite, Limit, Options
from videoar.data.options import ALL, Turn
from videoar.evaluation.options import Checkpoint, Suite


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(Options):
    """What may be said of a checkpoint beside its name: see docs/wan.md."""

    base: str | None = None
    """Folder or Hugging Face repository with the codec and text encoder, for files of weights."""
    lora: UseAppendAction[tuple[str, ...]] = ()
    """File of low-rank updates to merge, FILE or FILE=STRENGTH; once for each."""
    preset: str | None = None
    """Family whose settings are the defaults: wan, rcm, self-forcing, causvid, longlive, ..."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision; as it is stored by default."""


# What an option of `generate` leaves no room for, and why; and what others are nothing without.
CLASHES = {
    "prompts": ("makes a video of each line", {"prompt", "prompt_at", "script", "save_state"}),
    "seconds": ("is the length", {"num_frames"}),
    "image": ("is how the video begins", {"video"}),
}
MACHINE = ("device", "offload", "graphs", "compile")
"""How a machine computes, whatever the video."""
NEEDS = {"keep": {"video"}, "fit": {"image", "video"}}


@dataclass(frozen=True, kw_only=True)
class Sampling(CheckpointOptions):
    """How videos are made, whatever they show."""

    units: str | None = None
    """Unit scheme, such as cube:1x2x2; this and others: the checkpoint's own by default."""
    seconds: Finite | None = None
    """Length of the video, what is kept included; by default 4 more than that."""
    num_frames: Count | None = None
    """Length in frames, instead of seconds."""
    model: str = "robot"
    """Checkpoint: a bundled name, a folder, a file, or a Hugging Face repository."""
    codec: str | None = None
    """Another codec: a checkpoint, or a file such as taew2_1.pth."""
    codec_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the codec; with bfloat16 a third of the pixels differ by a few levels."""
    height: Count | None = None
    """Rows of pixels."""
    width: Count | None = None
    """Columns of pixels."""
    device: str = "cpu"
    """Where to compute, such as cuda."""
    offload: bool = False
    """Keep transformer and text encoder on the host, but for the layer that computes."""
    graphs: bool = False
    """Record the passes that come again as CUDA graphs."""
    compile: bool = False
    """Compile the transformer by torch.compile: seconds more at the first frames."""
    num_inference_steps: Count | None = None
    """Denoising steps per unit."""
    first_steps: tuple[int, ...] | None = None
    """Steps of the first units, if they need more: 4, or 4 3."""
    shift: Finite | None = None
    """Shift of the sigmas towards noise."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 for none, which is twice as fast."""
    negative_prompt: str | None = None
    """What guidance leads away from."""
    window: int | Literal["all"] | None = None
    """Latent frames that a unit may read, the sinks included."""
    sink: int | None = None
    """First latent frames that stay readable for ever."""
    lag: int | float | str | None = None
    """Steps between the starts of two units; the number of steps is one after the other. Or the
    name of a schedule, such as rolling: see docs/concepts/sampling.md."""
    threads: Count | None = None
    """CPU threads."""
    force: bool = False
    """Replace the file if it exists."""
    share: Turn = ALL
    """K/N in the K-th of N processes that share a folder of videos: it makes every N-th of them."""

    def given(self) -> set[str]:
        """Return the names of what is not as it is by default."""
        return {f.name for f in fields(self) if getattr(self, f.name) != f.default}

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.given()
        held = given - {"resume", "threads", *MACHINE}
        rules = {"resume": ("goes on with what it holds", held)} | CLASHES
        for name, (why, others) in rules.items():
            if name in given and (clash := given & others):
                names = ", ".join(sorted(clash)).replace("_", "-")
                raise ValueError(f"--{name} {why}: leave out {names}")
        if isinstance(self.window, int) and self.sink is not None and self.sink >= self.window > 0:
            raise ValueError(
                f"--sink {self.sink} leaves nothing of --window {self.window}, which holds them"
                " too: use fewer sinks, or a longer window"
            )


@dataclass(frozen=True, kw_only=True)
class Generate(Sampling):
    """Generate a video from a sentence; Ctrl-C leaves what was finished so far."""

    prompt: Positional[Annotated[str | None, arg(metavar="PROMPT")]] = None
    """What to show."""
    prompts: Path | None = None
    """Or a file of them, a line for each, but where # begins a remark: .txt; .jsonl or .csv with
    prompt, name and seed."""
    num_videos_per_prompt: Count = 1
    """How many videos of each prompt, with seeds of their own."""
    prompt_at: UseAppendAction[tuple[tuple[str, str], ...]] = ()
    """Another prompt from a second on, SECONDS PROMPT; once for each."""
    script: Path | None = None
    """File of prompts, in each line the second from which on one holds, and the prompt; lines that
    begin with # are remarks."""
    recompute: bool = False
    """When the prompt changes, recompute the keys of what is read with it; a checkpoint with
    `recall_frames`, such as `robot`, does so anyhow: see docs/live.md."""
    image: Path | None = None
    """Picture to begin with."""
    video: Path | None = None
    """Video to go on from; its frames come first in the result."""
    keep: Finite | None = None
    """Seconds of it to go on after; all by default."""
    fit: Literal["crop", "letterbox"] | None = None
    """How a picture or video of another shape is brought to the model's size; crop by default."""
    seed: int | None = 0
    """Seed of the noise; the same seed gives the same video. More videos count on from it. None
    draws one, and says which."""
    out: Path = Path("video.mp4")
    """File to write: .mp4, .mkv (lossless), .webp, .gif, .png (contact sheet); for several videos a
    folder, in which those that are there are left as they are."""
    save_state: Path | None = None
    """File that is kept up to date while it lasts: what --resume needs if the process is killed."""
    resume: Path | None = None
    """Such a file, to go on with; all options are in it but --threads, --device, --offload,
    --graphs and --compile."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.given()
        if not given & {"prompt", "prompts", "script", "resume"}:
            raise ValueError("no PROMPT is given: describe the video in a few words")
        for name, others in NEEDS.items():
            if name in given and not given & others:
                raise ValueError(f"--{name} is of --{' or --'.join(sorted(others))}: name one too")
        if self.share != ALL and not self.several:
            raise ValueError(f"--share {self.share} parts many videos: give --prompts, or no share")

    @property
    def several(self) -> bool:
        """Whether there may be more than one video."""
        return self.prompts is not None or self.num_videos_per_prompt > 1


@dataclass(frozen=True, kw_only=True)
class VBenchGenerate(Sampling, Suite):
    """Make the videos that VBench asks for; goes on where it stopped."""

    folder: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of the run: the videos, and by what protocol they are made."""


@dataclass(frozen=True, kw_only=True)
class Serve(CheckpointOptions):
    """Open a page on which a video is made while you watch, and told what comes next."""

    model: str = "robot"
    """Checkpoint: a bundled name, a folder, a file, or a Hugging Face repository."""
    host: str = "127.0.0.1"
    """Address to listen at; another than this machine's own prints a token that is asked for."""
    port: Annotated[int, Limit(lambda port: 0 <= port < 2**16, f"0 to {2**16 - 1}")] = 8000
    """Port; 0 for any that is free."""
    sessions: Count = 8
    """Sessions at a time."""
    device: str = "cpu"
    """Where to compute, such as cuda."""
    graphs: bool = False
    """Record the passes that come again as CUDA graphs."""
    compile: bool = False
    """Compile the transformer by torch.compile."""
    threads: Count | None = None
    """CPU threads."""


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
class Convert(CheckpointOptions):
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
class Info(CheckpointOptions):
    """Say what a checkpoint is, how it was trained, and what memory it needs."""

    checkpoint: Positional[Checkpoint]
    """A bundled name, a folder, a file, or a Hugging Face repository."""
    seconds: Finite = 60.0
    """Length of the video to forecast."""
    window: Count | None = None
    """Latent frames that a unit may read; the checkpoint's own by default."""
