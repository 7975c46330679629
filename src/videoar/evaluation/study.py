"""A study: what a design compares is made, judged and kept, video by video, and then reported.

A folder holds `study.json`, what is compared; `figures/`, a line of JSON for each video, a file for
each share of the work; `videos/`, those of the first prompts; and the report. What is there is not
computed again, so a study goes on where it was killed, and processes may share it.
"""

import itertools
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from videoar import machine
from videoar.checkpoints.checkpoint import Checkpoint
from videoar.checks import Report, check_same
from videoar.core.schemes import KINDS
from videoar.data.latents import LatentShards, check_codec
from videoar.data.options import ALL, turns
from videoar.evaluation import designs, entries, report
from videoar.evaluation.designs import Design
from videoar.evaluation.entries import Job, UnitsOf, generated, load_pipeline, plan
from videoar.evaluation.judge import Judge
from videoar.evaluation.metrics import PixelUnits
from videoar.evaluation.nearest import find_nearest
from videoar.evaluation.options import Evaluate, Judged, Study
from videoar.evaluation.statistics import Found
from videoar.evaluation.tables import CLEAN, CODEC
from videoar.files import Json, check_folder, first_written, to_json
from videoar.generation.inputs import doubts
from videoar.generation.pipeline import VideoPipeline
from videoar.generation.progress import Paced

REPEATS, MAX_STEPS = 3, 64
LINE = 1, 4  # steps: what more cost is on the straight line through these
TIMED = -1
"""The number of a line that holds no video, but what one costs."""
TIMED_SECONDS = 60.0  # at most: longer videos cost as much a second
TRIED_FRAMES = 45  # twelve latent ones, which are whole segments of most kinds of unit
WORDS = {"units": "{}", "window_frames": "window {}", "sink_frames": "sink {}"}
WORDS["num_inference_steps"] = "steps {}"


def run(config: Study, say: Report) -> str:
    """Do a share of a study by a design that has a name, or is a file: see `compare`."""
    design = designs.find(config)
    lines = dict(map(entries.read_line, design.checkpoints))
    if len(lines) < len(design.checkpoints):
        raise ValueError("two checkpoints have one name: write NAME=CHECKPOINT with other names")
    return compare(design, lines, config, say)


def evaluate(config: Evaluate, say: Report) -> str:
    """Do a share of a study of one checkpoint under kinds of unit: see `compare`."""
    names = ("num_inference_steps", "shift", "guidance_scale")
    given = [f"{k}={getattr(config, k)}" for k in names if getattr(config, k) is not None]
    line = "?".join([config.checkpoint, *(["&".join(given)] if given else [])])
    design = Design(
        about=f"Do the videos of {config.checkpoint} show what their prompts say?",
        checkpoints=(line,),
        units=config.units or tuple(Checkpoint.find(config.checkpoint).meta.get("units", KINDS)),
        num_prompts=config.num_prompts,
        seeds=1,
        seconds=config.seconds,
    )
    return compare(design, {"videos": (line,)}, config, say)


def compare(design: Design, lines: Mapping[str, Sequence[str]], config: Judged, say: Report) -> str:
    """Do a share of a study, and return the report if it was the last one.

    Args:
        design: what is compared, and on how many videos.
        lines: its checkpoints by name, and what each overrides, as `toy?shift=3`.
        config: who judges, and where to.
        say: is told how far it is.

    Raises:
        ValueError: it is none, or the folder holds another one.
    """
    folder = config.out
    paths = [path.partition("?")[0] for several in lines.values() for path in several]
    judge, mark = entries.find_judge(config, paths[0], seconds=design.seconds)
    found = judge.prompts(design.num_prompts, seed=config.seed)  # raises if there are too few
    prompts = [prompt["prompt"] for prompt in found]
    about = {"seed": config.seed, "batch_size": config.batch_size} | mark
    weights = {path: Checkpoint.find(path).fingerprint() for path in paths}
    made_of = {"design": design, "weights": weights} | about
    asked = json.loads(json.dumps(to_json(made_of)))
    check_folder(folder)
    path, settled = folder / "study.json", Json()
    if not path.exists():
        if any(folder.glob("[!.]*")):
            raise ValueError(f"{folder} holds other files, and no study: name another folder")
        settled = _settled(design, lines, say)
        _jobs(settled["entries"], design, paths[0], about)  # may raise
        for name in weights:
            if long := load_pipeline(name)[0].prompt_encoder.too_long(set(prompts)):
                raise ValueError(
                    f"{long} of {name}: shorten them, or name videos with shorter ones by --footage"
                )
        folder.mkdir(exist_ok=True)
    held = first_written(path, {"asked": asked} | settled)
    how: Json = {"other": "folder", "options": made_of}
    check_same(held["asked"], asked, held=f"{folder} holds a study", **how)
    jobs = _jobs(held["entries"], design, paths[0], about)
    said: Json = {"design": design, "groups": held["groups"], "commit": machine.git_commit()}
    said |= {
        "hardware": machine.hardware("cpu"),
        "lattices": {},
        "doubts": [*held.get("doubts", ())],
    }
    said["judge"] = (config.judge or paths[0]) if mark else "the procedural world"
    for checkpoint in weights:
        made = [job for job in jobs if job.make is generated]
        own = [job.sampling for job in made if job.checkpoint == checkpoint]
        for line in doubts(load_pipeline(checkpoint)[0], own, prompts):
            said["doubts"].append(f"{checkpoint}: {line}.")
            say(said["doubts"][-1])
    codec = load_pipeline(paths[0])[0].codec
    if training := None if config.nearest is None else LatentShards(config.nearest):
        check_codec(training.folder, training.info, codec, checkpoint=paths[0])
    _work(config, design, jobs, judge, say)
    found, missing = _found(folder, jobs, say)
    if missing:
        return f"{missing} videos are missing: other shares make them, or this command again\n"
    if training:
        find_nearest(found, training, codec, folder, keep=design.keep, say=Paced(say).hear)
    ways = held["entries"].items()
    members = {k: [report.member(k, n) for n, _ in enumerate(v)] for k, (v, _) in ways}
    for job in {str(job.sampling.units): job for job in jobs if not job.routed}.values():
        units = job.pipeline().lattice(job.sampling.units, job.settings["num_frames"])
        said["lattices"][str(job.sampling.units)] = report.lattice(units)
    return report.write(folder, Found(entries=found, lines=members), said, say)


def _settled(design: Design, lines: Mapping[str, Sequence[str]], say: Report) -> Json:
    """Return what is compared: groups of entries, their checkpoints, and what they override.

    Steps that make seconds equal are measured, once.
    """
    groups, ways, doubts = defaultdict[str, list[str]](list), Json(), list[str]()
    for title, steps in _steps(design, lines, say, doubts.append):
        for (line, several), cell in itertools.product(lines.items(), design.cells()):
            chosen = {} if steps is None else {"num_inference_steps": steps[cell.get("units")]}
            words = [line] if len(lines) > 1 or not cell | chosen else []
            for name, value in (cell | chosen).items():
                text = "all" if value is None else str(value)
                words.append(WORDS[name].format(text))
            ways[name := " ".join(words)] = several, cell | chosen
            groups[title].append(name)
    return {"groups": groups, "entries": ways, "doubts": doubts}


def _steps(
    design: Design, lines: Mapping[str, Sequence[str]], say: Report, doubt: Report
) -> Iterator[tuple[str, Mapping[str | None, int] | None]]:
    """Yield groups of entries that are compared, and the steps of kinds of unit in each."""
    kinds = design.units or (None,)
    if not design.steps and not design.equal:
        yield "as they are", None
    for steps in design.steps:
        yield f"{steps} steps", dict.fromkeys(kinds, steps)
    tries, costs = defaultdict[Any, list[Json]](list), {}
    if design.equal:
        say(f"measuring what each of {len(kinds)} kinds of unit costs, in turn, {REPEATS} times")
    for _ in range(REPEATS if design.equal else 0):  # in turn: the machine is as busy for all
        for kind, steps in itertools.product(kinds, LINE):
            own = {"units": kind, "num_inference_steps": steps, "about": {}, "seconds": 1.0}
            tried = plan("", next(iter(lines.values()))[0], **own).pipeline()
            tries[kind, steps].append(entries.speed(tried, num_frames=TRIED_FRAMES))
    for kind in kinds if design.equal else ():
        both = [tries[kind, steps] for steps in LINE]
        runs = [{name: min(each[name] for each in own) for name in own[0]} for own in both]
        costs[kind] = {name: np.polyfit(LINE, [one[name] for one in runs], 1) for name in runs[0]}
    for what in design.equal:
        budget = np.polyval(costs[kinds[0]][what], design.budget)
        ideal = {kind: (budget - line[what][1]) / line[what][0] for kind, line in costs.items()}
        found = {kind: min(max(1, round(float(n))), MAX_STEPS) for kind, n in ideal.items()}
        seconds = [[run["seconds"] for run in runs] for runs in tries.values()]
        more = max(max(own) / min(own) for own in seconds) - 1
        steps = ", ".join(f"{kind} {n}" for kind, n in found.items())
        said = f"equal {what}: {steps} steps; of {REPEATS} times, one took up to {more:.0%} more"
        say(said)
        doubt(f"{said}.")
        yield f"equal {what}", found


def _jobs(ways: Json, design: Design, first: str, about: Json) -> list[Job]:
    """Return what is made: real clips, those through the codec, and videos of every checkpoint."""
    one = about | {"num_prompts": design.num_prompts, "seeds": 1}
    both: Json = {"about": one | {"seeds": design.seeds}, "seconds": design.seconds}
    whole = plan(CLEAN, first, about=one, seconds=design.seconds)
    jobs = [replace(whole, make=entries.real), replace(whole, name=CODEC, make=entries.coded)]
    for name, (lines, changes) in ways.items():
        jobs += [plan(report.member(name, k), v, **both, **changes) for k, v in enumerate(lines)]
    return jobs


def _work(config: Judged, design: Design, jobs: Sequence[Job], judge: Judge, say: Report) -> None:
    """Make this process's share of the videos, those apart that are there."""
    share = config.share
    if share == ALL and "WORLD_SIZE" in os.environ:  # as torchrun says it
        share = f"{int(os.environ['RANK']) + 1}/{os.environ['WORLD_SIZE']}"
    work = list[tuple[Job, range]]()
    for job in jobs:
        numbers, size = _numbers(job), 1 if job.routed else config.batch_size
        starts = range(0, job.num_videos, size)
        work += [(job, numbers[k : min(k + size, job.num_videos)]) for k in starts]
        work += [(job, numbers[job.num_videos :])] if job.num_videos < len(numbers) else []
    there = set(_rows(config.out, say))
    left = [(job, own) for job, own in work[turns(share)] if _new(job, own, there)]
    for name in ("figures", "videos"):
        (config.out / name).mkdir(exist_ok=True)
    kinds = tuple(dict.fromkeys(str(job.sampling.units) for job in jobs if not job.routed))
    path, paced = config.out / "figures" / f"{share.replace('/', '-of-')}.jsonl", Paced(say)
    started = time.perf_counter()
    for number, (job, rows) in enumerate(left, start=1):
        name, pipe, frames = job.name, job.pipeline(), job.settings["num_frames"]
        if rows == [TIMED]:
            tried = min(frames, round(TIMED_SECONDS * job.sampling.fps))
            found = [{"runs": [entries.speed(pipe, num_frames=tried) for _ in range(REPEATS)]}]
        else:
            asked = job.asked(judge, seed=config.seed)[rows[0] : rows[-1] + 1]
            files = {i: config.out / report.video_of(name, i) for i in rows if i < design.keep}
            blocks = job.make(pipe, asked, judge, num_frames=frames)
            blocks = entries.written(blocks, files, first=rows[0], fps=job.sampling.fps)
            own = [k for k in kinds if k == str(job.sampling.units)]
            own = own if job.make is generated else kinds
            how: Json = {"labels": _labels(pipe, own, frames), "fps": job.sampling.fps}
            found = entries.measured(blocks, asked, judge=judge, **how)
        with path.open("a", encoding="utf-8") as file:
            for i in _new(job, rows, there):
                line = {"entry": name, "index": i} | found[rows.index(i)]
                file.write(f"\n{json.dumps(line, allow_nan=False)}")  # whatever was torn before it
        rest = (time.perf_counter() - started) * (len(left) / number - 1)
        paced.say(f"{name}: {number} of {len(left)} parts, {timedelta(seconds=round(rest))} left")


def _numbers(job: Job) -> list[int]:
    """Return the numbers of its lines: videos, and what one of them costs."""
    return [*range(job.num_videos), *([TIMED] if job.make is generated else [])]


def _new(job: Job, rows: Sequence[int], there: set[tuple[str, int]]) -> list[int]:
    """Return the numbers of lines that are not there."""
    return [i for i in rows if (job.name, i) not in there]


def _labels(pipe: VideoPipeline, kinds: Sequence[str], num_frames: int) -> dict[str, UnitsOf]:
    """Return what tells the unit of every pixel of some frames, under kinds of unit."""
    found, (stride, *sides) = dict[str, UnitsOf](), pipe.codec.stride
    patch = pipe.transformer.config.patch
    for kind in kinds:
        units = pipe.lattice(kind, num_frames)
        finest = units.coords[:, 3] == 0
        t, h, w, _ = units.coords[finest].long().T.numpy()
        grid = np.zeros((units.frames or 0, units.height, units.width), dtype=np.int32)
        grid[t, h, w] = units.unit[finest]

        def pixels(frames: range, grid: PixelUnits = grid) -> PixelUnits:
            chosen = grid[-(-np.array(frames) // stride)]
            return chosen.repeat(sides[0] * patch, axis=1).repeat(sides[1] * patch, axis=2)

        found[kind] = pixels
    return found


def _rows(folder: Path, say: Report) -> dict[tuple[str, int], Json]:
    """Return what was measured, by entry and number; say which lines were torn by a kill."""
    found = dict[tuple[str, int], Json]()
    for path in sorted((folder / "figures").glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line or "null")
            except ValueError:
                say(f"{path}: line {number} is torn, so it is made again")
                continue
            if row:
                found.setdefault((row["entry"], row["index"]), row)
    return found


def _found(folder: Path, jobs: Sequence[Job], say: Report) -> tuple[Json, int]:
    """Return what is known of every entry, and how much is missing."""
    rows, found, missing = _rows(folder, say), Json(), 0
    for job in jobs:
        own = {k: rows[job.name, k] for k in _numbers(job) if (job.name, k) in rows}
        missing += len(_numbers(job)) - len(own)
        runs = own.pop(TIMED, {"runs": []})["runs"]
        found[job.name] = {"settings": job.settings, "videos": list(own.values()), "runs": runs}
    return found, missing
