"""`videoar evaluate`, `videoar evaluate heldout`, `videoar study` and `videoar bench`."""

from typing import Any

from videoar.cli.progress import say
from videoar.evaluation import heldout, options, speed, study


def measure(args: options.Evaluate | options.HeldOut | options.Study | options.Bench) -> None:
    """Measure, and say the tables."""
    run: Any = {
        options.Evaluate: study.evaluate,
        options.HeldOut: heldout.run,
        options.Study: study.run,
        options.Bench: speed.run,
    }[type(args)]
    say(run(args, say))
