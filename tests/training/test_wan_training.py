"""Checkpoints of the Wan family in training: captions are encoded once, by their own encoder."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_wan
import torch
from safetensors.torch import load_file, save_file

from videoar.cli.main import main
from videoar.core.transformer import ModelConfig, VideoTransformer
from videoar.data.latents import EMPTY_TEXT, LatentShards, read_info, text_module
from videoar.data.video import Video
from videoar.generation.pipeline import VideoPipeline
from videoar.training import recipes
from videoar.training.distillation.task import forecast
from videoar.training.loop import train
from videoar.training.low_rank import ADAPTER
from videoar.training.run_folder import read_log

CAPTIONS = ("a red ball moves left", "nothing happens", "a red ball moves right")
QUICK = ("--num-frames", "9", "--workers", "1", "--held-out", "0", "--sizes", "32x32")
SHORT = ("--batch-size", "2", "--save-every", "1", "--precision", "float32", "--log-every", "1")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan folder, videos with captions, and their latents."""
    root = tmp_path_factory.mktemp("wan")
    tiny_wan.save(tiny_wan.pipeline(), root / "wan")
    videos, rng = root / "videos", np.random.default_rng(0)
    videos.mkdir()
    for number, caption in enumerate(CAPTIONS):
        frames = rng.integers(0, 255, (12, 32, 32, 3), dtype=np.uint8)
        Video(frames=frames, fps=16.0).save(videos / f"{number}.mp4")
        (videos / f"{number}.txt").write_text(caption)
    words = [str(videos), str(root / "latents"), "--codec", str(root / "wan"), *QUICK]
    assert main(["prepare", *words]) == 0
    return root


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep embeddings of these tests apart from those of the user."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


def _finetune(root: Path, out: Path, *words: str) -> list[str]:
    data = ["--data.path", str(root / "latents"), "--task.init", str(root / "wan")]
    rate = ["--optimizer.muon-learning-rate", "None", "--optimizer.warmup-steps", "0"]
    units = ["--task.units", "frame", "chunk:2", "--task.flow.clip-frames", "3"]
    return ["train", "finetune", *data, *rate, *units, *SHORT, "--out", str(out), *words]


def test_captions_are_stored_as_the_rows_of_the_encoder(root: Path) -> None:
    """What training reads is what generation would compute for the same prompt."""
    prompts = VideoPipeline.from_pretrained(root / "wan").prompt_encoder
    shards = LatentShards(root / "latents")
    batch = shards.get([0, 1, 2], np.random.default_rng(0))
    captions = [clip["captions"][0] for clip in shards.clips]
    assert sorted(captions) == sorted(CAPTIONS)
    expected = prompts.encode(captions)
    torch.testing.assert_close(batch["text"], expected.float(), atol=2e-3, rtol=1e-3)
    assert read_info(root / "latents").text == prompts.fingerprint()
    assert (root / "latents" / EMPTY_TEXT).is_file()


def test_an_encoder_of_the_same_size_is_another_one(root: Path, tmp_path: Path) -> None:
    """Neither rows on disc nor those with latents are taken for its own; sizes and dates agree."""
    wan = tmp_path / "wan"
    shutil.copytree(root / "wan", wan)
    before = VideoPipeline.from_pretrained(wan).prompt_encoder
    rows = before.encode(["a ball"])
    file = next((wan / "text_encoder").glob("*.safetensors"))
    date = file.stat().st_mtime_ns
    save_file({key: 2 * tensor for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    os.utime(file, ns=(date, date))
    after = VideoPipeline.from_pretrained(wan).prompt_encoder
    assert before.fingerprint() != after.fingerprint()
    assert not torch.equal(rows, after.encode(["a ball"]))
    with pytest.raises(ValueError, match=r"has captions encoded by umT5-.*, but .* umT5-"):
        text_module(after, root / "latents")
    words = [str(root / "videos"), str(root / "latents"), "--codec", str(wan), *QUICK]
    assert main(["prepare", *words]) == 2


def test_a_wan_folder_is_finetuned_and_generates(root: Path, tmp_path: Path) -> None:
    """Only the transformer learns; the text encoder comes out as it went in."""
    assert main(_finetune(root, tmp_path / "run", "--steps", "3")) == 0
    trained = VideoPipeline.from_pretrained(tmp_path / "run" / "checkpoint")
    first = VideoPipeline.from_pretrained(root / "wan")
    assert (first.sampling.units, trained.sampling.units) == ("full", "frame")
    assert (trained.sampling.window_frames, trained.sampling.shift) == (3, 5.0)
    before, after = first.transformer.state_dict(), trained.transformer.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(
        first.prompt_encoder.encode(["a ball"]), trained.prompt_encoder.encode(["a ball"])
    )
    video = trained("a red ball moves left", num_frames=5, num_inference_steps=1)
    assert video.frames.shape == (5, 32, 32, 3)


def test_low_rank_updates_of_a_wan_folder_are_for_diffusers_too(root: Path, tmp_path: Path) -> None:
    """Trained alone, merged into the checkpoint, and a file that both programs add to the base."""
    pytest.importorskip("peft")
    out, wan = tmp_path / "run", root / "wan"
    assert main(_finetune(root, out, "--steps", "3", "--task.lora-rank", "2")) == 0
    file = out / "checkpoint" / ADAPTER
    trained = VideoPipeline.from_pretrained(out / "checkpoint").transformer.state_dict()
    base = VideoPipeline.from_pretrained(wan).transformer.state_dict()
    moved = {name for name in base if not torch.equal(base[name], trained[name])}
    layers = {key.split(".lora_")[0].removeprefix("transformer.") for key in load_file(file)}
    assert moved == {f"{layer}.weight" for layer in layers}
    assert len(layers) == 2 * (4 + 4 + 2)

    merged = VideoPipeline.from_pretrained(wan, lora=file, preset="wan").transformer.state_dict()
    reference = tiny_wan.diffusers.WanPipeline.from_pretrained(wan)
    reference.load_lora_weights(out / "checkpoint")
    reference.fuse_lora()
    reference.unload_lora_weights()
    theirs = reference.transformer.state_dict()
    for name in base:
        torch.testing.assert_close(merged[name], trained[name], atol=1e-7, rtol=1e-6)
        if name in theirs:
            torch.testing.assert_close(theirs[name], trained[name], atol=1e-7, rtol=1e-6)

    words = [str(wan), str(tmp_path / "merged"), "--lora", str(file), "--preset", "wan"]
    assert main(["convert", *words]) == 0
    converted = VideoPipeline.from_pretrained(tmp_path / "merged").transformer.state_dict()
    assert all(torch.equal(converted[name], merged[name]) for name in base)


def test_a_rank_that_trains_nothing_is_refused() -> None:
    """Updates of no rank, and of weights that were never trained."""
    task = recipes.finetune().task
    with pytest.raises(ValueError, match="lora_rank is 0: use 1 or more"):
        replace(task, lora_rank=0)
    with pytest.raises(ValueError, match=r"lora_rank is 2: use none without task\.init"):
        replace(task, lora_rank=2, init=None)


def test_an_interrupted_finetune_goes_on_exactly(root: Path, tmp_path: Path) -> None:
    """Rows of text come from the same clips after a resume."""
    assert main(_finetune(root, tmp_path / "whole", "--steps", "3")) == 0
    for steps in ("1", "3"):
        words = ("--steps", steps, "--optimizer.decay-fraction", "0.5")
        assert main(_finetune(root, tmp_path / "parts", *words)) == 0
    losses = [
        [row["loss"] for row in read_log(tmp_path / name) if "loss" in row]
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1]


def test_losses_on_held_out_clips(root: Path, tmp_path: Path) -> None:
    """The rows of held-out captions are stored, too; every kind of unit gets a loss."""
    latents, out = tmp_path / "latents", tmp_path / "scores.json"
    wan, held = str(root / "wan"), [*QUICK[:-4], "--held-out", "0.5", *QUICK[-2:]]
    assert main(["prepare", str(root / "videos"), str(latents), "--codec", wan, *held]) == 0
    words = ["--data", str(latents), "--units", "frame", "chunk:2", "--out", str(out)]
    assert main(["evaluate", "heldout", wan, *words]) == 0
    means = json.loads(out.read_text())["means"]
    assert set(means) == {"codec", "frame", "chunk:2"}
    assert all(np.isfinite(each["mean"]) for line in means.values() for each in line.values())


@pytest.mark.parametrize("recipe", ["toy-start", "toy-dmd"])
def test_a_wan_folder_is_distilled(root: Path, tmp_path: Path, recipe: str) -> None:
    """Plain Wan reads everything: it is teacher, critic and student of the same command."""
    wan, out = str(root / "wan"), tmp_path / "run"
    parts = ["--task.teacher", wan, "--task.student", wan, "--data.path", str(root / "latents")]
    small = ["--task.distillation.clip-frames", "3", "--task.units", "frame"]
    if recipe == "toy-dmd":
        small += ["--task.distillation.critic-warmup", "0", "--task.distillation.critic-steps", "1"]
    rate = ["--optimizer.muon-learning-rate", "None"]
    words = [*parts, *small, *rate, *SHORT, "--out", str(out), "--steps", "2"]
    assert main(["distill", recipe, *words]) == 0
    pipe = VideoPipeline.from_pretrained(out / "checkpoint")
    assert (pipe.sampling.step, pipe.sampling.window_frames) == ("renoise", 3)
    assert len(pipe("a red ball", num_frames=5).frames) == 5


def test_latents_without_rows_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence says what to run; training would else begin without words."""
    info = root / "latents" / "latents.json"
    text = info.read_text()
    stored = read_info(root / "latents").text
    try:
        info.write_text(text.replace(f'"{stored}"', "null"))
        assert main(_finetune(root, tmp_path / "run", "--steps", "1")) == 2
    finally:
        info.write_text(text)
    error = capsys.readouterr().err
    assert "captions encoded by nothing" in error
    assert "prepare the videos again, with that checkpoint as codec" in error


# ---------------------------------------------------------------- the recipe of the real size


def test_the_networks_of_the_recipe_have_the_public_size() -> None:
    """1.42 billion parameters each, counted without memory, and what they take when trained."""
    with torch.device("meta"):
        teacher, student, critic = (VideoTransformer(ModelConfig()) for _ in range(3))
    public = 1_418_996_800 + ModelConfig().num_levels * ModelConfig().hidden_size
    assert teacher.num_parameters == public
    said = forecast({"student": student, "critic": critic, "teacher": teacher})
    whole = public * (20 + 16 + 4) / 2**30
    assert f"{whole:.1f} on 1, {whole / 2:.1f} on 2" in said
    said = forecast({"student": student, "teacher": teacher.to(torch.bfloat16)})
    assert f"{public * (20 + 2) / 2**30:.1f} on 1" in said


def test_the_recipe_takes_a_step_at_full_width(root: Path, tmp_path: Path) -> None:
    """All widths are real; layers, frames and batches are few."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = VideoTransformer(ModelConfig(num_layers=1))
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.02)
    pipe = tiny_wan.pipeline()
    config = tiny_wan.transformers.UMT5Config(
        **tiny_wan.T5 | {"d_model": 4096}, feed_forward_proj="gated-gelu"
    )
    wide = tiny_wan.transformers.UMT5EncoderModel(config)
    pipe.text_encoder = tiny_wan.randomise(wide, scale=0.02)
    folder, latents = tiny_wan.save(pipe, tmp_path / "tiny"), tmp_path / "latents"
    first = VideoPipeline.from_pretrained(folder)
    first.transformer, first.sampling = transformer, replace(first.sampling, units="full")
    first.height = first.width = 32
    first.save_pretrained(tmp_path / "wan")
    videos = [str(root / "videos"), str(latents), "--codec", str(tmp_path / "wan"), *QUICK]
    assert main(["prepare", *videos]) == 0
    recipe = recipes.find("wan-1.3b-dmd")
    distillation = replace(recipe.task.distillation, clip_frames=3, critic_warmup=0, critic_steps=1)
    wan = str(tmp_path / "wan")
    task = replace(
        recipe.task, teacher=wan, student=wan, latents=latents, distillation=distillation
    )
    small = {"task": task, "steps": 2, "accumulate": 1, "device": "cpu", "out": tmp_path / "run"}
    train(replace(recipe, **small))
    losses = [row["loss"] for row in read_log(tmp_path / "run") if "loss" in row]
    assert len(losses) == 1
    assert np.isfinite(losses[0])
