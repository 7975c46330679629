"""Cut the long clips at their changes of instruction: `python parts.py FOLDER`.

Each part but the first becomes a clip in `videos/single/parts`, with its own captions: a few
frames of what went before, then what is said. A model learns from them to be told something new
on the way.
"""

import argparse
import json
import sys
from pathlib import Path

import folder
import numpy as np

BEFORE = 13  # frames of the part before: three latent frames and the one that begins a clip
LENGTH = 61


def cut(root: Path) -> int:
    """Write what is missing of `videos/single/parts`, and its table; return the number of clips."""
    target = root / "videos" / "single" / "parts"
    target.mkdir(exist_ok=True)
    table, count = "", 0
    for line in (root / "labels.jsonl").read_text().splitlines():
        label = json.loads(line)
        source = root / label["file_name"]
        if source.parent.name != "long":
            continue
        starts = [(k, part["first"] - BEFORE) for k, part in enumerate(label["parts"])][1:]
        starts = [(k, start) for k, start in starts if start + LENGTH <= label["frames"]]
        names = {k: f"{source.stem}-part{k}.mp4" for k, _ in starts}
        if not all((target / name).exists() for name in names.values()):
            pictures = read_video(source)
            for k, start in starts:
                partial = root / "partial" / names[k]
                folder.write_video(partial, pictures[start : start + LENGTH])
                partial.replace(target / names[k])
        for k, name in names.items():
            text = label["parts"][k]["captions"]
            table += json.dumps({"file_name": name, "text": text}) + "\n"
        count += len(names)
        sys.stderr.write(f"\r{count} parts")
    partial = root / "partial" / "parts.jsonl"
    partial.write_text(table)
    partial.replace(target / "metadata.jsonl")
    return count


def read_video(path: Path) -> list[np.ndarray]:
    """Return its pictures."""
    import av

    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what render.py wrote")
    sys.stdout.write(f"{cut(parser.parse_args().folder)} clips are in videos/single/parts\n")
