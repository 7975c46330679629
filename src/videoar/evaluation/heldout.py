"""A checkpoint on the held-out clips of prepared videos: what its codec loses, and its loss.

Every kind of unit sees the same clips and seeds, so kinds are compared in pairs. Clips of one video
resemble each other: intervals draw whole videos.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn

from videoar.core.loss import FlowMatchingConfig, draw_clip, flow_matching_loss
from videoar.core.schemes import KINDS, parse
from videoar.data.latents import LatentShards, check_codec, text_module
from videoar.data.video import read_video
from videoar.encoders.codec import to_frames
from videoar.evaluation.metrics import bootstrap_interval, psnr, ssim
from videoar.evaluation.options import HeldOut
from videoar.evaluation.tables import markdown
from videoar.files import Json, save
from videoar.generation.pipeline import VideoPipeline

DRAWS = 4  # of sigmas and noise, per clip and kind
LOSSLESS = 100.0  # dB; a mean of infinite ones would be none


@torch.no_grad()
def run(config: HeldOut, report: Callable[[str], None]) -> str:
    """Measure a checkpoint on what `config.data` holds out, and return the tables.

    Raises:
        ValueError: the folder holds nothing out, or is of another codec.
    """
    data = config.data
    if config.out is not None and config.out.exists():
        raise ValueError(f"{config.out} exists already: name another file")
    for name in config.units or ():
        parse(name)
    if not (data / "heldout").is_dir():
        raise ValueError(
            f"{data} holds no clips out: prepare two or more videos with held_out above 0"
        )
    pipe = VideoPipeline.from_pretrained(config.checkpoint)
    kinds = config.units or tuple(pipe.meta.get("units", KINDS))
    if new := pipe.untrained(kinds):
        report(f"{config.checkpoint} is {new}")
    shards = LatentShards(data / "heldout", tokenize=pipe.prompt_encoder.tokenize)
    check_codec(data, shards.info, pipe.codec, checkpoint=config.checkpoint)
    text = text_module(pipe.prompt_encoder, data)
    if len(shards) < 2:
        raise ValueError(
            f"{data} holds {len(shards)} clip out, but an interval takes 2: prepare more videos, or"
            " with a larger held_out"
        )
    clips = []
    for clip in _scores(pipe, text, shards, kinds, seed=config.seed):
        clips.append(clip)
        report(f"{len(clips)}/{len(shards)}  PSNR {clip['psnr']:.1f} dB  {clip['file']}")
    files = [clip["file"] for clip in clips]
    if (videos := len(set(files))) < 2:
        report("all held-out clips are of one video: intervals say nothing of other videos")
        files = [str(number) for number in range(len(clips))]

    interval = functools.partial(bootstrap_interval, clusters=files)
    quality, similarity = (interval([clip[key] for clip in clips]) for key in ("psnr", "ssim"))
    losses = {name: np.array([clip["losses"][name] for clip in clips]) for name in kinds}
    first = kinds[0]
    means = {name: interval(values) for name, values in losses.items()}
    minus = {name: interval(losses[name] - losses[first]) for name in kinds[1:]}
    found = {"clips": clips, "reconstruction": {"psnr": quality, "ssim": similarity}}
    save(config.out, found | {"losses": means, "differences": minus})
    about = f"{len(clips)} held-out clips of {videos} videos, 95 % intervals:"
    codec = [["codec", "mean"], ["PSNR", f"{quality:.4g} dB"], ["SSIM", f"{similarity:.4g}"]]
    units = [["units", "loss", "minus the first"], [first, f"{means[first]:.4g}", ""]]
    units += [[name, f"{means[name]:.4g}", f"{change:.4g}"] for name, change in minus.items()]
    return f"{about}\n\n{markdown(codec)}\n\n{markdown(units)}\n"


def _scores(
    pipe: VideoPipeline,
    module: nn.Module,
    shards: LatentShards,
    kinds: Sequence[str],
    *,
    seed: int,
) -> Iterator[Json]:
    rng, schemes = np.random.default_rng(seed), {name: parse(name) for name in kinds}
    flow, model = FlowMatchingConfig(shift=pipe.sampling.shift), pipe.transformer
    for index, about in enumerate(shards.clips):
        extra, batch = about["extra"], shards.get([index], rng)
        source = read_video(shards.folder / extra["source"]).frames
        decoded = to_frames(pipe.codec.decode(batch["latents"])[0])
        latents, words = (
            batch[key].expand(DRAWS, *batch[key].shape[1:]) for key in ("latents", "text")
        )
        losses, text = {}, model.encode_text(module(words))
        for name, scheme in schemes.items():
            seeds = torch.Generator().manual_seed(seed + DRAWS * index)
            clip = draw_clip(latents, scheme, flow, seeds)
            loss = flow_matching_loss(model, clip, text, scheme=scheme, config=flow, rng=seeds)
            losses[name] = float(loss)
        yield {
            "file": extra["file"],
            "start": extra["start"],
            "psnr": min(psnr(source, decoded), LOSSLESS),
            "ssim": ssim(source, decoded),
            "losses": losses,
        }
