"""Sessions that share one model: each gets a unit, then each the next, in a thread of its own."""

import functools
import secrets
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np

from videoar.checks import Note
from videoar.core.sampler import Finished, Sampler
from videoar.core.schemes import KINDS
from videoar.core.units import Unit, Units
from videoar.data.fragments import encode
from videoar.generation.config import AUTO
from videoar.generation.inputs import doubts_of
from videoar.generation.pipeline import VideoPipeline
from videoar.generation.session import Session
from videoar.generation.together import side_by_side
from videoar.machine import peak_bytes
from videoar.serve import messages
from videoar.serve.messages import Change, Event, Refused, Start

AHEAD = 1.0
"""Seconds of video that are computed before they are played."""
MAX_UNSENT = 64
"""Messages that may wait for a slow connection."""
IDLE = 60.0
"""Seconds after which a session that nobody watches ends."""
PAUSED = 600.0
"""Seconds after which one ends for which nothing was computed, though somebody watches."""
KEPT_BYTES = 2**26
"""Of the moments that a session can go back to."""
RECENT = 32


class Live:
    """A session, its encoder, and who watches it; all of it belongs to the engine's thread."""

    def __init__(self, session: Session, *, height: int, width: int):
        self.id, self.used_at = secrets.token_urlsafe(12), time.monotonic()
        self.height, self.width = height, width
        self.viewer: Any = None
        """Who gets messages and says how many are `unsent`: see `app.Connection`."""
        self.given: dict[str, Any] = {}
        """The picture or clip that `Start` may begin with."""
        self.way = 0
        self.take(session)

    def watch(self, viewer: Any) -> None:
        """Show it to somebody, or to nobody; another who watched sees no more of it."""
        if viewer is not None:
            self.tell(Refused(message="the session is watched from elsewhere now", fatal=True))
        self.viewer, self.used_at = viewer, time.monotonic()
        if viewer is not None:
            self.begin()

    def take(self, session: Session) -> None:
        """Show this session from now on."""
        self.session, session.kept_bytes = session, KEPT_BYTES
        self.begin()

    def begin(self) -> None:
        """Begin a way: its video is a stream of its own."""
        session, units = self.session, self.session.generation.sampler.units
        self.way, self.paused = self.way + 1, False
        self.frames, self.fragments, self.seen = 0, 0, 0.0
        self._asked: list[tuple[int, float]] = []
        self._shows = False
        """Whether what was asked for has begun."""
        self._bytes = peak_bytes()
        self._took: deque[tuple[float, int]] = deque(maxlen=RECENT)
        black = np.zeros((1, self.height, self.width, 3), dtype=np.uint8)
        head = encode(black, fps=session.fps, first=0, index=0, lossless=False).head
        profile = head[head.index(b"avcC") + 5 :][:3].hex()
        self.tell(
            messages.Begin(
                mime=f'video/mp4; codecs="avc1.{profile}"',
                seconds=session.seconds,
                oldest=session.oldest,
                fps=session.fps,
                width=self.width,
                height=self.height,
                lattice=(units.height, units.width),
                prompt=session.prompt,
                units=str(session.units),
                seed=session.seed,
                num_inference_steps=session.generation.plan.options.steps,
                notes=doubts_of(session.generation),
            )
        )
        self.tell(head)

    @property
    def waits(self) -> bool:
        """Whether somebody waits for a unit."""
        ahead = self.frames / self.session.fps - self.seen
        free = self.viewer is not None and self.viewer.unsent < MAX_UNSENT
        return free and not self.paused and ahead < AHEAD

    def tell(self, message: Event | bytes) -> None:
        if self.viewer is not None:
            self.viewer.send(self.way, message)

    def due(self) -> Sampler:
        """Return what computes the next unit."""
        generation = self.session.generation
        self._begun, plan, self.used_at = time.perf_counter(), generation.plan, time.monotonic()
        sampler = generation.due()
        assert sampler is not None, "a stream has no end"
        self._shows |= generation.plan != plan or generation.wanted is None
        return sampler

    def step(self, finished: Finished | None) -> None:
        """Take the unit that was due, and send what it finishes."""
        assert finished is not None, "a stream has no end"
        done = self.session.step(finished)
        assert done is not None
        (unit, batch), took = done, time.perf_counter() - self._begun
        self._took.append((took, 0 if batch is None else batch.shape[1]))
        if batch is not None:
            self._bytes = peak_bytes()
            place = {"first": self.frames, "index": self.fragments}
            part = encode(batch[0], fps=self.session.fps, lossless=False, **place)
            if self._asked and self._shows:
                waited = 1000 * (time.perf_counter() - self._asked[0][1])
                ids = [number for number, _ in self._asked]
                notes = doubts_of(self.session.generation)
                self.tell(messages.Changed(ids=ids, ms=waited, notes=notes))
                self._asked, self._shows = [], False
            self.tell(part.body)
            self.frames, self.fragments = self.frames + batch.shape[1], self.fragments + 1
        self.tell(self._computed(unit, took))

    def _computed(self, unit: Unit, took: float) -> messages.Computed:
        generation = self.session.generation
        sampler, kept = generation.sampler, generation.kept
        busy, made = (sum(values) for values in zip(*self._took, strict=True))
        find = functools.partial(_runs, sampler.units, kept)
        return messages.Computed(
            index=generation.stats.units,
            cells=find([unit.index]),
            next=find([sampler.delivered]),
            cached=find(sampler.cache.blocks),
            seconds=self.session.seconds,
            unit_ms=1000 * took,
            fps=made / busy,
            units=str(generation.plan.options.units),
            cache_bytes=generation.stats.cache_bytes,
            process_bytes=self._bytes,
        )

    def obey(self, message: Change | messages.Pause | messages.Seek | messages.Seen) -> None:
        """Do what the viewer asks for; a wrong value is a `ValueError`, and changes nothing."""
        if isinstance(message, messages.Pause):
            self.paused = message.paused
        elif isinstance(message, messages.Seen):
            self.seen = min(message.seconds, self.frames / self.session.fps)
        elif isinstance(message, messages.Seek):
            self.session.seek(message.seconds)
            self.begin()
        else:
            said = {k: v for k, v in messages.plain(message).items() if k not in ("type", "id")}
            self.session.change(**said)
            self._asked.append((message.id, time.perf_counter()))
            self._shows = False


@functools.lru_cache(maxsize=1024)  # every message says what is cached
def _runs_of(units: Units, index: int) -> list[list[int]]:
    """Return the cells of a unit as (frame, row, first column, last column, level)."""
    found: list[list[int]] = []
    for t, h, w, level in units.at(index).cells:
        if found and found[-1][:2] + found[-1][3:] == [t, h, w - 1, level]:
            found[-1][3] = w
        else:
            found.append([t, h, w, w, level])
    return found


def _runs(units: Units, kept: Sequence[int], indices: Iterable[int]) -> list[list[int]]:
    """Return the runs of units in the video, whose `kept` frames are the lattice's first."""
    later = 1 + kept[-1] - len(kept) if kept else 0
    own = (run for index in indices for run in _runs_of(units, index))
    return [[kept[t] if t < len(kept) else t + later, *rest] for t, *rest in own]


class Full(ValueError):
    """There are as many sessions as may be: refused for now."""


class Engine(threading.Thread):
    """The thread that computes: what others want done, and a unit of each session, side by side."""

    def __init__(self, pipe: VideoPipeline, *, limit: int = 8):
        super().__init__(daemon=True)
        self.pipe, self.limit = pipe, limit
        self.lives: dict[str, Live] = {}
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._wake, self._ended = threading.Condition(), False

    def call(self, function: Callable[..., Any], *args: Any) -> "Future[Any]":
        """Have a function called between two units; what it returns, or raises, comes later."""
        future: Future[Any] = Future()
        with self._wake:
            self._calls.append((future, functools.partial(function, *args)))
            self._wake.notify()
        return future

    def run(self) -> None:
        while not self._ended:
            self._turn()
            with self._wake:
                if not self._calls and not any(live.waits for live in self.lives.values()):
                    self._wake.wait(0.2)  # who reads slowly does not say when it has read
            self._answer()
            for live in list(self.lives.values()):
                limit = IDLE if live.viewer is None else PAUSED
                if live.used_at < time.monotonic() - limit:
                    words = f"the session stood still for {limit:g} s and has ended: begin another"
                    live.tell(Refused(message=words, fatal=True))
                    del self.lives[live.id]

    def _answer(self) -> None:
        while self._calls:
            future, function = self._calls.popleft()
            if not future.set_running_or_notify_cancel():  # who asked has left
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", Note)  # viewers read it in `notes`
                    future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    def _turn(self) -> None:
        """Compute a unit of each session that somebody waits for, side by side."""
        lives, due = [live for live in self.lives.values() if live.waits], dict[Live, Sampler]()
        for live in lives:
            with self._ending(live):
                due[live] = live.due()
        finished: list[Finished | None] = []
        with self._ending(*due):
            finished = side_by_side(list(due.values()))
        for live, unit in zip(due, finished, strict=False):
            with self._ending(live):
                live.step(unit)

    @contextmanager
    def _ending(self, *lives: Live) -> Iterator[None]:
        """End sessions in which something goes wrong; the others go on."""
        try:
            yield
        except Exception as error:
            for live in lives:
                live.tell(Refused(message=f"the session has ended: {error}", fatal=True))
                del self.lives[live.id]

    def end(self) -> None:
        self._ended = True

    def add(self, session: Session) -> str:
        """Take a session in; return its name."""
        live = Live(session, height=self.pipe.height, width=self.pipe.width)
        self.lives[live.id] = live
        return live.id

    def make(self, message: Start, given: dict[str, Any]) -> Session:
        """Begin a session."""
        self.check_units(message)
        said = {k: v for k, v in messages.plain(message).items() if k not in ("type", "given")}
        return self.pipe.session(**said, **(given if message.given else {}))

    def check_units(self, message: Start | Change) -> None:
        """Raise for a class that a client names: it would be imported."""
        own, units = (self.pipe.sampling.units, *self.pipe.meta.get("units", ())), message.units
        if units is not None and units not in own and units != units.lower():
            raise ValueError(f"units {units[:100]!r} are none that a client may name: use frame")

    def model(self) -> messages.Model:
        """Return what can be asked for."""
        pipe, sampling = self.pipe, self.pipe.sampling
        return messages.Model(
            prompts=list(pipe.meta.get("prompts", ())),
            kinds=[*pipe.meta.get("units", KINDS), *([AUTO] if pipe.router else [])],
            units=str(sampling.units),
            num_inference_steps=sampling.steps,
            height=pipe.height,
            width=pipe.width,
            fps=sampling.fps,
        )

    def open(self, message: Start) -> str:
        """Begin a session of its own; return its name."""
        self.check_room()
        return self.add(self.make(message, {}))

    def check_room(self) -> None:
        if len(self.lives) >= self.limit:
            raise Full(f"there are {self.limit} sessions already: try again later")

    def obey(self, live: Live, message: messages.Control) -> None:
        """Do what a viewer asks for, or say why not."""
        try:
            if isinstance(message, Start):
                live.take(self.make(message, live.given))
            elif isinstance(message, messages.Branch):
                self.check_room()
                live.tell(messages.Branched(session=self.add(live.session.branch())))
            else:
                if isinstance(message, Change):
                    self.check_units(message)
                live.obey(message)
        except ValueError as error:
            live.tell(Refused(message=str(error), id=getattr(message, "id", 0)))
