"""Checkpoints beside each other: the same prompts, the same noise, intervals of the differences.

An entry is a name with one checkpoint, or with several that differ in their seed of training: their
videos of one prompt are one observation. Every checkpoint samples as it says itself, but for
fields of `Sampling` that follow its name, as in `toy?guidance_scale=1&num_inference_steps=2`.
"""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8

from videoar.checkpoint import resolve
from videoar.evaluate import (
    CLEAN,
    fingerprint,
    held_out_prompts,
    judge_ends,
    judge_whole,
    load_parts,
    make,
    save,
)
from videoar.metrics import bootstrap_interval, frechet_distance, frechet_interval
from videoar.options import Compare
from videoar.pipeline import VideoPipeline, from_frames
from videoar.sampling import Sampling
from videoar.tables import markdown
from videoar.tasks import load_codec

Json = dict[str, Any]
JUDGED = ("color", "shape", "motion", "all")
LONG = " (long)"


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


def features(frames: UInt8[np.ndarray, "batch frames height width 3"]) -> Float[np.ndarray, "b c"]:
    """Describe videos by the encoder of the bundled codec, a fixed network that saw no generator.

    Per latent channel: its mean and deviation over all places, and its mean change in time.
    """
    codec = load_codec(resolve("toy"))
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
    parts = load_parts(config.out)
    save(config.out, {"parts": parts})
    prompts = held_out_prompts(config.num_prompts, seed=config.seed)
    settings = {"num_prompts": config.num_prompts, "seeds": config.seeds, "seed": config.seed}
    settings |= {"seconds": config.seconds, "units": config.units}
    for name, checkpoint in _jobs(entries):
        path, _, given = checkpoint.partition("?")
        key, weights = f"{name} {checkpoint}", fingerprint(resolve(path))
        wanted = settings | {"weights": weights}
        for suffix, count in (("", config.num_prompts), (LONG, config.long_prompts)):
            length = config.long_seconds if suffix else config.seconds
            asked = wanted | {"long": [count, length]} if suffix else wanted
            if not count or parts.get(key + suffix, {}).get("settings") == asked:
                continue
            pipe = VideoPipeline.from_pretrained(resolve(path))
            pipe.sampling = with_fields(pipe.sampling, given)
            units = config.units or pipe.sampling.units
            assert isinstance(units, str)
            reference = name == CLEAN
            started = time.perf_counter()
            seeds = range(1 if suffix or reference else config.seeds)
            found = [
                _videos(pipe, CLEAN if reference else units, prompts[:count], config, seed, suffix)
                for seed in seeds
            ]
            about: Json = {"settings": asked, "units": units, "steps": _steps(pipe)}
            about["passes_per_second"] = _passes(pipe, units)
            parts[key + suffix] = about | {
                "videos": [video for videos in found for video in videos]
            }
            save(config.out, {"parts": parts})
            report(f"{key}{suffix}: {time.perf_counter() - started:.0f} s")
    text = _tables(entries, parts, config)
    save(config.out, {"parts": parts, "tables": text})
    return text


def with_fields(sampling: Sampling, given: str) -> Sampling:
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


def _jobs(entries: Iterable[Entry]) -> Iterable[tuple[str, str]]:
    yield CLEAN, "toy"
    for entry in entries:
        yield from ((entry.name, checkpoint) for checkpoint in entry.checkpoints)


def _videos(
    pipe: VideoPipeline, units: str, prompts: list[Json], config: Compare, seed: int, suffix: str
) -> list[Json]:
    """Make the videos of all prompts with one seed of noise, and judge them."""
    fps, videos = pipe.sampling.fps, []
    frames = round((config.long_seconds if suffix else config.seconds) * fps)
    for start in range(0, len(prompts), config.batch_size):
        batch = prompts[start : start + config.batch_size]
        batch = [prompt | {"seed": prompt["seed"] + 1_000_003 * seed} for prompt in batch]
        made = make(pipe, units, batch, num_frames=frames)
        if suffix:
            videos += judge_ends(made, batch, fps=fps)
            continue
        clips = np.concatenate(list(made), axis=1)
        described = features(clips).tolist()
        judged = judge_whole(iter([clips]), batch, fps=fps)
        videos += [one | {"features": two} for one, two in zip(judged, described, strict=True)]
    keep = ("prompt", "seed", "scores", "features", "first", "last")
    return [{key: video[key] for key in keep if key in video} for video in videos]


def _steps(pipe: VideoPipeline) -> int:
    sigmas = pipe.sampling.sigmas
    return pipe.sampling.num_inference_steps if sigmas is None else len(sigmas) - 1


def _passes(pipe: VideoPipeline, units: str) -> float:
    """Count the passes for a second of video; guidance makes two of one."""
    fps, stride = pipe.sampling.fps, pipe.codec.stride[0]
    generation = pipe.generate(["a ball"], num_frames=1 + 4 * stride, seeds=[0], units=units)
    frames = sum(block.shape[1] for block in generation)
    twice = 2 if pipe.sampling.guidance_scale != 1 else 1
    return generation.stats.passes * twice * fps / frames


def _by_prompt(videos: list[list[Json]], key: str, scores: str = "scores") -> list[float]:
    """Average a score over all videos of a prompt, in the order of the prompts."""
    found: dict[str, list[float]] = {}
    for video in (video for each in videos for video in each):
        found.setdefault(f"{video['prompt']}", []).append(video[scores][key])
    return [float(np.mean(values)) for values in found.values()]


def _tables(entries: list[Entry], parts: Json, config: Compare) -> str:
    real = np.array([video["features"] for video in parts[f"{CLEAN} toy"]["videos"]])
    columns = [
        "colour",
        "shape",
        "motion",
        "all right",
        "Frechet",
        "diversity",
        "steps",
        "passes/s",
    ]
    rows = [["videos of", *columns]]
    minus, drift = [["minus the first", *columns[:4]]], [["last - first 4 s", *columns[:4]]]
    first: dict[str, list[float]] = {}
    ceiling = [video["scores"] for video in parts[f"{CLEAN} toy"]["videos"]]
    rows.append([CLEAN, *(_cell([s[key] for s in ceiling]) for key in JUDGED), "", "", "", ""])
    for entry in entries:
        own = [parts[f"{entry.name} {checkpoint}"] for checkpoint in entry.checkpoints]
        videos = [part["videos"] for part in own]
        scores = {key: _by_prompt(videos, key) for key in JUDGED}
        cells = [_cell(values) for values in scores.values()]
        cells += [_distance(own, real), _diversity(own, config.seeds), str(own[0]["steps"])]
        rows.append([entry.name, *cells, f"{own[0]['passes_per_second']:.1f}"])
        if first:
            pairs = [np.subtract(scores[key], first[key]) for key in JUDGED]
            minus.append([entry.name, *(_cell(values) for values in pairs)])
        first = first or scores
        if config.long_prompts:
            long = [parts[f"{entry.name} {path}{LONG}"]["videos"] for path in entry.checkpoints]
            ends = [[_by_prompt(long, key, end) for key in JUDGED] for end in ("last", "first")]
            pairs = [np.subtract(a, b) for a, b in zip(*ends, strict=True)]
            drift.append([entry.name, *(_cell(values) for values in pairs)])
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
    return _cell(apart, scale=1)


def _cell(values: Any, scale: float = 100) -> str:
    found = bootstrap_interval(values)
    digits = 1 if scale == 100 else 2
    low, mean, high = (f"{scale * v:.{digits}f}" for v in (found.low, found.mean, found.high))
    return f"{mean} [{low}, {high}]"
