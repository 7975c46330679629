"""Speed and memory of generation, end to end: from a prompt to a closed video file.

Every kind of unit runs in a fresh process, so that its peak of memory is its own and its start is a
real one. What a figure includes stands in the report, and so does what a cache is worth: the same
sampling with the prefix recomputed in every pass.
"""

import itertools
import multiprocessing
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from videoar import machine
from videoar.core.attention import Spans
from videoar.core.noise import unit_noise
from videoar.core.sampler import Network, Sampler
from videoar.core.schemes import parse
from videoar.core.transformer import Output, VideoTransformer
from videoar.core.units import token_mask
from videoar.data.video import VideoWriter
from videoar.evaluation.options import Bench
from videoar.evaluation.tables import cells, markdown
from videoar.files import Json, load, save
from videoar.generation.pipeline import VideoPipeline
from videoar.generation.stream import Generation, write
from videoar.generation.timing import Timing

MARK_SECONDS, SPAN_SECONDS = 10.0, 5.0  # a long video is timed every 10 s, over the 5 s before
INCLUDED = (
    "Frames per second are end to end: text encoding, sampling, decoding and writing the file. "
    "Loading is in `from start` alone, which begins with the process. Medians of {repeats} runs "
    "[lowest, highest], no warm-up. {seconds:g} s of video, {hardware}."
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """All that was measured of one kind of unit."""

    name: str
    runs: tuple[Timing, ...]
    """Of the same video, the first one at the start of a process."""
    steps: int
    """Denoising steps per unit."""
    tokens: int
    """Tokens that went through the network for it, cache writes included."""
    flops: float
    """Of the network, counting the keys that may be read."""
    load_seconds: float
    """Of the weights."""
    window_frames: int | None
    """Latent frames that a unit may read; None: all."""
    matmul_rate: float
    """Floating-point operations per second of a large matrix product on this machine."""
    hardware: str
    uncached: Json | None
    """What `measure_uncached` returns."""
    flat: Json | None = None
    """What `measure_flat` returns."""


def run(config: Bench, report: Callable[[str], None]) -> str:
    """Measure every kind of unit, and return the tables."""
    return tables(config, measure_all(config, report))


def measure_all(config: Bench, report: Callable[[str], None]) -> list[Row]:
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
        one = replace(config, units=(name,))
        row = apart(measure, one)
        if config.long_seconds:
            row = replace(row, flat=apart(measure_flat, one))
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


def tables(config: Bench, rows: Sequence[Row]) -> str:
    """Return the tables, and what their figures include."""
    flat = [flat_cells(row.name, row.flat) for row in rows if row.flat]
    uncached = [uncached_cells(row.name, row.uncached) for row in rows if row.uncached]
    titled = {
        INCLUDED.format(**vars(config), hardware=rows[0].hardware): list(map(speed_cells, rows)),
        f"Seconds per second of video, over the {SPAN_SECONDS:g} s that end there:": flat,
        "The network alone, with a cache and without; both read the whole prefix:": uncached,
    }
    text = [f"{title}\n\n{markdown(cells(found))}" for title, found in titled.items() if found]
    return "\n\n".join(text) + "\n"


def _spread(values: Sequence[float]) -> str:
    """Return the median and the range."""
    return f"{statistics.median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


def speed_cells(row: Row) -> dict[str, str]:
    """Return the cells of the table of speed, by column."""
    first, names = row.runs[0], ("model_seconds", "decode_seconds", "write_seconds")
    seconds = [statistics.median(getattr(run, name) for run in row.runs) for name in names]
    start, rate = first.start_seconds, row.flops / seconds[0]
    return {
        "units": row.name,
        "frames/s": _spread([run.fps for run in row.runs]),
        "model, decode, write (s)": ", ".join(f"{value:.2f}" for value in seconds),
        "steps": str(row.steps),
        "passes": str(first.passes),
        "units made": str(first.units),
        "tokens/pass": f"{row.tokens / first.passes:.1f}",
        "ms/pass": f"{1000 * seconds[0] / first.passes:.2f}",
        "cache": f"{first.cache_tokens} tokens, {first.cache_bytes / 2**20:.1f} MiB",
        "window (latent frames)": str(row.window_frames or "all"),
        "first frame (s)": _spread([run.first_frame_seconds for run in row.runs]),
        "from start (s)": "unknown" if start is None else f"{start:.2f}",
        "peak memory": f"{row.runs[-1].peak_bytes / 2**20:.0f} MiB",
        "GFLOP/s": f"{rate / 1e9:.1f}",
        "of a matmul": f"{rate / row.matmul_rate:.0%}",
    }


def flat_cells(name: str, flat: Json) -> dict[str, str]:
    """Return the cells of the table of long videos, by column."""
    cost, early, late = flat["cost"], flat["early_bytes"], flat["late_bytes"]
    return {
        "units": name,
        **{f"at {at:g} s": f"{value:.3f}" for at, value in zip(flat["seconds"], cost, strict=True)},
        "last / first": f"{cost[-1] / cost[0]:.3f}",
        "peak memory at 20 s": f"{early / 2**20:.0f} MiB",
        "at the end": f"{late / 2**20:.0f} MiB",
        "end / 20 s": f"{late / early:.3f}",
    }


def uncached_cells(name: str, both: Json) -> dict[str, str]:
    """Return the cells of the comparison with no cache, by column."""
    cached, uncached = both["cached_seconds"], both["uncached_seconds"]
    return {
        "units": name,
        "video (s)": f"{both['seconds']:g}",
        "with cache (s)": f"{cached:.2f}",
        "prefix recomputed (s)": f"{uncached:.2f}",
        "ratio": f"{uncached / cached:.1f}",
        "largest difference": f"{both['max_difference']:.0e}",
    }


def load_pipeline(config: Bench) -> VideoPipeline:
    """Load the checkpoint, to be used with the threads that are asked for."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return VideoPipeline.from_pretrained(config.checkpoint)


def measure(config: Bench) -> Row:
    """Generate the video of one kind several times; then measure the machine, and use no cache."""
    before = time.perf_counter()
    pipe = load_pipeline(config)
    load_seconds = time.perf_counter() - before
    done = [generate(pipe, config, seconds=config.seconds) for _ in range(config.repeats)]
    return Row(
        name=config.units[0],
        steps=done[0][1].steps,
        runs=tuple(timing for timing, _ in done),
        tokens=done[0][1].tokens,
        flops=done[0][1].flops,
        load_seconds=load_seconds,
        window_frames=pipe.sampling.window_frames,
        matmul_rate=machine.measure_matmul_rate("cpu", precision="float32"),
        hardware=machine.hardware("cpu"),
        uncached=measure_uncached(pipe, config) if config.uncached_seconds else None,
    )


def measure_flat(config: Bench) -> Json:
    """Generate one long video; return what its seconds cost, and the peak of memory on the way."""
    pipe, clock = load_pipeline(config), []

    def tick(frames: int, seconds: float) -> None:
        clock.append((frames, seconds, machine.peak_bytes()))

    generate(pipe, config, seconds=config.long_seconds, show=tick)
    frames, times, peaks = zip(*clock, strict=True)
    fps = pipe.sampling.fps
    seconds = np.arange(1, config.long_seconds // MARK_SECONDS + 1) * MARK_SECONDS
    return {
        "seconds": seconds.tolist(),
        "cost": [cost_at(second, fps=fps, frames=frames, times=times) for second in seconds],
        "early_bytes": peaks[int(np.searchsorted(frames, 20 * fps))],
        "late_bytes": peaks[-1],
    }


def cost_at(second: float, *, fps: float, frames: Sequence[int], times: Sequence[float]) -> float:
    """Return the time per second of video over the span that ends at a second of it.

    There were so many `frames` at these `times`.
    """
    end, begin = np.interp([second * fps, (second - SPAN_SECONDS) * fps], frames, times)
    return float(end - begin) / SPAN_SECONDS


def _pairs(mask: Tensor | Spans) -> int:
    """Count the pairs of query and key that a mask lets through."""
    if isinstance(mask, Tensor):
        return int(mask.sum())
    runs = zip(mask.queries, mask.keys, strict=True)
    return sum((q.stop - q.start) * sum(k.stop - k.start for k in keys) for q, keys in runs)


class Counted:
    """A network that counts what passes through it."""

    def __init__(self, network: Network, transformer: VideoTransformer) -> None:
        self.network, self.config = network, network.config
        self.flops_of = transformer.flops
        self.tokens, self.flops = 0, 0.0
        self.steps = 0

    def __call__(self, tokens: Tensor, **inputs: Any) -> Output:
        """Count a pass and do it."""
        mask, cache, text = inputs["mask"], inputs["cache"], inputs["text"][0][0]
        count = tokens.shape[1]
        keys = cache.tokens + count if mask is None else _pairs(mask) // count
        self.tokens += count
        self.flops += len(text) * self.flops_of(count, keys=keys, words=text.shape[2])
        return self.network(tokens, **inputs)


def start(pipe: VideoPipeline, config: Bench, *, seconds: float) -> Generation:
    """Prepare to generate a video."""
    steps = config.num_inference_steps
    stated: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}
    return pipe.generate(
        [config.prompt],
        num_frames=max(1, round(seconds * pipe.sampling.fps)),
        seeds=[0],
        units=config.units[0],
        **stated,
    )


def generate(
    pipe: VideoPipeline,
    config: Bench,
    *,
    seconds: float,
    show: Callable[[int, float], None] = lambda frames, seconds: None,
) -> tuple[Timing, Counted]:
    """Generate a video file and forget it; return what it took, and what the network did.

    After every write `show` gets the frames and the seconds so far.
    """
    generation = start(pipe, config, seconds=seconds)
    counted = Counted(generation.sampler.network, pipe.transformer)
    counted.steps = generation.sampler.config.num_steps
    generation.sampler.network = counted
    with tempfile.TemporaryDirectory() as folder:
        writer = VideoWriter(Path(folder) / "video.mp4", fps=pipe.sampling.fps)
        timing = write(generation, writer, fps=pipe.sampling.fps, show=show)
    if timing.interrupted:
        raise KeyboardInterrupt
    return timing, counted


def measure_uncached(pipe: VideoPipeline, config: Bench) -> Json:
    """Time the network alone for one video, with the cache and with the prefix recomputed.

    Both let a unit read all before it: sinks that move with a window exist only in a cache.
    """
    plain = replace(pipe.sampling, window_frames=None, lag=None, context_noise=0.0)
    pipe = replace(pipe, sampling=plain)
    times: dict[str, list[float]] = {"cached": [], "uncached": []}
    tokens: dict[str, Tensor] = {}
    for _ in range(config.repeats):
        for name, generate_all in (("cached", with_cache), ("uncached", without_cache)):
            sampler = start(pipe, config, seconds=config.uncached_seconds).sampler
            before = time.perf_counter()
            tokens[name] = generate_all(sampler)
            times[name].append(time.perf_counter() - before)
    difference = float((tokens["cached"] - tokens["uncached"]).abs().max())
    assert difference < 1e-2, f"the cache changes tokens by {difference}"
    seconds = {f"{name}_seconds": statistics.median(values) for name, values in times.items()}
    return {"seconds": config.uncached_seconds, "max_difference": difference} | seconds


@torch.inference_mode()
def with_cache(sampler: Sampler) -> Float[Tensor, "batch tokens features"]:
    """Return all tokens of a clip in the order of its units."""
    finished = sorted(sampler, key=lambda item: item.unit.index)
    return torch.cat([item.tokens for item in finished], dim=1)


@torch.inference_mode()
def without_cache(sampler: Sampler) -> Float[Tensor, "batch tokens features"]:
    """Do what a sampler does, by a forward over all tokens so far for every step of every unit."""
    units, config, batch = sampler.units, sampler.config, len(sampler.seeds)
    visible = config.visible.matrix(torch.arange(len(units.sizes)), units.waves)
    tokens: list[Tensor] = []
    for unit in units:
        count, size = unit.index + 1, unit.size
        row = units.unit[units.unit < count]
        mask = token_mask(visible[:count, :count], row, row)
        shape = size, sampler.network.config.token_dim
        x = unit_noise(sampler.seeds, unit.index, shape)
        for at, (sigma, after) in enumerate(itertools.pairwise(config.sigmas)):
            output = sampler.network(
                torch.cat([*tokens, x], dim=1),
                coords=units.coords[: len(row)],
                sigma=torch.tensor([[0.0] * unit.index + [sigma]]).expand(batch, -1),
                unit=row,
                text=sampler.text,
                mask=mask,
            )
            fresh = unit_noise(sampler.seeds, unit.index, shape, draw=at + 1)
            x = config.step(x, output.velocity[:, -size:], sigma, after, fresh)
        tokens.append(x)
    return torch.cat(tokens, dim=1)
