"""Recipes: functions that return a complete `TrainConfig`.

A name on the command line is a function here, or `package.module:function` anywhere.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from videoar.checks import explained, hint, import_named
from videoar.core.loss import FlowMatchingConfig
from videoar.encoders.tiny_codec import TinyCodecConfig
from videoar.generation.config import GenerationConfig
from videoar.training.codec import FootageConfig, ReconstructionConfig
from videoar.training.distillation.objectives import DistillationConfig
from videoar.training.distillation.task import StudentConfig
from videoar.training.loop import TrainConfig
from videoar.training.objectives import StageConfig
from videoar.training.optimizer import OptimizerConfig
from videoar.training.reader import JudgeConfig
from videoar.training.router import RoutingConfig
from videoar.training.text_to_video import TextToVideoConfig

CUBES = ("cube:1x2x2", "cube:2x2x2")
TOY_UNITS = ("frame", "chunk:2", "chunk:3", "key-detail:4", "multiscale:4,2,1", *CUBES)
SAMPLING = GenerationConfig(guidance_scale=3.0)
# What a thing looks like is learned 20 times as fast from pictures as from clips.
PICTURES = FlowMatchingConfig(context="noisy", clip_frames=1, sink_frames=0)
# Where to go is then said by the prompt alone: in longer clips the context shows it, and what the
# words for it mean is not learned.
PAIRS = FlowMatchingConfig(clip_frames=2, far_probability=0.0)
TOY_TASK = TextToVideoConfig(
    codec=Path("runs/codec-toy-decoder/checkpoint"),
    latents=Path("runs/world-64"),
    num_videos=12_000,
    num_latents=12,
    two_things=0.5,
    units=TOY_UNITS,
    size="tiny",
    flow=FlowMatchingConfig(far_probability=0.3, short_probability=0.5),
    sampling=SAMPLING,
    stages=(
        StageConfig(steps=2500, flow=PICTURES, draws=8, units=("frame",)),
        StageConfig(steps=1000, flow=PAIRS, draws=4, units=("frame",)),
        StageConfig(steps=900, flow=FlowMatchingConfig(clip_frames=4), draws=2),
    ),
)
TOY_STUDENT = StudentConfig(
    teacher="toy-base",
    student="toy-base",
    latents=TOY_TASK.latents,
    units=TOY_UNITS,
    num_validation=32 * len(TOY_UNITS),
    distillation=DistillationConfig(
        critic="causal",
        critic_steps=2,
        critic_draws=1,
        critic_learning_rate=3e-4,
        critic_warmup=40,
    ),
)


def _named(name: str, config: TrainConfig, **changes: Any) -> TrainConfig:
    """Return a run like another, with a name and a folder of its own."""
    return replace(config, name=name, out=Path("runs") / name, **changes)


def codec_toy() -> TrainConfig:
    """The codec of the embedded checkpoint: `videoar train codec-toy`, 8 minutes on 2 cores."""
    return TrainConfig(
        name="codec-toy",
        out=Path("runs/codec-toy"),
        task=ReconstructionConfig(codec=TinyCodecConfig.toy()),
        steps=1200,
        batch_size=8,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=30, decay_fraction=0.6),
        ema_decay=0.99,
        precision="bfloat16",
        log_every=50,
        sample_every=100,
    )


def codec_toy_decoder() -> TrainConfig:
    """A wider decoder for the latents of `codec-toy`: `videoar train codec-toy-decoder`."""
    first = codec_toy()
    task = ReconstructionConfig(codec=TinyCodecConfig.wide(), init=first.out / "checkpoint")
    return _named("codec-toy-decoder", first, task=task, steps=3000)


def codec() -> TrainConfig:
    """A codec of your own videos: `videoar train codec --data.path VIDEOS`."""
    first = codec_toy()
    return _named(
        "codec",
        first,
        task=FootageConfig(videos=Path("videos")),
        steps=5000,
        batch_size=4,
        optimizer=replace(first.optimizer, decay_fraction=0.25),
        ema_decay=0.998,
    )


def judge() -> TrainConfig:
    """A judge of labelled videos of your own: `videoar train judge --data.path FOOTAGE`."""
    task = JudgeConfig(footage=Path("footage"))
    rates = OptimizerConfig(learning_rate=2e-3, warmup_steps=50, decay_fraction=0.5)
    how = {"steps": 2000, "batch_size": 16, "optimizer": rates, "sample_every": 200}
    return _named("judge", codec_toy(), task=task, **how)


def router() -> TrainConfig:
    """Who chooses the units of every segment: `videoar train router --task.checkpoint toy-base`."""
    task = RoutingConfig(latents=Path("runs/world-router"), num_videos=256)
    first = judge()
    rates = replace(first.optimizer, learning_rate=1e-3, weight_decay=0.1, warmup_steps=20)
    how = {"steps": 200, "batch_size": 64, "optimizer": rates, "precision": "float32"}
    return _named("router", first, task=task, **how)


def toy() -> TrainConfig:
    """The bundled `toy-base`, for every kind of unit, in stages: `videoar train toy`.

    First pictures, then two latent frames, then the first second, then clips.
    """
    return TrainConfig(
        name="toy",
        out=Path("runs/toy"),
        task=TOY_TASK,
        steps=5900,
        batch_size=32,
        # With two and three times the rates words are not bound to things (docs/log.md).
        optimizer=OptimizerConfig(learning_rate=1e-3, muon_learning_rate=0.01, decay_fraction=0.2),
        ema_decay=0.998,
        precision="bfloat16",
        log_every=20,
        sample_every=400,
    )


def toy_teacher() -> TrainConfig:
    """A teacher that reads everything, from `toy-base`: `videoar train toy-teacher`.

    It learns the lattice of multiscale units, too, so that it can teach them.
    """
    task = replace(
        TOY_TASK,
        codec=None,
        units=("full", "full", "full", "multiscale:4,2,1"),
        size=None,
        flow=FlowMatchingConfig(context="full", sink_frames=0, far_probability=0.0),
        stages=(),
        sampling=replace(SAMPLING, units="full", num_inference_steps=24, sink_frames=0),
        init=Path("toy-base"),
    )
    rates = replace(toy().optimizer, decay_fraction=0.4)
    how = {"task": task, "steps": 2400, "batch_size": 64, "optimizer": rates}
    return _named("toy-teacher", toy(), **how)


def _distillation(name: str, task: StudentConfig, *, steps: int) -> TrainConfig:
    """Match distributions; half-way and at the end the student is judged."""
    return _named(
        name,
        toy(),
        task=task,
        steps=steps,
        batch_size=16,
        optimizer=OptimizerConfig(learning_rate=2e-4, betas=(0.0, 0.99), warmup_steps=0),
        ema_decay=0.95,
        sample_every=steps // 2,
    )


def toy_start() -> TrainConfig:
    """The first stage of distillation: `videoar distill toy-start`.

    The teacher is causal as the student is: with one that reads everything motions were lost
    (`docs/log.md`).
    """
    task = replace(TOY_STUDENT, distillation=DistillationConfig(stage="consistency"))
    return replace(
        _distillation("toy-start", task, steps=240),
        batch_size=32,
        optimizer=OptimizerConfig(
            learning_rate=5e-4, muon_learning_rate=2e-3, warmup_steps=20, decay_fraction=0.5
        ),
        ema_decay=0.98,
        sample_every=80,
    )


def few_step() -> TrainConfig:
    """A model of `train video` in two steps: `videoar distill few-step --data.path LATENTS`."""
    made = "runs/video/checkpoint"
    path = DistillationConfig(stage="consistency", num_inference_steps=2, guidance_scale=2.0)
    task = StudentConfig(teacher=made, student=made, latents=Path("latents"), distillation=path)
    return _named("few-step", toy_start(), task=task, steps=600, batch_size=16, sample_every=200)


def toy_same() -> TrainConfig:
    """The second: `videoar distill toy-same`, teacher and critic reading what the student reads."""
    task = replace(TOY_STUDENT, student="runs/toy-start/checkpoint")
    return _distillation("toy-same", task, steps=400)


def toy_dmd() -> TrainConfig:
    """Symmetric DMD: `videoar distill toy-dmd`, after `toy-same` and `toy-teacher`."""
    task = replace(
        TOY_STUDENT,
        teacher="runs/toy-teacher/checkpoint",
        student="runs/toy-same/checkpoint",
        distillation=replace(TOY_STUDENT.distillation, critic="symmetric"),
    )
    return _distillation("toy-dmd", task, steps=320)


def wan_dmd() -> TrainConfig:
    """Wan2.1 1.3B to 4 steps by chunks of 3, under `torchrun`: `videoar distill wan-1.3b-dmd`.

    Rates, sigmas and turns are those of Self-Forcing (arXiv:2506.08009).
    """
    wan = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    task = StudentConfig(
        teacher=wan,
        student=wan,
        latents=Path("latents"),
        units=("chunk:3",),
        distillation=DistillationConfig(
            clip_frames=21,
            guidance_scale=4.0,
            critic_draws=1,
            critic_learning_rate=4e-7,
            critic_warmup=500,
        ),
        recompute=True,
    )
    betas = (0.0, 0.999)
    rates = {"learning_rate": 2e-6, "warmup_steps": 0, "decay_fraction": 0.0, "clip_norm": 10.0}
    return replace(
        _distillation("wan-1.3b-dmd", task, steps=1700),
        batch_size=1,
        accumulate=64,
        optimizer=OptimizerConfig(betas=betas, **rates),
        ema_decay=0.99,
        device="cuda",
        log_every=10,
        sample_every=0,
    )


def video() -> TrainConfig:
    """A model of your own videos, from nothing: `videoar train video --data.path LATENTS`.

    First pictures, with which a video begins, so that words for what is done show in them, too: a
    drawer that is told to open is shut. Then two latent frames, in which the prompt alone says
    where to go, then clips.
    """
    first = replace(PICTURES, far_probability=0.0)
    return _named(
        "video",
        toy(),
        task=TextToVideoConfig(
            latents=Path("latents"),
            units=TOY_UNITS,
            flow=FlowMatchingConfig(far_probability=0.3, short_probability=0.4),
            stages=(
                StageConfig(steps=1500, flow=first, draws=8, units=("frame",)),
                StageConfig(steps=300, flow=PAIRS, draws=2, units=("frame",)),
            ),
        ),
        steps=7000,
        batch_size=16,
        optimizer=replace(toy().optimizer, decay_fraction=0.3),
        sample_every=500,
    )


def finetune() -> TrainConfig:
    """Go on from a checkpoint with your own videos: `videoar train finetune --data.path X`."""
    task = TextToVideoConfig(latents=Path("latents"), units=TOY_UNITS, init=Path("toy-base"))
    rates = {"learning_rate": 1e-3, "muon_learning_rate": 0.005, "warmup_steps": 20}
    return _named(
        "finetune",
        toy(),
        task=task,
        steps=500,
        batch_size=8,
        optimizer=OptimizerConfig(**rates, decay_fraction=0.5),
        ema_decay=0.99,
        log_every=10,
        sample_every=100,
    )


def distils(config: TrainConfig) -> bool:
    """Say whether a recipe distils a teacher."""
    return isinstance(config.task, StudentConfig)


ALL = (
    *(codec_toy, codec_toy_decoder, codec, judge),
    *(toy, router, toy_teacher, video, finetune),
    *(few_step, toy_start, toy_same, toy_dmd, wan_dmd),
)
RECIPES = {recipe().name: recipe for recipe in ALL}
DISTILLATIONS = {name: recipe for name, recipe in RECIPES.items() if distils(recipe())}


def find(name: str) -> TrainConfig:
    """Build the recipe of that name.

    Raises:
        ValueError: there is no such recipe or function.
    """
    if name in RECIPES:
        return RECIPES[name]()
    if ":" not in name:
        raise ValueError(
            f"Unknown recipe {name!r}: use one of {', '.join(RECIPES)},"
            f" or package.module:function.{hint(name, RECIPES, ' Did you mean {}?')}"
        )
    kinds = ImportError, AttributeError, ValueError, TypeError
    with explained(f"Recipe {name!r} cannot be imported ({{}}): check both names.", *kinds):
        config = import_named(name)
        config = config() if callable(config) else config
    if not isinstance(config, TrainConfig):
        raise ValueError(f"Recipe {name!r} returns {type(config).__name__}: return a TrainConfig.")
    return config
