"""Evaluation on held-out clips: what the codec loses, and what the generator does not foresee."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import MODEL, tiny_pipeline, tiny_transformer

from videoar.cli.main import main, parse
from videoar.core.loss import FlowMatchingConfig
from videoar.data import world
from videoar.data.video import Video
from videoar.encoders.codec import PatchCodec, PatchCodecConfig
from videoar.evaluation.heldout import DRAWS, NEXT, finest_errors
from videoar.generation.config import GenerationConfig, trained_flow

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
    """The codec, and per kind of unit what kinds have in common; the tables show the means."""
    file = tmp_path / "report.json"
    words = (prepared["lossy"], "--data", prepared["lossy-latents"], *UNITS, "--out", file)
    code, out, error = run(*words)
    assert code == 0, error
    report = json.loads(file.read_text())
    index = (prepared["lossy-latents"] / "heldout" / "index.jsonl").read_text().splitlines()
    assert len(report["files"]) == len(index) == 4  # two of each video
    assert len(set(report["files"])) == 2
    scores = report["clips"]
    assert scores.keys() == {"codec", *UNITS[1:]}
    assert all(psnr < 30 for psnr in scores["codec"]["PSNR"])
    assert all(-1 <= ssim < 1 for ssim in scores["codec"]["SSIM"])
    for name in UNITS[1:]:
        assert set(scores[name]) == {NEXT, *(f"error at {sigma}" for sigma in (0.9, 0.6, 0.3))}
        assert f"| {name} | {np.mean(scores[name]['error at 0.9']):.4g} [" in out
        assert report["means"][name][NEXT]["mean"] == pytest.approx(np.mean(scores[name][NEXT]))
    change = report["differences"]["chunk:2"][NEXT]
    mean = np.subtract(scores["chunk:2"][NEXT], scores["frame"][NEXT]).mean()
    assert change["mean"] == pytest.approx(mean)
    assert change["low"] <= change["mean"] <= change["high"]
    assert "| minus frame |" in out
    assert run(*words)[0] == 2  # the report of an evaluation is not lost to a second one


def test_checkpoints_are_compared_on_the_same_clips(run: Run, prepared: dict[str, Path]) -> None:
    """On own data, in pairs: a checkpoint minus itself under another name is exactly nothing."""
    twin = tiny_pipeline().save_pretrained(prepared["lossy"].parent / "twin", overwrite=True)
    words = ("--data", prepared["lossy-latents"], "--units", "frame")
    code, out, error = run(prepared["lossy"], twin, *words)
    assert code == 0, error
    assert f"| frame of {twin} | 0 [0, 0] | 0 [0, 0] | 0 [0, 0] | 0 [0, 0] |" in out
    assert run(twin, twin, *words)[0] == 2
    with pytest.raises(ValueError, match="use `videoar evaluate heldout` with it"):
        parse(["study", "units", "--data", "x"])


@torch.no_grad()
def test_all_kinds_of_unit_are_measured_by_the_same() -> None:
    """A model that answers zero makes the same error at a sigma whatever the units: that of noise.

    Were coarse tokens counted, or other noise drawn, kinds would differ where no model does.
    """
    pipe, found = tiny_pipeline(), dict[str, float]()
    pipe.transformer.proj_out.weight.zero_()
    pipe.transformer.proj_out.bias.zero_()
    clip = torch.randn(1, 8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for context in ("clean", "noisy", "full"):
        pipe.meta = {"config": {"task": {"flow": {"context": context}}}}
        for name in ("frame", "chunk:3", "key-detail:4", "multiscale:4,2,1", "cube:1x2x2"):
            errors = finest_errors(pipe, clip, torch.zeros(1, 3, 16), name, seed=1)
            found[f"{name}, {context}"] = errors["error at 0.6"]
    noise = torch.randn(DRAWS, *clip.shape[1:], generator=torch.Generator().manual_seed(1))
    expected = float((noise - clip).square().mean())
    assert list(found.values()) == pytest.approx([expected] * 15)


def test_a_checkpoint_is_measured_as_it_was_trained() -> None:
    """What its training read, and how long its clips were, says the checkpoint and no default."""
    task = {"units": ["frame"], "flow": {"class": "Flow", "context": "noisy", "clip_frames": 4}}
    flow = trained_flow({"config": {"task": task}}, GenerationConfig())
    assert (flow.context, flow.clip_frames) == ("noisy", 4)
    assert trained_flow({}, GenerationConfig(units="full")).context == "full"
    assert trained_flow({}, GenerationConfig()) == FlowMatchingConfig()


def test_a_codec_without_loss_is_measured_as_such(
    run: Run, prepared: dict[str, Path], tmp_path
) -> None:
    """The frames kept aside are those that were encoded; else PSNR would mean nothing."""
    file = tmp_path / "report.json"
    words = (prepared["exact"], "--data", prepared["exact-latents"], *UNITS[:2], "--out", file)
    code, out, error = run(*words)
    assert code == 0, error
    report = json.loads(file.read_text())
    assert report["means"]["codec"]["PSNR"]["mean"] > 50  # stored with 11 bits
    assert report["means"]["codec"]["SSIM"]["mean"] > 0.999
    assert "0% is the codec's: the generator is the limit." in out


@torch.no_grad()
def test_the_error_tells_a_trained_model_from_noise(
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
        found.append(json.loads(file.read_text())["means"]["frame"]["error at 0.9"]["mean"])
    assert found[1] < found[0]


def test_figures_are_those_of_the_trained_units_by_default(
    run: Run, prepared: dict[str, Path], tmp_path: Path
) -> None:
    """What a model never learned has an error, too, and means nothing; asked for, it is said."""
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


def test_a_study_needs_no_judge(
    prepared: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Held-out clips are asked for, and all is measured but what a reader would have to say."""
    clips, own, videos = tmp_path / "clips", str(prepared["lossy"]), tmp_path / "videos"
    videos.mkdir()
    for number in range(4):
        scene = world.sample_scene(np.random.default_rng(number))
        Video(frames=world.render(scene, num_frames=29), fps=16.0).save(videos / f"{number}.mkv")
        (videos / f"{number}.txt").write_text(f"a red ball, number {number}")
    words = ["prepare", str(videos), str(clips), "--codec", own, "--workers", "1"]
    assert main([*words, "--num-frames", "29", "--held-out", "0.5"]) == 0
    words = ["study", "checkpoints", "--checkpoint", own, "--units", "frame", "chunk:2"]
    words += ["--seeds", "1", "--footage", str(clips)]
    asked = [*words, "--num-prompts", "2", "--seconds", "1.6", "--out", str(tmp_path / "study")]
    assert main(asked) == 0
    text = (tmp_path / "study" / "report.md").read_text()
    assert "No judge read these videos" in text
    assert "all right" not in text
    for said in ("| motion, % of real |", "## What it costs", "## Seams", "## Drift", "a red ball"):
        assert said in text or said in (tmp_path / "study" / "report.html").read_text()
    real = [line for line in text.splitlines() if line.startswith("| real clips |")]
    assert len(real) == 1
    capsys.readouterr()
    for more, says in (
        (["--num-prompts", "3", "--seconds", "1.6"], "holds out 2 videos"),
        (["--num-prompts", "2", "--seconds", "2.0"], "holds out 0 videos"),
    ):
        assert main([*words, *more, "--out", str(tmp_path / "no")]) == 2
        assert says in capsys.readouterr().err
    assert main(["evaluate", own, "--num-prompts", "2", "--out", str(tmp_path / "no")]) == 2
    assert "longer than the 24 tokens" in (said := capsys.readouterr().err)
    assert "--footage" in said
    assert not (tmp_path / "no").exists()
