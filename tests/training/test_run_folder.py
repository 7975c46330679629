"""A run and its folder: it is made of what it was begun with, and one process at a time trains."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from distributed import config, prepare
from safetensors.torch import load_file, save_file

from videoar.checks import Note
from videoar.data.latents import INDEX_NAME
from videoar.training.loop import TrainConfig, export, train
from videoar.training.optimizer import OptimizerConfig
from videoar.training.run_folder import LOCK, SOURCES, check_sources, claim
from videoar.training.text_to_video import TextToVideoConfig


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A teacher, a student, and latents."""
    return prepare(tmp_path)


def _finetune(root: Path) -> TrainConfig:
    task = TextToVideoConfig(
        latents=root / "latents", units=("frame",), init=root / "student", codec=root / "short"
    )
    run = config(root, root / "run", accumulate=1, steps=1, save_every=1)
    rate = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, decay_fraction=0)
    return replace(run, task=task, optimizer=rate)


def _distil(root: Path) -> TrainConfig:
    return config(root, root / "run", steps=1, accumulate=1, save_every=1)


def _edit_a_caption(root: Path) -> None:
    index = root / "latents" / INDEX_NAME
    index.write_text(index.read_text().replace("a ball 3", "a cube 3"))


def _remove_a_clip(root: Path) -> None:
    index = root / "latents" / INDEX_NAME
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:-1]))


def _move_weights(name: str, part: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        file = root / name / part / "model.safetensors"
        save_file({key: 1.01 * tensor for key, tensor in load_file(file).items()}, file)

    return change


CHANGES = {
    "captions": (_finetune, _edit_a_caption, r"with 24 clips .* in .*latents, .* 24 clips"),
    "clips": (_finetune, _remove_a_clip, r"with 24 clips .* in .*latents, .* 23 clips"),
    "init": (_finetune, _move_weights("student", "transformer"), "in .*student, but"),
    "codec": (_finetune, _move_weights("short", "text"), "in .*short, but"),
    "prompts": (_distil, _edit_a_caption, r"with 24 clips .* in .*latents, .* 24 clips"),
    "teacher": (_distil, _move_weights("teacher", "transformer"), "in .*teacher, but"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_does_not_go_on_with_other_data(root: Path, name: str) -> None:
    """Both are named; put back, the run goes on. Else its losses would be of two data sets."""
    recipe, change, message = CHANGES[name]
    run = recipe(root)
    train(run)
    files = {file: file.read_bytes() for file in root.glob("[!r]*/**/*") if file.is_file()}
    change(root)
    for go_on in (train, export):
        with pytest.raises(ValueError, match=message):
            go_on(replace(run, steps=2))
    for file, content in files.items():
        file.write_bytes(content)
    train(replace(run, steps=2))


def test_a_run_that_never_began_may_be_made_of_something_else(tmp_path: Path) -> None:
    """Who mends the data before the first step need not name another folder."""
    for sources in ({"latents": "1 clip"}, {"latents": "2 clips"}):
        check_sources(tmp_path, sources)
    (tmp_path / "log.jsonl").touch()
    assert json.loads((tmp_path / SOURCES).read_text()) == {"latents": "2 clips"}
    with pytest.raises(ValueError, match="begun with 2 clips in latents, but there is None now"):
        check_sources(tmp_path, {})


def test_one_process_at_a_time_trains_in_a_folder(root: Path) -> None:
    """Two would write over each other's checkpoints; a result may be looked at meanwhile."""
    run = _finetune(root)
    train(run)
    described = json.loads((run.out / "run.json").read_text())
    with claim(run.out, described):
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on .*: wait for it"):
            train(replace(run, steps=2))
        export(run)
    train(replace(run, steps=2))


def test_a_run_of_an_older_version_goes_on(root: Path) -> None:
    """It was refused for an option that did not exist when it began; what it takes is said once."""
    run = _finetune(root)
    train(run)
    held = json.loads((run.out / "run.json").read_text())
    del held["task"]["lora_rank"], held["task"]["flow"]["short_probability"]
    (run.out / "run.json").write_text(json.dumps(held))
    said = r"goes on with task.flow.short_probability = 0.0, task.lora_rank = None"
    with pytest.warns(Note, match=said):
        train(replace(run, steps=2))
    train(replace(run, steps=3))
    assert (run.out / "checkpoints" / "step-3").is_dir()


def test_what_is_wrong_with_the_data_is_said_first(root: Path) -> None:
    """Neither a run in the way nor weights that take long to load hide it."""
    run = _finetune(root)
    train(run)
    many = replace(run, batch_size=64, task=replace(run.task, init=root / "none"))
    with pytest.raises(ValueError, match="one batch takes 64: add samples or lower batch_size"):
        train(many)
    nowhere = replace(run, steps=2, task=replace(run.task, latents=root / "none"))
    with pytest.raises(ValueError, match=r"there is no folder .*none with latents\.json"):
        train(nowhere)


HOLD = """
import sys, time
from pathlib import Path
from videoar.training.run_folder import claim
with claim(Path(sys.argv[1]), {}):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_holds_no_folder(tmp_path: Path) -> None:
    """Also if it could not clean up, and whoever has its number now."""
    words = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"in use by process {other.pid} on"):
            claim(tmp_path / "run", {}).__enter__()
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert str(other.pid) in (tmp_path / "run" / LOCK).read_text()
    with claim(tmp_path / "run", {}):
        pass


def test_a_lock_of_another_machine_is_not_taken_over(tmp_path: Path) -> None:
    """Whether its process lives cannot be seen from here; the sentence says how to go on."""
    (tmp_path / LOCK).write_text("process 7 on elsewhere")
    with (
        pytest.raises(ValueError, match=r"process 7 on elsewhere: .* if it runs no more, remove"),
        claim(tmp_path, {}),
    ):
        pass
    (tmp_path / LOCK).unlink()
    with claim(tmp_path, {}):
        pass
