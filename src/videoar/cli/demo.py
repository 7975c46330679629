"""The demonstration: one prompt under every kind of unit, and a minute of the last."""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from videoar.cli import options
from videoar.cli.progress import say
from videoar.core.schemes import KINDS
from videoar.data.video import decode_frames, read_video, side_by_side
from videoar.evaluation import judge
from videoar.evaluation.lengths import WINDOW_SECONDS
from videoar.evaluation.tables import cells, columns
from videoar.files import check_folder


def demo(args: options.Demo) -> None:
    """Show every kind of unit."""
    check_folder(args.out)
    run(args, say)


DEMO_PROMPT = "a small red ball bounces up and down on a black background"


def run(args: options.Demo, report: Callable[[str], None]) -> None:
    """Generate every kind of unit in a process of its own, so that start and memory are its own."""
    kinds, out = KINDS, args.out
    report(f"{DEMO_PROMPT!r} under {len(kinds)} kinds of unit, and for {args.seconds:g} s")
    rows, videos = [], []
    with tempfile.TemporaryDirectory() as scratch:
        clip, figures = Path(scratch) / "clip.mp4", Path(scratch) / "report.json"
        for kind in kinds:
            rows.append(_generate_apart(kind, clip, WINDOW_SECONDS, figures, model=args.model))
            report(_line(rows[-1]))
            videos.append(read_video(clip))
            rows[-1]["seen"] = seen([videos[-1].frames], fps=videos[-1].fps)
        out.mkdir(exist_ok=True)
        side_by_side(videos, kinds, scale=3).save(out / "units.webp", overwrite=True)
        minute = out / "minute.mp4"
        seconds = args.seconds
        rows.append(_generate_apart(kinds[-1], minute, seconds, figures, model=args.model))
        report(_line(rows[-1]))
    frames, size = decode_frames(minute), len(videos[0].frames)
    clips = iter(lambda: list(itertools.islice(frames, size)), [])
    long_enough = (np.stack(clip) for clip in clips if len(clip) > size // 2)
    rows[-1]["seen"] = seen(long_enough, fps=videos[0].fps)
    report(f"\n{columns(cells(rows))}\n\n{minute} and {out / 'units.webp'} are ready")


def _generate_apart(
    kind: str, file: Path, seconds: float, to: Path, *, model: str
) -> dict[str, str]:
    """Run `videoar generate` in a process of its own, and return its figures."""
    command = [sys.executable, "-m", "videoar", "generate", DEMO_PROMPT, "--units", kind]
    command += ["--seconds", str(seconds), "--model", model, "--out", str(file)]
    # One thread: as fast as two for so small a model, and far faster on a busy machine.
    command += ["--report", str(to), "--force", "--threads", "1"]
    # The new process finds the package where this one did, installed or not.
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL)
    if done.returncode:  # it has said why
        raise SystemExit(done.returncode)
    figures = json.loads(to.read_text(encoding="utf-8"))
    start = figures["start_seconds"]
    return {
        "units": kind,
        "video": f"{figures['video_seconds']:.0f} s",
        "frames/s": f"{figures['fps']:.1f}",
        "passes": str(figures["passes"]),
        "first frame": f"{figures['first_frame_seconds']:.2f} s",
        "from start": "unknown" if start is None else f"{start:.1f} s",
        "peak memory": f"{figures['peak_bytes'] / 2**20:.0f} MiB",
    }


def _line(row: dict[str, str]) -> str:
    return "  ".join(f"{name} {value}" for name, value in row.items())


def seen(clips: Iterable[UInt8[np.ndarray, "frames height width 3"]], *, fps: float) -> str:
    """Say what the judge of the procedural world sees in clips, the most frequent first."""
    counts: Counter[str] = Counter()
    for clip in clips:
        reading = judge.read(clip, fps=round(fps))
        things = [
            f"{thing.size} {thing.color} {thing.shape or 'thing'} {thing.motion or 'going astray'}"
            for thing in reading.things
        ]
        ground = reading.background or "another colour"
        counts[f"{' and '.join(things) or 'nothing'} on {ground}"] += 1
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{count}x {text}" for text, count in counts.most_common(3))
