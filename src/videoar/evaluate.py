"""Faithfulness and drift on the procedural world: does a video show what its prompt says?

Every kind of unit gets the same prompts and seeds, so kinds are compared in pairs. The judge is
`world.read`; its ceiling is its score on real clips of the same scenes. No scene is trained on, but
its words may be: one thing on a background has only 1,536 combinations of attributes.
"""

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from videoar import world
from videoar.checkpoint import resolve
from videoar.metrics import Interval, bootstrap_interval, properties, slope
from videoar.options import WINDOW_SECONDS, Evaluate
from videoar.pipeline import VideoPipeline, from_frames, to_frames
from videoar.tables import load, markdown, save
from videoar.tasks import HELD_OUT, scene_of
from videoar.units import parse

Json = dict[str, Any]
Clips = UInt8[np.ndarray, "batch frames height width 3"]
FIRST_SCENE = 2 * HELD_OUT  # training ends below `HELD_OUT`, validation soon after it
ATTRIBUTES = ("color", "shape", "motion", "size", "background", "count", "all")
"""`count` is right if nothing else is there: noise shows every colour. `all`: everything right."""
COMPARED = ATTRIBUTES[:3]
HEADLINE = {"color": "colour", "shape": "shape", "motion": "motion", "all": "all right"}
CLEAN, CODEC = "real clips", "real clips through the codec"
LONG = ", long"  # ends the names of parts with long videos


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of one table: means over videos, with 95 % bootstrap intervals."""

    table: str
    name: str
    """Kind of unit, or kind of real clips."""
    num_videos: int
    scores: dict[str, Interval]
    """By column, 1 for all right."""

    def cells(self, columns: Iterable[str]) -> list[str]:
        """Return some of the scores as `mean [low, high]`, in hundredths."""
        return [f"{self.scores[column].times(100):.1f}" for column in columns]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result: tables, and every video behind them."""

    parts: Json
    """By kind: the settings, and each video's prompt, scores and what the judge saw."""
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        """Return a table of few columns, made for a README, and then all tables; in hundredths."""
        text = []
        for table, group in itertools.groupby(self.rows, key=lambda row: row.table):
            rows = list(group)
            if not text:
                cells = [["units", *HEADLINE.values()]]
                cells += [[row.name, *row.cells(HEADLINE)] for row in rows]
                text += [markdown(cells)]
            cells = [["units", "videos", *rows[0].scores]]
            cells += [[row.name, str(row.num_videos), *row.cells(row.scores)] for row in rows]
            text += [f"{table}:", markdown(cells)]
        return "\n\n".join(text) + "\n"


def run(config: Evaluate, report: Callable[[str], None]) -> Report:
    """Evaluate a checkpoint, with a report of each batch and kind.

    What `config.out` holds already is kept, not computed again; with other settings it is refused.
    """
    for name in config.units:
        parse(name)
    folder, parts = resolve(config.checkpoint), load(config.out, "parts", kind="evaluation")
    save(config.out, {"parts": parts})  # fails now if it must fail
    pipe = VideoPipeline.from_pretrained(folder)
    names = ("num_inference_steps", "shift", "guidance_scale")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    pipe.sampling = replace(pipe.sampling, **given)
    fps = pipe.sampling.fps
    shared = {key: value for key, value in vars(pipe.sampling).items() if key != "units"}
    shared |= {"seed": config.seed, "weights": fingerprint(folder)}
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
        means = _row("", name, [video[key] for video in videos]).scores
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


def fingerprint(folder: Path) -> str:
    """Return a hash of the weights and configs: a checkpoint may change under its name."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*/*")):
        digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def held_out_prompts(count: int, *, seed: int) -> list[Json]:
    """Return scenes that no training has seen, with a caption and a seed each."""
    prompts = []
    for i in range(count):
        scene, rng = scene_of(FIRST_SCENE + i, seed=seed)
        text = world.caption(scene, rng)
        prompts.append({"prompt": text, "seed": seed + i, "scene": scene.to_json()})
    return prompts


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


def look(frames: UInt8[np.ndarray, "frames height width 3"], prompt: Json, *, fps: int) -> Json:
    """Return what the judge sees in a clip, and the scores."""
    reading = world.read(frames, fps=fps)
    things = [{name: getattr(thing, name) for name in world.WORDS} for thing in reading.things]
    scores = world.score(reading, world.Scene.from_json(prompt["scene"]))
    scores["all"] = float(min(scores.values()) == 1)
    return {"scores": scores, "seen": {"background": reading.background, "things": things}}


def judge_whole(blocks: Iterator[Clips], prompts: list[Json], *, fps: int) -> list[Json]:
    """Judge short videos."""
    clips = np.concatenate(list(blocks), axis=1)
    return [p | look(clip, p, fps=fps) for clip, p in zip(clips, prompts, strict=True)]


def judge_ends(blocks: Iterator[Clips], prompts: list[Json], *, fps: int) -> list[Json]:
    """Judge the first and last window of long videos, and measure drift from window to window.

    No more than two windows of frames are kept, however long the videos are.
    """
    size, half = round(WINDOW_SECONDS * fps), WINDOW_SECONDS / 2
    ends: dict[str, Clips] = {}
    values: list[dict[str, list[float]]] = [{} for _ in prompts]
    for window in windows(blocks, size=size):
        last = np.concatenate([ends["last"], window], axis=1)[:, -size:] if ends else window
        ends = {"first": ends.get("first", window), "last": last}
        if window.shape[1] == size:
            for known, clip in zip(values, window, strict=True):
                for name, two in properties(clip, fps=fps, window_seconds=half).items():
                    known.setdefault(name, []).extend(two)
    videos = []
    for i, (prompt, known) in enumerate(zip(prompts, values, strict=True)):
        slopes = {name: slope(v, window_seconds=half) for name, v in known.items()}
        found = {end: look(clips[i], prompt, fps=fps) for end, clips in ends.items()}
        scores, seen = ({end: found[end][key] for end in found} for key in ("scores", "seen"))
        videos.append(prompt | scores | {"seen": seen, "slopes": slopes, "values": known})
    return videos


def windows(blocks: Iterator[Clips], *, size: int) -> Iterator[Clips]:
    """Cut a stream of frames anew, into windows of `size` frames and a rest."""
    held: list[Clips] = []
    for block in blocks:
        held.append(block)
        while sum(part.shape[1] for part in held) >= size:
            joined = np.concatenate(held, axis=1)
            yield joined[:, :size]
            held = [joined[:, size:]]
    if any(part.shape[1] for part in held):
        yield np.concatenate(held, axis=1)


def tabulate(parts: Json, *, units: Sequence[str]) -> Iterator[Row]:
    """Yield the lines of all tables."""

    def scores(name: str, key: str = "scores") -> list[dict[str, float]]:
        return [video[key] for video in parts[name]["videos"]]

    table = "Right, in %, with 95 % intervals over prompts"
    means = {name: _row(table, name, scores(name)) for name in (CLEAN, CODEC, *units)}
    yield from means.values()
    for ceiling in (CODEC, CLEAN):
        best = {key: means[ceiling].scores[key].mean for key in COMPARED}
        for name in units:  # the ceiling is taken as exact; a judge who is always wrong has none
            own = means[name].scores
            shares = {key: own[key].times(1 / best[key]) for key in COMPARED if best[key]}
            yield replace(means[name], table=f"In % of the score of {ceiling}", scores=shares)
    table = f"Minus {units[0]} with the same prompts and seeds, in points"
    for name in units[1:]:
        yield _difference(table, name, scores(name), scores(units[0]))
    long = [f"{name}{LONG}" for name in units if f"{name}{LONG}" in parts]
    for table, key in (
        (f"The first {WINDOW_SECONDS:g} s of the long videos", "first"),
        (f"The last {WINDOW_SECONDS:g} s of the long videos", "last"),
        ("Change per minute, times 100", "slopes"),
    ):
        yield from (_row(table, name, scores(name, key)) for name in long)
    table = "Last minus first window of the same video, in points"
    for name in long:
        yield _difference(table, name, scores(name, "last"), scores(name, "first"))


def _row(table: str, name: str, scores: Sequence[Mapping[str, float]]) -> Row:
    means = {key: bootstrap_interval([one[key] for one in scores]) for key in scores[0]}
    return Row(table=table, name=name, num_videos=len(scores), scores=means)


def _difference(
    table: str, name: str, first: list[dict[str, float]], second: list[dict[str, float]]
) -> Row:
    pairs = zip(first, second, strict=True)  # what makes a prompt easy for both cancels
    return _row(table, name, [{key: a[key] - b[key] for key in COMPARED} for a, b in pairs])
