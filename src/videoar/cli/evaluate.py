"""`videoar evaluate`, `videoar evaluate heldout`, `videoar compare` and `videoar bench`."""

from typing import Any

from videoar.cli.progress import say
from videoar.evaluation import heldout, options, speed, study


def measure(args: options.Evaluate | options.HeldOut | options.Compare | options.Bench) -> None:
    """Measure, and say the tables."""
    run: Any = {
        options.Evaluate: study.evaluate,
        options.HeldOut: heldout.run,
        options.Compare: study.compare,
        options.Bench: speed.run,
    }[type(args)]
    say(run(args, say))
