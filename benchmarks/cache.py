"""What a cache is worth: the same sampling with the prefix recomputed in every pass."""

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from tyro.conf import Positional

from videoar import machine
from videoar.checks import check_options
from videoar.cli import arguments
from videoar.cli.main import exit_code
from videoar.cli.progress import say
from videoar.core.noise import unit_noise
from videoar.core.sampler import Sampler
from videoar.core.schemes import KINDS
from videoar.core.units import token_mask
from videoar.evaluation.options import Checkpoint
from videoar.evaluation.tables import cells, markdown
from videoar.generation.pipeline import VideoPipeline


@dataclass(frozen=True, kw_only=True)
class BenchCache:
    """Time the network alone for one video, with the cache and with the prefix recomputed."""

    checkpoint: Positional[Checkpoint] = "toy"
    """A bundled name or a folder."""
    units: tuple[str, ...] = KINDS
    """Kinds of unit."""
    prompt: str = "a large red ball moves left on a black background"
    """What is generated."""
    seconds: float = 2.0
    """Length of the video."""
    num_inference_steps: int = 4
    """Denoising steps per unit."""
    repeats: int = 3
    """How often it is generated."""
    threads: int | None = None
    """CPU threads."""

    def __post_init__(self) -> None:
        least = {"num_inference_steps": 1, "repeats": 1, "threads": 1}
        check_options(self, ("seconds", self.seconds > 0, "a number above 0"), least=least)


def measure(pipe: VideoPipeline, config: BenchCache, units: str) -> dict[str, str]:
    """Return the cells of one kind of unit, by column.

    Both let a unit read all before it: sinks that move with a window exist only in a cache.
    """
    plain = replace(pipe.sampling, window_frames=None, lag=None, context_noise=0.0)
    pipe = replace(pipe, sampling=plain)
    times: dict[str, list[float]] = {"cached": [], "uncached": []}
    tokens: dict[str, Tensor] = {}
    for _ in range(config.repeats):
        for name, generate_all in (("cached", with_cache), ("uncached", without_cache)):
            sampler = pipe.generate(
                [config.prompt],
                num_frames=max(1, round(config.seconds * pipe.sampling.fps)),
                seeds=[0],
                units=units,
                num_inference_steps=config.num_inference_steps,
            ).sampler
            before = time.perf_counter()
            tokens[name] = generate_all(sampler)
            times[name].append(time.perf_counter() - before)
    difference = float((tokens["cached"] - tokens["uncached"]).abs().max())
    assert difference < 1e-2, f"the cache changes tokens by {difference}"
    cached, uncached = map(statistics.median, times.values())
    return {
        "units": units,
        "video (s)": f"{config.seconds:g}",
        "with cache (s)": f"{cached:.2f}",
        "prefix recomputed (s)": f"{uncached:.2f}",
        "ratio": f"{uncached / cached:.1f}",
        "largest difference": f"{difference:.0e}",
    }


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
        shape = size, sampler.network.config.token_dim
        x, memory = unit_noise(sampler.seeds, unit.index, shape), None
        for done, sigma in enumerate(map(config.told, config.sigmas[:-1])):
            output = sampler.network(
                torch.cat([*tokens, x], dim=1),
                coords=units.coords[: len(row)],
                sigma=torch.tensor([[0.0] * unit.index + [sigma]]).expand(batch, -1),
                unit=row,
                text=sampler.text,
                mask=mask,
            )
            fresh = partial(unit_noise, sampler.seeds, unit.index, shape, draw=done + 1)
            velocity, sigmas = output.velocity[:, -size:], config.sigmas[: done + 2]
            x, memory = config.step(x, velocity, sigmas, memory, fresh)
        tokens.append(x)
    return torch.cat(tokens, dim=1)


def run(config: BenchCache) -> str:
    """Measure every kind of unit, and return a table."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    pipe = VideoPipeline.from_pretrained(config.checkpoint)
    rows = [measure(pipe, config, name) for name in config.units]
    return f"{markdown(cells(rows))}\n\nMedians of {config.repeats}, {machine.hardware('cpu')}."


def main(words: Sequence[str]) -> int:
    """Print the table; bad input is one sentence."""
    prog = "python benchmarks/cache.py"
    return exit_code(lambda: say(run(arguments.read(BenchCache, words, prog=prog))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
