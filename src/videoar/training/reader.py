"""Training a judge of own videos on labelled ones."""

import functools
import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tyro.conf import arg

from videoar.checkpoints.checkpoint import save_checkpoint
from videoar.checks import Options, Report
from videoar.core.loss import on
from videoar.data.batches import Batches
from videoar.data.options import TestShare
from videoar.encoders.codec import Video, from_frames
from videoar.evaluation.labels import LABELS, Part, outline, read_labels, spread, vocabulary
from videoar.evaluation.reader import NOTHING, ReaderConfig, StateReader, scores
from videoar.files import Json
from videoar.training.loop import TrainConfig
from videoar.training.objectives import Named, Objective

IGNORED = -1  # as a target
CACHED = 4_000_000_000  # bytes of frames that are kept in memory


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(Options):
    """Train a judge on a folder of labelled videos."""

    footage: Annotated[Path, arg(aliases=["--data.path"])]
    """Folder with labels.jsonl, which docs/training.md explains, and the videos."""
    attributes: tuple[str, ...] = ()
    """Fields of the labels to read; all words by default."""
    apart: tuple[str, ...] = ()
    """Fields whose values are held out together, such as color position: what is tested was then
    never seen. By default every video is for itself."""
    held_out: TestShare = 0.1
    """Share of the videos that are kept out of training, to test on."""
    reader: ReaderConfig = field(default_factory=ReaderConfig)
    """Shape of the judge."""

    def check(self, config: TrainConfig) -> None:
        read_labels(self.footage, only=self.attributes, apart=self.apart, share=self.held_out)

    def build(self, config: TrainConfig, report: Report) -> "JudgeTask":
        return JudgeTask(self, config, report)


class LabelledClips:
    """Clips of labelled parts: whole ones, windows of them, and frozen ones."""

    def __init__(self, parts: list[Part], config: ReaderConfig) -> None:
        self.parts, self.config, self.stored = parts, config, 2 * config.num_frames - 1
        size = self.stored * config.size**2 * 3
        self.frames = functools.lru_cache(max(1, CACHED // size))(
            lambda index: parts[index].clip(self.stored, size=config.size)
        )

    def __len__(self) -> int:
        return len(self.parts)

    def get(self, indices: list[int], rng: np.random.Generator) -> dict[str, Any]:
        made = [self.clip(index, self._window(rng)) for index in indices]
        video = from_frames(np.stack([clip for clip, _ in made]))
        words = {name: torch.tensor([own[name] for _, own in made]) for name in made[0][1]}
        return {"video": video} | words

    def _window(self, rng: np.random.Generator) -> tuple[int, int]:
        """Draw the first and the last frame of a clip, of those that are stored."""
        last, kind = self.stored - 1, rng.random()
        if kind < 0.5:  # about all
            return int(rng.integers(3)), last - int(rng.integers(3))
        first, second = sorted(rng.integers(self.stored, size=2).tolist())
        return (first, first) if kind < 0.65 else (first, second)

    def clip(self, index: int, window: tuple[int, int]) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the frames of a window, and the numbers of the words for it."""
        part, config = self.parts[index], self.config
        chosen = window[0] + spread(window[1] - window[0], config.num_frames)
        moments = spread(part.last - part.first, self.stored)[chosen]
        states = {k: [words[m] for m in moments] for k, words in part.states.items()}
        deeds = self._deeds(part, states, window)
        said = part.things | deeds | states
        said = dict.fromkeys(config.states, [None] * config.num_frames) | said
        targets = {name: _numbers(words, said.get(name)) for name, words in config.heads.items()}
        return self.frames(index)[chosen], targets

    def _deeds(self, part: Part, states: Json, window: tuple[int, int]) -> Json:
        """Return what happens in a window of a part: all, nothing, or none that can be said."""
        told = [outline(part.states[name]) for name in states]
        seen, changes = list(map(outline, states.values())), any(len(words) > 1 for words in told)
        length = window[1] - window[0]
        if seen == told if changes else length > self.stored - 6:
            return part.deeds
        rests = changes and all(words[0] and len({*words}) == 1 for words in states.values())
        return dict.fromkeys(part.deeds, NOTHING) if rests or not length else {}


def _numbers(words: tuple[str, ...], said: Any) -> Any:
    """Return the number of a word, or of each; or that there is none."""
    if isinstance(said, list):
        return [_numbers(words, word) for word in said]
    return words.index(said) if said in words else IGNORED


class Reading(Objective):
    """Train a reader on clips that are now and then blurred, noisy, darker or paler.

    So what a codec or a generator loses does not mislead it.
    """

    def __init__(self, reader: StateReader):
        self.module = reader

    def loss(self, batch: Named, rng: torch.Generator, *, step: int = 0) -> Named:
        targets = dict(batch)
        logits = self.module(self._spoilt(targets.pop("video"), rng))
        losses = list[Tensor]()
        for name, target in targets.items():
            words = logits[name].flatten(0, -2), target.flatten()
            losses.append(F.cross_entropy(*words, ignore_index=IGNORED, reduction="none").mean())
        return {"loss": torch.stack(losses).sum()}

    def _spoilt(self, video: Video, rng: torch.Generator) -> Video:
        strength = torch.rand((3, len(video), 1, 1, 1, 1), **on(rng))
        side = video.shape[-1]
        smaller = int(torch.randint(side // 2, 2 * side, (), **on(rng)))
        if smaller < side:
            how = {"mode": "bilinear", "antialias": True}
            small = F.interpolate(video.flatten(0, 1), (smaller, smaller), **how)
            video = F.interpolate(small, (side, side), **how).unflatten(0, video.shape[:2])
        noise = torch.randn(video.shape, **on(rng))
        video = video * (0.85 + 0.3 * strength[0]) + 0.2 * (strength[1] - 0.5)
        return video + 0.1 * strength[2] * noise


class JudgeTask:
    """A `Task`: what the loop needs to train a judge."""

    def __init__(self, task: JudgeConfig, config: TrainConfig, report: Report) -> None:
        how = {"only": task.attributes, "apart": task.apart, "share": task.held_out}
        self.labels, parts = task.footage / LABELS, read_labels(task.footage, **how)
        known = [part for part in parts if not part.held_out]
        self.apart = [part for part in parts if part.held_out]
        words: Json = {kind: vocabulary(known, kind) for kind in ("things", "deeds", "states")}
        if not any(words.values()) or not self.apart:
            raise ValueError(
                f"{self.labels} labels {len(known)} parts to train on and {len(self.apart)} to test"
                f" on with {sum(map(len, words.values()))} attributes of two words or more: label"
                " more videos"
            )
        report(f"{len(known)} parts of videos to train on, {len(self.apart)} held out")
        reader = replace(task.reader, apart=task.apart, held_out=task.held_out, **words)
        self.objective, clips = Reading(StateReader(reader)), LabelledClips(known, reader)
        self.batches = Batches(clips, batch_size=config.batch_size, seed=config.seed)

    def sources(self) -> dict[str, str]:
        return {str(self.labels): hashlib.sha256(self.labels.read_bytes()).hexdigest()[:16]}

    def validate(self, module: StateReader, *, step: int) -> dict[str, float]:
        """Return the share of the parts held out in which each attribute is read right."""
        right = Counter[str]()
        for part in self.apart:
            frames = part.clip(module.config.num_frames, size=module.config.size)
            (seen,) = module.read(frames[None])
            right.update(scores(seen, part.told()))
        return {name: count / len(self.apart) for name, count in right.items()}

    def export(self, folder: Path, module: StateReader, meta: dict[str, Any]) -> None:
        save_checkpoint(folder, {"judge": module.half()}, meta, overwrite=True)
