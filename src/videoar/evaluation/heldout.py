"""Checkpoints on the held-out clips of prepared videos: what the codec loses, and the generator.

All see the same clips and noise, so kinds of unit and checkpoints are compared in pairs, by what is
measured on the same tokens or pixels: a loss of training is a mean over the tokens of its units,
coarse ones among them. Clips of one video resemble each other: intervals draw whole videos.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from videoar.checkpoints.checkpoint import Checkpoint
from videoar.core.flow import add_noise, velocity_of
from videoar.core.loss import Reads, layout, velocities
from videoar.core.schemes import KINDS, parse
from videoar.core.tokens import Latents, to_tokens
from videoar.core.units import Units, Visible
from videoar.data.latents import LatentShards, check_codec, text_module
from videoar.data.video import Frames, read_video
from videoar.encoders.codec import to_frames
from videoar.evaluation.metrics import Interval, bootstrap_interval, psnr, ssim
from videoar.evaluation.options import HeldOut
from videoar.evaluation.tables import markdown
from videoar.files import Json, save
from videoar.generation.config import GenerationConfig, trained_flow
from videoar.generation.pipeline import VideoPipeline

Words = Float[Tensor, "batch words text_channels"]
DRAWS = 4  # of noise, per clip
SIGMAS = (0.9, 0.6, 0.3)
LOSSLESS = 100.0  # dB; a mean of infinite ones would be none
NEXT = "next frames, PSNR"
CODEC_IS_THE_LIMIT = (
    "the codec, not the generator, is the limit: train one of such videos, with `train codec`."
)
ABOUT = """\
Error at a sigma: of the velocity, squared, on the tokens of the video alone and not on coarser
ones, given all units before as they are; those of finer levels and details show their own moment.
Next frames: PSNR of the second half of a clip, made of the first by the checkpoint's own steps; the
same is given to all, and asked of all."""


@torch.no_grad()
def run(config: HeldOut, report: Callable[[str], None]) -> str:
    """Measure checkpoints on what `config.data` holds out, and return the tables.

    Raises:
        ValueError: the folder holds nothing out, or is of another codec.
    """
    data = config.data
    if config.out is not None and config.out.exists():
        raise ValueError(f"{config.out} exists already: name another file")
    for name in config.units or ():
        parse(name)
    apart = data / "heldout"
    if not apart.is_dir() or len(shards := LatentShards(apart)) < 2:
        raise ValueError(
            f"{data} holds no clips out, or one, but an interval takes 2: prepare two or more"
            " videos with held_out above 0, or a larger one"
        )
    files = [clip["extra"]["file"] for clip in shards.clips]
    metas = [Checkpoint.find(checkpoint).meta for checkpoint in config.checkpoints]
    # Of all the same tokens, and no more than the shortest training has seen at a time.
    length = min(trained_flow(meta, GenerationConfig()).clip_frames for meta in metas)
    codec_of, scores = dict[str, str](), defaultdict[str, dict[str, list[float]]](dict)
    for checkpoint in config.checkpoints:
        pipe = VideoPipeline.from_pretrained(checkpoint)
        kinds = config.units or tuple(pipe.meta.get("units", KINDS))
        if new := pipe.untrained(kinds):
            report(f"{checkpoint} is {new}")
        check_codec(data, shards.info, pipe.codec, checkpoint=checkpoint)
        of = f" of {checkpoint}" if len(config.checkpoints) > 1 else ""
        codec_of |= {f"{name}{of}": f"codec{of}" for name in kinds}
        measured = _measured(pipe, data, kinds, length=length, seed=config.seed)
        for number, (found, file) in enumerate(zip(measured, files, strict=True), start=1):
            for name, values in found.items():
                for column, value in values.items():
                    scores[f"{name}{of}"].setdefault(column, []).append(value)
            report(f"{number}/{len(files)}{of}  codec {found['codec']['PSNR']:.1f} dB  {file}")
    if (videos := len(set(files))) < 2:
        report("all held-out clips are of one video: intervals say nothing of other videos")
    clusters = files if videos > 1 else [str(number) for number in range(len(files))]
    interval = functools.partial(bootstrap_interval, clusters=clusters)
    means = {line: {k: interval(v) for k, v in own.items()} for line, own in scores.items()}
    first, *others = codec_of
    minus = {
        line: {k: interval(np.subtract(v, scores[first][k])) for k, v in scores[line].items()}
        for line in others
    }
    save(config.out, {"files": files, "clips": scores, "means": means, "differences": minus})
    tables = {"codec": dict.fromkeys(codec_of.values()), "units": codec_of}
    said = [_table(title, {line: means[line] for line in lines}) for title, lines in tables.items()]
    said += [_table(f"minus {first}", minus)] if minus else []
    about = f"{len(files)} held-out clips of {videos} videos, 95 % intervals:"
    best = max(codec_of, key=lambda line: means[line][NEXT].mean)
    errors = [np.power(10, np.divide(scores[line][NEXT], -10)) for line in (best, codec_of[best])]
    share = errors[1].mean() / errors[0].mean()
    limit = f"Of the squared error of the next frames of {best}, {share:.0%} is the codec's: "
    limit += "the generator is the limit." if share < 0.5 else CODEC_IS_THE_LIMIT
    return "\n\n".join([about, *said, ABOUT, limit]) + "\n"


def _table(title: str, rows: Mapping[str, Mapping[str, Interval]]) -> str:
    """Write lines of intervals."""
    body = [[name, *(f"{value:.4g}" for value in row.values())] for name, row in rows.items()]
    return markdown([[title, *next(iter(rows.values()))], *body])


def _measured(
    pipe: VideoPipeline, data: Path, kinds: Sequence[str], *, length: int, seed: int
) -> Iterator[dict[str, dict[str, float]]]:
    """Yield for each clip the figures of the codec and of every kind of unit."""
    shards = LatentShards(data / "heldout", tokenize=pipe.prompt_encoder.tokenize)
    module = text_module(pipe.prompt_encoder, data)
    stride = pipe.codec.stride[0]
    for index, about in enumerate(shards.clips):
        batch = shards.get([index], np.random.default_rng([seed, index]))
        latents, words = batch["latents"], module(batch["text"])
        source = read_video(shards.folder / about["extra"]["source"]).frames
        decoded = to_frames(pipe.codec.decode(latents)[0])
        given = 1 + stride * (max(1, latents.shape[1] // 2) - 1)

        whole = {"PSNR": _psnr(source, decoded), "SSIM": ssim(source, decoded)}
        found = {"codec": {**whole, NEXT: _psnr(source[given:], decoded[given:])}}
        how: Json = {"num_frames": len(source), "video": source[:given], "prompt_embeds": words}
        how |= {"height": source.shape[1], "width": source.shape[2], "seeds": [seed + index]}
        clip = latents[:, :length]
        for name in kinds:
            how |= {"units": name}
            found[name] = finest_errors(pipe, clip, words, name, seed=seed + index)
            made = np.concatenate(list(pipe.generate([""], **how)), axis=1)[0]
            found[name][NEXT] = _psnr(source[given:], made[given:])
        yield found


def _psnr(reference: Frames, other: Frames) -> float:
    return min(psnr(reference, other), LOSSLESS)


def finest_errors(
    pipe: VideoPipeline, clip: Latents, words: Words, name: str, *, seed: int
) -> dict[str, float]:
    """Return the error of the velocity at each sigma, over the tokens that every scheme has.

    Their noise is the same whatever the scheme. What else is read is as in training: clean copies
    of the units before, these units as noisy, or everything.
    """
    rng = torch.Generator().manual_seed(seed)
    model, context = pipe.transformer, trained_flow(pipe.meta, pipe.sampling).context
    latents, patch = clip.expand(DRAWS, -1, -1, -1, -1), model.config.patch
    text = pipe.encode([], before=words.expand(DRAWS, -1, -1))
    _, frames, _, height, width = latents.shape
    units = Units(parse(name), frames, height // patch, width // patch)
    reads: Reads = "all" if context == "full" else "past"
    plan, found = layout(units, Visible(), copies=context == "clean", reads=reads), {}
    noise = torch.randn(latents.shape, generator=rng)
    clean, noise = to_tokens(latents, units, patch=patch), to_tokens(noise, units, patch=patch)
    finest = units.coords[:, 3] == 0
    noise[:, ~finest] = torch.randn(noise[:, ~finest].shape, generator=rng)
    for sigma in SIGMAS:
        sigmas = torch.full((DRAWS, len(units.sizes)), sigma)
        copies = (clean, torch.zeros_like(sigmas)) if context == "clean" else None
        x = add_noise(clean, noise, sigma)
        velocity = velocities(model, x, sigmas, plan, text, copies=copies)
        error = (velocity.float() - velocity_of(clean, noise)).square()
        found[f"error at {sigma}"] = float(error[:, finest].mean())
    return found
