"""From a generation to a file: frames are written as they come, timed, and kept when it is stopped.

Nothing here knows of options; the command line calls it.
"""

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from videoar.pipeline import Generation
from videoar.video import STREAMS, Video, VideoWriter

MAX_PICTURES = 1000  # of an animation or contact sheet, which is held in memory until complete


def open_output(path: Path, *, num_frames: int, fps: float) -> "VideoWriter | Pictures":
    """Return what writes a file of this kind; one that exists is replaced."""
    if path.suffix.lower() in STREAMS:
        return VideoWriter(path, fps=fps, overwrite=True)
    if num_frames > MAX_PICTURES:
        raise ValueError(
            f"a {path.suffix} of {num_frames} frames would be held in memory: make it "
            f"{MAX_PICTURES} frames or fewer, or write {' or '.join(STREAMS)}"
        )
    return Pictures(path, fps=fps)


class Pictures:
    """Stands in for a `VideoWriter` where a format is written in one piece."""

    def __init__(self, path: Path, *, fps: float) -> None:
        self.path, self.fps, self.num_frames = path, fps, 0
        self.frames: list[np.ndarray] = []

    def __enter__(self) -> "Pictures":
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if self.frames and (kind is None or issubclass(kind, KeyboardInterrupt)):
            video = Video(frames=np.concatenate(self.frames), fps=self.fps)
            video.save(self.path, overwrite=True)

    def write(self, frames: UInt8[np.ndarray, "frames height width 3"]) -> None:
        """Keep frames for the end."""
        self.frames.append(frames)
        self.num_frames += len(frames)


def write(
    generation: Generation,
    writer: VideoWriter | Pictures,
    *,
    started: float,
    fps: float,
    show: Callable[[int, float], None],
) -> tuple[dict[str, Any], bool]:
    """Write the frames of one video as they come, until the end or Ctrl-C.

    The work began when the clock `time.perf_counter` showed `started`; `show` gets the frames and
    the seconds since then after every write.

    Returns:
        What was done and what it took; and whether the user stopped it.
    """
    stats, interrupted = generation.stats, False
    first_frame_seconds = start_seconds = closing = None
    write_seconds = 0.0
    try:
        with writer:
            for batch in generation:
                before = time.perf_counter()
                if first_frame_seconds is None:
                    first_frame_seconds, start_seconds = before - started, process_seconds()
                writer.write(batch[0])
                after = time.perf_counter()
                write_seconds += after - before
                show(stats.frames, after - started)
            closing = time.perf_counter()
    except KeyboardInterrupt:
        interrupted = True
    ended = time.perf_counter()
    frames = writer.num_frames  # fewer than were generated, if it was stopped in a write
    return vars(stats) | {
        "frames": frames,
        "video_seconds": frames / fps,
        "fps": frames / (ended - started),
        "seconds": ended - started,
        "write_seconds": write_seconds + (ended - closing if closing else 0.0),
        "first_frame_seconds": first_frame_seconds,
        "start_seconds": start_seconds,
        "peak_bytes": peak_bytes(),
    }, interrupted


class Progress:
    """A line that rewrites itself on a terminal, and is repeated now and then elsewhere."""

    def __init__(self, file: Any, *, every: float) -> None:
        self.file, self.live = file, file.isatty()
        self.every, self.shown = 0.2 if self.live else every, time.perf_counter()

    def __enter__(self) -> Callable[[object], None]:
        return self.show

    def __exit__(self, *_: object) -> None:
        if self.live:  # make room for other lines
            print("\r\033[K", end="", file=self.file, flush=True)

    def show(self, line: object) -> None:
        """Show how far it is, unless that was done a moment ago."""
        if time.perf_counter() > self.shown + self.every:
            self.shown = time.perf_counter()
            start, end = ("\r\033[K", "") if self.live else ("", "\n")
            print(f"{start}{line}", end=end, file=self.file, flush=True)


def how_far(frames: int, seconds: float, *, total: int, fps: int) -> str:
    """Say how far a generation is after some seconds."""
    rate = frames / seconds
    return (
        f"{frames / fps:.1f} of {total / fps:.1f} s, {rate:.1f} frames/s, "
        f"{(total - frames) / rate:.0f} s left"
    )


def peak_bytes() -> int:
    """Return the most memory that this process has held."""
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="ascii").splitlines() if status.is_file() else []:
        # The peak of `getrusage` counts the process that started this one, too.
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def process_seconds() -> float | None:
    """Return the age of this process, imports and all; None where the system does not tell."""
    stat, uptime = Path("/proc/self/stat"), Path("/proc/uptime")
    if not (stat.is_file() and uptime.is_file()):
        return None
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    return float(uptime.read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


def summary(path: Path, figures: dict[str, Any]) -> str:
    """Return what `write` measured, as sentences."""
    start = figures["start_seconds"]
    since = "" if start is None else f", {start:.1f} s after the start of the process"
    return (
        "{path}: {frames} frames, {video_seconds:.1f} s\n"
        "{fps:.1f} frames/s with decoding and writing: {seconds:.2f} s, of them model "
        "{model_seconds:.2f}, decoding {decode_seconds:.2f}, writing {write_seconds:.2f}\n"
        "{units} units of {scheme} in {passes} passes; up to {cache_tokens} tokens in the cache\n"
        "first frames after {first_frame_seconds:.2f} s{since}; peak memory {peak:.0f} MiB"
    ).format(**figures, path=path, since=since, peak=figures["peak_bytes"] / 2**20)
