"""Faithfulness and drift on the procedural world: does a video show what its prompt says?

Every kind of unit gets the same prompts and seeds, so kinds are compared in pairs. The judge is
`world.read`; its ceiling is its score on real clips of the same scenes. No scene is trained on, but
its words may be: one thing on a background has only 1,536 combinations of attributes.
"""

import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from videoar import world
from videoar.checkpoint import resolve
from videoar.metrics import Interval, bootstrap_interval, drift_slopes, paired_interval
from videoar.options import WINDOW_SECONDS, Evaluate
from videoar.pipeline import VideoPipeline, from_frames, to_frames
from videoar.tables import markdown
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
        found = [self.scores[column] for column in columns]
        return [f"{100 * s.mean:.1f} [{100 * s.low:.1f}, {100 * s.high:.1f}]" for s in found]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result: tables, and every video behind them."""

    parts: Json
    """By kind: the settings, and each video's prompt, scores and what the judge saw."""
    rows: tuple[Row, ...]

    def to_json(self) -> Json:
        """Return plain JSON values."""
        return asdict(self)

    def to_markdown(self) -> str:
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
    folder, parts = resolve(config.checkpoint), load_parts(config.out)
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

    short, long = (CLEAN, CODEC, *config.units), [name + LONG for name in config.units]
    lengths = dict.fromkeys(short, (config.num_prompts, round(config.seconds * fps)))
    if config.long_prompts:
        lengths |= dict.fromkeys(long, (config.long_prompts, round(config.long_seconds * fps)))
    jobs = {}
    for name, (count, frames) in lengths.items():
        settings = shared | {"num_prompts": count, "num_frames": frames}
        if name not in parts:
            jobs[name] = settings
            continue
        for key, value in parts[name]["settings"].items():
            if value != settings.get(key):
                raise ValueError(
                    f"{config.out} holds {name} with {key} = {value}, but {settings.get(key)} is "
                    "asked for: keep the old value, or name another file."
                )
    total = sum(math.prod(lengths[name]) for name in jobs)
    done, started = 0, time.perf_counter()
    for name, settings in jobs.items():
        (count, frames), videos = lengths[name], []
        prompts = held_out_prompts(count, seed=config.seed)
        for start in range(0, count, config.batch_size):
            batch = prompts[start : start + config.batch_size]
            judge = judge_ends if name in long else judge_whole
            videos += judge(make(pipe, name, batch, num_frames=frames), batch, fps=fps)
            done += len(batch) * frames
            left = (time.perf_counter() - started) * (total / done - 1)
            report(f"{name}: {done / total:.0%} of all, {timedelta(seconds=round(left))} left")
        parts[name] = {"settings": settings, "videos": videos}
        save(config.out, {"parts": parts})
        means = _row("", name, videos, "last" if name in long else "scores").scores
        report(f"{name}: {', '.join(f'{key} {100 * s.mean:.1f}' for key, s in means.items())}")
    result = Report(
        parts={name: parts[name] for name in (*short, *long) if name in parts},
        rows=tuple(tabulate(parts, units=config.units)),
    )
    save(config.out, result.to_json() | {"parts": parts})
    return result


def load_parts(path: Path | None) -> Json:
    """Return the finished parts in the file of an evaluation; none if there is no such file."""
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"the folder {path.parent} does not exist; create it first")
    if path is None or not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["parts"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no evaluation: name another file.") from error


def save(path: Path | None, value: Json) -> None:
    """Replace the file as a whole, so that it is complete at any moment."""
    if path is not None:
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(value, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)


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
    size = round(WINDOW_SECONDS * fps)
    ends: dict[str, Clips] = {}
    values: list[dict[str, list[float]]] = [{} for _ in prompts]
    for window in windows(blocks, size=size):
        last = np.concatenate([ends["last"], window], axis=1)[:, -size:] if ends else window
        ends = {"first": ends.get("first", window), "last": last}
        if window.shape[1] == size:
            for known, clip in zip(values, window, strict=True):
                drift = drift_slopes(clip, fps=fps, window_seconds=WINDOW_SECONDS / 2)
                for name, two in drift.values.items():
                    known.setdefault(name, []).extend(two)
    videos = []
    for i, (prompt, known) in enumerate(zip(prompts, values, strict=True)):
        minutes = (np.arange(len(known["motion"])) + 0.5) * WINDOW_SECONDS / 120
        slopes = {name: float(np.polyfit(minutes, v, 1)[0]) for name, v in known.items()}
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
    videos = {name: part["videos"] for name, part in parts.items()}
    table = "Right, in %, with 95 % intervals over prompts"
    means = {name: _row(table, name, videos[name], "scores") for name in (CLEAN, CODEC, *units)}
    yield from means.values()
    for ceiling in (CODEC, CLEAN):
        best = {key: means[ceiling].scores[key].mean for key in COMPARED}
        for name in units:
            scores = {  # the ceiling is taken as exact; a judge who is always wrong has none
                key: Interval(**{end: v / best[key] for end, v in vars(s).items()})
                for key, s in means[name].scores.items()
                if best.get(key)
            }
            yield replace(means[name], table=f"In % of the score of {ceiling}", scores=scores)
    first = [video["scores"] for video in videos[units[0]]]
    for name in units[1:]:
        scores = [video["scores"] for video in videos[name]]
        table = f"Minus {units[0]} with the same prompts and seeds, in points"
        yield _difference(table, name, scores, first)
    long = {name: videos[name] for name in (f"{name}{LONG}" for name in units) if name in videos}
    for table, key in (
        (f"The first {WINDOW_SECONDS:g} s of the long videos", "first"),
        (f"The last {WINDOW_SECONDS:g} s of the long videos", "last"),
        ("Change per minute, times 100", "slopes"),
    ):
        yield from (_row(table, name, both, key) for name, both in long.items())
    for name, both in long.items():
        last, first = ([video[end] for video in both] for end in ("last", "first"))
        yield _difference("Last minus first window of the same video, in points", name, last, first)


def _row(table: str, name: str, videos: list[Json], key: str) -> Row:
    columns = {c: [video[key][c] for video in videos] for c in videos[0][key]}
    scores = {column: bootstrap_interval(values) for column, values in columns.items()}
    return Row(table=table, name=name, num_videos=len(videos), scores=scores)


def _difference(table: str, name: str, first: list[Json], second: list[Json]) -> Row:
    pairs = {key: ([a[key] for a in first], [b[key] for b in second]) for key in COMPARED}
    scores = {key: paired_interval(a, b) for key, (a, b) in pairs.items()}
    return Row(table=table, name=name, num_videos=len(first), scores=scores)
