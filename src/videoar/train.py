"""One training loop for everything: it updates the module of an objective and knows of no videos.

What a run leaves in its folder is described in `runs.py`.
"""

import contextlib
import copy
import dataclasses
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from videoar import runs
from videoar.data import Batches
from videoar.objectives import Objective
from videoar.optim import Muon
from videoar.runs import Report, Row


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, or Muon and AdamW, with a warm-up, a plateau and a linear decay to zero."""

    learning_rate: float
    """Step size of AdamW on the plateau."""
    muon_learning_rate: float | None = None
    """Step size of Muon, for hidden matrices and convolutions; None leaves them to AdamW."""
    muon_excludes: tuple[str, ...] = ("embed", "proj_out", "scale_shift_table", "position")
    """Parameters with one of these in their name stay with AdamW: what comes first and last."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    weight_decay: float = 0.01
    """Decay of parameters of two and more axes; gains and biases are left alone."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly."""
    decay_fraction: float = 0.2
    """Last part of the run over which the learning rate falls linearly to zero."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""

    def __post_init__(self) -> None:
        """Check the limits."""
        _check("learning_rate", self.learning_rate, self.learning_rate > 0, "above 0")
        _check("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "0 or more")
        within = 0 <= self.decay_fraction <= 1
        _check("decay_fraction", self.decay_fraction, within, "between 0 and 1")
        _check("clip_norm", self.clip_norm, self.clip_norm > 0, "above 0")


@runtime_checkable
class Task(Protocol):
    """What is trained, on what, and what comes out."""

    objective: Objective
    batches: Batches
    tokens_per_batch: int
    """Tokens of one batch, for the rate."""
    flops_per_batch: float
    """Floating point operations of one batch, forward and backward, for the share of peak."""

    def validate(self, module: nn.Module) -> dict[str, float]:
        """Measure the averaged weights; draws from generators of its own. May return nothing."""
        ...

    def export(self, folder: Path, module: nn.Module, meta: dict[str, Any]) -> None:
        """Write the averaged weights and `meta`, replacing an earlier export."""
        ...


@runtime_checkable
class TaskConfig(Protocol):
    """A frozen dataclass that knows how to build its task."""

    def build(self, config: "TrainConfig", report: Report) -> Task:
        """Build module, objective and batches; the loop has seeded the global generator.

        What takes long (latents that must be encoded first) tells `report` how far it is.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A complete run."""

    name: str
    """Name of the run."""
    task: TaskConfig
    """What is trained, on what."""
    out: Path
    """Folder of the run."""
    steps: int
    """Optimizer steps in all."""
    batch_size: int
    """Samples per batch; an optimizer step takes `batch_size * accumulate` of them."""
    accumulate: int = 1
    """Batches per optimizer step."""
    seed: int = 0
    """Seed of the first weights, the order of the samples and all noise."""
    optimizer: OptimizerConfig
    """Optimizer and schedule."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are the ones exported."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products; weights and moments stay float32."""
    device: str = "cpu"
    """Where to train."""
    num_threads: int | None = None
    """CPU threads; None leaves torch's choice. A run repeats bit for bit at the same count only."""
    log_every: int = 10
    """Steps between two lines of the log."""
    save_every: int = 500
    """Steps between two checkpoints."""
    sample_every: int = 0
    """Steps between two validations; 0 for none."""
    keep: int = 1
    """How many of the newest checkpoints stay."""

    def __post_init__(self) -> None:
        """Check the limits."""
        for name in ("steps", "batch_size", "accumulate", "log_every", "save_every", "keep"):
            value = getattr(self, name)
            _check(name, value, value >= 1, "1 or more")
        _check("seed", self.seed, self.seed >= 0, "0 or more")
        _check("sample_every", self.sample_every, self.sample_every >= 0, "0 or more")
        _check("ema_decay", self.ema_decay, 0 <= self.ema_decay < 1, "from 0 to below 1")
        enough = self.num_threads is None or self.num_threads >= 1
        _check("num_threads", self.num_threads, enough, "1 or more")


def learning_rate(config: OptimizerConfig, *, step: int, steps: int) -> float:
    """Return the learning rate of `step`, counted from 0, in a run of `steps`.

    Neither the first step nor the last is wasted on a rate of zero.
    """
    rise = (step + 1) / config.warmup_steps if config.warmup_steps else 1.0
    decay_steps = config.decay_fraction * steps
    fall = (steps - step) / decay_steps if decay_steps else 1.0
    return config.learning_rate * max(0.0, min(1.0, rise, fall))


def ema_decay_at(decay: float, *, step: int) -> float:
    """Return the decay of `step`, from 0: small at first, so that the start is forgotten."""
    return min(decay, (1 + step) / (10 + step))


def train(config: TrainConfig, *, report: Report = lambda line: None) -> Path:
    """Train to the end, or go on where the same run stopped, and return the exported checkpoint.

    Whatever stops a run, the same call goes on from its newest checkpoint, and its losses equal
    those of a run that never stopped. Ctrl-C finishes the step, saves and raises.

    Args:
        config: The run.
        report: Receives one line per logged step and per event.

    Raises:
        FloatingPointError: A loss or gradient is not finite; the step was not taken.
        KeyboardInterrupt: Ctrl-C, after the checkpoint was saved.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    runs.claim(config.out, runs.to_json(config))
    run = _Run(config, report)
    if run.restore():
        report(f"going on from step {run.step} of {config.out}")
    if run.step > config.steps:
        raise ValueError(
            f"{config.out} is at step {run.step} already, past the {config.steps} steps asked for:"
            " raise steps, or name another folder"
        )
    if run.step < config.steps:
        _loop(run, report)
    return run.export()


def export(config: TrainConfig, *, report: Report = lambda line: None) -> Path:
    """Export the newest checkpoint of a run that is not finished, and return the folder."""
    if not runs.checkpoints(config.out):
        raise ValueError(f"{config.out} holds no checkpoint of a run yet: train longer first")
    runs.claim(config.out, runs.to_json(config))
    run = _Run(config, report)
    run.restore()
    return run.export()


def _loop(run: "_Run", report: Report) -> None:
    config = run.config
    peak = runs.measure_matmul_rate(config.device, precision=config.precision)
    log = runs.Log(config.out, after=run.step, report=report)
    with contextlib.closing(log), runs.deferred_interrupt() as interrupted:
        while run.step < config.steps:
            run.advance()
            last = run.step == config.steps
            if run.step % config.log_every == 0 or last:
                log.write(run.row(peak), total=config.steps)
            if config.sample_every and (run.step % config.sample_every == 0 or last):
                log.write_validation(run.step, run.validate())
            if run.step % config.save_every == 0 or last or interrupted.is_set():
                run.save()
            if interrupted.is_set() and not last:
                report(f"stopped and saved at step {run.step}: the same command goes on from there")
                raise KeyboardInterrupt


class _Run:
    """Everything that a step changes, and how it is kept in files."""

    def __init__(self, config: TrainConfig, report: Report) -> None:
        self.config = config
        # Initial weights come from the global generator: seeded here, and given back as it was.
        device = torch.device(config.device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(config.seed)
            self.task = config.task.build(config, report)
        self.module = self.task.objective.module.to(device).train()
        self.ema = copy.deepcopy(self.module).float().requires_grad_(False).eval()
        named = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self.parameters = named
        averages = dict(self.ema.named_parameters())
        self._averages = [(averages[name], value) for name, value in self.parameters.items()]
        self.optimizers = _optimizers(config, named)
        self.step = 0
        self.seconds = 0.0
        self.window = _Window()
        self._clock = time.perf_counter()

    def advance(self) -> None:
        """Take one optimizer step, or raise before the weights change."""
        started = time.perf_counter()
        config = self.config
        terms: dict[str, float] = {}
        for micro in range(config.accumulate):
            for name, value in self._backward(micro).items():
                terms[name] = terms.get(name, 0.0) + value / config.accumulate
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), config.optimizer.clip_norm)
        terms["grad_norm"] = norm.item()
        for name, value in terms.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"step {self.step + 1} of {config.out} was not taken because its {name} is"
                    f" {value} (the last checkpoint is intact): look at the data of that step, or"
                    " begin in another folder with a lower learning rate"
                )
        rate = learning_rate(config.optimizer, step=self.step, steps=config.steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate / config.optimizer.learning_rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._average()
        self.step += 1
        self.window.add(terms, rate, time.perf_counter() - started)

    def _backward(self, micro: int) -> dict[str, float]:
        config = self.config
        device = torch.device(config.device)
        number = self.step * config.accumulate + micro
        batch = {
            key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in self.task.batches.batch(number).items()
        }
        # A generator of its own per batch: nothing random has to be kept to go on exactly.
        seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1, np.uint64)[0])
        rng = torch.Generator(device).manual_seed(seed >> 1)
        mixed = config.precision == "bfloat16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed):
            terms = self.task.objective.loss(batch, rng)
        (terms["loss"] / config.accumulate).backward()
        return {name: value.item() for name, value in terms.items()}

    @torch.no_grad()
    def _average(self) -> None:
        weight = 1 - ema_decay_at(self.config.ema_decay, step=self.step)
        for average, parameter in self._averages:
            average.lerp_(parameter.float(), weight)

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The optimizer state of a parameter, which exactly one optimizer holds."""
        owner = next(o for o in self.optimizers if any(parameter is p for p in _members(o)))
        return owner.state[parameter]

    def row(self, peak: float) -> Row:
        """Return the log line of the steps since the last one, and begin anew."""
        window, self.window = self.window, _Window()
        batches = window.count * self.config.accumulate / window.seconds
        return {
            "step": self.step,
            **{name: total / window.count for name, total in window.totals.items()},
            "learning_rate": window.learning_rate,
            "seconds_per_step": window.seconds / window.count,
            "tokens_per_second": batches * self.task.tokens_per_batch,
            "share_of_peak": batches * self.task.flops_per_batch / peak,
            "seconds": self.tick(),
        }

    def validate(self) -> dict[str, float]:
        """Measure the averaged weights."""
        self._copy_buffers()
        return self.task.validate(self.ema)

    def tick(self) -> float:
        """Return the seconds spent on this run so far, over all its resumptions."""
        now = time.perf_counter()
        self.seconds += now - self._clock
        self._clock = now
        return self.seconds

    def _copy_buffers(self) -> None:
        for target, source in zip(self.ema.buffers(), self.module.buffers(), strict=True):
            target.copy_(source)

    def save(self) -> None:
        """Write a checkpoint of this step and remove those that are too old."""
        state = {
            "step": self.step,
            "seconds": self.tick(),
            "window": dataclasses.asdict(self.window),
        }
        tensors = {
            "module": runs.named_tensors(self.module),
            "ema": runs.named_tensors(self.ema),
            "optimizer": {
                f"{name}/{key}": value
                for name, parameter in self.parameters.items()
                for key, value in self._state(parameter).items()
            },
        }
        runs.write_checkpoint(
            self.config.out, step=self.step, keep=self.config.keep, tensors=tensors, state=state
        )

    def restore(self) -> bool:
        """Take over the newest checkpoint; return whether there is one."""
        found = runs.checkpoints(self.config.out)
        if not found:
            return False
        tensors, state = runs.read_checkpoint(found[-1])
        runs.copy_tensors(tensors["module"], runs.named_tensors(self.module), origin=found[-1])
        runs.copy_tensors(tensors["ema"], runs.named_tensors(self.ema), origin=found[-1])
        for full_name, value in tensors["optimizer"].items():
            name, _, key = full_name.rpartition("/")
            parameter = self.parameters[name]
            # Moments take the memory layout of their parameter: fused AdamW walks both alike.
            place = torch.empty_like(parameter if value.shape == parameter.shape else value)
            self._state(parameter)[key] = place.to(parameter.device).copy_(value)
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.window = _Window(**state["window"])
        return True

    def export(self) -> Path:
        """Have the task write the averaged weights, and return their folder."""
        self._copy_buffers()
        config = self.config
        folder = config.out / "checkpoint"
        meta = runs.provenance(
            config.out, runs.to_json(config), step=self.step, seconds=self.tick()
        )
        self.task.export(folder, self.ema, meta)
        return folder


def _members(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _optimizers(config: TrainConfig, named: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    options = config.optimizer
    matrices = {
        name: parameter
        for name, parameter in named.items()
        if options.muon_learning_rate is not None
        and parameter.ndim >= 2
        and not any(part in name for part in options.muon_excludes)
    }
    rest = [parameter for name, parameter in named.items() if name not in matrices]
    decayed = {"params": [p for p in rest if p.ndim >= 2], "weight_decay": options.weight_decay}
    free = {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}
    rate = options.learning_rate
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([decayed, free], lr=rate, betas=options.betas, fused=True)
    ]
    if matrices and options.muon_learning_rate is not None:
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        decay = options.weight_decay
        optimizers.append(
            Muon(matrices.values(), lr=options.muon_learning_rate, weight_decay=decay, dtype=dtype)
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


@dataclass
class _Window:
    """Sums over the steps since the last line of the log; part of a checkpoint."""

    totals: dict[str, float] = field(default_factory=dict)
    learning_rate: float = 0.0
    count: int = 0
    seconds: float = 0.0

    def add(self, terms: dict[str, float], rate: float, seconds: float) -> None:
        for name, value in terms.items():
            self.totals[name] = self.totals.get(name, 0.0) + value
        self.learning_rate = rate
        self.count += 1
        self.seconds += seconds


def _check(name: str, value: Any, valid: bool, limit: str) -> None:
    if not valid:
        raise ValueError(f"{name} is {value}, but must be {limit}: change it")
