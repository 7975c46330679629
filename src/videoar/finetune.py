"""Going on from a checkpoint with videos of one's own."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from videoar.checkpoint import resolve
from videoar.objectives import FlowMatchingConfig
from videoar.pipeline import VideoPipeline
from videoar.runs import Report
from videoar.tasks import GeneratorTask, GeneratorTraining, check_codec
from videoar.text import PromptEncoder, TextEncoderConfig
from videoar.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class FinetuneTask:
    """Train the generator of a checkpoint on prepared videos; sizes are those it has."""

    latents: Annotated[Path, arg(aliases=["--data.path"])]
    """Folder that `videoar prepare` wrote."""
    init: str = "toy-base"
    """Checkpoint to begin with: a bundled name or a folder."""
    units: tuple[str, ...]
    """Unit schemes, drawn from at every step."""
    flow: FlowMatchingConfig = field(default_factory=FlowMatchingConfig)
    """The objective."""

    def build(self, config: TrainConfig, report: Report) -> GeneratorTraining:
        if not self.latents.is_dir():
            raise ValueError(
                f"there is no folder {self.latents}: make it of your videos, with `videoar prepare"
                f" VIDEOS {self.latents}`, or name it with --task.latents"
            )
        folder = resolve(self.init)
        pipe = VideoPipeline.from_pretrained(folder)
        prompts = pipe.prompt_encoder
        trained = isinstance(prompts, PromptEncoder)
        info = check_codec(self.latents, pipe.codec, checkpoint=self.init)
        task = GeneratorTask(
            codec=folder,
            latents=self.latents,
            units=self.units,
            model=pipe.transformer.config,
            text=prompts.encoder.config if trained else TextEncoderConfig(),
            flow=self.flow,
            sampling=replace(pipe.sampling, fps=round(info.fps)),
            init=folder,
        )
        return GeneratorTraining(task, config, report)
