"""Faithfulness and drift: does a video show what its prompt says, under every kind of unit?

What a file holds is kept and not computed again; of other settings it is refused.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta

from videoar.checkpoints.checkpoint import Checkpoint
from videoar.checks import check_same
from videoar.core.schemes import KINDS, parse
from videoar.evaluation import tables
from videoar.evaluation.entries import (
    Entry,
    Report,
    Who,
    coded,
    find_judge,
    generated,
    measured,
    plan,
    real,
)
from videoar.evaluation.judge import Clips
from videoar.evaluation.options import Evaluate
from videoar.evaluation.tables import CLEAN, CODEC, LONG, cells, markdown
from videoar.files import Json, load, save
from videoar.generation.progress import Paced


def evaluate(config: Evaluate, report: Report) -> str:
    """Judge a checkpoint under every kind of unit, and return the tables."""
    units = config.units or tuple(Checkpoint.find(config.checkpoint).meta.get("units", KINDS))
    for name in units:  # what is wrong with it is said before weights are loaded
        parse(name)
    names = ("num_inference_steps", "shift", "guidance_scale")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    shared: Json = {"checkpoint": config.checkpoint}
    shared |= {"num_prompts": config.num_prompts, "seconds": config.seconds}
    entries = [
        Entry(name=CLEAN, make=real, overrides=given, **shared),
        Entry(name=CODEC, make=coded, overrides=given, **shared),
        *(Entry(name=name, overrides=given | {"units": name}, **shared) for name in units),
    ]
    found = run(entries, config, report, find_judge(config, config.checkpoint))
    titled = tables.unit_tables(found, units=units)
    save(config.out, {"entries": found, "tables": titled})
    text = [markdown(cells(tables.headline(next(iter(titled.values())))))]
    for title, rows in titled.items():
        text += [f"{title}:", markdown(cells(rows))]
    return "\n\n".join(text) + "\n"


def run(entries: Sequence[Entry], config: Evaluate, report: Report, who: Who) -> Json:
    """Make and judge the videos of entries, and keep them, with a report of each batch and entry.

    If they are asked for, long videos of what generates are judged, too.

    Returns:
        All that the file holds then, by entry: settings, and what was seen in every video.
    """
    found, (judge, mark) = load(config.out, "entries", kind="evaluation"), who
    judge.prompts(max(entry.num_prompts for entry in entries), seed=config.seed)
    save(config.out, {"entries": found})  # fails now if it must fail
    how: Json = {"num_prompts": config.long_prompts, "seconds": config.long_seconds, "seeds": 1}
    long = [
        replace(entry, name=f"{entry.name}{LONG}", **how)
        for entry in entries
        if config.long_prompts and entry.make is generated
    ]
    jobs = []
    for job in plan((*entries, *long), report, {"seed": config.seed} | mark):
        if (name := job.entry.name) in found:
            held = f"{config.out} holds {name}"
            check_same(found[name]["settings"], job.settings, held=held, other="file")
        else:
            jobs.append(job)
    total = sum(job.num_videos * job.settings["num_frames"] for job in jobs)
    done, started, paced = 0, time.perf_counter(), Paced(report)
    for job in jobs:
        pipe, frames, videos = job.pipeline(), job.settings["num_frames"], []
        name, asked = job.entry.name, job.asked(judge, seed=config.seed)
        for start in range(0, len(asked), config.batch_size):
            batch = asked[start : start + config.batch_size]
            blocks = _heard(job.entry.make(pipe, batch, judge, num_frames=frames), name, paced)
            videos += measured(blocks, batch, fps=job.sampling.fps, judge=judge)
            done += len(batch) * frames
            left = (time.perf_counter() - started) * (total / done - 1)
            paced.say(f"{name}: {done / total:.0%} of all, {timedelta(seconds=round(left))} left")
        found[name] = {"settings": job.settings, "videos": videos}
        save(config.out, {"entries": found})
        scores = tables.by_prompt([found[name]], "last")
        report(f"{name}: {', '.join(f'{key} {100 * s.mean():.1f}' for key, s in scores.items())}")
    return found


def _heard(blocks: Iterator[Clips], name: str, paced: Paced) -> Iterator[Clips]:
    """Pass on what comes, and say how much it was if nothing else is said."""
    frames = 0
    for block in blocks:
        frames += block.shape[1]
        paced.hear(f"{name}: {frames} frames of {len(block)} videos")
        yield block
