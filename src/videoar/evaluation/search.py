"""Search for the partitions that cost a checkpoint least, one for every number of passes.

A segment reads the true frames before it, whatever they were cut into: so what it costs depends on
where it begins and on its scheme alone, and dynamic programming over the ends of segments is exact.

The cost is an energy score (Gneiting and Raftery 2007, eq. 21) of what few steps make of a segment:
E|X - x| - E|X - X'| / 2 over draws X for one clip x. Of it is taken off the score of frames made
one by one in many steps, without guidance, which stands for what no sampler can know. A score grows
with the root of the number of values: times that root, the parts add up.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from videoar.checks import Report
from videoar.core.schemes import KINDS, names, parse
from videoar.core.tokens import Latents
from videoar.data.latents import LatentShards, check_codec, text_module
from videoar.evaluation.metrics import bootstrap_interval
from videoar.evaluation.options import PrintUnits
from videoar.evaluation.tables import cells, columns
from videoar.generation.config import GenerationConfig, Plan
from videoar.generation.latents import Assembler, known_tokens
from videoar.generation.pipeline import VideoPipeline

MANY = 4  # times the steps
TOGETHER = 16  # clips
Costs = dict[tuple[int, str], Float[np.ndarray, " clips"]]
"""Of the segments of a scheme, by their first frame and its name."""


@dataclass(frozen=True)
class Segment:
    """Frames from `start` on, in units of one scheme."""

    start: int
    name: str
    frames: int
    waves: int
    cost: float


Partition = tuple[int, float, tuple[Segment, ...]]
"""Its waves, its cost, and what it is made of."""


def pareto(segments: Iterable[Segment], frames: int) -> list[Partition]:
    """Return the partitions of so many frames than which none of fewer waves costs less."""
    best: list[dict[int, Partition]] = [{} for _ in range(frames + 1)]
    best[0][0] = (0, 0.0, ())
    for segment in sorted(segments, key=lambda segment: segment.start):
        end = segment.start + segment.frames
        for waves, cost, parts in best[segment.start].values() if end <= frames else ():
            found = (waves + segment.waves, cost + segment.cost, (*parts, segment))
            known = best[end].get(found[0], found)
            best[end][found[0]] = min(found, known, key=lambda partition: partition[1])
    curve: list[Partition] = []
    for _, found in sorted(best[frames].items()):
        if not curve or found[1] < curve[-1][1]:
            curve.append(found)
    return curve


def energy_score(
    made: Float[Tensor, "clips draws values"], real: Float[Tensor, "clips 1 values"]
) -> Float[np.ndarray, " clips"]:
    """Return E|X - x| - E|X - X'| / 2 times the root of the number of values, without bias."""
    draws, values = made.shape[1:]
    apart = torch.cdist(made, made).sum((1, 2)) / (draws * (draws - 1))
    score = (made - real).norm(dim=-1).mean(1) - apart / 2
    return (score * values**0.5).double().numpy()


@dataclass(frozen=True)
class Clips:
    """Clips of a folder, and a pipeline that continues their beginnings."""

    pipe: VideoPipeline
    options: GenerationConfig
    latents: Latents
    words: Float[Tensor, "clips words text_channels"]
    draws: int

    def continued(
        self, start: int, name: str, options: GenerationConfig
    ) -> Float[Tensor, "clips draws frames channels height width"]:
        """Return what is made of the frames from `start` on in units of a scheme."""
        units, made = "+".join([*["frame"] * start, name]), []
        options = replace(options, units=units, window_frames=None)
        lattice = self.pipe.lattice(units, 1)  # of a whole segment
        patch = self.pipe.transformer.config.patch
        for first in range(0, len(self.latents), TOGETHER):
            clips, words = (
                x[first : first + TOGETHER].repeat_interleave(self.draws, 0)
                for x in (self.latents, self.words)
            )
            seeds = tuple(range(first * self.draws, first * self.draws + len(clips)))
            plan = Plan(prompts=("",) * len(clips), seeds=seeds, options=options)
            how = {"known": known_tokens(clips[:, :start], lattice, patch=patch) if start else {}}
            text, assembler = self.pipe.text(plan, before=words), Assembler(lattice, patch=patch)
            sampler = self.pipe.sampler(plan, lattice.frames, text=text, **how)
            parts = [assembler.add(each.unit, each.tokens) for each in sampler]
            made.append(torch.cat([part for part in parts if part is not None], dim=1)[:, start:])
        return torch.cat(made).unflatten(0, (-1, self.draws))

    def waves(self, menu: Iterable[str]) -> dict[str, int]:
        """Return the waves of a segment of each scheme."""
        return {name: int(self.pipe.lattice(name, 1).waves[-1]) + 1 for name in menu}

    def costs(self, menu: dict[str, int], frames: int, start: int, report: Report) -> Costs:
        """Measure the segments from a frame on, of the schemes of a menu, given with their frames.

        What none of them reaches is not measured.
        """
        found: Costs = {}
        many = self.options.replaced(num_inference_steps=MANY * (len(self.options.schedule) - 1))
        here = {name: size for name, size in menu.items() if start + size <= frames}
        best = self.continued(start, "+".join(["frame"] * max(here.values(), default=1)), many)
        for name, size in here.items():
            sets = self.continued(start, name, self.options), best, self.latents[:, None, start:]
            made, many_steps, real = (x[:, :, :size].flatten(2) for x in sets)
            found[start, name] = energy_score(made, real) - energy_score(many_steps, real)
            mean = found[start, name].mean()
            report(f"frames {start} to {start + size - 1} as {name}: {mean:.4g}")
        return found


def clips_of(
    pipe: VideoPipeline, folder: Path, *, frames: int, count: int, draws: int, **changes: Any
) -> Clips:
    """Return the first clips of a folder that are long enough, to be continued with changes.

    Raises:
        ValueError: there are too few, or they are of another codec.
    """
    shards = LatentShards(folder, tokenize=pipe.prompt_encoder.tokenize)
    check_codec(folder, shards.info, pipe.codec, checkpoint="the one that is searched")
    long = [k for k, clip in enumerate(shards.clips) if clip["frames"] >= frames][:count]
    if len(long) < 4:
        raise ValueError(f"{folder} has {len(long)} clips of {frames} latent frames: use 4 or more")
    batch = shards.get(long, np.random.default_rng(0))
    clips, words = batch["latents"][:, :frames], batch["text"]
    _, *stride = pipe.codec.stride
    height, width = (side * each for side, each in zip(clips.shape[3:], stride, strict=True))
    options = replace(pipe.sampling.replaced(**changes), guidance_scale=1.0, unit_steps={})
    words = text_module(pipe.prompt_encoder, folder)(words)
    return Clips(replace(pipe, height=height, width=width), options, clips, words, draws)


@torch.inference_mode()
def run(config: PrintUnits, report: Report) -> str:
    """Choose partitions on half of the clips, measure them on the others, and return the table."""
    assert config.search is not None
    checkpoint, folder = config.search
    pipe, frames = VideoPipeline.from_pretrained(checkpoint), config.frames
    known = names(config.schemes or pipe.meta.get("units", KINDS))
    menu = {name: parse(name).frames or frames for name in known}
    how = {"frames": frames, "count": config.clips, "draws": config.draws, **config.changes}
    clips, costs = clips_of(pipe, folder, **how), Costs()
    for start in range(frames):
        costs |= clips.costs(menu, frames, start, report)
    if np.mean(list(costs.values())) < 0:
        report("many steps are worse than few: search with what the checkpoint was distilled from")
    waves, steps = clips.waves(menu), len(clips.options.schedule) - 1
    segments = [
        Segment(start, name, menu[name], waves[name], float(found[::2].mean()))
        for (start, name), found in costs.items()
    ]
    of_one = [pareto((s for s in segments if s.name == name), frames) for name in menu]
    rows = []
    for count, _, parts in pareto(segments, frames):
        fitting = [found for curve in of_one for found in curve if found[0] <= count]
        single = min(fitting, key=lambda found: found[1])[2] if fitting else parts
        both = ([costs[s.start, s.name][1::2] for s in each] for each in (parts, single))
        ours, theirs = (np.sum(each, axis=0) for each in both)
        row = {"passes": count * steps}
        row |= {"cost": f"{bootstrap_interval(ours):.4g}", "of one scheme": single[0].name}
        row |= {"minus that": f"{bootstrap_interval(ours - theirs):.4g}"}
        rows.append(row | {"partition": "+".join(part.name for part in parts)})
    return columns(cells(rows))
