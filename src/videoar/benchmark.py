"""Speed and memory of generation, end to end: from a prompt to a closed video file.

Every kind of unit runs in a fresh process, so that its peak of memory is its own and its start is a
real one. What a figure includes stands in the report, and so does what a cache is worth: the same
sampling with the prefix recomputed in every pass. The measurements are in `videoar.measure`.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from videoar.checkpoint import resolve
from videoar.options import Bench
from videoar.units import parse

Json = dict[str, Any]
MARK_SECONDS, SPAN_SECONDS = 10.0, 5.0  # a long video is timed every 10 s, over the 5 s before
INCLUDED = (
    "Frames per second are end to end: text encoding, sampling, decoding and writing the file. "
    "Loading is in `from start` alone, which begins with the process. Medians of {repeats} runs "
    "[lowest, highest], no warm-up. {seconds:g} s of video, {num_inference_steps} steps per unit, "
    "{hardware}."
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One generated file; the parts of its time need not add up to all of it."""

    frames: int
    wall_seconds: float
    model_seconds: float
    decode_seconds: float
    write_seconds: float
    first_frame_seconds: float
    passes: int
    units: int
    tokens: int
    """Tokens that went through the network, cache writes included."""
    flops: float
    """Of the network, counting the keys that may be read."""
    cache_tokens: int
    """Most tokens the cache held."""
    cache_bytes: int

    @property
    def fps(self) -> float:
        """Frames per second, end to end."""
        return self.frames / self.wall_seconds


@dataclass(frozen=True, kw_only=True)
class Row:
    """All that was measured of one kind of unit."""

    name: str
    runs: tuple[Run, ...]
    start_seconds: float
    """From the start of the process to the first frames: interpreter, imports, loading, text."""
    load_seconds: float
    """Of the weights."""
    peak_bytes: int
    """Peak memory of the process after these runs."""
    window_frames: int | None
    """Latent frames that a unit may read; None: all."""
    matmul_rate: float
    """Floating-point operations per second of a large matrix product on this machine."""
    hardware: str
    uncached: Json | None
    """What `measure.measure_uncached` returns."""
    flat: Json | None
    """What `measure.measure_flat` returns."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result."""

    config: Json
    rows: tuple[Row, ...]

    def to_json(self) -> Json:
        """Return plain JSON values."""
        return {"benchmark": json.loads(json.dumps(asdict(self)))}

    def to_markdown(self) -> str:
        """Return the tables."""
        text = [INCLUDED.format(**self.config, hardware=self.rows[0].hardware)]
        text += [_table([speed_cells(row) for row in self.rows])]
        if flat := [flat_cells(row) for row in self.rows if row.flat]:
            text += [f"Seconds per second of video, over the {SPAN_SECONDS:g} s that end there:"]
            text += [_table(flat)]
        if uncached := [uncached_cells(row) for row in self.rows if row.uncached]:
            text += ["The network alone, with a cache and without; both read the whole prefix:"]
            text += [_table(uncached)]
        return "\n\n".join(text) + "\n"


def _table(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float]) -> str:
    """Return the median and the range."""
    return f"{statistics.median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


def speed_cells(row: Row) -> dict[str, str]:
    """Return the cells of the table of speed, by column."""
    first, names = row.runs[0], ("model_seconds", "decode_seconds", "write_seconds")
    seconds = [statistics.median(getattr(run, name) for run in row.runs) for name in names]
    rate = first.flops / seconds[0]
    return {
        "units": row.name,
        "frames/s": spread([run.fps for run in row.runs]),
        "model, decode, write (s)": ", ".join(f"{value:.2f}" for value in seconds),
        "passes": str(first.passes),
        "units made": str(first.units),
        "tokens/pass": f"{first.tokens / first.passes:.1f}",
        "ms/pass": f"{1000 * seconds[0] / first.passes:.2f}",
        "cache": f"{first.cache_tokens} tokens, {first.cache_bytes / 2**20:.1f} MiB",
        "window (latent frames)": str(row.window_frames or "all"),
        "first frame (s)": spread([run.first_frame_seconds for run in row.runs]),
        "from start (s)": f"{row.start_seconds:.2f}",
        "peak memory": f"{row.peak_bytes / 2**20:.0f} MiB",
        "GFLOP/s": f"{rate / 1e9:.1f}",
        "of a matmul": f"{rate / row.matmul_rate:.0%}",
    }


def flat_cells(row: Row) -> dict[str, str]:
    """Return the cells of the table of long videos, by column."""
    flat = row.flat or {}
    cost, early, late = flat["cost"], flat["early_bytes"], flat["late_bytes"]
    return {
        "units": row.name,
        **{f"at {at:g} s": f"{value:.3f}" for at, value in zip(flat["seconds"], cost, strict=True)},
        "last / first": f"{cost[-1] / cost[0]:.3f}",
        "peak memory at 20 s": f"{early / 2**20:.0f} MiB",
        "at the end": f"{late / 2**20:.0f} MiB",
        "end / 20 s": f"{late / early:.3f}",
    }


def uncached_cells(row: Row) -> dict[str, str]:
    """Return the cells of the comparison with no cache, by column."""
    both = row.uncached or {}
    cached, uncached = both["cached_seconds"], both["uncached_seconds"]
    return {
        "units": row.name,
        "video (s)": f"{both['seconds']:g}",
        "with cache (s)": f"{cached:.2f}",
        "prefix recomputed (s)": f"{uncached:.2f}",
        "ratio": f"{uncached / cached:.1f}",
        "largest difference": f"{both['max_difference']:.0e}",
    }


def run(config: Bench, report: Callable[[str], None]) -> Report:
    """Measure every kind of unit, with a line of report for each.

    Raises:
        ValueError: the checkpoint or an argument does not fit.
        ChildProcessError: a measurement died, for instance for want of memory.
    """
    for name in config.units:
        parse(name)
    if (out := config.out) is not None:
        if not out.parent.is_dir():
            raise ValueError(f"the folder {out.parent} does not exist; create it first")
        if out.exists() and '"benchmark"' not in out.read_text(errors="replace")[:100]:
            raise ValueError(f"{out} holds no benchmark: name another file.")
    folder, rows = resolve(config.checkpoint), []
    for name in config.units:
        one = asdict(replace(config, units=(name,), checkpoint=str(folder), out=None))
        parts = _in_process("measure", one)
        runs = tuple(Run(**values) for values in parts.pop("runs"))
        flat = _in_process("measure_flat", one) if config.long_seconds else None
        rows.append(Row(**parts, name=name, runs=runs, flat=flat))
        report(", ".join(f"{key} {cell}" for key, cell in speed_cells(rows[-1]).items()))
    result = Report(config=asdict(config) | {"out": None}, rows=tuple(rows))
    if out is not None:
        partial = out.with_name(f".{out.name}.partial")
        partial.write_text(json.dumps(result.to_json(), indent=1) + "\n", encoding="utf-8")
        partial.replace(out)
    return result


def _in_process(job: str, config: Json) -> Json:
    """Run a job of `videoar.measure` in a fresh process."""
    request = {"job": job, "config": config, "started": time.time()}
    # The new process finds the package where this one did, installed or not.
    done = subprocess.run(
        [sys.executable, "-m", "videoar.measure"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ChildProcessError(f"a measurement ended with {done.returncode}: {last}")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer
