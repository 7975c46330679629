"""`videoar vbench prompts`, `generate` and `table`."""

import json
from dataclasses import fields

from videoar.checkpoints.checkpoint import Checkpoint, fingerprints
from videoar.checks import check_same
from videoar.cli import options
from videoar.cli.generate import begin, generate_several, load
from videoar.cli.progress import say
from videoar.cli.prompts import listed
from videoar.evaluation import vbench
from videoar.evaluation.options import Suite, VBenchTable
from videoar.files import check_folder, first_written
from videoar.generation.config import GenerationConfig


def prompts(args: Suite) -> None:
    """Print the list of videos."""
    say("\n".join(map(json.dumps, vbench.suite(args)[0])))


def generate(args: options.VBenchGenerate) -> int:
    """Generate the videos into the folder of a run, all by the protocol that it states."""
    rows, told = vbench.suite(args)
    todo, folder = listed(enumerate(rows, start=1), of="VBench"), args.folder.expanduser()
    check_folder(folder)
    shared = {field.name: getattr(args, field.name) for field in fields(options.Sampling)}
    several = options.Generate(prompts=folder, out=folder / vbench.VIDEOS, **shared)
    generation = begin(several, pipe := load(several), todo[0].prompt)
    found = Checkpoint.find(args.model, base=args.base, lora=args.lora)
    marks = {args.model: found.fingerprint()} | fingerprints(args.base, args.codec)
    marks |= {vbench.hash_of(file): str(strength) for file, strength in found.lora}
    sampling = generation.plan.to_json()["options"] | {"unit_steps": None}
    sampling["num_inference_steps"] = generation.plan.options.steps
    told["checkpoint"] = ", ".join(f"{name} {mark}" for name, mark in marks.items())
    told["size"] = f"{pipe.width} x {pipe.height} x {generation.num_frames} frames"
    told |= {k: str(v) for k, v in sampling.items() if v is not None or k == "window_frames"}
    folder.mkdir(exist_ok=True)
    held = first_written(folder / vbench.PROTOCOL, told)
    older = {k: str(v) for k, v in vars(GenerationConfig()).items() if k in told}
    check_same(older | held, told, held=f"{folder} holds videos", other="folder")
    return generate_several(several, todo, pipe)


def table(args: VBenchTable) -> None:
    """Print the scores of a run."""
    say(vbench.table(args))
