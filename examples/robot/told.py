"""How often is a new instruction obeyed on the way? `python examples/robot/told.py`.

Two tasks that undo each other are told in turn, with a prompt every four seconds; the judge of the
checkpoint says what was done in each part. What was obeyed is kept
as lines of `--out`, so a run that was stopped goes on: another `--recall` needs another file.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from videoar import VideoPipeline
from videoar.cli.progress import say
from videoar.evaluation.entries import find_judge
from videoar.evaluation.metrics import bootstrap_interval
from videoar.evaluation.options import Judged

PLATE = "the arm {slides the white plate into|pulls the white plate out of} the goal in the centre"
STORIES = {
    "the robot arm {closes|opens} the green drawer, on the left": ("close", "open"),
    PLATE: ("slide in", "slide out"),
    "the robot arm {unlocks|locks} the door with the purple lock in the middle": ("unlock", "lock"),
    "the robot {opens|closes} the blue faucet at the left": ("open", "close"),
    "the robot arm {closes|opens} the yellow window, on the right": ("close", "open"),
    "the arm {shuts|opens} the purple door, in the middle": ("close", "open"),
}
"""What is told in turn, and what the judge calls it."""
SECONDS = 4


def sides(text: str) -> list[str]:
    """Return both prompts of a story."""
    before, _, rest = text.partition("{")
    inner, _, after = rest.partition("}")
    return [f"{before}{verb}{after}" for verb in inner.split("|")]


def main() -> None:
    """Make what is missing of the videos, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = "frame chunk:2 chunk:3 chunk:4 key-detail:4 multiscale:4,2,1 cube:1x2x2 cube:2x3x3"
    parser.add_argument("--model", default="robot")
    parser.add_argument("--units", nargs="*", default=[*kinds.split(), "cube:3x3x3"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--parts", type=int, default=6, help="instructions of a video")
    parser.add_argument(
        "--recall", type=int, help="latent frames that stay at a new instruction; 0: the window"
    )
    parser.add_argument("--story", help="of one thing alone, such as 'the arm {closes|opens} ...'")
    parser.add_argument("--out", type=Path, default=Path("told.jsonl"))
    given = parser.parse_args()
    pipe, (judge, _) = VideoPipeline.from_pretrained(given.model), find_judge(Judged(), given.model)
    stories = STORIES if given.story is None else {given.story: ("close", "open")}
    if given.seeds * len(stories) < 2:
        parser.error("one video of a kind has no interval: raise --seeds")
    lines = given.out.read_text().splitlines() if given.out.exists() else []
    rows = {tuple(row[:3]): row[3] for row in map(json.loads, lines)}
    size = round(SECONDS * pipe.sampling.fps)
    for seed in range(given.seeds):
        for text, actions in stories.items():
            prompts = sides(text)
            for kind in given.units:
                if (kind, text, seed) in rows:
                    continue
                how = {"num_frames": given.parts * size, "seeds": [seed], "units": kind}
                if given.recall is not None:
                    how["recall_frames"] = given.recall or None
                made = pipe.generate(prompts[:1], **how)
                for k in range(1, given.parts):
                    made.change_at(k * size, prompts=[prompts[k % 2]], recompute=True)
                video = np.concatenate(list(made), axis=1)
                parts = np.split(video, given.parts, axis=1)
                obeyed = []
                for k, part in enumerate(parts):
                    asked = [{"told": {"action": actions[k % 2]}}]
                    (looked,) = judge.look(part, asked, fps=pipe.sampling.fps)
                    obeyed.append(looked["scores"]["action"] == 1)
                rows[kind, text, seed] = obeyed
                with given.out.open("a") as file:
                    file.write(json.dumps([kind, text, seed, obeyed]) + "\n")
    for kind in given.units:
        own = [np.array(obeyed) for (name, *_), obeyed in rows.items() if name == kind]
        later = bootstrap_interval([obeyed[1:].mean() for obeyed in own])
        first = sum(int(obeyed[0]) for obeyed in own)
        say(f"{kind}: {later} % of the changes obeyed, first {first} of {len(own)}")


if __name__ == "__main__":
    main()
