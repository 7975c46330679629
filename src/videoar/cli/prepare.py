"""`videoar prepare`."""

import shlex
import sys

from videoar.checkpoints.checkpoint import Checkpoint
from videoar.cli.progress import say
from videoar.data import options
from videoar.data import prepare as preparation
from videoar.generation.progress import Progress


def prepare(args: options.Prepare) -> None:
    """Prepare videos."""
    with Progress(sys.stdout, every=10.0) as show:
        statistics = preparation.run(args, show)
    if not statistics:
        say(f"share {args.share} is made; when all are, `prepare` without --share joins them")
        return
    say(
        "{clips} clips to train on and {held_out_clips} held out, {seconds:.0f} s, of {used} of"
        " {videos} videos".format(**statistics)
    )
    if statistics["held_out_clips"] < 2:
        say("`evaluate heldout --data` needs 2 clips held out: add videos, or raise --held-out")
    for reason, count in statistics["rejected"].items():
        say(f"  {count} x {reason}")
    say(f"see {args.latents / 'contact-sheet.png'} and {args.latents / 'rejected.jsonl'}; then:")
    recipe, codec = "finetune", ["--task.init", args.codec]
    if "transformer" not in Checkpoint.find(args.codec).meta.get("components", ["transformer"]):
        recipe, codec = "video", []
    say(shlex.join(["videoar", "train", recipe, "--data.path", str(args.latents), *codec]))
