"""The training loop: exact resume, accumulation, averaging, schedule, log and refusals.

Run as a program, `python test_train.py OUT` trains the tiny task of these tests in a process of
its own, so that the process can be killed.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import videoar
from videoar.data.batches import Batches
from videoar.machine import git_commit
from videoar.training.loop import TrainConfig, export, train
from videoar.training.objectives import Objective
from videoar.training.optimizer import OptimizerConfig, ema_decay_at, learning_rate
from videoar.training.run_folder import check_owner, checkpoints, claim, read_log


class _Points:
    """Random points and a smooth function of them; one of them may be marked as poisoned."""

    def __init__(self, poisoned):
        rng = torch.Generator().manual_seed(7)
        self.inputs = torch.randn(24, 3, generator=rng)
        self.targets = self.inputs.sin().sum(1, keepdim=True)
        self.marks = torch.arange(24) == (-1 if poisoned is None else poisoned)

    def __len__(self):
        return len(self.inputs)

    def get(self, indices, rng):
        kept = {"inputs": self.inputs, "targets": self.targets, "marks": self.marks}
        return {name: value[indices] for name, value in kept.items()}


class _Regression(Objective):
    """Least squares with noisy inputs; a marked sample makes the loss or its gradient NaN."""

    def __init__(self, module, task):
        self.module = module
        self.task = task

    def loss(self, batch, rng, *, step):
        noise = torch.randn(batch["inputs"].shape, generator=rng) * self.task.noise
        output = self.module(batch["inputs"] + noise)
        marked = output[batch["marks"]].sum()
        if self.task.poison == "loss":
            marked = marked * math.nan if batch["marks"].any() else marked * 0
        else:
            marked = (marked - marked.detach()).abs().sqrt() if batch["marks"].any() else 0
        error = (output - batch["targets"]).square().mean()
        return {"loss": error * self.task.gain + marked, "root": error.detach().sqrt()}


class _RegressionTask:
    """An MLP with a buffer (batch norm) and a channels-last weight, whose moments lie otherwise."""

    def __init__(self, task, config):
        module = nn.Sequential(
            nn.Linear(3, 32),
            nn.Unflatten(1, (8, 2, 2)),
            nn.Conv2d(8, 8, 2).to(memory_format=torch.channels_last),
            nn.Flatten(),
            nn.BatchNorm1d(8) if task.norm else nn.SiLU(),
            nn.Linear(8, 1),
        )
        self.points = _Points(task.poisoned)
        self.objective = _Regression(module, task)
        self.batches = Batches(self.points, batch_size=config.batch_size, seed=config.seed)

    def sources(self):
        return {"points": f"{self.points.inputs.sum():.6f}"}

    def validate(self, module, *, step):
        return {"spread": module(self.points.inputs).std().item()}

    def export(self, folder, module, meta):
        folder.mkdir(exist_ok=True)
        dense = {name: value.contiguous() for name, value in module.state_dict().items()}
        save_file(dense, folder / "model.safetensors")
        (folder / "videoar.json").write_text(json.dumps(meta))


@dataclass(frozen=True, kw_only=True)
class _RegressionConfig:
    """How to build the task."""

    noise: float = 0.1
    norm: bool = True
    gain: float = 1.0
    poisoned: int | None = None
    poison: Literal["loss", "grad_norm"] = "loss"

    def check(self, config):
        """Nothing can be missing."""

    def build(self, config, report):
        return _RegressionTask(self, config)


def _make_config(out, **changes):
    config = TrainConfig(
        name="tiny",
        task=_RegressionConfig(),
        out=Path(out),
        steps=40,
        batch_size=8,
        optimizer=OptimizerConfig(learning_rate=3e-2, warmup_steps=5),
        log_every=3,
        save_every=7,
        sample_every=11,
    )
    return replace(config, **changes)


def _trace(config):
    """Everything of the log that a computation decides, and no clock."""
    clocks = {"seconds", "seconds_per_step", "tokens_per_second", "share_of_peak"}
    return [{k: v for k, v in row.items() if k not in clocks} for row in read_log(config.out)]


def _steps_logged(config):
    return [row["step"] for row in _trace(config) if "loss" in row]


def _weights(config):
    return load_file(config.out / "checkpoint" / "model.safetensors")


def _assert_same(left, right):
    assert left.keys() == right.keys()
    assert [name for name, value in left.items() if not torch.equal(value, right[name])] == []


def _interrupt_at(step, number=signal.SIGINT):
    """Return a report that presses Ctrl-C when this step is logged or validated."""

    def report(line):
        if line.startswith((f"step {step:>2}/", f"step {step}  validation")):
            signal.raise_signal(number)

    return report


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never interrupted."""
    config = _make_config(tmp_path_factory.mktemp("finished") / "run")
    train(config)
    return config


def test_killed_run_resumes_bit_for_bit(finished, tmp_path):
    """Kill -9 costs time only; otherwise no figure of a run that once stopped could be trusted."""
    config = _make_config(tmp_path / "run")
    environment = os.environ | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": str(Path(videoar.__file__).parents[1]),
    }
    command = [sys.executable, __file__, str(config.out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if line.startswith("step 24/"):
                process.kill()
                break
        else:
            pytest.fail("the run ended by itself")
    assert checkpoints(config.out)[-1].name in {"step-21", "step-28"}
    train(config)
    assert _trace(config) == _trace(finished)
    _assert_same(_weights(config), _weights(finished))


def test_interrupted_run_keeps_every_step(finished, tmp_path):
    """Ctrl-C saves at once and the run goes on exactly; otherwise stopping would waste work.

    So does SIGTERM, which schedulers of clusters send.
    """
    config = _make_config(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt) as stop:
        train(config, report=_interrupt_at(9, signal.SIGTERM))
    assert stop.value.args == (signal.SIGTERM,)
    assert checkpoints(config.out)[-1].name == "step-9"
    # Between two lines of the log, so that the sums of the line to come must survive.
    with pytest.raises(KeyboardInterrupt):
        train(config, report=_interrupt_at(11))
    assert checkpoints(config.out)[-1].name == "step-11"
    with pytest.raises(KeyboardInterrupt):
        train(config, report=_interrupt_at(30))
    assert checkpoints(config.out)[-1].name == "step-30"
    train(config)
    assert _trace(config) == _trace(finished)
    _assert_same(_weights(config), _weights(finished))


def test_a_run_that_never_began_does_not_own_its_folder(tmp_path):
    """Who corrects the name of a folder of data must not have to delete that of the run."""
    out = tmp_path / "run"
    for name in ("latentz", "latents"):
        check_owner(out, {"data": name})
        with claim(out, {"data": name}):
            pass
    (out / "log.jsonl").touch()
    with pytest.raises(ValueError, match="data = latents, but other is asked for"):
        check_owner(out, {"data": "other"})


def test_half_written_files_of_a_killed_run_are_passed_over(finished, tmp_path):
    """A kill while a checkpoint or a log line is written loses neither, nor stops a resume."""
    config = _make_config(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(config, report=_interrupt_at(9))
    half = config.out / "checkpoints" / ".step-14.partial"
    (half / "module").mkdir(parents=True)
    (half / "module" / "whole.safetensors").write_bytes(b"half")
    with (config.out / "log.jsonl").open("a") as log:
        log.write('{"step": 12, "lo')
    train(config)
    assert _trace(config) == _trace(finished)
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == ["step-40"]


def test_run_learns_and_exports_its_provenance(finished):
    """The export says how it was made; otherwise a checkpoint could not be made again."""
    losses = [row["loss"] for row in _trace(finished) if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    meta = json.loads((finished.out / "checkpoint" / "videoar.json").read_text())
    assert meta["config"]["task"]["class"] == "_RegressionConfig"
    assert meta["config"]["optimizer"]["betas"] == [0.9, 0.95]
    assert meta["step"] == meta["config"]["steps"] == 40
    assert meta["loss_curve"][-1] == [40, losses[-1]]
    assert meta["seconds"] == pytest.approx(read_log(finished.out)[-2]["seconds"], abs=5)
    assert meta["git_commit"] == git_commit()
    validated = [row["step"] for row in _trace(finished) if "validation/spread" in row]
    assert validated == [11, 22, 33, 40]


def test_finished_run_is_not_trained_again(finished):
    """The same command on a finished run changes nothing; otherwise it would replace a result."""
    before, log = _weights(finished), _trace(finished)
    train(finished)
    assert _trace(finished) == log
    _assert_same(_weights(finished), before)


def test_run_can_be_extended_but_not_shortened(tmp_path):
    """More steps, or another pace of the log, go on from the old end; fewer steps are refused."""
    config = _make_config(tmp_path / "run", steps=14, keep=2)
    train(config)
    assert [folder.name for folder in checkpoints(config.out)] == ["step-7", "step-14"]
    longer = replace(config, steps=20, log_every=2, keep=1)
    train(longer)
    assert [folder.name for folder in checkpoints(config.out)] == ["step-20"]
    assert _steps_logged(config) == [3, 6, 9, 12, 14, 16, 18, 20]
    with pytest.raises(ValueError, match="step 20 already, past the 14 steps asked for"):
        train(config)


def test_unfinished_run_exports_its_newest_checkpoint(tmp_path):
    """Weights of a run that stopped early are of use."""
    config = _make_config(tmp_path / "run", ema_decay=0.5)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        export(config)
    assert not config.out.exists()
    with pytest.raises(KeyboardInterrupt):
        train(config, report=_interrupt_at(9))
    average = load_file(config.out / "checkpoints" / "step-9" / "ema" / "whole.safetensors")
    export(config)
    exported = _weights(config)
    _assert_same(
        {name: exported[name] for name in average if name.endswith(("weight", "bias"))},
        {name: value for name, value in average.items() if name.endswith(("weight", "bias"))},
    )
    assert exported["4.num_batches_tracked"] == 9


def test_two_half_batches_equal_one_full_batch(tmp_path):
    """Accumulation is a matter of memory alone; otherwise it would change what is trained."""
    task = _RegressionConfig(noise=0.0, norm=False)
    whole = _make_config(tmp_path / "whole", task=task, steps=9, sample_every=0)
    halves = replace(whole, out=tmp_path / "halves", batch_size=4, accumulate=2)
    train(whole)
    train(halves)
    for name, value in _weights(whole).items():
        torch.testing.assert_close(_weights(halves)[name], value, rtol=1e-4, atol=1e-6)
    # AdamW with clipping forgives a wrong scale of the gradient; its norm in the log does not.
    for key in ("loss", "grad_norm"):
        one, two = ([row[key] for row in _trace(config)] for config in (whole, halves))
        assert two == pytest.approx(one, rel=1e-3)


def test_exported_weights_are_the_average_by_its_formula(tmp_path):
    """The export equals the average recomputed in float64 from the weights of every step."""
    trail = []

    @dataclass(frozen=True, kw_only=True)
    class Recorded(_RegressionConfig):
        def build(self, config, report):
            task = _RegressionTask(self, config)
            task.objective.module.register_forward_pre_hook(
                lambda module, args: trail.append(module[0].weight.detach().double().clone())
            )
            return task

    config = _make_config(
        tmp_path / "run", task=Recorded(), steps=16, sample_every=0, ema_decay=0.5
    )
    train(config)
    last = load_file(config.out / "checkpoints" / "step-16" / "module" / "whole.safetensors")
    average = trail[0]
    for step, weight in enumerate([*trail[1:], last["0.weight"].double()]):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(_weights(config)["0.weight"].double(), average, rtol=0, atol=1e-6)


def test_average_forgets_the_start():
    """The decay rises from a tenth to its value; a constant one would keep the random start."""
    assert ema_decay_at(0.999, step=0) == pytest.approx(0.1)
    assert ema_decay_at(0.999, step=90) == pytest.approx(0.91)
    assert ema_decay_at(0.999, step=10**6) == 0.999


def test_learning_rate_rises_stays_and_falls():
    """The schedule has known values at its corners, and neither end is a step of size zero."""
    config = OptimizerConfig(learning_rate=8.0, warmup_steps=4, decay_fraction=0.5)
    rates = [learning_rate(config, step=step, steps=16, moved=step) for step in range(16)]
    assert rates == [2, 4, 6, 8, 8, 8, 8, 8, 8, 7, 6, 5, 4, 3, 2, 1]
    flat = OptimizerConfig(learning_rate=8.0, warmup_steps=0, decay_fraction=0.0)
    assert {learning_rate(flat, step=step, steps=16, moved=step) for step in range(16)} == {8.0}


def test_only_matrices_decay(tmp_path):
    """With no gradient matrices shrink by the decay and vectors stay; else gains would fade."""
    options = OptimizerConfig(
        learning_rate=0.1, weight_decay=0.5, warmup_steps=0, decay_fraction=0.0
    )
    config = _make_config(
        tmp_path / "run", task=_RegressionConfig(gain=0.0), steps=2, save_every=1, optimizer=options
    )
    train(replace(config, steps=1))
    first = load_file(config.out / "checkpoints" / "step-1" / "module" / "whole.safetensors")
    train(config)
    second = load_file(config.out / "checkpoints" / "step-2" / "module" / "whole.safetensors")
    for name in ("0.weight", "2.weight", "5.weight"):
        torch.testing.assert_close(second[name], first[name] * (1 - 0.1 * 0.5))
    for name in ("0.bias", "4.weight", "5.bias"):
        assert torch.equal(second[name], first[name])


@pytest.mark.parametrize("poison", ["loss", "grad_norm"])
def test_non_finite_step_is_not_taken(tmp_path, poison):
    """A NaN stops the run before it reaches the weights; otherwise hours of work would be lost."""
    common = {"log_every": 1, "save_every": 1, "sample_every": 0}
    healthy = _make_config(tmp_path / "healthy", **common)
    sample = Batches(_Points(None), batch_size=8, seed=healthy.seed).indices(2)[0]
    task = _RegressionConfig(poisoned=sample, poison=poison)
    poisoned = _make_config(tmp_path / "poisoned", task=task, **common)
    with pytest.raises(FloatingPointError, match=rf"step 3 .* {poison} is nan"):
        train(poisoned)
    with pytest.raises(KeyboardInterrupt):
        train(healthy, report=_interrupt_at(2))
    for stem in ("module", "ema", "optimizer"):
        name = f"checkpoints/step-2/{stem}/whole.safetensors"
        _assert_same(load_file(poisoned.out / name), load_file(healthy.out / name))


def test_bfloat16_leaves_weights_in_float32(finished, tmp_path):
    """Mixed precision rounds products only; rounded weights would lose small updates."""
    config = _make_config(tmp_path / "run", precision="bfloat16")
    train(config)
    assert {value.dtype for value in _weights(config).values()} <= {torch.float32, torch.int64}
    assert _trace(config) != _trace(finished)
    assert _trace(config)[-2]["loss"] == pytest.approx(_trace(finished)[-2]["loss"], rel=0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 4}, "batch_size = 8, but 4"),
        ({"optimizer": OptimizerConfig(learning_rate=1.0)}, r"optimizer\.learning_rate = 0\.03"),
        ({"task": _RegressionConfig(noise=0.2)}, r"task\.noise = 0\.1, but 0\.2"),
    ],
)
def test_changed_field_is_refused_on_resume(finished, changes, message):
    """A run goes on as it began; a silent change would make its record a lie."""
    log = (finished.out / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message):
        train(replace(finished, **changes))
    assert (finished.out / "log.jsonl").read_bytes() == log


def test_foreign_folder_is_left_alone(tmp_path):
    """A folder with other contents is refused; otherwise a slip of the hand would mix it up."""
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not the folder of a run"):
        train(_make_config(tmp_path))
    with pytest.raises(ValueError, match="not the folder of a run"):
        train(_make_config(tmp_path / "thesis.txt"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("stem", ["module", "ema", "optimizer"])
def test_truncated_checkpoint_gives_one_clear_sentence(tmp_path, stem):
    """A damaged file is named with the way out; a trace of the parser would help nobody."""
    config = _make_config(tmp_path / "run", steps=2)
    train(config)
    path = config.out / "checkpoints" / "step-2" / f"{stem}/whole.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"step-2 cannot be read .*: remove that folder"):
        train(replace(config, steps=4))


def test_checkpoint_of_another_model_is_refused(tmp_path):
    """Weights of other shapes are not loaded in part; the error names the tensor."""
    config = _make_config(tmp_path / "run", steps=2)
    train(config)
    path = config.out / "checkpoints" / "step-2" / "module" / "whole.safetensors"
    save_file(load_file(path) | {"0.weight": torch.zeros(5, 3)}, path)
    with pytest.raises(ValueError, match=r"0\.weight of shape \(5, 3\), but the model has \(32, 3"):
        train(replace(config, steps=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"num_threads": 0}, "num_threads is 0"),
    ],
)
def test_impossible_values_are_named(changes, message):
    """A value out of its limits is refused when it is given, not an hour later."""
    with pytest.raises(ValueError, match=message):
        _make_config("never", **changes)


def test_initial_weights_depend_on_the_seed_alone(tmp_path):
    """Two runs of one seed begin alike whatever ran before, and leave the global generator be."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    config = _make_config(tmp_path / "first", steps=1)
    train(config)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = _make_config(tmp_path / "again", steps=1)
    train(again)
    _assert_same(_weights(config), _weights(again))


def _slow_report(line):
    """Print a line and wait, so that the parent can kill this process at that step."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
    time.sleep(0.05)


if __name__ == "__main__":
    train(_make_config(sys.argv[1]), report=_slow_report)
