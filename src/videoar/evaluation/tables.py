"""Tables for people, and files of the figures behind them."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from videoar.evaluation.metrics import Interval, bootstrap_interval
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


ATTRIBUTES = ("color", "shape", "motion", "size", "background", "count", "all")
"""`count` is right if nothing else is there: noise shows every colour. `all`: everything right."""
COMPARED = ATTRIBUTES[:3]
HEADLINE = {"color": "colour", "shape": "shape", "motion": "motion", "all": "all right"}


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


def row_of(table: str, name: str, scores: Sequence[Mapping[str, float]]) -> Row:
    """Return the means of scores, with intervals."""
    means = {key: bootstrap_interval([one[key] for one in scores]) for key in scores[0]}
    return Row(table=table, name=name, num_videos=len(scores), scores=means)


def difference(
    table: str, name: str, first: list[dict[str, float]], second: list[dict[str, float]]
) -> Row:
    """Return the means of differences between videos of the same prompts and seeds."""
    pairs = zip(first, second, strict=True)  # what makes a prompt easy for both cancels
    return row_of(table, name, [{key: a[key] - b[key] for key in COMPARED} for a, b in pairs])


def cell(values: Sequence[float] | Float[np.ndarray, " values"]) -> str:
    """Return a mean and its interval, in hundredths."""
    return f"{bootstrap_interval(values).times(100):.1f}"
