"""Choose clips that no generator was trained on, small enough to pass on: `python exam.py ...`.

    python examples/robot/exam.py FOOTAGE LATENTS EXAM --size 96 --count 100

FOOTAGE is what render.py wrote, LATENTS what `videoar prepare` made of it: of the clips that it
holds out, those of one task, and their labels. Their words are what videos are asked for and judged
by; a judge is trained without them, too (`held_out` in `labels.jsonl`).
"""

import argparse
import json
import sys
from pathlib import Path

import folder
import numpy as np
from parts import read_video
from PIL import Image

KEPT = ("file_name", "task", "object", "action", "color", "position", "state", "frames", "fps")


def choose(footage: Path, latents: Path, exam: Path, *, size: int, count: int) -> int:
    """Write videos and `labels.jsonl`; return the number of clips."""
    rows = map(json.loads, (latents / "heldout" / "index.jsonl").read_text().splitlines())
    names = {row["extra"]["file"] for row in rows}
    labels = map(json.loads, (footage / "labels.jsonl").read_text().splitlines())
    single = [each for each in labels if Path(each["file_name"]).parent.name == "single"]
    chosen = [each for each in single if Path(each["file_name"]).name in names][:count]
    (exam / "videos").mkdir(parents=True, exist_ok=True)
    table = ""
    for each in chosen:
        pictures = [
            np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BOX))
            for picture in read_video(footage / each["file_name"])
        ]
        path = exam / "videos" / Path(each["file_name"]).name
        folder.write_video(path, pictures, crf="24")  # to be passed on
        kept = {name: each[name] for name in KEPT if name in each} | {
            "file_name": f"videos/{path.name}",
            "captions": each["captions"],
            "held_out": True,
        }
        table += json.dumps(kept) + "\n"
    (exam / "labels.jsonl").write_text(table)
    return len(chosen)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("footage", type=Path, help="what render.py wrote")
    parser.add_argument("latents", type=Path, help="what `videoar prepare` wrote")
    parser.add_argument("exam", type=Path, help="a new folder")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--count", type=int, default=100)
    given = parser.parse_args()
    how = {"size": given.size, "count": given.count}
    sys.stderr.write(f"{choose(given.footage, given.latents, given.exam, **how)} clips\n")
