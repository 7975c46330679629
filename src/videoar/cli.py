"""The command line: options, progress and sentences. Thin; what it calls can be called without it.

Nothing here imports torch before a command needs it: help and refusals are instant.
"""

import dataclasses
import functools
import importlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from videoar import __version__, arguments, options

USAGE = """\
usage: videoar [--version] COMMAND ...

Autoregressive video generation in which the prediction unit is a choice.

{commands}

`videoar COMMAND --help` shows the options of a command."""
FIELDS = {"window": "window_frames", "sink": "sink_frames"}  # of `Sampling`, by their options


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 2 for bad input, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Before torch is loaded: threads that wait by spinning, OpenMP's default, made a video 60 times
    # as slow beside another process on 2 cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        if not words or words[0] in ("-h", "--help"):
            kinds = {
                name: (kind.__doc__ or "").splitlines() for name, (kind, _) in COMMANDS.items()
            }
            lines = [f"  {name:<14} {line}" for name, (line, *_) in kinds.items()]
            _say(USAGE.format(commands="\n".join(lines)))
            return 0
        if words == ["--version"]:
            _say(f"videoar {__version__}")
            return 0
        command, args = parse(words)
        return command(args) or 0
    except SystemExit as stop:  # after --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("videoar: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError, FloatingPointError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename:
            text = f"{error.strerror}: {error.filename}"
        print(f"videoar: error: {' '.join(text.split())}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2


def parse(argv: Sequence[str]) -> tuple[Callable[[Any], int | None], Any]:
    """Read a command line: the function of the command, and its options.

    Raises:
        ValueError: unknown or malformed words, in one sentence.
        SystemExit: help was asked for and has been printed.
    """
    name, *words = argv
    if words and f"{name} {words[0]}" in COMMANDS:
        name, words = f"{name} {words[0]}", words[1:]
    if name not in COMMANDS:
        close = arguments.hint(name, COMMANDS)
        raise ValueError(f"unknown command {name!r}: use one of {', '.join(COMMANDS)}{close}")
    kind, command = COMMANDS[name]
    if not issubclass(kind, options.Train) or not words or words[0].startswith("-"):
        return command, arguments.read(kind, words, prog=f"videoar {name}")
    from videoar import recipes

    recipe, *rest = words
    default, export = recipes.find(recipe), "--export" in rest
    rest = [word for word in rest if word != "--export"]
    prog = f"videoar {name} {recipe}"
    config = arguments.read(type(default), rest, prog=prog, default=default)
    return functools.partial(train, config=config), kind(recipe=recipe, export=export)


def _say(line: object) -> None:
    print(line, flush=True)


def _check_positive(args: Any, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value:g}: use a number above 0, such as 4")


def _check_folder(path: Path) -> None:
    """Raise unless files can be written to a folder that is there or can be made."""
    if not path.parent.is_dir():
        raise ValueError(f"the folder {path.parent} does not exist; create it first")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; name a folder")
    place = path if path.is_dir() else path.parent
    if not os.access(place, os.W_OK):
        raise ValueError(f"the folder {place} is not writable; choose another one")


def _check_generate(args: options.Generate) -> None:
    names = ("seconds", "num_frames", "keep", "num_inference_steps", "shift", "threads")
    _check_positive(args, *names, "height", "width")
    if args.seconds is not None and args.num_frames is not None:
        raise ValueError("--seconds and --num-frames both give the length: choose one of them")
    if args.image is not None and args.video is not None:
        raise ValueError("--image and --video both say how the video begins: choose one of them")
    if args.keep is not None and args.video is None:
        raise ValueError("--keep says how much of --video comes first: name a video too")
    if args.report is not None and not args.report.parent.is_dir():
        raise ValueError(f"the folder {args.report.parent} does not exist; create it first")


def generate(args: options.Generate) -> int:
    """Generate, decode and write at the same time, in memory that does not grow."""
    _check_generate(args)
    from videoar import condition
    from videoar.video import check_output

    target = check_output(args.out, overwrite=args.force)
    image = None if args.image is None else condition.read_image(args.image)
    import torch

    from videoar import output, units
    from videoar.pipeline import Sampling, VideoPipeline

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.units is not None:
        units.parse(args.units)  # what is wrong with it is said before weights are loaded
    fields = {field.name for field in dataclasses.fields(Sampling)}
    given = {FIELDS.get(k, k): value for k, value in vars(args).items() if value is not None}
    given = {name: value for name, value in given.items() if name in fields}
    if args.window == "all":
        given["window_frames"] = None
    names = ("base", "lora", "codec", "preset", "dtype", "device", "offload")
    load = {name: getattr(args, name) for name in names}
    pipe = VideoPipeline.from_pretrained(args.model, **load)
    pipe.height, pipe.width = args.height or pipe.height, args.width or pipe.width
    fps = pipe.sampling.fps
    size = {"height": pipe.height, "width": pipe.width, "fit": args.fit}
    video = None
    if args.video is not None:
        video = condition.read_clip(args.video, fps=fps, seconds=args.keep, **size)
    begin = 0 if video is None else len(video) / fps
    num_frames = args.num_frames or max(1, round((args.seconds or 4.0 + begin) * fps))
    started = time.perf_counter()
    given |= {"image": image, "video": video, "fit": args.fit}
    generation = pipe.generate([args.prompt], num_frames=num_frames, seeds=[args.seed], **given)
    if video is not None and (kept := generation.kept_frames) < len(video):
        groups = f"1 + {pipe.codec.stride[0]} * k"
        _say(f"the first {kept} of {len(video)} frames are kept, as the codec needs {groups}")
    writer = output.open_output(target, num_frames=num_frames, fps=fps)
    with output.Progress(sys.stderr, every=5.0) as show:
        figures, interrupted = output.write(
            generation,
            writer,
            started=started,
            fps=fps,
            show=lambda frames, seconds: show(
                output.how_far(frames, seconds, total=num_frames, fps=fps)
            ),
        )
    if not figures["frames"]:
        print("videoar: stopped before the first frame; nothing is written", file=sys.stderr)
        return 130
    figures["scheme"] = given.get("units", pipe.sampling.units)
    _say(output.summary(target, figures))
    if args.report is not None:
        args.report.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if interrupted:
        print(f"videoar: stopped; {target} holds what was finished", file=sys.stderr)
    return 130 if interrupted else 0


def train(args: options.Train, *, config: Any = None) -> None:
    """Train a recipe, export a run, or list the recipes."""
    from videoar import recipes

    distils = isinstance(args, options.Distill)
    if args.list or args.recipe is None:
        chosen = recipes.DISTILLATIONS if distils else recipes.RECIPES
        for name, recipe in chosen.items():
            _say(f"{name:<18} {(recipe.__doc__ or '').splitlines()[0]}")
        return
    from videoar import formats
    from videoar import train as training

    config = config or recipes.find(args.recipe)
    if distils and not recipes.distils(config):
        known = ", ".join(recipes.DISTILLATIONS)
        raise ValueError(f"{args.recipe} distils nothing: train it, or use one of {known}")
    formats.check_device(config.device)
    folder = training.export(config) if args.export else training.train(config, report=_say)
    if os.environ.get("RANK", "0") == "0":  # of the processes of torchrun the first one speaks
        _say(f"the checkpoint is in {folder}")


def convert(args: options.Convert) -> None:
    """Convert a checkpoint."""
    _check_folder(args.target)
    from videoar import formats

    origin = formats.Origin.find(args.source, base=args.base, lora=args.lora)
    how = {"format": args.format, "preset": args.preset, "dtype": args.dtype}
    for line in formats.convert(origin, args.target, **how, overwrite=args.force):
        _say(line)


def info(args: options.Info) -> None:
    """Describe a checkpoint and forecast its memory."""
    _check_positive(args, "seconds", "window")
    from videoar import describe, formats

    origin = formats.Origin.find(args.checkpoint, base=args.base, lora=args.lora)
    asked = {name: getattr(args, name) for name in ("seconds", "window", "preset", "dtype")}
    _say(describe.checkpoint(origin, **asked))


def draw_units(args: options.DrawUnits) -> None:
    """Print partitions as a table, and draw them."""
    _check_positive(args, "steps")
    if not args.schemes:
        example = " ".join(options.KINDS)
        raise ValueError(f"no scheme is given: name one or more, such as {example}")
    from videoar.video import check_output

    names, folder = dict.fromkeys(args.schemes), args.out
    files = ["order.png", "mask.png", "filling.webp"] if len(names) == 1 else ["units.webp"]
    if folder is not None:
        _check_folder(folder)
        for file in files if folder.is_dir() else ():
            check_output(folder / file, overwrite=args.force)
    from videoar import describe, drawing
    from videoar.pipeline import Sampling
    from videoar.tables import cells, columns
    from videoar.units import Units, parse

    size = (args.frames, args.height, args.width)
    lattices, rows = {name: Units(parse(name), *size) for name in names}, []
    for name, units in lattices.items():
        if folder is not None:
            drawing.check_size(units)
        sampling = Sampling(units=name, window_frames=args.window, sink_frames=args.sink)
        visible = sampling.visible(units)
        rows.append(describe.partition(name, units, visible, steps=args.steps))
    _say("{} x {} x {} tokens, {} steps per unit".format(*size, args.steps))
    _say(columns(cells(rows)))
    if folder is None:
        return
    folder.mkdir(exist_ok=True)
    if len(names) == 1:
        title = "{} on {} x {} x {}".format(name, *size)
        drawing.order(units, title=title).save(folder / "order.png")
        drawing.mask(units, visible, title=title).save(folder / "mask.png")
    drawing.save_animation(drawing.filling(lattices, steps=args.steps), folder / files[-1])
    _say(f"drawn in {folder}: {', '.join(files)}")


def prepare(args: options.Prepare) -> None:
    """Prepare videos."""
    from videoar import prepare as preparation
    from videoar.output import Progress

    with Progress(sys.stdout, every=10.0) as show:
        statistics = preparation.run(args, show)
    _say(
        "{clips} clips to train on and {held_out_clips} held out, {seconds:.0f} s, of {used} of"
        " {videos} videos".format(**statistics)
    )
    if statistics["held_out_clips"] < 2:
        _say("`evaluate --data` needs 2 clips held out: add videos, or raise --held-out")
    for reason, count in statistics["rejected"].items():
        _say(f"  {count} x {reason}")
    _say(f"see {args.latents / 'contact-sheet.png'} and {args.latents / 'rejected.jsonl'}; then:")
    words = ("--data.path", str(args.latents), "--task.init", args.codec)
    _say(f"videoar train finetune {shlex.join(words)}")


def measuring(module: str) -> Callable[[Any], None]:
    """Return the command that runs a module of measurements and prints its tables."""

    def command(args: Any) -> None:
        _say(importlib.import_module(f"videoar.{module}").run(args, _say))

    return command


def evaluate(args: options.Evaluate) -> None:
    """Measure faithfulness and drift, or reconstruction and loss on videos."""
    measuring("evaluate" if args.data is None else "heldout")(args)


def demo(args: options.Demo) -> None:
    """Show every kind of unit."""
    _check_positive(args, "seconds")
    _check_folder(args.out)
    from videoar import demo as demonstration

    demonstration.run(args, _say)


COMMANDS: dict[str, tuple[type, Callable[[Any], int | None]]] = {
    "generate": (options.Generate, generate),
    "train": (options.Train, train),
    "distill": (options.Distill, train),
    "convert": (options.Convert, convert),
    "info": (options.Info, info),
    "units": (options.DrawUnits, draw_units),
    "prepare": (options.Prepare, prepare),
    "bench": (options.Bench, measuring("measure")),
    "bench prepare": (options.BenchPrepare, measuring("bench_prepare")),
    "bench distill": (options.BenchDistill, measuring("bench_distill")),
    "evaluate": (options.Evaluate, evaluate),
    "compare": (options.Compare, measuring("compare")),
    "demo": (options.Demo, demo),
}
