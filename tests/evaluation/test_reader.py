"""A judge of labelled videos: trained on some, right about others, and asked like any judge."""

import dataclasses
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from videoar.cli.main import main
from videoar.data.video import Video
from videoar.encoders.text_encoder import TextEncoder, TinyPromptEncoder
from videoar.evaluation.labels import LABELS, outline, read_labels, vocabulary
from videoar.evaluation.reader import NOTHING, TrainedJudge, changed, scores
from videoar.training.loop import TrainConfig, train
from videoar.training.reader import LabelledClips
from videoar.training.recipes import find

# What is made once is made by one worker.
pytestmark = pytest.mark.xdist_group("reader")

COLORS = {"red": (220, 40, 30), "green": (40, 200, 60), "blue": (40, 60, 230)}
FRAMES = 24


def _clip(row: dict[str, Any], rng: np.random.Generator) -> np.ndarray:
    """Draw a box at one side that is opened, or shut: a lid moves down, or up."""
    frames = np.full((FRAMES, 32, 32, 3), rng.integers(90, 110), np.uint8)
    x = {"left": 3, "right": 19}[row["side"]] + int(rng.integers(-1, 2))
    begin, moves = int(rng.integers(4, 8)), FRAMES // 3
    for t, frame in enumerate(frames):
        open_by = np.clip((t - begin) / moves, 0, 1)
        open_by = 1 - open_by if row["action"] == "shuts" else open_by
        frame[4:28, x : x + 10] = 20
        top = 4 + round(12 * open_by)
        frame[top : top + 12, x : x + 10] = COLORS[row["color"]]
        row["lid"].append("open" if open_by > 0.7 else "shut" if open_by < 0.3 else None)
    return frames


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Boxes of three colours at two sides, each opened and shut by 6 videos."""
    folder, rng, lines = tmp_path_factory.mktemp("footage"), np.random.default_rng(0), []
    looks = [(c, s, a) for c in COLORS for s in ("left", "right") for a in ("opens", "shuts")]
    for number, (color, side, action) in enumerate(6 * looks):
        row: dict[str, Any] = {"color": color, "side": side, "action": action, "lid": []}
        row |= {"file_name": f"{number:03d}.mkv", "frames": FRAMES, "takes": number}
        Video(frames=_clip(row, rng), fps=16).save(folder / row["file_name"])
        del row["action"]
        said = f"a {color} box {action} {side}"
        row["parts"] = [{"action": action, "first": 0, "last": FRAMES - 1, "captions": [said]}]
        lines.append(json.dumps(row))
    (folder / LABELS).write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(footage: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A tiny judge, trained."""
    recipe = find("judge")
    small = replace(recipe.task.reader, size=32, num_frames=8, channels=(8, 16), width=32)
    task = replace(recipe.task, footage=footage, reader=small, held_out=0.25)
    config = replace(recipe, task=task, out=tmp_path_factory.mktemp("run") / "judge")
    config = replace(config, steps=180, batch_size=8, precision="float32", num_threads=1)
    config = replace(config, sample_every=180, log_every=90, save_every=180)
    train(config)
    return config


@pytest.fixture(scope="module")
def judge(run: TrainConfig, footage: Path) -> TrainedJudge:
    """It, as a study uses it."""
    return TrainedJudge(run.out / "checkpoint" / "judge", footage)


def test_a_judge_reads_what_it_was_not_trained_on(run: TrainConfig) -> None:
    """Things, deeds and states of held-out videos are read: else its scores mean nothing."""
    (line,) = (
        row
        for row in map(json.loads, (run.out / "log.jsonl").read_text().splitlines())
        if "validation/color" in row
    )
    right = {key.removeprefix("validation/"): v for key, v in line.items() if "validation" in key}
    assert set(right) == {"color", "side", "action", "lid", "all"}
    assert min(right.values()) > 0.85


def test_nothing_happens_in_a_frozen_clip(judge: TrainedJudge) -> None:
    """A picture that stands still tells which thing it is, but no deed, and no new state."""
    parts = judge.asked
    clips = np.stack([part.clip(FRAMES, fps=16, size=32) for part in parts])
    frozen = clips[:, :1].repeat(FRAMES, axis=1)
    found = [
        scores(seen, part.told())
        for seen, part in zip(judge.reader.read(frozen), parts, strict=True)
    ]
    assert np.mean([right["color"] for right in found]) > 0.85
    assert np.mean([right["action"] for right in found]) < 0.2
    assert np.mean([right["lid"] for right in found]) < 0.2


def test_held_out_videos_are_not_trained_on(judge: TrainedJudge, footage: Path) -> None:
    """What is asked for lies apart, by the rule that the weights bring along."""
    parts = read_labels(footage, share=0.25)
    assert 0 < len(judge.asked) < len(parts) == 72
    assert {part.path for part in parts if part.held_out} == {part.path for part in judge.asked}


def test_combinations_are_held_out_together(footage: Path) -> None:
    """Of a colour at a side all videos are held out, or none: it was never seen there."""
    parts = read_labels(footage, apart=("color", "side"), share=0.5)
    groups = {(p.things["color"], p.things["side"], p.held_out) for p in parts}
    assert len(groups) == 6
    assert {held_out for *_, held_out in groups} == {True, False}


def test_a_run_repeats(run: TrainConfig, tmp_path: Path) -> None:
    """Clips and what spoils them depend on the seed alone, so weights agree to the last bit."""
    short = replace(run, steps=4, sample_every=0)
    made = [train(replace(short, out=tmp_path / name)) for name in ("one", "two")]
    one, two = ((folder / "judge" / "model.safetensors").read_bytes() for folder in made)
    assert one == two


def test_a_window_says_what_happens_in_it(footage: Path, run: TrainConfig) -> None:
    """All of the deed, nothing before it, and no word for half of it."""
    parts = read_labels(footage)
    words = {kind: vocabulary(parts, kind) for kind in ("things", "deeds", "states")}
    clips = LabelledClips(parts, replace(run.task.reader, **words))
    deeds = (*words["deeds"]["action"], NOTHING)
    part, last = parts[0], clips.stored - 1
    assert part.deeds == {"action": "opens"}

    def said(*window: int) -> str | None:
        number = clips.clip(0, window)[1]["action"]
        return deeds[number] if number >= 0 else None

    half = part.states["lid"].index(None) * last // (FRAMES - 1) + 1
    assert said(0, last) == "opens"
    assert said(0, 2) == said(5, 5) == NOTHING
    assert said(0, half) is said(half, last) is None


def test_states_are_outlined_whatever_the_rate() -> None:
    """Where it begins, and where it was led: a button that comes back was pressed."""
    assert outline(["out", None, "in", "in", "out"]) == ["out", "in"]
    assert outline(["shut", "shut", None, "open"]) == ["shut", "open"]
    assert outline([None, "open", "open"]) == ["open"]
    assert outline([None]) == []


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([2, 2, 2, 2], [2]),
        ([1, 1, 1, 1], [1]),
        ([2, 2, 1, 1], [2, 1]),
        ([0, 2, 2, 2, 2, 2], [0, 2]),
        ([1, 1, 1, 1, 1, 0], [1, 0]),
        ([0, 0, 0, 2, 2, 2, 0, 0, 0], [0, 2]),  # for a while
    ],
)
def test_states_are_read_as_the_likeliest_change(frames: list[int], words: list[int]) -> None:
    """The one word that never changes is read, too: it is not the first of the vocabulary."""
    logits = 9 * torch.eye(3)[torch.tensor(frames)]
    assert changed(logits.log_softmax(-1)) == words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is missing: write a line for each video"),
        ("{}\n", r"line 1 of .* labels no video \(KeyError: 'file_name'\)"),
        ('{"file_name": "a.mp4", "frames": 1}\n', "frames 0 to 0 of 1"),
        ("[]\n", "line 1 of"),
        ('{"file_name": "a.mp4", "frames": 9, "color": "red"}\n' * 2, "label more videos"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(
    text: str | None, message: str, tmp_path: Path, capsys
) -> None:
    """One sentence, and no run begun."""
    if text is not None:
        (tmp_path / LABELS).write_text(text)
    words = ["train", "judge", "--data.path", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert "Traceback" not in said


def test_a_trained_judge_is_asked_like_the_worlds(
    run: TrainConfig, footage: Path, tmp_path: Path, capsys
) -> None:
    """Ceilings, kinds and motion stand in one report; what is missing is said."""
    pipe = tiny.tiny_pipeline()
    encoder = TextEncoder(dataclasses.replace(tiny.TEXT, max_tokens=96)).eval()
    pipe.prompt_encoder = TinyPromptEncoder(pipe.prompt_encoder.tokenizer, encoder)
    own, made_by = str(pipe.save_pretrained(tmp_path / "own")), str(run.out / "checkpoint")
    words = ["evaluate", own, "--units", "frame", "--num-prompts", "4", "--seconds", "2"]
    words += ["--num-inference-steps", "1"]
    asked = ["--judge", made_by, "--footage", str(footage)]
    assert main([*words, *asked, "--out", str(tmp_path / "report")]) == 0
    capsys.readouterr()
    said = (tmp_path / "report" / "report.md").read_text()
    assert "| videos of | colour | side | action | lid | all right | Fréchet |" in said
    assert "| motion vectors, Fréchet |" in said
    texts = [path.read_text() for path in (tmp_path / "report" / "figures").iterdir()]
    rows = [json.loads(line) for text in texts for line in text.splitlines() if line]
    found = {row["entry"]: [each for each in rows if each["entry"] == row["entry"]] for row in rows}
    assert set(found) == {"real clips", "real clips through the codec", "frame #1"}
    assert found["frame #1"][0]["told"]["color"] in COLORS
    assert np.mean([video["scores"]["all"] for video in found["real clips"]]) > 0.5
    for missing, message in (
        (["--judge", made_by], "brings a judge of labelled videos: one takes --footage"),
        (["--judge", own, "--footage", str(footage)], "brings no judge of labelled videos"),
        ([*asked, "--num-prompts", "99"], "ask for fewer prompts or seconds, or add videos"),
    ):
        assert main([*words, *missing, "--out", str(tmp_path / "no")]) == 2
        assert message in capsys.readouterr().err
    # The judge of a checkpoint needs no name.
    shutil.copytree(Path(made_by) / "judge", Path(own) / "judge")
    again = str(tmp_path / "again")
    assert main([*words, "--footage", str(footage), "--out", again]) == 0
    both = (said, (tmp_path / "again" / "report.md").read_text())
    quality = [text.partition("## What it costs")[0] for text in both]
    assert quality[0][quality[0].index("## Qual") :] == quality[1][quality[1].index("## Qual") :]
