"""The first command that a stranger runs, `make demo`."""

from dataclasses import replace
from pathlib import Path

import pytest
from examples.demo import main
from PIL import Image
from tiny import TEXT, tiny_pipeline

from videoar.core.schemes import KINDS
from videoar.data.video import read_video
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
    assert main(["--model", checkpoint, "--seconds", "5", "--out", "demo"]) == 0
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
