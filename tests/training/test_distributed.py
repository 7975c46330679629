"""Many processes compute what one does, and lose nothing when one of them dies."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed import config, prepare
from safetensors.torch import load_file
from test_reconstruction import QUICK, SHAPE, write

from videoar.training.loop import train
from videoar.training.run_folder import checkpoints, read_log

HERE = Path(__file__).parents[1]
pytestmark = pytest.mark.xdist_group("distributed")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that reads everything, a student, and latents."""
    return prepare(tmp_path_factory.mktemp("distributed"))


def _torchrun(root: Path, out: Path, *, ranks: int, steps: int = 6, victim: str = ""):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", str(HERE / "distributed.py"), str(root), str(out)]
    command += [str(steps), *([victim] if victim else [])]
    path = os.pathsep.join(filter(None, [str(HERE), *sys.path]))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


def _losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_log(out) if "loss" in row]


@pytest.fixture(scope="module")
def alone(root: Path) -> Path:
    """The run of one process."""
    train(config(root, root / "alone"))
    return root / "alone"


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_compute_what_one_process_does(root: Path, alone: Path, ranks: int) -> None:
    """Losses of both groups and the weights at the end are equal up to rounding."""
    out = root / f"of-{ranks}"
    done = _torchrun(root, out, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert _losses(out) == pytest.approx(_losses(alone), rel=1e-4)
    ours, theirs = (
        load_file(run / "checkpoint" / "transformer" / "model.safetensors") for run in (out, alone)
    )
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_a_run_goes_on_with_another_number_of_ranks(root: Path, alone: Path) -> None:
    """Three ranks begin, two go on, and one process ends, as if it had been alone all the time."""
    out = root / "changing"
    assert _torchrun(root, out, ranks=3, steps=2).returncode == 0
    assert _torchrun(root, out, ranks=2, steps=4).returncode == 0
    train(config(root, out))
    assert _losses(out) == pytest.approx(_losses(alone), rel=1e-4)


def test_a_killed_rank_ends_the_run_and_leaves_its_checkpoint(root: Path, alone: Path) -> None:
    """The others say who is gone and how to go on; and going on gives the same."""
    out = root / "killed"
    done = _torchrun(root, out, ranks=2, victim="1")
    assert done.returncode != 0
    assert "rank 0 lost another rank of 2 after step 3" in done.stdout
    assert "goes on from step-2" in done.stdout
    assert [folder.name for folder in checkpoints(out)] == ["step-2"]
    assert _torchrun(root, out, ranks=2).returncode == 0
    assert _losses(out) == pytest.approx(_losses(alone), rel=1e-4)


def test_one_of_many_decodes_the_videos(tmp_path: Path) -> None:
    """The others wait until the clips are there; else all would write into one folder."""
    (tmp_path / "videos").mkdir()
    for k in range(3):
        write(tmp_path / "videos" / f"{k}.mkv", shade=50 * k)
    words = ["--data.path", str(tmp_path / "videos"), "--out", str(tmp_path / "run")]
    words += ["--accumulate", "2", "--optimizer.muon-learning-rate", "None", "--steps", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "videoar", "train", "codec", *words, *QUICK, *SHAPE]
    path = os.pathsep.join(sys.path)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("4 clips to train on, 2 held out") == 1
    assert (tmp_path / "run" / "checkpoint").is_dir()
