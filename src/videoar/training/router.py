"""Training a router of units on what segments of clips cost, as `evaluation.search` measures it.

On true context neither what a segment costs nor what the router reads depends on how the frames
before it were cut. So what a router costs on a clip, on average over its choices, is a sum over
segments from the last to the first, and its gradient is exact: no choice has to be drawn.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tyro.conf import arg

from videoar.checkpoints.checkpoint import fingerprints
from videoar.checks import Count, Finite, Limit, Options, Report
from videoar.core.schemes import KINDS, names, parse
from videoar.data.batches import Batches
from videoar.data.clips import WorldEncoder
from videoar.data.latents import LatentShards
from videoar.evaluation.metrics import bootstrap_interval
from videoar.evaluation.search import Clips, clips_of
from videoar.evaluation.statistics import difference
from videoar.evaluation.tables import cells, columns
from videoar.generation.pipeline import VideoPipeline
from videoar.generation.router import Router, RouterConfig
from videoar.training.loop import TrainConfig
from videoar.training.objectives import Named, Objective
from videoar.training.run_folder import COSTS
from videoar.training.text_to_video import Units
from videoar.weights import read_safetensors, write_safetensors

SURE = 1e6
"""Times this, logits leave no doubt."""
TESTED = 4  # one clip of so many
Values = Float[Tensor, "clips starts menu 3"]
"""Of the segments that begin with a frame: what is to be small, the cost, and the passes."""
Choices = Float[Tensor, "#clips starts menu"]
"""Logits."""


@dataclass(frozen=True, kw_only=True)
class RoutingConfig(Options):
    """Train a router of units, beside a checkpoint that stays as it is."""

    checkpoint: str = "toy"
    """Checkpoint that makes the videos: a bundled name or a folder."""
    latents: Annotated[Path, arg(name="data.path", prefix_name=False)]
    """Folder that `videoar prepare` wrote."""
    units: Units = ()
    """Unit schemes to choose from; by default those that the checkpoint was trained on."""
    pass_cost: Finite = 5.0
    """What a pass counts: the cost that it has to save to be worth its time."""
    frames: Count = 6
    """Latent frames of a clip."""
    clips: Count = 256
    """Clips that are measured, the last quarter to test on."""
    draws: Annotated[int, Limit(lambda count: count >= 2, "2 or more")] = 4
    """Videos of every segment."""
    num_inference_steps: Count | None = None
    """Denoising steps; the checkpoint's own by default."""
    hidden_size: Count = 64
    """Width of the router."""
    num_videos: int = 0
    """Videos of the world to encode, if the folder is not there; 0: it must be."""

    def check(self, config: TrainConfig) -> None:
        if not self.num_videos or self.latents.exists():
            LatentShards(self.latents)

    def build(self, config: TrainConfig, report: Report) -> "RoutingTask":
        return RoutingTask(self, config, report)


def added_up(
    values: Values, sizes: list[int], logits: Choices | None = None
) -> tuple[Float[Tensor, "clips 3"], Choices]:
    """Return the values of whole clips, on average over choices, and what each choice leads to.

    Args:
        values: of segments.
        sizes: latent frames of the schemes of the menu.
        logits: of the choices; by default the best is chosen, with all that follows known. A
            segment that goes past the end, or leads to where none fits, is not chosen.
    """
    (clips, frames, *_), ahead = values.shape, dict[int, Tensor]()
    ahead[frames], found = values.new_zeros(clips, 3), values.new_full(values.shape[:3], -1e30)
    for start in reversed(range(frames)):
        if fits := [k for k, size in enumerate(sizes) if start + size in ahead]:
            after = torch.stack([ahead[start + sizes[k]] for k in fits], dim=1)
            each = values[:, start, fits] + after
            found[:, start, fits] = -each[..., 0].detach()
            shares = SURE * found[:, start, fits] if logits is None else logits[:, start, fits]
            ahead[start] = (shares.softmax(dim=1)[..., None] * each).sum(dim=1)
    if 0 not in ahead:
        raise ValueError(f"{frames} frames are no sum of {sizes}: measure longer clips")
    return ahead[0], found


@dataclass(frozen=True)
class Measured:
    """Clips as a router reads them, and what their segments cost."""

    features: Float[Tensor, "clips starts features"]
    values: Values

    def __len__(self) -> int:
        return len(self.features)

    def get(self, indices: list[int], rng: np.random.Generator) -> Named:
        return {"features": self.features[indices], "values": self.values[indices]}


class Routing(Objective):
    """Make small what whole clips cost on average over the choices of a router."""

    def __init__(self, router: Router, sizes: list[int]) -> None:
        self.module, self.sizes = router, sizes

    def loss(self, batch: Named, rng: torch.Generator, *, step: int = 0) -> Named:
        whole, _ = added_up(batch["values"], self.sizes, self.module(batch["features"]))
        return {"loss": whole[:, 0].mean()}


class RoutingTask:
    """A `Task`: what the loop needs to train a router."""

    def __init__(self, task: RoutingConfig, config: TrainConfig, report: Report) -> None:
        self.task, self.report = task, report
        self.pipe = pipe = VideoPipeline.from_pretrained(task.checkpoint)
        self.menu = names(task.units or pipe.meta.get("units", KINDS))
        router = RouterConfig(
            menu=self.menu,
            latent_channels=pipe.codec.latent_channels,
            text_channels=pipe.transformer.config.hidden_size,
            hidden_size=task.hidden_size,
        )
        self.sizes = [parse(name).frames or task.frames for name in self.menu]
        how = {"num_latents": task.frames, "seed": config.seed, "dtype": torch.float32}
        WorldEncoder(codec=pipe.codec, **how).write(task.latents, task.num_videos, report)
        how = {"frames": task.frames, "count": task.clips, "draws": task.draws}
        steps = task.num_inference_steps
        how |= {} if steps is None else {"num_inference_steps": steps}
        clips, module = clips_of(pipe, task.latents, **how), Router(router)
        rest = max(2, (count := len(clips.latents)) // TESTED)
        # Those to test on are measured twice: what is best by one measurement is not by another.
        latents, words = (torch.cat([x, x[-rest:]]) for x in (clips.latents, clips.words))
        clips = replace(clips, latents=latents, words=words)
        features, values = self._features(module, clips), self._values(clips, config.out / COSTS)
        self.known = Measured(features[: count - rest], values[: count - rest])
        std, mean = torch.std_mean(self.known.features, dim=(0, 1))
        module.mean.copy_(mean)
        module.std.copy_(torch.where(std > 1e-6, std, 1.0))
        self.apart, self.twice = features[count:], values[count - rest :].unflatten(0, (2, rest))
        self.objective = Routing(module, self.sizes)
        self.batches = Batches(self.known, batch_size=config.batch_size, seed=config.seed)

    def sources(self) -> dict[str, str]:
        task = self.task
        latents = {str(task.latents): LatentShards(task.latents).fingerprint()}
        return latents | fingerprints(task.checkpoint)

    def _features(self, router: Router, clips: Clips) -> Float[Tensor, "clips starts features"]:
        """Return what the router reads before every frame."""
        text, starts = self.pipe.encode([], before=clips.words), range(self.task.frames)
        found = [router.features(clips.latents[:, :start], text) for start in starts]
        return torch.stack(found, dim=1)

    @torch.inference_mode()
    def _values(self, clips: Clips, folder: Path) -> Values:
        """Measure what segments cost, or read what was measured before the run was killed."""
        task, menu = self.task, dict(zip(self.menu, self.sizes, strict=True))
        asked = [menu, task.frames, task.draws, clips.options, len(clips.latents), self.sources()]
        mark = hashlib.sha256(repr(asked).encode()).hexdigest()[:12]
        values = torch.full((len(clips.latents), task.frames, len(menu), 3), torch.nan)
        waves, steps = clips.waves(menu), len(clips.options.schedule) - 1
        folder.mkdir(parents=True, exist_ok=True)
        for start in range(task.frames):
            file = folder / f"{mark}-{start}.safetensors"
            if not file.exists():
                found = clips.costs(menu, task.frames, start, self.report)
                tensors = {name: torch.from_numpy(x) for (_, name), x in found.items()}
                write_safetensors(file, tensors)
            for name, cost in read_safetensors(file).items():
                passes = torch.full_like(cost, waves[name] * steps)
                whole = torch.stack([cost + task.pass_cost * passes, cost, passes], dim=1)
                values[:, start, self.menu.index(name)] = whole.float()
        return values

    def _parts(self) -> dict[str, Choices]:
        """Return what is chosen without a look at the clip, by what is known of others."""
        mean = self.known.values.mean(0, keepdim=True)
        alone = torch.eye(len(self.menu))[:, None, None].expand(-1, -1, self.task.frames, -1)
        fits = [k for k, size in enumerate(self.sizes) if self.task.frames % size == 0]
        costs = {k: float(added_up(mean, self.sizes, SURE * alone[k])[0][0, 0]) for k in fits}
        best, *others = sorted(costs, key=costs.__getitem__)
        found = {f"{self.menu[best]}, the best one": SURE * alone[best]}
        found |= {self.menu[k]: SURE * alone[k] for k in others}
        return found | {"the best partition": SURE * added_up(mean, self.sizes)[1]}

    @torch.no_grad()
    def compared(self, router: Router) -> dict[str, Float[np.ndarray, "clips 3"]]:
        """Return what choices cost on the clips that are tested on.

        Without a look at them; by the router; by what it chooses for other clips, so at as many
        passes; and by an oracle, who knows what each leads to in other videos of the same clip.
        """
        values, choices = self.twice.mean(0), SURE * router(self.apart).cpu()
        found = {name: added_up(values, self.sizes, own)[0] for name, own in self._parts().items()}
        turns = (choices.roll(k, 0) for k in range(1, len(choices)))
        others = torch.stack([added_up(values, self.sizes, own)[0] for own in turns])
        known = (SURE * added_up(one, self.sizes)[1] for one in self.twice.flip(0))
        pairs = zip(self.twice, known, strict=True)
        oracle = torch.stack([added_up(one, self.sizes, own)[0] for one, own in pairs])
        found |= {"router, of other clips": others.mean(0), "oracle": oracle.mean(0)}
        found["router"] = added_up(values, self.sizes, choices)[0]
        return {name: each.double().numpy() for name, each in found.items()}

    def validate(self, module: Router, *, step: int) -> dict[str, float]:
        """Return what choices cost, passes included."""
        return {name: float(each[:, 0].mean()) for name, each in self.compared(module).items()}

    def export(self, folder: Path, module: Router, meta: dict[str, Any]) -> None:
        whole = replace(self.pipe, router=module.cpu(), meta=self.pipe.meta | {"router": meta})
        whole.save_pretrained(folder, overwrite=True)
        self.report(self.table(module))

    def table(self, router: Router) -> str:
        """Compare choices with the best units that stay the same, clip by clip."""
        compared, rows = self.compared(router), []
        first, *_ = compared
        for name, each in compared.items():
            row = {"choice": name, "passes": f"{each[:, 2].mean():.1f}"}
            row |= {"cost": f"{bootstrap_interval(each[:, 1]):.4g}"}
            change = difference(each[None, :, 0], compared[first][None, :, 0])
            row["cost with passes, minus the best one"] = f"{change.change:.4g}"
            rows.append(row | {"p": f"{change.p:.2g}"})
        least = difference(compared["router"][None, :, 0], compared[first][None, :, 0]).least(1)
        return (
            f"{columns(cells(rows))}\n{len(self.apart)} clips of {self.task.frames} latent frames"
            f" were tested on, a pass counted as {self.task.pass_cost:g}; a difference of"
            f" {least:.4g} would have been found in 8 of 10 such runs"
        )
