"""Speed of preparation: what reading a folder of videos costs beside decoding them at all."""

import itertools
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch

from videoar import interop, prepare
from videoar.checkpoint import build_empty
from videoar.data import Batches, LatentShards
from videoar.frames import Unusable, cut, read
from videoar.measure import apart
from videoar.model import ModelConfig, VideoTransformer
from videoar.options import BenchPrepare, Prepare
from videoar.output import peak_bytes
from videoar.sources import Source, list_sources
from videoar.tables import markdown

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
    interop.save_diffusers(folder, interop.Found(random, config, folder, ""))
    return sum(tensor.nbytes for tensor in random.values())


def _load_weights(folder: Path) -> tuple[float, int, int, int]:
    before, start = peak_bytes(), time.perf_counter()
    model = interop.read_transformer(folder).build()
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
