"""Training a generator, by flow matching on latents that were encoded once."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor
from tyro.conf import AvoidSubcommands, arg

from videoar.checkpoints.checkpoint import Checkpoint, fingerprints
from videoar.checks import Count, Natural, Options, Report, Share, check
from videoar.core import schemes
from videoar.core.loss import FlowMatchingConfig, flow_matching_loss
from videoar.core.transformer import ModelConfig, VideoTransformer
from videoar.data.batches import Batches
from videoar.data.clips import WorldEncoder
from videoar.data.latents import LatentShards, check_codec, read_held_out, read_info
from videoar.data.world import FIRST_HELD_OUT, TWO_THINGS, held_out_prompts
from videoar.encoders import text_encoder
from videoar.encoders.codec import Codec
from videoar.evaluation.judge import Clips
from videoar.files import Json
from videoar.generation.config import GenerationConfig
from videoar.generation.inputs import hearing
from videoar.generation.pipeline import VideoPipeline
from videoar.generation.progress import Paced
from videoar.training.loop import TrainConfig
from videoar.training.low_rank import save_trained, trainable
from videoar.training.objectives import FlowMatching, StageConfig, TextToVideo, draw_clip
from videoar.training.run_folder import save_sample

SIZES = {"tiny": (6, 4), "small": (6, 5), "medium": (8, 8)}
"""Layers and heads of transformers of 1.8, 2.7 and 8.9 million parameters."""
MAX_WORDS, MAX_PROMPTS = 10_000, 12
"""A checkpoint lists no more words and examples of prompts than that."""


Units = tuple[Annotated[str | schemes.Scheme, arg(constructor=str)], ...]
"""Unit schemes, or their names, which are what is kept."""


def batches_of(shards: LatentShards, config: TrainConfig) -> Batches:
    """Return the batches of a run, each of clips of one size."""
    return Batches(shards, batch_size=config.batch_size, seed=config.seed, kinds=shards.kinds)


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig(Options):
    """What tasks share that train a generator."""

    latents: Annotated[Path, arg(name="data.path", prefix_name=False)]
    """Folder that `videoar prepare` wrote, with the prompts and the sizes of the videos."""
    units: Units
    """Unit schemes, or their names, drawn from at every step."""
    lora_rank: Count | None = None
    """Train low-rank updates of this rank, exported and merged at the end; None: all weights."""
    num_validation: Natural = 8
    """Videos of a validation, shared among the kinds of unit: of held-out prompts of the world, or
    of the folder; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "units", schemes.names(self.units))

    def check(self, config: TrainConfig) -> None:
        batches_of(LatentShards(self.latents), config)


@dataclass(frozen=True, kw_only=True)
class TextToVideoConfig(GeneratorConfig):
    """Train a transformer and its text encoder, by flow matching over a mix of units.

    Codec, sizes and defaults that are None are those of `init`; without that the codec is the one
    that the latents were prepared with.
    """

    codec: Path | None = None
    """Checkpoint whose codec encodes the videos."""
    size: Annotated[
        Literal["tiny", "small", "medium"] | None, arg(name="size", prefix_name=False)
    ] = None
    """Size of a transformer trained from nothing, in place of `model`; small, if none is said."""
    model: AvoidSubcommands[ModelConfig | None] = None
    """The same, number by number."""
    text: AvoidSubcommands[text_encoder.TextEncoderConfig | None] = None
    """Size of the text encoder of a run from nothing; if it is not said, with rotary positions."""
    flow: FlowMatchingConfig = field(default_factory=FlowMatchingConfig)
    """The objective."""
    stages: tuple[StageConfig, ...] = ()
    """What the first steps do otherwise."""
    sampling: AvoidSubcommands[GenerationConfig | None] = None
    """Defaults written into the checkpoint; None: as it is trained, and else as `init`."""
    num_videos: int = 0
    """Videos of the world to encode, if the folder is not there; 0: it must be."""
    num_latents: int = 16
    """Latent frames per encoded video."""
    two_things: Share = TWO_THINGS
    """How many of the scenes to encode have two things; of those asked for a fourth has."""
    init: Path | None = None
    """Checkpoint to begin with, a bundled name or a folder: transformer, text encoder, words."""
    compile: bool = False
    """Compile the transformer's blocks: a minute at the start, then a quarter less time a step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        own = self.init is not None or self.lora_rank is None
        check("lora_rank", self.lora_rank, own, "none without task.init")
        given = [name for name in ("init", "size", "model") if getattr(self, name) is not None]
        if self.init and self.text:
            given.append("text")
        if len(given) > 1:
            raise ValueError(
                f"{given[1]} says how large what is trained is, but the run has {given[0]}, too:"
                " leave one of the two out"
            )

    def check(self, config: TrainConfig) -> None:
        if not self.num_videos or self.latents.exists():
            super().check(config)

    def build(self, config: TrainConfig, report: Report) -> "TextToVideoTask":
        return TextToVideoTask(self, config, report)


def codec_of(task: TextToVideoConfig) -> Codec:
    """Return the codec of a run from nothing: the one named, or that of its latents."""
    source = task.codec or read_info(task.latents).checkpoint
    if source is None:
        raise ValueError(
            f"{task.latents} does not say which codec made it: name its checkpoint as task.codec"
        )
    return Checkpoint.find(str(source)).codec()


def make_generator(task: TextToVideoConfig, codec: Codec, shards: LatentShards) -> VideoPipeline:
    """Make an untrained one, whose tokenizer knows the captions."""
    text = task.text or text_encoder.TextEncoderConfig(rope_theta=100.0)
    captions = map(text_encoder.as_read, shards.captions)
    tokenizer = text_encoder.train_tokenizer(captions, vocab_size=text.vocab_size)
    prompts = text_encoder.TinyPromptEncoder(tokenizer, text_encoder.TextEncoder(text))
    layers, heads = SIZES[task.size or "small"]
    shape: dict[str, Any] = {"num_layers": layers, "num_heads": heads, "ffn_dim": 4 * 32 * heads}
    shape |= {"head_dim": 32, "freq_dim": 64, "rope_theta": 100.0, "prediction": "clean"}
    model = task.model or ModelConfig(**shape)
    sizes = {"latent_channels": codec.latent_channels, "text_dim": text.hidden_size}
    # With what is heard on the way, docs/results.md, "Told anew".
    how = {"units": "chunk:2", "recall_frames": 1}
    sampling = GenerationConfig(**how, num_inference_steps=8, guidance_scale=2.0)
    transformer, known = VideoTransformer(replace(model, **sizes)), {"words": ()}
    return VideoPipeline(transformer, prompts, codec, sampling=sampling, meta=known)


def learned(units: tuple[str, ...], captions: list[str], words: Any) -> dict[str, Any]:
    """Return what a checkpoint says that it knows: units, some captions, and all their words.

    `words` are those from before; None, where they are not known or too many, stays so.
    """
    said: dict[str, Any] = {"units": list(dict.fromkeys(units))}
    some = list(dict.fromkeys(filter(None, captions)))
    said["prompts"] = some[:: max(1, math.ceil(len(some) / MAX_PROMPTS))]
    if words is not None:
        words = sorted({*words, *text_encoder.words_of(captions)})
    return said if words is None or len(words) > MAX_WORDS else said | {"words": words}


class GeneratorTask:
    """What tasks share that train a generator: its latents, their batches, and its checkpoint.

    Args:
        pipe: who makes videos of the size that most clips have, and of which a part is trained.
        shards: the clips.
        config: the run.
        report: hears of clips and captions that are not used, and of validations that take long.
    """

    units: tuple[str, ...]
    """Names of the schemes."""
    clip_frames: int
    """Latent frames of the videos of a validation."""
    made_of: tuple[str | Path | None, ...]
    """The checkpoints that the run is made of."""

    def __init__(
        self, pipe: VideoPipeline, shards: LatentShards, config: TrainConfig, report: Report
    ) -> None:
        self.pipe, self.shards, self.out = pipe, shards, config.out
        self.schemes = tuple(map(schemes.parse, self.units))
        self.hear = Paced(lambda line: report(f"validation: {line}")).hear
        prompts = pipe.prompt_encoder
        shards.tokenize = prompts.tokenize
        (height, width), (_, *stride) = shards.size, pipe.codec.stride
        pipe.height, pipe.width = height * stride[0], width * stride[1]
        self.batches = batches_of(shards, config)
        if left_out := self.batches.left_out:
            report(
                f"{left_out} of {len(shards)} clips are never trained on: of their sizes there are"
                f" fewer than the {config.batch_size} of a batch; lower batch_size to use them"
            )
        if cut := prompts.too_long(set(shards.captions)):
            report(f"{cut} that are read, and are cut")
        self.of_the_world = "scene" in shards.clips[0].get("extra", {})

    def sources(self) -> dict[str, str]:
        latents = {str(self.shards.folder): self.shards.fingerprint()}
        return latents | fingerprints(*self.made_of)

    def with_networks(self, module: TextToVideo) -> VideoPipeline:
        """Return the pipeline with what was trained of it."""
        text = self.pipe.prompt_encoder.with_trained(module.text)
        # A router reads, and is right for, the transformer that it was trained beside.
        return replace(self.pipe, transformer=module.transformer, prompt_encoder=text, router=None)

    def videos(
        self, module: TextToVideo, step: int, *, count: int
    ) -> Iterator[tuple[str, list[Json], Clips]]:
        """Make videos of every kind of unit, yield them with their prompts, and keep a sheet."""
        if not count:
            return
        pipe, shown = self.with_networks(module), list[Clips]()
        pipe.codec.to(next(module.parameters()).device)
        prompts = self._prompts(count)
        texts, seeds = ([prompt[key] for prompt in prompts] for key in ("prompt", "seed"))
        rows = pipe.prompt_encoder.encode(texts)  # of empty captions, too
        size = self.batches.batch_size  # what the memory holds of a training
        pieces = [slice(k, k + size) for k in range(0, len(texts), size)]
        frames = 1 + pipe.codec.stride[0] * (self.clip_frames - 1)
        every = max(1, frames // 6)
        for name, scheme in zip(self.units, self.schemes, strict=True):
            made, wide = list[Clips](), max(self.clip_frames, scheme.frames or 0)
            for own in pieces:
                how: Json = {"seeds": seeds[own], "prompt_embeds": rows[own], "window_frames": wide}
                piece = pipe.generate(texts[own], num_frames=frames, units=name, **how)
                piece.sampler.on_step = hearing(pipe, piece, None, self.hear)
                made.append(np.concatenate(list(piece), axis=1))
            blocks = np.concatenate(made)
            shown.append(blocks[:8, ::every].reshape(-1, *blocks.shape[2:]))
            yield name, prompts, blocks
        columns = len(range(0, frames, every))
        save_sample(self.out, step, np.concatenate(shown), columns=columns)

    def _prompts(self, count: int) -> list[Json]:
        """Return prompts of the world, or of the folder, held out if it does; each with a seed.

        `count` videos are shared among the kinds of unit.
        """
        count = max(1, count // len(self.units))
        if self.of_the_world:
            return held_out_prompts(count, seed=0)
        apart = self.shards.folder / "heldout"
        clips = (LatentShards(apart) if apart.is_dir() else self.shards).clips[:count]
        return [{"prompt": clip["captions"][0], "seed": k} for k, clip in enumerate(clips)]

    def export(self, folder: Path, module: TextToVideo, meta: dict[str, Any]) -> None:
        said = learned(self.units, self.shards.captions, self.pipe.meta.get("words"))
        save_trained(self.with_networks(module), folder, said | meta)


class TextToVideoTask(GeneratorTask):
    """A `Task`: what the loop needs to train a generator."""

    def __init__(self, task: TextToVideoConfig, config: TrainConfig, report: Report):
        self.task = task
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        self.encoding: Json = {"num_latents": task.num_latents, "two_things": task.two_things}
        self.encoding |= {"seed": config.seed, "dtype": dtype}
        self.units, self.made_of = schemes.names(task.units), (task.init, task.codec)
        loaded = VideoPipeline.from_pretrained(task.init, codec=task.codec) if task.init else None
        codec = loaded.codec if loaded else codec_of(task)
        # Made first if they are of the world and not there.
        WorldEncoder(codec=codec, **self.encoding).write(task.latents, task.num_videos, report)
        shards = LatentShards(task.latents)
        source = str(task.codec or task.init or shards.info.checkpoint)
        check_codec(task.latents, shards.info, codec, checkpoint=source)
        pipe = loaded or make_generator(task, codec, shards)
        super().__init__(pipe, shards, config, report)
        self.clip_frames = min(task.flow.clip_frames, max(clip["frames"] for clip in shards.clips))
        pipe.sampling = task.sampling or self._sampling(pipe.sampling)
        transformer, module = pipe.transformer, trainable(pipe, shards, rank=task.lora_rank)
        if task.compile:  # of the averaged copy, made later, nothing is compiled
            # Each kind of unit has shapes and masks of its own, in every stage.
            shapes = len(task.units) * (1 + len(task.stages))
            torch.compiler.config.recompile_limit = max(8, 2 * shapes)
            for block in transformer.blocks:
                block.compile(dynamic=False)
        how: dict[str, Any] = {"config": task.flow, "stages": task.stages}
        self.objective = FlowMatching(module, schemes=self.schemes, **how)
        self.held_out = self._held_out()

    def _sampling(self, init: GenerationConfig) -> GenerationConfig:
        """Return how the checkpoint samples: what its training does not say is of `init`."""
        flow = self.task.flow
        return init.trained(
            self.units,
            window=self.clip_frames,
            sink_frames=flow.sink_frames,
            shift=flow.shift,
            lag=init.lag if flow.context == "noisy" else None,
            fps=round(self.shards.info.fps),
        )

    def _held_out(self) -> list[dict[str, Tensor]]:
        """Return batches of unseen clips: of the world, or of what the folder holds out."""
        shards = self.shards
        if not self.of_the_world or shards.tokenize is None:
            return list(read_held_out(shards.folder, shards.tokenize))
        indices = range(FIRST_HELD_OUT, FIRST_HELD_OUT + 32)
        videos = WorldEncoder(codec=self.pipe.codec, **self.encoding).encode(indices)
        latents, captions, _ = zip(*videos, strict=True)
        text = shards.tokenize([first for first, *_ in captions])
        return [{"latents": torch.stack(latents), "text": text}]

    @torch.no_grad()
    def validate(self, module: TextToVideo, *, step: int) -> dict[str, float]:
        """Keep a sheet of videos; the loss of every scheme on the same clips and noise."""
        device, flow, model = next(module.parameters()).device, self.task.flow, module.transformer
        count, losses = sum(len(batch["text"]) for batch in self.held_out), {}
        for name, scheme in zip(self.units, self.schemes, strict=True) if count else ():
            rng, total = torch.Generator().manual_seed(0), 0.0
            for batch in self.held_out:
                self.hear(name)
                latents = draw_clip(batch["latents"].to(device), scheme, flow, rng)
                text = module.context(batch["text"].to(device))
                loss = flow_matching_loss(model, latents, text, scheme=scheme, config=flow, rng=rng)
                total += float(loss) * len(latents)
            losses[name] = total / count
        for _ in self.videos(module, step, count=self.task.num_validation):
            pass
        return losses
