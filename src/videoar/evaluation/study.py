"""Faithfulness and drift on the procedural world: does a video show what its prompt says?

Every kind of unit gets the same prompts and seeds, so kinds are compared in pairs. The judge is
`world.read`; its ceiling is its score on real clips of the same scenes. No scene is trained on, but
its words may be: one thing on a background has only 1,536 combinations of attributes.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta

import numpy as np

from videoar.checkpoints.checkpoint import Checkpoint
from videoar.core.schemes import parse
from videoar.data import world
from videoar.data.world import held_out_prompts
from videoar.encoders.codec import from_frames, to_frames
from videoar.evaluation.judge import Clips, judge_ends, judge_whole
from videoar.evaluation.options import WINDOW_SECONDS, Evaluate
from videoar.evaluation.tables import COMPARED, Report, Row, difference, row_of
from videoar.files import Json, load, save
from videoar.generation.pipeline import VideoPipeline

CLEAN, CODEC = "real clips", "real clips through the codec"
LONG = ", long"  # ends the names of parts with long videos


def run(config: Evaluate, report: Callable[[str], None]) -> Report:
    """Evaluate a checkpoint, with a report of each batch and kind.

    What `config.out` holds already is kept, not computed again; with other settings it is refused.
    """
    for name in config.units:
        parse(name)
    weights = Checkpoint.find(config.checkpoint).fingerprint()
    parts = load(config.out, "parts", kind="evaluation")
    save(config.out, {"parts": parts})  # fails now if it must fail
    pipe = VideoPipeline.from_pretrained(config.checkpoint)
    names = ("num_inference_steps", "shift", "guidance_scale")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    pipe.sampling = replace(pipe.sampling, **given)
    fps = pipe.sampling.fps
    shared = {key: value for key, value in vars(pipe.sampling).items() if key != "units"}
    shared |= {"seed": config.seed, "weights": weights}
    for name in config.units:  # what is wrong with one kind is said before the others take hours
        pipe.generate(["a ball"], num_frames=1 + fps, seeds=[0], units=name)

    lengths = dict.fromkeys((CLEAN, CODEC, *config.units), (config.num_prompts, config.seconds))
    if config.long_prompts:
        long = (f"{name}{LONG}" for name in config.units)
        lengths |= dict.fromkeys(long, (config.long_prompts, config.long_seconds))
    jobs = {}
    for name, (count, seconds) in lengths.items():
        settings = shared | {"num_prompts": count, "num_frames": round(seconds * fps)}
        if name not in parts:
            jobs[name] = settings
            continue
        for key, value in parts[name]["settings"].items():
            if value != settings.get(key):
                raise ValueError(
                    f"{config.out} holds {name} with {key} = {value}, but {settings.get(key)} is "
                    "asked for: keep the old value, or name another file."
                )
    total = sum(settings["num_prompts"] * settings["num_frames"] for settings in jobs.values())
    done, started = 0, time.perf_counter()
    for name, settings in jobs.items():
        judge, key = (judge_ends, "last") if name.endswith(LONG) else (judge_whole, "scores")
        frames, videos = settings["num_frames"], []
        prompts = held_out_prompts(settings["num_prompts"], seed=config.seed)
        how = {"num_frames": frames, "batch_size": config.batch_size}
        for batch in judged(pipe, name, prompts, judge, **how):
            videos += batch
            done += len(batch) * frames
            left = (time.perf_counter() - started) * (total / done - 1)
            report(f"{name}: {done / total:.0%} of all, {timedelta(seconds=round(left))} left")
        parts[name] = {"settings": settings, "videos": videos}
        save(config.out, {"parts": parts})
        means = row_of("", name, [video[key] for video in videos]).scores
        report(f"{name}: {', '.join(f'{key} {100 * s.mean:.1f}' for key, s in means.items())}")
    result = Report(parts=parts, rows=tuple(tabulate(parts, units=config.units)))
    save(config.out, result)
    return result


def judged(
    pipe: VideoPipeline,
    name: str,
    prompts: list[Json],
    judge: Callable[..., list[Json]],
    *,
    num_frames: int,
    batch_size: int,
) -> Iterator[list[Json]]:
    """Make the videos of all prompts, batch by batch, and yield what a judge says of each batch."""
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        yield judge(make(pipe, name, batch, num_frames=num_frames), batch, fps=pipe.sampling.fps)


def make(
    pipe: VideoPipeline, name: str, prompts: list[Json], *, num_frames: int
) -> Iterator[Clips]:
    """Yield the frames of a batch of videos as they come: generated, or real ones."""
    if name not in (CLEAN, CODEC):
        texts, seeds = ([prompt[key] for prompt in prompts] for key in ("prompt", "seed"))
        units = name.removesuffix(LONG)
        yield from pipe.generate(texts, num_frames=num_frames, seeds=seeds, units=units)
        return
    stride, size, fps = pipe.codec.stride[0], pipe.height, pipe.sampling.fps
    frames = 1 + math.ceil((num_frames - 1) / stride) * stride
    scenes = [world.Scene.from_json(prompt["scene"]) for prompt in prompts]
    clips = np.stack([world.render(s, num_frames=frames, size=size, fps=fps) for s in scenes])
    if name == CODEC:
        clips = to_frames(pipe.codec.decode(pipe.codec.encode(from_frames(clips))))
    yield clips[:, :num_frames]


def tabulate(parts: Json, *, units: Sequence[str]) -> Iterator[Row]:
    """Yield the lines of all tables."""

    def scores(name: str, key: str = "scores") -> list[dict[str, float]]:
        return [video[key] for video in parts[name]["videos"]]

    table = "Right, in %, with 95 % intervals over prompts"
    means = {name: row_of(table, name, scores(name)) for name in (CLEAN, CODEC, *units)}
    yield from means.values()
    for ceiling in (CODEC, CLEAN):
        best = {key: means[ceiling].scores[key].mean for key in COMPARED}
        for name in units:  # the ceiling is taken as exact; a judge who is always wrong has none
            own = means[name].scores
            shares = {key: own[key].times(1 / best[key]) for key in COMPARED if best[key]}
            yield replace(means[name], table=f"In % of the score of {ceiling}", scores=shares)
    table = f"Minus {units[0]} with the same prompts and seeds, in points"
    for name in units[1:]:
        yield difference(table, name, scores(name), scores(units[0]))
    long = [f"{name}{LONG}" for name in units if f"{name}{LONG}" in parts]
    for table, key in (
        (f"The first {WINDOW_SECONDS:g} s of the long videos", "first"),
        (f"The last {WINDOW_SECONDS:g} s of the long videos", "last"),
        ("Change per minute, times 100", "slopes"),
    ):
        yield from (row_of(table, name, scores(name, key)) for name in long)
    table = "Last minus first window of the same video, in points"
    for name in long:
        yield difference(table, name, scores(name, "last"), scores(name, "first"))
