"""`videoar generate`."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from videoar.cli import options
from videoar.cli.progress import say
from videoar.files import check_place

FIELDS = ("units", "num_inference_steps", "shift", "guidance_scale", "negative_prompt", "lag")
"""Options that are fields of `GenerationConfig` under their own names."""


def generate(args: options.Generate) -> int:
    """Generate, decode and write at the same time, in memory that does not grow."""
    from videoar.data.video import check_output, open_output
    from videoar.generation import conditioning

    if args.report is not None:
        check_place(args.report.parent)
    target = check_output(args.out, overwrite=args.force)
    image = None if args.image is None else conditioning.read_image(args.image)
    import torch

    from videoar.cli.progress import Progress, how_far
    from videoar.core import schemes
    from videoar.generation import stream
    from videoar.generation.pipeline import VideoPipeline

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.units is not None:
        schemes.parse(args.units)  # what is wrong with it is said before weights are loaded
    given = {name: getattr(args, name) for name in FIELDS} | {"sink_frames": args.sink}
    given = {name: value for name, value in given.items() if value is not None}
    if args.window is not None:
        given["window_frames"] = None if args.window == "all" else args.window
    names = ("base", "lora", "codec", "preset", "dtype", "device", "offload")
    load = {name: getattr(args, name) for name in names}
    pipe = VideoPipeline.from_pretrained(args.model, **load)
    pipe.height, pipe.width = args.height or pipe.height, args.width or pipe.width
    fps = pipe.sampling.fps
    size = {"height": pipe.height, "width": pipe.width, "fit": args.fit}
    video = None
    if args.video is not None:
        video = conditioning.read_clip(args.video, fps=fps, seconds=args.keep, **size)
    begin = 0 if video is None else len(video) / fps
    num_frames = args.num_frames or max(1, round((args.seconds or 4.0 + begin) * fps))
    started = time.perf_counter()
    given |= {"image": image, "video": video, "fit": args.fit}
    generation = pipe.generate([args.prompt], num_frames=num_frames, seeds=[args.seed], **given)
    if video is not None and (kept := generation.kept_frames) < len(video):
        groups = f"1 + {pipe.codec.stride[0]} * k"
        say(f"the first {kept} of {len(video)} frames are kept, as the codec needs {groups}")
    writer = open_output(target, num_frames=num_frames, fps=fps)
    with Progress(sys.stderr, every=5.0) as show:
        figures, interrupted = stream.write(
            generation,
            writer,
            started=started,
            fps=fps,
            show=lambda frames, seconds: show(how_far(frames, seconds, total=num_frames, fps=fps)),
        )
    if not figures["frames"]:
        print("videoar: stopped before the first frame; nothing is written", file=sys.stderr)
        return 130
    figures["scheme"] = given.get("units", pipe.sampling.units)
    say(summary(target, figures))
    if args.report is not None:
        args.report.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if interrupted:
        print(f"videoar: stopped; {target} holds what was finished", file=sys.stderr)
    return 130 if interrupted else 0


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
