"""What the recipes of distillation train: a student, from a teacher, a critic and prompts."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from videoar.checks import Count, Report, explained
from videoar.core.schemes import names
from videoar.core.transformer import VideoTransformer
from videoar.data.latents import LatentShards, check_codec
from videoar.evaluation.judge import WORLD
from videoar.generation.config import trained_flow
from videoar.generation.pipeline import VideoPipeline
from videoar.training.distillation import objectives
from videoar.training.distillation.scores import Context
from videoar.training.distributed import recompute_activations
from videoar.training.loop import TrainConfig
from videoar.training.low_rank import networks_of, trainable
from videoar.training.objectives import TextToVideo
from videoar.training.text_to_video import GeneratorConfig, GeneratorTask, Units


@dataclass(frozen=True, kw_only=True)
class StudentConfig(GeneratorConfig):
    """Distil a teacher into a causal student of few steps."""

    teacher: str
    """Checkpoint that says what videos should be; it reads everything, or the past alone, as it was
    trained to."""
    student: str
    """Checkpoint that the student begins with."""
    critic: str | None = None
    """Checkpoint that the critic begins with; None: the teacher."""
    units: Units = ()
    """Unit schemes, or their names, drawn from at every step; those of the student by default."""
    distillation: objectives.DistillationConfig = field(
        default_factory=objectives.DistillationConfig
    )
    """The objective."""
    recompute: bool = False
    """Compute activations again for the gradients, instead of keeping them."""
    num_validation: Count = 32
    """Videos of a validation, shared among the kinds of unit; they are measured."""

    def build(self, config: TrainConfig, report: Report) -> "StudentTask":
        return StudentTask(self, config, report)


def load_role(name: str, role: str) -> VideoPipeline:
    """Load who takes a role, or say which checkpoint is missing."""
    with explained(f"the {role}: {{}}"):
        return VideoPipeline.from_pretrained(name)


def shared_traits(pipe: VideoPipeline) -> dict[str, Any]:
    """Return what must agree where transformers are to take the same clips and words."""
    config = pipe.transformer.config
    return {
        "codec": pipe.codec.fingerprint(),
        "latent channels and patch": (config.latent_channels, config.patch),
        "frame size": (pipe.width, pipe.height),
        "words": pipe.prompt_encoder.fingerprint(),
    }


def forecast(networks: dict[str, VideoTransformer], *, lora: bool = False) -> str:
    """Say what weights, gradients, averages and moments take, on one GPU and split among more.

    In float32, but for the teacher, which stays as it is stored. Activations come on top.
    """
    counts = {name: network.num_parameters for name, network in networks.items()}
    teacher = networks["teacher"]
    total = counts["teacher"] * next(teacher.parameters()).element_size()
    # Weight and gradient, two moments, and the student's average.
    each = {"student": (4 if lora else 16) + 4, "critic": 4 if lora else 16}
    total += sum(each[name] * count for name, count in counts.items() if name != "teacher")
    sizes = ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in counts.items())
    splits = ", ".join(f"{total / 2**30 / gpus:.1f} on {gpus}" for gpus in (1, 2, 4, 8))
    return f"parameters: {sizes}; GiB of state beside activations: {splits} GPUs"


class StudentTask(GeneratorTask):
    """A `Task`: what the loop needs to distil a student."""

    def __init__(self, task: StudentConfig, config: TrainConfig, report: Report) -> None:
        self.task, self.clip_frames = task, task.distillation.clip_frames
        teacher, student = load_role(task.teacher, "teacher"), load_role(task.student, "student")
        units = names(task.units or student.meta.get("units") or [student.sampling.units])
        others, distillation = {"student": student}, task.distillation
        if distillation.stage == "dmd":
            others["critic"] = load_role(task.critic or task.teacher, "critic")
        self.units, self.made_of = units, (task.teacher, task.student, task.critic)
        context = self._check_roles(teacher, others)
        shards = LatentShards(task.latents)
        check_codec(task.latents, shards.info, student.codec, checkpoint=task.student)
        self._check_clips(shards, teacher)
        super().__init__(student, shards, config, report)
        student.sampling = student.sampling.trained(
            units,
            window=distillation.clip_frames,
            num_inference_steps=distillation.num_inference_steps,
            shift=distillation.shift,
            step="renoise",
            lag=None,
            guidance_scale=1.0,
            context_noise=0.0,
        )
        taught: dict[str, Any] = {
            "teacher": networks_of(teacher, shards),
            "context": context,
            "schemes": self.schemes,
            "config": distillation,
            "seed": config.seed,
        }
        trained = [trainable(pipe, shards, rank=task.lora_rank) for pipe in others.values()]
        for pipe in others.values() if task.recompute else ():
            recompute_activations(pipe.transformer)
        kind = objectives.DistributionMatching if "critic" in others else objectives.Initialisation
        self.objective = kind(*trained, **taught)
        sizes = {name: pipe.transformer for name, pipe in (others | {"teacher": teacher}).items()}
        report(f"teacher {task.teacher} ({context}), student {task.student}")
        report(forecast(sizes, lora=task.lora_rank is not None))
        first = distillation.critic_warmup + distillation.critic_steps + 1
        if "critic" in others and config.steps < first:
            report(
                f"the student does not move: its first step is step {first} of {config.steps};"
                " raise steps, or lower critic_warmup"
            )

    def _check_roles(self, teacher: VideoPipeline, others: dict[str, VideoPipeline]) -> Context:
        """Return what the teacher reads; raise if it does not fit, or if the others do not."""
        context, name = trained_flow(teacher.meta, teacher.sampling).context, self.task.teacher
        if context != "full" and (new := teacher.untrained(self.units)):
            raise ValueError(
                f"{name} was {new}: use one of these units, or a teacher that reads everything"
            )
        theirs = shared_traits(teacher)
        for role, pipe in others.items():
            for what, ours in shared_traits(pipe).items():
                if ours != theirs[what]:
                    raise ValueError(
                        f"the {role} has the {what} {ours}, but the teacher {name} has"
                        f" {theirs[what]}: name checkpoints that share it"
                    )
        return context

    def _check_clips(self, shards: LatentShards, teacher: VideoPipeline) -> None:
        """Raise unless the clips, and those of the objective, have lengths and sizes that fit."""
        task, clips = self.task, shards.clips
        needed, shortest = task.distillation.clip_frames, min(clip["frames"] for clip in clips)
        if shortest < needed:
            raise ValueError(
                f"{task.latents} has clips of {shortest} latent frames, but clip_frames is"
                f" {needed}: prepare longer clips, or lower clip_frames"
            )
        trained = teacher.meta.get("config", {}).get("task", {}).get("flow", {}).get("clip_frames")
        if trained is not None and needed > trained:
            raise ValueError(
                f"clip_frames is {needed}, but {task.teacher} was trained on clips of {trained}"
                f" latent frames: use {trained} or fewer, or another teacher"
            )
        _, *stride = teacher.codec.stride
        own = teacher.height // stride[0], teacher.width // stride[1]
        for clip in clips if teacher.meta else ():  # a folder of Wan says nothing of its sizes
            if (size := (clip["height"], clip["width"])) != own:
                raise ValueError(
                    f"{task.latents} has clips of {size[0]}x{size[1]} latents, but {task.teacher}"
                    f" makes videos of {own[0]}x{own[1]}: prepare the videos in the size"
                    f" {teacher.width}x{teacher.height}"
                )

    @torch.no_grad()
    def validate(self, module: TextToVideo, *, step: int) -> dict[str, float]:
        """Make videos, keep a sheet of them, and measure them; the judge reads those of its world.

        `change` from frame to frame and `contrast`, as shares of the range of pixels, fall when a
        student freezes or fades.
        """
        values, fps = dict[str, float](), self.pipe.sampling.fps
        for name, prompts, blocks in self.videos(module, step, count=self.task.num_validation):
            pixels = blocks.astype(np.float32) / 255
            values[f"change/{name}"] = float(np.abs(np.diff(pixels, axis=1)).mean())
            values[f"contrast/{name}"] = float(pixels.std())
            found = WORLD.look(blocks, prompts, fps=fps) if self.of_the_world else []
            for key in ("color", "shape", "motion") if found else ():
                values[f"{key}/{name}"] = float(np.mean([seen["scores"][key] for seen in found]))
        return values
