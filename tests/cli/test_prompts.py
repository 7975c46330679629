"""`videoar generate --prompts`: a file of prompts becomes a folder of videos."""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_pipeline

from videoar.cli.main import main
from videoar.cli.prompts import Wanted, wanted
from videoar.data.video import VideoWriter, read_video

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `generate` in an empty folder with a tiny model: exit code, and what it printed."""
    monkeypatch.chdir(tmp_path)
    tiny_pipeline().save_pretrained("tiny")

    def generate(*words: object) -> tuple[int, str, str]:
        code = main(["generate", "--model", "tiny", "--num-frames", "5", *map(str, words)])
        return code, *capsys.readouterr()

    return generate


def test_prompts_names_and_seeds_are_read_from_text_json_and_tables(tmp_path: Path) -> None:
    """What is not said counts up; a video may be one of several of its prompt."""
    (tmp_path / "a.txt").write_text("a red ball\n\n a blue square \n")
    rows = [{"prompt": "a red ball", "name": "ball.mkv", "seed": 3}, {"prompt": "a blue square"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.csv").write_text('seed,prompt,name\n3,"a ball, red",v1.0\n,a blue square,\n')
    assert wanted(tmp_path / "a.txt", seed=5, count=1) == [
        Wanted("a red ball", "0001.mp4", 5),
        Wanted("a blue square", "0003.mp4", 6),
    ]
    assert wanted(tmp_path / "a.jsonl", seed=0, count=2) == [
        Wanted("a red ball", "ball-0.mkv", 3),
        Wanted("a red ball", "ball-1.mkv", 4),
        Wanted("a blue square", "0002-0.mp4", 2),
        Wanted("a blue square", "0002-1.mp4", 3),
    ]
    assert wanted(tmp_path / "a.csv", seed=0, count=1) == [
        Wanted("a ball, red", "v1.0.mp4", 3),
        Wanted("a blue square", "0003.mp4", 1),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "name": "../out"}, "'../out' cannot name a file in the folder"),
        ({"prompt": "a", "name": "/tmp/out"}, "cannot name a file"),
        ({"prompt": "a", "name": ".."}, "cannot name a file"),
        ({"prompt": "a", "name": "a\\b"}, "cannot name a file"),
        ({"prompt": "a", "name": "a\nb"}, "cannot name a file"),
        ({"prompt": "a", "name": ""}, "cannot name a file"),
        ({"prompt": "a", "name": "x" * 300}, "cannot name a file"),
        ({"prompt": "a", "name": "FIRST"}, "FIRST.mp4 is the name of another video"),
        ({"prompt": "a", "name": "e\u0301"}, "is the name of another video"),
        ({"prompt": "a", "sead": 3}, "'sead' is none of prompt, name, seed; did you mean seed?"),
        ({"prompt": "a", "seed": "x"}, "seed is 'x': use a whole number"),
        ({"prompt": "a", "seed": -1}, "seed is -1: use 0 or more"),
        ({"text": "a"}, "there is no prompt"),
        ([], "there is no prompt"),
    ],
    ids=str,
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, row: object, message: str) -> None:
    """Before anything is made; a name does not lead out of the folder, nor replace another's."""
    good = [{"prompt": "b", "name": name} for name in ("first", "\u00e9")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*good, row])))
    with pytest.raises(ValueError, match=r"line 3: ") as caught:
        wanted(tmp_path / "a.jsonl", seed=0, count=1)
    assert message in str(caught.value)


def test_what_is_there_is_skipped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an interruption the same command goes on; what was not whole is made anew."""
    Path("a.txt").write_text("a red ball\na blue square\na red ball")
    words, write, calls = ("--prompts", "a.txt", "--out", "out"), VideoWriter.write, []

    def stopped(self, frames):
        calls.append(self.path)
        write(self, frames)
        if len(set(calls)) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(VideoWriter, "write", stopped)
        code, _, error = run(*words)
    assert (code, "the same command goes on" in error) == (130, True)
    assert [path.name for path in Path("out").glob("*.mp4")] == ["0001.mp4"]
    code, out, error = run(*words)
    assert code == 0, error
    assert "1/3  out/0001.mp4 is there already and is skipped" in out
    assert "3/3  out/0003.mp4: 5 frames" in out
    assert sorted(path.name for path in Path("out").glob("*.mp4")) == [
        f"000{k}.mp4" for k in (1, 2, 3)
    ]
    code, _, error = run(*words, "--seed", "5", "--units", "frame")
    assert code == 2, "else the old ones would pass for these"
    assert "out holds videos with seed = 0, but 5 is asked for, and units = None" in error
    assert run("a red ball", "--seed", "2", "--out", "alone.mp4")[0] == 0
    assert np.array_equal(read_video("alone.mp4").frames, read_video("out/0003.mp4").frames)


def test_names_have_one_form(run: Run) -> None:
    """Letters with accents are written in two ways, which look alike and name two files."""
    for form in ("NFC", "NFD"):
        row = {"prompt": "a red ball", "name": unicodedata.normalize(form, "caf\u00e9")}
        Path("a.jsonl").write_text(json.dumps(row))
        assert run("--prompts", "a.jsonl", "--out", "out")[0] == 0
    assert len(list(Path("out").glob("*.mp4"))) == 1


def test_several_videos_of_one_prompt_need_a_folder(run: Run) -> None:
    """And one needs a prompt; options that contradict each other are refused."""
    assert run("a red ball", "--num-videos-per-prompt", "2", "--out", "out")[0] == 0
    assert sorted(path.name for path in Path("out").glob("*.mp4")) == ["0001-0.mp4", "0001-1.mp4"]
    Path("a.txt").write_text("a red ball\n" + "ball " * 300)
    Path("none.txt").write_text("\n\n")
    Path("odd.csv").write_bytes(b"prompt\n\xff")
    for words, message in (
        (("--prompts", "a.txt"), "name a folder"),
        ((), "no PROMPT is given"),
        (("a red ball", "--prompts", "a.txt", "--out", "b"), "leave out prompt"),
        (("--prompts", "gone.txt", "--out", "b"), "No such file"),
        (("--prompts", "none.txt", "--out", "b"), "holds no prompt"),
        (("--prompts", "odd.csv", "--out", "b"), "save it as UTF-8"),
        (("--prompts", "a.txt", "--out", "b"), "tokens, but the limit is 24"),
    ):
        code, _, error = run(*words)
        assert (code, error.count("\n")) == (2, 1)
        assert message in error
        assert not list(Path().glob("b/*"))


def test_processes_share_the_videos_of_a_file(run: Run, tmp_path: Path) -> None:
    """Each makes its own, and together all; a share of one video would be nothing or all."""
    (tmp_path / "a.txt").write_text("a red ball\na blue square\na red square\n")
    for share, names in (("2/2", ["0002"]), ("1/2", ["0001", "0002", "0003"])):
        code, _, error = run("--prompts", "a.txt", "--out", "out", "--share", share)
        assert code == 0, error
        assert sorted(path.stem for path in (tmp_path / "out").glob("*.mp4")) == names
    code, _, error = run("a red ball", "--share", "1/2")
    assert code == 2
    assert "--share 1/2 parts many videos: give --prompts" in error
    code, _, error = run("--prompts", "a.txt", "--share", "3/2")
    assert code == 2
    assert "share is 3/2: use K/N with K up to N" in error
