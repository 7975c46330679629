"""The folder of clips: written so that it can be used, and gone on with, at any time."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import tasks as world

KINDS = ("single", "long")
CRF = "15"


class Folder:
    """What has been rendered: videos, a label of each, and the tables made of them.

    A clip is there when its label is; the video is put in its place before.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.partial = root / "partial"

    def open(self, settings: dict[str, Any]) -> None:
        """Make the folder, or make sure that it is of the same settings."""
        about = self.root / "settings.json"
        if about.exists():
            before = json.loads(about.read_text())
            if before != settings:
                differ = [name for name in settings if before.get(name) != settings[name]]
                told = ", ".join(f"{name} {before.get(name)}" for name in differ)
                raise ValueError(f"{self.root} was rendered with {told}: name another folder")
        elif self.root.exists() and any(self.root.iterdir()):
            raise ValueError(f"{self.root} holds other things: name a new folder")
        for kind in KINDS:
            (self.root / "videos" / kind).mkdir(parents=True, exist_ok=True)
            (self.root / "labels" / kind).mkdir(parents=True, exist_ok=True)
        self.partial.mkdir(exist_ok=True)
        self._replace(about, json.dumps(settings, indent=2) + "\n")

    def label(self, name: str, index: int) -> dict[str, Any] | None:
        """Return the label of a clip, if it is there and whole."""
        try:
            return json.loads(self._label_path(name, index).read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _label_path(self, name: str, index: int) -> Path:
        return self.root / "labels" / f"{world.clip_name(name, index)}.json"

    def add(self, name: str, index: int, pictures: list[np.ndarray], label: dict[str, Any]) -> None:
        """Write a clip."""
        stem = world.clip_name(name, index)
        partial = self.partial / f"{stem.replace('/', '-')}.mp4"
        write_video(partial, pictures)
        partial.replace(self.root / "videos" / f"{stem}.mp4")
        self._replace(self._label_path(name, index), json.dumps(label) + "\n")

    def collect(self, labels: dict[str, dict[str, Any]]) -> None:
        """Write the tables of all clips: what `videoar prepare` reads, and what a judge does."""
        rows = [_in_words(labels[name]) for name in sorted(labels)]
        self._replace(self.root / "labels.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        for kind in KINDS:
            text = ""
            for row in rows:
                path = Path(row["file_name"])
                if path.parent.name == kind:
                    text += json.dumps({"file_name": path.name, "text": row["captions"]}) + "\n"
            self._replace(self.root / "videos" / kind / "metadata.jsonl", text)

    def _replace(self, path: Path, text: str) -> None:
        partial = self.partial / f"{path.name}-{os.getpid()}"
        partial.write_text(text)
        partial.replace(path)


def _in_words(label: dict[str, Any]) -> dict[str, Any]:
    """Return a label that also says what is done in each part, and how things stand."""
    parts = [part | {"action": world.TASKS[part["task"]].action} for part in label["parts"]]
    state = world.state_words(world.TASKS[label["task"]].scene, label["states"])
    return label | {"parts": parts, "state": state}


def write_video(path: Path, pictures: list[np.ndarray], *, crf: str = CRF) -> None:
    """Write H.264 in high quality. One thread: the bytes are the same everywhere."""
    import av

    size = len(pictures[0])
    with av.open(str(path), "w") as container:
        options = {"crf": crf, "preset": "medium", "threads": "1"}
        stream = container.add_stream("libx264", rate=world.FPS, options=options)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
