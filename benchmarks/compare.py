"""Two checkouts beside each other: what a change does to the speed, and to what comes out.

    python benchmarks/compare.py OLD NEW

Each checkout runs in a process of its own, with its own `src/`; they take turns, so that what else
the machine does falls on both alike, and what counts is the time of the processor, not the clock.
`toy` is timed from the prompt to the pixels, and `passes` are its passes alone; `wide` is the
shape of Wan 1.3B with two layers, without a codec.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tyro.conf import Positional, arg

from videoar.checks import check_options
from videoar.cli import arguments
from videoar.cli.main import exit_code

KINDS = (
    *("frame", "chunk:2", "key-detail:4", "multiscale:4,2,1"),
    *("cube:1x2x2", "cube:2x2x2", "cube:1x2x2/wavefront"),
)


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare the speed and the output of two checkouts."""

    old: Positional[Annotated[Path, arg(metavar="OLD")]]
    """Folder of the one."""
    new: Positional[Annotated[Path, arg(metavar="NEW")]]
    """Folder of the other."""
    units: tuple[str, ...] = KINDS
    """Kinds of unit."""
    of: tuple[Literal["toy", "passes"], ...] = ("toy", "passes")
    """What is timed: `toy` from prompt to pixels, its passes alone, or both."""
    wide: tuple[str, ...] = ("chunk:3", "cube:3x8x14")
    """Kinds of unit at the shape of Wan; none: `--wide`."""
    wide_frames: int = 12
    """Latent frames of these."""
    dtype: str = "bfloat16"
    """Of the wide weights."""
    seconds: float = 10.0
    """Of video from `toy`, less 3 frames, so that segments are whole; 1 or more."""
    num_inference_steps: int = 4
    """Denoising steps per unit."""
    batch: int = 1
    """Videos at once."""
    rounds: int = 5
    """How often each runs."""

    def __post_init__(self) -> None:
        least = dict.fromkeys(("seconds", "num_inference_steps", "batch", "rounds"), 1)
        check_options(self, least=least)


def begin(units: str, seconds: float, steps: int, batch: int) -> Any:
    """Begin videos of the bundled model."""
    from videoar.generation.pipeline import VideoPipeline

    # Four latent frames a second: whole segments, as what is made of others changed.
    how = {"num_frames": round(16 * seconds) - 3, "num_inference_steps": steps, "units": units}
    prompts = ["a big red ball moves left on a black background"] * batch
    pipe = VideoPipeline.from_pretrained("toy")
    return lambda: pipe.generate(prompts, seeds=list(range(batch)), **how)


def toy(*video: Any) -> dict[str, Any]:
    """Generate videos with the bundled model; return what it took and what came out."""
    start = begin(*video)
    before = time.process_time()
    generation = start()
    frames = np.concatenate(list(generation), axis=1)
    took = time.process_time() - before
    return {"seconds": took, "passes": generation.stats.passes, "output": frames}


def passes(*video: Any) -> dict[str, Any]:
    """Do the same without the text and the decoder."""
    import torch

    sampler = begin(*video)().sampler
    before = time.process_time()
    with torch.inference_mode():
        tokens = torch.cat([each.tokens for each in sampler], dim=1)
    took = time.process_time() - before
    return {"seconds": took, "passes": sampler.passes, "output": tokens.numpy()}


@cache
def wide_model(dtype: str) -> Any:
    """Return a transformer as wide as Wan 1.3B, of two layers, with random weights."""
    import torch

    from videoar.core.transformer import ModelConfig, VideoTransformer

    torch.manual_seed(0)
    model = VideoTransformer(ModelConfig(num_layers=2))
    torch.nn.init.normal_(model.proj_out.weight, std=0.02)
    return model.to(getattr(torch, dtype)).eval()


def wide(units: str, frames: int, dtype: str, steps: int) -> dict[str, Any]:
    """Generate latent frames of 16 x 28 tokens in a window of 6; return what it took."""
    import torch

    from videoar.core.flow import sigma_steps
    from videoar.core.sampler import Sampler, SamplerConfig
    from videoar.core.schemes import parse
    from videoar.core.units import Units, Visible

    model, lattice = wide_model(dtype), Units(parse(units), frames, 16, 28)
    with torch.inference_mode():
        rows = torch.randn(1, 64, 4096, generator=torch.Generator().manual_seed(0))
        text = model.encode_text(rows.to(getattr(torch, dtype)))
        window = Visible(window=lattice.units_of(6))
        config = SamplerConfig(sigmas=sigma_steps(steps, shift=5.0), visible=window)
        sampler = Sampler(model, lattice, text, config, seeds=(0,))
        before = time.process_time()
        tokens = torch.cat([each.tokens for each in sampler], dim=1)
        took = time.process_time() - before
    return {"seconds": took, "passes": sampler.passes, "output": tokens.float().numpy()}


def serve() -> None:
    """Do the jobs that come on standard input, one a line."""
    import torch

    import videoar

    torch.set_num_threads(1)
    assert Path(videoar.__file__).is_relative_to(os.environ["PYTHONPATH"])
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what else is printed must not be taken for an answer
    for line in sys.stdin:
        name, arguments, file = json.loads(line)
        result = {"toy": toy, "passes": passes, "wide": wide}[name](*arguments)
        np.save(file, result.pop("output"))
        print(json.dumps(result), file=answer)


class Checkout:
    """A process that computes with the code of one folder."""

    def __init__(self, folder: Path, place: Path) -> None:
        source = folder.resolve() / "src"
        if not (source / "videoar").is_dir():
            raise ValueError(f"{folder} is no checkout: it has no src/videoar")
        self.file = place / "output.npy"
        place.mkdir()
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        program = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        self.process = subprocess.Popen(program, env=environment, **pipes)

    def do(self, name: str, *arguments: Any) -> tuple[dict[str, Any], np.ndarray]:
        """Run a job and wait for it."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        print(json.dumps([name, arguments, str(self.file)]), file=stdin, flush=True)
        line = stdout.readline()
        if not line:
            raise ValueError("a checkout died: its own message stands above")
        return json.loads(line), np.load(self.file)


def spread(values: list[float], form: str = ".2f") -> str:
    """Write the median and the range."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"


def compare(config: Compare) -> None:
    """Print a line for each job."""
    steps = config.num_inference_steps
    jobs: list[tuple[Any, ...]] = [
        (name, units, config.seconds, steps, config.batch)
        for name, units in itertools.product(config.of, config.units)
    ]
    jobs += [("wide", units, config.wide_frames, config.dtype, steps) for units in config.wide]
    print("CPU ms per pass, medians [lowest, highest]; a ratio is of neighbours in time\n")
    print("| what | passes | old | new | old / new | largest difference, share |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as place:
        folders = {"old": config.old, "new": config.new}
        both = [Checkout(folder, Path(place) / name) for name, folder in folders.items()]
        for job in jobs:
            rounds = [[each.do(*job) for each in both] for _ in range(config.rounds + 1)][1:]
            cost = [[1000 * r["seconds"] / r["passes"] for r, _ in pair] for pair in rounds]
            old, new = (list(side) for side in zip(*cost, strict=True))
            difference = np.abs(np.subtract(*(o.astype(float) for _, o in rounds[-1])))
            cells = [
                f"{job[0]} {job[1]}",
                " / ".join(str(result["passes"]) for result, _ in rounds[-1]),
                spread(old),
                spread(new),
                spread([a / b for a, b in cost]),
                f"{difference.max():.2g}, {(difference > 0).mean():.3%}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
        for each in both:
            each.process.communicate()


def main(words: Sequence[str]) -> int:
    """Print the table; bad input is one sentence."""
    prog = "python benchmarks/compare.py"
    return exit_code(lambda: compare(arguments.read(Compare, words, prog=prog)))


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1:] == ["--serve"] else main(sys.argv[1:]))
