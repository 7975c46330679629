"""What the recipes train: the codec, and the generator on latents that were encoded once."""

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from videoar import units, world
from videoar.checkpoint import Component, load_component, save_checkpoint
from videoar.codecs import TinyCodec, TinyCodecConfig
from videoar.data import Batches, LatentShards, LatentsInfo, ShardWriter
from videoar.metrics import psnr
from videoar.model import ModelConfig, VideoTransformer
from videoar.objectives import FlowMatching, FlowMatchingConfig, Reconstruction, TextToVideo
from videoar.pipeline import Sampling, to_frames
from videoar.runs import Report
from videoar.text import PromptEncoder, TextEncoder, TextEncoderConfig, Tokenizer
from videoar.train import TrainConfig

HELD_OUT = 1_000_000
"""Scenes from this index on are never trained on."""


def to_video(
    frames: UInt8[np.ndarray, "*batch height width 3"],
) -> Float[Tensor, "*batch 3 height width"]:
    """Turn pixels into floats in [-1, 1]."""
    return rearrange(torch.from_numpy(frames), "... h w c -> ... c h w").float() / 127.5 - 1


def scene_of(index: int, *, seed: int) -> tuple[world.Scene, np.random.Generator]:
    """Scene number `index` of a world, and the generator for what else is random about it."""
    rng = np.random.default_rng([seed, index])
    return world.sample_scene(rng), rng


def load_codec(checkpoint: Path) -> TinyCodec:
    """Load the codec of a checkpoint."""
    return load_component(checkpoint / "codec", {"TinyCodec": (TinyCodec, TinyCodecConfig)})


# ---------------------------------------------------------------- the codec


@dataclass(frozen=True, kw_only=True)
class CodecTask:
    """Train a codec on clips of the procedural world, rendered as they are needed."""

    codec: TinyCodecConfig | Path
    """Shape of a new codec; or the checkpoint of one whose decoder is trained on, so that latents
    keep their meaning, and a generator trained on them stays valid."""
    num_frames: int = 9
    """Pixel frames per clip, 1 + 4k."""
    num_clips: int = 200_000
    """Clips in an epoch."""
    latent_noise: float = 0.1
    """Noise on the latents before decoding."""

    def build(self, config: TrainConfig, report: Report) -> "CodecTraining":
        return CodecTraining(self, config)


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
        return {"video": to_video(np.stack(clips))}


class CodecTraining:
    """A `Task`: what the loop needs to train a codec."""

    def __init__(self, task: CodecTask, config: TrainConfig):
        self.task = task
        if isinstance(task.codec, TinyCodecConfig):
            codec = TinyCodec(task.codec)
        else:
            codec = load_codec(task.codec)
            codec.encoder.requires_grad_(False)
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
    def validate(self, module: nn.Module) -> dict[str, float]:
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
        if isinstance(self.task.codec, TinyCodecConfig):
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

    def build(self, config: TrainConfig, report: Report) -> "GeneratorTraining":
        return GeneratorTraining(self, config, report)


@dataclass(frozen=True)
class Encoded:
    """A video of the world as the generator sees it."""

    latents: Float[Tensor, "frames channels height width"]
    captions: list[str]
    scene: world.Scene


def encode_scenes(
    codec: TinyCodec, indices: Sequence[int], *, num_latents: int, config: TrainConfig
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
            latents = codec.encode(to_video(np.stack(clips))).float()
        for (scene, rng), latent in zip(scenes, latents, strict=True):
            yield Encoded(latent, [world.caption(scene, rng) for _ in range(6)], scene)


def encode_world(
    codec: TinyCodec, folder: Path, *, task: "GeneratorTask", config: TrainConfig, report: Report
) -> None:
    """Keep the latents and captions of the world's first videos in a new folder."""
    info = LatentsInfo(
        codec=str(task.codec), channels=codec.latent_channels, stride=codec.stride, fps=16.0
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


class GeneratorTraining:
    """A `Task`: what the loop needs to train a generator."""

    def __init__(self, task: GeneratorTask, config: TrainConfig, report: Report):
        self.task = task
        self.codec = load_codec(task.codec)
        if not task.latents.exists():
            encode_world(self.codec, task.latents, task=task, config=config, report=report)
        captions = [
            caption for clip in LatentShards(task.latents).clips for caption in clip["captions"]
        ]
        self.tokenizer = Tokenizer.train(captions, vocab_size=task.text.vocab_size)
        text = TextEncoder(task.text)
        prompt = PromptEncoder(self.tokenizer, text)
        shards = LatentShards(task.latents, tokenize=prompt.tokenize)
        transformer = VideoTransformer(task.model)
        self.objective = FlowMatching(
            TextToVideo(transformer, text),
            schemes=tuple(map(units.parse, task.units)),
            config=task.flow,
        )
        self.batches = Batches(shards, batch_size=config.batch_size, seed=config.seed)
        indices = range(HELD_OUT, HELD_OUT + 32)
        unseen = encode_scenes(self.codec, indices, num_latents=task.num_latents, config=config)
        videos = list(unseen)
        self.held_out = {
            "latents": torch.stack([video.latents for video in videos]),
            "text": prompt.tokenize([video.captions[0] for video in videos]),
        }
        height, width = self.held_out["latents"].shape[-2:]
        per_clip = task.flow.clip_frames * height * width // task.model.patch**2
        tokens = per_clip * (2 if task.flow.context == "clean" else 1)
        self.tokens_per_batch = tokens * config.batch_size
        flops = transformer.flops(tokens, keys=tokens, words=task.text.max_tokens)
        self.flops_per_batch = 3.0 * flops * config.batch_size

    @torch.no_grad()
    def validate(self, module: nn.Module) -> dict[str, float]:
        """The loss of every scheme on the same clips and noise."""
        assert isinstance(module, TextToVideo)
        schemes = self.objective.schemes
        objective = FlowMatching(module, schemes=schemes, config=self.task.flow)
        losses = {}
        for name, scheme in zip(self.task.units, objective.schemes, strict=True):
            rng = torch.Generator().manual_seed(0)
            latents = objective.clip(self.held_out["latents"], scheme, rng)
            losses[name] = float(
                objective.scheme_loss(latents, self.held_out["text"], scheme, rng)["loss"]
            )
        return losses

    def export(self, folder: Path, module: nn.Module, meta: dict[str, Any]) -> None:
        assert isinstance(module, TextToVideo)
        task = self.task
        text = {"tokenizer.json": self.tokenizer.to_json()}
        save_checkpoint(
            folder,
            {
                "transformer": Component(module=module.transformer, config=task.model),
                "text": Component(module=module.text, config=task.text, texts=text),
                "codec": Component(module=self.codec, config=self.codec.config),
            },
            {"units": list(task.units), "sampling": vars(task.sampling), **meta},
            overwrite=True,
        )
