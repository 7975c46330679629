"""How soon does the page show its first picture? `python benchmarks/page.py`, with Chromium there.

The server is a process of its own. The clock runs from the click on Start until the video element
has a picture; each time is of a page of its own.
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

from live import server
from playwright.sync_api import Page, sync_playwright

from videoar.cli.progress import say

SHOWN = (
    "() => {const v = document.getElementById('video'); return v.readyState > 1 && v.videoWidth}"
)
READY = "() => document.getElementById('prompt').value !== ''"


def until(page: Page, script: str) -> None:
    """Ask a page until it says yes."""
    began = time.perf_counter()
    while not page.evaluate(script):
        if time.perf_counter() - began > 60:
            raise TimeoutError(script)
        time.sleep(0.02)


def main() -> None:
    """Print the seconds of each kind of unit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="robot")
    parser.add_argument("--units", nargs="*", default=["frame", "chunk:3", "cube:2x2x2"])
    parser.add_argument("--count", type=int, default=3)
    given = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        parser.error("there is no browser: install chromium")
    # A browser that root starts gives its threads priority over all else: not with this.
    bounds = "setpriv --bounding-set=-sys_nice " if os.geteuid() == 0 else ""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        file = Path(folder) / "browser"
        file.write_text(f'#!/bin/sh\nexec {bounds}"{browser}" "$@"\n')
        file.chmod(0o755)
        for units in given.units:  # a server each: sessions of pages that are closed last a while
            with server(given.model, 1) as (url, _):
                opened = play.chromium.launch(executable_path=file, args=["--no-sandbox"])
                times = []
                for _ in range(given.count):
                    page = opened.new_page()
                    page.goto(url)
                    until(page, READY)
                    page.click(f"#units >> text={units}")
                    began = time.perf_counter()
                    page.click("#start")
                    until(page, SHOWN)
                    times.append(f"{time.perf_counter() - began:.2f}")
                    page.close()
                opened.close()
            say(f"{given.model}, {units}: {', '.join(times)} s")


if __name__ == "__main__":
    main()
