"""`videoar generate`."""

import os
import secrets
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from videoar.cli import options
from videoar.cli.progress import say
from videoar.cli.prompts import wanted
from videoar.data.video import PICTURES, STREAMS
from videoar.files import check_folder
from videoar.generation.progress import Progress, how_far
from videoar.generation.timing import Timing

FIELDS = ("units", "num_inference_steps", "shift", "guidance_scale", "negative_prompt", "lag")
"""Options that are fields of `GenerationConfig` under their own names."""


def generate(args: options.Generate) -> int:
    """Generate a video, and say what it took; or several."""
    if args.seed is None:
        args = replace(args, seed=secrets.randbelow(2**32))
        say(f"seed {args.seed}")
    if args.several:
        return generate_several(args)
    timing, scheme = make(args)
    if not timing.frames:
        print("videoar: stopped before the first frame; nothing is written", file=sys.stderr)
        return 130
    target = args.out.expanduser()
    say(summary(target, timing, scheme=scheme))
    if timing.interrupted:
        print(f"videoar: stopped; {target} holds what was finished", file=sys.stderr)
    return 130 if timing.interrupted else 0


def generate_several(args: options.Generate) -> int:
    """Generate the videos of prompts one after the other; those that are there are skipped."""
    folder, pipe, count = args.out.expanduser(), None, args.num_videos_per_prompt
    if folder.suffix.lower() in STREAMS + PICTURES:
        raise ValueError(f"--out {folder} would be one file of several videos: name a folder")
    check_folder(folder)
    todo = wanted(args.prompts or str(args.prompt), seed=args.seed or 0, count=count)
    for number, video in enumerate(todo, start=1):
        target, said = folder / video.name, f"{number}/{len(todo)}  {folder / video.name}"
        if target.exists() and not args.force:
            say(f"{said} is there already and is skipped")
            continue
        folder.mkdir(exist_ok=True)
        if pipe is None:
            pipe = load(args)
            for other in todo:  # what is wrong with one is said before others take hours
                pipe.generate([other.prompt], num_frames=1, seeds=[other.seed])
        # What is not whole has a hidden name, so that it is not skipped later.
        hidden = folder / f".{video.name}"
        one: dict[str, Any] = {"prompt": video.prompt, "prompts": None, "num_videos_per_prompt": 1}
        one |= {"seed": video.seed, "out": hidden, "force": True}
        timing, _ = make(replace(args, **one), pipe)
        if timing.interrupted:
            hidden.unlink(missing_ok=True)
            print("videoar: stopped; the same command goes on from there", file=sys.stderr)
            return 130
        os.replace(hidden, target)
        say(f"{said}: {timing.frames} frames in {timing.seconds:.1f} s, seed {video.seed}")
    return 0


def load(args: options.Generate) -> Any:
    """Load the pipeline."""
    import torch

    from videoar.generation.pipeline import VideoPipeline

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    names = ("base", "lora", "codec", "preset", "dtype", "device", "offload")
    given = {name: getattr(args, name) for name in names}
    pipe = VideoPipeline.from_pretrained(args.model, **given)
    pipe.height, pipe.width = args.height or pipe.height, args.width or pipe.width
    return pipe


def make(args: options.Generate, pipe: Any = None) -> tuple[Timing, str]:
    """Generate, decode and write at the same time, in memory that does not grow.

    Returns:
        What it took, and the name of the units.
    """
    from videoar.data.video import check_output, open_output
    from videoar.generation import conditioning

    target = check_output(args.out, overwrite=args.force)
    image = None if args.image is None else conditioning.read_image(args.image)
    from videoar.core import schemes
    from videoar.generation import stream
    from videoar.generation.inputs import hearing

    if args.units is not None:
        schemes.parse(args.units)  # what is wrong with it is said before weights are loaded
    given = {name: getattr(args, name) for name in FIELDS} | {"sink_frames": args.sink}
    given = {name: value for name, value in given.items() if value is not None}
    if args.window is not None:
        given["window_frames"] = None if args.window == "all" else args.window
    pipe = pipe or load(args)
    for line in doubts(args, pipe):
        say(line)
    fps = pipe.sampling.fps
    video = None
    if args.video is not None:
        size: dict[str, Any] = {"height": pipe.height, "width": pipe.width}
        size |= {"fit": args.fit or "crop", "seconds": args.keep}
        video = conditioning.read_clip(args.video, fps=fps, **size)
    begin = 0 if video is None else len(video) / fps
    num_frames = args.num_frames or max(1, round((args.seconds or 4.0 + begin) * fps))
    given |= {"image": image, "video": video, "fit": args.fit}
    seeds = [args.seed or 0]
    generation = pipe.generate([args.prompt], num_frames=num_frames, seeds=seeds, **given)
    if video is not None and (kept := generation.kept_frames) < len(video):
        groups = f"1 + {pipe.codec.stride[0]} * k"
        say(f"the first {kept} of {len(video)} frames are kept, as the codec needs {groups}")
    writer = open_output(target, num_frames=num_frames, fps=fps)
    with Progress(sys.stderr, every=5.0) as show:
        # Until there are frames: one unit may be all of a video.
        hear = hearing(pipe, generation, None, lambda line: generation.stats.frames or show(line))
        generation.sampler.on_step = hear

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
