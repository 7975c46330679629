"""What is made of one video: a file for each encoded clip, which are put together later.

They are named after the key of the source: `KEY-000000.safetensors` and on, `KEY-000000.mkv` and on
with the pixels if it is held out, and at last `KEY.json`. What has no `KEY.json` is made anew.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from safetensors import safe_open
from torch import Tensor

from videoar.checkpoints.checkpoint import Checkpoint
from videoar.data.containers import Unusable, duration
from videoar.data.decode import cut, read
from videoar.data.latents import INFO_NAME, LatentsInfo, ShardWriter
from videoar.data.options import Prepare
from videoar.data.sources import Source
from videoar.data.video import Frames, VideoWriter
from videoar.data.world import TWO_THINGS, Scene, caption, random_clip, scene_of
from videoar.encoders.codec import Codec, from_frames
from videoar.files import replaced_folder, write_json
from videoar.weights import write_safetensors

SHEET_EVERY, SHEET_SIDE = 64, 96


@dataclass(frozen=True)
class Clip:
    """An encoded clip."""

    latents: Tensor
    start: float
    """Seconds from the start of the video."""
    pixels: Path
    """Its frames without loss, if the video is held out."""
    shown: Tensor | None
    """Some frames, small, of every 64th clip."""


def begin(config: Prepare, work: Path) -> Callable[[Source, Callable[[Any], None]], None]:
    """Load the codec, and return what makes the parts of a video."""
    codec = Checkpoint.find(config.codec).codec(device=config.device)
    return partial(make_parts, config=config, codec=codec, work=work)


def make_parts(
    source: Source, beat: Callable[[Any], None], *, config: Prepare, codec: Codec, work: Path
) -> None:
    """Decode, cut and encode one video, and write its parts.

    There are as many processes as cores, so that none has to do two things at a time.
    """
    stem, length, count, note = str(work / source.key), duration(*source.place), 0, ""
    notes = list[str]()
    held_out = Path(f"{stem}.heldout").exists()
    frames = read(
        source,
        fps=config.fps,
        sizes=config.pixels,
        scene_cut=config.scene_cut,
        picture_fps=config.picture_fps,
        notes=notes,
    )
    stride = config.stride or max(config.num_frames)
    try:
        for start, pixels in cut(frames, lengths=config.num_frames, stride=stride):
            latents = codec.encode(from_frames(pixels)[None].to(config.device), beat=beat)
            tensors = {"latents": latents[0].to("cpu", torch.float16)}
            if count % SHEET_EVERY == 0:
                tensors["sheet"] = torch.from_numpy(_triple(pixels))
            about = {"start": json.dumps(round(start, 6))}
            write_safetensors(Path(f"{stem}-{count:06d}.safetensors"), tensors, about)
            if held_out:
                path = Path(f"{stem}-{count:06d}.mkv")
                with VideoWriter(path, fps=config.fps, overwrite=True) as writer:
                    writer.write(pixels)
            count += 1
            beat(min(1.0, start / length) if length else 0.0)
    except Unusable as reason:
        note = str(reason)
    if not count and not note:
        shortest = f"{min(config.num_frames)} frames at {config.fps:g} per second"
        note = f"shorter than a clip: no scene has {shortest}"
    note = "; ".join(text for text in (note, *notes) if text)
    write_json(Path(f"{stem}.json"), {"clips": count, "note": note})


def _triple(pixels: Frames) -> UInt8[np.ndarray, "3 side side 3"]:
    """Return the first, middle and last frame of a clip, small, for the contact sheet."""
    chosen = pixels[[0, len(pixels) // 2, -1]]
    side = (SHEET_SIDE, SHEET_SIDE)
    return np.stack([np.asarray(ImageOps.pad(Image.fromarray(x), side)) for x in chosen])


def read_done(source: Source, work: Path) -> dict[str, Any]:
    """Return the number of clips of a video, and a note on what is not used."""
    return json.loads((work / f"{source.key}.json").read_text(encoding="utf-8"))


def read_parts(source: Source, work: Path) -> Iterator[Clip]:
    """Yield the clips of a video in order."""
    for number in range(read_done(source, work)["clips"]):
        path = work / f"{source.key}-{number:06d}.safetensors"
        with safe_open(path, framework="pt") as file:
            shown = file.get_tensor("sheet") if "sheet" in file.keys() else None
            start = json.loads(file.metadata()["start"])
            yield Clip(file.get_tensor("latents"), start, path.with_suffix(".mkv"), shown)


Encoded = tuple[Float[Tensor, "frames channels height width"], list[str], Scene]
"""A video of the world as the generator sees it: latents, captions, and what they are of."""


@dataclass(frozen=True, kw_only=True)
class WorldEncoder:
    """Renders scenes of the world from a random moment on, and encodes them."""

    codec: Codec
    num_latents: int
    seed: int
    dtype: torch.dtype
    two_things: float = TWO_THINGS

    def encode(self, indices: Sequence[int]) -> Iterator[Encoded]:
        """Yield videos, encoded in batches of 16."""
        num_frames = 1 + self.codec.stride[0] * (self.num_latents - 1)
        for first in range(0, len(indices), 16):
            how = {"seed": self.seed, "two_things": self.two_things}
            scenes = [scene_of(index, **how) for index in indices[first : first + 16]]
            clips = [random_clip(*scene, num_frames=num_frames) for scene in scenes]
            # Half the time in bfloat16, and what is lost is below the precision of shards.
            with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                latents = self.codec.encode(from_frames(np.stack(clips))).float()
            for (scene, rng), latent in zip(scenes, latents, strict=True):
                yield latent, [caption(scene, rng) for _ in range(6)], scene

    def write(self, folder: Path, num_videos: int, report: Callable[[str], None]) -> None:
        """Keep the latents and captions of the world's first videos, unless the folder is there."""
        if folder.exists() or not num_videos:
            return
        started = time.perf_counter()
        info = LatentsInfo.of(self.codec, fps=16.0)
        whole = replaced_folder(folder, marker=INFO_NAME, overwrite=False)
        with whole as partial, ShardWriter(partial, info=info) as writer:
            for done, (latents, captions, scene) in enumerate(self.encode(range(num_videos))):
                if done and done % 512 == 0:
                    rate = done / (time.perf_counter() - started)
                    left = timedelta(seconds=round((num_videos - done) / rate))
                    report(f"encoded {done}/{num_videos} videos  {rate:.1f}/s  {left} left")
                writer.add(latents, captions=captions, extra={"scene": scene.to_json()})
