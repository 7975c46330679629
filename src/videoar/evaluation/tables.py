"""Tables for people, and the statistics in them: means over prompts, with 95 % intervals."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from videoar.evaluation.lengths import WINDOW_SECONDS
from videoar.evaluation.metrics import Interval, bootstrap_interval, frechet_interval
from videoar.files import Json


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return rows by column as cells, the names of the columns first."""
    return [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Write rows of cells, the first of them the head, as Markdown."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def columns(rows: Iterable[Sequence[str]]) -> str:
    """Lay rows of cells out in columns."""
    lines = list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (map(str.ljust, line, widths) for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


CLEAN, CODEC = "real clips", "real clips through the codec"
LONG = ", long"  # ends the names of long videos
HEADLINE = {"color": "colour", "shape": "shape", "motion": "motion", "all": "all right"}
COMPARED = {"color": "color", "shape": "shape", "motion": "motion"}
"""Scores, and the columns that show them."""

Scores = dict[str, Float[np.ndarray, " prompts"]]
Rows = list[dict[str, Any]]
"""Of a table, by column."""


def by_prompt(samples: Sequence[Json], key: str = "scores") -> Scores:
    """Return scores, each the mean over all videos of a prompt, in the order of the prompts.

    The videos of a sample differ in their noise, and the samples in who made them.
    """
    videos = [video for sample in samples for video in sample["videos"]]
    shape = -1, samples[0]["settings"]["num_prompts"]
    names = videos[0][key]
    return {name: np.reshape([v[key][name] for v in videos], shape).mean(0) for name in names}


def intervals(scores: Scores, names: Mapping[str, str] | None = None) -> dict[str, Interval]:
    """Return the means of scores over prompts, with intervals, by column."""
    names = names or {name: name for name in scores}
    return {column: bootstrap_interval(scores[name]) for name, column in names.items()}


def difference(first: Scores, second: Scores, names: Mapping[str, str]) -> dict[str, Interval]:
    """Return the means of differences between videos of the same prompts, with intervals."""
    # What makes a prompt easy for both cancels.
    return intervals({name: first[name] - second[name] for name in names}, names)


def headline(rows: Rows) -> Rows:
    """Return few columns, made for a README."""
    return [
        {"units": row["units"]} | {shown: row[key] for key, shown in HEADLINE.items()}
        for row in rows
    ]


def unit_tables(found: Json, *, units: Sequence[str]) -> dict[str, Rows]:
    """Return the tables of kinds of unit, by title."""
    tables: dict[str, Rows] = defaultdict(list)

    def add(title: str, name: str, scores: dict[str, Interval]) -> None:
        tables[title].append({"units": name, "videos": len(found[name]["videos"])} | scores)

    scores = {name: by_prompt([found[name]]) for name in (CLEAN, CODEC, *units)}
    right = {name: intervals(own) for name, own in scores.items()}
    for name in right:
        add("Right, in %, with 95 % intervals over prompts", name, right[name])
    for ceiling, name in itertools.product((CODEC, CLEAN), units):
        best = {key: right[ceiling][key].mean for key in COMPARED}
        # It is taken as exact; a judge who is always wrong has none.
        shares = {key: right[name][key].times(1 / best[key]) for key in COMPARED if best[key]}
        add(f"In % of the score of {ceiling}", name, shares)
    for name in units[1:]:
        change = difference(scores[name], scores[units[0]], COMPARED)
        add(f"Minus {units[0]} with the same prompts and seeds, in points", name, change)
    for name in (f"{name}{LONG}" for name in units if f"{name}{LONG}" in found):
        first, last, slopes = (by_prompt([found[name]], key) for key in ("first", "last", "slopes"))
        add(f"The first {WINDOW_SECONDS:g} s of the long videos", name, intervals(first))
        add(f"The last {WINDOW_SECONDS:g} s of the long videos", name, intervals(last))
        add("Change per minute, times 100", name, intervals(slopes))
        change = difference(last, first, COMPARED)
        add("Last minus first window of the same video, in points", name, change)
    return tables


def checkpoint_tables(found: Json, lines: Mapping[str, Sequence[str]]) -> list[Rows]:
    """Return the tables of lines that are one entry, or several that differ in who made them."""
    real = intervals(by_prompt([found[CLEAN]]), HEADLINE)
    extra = ("Frechet", "diversity", "steps", "passes/s")
    right: Rows = [{"videos of": CLEAN} | real | dict.fromkeys(extra, "")]
    minus, drift, first = [], [], {}
    for line, names in lines.items():
        own = [found[name] for name in names]
        scores, settings = by_prompt(own), own[0]["settings"]
        sigmas = settings["sigmas"]
        right.append({"videos of": line} | intervals(scores, HEADLINE))
        right[-1]["Frechet"] = _distance(own, _features(found[CLEAN]))
        right[-1]["diversity"] = _diversity(own)
        steps = settings["num_inference_steps"] if sigmas is None else len(sigmas) - 1
        right[-1] |= {"steps": steps, "passes/s": f"{own[0]['passes_per_second']:.1f}"}
        if first:
            minus.append({"minus the first": line} | difference(scores, first, HEADLINE))
        first = first or scores
        if long := [found[f"{name}{LONG}"] for name in names if f"{name}{LONG}" in found]:
            change = difference(by_prompt(long, "last"), by_prompt(long, "first"), HEADLINE)
            drift.append({f"last - first {WINDOW_SECONDS:g} s": line} | change)
    return [rows for rows in (right, minus, drift) if rows]


def _features(sample: Json) -> Float[np.ndarray, "videos features"]:
    return np.array([video["features"] for video in sample["videos"]])


def _distance(samples: Sequence[Json], real: Float[np.ndarray, "videos features"]) -> str:
    """Return the Fréchet distance, the mean over samples: more videos would be nearer."""
    found = [vars(frechet_interval(_features(sample), real)) for sample in samples]
    means = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
    return f"{Interval(**means):.2f}"


def _diversity(samples: Sequence[Json]) -> str:
    """Return how far apart videos of one prompt with different noise are, in features."""
    seeds = samples[0]["settings"]["seeds"]
    if seeds < 2:
        return ""
    apart: list[float] = []
    for described in map(_features, samples):
        first, second = described.reshape(seeds, -1, described.shape[1])[:2]
        apart += np.linalg.norm(first - second, axis=1).tolist()
    return f"{bootstrap_interval(apart):.2f}"
