"""The command line: options, progress and sentences. Thin; what it calls can be called without it.

Nothing here imports torch before a command needs it, so that help is instant.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from videoar import __version__
from videoar.options import (
    KINDS,
    Bench,
    Demo,
    DrawUnits,
    Evaluate,
    Generate,
    Info,
    Train,
    hint,
    read,
)

DEMO_PROMPT = "a small red ball bounces up and down on a black background"
CLIP_SECONDS = 4.0
"""Length of the short videos of the demo, and of what its judge sees at a time."""
SAMPLING = {"window": "window_frames", "sink": "sink_frames"}
"""Options that are shorter than the fields of `Sampling` that they set."""


# ---------------------------------------------------------------- entry


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 2 for bad input, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if not words or words[0] in ("-h", "--help"):
            print(overview())
            return 0
        if words == ["--version"]:
            print(f"videoar {__version__}")
            return 0
        command, options = parse(words)
        return command(options)
    except SystemExit as stop:  # after --help
        return int(stop.code or 0)
    except OSError as error:
        return _fail(f"{error.strerror}: {error.filename}" if error.filename else str(error), 2)
    except ValueError as error:
        return _fail(str(error), 2)
    except FloatingPointError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        print("videoar: stopped", file=sys.stderr)
        return 130


def _fail(text: str, code: int) -> int:
    print(f"videoar: error: {' '.join(text.split())}", file=sys.stderr)
    return code


def overview() -> str:
    """Return the help on all commands."""
    lines = [
        f"  {name:<9} {(kind.__doc__ or '').splitlines()[0]}"
        for name, (kind, _) in COMMANDS.items()
    ]
    return "\n".join(
        [
            "usage: videoar [--version] COMMAND ...",
            "",
            "Autoregressive video generation in which the prediction unit is a choice.",
            "",
            *lines,
            "",
            "`videoar COMMAND --help` shows the options of a command.",
        ]
    )


def parse(argv: Sequence[str]) -> tuple[Callable[[Any], int], Any]:
    """Read a command line: the function of the command, and its options.

    Raises:
        ValueError: unknown or malformed words, in one sentence.
        SystemExit: help was asked for and has been printed.
    """
    name, *words = argv
    if name not in COMMANDS:
        raise ValueError(
            f"unknown command {name!r}: use one of {', '.join(COMMANDS)}{hint(name, COMMANDS)}"
        )
    kind, command = COMMANDS[name]
    if name != "train" or not words or words[0].startswith("-"):
        return command, read(kind, words, prog=f"videoar {name}")
    from videoar import recipes

    default = recipes.find(words[0])
    export = "--export" in words
    rest = [word for word in words[1:] if word != "--export"]
    prog = f"videoar train {words[0]}"
    config = read(type(default), rest, prog=prog, default=default)
    return functools.partial(train, config=config), Train(recipe=words[0], export=export)


def _say(line: str) -> None:
    print(line, flush=True)


def _folder(path: Path) -> Path:
    """Return a folder that exists and can be written to."""
    if not path.parent.is_dir():
        raise ValueError(f"the folder {path.parent} does not exist; create it first")
    path.mkdir(exist_ok=True)
    if not os.access(path, os.W_OK):
        raise ValueError(f"the folder {path} is not writable; choose another one")
    return path


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value:g}: use a number above 0, such as 4")
    return value


# ---------------------------------------------------------------- generate


def generate(options: Generate) -> int:
    """Generate, decode and write at the same time, in memory that does not grow."""
    from videoar.video import check_output

    target = check_output(options.out, overwrite=options.force)
    if options.report is not None and not options.report.parent.is_dir():
        raise ValueError(f"the folder {options.report.parent} does not exist; create it first")
    if options.seconds is not None and options.num_frames is not None:
        raise ValueError("--seconds and --num-frames both give the length: choose one of them")
    seconds = _positive("seconds", 4.0 if options.seconds is None else options.seconds)
    import torch

    from videoar import output, units
    from videoar.pipeline import Sampling, VideoPipeline

    if options.threads is not None:
        torch.set_num_threads(int(_positive("threads", options.threads)))
    given = {SAMPLING.get(name, name): value for name, value in vars(options).items()}
    given = {f.name: given.get(f.name) for f in dataclasses.fields(Sampling)}
    given = {name: value for name, value in given.items() if value is not None}
    if options.window == "all":
        given["window_frames"] = None
    units.parse(given.get("units", "frame"))
    pipe = VideoPipeline.from_pretrained(options.model)
    fps = pipe.sampling.fps
    num_frames = max(1, round(seconds * fps)) if options.num_frames is None else options.num_frames
    started = time.perf_counter()
    generation = pipe.generate(
        [options.prompt], num_frames=num_frames, seeds=[options.seed], **given
    )
    writer = output.open_output(target, num_frames=num_frames, fps=fps)
    figures, interrupted = output.write(generation, writer, started=started, fps=fps)
    if not figures["frames"]:
        print("videoar: stopped before the first frame; nothing is written", file=sys.stderr)
        return 130
    figures["scheme"] = given.get("units", pipe.sampling.units)
    _say(output.summary(target, figures))
    if options.report is not None:
        options.report.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if interrupted:
        print(f"videoar: stopped; {target} holds what was finished", file=sys.stderr)
    return 130 if interrupted else 0


def train(options: Train, *, config: Any = None) -> int:
    """Train a recipe, export a run, or list the recipes."""
    from videoar import recipes

    if options.recipe is None:
        for name, recipe in recipes.RECIPES.items():
            text = (recipe.__doc__ or "").partition("\n\n")[0]
            _say(f"{name:<11} {' '.join(text.split())}")
        return 0
    import torch

    from videoar.train import export as export_run
    from videoar.train import train as run

    config = config or recipes.find(options.recipe)
    try:
        torch.zeros(1, device=config.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device {config.device!r} cannot be used ({reason}); use another one, such as cpu"
        ) from error
    folder = export_run(config) if options.export else run(config, report=_say)
    _say(f"the checkpoint is in {folder}")
    return 0


def info(options: Info) -> int:
    """Describe a checkpoint and forecast its memory."""
    seconds = _positive("seconds", options.seconds)
    from videoar import describe
    from videoar.checkpoint import resolve

    folder = resolve(options.checkpoint)
    _say(describe.checkpoint(folder, seconds=seconds, window=options.window))
    return 0


def draw_units(options: DrawUnits) -> int:
    """Print partitions as a table, and draw them."""
    steps = int(_positive("steps", options.steps))
    from videoar import describe, drawing
    from videoar.units import Units, parse
    from videoar.video import check_output

    if not options.schemes:
        raise ValueError(f"no scheme is given: name one or more, such as {' '.join(KINDS)}")
    size = (options.frames, options.height, options.width)
    lattices = {name: Units(parse(name), *size) for name in options.schemes}
    text, visible = describe.partitions(
        lattices, window=options.window, sink=options.sink, steps=steps
    )
    _say("{} x {} x {} tokens, {} steps per unit\n".format(*size, steps) + text)
    if options.out is None:
        return 0
    for units in lattices.values():
        drawing.check_size(units)
    folder, force = _folder(options.out), options.force
    one = len(lattices) == 1
    moving = check_output(folder / ("filling.webp" if one else "units.webp"), overwrite=force)
    pictures = {}
    if one:
        ((name, units),) = lattices.items()
        title = "{} on {} x {} x {}".format(name, *size)
        pictures[check_output(folder / "order.png", overwrite=force)] = drawing.order(
            units, title=title
        )
        pictures[check_output(folder / "mask.png", overwrite=force)] = drawing.mask(
            units, visible[name], title=title
        )
    for file, picture in pictures.items():
        picture.save(file)
    frames, height, width = size
    drawing.save_animation(
        drawing.filling(list(lattices), frames=frames, height=height, width=width, steps=steps),
        moving,
    )
    _say(f"drawn in {folder}: {', '.join(file.name for file in (*pictures, moving))}")
    return 0


# ---------------------------------------------------------------- bench, evaluate, demo


def bench(options: Bench) -> int:
    """Measure speed."""
    from videoar import benchmark

    _say(benchmark.run(benchmark.BenchConfig(**vars(options)), _say).to_markdown())
    return 0


def evaluate(options: Evaluate) -> int:
    """Measure faithfulness and drift."""
    from videoar import evaluate as evaluation

    _say(evaluation.run(evaluation.EvaluateConfig(**vars(options)), _say).to_markdown())
    return 0


def demo(options: Demo) -> int:
    """Generate every kind of unit in a process of its own, so that start and memory are its own."""
    seconds = _positive("seconds", options.seconds)
    folder = _folder(options.out)
    from videoar import describe
    from videoar.video import decode_frames, read_video, side_by_side

    _say(f"{DEMO_PROMPT!r} under {len(KINDS)} kinds of unit, and for {seconds:g} s")
    rows, videos = [], []
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "clip.mp4"
        for kind in KINDS:
            row = _generate_apart(kind, file, model=options.model, seconds=CLIP_SECONDS)
            video = read_video(file)
            row["seen"] = describe.seen([video.frames], fps=video.fps)
            videos.append(video)
            rows.append(row)
    side_by_side(videos, KINDS, scale=3).save(folder / "units.webp", overwrite=True)
    minute = folder / "minute.mp4"
    row = _generate_apart(KINDS[-1], minute, model=options.model, seconds=seconds)
    windows = _windows(decode_frames(minute), size=round(CLIP_SECONDS * videos[0].fps))
    row["seen"] = describe.seen(windows, fps=videos[0].fps)
    _say(f"\n{describe.table([*rows, row])}\n\n{minute} and {folder / 'units.webp'} are ready")
    return 0


def _generate_apart(kind: str, file: Path, *, model: str, seconds: float) -> dict[str, str]:
    """Run `videoar generate` in a process of its own, and return its figures."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        words = ["generate", DEMO_PROMPT, "--units", kind, "--seconds", str(seconds)]
        words += ["--model", model, "--out", str(file), "--report", str(report), "--force"]
        # The new process finds the package where this one did, installed or not.
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "videoar", *words]
        done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL)
        if done.returncode:  # it has said why
            raise SystemExit(done.returncode)
        figures = json.loads(report.read_text(encoding="utf-8"))
    start = figures["start_seconds"]
    row = {
        "units": kind,
        "video": f"{figures['video_seconds']:.0f} s",
        "frames/s": f"{figures['fps']:.1f}",
        "passes": str(figures["passes"]),
        "first frame": f"{figures['first_frame_seconds']:.2f} s",
        "from start": "unknown" if start is None else f"{start:.1f} s",
        "peak memory": f"{figures['peak_bytes'] / 2**20:.0f} MiB",
    }
    _say("  ".join(f"{name} {value}" for name, value in row.items()))
    return row


def _windows(frames: Iterator[Any], *, size: int) -> Iterator[Any]:
    """Cut a stream of frames into clips; a rest too short to be judged is left out."""
    import numpy as np

    while len(clip := list(itertools.islice(frames, size))) > size // 2:
        yield np.stack(clip)


COMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "generate": (Generate, generate),
    "train": (Train, train),
    "info": (Info, info),
    "units": (DrawUnits, draw_units),
    "bench": (Bench, bench),
    "evaluate": (Evaluate, evaluate),
    "demo": (Demo, demo),
}
