"""Tables for people, and the statistics in them: means over prompts, with 95 % intervals."""

import functools
import operator
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

from videoar.evaluation import metrics
from videoar.files import Json


def cells(rows: Sequence[Json]) -> list[list[str]]:
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
FEW = 5
"""Percent of the real clips, so near to a training clip that nearer ones are suspect."""
ASIDE = {"size", "background", "count"}  # scores that only the whole table shows

Scores = dict[str, Float[np.ndarray, " prompts"]]


def by_prompt(samples: Sequence[Json], *keys: str) -> Scores:
    """Return scores, each the mean over all videos of a prompt, in the order of the prompts.

    The videos of a sample differ in their noise, and the samples in who made them. What was not
    measured is no number.

    Args:
        samples: entries of one study.
        keys: where in a video they are, one below the other; `scores` by default.
    """
    videos = [video for sample in samples for video in sample["videos"]]
    rows = [functools.reduce(operator.getitem, keys or ("scores",), video) for video in videos]
    shape = -1, samples[0]["settings"]["num_prompts"]
    values = {name: np.array([row[name] for row in rows], float) for name in rows[0]}
    return {name: each.reshape(shape).mean(0) for name, each in values.items()}


def columns_of(scores: Iterable[str]) -> dict[str, str]:
    """Return the scores that matter most, and the columns that show them."""
    named = {"color": "colour", "all": "all right"}
    return {name: named.get(name, name) for name in scores if name not in ASIDE}


def looks(samples: Sequence[Json], real: Json) -> dict[str, str]:
    """Return how far frames and motion are from those of real clips; frames if described."""
    made, others = [video for sample in samples for video in sample["videos"]], real["videos"]
    rows = dict[str, str]()
    if all("pictures" in videos[0] for videos in (made, others)):
        frames = np.array([video["pictures"] for video in made])
        frames = np.concatenate(np.split(frames, len(made) // len(others)), axis=1)
        distance = metrics.kid(frames, np.array([video["pictures"] for video in others]))
        rows["KID, EfficientNet-lite0"] = f"{distance:.3f}"
    moved, moves = ([video["motion"] for video in videos] for videos in (made, others))
    rows["motion vectors, Fréchet"] = f"{metrics.motion_distance(moved, moves):.2f}"
    usual = np.mean([video["amount"] for video in moves])
    amount = metrics.bootstrap_interval([video["amount"] / usual for video in moved])
    return rows | {"motion, % of real": f"{amount.times(100):.0f}"}


def _features(sample: Json) -> Float[np.ndarray, "videos features"]:
    return np.array([video["features"] for video in sample["videos"]])


def distance(samples: Sequence[Json], real: Json) -> str:
    """Return the Fréchet distance, the mean over samples: more videos would be nearer."""
    known = _features(real)
    found = [vars(metrics.frechet_interval(_features(sample), known)) for sample in samples]
    means = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
    return f"{metrics.Interval(**means):.2f}"


def nearest(samples: Sequence[Json], real: Json) -> dict[str, str]:
    """Return how far videos are from the nearest training clips, and the share of suspects."""
    sides = [video["nearest"]["distance"] for sample in samples for video in sample["videos"]]
    least = np.percentile([video["nearest"]["distance"] for video in real["videos"]], FEW)
    row = {"distance": f"{metrics.bootstrap_interval(sides):.2f}"}
    return row | {f"nearer than {100 - FEW} % of real clips": f"{np.mean(sides < least):.0%}"}


def diversity(samples: Sequence[Json]) -> str:
    """Return how far apart videos of one prompt with different noise are, in features."""
    seeds = samples[0]["settings"]["seeds"]
    if seeds < 2:
        return ""
    apart: list[float] = []
    for described in map(_features, samples):
        first, second = described.reshape(seeds, -1, described.shape[1])[:2]
        apart += np.linalg.norm(first - second, axis=1).tolist()
    return f"{metrics.bootstrap_interval(apart):.2f}"


def spread(values: Sequence[float]) -> str:
    """Return the median and the range."""
    three = np.median(values), min(values), max(values)
    return "{} [{}, {}]".format(*(f"{x:.0f}" if x >= 100 else f"{x:.3g}" for x in three))
