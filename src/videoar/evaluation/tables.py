"""Tables for people, and the statistics in them: means over prompts, with 95 % intervals."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from videoar.evaluation.lengths import WINDOW_SECONDS
from videoar.evaluation.metrics import (
    Interval,
    bootstrap_interval,
    frechet_interval,
    kid,
    motion_distance,
)
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
ASIDE = {"size", "background", "count"}  # scores that only the whole table shows

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


def columns_of(scores: Iterable[str]) -> dict[str, str]:
    """Return the scores that matter most, and the columns that show them."""
    named = {"color": "colour", "all": "all right"}
    return {name: named.get(name, name) for name in scores if name not in ASIDE}


def headline(rows: Rows) -> Rows:
    """Return few columns, made for a README."""
    shown = columns_of(name for name in rows[0] if name not in ("units", "videos"))
    return [
        {"units": row["units"]} | {column: row[key] for key, column in shown.items()}
        for row in rows
    ]


def unit_tables(found: Json, *, units: Sequence[str]) -> dict[str, Rows]:
    """Return the tables of kinds of unit, by title."""
    tables: dict[str, Rows] = defaultdict(list)

    def add(title: str, name: str, scores: dict[str, Interval]) -> None:
        tables[title].append({"units": name, "videos": len(found[name]["videos"])} | scores)

    scores = {name: by_prompt([found[name]]) for name in (CLEAN, CODEC, *units)}
    right = {name: intervals(own) for name, own in scores.items()}
    compared = {name: name for name in columns_of(right[CLEAN])}
    for name in right:
        add("Right, in %, with 95 % intervals over prompts", name, right[name])
    for ceiling, name in itertools.product((CODEC, CLEAN), units):
        best = {key: right[ceiling][key].mean for key in compared}
        # It is taken as exact; a judge who is always wrong has none.
        shares = {key: right[name][key].times(1 / best[key]) for key in compared if best[key]}
        add(f"In % of the score of {ceiling}", name, shares)
    for name in (CODEC, *units):
        if beside := looks([found[name]], found[CLEAN]):
            tables["How it looks and moves beside real clips"].append({"units": name} | beside)
    for name in units[1:]:
        change = difference(scores[name], scores[units[0]], compared)
        add(f"Minus {units[0]} with the same prompts and seeds, in points", name, change)
    for name in (f"{name}{LONG}" for name in units if f"{name}{LONG}" in found):
        first, last, slopes = (by_prompt([found[name]], key) for key in ("first", "last", "slopes"))
        add(f"The first {WINDOW_SECONDS:g} s of the long videos", name, intervals(first))
        add(f"The last {WINDOW_SECONDS:g} s of the long videos", name, intervals(last))
        per_minute = {key: 60 * value for key, value in slopes.items()}
        add("Change per minute, times 100", name, intervals(per_minute))
        change = difference(last, first, compared)
        add("Last minus first window of the same video, in points", name, change)
    return tables


def looks(samples: Sequence[Json], real: Json) -> dict[str, str]:
    """Return how far frames and motion are from those of real clips, if they were measured."""
    made, others = [video for sample in samples for video in sample["videos"]], real["videos"]
    rows = dict[str, str]()
    if all("pictures" in videos[0] for videos in (made, others)):
        frames = np.array([video["pictures"] for video in made])
        frames = np.concatenate(np.split(frames, len(made) // len(others)), axis=1)
        distance = kid(frames, np.array([video["pictures"] for video in others]))
        rows["KID, EfficientNet-lite0"] = f"{distance:.3f}"
    if all("motion" in videos[0] for videos in (made, others)):
        moved, moves = ([video["motion"] for video in videos] for videos in (made, others))
        rows["motion vectors, Fréchet"] = f"{motion_distance(moved, moves):.2f}"
        usual = np.mean([video["amount"] for video in moves])
        amount = bootstrap_interval([video["amount"] / usual for video in moved])
        rows["motion, % of real"] = f"{amount.times(100):.0f}"
    return rows


def _features(sample: Json) -> Float[np.ndarray, "videos features"]:
    return np.array([video["features"] for video in sample["videos"]])


def distance(samples: Sequence[Json], real: Json) -> str:
    """Return the Fréchet distance, the mean over samples: more videos would be nearer."""
    known = _features(real)
    found = [vars(frechet_interval(_features(sample), known)) for sample in samples]
    means = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
    return f"{Interval(**means):.2f}"


def diversity(samples: Sequence[Json]) -> str:
    """Return how far apart videos of one prompt with different noise are, in features."""
    seeds = samples[0]["settings"]["seeds"]
    if seeds < 2:
        return ""
    apart: list[float] = []
    for described in map(_features, samples):
        first, second = described.reshape(seeds, -1, described.shape[1])[:2]
        apart += np.linalg.norm(first - second, axis=1).tolist()
    return f"{bootstrap_interval(apart):.2f}"


def spread(values: Sequence[float]) -> str:
    """Return the median and the range."""
    three = np.median(values), min(values), max(values)
    return "{} [{}, {}]".format(*(f"{x:.0f}" if x >= 100 else f"{x:.3g}" for x in three))
