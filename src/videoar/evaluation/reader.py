"""The judge of own videos: a small network, trained on labelled ones, that reads what one shows."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from videoar.data.latents import INFO_NAME, LatentShards
from videoar.encoders.codec import Video, from_frames
from videoar.evaluation.judge import Clips, Size
from videoar.evaluation.labels import Part, Words, read_labels, shrunk, spread
from videoar.files import Json
from videoar.weights import load_component

FOOTAGE = "footage"
"""The folder of labelled videos that a judge may bring along."""
BACK = 8.0
"""By how much likelier (in nats) a video has to be if what has changed changes back."""
NOTHING = "nothing"
"""Happens in a clip in which no state changes, and in a frozen one."""


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """Shape of a reader, and its words."""

    size: int = 96
    """Width and height to which frames are brought."""
    num_frames: int = 16
    """Frames it looks at, from the first to the last."""
    channels: tuple[int, ...] = (24, 48, 96, 128)
    """Of convolutions, each of which halves the picture."""
    width: int = 192
    """Numbers that describe a frame."""
    apart: tuple[str, ...] = ()
    """What tells videos apart that were held out, see `labels.read_labels`."""
    held_out: float = 0.1
    """Their share."""
    things: Words = field(default_factory=dict)
    """Words for what is there, by attribute."""
    deeds: Words = field(default_factory=dict)
    """Words for what happens; behind them comes `NOTHING`."""
    states: Words = field(default_factory=dict)
    """Words for how things stand in a frame."""

    @property
    def heads(self) -> Words:
        """All words that it tells apart, by attribute."""
        deeds = {name: (*words, NOTHING) for name, words in self.deeds.items()}
        return self.things | deeds | self.states


class Refined(nn.Module):
    """Adds to pictures what a convolution makes of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(8, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


class StateReader(nn.Module):
    """Reads a clip: frames one by one, and then what happens from one to the next.

    How things stand is read from single frames, so it is no guess from what happens.
    """

    def __init__(self, config: ReaderConfig) -> None:
        super().__init__()
        self.config, layers, below = config, list[nn.Module](), 3
        for channels in config.channels:
            layers.append(nn.Conv2d(below, channels, 3, stride=2, padding=1))
            layers += [nn.GroupNorm(8, channels), nn.ReLU()]
            if below > 3:  # at full size it would be most of the work
                layers.append(Refined(channels))
            below = channels
        rest = -(-config.size // 2 ** len(config.channels))
        self.frame = nn.Sequential(
            *layers,
            nn.Conv2d(below, 16, 1),
            nn.Flatten(),
            nn.Linear(16 * rest**2, config.width),
            nn.ReLU(),
        )
        width, self.heads = config.width, nn.ModuleDict()
        self.time = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2) for _ in range(2))
        for name, words in config.heads.items():
            self.heads[name] = nn.Linear(width * (2 if name in config.deeds else 1), len(words))

    def forward(self, video: Video) -> dict[str, Tensor]:
        """Return logits of the words of every attribute: per frame of states, else per clip."""
        frames = rearrange(self.frame(video.flatten(0, 1)), "(b t) c -> b c t", b=len(video))
        moving = frames
        for layer in self.time:
            moving = moving + layer(moving).relu()
        happens = torch.cat([moving.mean(2), moving.amax(2)], dim=1)
        read = dict.fromkeys(self.config.things, frames.mean(2))
        read |= dict.fromkeys(self.config.deeds, happens)
        read |= dict.fromkeys(self.config.states, frames.mT)
        return {name: self.heads[name](x) for name, x in read.items()}

    @torch.inference_mode()
    def read(self, clips: Clips) -> list[Json]:
        """Return the words for each clip; of states as in `labels.outline`."""
        found: list[Json] = [{} for _ in clips]
        chosen = clips[:, spread(clips.shape[1] - 1, self.config.num_frames)]
        video = from_frames(np.stack([shrunk(clip, self.config.size) for clip in chosen]))
        for name, logits in self(video).items():
            words = self.config.heads[name]
            for seen, of_clip in zip(found, logits.log_softmax(-1), strict=True):
                best = changed(of_clip) if name in self.config.states else [int(of_clip.argmax())]
                told = [words[k] for k in best]
                seen[name] = told if name in self.config.states else told[0]
        return found


def changed(logs: Float[Tensor, "frames words"]) -> list[int]:
    """Return the word that frames begin with, and that to which it changes, if it does.

    The likeliest of all ways to change once, or for a while: single frames that are misread, as
    where an arm hides what it moves, are no change.
    """
    frames, words = logs.shape
    sums = torch.cat([logs.new_zeros(1, words), logs.cumsum(0)])
    first, last = torch.triu_indices(frames + 1, frames + 1).to(logs.device)
    inside = sums[last] - sums[first]
    back = ((first > 0) & (last < frames)).to(logs)[:, None, None]
    likely = (sums[-1] - inside)[:, :, None] + inside[:, None] - BACK * back
    at, rest = divmod(int(likely.argmax()), words**2)
    outer, inner = divmod(rest, words)
    order = [outer, inner] if first[at] else [inner, outer]
    whole = {0: [outer], frames: [inner]}.get(int(last[at] - first[at]), order)
    return whole[:1] if outer == inner else whole


def scores(seen: Json, told: Json) -> dict[str, float]:
    """Return what was read as it was told, 0 or 1 by attribute; `all`: everything is right."""
    right = {name: float(word == told[name]) for name, word in seen.items() if name in told}
    return right | {"all": min(right.values())}


def held_out(footage: Path, *, seconds: float) -> list[Part]:
    """Return what labels, or prepared videos, hold out; of these what lasts so long."""
    if not (footage / INFO_NAME).is_file():
        return [part for part in read_labels(footage) if part.held_out]
    if not (apart := footage / "heldout").is_dir():
        return []
    shards, found = LatentShards(apart), list[Part]()
    for clip in shards.clips:
        frames = 1 + (clip["frames"] - 1) * shards.info.stride[0]
        usual = (clip["height"], clip["width"]) == shards.size
        if usual and frames >= round(seconds * shards.info.fps):
            path, said = apart / clip["extra"]["source"], clip["captions"][0]
            found.append(Part(path=path, first=0, last=frames - 1, caption=said, held_out=True))
    return found


class Footage:
    """Who asks for what videos show that were held out, and reads nothing in others."""

    def __init__(self, footage: Path, asked: list[Part]) -> None:
        self.footage, self.asked = footage, asked

    def prompts(self, count: int, *, seed: int) -> list[Json]:
        if count > len(self.asked):
            raise ValueError(
                f"{count} prompts are asked for, but {self.footage} holds out {len(self.asked)}"
                " videos that last so long: ask for fewer prompts or seconds, or add videos"
            )
        order = np.random.default_rng(seed).permutation(len(self.asked))[:count].tolist()
        found = list[Json]()
        for i, part in enumerate(self.asked[k] for k in order):
            about = {"part": order[i], "told": part.told()}
            found.append({"prompt": part.caption, "seed": seed + i} | about)
        return found

    def real(self, prompts: list[Json], *, num_frames: int, size: Size, fps: int) -> Clips:
        parts = [self.asked[prompt["part"]] for prompt in prompts]
        return np.stack([part.clip(num_frames, size=size, fps=fps) for part in parts])

    def look(self, clips: Clips, prompts: list[Json], *, fps: int) -> list[Json]:
        return [{"seen": {}, "scores": {}} for _ in clips]


class TrainedJudge(Footage):
    """The judge of labelled videos."""

    def __init__(self, folder: Path, footage: Path) -> None:
        self.reader = load_component(folder, StateReader).float().eval()
        self.config = config = self.reader.config
        how = {"only": tuple(config.heads), "apart": config.apart, "share": config.held_out}
        # How things stand at first is what follows from the words only where a video begins.
        parts = read_labels(footage, **how)
        super().__init__(footage, [part for part in parts if part.held_out and part.first == 0])

    def look(self, clips: Clips, prompts: list[Json], *, fps: int) -> list[Json]:
        told = zip(self.reader.read(clips), prompts, strict=True)
        return [{"seen": seen, "scores": scores(seen, asked["told"])} for seen, asked in told]
