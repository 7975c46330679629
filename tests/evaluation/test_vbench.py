"""`videoar vbench`: the prompts of VBench become videos, and its scores a table.

VBench itself stands in another environment. What stands in for it here reads and writes the files
that it does; the last test asks the real one, if `VIDEOAR_VBENCH_PYTHON` names its Python.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_pipeline

from videoar.cli.main import main
from videoar.data.video import Video, read_video
from videoar.evaluation.metrics import bootstrap_interval
from videoar.evaluation.vbench import DIMENSIONS, FLICKER

Run = Callable[..., tuple[int, str, str]]
SCENE = {"dimension": ["scene", "background_consistency"]}
INFO = [
    {"prompt_en": "a still ball", "dimension": [FLICKER]},
    {"prompt_en": "alley", **SCENE, "auxiliary_info": {"scene": {"scene": {"scene": "alley"}}}},
    {"prompt_en": "a red-ish ball", "dimension": ["overall_consistency"]},
    {"prompt_en": "Alley", "dimension": ["overall_consistency"]},
]
STAND_IN = '''
"""Scores are those of a file; what lacks weights fails as the package does."""
import json
from pathlib import Path

class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.info, self.out = json.loads(Path(full_info_dir).read_text()), Path(output_path)

    def evaluate(self, videos_path, name, dimension_list):
        (dimension,) = dimension_list
        held = json.loads(Path(__file__).with_name("scores.json").read_text())[dimension]
        if held == "missing":
            raise RuntimeError("Command '['wget', 'https://there/weights.pth']' returned status 4")
        prompts = [one["prompt_en"] for one in self.info if dimension in one["dimension"]]
        files = [Path(videos_path) / f"{p}-{k}.mp4" for p in prompts for k in range(5)]
        rows = [(str(f), held[f.name]) for f in files if f.is_file()]
        mean = sum(value for _, value in rows) / len(rows)
        mean /= 100 if dimension == "imaging_quality" else 1
        found = [{"video_path": path, "video_results": value} for path, value in rows]
        text = json.dumps({dimension: [mean, found]})
        (self.out / f"{name}_eval_results.json").write_text(text)
'''


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `vbench` in an empty folder with a small list: exit code, and what it printed."""
    monkeypatch.chdir(tmp_path)
    Path("info.json").write_text(json.dumps(INFO))

    def vbench(*words: object) -> tuple[int, str, str]:
        code = main(["vbench", *map(str, words)])
        return code, *capsys.readouterr()

    return vbench


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The Python of an environment in which something stands in for VBench."""
    package = tmp_path / "environment" / "vbench"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    about = package.with_name("vbench-0.1.5.dist-info")
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vbench\nVersion: 0.1.5\n")
    (package / "VBench_full_info.json").write_text(json.dumps(INFO))
    script = tmp_path / "python"
    # It needs no torch but its name.
    (package.parent / "torch.py").write_text("device = str\n")
    script.write_text(f'#!/bin/sh\nPYTHONPATH={package.parent} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return script


def scored(run: Run, python: Path, folder: str, scores: dict[str, list[list[float]]]) -> str:
    """Score videos that get these scores, by dimension, prompt and video; return the table."""
    names = {k: {f"{k} {p}-{v}.mp4": x for p, own in enumerate(prompts) for v, x in enumerate(own)}
             for k, prompts in scores.items()}  # fmt: skip
    info = [
        {"prompt_en": f"{name} {p}", "dimension": [name]}
        for name, prompts in scores.items()
        for p in range(len(prompts))
    ]
    Path("info.json").write_text(json.dumps(info))
    package = python.parent / "environment" / "vbench"
    (package / "scores.json").write_text(json.dumps(names))
    Path(folder, "videos").mkdir(parents=True)
    for name in (name for own in names.values() for name in own):
        Path(folder, "videos", name).write_bytes(name.encode())
    asked = ("--info", "info.json", "--dimensions", *scores)
    code, out, error = run("score", folder, "--python", python, *asked)
    assert code == 0, error
    return out


def test_every_prompt_has_its_videos_names_and_seeds(run: Run) -> None:
    """As VBench looks for them; 25 for temporal flickering; the later of two equal names counts."""
    code, out, _ = run("prompts", "--info", "info.json", "--seed", "7")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert len(rows) == 25 + 5 + 5
    assert rows[24] == {"prompt": "a still ball", "name": "a still ball-24.mp4", "seed": 31}
    assert rows[25] == {"prompt": "Alley", "name": "Alley-0.mp4", "seed": 300007}
    assert rows[-1] == {"prompt": "a red-ish ball", "name": "a red-ish ball-4.mp4", "seed": 200011}
    few = ("--dimensions", "overall_consistency", "scene", "--limit", "1")
    _, out, _ = run("prompts", "--info", "info.json", *few)
    names = [json.loads(line)["name"] for line in out.splitlines()]
    assert names[::5] == ["alley-0.mp4", "a red-ish ball-0.mp4"]


def test_extended_prompts_keep_the_names_of_the_short_ones(run: Run) -> None:
    """VBench looks for the short prompt; a file of another length is of another list."""
    Path("long.txt").write_text("a ball, still\na long alley\na ball, reddish\nAn alley\n")
    how = ("prompts", "--info", "info.json", "--extended", "long.txt", "--dimensions", "scene")
    _, out, _ = run(*how)
    assert json.loads(out.splitlines()[0]) == {
        "prompt": "a long alley",
        "name": "alley-0.mp4",
        "seed": 100000,
    }
    Path("long.txt").write_text("a ball, still\n")
    code, _, error = run(*how)
    assert code == 2
    assert "lines of long.txt is 1: use 4, as of info.json" in error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--python", sys.executable], "has no vbench: `pip install vbench` into an environment"),
        (["--python", "nowhere/python"], "nowhere/python"),
        (["--info", "other.json"], "other.json holds no prompts of VBench"),
        (["--info", "info.json", "--dimensions", "scenes"], "did you mean scene?"),
        (["--info", "info.json", "--limit", "0"], "limit is 0: use 1 or more"),
    ],
    ids=str,
)
def test_what_is_no_vbench_is_said(run: Run, words: list[str], says: str) -> None:
    """In a sentence with what to do."""
    Path("other.json").write_text('[{"prompt": "alley"}]')
    code, _, error = run("prompts", *words)
    assert code == 2
    assert says in error
    assert len(error.splitlines()) == 1


def test_a_run_is_made_in_shares_by_one_protocol(run: Run) -> None:
    """Shares are the whole; what is there is kept; other settings would mix two runs."""
    tiny_pipeline().save_pretrained("tiny")
    how = ("--info", "info.json", "--dimensions", "overall_consistency", "--model", "tiny")
    how = ("generate", "run", *how, "--num-frames", "5")
    code, out, error = run(*how, "--share", "1/2")
    assert code == 0, error
    assert len(list(Path("run/videos").iterdir())) == 5
    assert "Alley-1.mp4: 5 frames" in out
    code, out, _ = run(*how)
    assert code == 0
    assert out.count("is there already and is skipped") == 5
    names = {f"{prompt}-{k}.mp4" for prompt in ("a red-ish ball", "Alley") for k in range(5)}
    assert {path.name for path in Path("run/videos").iterdir()} == names
    told = json.loads(Path("run/vbench.json").read_text())
    assert told["seeds"] == "100000 * prompt + video + 0"
    assert told["units"] == "cube:1x2x2"
    assert told["size"].endswith("x 5 frames")
    assert told["checkpoint"].startswith("tiny ")
    code, _, error = run(*how, "--num-inference-steps", "3")
    assert code == 2
    assert "run holds videos with num_inference_steps" in error


def test_a_prompt_that_names_no_file_is_refused(run: Run) -> None:
    """VBench looks for the prompt itself, so a slash has no other spelling."""
    Path("info.json").write_text(json.dumps([{"prompt_en": "on/off", "dimension": ["scene"]}]))
    code, _, error = run("generate", "run", "--info", "info.json")
    assert code == 2
    assert "'on/off-0.mp4' cannot name a file in the folder" in error
    assert not Path("run").exists()


def test_dimensions_are_scored_alone_and_kept(run: Run, python: Path) -> None:
    """One that fails or takes too long is named with what it needs, and holds up no other."""
    package = python.parent / "environment" / "vbench"
    names = [f"{prompt}-{k}.mp4" for prompt in ("alley", "a still ball") for k in range(2)]
    scores = dict.fromkeys(names, 0.75) | {"alley-0.mp4": 0.25}
    held = {FLICKER: scores, "scene": "missing"}
    (package / "scores.json").write_text(json.dumps(held))
    Path("run/videos").mkdir(parents=True)
    for name in names:
        Path("run/videos", name).write_bytes(b"a video")
    one = ("--dimensions", "background_consistency", "--timeout", "0.000001")
    code, out, error = run("score", "run", "--python", python, *one)
    assert code == 2
    assert "background_consistency is not scored: 1e-06 s were too few, raise --timeout" in out
    assert "run holds no scores of VBench" in error
    code, out, error = run("score", "run", "--python", python)
    assert code == 0, error
    assert f"{FLICKER}: 2 of 5 videos are there" in out
    assert "| temporal flickering | 75.00 (2 videos, 1 of 1 prompts) |" in out
    assert (
        "scene is not scored: RuntimeError: Command '['wget', 'https://there/weights.pth']'" in out
    )
    assert "it needs the weights tag2text_swin_14m.pth" in out
    assert "color is not scored: there is none of its videos" in out
    assert "run has no total without subject consistency, background consistency, motion" in out
    assert "| static filter | no |" in out
    assert "| scored by | vbench 0.1.5 on cpu |" in out
    (package / "scores.json").write_text(json.dumps(held | {"scene": scores}))
    _, out, _ = run("score", "run", "--python", python)
    assert f"{FLICKER} is scored already" in out
    assert "| scene | 50.00 (2 videos, 1 of 1 prompts) |" in out
    Path("run/videos/a still ball-0.mp4").write_bytes(b"another video")
    _, out, _ = run("score", "run", "--python", python, "--dimensions", FLICKER)
    assert f"{FLICKER}: 2 of 5 videos are there" in out


def test_the_total_is_the_published_one(run: Run, python: Path) -> None:
    """0 where every dimension is at its floor, 100 at its ceiling; dynamics count half.

    Of one prompt for each dimension nothing is known of their spread.
    """
    low, high = ({k: d[side] for k, d in DIMENSIONS.items()} for side in ("low", "high"))
    fast = low | {"dynamic_degree": 1.0}
    for folder, values in {"low": low, "high": high, "fast": fast}.items():
        values["imaging_quality"] *= 100  # as VBench gives those of videos
        out = scored(run, python, folder, {name: [[value]] for name, value in values.items()})
        total = {"low": 0.0, "high": 100.0, "fast": 80 * 0.5 / 6.5}[folder]
        assert f"| total | {total:.2f} |" in out.replace("-0.00", "0.00")


def test_intervals_are_over_prompts_and_differences_in_pairs(run: Run, python: Path) -> None:
    """Videos of a prompt are one observation, and what makes a prompt hard for both cancels."""
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.2, 0.8, size=(20, 1)).repeat(5, axis=1)
    first = scored(run, python, "first", {"scene": hard.tolist()})
    mean = bootstrap_interval(hard.mean(1)).times(100)
    assert f"| scene | {mean:.2f} (100 videos, 20 of 20 prompts) |" in first
    scored(run, python, "second", {"scene": (hard - 0.1).tolist()})
    code, out, _ = run("table", "first", "--against", "second")
    assert code == 0
    (line,) = (line for line in out.splitlines() if line.startswith("| scene"))
    assert line.endswith("| 10.00 [10.00, 10.00] |")
    assert "| protocol | first | second |" in out
    code, _, error = run("table", ".")
    assert code == 2
    assert "holds no scores of VBench: `videoar vbench score` makes them" in error


@pytest.mark.skipif(
    "VIDEOAR_VBENCH_PYTHON" not in os.environ,
    reason="needs VBench: let VIDEOAR_VBENCH_PYTHON name the Python of its environment",
)
def test_the_real_vbench_scores_flickering(run: Run) -> None:
    """Its prompts, names and formats are those that are read here."""
    python = os.environ["VIDEOAR_VBENCH_PYTHON"]
    how = ("--python", python, "--dimensions", FLICKER)
    _, out, _ = run("prompts", *how, "--limit", "2")
    names = [json.loads(line)["name"] for line in out.splitlines()][::25]
    Path("run/videos").mkdir(parents=True)
    rng, expected = np.random.default_rng(0), []
    for name in names:
        path = Path("run/videos", name)
        Video(frames=rng.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8), fps=8.0).save(path)
        frames = read_video(path).frames.astype(float)
        expected.append(1 - np.abs(np.diff(frames, axis=0)).mean() / 255)
    code, out, error = run("score", "run", *how)
    assert code == 0, error
    held = json.loads(Path(f"run/scores/{FLICKER}.json").read_text())
    assert [name for name, _ in held["scores"]] == names
    assert [value for _, value in held["scores"]] == pytest.approx(expected, abs=0.005)
    assert f"| temporal flickering | {100 * held['value']:.2f} [" in out
