"""One training loop for everything; it knows of no videos. `run_folder` says what a run leaves."""

import copy
import functools
import math
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from videoar import files, machine
from videoar.checks import Count, Limit, Natural, Options, Report
from videoar.data.batches import Batches
from videoar.generation.progress import Paced
from videoar.training import run_folder
from videoar.training.distributed import gather, join, split, whole
from videoar.training.objectives import Objective, seeded
from videoar.training.optimizer import OptimizerConfig, ParameterGroup, ema_decay_at, learning_rate


@runtime_checkable
class Task(Protocol):
    """What is trained, on what, and what comes out."""

    @property
    def objective(self) -> Objective:
        """What is trained, and its loss."""

    @property
    def batches(self) -> Batches:
        """What it is trained on."""

    def sources(self) -> dict[str, str]:
        """Fingerprints of the data and checkpoints it is made of, by name."""

    def validate(self, module: Any, *, step: int) -> dict[str, float]:
        """Measure the averaged weights, with generators of its own; may return nothing."""

    def export(self, folder: Path, module: Any, meta: dict[str, Any]) -> None:
        """Write the averaged weights and `meta`, replacing an earlier export."""


@runtime_checkable
class TaskConfig(Protocol):
    """A frozen dataclass that knows how to build its task."""

    def check(self, config: "TrainConfig") -> None:
        """Raise for data that cannot be trained on, before anything is loaded or made."""

    def build(self, config: "TrainConfig", report: Report) -> Task:
        """Build the task; the global generator is seeded, and `report` hears of what takes long."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Options):
    """A complete run."""

    name: str
    """Name of the run."""
    task: TaskConfig
    """What is trained, on what."""
    out: Path
    """Folder of the run."""
    steps: Count
    """Optimizer steps in all."""
    batch_size: Count
    """Samples per batch; an optimizer step takes `batch_size * accumulate` of them."""
    accumulate: Count = 1
    """Batches per optimizer step, which all processes share."""
    seed: Natural = 0
    """Seed of the first weights, the order of the samples and all noise."""
    optimizer: OptimizerConfig
    """Optimizer and schedule."""
    ema_decay: Annotated[float, Limit(lambda x: 0 <= x < 1, "a number from 0 to below 1")] = 0.999
    """Decay of the averaged weights, which are the ones exported."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products; weights and moments stay float32."""
    device: str = "cpu"
    """Where to train."""
    num_threads: Count | None = None
    """CPU threads; None leaves torch's choice. A run repeats bit for bit at the same count only."""
    log_every: Count = 10
    """Steps between two lines of the log."""
    save_every: Count = 100
    """Steps between two checkpoints."""
    sample_every: Natural = 0
    """Steps between two validations; 0 for none."""
    keep: Count = 1
    """How many of the newest checkpoints stay."""


def train(config: TrainConfig, *, report: Report = lambda line: None) -> Path:
    """Train to the end, or go on where the same run stopped, and return the exported checkpoint.

    Whatever stops a run, the same call goes on from its newest checkpoint, and its losses equal
    those of a run that never stopped. `report` gets a line per logged step and per event.

    Raises:
        FloatingPointError: A loss or gradient is not finite; the step was not taken.
        KeyboardInterrupt: Ctrl-C, after the step was finished and saved.
        ConnectionError: Another process of the run is gone.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    found = run_folder.checkpoints(config.out)
    if found and (step := int(found[-1].name.removeprefix("step-"))) > config.steps:
        raise ValueError(
            f"{config.out} is at step {step} already, past the {config.steps} steps asked for:"
            " raise steps, or name another folder"
        )
    with ExitStack() as held:
        run = _Run(config, report, held)
        if run.step:
            run.report(f"going on from step {run.step} of {config.out}")
        if run.step < config.steps:
            try:
                _loop(run)
            except RuntimeError as error:
                lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
                if run.ranks.count == 1 or not lost:
                    raise
                kept = [folder.name for folder in run_folder.checkpoints(config.out)][-1:]
                raise ConnectionError(
                    f"rank {run.ranks.index} lost another rank of {run.ranks.count} after step"
                    f" {run.step}, and stops: the same command goes on from"
                    f" {kept[0] if kept else 'the start'}"
                ) from error
        return run.export()


def export(config: TrainConfig) -> Path:
    """Export the newest checkpoint of a run that is not finished, and return the folder."""
    if not run_folder.checkpoints(config.out):
        raise ValueError(f"{config.out} holds no checkpoint of a run yet: train longer first")
    return _Run(config, lambda line: None).export()  # which may be trained meanwhile


def _loop(run: "_Run") -> None:
    config, ranks = run.config, run.ranks
    log = run_folder.Log(config.out, after=run.step, report=run.report) if ranks.first else None
    with closing(log or ExitStack()), run_folder.deferred_interrupt() as asked:
        while run.step < config.steps:
            run.advance()
            run.paced.hear(f"step {run.step}/{config.steps}")
            last = run.step == config.steps
            if run.step % config.log_every == 0 or last:
                row = run.row()
                if log is not None:
                    log.write(row, total=config.steps)
            if config.sample_every and (run.step % config.sample_every == 0 or last):
                average = run.average()
                if log is not None:
                    log.write_validation(run.step, run.task.validate(average, step=run.step))
            interrupted = ranks.total({"": float(bool(asked))})[""] > 0
            if run.step % config.save_every == 0 or last or interrupted:
                run.save()
            if interrupted and not last:
                older = config.out / "checkpoint"
                stale = f"; {older} is of fewer steps until --export" if older.exists() else ""
                run.report(
                    f"stopped and saved at step {run.step}: the same command goes on from there"
                    f"{stale}"
                )
                raise KeyboardInterrupt(*asked)


class _Run:
    """Everything that a step changes, as the newest checkpoint has it, and how it is kept."""

    def __init__(self, config: TrainConfig, report: Report, held: ExitStack | None = None) -> None:
        self.config = config
        self.ranks, self.device = join(config.device)
        self.paced = Paced(report if self.ranks.first else lambda line: None)
        self.report: Report = self.paced.say
        if config.accumulate % (count := self.ranks.count):
            raise ValueError(
                f"accumulate is {config.accumulate}, but {count} processes share the batches of a"
                f" step: make it a multiple of {count}"
            )
        if count > 1 and config.optimizer.muon_learning_rate is not None:
            raise ValueError(
                f"Muon moves whole matrices, which {count} processes split among them: set"
                " optimizer.muon_learning_rate to None"
            )
        if self.ranks.first:
            config.task.check(config)
            run_folder.check_owner(config.out, config)
            if held is not None:
                held.enter_context(run_folder.claim(config.out, config))
        self.ranks.wait()
        # Initial weights come from the global generator: seeded here, and given back as it was.
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(config.seed)
            with self.ranks.in_turn():
                self.task = config.task.build(config, self.report)
        if self.ranks.first:
            run_folder.check_sources(config.out, self.task.sources())
        self.ranks.wait()
        objective = self.task.objective
        self.module, self.result = objective.module.train(), objective.result
        self.ema = copy.deepcopy(self.result).float().requires_grad_(False).eval()
        self.plain = copy.deepcopy(self.ema) if self.ranks.count > 1 else self.ema
        for network in (self.module, self.ema, *objective.frozen):
            split(network, self.ranks, self.device)
            network.to(self.device)
        self.averages = dict(zip(self.result.parameters(), self.ema.parameters(), strict=True))
        self.groups: dict[str, ParameterGroup] = {}
        for name, optimizer in objective.optimizers(config.optimizer).items():
            named = self.module.get_submodule(name).named_parameters(prefix=name)
            trained = {n: p for n, p in named if p.requires_grad}
            self.groups[name] = ParameterGroup(optimizer, trained)
        self.step = 0
        self.window: list[run_folder.LogLine] = []
        """What steps computed and took since the last line of the log; part of a checkpoint."""
        self.began = time.perf_counter()
        if found := run_folder.checkpoints(config.out):
            self._restore(found[-1])

    @property
    def seconds(self) -> float:
        """Seconds spent on this run so far, over all its resumptions."""
        return time.perf_counter() - self.began

    def advance(self) -> None:
        """Take one optimizer step, or raise before the weights change."""
        config, started = self.config, time.perf_counter()
        terms: dict[str, float] = {}
        for micro in range(self.ranks.index, config.accumulate, self.ranks.count):
            for name, value in self._backward(micro).items():
                terms[name] = terms.get(name, 0.0) + value / config.accumulate
        terms = self.ranks.total(terms)
        group = self.groups[self.task.objective.group_of(self.step)]
        norm = nn.utils.clip_grad_norm_(group.parameters.values(), group.config.clip_norm)
        terms["grad_norm"] = whole(norm).item()
        for name, value in terms.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"step {self.step + 1} of {config.out} was not taken, as its {name} is {value}:"
                    " look at its data, or begin in another folder with a lower learning rate"
                )
        when = {"step": self.step, "steps": config.steps, "moved": group.steps}
        rate = learning_rate(group.config, **when)
        group.move(rate)
        self.module.zero_grad(set_to_none=True)  # that of who waits, too
        with torch.no_grad():
            weight = 1 - ema_decay_at(config.ema_decay, step=group.steps)
            for parameter in group.parameters.values():
                if parameter in self.averages:
                    self.averages[parameter].lerp_(parameter.float(), weight)
        group.steps += 1
        self.step += 1
        seconds = time.perf_counter() - started
        self.window.append({**terms, "learning_rate": rate, "seconds_per_step": seconds})

    def _backward(self, micro: int) -> dict[str, float]:
        config, device = self.config, self.device
        number = self.step * config.accumulate + micro
        batch = self.task.batches.batch(number)
        batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        rng = seeded(config.seed, number, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            terms = self.task.objective.loss(batch, rng, step=self.step)
        # The mean over ranks is FSDP's.
        (terms["loss"] * (self.ranks.count / config.accumulate)).backward()
        return {name: value.item() for name, value in terms.items()}

    @functools.cached_property
    def peak(self) -> float:
        """What all ranks could compute in a second; measured if it is asked for."""
        one = machine.measure_matmul_rate(self.device, precision=self.config.precision)
        return one * self.ranks.count

    def row(self) -> run_folder.LogLine:
        """Return the log line of the steps since the last one, and begin anew."""
        window, self.window = self.window, []
        names = dict.fromkeys(name for terms in window for name in terms)
        found = {name: [terms[name] for terms in window if name in terms] for name in names}
        means = {name: sum(values) / len(values) for name, values in found.items()}
        rate = self.config.accumulate / means["seconds_per_step"]
        if "tokens" in means:
            means["tokens_per_second"] = rate * means.pop("tokens")
            means["share_of_peak"] = rate * means.pop("flops") / self.peak
        last = {"learning_rate": window[-1]["learning_rate"], "seconds": self.seconds}
        return {"step": self.step} | means | last

    def average(self) -> nn.Module:
        """Return the averaged weights beside the buffers of now."""
        for target, source in zip(self.ema.buffers(), self.result.buffers(), strict=True):
            target.copy_(source)
        return self.ema if self.plain is self.ema else gather(self.ema, self.plain)

    @property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors that a step changes, by entry of a checkpoint."""
        moments = {k: v for group in self.groups.values() for k, v in group.moments.items()}
        named = run_folder.named_tensors
        return {"module": named(self.module), "ema": named(self.ema), "optimizer": moments}

    def save(self) -> None:
        """Write a checkpoint of this step and remove those that are too old."""
        moved = {name: group.steps for name, group in self.groups.items()}
        state = {"step": self.step, "seconds": self.seconds, "window": self.window, "moved": moved}
        out, keep = self.config.out, self.config.keep
        run_folder.write_checkpoint(out, state, self.tensors, keep=keep, ranks=self.ranks)

    def _restore(self, folder: Path) -> None:
        state = run_folder.read_checkpoint(folder, self.tensors, ranks=self.ranks)
        for name, count in state["moved"].items():
            self.groups[name].steps = count
        self.step = state["step"]
        self.began -= state["seconds"]
        self.window = state["window"]

    def export(self) -> Path:
        """Have the task write the averaged weights, and return their folder."""
        out, config = self.config.out, files.to_json(self.config)
        average = self.average()
        if self.ranks.first:
            meta = run_folder.provenance(out, config, step=self.step, seconds=self.seconds)
            self.task.export(out / "checkpoint", average, meta)
        self.ranks.wait()
        return out / "checkpoint"
