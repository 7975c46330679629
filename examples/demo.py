"""The demonstration, `make demo`: one prompt under every kind of unit, and a minute of a story."""

import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from videoar.checks import Finite, Options
from videoar.cli import arguments, options
from videoar.cli.generate import make, read_script
from videoar.cli.main import exit_code
from videoar.cli.progress import say
from videoar.core.schemes import KINDS
from videoar.data.video import (
    PAPER,
    Frames,
    Picture,
    Video,
    contact_sheet,
    decode_frames,
    read_video,
)
from videoar.evaluation.entries import find_judge
from videoar.evaluation.judge import WINDOW_SECONDS, WORLD, Clips, Judge, read, windows
from videoar.evaluation.options import Judged
from videoar.evaluation.reader import TrainedJudge
from videoar.evaluation.speed import apart
from videoar.evaluation.tables import cells, columns
from videoar.files import check_folder
from videoar.generation.timing import Timing

STORY = Path(__file__).parent / "robot" / "story.txt"


@dataclass(frozen=True, kw_only=True)
class Demo(Options):
    """Generate one prompt under all five kinds of unit, and a minute in which prompts change."""

    out: Path = Path("demo")
    """Folder; the files of an earlier demo in it are replaced."""
    model: str = "robot"
    """Checkpoint: a bundled name or a folder; `toy` wants the script examples/story.txt."""
    script: Path = STORY
    """Seconds and the prompts that hold from then on, as of `videoar generate --script`."""
    seconds: Finite = 60.0
    """Length of the long video."""
    units: str = "cube:2x3x3"
    """Unit scheme of the long video."""


def demo(args: Demo) -> None:
    """Generate every kind of unit in a process of its own, so that start and memory are its own."""
    check_folder(args.out)
    judge, _ = find_judge(Judged(), args.model)
    out, minute, rows, videos = args.out, args.out / "minute.mp4", [], []
    # One thread: as fast as two for so small a model, and far faster on a busy machine.
    how = {"model": args.model, "force": True, "threads": 1, "recompute": True}
    long = options.Generate(script=args.script, **how)
    story = [each for each in read_script(long) if each[0] < args.seconds]
    say(f"{story[0][1]!r} under {len(KINDS)} kinds of unit, and {len(story)} prompts in a minute")
    clip = replace(long, script=None, prompt=story[0][1], seconds=WINDOW_SECONDS)
    with tempfile.TemporaryDirectory() as scratch:
        for kind in KINDS:
            one = replace(clip, units=kind, out=Path(scratch) / "clip.mp4")
            seen = " / ".join(text for _, text in watched(one, _row(one, rows), judge))
            rows[-1]["seen"] = seen
            videos.append(read_video(one.out))
    out.mkdir(exist_ok=True)
    side_by_side(videos, KINDS, scale=3).save(out / "units.webp", overwrite=True)
    long = replace(long, seconds=args.seconds, units=args.units, out=minute)
    fps = _row(long, rows)
    rows[-1]["seen"] = "see below, part by part"
    told = [
        {
            "from": f"{second:.0f} s",
            "told": [prompt for start, prompt in story if start <= second + 1e-6][-1],
            "seen": text,
        }
        for second, text in watched(long, fps, judge)
    ]
    say(f"\n{columns(cells(rows))}\n\n{columns(cells(told))}")
    say(f"\n{minute} and {out / 'units.webp'} are ready")


def side_by_side(videos: Sequence[Video], labels: Sequence[str], *, scale: int = 1) -> Video:
    """Show videos beside each other, enlarged, below their labels; short ones hold their end."""
    if len(videos) != len(labels):
        raise ValueError(f"{len(videos)} videos have {len(labels)} labels; give one to each video")
    kinds = sorted({(*video.frames.shape[1:3], video.fps) for video in videos})
    if len(kinds) > 1:
        raise ValueError(f"the videos must agree in (height, width, fps), but have {kinds}")
    moments = np.arange(max(len(video.frames) for video in videos))
    tiles = []
    for video, label in zip(videos, labels, strict=True):
        frames = upscale(video.frames[np.minimum(moments, len(video.frames) - 1)], scale)
        tiles.append(np.pad(frames, ((0, 0), (20, 0), (0, 0), (0, 0))))
        tiles[-1][:, :20] = _label(label, width=frames.shape[2])
    sheets = [contact_sheet(row, columns=len(videos), gap=4) for row in np.stack(tiles, axis=1)]
    return Video(frames=np.stack(sheets), fps=videos[0].fps)


def _label(text: str, *, width: int) -> Picture:
    """Draw one line of text, smaller if it is long, cut if it is longer still."""
    picture = Image.new("RGB", (width, 20), (PAPER,) * 3)
    draw = ImageDraw.Draw(picture)
    fonts = [ImageFont.load_default(size) for size in range(14, 7, -1)]
    font = next((font for font in fonts if draw.textlength(text, font) <= width), fonts[-1])
    draw.text((0, 10), text, fill=(0, 0, 0), font=font, anchor="lm")
    return np.asarray(picture)


def upscale(frames: Frames, factor: int) -> np.ndarray:
    """Enlarge every pixel to a square: small frames stay sharp where players would blur them."""
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def _generate(args: options.Generate) -> Timing:
    """Generate a video in a process that Ctrl-C does not end before the file is whole."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return make(args)[0]


def _row(args: options.Generate, rows: list[dict[str, str]]) -> int:
    """Generate a video in a process of its own; say and add its figures, and return its rate."""
    timing: Timing = apart(_generate, args)
    if timing.interrupted:
        raise KeyboardInterrupt
    start = timing.start_seconds
    row = {
        "units": args.units or "its own",
        "video": f"{timing.video_seconds:.0f} s",
        "frames/s": f"{timing.fps:.1f}",
        "passes": str(timing.passes),
        "first frame": f"{timing.first_frame_seconds:.2f} s",
        "from start": "unknown" if start is None else f"{start:.1f} s",
        "peak memory": f"{timing.peak_bytes / 2**20:.0f} MiB",
    }
    say("  ".join(f"{name} {value}" for name, value in row.items()))
    rows.append(row)
    return round(timing.frames / timing.video_seconds)


def watched(args: options.Generate, fps: int, judge: Judge) -> Iterator[tuple[float, str]]:
    """Yield the second and what the judge sees in it, of each window of a video."""
    size, frames = round(WINDOW_SECONDS * fps), decode_frames(args.out)
    for k, clip in enumerate(windows((frame[None, None] for frame in frames), size=size)):
        if clip.shape[1] > size // 2:
            yield k * WINDOW_SECONDS, described(judge, clip, fps=fps)


def described(judge: Judge, clip: Clips, *, fps: int) -> str:
    """Say what a judge sees in one clip; nothing if it reads none."""
    if isinstance(judge, TrainedJudge):
        (seen,) = judge.reader.read(clip)
        return ", ".join(w if isinstance(w, str) else " then ".join(w) for w in seen.values())
    if judge is not WORLD:
        return ""
    reading = read(clip[0], fps=fps)
    said = [
        f"{thing.size} {thing.color} {thing.shape or 'thing'} {thing.motion or 'going astray'}"
        for thing in reading.things
    ]
    return f"{' and '.join(said) or 'nothing'} on {reading.background or 'another colour'}"


def main(words: Sequence[str]) -> int:
    """Generate, and print the table; bad input is one sentence."""
    return exit_code(lambda: demo(arguments.read(Demo, words, prog="python examples/demo.py")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
