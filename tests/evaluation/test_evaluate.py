"""Evaluation: held-out prompts in pairs, a judge with a ceiling, and results that are kept."""

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from videoar.checkpoints.checkpoint import Checkpoint
from videoar.data import world
from videoar.data.latents import LatentShards, LatentsInfo, ShardWriter
from videoar.data.world import FIRST_HELD_OUT, FIRST_SCENE, held_out_prompts, scene_of
from videoar.encoders.text_encoder import TextEncoder, TinyPromptEncoder, train_tokenizer
from videoar.evaluation import nearest
from videoar.evaluation.entries import measured
from videoar.evaluation.judge import WORLD, windows
from videoar.evaluation.options import Evaluate
from videoar.evaluation.study import evaluate
from videoar.evaluation.tables import CLEAN, CODEC
from videoar.generation.pipeline import VideoPipeline

# What is made once is made by one worker.
pytestmark = pytest.mark.xdist_group("evaluate")

FPS = 16
HOW: dict[str, Any] = {"fps": FPS, "judge": WORLD, "labels": {}}
ATTRIBUTES = ("color", "shape", "motion", "size", "background", "count", "all")
Videos = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny checkpoint whose prompts may be as long as captions."""
    pipe: VideoPipeline = tiny.tiny_pipeline()
    tokenizer = train_tokenizer(["a small red ball moves left"], vocab_size=300)
    text = TextEncoder(replace(tiny.TEXT, max_tokens=256)).eval()
    pipe.prompt_encoder = TinyPromptEncoder(tokenizer, text)
    return str(pipe.save_pretrained(tmp_path_factory.mktemp("evaluate") / "tiny"))


@pytest.fixture(scope="module")
def config(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Evaluate:
    """Few and short videos."""
    return Evaluate(
        checkpoint=checkpoint,
        units=("frame", "cube:1x2x2"),
        num_prompts=5,
        seconds=2.0,
        batch_size=3,
        num_inference_steps=1,
        out=tmp_path_factory.mktemp("report") / "out",
    )


@pytest.fixture(scope="module")
def text(config: Evaluate) -> str:
    """One evaluation that several tests look at."""
    said, text = evaluate(config, lambda line: None), (config.out / "report.md").read_text()
    assert len(said) < 0.3 * len(text)  # the tables stand in the files
    assert "report.html has the tables and the videos; report.md is the same as text" in said
    return text


@pytest.fixture(scope="module")
def videos(text: str, config: Evaluate) -> Videos:
    """What its folder holds of the videos of each entry."""
    return _kept(config.out)


def _kept(folder: Path) -> Videos:
    texts = [path.read_text() for path in (folder / "figures").iterdir()]
    rows = [json.loads(line) for text in texts for line in text.splitlines() if line]
    found: Videos = {}
    for row in rows:
        found.setdefault(row["entry"].partition(" #")[0], []).append(row)
    return {name: [row for row in own if row["index"] >= 0] for name, own in found.items()}


def _table(text: str, title: str) -> list[list[str]]:
    """Return the cells of a table of the report, its head first."""
    lines = text.partition(f"## {title}")[2].partition("\n## ")[0].splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return [cells[0], *cells[2:]]


def _mean(videos: Videos, name: str, key: str) -> float:
    return float(np.mean([video["scores"][key] for video in videos[name]]))


def test_scenes_were_never_trained_on() -> None:
    """Prompts come from indices behind all of training; else memory would pass for faithfulness."""
    prompt = held_out_prompts(3, seed=4)[2]
    assert FIRST_SCENE > FIRST_HELD_OUT
    assert prompt["scene"] == scene_of(FIRST_SCENE + 2, seed=4)[0].to_json()
    assert prompt["seed"] == 6


def test_more_prompts_begin_with_the_same_ones() -> None:
    """Prompt i does not depend on how many there are, so runs of different length compare."""
    assert held_out_prompts(5, seed=0)[:2] == held_out_prompts(2, seed=0)


def test_every_kind_gets_the_same_prompts_and_seeds(videos: Videos) -> None:
    """Differences are paired; with other prompts per kind their intervals would be wrong."""
    asked = [
        [(video["prompt"], video["seed"]) for video in videos[name]]
        for name in (CLEAN, CODEC, "frame", "cube:1x2x2")
    ]
    assert len(asked[0]) == 5
    assert all(other == asked[0] for other in asked)


def test_the_judge_is_right_about_real_clips(videos: Videos) -> None:
    """The ceiling is near 1 on clean clips; else scores say more of the judge than of a model."""
    assert min(_mean(videos, CLEAN, key) for key in ATTRIBUTES) > 0.9


def test_noise_is_not_faithful(videos: Videos) -> None:
    """A model with random weights scores far below the ceiling: the scores are not a constant."""
    assert _mean(videos, "frame", "motion") < 0.5
    assert _mean(videos, "frame", "shape") < 0.5


def test_long_videos_are_judged_at_both_ends(config: Evaluate, tmp_path: Path) -> None:
    """Every long video has scores of its first and last window, and slopes from all windows."""
    long = replace(config, units=("frame",), num_prompts=2, seconds=9.0, out=tmp_path / "long")
    evaluate(long, lambda line: None)
    text = (long.out / "report.md").read_text()
    assert "\n\nall right, of 100, as the judge of the procedural world reads: frame " in text
    assert ", real clips through the codec " in text
    assert (
        f"\n\n2 videos of 9.0 s were made by {config.checkpoint}?num_inference_steps=1 in" in text
    )
    (video, _) = _kept(tmp_path / "long")["frame"]
    assert set(video["first"]) == set(video["last"]) == set(ATTRIBUTES)
    assert len(video["curves"]["brightness"]) == 16  # eight slices of each of two whole windows
    head, row = _table(text, "The last 4 s of the same videos minus the first, in points")
    assert head == ["videos of", "colour", "shape", "motion", "all right"]
    assert row[0] == "frame"


def test_ends_of_a_stream_are_its_first_and_last_seconds() -> None:
    """The windows lie where they should when blocks of frames do not: here, things swap places."""
    scene, _ = scene_of(0, seed=0)
    other = replace(scene, background=next(b for b in world.BACKGROUNDS if b != scene.background))
    clips = [world.render(s, num_frames=n)[None] for s, n in ((scene, 70), (other, 125))]
    frames = np.concatenate(clips, axis=1)
    prompt = {"prompt": "", "seed": 0, "scene": scene.to_json()}
    (video,) = measured(iter(np.split(frames, [1, 33, 40, 41, 140], axis=1)), [prompt], **HOW)
    assert video["first"]["background"] == 1
    assert video["last"]["background"] == 0
    assert video["seen"]["last"]["background"] == other.background


def test_a_steady_video_has_no_slopes(rng: np.random.Generator) -> None:
    """Brightness that rises by 1 per minute has that slope per second; a constant one has none."""
    levels = np.round(np.arange(32 * FPS) / FPS / 60 * 255).astype(np.uint8)
    rising = np.broadcast_to(levels[None, :, None, None, None], (1, 32 * FPS, 64, 64, 3))
    both = np.concatenate([rising, np.full_like(rising, 9)])
    prompts = held_out_prompts(2, seed=0)
    first, second = measured(iter(np.array_split(both, 7, axis=1)), prompts, **HOW)
    assert 60 * first["slopes"]["brightness"] == pytest.approx(1, abs=0.02)
    assert second["slopes"]["brightness"] == pytest.approx(0, abs=1e-9)


def test_windows_keep_every_frame_in_order(rng: np.random.Generator) -> None:
    """Cutting a stream anew loses nothing, whatever the sizes of its blocks."""
    frames = rng.integers(256, size=(2, 29, 2, 2, 3), dtype=np.uint8)
    cut = list(windows(iter(np.split(frames, [1, 5, 6, 20], axis=1)), size=8))
    assert [part.shape[1] for part in cut] == [8, 8, 8, 5]
    assert np.array_equal(np.concatenate(cut, axis=1), frames)


def test_the_tables_are_those_of_the_scores(text: str, videos: Videos) -> None:
    """Means of what is kept, shares of the ceiling, and differences of the same prompts."""
    head, *rows = _table(text, "Quality, as they are")
    assert head[:5] == ["videos of", "colour", "shape", "motion", "all right"]
    assert [row[0] for row in rows] == [CLEAN, CODEC, "frame", "cube:1x2x2"]
    columns, *shares = _table(text, f"In % of the scores of {CODEC}, as they are")
    keys = {"colour": "color", "shape": "shape", "motion": "motion", "all right": "all"}
    assert columns[1:] == [name for name, key in keys.items() if _mean(videos, CODEC, key)]
    assert len(columns) > 1  # what the judge never sees in real clips has no share
    for row, share in zip(rows, shares, strict=True):
        means = {name: _mean(videos, row[0], key) for name, key in keys.items()}
        for name, mean in means.items():
            assert row[head.index(name)].startswith(f"{100 * mean:.1f} [")
        for name, cell in zip(columns[1:], share[1:], strict=True):
            assert cell.startswith(f"{100 * means[name] / _mean(videos, CODEC, keys[name]):.1f} [")
    _, (name, color, *_) = _table(text, "Differences, as they are")
    assert name == "cube:1x2x2"
    apart = 100 * (_mean(videos, "cube:1x2x2", "color") - _mean(videos, "frame", "color"))
    assert color.startswith(f"{apart:.1f} [")


def test_finished_kinds_are_not_computed_again(text: str, config: Evaluate, tmp_path: Path) -> None:
    """A second run only adds what is missing; a mark on an old result survives it."""
    again = tmp_path / "again"
    shutil.copytree(config.out, again)
    (path,) = (again / "figures").iterdir()
    lines = [line for line in path.read_text().splitlines() if line and "cube:1x2x2 #1" not in line]
    path.write_text(
        "\n".join([lines[0].replace('"index": 0', '"index": 0, "mark": 7'), *lines[1:]])
    )
    assert evaluate(replace(config, out=again), lambda line: None)
    kept = _kept(again)
    assert kept[CLEAN][0]["mark"] == 7
    assert {name: len(own) for name, own in kept.items()} == dict.fromkeys(kept, 5)


def test_results_of_other_settings_are_not_mixed(
    text: str, config: Evaluate, tmp_path: Path
) -> None:
    """Another seed or other weights under the same name would make pairs of strangers."""
    with pytest.raises(ValueError, match=r"holds .* with seed = 0, but 1 is asked for"):
        evaluate(replace(config, seed=1), lambda line: None)
    other = tiny.tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    first, second = (Checkpoint.find(name).fingerprint() for name in (other, config.checkpoint))
    assert first != second


def test_who_remembers_is_nearer_to_the_training_than_real_clips(
    config: Evaluate, tmp_path: Path
) -> None:
    """A checkpoint whose own videos were those of the training has learned them by heart."""
    own = replace(config, units=("frame",), num_prompts=4, seconds=29 / FPS, out=tmp_path / "out")
    assert "Nearest" not in evaluate(own, lambda line: None)
    pipe = VideoPipeline.from_pretrained(own.checkpoint)
    how = {"num_frames": 29, "units": "frame", "num_inference_steps": 1, "output_type": "latent"}
    with ShardWriter(tmp_path / "latents", info=LatentsInfo.of(pipe.codec, fps=FPS)) as writer:
        for prompt in WORLD.prompts(4, seed=own.seed):
            writer.add(pipe(prompt["prompt"], seed=prompt["seed"], **how), captions=[""])
    lines = list[str]()
    evaluate(replace(own, nearest=tmp_path / "latents"), lines.append)
    text = (own.out / "report.md").read_text()
    head, real, made = _table(text, "Nearest training clips\n")
    assert head[1:] == ["distance", "nearer than 95 % of real clips"]
    assert (real[0], real[2], made[2]) == (CODEC, "25%", "100%")
    assert float(made[1].split()[0]) < 0.1 < float(real[1].split()[0])
    assert "nearest" in (own.out / "report.html").read_text()
    assert len(list((own.out / "videos").glob("training-*.mp4"))) == 4
    with pytest.raises(ValueError, match=r"there is no folder .*: make latents of your videos"):
        evaluate(replace(own, nearest=tmp_path / "none"), lambda line: None)


def test_training_clips_that_are_described_outlive_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of clips take half an hour, once."""
    monkeypatch.setattr(nearest, "PIECE", 2)
    codec = tiny.tiny_pipeline().codec
    with ShardWriter(tmp_path / "latents", info=LatentsInfo.of(codec, fps=FPS)) as writer:
        for seed in range(4):
            noise = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
            writer.add(noise, captions=[""])
    shards, said = LatentShards(tmp_path / "latents"), list[str]()

    def killed(line: str) -> None:
        if line.startswith("3"):
            raise KeyboardInterrupt

    for say in (killed, said.append):
        with contextlib.suppress(KeyboardInterrupt):
            nearest.find_nearest({}, shards, codec, tmp_path, keep=0, say=say)
    assert [line.partition(" training")[0] for line in said] == ["3 of 4", "4 of 4"]


def test_a_foreign_file_is_left_alone(config: Evaluate, tmp_path: Path) -> None:
    """A file is refused in one sentence, and stays as it is."""
    path = tmp_path / "notes.json"
    path.write_text("my notes")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        evaluate(replace(config, out=path), lambda line: None)
    assert path.read_text() == "my notes"
    with pytest.raises(ValueError, match="does not exist"):
        evaluate(replace(config, out=tmp_path / "no" / "report"), lambda line: None)


def test_units_are_those_of_the_training_by_default(tmp_path: Path) -> None:
    """A model is not judged by what it never learned, unless asked for; the report says so."""
    pipe = tiny.tiny_pipeline()
    pipe.meta = {"units": ["chunk:2", "key-detail:2"]}
    pipe.prompt_encoder = replace(
        pipe.prompt_encoder, encoder=TextEncoder(replace(tiny.TEXT, max_tokens=256)).eval()
    )
    folder, lines = pipe.save_pretrained(tmp_path / "two, of one name"), []
    short = {"num_prompts": 2, "seconds": 2.0, "num_inference_steps": 1}
    config = Evaluate(checkpoint=str(folder), out=tmp_path / "out", **short)
    assert "not trained" not in evaluate(config, lines.append)
    assert set(_kept(tmp_path / "out")) == {CLEAN, CODEC, "chunk:2", "key-detail:2"}
    assert not any("not trained" in line for line in lines)
    more = replace(config, units=("chunk:2", "frame"), out=tmp_path / "more")
    assert "is not trained on frame, but on chunk:2, key-detail:2." in evaluate(more, lines.append)
    (line,) = (line for line in lines if "not trained" in line)
    assert line.endswith("is not trained on frame, but on chunk:2, key-detail:2.")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("units", ("frame", "frame"), "twice"),
        ("units", ("chunks:2",), "Did you mean chunk"),
        ("num_prompts", 1, "2 or more"),
        ("seconds", 1.0, "1.5 or more"),
        ("seconds", float("nan"), "1.5 or more"),
        ("seconds", float("inf"), "1.5 or more"),
        ("batch_size", 0, "batch_size is 0: use 1"),
        ("seed", -1, "seed is -1: use 0"),
        ("share", "3/2", "K/N with K up to N"),
    ],
)
def test_impossible_requests_are_refused(field: str, value: object, message: str) -> None:
    """One sentence before any work, with the value and what to use."""
    with pytest.raises(ValueError, match=message):
        evaluate(Evaluate(**{field: value}), lambda line: pytest.fail(line))


def test_an_impossible_step_count_fails_before_the_first_video(
    checkpoint: str, tmp_path: Path
) -> None:
    """Arguments that only the pipeline knows are checked for all kinds, and nothing is written."""
    config = Evaluate(checkpoint=checkpoint, num_inference_steps=0, out=tmp_path / "out")
    with pytest.raises(ValueError, match="num_inference_steps is 0"):
        evaluate(config, lambda line: pytest.fail(line))
    assert not (tmp_path / "out").exists()
