"""What is made of one video: files of encoded clips, which are put together later.

Parts are named after the key of the source: `KEY-000000.safetensors` and on with some clips each,
`KEY-000000.mkv` and on with the pixels of every clip if it is held out, and at last `KEY.json`.
"""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from videoar.codecs import Codec
from videoar.formats import load_codec
from videoar.frames import Unusable, cut, duration, read
from videoar.options import Prepare
from videoar.pipeline import from_frames
from videoar.sources import Source
from videoar.video import Frames, VideoWriter

Json = dict[str, Any]
PART_CLIPS, PART_BYTES = 64, 64 << 20
SHEET_SIDE = 96


@dataclass(frozen=True)
class Clip:
    """An encoded clip of a part."""

    latents: Tensor
    start: float
    """Seconds from the start of the video."""
    pixels: Path
    """Its frames without loss, if the video is held out."""
    shown: Tensor | None
    """Some frames, small, of the first clip of a part."""


def begin(config: Prepare, work: Path) -> Callable[[Source, Callable[[Any], None]], None]:
    """Load the codec, and return what makes the parts of a video."""
    codec = load_codec(Path(config.codec), device=config.device)
    return partial(make_parts, config=config, codec=codec, work=work)


def make_parts(
    source: Source, beat: Callable[[Any], None], *, config: Prepare, codec: Codec, work: Path
) -> None:
    """Decode, cut and encode one video, and write its parts.

    The next clip is decoded while one is encoded, and no more than two are in memory.
    """
    parts, length = _Parts(source, work, fps=config.fps), duration(source)
    stride = config.stride or max(config.num_frames)
    frames = read(
        source,
        fps=config.fps,
        sizes=config.pixels or (),
        scene_cut=config.scene_cut,
        max_seconds=config.max_seconds,
        picture_fps=config.picture_fps,
    )
    clips = cut(frames, lengths=config.num_frames, stride=stride)
    shortest = f"{min(config.num_frames)} frames at {config.fps:g} per second"
    note = ""
    with ThreadPoolExecutor(max_workers=1) as ahead:
        waiting = ahead.submit(next, clips, None)
        try:
            while (clip := waiting.result()) is not None:
                waiting = ahead.submit(next, clips, None)
                start, pixels = clip
                video = from_frames(pixels)[None].to(config.device)
                parts.add(codec.encode(video)[0].cpu(), start=start, pixels=pixels)
                beat(min(1.0, start / length) if length else 0.0)
        except Unusable as reason:
            note = str(reason)
    if not parts.count and not note:
        note = f"shorter than a clip: no scene has {shortest}"
    parts.finish(note)


class _Parts:
    """The files that are made of one video: numbered parts, and at last what there is of them."""

    def __init__(self, source: Source, work: Path, *, fps: float) -> None:
        self.stem, self.fps = str(work / source.key), fps
        self.count = self.num_parts = 0
        self._starts: list[float] = []
        self._tensors: dict[str, Tensor] = {}

    def add(self, latents: Tensor, *, start: float, pixels: Frames) -> None:
        if not self._starts:
            self._tensors["sheet"] = torch.from_numpy(_triple(pixels))
        self._tensors[str(len(self._starts))] = latents.to(torch.float16).contiguous()
        self._starts.append(round(start, 6))
        if os.path.exists(f"{self.stem}.heldout"):
            path = Path(f"{self.stem}-{self.count:06d}.mkv")
            with VideoWriter(path, fps=self.fps, overwrite=True) as writer:
                writer.write(pixels)
        self.count += 1
        size = sum(tensor.nbytes for tensor in self._tensors.values())
        if len(self._starts) >= PART_CLIPS or size > PART_BYTES:
            self._flush()

    def finish(self, note: str) -> None:
        if self._starts:
            self._flush()
        done = {"clips": self.count, "parts": self.num_parts, "note": note}
        write_json(Path(f"{self.stem}.json"), done)

    def _flush(self) -> None:
        target = f"{self.stem}-{self.num_parts:06d}.safetensors"
        save_file(self._tensors, f"{target}.partial", {"starts": json.dumps(self._starts)})
        os.replace(f"{target}.partial", target)
        self.num_parts += 1
        self._starts, self._tensors = [], {}


def _triple(pixels: Frames) -> Frames:
    """Return the first, middle and last frame of a clip, small, for the contact sheet."""
    chosen = pixels[[0, len(pixels) // 2, -1]]
    side = (SHEET_SIDE, SHEET_SIDE)
    return np.stack([np.asarray(ImageOps.pad(Image.fromarray(x), side)) for x in chosen])


def read_done(source: Source, work: Path) -> Json:
    """Return the number of clips and parts of a video, and a note on what is not used."""
    return json.loads((work / f"{source.key}.json").read_text(encoding="utf-8"))


def read_parts(source: Source, work: Path) -> Iterator[Clip]:
    """Yield the clips of a video in order."""
    stem, number = str(work / source.key), 0
    for part in range(read_done(source, work)["parts"]):
        with safe_open(f"{stem}-{part:06d}.safetensors", framework="pt") as file:
            for row, start in enumerate(json.loads(file.metadata()["starts"])):
                shown = None if row else file.get_tensor("sheet")
                pixels = Path(f"{stem}-{number:06d}.mkv")
                yield Clip(file.get_tensor(str(row)), start, pixels, shown)
                number += 1


def write_json(path: Path, value: Any) -> None:
    """Write a file that is complete as soon as it exists."""
    partial_ = path.with_name(f".{path.name}.partial")
    partial_.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial_, path)
