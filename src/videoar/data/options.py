"""The options of preparation. No torch."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from videoar.checks import Count, Finite, Limit, Options

ALL = "1/1"  # the whole share


def turns(share: str) -> slice:
    """Return which of all a share K/N takes; none if it is none."""
    found = re.fullmatch(r"([1-9]\d{0,3})/([1-9]\d{0,3})", share)
    number, count = map(int, found.groups()) if found else (1, 0)
    return slice(number - 1, None, count) if number <= count else slice(0)


Turn = Annotated[str, Limit(lambda x: turns(x) != slice(0), "K/N with K up to N, such as 2/8")]
Rate = Annotated[float, Limit(lambda rate: 0 < rate <= 240, "a number above 0, up to 240")]
Change = Annotated[float, Limit(lambda change: 0 < change < 1, "between 0 and 1")]
TestShare = Annotated[float, Limit(lambda share: 0 < share <= 0.5, "a share above 0, up to 0.5")]

LENGTHS = Limit(lambda x: min(x, default=0) > 1, "lengths above 1, such as 61")
SIZE = re.compile(r"[1-9]\d{1,3}x[1-9]\d{1,3}").fullmatch
SIZES = Limit(lambda x: x and all(map(SIZE, x)), "widths and heights, such as 64x64 96x64")


@dataclass(frozen=True, kw_only=True)
class Prepare(Options):
    """Turn a folder of videos and captions into latents to train on; goes on where it stopped."""

    videos: Positional[Annotated[Path, arg(metavar="VIDEOS")]]
    """Folder with video files, folders of pictures, WebDataset tars."""
    latents: Positional[Annotated[Path, arg(metavar="LATENTS")]]
    """Folder to write."""
    codec: str = "toy-base"
    """Checkpoint whose codec encodes: a bundled name or a folder."""
    captions: Literal["auto", "none"] = "auto"
    """From metadata.jsonl, metadata.csv, .txt beside the video or in the tar; none: without."""
    fps: Rate = 16.0
    """Frames per second of the clips."""
    num_frames: Annotated[tuple[int, ...], LENGTHS] = (61, 29)
    """Lengths of clips, 1 + 4k: the longest, and shorter ones for what is left of a scene."""
    stride: Count | None = None
    """Frames from one clip to the next; by default the longest length."""
    sizes: Annotated[tuple[str, ...], SIZES] = ("64x64",)
    """Widths and heights of clips; each video is cropped to the one of nearest shape."""
    scene_cut: Change | None = None
    """Mean change of a pixel, from 0 to 1, that ends a scene, such as 0.1; none is looked for."""
    picture_fps: Rate | None = None
    """Pictures per second in folders of pictures; `fps` by default."""
    held_out: Annotated[float, Limit(lambda share: 0 <= share <= 0.5, "0 to 0.5")] = 0.05
    """Share of the videos that are kept out of training, to evaluate on; two clips or more."""
    timeout: Finite = 120.0
    """Seconds without a clip or a latent frame after which a video is given up."""
    workers: Count | None = None
    """Processes; by default one per core."""
    device: str = "cpu"
    """Where to encode."""
    share: Turn = ALL
    """K/N on the K-th of N machines that share the folders: every N-th video is made. When all are
    done, the command without it puts the shares together."""

    @property
    def pixels(self) -> list[tuple[int, int]]:
        """The sizes as numbers."""
        pairs = (size.split("x") for size in self.sizes)
        return [(int(width), int(height)) for width, height in pairs]
