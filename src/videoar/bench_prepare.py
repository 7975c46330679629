"""Speed of preparation: what reading a folder of videos costs beside decoding them at all."""

import itertools
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import av
import numpy as np

from videoar import prepare
from videoar.data import Batches, LatentShards
from videoar.frames import Unusable, cut, read
from videoar.options import BenchPrepare, Prepare
from videoar.sources import Source, list_sources
from videoar.tables import markdown

LOADED = 200  # batches
DECODE, READ = "decode (PyAV alone)", "read (decode, resample, resize, cut)"
PREPARE = "prepare (starting included)"


def run(config: BenchPrepare, report: Callable[[str], None]) -> str:
    """Decode alone, then read as preparation does, then prepare; all in one process and thread.

    Returns:
        The table: medians over the repeats, in turn.
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
            before = time.perf_counter()
            clips = sum(way(source) for source in sources)
            times[name].append(time.perf_counter() - before)
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
    return f"{about}\n\n{markdown(rows)}\n\nloader: {rate:,.0f} batches of 8 clips per second\n"


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
