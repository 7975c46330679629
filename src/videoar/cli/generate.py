"""`videoar generate`."""

import itertools
import json
import math
import secrets
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from videoar.checks import check_same, explained
from videoar.cli import options
from videoar.cli.progress import say
from videoar.cli.prompts import Wanted, lines_of, read_text, wanted
from videoar.data.options import ALL, turns
from videoar.data.video import PICTURES, STREAMS
from videoar.files import Json, check_folder, to_json, write_json
from videoar.generation import conditioning
from videoar.generation.progress import Progress, how_far
from videoar.generation.timing import Timing

FIELDS = ("units", "num_inference_steps", "first_steps", "shift", "guidance_scale")
FIELDS += ("negative_prompt", "lag")
"""Options that are fields of `GenerationConfig` under their own names."""
LOAD = ("base", "lora", "codec", "preset", "dtype", "codec_dtype")
HELD = ("model", "height", "width", *LOAD)
"""Options that are in a state."""
NARROW = 256
"""Channels of a model whose passes hardly gain by more threads: see docs/decisions/passes.md."""
FREE = ("class", "prompts", "num_videos_per_prompt", "out", "threads", "force", "share")
FREE += options.MACHINE
"""Options that do not tell videos of one folder apart."""
SETTINGS = "settings.json"
"""In the folder of several videos: how they were made."""
SHARE = 20
"""Of the time, saving the state takes one part in so many, or less."""


def generate(args: options.Generate) -> int:
    """Generate a video, and say what it took; or several."""
    asked = args
    if args.seed is None:
        args = replace(args, seed=secrets.randbelow(2**32))
        say(f"seed {args.seed}")
    if args.several:
        prompts, count = args.prompts or str(args.prompt), args.num_videos_per_prompt
        todo = wanted(prompts, seed=args.seed or 0, count=count)
        told = {name: v for name, v in to_json(asked).items() if name not in FREE}
        return generate_several(args, todo, told=told)
    timing, scheme, target = make(args)
    if not timing.frames:
        print("videoar: stopped before the first frame; nothing is written", file=sys.stderr)
        return 128 + timing.interrupted
    say(summary(target, timing, scheme=scheme))
    if timing.interrupted:
        print(f"videoar: stopped; {target} holds what was finished", file=sys.stderr)
    return timing.interrupted and 128 + timing.interrupted


def generate_several(
    args: options.Generate, todo: list[Wanted], pipe: Any = None, *, told: Json | None = None
) -> int:
    """Generate a share of videos one after the other; those that are there are skipped.

    Raises:
        ValueError: videos that are there were not made as is `told`.
    """
    folder = args.out.expanduser()
    record, old = folder / SETTINGS, any((folder / v.name).exists() for v in todo)
    todo = todo[turns(args.share)]
    if folder.suffix.lower() in (*STREAMS, *PICTURES):
        raise ValueError(f"--out {folder} would be one file of several videos: name a folder")
    check_folder(folder)
    if told and old and not args.force and record.exists():
        held = json.loads(record.read_text(encoding="utf-8"))
        how: Json = {"other": "folder, or pass --force", "options": args}
        check_same(held, told, held=f"{folder} holds videos", **how)
    left = [v for v in todo if args.force or not (folder / v.name).exists()]
    seeds = {v.prompt: v.seed for v in sorted(left, key=lambda v: v.seed)}
    if left and pipe is None:
        pipe = load(args)
    for prompt, seed in seeds.items():  # what is wrong with one is said before others take hours
        pipe.generate([prompt], num_frames=1, seeds=[seed])
    if left:
        folder.mkdir(exist_ok=True)
    if left and told:
        write_json(record, told)
    for number, video in enumerate(todo, start=1):
        target, said = folder / video.name, f"{number}/{len(todo)}  {folder / video.name}"
        if target.exists() and not args.force:
            say(f"{said} is there already and is skipped")
            continue
        # What is not whole has a hidden name, so that it is not skipped later.
        hidden = folder / f".{video.name}"
        one: dict[str, Any] = {"prompt": video.prompt, "prompts": None, "num_videos_per_prompt": 1}
        one |= {"seed": video.seed, "out": hidden, "force": True, "share": ALL}
        timing, *_ = make(replace(args, **one), pipe)
        if timing.interrupted:
            hidden.unlink(missing_ok=True)
            print("videoar: stopped; the same command goes on from there", file=sys.stderr)
            return 128 + timing.interrupted
        hidden.replace(target)
        say(f"{said}: {timing.frames} frames in {timing.seconds:.1f} s, seed {video.seed}")
    return 0


def loaded(args: options.Sampling | options.Serve, *names: str) -> Any:
    """Load a pipeline as these options say; say which of them changes nothing."""
    import torch

    from videoar.generation.pipeline import VideoPipeline

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.graphs and not args.device.startswith("cuda"):
        say(f"--graphs changes nothing on {args.device}: passes are recorded on a CUDA device")
    given = {name: getattr(args, name) for name in names}
    return VideoPipeline.from_pretrained(args.model, **given)


def load(args: options.Sampling) -> Any:
    """Load the pipeline of a generation; a small model leaves half of the threads to its codec."""
    import torch

    pipe = loaded(args, *LOAD, *options.MACHINE)
    half, narrow = torch.get_num_threads() // 2, pipe.transformer.config.hidden_size <= NARROW
    if half and narrow and args.device == "cpu":
        torch.set_num_threads(half)
        pipe.ahead = True
    pipe.height, pipe.width = args.height or pipe.height, args.width or pipe.width
    return pipe


def make(args: options.Generate, pipe: Any = None) -> tuple[Timing, str, Path]:
    """Generate, decode and write at the same time, in memory that does not grow.

    Returns:
        What it took, the name of the units, and the file.
    """
    from videoar.data.video import VideoWriter, check_output, check_streamed, open_output

    state: dict[str, Any] = {}
    if args.resume is not None:
        state, args = _resumed(args, args.resume)
    elif args.save_state is not None and args.save_state.exists() and not args.force:
        raise ValueError(f"{args.save_state} exists already: --resume it, or pass --force")
    target = check_output(args.out, overwrite=args.force or bool(state))
    if args.save_state is not None:
        check_streamed(target)
    (_, prompt), *script = read_script(args)
    image = None if args.image is None else conditioning.read_image(args.image)
    from videoar.generation.config import scheme_of
    from videoar.generation.inputs import warned
    from videoar.generation.state import unpacked

    if args.units is not None:
        scheme_of(args.units)  # what is wrong with it is said before weights are loaded
    pipe = pipe or load(args)
    if state:
        generation = pipe.resume(state).generation
        file = unpacked(state, "file") | {"pending": state["pending"].numpy()}
        writer = VideoWriter(target, fps=pipe.sampling.fps, state=file)
    else:
        generation = begin(args, pipe, prompt, image)
        for second, later in script:
            change = {"prompts": [later], "recompute": args.recompute or None}
            generation.change_at(frame := round(second * pipe.sampling.fps), **change)
            if frame >= generation.num_frames:
                say(f"the video ends before {second:g} s, from which on {later!r} was to hold")
                break  # as it does before those that follow
        warned(generation)
        writer = open_output(target, num_frames=generation.num_frames, fps=pipe.sampling.fps)
    timing = _write(pipe, generation, writer, args)
    chosen = ", ".join(f"{count} of {name}" for name, count in sorted(timing.chosen.items()))
    units = generation.plan.units
    return timing, f"{units} (segments: {chosen})" if chosen else units, target


def _write(pipe: Any, generation: Any, writer: Any, args: options.Generate) -> Timing:
    """Write the frames as they come, and the state if that is asked for."""
    from videoar.generation.inputs import hearing, write

    fps, total, due = writer.fps, generation.num_frames, 0.0
    with Progress(sys.stderr, every=5.0) as show:
        # Until there are frames: one unit may be all of a video.
        hear = hearing(pipe, generation, None, lambda line: generation.stats.frames or show(line))
        generation.sampler.on_step = hear

        def tell(frames: int, seconds: float) -> None:
            nonlocal due
            show(how_far(frames, seconds, total=total, fps=fps, resumed=generation.stats.resumed))
            if (before := time.perf_counter()) >= due:
                _save(args, generation, writer)
                due = time.perf_counter() + SHARE * (time.perf_counter() - before)

        try:
            timing = write(generation, writer, tell)
        except (OSError, FloatingPointError) as error:
            kind = OSError if isinstance(error, OSError) else FloatingPointError
            what = f"{writer.path} holds the first {writer.num_frames / fps:.1f} s"
            left = what if writer.num_frames else "nothing is written"
            raise kind(f"{getattr(error, 'strerror', None) or error}: {left}") from error
    if args.save_state is not None and not timing.interrupted:
        args.save_state.unlink(missing_ok=True)
    return timing


def begin(args: options.Generate, pipe: Any, prompt: str, image: Any = None) -> Any:
    """Begin to generate."""
    given = {name: getattr(args, name) for name in FIELDS} | {"sink_frames": args.sink}
    given = {name: value for name, value in given.items() if value is not None}
    if args.window is not None:
        given["window_frames"] = None if args.window == "all" else args.window
    fps, video = pipe.sampling.fps, None
    if args.video is not None:
        size: dict[str, Any] = {"height": pipe.height, "width": pipe.width}
        size |= {"fit": args.fit or "crop", "seconds": args.keep}
        video = conditioning.read_clip(args.video, fps=fps, **size)
    begin = 0 if video is None else len(video) / fps
    num_frames = args.num_frames or max(1, round((args.seconds or 4.0 + begin) * fps))
    given |= {"image": image, "video": video, "fit": args.fit, "seeds": [args.seed or 0]}
    generation = pipe.generate([prompt], num_frames=num_frames, **given)
    if video is not None and (kept := generation.kept_frames) < len(video):
        groups = f"1 + {pipe.codec.stride[0]} * k"
        say(f"the first {kept} of {len(video)} frames are kept, as the codec needs {groups}")
    return generation


def read_script(args: options.Generate) -> list[tuple[float, str]]:
    """Return the prompts and the seconds from which on they hold; the first is that of 0."""
    found = [] if args.prompt is None else [(0.0, args.prompt)]
    given = [("--prompt-at", *at) for at in args.prompt_at]
    for number, line in lines_of(read_text(args.script)) if args.script else []:
        second, _, prompt = line.partition(" ")
        given.append((f"line {number} of {args.script}", second, prompt.strip()))
    for place, second, prompt in given:
        says = f"{place} begins with {second!r}: write the second from which on its prompt holds,"
        with explained(f"{says} and the prompt, as `12.5 a red ball`"):
            found.append((float(second), prompt))
    found.sort(key=lambda item: item[0])
    seconds = [second for second, _ in found]
    if twice := [one for one, other in itertools.pairwise(seconds) if one == other]:
        raise ValueError(f"two prompts hold from {twice[0]:g} s on: leave out one, such as PROMPT")
    if seconds[:1] != [0.0] or not math.isfinite(sum(seconds)):
        raise ValueError(
            f"the prompts hold from {', '.join(f'{s:g}' for s in seconds)} s on: give one for 0,"
            " and one for each other moment"
        )
    return found


def _save(args: options.Generate, generation: Any, writer: Any) -> None:
    """Write what `--resume` needs, if that is asked for."""
    import numpy as np
    import torch

    from videoar.generation.state import packed
    from videoar.weights import write_safetensors

    if args.save_state is None or (file := writer.state_dict()) is None:
        return
    held = {name: to_json(getattr(args, name)) for name in HELD}
    held |= {"out": str(writer.path.absolute()), "prompt": generation.begun.prompts[0]}
    pending = torch.from_numpy(np.array(file.pop("pending"), dtype=np.uint8))
    parts = {"args": packed(held), "file": packed(file), "pending": pending}
    write_safetensors(args.save_state, generation.state_dict() | parts)


def _resumed(args: options.Generate, file: Path) -> tuple[dict[str, Any], options.Generate]:
    """Read a state, and the options it was made with."""
    from videoar.generation.state import unpacked
    from videoar.weights import read_safetensors

    if not file.exists():
        raise ValueError(f"there is no {file}: it is removed when its video is whole")
    state = read_safetensors(file)
    held = unpacked(state, "args")
    held |= {"out": Path(held["out"]), "lora": tuple(held["lora"])}
    return state, replace(args, **held, resume=None, save_state=file)


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
