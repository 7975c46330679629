"""Videos that were killed, stopped, or ran out of disk: what was finished is there, and goes on."""

import functools
import os
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import Line, LineTask, line
from tiny import tiny_pipeline

from videoar.cli.main import main
from videoar.core.schemes import KINDS
from videoar.data import video
from videoar.data.video import read_video
from videoar.training.loop import TrainConfig
from videoar.training.run_folder import Report

PROMPT = "a red ball"
STORY = "0 a red ball\n\n1.5 a blue square\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny checkpoint."""
    return str(tiny_pipeline().save_pretrained(tmp_path_factory.mktemp("checkpoints") / "tiny"))


@dataclass(frozen=True)
class _Ended:
    code: int
    out: str
    error: str


def _forked(
    words: list[str],
    *,
    killed_after: float | None = None,
    before: Callable[[], None] = lambda: None,
) -> _Ended:
    """Run a command in a copy of this process, which needs no time to start."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which wait here
        files = [Path(folder) / name for name in ("out", "error")]
        child = os.fork()
        if child == 0:
            for number, file in enumerate(files, start=1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
            before()
            code = main(words)
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        if killed_after is not None:
            time.sleep(killed_after)
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return _Ended(code, *(file.read_text() if file.exists() else "" for file in files))


@pytest.mark.parametrize(
    ("seconds", "most"), [(3, 3), pytest.param(20, 20, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_generation_is_that_of_one_never_killed(
    checkpoint: str, tmp_path: Path, kind: str, seconds: int, most: int
) -> None:
    """Killed at random moments, again and again, in a story with two prompts: the same file.

    At every moment the file under the hidden name plays, once it has a fragment.
    """
    whole, file, state = (tmp_path / name for name in ("whole.mp4", "a.mp4", "state"))
    words = ["--units", kind, "--model", checkpoint, "--seconds", str(seconds)]
    (tmp_path / "story.txt").write_text(STORY)
    begin = ["generate", "--script", str(tmp_path / "story.txt"), "--recompute", *words]
    assert _forked([*begin, "--out", str(whole)]).code == 0
    expected = read_video(whole).frames
    moments, kills = random.Random(kind), 0
    first = [*begin, "--out", str(file), "--save-state", str(state), "--force"]
    while kills < most and not file.exists():
        words = ["generate", "--resume", str(state)] if state.exists() else first
        ended = _forked(words, killed_after=moments.uniform(0.02, 0.2))
        assert ended.code in (0, -signal.SIGKILL), ended.error
        kills += ended.code != 0
        hidden = file.with_name(".a.mp4.partial.mp4")
        if hidden.exists() and hidden.stat().st_size:
            seen = read_video(hidden).frames
            assert np.array_equal(seen, expected[: len(seen)])
    assert kills
    if state.exists():
        ended = _forked(["generate", "--resume", str(state)])
        assert ended.code == 0, ended.error
    elif not file.exists():
        assert _forked(first).code == 0
    assert file.read_bytes() == whole.read_bytes()
    assert len(read_video(file).frames) == 16 * seconds
    left = {path.name for path in tmp_path.iterdir()} - {".state.partial", "story.txt"}
    assert left == {"a.mp4", "whole.mp4"}


def _stopped_after_two_fragments() -> None:
    """Have this process send itself a signal at a moment that is known."""
    put = video.VideoWriter._put

    def then_stop(self, *args) -> None:
        put(self, *args)
        if self.num_frames >= 2 * video.GROUP:
            os.kill(os.getpid(), signal.SIGTERM)

    video.VideoWriter._put = then_stop


def test_sigterm_is_ctrl_c_and_can_be_gone_on_after(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has its name and plays; with a state the rest comes later, to the same bits.

    Only the exit code tells them apart: 128 and the number of the signal.
    """
    monkeypatch.chdir(tmp_path)
    begin = ["generate", PROMPT, "--model", checkpoint, "--seconds", "6", "--units", "chunk:2"]
    assert _forked([*begin, "--out", "whole.mp4"]).code == 0
    words = [*begin, "--out", "a.mp4", "--save-state", "state"]
    done = _forked(words, before=_stopped_after_two_fragments)
    assert (done.code, "stopped; " in done.error, "Traceback" in done.error) == (143, True, False)
    assert 64 <= len(read_video("a.mp4").frames) < 96
    again = _forked(words)
    assert (again.code, "exists already" in again.error) == (2, True)
    rest = _forked(["generate", "--resume", "state"])
    assert (rest.code, "a.mp4: 96 frames, 6.0 s" in rest.out) == (0, True), rest
    assert Path("a.mp4").read_bytes() == Path("whole.mp4").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "whole.mp4"]


@dataclass(frozen=True, kw_only=True)
class HeavyTask(LineTask):
    """A line whose checkpoints are large."""

    def build(self, config: TrainConfig, report: Report) -> Line:
        """Build the task."""
        task = Line(self, config)
        task.module.register_buffer("ballast", torch.zeros(20_000))
        return task


def heavy() -> TrainConfig:
    """A recipe outside of the package."""
    return replace(line(), task=HeavyTask())


GENERATE = ["generate", PROMPT, "--out", "x.mp4", "--seconds", "99", "--units", "chunk:2"]
TRAIN = ["train", "test_nothing_lost:heavy", "--out", "run", "--steps", "2", "--save-every", "1"]


@pytest.mark.parametrize(
    ("words", "limit", "part"),
    [
        (GENERATE, 30_000, "File too large: x.mp4 holds the first"),
        (GENERATE, 500, "File too large: nothing is written"),
        ([*GENERATE, "--save-state", "state"], 20_000, "state"),
        (TRAIN, 40_000, "cannot be written"),
    ],
)
def test_a_full_disk_is_one_sentence(
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    limit: int,
    part: str,
) -> None:
    """Exit code 2, no traceback, no hidden file that keeps the disk full; what there is plays.

    The limit is a real one, on the size of files. FFmpeg died of it.
    """
    monkeypatch.chdir(tmp_path)
    extra = ["--model", checkpoint] if words[0] == "generate" else []
    full = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    done = _forked([*words, *extra], before=full)
    assert done.code == 2, done.error
    said = [line for line in done.error.splitlines() if not line.endswith(" s left")]
    assert len(said) == 1
    assert said[0].startswith("videoar: error: ")
    assert part in said[0]
    assert list(tmp_path.rglob("*partial*")) == []
    if Path("x.mp4").exists():
        assert len(read_video("x.mp4").frames) > 0
