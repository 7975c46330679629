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
from videoar.metrics import Interval, bootstrap_interval, drift_slopes, paired_interval
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
HEADLINE = {"color": "colour", "shape": "shape", "motion": "motion", "all": "all right"}
"""Columns of the first table, and their titles."""
CLEAN, CODEC = "real clips", "real clips through the codec"
WINDOW_SECONDS = 4.0
"""Long videos are judged in their first and last window of this length."""
LONG = ", long"
"""Ends the names of parts with long videos."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to evaluate; `videoar evaluate --help` explains the fields."""

    checkpoint: str = "toy"
    units: tuple[str, ...] = ("frame", "chunk:2", "key-detail:4", "multiscale:4,2,1", "cube:1x2x2")
    num_prompts: int = 200
    seconds: float = 3.0
    long_prompts: int = 0
    long_seconds: float = 60.0
    seed: int = 0
    """Of the scenes; video i has the seed `seed + i`."""
    batch_size: int = 16
    num_inference_steps: int | None = None
    shift: float | None = None
    guidance_scale: float | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.units or len(set(self.units)) < len(self.units):
            raise ValueError(f"units are {self.units}: name at least one kind, none of them twice.")
        for name in self.units:
            parse(name)
        for name, right, remedy in (
            ("num_prompts", self.num_prompts >= 2, "2 or more, as an interval needs"),
            ("long_prompts", self.long_prompts == 0 or self.long_prompts >= 2, "0, or 2 or more"),
            ("seconds", 2 <= self.seconds <= WINDOW_SECONDS, "2 to 4, as the judge needs"),
            ("long_seconds", 2 * WINDOW_SECONDS <= self.long_seconds < math.inf, "8 or more"),
            ("seed", self.seed >= 0, "0 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
        ):
            if not right:
                raise ValueError(f"{name} is {getattr(self, name)}: use {remedy}.")


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
        """Return the table for a README, then all tables in full; in hundredths."""
        tables = [list(g) for _, g in itertools.groupby(self.rows, key=lambda row: row.table)]
        text = [_markdown(["units", *HEADLINE.values()], tables[0], list(HEADLINE))]
        for rows in tables:
            text += [f"{rows[0].table}:"]
            text += [_markdown(["units", "videos", *rows[0].scores], rows, list(rows[0].scores))]
        return "\n\n".join(text) + "\n"


def _markdown(titles: list[str], rows: list[Row], columns: list[str]) -> str:
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        found = [row.scores[key] for key in columns]
        cells = [f"{100 * s.mean:.1f} [{100 * s.low:.1f}, {100 * s.high:.1f}]" for s in found]
        videos = [str(row.num_videos)] if "videos" in titles else []
        lines.append([row.name, *videos, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run(config: EvaluateConfig, report: Callable[[str], None]) -> Report:
    """Evaluate a checkpoint; what `config.out` holds already is kept, not computed again.

    Args:
        config: what to evaluate.
        report: receives a line of progress for each batch, and the means of each finished kind.

    Raises:
        ValueError: the checkpoint, or the file `config.out`, does not fit.
    """
    folder, parts = resolve(config.checkpoint), load_parts(config.out)
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
        if name in parts:
            check_settings(name, parts[name]["settings"], settings, file=config.out)
        else:
            jobs[name] = settings
    total = sum(math.prod(lengths[name]) for name in jobs)
    done, started = 0, time.perf_counter()
    for name, settings in jobs.items():
        (count, frames), videos = lengths[name], []
        for batch in itertools.batched(held_out_prompts(count, seed=config.seed), config.batch_size):
            judge = judge_ends if name in long else judge_whole
            videos += judge(make(pipe, name, batch, num_frames=frames), batch, fps=fps)
            done += len(batch) * frames
            left = (time.perf_counter() - started) * (total / done - 1)
            report(f"{name}: {done / total:.0%} of all, {timedelta(seconds=round(left))} left")
        parts[name] = {"settings": settings, "videos": videos}
        save(config.out, {"parts": parts})
    result = Report(
        parts={name: parts[name] for name in (*short, *long) if name in parts},
        rows=tuple(tabulate(parts, units=config.units)),
    )
    save(config.out, result.to_json() | {"parts": parts})
    return result
