"""Checkpoints beside each other: the same prompts, the same noise, intervals of the differences.

An entry is a name with one checkpoint, or with several that differ in their seed of training: their
videos of one prompt are one observation. Every checkpoint samples as it says itself, but for
fields of `GenerationConfig` after its name, as in `toy?guidance_scale=1&num_inference_steps=2`.
"""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float

from videoar.checkpoints.checkpoint import Checkpoint
from videoar.data.world import held_out_prompts
from videoar.encoders.codec import from_frames
from videoar.evaluation.judge import Clips, judge_ends, judge_whole
from videoar.evaluation.metrics import bootstrap_interval, frechet_distance, frechet_interval
from videoar.evaluation.options import Compare
from videoar.evaluation.study import CLEAN, judged
from videoar.evaluation.tables import HEADLINE, cell, markdown
from videoar.files import Json, load, save
from videoar.generation.config import GenerationConfig
from videoar.generation.pipeline import VideoPipeline

LONG = " (long)"
KEPT = ("prompt", "seed", "scores", "features", "first", "last")


@dataclass(frozen=True)
class Entry:
    """What is compared: a name, its checkpoints and its unit."""

    name: str
    checkpoints: tuple[str, ...]

    @classmethod
    def read(cls, text: str) -> "Entry":
        """Read `NAME=CHECKPOINT,CHECKPOINT`, or a checkpoint alone."""
        name, equals, paths = text.partition("=")
        entry = cls(name, tuple((paths if equals else name).split(",")))
        if not name or not all(entry.checkpoints):
            raise ValueError(f"{text!r} names nothing: write NAME=CHECKPOINT,CHECKPOINT")
        return entry


def features(frames: Clips) -> Float[np.ndarray, "b c"]:
    """Describe videos by the encoder of the bundled codec, a fixed network that saw no generator.

    Per latent channel: its mean and deviation over all places, and its mean change in time.
    """
    codec = Checkpoint.find("toy").codec()
    with torch.inference_mode():
        latents = codec.encode(from_frames(frames[:, : 1 + (frames.shape[1] - 1) // 4 * 4]))
    change = latents.diff(dim=1).abs()
    parts = (latents.mean((1, 3, 4)), latents.std((1, 3, 4)), change.mean((1, 3, 4)))
    return torch.cat(parts, dim=1).double().numpy()


def run(config: Compare, report: Callable[[str], None]) -> str:
    """Make and judge the videos of all entries, and return the tables.

    What `config.out` holds already is kept, if weights and settings are the same.
    """
    entries = [Entry.read(text) for text in config.entries]
    if len({entry.name for entry in entries}) < len(entries):
        raise ValueError("two entries have one name: write NAME=CHECKPOINT with other names")
    parts = load(config.out, "parts", kind="evaluation")
    save(config.out, {"parts": parts})
    settings = {"num_prompts": config.num_prompts, "seeds": config.seeds, "seed": config.seed}
    settings |= {"seconds": config.seconds, "units": config.units}
    made = [(entry.name, checkpoint) for entry in entries for checkpoint in entry.checkpoints]
    for name, checkpoint in ((CLEAN, "toy"), *made):
        path, _, given = checkpoint.partition("?")
        kinds: Json = {"": settings | {"weights": Checkpoint.find(path).fingerprint()}}
        if config.long_prompts and name != CLEAN:
            kinds[LONG] = kinds[""] | {"long": [config.long_prompts, config.long_seconds]}
        for suffix, asked in kinds.items():
            key = f"{name} {checkpoint}{suffix}"
            if parts.get(key, {}).get("settings") == asked:
                continue
            started = time.perf_counter()
            pipe = VideoPipeline.from_pretrained(path)
            pipe.sampling = with_fields(pipe.sampling, given)
            parts[key] = {"settings": asked} | _part(pipe, config, name, suffix)
            save(config.out, {"parts": parts})
            report(f"{key}: {time.perf_counter() - started:.0f} s")
    text = _tables(entries, parts, config)
    save(config.out, {"parts": parts, "tables": text})
    return text


def with_fields(sampling: GenerationConfig, given: str) -> GenerationConfig:
    """Override fields by `name=value&name=value`; values are JSON, or words."""
    changes: Json = {}
    for pair in filter(None, given.split("&")):
        name, equals, value = pair.partition("=")
        if not equals or name not in vars(sampling):
            raise ValueError(
                f"{pair!r} changes no field of the sampling: write NAME=VALUE with a name among"
                f" {', '.join(vars(sampling))}"
            )
        try:
            changes[name] = json.loads(value)
        except ValueError:
            changes[name] = value
    return replace(sampling, **changes)


def _part(pipe: VideoPipeline, config: Compare, name: str, suffix: str) -> Json:
    """Make and judge short or long videos, and say how they were made."""
    sampling, units = pipe.sampling, config.units or pipe.sampling.units
    assert isinstance(units, str)
    count, seconds, judge = config.num_prompts, config.seconds, _judge_and_describe
    if suffix:
        count, seconds, judge = config.long_prompts, config.long_seconds, judge_ends
    prompts = [
        prompt | {"seed": prompt["seed"] + 1_000_003 * seed}
        for seed in range(1 if suffix or name == CLEAN else config.seeds)
        for prompt in held_out_prompts(count, seed=config.seed)
    ]
    how = {"num_frames": round(seconds * sampling.fps), "batch_size": config.batch_size}
    batches = judged(pipe, CLEAN if name == CLEAN else units, prompts, judge, **how)
    steps = sampling.num_inference_steps if sampling.sigmas is None else len(sampling.sigmas) - 1
    return {
        "units": units,
        "steps": steps,
        "passes_per_second": _passes(pipe, units),
        "videos": [
            {key: video[key] for key in KEPT if key in video}
            for videos in batches
            for video in videos
        ],
    }


def _judge_and_describe(blocks: Iterable[Clips], prompts: list[Json], *, fps: int) -> list[Json]:
    clips = np.concatenate(list(blocks), axis=1)
    found = zip(judge_whole(iter([clips]), prompts, fps=fps), features(clips).tolist(), strict=True)
    return [video | {"features": described} for video, described in found]


def _passes(pipe: VideoPipeline, units: str) -> float:
    """Count the passes for a second of video; guidance makes two of one."""
    fps, stride = pipe.sampling.fps, pipe.codec.stride[0]
    generation = pipe.generate(["a ball"], num_frames=1 + 4 * stride, seeds=[0], units=units)
    frames = sum(block.shape[1] for block in generation)
    twice = 2 if pipe.sampling.guidance_scale != 1 else 1
    return generation.stats.passes * twice * fps / frames


def _by_prompt(parts: list[Json], key: str, scores: str = "scores") -> list[float]:
    """Average a score over all videos of a prompt, in the order of the prompts."""
    found: dict[str, list[float]] = {}
    for video in (video for part in parts for video in part["videos"]):
        found.setdefault(video["prompt"], []).append(video[scores][key])
    return [float(np.mean(values)) for values in found.values()]


def _tables(entries: list[Entry], parts: Json, config: Compare) -> str:
    reference = parts[f"{CLEAN} toy"]["videos"]
    real = np.array([video["features"] for video in reference])
    judged = list(HEADLINE.values())
    rows = [["videos of", *judged, "Frechet", "diversity", "steps", "passes/s"]]
    minus, drift = [["minus the first", *judged]], [["last - first 4 s", *judged]]
    ceiling = [cell([video["scores"][key] for video in reference]) for key in HEADLINE]
    rows.append([CLEAN, *ceiling, "", "", "", ""])
    first: list[list[float]] = []
    for entry in entries:
        own = [parts[f"{entry.name} {checkpoint}"] for checkpoint in entry.checkpoints]
        scores = [_by_prompt(own, key) for key in HEADLINE]
        cells = [_distance(own, real), _diversity(own, config.seeds), str(own[0]["steps"])]
        cells.append(f"{own[0]['passes_per_second']:.1f}")
        rows.append([entry.name, *map(cell, scores), *cells])
        if first:
            minus.append([entry.name, *map(cell, np.subtract(scores, first))])
        first = first or scores
        if config.long_prompts:
            long = [parts[f"{entry.name} {path}{LONG}"] for path in entry.checkpoints]
            last = [_by_prompt(long, key, "last") for key in HEADLINE]
            changes = np.subtract(last, [_by_prompt(long, key, "first") for key in HEADLINE])
            drift.append([entry.name, *map(cell, changes)])
    tables = [table for table in (rows, minus, drift) if len(table) > 1]
    return "\n\n".join(markdown(table) for table in tables) + "\n"


def _distance(parts: list[Json], real: Float[np.ndarray, "videos features"]) -> str:
    """Return the Fréchet distance, the mean over checkpoints: more videos would be nearer."""
    made = [np.array([video["features"] for video in part["videos"]]) for part in parts]
    values = [(frechet_distance(one, real), *frechet_interval(one, real)) for one in made]
    mean, low, high = np.mean(values, axis=0)
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def _diversity(parts: list[Json], seeds: int) -> str:
    """Return how far apart videos of one prompt with different noise are, in features."""
    if seeds < 2:
        return ""
    apart: list[float] = []
    for part in parts:
        described = np.array([video["features"] for video in part["videos"]])
        first, second = described.reshape(seeds, -1, described.shape[1])[:2]
        apart += np.linalg.norm(first - second, axis=1).tolist()
    return f"{bootstrap_interval(apart):.2f}"
