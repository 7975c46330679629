"""The command line: options, progress and sentences. Thin; what it calls can be called without it.

Nothing here imports torch before a command needs it: help and refusals are instant.
"""

import functools
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence

from videoar import __version__
from videoar.checks import Note, hint, import_named, interrupt, signal_of
from videoar.cli import arguments, options
from videoar.cli.progress import say
from videoar.data.options import Prepare
from videoar.evaluation import options as vbench
from videoar.evaluation.options import Bench, Evaluate, HeldOut, PrintUnits, Study

CALLED = {"overwrite=True": "--force", "lower batch_size": "lower --batch-size"}
"""What is called otherwise on the command line."""
USAGE = """\
usage: videoar [--version] COMMAND ...

Autoregressive video generation in which the prediction unit is a choice.

{commands}

`videoar COMMAND --help` shows the options of a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Before torch is loaded: threads that wait by spinning, OpenMP's default, made a video 60 times
    # as slow beside another process on 2 cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if threading.current_thread() is threading.main_thread():  # what ends a job is as Ctrl-C
        signal.signal(signal.SIGTERM, interrupt)
    return exit_code(lambda: parse(words)())


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command; say what is wrong in a sentence: 2 for bad input, 130 after Ctrl-C.

    After SIGTERM it is 143: 128 and the number of the signal.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", Note)
            warnings.showwarning = lambda message, *_, **__: print(
                f"videoar: {message}", file=sys.stderr
            )
            return command() or 0
    except SystemExit as stop:  # after --help
        return int(stop.code or 0)
    except KeyboardInterrupt as stop:
        print("videoar: stopped", file=sys.stderr)
        return 128 + signal_of(stop)
    except BrokenPipeError:  # who reads has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError, FloatingPointError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename:
            text = f"{error.strerror}: {error.filename}"
        for name, option in CALLED.items():
            text = text.replace(name, option)
        print(f"videoar: error: {' '.join(text.split())}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2


def parse(argv: Sequence[str]) -> Callable[[], int | None]:
    """Read a command line: the function of the command, with its options.

    Raises:
        ValueError: unknown or malformed words, in one sentence.
        SystemExit: help was asked for and has been printed.
    """
    name, *words = argv or ["--help"]
    if name in ("-h", "--help"):
        kinds = {name: (kind.__doc__ or "").splitlines() for name, (kind, _) in COMMANDS.items()}
        lines = [f"  {name:<16} {line}" for name, (line, *_) in kinds.items()]
        return functools.partial(say, USAGE.format(commands="\n".join(lines)))
    if name == "--version":
        return functools.partial(say, f"videoar {__version__}")
    if words and f"{name} {words[0]}" in COMMANDS:
        name, *words = f"{name} {words[0]}", *words[1:]
    if name not in COMMANDS:
        close = hint(name, COMMANDS)
        raise ValueError(f"unknown command {name!r}: use one of {', '.join(COMMANDS)}{close}")
    asked = [word.partition("=")[0] for word in words]
    if name in ("evaluate", "study") and "--data" in asked:
        raise ValueError(f"`{name}` reads no --data: use `videoar evaluate heldout` with it")
    kind, place = COMMANDS[name]
    if not issubclass(kind, options.Train) or not words or words[0].startswith("-"):
        args = arguments.read(kind, words, prog=f"videoar {name}")
        if place.startswith("videoar.evaluation"):  # what measures returns its tables
            return lambda: say(import_named(place)(args, say))
        return functools.partial(import_named(place), args)
    from videoar.training import recipes

    recipe, *rest = words
    default, export = recipes.find(recipe), "--export" in rest
    rest = [word for word in rest if word != "--export"]
    prog = f"videoar {name} {recipe}"
    config = arguments.read(type(default), rest, prog=prog, default=default)
    return functools.partial(import_named(place), kind(recipe=recipe, export=export), config=config)


COMMANDS: dict[str, tuple[type, str]] = {
    "generate": (options.Generate, "videoar.cli.generate:generate"),
    "serve": (options.Serve, "videoar.cli.serve:serve"),
    "train": (options.Train, "videoar.cli.train:train"),
    "distill": (options.Distill, "videoar.cli.train:train"),
    "convert": (options.Convert, "videoar.cli.checkpoints:convert"),
    "info": (options.Info, "videoar.cli.checkpoints:info"),
    "units": (PrintUnits, "videoar.cli.units:print_units"),
    "prepare": (Prepare, "videoar.cli.prepare:prepare"),
    "bench": (Bench, "videoar.evaluation.speed:run"),
    "evaluate": (Evaluate, "videoar.evaluation.study:evaluate"),
    "evaluate heldout": (HeldOut, "videoar.evaluation.heldout:run"),
    "study": (Study, "videoar.evaluation.study:run"),
    "vbench prompts": (vbench.Suite, "videoar.cli.vbench:prompts"),
    "vbench generate": (options.VBenchGenerate, "videoar.cli.vbench:generate"),
    "vbench score": (vbench.VBenchScore, "videoar.evaluation.vbench:score"),
    "vbench table": (vbench.VBenchTable, "videoar.cli.vbench:table"),
}
"""The options of every command, and the name of its function: imported only when it runs."""
