"""What a video begins with: a picture or a clip, read and brought to the size of the model.

Nothing here knows of tensors or models.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from videoar.checks import explained
from videoar.data.containers import Unusable, check_size
from videoar.data.decode import Fit, read, readable, upright
from videoar.data.sources import Source, list_sources
from videoar.data.video import Frames, Picture, Video


def read_image(path: str | Path) -> Picture:
    """Read a picture file: upright, without transparency; of an animation the first frame."""
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}; give the path of a picture")
    reading = readable("no picture: convert it to PNG or JPEG")
    with explained(f"{path} cannot be used: {{}}", Unusable), reading, Image.open(path) as image:
        return upright(image)


def read_clip(
    path: str | Path, *, fps: float, height: int, width: int, fit: Fit, seconds: float | None
) -> Frames:
    """Read the beginning of a video file, or of a folder of pictures, at a rate and size.

    Frames are chosen by their timestamps; without `seconds`, all of them.

    Raises:
        ValueError: it cannot be read, or is shorter than that.
    """
    file = Path(path)
    found = list_sources(file, captions="none").sources if file.is_dir() else []
    source = next((source for source in found if source.name == "."), None)
    if file.is_file():
        source = Source(name=file.name, path=str(file), captions=(), size=file.stat().st_size)
    if source is None:
        raise ValueError(f"there is no file {path} or folder of pictures; give the path of one")
    count = None if seconds is None else max(1, round(seconds * fps))
    shown = read(source, fps=fps, sizes=[(width, height)], fit=fit)
    with explained(f"{path} cannot be used: {{}}", Unusable):
        frames = [frame.picture for frame in itertools.islice(shown, count)]
    if count is not None and len(frames) < count:
        raise ValueError(
            f"keep is {seconds:g} s, but {path} lasts {len(frames) / fps:.2f} s: keep less of it"
        )
    return fitted(np.stack(frames), height=height, width=width, fit=fit)


def fitted(
    frames: Frames, *, height: int, width: int, fit: Fit
) -> UInt8[np.ndarray, "frames rows columns 3"]:
    """Bring frames to a size; those that have it are not changed."""
    if frames.shape[1:3] == (height, width):
        return frames
    change = {"crop": ImageOps.fit, "letterbox": ImageOps.pad}[fit]
    pictures = (Image.fromarray(frame) for frame in frames)
    return np.stack([np.asarray(change(picture, (width, height))) for picture in pictures])


def beginning(
    image: Any, video: Any, *, batch: int, height: int, width: int, stride: int, fit: Fit | None
) -> UInt8[np.ndarray, "videos frames height width 3"] | None:
    """Check what is given, and bring it to the model's size and whole latent frames.

    Args:
        image: a picture, or uint8, `height width 3`, or one such per video of the batch.
        video: a `Video`, or uint8, `frames height width 3`, or one such per video of the batch.
        batch: Videos that begin so.
        height: Of the model, as is the width.
        width: Of the model.
        stride: Frames per latent frame: `1 + stride * k` frames are kept, the rest is dropped.
        fit: Whether the sides are cut, as with None, or bars added.

    Returns:
        One beginning for all videos, or one for each; None if nothing is given.
    """
    if image is not None and video is not None:
        raise ValueError("image and video both say how the video begins: give one of them.")
    if image is None and video is None:
        if fit is not None:
            raise ValueError("fit says how image or video is resized: give one of them too.")
        return None
    name, axes = "image", "height width 3"
    if image is None:
        name, axes = "video", f"frames {axes}"
    given, single = _array(video if image is None else image), len(axes.split())
    if given.dtype != np.uint8 or given.ndim not in (single, single + 1) or given.shape[-1] != 3:
        raise ValueError(
            f"{name} is {given.dtype} of shape {given.shape}: give uint8 of `{axes}`, or one such "
            "array for each video of the batch."
        )
    if image is not None:
        given = np.expand_dims(given, -4)
    given = given if given.ndim == 5 else given[None]
    if len(given) not in (1, batch) or given.shape[1] == 0:
        raise ValueError(
            f"{name} has shape {given.shape} (videos, frames, height, width, 3), but {batch} "
            "videos are to be made: give one frame or more, for all of them or for each."
        )
    check_size(given.shape[3], given.shape[2])
    kept = 1 + (given.shape[1] - 1) // stride * stride
    whole, fit = (frames[:kept] for frames in given), fit or "crop"
    return np.stack([fitted(frames, height=height, width=width, fit=fit) for frames in whole])


def _array(given: Any) -> np.ndarray:
    """Return the pixels of pictures, videos, or lists of them."""
    if isinstance(given, list | tuple):
        given = [_array(each) for each in given]
    given = upright(given) if isinstance(given, Image.Image) else given
    return np.asarray(given.frames if isinstance(given, Video) else given)
