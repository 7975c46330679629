"""Measure a live server: frames per second beside the bare pipeline, time to a change, memory.

    python benchmarks/live.py                           # the tables
    python benchmarks/live.py --seconds 2 --count 3 --opens 20 --stall 2 --hour 20    # in short

The server is a process of its own, as in use; this one plays the viewers, who decode nothing.
"""

import itertools
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import tyro

from videoar.client import connect
from videoar.core.schemes import KINDS
from videoar.data.fragments import encode
from videoar.generation.pipeline import VideoPipeline
from videoar.serve.messages import Seen

PROMPTS = (
    "a small red ball moves left on a black background",
    "a large blue square stays still on a white background",
)


@contextmanager
def server(model: str, threads: int) -> Iterator[tuple[str, int]]:
    """Start `videoar serve`; yield where it is, and its process."""
    words = ["serve", "--model", model, "--threads", str(threads), "--port", "0"]
    command = [sys.executable, "-m", "videoar", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[1], process.pid
        finally:
            process.terminate()


def bare(pipe: VideoPipeline, units: str, seconds: float) -> float:
    """Return the frames per second of generating and encoding, with nobody to watch."""
    shown, begun = 0, time.perf_counter()
    for index, frames in enumerate(pipe.stream(PROMPTS[0], units=units)):
        encode(frames, fps=16, first=shown, index=index, lossless=False)
        shown += len(frames)
        if time.perf_counter() > begun + seconds:
            return shown / (time.perf_counter() - begun)
    raise AssertionError("a stream has no end")


def watched(url: str, units: str, seconds: float, rates: list[float]) -> None:
    """Add the frames per second of a session whose viewer is never behind."""
    with connect(url, PROMPTS[0], units=units) as session:
        begun, shown = time.perf_counter(), 0.0
        for _ in session.fragments():
            session.say(Seen(seconds=1e9))
            units_seen = [event for event in session.events if event["type"] == "unit"]
            shown = units_seen[-1]["seconds"] if units_seen else shown
            session.events.clear()
            if time.perf_counter() > begun + seconds:
                break
        rates.append(16 * shown / (time.perf_counter() - begun))


def reactions(url: str, units: str, count: int, *, recompute: bool) -> list[float]:
    """Return the milliseconds from sending a prompt to having its first changed fragment."""
    found: list[float] = []
    with connect(url, PROMPTS[0], units=units) as session:
        fragments = session.fragments()
        for index in range(count):
            for _ in itertools.islice(fragments, 4):
                session.say(Seen(seconds=1e9))
            session.events.clear()
            sent = time.perf_counter()
            session.change(id=index, prompt=PROMPTS[(index + 1) % 2], recompute=recompute)
            for _ in fragments:
                session.say(Seen(seconds=1e9))
                if any(event["type"] == "changed" for event in session.events):
                    break
            found.append(1000 * (time.perf_counter() - sent))
    return found


def first_picture(url: str, units: str) -> float:
    """Return the milliseconds from asking for a session to having its first fragment."""
    begun = time.perf_counter()
    with connect(url, PROMPTS[0], units=units) as session:
        next(session.fragments())
        return 1000 * (time.perf_counter() - begun)


def resident(process: int) -> float:
    """Return the MiB of memory that a process has (Linux)."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 2**10


def opened(url: str, process: int, count: int) -> list[float]:
    """Return the MiB of a server, after each tenth of so many sessions that came and went."""
    found = []
    for index in range(count):
        first_picture(url, KINDS[index % len(KINDS)])
        if (index + 1) % max(1, count // 10) == 0:
            found.append(resident(process))
    return found


def stalled(url: str, process: int, units: str, seconds: float) -> tuple[float, float]:
    """Let a viewer read nothing for a while; return the MiB before, and the most of them."""
    with connect(url, PROMPTS[0], units=units) as session:
        fragments = session.fragments()
        for _ in itertools.islice(fragments, 8):
            session.say(Seen(seconds=1e9))
        before, most, end = resident(process), 0.0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            session.say(Seen(seconds=1e9))  # as if it had played all: only its reading is late
            time.sleep(0.1)
            most = max(most, resident(process))
        return before, most


def lasting(url: str, process: int, units: str, seconds: float) -> list[tuple[float, float]]:
    """Watch a session as fast as it comes; after each sixth: ms per second of video, and MiB."""
    found, marks, shown = list[tuple[float, float]](), itertools.count(1), 0.0
    with connect(url, PROMPTS[0], units=units) as session:
        begun, start, mark = time.perf_counter(), 0.0, next(marks)
        for _ in session.fragments():
            session.say(Seen(seconds=1e9))
            shown = max([shown, *(e["seconds"] for e in session.events if e["type"] == "unit")])
            session.events.clear()
            if shown >= mark * seconds / 6:
                now = time.perf_counter()
                found.append((1000 * (now - begun) / (shown - start), resident(process)))
                begun, start, mark = now, shown, next(marks)
            if len(found) == 6:
                break
    return found


def main(
    model: str = "toy",
    seconds: float = 20.0,
    count: int = 20,
    threads: int = 1,
    opens: int = 1000,
    stall: float = 60.0,
    hour: float = 3600.0,
) -> None:
    """Print four tables.

    Args:
        model: checkpoint.
        seconds: of each measurement of speed.
        count: prompts for each kind of unit.
        threads: of the model.
        opens: sessions that are begun and ended, one after the other.
        stall: seconds for which a viewer reads nothing.
        hour: seconds of video of a session that lasts.
    """
    torch.set_num_threads(threads)
    pipe = VideoPipeline.from_pretrained(model)
    with server(model, threads) as (url, process):
        print(
            "| units | bare | one session | of bare | four sessions, all |\n|---|---|---|---|---|"
        )
        for units in KINDS:
            alone, one, four = [], list[float](), list[float]()
            for _ in range(2):  # in turn, so that a busy machine is as busy for both
                alone.append(bare(pipe, units, seconds / 2))
                watched(url, units, seconds / 2, one)
            viewers = [
                threading.Thread(target=watched, args=(url, units, seconds, four)) for _ in range(4)
            ]
            for viewer in viewers:
                viewer.start()
            for viewer in viewers:
                viewer.join()
            a, b = statistics.mean(alone), statistics.mean(one)
            print(f"| `{units}` | {a:.1f} | {b:.1f} | {b / a:.0%} | {sum(four):.1f} |", flush=True)
        print("\n| units | first picture | keep: median | p90 | recompute: median | p90 |")
        print("|---|---|---|---|---|---|")
        for units in KINDS:
            cells = [statistics.median(first_picture(url, units) for _ in range(5))]
            for recompute in (False, True):
                times = sorted(reactions(url, units, count, recompute=recompute))
                cells += [statistics.median(times), times[int(0.9 * (len(times) - 1))]]
            print(f"| `{units}` | " + " | ".join(f"{ms:.0f} ms" for ms in cells) + " |", flush=True)
        print(f"\n| a viewer reads nothing for {stall:g} s | before | at most |\n|---|---|---|")
        for units in KINDS:
            before, most = stalled(url, process, units, stall)
            print(f"| `{units}` | {before:.0f} MiB | {most:.0f} MiB |", flush=True)
        heads = " | ".join(f"{hour * part / 6:g} s" for part in range(1, 7))
        print(f"\n| ms per second of video, MiB, to | {heads} |\n|{'---|' * 7}")
        for units in ("frame", "cube:1x2x2"):
            cells = [f"{ms:.0f}, {size:.0f}" for ms, size in lasting(url, process, units, hour)]
            print(f"| `{units}` | " + " | ".join(cells) + " |", flush=True)
        sizes = " | ".join(f"{size:.0f}" for size in opened(url, process, opens))
        print(f"\nMiB after each tenth of {opens} sessions: {sizes}")


if __name__ == "__main__":
    tyro.cli(main)
