"""What is held against what is asked for."""

from dataclasses import dataclass, field

import pytest

from videoar.checks import Note, check_same
from videoar.files import Json, to_json


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part, of which there are several."""

    steps: int
    draws: int = 1


@dataclass(frozen=True, kw_only=True)
class Run:
    """What was asked for."""

    steps: int = 4
    rank: int | None = None
    part: Stage = field(default_factory=lambda: Stage(steps=2))
    stages: tuple[Stage, ...] = ()


HELD = "it holds a run"


def _check(held: Json, run: Run, **how: set[str]) -> None:
    check_same(held, to_json(run), held=HELD, other="folder", options=run, **how)


def test_what_an_older_version_did_not_know_was_at_its_default() -> None:
    """An update would end every run that is not finished; what is taken is said."""
    run = Run(stages=(Stage(steps=1), Stage(steps=2, draws=3)))
    held = to_json(run)
    del held["rank"], held["part"], held["stages"][0]["draws"]
    said = "part.class = Stage, part.draws = 1,"
    said += " part.steps = 2, rank = None, stages.0.draws = 1"
    with pytest.warns(Note) as notes:
        _check(held, run)
    assert [str(note.message) for note in notes] == [
        f"{HELD} of an older version, which goes on with {said}"
    ]
    _check(to_json(run), run)  # says nothing
    with pytest.raises(ValueError, match="rank = None, but 8 is asked for: keep the old value"):
        _check(held, Run(stages=run.stages, rank=8))
    del held["stages"][1]["draws"]
    with pytest.raises(ValueError, match=r"stages\.1\.draws = 1, but 3 is asked for"):
        _check(held, run)


def test_what_may_differ_is_not_told() -> None:
    """Nobody has to know of a default that changes nothing."""
    held = to_json(Run())
    del held["rank"]
    _check(held, Run(rank=8), free={"rank"})


def test_what_differs_is_told_together() -> None:
    """One setting in the way hid the wrong name of the data."""
    with pytest.raises(ValueError, match="rank = None, but 8 is asked for, and steps = 4"):
        _check(to_json(Run()), Run(steps=5, rank=8))
