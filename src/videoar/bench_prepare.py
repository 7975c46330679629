"""Speed of preparation: what reading a folder of videos costs beside decoding them at all."""

import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from videoar import prepare
from videoar.data import Batches, LatentShards
from videoar.frames import Unusable, cut, read
from videoar.options import BenchPrepare, Prepare
from videoar.sources import Source, list_sources

LOADED = 200  # batches


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way through all videos."""

    name: str
    seconds: float
    megabytes: float
    clips: int | None

    def cells(self, plain: float) -> list[str]:
        """Return the cells of the table; `plain` are the seconds of the decoder alone."""
        rate = "" if self.clips is None else f"{self.clips / self.seconds:.1f}"
        speed = f"{self.megabytes / self.seconds:.1f}"
        return [self.name, f"{self.seconds:.2f}", speed, rate, f"{plain / self.seconds:.0%}"]


def run(config: BenchPrepare, report: Callable[[str], None]) -> str:
    """Decode alone, then read as preparation does, then prepare; all in one process and thread.

    Returns:
        The table: medians over the repeats, in turn.
    """
    if not config.videos.is_dir():
        raise ValueError(f"there is no folder {config.videos}: name the folder of your videos")
    sources = list_sources(config.videos, captions="none").sources
    sources = [source for source in sources if source.kind == "video" and not source.offset]
    if not sources:
        raise ValueError(f"{config.videos} holds no video files: name another folder")
    size = sum(source.size for source in sources) / 1e6
    ways = {"decode (PyAV alone)": _decode, "read (decode, resample, resize, cut)": _clips}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    clips = 0
    for turn, (name, way) in itertools.product(range(config.repeats), ways.items()):
        before = time.perf_counter()
        clips = sum(way(source, config) for source in sources)
        seconds[name].append(time.perf_counter() - before)
        report(f"{turn + 1}/{config.repeats}  {name}: {seconds[name][-1]:.2f} s")
    decode, reading = (float(np.median(values)) for values in seconds.values())
    first, second = ways
    rows = [
        Row(name=first, seconds=decode, megabytes=size, clips=None),
        Row(name=second, seconds=reading, megabytes=size, clips=clips),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        latents, before = Path(scratch) / "latents", time.perf_counter()
        prepare.run(_options(config, latents))
        took = time.perf_counter() - before
        rows += [Row(name="prepare (starting included)", seconds=took, megabytes=size, clips=clips)]
        rate = _loading(latents)
    lines = [["", "seconds", "MB/s", "clips/s", "of decoding"], ["---"] * 5]
    lines += [row.cells(decode) for row in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    about = f"{len(sources)} videos, {size:.1f} MB, one process and thread"
    return f"{about}\n\n{table}\n\nloader: {rate:,.0f} batches of 8 clips per second\n"


def _options(config: BenchPrepare, latents: Path) -> Prepare:
    names = ("videos", "codec", "fps", "num_frames", "sizes")
    shared = {name: getattr(config, name) for name in names}
    return Prepare(latents=latents, captions="none", workers=1, held_out=0.0, **shared)


def _decode(source: Source, config: BenchPrepare) -> int:
    with av.open(source.path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return sum(1 for _ in container.decode(stream))


def _clips(source: Source, config: BenchPrepare) -> int:
    frames = read(source, fps=config.fps, sizes=_options(config, Path()).pixels or ())
    clips = cut(frames, lengths=config.num_frames, stride=max(config.num_frames))
    count = 0
    try:
        for _ in clips:
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
