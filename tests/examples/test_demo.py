"""The first command that a stranger runs, `make demo`."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from examples.demo import STORY, main, side_by_side, upscale
from jaxtyping import UInt8
from PIL import Image
from tiny import TEXT, tiny_pipeline

from videoar.core.schemes import KINDS
from videoar.data.video import Video, read_video
from videoar.encoders.text_encoder import TextEncoder, TinyPromptEncoder


@pytest.mark.slow
def test_the_demo_makes_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends in two videos and a table over all kinds."""
    monkeypatch.chdir(tmp_path)
    pipe = tiny_pipeline()
    encoder = TextEncoder(replace(TEXT, max_tokens=96)).eval()
    pipe.prompt_encoder = TinyPromptEncoder(pipe.prompt_encoder.tokenizer, encoder)
    checkpoint = str(pipe.save_pretrained(tmp_path / "tiny"))
    story = str(STORY.parent.with_name("story.txt"))
    words = ["--model", checkpoint, "--script", story, "--seconds", "5", "--out", "demo"]
    assert main(words) == 0
    assert len(read_video("demo/minute.mp4").frames) == 80
    with Image.open("demo/units.webp") as picture:
        assert picture.n_frames > 1
    out = capsys.readouterr().out
    table = out[out.rindex("units  ") :]
    assert all(kind in table for kind in KINDS)


def test_what_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, before anything is generated."""
    monkeypatch.chdir(tmp_path)
    assert main(["--out", "missing/demo"]) == 2
    assert "missing does not exist" in capsys.readouterr().err
    assert main(["--seconds", "0"]) == 2
    assert "seconds is 0" in capsys.readouterr().err


def _noise(num_frames: int, height: int, width: int) -> UInt8[np.ndarray, "frames height width 3"]:
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def test_upscaling_repeats_pixels() -> None:
    """Every pixel becomes a square, so taking every n-th gives the original back."""
    frames = _noise(2, 3, 5)
    large = upscale(frames, 3)
    for dy in range(3):
        for dx in range(3):
            assert np.array_equal(large[:, dy::3, dx::3], frames)


def test_side_by_side_shows_each_video_below_its_label() -> None:
    """Tiles hold the enlarged frames in order, short videos their last frame, labels have ink."""
    first, second = _noise(4, 32, 48), _noise(2, 32, 48) // 2
    both = side_by_side(
        [Video(frames=first, fps=16), Video(frames=second, fps=16)], ["frame", "cube"], scale=2
    )
    assert both.fps == 16
    assert len(both.frames) == 4
    top = 4 + 20
    assert np.array_equal(both.frames[:, top : top + 64, 4:100], upscale(first, 2))
    tile = both.frames[:, top : top + 64, 104:200]
    assert np.array_equal(tile, upscale(second, 2)[[0, 1, 1, 1]])
    for left in (4, 104):
        assert both.frames[0, 4:24, left : left + 96].min() < 100


def test_side_by_side_refuses_what_does_not_match() -> None:
    """Sizes, speeds and numbers of labels must agree; nothing is resized in silence."""
    small = Video(frames=_noise(1, 4, 4), fps=16)
    with pytest.raises(ValueError, match="1 videos have 2 labels"):
        side_by_side([small], ["a", "b"])
    with pytest.raises(ValueError, match=r"\(4, 4, 8.0\).*\(4, 4, 16.0\)"):
        side_by_side([small, Video(frames=_noise(1, 4, 4), fps=8)], ["a", "b"])
