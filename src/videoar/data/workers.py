"""Jobs in processes of their own: one that hangs or dies costs itself and nothing else.

Nothing here knows what a job is.
"""

import math
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
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


class Pool:
    """Processes that do jobs, each with one torch thread: `for event in pool.run(jobs)`.

    Args:
        start: Called in each process; returns what does the jobs. Like jobs and results, picklable.
        workers: Number of processes.
        timeout: Seconds of silence after which a job is lost.
        preload: Module that all processes need: imported once, and not once in each.
    """

    def __init__(
        self, start: Callable[[], Work], *, workers: int, timeout: float, preload: str
    ) -> None:
        self.start, self.workers, self.timeout = start, workers, timeout
        # A process forked from this one would inherit the locks of threads that it has not.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([preload])
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        while self._workers:
            self._end(self._workers[0])

    def run(self, jobs: Iterable[Any]) -> Iterator[Event]:
        """Do jobs side by side, and yield what is heard of them as it comes.

        A job whose process dies is tried once more: it may have died of something else.

        Raises:
            Exception: what a job raised, and with it all ends. Jobs return what is their own fault.
        """
        queue, tried = deque(jobs), []
        while queue or any(worker.job is not None for worker in self._workers):
            while len(self._workers) < self.workers:
                self._begin()
            for worker in self._workers:
                if worker.deadline == math.inf and queue:
                    worker.job, worker.deadline = queue.popleft(), time.monotonic() + self.timeout
                    worker.connection.send(worker.job)
            for worker, (kind, value) in self._listen():
                job = worker.job
                if kind == "error":
                    raise value
                if kind == "lost":
                    self._end(worker)
                    if job is None:
                        raise ChildProcessError("a process died before it began: look at memory")
                    if job not in tried and not value:
                        tried.append(job)
                        queue.appendleft(job)
                        continue
                    value = value or f"its process died twice (code {worker.process.exitcode})"
                if kind == "beat":
                    worker.deadline = time.monotonic() + self.timeout
                else:
                    worker.job, worker.deadline = None, math.inf
                if job is not None and (kind, value) != ("beat", None):
                    yield Event(job, kind, value)

    def _begin(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(self.start, theirs), daemon=True)
        process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours, time.monotonic() + START_SECONDS))

    def _listen(self) -> Iterator[tuple[_Worker, tuple[Any, Any]]]:
        """Wait; yield workers and what they say, or that they died or are overdue."""
        first = min(worker.deadline for worker in self._workers)
        left = None if first == math.inf else max(0.0, first - time.monotonic())
        heard = wait([worker.connection for worker in self._workers], timeout=left)
        for worker in list(self._workers):
            if worker.connection in heard:
                try:
                    yield worker, worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    yield worker, ("lost", None)
            elif time.monotonic() > worker.deadline:
                yield worker, ("lost", f"no progress in {self.timeout:g} s")

    def _end(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        self._workers.remove(worker)


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
