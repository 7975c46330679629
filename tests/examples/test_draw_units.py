"""The pictures of partitions: they show every unit, in its order, and who reads whom."""

import itertools
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from videoar.core.schemes import Scheme
from videoar.core.schemes import parse as parse_units
from videoar.core.units import Units, Visible

PROGRAM = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "draw_units.py"))
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the program in a folder of its own; return its exit code and what it says is wrong."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: (PROGRAM["main"](words), capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("frame", "--out", "missing/folder"), "missing does not exist"),
        (("frame", "--frames", "999"), "too many to draw"),
        ((), "no scheme"),
    ],
)
def test_what_cannot_be_drawn_is_refused(run: Run, words: tuple[str, ...], message: str) -> None:
    """One sentence, and no folder is left."""
    code, error = run(*words)
    assert code == 2
    assert message in error
    assert not list(Path().iterdir())


def test_schemes_are_drawn_into_a_folder(run: Run) -> None:
    """One scheme gives order, mask and filling; several fill side by side in one picture."""
    assert run("cube:1x2x2", "--frames", "2", "--out", "one")[0] == 0
    assert {file.name for file in Path("one").iterdir()} == {
        "order.png",
        "mask.png",
        "filling.webp",
    }
    before = Path("one/mask.png").read_bytes()
    code, error = run("frame", "--frames", "2", "--out", "one")
    assert (code, Path("one/mask.png").read_bytes()) == (2, before)
    assert "--force" in error
    assert run("frame", "chunk:2", "--frames", "2", "--out", "two")[0] == 0
    assert [file.name for file in Path("two").iterdir()] == ["units.webp"]
    with Image.open("two/units.webp") as picture:
        seconds = PROGRAM["FILL_SECONDS"] + PROGRAM["HOLD_SECONDS"]
        durations = [
            frame.info["duration"] for frame in map(_loaded, ImageSequence.Iterator(picture))
        ]
        assert sum(durations) == pytest.approx(1000 * seconds, rel=0.01)


def _loaded(frame: Image.Image) -> Image.Image:
    frame.load()
    return frame


def _shades(picture: Image.Image) -> set[tuple[int, ...]]:
    return {shade for _, shade in picture.getcolors(2**20)}


@dataclass(frozen=True)
class Checkers(Scheme):
    """Black fields of a board, then white ones: a scheme that the package does not know."""

    frames: int = 1

    def segment(self, frames: int, height: int, width: int) -> list[list]:
        """Cut by the parity of row and column."""
        cells = [(0, h, w, 0) for h, w in itertools.product(range(height), range(width))]
        return [[tuple(c for c in cells if (c[1] + c[2]) % 2 == parity)] for parity in (0, 1)]


@pytest.mark.parametrize(
    "scheme", [parse_units("multiscale:4,2,1"), parse_units("cube:1x2x2"), Checkers()], ids=str
)
def test_pictures_show_every_unit(scheme: Scheme) -> None:
    """Order and mask hold the colour of every unit, for a scheme that was just written, too."""
    units = Units(scheme, 2, 4, 4)
    ramp = {PROGRAM["color"](k / (units.count - 1)) for k in range(units.count)}
    assert len(ramp) == units.count
    assert ramp <= _shades(PROGRAM["order"](units, title="order"))
    assert ramp <= _shades(PROGRAM["mask"](units, Visible(), title="mask"))


def test_the_mask_shows_who_reads_whom() -> None:
    """A dot is coloured where a token is read, and empty where it is not."""
    units, visible = Units(parse_units("frame"), 3, 1, 1), Visible(window=2)
    pixels = np.asarray(PROGRAM["mask"](units, visible, title="mask"))[84:, 64:]
    size = 760 // 3
    dots = pixels[size // 2 : 3 * size : size, size // 2 : 3 * size : size]
    read = (dots != PROGRAM["EMPTY"]).any(-1)
    assert read.tolist() == [[True, False, False], [True, True, False], [False, True, True]]


def test_the_lattice_fills_from_empty_to_full() -> None:
    """The animation begins empty, adds units in their order, and ends with all of them."""
    pictures = PROGRAM["filling"]({"cube": Units(parse_units("cube:1x2x2"), 2, 4, 4)}, steps=4)
    ramp = [PROGRAM["color"](k / 7) for k in range(8)]
    counts = []
    for picture in pictures:
        shades = _shades(picture)
        shown = [shade in shades for shade in ramp]
        counts.append(sum(shown))
        assert shown == sorted(shown, reverse=True)
    assert (counts[0], counts[-1]) == (0, 8)
    assert counts == sorted(counts)


def test_lightness_falls_evenly_along_the_ramp() -> None:
    """Later units are darker, so the order survives a printer without colours."""
    grey = [np.dot(PROGRAM["color"](k / 20), (0.2126, 0.7152, 0.0722)) for k in range(21)]
    assert all(later < earlier for earlier, later in itertools.pairwise(grey))
