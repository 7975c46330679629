"""A tiny distillation that tests start under torchrun, as users do: `distributed.py OUT STEPS`."""

import dataclasses
import os
import signal
import sys
from pathlib import Path

import torch
from tiny import tiny_pipeline

from videoar.data.latents import LatentsInfo, ShardWriter
from videoar.training.distillation.objectives import DistillationConfig
from videoar.training.distillation.task import StudentConfig
from videoar.training.loop import TrainConfig, train
from videoar.training.optimizer import OptimizerConfig


def prepare(root: Path) -> Path:
    """Write a teacher that reads everything, a student, latents, and parts that fit neither."""
    roles = {"teacher": "full", "student": "frame", "other": "full", "short": "full"}
    for name, units in roles.items():
        pipe = tiny_pipeline(seed=int(name == "other"))
        pipe.height = pipe.width = 32
        flow = {"clip_frames": 2 if name == "short" else 3, "context": "clean"}
        pipe.meta = {"units": [units], "config": {"task": {"flow": flow}}}
        pipe.save_pretrained(root / name)
    rng, codec = torch.Generator().manual_seed(0), tiny_pipeline().codec
    foreign = "TinyCodec-of-another"
    folders = {"latents": (None, 4), "foreign": (foreign, 4), "wide": (None, 6)}
    for name, (owner, width) in folders.items():
        owner = owner or codec.fingerprint()
        info = LatentsInfo(codec=owner, channels=4, stride=codec.stride, fps=16.0)
        with ShardWriter(root / name, info=info) as writer:
            for number in range(24):
                latents = torch.randn(3, 4, 4, width, generator=rng)
                writer.add(latents, captions=[f"a ball {number}"])
    return root


def config(root: Path, out: Path, **changes) -> TrainConfig:
    """Two players on tiny latents; a step has six batches, for one, two, or three ranks."""
    task = StudentConfig(
        teacher=str(root / "teacher"),
        student=str(root / "student"),
        latents=root / "latents",
        units=("frame", "cube:1x2x2"),
        distillation=DistillationConfig(
            num_inference_steps=2,
            path_steps=4,
            clip_frames=3,
            critic_steps=2,
            critic_draws=1,
            critic_warmup=1,
        ),
    )
    whole = TrainConfig(
        name="tiny",
        task=task,
        out=out,
        steps=6,
        batch_size=2,
        accumulate=6,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0),
        log_every=1,
        save_every=2,
    )
    return dataclasses.replace(whole, **changes)


if __name__ == "__main__":
    torch.set_num_threads(1)
    root, out, steps, victim = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]

    if victim and os.environ["RANK"] == victim[0]:
        from videoar.training.distillation.objectives import DistributionMatching

        loss = DistributionMatching.loss

        def dying(self, batch, rng, *, step=0):
            """Be killed in the middle of a step: the others wait in a collective."""
            if step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return loss(self, batch, rng, step=step)

        DistributionMatching.loss = dying
    try:
        train(config(root, out, steps=steps))
    except ConnectionError as error:
        sys.stdout.write(f"{error}\n")
        sys.exit(2)
