"""The command line: options, progress and sentences. Thin; what it calls can be called without it.

Nothing here imports torch before a command needs it: help and refusals are instant.
"""

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence

from videoar import __version__
from videoar.checks import hint
from videoar.cli import arguments, options
from videoar.cli.progress import say
from videoar.data.options import Prepare
from videoar.evaluation.options import Bench, Compare, Evaluate, HeldOut

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
    if threading.current_thread() is threading.main_thread():  # what ends a job is Ctrl-C
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    return exit_code(lambda: parse(words)())


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command; say what is wrong in a sentence: 2 for bad input, 130 after Ctrl-C."""
    try:
        return command() or 0
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


def parse(argv: Sequence[str]) -> Callable[[], int | None]:
    """Read a command line: the function of the command, with its options.

    Raises:
        ValueError: unknown or malformed words, in one sentence.
        SystemExit: help was asked for and has been printed.
    """
    name, *words = argv or ["--help"]
    if name in ("-h", "--help"):
        kinds = {name: (kind.__doc__ or "").splitlines() for name, kind in COMMANDS.items()}
        lines = [f"  {name:<16} {line}" for name, (line, *_) in kinds.items()]
        return functools.partial(say, USAGE.format(commands="\n".join(lines)))
    if name == "--version":
        return functools.partial(say, f"videoar {__version__}")
    if words and f"{name} {words[0]}" in COMMANDS:
        name, *words = f"{name} {words[0]}", *words[1:]
    if name not in COMMANDS:
        close = hint(name, COMMANDS)
        raise ValueError(f"unknown command {name!r}: use one of {', '.join(COMMANDS)}{close}")
    if name == "evaluate" and any(word.partition("=")[0] == "--data" for word in words):
        raise ValueError("`evaluate` reads no --data: use `videoar evaluate heldout` with it")
    kind = COMMANDS[name]
    if not issubclass(kind, options.Train) or not words or words[0].startswith("-"):
        args = arguments.read(kind, words, prog=f"videoar {name}")
        return functools.partial(command_of(name), args)
    from videoar.training import recipes

    recipe, *rest = words
    default, export = recipes.find(recipe), "--export" in rest
    rest = [word for word in rest if word != "--export"]
    prog = f"videoar {name} {recipe}"
    config = arguments.read(type(default), rest, prog=prog, default=default)
    return functools.partial(command_of(name), kind(recipe=recipe, export=export), config=config)


COMMANDS: dict[str, type] = {
    "generate": options.Generate,
    "serve": options.Serve,
    "train": options.Train,
    "distill": options.Distill,
    "convert": options.Convert,
    "info": options.Info,
    "units": options.DrawUnits,
    "prepare": Prepare,
    "bench": Bench,
    "evaluate": Evaluate,
    "evaluate heldout": HeldOut,
    "compare": Compare,
    "demo": options.Demo,
}


def command_of(name: str) -> Callable[..., int | None]:
    """Return the function of a command; what it needs is imported only now."""
    if name == "generate":
        from videoar.cli.generate import generate as command
    elif name == "serve":
        from videoar.cli.serve import serve as command
    elif name in ("train", "distill"):
        from videoar.cli.train import train as command
    elif name == "convert":
        from videoar.cli.checkpoints import convert as command
    elif name == "info":
        from videoar.cli.checkpoints import info as command
    elif name == "units":
        from videoar.cli.units import draw_units as command
    elif name == "prepare":
        from videoar.cli.prepare import prepare as command
    elif name == "demo":
        from videoar.cli.demo import demo as command
    else:
        from videoar.cli.evaluate import measure as command
    return command
