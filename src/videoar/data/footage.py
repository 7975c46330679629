"""Pixels of own videos, for what trains on pixels: decoded once, then drawn from as clips.

The folder of a store holds:

footage.json        of what it is made, and how
index.json          how many clips there are of which video, to train on and held out; comes last
rejected.jsonl      every file that is not used, or not to its end, and why
.work/KEY.pixels    the clips of a video, frame after frame

One that was not finished goes on. Once there is an index nothing changes any more, whatever becomes
of the videos: a run draws the same clips until its end.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from videoar.data.clips import read_clips, read_done, write_done
from videoar.data.decode import Unusable
from videoar.data.options import Prepare
from videoar.data.prepare import REJECTED, WORK, Progress, held_out, make_all, write_rejected
from videoar.data.sources import Source, list_sources
from videoar.encoders.codec import from_frames
from videoar.files import to_json, write_json

ABOUT, INDEX = "footage.json", "index.json"
KEPT = ("videos", "fps", "num_frames", "sizes", "held_out")  # what decides which pixels there are

Clips = Sequence[tuple[str, int]]
"""Keys of videos, and numbers of their clips."""


class Footage:
    """A `Dataset`: the clips of a store, all of one length and size."""

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        self.work, self.shape = folder / WORK, tuple(index["shape"])
        self.clips, self.apart = (
            [(key, number) for key, count in index[part].items() for number in range(count)]
            for part in ("train", "held_out")
        )

    def __len__(self) -> int:
        return len(self.clips)

    def get(self, indices: list[int], rng: np.random.Generator) -> dict[str, Any]:
        return {"video": self._read([self.clips[index] for index in indices])}

    def held_out(self, count: int) -> Float[Tensor, "batch frames 3 height width"]:
        """Return so many clips, or all, from everywhere in the videos that are held out."""
        return self._read(_spread(self.apart, count))

    def some(self, count: int) -> Float[Tensor, "batch frames 3 height width"]:
        """Return so many clips, or all, from everywhere in the others."""
        return self._read(_spread(self.clips, count))

    def _read(self, clips: Clips) -> Float[Tensor, "batch frames 3 height width"]:
        size = int(np.prod(self.shape))
        pixels = [
            np.fromfile(self.work / f"{key}.pixels", np.uint8, size, offset=size * number)
            for key, number in clips
        ]
        return from_frames(np.stack(pixels).reshape(-1, *self.shape))


def _spread(clips: Clips, count: int) -> Clips:
    chosen = np.linspace(0, len(clips) - 1, min(count, len(clips))).round().astype(int)
    return [clips[index] for index in chosen]


def keep_footage(
    config: Prepare, *, max_gigabytes: float, show: Callable[[Progress], None]
) -> Footage:
    """Decode the clips of `config.videos` into the folder `config.latents`, or find them there.

    Raises:
        ValueError: there are too few videos to train on some and hold out others.
    """
    folder = config.latents
    about = {name: to_json(getattr(config, name)) for name in KEPT} | {"gigabytes": max_gigabytes}
    file = folder / ABOUT
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != about:
        shutil.rmtree(folder)
    if not (folder / INDEX).exists():
        (folder / WORK).mkdir(parents=True, exist_ok=True)
        write_json(file, about)
        _decode_all(config, max_gigabytes, show)
    return Footage(folder)


def _decode_all(config: Prepare, gigabytes: float, show: Callable[[Progress], None]) -> None:
    folder, work = config.latents, config.latents / WORK
    assert config.pixels is not None
    (width, height), (num_frames,) = config.pixels[0], config.num_frames
    listing = list_sources(config.videos, captions="none")
    sources, shape = listing.sources, (num_frames, height, width, 3)
    most, total = int(gigabytes * 1e9 / np.prod(shape)), sum(source.size for source in sources)
    if most < len(sources):
        raise ValueError(
            f"one clip of each of {len(sources)} videos takes more than {gigabytes:g} GB: raise"
            " max_gigabytes, or lower num_frames or the size"
        )
    # A longer video, as its bytes tell, may keep more.
    room = {s.key: 1 + int((most - len(sources)) * s.size / total) for s in sources}
    todo = [source for source in sources if not (work / f"{source.key}.json").exists()]
    make_all(config, sources, todo, partial(_begin, config, work.resolve(), room), show)
    done = {source: read_done(source, work) for source in sources}
    clips = {source: record["clips"] for source, record in done.items() if record["clips"]}
    rejected = write_rejected(folder / REJECTED, listing, done)
    apart = held_out(clips, share=config.held_out)
    if len(clips) < 2:
        raise ValueError(
            f"{len(clips)} videos of {config.videos} give a clip of {num_frames} frames, but it"
            " takes 2, one of which is held out: add videos, or lower num_frames;"
            f" {folder / REJECTED} says why {len(rejected)} files are not used"
        )
    parts = {"train": clips.keys() - apart, "held_out": apart}
    index = {
        name: {source.key: clips[source] for source in sources if source in part}
        for name, part in parts.items()
    }
    write_json(folder / INDEX, {"shape": shape} | index)


def _begin(
    config: Prepare, work: Path, room: dict[str, int]
) -> Callable[[Source, Callable[[Any], None]], None]:
    """Return what keeps the clips of a video."""
    return partial(_keep_clips, config=config, work=work, room=room)


def _keep_clips(
    source: Source,
    beat: Callable[[Any], None],
    *,
    config: Prepare,
    work: Path,
    room: dict[str, int],
) -> None:
    """Decode one video, and write its clips; of more than there is room for any is as likely."""
    rng, most = np.random.default_rng(int(source.key, 16)), room[source.key]
    count, note = 0, ""
    partial_file = work / f".{source.key}.{os.getpid()}"
    with partial_file.open("wb") as file:
        try:
            for _, clip in read_clips(source, config):
                slot = count if count < most else int(rng.integers(count + 1))
                if slot < most:
                    file.seek(slot * clip.nbytes)
                    file.write(clip.tobytes())
                count += 1
                beat(None)
        except Unusable as reason:
            note = str(reason)
    os.replace(partial_file, work / f"{source.key}.pixels")
    write_done(source, work, clips=min(count, most), note=note, config=config)
