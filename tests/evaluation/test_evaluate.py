"""Evaluation: held-out prompts in pairs, a judge with a ceiling, and results that are kept."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from videoar.checkpoints.checkpoint import Checkpoint
from videoar.data import world
from videoar.data.world import FIRST_HELD_OUT, FIRST_SCENE, held_out_prompts, scene_of
from videoar.encoders.text_encoder import TextEncoder, TinyPromptEncoder, train_tokenizer
from videoar.evaluation.entries import measured
from videoar.evaluation.evaluate import evaluate
from videoar.evaluation.judge import windows
from videoar.evaluation.options import Evaluate
from videoar.evaluation.tables import CLEAN, CODEC, unit_tables
from videoar.generation.pipeline import VideoPipeline

FPS = 16
ATTRIBUTES = ("color", "shape", "motion", "size", "background", "count", "all")
Report = dict[str, Any]


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
        long_prompts=2,
        long_seconds=9.0,
        batch_size=3,
        num_inference_steps=1,
        out=tmp_path_factory.mktemp("report") / "report.json",
    )


@pytest.fixture(scope="module")
def text(config: Evaluate) -> str:
    """One evaluation that several tests look at."""
    return evaluate(config, lambda line: None)


@pytest.fixture(scope="module")
def report(text: str, config: Evaluate) -> Report:
    """What its file holds."""
    return json.loads(config.out.read_text())


def _row(report: Report, name: str) -> dict[str, float]:
    rows = next(iter(report["tables"].values()))
    row = next(row for row in rows if row["units"] == name)
    return {key: value["mean"] for key, value in row.items() if key in ATTRIBUTES}


def test_scenes_were_never_trained_on() -> None:
    """Prompts come from indices behind all of training; else memory would pass for faithfulness."""
    prompt = held_out_prompts(3, seed=4)[2]
    assert FIRST_SCENE > FIRST_HELD_OUT
    assert prompt["scene"] == scene_of(FIRST_SCENE + 2, seed=4)[0].to_json()
    assert prompt["seed"] == 6


def test_more_prompts_begin_with_the_same_ones() -> None:
    """Prompt i does not depend on how many there are, so runs of different length compare."""
    assert held_out_prompts(5, seed=0)[:2] == held_out_prompts(2, seed=0)


def test_every_kind_gets_the_same_prompts_and_seeds(report: Report) -> None:
    """Differences are paired; with other prompts per kind their intervals would be wrong."""
    asked = [
        [(video["prompt"], video["seed"]) for video in report["entries"][name]["videos"]]
        for name in (CLEAN, CODEC, "frame", "cube:1x2x2")
    ]
    assert len(asked[0]) == 5
    assert all(other == asked[0] for other in asked)


def test_the_judge_is_right_about_real_clips(report: Report) -> None:
    """The ceiling is near 1 on clean clips; else scores say more of the judge than of a model."""
    assert min(_row(report, CLEAN).values()) > 0.9


def test_noise_is_not_faithful(report: Report) -> None:
    """A model with random weights scores far below the ceiling: the scores are not a constant."""
    assert _row(report, "frame")["motion"] < 0.5
    assert _row(report, "frame")["shape"] < 0.5


def test_long_videos_are_judged_at_both_ends(report: Report) -> None:
    """Every long video has scores of its first and last window, and slopes from all windows."""
    (video, _) = report["entries"]["frame, long"]["videos"]
    assert set(video["first"]) == set(video["last"]) == set(ATTRIBUTES)
    assert len(video["curves"]["brightness"]) == 16  # eight slices of each of two whole windows
    rows = [row for table in report["tables"].values() for row in table]
    assert [row["units"] for row in rows].count("frame, long") == 4


def test_ends_of_a_stream_are_its_first_and_last_seconds() -> None:
    """The windows lie where they should when blocks of frames do not: here, things swap places."""
    scene, _ = scene_of(0, seed=0)
    other = replace(scene, background=next(b for b in world.BACKGROUNDS if b != scene.background))
    clips = [world.render(s, num_frames=n)[None] for s, n in ((scene, 70), (other, 125))]
    frames = np.concatenate(clips, axis=1)
    prompt = {"prompt": "", "seed": 0, "scene": scene.to_json()}
    (video,) = measured(iter(np.split(frames, [1, 33, 40, 41, 140], axis=1)), [prompt], fps=FPS)
    assert video["first"]["background"] == 1
    assert video["last"]["background"] == 0
    assert video["seen"]["last"]["background"] == other.background


def test_a_steady_video_has_no_slopes(rng: np.random.Generator) -> None:
    """Brightness that rises by 1 per minute has that slope per second; a constant one has none."""
    levels = np.round(np.arange(32 * FPS) / FPS / 60 * 255).astype(np.uint8)
    rising = np.broadcast_to(levels[None, :, None, None, None], (1, 32 * FPS, 64, 64, 3))
    both = np.concatenate([rising, np.full_like(rising, 9)])
    prompts = held_out_prompts(2, seed=0)
    first, second = measured(iter(np.array_split(both, 7, axis=1)), prompts, fps=FPS)
    assert 60 * first["slopes"]["brightness"] == pytest.approx(1, abs=0.02)
    assert second["slopes"]["brightness"] == pytest.approx(0, abs=1e-9)


def test_windows_keep_every_frame_in_order(rng: np.random.Generator) -> None:
    """Cutting a stream anew loses nothing, whatever the sizes of its blocks."""
    frames = rng.integers(256, size=(2, 29, 2, 2, 3), dtype=np.uint8)
    cut = list(windows(iter(np.split(frames, [1, 5, 6, 20], axis=1)), size=8))
    assert [part.shape[1] for part in cut] == [8, 8, 8, 5]
    assert np.array_equal(np.concatenate(cut, axis=1), frames)


def _videos(colors: list[float]) -> dict:
    scene, _ = scene_of(0, seed=0)
    scores = [dict.fromkeys(ATTRIBUTES, 1.0) | {"color": color} for color in colors]
    videos = [{"scores": s, "scene": scene.to_json()} for s in scores]
    return {"settings": {"num_prompts": len(videos)}, "videos": videos}


def test_shares_and_differences_are_those_of_the_scores() -> None:
    """Half right, where the judge is right in 4 of 5, is 62.5 % of the ceiling."""
    found = {CLEAN: _videos([1] * 10), CODEC: _videos([1] * 8 + [0] * 2)}
    found |= {"a": _videos([1] * 5 + [0] * 5), "b": _videos([1] * 6 + [0] * 4)}
    tables = unit_tables(found, units=("a", "b"))
    of_codec = next(rows for title, rows in tables.items() if title.endswith(CODEC))[0]
    assert of_codec["units"] == "a"
    assert of_codec["color"].mean == pytest.approx(0.625)
    (minus,) = next(rows for title, rows in tables.items() if title.startswith("Minus a"))
    assert minus["units"] == "b"
    assert minus["color"].mean == pytest.approx(0.1)
    assert minus["shape"].low <= 0 <= minus["shape"].high


def test_the_tables_hold_every_row(text: str, report: Report) -> None:
    """Behind the first table the markdown has one line per row, with as many cells as columns."""
    _, _, details = text.partition("\n\n")
    lines = [line for line in details.splitlines() if line.startswith("|")]
    tables = report["tables"]
    assert len(lines) == sum(map(len, tables.values())) + 2 * len(tables)
    assert all(line.count("|") == 10 for line in lines[:4])


def test_the_first_table_fits_a_readme(text: str, report: Report) -> None:
    """It is a whole table of four scores per kind, as `mean [low, high]`, without more words."""
    head, rule, *lines = text.partition("\n\n")[0].splitlines()
    assert head == "| units | colour | shape | motion | all right |"
    assert rule == "|---|---|---|---|---|".replace("---", " --- ")
    kinds = [CLEAN, CODEC, "frame", "cube:1x2x2"]
    assert [line.split(" | ")[0].strip("| ") for line in lines] == kinds
    rows = next(iter(report["tables"].values()))
    for line, row in zip(lines, rows, strict=True):
        for cell, key in zip(
            line.split(" | ")[1:], ("color", "shape", "motion", "all"), strict=True
        ):
            shown = [100 * row[key][name] for name in ("mean", "low", "high")]
            assert cell.strip(" |") == "{:.1f} [{:.1f}, {:.1f}]".format(*shown)


def test_the_file_holds_every_score(report: Report) -> None:
    """The tables can be made again from the videos in the file, to the last digit."""
    tables = unit_tables(report["entries"], units=("frame", "cube:1x2x2"))
    assert json.loads(json.dumps(tables, default=vars)) == report["tables"]


def test_finished_kinds_are_not_computed_again(
    report: Report, config: Evaluate, tmp_path: Path
) -> None:
    """A second run only adds what is new; a mark on an old result survives it."""
    kept = json.loads(json.dumps(report))
    kept["entries"]["frame"]["videos"][0]["mark"] = 7
    path = tmp_path / "report.json"
    path.write_text(json.dumps(kept))
    lines: list[str] = []
    evaluate(replace(config, out=path, units=("frame", "chunk:2"), long_prompts=0), lines.append)
    more = json.loads(path.read_text())["entries"]
    assert more["frame"]["videos"][0]["mark"] == 7
    assert {line.partition(": ")[0] for line in lines} == {"chunk:2"}
    assert "cube:1x2x2" in more


def test_results_of_other_settings_are_not_mixed(
    report: Report, config: Evaluate, tmp_path: Path
) -> None:
    """Another seed or other weights under the same name would make pairs of strangers."""
    with pytest.raises(ValueError, match=r"holds .* with seed = 0, but 1 is asked for"):
        evaluate(replace(config, seed=1), lambda line: None)
    other = tiny.tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    first, second = (Checkpoint.find(name).fingerprint() for name in (other, config.checkpoint))
    assert first != second


def test_a_foreign_file_is_left_alone(config: Evaluate, tmp_path: Path) -> None:
    """A file that is no evaluation is refused in one sentence, and stays as it is."""
    path = tmp_path / "notes.json"
    for notes in ("my notes", '{"parts": {}}'):  # the second is a file of 0.1
        path.write_text(notes)
        with pytest.raises(ValueError, match="holds no evaluation"):
            evaluate(replace(config, out=path), lambda line: None)
        assert path.read_text() == notes
    with pytest.raises(ValueError, match="does not exist"):
        evaluate(replace(config, out=tmp_path / "no" / "report.json"), lambda line: None)


def test_units_are_those_of_the_training_by_default(tmp_path: Path) -> None:
    """A model is not judged by what it never learned, unless it is asked for, and said."""
    pipe = tiny.tiny_pipeline()
    pipe.meta = {"units": ["chunk:2", "key-detail:2"]}
    pipe.prompt_encoder = replace(
        pipe.prompt_encoder, encoder=TextEncoder(replace(tiny.TEXT, max_tokens=256)).eval()
    )
    folder, lines = pipe.save_pretrained(tmp_path / "two"), []
    short = {"num_prompts": 2, "seconds": 2.0, "num_inference_steps": 1}
    config = Evaluate(checkpoint=str(folder), out=tmp_path / "report.json", **short)
    evaluate(config, lines.append)
    found = json.loads((tmp_path / "report.json").read_text())["entries"]
    assert set(found) >= {"chunk:2", "key-detail:2"}
    assert "frame" not in found
    assert not any("not trained" in line for line in lines)
    evaluate(replace(config, units=("chunk:2", "frame")), lines.append)
    (line,) = (line for line in lines if "not trained" in line)
    assert line.endswith("is not trained on frame, but on chunk:2, key-detail:2")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("units", ("frame", "frame"), "twice"),
        ("num_prompts", 1, "2 or more"),
        ("long_prompts", 1, "use 0"),
        ("seconds", 5.0, "2 to 4"),
        ("seconds", float("nan"), "2 to 4"),
        ("long_seconds", float("inf"), "8 or more"),
        ("batch_size", 0, "batch_size is 0: use 1"),
        ("seed", -1, "seed is -1: use 0"),
    ],
)
def test_impossible_requests_are_refused(field: str, value: object, message: str) -> None:
    """One sentence before any work, with the value and what to use."""
    with pytest.raises(ValueError, match=message):
        Evaluate(**{field: value})
    with pytest.raises(ValueError, match="Did you mean chunk"):
        evaluate(Evaluate(units=("chunks:2",)), lambda line: pytest.fail(line))


def test_an_impossible_step_count_fails_before_the_first_video(
    checkpoint: str, tmp_path: Path
) -> None:
    """Arguments that only the pipeline knows are checked for all kinds before hours of work."""
    config = Evaluate(checkpoint=checkpoint, num_inference_steps=0)
    with pytest.raises(ValueError, match="num_inference_steps is 0"):
        evaluate(config, lambda line: pytest.fail(line))
