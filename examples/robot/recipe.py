"""The bundled `robot`, half an hour of one card: recipes of `videoar train` and `videoar distill`.

cd examples/robot
videoar train recipe:robot --data.path LATENTS
videoar distill recipe:few_robot --data.path LATENTS
"""

from dataclasses import replace
from pathlib import Path

from videoar.core.transformer import ModelConfig
from videoar.encoders.text_encoder import TextEncoderConfig
from videoar.training import recipes
from videoar.training.loop import TrainConfig
from videoar.training.optimizer import OptimizerConfig

CUBES = ("cube:1x2x2", "cube:2x2x2", "cube:2x3x3")
UNITS = ("frame", "chunk:2", "chunk:3", "key-detail:4", "multiscale:4,2,1", *CUBES)
SHAPE = {"num_layers": 6, "num_heads": 7, "head_dim": 32, "ffn_dim": 896, "freq_dim": 64}


def robot() -> TrainConfig:
    """Return `videoar train video` with batches of a card, of a model of 5.3 million parameters."""
    first = recipes.video()
    model = ModelConfig(**SHAPE, rope_theta=100.0, prediction="clean")
    steps = zip(first.task.stages, (2500, 1000), strict=True)
    stages = tuple(replace(stage, steps=count) for stage, count in steps)
    how = {"stages": stages, "compile": True, "num_validation": 0}
    return replace(
        first,
        name="robot",
        out=Path("runs/robot"),
        # As it was made: without rotary positions of words, and at rates that bind none of two.
        task=replace(first.task, units=UNITS, model=model, text=TextEncoderConfig(), **how),
        steps=12_459,  # what 17 minutes of an H200 were enough for
        batch_size=128,
        optimizer=OptimizerConfig(learning_rate=3e-3, muon_learning_rate=0.02, decay_fraction=0.35),
        ema_decay=0.999,
        device="cuda",
        log_every=50,
        save_every=1000,
        sample_every=2000,
    )


def few_robot() -> TrainConfig:
    """Return `videoar distill few-step` of it: two steps, and no guidance."""
    first = recipes.few_step()
    made = str(robot().out / "checkpoint")
    return replace(
        first,
        name="few-robot",
        out=Path("runs/few-robot"),
        task=replace(first.task, teacher=made, student=made, units=UNITS, num_validation=8),
        steps=900,
        batch_size=64,
        device="cuda",
        log_every=20,
        save_every=300,
        sample_every=0,
    )
