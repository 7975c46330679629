"""A video file that is written as its frames come."""

import time
from collections.abc import Callable

from videoar.data.video import VideoWriter
from videoar.generation.stream import Generation
from videoar.generation.timing import Timing
from videoar.machine import peak_bytes


def write(
    generation: Generation,
    writer: VideoWriter,
    *,
    fps: float,
    show: Callable[[int, float], None],
) -> Timing:
    """Write the frames of one video as they come, until the end or Ctrl-C.

    After every write `show` gets the frames, and the seconds since the work began.
    """
    stats = generation.stats
    try:
        with writer:
            for batch in generation:
                before = time.perf_counter()
                writer.write(batch[0])
                after = time.perf_counter()
                stats.write_seconds += after - before
                show(stats.frames, after - generation.started)
            before = time.perf_counter()
        stats.write_seconds += time.perf_counter() - before
    except KeyboardInterrupt:
        stats.interrupted = True
    stats.frames = writer.num_frames  # fewer than were generated, if it was stopped in a write
    stats.video_seconds = writer.num_frames / fps
    stats.seconds = time.perf_counter() - generation.started
    stats.peak_bytes = peak_bytes()
    return stats
