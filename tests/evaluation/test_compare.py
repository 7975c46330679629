"""Comparison: pairs, intervals, and nothing computed twice."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from tiny import TEXT, tiny_pipeline

from videoar.cli.main import main
from videoar.encoders.text_encoder import TextEncoder, TinyPromptEncoder
from videoar.evaluation.metrics import frechet_distance, frechet_interval
from videoar.evaluation.study import features, read_line, read_overrides
from videoar.generation.config import GenerationConfig

SMALL = ["--num-prompts", "3", "--seconds", "1.5", "--units", "frame"]


def test_frechet_distance_is_the_closed_form() -> None:
    """Shifted and scaled Gaussians: squared shift plus squared difference of deviations."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((50_000, 3))
    second = 2 * rng.standard_normal((50_000, 3)) + np.array([3.0, 0, 0])
    assert frechet_distance(first, second) == pytest.approx(9 + 3, rel=0.02)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


def test_frechet_interval_holds_the_distance_of_many() -> None:
    """Drawing anew adds distance; the interval of few videos still holds what many have."""
    rng = np.random.default_rng(1)
    held = 0
    for seed in range(20):
        first, second = rng.standard_normal((100, 2)), rng.standard_normal((100, 2)) + 1
        found = frechet_interval(first, second, seed=seed)
        held += found.low <= 2.0 <= found.high
    assert held >= 16


def test_features_tell_videos_apart() -> None:
    """Another background, another speed: another place."""
    still = np.zeros((1, 9, 64, 64, 3), dtype=np.uint8)
    bright, moving = np.full_like(still, 200), still.copy()
    for t in range(9):
        moving[0, t, 20:40, 4 * t : 4 * t + 20] = 255
    places = [features(frames)[0] for frames in (still, bright, moving)]
    assert np.array_equal(features(still)[0], places[0])
    assert min(np.linalg.norm(a - b) for a, b in ((places[0], places[1]), places[1:])) > 0.1


def test_entries_name_one_or_several_checkpoints() -> None:
    """Seeds of training belong together under one name."""
    assert read_line("full=a,b") == ("full", ("a", "b"))
    assert read_line("toy?units=frame") == ("toy?units=frame", ("toy?units=frame",))
    assert read_line("runs/a/checkpoint") == ("runs/a/checkpoint", ("runs/a/checkpoint",))
    commas = "toy?units=multiscale:4,2,1/frames=3", "toy?sigmas=[1,0.5,0]&shift=3"
    assert read_line(commas[0]) == (commas[0], (commas[0],))
    assert read_line(f"full={','.join(commas)},b") == ("full", (*commas, "b"))
    for bad in ("", "=a", "full=", "full=a,"):
        with pytest.raises(ValueError, match="names nothing"):
            read_line(bad)


def test_checkpoints_are_compared_in_pairs(tmp_path: Path, capsys) -> None:
    """A table of scores, one of differences; the second time nothing is made again."""
    pipe = tiny_pipeline()
    encoder = TextEncoder(dataclasses.replace(TEXT, max_tokens=96)).eval()
    pipe.prompt_encoder = TinyPromptEncoder(pipe.prompt_encoder.tokenizer, encoder)
    folders = [str(pipe.save_pretrained(tmp_path / name)) for name in ("a", "b")]
    out = tmp_path / "scores.json"
    words = ["compare", f"one={folders[0]}", f"two={folders[0]},{folders[1]}", *SMALL]
    words += ["--long-prompts", "2", "--long-seconds", "8", "--out", str(out)]
    assert main(words) == 0
    said = capsys.readouterr().out
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith("| ")]
    heads = [row[0] for row in rows]
    assert heads == [
        *("| videos of", "| ---", "| real clips", "| real clips through the codec"),
        *("| one", "| two"),
        *("| minus the first", "| ---", "| two"),
        *("| last - first 4 s", "| ---", "| one", "| two"),
    ]
    assert rows[2][4] == "100.0 [100.0, 100.0]"
    assert rows[8][1] == "0.0 [0.0, 0.0]"  # the same weights, prompts and noise
    found = json.loads(out.read_text())["entries"]
    assert found[f"one {folders[0]}"]["videos"] == found[f"two {folders[1]}"]["videos"]
    assert "one " in said.split("| videos of")[0]
    assert main(words) == 0
    again = capsys.readouterr().out
    assert again.startswith("| videos of")
    assert again[again.index("| videos of") :] == said[said.index("| videos of") :]


def test_fields_of_the_sampling_may_follow_a_name() -> None:
    """The same checkpoint with and without guidance is a comparison, too."""
    overrides = read_overrides("guidance_scale=2.5&units=frame&num_inference_steps=2")
    changed = GenerationConfig(sigmas=(1.0, 0.0)).replaced(**overrides)
    assert (changed.guidance_scale, changed.units, changed.num_inference_steps) == (2.5, "frame", 2)
    assert changed.sigmas is None
    assert read_overrides("") == {}
    for bad in ("guidance=2", "shift"):
        with pytest.raises(ValueError, match="changes no field of the sampling"):
            read_overrides(bad)


def test_two_entries_of_one_name_are_refused(capsys) -> None:
    """Their rows could not be told apart."""
    assert main(["compare", "a=toy", "a=toy"]) == 2
    assert "two entries have one name" in capsys.readouterr().err
