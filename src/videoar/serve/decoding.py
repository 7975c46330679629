"""A picture or clip that a viewer sent: decoded where it can harm nothing else. No torch."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from videoar.data.containers import AbsurdSize
from videoar.data.decode import Unusable, read
from videoar.data.sources import Source
from videoar.generation.conditioning import fitted, read_image

MAX_SECONDS = 4.0
"""Of a clip: what is later is not decoded."""


def decoder() -> Callable[..., Any]:
    """Return what decodes a file to frames, or says in a sentence why it cannot."""
    return _decode


def _decode(job: tuple[Path, int, int, float], beat: Callable[[Any], None]) -> Any:
    file, height, width, fps = job
    try:
        frames = read_image(file)[None]
    except ValueError as error:
        if isinstance(error.__cause__, AbsurdSize):  # FFmpeg would decode some of these
            return f"it cannot be used: {error.__cause__}"
        source = Source(name="given", path=str(file), captions=(), size=file.stat().st_size)
        shown = read(source, fps=fps, sizes=[(width, height)])
        try:
            first = itertools.islice(shown, round(MAX_SECONDS * fps))
            frames = np.stack([frame.picture for frame in first])
        except (Unusable, ValueError) as error:
            return f"it cannot be used: {error}"
    return fitted(frames, height=height, width=width, fit="crop")
