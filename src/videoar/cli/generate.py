"""`videoar generate`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from videoar.cli import options
from videoar.cli.progress import Progress, how_far, say
from videoar.generation.timing import Timing

FIELDS = ("units", "num_inference_steps", "shift", "guidance_scale", "negative_prompt", "lag")
"""Options that are fields of `GenerationConfig` under their own names."""


def generate(args: options.Generate) -> int:
    """Generate a video, and say what it took."""
    timing, scheme = make(args)
    if not timing.frames:
        print("videoar: stopped before the first frame; nothing is written", file=sys.stderr)
        return 130
    target = args.out.expanduser()
    say(summary(target, timing, scheme=scheme))
    if timing.interrupted:
        print(f"videoar: stopped; {target} holds what was finished", file=sys.stderr)
    return 130 if timing.interrupted else 0


def make(args: options.Generate) -> tuple[Timing, str]:
    """Generate, decode and write at the same time, in memory that does not grow.

    Returns:
        What it took, and the name of the units.
    """
    from videoar.data.video import check_output, open_output
    from videoar.generation import conditioning

    target = check_output(args.out, overwrite=args.force)
    image = None if args.image is None else conditioning.read_image(args.image)
    import torch

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
    names = ("base", "lora", "codec", "preset", "dtype", "codec_dtype", "device", "offload")
    load = {name: getattr(args, name) for name in names}
    pipe = VideoPipeline.from_pretrained(args.model, **load)
    pipe.height, pipe.width = args.height or pipe.height, args.width or pipe.width
    for line in doubts(args, pipe):
        say(line)
    fps = pipe.sampling.fps
    size: dict[str, Any] = {"height": pipe.height, "width": pipe.width, "fit": args.fit or "crop"}
    video = None
    if args.video is not None:
        video = conditioning.read_clip(args.video, fps=fps, seconds=args.keep, **size)
    begin = 0 if video is None else len(video) / fps
    num_frames = args.num_frames or max(1, round((args.seconds or 4.0 + begin) * fps))
    given |= {"image": image, "video": video, "fit": size["fit"]}
    generation = pipe.generate([args.prompt], num_frames=num_frames, seeds=[args.seed], **given)
    if video is not None and (kept := generation.kept_frames) < len(video):
        groups = f"1 + {pipe.codec.stride[0]} * k"
        say(f"the first {kept} of {len(video)} frames are kept, as the codec needs {groups}")
    writer = open_output(target, num_frames=num_frames, fps=fps)
    with Progress(sys.stderr, every=5.0) as show:

        def tell(frames: int, seconds: float) -> None:
            show(how_far(frames, seconds, total=num_frames, fps=fps))

        timing = stream.write(generation, writer, fps=fps, show=tell)
    return timing, given.get("units", pipe.sampling.units)


def doubts(args: options.Generate, pipe: Any) -> Iterator[str]:
    """Yield what is asked of a model that its training did not know, a line for each."""
    if new := pipe.untrained([args.units or pipe.sampling.units]):
        yield f"the model is {new}"
    if unknown := pipe.unknown_words(args.prompt):
        yield f"in no caption of the model's training: {', '.join(unknown)}"
    if pipe.sampling.step == "renoise" and args.guidance_scale not in (None, 1):
        yield "the model is distilled to sample without guidance, which takes a second pass"


def summary(path: Path, done: Timing, *, scheme: str) -> str:
    """Return what was done and what it took, as sentences."""
    start = done.start_seconds
    since = "" if start is None else f", {start:.1f} s after the start of the process"
    return (
        f"{path}: {done.frames} frames, {done.video_seconds:.1f} s\n"
        f"{done.fps:.1f} frames/s with decoding and writing: {done.seconds:.2f} s, of them model "
        f"{done.model_seconds:.2f}, decoding {done.decode_seconds:.2f}, writing "
        f"{done.write_seconds:.2f}\n{done.units} units of {scheme} in {done.passes} passes; up to "
        f"{done.cache_tokens} tokens in the cache\nfirst frames after "
        f"{done.first_frame_seconds:.2f} s{since}; peak memory {done.peak_bytes / 2**20:.0f} MiB"
    )
