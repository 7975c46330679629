"""Lines for the user: what is said, and how far it is."""

import time
from collections.abc import Callable
from typing import Any


def say(line: object) -> None:
    """Print a line at once."""
    text = str(line).encode("utf-8", "backslashreplace").decode()  # names of files may be no text
    print(text, flush=True)


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
