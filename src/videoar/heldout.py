"""A checkpoint on the held-out clips of prepared videos: what its codec loses, and its loss.

Every kind of unit sees the same clips and seeds, so kinds are compared in pairs. Clips of one video
resemble each other: intervals draw whole videos.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from videoar.checkpoint import resolve
from videoar.data import LatentShards
from videoar.metrics import Interval, Values, bootstrap_interval, psnr, ssim
from videoar.objectives import FlowMatching, FlowMatchingConfig, TextToVideo
from videoar.options import Evaluate
from videoar.pipeline import VideoPipeline, to_frames
from videoar.tables import markdown, save
from videoar.tasks import check_codec
from videoar.units import parse
from videoar.video import read_video
from videoar.wording import Wording

Json = dict[str, Any]
DRAWS = 4  # of noise levels and noise, per clip and kind
LOSSLESS = 100.0  # dB; a mean of infinite ones would be none


@dataclass(frozen=True, kw_only=True)
class Report:
    """Means over held-out clips with 95 % intervals, and the scores of every clip."""

    clips: list[Json]
    reconstruction: dict[str, Interval]
    """`psnr` in dB and `ssim`, of decoded latents against the source."""
    losses: dict[str, Interval]
    """By kind of unit."""
    differences: dict[str, Interval]
    """Of the losses to that of the first kind, on the same clips."""

    def to_markdown(self) -> str:
        """Return the tables."""
        videos = len({clip["file"] for clip in self.clips})
        text = [f"{len(self.clips)} held-out clips of {videos} videos, 95 % intervals:"]
        quality, similarity = (f"{mean:.4g}" for mean in self.reconstruction.values())
        text += [markdown([["codec", "mean"], ["PSNR", f"{quality} dB"], ["SSIM", similarity]])]
        rows = [["units", "loss", "minus the first"]]
        for name, loss in self.losses.items():
            minus = self.differences.get(name)
            rows.append([name, f"{loss:.4g}", f"{minus:.4g}" if minus else ""])
        text += [markdown(rows)]
        return "\n\n".join(text) + "\n"


@torch.no_grad()
def run(config: Evaluate, data: Path, report: Callable[[str], None]) -> Report:
    """Measure a checkpoint on what `data` holds out.

    Raises:
        ValueError: the folder holds nothing out, or is of another codec.
    """
    if config.out is not None and config.out.exists():
        raise ValueError(f"{config.out} exists already: name another file")
    for name in config.units:
        parse(name)
    if not (data / "heldout").is_dir():
        raise ValueError(
            f"{data} holds no clips out: prepare two or more videos with --held-out above 0"
        )
    pipe = VideoPipeline.from_pretrained(resolve(config.checkpoint))
    check_codec(data, pipe.codec, checkpoint=config.checkpoint)
    wording = Wording.of(pipe.prompt_encoder, data)
    shards = LatentShards(data / "heldout", tokenize=wording.tokenize)
    if len(shards) < 2:
        raise ValueError(
            f"{data} holds {len(shards)} clip out, but an interval takes 2: prepare it with a"
            " larger --held-out"
        )
    clips = []
    for clip in _scores(pipe, wording, shards, config):
        clips.append(clip)
        report(f"{len(clips)}/{len(shards)}  PSNR {clip['psnr']:.1f} dB  {clip['file']}")
    files = [clip["file"] for clip in clips]
    if len(set(files)) < 2:
        report("all held-out clips are of one video: intervals say nothing of other videos")
        files = [str(number) for number in range(len(clips))]

    def interval(values: Values) -> Interval:
        return bootstrap_interval(values, clusters=files)

    losses = {name: np.array([clip["losses"][name] for clip in clips]) for name in config.units}
    first = losses[config.units[0]]
    result = Report(
        clips=clips,
        reconstruction={key: interval([c[key] for c in clips]) for key in ("psnr", "ssim")},
        losses={name: interval(values) for name, values in losses.items()},
        differences={name: interval(losses[name] - first) for name in config.units[1:]},
    )
    save(config.out, asdict(result))
    return result


def _scores(
    pipe: VideoPipeline, wording: Wording, shards: LatentShards, config: Evaluate
) -> Iterator[Json]:
    rng, schemes = np.random.default_rng(config.seed), {name: parse(name) for name in config.units}
    objective = FlowMatching(
        TextToVideo(pipe.transformer, wording.module),
        schemes=tuple(schemes.values()),
        config=FlowMatchingConfig(shift=pipe.sampling.shift),
    )
    for index, about in enumerate(shards.clips):
        extra, batch = about["extra"], shards.get([index], rng)
        source = read_video(shards.folder / extra["source"]).frames
        decoded = to_frames(pipe.codec.decode(batch["latents"])[0])
        latents, words = (
            batch[key].expand(DRAWS, *batch[key].shape[1:]) for key in ("latents", "text")
        )
        losses = {}
        for name, scheme in schemes.items():
            seeds = torch.Generator().manual_seed(config.seed + DRAWS * index)
            clip = objective.clip(latents, scheme, seeds)
            losses[name] = float(objective.scheme_loss(clip, words, scheme, seeds)["loss"])
        yield {
            "file": extra["file"],
            "start": extra["start"],
            "psnr": min(psnr(source, decoded), LOSSLESS),
            "ssim": ssim(source, decoded),
            "losses": losses,
        }
