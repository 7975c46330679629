"""What was done for a video, and what it took. No torch."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Timing:
    """The figures of a generation so far; seconds are wall-clock.

    The parts of the time need not add up to all of it.
    """

    frames: int = 0
    """Finished pixel frames; once it is written, those in the file."""
    resumed: int = 0
    """Frames of these that were there when it went on: an earlier process took the time."""
    video_seconds: float = 0.0
    """Length of the written video."""
    units: int = 0
    """Finished units."""
    chosen: dict[str, int] = field(default_factory=Counter)
    """Segments by the units that a router chose for them."""
    passes: int = 0
    """Forward passes of the transformer."""
    cache_tokens: int = 0
    """Most tokens the cache held."""
    cache_bytes: int = 0
    model_seconds: float = 0.0
    decode_seconds: float = 0.0
    write_seconds: float = 0.0
    seconds: float = 0.0
    """From the prompt to the closed file."""
    first_frame_seconds: float = 0.0
    """From the prompt to the first frames."""
    start_seconds: float | None = None
    """From the start of the process to the first frames: interpreter, imports, loading, text; None
    where the system does not tell."""
    peak_bytes: int = 0
    """Most memory that the process held."""
    interrupted: int = 0
    """Number of the signal by which the user stopped it; 0 if nobody did."""

    @property
    def fps(self) -> float:
        """Frames per second, end to end."""
        return (self.frames - self.resumed) / self.seconds
