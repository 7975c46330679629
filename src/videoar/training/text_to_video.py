"""What the recipes train: the codec, and the generator on latents that were encoded once."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import nn
from tyro.conf import arg

from videoar.checkpoints.checkpoint import Checkpoint
from videoar.core import schemes
from videoar.core.loss import FlowMatchingConfig, draw_clip, flow_matching_loss
from videoar.core.transformer import ModelConfig, VideoTransformer
from videoar.data.batches import Batches
from videoar.data.captions import Wording
from videoar.data.clips import encode_scenes, encode_world
from videoar.data.latents import LatentShards, check_codec, read_held_out
from videoar.data.world import FIRST_HELD_OUT
from videoar.encoders.text_encoder import (
    PromptEncoder,
    TextEncoder,
    TextEncoderConfig,
    TinyPromptEncoder,
    Tokenizer,
)
from videoar.generation.config import GenerationConfig
from videoar.generation.pipeline import VideoPipeline
from videoar.training.loop import TrainConfig
from videoar.training.objectives import FlowMatching, TextToVideo, own_weights
from videoar.training.run_folder import Report

# ---------------------------------------------------------------- the generator


@dataclass(frozen=True, kw_only=True)
class TextToVideoConfig:
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
    sampling: GenerationConfig = field(default_factory=GenerationConfig)
    """Defaults written into the checkpoint."""
    num_videos: int = 4000
    """Videos of the world to encode."""
    num_latents: int = 16
    """Latent frames per encoded video."""
    init: Path | None = None
    """Checkpoint whose transformer, text encoder and tokenizer this run begins with."""
    compile: bool = False
    """Compile the transformer's blocks: a minute at the start, then a quarter less time a step."""

    def build(self, config: TrainConfig, report: Report) -> "TextToVideoTask":
        return TextToVideoTask(self, config, report)


def load_generator(task: TextToVideoConfig) -> tuple[VideoTransformer, PromptEncoder]:
    """Load what `task.init` names; its sizes must be those that the task asks for."""
    assert task.init is not None
    pipe = VideoPipeline.from_pretrained(task.init)
    found: list[Any] = [pipe.transformer.config]
    if isinstance(pipe.prompt_encoder, TinyPromptEncoder):
        found.append(pipe.prompt_encoder.encoder.config)
    for name, there, wanted in zip(("model", "text"), found, (task.model, task.text), strict=False):
        if there != wanted:
            raise ValueError(
                f"{task.init} has the {name} sizes {there}, but the run asks for {wanted}:"
                " name another checkpoint, or change the sizes"
            )
    return pipe.transformer, pipe.prompt_encoder


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


class TextToVideoTask:
    """A `Task`: what the loop needs to train a generator."""

    def __init__(self, task: TextToVideoConfig, config: TrainConfig, report: Report):
        self.task = task
        self.codec = Checkpoint.find(task.codec).codec()
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        how: dict[str, Any] = {"num_latents": task.num_latents, "seed": config.seed, "dtype": dtype}
        if not task.latents.exists():
            encode_world(self.codec, task.latents, num_videos=task.num_videos, report=report, **how)
        check_codec(task.latents, self.codec, checkpoint=task.codec)
        if task.init is None:
            clips = LatentShards(task.latents).clips
            captions = [caption for clip in clips for caption in clip["captions"]]
            tokenizer = Tokenizer.train(captions, vocab_size=task.text.vocab_size)
            prompt = TinyPromptEncoder(tokenizer, TextEncoder(task.text))
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
            schemes=tuple(map(schemes.parse, task.units)),
            config=task.flow,
        )
        kinds, batch_size = shards.kinds, config.batch_size
        self.batches = Batches(shards, batch_size=batch_size, seed=config.seed, kinds=kinds)
        _report_unused(shards, self.batches, self.wording, report)
        common = shards.clips[int(np.argmax(kinds == np.bincount(kinds).argmax()))]
        self.size = common["height"], common["width"]
        if "scene" in common.get("extra", {}) and tokenize is not None:
            indices = range(FIRST_HELD_OUT, FIRST_HELD_OUT + 32)
            unseen = encode_scenes(self.codec, indices, **how)
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
        flow, model = self.task.flow, module.transformer
        count, losses = sum(len(batch["text"]) for batch in self.held_out), {}
        for name, scheme in zip(self.task.units, schemes, strict=True) if count else ():
            rng, total = torch.Generator().manual_seed(0), 0.0
            for batch in self.held_out:
                latents = draw_clip(batch["latents"].to(device), scheme, flow, rng)
                text = module.context(batch["text"].to(device))
                loss = flow_matching_loss(model, latents, text, scheme=scheme, config=flow, rng=rng)
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


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Train the generator of a checkpoint on prepared videos; sizes are those it has."""

    latents: Annotated[Path, arg(aliases=["--data.path"])]
    """Folder that `videoar prepare` wrote."""
    init: str = "toy-base"
    """Checkpoint to begin with: a bundled name or a folder."""
    units: tuple[str, ...]
    """Unit schemes, drawn from at every step."""
    flow: FlowMatchingConfig = field(default_factory=FlowMatchingConfig)
    """The objective."""

    def build(self, config: TrainConfig, report: Report) -> TextToVideoTask:
        if not self.latents.is_dir():
            raise ValueError(
                f"there is no folder {self.latents}: make it of your videos, with `videoar prepare"
                f" VIDEOS {self.latents}`, or name it with --task.latents"
            )
        folder, pipe = Path(self.init), VideoPipeline.from_pretrained(self.init)
        prompts = pipe.prompt_encoder
        trained = isinstance(prompts, TinyPromptEncoder)
        info = check_codec(self.latents, pipe.codec, checkpoint=self.init)
        task = TextToVideoConfig(
            codec=folder,
            latents=self.latents,
            units=self.units,
            model=pipe.transformer.config,
            text=prompts.encoder.config if trained else TextEncoderConfig(),
            flow=self.flow,
            sampling=replace(pipe.sampling, fps=round(info.fps)),
            init=folder,
        )
        return TextToVideoTask(task, config, report)
