"""Faithfulness and drift: does a video show what its prompt says?

A study is a list of entries, each a checkpoint with fields of `GenerationConfig` beside its own;
all get the same prompts and seeds, so they are compared in pairs. The judge is that of the
procedural world, or one that was trained; its ceiling is its score on real clips of the same
prompts. No scene is trained on, but its words may be: one thing on a background of the procedural
world has only 1,536 combinations of attributes.

What the file of a study holds is kept and not computed again; of other settings it is refused.
"""

import functools
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta

import numpy as np
import torch
from jaxtyping import Float

from videoar.checkpoints.checkpoint import Checkpoint
from videoar.checks import check_same
from videoar.core.schemes import KINDS, parse
from videoar.encoders.codec import from_frames, to_frames
from videoar.evaluation import tables
from videoar.evaluation.judge import WORLD, Clips, Judge, judge_ends, judge_whole
from videoar.evaluation.options import Compare, Evaluate, StudyOptions
from videoar.evaluation.reader import TrainedJudge
from videoar.evaluation.tables import CLEAN, CODEC, LONG, cells, markdown
from videoar.files import Json, load, save, to_json
from videoar.generation.config import GenerationConfig
from videoar.generation.pipeline import VideoPipeline
from videoar.generation.progress import Paced

Report, Asked, Made = Callable[[str], None], list[Json], Iterator[Clips]
Who = tuple[Judge, Json]
"""A judge, and what tells it from others in the settings of a study."""


def generated(pipe: VideoPipeline, prompts: Asked, judge: Judge, *, num_frames: int) -> Made:
    """Yield the frames of a batch of generated videos as they come."""
    texts, seeds = ([prompt[key] for prompt in prompts] for key in ("prompt", "seed"))
    yield from pipe.generate(texts, num_frames=num_frames, seeds=seeds)


def real(pipe: VideoPipeline, prompts: Asked, judge: Judge, *, num_frames: int) -> Made:
    """Yield real clips of what is asked for."""
    yield judge.real(prompts, num_frames=num_frames, size=pipe.height, fps=pipe.sampling.fps)


def coded(pipe: VideoPipeline, prompts: Asked, judge: Judge, *, num_frames: int) -> Made:
    """Yield real clips that went through the codec, which takes whole latent frames."""
    stride = pipe.codec.stride[0]
    whole = 1 + math.ceil((num_frames - 1) / stride) * stride
    for clips in real(pipe, prompts, judge, num_frames=whole):
        latents = pipe.codec.encode(from_frames(clips))
        yield to_frames(pipe.codec.decode(latents))[:, :num_frames]


def judge_and_describe(blocks: Made, prompts: Asked, *, fps: int, judge: Judge) -> list[Json]:
    """Judge short videos, and describe them by `features`."""
    clips = np.concatenate(list(blocks), axis=1)
    videos = judge_whole(iter([clips]), prompts, fps=fps, judge=judge)
    pairs = zip(videos, features(clips).tolist(), strict=True)
    return [video | {"features": described} for video, described in pairs]


def features(frames: Clips) -> Float[np.ndarray, "b c"]:
    """Describe videos by the encoder of the bundled codec, a fixed network that saw no generator.

    Per latent channel: its mean and deviation over all places, and its mean change in time.
    """
    codec = Checkpoint.find("toy").codec()
    stride = codec.stride[0]
    with torch.inference_mode():
        whole = 1 + (frames.shape[1] - 1) // stride * stride
        latents = codec.encode(from_frames(frames[:, :whole]))
    change = latents.diff(dim=1).abs()
    parts = (latents.mean((1, 3, 4)), latents.std((1, 3, 4)), change.mean((1, 3, 4)))
    return torch.cat(parts, dim=1).double().numpy()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Videos of the held-out prompts that one checkpoint makes in one way, and their judge."""

    name: str
    """In the file; no other entry has it."""
    checkpoint: str
    overrides: Json = field(default_factory=dict)
    """Fields of `GenerationConfig`, such as the units, that are not the checkpoint's own."""
    num_prompts: int
    seconds: float
    seeds: int = 1
    """Videos per prompt."""
    make: Callable[..., Made] = generated
    judge: Callable[..., list[Json]] = judge_whole


def find_judge(config: StudyOptions, checkpoint: str) -> Who:
    """Return who judges: whom the options name, or whom the checkpoint brings along; and its mark.

    Raises:
        ValueError: it lacks the videos by which it judges, or there is none.
    """
    found = Checkpoint.find(config.judge or checkpoint)
    folder, footage = found.source / "judge", config.footage
    trained = folder.is_dir()
    if trained != (footage is not None) or (config.judge and not trained):
        raise ValueError(
            f"{found.source} brings {'a' if trained else 'no'} judge of labelled videos: one takes"
            " --footage, the folder of these, and --judge, the checkpoint of `videoar train judge`,"
            " if the first checkpoint brings none"
        )
    if footage is None:
        return WORLD, {}
    return TrainedJudge(folder, footage), {"judge_weights": found.fingerprint()}


def evaluate(config: Evaluate, report: Report) -> str:
    """Judge a checkpoint under every kind of unit, and return the tables."""
    units = config.units or tuple(Checkpoint.find(config.checkpoint).meta.get("units", KINDS))
    for name in units:  # what is wrong with it is said before weights are loaded
        parse(name)
    names = ("num_inference_steps", "shift", "guidance_scale")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    shared: Json = {"checkpoint": config.checkpoint}
    shared |= {"num_prompts": config.num_prompts, "seconds": config.seconds}
    entries = [
        Entry(name=CLEAN, make=real, overrides=given, **shared),
        Entry(name=CODEC, make=coded, overrides=given, **shared),
        *(Entry(name=name, overrides=given | {"units": name}, **shared) for name in units),
    ]
    found = run(entries, config, report, find_judge(config, config.checkpoint))
    titled = tables.unit_tables(found, units=units)
    save(config.out, {"entries": found, "tables": titled})
    text = [markdown(cells(tables.headline(next(iter(titled.values())))))]
    for title, rows in titled.items():
        text += [f"{title}:", markdown(cells(rows))]
    return "\n\n".join(text) + "\n"


def compare(config: Compare, report: Report) -> str:
    """Judge checkpoints beside each other, and return the tables.

    A line is a name with one checkpoint, or with several that differ in their seed of training:
    their videos of one prompt are one observation. Every checkpoint samples as it says itself, but
    for fields after its name, as in `toy?guidance_scale=1&num_inference_steps=2`.
    """
    lines = dict(map(read_line, config.entries))
    if len(lines) < len(config.entries):
        raise ValueError("two entries have one name: write NAME=CHECKPOINT with other names")
    shared: Json = {"num_prompts": config.num_prompts, "seconds": config.seconds}
    shared["judge"] = judge_and_describe
    first = next(iter(lines.values()))[0].partition("?")[0]
    makers = {CLEAN: real, CODEC: coded}
    entries = [Entry(name=k, checkpoint=first, make=make, **shared) for k, make in makers.items()]
    for line, checkpoint in ((line, one) for line, several in lines.items() for one in several):
        path, _, text = checkpoint.partition("?")
        overrides = read_overrides(text) | ({"units": config.units} if config.units else {})
        how: Json = {"checkpoint": path, "overrides": overrides, "seeds": config.seeds}
        entries.append(Entry(name=f"{line} {checkpoint}", **how, **shared))
    found = run(entries, config, report, find_judge(config, first))
    names = {line: [f"{line} {one}" for one in several] for line, several in lines.items()}
    three = tables.checkpoint_tables(found, names)
    save(config.out, {"entries": found, "tables": three})
    return "\n\n".join(markdown(cells(rows)) for rows in three) + "\n"


def read_line(text: str) -> tuple[str, tuple[str, ...]]:
    """Read `NAME=CHECKPOINT,CHECKPOINT`, or a checkpoint alone."""
    name, equals, paths = text.partition("=")
    if not equals or "?" in name:  # what follows a checkpoint's own name is no other one
        name = paths = text
    # Commas of a changed field, as in units=multiscale:4,2,1 or sigmas=[1,0.5,0], part nothing.
    comma = r",(?! ?[\d.]+\]?(?:[,/&]|$))" if "?" in paths else ","
    checkpoints = tuple(re.split(comma, paths))
    if not name or not all(checkpoints):
        raise ValueError(f"{text!r} names nothing: write NAME=CHECKPOINT,CHECKPOINT")
    return name, checkpoints


def read_overrides(text: str) -> Json:
    """Read fields of `GenerationConfig` from `name=value&name=value`; values are JSON, or words."""
    changes, known = {}, [field.name for field in fields(GenerationConfig)]
    for pair in filter(None, text.split("&")):
        name, equals, value = pair.partition("=")
        if not equals or name not in known:
            raise ValueError(
                f"{pair!r} changes no field of the sampling: write NAME=VALUE with a name among"
                f" {', '.join(known)}"
            )
        try:
            changes[name] = json.loads(value)
        except ValueError:
            changes[name] = value
    return changes


def run(entries: Sequence[Entry], config: StudyOptions, report: Report, who: Who) -> Json:
    """Make and judge the videos of entries, and keep them, with a report of each batch and entry.

    If they are asked for, long videos of what generates are judged, too.

    Returns:
        All that the file holds then, by entry: settings, and what was seen in every video.
    """
    found, (judge, mark) = load(config.out, "entries", kind="evaluation"), who
    judge.prompts(max(entry.num_prompts for entry in entries), seed=config.seed)
    save(config.out, {"entries": found})  # fails now if it must fail
    how: Json = {"num_prompts": config.long_prompts, "seconds": config.long_seconds, "seeds": 1}
    long = [
        replace(entry, name=f"{entry.name}{LONG}", judge=judge_ends, **how)
        for entry in entries
        if config.long_prompts and entry.make is generated
    ]
    pipelines = functools.lru_cache(maxsize=1)(_load)  # neighbours often share a checkpoint
    jobs = {}
    for entry in (*entries, *long):  # what is wrong with one is said before others take hours
        pipe, weights = pipelines(entry.checkpoint)
        sampling = pipe.sampling.replaced(**entry.overrides)
        pipe = replace(pipe, sampling=sampling)
        if new := pipe.untrained([sampling.units] if entry.make is generated else ()):
            report(f"{entry.name}: {entry.checkpoint} is {new}")
        pipe.generate(["a ball"], num_frames=1 + sampling.fps, seeds=[0])
        settings = to_json(
            vars(sampling)
            | {
                "num_inference_steps": sampling.steps,
                "num_prompts": entry.num_prompts,
                "seeds": entry.seeds,
                "seed": config.seed,
            }
            | {"num_frames": round(entry.seconds * sampling.fps), "weights": weights}
            | {"judge": entry.judge.__name__}
            | mark
        )
        if entry.name in found:
            held = f"{config.out} holds {entry.name}"
            check_same(found[entry.name]["settings"], settings, held=held, other="file")
        else:
            jobs[entry.name] = entry, sampling, settings
    total = sum(s["num_prompts"] * s["seeds"] * s["num_frames"] for *_, s in jobs.values())
    done, started, paced = 0, time.perf_counter(), Paced(report)
    for name, (entry, sampling, settings) in jobs.items():
        pipe = replace(pipelines(entry.checkpoint)[0], sampling=sampling)
        frames, videos = settings["num_frames"], []
        for batch in _batches(entry, config, judge):
            blocks = _heard(entry.make(pipe, batch, judge, num_frames=frames), name, paced)
            videos += entry.judge(blocks, batch, fps=sampling.fps, judge=judge)
            done += len(batch) * frames
            left = (time.perf_counter() - started) * (total / done - 1)
            paced.say(f"{name}: {done / total:.0%} of all, {timedelta(seconds=round(left))} left")
        found[name] = {"settings": settings, "videos": videos}
        if entry.make is generated:
            found[name]["passes_per_second"] = _passes(pipe)
        save(config.out, {"entries": found})
        scores = tables.by_prompt([found[name]], "last" if "last" in videos[0] else "scores")
        report(f"{name}: {', '.join(f'{key} {100 * s.mean():.1f}' for key, s in scores.items())}")
    return found


def _load(checkpoint: str) -> tuple[VideoPipeline, str]:
    """Load a checkpoint, and take its fingerprint."""
    return VideoPipeline.from_pretrained(checkpoint), Checkpoint.find(checkpoint).fingerprint()


def _heard(blocks: Iterator[Clips], name: str, paced: Paced) -> Iterator[Clips]:
    """Pass on what comes, and say how much it was if nothing else is said."""
    frames = 0
    for block in blocks:
        frames += block.shape[1]
        paced.hear(f"{name}: {frames} frames of {len(block)} videos")
        yield block


def _batches(entry: Entry, config: StudyOptions, judge: Judge) -> Iterator[list[Json]]:
    """Yield the prompts of an entry, once for each of its seeds, in batches."""
    prompts = judge.prompts(entry.num_prompts, seed=config.seed)
    asked = [p | {"seed": p["seed"] + 1_000_003 * k} for k in range(entry.seeds) for p in prompts]
    for start in range(0, len(asked), config.batch_size):
        yield asked[start : start + config.batch_size]


def _passes(pipe: VideoPipeline) -> float:
    """Count the passes for a second of video; guidance makes two of one."""
    generation = pipe.generate(["a ball"], num_frames=1 + 4 * pipe.codec.stride[0], seeds=[0])
    frames = sum(block.shape[1] for block in generation)
    twice = 2 if pipe.sampling.guidance_scale != 1 else 1
    return generation.stats.passes * twice * pipe.sampling.fps / frames
