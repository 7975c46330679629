"""A stream that its user is in: told something else, taken back, branched, put away and resumed."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from videoar.checks import check_names
from videoar.core.sampler import Finished
from videoar.core.units import Unit
from videoar.data.video import Frames
from videoar.generation.config import GenerationConfig, Plan
from videoar.generation.inputs import warned
from videoar.generation.state import State, unpacked
from videoar.generation.stream import Batch, Generation
from videoar.weights import read_safetensors, write_safetensors

KEPT_BYTES = 2**28


def _changed_by_setting(name: str, read: Callable[[Plan], Any]) -> Any:
    """Return a property that shows what holds from the next unit on, and asks for another."""

    def value(session: "Session") -> Any:
        return read(session.generation.wanted or session.generation.plan)

    return property(value, lambda session, new: session.change(**{name: new}))


class Session:
    """One video in the making; what follows can be changed while it comes.

    with pipe.session("a red ball moves left") as session:
        for frames in session:
            if session.seconds > 3:
                session.prompt = "a blue ball moves left"

    A change holds from the next unit on, other units from the next segment: `change` has the ways
    in which it can be made. Once a second of video the state is kept, the newest in bounded memory,
    for `seek`, until the end of a `with`.
    """

    # A misspelt `session.prompts = ...` must not be taken.
    __slots__ = ("__weakref__", "_kept", "generation", "kept_bytes")

    def __init__(self, generation: Generation) -> None:
        self.generation, self.kept_bytes = generation, KEPT_BYTES
        self._kept: deque[tuple[int, State]] = deque()
        self._keep()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.clear()

    def __iter__(self) -> Iterator[Frames]:
        while (done := self.step()) is not None:
            if done[1] is not None:
                yield done[1][0]

    def step(self, finished: Finished | None = None) -> tuple[Unit, Batch | None] | None:
        """Compute one unit, or take a computed one: see `Generation.step`."""
        done = self.generation.step(finished)
        if done is not None and done[1] is not None:
            self._keep()
        return done

    @property
    def fps(self) -> int:
        return self.generation.begun.options.fps

    @property
    def seconds(self) -> float:
        """How much video there is."""
        return self.generation.stats.frames / self.fps

    @property
    def oldest(self) -> float:
        """The first moment to which `seek` can go."""
        return self._kept[0][0] / self.fps if self._kept else self.seconds

    prompt = _changed_by_setting("prompt", lambda plan: plan.prompts[0])
    seed = _changed_by_setting("seed", lambda plan: plan.seeds[0])
    units = _changed_by_setting("units", lambda plan: plan.options.units)
    guidance_scale = _changed_by_setting("guidance_scale", lambda p: p.options.guidance_scale)

    def change(self, **changes: Any) -> None:
        """Ask for something else: `prompt`, `seed`, and what `Generation.change` takes."""
        self.generation.change(**_of_a_batch(changes))
        warned(self.generation)

    def change_at(self, seconds: float, **changes: Any) -> None:
        """Ask for a change when so much video is finished; in rising order."""
        self.generation.change_at(round(seconds * self.fps), **_of_a_batch(changes))

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write all that `VideoPipeline.resume` needs, in another process too, as safetensors."""
        target = Path(path).expanduser()
        if target.exists() and not overwrite:
            raise ValueError(f"{target} exists already: name another file, or overwrite it")
        write_safetensors(target, self.generation.state_dict())
        return target

    def branch(self) -> "Session":
        """Return another session, which goes on from here on its own."""
        return resumed(self.generation.pipe, self.generation.state_dict())

    def seek(self, seconds: float) -> None:
        """Go back to the last kept point at or before a moment; what came after is forgotten.

        Raises:
            ValueError: it is no longer kept.
        """
        if not self.oldest <= seconds <= self.seconds:
            raise ValueError(
                f"{seconds:g} s is not kept: go back to {self.oldest:.1f} to {self.seconds:.1f} s"
            )
        while self._kept[-1][0] > seconds * self.fps:
            self._kept.pop()
        self.generation.load_state_dict(self._kept[-1][1])

    def _keep(self) -> None:
        """Keep the state once a second, and forget the oldest."""
        frames = self.generation.stats.frames
        if self._kept and frames < self._kept[-1][0] + self.fps:
            return
        self._kept.append((frames, self.generation.state_dict()))
        held = sum(t.nbytes for _, state in self._kept for t in state.values())
        while held > self.kept_bytes:
            held -= sum(tensor.nbytes for tensor in self._kept.popleft()[1].values())


def resumed(pipe: Any, source: State | str | Path) -> Session:
    """Return a session of a pipeline that goes on from a state, or a file of one."""
    if not isinstance(source, dict):
        source = read_safetensors(Path(source).expanduser())
    about = unpacked(source)["about"]
    plan, num_frames = Plan.from_json(about["begun"]), about["num_frames"]
    pipe = replace(pipe, height=about["height"], width=about["width"])
    sampler = pipe.sampler(plan, pipe.lattice(plan.options.units, num_frames).frames)
    given = {"num_frames": num_frames, "conditioning": None, "started": time.perf_counter()}
    generation = Generation(pipe, plan, sampler, **given)
    generation.load_state_dict(source)
    generation.stats.resumed = generation.stats.frames
    return Session(generation)


def _of_a_batch(changes: dict[str, Any]) -> dict[str, Any]:
    """Return changes of one video as those of a batch of one."""
    several = {"prompt": "prompts", "seed": "seeds"}
    check_names(changes, [*several, "over", "recompute", *vars(GenerationConfig())])
    return {several.get(k, k): [v] if k in several else v for k, v in changes.items()}
