"""One measurement of speed, in a process of its own: what `videoar.benchmark` starts.

A request comes as JSON on the standard input, the answer goes as JSON to the standard output.
"""

import itertools
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from videoar import runs
from videoar.benchmark import MARK_SECONDS, SPAN_SECONDS, Run
from videoar.flow import euler_step, unit_noise
from videoar.model import Output, VideoTransformer
from videoar.options import Bench
from videoar.pipeline import Generation, VideoPipeline
from videoar.sampler import Network, Sampler
from videoar.units import token_mask
from videoar.video import VideoWriter

Json = dict[str, Any]


def main() -> None:
    """Do the job that is asked for on the standard input."""
    request = json.load(sys.stdin)
    try:
        config = Bench(**request["config"] | {"units": tuple(request["config"]["units"])})
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        job = {"measure": measure, "measure_flat": measure_flat}[request["job"]]
        answer = job(config, request["started"])
    except ValueError as error:
        answer = {"error": str(error)}
    sys.stdout.write(json.dumps(answer))


def measure(config: Bench, started: float) -> Json:
    """Generate the video of one kind several times; then measure the machine, and use no cache.

    `started` is when this process was started, on the clock `time.time`.
    """
    before = time.perf_counter()
    pipe = VideoPipeline.from_pretrained(config.checkpoint)
    load_seconds, begun = time.perf_counter() - before, time.time()
    done = [generate(pipe, config, seconds=config.seconds)[0] for _ in range(config.repeats)]
    return {
        "runs": [asdict(run) for run in done],
        "start_seconds": begun - started + done[0].first_frame_seconds,
        "load_seconds": load_seconds,
        "peak_bytes": peak_bytes(),  # before anything else takes memory
        "window_frames": pipe.sampling.window_frames,
        "matmul_rate": runs.measure_matmul_rate("cpu", precision="float32"),
        "hardware": runs.hardware("cpu"),
        "uncached": measure_uncached(pipe, config) if config.uncached_seconds else None,
    }


def measure_flat(config: Bench, started: float) -> Json:
    """Generate one long video; return what its seconds cost, and the peak of memory on the way."""
    pipe = VideoPipeline.from_pretrained(config.checkpoint)
    clock = generate(pipe, config, seconds=config.long_seconds)[1]
    frames, times, peaks = (list(column) for column in zip(*clock, strict=True))
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


class Counted:
    """A network that counts what passes through it."""

    def __init__(self, network: Network, transformer: VideoTransformer) -> None:
        self.network, self.config = network, network.config
        self.flops_of = transformer.flops
        self.tokens, self.flops = 0, 0.0

    def __call__(self, tokens: Tensor, **inputs: Any) -> Output:
        """Count a pass and do it."""
        mask, cache, text = inputs["mask"], inputs["cache"], inputs["text"][0][0]
        count = tokens.shape[1]
        keys = cache.tokens + count if mask is None else int(mask.sum()) // count
        self.tokens += count
        self.flops += len(text) * self.flops_of(count, keys=keys, words=text.shape[2])
        return self.network(tokens, **inputs)


def start(pipe: VideoPipeline, config: Bench, *, seconds: float) -> Generation:
    """Prepare to generate a video."""
    return pipe.generate(
        [config.prompt],
        num_frames=max(1, round(seconds * pipe.sampling.fps)),
        seeds=[0],
        units=config.units[0],
        num_inference_steps=config.num_inference_steps,
    )


def generate(
    pipe: VideoPipeline, config: Bench, *, seconds: float
) -> tuple[Run, list[tuple[int, float, int]]]:
    """Generate a video file and forget it.

    Returns:
        What it cost, and after every write: frames so far, time, peak memory.
    """
    started, written, clock, first = time.perf_counter(), 0.0, [], 0.0
    generation = start(pipe, config, seconds=seconds)
    sampler, stats = generation.sampler, generation.stats
    counted = sampler.network = Counted(sampler.network, pipe.transformer)
    with tempfile.TemporaryDirectory() as folder:
        with VideoWriter(Path(folder) / "video.mp4", fps=pipe.sampling.fps) as writer:
            for frames in generation:
                before = time.perf_counter()
                first = first or before - started
                writer.write(frames[0])
                after = time.perf_counter()
                written += after - before
                clock.append((stats.frames, after - started, peak_bytes()))
            before = time.perf_counter()
        ended = time.perf_counter()
    values: Json = vars(stats) | {
        "wall_seconds": ended - started,
        "write_seconds": written + ended - before,
        "first_frame_seconds": first,
        "tokens": counted.tokens,
        "flops": counted.flops,
        "cache_bytes": sampler.cache.num_bytes,
    }
    return Run(**values), clock


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
        count, size = unit.index + 1, len(unit.cells)
        row = units.unit[units.unit < count]
        mask = token_mask(visible[:count, :count], row, row)
        x = unit_noise(sampler.seeds, unit.index, (size, sampler.network.config.token_dim))
        for sigma, after in itertools.pairwise(config.sigmas):
            output = sampler.network(
                torch.cat([*tokens, x], dim=1),
                coords=units.coords[: len(row)],
                sigma=torch.tensor([[0.0] * unit.index + [sigma]]).expand(batch, -1),
                unit=row,
                text=sampler.text,
                mask=mask,
            )
            x = euler_step(x, output.velocity[:, -size:], sigma, after, x)
        tokens.append(x)
    return torch.cat(tokens, dim=1)


def peak_bytes() -> int:
    """Return the most memory that this process has held."""
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="ascii").splitlines() if status.is_file() else []:
        # The peak of `getrusage` counts the process that started this one, too.
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
