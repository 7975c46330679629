"""No input ends in a traceback: hundreds of odd ones, the same each time."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from videoar.checks import Count, Share, checked, typed
from videoar.training.loop import TrainConfig
from videoar.training.optimizer import OptimizerConfig

HERE = Path(__file__).parents[1]


def test_odd_inputs_get_a_result_or_a_sentence() -> None:
    """Commands end with 0 or 2, functions raise what they document, and all name the remedy."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
    command = [sys.executable, str(HERE / "fuzz.py"), "0", "520"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "0 of 5" in done.stdout


def test_what_means_the_same_is_taken() -> None:
    """A text for a path, numbers of NumPy, whole floats, lists of JSON; types are Python's."""
    given = {"out": "runs/x", "steps": np.int64(3), "batch_size": 2.0, "ema_decay": np.float32(0.5)}
    found = typed(TrainConfig, given)
    assert found == {"out": Path("runs/x"), "steps": 3, "ema_decay": 0.5, "batch_size": 2}
    assert {type(found[name]) for name in ("steps", "batch_size")} == {int}
    assert typed(OptimizerConfig, {"betas": [0, np.float64(0.9)]}) == {"betas": (0.0, 0.9)}


@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [
        ("steps", "10", "int"),
        ("steps", True, "int"),
        ("steps", 2.5, "int"),
        ("steps", math.nan, "int"),
        ("seed", None, "int"),
        ("ema_decay", 10**400, "float"),
        ("num_threads", "x", "int | None"),
        ("precision", "half", "Literal['float32', 'bfloat16']"),
        ("out", 3, "Path"),
    ],
)
def test_what_means_nothing_is_named(name: str, value: object, needed: str) -> None:
    """The sentence has field, value and type."""
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value!r:.80}: use {needed}")):
        typed(TrainConfig, {name: value})


def test_limits_are_said_in_annotations() -> None:
    """Beside the type, also where there may be nothing; the sentence says what is right."""

    def draw(count: Count | None = None, share: Share = 0.5) -> None: ...

    assert typed(draw, {"count": None, "share": 1}) == {"count": None, "share": 1.0}
    for name, value, needed in (
        ("count", 0, "1 or more"),
        ("count", "a", "int | None"),
        ("share", math.nan, "a share from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{name} is {value!r}: use {needed}.")):
            typed(draw, {name: value})


def test_arguments_are_checked_where_users_call() -> None:
    """Also by position; the function is called with what it can use."""

    @checked
    def repeat(text: str, count: int = 2) -> str:
        return text * count

    assert repeat("a", np.int64(3)) == "aaa"
    assert repeat(text="a") == "aa"
    with pytest.raises(ValueError, match="count is 'x': use int"):
        repeat("a", count="x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no keyword 'times'"):
        repeat("a", times=3)  # type: ignore[call-arg]
