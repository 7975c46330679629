"""Whether the cost of a second of video and the memory stay flat as a video grows.

The cost is processor time, which other work on the machine moves least: an hour is never quiet.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tyro.conf import Positional

from videoar import machine
from videoar.checks import check_options
from videoar.cli import arguments
from videoar.cli.main import exit_code
from videoar.cli.progress import say
from videoar.core.schemes import KINDS
from videoar.evaluation.options import Bench, Checkpoint
from videoar.evaluation.speed import apart, generate, load_pipeline
from videoar.evaluation.tables import cells, markdown

MARKS, FIRST_SECONDS = 6, 10.0  # a video is timed so often, at 10 s first
SPAN_SECONDS = 5.0  # over the time before


@dataclass(frozen=True, kw_only=True)
class BenchLength:
    """Generate a long video under every kind of unit, each in a fresh process."""

    checkpoint: Positional[Checkpoint] = "toy"
    """A bundled name or a folder."""
    units: tuple[str, ...] = KINDS
    """Kinds of unit."""
    seconds: float = 120.0
    """Length of the video, 30 or more."""
    num_inference_steps: int = 4
    """Denoising steps per unit."""
    threads: int | None = None
    """CPU threads."""

    def __post_init__(self) -> None:
        long = 30 <= self.seconds < math.inf
        check_options(self, ("seconds", long, "30 or more"))
        self.of(self.units)  # what is wrong with the rest

    def of(self, units: tuple[str, ...]) -> Bench:
        """Return what is generated, as `videoar bench` says it."""
        how = {"num_inference_steps": self.num_inference_steps, "threads": self.threads}
        return Bench(checkpoint=self.checkpoint, units=units, **how)


def measure(config: Bench, seconds: float) -> dict[str, Any]:
    """Generate one long video; return what its seconds cost, and the peak of memory on the way."""
    pipe, clock = load_pipeline(config), []

    def tick(frames: int, seconds: float) -> None:
        clock.append((frames, time.process_time(), machine.peak_bytes()))

    generate(pipe, config, seconds=seconds, show=tick)
    frames, times, peaks = zip(*clock, strict=True)
    fps = pipe.sampling.fps
    marks = np.linspace(FIRST_SECONDS, seconds, MARKS).round()
    return {
        "seconds": marks.tolist(),
        "cost": [cost_at(second, fps=fps, frames=frames, times=times) for second in marks],
        "early_bytes": peaks[int(np.searchsorted(frames, 20 * fps))],
        "late_bytes": peaks[-1],
    }


def cost_at(second: float, *, fps: float, frames: Sequence[int], times: Sequence[float]) -> float:
    """Return the time per second of video over the span that ends at a second of it.

    There were so many `frames` at these `times`.
    """
    end, begin = np.interp([second * fps, (second - SPAN_SECONDS) * fps], frames, times)
    return float(end - begin) / SPAN_SECONDS


def row(name: str, found: dict[str, Any]) -> dict[str, str]:
    """Return the cells of one kind of unit, by column."""
    cost, early, late = found["cost"], found["early_bytes"], found["late_bytes"]
    marks = zip(found["seconds"], cost, strict=True)
    return {
        "units": name,
        **{f"at {at:g} s": f"{value:.3f}" for at, value in marks},
        "last / first": f"{cost[-1] / cost[0]:.3f}",
        "peak memory at 20 s": f"{early / 2**20:.0f} MiB",
        "at the end": f"{late / 2**20:.0f} MiB",
        "end / 20 s": f"{late / early:.3f}",
    }


def run(config: BenchLength, report: Callable[[str], None]) -> str:
    """Measure every kind of unit, and return a table."""
    rows = []
    for name in config.units:
        rows.append(row(name, apart(measure, config.of((name,)), config.seconds)))
        report(", ".join(f"{key} {cell}" for key, cell in rows[-1].items()))
    title = f"Processor seconds per second of video, over the {SPAN_SECONDS:g} s that end there:"
    return f"{title}\n\n{markdown(cells(rows))}"


def main(words: Sequence[str]) -> int:
    """Print the table; bad input is one sentence."""
    prog = "python benchmarks/length.py"
    return exit_code(lambda: say(run(arguments.read(BenchLength, words, prog=prog), say)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
