"""Speed and memory of generation, from a prompt to a closed video file, and of its passes alone.

Every kind of unit runs in a fresh process, so that its peak of memory is its own and its start is a
real one. What a figure includes stands in the report. What a cache is worth measures
`benchmarks/cache.py`, and whether long videos stay flat `benchmarks/length.py`.
"""

import itertools
import multiprocessing
import signal
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from videoar.core.flow import sigma_steps
from videoar.core.sampler import Sampler, SamplerConfig
from videoar.core.schemes import KINDS, parse
from videoar.core.transformer import ModelConfig, VideoTransformer
from videoar.core.units import Units, Visible
from videoar.data.video import VideoWriter
from videoar.evaluation.beside import beside
from videoar.evaluation.options import SHAPE_KINDS, Bench
from videoar.evaluation.tables import cells, markdown, spread
from videoar.files import Json, load, save
from videoar.generation.inputs import Show, write
from videoar.generation.pipeline import VideoPipeline
from videoar.generation.stream import Generation
from videoar.generation.timing import Timing
from videoar.weights import as_dtype

INCLUDED = (
    "Frames per second are end to end: text encoding, sampling, decoding and writing the file. "
    "Loading is in `from start` alone, which begins with the process. Medians of {repeats} runs "
    "[lowest, highest], no warm-up. {seconds:g} s of video, {hardware}, {dtype}."
)
BESIDE = (
    "Passes alone, in turn with others, CPU time if there is one thread: a unit pass is a step of "
    "a unit, or the pass that commits it to the cache; text, decoding and writing are not in it. "
    "`plain` is a textbook loop of the same weights, layer by layer, nothing kept between passes. "
    "`diffusers` is its transformer over one unit without context, which projects the text in "
    "every pass, beside ours over the same. Medians of {repeats} turns [lowest, highest], largest "
    "differences as shares of the largest value, {hardware}."
)
WINDOW = 6  # latent frames, of a shape
LATTICE = 15, 26  # tokens of a latent frame: 240x416 pixels
WORDS = 512


def run(config: Bench, report: Callable[[str], None]) -> str:
    """Measure every kind of unit, and return the tables."""
    return tables(config, measure_all(config, report))


def measure_all(config: Bench, report: Callable[[str], None]) -> list[Json]:
    """Measure every kind of unit, with a line of report for each.

    Raises:
        ValueError: the checkpoint or an argument does not fit.
        ChildProcessError: a measurement died, for instance for want of memory.
    """
    kinds = config.units or (KINDS if config.shape is None else SHAPE_KINDS)
    for name in kinds:
        parse(name)
    load(config.out, "benchmark", kind="benchmark")  # fails now if it must fail
    jobs: list[tuple[Any, ...]] = [(measure,)]
    if config.shape is not None:
        jobs = [(measure_shape, dtype) for dtype in ("float32", "bfloat16")]
    rows = []
    for (job, *given), name in itertools.product(jobs, kinds):
        rows.append({"name": name, **apart(job, replace(config, units=(name,)), *given)})
        said = speed_cells(rows[-1]) | pass_cells(rows[-1])
        report(", ".join(f"{key} {cell}" for key, cell in said.items()))
    save(config.out, {"benchmark": {"config": replace(config, out=None), "rows": rows}})
    return rows


def apart(job: Callable[..., Any], *args: object) -> Any:
    """Run a job in a fresh process."""
    spawn, quiet = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_DFL)
    # Ctrl-C reaches both processes, and it is this one that says so.
    with ProcessPoolExecutor(1, spawn, initializer=signal.signal, initargs=quiet) as pool:
        try:
            return pool.submit(job, *args).result()
        except BrokenExecutor as error:
            raise ChildProcessError("a measurement died: is there too little memory?") from error


def tables(config: Bench, rows: Sequence[Json]) -> str:
    """Return the tables, and what their figures include."""
    about, parts = rows[0] | vars(config), list[str]()
    for title, each in ((INCLUDED, speed_cells), (BESIDE, pass_cells)):
        if lines := [line for line in map(each, rows) if line]:
            parts.append(f"{title.format(**about)}\n\n{markdown(cells(lines))}\n")
    return "\n".join(parts)


def pass_cells(row: Json) -> dict[str, str]:
    """Return the cells of the table of passes, by column."""
    seconds, flops = row["seconds"], row["flops"] / row["matmul_flops"]

    def ratio(one: str, other: str) -> list[float]:
        return [a / b for a, b in zip(seconds[one], seconds[other], strict=True)]

    return {
        "units": row["name"],
        "dtype": row["dtype"],
        "tokens": f"{row['tokens']:.0f}",
        "ms/unit pass": spread([1000 * each for each in seconds["ours"]]),
        "of a matmul": f"{flops * statistics.median(ratio('matmul', 'ours')):.0%}",
        "plain / ours": spread(ratio("plain", "ours")),
        "diffusers / ours": spread(ratio("diffusers", "alone")) if "alone" in seconds else "-",
        "largest difference": ", ".join(f"{each:.0e}" for each in row["difference"]),
    }


def speed_cells(row: Json) -> dict[str, str]:
    """Return the cells of the table of speed, by column; none of a shape."""
    if "runs" not in row:
        return {}
    runs = row["runs"]
    first, names = runs[0], ("model_seconds", "decode_seconds", "write_seconds")
    seconds = [statistics.median(getattr(run, name) for run in runs) for name in names]
    start = first.start_seconds
    return {
        "units": row["name"],
        "frames/s": spread([run.fps for run in runs]),
        "model, decode, write (s)": ", ".join(f"{value:.2f}" for value in seconds),
        "steps": str(row["steps"]),
        "passes": str(first.passes),
        "ms/pass": f"{1000 * seconds[0] / first.passes:.2f}",
        "cache": f"{first.cache_tokens} tokens, {first.cache_bytes / 2**20:.1f} MiB",
        "window (latent frames)": str(row["window_frames"] or "all"),
        "first frame (s)": spread([run.first_frame_seconds for run in runs]),
        "from start (s)": "unknown" if start is None else f"{start:.2f}",
        "peak memory": f"{runs[-1].peak_bytes / 2**20:.0f} MiB",
    }


def load_pipeline(config: Bench) -> VideoPipeline:
    """Load the checkpoint, to be used with the threads that are asked for."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return VideoPipeline.from_pretrained(config.checkpoint)


def measure(config: Bench) -> Json:
    """Generate the video of one kind several times; then time passes, and measure the machine.

    Returns:
        All that was measured: the `runs`, each a `Timing` of the same video, the first one at the
        start of a process; the latent frames that a unit may read, None for all; and what `beside`
        says.
    """
    pipe = load_pipeline(config)
    runs = [generate(pipe, config, seconds=config.seconds) for _ in range(config.repeats)]
    words = pipe.prompt_encoder.encode([config.prompt]).to(pipe.transformer.proj_out.weight)
    sampler = begin(pipe, config, None).sampler
    passes = beside(pipe.transformer, sampler, words, repeats=config.repeats)
    return {"runs": runs, "window_frames": pipe.sampling.window_frames, **passes}


def measure_shape(config: Bench, dtype: str) -> Json:
    """Time passes of one kind over random weights of a shape; speed does not depend on values."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    model = VideoTransformer(ModelConfig(num_layers=config.layers or 2))
    torch.nn.init.normal_(model.proj_out.weight, std=0.02)
    model.to(as_dtype(dtype)).eval()
    units = Units(parse(config.units[0]), None, *LATTICE)
    words = torch.randn(1, WORDS, model.config.text_dim).to(model.proj_out.weight)
    sigmas = sigma_steps(config.num_inference_steps or 4, shift=5.0)
    how = SamplerConfig(sigmas=sigmas, visible=Visible(window=units.units_of(WINDOW)))
    with torch.inference_mode():
        sampler = Sampler(model, units, model.encode_text(words), how, seeds=(0,))
    return beside(model, sampler, words, repeats=config.repeats)


def begin(pipe: VideoPipeline, config: Bench, num_frames: int | None) -> Generation:
    """Begin a video, or an endless one."""
    steps = config.num_inference_steps
    how: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}
    how |= {"num_frames": num_frames, "seeds": [0], "units": config.units[0]}
    return pipe.generate([config.prompt], **how)


def generate(
    pipe: VideoPipeline, config: Bench, *, seconds: float, show: Show = lambda *_: None
) -> Timing:
    """Generate a video file and forget it; return what it took.

    After every write `show` gets the frames and the seconds so far.
    """
    fps = pipe.sampling.fps
    generation = begin(pipe, config, max(1, round(seconds * fps)))
    with tempfile.TemporaryDirectory() as folder:
        timing = write(generation, VideoWriter(Path(folder) / "video.mp4", fps=fps), show)
    if timing.interrupted:
        raise KeyboardInterrupt(timing.interrupted)
    return timing
