"""What is measured: videos of the same prompts and noise, made and judged in one way or another.

Entries are checkpoints with fields of `GenerationConfig` beside their own; all get the same prompts
and seeds, so they are compared in pairs. The judge is that of the procedural world, or one that was
trained; its ceiling is its score on real clips of the same prompts. No scene is trained on, but its
words may be: one thing on a background of the procedural world has only 1,536 combinations.
"""

import contextlib
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from videoar.checkpoints.checkpoint import Checkpoint, assets
from videoar.data.video import VideoWriter
from videoar.encoders.codec import from_frames, to_frames
from videoar.evaluation.judge import WINDOW_SECONDS, WORLD, Clips, Judge, windows
from videoar.evaluation.looks import pictures
from videoar.evaluation.metrics import Features, PixelUnits, motion, properties, seams, slope
from videoar.evaluation.options import Judged
from videoar.evaluation.reader import FOOTAGE, Footage, TrainedJudge, held_out
from videoar.files import Json, to_json
from videoar.generation.config import AUTO, GenerationConfig
from videoar.generation.pipeline import VideoPipeline

Asked, Made = list[Json], Iterator[Clips]
UnitsOf = Callable[[range], PixelUnits]
"""Of some frames of a video, the unit in which every pixel is made."""
Who = tuple[Judge, Json]
"""A judge, and what tells it from others in the settings of a study."""


def generated(pipe: VideoPipeline, prompts: Asked, judge: Judge, *, num_frames: int) -> Made:
    """Yield the frames of a batch of generated videos as they come."""
    texts, seeds = ([prompt[key] for prompt in prompts] for key in ("prompt", "seed"))
    yield from pipe.generate(texts, num_frames=num_frames, seeds=seeds)


def real(pipe: VideoPipeline, prompts: Asked, judge: Judge, *, num_frames: int) -> Made:
    """Yield real clips of what is asked for."""
    size = pipe.height, pipe.width
    yield judge.real(prompts, num_frames=num_frames, size=size, fps=pipe.sampling.fps)


def coded(pipe: VideoPipeline, prompts: Asked, judge: Judge, *, num_frames: int) -> Made:
    """Yield real clips that went through the codec, group by group, so that an hour fits."""
    codec, memory, decode = pipe.codec, None, pipe.codec.stream_decoder()
    stride, start = codec.stride[0], 0
    whole = 1 + math.ceil((num_frames - 1) / stride) * stride
    (clips,) = real(pipe, prompts, judge, num_frames=whole)
    for end in range(1, whole + 1, stride):
        frames = from_frames(clips[:, start:end])
        with torch.no_grad():
            latents, memory = codec.encode_step(frames if start else codec.pad(frames), memory)
        yield to_frames(decode(latents))[:, : num_frames - start]
        start = end


def features(frames: Clips) -> Features:
    """Describe videos by the encoder of the bundled codec, a fixed network that saw no generator.

    Per latent channel: its mean and deviation over all places, and its mean change in time.
    """
    codec = Checkpoint.find(assets() / "toy").codec()
    stride = codec.stride[0]
    with torch.inference_mode():
        whole = 1 + (frames.shape[1] - 1) // stride * stride
        latents = codec.encode(from_frames(frames[:, :whole]))
    change = latents.diff(dim=1).abs()
    parts = (latents.mean((1, 3, 4)), latents.std((1, 3, 4)), change.mean((1, 3, 4)))
    return torch.cat(parts, dim=1).double().numpy()


SLICE_SECONDS = 0.5
"""Of a video whose brightness and the like are one point of a curve."""


def measured(
    blocks: Made, prompts: Asked, *, fps: int, judge: Judge, labels: Mapping[str, UnitsOf]
) -> list[Json]:
    """Judge videos of any length window by window, and measure how they look, move and drift.

    No more than one window of frames is kept, however long the videos are.

    Args:
        blocks: their frames, as they come.
        prompts: one for each; what is in them is returned, too.
        fps: frames per second.
        judge: who judges.
        labels: by kind of unit, what tells the unit of every pixel: where seams are looked for.

    Returns:
        For each, `scores`, the mean over its windows, `first` and `last`; `curves`, values from
        window to window, or from slice to slice, with the `slopes` per second of those that have
        one; the rest is measured in the last window. A rest that fills no window is not looked at.
    """
    size, start = round(WINDOW_SECONDS * fps), 0
    parts: list[list[Json]] = [[] for _ in prompts]
    last: tuple[range, Clips] | None = None
    for window in windows(blocks, size=size):
        if start == 0 or window.shape[1] == size:
            last = range(start, start + window.shape[1]), window
            looked = judge.look(window, prompts, fps=fps)
            for i, clip in enumerate(window):
                slices = min(SLICE_SECONDS, len(clip) / fps)
                looked[i]["slices"] = properties(clip, fps=fps, window_seconds=slices)
                parts[i].append(looked[i])
        start += window.shape[1]
    assert last is not None, "a video has frames"
    here, window = last
    described, places = pictures(window), features(window).round(5).tolist()
    for i, (clip, own) in enumerate(zip(window, parts, strict=True)):
        own[-1] |= {"features": places[i], "motion": motion(clip)}
        own[-1]["seams"] = {k: seams(clip, units(here)) for k, units in labels.items()}
        if described is not None:
            own[-1]["pictures"] = described[i].round(3).tolist()
    return [prompt | _whole(own) for prompt, own in zip(prompts, parts, strict=True)]


def _whole(parts: Sequence[Json]) -> Json:
    """Put what was measured in the windows of a video together."""
    scores = {name: [part["scores"][name] for part in parts] for name in parts[0]["scores"]}
    slices = [part.pop("slices") for part in parts]
    values = {name: [v for one in slices for v in one[name]] for name in slices[0]}
    apart = dict.fromkeys(scores, WINDOW_SECONDS) | dict.fromkeys(values, SLICE_SECONDS)
    curves = scores | values
    long = {name: each for name, each in curves.items() if len(each) > 1}
    return parts[-1] | {
        "scores": {name: float(np.mean(each)) for name, each in scores.items()},
        "first": parts[0]["scores"],
        "last": parts[-1]["scores"],
        "seen": {"first": parts[0]["seen"], "last": parts[-1]["seen"]},
        "curves": curves,
        "slopes": {name: slope(each, window_seconds=apart[name]) for name, each in long.items()},
    }


def find_judge(config: Judged, checkpoint: str, *, seconds: float = 0.0) -> Who:
    """Return who judges: whom the options name, or whom the checkpoint brings along; and its mark.

    Of footage alone the clips are asked for that last so long, and nobody reads the videos.

    Raises:
        ValueError: it lacks the videos by which it judges, or there is none.
    """
    found = Checkpoint.find(config.judge or checkpoint)
    folder, footage = found.source / "judge", config.footage
    trained = folder.is_dir()
    if trained and footage is None and (folder / FOOTAGE).is_dir():
        footage = folder / FOOTAGE
    if (trained and footage is None) or (config.judge and not trained):
        raise ValueError(
            f"{found.source} brings {'a' if trained else 'no'} judge of labelled videos: one takes"
            " --footage, the folder of these, if it brings none along, and --judge, the checkpoint"
            " of `videoar train judge`, if the first checkpoint brings none"
        )
    if footage is None:
        return WORLD, {}
    if not trained:
        return Footage(footage, held_out(footage, seconds=seconds)), {"footage": str(footage)}
    return TrainedJudge(folder, footage), {"judge_weights": found.fingerprint()}


def read_line(text: str) -> tuple[str, tuple[str, ...]]:
    """Read `NAME=CHECKPOINT,CHECKPOINT`, or a checkpoint alone."""
    name, equals, paths = text.partition("=")
    if not equals or "?" in name:  # what follows a checkpoint's own name is no other one
        name = paths = text
    # Commas of a changed field, as in units=multiscale:4,2,1 or sigmas=[1,0.5,0], part nothing.
    comma = r",(?! ?[\d.]+\]?(?:[,/&]|$))" if "?" in paths else ","
    checkpoints = tuple(re.split(comma, paths))
    if not name or not all(checkpoints):
        raise ValueError(f"{text!r} names nothing: write NAME=CHECKPOINT,CHECKPOINT")
    return name, checkpoints


def read_overrides(text: str) -> Json:
    """Read fields of `GenerationConfig` from `name=value&name=value`; values are JSON, or words."""
    changes, known = {}, [field.name for field in fields(GenerationConfig)]
    for pair in filter(None, text.split("&")):
        name, equals, value = pair.partition("=")
        if not equals or name not in known:
            raise ValueError(
                f"{pair!r} changes no field of the sampling: write NAME=VALUE with a name among"
                f" {', '.join(known)}"
            )
        changes[name] = value
        with contextlib.suppress(ValueError):
            changes[name] = json.loads(value)
    return changes


@dataclass(frozen=True, kw_only=True)
class Job:
    """Videos that one checkpoint makes in one way, and what tells them from others."""

    name: str
    """In the file; no other job has it."""
    checkpoint: str
    sampling: GenerationConfig
    settings: Json
    make: Callable[..., Made] = generated

    @property
    def routed(self) -> bool:
        """Whether units are chosen for each video on its own: none has those of another."""
        return self.make is generated and self.sampling.units == AUTO

    @property
    def num_videos(self) -> int:
        return self.settings["num_prompts"] * self.settings["seeds"]

    def pipeline(self) -> VideoPipeline:
        return replace(load_pipeline(self.checkpoint)[0], sampling=self.sampling)

    def asked(self, judge: Judge, *, seed: int) -> list[Json]:
        """Return the prompts with their seeds: all of them, once for each video of a prompt."""
        prompts = judge.prompts(self.settings["num_prompts"], seed=seed)
        return [
            prompt | {"seed": prompt["seed"] + 1_000_003 * k}
            for k in range(self.settings["seeds"])
            for prompt in prompts
        ]


@functools.lru_cache(maxsize=1)  # neighbours often share a checkpoint
def load_pipeline(checkpoint: str) -> tuple[VideoPipeline, str]:
    """Load a checkpoint, and take its fingerprint."""
    return VideoPipeline.from_pretrained(checkpoint), Checkpoint.find(checkpoint).fingerprint()


def plan(name: str, line: str, *, seconds: float, about: Json, **changes: Any) -> Job:
    """Plan the videos of a checkpoint, and say what is wrong with it before others take hours.

    Args:
        name: of the job.
        line: the checkpoint, and what of the sampling it overrides, as `toy?shift=3`.
        seconds: the length of a video.
        about: what else is kept in the settings, `num_prompts` and `seeds` among it.
        changes: further fields of `GenerationConfig`.
    """
    checkpoint, _, text = line.partition("?")
    pipe, weights = load_pipeline(checkpoint)
    sampling = pipe.sampling.replaced(**read_overrides(text) | changes)
    num_frames = round(seconds * sampling.fps)
    replace(pipe, sampling=sampling).generate(["a ball"], num_frames=num_frames, seeds=[0])
    own = {"num_inference_steps": sampling.steps, "num_frames": num_frames, "weights": weights}
    settings = to_json(vars(sampling) | own | about)
    return Job(name=name, checkpoint=checkpoint, sampling=sampling, settings=settings)


def written(blocks: Made, files: Mapping[int, Path], *, first: int, fps: int) -> Made:
    """Pass frames on, and write some videos by their number; `first` is that of the first one."""
    with contextlib.ExitStack() as stack:
        opened = {i: VideoWriter(path, fps=fps, overwrite=True) for i, path in files.items()}
        writers = {i: stack.enter_context(writer) for i, writer in opened.items()}
        for block in blocks:
            for i, writer in writers.items():
                writer.write(block[i - first])
            yield block


def speed(pipe: VideoPipeline, *, num_frames: int) -> Json:
    """Generate one video, and return what it cost; guidance makes two passes of one."""
    generation = pipe.generate(["a ball"], num_frames=num_frames, seeds=[0])
    frames = sum(block.shape[1] for block in generation)
    stats, twice = generation.stats, 2 if pipe.sampling.guidance_scale != 1 else 1
    seconds = frames / pipe.sampling.fps
    return {
        "passes": stats.passes * twice / seconds,
        "seconds": (stats.model_seconds + stats.decode_seconds) / seconds,
        "first_frame": stats.first_frame_seconds,
        "cache": stats.cache_bytes,
    }
