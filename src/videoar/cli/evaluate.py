"""`videoar evaluate`, `videoar evaluate heldout`, `videoar compare` and `videoar bench`."""

from videoar.cli.progress import say
from videoar.evaluation import heldout, options, speed, study


def evaluate(args: options.Evaluate) -> None:
    """Measure faithfulness and drift."""
    say(study.evaluate(args, say))


def evaluate_heldout(args: options.HeldOut) -> None:
    """Measure reconstruction and loss on videos."""
    say(heldout.run(args, say))


def compare(args: options.Compare) -> None:
    """Judge checkpoints beside each other."""
    say(study.compare(args, say))


def bench(args: options.Bench) -> None:
    """Measure speed and memory."""
    say(speed.run(args, say))
