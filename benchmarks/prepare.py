"""Speed of preparation: what reading a folder of videos costs beside decoding them at all."""

import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import av
import numpy as np
import torch
from tyro.conf import Positional, arg

from videoar.checkpoints import convert, wan
from videoar.checkpoints.checkpoint import Checkpoint
from videoar.checks import check_options
from videoar.cli import arguments
from videoar.cli.main import exit_code
from videoar.cli.progress import say
from videoar.core.transformer import ModelConfig, VideoTransformer
from videoar.data import prepare
from videoar.data.batches import Batches
from videoar.data.containers import Unusable
from videoar.data.decode import cut, read
from videoar.data.latents import LatentShards
from videoar.data.options import Prepare
from videoar.data.sources import Source, list_sources
from videoar.evaluation.speed import apart
from videoar.evaluation.tables import markdown
from videoar.machine import peak_bytes
from videoar.weights import build_empty


@dataclass(frozen=True, kw_only=True)
class BenchPrepare:
    """Measure what preparation costs beside decoding the same videos, and the loader."""

    videos: Positional[Annotated[Path, arg(metavar="VIDEOS")]]
    """Folder with video files."""
    codec: str = "toy-base"
    """Checkpoint whose codec encodes."""
    fps: float = 16.0
    """Frames per second of the clips."""
    num_frames: tuple[int, ...] = (61, 29)
    """Lengths of clips."""
    sizes: tuple[str, ...] = ("64x64",)
    """Widths and heights of clips."""
    repeats: int = 3
    """How often the videos are read."""
    weights: bool = False
    """Also load 2.6 GiB of random weights, which are made for it and deleted."""

    def __post_init__(self) -> None:
        check_options(self, ("repeats", self.repeats >= 1, "1 or more"))


LOADED = 200  # batches
DECODE, READ = "decode (PyAV alone)", "read (decode, resample, resize, cut)"
PREPARE = "prepare (by the clock, starting included)"


def run(config: BenchPrepare, report: Callable[[str], None]) -> str:
    """Decode alone, then read as preparation does, then prepare; all in one process and thread.

    Returns:
        The table: medians over the repeats, in turn. Seconds are those of the processor, which
        other work changes least, but for preparation, which has a process of its own.
    """
    if not config.videos.is_dir():
        raise ValueError(f"there is no folder {config.videos}: name the folder of your videos")
    sources = list_sources(config.videos, captions="none").sources
    sources = [source for source in sources if not source.pictures and not source.offset]
    if not sources:
        raise ValueError(f"{config.videos} holds no video files: name another folder")
    size, clips = sum(source.size for source in sources) / 1e6, 0
    times: dict[str, list[float]] = {DECODE: [], READ: [], PREPARE: []}
    with tempfile.TemporaryDirectory() as scratch:
        names = ("videos", "codec", "fps", "num_frames", "sizes")
        options = Prepare(
            latents=Path(scratch) / "latents",
            captions="none",
            workers=1,
            held_out=0.0,
            **{name: getattr(config, name) for name in names},
        )
        ways = {DECODE: _decode, READ: partial(_clips, options=options)}
        for turn, (name, way) in itertools.product(range(config.repeats), ways.items()):
            before = time.process_time()
            clips = sum(way(source) for source in sources)
            times[name].append(time.process_time() - before)
            report(f"{turn + 1}/{config.repeats}  {name}: {times[name][-1]:.2f} s")
        before = time.perf_counter()
        prepare.run(options)
        times[PREPARE].append(time.perf_counter() - before)
        rate = _loading(options.latents)
    seconds = {name: float(np.median(values)) for name, values in times.items()}
    rows = [["", "seconds", "MB/s", "clips/s", "of decoding"]]
    for name, took in seconds.items():
        made = "" if name == DECODE else f"{clips / took:.1f}"
        share = f"{seconds[DECODE] / took:.0%}"
        rows.append([name, f"{took:.2f}", f"{size / took:.1f}", made, share])
    about = f"{len(sources)} videos, {size:.1f} MB, one process and thread"
    text = f"{about}\n\n{markdown(rows)}\n\nloader: {rate:,.0f} batches of 8 clips per second\n"
    return text + (_loading_weights(report) if config.weights else "")


def _loading_weights(report: Callable[[str], None]) -> str:
    """Make random weights in the shape of Wan 1.3B, load them in a fresh process, delete them."""
    with tempfile.TemporaryDirectory() as folder:
        report("making random weights of 1.3 billion parameters")
        size = apart(_make_weights, Path(folder))
        seconds, *peaks = apart(_load_weights, Path(folder))
    before, loaded, read = (f"{peak / 2**30:.2f} GiB" for peak in peaks)
    return (
        f"weights of {size / 2**30:.2f} GiB, bfloat16: loaded in {seconds:.2f} s; peak memory"
        f" {before} before, {loaded} loaded, {read} when every weight was read\n"
    )


def _make_weights(folder: Path) -> int:
    config = ModelConfig()
    shapes = build_empty(VideoTransformer, config).state_dict()
    random = {
        name: torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(std=0.02)
        for name, tensor in shapes.items()
    }
    random["scale_embedding.weight"].zero_()  # as in every public checkpoint
    convert.save_diffusers(folder, wan.TransformerWeights(random, config, folder, ""))
    return sum(tensor.nbytes for tensor in random.values())


def _load_weights(folder: Path) -> tuple[float, int, int, int]:
    before, start = peak_bytes(), time.perf_counter()
    model = Checkpoint.find(folder).transformer().build()
    seconds, loaded = time.perf_counter() - start, peak_bytes()
    for parameter in model.parameters():
        parameter.sum()
    return seconds, before, loaded, peak_bytes()


def _decode(source: Source) -> int:
    with av.open(source.path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return sum(1 for _ in container.decode(stream))


def _clips(source: Source, options: Prepare) -> int:
    lengths, count = options.num_frames, 0
    frames = read(source, fps=options.fps, sizes=options.pixels or ())
    try:
        for _ in cut(frames, lengths=lengths, stride=max(lengths)):
            count += 1
    except Unusable:  # as in preparation, what came before is used
        pass
    return count


def _loading(latents: Path) -> float:
    """Return the batches per second that training would get."""
    shards = LatentShards(latents)
    size = min(8, int(np.bincount(shards.kinds).max()))
    batches = Batches(shards, batch_size=size, seed=0, kinds=shards.kinds)
    before = time.perf_counter()
    for step in range(LOADED):
        batches.batch(step)
    return LOADED / (time.perf_counter() - before)


def main(words: Sequence[str]) -> int:
    """Print the tables; bad input is one sentence."""
    prog = "python benchmarks/prepare.py"
    return exit_code(lambda: say(run(arguments.read(BenchPrepare, words, prog=prog), say)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
