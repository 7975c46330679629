"""What a study may claim: paired differences with intervals, corrected for how many there are.

A mean over videos of a prompt is one observation, as they resemble each other. Where a side has
several checkpoints that differ in their seed of training, these are a level of their own.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float

from videoar.evaluation.metrics import RESAMPLES, Interval, student
from videoar.evaluation.tables import by_prompt
from videoar.files import Json

Side = Float[np.ndarray, "_ prompts"]
"""Scores of the trainings of one side, each the mean over the noise of a prompt."""
LEVEL, POWER = 0.05, 0.8


CHIEF = "all"
"""The score by which every pair is compared: everything is right."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean of differences between videos of the same prompts and noise."""

    change: Interval
    p: float
    """Probability of as large a difference by chance, two-sided."""
    error: float
    """Standard error."""
    freedom: float
    """Degrees of freedom of the error."""

    def least(self, tests: int) -> float:
        """Return the smallest true difference that would have been found in 8 of 10 such studies.

        Args:
            tests: how many comparisons share the level of 5 %.
        """
        found = student(1 - LEVEL / (2 * tests), self.freedom)
        return self.error * (found + student(POWER, self.freedom))


def difference(first: Side, second: Side) -> Difference:
    """Return the first side minus the second, with a 95 % bootstrap interval.

    Prompts are drawn anew for both sides together, and trainings for each side alone (Owen 2007,
    arXiv:0711.3014): what is due to either is in the interval. Few prompts or trainings would make
    it too narrow, so it is widened to Student's t with the freedom of Welch and Satterthwaite.
    """
    paired = first.mean(0) - second.mean(0)
    count, mean = len(paired), float(paired.mean())
    several = [side.mean(1) for side in (first, second) if len(side) > 1]
    parts = [each.var(ddof=1) / len(each) for each in (paired, *several)]
    sizes = [count - 1, *(len(each) - 1 for each in several)]
    error = math.sqrt(sum(parts))
    shares = sum((part / error**2) ** 2 / n for part, n in zip(parts, sizes, strict=True) if error)
    freedom = float(1 / shares) if shares else float(count - 1)
    rng = np.random.default_rng(0)

    def drawn(size: int) -> Float[np.ndarray, "resamples size"]:
        return rng.multinomial(size, np.full(size, 1 / size), RESAMPLES) / size

    prompts = drawn(count)
    one, two = ((drawn(len(side)) @ side * prompts).sum(1) for side in (first, second))
    draws = one - two - mean
    z, t = NormalDist().inv_cdf(1 - LEVEL / 2), student(1 - LEVEL / 2, freedom)
    wider = t / z * error / draws.std() if error > 1e-12 else 0.0
    low, high = mean + wider * np.quantile(draws, [LEVEL / 2, 1 - LEVEL / 2])
    return Difference(
        change=Interval(mean=mean, low=float(low), high=float(high)),
        p=_p_value(mean, error, freedom),
        error=error,
        freedom=freedom,
    )


def _p_value(mean: float, error: float, freedom: float) -> float:
    """Return the two-sided probability of Student's t, the inverse of `student`."""
    if error < 1e-12:
        return float(abs(mean) < 1e-12)
    told = math.sqrt(freedom * math.log1p((mean / error) ** 2 / freedom))
    return 2 * NormalDist().cdf(-told * (8 * freedom + 1) / (8 * freedom + 3))


def holm(values: list[float]) -> list[float]:
    """Correct probabilities for how many there are (Holm 1979), in the order given."""
    found, least = [0.0] * len(values), 0.0
    for rank, place in enumerate(np.argsort(values, kind="stable").tolist()):
        least = max(least, min(1.0, (len(values) - rank) * values[place]))
        found[place] = least
    return found


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a study found: the entries by name, and the lines, whose members they are."""

    entries: Json
    lines: dict[str, list[str]]

    def samples(self, line: str) -> list[Json]:
        return [self.entries[name] for name in self.lines.get(line, [line])]

    def sides(self, line: str, *keys: str) -> dict[str, Side]:
        """Return the values of a line: trainings x prompts, each the mean over noise."""
        each = [by_prompt([sample], *keys) for sample in self.samples(line)]
        return {name: np.stack([one[name] for one in each]) for name in each[0]}

    def minus(self, line: str, other: str, name: str, *keys: str) -> Difference:
        return difference(self.sides(line, *keys)[name], self.sides(other, *keys)[name])

    def cost(self, line: str, name: str) -> list[float]:
        return [run[name] for sample in self.samples(line) for run in sample["runs"]]
