"""A run from outside: its folder, its log, its checkpoints and its machine. Nothing here trains.

The folder of a run holds:

out/run.json             the configuration that owns the folder
out/sources.json         fingerprints of what the run is made of: latents and checkpoints
out/.lock                the process that trains, while it does
out/log.jsonl            one line per logged step
out/tensorboard/         the same, if TensorBoard is installed
out/checkpoints/step-N/  everything needed to go on from step N, exactly
out/checkpoint/          what the task exports at the end
out/footage/             decoded videos, if it is a codec that is trained
out/costs/               of segments, if it is a router of units
out/samples/             pictures of validations

A checkpoint appears under its name only when it is complete, so a run may be killed at any moment.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

from videoar.checks import Report, check_same, explained, interrupt
from videoar.data.video import Frames, save_sheet
from videoar.files import Json, to_json, write_json, written_whole
from videoar.machine import git_commit, hardware
from videoar.training.distributed import Ranks, load, save, sizes

LogLine = dict[str, int | float]


# What may differ when a run goes on: none of these changes what a step computes, except that the
# decay at the end of the schedule moves with `steps`.
FREE_FIELDS = {"out", "steps", "log_every", "save_every", "sample_every", "keep", "num_threads"}
FREE_FIELDS |= {"task.num_validation"}
LOSS_CURVE_POINTS = 100
FOOTAGE, COSTS, SOURCES, LOCK = "footage", "costs", "sources.json", ".lock"


def _begun(out: Path) -> bool:
    return (out / "log.jsonl").exists() or (out / "checkpoints").exists()


def check_owner(out: Path, config: object) -> None:
    """Raise if `out` belongs to anything but the run `config`.

    A run that ended before it began, for a wrong name say, keeps no folder.
    """
    owner = out / "run.json"
    known = {"run.json", ".run.json.partial", LOCK}
    if owner.is_file():  # footage may have been read before it failed, which takes long
        known |= {FOOTAGE, f"{FOOTAGE}.codec", COSTS, SOURCES}
    if owner.is_file() and _begun(out):
        old, held = json.loads(owner.read_text(encoding="utf-8")), f"{out} holds a run"
        how: Json = {"other": "folder", "free": FREE_FIELDS, "options": config}
        check_same(old, to_json(config), held=held, **how)
    elif out.exists() and (not out.is_dir() or {p.name for p in out.iterdir()} - known):
        raise ValueError(f"{out} exists but is not the folder of a run: name another folder")


@contextlib.contextmanager
def claim(out: Path, config: object) -> Iterator[None]:
    """Make `out` the folder of the run `config`, and of this process alone while it trains.

    A lock says whose it is; the system gives back those of processes that died.

    Raises:
        ValueError: it belongs to anything else, or another process is at work there.
    """
    out.mkdir(parents=True, exist_ok=True)
    path, here, taken = out / LOCK, socket.gethostname(), False
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # else a file system without locks: what is written has to do
            taken = isinstance(error, BlockingIOError)
        file.seek(0)
        process, _, host = file.read().partition(" on ")
        if taken or host not in ("", here):
            raise ValueError(
                f"{out} is in use by {process} on {host or here}: wait for it, or name another"
                " folder" + ("" if taken else f"; if it runs no more, remove {path}")
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {here}")
        file.flush()
        try:
            write_json(out / "run.json", to_json(config))
            yield
        finally:
            file.truncate(0)  # not removed: who has opened it would hold a lock of nothing


def check_sources(out: Path, sources: Json) -> None:
    """Raise unless a run is made of what it was begun with; note that down if it begins."""
    path = out / SOURCES
    if not (path.exists() and _begun(out)):
        write_json(path, sources)
    else:
        for name, was in json.loads(path.read_text(encoding="utf-8")).items():
            if (now := sources.get(name)) != was:
                raise ValueError(
                    f"{out} was begun with {was} in {name}, but there is {now} now: put back what"
                    " there was, or begin anew in another folder"
                )


def checkpoints(out: Path) -> list[Path]:
    """Return the complete checkpoints of a run, the newest last."""
    found = (out / "checkpoints").glob("step-*")
    return sorted((p for p in found if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))


def write_checkpoint(
    out: Path, state: Json, tensors: dict[str, dict[str, Tensor]], *, keep: int, ranks: Ranks
) -> None:
    """Write a checkpoint that appears only when complete; keep the newest `keep`.

    Every entry of `tensors` becomes a folder; `state` is everything that is not a tensor.
    """
    target = out / "checkpoints" / f"step-{state['step']}"
    partial = target.with_name(f".{target.name}.partial")
    ranks.wait()
    if ranks.first:
        for left_over in target.parent.glob(".step-*"):
            shutil.rmtree(left_over)
        partial.mkdir(parents=True)
        write_json(partial / "state.json", state)
    ranks.wait()
    try:
        for stem, named in tensors.items():
            save(partial / stem, named, ranks)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # it would keep a full disk full
        raise
    ranks.wait()
    if ranks.first:
        os.replace(partial, target)
        for old in checkpoints(out)[:-keep]:
            removed = old.with_name(f".{old.name}.removed")
            os.replace(old, removed)
            shutil.rmtree(removed)
    ranks.wait()


def reading(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Say in one sentence that a checkpoint is damaged."""
    from torch.distributed.checkpoint import CheckpointException

    says = f"{folder} cannot be read ({{}}): remove that folder to go on without it"
    kinds = OSError, ValueError, KeyError, safetensors.SafetensorError, CheckpointException
    return explained(says, *kinds)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what `state_dict` holds, but a shared parameter only once."""
    kept = module.state_dict().keys()
    buffers = {name: value for name, value in module.named_buffers() if name in kept}
    return dict(module.named_parameters()) | buffers


def read_checkpoint(folder: Path, tensors: dict[str, dict[str, Tensor]], *, ranks: Ranks) -> Json:
    """Read entries into tensors, which must have their names and shapes; return all the rest."""
    with reading(folder):
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        stored = [sizes(folder / stem) for stem in tensors]
    for (stem, target), found in zip(tensors.items(), stored, strict=True):
        expected = {name: tuple(value.shape) for name, value in target.items()}
        for name in sorted(expected.keys() | found.keys()):
            if (wanted := expected.get(name)) != (shape := found.get(name)):
                raise ValueError(
                    f"{folder} has {name} of shape {shape}, but the model has {wanted}: go on with"
                    " the code that began the run, or name another folder"
                )
        with reading(folder), torch.no_grad():
            load(folder / stem, target, ranks)
    return state


def save_sample(out: Path, step: int, frames: Frames, *, columns: int = 8) -> None:
    """Keep a picture of what a validation saw."""
    (out / "samples").mkdir(exist_ok=True)
    save_sheet(frames, out / "samples" / f"step-{step}.png", columns=columns)


class Log:
    """The log of a run: JSON lines, TensorBoard if it is installed, and a line for the user.

    Lines of steps later than `after` are dropped: they are about to be computed again.
    """

    def __init__(self, out: Path, *, after: int, report: Report) -> None:
        self.report = report
        path = out / "log.jsonl"
        rows = [row for row in read_log(out) if row["step"] <= after]
        with written_whole(path) as partial:
            partial.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        # Line by line, so that a checkpoint never knows of a line that the file lacks.
        self.file = path.open("a", buffering=1, encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=after + 1)
        except ImportError:
            report(f"TensorBoard is not installed (extra `train`): the log is {path} alone")
            self.board = None

    def write(self, row: LogLine, *, total: int) -> None:
        """Write the line of a step and report it; `total` is the number of steps of the run."""
        self._write(row)
        left = timedelta(seconds=round((total - row["step"]) * row["seconds_per_step"]))
        # Of groups who take turns, each has its own; their mean says nothing.
        losses = [name for name in row if name.endswith("_loss")] or ["loss"]
        shown = "  ".join(f"{name.replace('_', ' ')} {row[name]:.4f}" for name in losses)
        speed = f"{row['seconds_per_step']:.3g} s a step"
        if "tokens_per_second" in row:
            speed = f"{row['tokens_per_second']:,.0f} tokens/s  {row['share_of_peak']:.0%} of peak"
        self.report(
            f"step {row['step']:>{len(str(total))}}/{total}  {shown}  norm {row['grad_norm']:.2f}"
            f"  rate {row['learning_rate']:.1e}  {speed}  {left} left"
        )

    def write_validation(self, step: int, values: LogLine) -> None:
        """Write what a validation measured, in a line of its own."""
        if not values:
            return
        self._write({"step": step} | {f"validation/{name}": v for name, v in values.items()})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.report(f"step {step}  validation: {shown}")

    def _write(self, row: LogLine) -> None:
        self.file.write(json.dumps(row) + "\n")
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def read_log(out: Path) -> list[LogLine]:
    """Return the lines of the log; one cut short when the run was killed is left out."""
    path = out / "log.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def provenance(out: Path, config: Json, *, step: int, seconds: float) -> Json:
    """Return what a checkpoint says of its making: configuration, code, machine, time, losses."""
    curve = [[row["step"], row["loss"]] for row in read_log(out) if "loss" in row]
    count = min(len(curve), LOSS_CURVE_POINTS)
    chosen = np.linspace(0, len(curve) - 1, count).round().astype(int)
    return {
        "config": config,
        "step": step,
        "seed": config["seed"],
        "git_commit": git_commit(),
        "hardware": hardware(config["device"]),
        "seconds": seconds,
        "loss_curve": [curve[index] for index in chosen],
    }


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """Have a first Ctrl-C, or SIGTERM, only say its number, so that no step is cut in half.

    Schedulers of clusters, and `torchrun` to its processes, send SIGTERM. A second one stops at
    once. Only a main thread receives signals; elsewhere nothing happens.
    """
    asked = list[int]()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if asked:
            interrupt(number, frame)
        asked.append(number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
