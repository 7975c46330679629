"""Evaluation on held-out clips: what the codec loses, and what the generator does not foresee."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import MODEL, tiny_pipeline, tiny_transformer

from videoar.cli.main import main
from videoar.data import world
from videoar.data.video import Video
from videoar.encoders.codec import PatchCodec, PatchCodecConfig

Run = Callable[..., tuple[int, str, str]]
UNITS = ("--units", "frame", "chunk:2", "cube:1x2x2")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Latents of six videos, two of them held out, under a lossy and a lossless codec."""
    folder = tmp_path_factory.mktemp("heldout")
    videos = folder / "videos"
    videos.mkdir()
    for number in range(6):
        scene = world.sample_scene(np.random.default_rng(number))
        Video(frames=world.render(scene, num_frames=20), fps=16.0).save(videos / f"{number}.mkv")
        (videos / f"{number}.txt").write_text("a red ball")
    lossy = tiny_pipeline()
    lossy.save_pretrained(folder / "lossy")
    exact = tiny_pipeline()
    exact.codec = PatchCodec(PatchCodecConfig(stride=(4, 8, 8))).eval()
    channels = exact.codec.latent_channels
    exact.transformer = tiny_transformer(replace(MODEL, latent_channels=channels))
    exact.save_pretrained(folder / "exact")
    for name in ("lossy", "exact"):
        words = [str(videos), str(folder / f"{name}-latents"), "--codec", str(folder / name)]
        options = ["--num-frames", "9", "--held-out", "0.34", "--workers", "1"]
        assert main(["prepare", *words, *options]) == 0
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `evaluate heldout`: its exit code, and what it printed."""

    def evaluate(*words: object) -> tuple[int, str, str]:
        code = main(["evaluate", "heldout", *map(str, words)])
        return code, *capsys.readouterr()

    return evaluate


def test_every_held_out_clip_is_measured(run: Run, prepared: dict[str, Path], tmp_path) -> None:
    """PSNR, SSIM and a loss per kind of unit for each clip; the table shows their means."""
    file = tmp_path / "report.json"
    words = (prepared["lossy"], "--data", prepared["lossy-latents"], *UNITS, "--out", file)
    code, out, error = run(*words)
    assert code == 0, error
    report = json.loads(file.read_text())
    index = (prepared["lossy-latents"] / "heldout" / "index.jsonl").read_text().splitlines()
    assert len(report["clips"]) == len(index) == 4  # two of each video
    assert len({clip["file"] for clip in report["clips"]}) == 2
    for clip in report["clips"]:
        assert clip["psnr"] < 30
        assert -1 <= clip["ssim"] < 1
        assert clip["losses"].keys() == set(UNITS[1:])
        assert all(0 < loss < 100 for loss in clip["losses"].values())
    means = {name: np.mean([c["losses"][name] for c in report["clips"]]) for name in UNITS[1:]}
    for name, mean in means.items():
        assert report["losses"][name]["mean"] == pytest.approx(mean)
        assert f"| {name} | {mean:.4g} [" in out
    change = report["differences"]["chunk:2"]
    assert change["mean"] == pytest.approx(means["chunk:2"] - means["frame"])
    assert change["low"] <= change["mean"] <= change["high"]
    assert run(*words)[0] == 2  # the report of an evaluation is not lost to a second one


def test_a_codec_without_loss_is_measured_as_such(
    run: Run, prepared: dict[str, Path], tmp_path
) -> None:
    """The frames kept aside are those that were encoded; else PSNR would mean nothing."""
    file = tmp_path / "report.json"
    words = (prepared["exact"], "--data", prepared["exact-latents"], *UNITS[:2], "--out", file)
    code, _, error = run(*words)
    assert code == 0, error
    report = json.loads(file.read_text())
    assert report["reconstruction"]["psnr"]["mean"] > 50  # stored with 11 bits
    assert report["reconstruction"]["ssim"]["mean"] > 0.999


@torch.no_grad()
def test_the_loss_tells_a_trained_model_from_noise(
    run: Run, prepared: dict[str, Path], tmp_path
) -> None:
    """A model that answers zero is better than one with random weights; the report shows it."""
    silent = tiny_pipeline()
    silent.transformer.proj_out.weight.zero_()
    silent.transformer.proj_out.bias.zero_()
    silent.save_pretrained(tmp_path / "silent")
    found = []
    for name, checkpoint in (("a", prepared["lossy"]), ("b", tmp_path / "silent")):
        file = tmp_path / f"{name}.json"
        words = (checkpoint, "--data", prepared["lossy-latents"], *UNITS[:2], "--out", file)
        assert run(*words)[0] == 0
        found.append(json.loads(file.read_text())["losses"]["frame"]["mean"])
    assert found[1] < found[0]


def test_losses_are_those_of_the_trained_units_by_default(
    run: Run, prepared: dict[str, Path], tmp_path: Path
) -> None:
    """What a model never learned has a loss, too, but says nothing; if it is asked for, say so."""
    pipe = tiny_pipeline()
    pipe.meta = {"units": ["chunk:2"]}
    words = (pipe.save_pretrained(tmp_path / "one"), "--data", prepared["lossy-latents"])
    code, out, _ = run(*words)
    assert code == 0
    assert ("chunk:2" in out, "frame |" in out, "not trained" in out) == (True, False, False)
    assert "is not trained on frame, but on chunk:2\n" in run(*words, "--units", "frame")[1]


def test_what_cannot_be_compared_is_said(run: Run, prepared: dict[str, Path], tmp_path) -> None:
    """Another codec, nothing held out, no such folder: one sentence, and what to do."""
    videos, latents = prepared["videos"], tmp_path / "latents"
    words = [str(videos), str(latents), "--codec", str(prepared["lossy"]), "--num-frames", "9"]
    assert main(["prepare", *words, "--held-out", "0", "--workers", "1"]) == 0
    for data, message in (
        (prepared["exact-latents"], "as codec, or name a checkpoint"),
        (latents, "holds no clips out"),
        (tmp_path / "none", "holds no clips out"),
    ):
        code, _, error = run(prepared["lossy"], "--data", data)
        assert code == 2
        assert message in error
        assert error.count("\n") == 1
