"""The page in a real browser, with the bundled model: it plays, obeys and goes back."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving import serving

from videoar.data.video import Video, read_video
from videoar.generation.pipeline import VideoPipeline
from videoar.serve import engine

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.skipif(
        not all(map(shutil.which, (CHROMIUM or "chromium", "timeout", "setpriv"))),
        reason="there is no browser, or nothing to bound it with: install chromium and util-linux",
    ),
    pytest.mark.xdist_group("browser"),
]

BLACK = "a small red ball moves left on a black background"
WHITE = "a large blue ball moves left on a white background"
# A browser that root starts gives its threads priority over all else, the real-time one included:
# without the capability it cannot. What hangs is killed with all its processes.
BOUNDED = """#!/bin/sh
exec timeout --signal=KILL 70 {bounds} "{browser}" "$@"
"""
BRIGHT = """() => {
  const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
  canvas.width = canvas.height = 8;
  pen.drawImage(document.getElementById("video"), 0, 0, 8, 8);
  return pen.getImageData(0, 0, 8, 8).data.reduce((sum, value) => sum + value, 0) / 256;
}"""
PLAYED = "() => document.getElementById('video').currentTime"


@pytest.fixture(scope="module")
def toy() -> Iterator[tuple[str, Any]]:
    """A server of the bundled model."""
    with serving(VideoPipeline.from_pretrained("toy")) as found:
        yield found


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A browser of this system, new for each test, with bounds."""
    bounds = "setpriv --bounding-set=-sys_nice" if os.geteuid() == 0 else ""
    file = tmp_path / "browser"
    file.write_text(BOUNDED.format(bounds=bounds, browser=CHROMIUM))
    file.chmod(0o755)
    with playwright.sync_playwright() as play:
        opened = play.chromium.launch(
            executable_path=file, args=["--no-sandbox", "--disable-gpu", "--mute-audio"]
        )
        yield opened
        opened.close()


@pytest.fixture
def page(toy: tuple[str, Any], browser: Any) -> Iterator[Any]:
    """The page; no error in its console, and no request to another host."""
    url = toy[0]
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    errors, asked = [], []
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    yield page
    page.close()
    toy[1].call(toy[1].lives.clear).result()
    assert errors == []
    hosts = {address.split("/")[2] for address in asked if address.startswith("http")}
    assert hosts == {url.split("/")[2]}


def _until(holds: Callable[[], Any], seconds: float = 50) -> float:
    """Wait until something holds; return how long it took."""
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < seconds, "it did not come to hold"
        time.sleep(0.05)
    return time.monotonic() - begun


def _start(page: Any, prompt: str = BLACK, units: str = "frame") -> None:
    page.fill("#prompt", prompt)
    page.click(f"text={units}")
    page.click("#start")
    _until(lambda: page.evaluate(PLAYED) > 0.1)


def test_it_plays_and_a_new_prompt_is_obeyed(page: Any) -> None:
    """Typed and sent by the keyboard alone: black becomes white, and the figures say when.

    Before, the page proposes what the model was trained with.
    """
    prompts = VideoPipeline.from_pretrained("toy").meta["prompts"]
    _until(lambda: page.input_value("#prompt") == prompts[0])
    assert page.locator("#prompts option").count() == len(prompts)
    page.fill("#prompt", BLACK)
    page.focus("#start")
    page.keyboard.press("Enter")
    _until(lambda: page.evaluate(PLAYED) > 0.5)
    assert page.evaluate(BRIGHT) < 130  # of 255, and a quarter of it is opacity
    page.focus("#prompt")
    page.keyboard.press("Control+A")
    page.keyboard.type(WHITE)
    page.keyboard.press("Enter")
    _until(lambda: page.evaluate(BRIGHT) > 190)
    assert page.inner_text("#latency").endswith(" ms")
    assert float(page.inner_text("#fps")) > 0
    assert page.inner_text("#status") == "live"
    page.fill("#prompt", f"{WHITE} dog")
    page.click("#send")
    _until(lambda: page.inner_text("#status").endswith("training: dog"))
    items = [item.inner_text() for item in page.query_selector_all("#history li")]
    assert items == [
        f"{WHITE} dog",
        WHITE,
        BLACK,
    ]


def test_units_change_and_the_lattice_shows_them(page: Any, toy: tuple[str, Any]) -> None:
    """The engine computes other units while the video plays on, and the picture is drawn."""
    _start(page)
    page.click("text=chunk:2")
    (live,) = toy[1].lives.values()
    _until(lambda: live.session.generation.plan.options.units == "chunk:2")
    before = page.evaluate(PLAYED)
    _until(lambda: page.evaluate(PLAYED) > before)
    drawn = "() => document.getElementById('lattice').toDataURL().length"
    assert page.evaluate(drawn) > 1000
    page.fill("#steps", "0")
    page.press("#steps", "Enter")
    _until(lambda: "num_inference_steps is 0" in page.inner_text("#status"))


def test_pause_back_branch_and_reset(page: Any, toy: tuple[str, Any], browser: Any) -> None:
    """Each does what it says, and a branch is a page of its own."""
    _start(page)
    _until(lambda: page.evaluate(PLAYED) > 1.3)
    page.click("#pause")
    stood = page.evaluate(PLAYED)
    time.sleep(0.3)
    assert page.evaluate(PLAYED) == pytest.approx(stood, abs=0.1)
    page.click("#branch")
    _until(lambda: page.query_selector("#links a"))
    page.click("#pause")
    page.click("#back")
    _until(lambda: page.evaluate(PLAYED) < 1 and page.evaluate(PLAYED) > 0)
    branch = page.get_attribute("#links a", "href")
    assert len(toy[1].lives) == 2
    other = browser.new_page()
    other.goto(toy[0] + branch)
    _until(lambda: other.evaluate(PLAYED) > 0)
    assert float(other.inner_text("#clock").split()[0]) > 1
    other.close()
    page.click("#reset")
    _until(lambda: 0 < float(page.inner_text("#clock").split()[0]) < 1)


def test_a_recording_plays_elsewhere(page: Any, tmp_path: Any) -> None:
    """It begins at 0, without a gap, and has the frames of what was seen."""
    _start(page)
    page.click("#record")
    before = page.evaluate(PLAYED)
    _until(lambda: page.evaluate(PLAYED) > before + 1)
    page.click("#record")
    with page.expect_download() as got:
        page.click("#links a")
    file = tmp_path / "recorded.mp4"
    got.value.save_as(file)
    seen = read_video(file)
    assert seen.fps == 16
    assert seen.frames.shape[1:] == (64, 64, 3)
    assert len(seen.frames) >= 8


def test_a_reload_goes_on_with_the_session(page: Any, toy: tuple[str, Any]) -> None:
    """The address has its name; the video goes on where it was."""
    _start(page)
    _until(lambda: page.evaluate(PLAYED) > 0.5)
    name = page.url.partition("#")[2]
    page.reload()
    _until(lambda: page.evaluate(PLAYED) > 0)
    assert page.url.partition("#")[2] == name
    assert float(page.inner_text("#clock").split()[0]) > 0.5


@pytest.mark.parametrize("kind", ["png", "mp4"])
def test_what_is_dropped_becomes_the_beginning(page: Any, kind: str, tmp_path: Any) -> None:
    """A white picture, or a clip of it, on a black video: the new video begins white."""
    _start(page)
    assert page.evaluate(BRIGHT) < 130
    white = np.full((9, 64, 64, 3), 255, dtype=np.uint8)
    file = tmp_path / f"white.{kind}"
    if kind == "png":
        Image.fromarray(white[0]).save(file)
    else:
        Video(frames=white, fps=16).save(file)
    take = """([bytes, name]) => {
      const carried = new DataTransfer();
      carried.items.add(new File([new Uint8Array(bytes)], name));
      return carried;
    }"""
    carried = page.evaluate_handle(take, [list(file.read_bytes()), file.name])
    # The first picture is gone back to once it is there: soon the prompt makes it black again, and
    # what a busy machine has not shown yet cannot be looked at.
    page.evaluate(
        f"""() => {{
          const video = document.getElementById("video"), once = {{ once: true }};
          video.addEventListener("loadeddata", () => {{
            video.addEventListener("seeked", () => {{ window.first = ({BRIGHT})(); }}, once);
            video.pause();
            video.currentTime = 0;
          }}, once);
        }}"""
    )
    page.dispatch_event("#screen", "drop", {"dataTransfer": carried})
    _until(lambda: page.evaluate("() => window.first ?? null") is not None)
    assert page.evaluate("() => window.first") > 220
    assert page.inner_text("#status") == "live"


def test_a_page_that_stands_still_ends_with_a_word(page: Any, monkeypatch: Any) -> None:
    """What was paused for long says so, and can be begun anew."""
    _start(page)
    page.click("#pause")
    monkeypatch.setattr(engine, "PAUSED", 0.5)
    _until(lambda: "stood still" in page.inner_text("#status"))
    monkeypatch.undo()
    page.click("#start")
    _until(lambda: page.inner_text("#status") == "live")


def test_it_fits_a_phone(page: Any) -> None:
    """At 390 pixels nothing stands over, and all that can be pressed has a name."""
    page.set_viewport_size({"width": 390, "height": 844})
    _start(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    nameless = (
        "() => [...document.querySelectorAll('button, input')].filter("
        "e => !(e.textContent || e.labels?.length || e.ariaLabel)).length"
    )
    assert page.evaluate(nameless) == 0
