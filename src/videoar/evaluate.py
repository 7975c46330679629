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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from videoar import world
from videoar.checkpoint import resolve
from videoar.metrics import Drift, Interval, bootstrap_interval, drift_slopes, paired_interval
from videoar.pipeline import VideoPipeline, to_frames
from videoar.tasks import HELD_OUT, scene_of, to_video
from videoar.units import parse

Json = dict[str, Any]
Clips = UInt8[np.ndarray, "batch frames height width 3"]
FIRST_SCENE = 2 * HELD_OUT
"""Training ends below `HELD_OUT`, validation soon after it."""
ATTRIBUTES = ("color", "shape", "motion", "size", "background", "count", "all")
"""`count` is right if nothing else is there: noise shows every colour. `all`: everything right."""
COMPARED = ATTRIBUTES[:3]
CLEAN, CODEC = "real clips", "real clips through the codec"
WINDOW_SECONDS = 4.0
"""Long videos are judged in their first and last window of this length."""
LONG = ", long"
"""Ends the names of parts with long videos."""
REPORT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to evaluate."""

    checkpoint: str = "toy"
    """Name or folder."""
    units: tuple[str, ...] = ("frame", "chunk:2", "key-detail:4", "multiscale:4,2,1", "cube:1x2x2")
    """Kinds of unit; differences are taken to the first."""
    num_prompts: int = 200
    """Prompts per kind."""
    seconds: float = 3.0
    """Length of the videos: 2 to 4."""
    long_prompts: int = 0
    """Prompts per kind for long videos, which show drift; 0: none."""
    long_seconds: float = 60.0
    """Length of the long videos."""
    seed: int = 0
    """Of the scenes; video i has the seed `seed + i`."""
    batch_size: int = 16
    """Videos that are generated side by side."""
    num_inference_steps: int | None = None
    """Denoising steps per unit; None: the checkpoint's own, as for the next two."""
    shift: float | None = None
    """Shift of the sigmas towards noise."""
    guidance_scale: float | None = None
    """Classifier-free guidance."""
    out: Path | None = None
    """JSON file of the report, with the scores of every video. Kinds of unit that it holds already
    are not computed again."""

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.units or len(set(self.units)) < len(self.units):
            raise ValueError(f"units are {self.units}: name at least one kind, none of them twice.")
        for name in self.units:
            parse(name)
        if self.num_prompts < 2:
            raise ValueError(f"num_prompts is {self.num_prompts}: an interval needs 2 or more.")
        if self.long_prompts < 0 or self.long_prompts == 1:
            raise ValueError(f"long_prompts is {self.long_prompts}: use 0, or 2 or more.")
        if not 2 <= self.seconds <= WINDOW_SECONDS:
            raise ValueError(f"seconds is {self.seconds}: the judge needs 2 to 4.")
        if not (math.isfinite(self.long_seconds) and self.long_seconds >= 2 * WINDOW_SECONDS):
            raise ValueError(f"long_seconds is {self.long_seconds}: use 8 or more.")
        if self.seed < 0 or self.batch_size < 1:
            raise ValueError(
                f"seed is {self.seed} and batch_size {self.batch_size}: use 0 and 1 or more."
            )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of one table: means over videos, with 95 % bootstrap intervals."""

    table: str
    """Heading of the table."""
    name: str
    """Kind of unit, or kind of real clips."""
    num_videos: int
    scores: dict[str, Interval]
    """By column, 1 for all right."""

    def __str__(self) -> str:
        scores = self.scores.values()
        cells = [f"{100 * s.mean:.1f} [{100 * s.low:.1f}, {100 * s.high:.1f}]" for s in scores]
        return f"| {self.name} | {self.num_videos} | {' | '.join(cells)} |"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result: tables, and every video behind them."""

    parts: Json
    """By kind: the settings, and each video's prompt, scores and what the judge saw."""
    rows: tuple[Row, ...]

    def to_json(self) -> Json:
        """Return plain JSON values."""
        return {"parts": self.parts, "rows": [asdict(row) for row in self.rows]}

    def to_markdown(self) -> str:
        """Return the tables, in hundredths."""
        text = []
        for table, group in itertools.groupby(self.rows, key=lambda row: row.table):
            rows = list(group)
            head = f"| units | videos | {' | '.join(rows[0].scores)} |"
            rule = "|---" * (2 + len(rows[0].scores)) + "|"
            text += [f"{table}:", "\n".join([head, rule, *map(str, rows)])]
        return "\n\n".join(text) + "\n"


class Store:
    """Finished parts in a JSON file that is complete at any moment; without a path, in memory."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.parts: Json = {}
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"the folder {path.parent} does not exist; create it first")
        if path is not None and path.exists():
            try:
                self.parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} holds no evaluation: name another file.") from error
        self.save({"parts": self.parts})  # fails now if it must fail

    def has(self, name: str, settings: Json) -> bool:
        """Tell whether a part is finished; raise if it was made with other settings."""
        for key, value in self.parts.get(name, {"settings": {}})["settings"].items():
            if value != settings.get(key):
                raise ValueError(
                    f"{self.path} holds {name} with {key} = {value}, but {settings.get(key)} is "
                    "asked for: keep the old value, or name another file."
                )
        return name in self.parts

    def save(self, value: Json) -> None:
        """Replace the file as a whole."""
        if self.path is not None:
            partial = self.path.with_name(f".{self.path.name}.partial")
            partial.write_text(json.dumps(value, allow_nan=False) + "\n", encoding="utf-8")
            os.replace(partial, self.path)


class Progress:
    """Says now and then how far the evaluation is."""

    def __init__(self, report: Callable[[str], None], *, total: int) -> None:
        self.report, self.total, self.done = report, total, 0
        self.started = self.shown = time.perf_counter()

    def watch(self, name: str, blocks: Iterator[Clips]) -> Iterator[Clips]:
        """Pass blocks of frames through, and count them."""
        for block in blocks:
            yield block
            self.done += block.shape[0] * block.shape[1]
            now = time.perf_counter()
            if now - self.shown > REPORT_SECONDS:
                self.shown, rate = now, self.done / (now - self.started)
                left = timedelta(seconds=round((self.total - self.done) / rate))
                share = self.done / self.total
                self.report(f"{name}: {share:.0%} of all, {rate:,.0f} frames/s, {left} left")


def run(config: EvaluateConfig, report: Callable[[str], None]) -> Report:
    """Evaluate a checkpoint; what `config.out` holds already is kept, not computed again.

    Args:
        config: what to evaluate.
        report: receives a line of progress now and then, and one for each finished kind.

    Raises:
        ValueError: the checkpoint, or the file `config.out`, does not fit.
    """
    folder, store = resolve(config.checkpoint), Store(config.out)
    pipe = VideoPipeline.from_pretrained(folder)
    names = ("num_inference_steps", "shift", "guidance_scale")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    pipe.sampling = replace(pipe.sampling, **given)
    fps = pipe.sampling.fps
    settings = {key: v for key, v in vars(pipe.sampling).items() if key != "units"}
    settings |= {"seed": config.seed, "weights": fingerprint(folder)}

    for name in config.units:  # what is wrong with one kind is said before the others take hours
        pipe.generate(["a ball"], num_frames=1 + fps, seeds=[0], units=name)
    jobs: list[tuple[str, Json]] = []
    for names, count, seconds in (
        ((CLEAN, CODEC, *config.units), config.num_prompts, config.seconds),
        ([f"{name}{LONG}" for name in config.units], config.long_prompts, config.long_seconds),
    ):
        asked = settings | {"num_prompts": count, "num_frames": round(seconds * fps)}
        jobs += [(name, asked) for name in names if count and not store.has(name, asked)]
    total = sum(asked["num_prompts"] * asked["num_frames"] for _, asked in jobs)
    progress = Progress(report, total=total)
    for name, asked in jobs:
        prompts = held_out_prompts(asked["num_prompts"], seed=config.seed)
        videos = []
        for start in range(0, len(prompts), config.batch_size):
            batch = prompts[start : start + config.batch_size]
            blocks = progress.watch(name, make(pipe, name, batch, num_frames=asked["num_frames"]))
            judge = judge_ends if name.endswith(LONG) else judge_whole
            videos += judge(blocks, batch, fps=fps)
        store.parts[name] = {"settings": asked, "videos": videos}
        store.save({"parts": store.parts})
        means = _row("", name, videos, "last" if name.endswith(LONG) else "scores").scores
        report(f"{name}: {', '.join(f'{key} {100 * s.mean:.1f}' for key, s in means.items())}")
    wanted = (CLEAN, CODEC, *config.units, *(f"{name}{LONG}" for name in config.units))
    parts = {name: store.parts[name] for name in wanted if name in store.parts}
    result = Report(parts=parts, rows=tuple(tabulate(parts, units=config.units)))
    store.save(result.to_json() | {"parts": store.parts})
    return result


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
        yield from pipe.generate(
            [prompt["prompt"] for prompt in prompts],
            num_frames=num_frames,
            seeds=[prompt["seed"] for prompt in prompts],
            units=name.removesuffix(LONG),
        )
        return
    stride = pipe.codec.stride[0]
    frames, size = 1 + math.ceil((num_frames - 1) / stride) * stride, pipe.height
    scenes = [world.Scene.from_json(prompt["scene"]) for prompt in prompts]
    fps = pipe.sampling.fps
    clips = np.stack([world.render(s, num_frames=frames, size=size, fps=fps) for s in scenes])
    if name == CODEC:
        clips = to_frames(pipe.codec.decode(pipe.codec.encode(to_video(clips))))
    yield clips[:, :num_frames]


def look(frames: UInt8[np.ndarray, "frames height width 3"], prompt: Json, *, fps: int) -> Json:
    """Return what the judge sees in a clip, and the scores."""
    reading = world.read(frames, fps=fps)
    names = ("color", "shape", "size", "motion", "confidence")
    things = [{name: getattr(thing, name) for name in names} for thing in reading.things]
    scores = world.score(reading, world.Scene.from_json(prompt["scene"]))
    scores["all"] = float(min(scores.values()) == 1)
    return {"scores": scores, "seen": {"background": reading.background, "things": things}}


def judge_whole(blocks: Iterator[Clips], prompts: list[Json], *, fps: int) -> list[Json]:
    """Judge short videos."""
    clips = np.concatenate(list(blocks), axis=1)
    return [
        prompt | look(clip, prompt, fps=fps) for clip, prompt in zip(clips, prompts, strict=True)
    ]


def judge_ends(blocks: Iterator[Clips], prompts: list[Json], *, fps: int) -> list[Json]:
    """Judge the first and last window of long videos, and measure drift from window to window.

    No more than two windows of frames are kept, however long the videos are.
    """
    size = round(WINDOW_SECONDS * fps)
    first = last = None
    drifts: list[list[Drift]] = []
    for window in windows(blocks, size=size):
        first = window if first is None else first
        last = window if last is None else np.concatenate([last, window], axis=1)[:, -size:]
        if window.shape[1] == size:
            half = WINDOW_SECONDS / 2
            drifts.append([drift_slopes(clip, fps=fps, window_seconds=half) for clip in window])
    assert first is not None
    assert last is not None
    minutes = (np.arange(2 * len(drifts)) + 0.5) * WINDOW_SECONDS / 120
    videos = []
    for i, prompt in enumerate(prompts):
        values = {
            name: [value for window in drifts for value in window[i].values[name]]
            for name in drifts[0][i].values
        }
        slopes = {name: float(np.polyfit(minutes, v, 1)[0]) for name, v in values.items()}
        video = prompt | {"slopes": slopes, "values": values, "seen": {}}
        for end, clip in (("first", first[i]), ("last", last[i])):
            found = look(clip, prompt, fps=fps)
            video[end], video["seen"][end] = found["scores"], found["seen"]
        videos.append(video)
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
    table = "Attributes that are right, in %, with 95 % intervals over prompts"
    means = {name: _row(table, name, videos[name], "scores") for name in (CLEAN, CODEC, *units)}
    yield from means.values()
    for ceiling in (CODEC, CLEAN):
        best = {key: means[ceiling].scores[key].mean for key in COMPARED}
        for name in units:
            # A judge who is always wrong has no ceiling.
            scores = {k: _scaled(means[name].scores[k], best[k]) for k in COMPARED if best[k]}
            yield replace(means[name], table=f"In % of the score of {ceiling}", scores=scores)
    for count, word in ((1, "one thing"), (2, "two things")):
        for name in means:
            some = [v for v in videos[name] if len(v["scene"]["things"]) == count]
            if len(some) > 1:
                yield _row(f"Prompts with {word} alone", name, some, "scores")
    for name in units[1:]:
        both = zip(videos[name], videos[units[0]], strict=True)
        pairs = [(a["scores"], b["scores"]) for a, b in both]
        table = f"Minus {units[0]} with the same prompts and seeds, in points"
        yield _paired(table, name, pairs)
    long = [f"{name}{LONG}" for name in units if f"{name}{LONG}" in parts]
    window = f"{WINDOW_SECONDS:g} s of the long videos"
    for end in ("first", "last"):
        yield from (_row(f"The {end} {window}", name, videos[name], end) for name in long)
    for name in long:
        pairs = [(video["last"], video["first"]) for video in videos[name]]
        yield _paired("Last minus first window of the same video, in points", name, pairs)
    for name in long:
        yield _row("Change per minute, times 100", name, videos[name], "slopes")


def _row(table: str, name: str, videos: list[Json], key: str) -> Row:
    scores = {
        column: bootstrap_interval([video[key][column] for video in videos])
        for column in videos[0][key]
    }
    return Row(table=table, name=name, num_videos=len(videos), scores=scores)


def _paired(table: str, name: str, pairs: list[tuple[Json, Json]]) -> Row:
    scores = {
        key: paired_interval([a[key] for a, _ in pairs], [b[key] for _, b in pairs])
        for key in COMPARED
    }
    return Row(table=table, name=name, num_videos=len(pairs), scores=scores)


def _scaled(interval: Interval, ceiling: float) -> Interval:
    """Divide by the ceiling, taken as exact."""
    mean, low, high = (value / ceiling for value in (interval.mean, interval.low, interval.high))
    return replace(interval, mean=mean, low=low, high=high)
