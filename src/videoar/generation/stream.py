"""A video in the making: units are sampled and decoded as they come."""

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from videoar import weights
from videoar.checks import check, check_same
from videoar.core.sampler import Finished, Sampler
from videoar.core.tokens import Known, Latents, Tokens
from videoar.core.transformer import TextContext
from videoar.core.units import Unit
from videoar.encoders.codec import to_frames
from videoar.generation.config import Plan
from videoar.generation.latents import Assembler, known_tokens
from videoar.generation.state import State, about, copied, packed, unpacked
from videoar.generation.timing import Timing
from videoar.generation.together import side_by_side
from videoar.machine import process_seconds

Batch = UInt8[np.ndarray, "batch frames height width 3"]
Computed = tuple[Unit, Latents | None]
"""A unit, and the latent frames that it completes."""
MAX_OVER = 1000


class Generation:
    """A video in the making: iterate to get newly finished frames, `batch frames height width 3`.

    Units are generated, committed and decoded as they come; nothing is kept but the cache, the
    decoder's memory and the latents that a unit may read, so an endless stream needs constant
    memory. What follows can be changed between two units: see `change`.

    With `ahead` of the pipeline, who iterates decodes while a thread computes the next units, up to
    the one that completes frames again: the frames are the same, errors come to who iterates, and
    who closes the iterator waits for them. A change holds behind them; `step` does not run ahead.

    Args:
        pipe: a `VideoPipeline`: makes the sampler of a plan and what its passes read, and decodes.
        plan: what is asked for.
        sampler: of that.
        num_frames: pixel frames; None for an endless stream.
        conditioning: first frames; they come out as they are, not as the codec gives them back.
        started: when the work began, on the clock `time.perf_counter`.
    """

    def __init__(
        self,
        pipe: Any,
        plan: Plan,
        sampler: Sampler,
        *,
        num_frames: int | None,
        conditioning: UInt8[np.ndarray, "videos frames height width 3"] | None,
        started: float,
    ):
        self.pipe, self._codec = pipe, pipe.codec
        self.begun = self.plan = plan
        self.wanted: Plan | None = None
        """What is asked for and has not begun."""
        self._anew = False
        self.script: list[tuple[int, dict[str, Any]]] = []
        """Changes to come, each after the frames at which it is due."""
        self.num_frames, self.conditioning, self.started = num_frames, conditioning, started
        self.stats, self._decoder = Timing(), pipe.codec.stream_decoder()
        self._frames = sampler.units.frames
        self._past: dict[int, Latents] = {}
        """Latent frames that a unit may yet read: the first, and the newest."""
        self._whole = 0
        """Latent frames of whole segments."""
        self.kept: list[int] = []
        """The latent frames of the video that are the first of the sampler."""
        self._open: list[Tokens] = []
        """Units of the segment that is not whole."""
        self._ahead: Callable[[], Computed | None] | None = None
        """Waits for a unit that is computed and not decoded, and returns it."""
        self._take(sampler)

    def _take(self, sampler: Sampler) -> None:
        self.sampler, self._passes = sampler, sampler.passes
        self._assembler = Assembler(sampler.units, patch=sampler.network.config.patch)

    @property
    def kept_frames(self) -> int:
        """Number of first frames that condition the rest, and are not generated."""
        return 0 if self.conditioning is None else self.conditioning.shape[1]

    def change(self, *, recompute: bool | None = None, over: int = 1, **changes: Any) -> None:
        """Ask for something else from the next unit on; other units begin with the next segment.

        Args:
            recompute: compute the keys of the frames that a unit reads anew, with the new words, as
                is always done for fields of `GenerationConfig`; else the cache stays. These are
                the last `recall_frames`, if the options have them, and then it is the default.
            over: units over which new prompts are blended with those before.
            changes: `prompts`, `seeds`, and fields of `GenerationConfig`.

        Raises:
            ValueError: a value is outside its limits; all stays as it was.
        """
        self._wait()
        self.wanted, self._anew = self._plan(recompute=recompute, over=over, **changes)

    def change_at(self, frame: int, **changes: Any) -> None:
        """Ask for a change, see `change`, when so many frames are finished; in rising order."""
        self._wait()
        self._plan(**changes)
        done = self.stats.frames
        check("frame", frame, frame >= done, f"{done}, those that there are, or more")
        self.script.append((frame, changes))

    def _wait(self) -> Computed | None:
        """Return what is computed and not decoded, once it is."""
        return None if self._ahead is None else self._ahead()

    def _plan(
        self, *, recompute: bool | None = None, over: int = 1, **changes: Any
    ) -> tuple[Plan, bool]:
        """Return what is asked for, and whether keys are to be new; raise if it cannot be."""
        plan = self.wanted or self.plan
        prompts, seeds = (changes.pop(name, getattr(plan, name)) for name in ("prompts", "seeds"))
        check("over", over, 1 <= over <= MAX_OVER, f"1 to {MAX_OVER} units")
        if tuple(prompts) != plan.prompts:
            plan = replace(plan, before=self.plan.prompts, over=over, left=over - 1)
        plan = replace(plan.replaced(**changes), prompts=tuple(prompts), seeds=tuple(seeds))
        fps = plan.options.fps
        check("fps", fps, fps == self.plan.options.fps, "the rate that it began with")
        self.pipe.check(plan)
        if recompute is None:
            told = plan.prompts != self.plan.prompts and over == 1
            recompute = told and plan.options.recall_frames is not None
        return plan, self._anew or recompute

    def _change(self, wanted: Plan) -> None:
        """Begin with what is asked for, as far as it can begin between these two units."""
        before, given = self.plan, self._given
        later = given or (bool(self._open) and wanted.options.units != before.options.units)
        self.plan = replace(wanted, options=before.options if later else wanted.options)
        if (self._anew and not given) or self.plan.options != before.options:
            self.plan = replace(self.plan, stretch=self.plan.stretch + 1)
            self._begin_again()
        elif self.plan != before:
            self.sampler.text = self.pipe.text(self.plan)
            self.sampler.seeds = self.plan.noise_seeds
        self._anew &= given
        self.wanted = replace(wanted, stretch=self.plan.stretch) if later else None

    @property
    def _given(self) -> bool:
        """Whether the next unit is known beforehand, in part at least: a new sampler would not."""
        return self.sampler.delivered in self.sampler.known

    def _route(self) -> None:
        """Begin a segment with the units that the router chooses, if that is asked for."""
        if not self.plan.routed or self._open or self._given:
            return
        text, end, router = self.sampler.text, self._whole, self.pipe.router
        near = [self._past[t] for t in range(end - router.config.frames, end) if t in self._past]
        chosen = router.choose(near, text)
        self.stats.chosen[chosen] += 1
        if chosen != self.plan.options.units:
            stretch = self.plan.stretch + bool(near)
            options = self.plan.options.replaced(units=chosen)
            self.plan = replace(self.plan, options=options, stretch=stretch)
            self._begin_again(text)

    def _begin_again(self, text: TextContext | None = None) -> None:
        """Go on with a new sampler, for which the frames that a unit reads are known."""
        options = self.plan.options
        units, _ = self.pipe.settings(options, None)
        how = {"told": self._anew, "begun": bool(self._open)}
        kept = options.read_again(units, sorted(self._past), self._whole, **how)
        rest = None if self._frames is None else len(kept) + self._frames - self._whole
        sampler = self.pipe.sampler(self.plan, rest, text=text)
        sampler.on_step = self.sampler.on_step
        self._take(sampler)
        self.kept = kept
        units, known = sampler.units, {}
        if kept:
            latents = torch.cat([self._past[t] for t in kept], dim=1)
            known = known_tokens(latents, units, patch=sampler.network.config.patch)
        done = itertools.takewhile(lambda part: part.mask.all(), known.values())
        self._assembler.done, sampler.delivered = len(kept), sum(1 for _ in done)
        for tokens in self._open:
            whole = torch.ones(tokens.shape[1], dtype=torch.bool)
            known[sampler.delivered] = Known(whole, tokens)
            self._assembler.add(units.at(sampler.delivered), tokens)
            sampler.delivered += 1
        sampler.hold(known)

    def _added(self, finished: Finished) -> Latents | None:
        """Return the frames that a unit completes, if any; keep what later ones may read."""
        unit, tokens = finished.unit, finished.tokens
        latents = self._assembler.add(unit, tokens)
        self._open.append(tokens)
        if latents is not None:
            start = max(self._past, default=-1) + 1
            self._past |= dict(enumerate(latents.split(1, dim=1), start))
        if (unit.index + 1) % self.sampler.units.units_per_segment:
            return latents
        self._whole, self._open = max(self._past) + 1, []
        options = self.plan.options
        if options.window_frames is not None:
            oldest = self._whole - options.window_frames
            for t in [t for t in self._past if options.sink_frames <= t < oldest]:
                del self._past[t]
        return latents

    def __iter__(self) -> Iterator[Batch]:
        device, ahead = self.sampler.device, self.pipe.ahead
        cuda = ahead and torch.device(device).type == "cuda"
        now: Any = torch.cuda.current_stream(device) if cuda else None
        side: Any = torch.cuda.Stream(device) if cuda else None
        with ThreadPoolExecutor(1, initializer=torch.cuda.set_stream, initargs=(now,)) as pool:
            for unit, latents in iter(self._next, None):
                if latents is None:
                    continue
                if side is not None:  # for these, and not for those behind them
                    side.wait_stream(now)
                if ahead:
                    self._ahead = pool.submit(self._to_frames).result
                with torch.cuda.stream(side):
                    frames = self._decoded(unit, latents)
                yield frames

    def due(self) -> Sampler | None:
        """Begin what is asked for, and return what computes the next unit; None at the end."""
        self._begun = time.perf_counter()
        # What is computed counts, shown or not.
        frames = 1 + self._codec.stride[0] * max(self._past) if self._past else 0
        if self.num_frames is not None and frames >= self.num_frames:
            return None  # the rest of the last unit is not shown
        while self.script and frames >= self.script[0][0]:
            self.wanted, self._anew = self._plan(**self.script.pop(0)[1])
        with torch.inference_mode():
            if self.wanted is not None:
                self._change(self.wanted)
            self._route()
        return self.sampler

    def step(self, finished: Finished | None = None) -> tuple[Unit, Batch | None] | None:
        """Compute one unit; return it and the frames that it finishes, if any; None at the end.

        Or take one that was computed `together.side_by_side`, after `due`.
        """
        done = self._next() if finished is None else self._taken(finished)
        if done is None:
            return None
        unit, latents = done
        return unit, None if latents is None else self._decoded(unit, latents)

    def _next(self) -> Computed | None:
        """Return the next unit, computed ahead or now."""
        done = (self._ahead or self._compute)()
        self._ahead = None
        return done

    def _to_frames(self) -> Computed | None:
        """Compute units until one completes frames: a cube alone takes less time than decoding."""
        return next((done for done in iter(self._compute, None) if done[1] is not None), None)

    def _compute(self) -> Computed | None:
        if (sampler := self.due()) is None:
            return None
        try:
            (finished,) = side_by_side([sampler])
        except Exception as error:
            error.add_note(f"in unit {sampler.delivered}")
            raise
        return None if finished is None else self._taken(finished)

    @torch.inference_mode()
    def _taken(self, finished: Finished) -> Computed:
        """Take a unit that is computed: return it, and the latent frames that it completes."""
        stats, sampler = self.stats, self.sampler
        stats.passes, self._passes = stats.passes + sampler.passes - self._passes, sampler.passes
        stats.cache_bytes = sampler.cache.num_bytes
        stats.cache_tokens = max(stats.cache_tokens, sampler.cache.tokens)
        stats.model_seconds += time.perf_counter() - self._begun
        stats.units += 1
        if self.plan.left:
            self.plan = replace(self.plan, left=self.plan.left - 1)
            self.wanted = self.wanted and replace(self.wanted, left=self.plan.left)
            sampler.text = self.pipe.text(self.plan)
        return finished.unit, self._added(finished)

    @torch.inference_mode()
    def _decoded(
        self, unit: Unit, latents: Latents
    ) -> UInt8[np.ndarray, "batch shown rows columns 3"]:
        """Return the frames that a unit finishes, as they are shown: given ones as given."""
        begun, finite = time.perf_counter(), latents.isfinite().all()
        frames = to_frames(self._decoder(latents))
        if not finite:  # asked behind the frames: a card is waited for once
            raise FloatingPointError(
                f"latents of unit {unit.index} are not finite: the weights are damaged, or the"
                " dtype is too narrow; try float32, or another copy"
            )
        stats, shown = self.stats, self.stats.frames
        stats.decode_seconds += (now := time.perf_counter()) - begun
        if self.num_frames is not None:
            frames = frames[:, : self.num_frames - shown]
        if self.conditioning is not None:
            kept = self.conditioning[:, shown : shown + frames.shape[1]]
            frames[:, : kept.shape[1]] = kept
        if not stats.first_frame_seconds:
            stats.first_frame_seconds = now - self.started
            stats.start_seconds = process_seconds()
        stats.frames += frames.shape[1]
        return frames

    @torch.inference_mode()
    def latents(self) -> Latents:
        """Generate a clip to its end, and return what would be decoded to its frames."""
        assert self.num_frames is not None, "an endless stream has no end"
        count = 1 + math.ceil((self.num_frames - 1) / self._codec.stride[0])
        done = iter(self._next, None)
        return torch.cat([part for _, part in done if part is not None], dim=1)[:, :count]

    def _parts(self) -> dict[str, Any]:
        return {"sampler": self.sampler, "decoder": self._decoder, "assembler": self._assembler}

    about = cached_property(about)

    def state_dict(self) -> State:
        """Everything that is needed to go on with the stream later, and what it is of."""
        ahead, sampler = self._wait(), self.sampler
        now = {
            "plan": self.plan.to_json(),
            "wanted": self.wanted and self.wanted.to_json(),
            "anew": self._anew,
            "script": self.script,
            "lattice": sampler.units.frames,
            "frames": self.stats.frames,
            "whole": self._whole,
            "kept": self.kept,
            "chosen": self.stats.chosen,
        }
        state = {"json": packed({"about": self.about, "now": now})}
        for name, part in self._parts().items():
            state |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
        first = min(sampler.active, default=sampler.entered)
        for index, known in sampler.known.items():
            if index >= first:
                state |= {f"mask.{index}": known.mask, f"known.{index}": known.tokens}
        state |= {f"past.{t}": latents for t, latents in self._past.items()}
        state |= {f"open.{k}": tokens for k, tokens in enumerate(self._open)}
        if ahead is not None and ahead[1] is not None:
            state["ahead"] = ahead[1]
        if self.stats.frames < self.kept_frames:
            state["conditioning"] = torch.from_numpy(self.conditioning)
        return copied(state)

    def load_state_dict(self, state: State) -> None:
        """Go on where a generation with the same arguments stood, on whatever device that was.

        Raises:
            ValueError: it is the state of another model, or of other arguments.
        """
        self._wait()
        about, now = unpacked(state).values()
        state = copied(state)
        how: dict[str, Any] = {"other": "state", "options": {"begun": self.begun}}
        check_same(about, self.about, held="the state is of a generation", **how)
        plan, device = Plan.from_json(now["plan"]), self.sampler.device
        if plan != self.plan or plan.stretch:
            self._take(self.pipe.sampler(plan, now["lattice"]))
        self.plan, self.wanted = plan, now["wanted"] and Plan.from_json(now["wanted"])
        self._anew, self._whole, self.kept = (now[k] for k in ("anew", "whole", "kept"))
        self.script = [(frame, changes) for frame, changes in now["script"]]
        self.stats.chosen = Counter(now["chosen"])
        self.stats.frames = now["frames"]
        for name, part in self._parts().items():
            part.load_state_dict(weights.part_of(state, name, device=device))
        masks, known = (weights.part_of(state, name, device=device) for name in ("mask", "known"))
        self.sampler.hold({int(index): Known(masks[index], known[index]) for index in known})
        self._past = {int(t): x for t, x in weights.part_of(state, "past", device=device).items()}
        tokens = weights.part_of(state, "open", device=device)
        self._open = [tokens[str(k)] for k in range(len(tokens))]
        if "conditioning" in state:
            self.conditioning = state["conditioning"].numpy()
        self._passes, self._ahead = self.sampler.passes, None
        if "ahead" in state:
            unit = self.sampler.units.at(self.sampler.delivered - 1)
            self._ahead = lambda: (unit, state["ahead"].to(device))
