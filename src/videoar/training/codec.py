"""Training a codec: reconstruction of clips of the procedural world."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from videoar.checkpoints.checkpoint import Checkpoint, save_checkpoint
from videoar.data import world
from videoar.data.batches import Batches
from videoar.data.world import FIRST_HELD_OUT, scene_of
from videoar.encoders.codec import from_frames, to_frames
from videoar.encoders.tiny_codec import TinyCodec, TinyCodecConfig
from videoar.evaluation.metrics import psnr
from videoar.training.loop import TrainConfig
from videoar.training.objectives import Objective
from videoar.training.run_folder import Report

# ---------------------------------------------------------------- the codec


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
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

    def build(self, config: TrainConfig, report: Report) -> "ReconstructionTask":
        return ReconstructionTask(self, config)


def load_decoder(task: ReconstructionConfig) -> TinyCodec:
    """Load the codec of `task.init`, its encoder fixed, with a decoder of the task's widths."""
    assert task.init is not None
    codec, wanted = Checkpoint.find(task.init).codec(), task.codec
    free = ("decoder_channels", "latents_mean", "latents_std")
    changes = {name: getattr(wanted, name) for name in free}
    if not isinstance(codec, TinyCodec) or replace(codec.config, **changes) != wanted:
        raise ValueError(
            f"{task.init} has a codec of the shape {codec.config}, but the run asks for {wanted}:"
            " only decoder_channels may differ; name another checkpoint, or change the shape"
        )
    if codec.config.decoder_channels != wanted.decoder_channels:
        codec = codec.with_decoder(wanted.decoder_channels)
    codec.encoder.requires_grad_(False)
    return codec


class Reconstruction(Objective):
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

    def __init__(self, task: ReconstructionConfig, *, seed: int):
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


class ReconstructionTask:
    """A `Task`: what the loop needs to train a codec."""

    def __init__(self, task: ReconstructionConfig, config: TrainConfig):
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
        return self.clips.get(
            list(range(FIRST_HELD_OUT, FIRST_HELD_OUT + count)), np.random.default_rng(0)
        )["video"]

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
        save_checkpoint(folder, {"codec": codec}, meta, overwrite=True)
