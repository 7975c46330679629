"""A study: designs are data, a killed one goes on, its statistics are right, its report opens."""

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import TEXT, tiny_pipeline

from videoar.cli.main import main
from videoar.core.schemes import parse
from videoar.core.units import Units
from videoar.encoders.text_encoder import TextEncoder, TinyPromptEncoder
from videoar.evaluation import designs
from videoar.evaluation.designs import find
from videoar.evaluation.entries import features, read_line, read_overrides
from videoar.evaluation.metrics import frechet_distance, frechet_interval, seams, student
from videoar.evaluation.options import Study
from videoar.evaluation.statistics import difference, holm
from videoar.generation.config import GenerationConfig
from videoar.generation.pipeline import VideoPipeline
from videoar.generation.router import Router, RouterConfig

# What is made once is made by one worker.
pytestmark = pytest.mark.xdist_group("study")

Lines = list[str]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Lines:
    """Two tiny checkpoints of the same weights."""
    pipe = tiny_pipeline()
    encoder = TextEncoder(dataclasses.replace(TEXT, max_tokens=96)).eval()
    pipe.prompt_encoder = TinyPromptEncoder(pipe.prompt_encoder.tokenizer, encoder)
    place = tmp_path_factory.mktemp("checkpoints")
    return [str(pipe.save_pretrained(place / name)) for name in ("a", "b")]


@pytest.fixture(scope="module")
def words(checkpoints: Lines) -> Lines:
    """A study of two lines, one of them with two trainings."""
    lines = [f"one={checkpoints[0]}", f"two={checkpoints[0]},{checkpoints[1]}"]
    more = ["--num-prompts", "3", "--seeds", "1", "--seconds", "1.5", "--units", "frame"]
    return ["study", "checkpoints", "--checkpoint", *lines, *more, "--batch-size", "2"]


@pytest.fixture(scope="module")
def done(words: Lines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that was never killed."""
    folder = tmp_path_factory.mktemp("study") / "out"
    assert main([*words, "--out", str(folder)]) == 0
    return folder


def rows(folder: Path) -> dict[tuple[str, int], Any]:
    """Return what a study measured of videos, but for what was torn."""
    texts = [path.read_text() for path in (folder / "figures").iterdir()]
    lines = [line for text in texts for line in text.splitlines() if line.endswith("}")]
    found = [json.loads(line) for line in lines if line.startswith("{")]
    assert len({(row["entry"], row["index"]) for row in found}) == len(found)
    return {(row["entry"], row["index"]): row for row in found if row["index"] >= 0}


# ---------------------------------------------------------------- the command


def test_checkpoints_are_compared_in_pairs(done: Path) -> None:
    """The same weights, prompts and noise make the same videos, whose difference is nothing."""
    found = rows(done)
    for k in range(3):
        same = {key: found[key, k] | {"entry": ""} for key in ("one frame #1", "two frame #2")}
        assert same["one frame #1"] == same["two frame #2"]
    text = (done / "report.md").read_text()
    (row,) = (line for line in text.splitlines() if line.startswith("| two frame | 0.0 [0.0, 0.0]"))
    assert row.count("none, no spread, p 1") == 4
    assert "| real clips | 100.0 [100.0, 100.0]" in text


def test_no_difference_is_larger_than_a_score_can_be(
    words: Lines, done: Path, tmp_path: Path
) -> None:
    """Three prompts have an interval of hundreds of points, and would have shown nothing."""
    folder = tmp_path / "few"
    shutil.copytree(done, folder)
    for path in (folder / "figures").iterdir():
        lines = list(map(json.loads, filter(None, path.read_text().splitlines())))
        for line in lines:
            if line["entry"].startswith("two frame") and line["index"] >= 0:
                line["scores"]["shape"] = float(line["index"] == 1)
            elif line["index"] >= 0:
                line["scores"]["shape"] = 0.5
        path.write_text("\n".join(map(json.dumps, lines)))
    assert main([*words, "--out", str(folder)]) == 0
    text = (folder / "report.md").read_text()
    assert "| -16.7 [-100.0, 100.0] none, too few, p 1 |" in text


def test_a_killed_study_goes_on(words: Lines, done: Path, tmp_path: Path, capsys) -> None:
    """Shares of it, of which one was killed in a line, hold what one never killed holds."""
    folder = tmp_path / "killed"
    shutil.copytree(done, folder)
    path = folder / "figures" / "1-of-1.jsonl"
    text = path.read_text()
    path.write_text(text[: int(0.6 * len(text))])
    (folder / "report.html").unlink()
    assert main([*words, "--out", str(folder), "--share", "2/2"]) == 0
    said = capsys.readouterr().out
    assert "is torn" in said
    assert not (folder / "report.html").exists()
    assert main([*words, "--out", str(folder), "--share", "1/2"]) == 0
    assert (folder / "report.html").exists()
    assert rows(folder) == rows(done)
    before = {file: file.read_bytes() for file in folder.rglob("*.jsonl")}
    assert main([*words, "--out", str(folder)]) == 0  # nothing is made again
    assert before == {file: file.read_bytes() for file in folder.rglob("*.jsonl")}


def test_a_study_of_an_older_version_goes_on(words: Lines, done: Path, tmp_path, capsys) -> None:
    """A design has got a field since, which is at its default."""
    shutil.copytree(done, folder := tmp_path / "study")
    held = json.loads((folder / "study.json").read_text())
    del held["asked"]["design"]["at_least"]
    (folder / "study.json").write_text(json.dumps(held))
    assert main([*words, "--out", str(folder)]) == 0
    assert "of an older version, which goes on with design.at_least = 1" in capsys.readouterr().err


def test_what_is_there_is_not_mixed_or_lost(words: Lines, done: Path, tmp_path, capsys) -> None:
    """Another seed in the same folder would make pairs of strangers; other files are left alone."""
    assert main([*words, "--out", str(done), "--seed", "5"]) == 2
    assert "seed = 0, but 5 is asked for" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("mine")
    assert main([*words, "--out", str(tmp_path)]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert main([*words[:3], "a=toy", "a=toy-base", "--out", str(tmp_path / "no")]) == 2
    assert "two checkpoints have one name" in capsys.readouterr().err


def test_what_a_checkpoint_never_learned_is_said(tmp_path: Path, capsys) -> None:
    """Noisy units, shown to a model of clean context, explain figures that nothing else does."""
    words = ["study", "checkpoints", "--checkpoint", "a=toy-base?lag=1", "--seeds", "1"]
    out = tmp_path / "out"
    assert main([*words, "--num-prompts", "2", "--seconds", "1.5", "--out", str(out)]) == 0
    line = "the model was trained on clean context, and reads noisy units with lag 1."
    assert f"toy-base: {line}" in capsys.readouterr().out
    assert line in (out / "report.md").read_text()


class _Page(HTMLParser):
    """What a page would load, and the data in it."""

    def __init__(self) -> None:
        super().__init__()
        self.sources, self.open, self.data = [], [], ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.sources += [given[name] for name in ("src", "href") if name in given]
        self.open.append(given.get("id"))

    def handle_data(self, data: str) -> None:
        self.data += data if self.open[-1:] == ["data"] and not self.data else ""


def test_units_that_are_chosen_are_made_one_by_one(checkpoints: Lines, tmp_path: Path) -> None:
    """No video has those of another; beside kinds of unit that stay, and without a lattice."""
    pipe = VideoPipeline.from_pretrained(checkpoints[0])
    pipe.router = Router(
        RouterConfig(menu=("frame", "chunk:2"), latent_channels=4, text_channels=24)
    )
    folder, out = pipe.save_pretrained(tmp_path / "routed"), tmp_path / "study"
    design: dict[str, Any] = {
        "units": ["frame", "auto"],
        "steps": [1],
        "num_prompts": 2,
        "seeds": 1,
    }
    (file := tmp_path / "design.json").write_text(json.dumps(design | {"seconds": 1.5, "keep": 1}))
    assert main(["study", str(file), "--checkpoint", str(folder), "--out", str(out)]) == 0
    assert "| auto steps 1 |" in (out / "report.md").read_text()
    assert {name.split()[0] for name, _ in rows(out)} >= {"frame", "auto"}


def test_the_report_opens_offline(done: Path) -> None:
    """Nothing is loaded from elsewhere, the videos are there, and no text ends the script."""
    page, text = _Page(), (done / "report.html").read_text()
    page.feed(text)
    assert page.sources == []
    assert not re.search(r"(src|href)=.?.?https?:", text)  # names of formats are no addresses
    data = json.loads(page.data)
    assert len(data["text"]) == 4
    assert [row["prompt"] for row in data["videos"]]
    for row in data["videos"]:
        assert all((done / shown["file"]).stat().st_size for shown in row["lines"].values())
    assert "<" not in page.data


def test_the_report_shows_in_a_browser(done: Path) -> None:
    """A browser runs it without an error and without a request to elsewhere, and videos play."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no browser")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page, said, asked = browser.new_page(), list[str](), list[str]()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(done.joinpath("report.html").as_uri())
        page.wait_for_selector("video")
        page.click("#play")
        cells = page.locator("#tables a").count()
        browser.close()
    assert not said
    assert all(url.startswith("file://") for url in asked)
    assert cells > 20


# ---------------------------------------------------------------- designs


@pytest.mark.parametrize("name", list(designs.shipped()))
def test_designs_that_ship_are_right(name: str, checkpoints: Lines) -> None:
    """Each can be read, asks something, and lays its units over the lattice of the toy."""
    lines = ("a=toy", "b=toy-base")
    design = find(Study(design=name, checkpoint=lines))
    quick = find(Study(design=name, checkpoint=lines, quick=True))
    assert design.about.endswith(("?", "."))
    assert (quick.num_prompts, quick.seeds) == (12, 1)
    assert quick.seconds <= 9
    for cell in design.cells():
        units = Units(parse(cell.get("units", "frame")), 8, 4, 4)
        GenerationConfig(**cell).visible(units)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(designs.shipped()))
def test_designs_that_ship_run(name: str, checkpoints: Lines, tmp_path: Path) -> None:
    """Each ends in a report of all that it compares, at tiny size; a new one is run by this."""
    both = [f"{name}={path}" for name, path in zip("ab", checkpoints, strict=True)]
    lines = both[: find(Study(design=name, checkpoint=tuple(both))).at_least]
    few = ["--num-prompts", "2", "--seeds", "1", "--seconds", "1.5"]
    words = ["study", name, "--checkpoint", *lines, *few, "--out", str(tmp_path / "out")]
    assert main(words) == 0
    held = json.loads((tmp_path / "out" / "study.json").read_text())
    assert (tmp_path / "out" / "report.html").exists()
    text = (tmp_path / "out" / "report.md").read_text()
    for title, names in held["groups"].items():
        quality, _, _ = text.partition(f"## Quality, {title}\n")[2].partition("##")
        assert names
        assert all(f"\n| {each} |" in quality for each in names)


def test_a_design_of_ones_own_is_a_file(tmp_path: Path, capsys) -> None:
    """It holds fields of a design, and what is wrong with it is a sentence."""
    path = tmp_path / "mine.json"
    path.write_text('{"units": ["frame", "chunk:2"], "steps": [1, 2], "windows": [4, "all"]}')
    design = find(Study(design=str(path), num_prompts=5))
    assert (design.steps, design.num_prompts) == ((1, 2), 5)
    assert design.cells()[1] == {"units": "frame", "window_frames": None}
    for text, says in (
        ("[1]", "holds no design"),
        ("{", "cannot be read"),
        ('{"unit": 1}', "design (unit): write some of about"),
        ('{"units": ["frames"]}', "Did you mean frame"),
        ('{"units": ["frame", "frame"]}', "none twice"),
        ('{"seconds": "long"}', "seconds is 'long'"),
        ('{"equal": ["passes"]}', "units beside it"),
    ):
        path.write_text(text)
        assert main(["study", str(path), "--out", str(tmp_path / "out")]) == 2
        assert says in capsys.readouterr().err
    assert main(["study", "unit"]) == 2
    assert "did you mean units" in capsys.readouterr().err
    with pytest.raises(ValueError, match="2 or more"):
        find(Study(design="critics"))


# ---------------------------------------------------------------- statistics


def _simulated(seed: int, *, trainings: int, effect: float) -> tuple[np.ndarray, np.ndarray]:
    """Return two sides of 24 prompts, the second worse by the effect."""
    rng = np.random.default_rng(seed)
    easy = 3 * rng.standard_normal(24)  # what makes a prompt easy for both

    def side(mean: float) -> np.ndarray:
        trained = 0.3 * rng.standard_normal((trainings, 1)) * (trainings > 1)
        return mean + easy + trained + 0.7 * rng.standard_normal((trainings, 24))

    return side(effect), side(0.0)


@pytest.mark.parametrize("trainings", [1, 3])
def test_what_is_not_there_is_rarely_found(trainings: int) -> None:
    """At 5 % one in twenty comparisons of the same thing differs, not more, and pairs matter."""
    found = [difference(*_simulated(seed, trainings=trainings, effect=0.0)) for seed in range(400)]
    assert sum(one.p < 0.05 for one in found) / 400 < 0.085
    assert sum(one.change.low <= 0 <= one.change.high for one in found) / 400 > 0.915
    assert np.mean([one.error for one in found]) < 0.4  # prompts alone would make it 0.87


def test_the_smallest_difference_is_found_in_four_of_five() -> None:
    """The figure beside "no difference" is what it says, of one comparison and of ten."""
    true = 0.7 * np.sqrt(2 / 24) * (student(0.975, 23) + student(0.8, 23))
    found = [difference(*_simulated(k, trainings=1, effect=true)) for k in range(400)]
    assert sum(one.p < 0.05 for one in found) / 400 == pytest.approx(0.8, abs=0.06)
    assert np.mean([one.least(1) for one in found]) == pytest.approx(true, rel=0.05)
    assert found[0].least(10) > 1.2 * found[0].least(1)


def test_trainings_are_a_level_of_their_own() -> None:
    """Three trainings that differ say less than as many videos of one, and the interval says so."""
    first, second = _simulated(0, trainings=3, effect=0.0)
    apart = first + np.array([[-3.0], [0.0], [3.0]])
    assert difference(apart, second).error > 3 * difference(first, second).error


def test_student_and_holm_are_those_of_the_books() -> None:
    """Quantiles of tables, and the worked example of Holm's correction."""
    for freedom, quantile in ((3, 3.182), (5, 2.571), (9, 2.262), (30, 2.042)):
        assert student(0.975, freedom) == pytest.approx(quantile, rel=0.015)
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_seams_are_found_where_units_meet() -> None:
    """A step of luma at a border is a seam; the same step elsewhere is none."""
    frames = np.random.default_rng(0).integers(100, 110, (8, 32, 32, 3), dtype=np.uint8)
    units = np.zeros((8, 32, 32), dtype=np.int32)
    units[:, :, 16:] = 1
    even = seams(frames, units)
    assert even["space"] == pytest.approx(1, abs=0.1)
    assert even["time"] is None
    frames[:, :, 16:] += 60
    assert seams(frames, units)["space"] > 8
    units[4:] += 2
    assert seams(frames, units)["time"] == pytest.approx(1, abs=0.1)


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
    for _ in range(20):
        first, second = rng.standard_normal((100, 2)), rng.standard_normal((100, 2)) + 1
        found = frechet_interval(first, second)
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
