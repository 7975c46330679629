"""Recipes: functions that return a complete `TrainConfig`.

A name on the command line is a function here, or `package.module:function` anywhere.
"""

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from videoar.checks import hint
from videoar.core.loss import FlowMatchingConfig
from videoar.core.transformer import ModelConfig
from videoar.encoders.text_encoder import TextEncoderConfig
from videoar.encoders.tiny_codec import TinyCodecConfig
from videoar.generation.config import GenerationConfig
from videoar.training.codec import FootageConfig, ReconstructionConfig
from videoar.training.distillation.objectives import DistillationConfig
from videoar.training.distillation.task import StudentConfig
from videoar.training.loop import TrainConfig
from videoar.training.optimizer import OptimizerConfig
from videoar.training.reader import JudgeConfig
from videoar.training.text_to_video import TextToVideoConfig

TOY_UNITS = (
    "frame",
    "chunk:2",
    "chunk:3",
    "key-detail:4",
    "multiscale:4,2,1",
    "cube:1x2x2",
    "cube:2x2x2",
)
WIDE_CODEC = replace(TinyCodecConfig.toy(), decoder_channels=(128, 64, 32, 16))
SAMPLING = GenerationConfig(guidance_scale=3.0)
TOY_TASK = TextToVideoConfig(
    codec=Path("runs/codec-toy-decoder/checkpoint"),
    latents=Path("runs/world-64"),
    num_videos=10_000,
    num_latents=12,
    units=TOY_UNITS,
    model=ModelConfig(
        num_layers=6,
        num_heads=4,
        head_dim=32,
        ffn_dim=512,
        text_dim=128,
        freq_dim=64,
        rope_theta=100.0,
        prediction="clean",
    ),
    text=TextEncoderConfig(),
    flow=FlowMatchingConfig(far_probability=0.3, short_probability=0.5),
    sampling=SAMPLING,
    init=Path("runs/toy-short/checkpoint"),
)
SHORT_TASK = replace(
    TOY_TASK, latents=Path("runs/world-64-short"), num_videos=20_000, num_latents=4, init=None
)
TOY_STUDENT = StudentConfig(
    teacher="toy-base",
    teacher_mask="same",
    student="toy-base",
    latents=TOY_TASK.latents,
    units=TOY_UNITS,
    distillation=DistillationConfig(
        critic="causal",
        critic_steps=2,
        critic_draws=1,
        critic_learning_rate=3e-4,
        critic_warmup=40,
    ),
)


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
        save_every=250,
        sample_every=100,
    )


def codec_toy_decoder() -> TrainConfig:
    """A wider decoder for the latents of `codec-toy`: `videoar train codec-toy-decoder`."""
    first = codec_toy()
    return replace(
        first,
        name="codec-toy-decoder",
        out=Path("runs/codec-toy-decoder"),
        task=ReconstructionConfig(codec=WIDE_CODEC, init=first.out / "checkpoint"),
        steps=3000,
    )


def codec() -> TrainConfig:
    """A codec of your own videos: `videoar train codec --data.path VIDEOS`."""
    return TrainConfig(
        name="codec",
        out=Path("runs/codec"),
        task=FootageConfig(videos=Path("videos"), codec=WIDE_CODEC),
        steps=5000,
        batch_size=4,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=30, decay_fraction=0.25),
        ema_decay=0.998,
        precision="bfloat16",
        log_every=50,
        save_every=100,
        sample_every=100,
    )


def judge() -> TrainConfig:
    """A judge of labelled videos of your own: `videoar train judge --data.path FOOTAGE`."""
    return TrainConfig(
        name="judge",
        out=Path("runs/judge"),
        task=JudgeConfig(footage=Path("footage")),
        steps=2000,
        batch_size=16,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50, decay_fraction=0.5),
        ema_decay=0.99,
        precision="bfloat16",
        log_every=50,
        save_every=100,
        sample_every=200,
    )


def _toy(
    name: str, task: TextToVideoConfig, *, steps: int, batch_size: int, decay_fraction: float = 0.0
) -> TrainConfig:
    """Train the generator of the embedded checkpoints a stage further."""
    return TrainConfig(
        name=name,
        out=Path("runs") / name,
        task=task,
        steps=steps,
        batch_size=batch_size,
        optimizer=OptimizerConfig(
            learning_rate=3e-3, muon_learning_rate=0.02, decay_fraction=decay_fraction
        ),
        ema_decay=0.998,
        precision="bfloat16",
        log_every=20,
        save_every=200,
        sample_every=400,
    )


def toy_images() -> TrainConfig:
    """First pictures from text: `videoar train toy-images`.

    What a thing looks like is learned 20 times as fast from pictures as from clips.
    """
    task = replace(
        SHORT_TASK,
        units=("frame",),
        flow=FlowMatchingConfig(context="noisy", clip_frames=1, sink_frames=0),
        sampling=replace(SAMPLING, units="frame", window_frames=1, sink_frames=0),
    )
    return _toy("toy-images", task, steps=2500, batch_size=256)


def toy_pairs() -> TrainConfig:
    """Then two latent frames, where to go being said by the prompt alone: `toy-pairs`.

    In longer clips the context shows it, and what the words for it mean is not learned.
    """
    task = replace(
        SHORT_TASK,
        units=("frame",),
        flow=FlowMatchingConfig(clip_frames=2, far_probability=0.0),
        sampling=replace(SAMPLING, units="frame", window_frames=2),
        init=Path("runs/toy-images/checkpoint"),
    )
    return _toy("toy-pairs", task, steps=1000, batch_size=128)


def toy_short() -> TrainConfig:
    """The first second, in every kind of unit, after `toy-pairs`: `videoar train toy-short`."""
    task = replace(
        SHORT_TASK,
        flow=FlowMatchingConfig(clip_frames=4),
        sampling=replace(SAMPLING, window_frames=4),
        init=Path("runs/toy-pairs/checkpoint"),
    )
    return _toy("toy-short", task, steps=900, batch_size=64)


def toy() -> TrainConfig:
    """The bundled `toy-base`, for every kind of unit, after `toy-short`: `videoar train toy`."""
    return _toy("toy", TOY_TASK, steps=1500, batch_size=32, decay_fraction=0.4)


def toy_teacher() -> TrainConfig:
    """A teacher that reads everything, from `toy-base`: `videoar train toy-teacher`.

    It learns the lattice of multiscale units, too, so that it can teach them.
    """
    task = replace(
        TOY_TASK,
        codec=Path("toy-base"),
        units=("full", "full", "full", "multiscale:4,2,1"),
        flow=FlowMatchingConfig(context="full", sink_frames=0, far_probability=0.0),
        sampling=replace(SAMPLING, units="full", num_inference_steps=24, sink_frames=0),
        init=Path("toy-base"),
    )
    return _toy("toy-teacher", task, steps=2400, batch_size=64, decay_fraction=0.4)


def _toy_distillation(name: str, task: StudentConfig, *, steps: int) -> TrainConfig:
    """Match distributions; half-way and at the end the student is judged."""
    return TrainConfig(
        name=name,
        out=Path("runs") / name,
        task=task,
        steps=steps,
        batch_size=16,
        optimizer=OptimizerConfig(learning_rate=2e-4, betas=(0.0, 0.99), warmup_steps=0),
        ema_decay=0.95,
        precision="bfloat16",
        log_every=20,
        save_every=100,
        sample_every=steps // 2,
    )


def toy_start() -> TrainConfig:
    """The first stage of distillation: `videoar distill toy-start`.

    The teacher is causal as the student is: with one that reads everything motions were lost
    (`docs/log.md`).
    """
    task = replace(TOY_STUDENT, distillation=DistillationConfig(stage="consistency"))
    return replace(
        _toy_distillation("toy-start", task, steps=240),
        batch_size=32,
        optimizer=OptimizerConfig(
            learning_rate=5e-4, muon_learning_rate=2e-3, warmup_steps=20, decay_fraction=0.5
        ),
        ema_decay=0.98,
        sample_every=80,
    )


def toy_same() -> TrainConfig:
    """The second: `videoar distill toy-same`, teacher and critic reading what the student reads."""
    task = replace(TOY_STUDENT, student="runs/toy-start/checkpoint")
    return _toy_distillation("toy-same", task, steps=400)


def toy_dmd() -> TrainConfig:
    """Symmetric DMD: `videoar distill toy-dmd`, after `toy-same` and `toy-teacher`."""
    task = replace(
        TOY_STUDENT,
        teacher="runs/toy-teacher/checkpoint",
        teacher_mask="full",
        student="runs/toy-same/checkpoint",
        distillation=replace(TOY_STUDENT.distillation, critic="symmetric"),
    )
    return _toy_distillation("toy-dmd", task, steps=320)


def wan_dmd() -> TrainConfig:
    """Wan2.1 1.3B to 4 steps by chunks of 3, under `torchrun`: `videoar distill wan-1.3b-dmd`.

    Rates, sigmas and turns are those of Self-Forcing (arXiv:2506.08009).
    """
    wan = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    return TrainConfig(
        name="wan-1.3b-dmd",
        out=Path("runs/wan-1.3b-dmd"),
        task=StudentConfig(
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
        ),
        steps=1700,
        batch_size=1,
        accumulate=64,
        optimizer=OptimizerConfig(
            learning_rate=2e-6,
            betas=(0.0, 0.999),
            warmup_steps=0,
            decay_fraction=0.0,
            clip_norm=10.0,
        ),
        ema_decay=0.99,
        precision="bfloat16",
        device="cuda",
        save_every=100,
    )


def finetune() -> TrainConfig:
    """Go on from a checkpoint with your own videos: `videoar train finetune --task.latents X`."""
    return TrainConfig(
        name="finetune",
        out=Path("runs/finetune"),
        task=TextToVideoConfig(latents=Path("latents"), units=TOY_UNITS, init=Path("toy-base")),
        steps=500,
        batch_size=8,
        optimizer=OptimizerConfig(
            learning_rate=1e-3, muon_learning_rate=0.005, warmup_steps=20, decay_fraction=0.5
        ),
        ema_decay=0.99,
        precision="bfloat16",
        save_every=100,
        sample_every=100,
    )


def distils(config: TrainConfig) -> bool:
    """Say whether a recipe distils a teacher."""
    return isinstance(config.task, StudentConfig)


ALL = (
    *(codec_toy, codec_toy_decoder, codec, judge),
    *(toy_images, toy_pairs, toy_short, toy, toy_teacher, finetune),
    *(toy_start, toy_same, toy_dmd, wan_dmd),
)
RECIPES: dict[str, Callable[[], TrainConfig]] = {recipe().name: recipe for recipe in ALL}
DISTILLATIONS = {name: recipe for name, recipe in RECIPES.items() if distils(recipe())}


def find(name: str) -> TrainConfig:
    """Build the recipe of that name.

    Raises:
        ValueError: there is no such recipe or function.
    """
    if name in RECIPES:
        return RECIPES[name]()
    module, colon, function = name.partition(":")
    if colon:
        try:
            config = getattr(importlib.import_module(module), function)()
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"Recipe {name!r} cannot be imported ({error}): check both names."
            ) from error
        if not isinstance(config, TrainConfig):
            raise ValueError(
                f"Recipe {name!r} returns {type(config).__name__}: return a TrainConfig."
            )
        return config
    raise ValueError(
        f"Unknown recipe {name!r}: use one of {', '.join(RECIPES)},"
        f" or package.module:function.{hint(name, RECIPES, ' Did you mean {}?')}"
    )
