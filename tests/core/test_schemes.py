"""Names of schemes: every scheme is read again from its own, also one that nobody here wrote."""

import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny import SCHEMES, tiny_pipeline

from videoar.cli.main import main
from videoar.core.schemes import KINDS, Blocks, Cells, KeyDetail, Pyramid, Scheme, box, parse
from videoar.generation.pipeline import VideoPipeline

ROWS = """
from dataclasses import dataclass
from videoar.core.schemes import Scheme, box

@dataclass(frozen=True)
class Rows(Scheme):
    frames: int = 1
    step: int = 1

    def segment(self, frames, height, width):
        starts = range(0, height, self.step)
        rows = [range(start, min(start + self.step, height)) for start in starts]
        return [[box(range(frames), row, range(width))] for row in rows]
"""


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of a user in the current folder, and the name of its scheme."""
    (tmp_path / "my_rows.py").write_text(ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "my_rows", raising=False)
    return "my_rows:Rows"


MORE = (
    "full",
    "cube:2x3x4",
    "cube:1x2x2/far-first",
    "cube:1x2x2/3,0,1,2",
    "frame+multiscale:4,2,1",
)


@pytest.mark.parametrize("name", [*KINDS, *SCHEMES, *MORE])
def test_a_name_comes_back(name: str) -> None:
    """What a checkpoint stores is what it was trained with."""
    assert parse(name).name == name


def _order(name: str, rows: int = 4, columns: int = 4) -> list[list[tuple[int, int]]]:
    """The places of blocks of one cell, wave by wave."""
    waves = parse(f"cube:1x1x1/{name}").segment(1, rows, columns)
    return [[unit[0][1:3] for unit in wave] for wave in waves]


def test_a_spiral_goes_from_the_centre_outwards() -> None:
    """Ring by ring, and from neighbour to neighbour within a ring."""
    places = [place for (place,) in _order("spiral", 5, 5)]
    assert places[0] == (2, 2)
    rings = [max(abs(r - 2), abs(c - 2)) for r, c in places]
    assert rings == sorted(rings)
    for (r, c), (row, column), *rest in zip(places, places[1:], rings, rings[1:], strict=False):
        assert abs(r - row) + abs(c - column) == 1 or rest[0] != rest[1]


def test_far_first_takes_the_farthest_from_all_before() -> None:
    """Written out: no block left is farther from the nearest one that is done."""
    places = [place for (place,) in _order("far-first", 3, 5)]
    for k, place in enumerate(places[1:], start=1):
        away = {p: min(math.dist(p, q) for q in places[:k]) for p in places[k:]}
        assert away[place] == max(away.values())


def test_a_random_order_is_the_same_in_every_program() -> None:
    """A checkpoint that was trained in it is sampled in it."""
    places = [(1, 1), (1, 2), (0, 1), (0, 0), (0, 2), (1, 0)]
    assert _order("random", 2, 3) == [[place] for place in places]


def test_an_order_of_ones_own_is_the_turn_of_every_block() -> None:
    """In raster order; those of one turn are generated together."""
    assert _order("3,0,1,2", 2, 2) == [[(0, 1)], [(1, 0)], [(1, 1)], [(0, 0)]]
    assert _order("0,1,2,1,2,3", 2, 3) == _order("wavefront", 2, 3)
    with pytest.raises(ValueError, match="Turns of 0,1,2 is 3: use 4"):
        _order("0,1,2", 2, 2)
    with pytest.raises(ValueError, match="or the turn of every block"):
        parse("cube:1x2x2/spirals")


def test_segments_of_several_schemes_follow_each_other() -> None:
    """Each part begins where the one before ends, and the last ends where the clip does."""
    mixed = parse("frame+cube:2x1x2/wavefront+chunk:3")
    assert mixed.frames == 6
    start, expected = 0, []
    for part in ("frame", "cube:2x1x2/wavefront", "chunk:2"):
        scheme = parse(part)
        waves = scheme.segment(scheme.frames, 2, 4)
        expected += [[tuple((t + start, *c) for t, *c in unit) for unit in w] for w in waves]
        start += scheme.frames
    assert mixed.segment(5, 2, 4) == expected
    with pytest.raises(ValueError, match="schemes of a number of frames"):
        parse("frame+full")


class Turned(Blocks):
    """Blocks from the last to the first."""

    def segment(self, frames: int, height: int, width: int) -> list[list[Cells]]:
        return super().segment(frames, height, width)[::-1]


def test_what_is_derived_from_a_scheme_has_a_name_of_its_own() -> None:
    """Under the name of its base a checkpoint would be sampled by other units than it learned."""
    assert Turned(2).name == f"{__name__}:Turned/frames=2"
    assert parse(Turned(2, 1, 1).name) == Turned(2, 1, 1)


@pytest.mark.parametrize(
    "scheme", [Blocks(2, None, 3), Blocks(None, 2, 2, "snake"), KeyDetail(5), Pyramid(3, (2, 1))]
)
def test_every_scheme_has_a_name(scheme: Scheme) -> None:
    """Also those for which there is no short one."""
    assert parse(scheme.name) == scheme


def test_a_scheme_of_ones_own_works_by_its_name(
    rows: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of the package is touched: commands, pipeline and checkpoint take `module:Class`."""
    assert main(["units", f"{rows}/step=2", "--frames", "2"]) == 0
    assert "my_rows:Rows/step=2" in capsys.readouterr().out
    pipe = tiny_pipeline()
    pipe.sampling = pipe.sampling.replaced(units=parse(f"{rows}/step=2"))
    expected = pipe("a red ball", num_frames=5).frames
    pipe.save_pretrained("own")
    again = VideoPipeline.from_pretrained("own")
    assert again.sampling.units == f"{rows}/step=2"
    assert (again("a red ball", num_frames=5).frames == expected).all()
    words = ["--model", "own", "--num-frames", "5", "--units", rows, "--out", "a.mkv"]
    assert main(["generate", "a red ball", *words]) == 0


def test_a_checkpoint_says_which_module_is_missing(rows: str, tmp_path: Path) -> None:
    """Who gets the checkpoint alone is told what else belongs to it."""
    pipe = tiny_pipeline()
    pipe.sampling = pipe.sampling.replaced(units=rows)
    pipe.save_pretrained(tmp_path / "own")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-m", "videoar", "generate", "ball", "--model", "../own"]
    path = {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "PATH": ""}
    done = subprocess.run(command, cwd=elsewhere, env=path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "my_rows:Rows" in done.stderr
    assert "No module named 'my_rows'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere_at_all:Rows", "cannot be imported"),
        ("my_rows:Columns", "cannot be imported"),
        ("my_rows:Scheme", "cannot be built"),
        ("pathlib:Path", "no scheme"),
        ("my_rows:Rows/stride=2", "no field 'stride'"),
        ("my_rows:Rows/step=two", "write JSON"),
    ],
)
@pytest.mark.usefixtures("rows")
def test_a_wrong_name_of_ones_own_is_refused_in_one_sentence(name: str, says: str) -> None:
    """A slip in the name of a class costs one more try."""
    with pytest.raises(ValueError, match=says) as caught:
        parse(name)
    assert "\n" not in str(caught.value)


def test_a_scheme_that_no_other_program_finds_is_not_stored(tmp_path: Path) -> None:
    """A checkpoint that names it would load nowhere."""

    @dataclass(frozen=True)
    class Here(Scheme):
        frames: int = 1

        def segment(self, frames: int, height: int, width: int) -> list[list[Cells]]:
            return [[box(range(frames), range(height), range(width))]]

    pipe = tiny_pipeline()
    pipe.sampling = pipe.sampling.replaced(units=Here())
    with pytest.raises(ValueError, match="put it into a module"):
        pipe.save_pretrained(tmp_path / "own")
