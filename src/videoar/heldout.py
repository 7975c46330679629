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
from torch import Tensor

from videoar.checkpoint import resolve
from videoar.data import LatentShards
from videoar.evaluate import save
from videoar.metrics import Interval, bootstrap_interval, psnr, ssim
from videoar.objectives import FlowMatching, FlowMatchingConfig, TextToVideo
from videoar.options import Evaluate
from videoar.pipeline import VideoPipeline, to_frames
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
        lines = [f"{len(self.clips)} held-out clips of {videos} videos, 95 % intervals:", ""]
        lines += ["| codec | mean |", "| --- | --- |"]
        for (name, mean), unit in zip(self.reconstruction.items(), (" dB", ""), strict=True):
            lines.append(f"| {name.upper()} | {_cell(mean)}{unit} |")
        if self.losses:
            lines += ["", "| units | loss | minus the first |", "| --- | --- | --- |"]
        for name, loss in self.losses.items():
            minus = self.differences.get(name)
            lines.append(f"| {name} | {_cell(loss)} | {_cell(minus) if minus else ''} |")
        return "\n".join(lines) + "\n"


def _cell(value: Interval) -> str:
    return f"{value.mean:.4g} [{value.low:.4g}, {value.high:.4g}]"


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

    def interval(values: list[float]) -> Interval:
        return bootstrap_interval(values, clusters=files)

    losses = {name: [clip["losses"][name] for clip in clips] for name in clips[0]["losses"]}
    first = next(iter(losses.values()), [])
    result = Report(
        clips=clips,
        reconstruction={key: interval([c[key] for c in clips]) for key in ("psnr", "ssim")},
        losses={name: interval(values) for name, values in losses.items()},
        differences={
            name: interval((np.array(values) - first).tolist())
            for name, values in list(losses.items())[1:]
        },
    )
    save(config.out, asdict(result))
    return result


def _scores(
    pipe: VideoPipeline, wording: Wording, shards: LatentShards, config: Evaluate
) -> Iterator[Json]:
    rng = np.random.default_rng(config.seed)
    loss_of = _losses(TextToVideo(pipe.transformer, wording.module), pipe.sampling.shift, config)
    for index, about in enumerate(shards.clips):
        extra, batch = about["extra"], shards.get([index], rng)
        source = read_video(shards.folder / extra["source"]).frames
        decoded = to_frames(pipe.codec.decode(batch["latents"])[0])
        yield {
            "file": extra["file"],
            "start": extra["start"],
            "psnr": min(psnr(source, decoded), LOSSLESS),
            "ssim": ssim(source, decoded),
            "losses": loss_of(batch["latents"], batch["text"], index),
        }


def _losses(
    module: TextToVideo, shift: float, config: Evaluate
) -> Callable[[Tensor, Tensor, int], dict[str, float]]:
    """Return what gives the loss of a clip by kind of unit."""
    schemes = {name: parse(name) for name in config.units}
    flow = FlowMatchingConfig(shift=shift)
    objective = FlowMatching(module, schemes=tuple(schemes.values()), config=flow)

    def loss_of(latents: Tensor, words: Tensor, index: int) -> dict[str, float]:
        losses = {}
        for name, scheme in schemes.items():
            seeds = torch.Generator().manual_seed(config.seed + DRAWS * index)
            draws = latents.expand(DRAWS, -1, -1, -1, -1)
            clips = objective.clip(draws, scheme, seeds)
            found = objective.scheme_loss(
                clips, words.expand(DRAWS, *words.shape[1:]), scheme, seeds
            )
            losses[name] = float(found["loss"])
        return losses

    return loss_of
