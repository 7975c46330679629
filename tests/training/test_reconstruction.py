"""A codec of own videos, through the public command, on little clips that the tests write."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from videoar.checkpoints.checkpoint import Checkpoint
from videoar.cli.main import main
from videoar.data.video import VideoWriter
from videoar.encoders.codec import PatchCodec, PatchCodecConfig
from videoar.training.codec import Footage
from videoar.training.run_folder import read_log

Run = Callable[..., tuple[int, str, str]]
SHAPE = ("--task.codec.latent-channels", "4", "--task.codec.num-blocks", "1")
SHAPE += ("--task.codec.encoder-channels", "4", "4", "4")
SHAPE += ("--task.codec.decoder-channels", "4", "4", "4", "4")
QUICK = ("--size", "32x32", "--task.num-frames", "5", "--num-threads", "1", "--batch-size", "2")
QUICK += ("--optimizer.decay-fraction", "0", "--optimizer.warmup-steps", "0", "--log-every", "1")


def write(path: Path, *, shade: int, num_frames: int = 12, size: int = 32) -> Path:
    """Write a video without loss: on a ground of this shade a bright square moves."""
    frames = np.full((num_frames, size, size, 3), shade, np.uint8)
    for k, frame in enumerate(frames):
        frame[8:16, k : k + 8] = 255 - shade
    with VideoWriter(path, fps=16) as writer:
        writer.write(frames)
    return path


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Six videos of two clips each, and a file that is none."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for k in range(6):
        write(folder / f"{k}.mkv", shade=20 * k)
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str], videos: Path) -> Run:
    """Train a tiny codec on the videos: the exit code, and what was printed."""

    def run(out: Path, *words: object, shape: Sequence[str] = SHAPE):
        known = ["--data.path", str(videos), "--out", str(out), *QUICK, *shape]
        code = main(["train", "codec", *known, *map(str, words)])
        return code, *capsys.readouterr()

    return run


def footage(out: Path) -> Footage:
    """Return the clips of a run."""
    return Footage(out / "footage", PatchCodec(PatchCodecConfig(stride=(4, 8, 8))))


def losses(out: Path) -> list[float]:
    """Return the loss of every step."""
    return [row["loss"] for row in read_log(out) if "loss" in row]


def test_a_codec_of_own_videos_goes_on_to_the_bit(train: Run, videos: Path, tmp_path: Path) -> None:
    """What was decoded stays as it was: new videos, or none at all, change no run that began."""
    assert train(tmp_path / "whole", "--steps", 5)[0] == 0
    assert train(tmp_path / "parts", "--steps", 3)[0] == 0
    assert "has changed" not in train(tmp_path / "parts", "--steps", 3)[1]
    shutil.rmtree(videos)
    videos.mkdir()
    code, said, _ = train(tmp_path / "parts", "--steps", 5)
    assert code == 0
    assert "has changed; the clips in" in said
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    one, other = (
        load_file(tmp_path / name / "checkpoint" / "codec" / "model.safetensors")
        for name in ("whole", "parts")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_clips_that_changed_are_refused(train: Run, tmp_path: Path) -> None:
    """What was decoded for the run is what it is made of."""
    assert train(tmp_path / "run", "--steps", 1)[0] == 0
    index = tmp_path / "run" / "footage" / "index.jsonl"
    index.write_text("".join(index.read_text().splitlines(keepends=True)[1:]))
    code, _, error = train(tmp_path / "run", "--steps", 2)
    assert code == 2
    assert re.search(r"was begun with 8 clips \w+ in \S+footage, but there is 7 clips", error), (
        error
    )


def test_training_lowers_the_error_and_says_so(train: Run, tmp_path: Path) -> None:
    """Validation measures held-out clips, and leaves a picture of them."""
    out = tmp_path / "run"
    assert (
        train(out, "--steps", 40, "--sample-every", 20, "--optimizer.learning-rate", 0.01)[0] == 0
    )
    rows = [row for row in read_log(out) if "validation/psnr" in row]
    names = {"psnr", "psnr_edges", "psnr_moving", "ssim", "latent_std"}
    assert {f"validation/{name}" for name in names} <= rows[0].keys()
    assert losses(out)[-1] < 0.7 * losses(out)[0]
    assert (out / "samples" / "step-20.png").stat().st_size > 100
    assert "not a video" in (out / "footage" / "rejected.jsonl").read_text()


def test_the_videos_that_prepare_holds_out_are_held_out(
    train: Run, videos: Path, tmp_path: Path
) -> None:
    """Whole videos, and the same ones: an evaluation sees nothing that the codec was trained on."""
    out, latents = tmp_path / "run", tmp_path / "latents"
    assert train(out, "--steps", 1, "--task.held-out", 0.3)[0] == 0
    words = [str(videos), str(latents), "--codec", str(out / "checkpoint"), "--captions", "none"]
    words += ["--sizes", "32x32", "--num-frames", "5", "--held-out", "0.3", "--workers", "1"]
    assert main(["prepare", *words]) == 0
    lines = (latents / "heldout" / "index.jsonl").read_text().splitlines()
    prepared = {int(json.loads(line)["extra"]["file"][0]) for line in lines}
    clips = footage(out)

    def shown(clips: Iterator[torch.Tensor]) -> set[int]:
        corners = ((torch.cat(list(clips))[:, :, 0, -1, -1] + 1) * 127.5).round().int()
        return set((corners // 20).flatten().tolist())

    assert len(clips) == 8
    assert shown(clips.held_out(100)) == prepared
    assert shown(clips.some(100)) == set(range(6)) - prepared


def test_another_codec_is_trained_on_as_a_whole(train: Run, tmp_path: Path) -> None:
    """From a checkpoint both halves move on, and latents are normalised anew in the end."""
    first, second = tmp_path / "first", tmp_path / "second"
    fast = ("--optimizer.learning-rate", 0.01)
    assert train(first, "--steps", 40, *fast)[0] == 0
    assert train(second, "--steps", 5, "--task.init", first / "checkpoint", *fast)[0] == 0
    assert losses(second)[0] < 0.8 * losses(first)[0]
    before, after = (Checkpoint.find(out / "checkpoint").codec() for out in (first, second))
    for half in ("encoder", "decoder"):
        old, new = (list(getattr(codec, half).parameters()) for codec in (before, after))
        assert not any(map(torch.equal, old, new))
    latents = after.encode(torch.cat(list(footage(second).some(100))))
    assert latents.mean((0, 1, 3, 4)).abs().max() < 1e-3
    assert (latents.std((0, 1, 3, 4)) - 1).abs().max() < 1e-2


def test_no_more_is_kept_than_allowed(train: Run, videos: Path, tmp_path: Path) -> None:
    """Every video keeps a clip at least, a long one keeps some from everywhere in it."""
    write(videos / "long.mkv", shade=120, num_frames=120)
    clip = 2 * 5 * 32 * 32 * 3
    words = ("--steps", 1, "--task.max-gigabytes", 16.5 * clip / 1e9)
    assert train(tmp_path / "run", *words)[0] == 0
    clips = footage(tmp_path / "run")
    assert 7 < len(clips) + len(clips.apart) <= 16
    starts = [line["extra"]["start"] for part in (clips.known, clips.apart) for line in part.clips]
    assert max(starts) > 5


WRONG = {
    "nowhere": (["--data.path", "nowhere"], "there is no folder nowhere: name the folder"),
    "size": (["--size", "40x32"], "a size is 40x32: use multiples of 16 and 16"),
    "no size": (["--size", "huge"], "huge.*use widths and heights"),
    "length": (["--task.num-frames", "6"], "num_frames is 6: use 5 or 9"),
    "too long": (
        ["--task.num-frames", "13"],
        "none of 7 files gives a clip: .*rejected.jsonl says why",
    ),
    "all": (["--task.held-out", "0"], "held_out is 0.*: use a share above 0"),
    "batch": (["--batch-size", "50"], "one batch takes 50: add samples or lower --batch-size"),
    "room": (["--task.max-gigabytes", "1e-6"], "max_gigabytes is 1e-06, .* 7 videos .* raise it"),
    "channels": (["--task.init", "toy-base"], "toy-base has a codec .* name another checkpoint"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused_in_a_sentence(train: Run, tmp_path: Path, name: str) -> None:
    """With the remedy; and the same command without the mistake finds nothing in its way."""
    words, message = WRONG[name]
    code, _, error = train(tmp_path / "run", "--steps", 1, *words)
    assert code == 2
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error
    if name in ("size", "too long"):
        assert train(tmp_path / "run", "--steps", 1)[0] == 0


@pytest.mark.parametrize(("num_frames", "count"), [(1, 4), (12, 1)], ids=["pictures", "one video"])
def test_too_few_videos_are_refused(
    train: Run, videos: Path, tmp_path: Path, num_frames: int, count: int
) -> None:
    """Of one video none can be held out; a single frame is no clip. More videos are the remedy."""
    shutil.rmtree(videos)
    videos.mkdir()
    for k in range(count):
        write(videos / f"{k}.mkv", shade=20 * k, num_frames=num_frames)
    code, _, error = train(tmp_path / "run", "--steps", 1)
    assert code == 2
    assert ("add videos" if count == 1 else "rejected.jsonl says why") in error
    assert len(error.splitlines()) == 1
    for k in range(5, 8):
        write(videos / f"{k}.mkv", shade=20 * k)
    assert train(tmp_path / "run", "--steps", 1)[0] == 0


def test_a_folder_of_something_else_is_left_alone(train: Run, tmp_path: Path) -> None:
    """Somebody's own folder of the name that a run gives to pixels is not a run."""
    (tmp_path / "mine" / "footage").mkdir(parents=True)
    (tmp_path / "mine" / "footage" / "holiday.txt").write_text("mine")
    code, _, error = train(tmp_path / "mine", "--steps", 1)
    assert code == 2
    assert "is not the folder of a run" in error
    assert (tmp_path / "mine" / "footage" / "holiday.txt").read_text() == "mine"
