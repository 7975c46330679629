"""How far it is, said now and then. No torch."""

import math
import time
from collections.abc import Callable
from typing import Any


class Paced:
    """A report of which no more than so many seconds are silent, and what need not be said rests.

    `say` passes a line on, `hear` only if that long nothing was said.
    """

    def __init__(self, report: Callable[[str], None], *, every: float = 30.0) -> None:
        self.report, self.every, self.said = report, every, time.perf_counter()

    def say(self, line: str) -> None:
        self.said = time.perf_counter()
        self.report(line)

    def hear(self, line: object) -> None:
        if time.perf_counter() > self.said + self.every:
            self.say(str(line))


class Progress:
    """A line that rewrites itself on a terminal, and is repeated now and then elsewhere."""

    def __init__(self, file: Any, *, every: float, disable: bool = False) -> None:
        self.file, self.live = file, file.isatty()
        self.every = math.inf if disable else 0.2 if self.live else every

    def __enter__(self) -> Callable[[object], None]:
        return Paced(self._print, every=self.every).hear

    def __exit__(self, *_: object) -> None:
        if self.live:  # make room for other lines
            print("\r\033[K", end="", file=self.file, flush=True)

    def _print(self, line: str) -> None:
        start, end = ("\r\033[K", "") if self.live else ("", "\n")
        print(f"{start}{line}", end=end, file=self.file, flush=True)


def how_far(frames: int, seconds: float, *, total: int, fps: float, resumed: int = 0) -> str:
    """Say how far a generation is after some seconds; `resumed` frames were there before."""
    rate = max(1, frames - resumed) / seconds
    return (
        f"{frames / fps:.1f} of {total / fps:.1f} s, {rate:.1f} frames/s, "
        f"{(total - frames) / rate:.0f} s left"
    )
