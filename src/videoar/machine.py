"""What this machine is and holds: device, memory, speed, and the commit of the code."""

import os
import platform
import re
import resource
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from videoar.checks import explained


def peak_bytes() -> int:
    """Return the most memory that this process has held."""
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="ascii").splitlines() if status.is_file() else []:
        # The peak of `getrusage` counts the process that started this one, too.
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that live; on the meta device they are not even made."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._leave, storage._cdata, storage.nbytes())
        return result

    def _leave(self, storage: int, size: int) -> None:
        self._seen.discard(storage)
        self.now -= size


def process_seconds() -> float | None:
    """Return the age of this process, imports and all; None where the system does not tell."""
    stat, uptime = Path("/proc/self/stat"), Path("/proc/uptime")
    if not (stat.is_file() and uptime.is_file()):
        return None
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    return float(uptime.read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


def git_commit() -> str | None:
    """Return the commit of this code, marked if files differ; None outside its repository."""
    here = Path(__file__)

    def git(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        # An installed copy may lie inside a repository that is not ours: ask for this very file.
        git("ls-files", "--error-unmatch", here.name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware(device: str) -> str:
    """Name the machine that trains."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(torch.device(device))
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    found = re.search(r"^model name\s*:(.*)", text, re.MULTILINE)
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def measure_matmul_rate(device: str | torch.device, *, precision: str) -> float:
    """Return the floating point operations per second of a large matrix product, best of 0.3 s."""
    from torch.utils.benchmark import Timer  # takes a second

    place = torch.device(device)
    size = 8192 if place.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    matrix = torch.ones(size, size, device=place, dtype=dtype)
    timer = Timer("x @ x", globals={"x": matrix}, num_threads=torch.get_num_threads())
    return 2 * size**3 / min(timer.blocked_autorange(min_run_time=0.3).times)


def sent(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Return what the host has made on a device; neither waits for the other.

    From memory that is not pinned a copy waits for all that a card has still to do.
    """
    pinned = torch.device(device).type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if pinned else tensor).to(device, dtype, non_blocking=True)


def check_device(device: str) -> None:
    """Raise unless tensors can be made on a device."""
    says = f"device {device!r} cannot be used ({{first}}); use another one, such as cpu"
    with explained(says, RuntimeError, AssertionError):
        torch.zeros(1, device=device)
