"""What a card makes of the sampler: ten minutes on any CUDA device, one JSON and one table.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --tiny --device cpu --how plain graphs

Random weights in the shape of Self-Forcing (Wan 1.3B at 832x480): speed does not depend on values.
A stream runs until its window is full; then segments are timed, ours and those of a plain eager
loop in turn: a pass for every step and one for the cache, with positions and sigmas made anew for
each. A case has a row for each way in which ours computes: as it is, with passes recorded as
graphs, with compiled blocks, and with both. `e2e` is ours with decoding by the tiny codec, and
frames as uint8 on the host. Text, loading, recording and compilation are not included.
"""

import copy
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videoar import machine
from videoar.checks import check_options
from videoar.cli import arguments
from videoar.cli.main import exit_code
from videoar.cli.progress import say
from videoar.core.flow import Sigmas, sigma_steps
from videoar.core.sampler import Sampler, SamplerConfig
from videoar.core.schemes import parse
from videoar.core.transformer import ModelConfig, Network, TextContext, VideoTransformer
from videoar.core.units import Unit, Units, Visible
from videoar.encoders.codec import to_frames
from videoar.encoders.tiny_codec import TinyCodec, TinyCodecConfig
from videoar.evaluation.beside import plain_loop
from videoar.evaluation.tables import cells, markdown
from videoar.files import Json, write_json
from videoar.generation.compiled import Compiled, compile_blocks
from videoar.generation.graphs import Recorded
from videoar.generation.latents import Assembler

# Cubes of as many tokens as chunk:3 and frame, and smaller ones.
UNITS = ("chunk:3", "cube:6x15x52", "frame", "cube:2x15x52", "cube:3x10x13")
TINY_UNITS = ("chunk:3", "cube:6x2x4", "frame", "cube:2x2x4")
HOW = ("plain", "graphs", "compile", "compile+graphs")
TESTS = Path(__file__).parents[1] / "tests"


@dataclass(frozen=True, kw_only=True)
class BenchGpu:
    """Measure random weights in the shape of Self-Forcing on a device."""

    device: str = "cuda"
    """Where to compute."""
    tiny: bool = False
    """Whether model and pictures are tiny, to try the program itself."""
    units: tuple[str, ...] = ()
    """Kinds of unit; none: chunk:3, frame, and cubes of as many tokens and fewer."""
    windows: tuple[int, ...] = (12, 21)
    """Latent frames that a unit may read."""
    num_inference_steps: tuple[int, ...] = (4, 2, 1)
    """Denoising steps per unit; the pass that writes the cache comes on top."""
    how: tuple[str, ...] = HOW
    """Ways in which ours computes: plain, graphs, compile, compile+graphs."""
    repeats: int = 3
    """Segments that are timed, of each side."""
    minutes: float = 10.0
    """No case begins after them."""
    out: Path = Path("gpu.json")
    """File of the figures."""

    def __post_init__(self) -> None:
        known = ("how", set(self.how) <= set(HOW), f"some of {', '.join(HOW)}")
        check_options(self, ("minutes", self.minutes > 0, "above 0"), known, least={"repeats": 1})


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    units: str
    window: int
    steps: int
    how: str


class Shape:
    """Models with random weights on a device, and a lattice for them."""

    def __init__(self, config: BenchGpu) -> None:
        torch.manual_seed(0)
        tiny = {"num_layers": 2, "num_heads": 2, "head_dim": 16, "ffn_dim": 64, "text_dim": 8}
        model = ModelConfig(**tiny) if config.tiny else ModelConfig()
        self.device = torch.device(config.device)
        self.dtype = torch.float32 if config.tiny else torch.bfloat16
        self.height, self.width = (4, 4) if config.tiny else (30, 52)
        with self.device:
            self.model = VideoTransformer(model).to(self.dtype).eval().requires_grad_(False)
            torch.nn.init.normal_(self.model.proj_out.weight, std=0.02)
            own = TinyCodecConfig.toy() if config.tiny else TinyCodecConfig()
            self.codec = TinyCodec(own).to(self.dtype).eval()
            words = torch.randn(1, 8 if config.tiny else 512, model.text_dim, dtype=self.dtype)
        self.text: TextContext = self.model.encode_text(words)

    @cached_property
    def compiled(self) -> Compiled:
        """The model again, compiled: the plain loop stays as it is."""
        model = copy.deepcopy(self.model)
        compile_blocks(model, self.device)
        return Compiled(model)

    def network(self, how: str) -> Network:
        """Return the model that computes in a way."""
        network = self.compiled if "compile" in how else self.model
        return Recorded(network) if "graphs" in how else network

    def units(self, name: str) -> Units:
        return Units(parse(name), None, self.height, self.width)

    def wait(self) -> None:
        """Until the device has done all."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def sampler(
    network: Network, shape: Shape, units: Units, visible: Visible, sigmas: Sigmas
) -> Sampler:
    """Return a sampler at its beginning."""
    config = SamplerConfig(sigmas=sigmas, visible=visible, moving_sinks=False)
    how: dict[str, Any] = {"seeds": (0,), "device": shape.device}
    return Sampler(network, units, shape.text, config, **how)


def eager(
    shape: Shape, units: Units, visible: Visible, sigmas: Sigmas, _: str
) -> Iterator[tuple[Unit, Tensor]]:
    """Do what a sampler does by a plain loop."""
    for unit, tokens, _ in plain_loop(sampler(shape.model, shape, units, visible, sigmas)):
        yield unit, tokens


def ours(
    shape: Shape, units: Units, visible: Visible, sigmas: Sigmas, how: str
) -> Iterator[tuple[Unit, Tensor]]:
    """Sample by the sampler."""
    for finished in sampler(shape.network(how), shape, units, visible, sigmas):
        yield finished.unit, finished.tokens


def decoded(
    shape: Shape, units: Units, visible: Visible, sigmas: Sigmas, how: str
) -> Iterator[tuple[Unit, Tensor]]:
    """Sample, decode, and bring the frames to the host."""
    assembler = Assembler(units, patch=shape.model.config.patch)
    decoder = shape.codec.stream_decoder()
    for unit, tokens in ours(shape, units, visible, sigmas, how):
        latents = assembler.add(unit, tokens)
        if latents is not None:
            to_frames(decoder(latents.to(shape.dtype)).float())
        yield unit, tokens


SIDES: dict[str, Callable[..., Iterator[tuple[Unit, Tensor]]]] = {
    "eager": eager,
    "ours": ours,
    "e2e": decoded,
}


@torch.inference_mode()
def measure(shape: Shape, case: Case, *, repeats: int) -> Json:
    """Time segments of each side in turn, with a full window."""
    units = shape.units(case.units)
    segment = units.units_per_segment
    visible = Visible(window=case.window // units.segment_frames * segment)
    sigmas = sigma_steps(case.steps, shift=5.0)
    if shape.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(shape.device)
    runs = {name: side(shape, units, visible, sigmas, case.how) for name, side in SIDES.items()}
    kept, times = dict[str, list[Tensor]](), dict[str, list[float]]()
    for _ in range(case.window // units.segment_frames + 3):  # and until all is recorded
        for name, run in runs.items():
            kept[name] = [tokens for _, tokens in itertools.islice(run, segment)]
    pairs = zip(kept["ours"], kept["eager"], strict=True)
    difference = max(float((a.float() - b.float()).abs().max()) for a, b in pairs)
    for _ in range(repeats):
        for name, run in runs.items():
            shape.wait()
            before = time.perf_counter()
            for _ in itertools.islice(run, segment):
                pass
            shape.wait()
            times.setdefault(name, []).append(time.perf_counter() - before)
    cuda = shape.device.type == "cuda"
    return {
        **vars(case),
        "tokens": units.at(0).size,
        "frames": units.segment_frames * shape.codec.stride[0],
        "passes": segment * (case.steps + 1),
        "seconds": times,
        "difference": difference,
        "peak_bytes": torch.cuda.max_memory_allocated(shape.device) if cuda else None,
    }


def line(row: Json) -> dict[str, str]:
    """Return the cells of a case, by column."""
    middle = {name: statistics.median(each) for name, each in row["seconds"].items()}
    pairs = zip(row["seconds"]["eager"], row["seconds"]["ours"], strict=True)
    ratios = sorted(a / b for a, b in pairs)
    peak = row["peak_bytes"]
    return {
        "units": row["units"],
        "tokens": str(row["tokens"]),
        "window": str(row["window"]),
        "passes": f"{row['steps']}+1",
        "how": row["how"],
        "ms/unit pass": f"{1000 * middle['ours'] / row['passes']:.2f}",
        "frames/s": f"{row['frames'] / middle['ours']:.1f}",
        "e2e frames/s": f"{row['frames'] / middle['e2e']:.1f}",
        "eager frames/s": f"{row['frames'] / middle['eager']:.1f}",
        "eager / ours": f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]",
        "largest difference": f"{row['difference']:.1g}",
        "peak of all three": "unknown" if peak is None else f"{peak / 2**30:.2f} GiB",
    }


def run(config: BenchGpu, report: Callable[[str], None] = say) -> str:
    """Run the tests that need a card, then every case; write the JSON and return the table."""
    machine.check_device(config.device)
    began, tests = time.perf_counter(), "not run: the device is no CUDA device"
    if torch.device(config.device).type == "cuda":
        words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(TESTS)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        tests = (done.stdout.strip().splitlines() or [done.stderr])[-1]
    report(f"tests: {tests}")
    shape, rows, left = Shape(config), list[Json](), list[Case]()
    names = config.units or (TINY_UNITS if config.tiny else UNITS)
    for case in itertools.starmap(
        Case, itertools.product(names, config.windows, config.num_inference_steps, config.how)
    ):
        if time.perf_counter() - began > 60 * config.minutes:
            left.append(case)
            continue
        rows.append(measure(shape, case, repeats=config.repeats))
        report(", ".join(f"{key} {cell}" for key, cell in line(rows[-1]).items()))
    about = {"hardware": machine.hardware(config.device), "torch": torch.__version__}
    about |= {"tests": tests, "left_out": left}
    write_json(config.out, about | {"config": vars(config) | {"out": None}, "rows": rows})
    table = markdown(cells([line(row) for row in rows])) if rows else "nothing was measured"
    missing = f"; {len(left)} cases left out after {config.minutes:g} minutes" if left else ""
    return f"{table}\n\n{about['hardware']}, medians of {config.repeats}{missing}; tests: {tests}"


def main(words: Sequence[str]) -> int:
    """Print the table; bad input is one sentence."""
    prog = "python benchmarks/gpu.py"
    return exit_code(lambda: say(run(arguments.read(BenchGpu, words, prog=prog))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
