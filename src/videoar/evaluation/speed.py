"""Speed and memory of generation, end to end: from a prompt to a closed video file.

Every kind of unit runs in a fresh process, so that its peak of memory is its own and its start is a
real one. What a figure includes stands in the report. What a cache is worth measures
`benchmarks/cache.py`, and whether long videos stay flat `benchmarks/length.py`.
"""

import multiprocessing
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videoar import machine
from videoar.core.attention import Spans
from videoar.core.schemes import parse
from videoar.core.transformer import VideoTransformer
from videoar.data.video import VideoWriter
from videoar.evaluation.options import Bench
from videoar.evaluation.tables import cells, markdown, spread
from videoar.files import Json, load, save
from videoar.generation.pipeline import VideoPipeline
from videoar.generation.stream import write
from videoar.generation.timing import Timing

INCLUDED = (
    "Frames per second are end to end: text encoding, sampling, decoding and writing the file. "
    "Loading is in `from start` alone, which begins with the process. Medians of {repeats} runs "
    "[lowest, highest], no warm-up. {seconds:g} s of video, {hardware}."
)


def run(config: Bench, report: Callable[[str], None]) -> str:
    """Measure every kind of unit, and return the tables."""
    return tables(config, measure_all(config, report))


def measure_all(config: Bench, report: Callable[[str], None]) -> list[Json]:
    """Measure every kind of unit, with a line of report for each.

    Raises:
        ValueError: the checkpoint or an argument does not fit.
        ChildProcessError: a measurement died, for instance for want of memory.
    """
    for name in config.units:
        parse(name)
    load(config.out, "benchmark", kind="benchmark")  # fails now if it must fail
    rows = []
    for name in config.units:
        row = apart(measure, replace(config, units=(name,)))
        rows.append(row)
        report(", ".join(f"{key} {cell}" for key, cell in speed_cells(row).items()))
    save(config.out, {"benchmark": {"config": replace(config, out=None), "rows": rows}})
    return rows


def apart(job: Callable[..., Any], *args: object) -> Any:
    """Run a job in a fresh process."""
    spawn, quiet = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_DFL)
    # Ctrl-C reaches both processes, and it is this one that says so.
    with ProcessPoolExecutor(1, spawn, initializer=signal.signal, initargs=quiet) as pool:
        try:
            return pool.submit(job, *args).result()
        except BrokenProcessPool as error:
            raise ChildProcessError("a measurement died: is there too little memory?") from error


def tables(config: Bench, rows: Sequence[Json]) -> str:
    """Return the table, and what its figures include."""
    title = INCLUDED.format(**vars(config), hardware=rows[0]["hardware"])
    return f"{title}\n\n{markdown(cells([speed_cells(row) for row in rows]))}\n"


def speed_cells(row: Json) -> dict[str, str]:
    """Return the cells of the table of speed, by column."""
    runs, rate = row["runs"], row["matmul_rate"]
    first, names = runs[0], ("model_seconds", "decode_seconds", "write_seconds")
    seconds = [statistics.median(getattr(run, name) for run in runs) for name in names]
    start, speed = first.start_seconds, row["flops"] / seconds[0]
    return {
        "units": row["name"],
        "frames/s": spread([run.fps for run in runs]),
        "model, decode, write (s)": ", ".join(f"{value:.2f}" for value in seconds),
        "steps": str(row["steps"]),
        "passes": str(first.passes),
        "units made": str(first.units),
        "tokens/pass": f"{row['tokens'] / first.passes:.1f}",
        "ms/pass": f"{1000 * seconds[0] / first.passes:.2f}",
        "cache": f"{first.cache_tokens} tokens, {first.cache_bytes / 2**20:.1f} MiB",
        "window (latent frames)": str(row["window_frames"] or "all"),
        "first frame (s)": spread([run.first_frame_seconds for run in runs]),
        "from start (s)": "unknown" if start is None else f"{start:.2f}",
        "peak memory": f"{runs[-1].peak_bytes / 2**20:.0f} MiB",
        "GFLOP/s": f"{speed / 1e9:.1f}",
        "of a matmul": f"{speed / rate:.0%}",
    }


def load_pipeline(config: Bench) -> VideoPipeline:
    """Load the checkpoint, to be used with the threads that are asked for."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return VideoPipeline.from_pretrained(config.checkpoint)


def measure(config: Bench) -> Json:
    """Generate the video of one kind several times; then measure the machine.

    Returns:
        All that was measured: the `runs`, each a `Timing` of the same video, the first one at the
        start of a process; the `tokens` that went through the network for it, cache writes
        included, and its `flops`, counting the keys that may be read; the seconds that loading the
        weights took; the latent frames that a unit may read, None for all; and the floating-point
        operations per second of a large matrix product on this machine.
    """
    before = time.perf_counter()
    pipe = load_pipeline(config)
    load_seconds = time.perf_counter() - before
    done = [generate(pipe, config, seconds=config.seconds) for _ in range(config.repeats)]
    return {
        "name": config.units[0],
        "runs": [timing for timing, _ in done],
        **done[0][1],
        "load_seconds": load_seconds,
        "window_frames": pipe.sampling.window_frames,
        "matmul_rate": machine.measure_matmul_rate("cpu", precision="float32"),
        "hardware": machine.hardware("cpu"),
    }


def _pairs(mask: Tensor | Spans) -> int:
    """Count the pairs of query and key that a mask lets through."""
    if isinstance(mask, Tensor):
        return int(mask.sum())
    runs = zip(mask.queries, mask.keys, strict=True)
    return sum((q.stop - q.start) * sum(k.stop - k.start for k in keys) for q, keys in runs)


def generate(
    pipe: VideoPipeline,
    config: Bench,
    *,
    seconds: float,
    show: Callable[[int, float], None] = lambda frames, seconds: None,
) -> tuple[Timing, Json]:
    """Generate a video file and forget it; return what it took, and the network's tokens and flops.

    After every write `show` gets the frames and the seconds so far.
    """
    steps = config.num_inference_steps
    stated: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}
    generation = pipe.generate(
        [config.prompt],
        num_frames=max(1, round(seconds * pipe.sampling.fps)),
        seeds=[0],
        units=config.units[0],
        **stated,
    )
    steps = len(generation.sampler.config.sigmas) - 1
    counted: Json = {"tokens": 0, "flops": 0.0, "steps": steps}

    def count(model: VideoTransformer, _: tuple[Tensor, ...], inputs: Json) -> None:
        text, mask = inputs["text"][0][0], inputs["mask"]
        size = inputs["tokens"].shape[1]
        keys = inputs["cache"].tokens + size if mask is None else _pairs(mask) // size
        counted["tokens"] += size
        counted["flops"] += len(text) * model.flops(size, keys=keys, words=text.shape[2])

    counting = pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    with counting, tempfile.TemporaryDirectory() as folder:
        writer = VideoWriter(Path(folder) / "video.mp4", fps=pipe.sampling.fps)
        timing = write(generation, writer, fps=pipe.sampling.fps, show=show)
    if timing.interrupted:
        raise KeyboardInterrupt
    return timing, counted
