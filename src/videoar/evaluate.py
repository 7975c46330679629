"""Faithfulness and drift on the procedural world: does a video show what its prompt says?

Every kind of unit gets the same prompts and the same seeds, so that kinds are compared in pairs. The
judge is `world.read`; its ceiling is what it says of real clips of the same scenes. The scenes are
never trained on; their captions may be: one thing alone has only 1,536 combinations of attributes.
"""

import hashlib
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
from videoar.metrics import Interval, bootstrap_interval, drift_slopes, paired_interval
from videoar.pipeline import Generation, VideoPipeline, to_frames
from videoar.tasks import HELD_OUT, scene_of, to_video
from videoar.units import parse

Json = dict[str, Any]
Clips = UInt8[np.ndarray, "batch frames height width 3"]
FIRST_SCENE = 2 * HELD_OUT
"""Training ends below `HELD_OUT`, validation soon after it."""
ATTRIBUTES = ("color", "shape", "motion", "size", "background", "count")
COMPARED = ATTRIBUTES[:3]
CLEAN, CODEC = "real clips", "real clips through the codec"
WINDOW_SECONDS = 4.0
"""Long videos are judged in their first and last window of this length."""
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
    """JSON file of the report with every video's scores. What it holds already is not computed again."""

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
class Prompt:
    """What is asked for, and how it is judged."""

    scene: world.Scene
    text: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """Mean scores of one kind of unit, or of real clips."""

    name: str
    things: int | None
    """Only prompts with this many things; None: all prompts."""
    num_videos: int
    scores: dict[str, Interval]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Scores of one kind minus those of another for the same prompts and seeds."""

    name: str
    other: str
    scores: dict[str, Interval]


@dataclass(frozen=True, kw_only=True)
class DriftRow:
    """Long videos of one kind of unit: their ends, and what changes per minute."""

    name: str
    num_videos: int
    first: dict[str, Interval]
    """Scores of the first window."""
    last: dict[str, Interval]
    """Scores of the last window."""
    change: dict[str, Interval]
    """Last minus first, in pairs."""
    slopes: dict[str, Interval]
    """Change per minute of the properties of `metrics.drift_slopes`."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result: tables, and every video behind them."""

    parts: Json
    """By kind of unit: the settings, and each video's prompt, scores and what the judge saw."""
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    drifts: tuple[DriftRow, ...]

    def to_json(self) -> Json:
        """Return plain JSON values."""
        return json.loads(json.dumps(asdict(self)))

    def to_markdown(self) -> str:
        """Return the tables of the README."""
        everything = [row for row in self.rows if row.things is None]
        parts = [row for row in self.rows if row.things is not None]
        tables = [
            "Share of attributes that are right, in %, with 95 % intervals over prompts:",
            _table(ATTRIBUTES, [(r.name, r.num_videos, r.scores) for r in everything]),
            "In % of the judge's ceiling, which is its score on real clips through the codec / on "
            "clean ones:",
            self._shares(everything),
            "By number of things:",
            _table(ATTRIBUTES, [(f"{r.name}, {r.things}", r.num_videos, r.scores) for r in parts]),
        ]
        if self.differences:
            paired = [(f"{d.name} - {d.other}", "", d.scores) for d in self.differences]
            tables += ["Differences for the same prompts and seeds, in points:"]
            tables += [_table(COMPARED, paired)]
        for drift in self.drifts:
            windows = {"first": drift.first, "last": drift.last, "last - first": drift.change}
            lines = [(f"{drift.name}, {w}", drift.num_videos, s) for w, s in windows.items()]
            slopes = [(drift.name, drift.num_videos, drift.slopes)]
            tables += [f"{drift.name}: first and last {WINDOW_SECONDS:g} s of long videos:"]
            tables += [_table(ATTRIBUTES, lines), "Change per minute, times 100:"]
            tables += [_table(tuple(drift.slopes), slopes)]
        return "\n\n".join(tables) + "\n"

    def _shares(self, rows: list[Row]) -> str:
        ceilings = [next(r for r in rows if r.name == name).scores for name in (CODEC, CLEAN)]
        lines = [f"| units | {' | '.join(COMPARED)} |", "|---" * (1 + len(COMPARED)) + "|"]
        for row in rows:
            cells = [
                " / ".join(_share(row.scores[name].mean, c[name].mean) for c in ceilings)
                for name in COMPARED
            ]
            lines.append(f"| {row.name} | {' | '.join(cells)} |")
        return "\n".join(lines)


def _share(value: float, ceiling: float) -> str:
    return f"{100 * value / ceiling:.1f}" if ceiling else "none"


def _table(columns: Sequence[str], rows: list[tuple[str, int | str, dict[str, Interval]]]) -> str:
    lines = [f"| units | videos | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for name, count, scores in rows:
        values = [[100 * v for v in (s.mean, s.low, s.high)] for s in map(scores.get, columns)]
        cells = [f"{mean:.1f} [{low:.1f}, {high:.1f}]" for mean, low, high in values]
        lines.append(f"| {name} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


class Store:
    """Finished parts in a JSON file that is complete at any moment; without a path, in memory."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.parts = path, {}
        if path is not None and path.exists():
            try:
                self.parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} holds no evaluation: name another file.") from error
        if path is not None:
            self.save({"parts": self.parts})  # fails now if it must fail

    def has(self, name: str, settings: Json) -> bool:
        """Tell whether a part is finished; raise if it was made with other settings."""
        if name not in self.parts:
            return False
        old = self.parts[name]["settings"]
        for key in settings:
            if settings[key] != old.get(key):
                raise ValueError(
                    f"{self.path} holds {name} with {key} = {old.get(key)}, but {settings[key]} is "
                    "asked for: keep the old value, or name another file."
                )
        return True

    def put(self, name: str, settings: Json, videos: list[Json]) -> None:
        """Add a finished part."""
        self.parts[name] = {"settings": settings, "videos": videos}
        self.save({"parts": self.parts})

    def save(self, value: Json) -> None:
        """Replace the file as a whole."""
        if self.path is not None:
            partial = self.path.with_name(f".{self.path.name}.partial")
            partial.write_text(json.dumps(value) + "\n", encoding="utf-8")
            os.replace(partial, self.path)


class Progress:
    """Says now and then how far the evaluation is."""

    def __init__(self, report: Callable[[str], None], *, total: int) -> None:
        self.report, self.total, self.done = report, total, 0
        self.started = self.shown = time.perf_counter()

    def add(self, name: str, frames: int) -> None:
        """Count judged or generated frames."""
        self.done += frames
        now = time.perf_counter()
        if now - self.shown < REPORT_SECONDS:
            return
        self.shown, rate = now, self.done / (now - self.started)
        left = timedelta(seconds=round((self.total - self.done) / rate))
        share = self.done / self.total
        self.report(f"{name}: {share:.0%} of all frames, {rate:,.0f} frames/s, {left} left")


def held_out_prompts(count: int, *, seed: int) -> list[Prompt]:
    """Return scenes that no training has seen, with a caption each."""
    scenes = [scene_of(FIRST_SCENE + i, seed=seed) for i in range(count)]
    return [
        Prompt(scene=scene, text=world.caption(scene, rng), seed=seed + i)
        for i, (scene, rng) in enumerate(scenes)
    ]
