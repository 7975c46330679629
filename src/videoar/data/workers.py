"""Jobs in processes of their own: one that hangs or dies costs itself and nothing else.

Nothing here knows what a job is.
"""

import contextlib
import math
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import torch

Work = Callable[[Any, Callable[[Any], None]], Any]
"""Does a job. Its second argument is called now and then, to say that the job goes on, and how;
with None it is not passed on."""
START_SECONDS = 300.0  # to import and load; no fault of a job


@dataclass(frozen=True)
class Event:
    """What is heard of a job: it goes on, is done, or is lost."""

    job: Any
    kind: Literal["beat", "done", "lost"]
    value: Any
    """What it said or gave; why it is lost."""


@dataclass
class _Worker:
    process: Any
    connection: Connection
    deadline: float
    """When it must have said something; infinite while it has nothing to do."""
    job: Any = None

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def perform(
    jobs: Iterable[Any], start: Callable[[], Work], *, workers: int, timeout: float, preload: str
) -> Generator[Event, None, None]:
    """Do jobs side by side, and yield what is heard of them; with the iterator all ends.

    A job whose process dies is tried once more: it may have died of something else.

    Args:
        jobs: Picklable, as are results.
        start: Called in each process, of one torch thread; returns what does the jobs.
        workers: Number of processes.
        timeout: Seconds of silence after which a job is lost.
        preload: Module that all processes need: imported once, and not once in each.

    Raises:
        Exception: what a job raised, and with it all ends. Jobs return what is their own fault.
    """
    # A process forked from this one would inherit the locks of threads that it has not.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    queue, tried, running = deque(jobs), [], list[_Worker]()
    with contextlib.ExitStack() as ends:
        while queue or any(worker.job is not None for worker in running):
            while len(running) < workers:
                running.append(_begin(context, start))
                ends.callback(running[-1].end)
            for worker in running:
                if worker.deadline == math.inf and queue:
                    worker.job, worker.deadline = queue.popleft(), time.monotonic() + timeout
                    worker.connection.send(worker.job)
            for worker, (kind, value) in _listen(running, timeout):
                job = worker.job
                if kind == "error":
                    raise value
                if kind == "lost":
                    worker.end()
                    running.remove(worker)
                    if job is None:
                        raise ChildProcessError("a process died before it began: look at memory")
                    if job not in tried and not value:
                        tried.append(job)
                        queue.appendleft(job)
                        continue
                    value = value or f"its process died twice (code {worker.process.exitcode})"
                if kind == "beat":
                    worker.deadline = time.monotonic() + timeout
                else:
                    worker.job, worker.deadline = None, math.inf
                if job is not None and (kind, value) != ("beat", None):
                    yield Event(job, kind, value)


def _begin(context: Any, start: Callable[[], Work]) -> _Worker:
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(start, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours, time.monotonic() + START_SECONDS)


def _listen(running: list[_Worker], timeout: float) -> Iterator[tuple[_Worker, tuple[Any, Any]]]:
    """Wait; yield workers and what they say, or that they died or are overdue."""
    first = min(worker.deadline for worker in running)
    left = None if first == math.inf else max(0.0, first - time.monotonic())
    heard = wait([worker.connection for worker in running], timeout=left)
    for worker in list(running):
        if worker.connection in heard:
            try:
                yield worker, worker.connection.recv()
            except (EOFError, ConnectionResetError):
                yield worker, ("lost", None)
        elif time.monotonic() > worker.deadline:
            yield worker, ("lost", f"no progress in {timeout:g} s")


def _serve(start: Callable[[], Work], connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this
    torch.set_num_threads(1)
    try:
        work = start()
        connection.send(("ready", None))
        while True:
            job = connection.recv()
            connection.send(("done", work(job, lambda value: connection.send(("beat", value)))))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone
    except Exception as error:
        connection.send(("error", error))
