"""What the recipes train: the codec, and the generator on latents that were encoded once."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from videoar import formats, units, world
from videoar.checkpoint import Component, load_component, resolve, save_checkpoint
from videoar.codecs import Codec, TinyCodec, TinyCodecConfig
from videoar.data import Batches, LatentShards, LatentsInfo, ShardWriter, read_info
from videoar.metrics import psnr
from videoar.model import ModelConfig, VideoTransformer
from videoar.objectives import Alone, FlowMatching, FlowMatchingConfig, TextToVideo
from videoar.pipeline import Sampling, VideoPipeline, from_frames, to_frames
from videoar.runs import Report
from videoar.text import PromptEncoder, Prompts, TextEncoder, TextEncoderConfig, Tokenizer
from videoar.train import TrainConfig
from videoar.wording import Wording, own_weights

HELD_OUT = 1_000_000
"""Scenes from this index on are never trained on."""


def scene_of(index: int, *, seed: int) -> tuple[world.Scene, np.random.Generator]:
    """Scene number `index` of a world, and the generator for what else is random about it."""
    rng = np.random.default_rng([seed, index])
    return world.sample_scene(rng), rng


def load_codec(checkpoint: Path) -> TinyCodec:
    """Load the codec of a checkpoint."""
    return load_component(checkpoint / "codec", {"TinyCodec": (TinyCodec, TinyCodecConfig)})


def check_codec(latents: Path, codec: Codec, *, checkpoint: str | Path) -> LatentsInfo:
    """Return what a folder of latents says of itself; raise if they are of another codec."""
    info = read_info(latents)
    theirs, ours = info.codec, codec.fingerprint()
    if (Path(theirs) / "codec").is_dir():  # before 0.2 folders named a checkpoint
        theirs = load_codec(Path(theirs)).fingerprint()
    if theirs != ours:
        raise ValueError(
            f"{latents} was encoded with the codec {theirs}, but {checkpoint} has {ours}: prepare"
            f" the videos with --codec {checkpoint}, or name a checkpoint with the codec {theirs}"
        )
    return info


# ---------------------------------------------------------------- the codec


@dataclass(frozen=True, kw_only=True)
class CodecTask:
    """Train a codec on clips of the procedural world, rendered as they are needed."""

    codec: TinyCodecConfig
    """Shape of the codec."""
    init: Path | None = None
    """Checkpoint whose encoder is kept as it is, so that latents keep their meaning and a generator
    trained on them stays valid; its decoder is trained on, or anew if the widths differ."""
    num_frames: int = 9
    """Pixel frames per clip, 1 + 4k."""
    num_clips: int = 200_000
    """Clips in an epoch."""
    latent_noise: float = 0.1
    """Noise on the latents before decoding."""

    def build(self, config: TrainConfig, report: Report) -> "CodecTraining":
        return CodecTraining(self, config)


def load_decoder(task: CodecTask) -> TinyCodec:
    """Load the codec of `task.init`, its encoder fixed, with a decoder of the task's widths."""
    assert task.init is not None
    codec, wanted = load_codec(task.init), task.codec
    stated = {name: getattr(wanted, name) for name in ("latents_mean", "latents_std")}
    if replace(codec.config, decoder_channels=wanted.decoder_channels, **stated) != wanted:
        raise ValueError(
            f"{task.init} has a codec of the shape {codec.config}, but the run asks for {wanted}:"
            " only decoder_channels may differ; name another checkpoint, or change the shape"
        )
    if codec.config.decoder_channels != wanted.decoder_channels:
        codec = codec.with_decoder(wanted.decoder_channels)
    codec.encoder.requires_grad_(False)
    return codec


class Reconstruction(Alone):
    """Train a codec to give back its input.

    The latents are slightly noisy on the way, so that the decoder forgives what a generator gets
    wrong.
    """

    def __init__(self, codec: TinyCodec, *, latent_noise: float):
        self.module, self.latent_noise = codec, latent_noise

    def loss(
        self, batch: dict[str, Tensor], rng: torch.Generator, *, step: int = 0
    ) -> dict[str, Tensor]:
        video = batch["video"]
        decoded, _ = self.module.reconstruct(video, noise_std=self.latent_noise, generator=rng)
        error = decoded.float() - video
        # Things are small: the absolute error alone long rests content with blurred ones. With it
        # the toy codec ended 1.2 dB lower, and one shape in five less was recognised.
        return {"loss": error.abs().mean() + 4 * error.square().mean()}


class WorldClips:
    """Clips of the procedural world: clip i is always the same."""

    def __init__(self, task: CodecTask, *, seed: int):
        self.task, self.seed = task, seed

    def __len__(self) -> int:
        return self.task.num_clips

    def get(self, indices: list[int], rng: np.random.Generator) -> dict[str, Any]:
        clips = []
        for index in indices:
            scene, own = scene_of(index, seed=self.seed)
            start = int(own.integers(1000))
            clips.append(world.render(scene, num_frames=self.task.num_frames, start=start))
        return {"video": from_frames(np.stack(clips))}


class CodecTraining:
    """A `Task`: what the loop needs to train a codec."""

    def __init__(self, task: CodecTask, config: TrainConfig):
        self.task = task
        codec = TinyCodec(task.codec) if task.init is None else load_decoder(task)
        self.objective = Reconstruction(codec, latent_noise=task.latent_noise)
        self.clips = WorldClips(task, seed=config.seed)
        self.batches = Batches(self.clips, batch_size=config.batch_size, seed=config.seed)
        latent_frames = 1 + (task.num_frames - 1) // 4
        self.tokens_per_batch = config.batch_size * latent_frames * 64
        self.flops_per_batch = 3 * config.batch_size * latent_frames * self._flops_per_latent()

    def _flops_per_latent(self) -> float:
        """Count the multiply-adds of one latent frame, there and back, by shape."""
        total = 0.0

        def count(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal total
            total += 2 * output.numel() * layer.weight[0].numel()

        codec = self.objective.module
        hooks = [
            layer.register_forward_hook(count)
            for layer in codec.modules()
            if isinstance(layer, nn.Conv2d)
        ]
        with torch.no_grad():
            codec.reconstruct(torch.zeros(1, 5, 3, 64, 64))
        for hook in hooks:
            hook.remove()
        return total / 2

    def held_out(self, count: int) -> Float[Tensor, "batch frames 3 height width"]:
        return self.clips.get(list(range(HELD_OUT, HELD_OUT + count)), np.random.default_rng(0))[
            "video"
        ]

    @torch.no_grad()
    def validate(self, module: nn.Module, *, step: int) -> dict[str, float]:
        assert isinstance(module, TinyCodec)
        video = self.held_out(32)
        decoded, latents = module.reconstruct(video)
        return {
            "psnr": float(psnr(to_frames(decoded.flatten(0, 1)), to_frames(video.flatten(0, 1)))),
            "latent_std": float(latents.std()),
        }

    @torch.no_grad()
    def export(self, folder: Path, module: nn.Module, meta: dict[str, Any]) -> None:
        assert isinstance(module, TinyCodec)
        codec = module
        if self.task.init is None:
            latents = module.encode(self.held_out(256))
            codec = module.with_statistics(latents.mean((0, 1, 3, 4)), latents.std((0, 1, 3, 4)))
        save_checkpoint(
            folder, {"codec": Component(module=codec, config=codec.config)}, meta, overwrite=True
        )


# ---------------------------------------------------------------- the generator


@dataclass(frozen=True, kw_only=True)
class GeneratorTask:
    """Train a transformer and its text encoder, by flow matching over a mix of units."""

    codec: Path
    """Checkpoint whose codec encodes the videos."""
    latents: Path
    """Folder of latents; made from the procedural world if it does not exist."""
    units: tuple[str, ...]
    """Unit schemes, drawn from at every step."""
    model: ModelConfig
    """Size of the transformer."""
    text: TextEncoderConfig
    """Size of the text encoder."""
    flow: FlowMatchingConfig
    """The objective."""
    sampling: Sampling = field(default_factory=Sampling)
    """Defaults written into the checkpoint."""
    num_videos: int = 4000
    """Videos of the world to encode."""
    num_latents: int = 16
    """Latent frames per encoded video."""
    init: Path | None = None
    """Checkpoint whose transformer, text encoder and tokenizer this run begins with."""
    compile: bool = False
    """Compile the transformer's blocks: a minute at the start, then a quarter less time a step."""

    def build(self, config: TrainConfig, report: Report) -> "GeneratorTraining":
        return GeneratorTraining(self, config, report)


@dataclass(frozen=True)
class Encoded:
    """A video of the world as the generator sees it."""

    latents: Float[Tensor, "frames channels height width"]
    captions: list[str]
    scene: world.Scene


def encode_scenes(
    codec: Codec, indices: Sequence[int], *, num_latents: int, config: TrainConfig
) -> Iterator[Encoded]:
    """Render scenes from a random moment on, and encode them in batches of 16."""
    num_frames = 1 + codec.stride[0] * (num_latents - 1)
    for first in range(0, len(indices), 16):
        scenes = [scene_of(index, seed=config.seed) for index in indices[first : first + 16]]
        clips = [
            world.render(scene, num_frames=num_frames, start=int(rng.integers(1000)))
            for scene, rng in scenes
        ]
        # Half the time in bfloat16, and what is lost is below the precision in which shards store.
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
            latents = codec.encode(from_frames(np.stack(clips))).float()
        for (scene, rng), latent in zip(scenes, latents, strict=True):
            yield Encoded(latent, [world.caption(scene, rng) for _ in range(6)], scene)


def encode_world(
    codec: Codec, folder: Path, *, task: "GeneratorTask", config: TrainConfig, report: Report
) -> None:
    """Keep the latents and captions of the world's first videos in a new folder."""
    info = LatentsInfo(
        codec=codec.fingerprint(), channels=codec.latent_channels, stride=codec.stride, fps=16.0
    )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    started = time.perf_counter()
    with ShardWriter(partial, info=info) as writer:
        indices = range(task.num_videos)
        videos = encode_scenes(codec, indices, num_latents=task.num_latents, config=config)
        for done, video in enumerate(videos):
            if done and done % 512 == 0:
                rate = done / (time.perf_counter() - started)
                left = timedelta(seconds=round((task.num_videos - done) / rate))
                report(f"encoded {done}/{task.num_videos} videos  {rate:.1f}/s  {left} left")
            extra = {"scene": video.scene.to_json()}
            writer.add(video.latents, captions=video.captions, extra=extra)
    partial.rename(folder)


def load_generator(task: GeneratorTask) -> tuple[VideoTransformer, Prompts]:
    """Load what `task.init` names; its sizes must be those that the task asks for."""
    assert task.init is not None
    pipe = VideoPipeline.from_pretrained(task.init)
    found: list[Any] = [pipe.transformer.config]
    if isinstance(pipe.prompt_encoder, PromptEncoder):
        found.append(pipe.prompt_encoder.encoder.config)
    for name, there, wanted in zip(("model", "text"), found, (task.model, task.text), strict=False):
        if there != wanted:
            raise ValueError(
                f"{task.init} has the {name} sizes {there}, but the run asks for {wanted}:"
                " name another checkpoint, or change the sizes"
            )
    return pipe.transformer, pipe.prompt_encoder


def read_held_out(
    latents: Path, tokenize: Callable[[list[str]], Tensor] | None, *, limit: int = 32
) -> Iterator[dict[str, Tensor]]:
    """Yield the first clips that a folder holds out, in batches of one size; none if it has not."""
    if not (latents / "heldout").is_dir():
        return
    shards, rng = LatentShards(latents / "heldout", tokenize=tokenize), np.random.default_rng(0)
    first = shards.kinds[:limit]
    for kind in np.unique(first):
        yield shards.get(np.nonzero(first == kind)[0].tolist(), rng)


def _report_unused(
    shards: LatentShards, batches: Batches, wording: Wording, report: Report
) -> None:
    if batches.left_out:
        report(
            f"{batches.left_out} of {len(shards)} clips are never trained on: of their sizes there"
            f" are fewer than the {batches.batch_size} of a batch; lower batch_size to use them"
        )
    captions = {caption for clip in shards.clips for caption in clip["captions"]}
    if cut := wording.too_long(captions):
        report(cut)


class GeneratorTraining:
    """A `Task`: what the loop needs to train a generator."""

    def __init__(self, task: GeneratorTask, config: TrainConfig, report: Report):
        self.task = task
        self.codec = formats.load_codec(resolve(task.codec))
        if not task.latents.exists():
            encode_world(self.codec, task.latents, task=task, config=config, report=report)
        check_codec(task.latents, self.codec, checkpoint=task.codec)
        if task.init is None:
            clips = LatentShards(task.latents).clips
            captions = [caption for clip in clips for caption in clip["captions"]]
            tokenizer = Tokenizer.train(captions, vocab_size=task.text.vocab_size)
            prompt = PromptEncoder(tokenizer, TextEncoder(task.text))
            transformer = VideoTransformer(task.model)
        else:
            transformer, prompt = load_generator(task)
        own_weights(transformer)
        self.wording = Wording.of(prompt, task.latents)
        if task.compile:  # of the averaged copy, made later, nothing is compiled
            for block in transformer.blocks:
                block.compile(dynamic=False)
        tokenize = self.wording.tokenize
        shards = LatentShards(task.latents, tokenize=tokenize)
        self.objective = FlowMatching(
            TextToVideo(transformer, self.wording.module),
            schemes=tuple(map(units.parse, task.units)),
            config=task.flow,
        )
        kinds, batch_size = shards.kinds, config.batch_size
        self.batches = Batches(shards, batch_size=batch_size, seed=config.seed, kinds=kinds)
        _report_unused(shards, self.batches, self.wording, report)
        common = shards.clips[int(np.argmax(kinds == np.bincount(kinds).argmax()))]
        self.size = common["height"], common["width"]
        if "scene" in common.get("extra", {}) and tokenize is not None:
            indices = range(HELD_OUT, HELD_OUT + 32)
            unseen = encode_scenes(self.codec, indices, num_latents=task.num_latents, config=config)
            videos = list(unseen)
            latents = torch.stack([video.latents for video in videos])
            text = tokenize([video.captions[0] for video in videos])
            self.held_out = [{"latents": latents, "text": text}]
        else:
            self.held_out = list(read_held_out(task.latents, tokenize))
        per_clip = task.flow.clip_frames * self.size[0] * self.size[1] // task.model.patch**2
        tokens = per_clip * (2 if task.flow.context == "clean" else 1)
        self.tokens_per_batch = tokens * config.batch_size
        flops = transformer.flops(tokens, keys=tokens, words=task.text.max_tokens)
        self.flops_per_batch = 3.0 * flops * config.batch_size

    @torch.no_grad()
    def validate(self, module: nn.Module, *, step: int) -> dict[str, float]:
        """The loss of every scheme on the same clips and noise."""
        assert isinstance(module, TextToVideo)
        schemes, device = self.objective.schemes, next(module.parameters()).device
        objective = FlowMatching(module, schemes=schemes, config=self.task.flow)
        count, losses = sum(len(batch["text"]) for batch in self.held_out), {}
        for name, scheme in zip(self.task.units, schemes, strict=True) if count else ():
            rng, total = torch.Generator().manual_seed(0), 0.0
            for batch in self.held_out:
                latents = objective.clip(batch["latents"].to(device), scheme, rng)
                words = batch["text"].to(device)
                loss = objective.scheme_loss(latents, words, scheme, rng)["loss"]
                total += float(loss) * len(latents)
            losses[name] = total / count
        return losses

    def export(self, folder: Path, module: nn.Module, meta: dict[str, Any]) -> None:
        assert isinstance(module, TextToVideo)
        sides = zip(("height", "width"), self.size, self.codec.stride[1:], strict=True)
        pipe = VideoPipeline(
            transformer=module.transformer,
            prompt_encoder=self.wording.along(module.text),
            codec=self.codec,
            sampling=self.task.sampling,
            meta={"units": list(self.task.units), **meta},
            **{name: side * stride for name, side, stride in sides},
        )
        pipe.save_pretrained(folder, overwrite=True)
