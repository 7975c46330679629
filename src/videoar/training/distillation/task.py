"""What the recipes of distillation train: a student, from a teacher, a critic and prompts."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import nn
from tyro.conf import arg

from videoar.core.schemes import parse
from videoar.core.transformer import VideoTransformer
from videoar.data.batches import Batches
from videoar.data.captions import Wording
from videoar.data.latents import LatentShards, check_codec
from videoar.data.video import contact_sheet
from videoar.data.world import held_out_prompts
from videoar.encoders.text_encoder import TinyPromptEncoder
from videoar.encoders.umt5 import UMT5PromptEncoder
from videoar.evaluation.judge import judge_whole
from videoar.evaluation.study import make
from videoar.generation.pipeline import VideoPipeline
from videoar.training.distillation.scores import PASSES, Context
from videoar.training.distillation.stages import (
    DistillationConfig,
    DistributionMatching,
    Initialisation,
    check_ranges,
)
from videoar.training.distributed import recompute_activations
from videoar.training.loop import TrainConfig
from videoar.training.lora import add_low_rank, merge_low_rank
from videoar.training.objectives import TextToVideo, own_weights
from videoar.training.run_folder import Report


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Distil a teacher into a causal student of few steps."""

    teacher: str
    """Checkpoint that says what videos should be."""
    student: str
    """Checkpoint that the student begins with."""
    critic: str | None = None
    """Checkpoint that the critic begins with; None: the teacher."""
    latents: Annotated[Path, arg(aliases=["--data.path"])]
    """Folder of latents with the prompts and the sizes of the videos."""
    units: tuple[str, ...]
    """Unit schemes of the student, drawn from at every step."""
    teacher_mask: Literal["full", "same"] = "full"
    """What the teacher reads: everything, or what the student reads."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """The objective."""
    lora_rank: int | None = None
    """Train low-rank updates of this rank, merged at the end; None: all weights."""
    recompute: bool = False
    """Compute activations again for the gradients, instead of keeping them."""
    num_validation: int = 32
    """Prompts of a validation: held-out ones of the procedural world, else of the folder."""

    def __post_init__(self) -> None:
        check_ranges(self, num_validation=1, **({} if self.lora_rank is None else {"lora_rank": 1}))

    def build(self, config: TrainConfig, report: Report) -> "StudentTask":
        if not self.latents.is_dir():
            raise ValueError(
                f"there is no folder {self.latents}: prepare one, train the teacher's recipe, which"
                " makes it, or name it with --task.latents"
            )
        return StudentTask(self, config, report)


def load_part(name: str, role: str) -> VideoPipeline:
    """Load who takes a part, or say which checkpoint is missing."""
    try:
        return VideoPipeline.from_pretrained(name)
    except ValueError as error:
        raise ValueError(f"the {role}: {error}") from error


def context_of(pipe: VideoPipeline) -> Context:
    """Return what a checkpoint was trained to read, as it says itself."""
    task = pipe.meta.get("config", {}).get("task", {})
    trained = pipe.meta.get("units") or task.get("units") or [pipe.sampling.units]
    if list(trained) == ["full"]:
        return "full"
    return task.get("flow", {}).get("context", "clean")


def check_parts(
    task: StudentConfig, teacher: VideoPipeline, parts: dict[str, VideoPipeline]
) -> Context:
    """Return what the teacher reads; raise if it does not fit, or if the others do not fit it."""
    context = context_of(teacher)
    causal = f"reads the past alone (context {context})"
    if (task.teacher_mask == "full") != (context == "full"):
        says = "reads everything" if context == "full" else causal
        other = "same" if task.teacher_mask == "full" else "full"
        raise ValueError(
            f"teacher_mask is {task.teacher_mask}, but {task.teacher} {says}: name another"
            f" teacher, or use teacher_mask {other}"
        )
    known = teacher.meta.get("units", ())
    if task.teacher_mask == "same" and known and (new := set(task.units) - set(known)):
        raise ValueError(
            f"{task.teacher} was not trained on {', '.join(sorted(new))}, but on"
            f" {', '.join(known)}: use one of these units, or a teacher that reads everything"
        )
    for role, pipe in parts.items():
        for what, find in _FITTING.items():
            ours, theirs = find(pipe), find(teacher)
            if ours != theirs:
                raise ValueError(
                    f"the {role} has the {what} {ours}, but the teacher {task.teacher} has"
                    f" {theirs}: name checkpoints that share it"
                )
    return context


def fitting(pipe: VideoPipeline) -> str:
    """Return what must agree where two transformers are to take the same words."""
    prompts = pipe.prompt_encoder
    if isinstance(prompts, UMT5PromptEncoder):
        return prompts.fingerprint()
    assert isinstance(prompts, TinyPromptEncoder)
    limit = prompts.encoder.config.max_tokens
    return f"{limit} tokens of the vocabulary {prompts.tokenizer.fingerprint()}"


_FITTING: dict[str, Callable[[VideoPipeline], Any]] = {
    "codec": lambda pipe: pipe.codec.fingerprint(),
    "latent channels and patch": lambda pipe: (
        pipe.transformer.config.latent_channels,
        pipe.transformer.config.patch,
    ),
    "frame size": lambda pipe: (pipe.width, pipe.height),
    "words": fitting,
}


def forecast(networks: Mapping[str, VideoTransformer], *, lora: bool = False) -> str:
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


def _size(clip: dict[str, Any]) -> tuple[int, int]:
    return clip["height"], clip["width"]


class StudentTask:
    """A `Task`: what the loop needs to distil a student."""

    def __init__(self, task: StudentConfig, config: TrainConfig, report: Report) -> None:
        self.task, self.config = task, config
        teacher = load_part(task.teacher, "teacher")
        student = load_part(task.student, "student")
        parts, distillation = {"student": student}, task.distillation
        follower = None
        if distillation.stage == "dmd":
            follower = load_part(task.critic or task.teacher, "critic")
            parts["critic"] = follower
        context = check_parts(task, teacher, parts)
        check_codec(task.latents, student.codec, checkpoint=task.student)
        self.wording = Wording.of(student.prompt_encoder, task.latents)
        shards = LatentShards(task.latents, tokenize=self.wording.tokenize)
        self.student = student
        self._check_clips(shards, teacher)
        schemes = tuple(map(parse, task.units))
        module = self._trainable(student)
        taught: dict[str, Any] = {
            "teacher": self._module(teacher),
            "context": context,
            "schemes": schemes,
            "config": distillation,
            "seed": config.seed,
        }
        self.objective: Initialisation | DistributionMatching
        if follower is None:
            self.objective = Initialisation(module, **taught)
        else:
            self.objective = DistributionMatching(module, self._trainable(follower), **taught)
        batches = {"batch_size": config.batch_size, "seed": config.seed, "kinds": shards.kinds}
        self.batches = Batches(shards, **batches)
        self.of_the_world = "scene" in shards.clips[0].get("extra", {})
        side = student.transformer.config.patch * student.codec.stride[1]
        tokens = distillation.clip_frames * student.height * student.width // side**2
        self.tokens_per_batch = tokens * config.batch_size
        self.flops_per_batch = config.batch_size * self._flops(tokens, teacher.transformer)
        sizes = {name: pipe.transformer for name, pipe in (parts | {"teacher": teacher}).items()}
        report(f"teacher {task.teacher} ({context}), student {task.student}")
        report(forecast(sizes, lora=task.lora_rank is not None))
        first = distillation.critic_warmup + distillation.critic_steps + 1
        if follower is not None and config.steps < first:
            report(
                f"the student does not move: its first step is step {first} of {config.steps};"
                " raise steps, or lower critic_warmup"
            )

    def _check_clips(self, shards: LatentShards, teacher: VideoPipeline) -> None:
        """Raise unless the clips, and those of the objective, have lengths and sizes that fit."""
        task = self.task
        needed = task.distillation.clip_frames
        shortest = min(clip["frames"] for clip in shards.clips)
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
        stride, sizes = teacher.codec.stride[1:], Counter(_size(clip) for clip in shards.clips)
        own = teacher.height // stride[0], teacher.width // stride[1]
        for size in sizes if teacher.meta else ():  # a folder of Wan says nothing of its sizes
            if size != own:
                raise ValueError(
                    f"{task.latents} has clips of {size[0]}x{size[1]} latents, but {task.teacher}"
                    f" makes videos of {own[0]}x{own[1]}: prepare the videos with --sizes"
                    f" {teacher.width}x{teacher.height}"
                )
        (height, width), _ = sizes.most_common(1)[0]
        self.student.height, self.student.width = height * stride[0], width * stride[1]

    def _module(self, pipe: VideoPipeline) -> TextToVideo:
        text = Wording.of(pipe.prompt_encoder, self.task.latents).module
        return TextToVideo(pipe.transformer, text)

    def _trainable(self, pipe: VideoPipeline) -> TextToVideo:
        module = self._module(pipe).requires_grad_(True)
        own_weights(module)
        module.text.requires_grad_(self.task.lora_rank is None)
        if self.task.lora_rank is not None:
            add_low_rank(pipe.transformer, self.task.lora_rank)
        if self.task.recompute:
            recompute_activations(pipe.transformer)
        return module

    def _flops(self, tokens: int, teacher: VideoTransformer) -> float:
        """Count the operations of a mean step for one video."""
        config, student = self.task.distillation, self.student.transformer
        one = student.flops(tokens, keys=tokens // 2)
        asked = teacher.flops(tokens, keys=tokens) * (1 if config.guidance_scale == 1 else 2)
        if config.stage == "trajectories":
            return asked * config.path_steps + 6.0 * one
        if config.stage == "consistency":
            return asked + 8.0 * one
        rollout = one * ((config.num_inference_steps + 1) / 2 + 1)
        passes = len(PASSES[config.critic]) * teacher.flops(tokens, keys=tokens)
        learned = 3 * passes * config.critic_draws
        share = 1 / (config.critic_steps + 1)
        return rollout + (1 - share) * learned + share * (4 * one + passes + asked)

    def pipeline(self, module: nn.Module) -> VideoPipeline:
        """Return what the student makes videos with."""
        assert isinstance(module, TextToVideo)
        config, old = self.task.distillation, self.student.sampling
        sampling = replace(
            old,
            units=old.units if old.units in self.task.units else self.task.units[0],
            num_inference_steps=config.num_inference_steps,
            shift=config.shift,
            sigmas=None,
            step="renoise",
            guidance_scale=1.0,
            context_noise=0.0,
        )
        return VideoPipeline(
            transformer=module.transformer,
            prompt_encoder=self.wording.along(module.text),
            codec=self.student.codec,
            sampling=sampling,
            height=self.student.height,
            width=self.student.width,
        )

    @torch.no_grad()
    def validate(self, module: nn.Module, *, step: int) -> dict[str, float]:
        """Make videos, keep a sheet of them, and measure them; the judge reads those of its world.

        `change` from frame to frame and `contrast`, as shares of the range of pixels, fall when a
        student freezes or fades.
        """
        pipe, values, shown = self.pipeline(module), {}, []
        pipe.codec.to(next(module.parameters()).device)
        count, fps = self.task.num_validation, pipe.sampling.fps
        prompts = held_out_prompts(count, seed=0) if self.of_the_world else self._captions(count)
        frames = 1 + pipe.codec.stride[0] * (self.task.distillation.clip_frames - 1)
        every = max(1, frames // 6)
        for name in self.task.units:
            blocks = np.concatenate(list(make(pipe, name, prompts, num_frames=frames)), axis=1)
            shown.append(blocks[:8, ::every].reshape(-1, *blocks.shape[2:]))
            pixels = blocks.astype(np.float32) / 255
            values[f"change/{name}"] = float(np.abs(np.diff(pixels, axis=1)).mean())
            values[f"contrast/{name}"] = float(pixels.std())
            found = judge_whole(iter([blocks]), prompts, fps=fps) if self.of_the_world else []
            for key in ("color", "shape", "motion") if found else ():
                scores = [video["scores"][key] for video in found]
                values[f"{key}/{name}"] = float(np.mean(scores))
        folder = self.config.out / "samples"
        folder.mkdir(exist_ok=True)
        sheet = contact_sheet(np.concatenate(shown), columns=len(range(0, frames, every)))
        Image.fromarray(sheet).save(folder / f"step-{step}.png")
        return values

    def _captions(self, count: int) -> list[dict[str, Any]]:
        """Return prompts of the folder, of what it holds out if it does, each with a seed."""
        held_out = self.task.latents / "heldout"
        shards = LatentShards(held_out if held_out.is_dir() else self.task.latents)
        captions = [caption for clip in shards.clips for caption in clip["captions"][:1]]
        return [{"prompt": text, "seed": k} for k, text in enumerate((captions or [""])[:count])]

    def export(self, folder: Path, module: nn.Module, meta: dict[str, Any]) -> None:
        assert isinstance(module, TextToVideo)
        merge_low_rank(module.transformer)
        pipe = self.pipeline(module)
        pipe.meta = {"units": list(self.task.units), **meta}
        pipe.save_pretrained(folder, overwrite=True)
