"""Sampling: one generator for clips, batches, endless streams and training rollouts.

All of it is a walk down the rows of the matrix of sigmas (`flow.Rows`). In every row the units that
have begun run through the model: those whose sigma moves, those that are read meanwhile, and those
that reached 0 with all before them: their pass writes the cache, which they leave the others for.
So the commit of unit i shares a forward with the first step of unit i+1.

What is known from the start, such as a picture to begin with, takes part in the same walk. A unit
that is known whole is clean from the row in which it would start, so its rows are left out but for
its commit. In one that is known in part, the known tokens stay clean beside the noisy ones and the
model is told so: noised like the others they say little at high sigmas, where few steps decide all
(19 against 23 dB in the frames after a picture, `docs/image-and-video.md`).
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from videoar.checks import check
from videoar.core.attention import Mask, attention_mask
from videoar.core.cache import KVCache, cached_tokens
from videoar.core.flow import Memory, Rows, Schedule, Sigmas, add_noise, euler_step
from videoar.core.noise import unit_noise
from videoar.core.tokens import Known, Tokens
from videoar.core.transformer import Network, TextContext
from videoar.core.units import Unit, Units, Visible
from videoar.machine import sent
from videoar.weights import part_of

Step = Callable[[Tensor, Tensor, Sigmas, Memory, Callable[[], Tensor]], tuple[Tensor, Memory]]
"""(x, velocity, sigmas, memory, fresh) -> x at the last of the sigmas, memory of the next step.

`x` and what the model says of it are at the sigma before the last, `sigmas` are all from the first
on, `memory` is what the step before returned, and `fresh()` draws noise: see `flow.euler_step`."""


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How units are generated."""

    sigmas: Sigmas
    """Falling sigmas of one unit, from 1 to 0: `flow.sigma_steps`."""
    first_sigmas: tuple[Sigmas, ...] = ()
    """Those of the first waves, if they take more steps than the rest."""
    lag: float | Schedule | None = None
    """Rows between the starts of successive waves, or what says when each takes its steps; None:
    one wave after the other. Less than the number of steps is pipelined and needs a model trained
    with noisy context; 0 is full sequence."""
    visible: Visible = field(default_factory=Visible)
    """What a unit may read."""
    context_noise: float = 0.0
    """Sigma at which finished units are written to the cache."""
    moving_sinks: bool = True
    """Whether sinks follow the window, so that no distance is longer than in training."""
    step: Step = euler_step
    """How a sigma is left."""
    told: Callable[[float], float] = float
    """The sigma as the model is told it."""

    def __post_init__(self):
        for sigmas in (*self.first_sigmas, self.sigmas):
            falling = all(a > b for a, b in itertools.pairwise(sigmas))
            if not falling or (*sigmas[:1], *sigmas[-1:]) != (1, 0):
                raise ValueError(f"sigmas must fall from 1 to 0, got {sigmas}: see sigma_steps.")
        steps = len(self.sigmas) - 1
        fits = self.lag is None or callable(self.lag) or 0 <= self.lag <= steps
        check("lag", self.lag, fits, f"0 to {steps}, the number of steps")
        check("context_noise", self.context_noise, 0 <= self.context_noise < 1, "0 to below 1")

    def rows(self, waves: int | None) -> Rows:
        """Return the matrix of a clip of so many waves, or of an endless stream."""
        lag = len(self.sigmas) - 1 if self.lag is None else self.lag
        says = "a lag of 1 or more for an endless stream, or give a number of frames"
        check("lag", lag, callable(lag) or lag >= 1 or waves is not None, says)
        return Rows((*self.first_sigmas, self.sigmas), lag, waves)


@dataclass(frozen=True)
class Finished:
    """A unit that reached sigma 0."""

    unit: Unit
    tokens: Tokens
    before: Tokens | None
    """They before the last step, at the last sigma above 0; None if that was not here."""


class Sampler:
    """A generation in progress; iterate over it to get units as they finish.

    Its state (`state_dict`) is the cache, the units in flight, and how far it is.

    Args:
        network: the model, or a wrapper of it.
        units: the partition, of a clip or an endless stream.
        text: from `VideoTransformer.encode_text`.
        config: see `SamplerConfig`.
        seeds: of the noise, one per video.
        known: what is known beforehand, by unit: see `tokens.known_tokens`.
        noise: the starting noise of a clip, tokens in unit order; None: drawn from the seeds.
        device: where the network is.
        dtype: of the tokens.
    """

    def __init__(
        self,
        network: Network,
        units: Units,
        text: TextContext,
        config: SamplerConfig,
        *,
        seeds: Sequence[int],
        known: Mapping[int, Known] = MappingProxyType({}),
        noise: Tokens | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.network, self.units, self.text, self.config = network, units, text, config
        self.seeds, self.device, self.dtype = tuple(seeds), device, dtype
        self._noise = noise if noise is None else noise.to(device, dtype).split(units.sizes, dim=1)
        self.hold(known)
        count = units.count
        self.rows = config.rows(None if count is None else 1 + units.wave_of(count - 1))
        endless, waves = count is None and config.visible.window is None, self.rows.in_flight
        room = None if endless else cached_tokens(units, config.visible, in_flight=waves)
        self.cache = KVCache(room)
        self.row = 0
        self.entered = 0
        """Units that have started."""
        self.delivered = 0
        """Units that have been handed out."""
        self.active: dict[int, Tensor] = {}
        """Tokens of the units in flight, the finished but uncommitted ones included."""
        self._before: dict[int, Tensor] = {}
        self._memory: dict[int, Tensor] = {}
        self.passes = 0
        """Forward passes so far."""
        self.on_step: Callable[[int, int, Tensor], Tensor] | None = None
        """Called with a unit, the step it took, and its tokens; returns those to go on with."""

    def hold(self, known: Mapping[int, Known]) -> None:
        """Take what is known beforehand, before the first unit."""
        self.known = {
            index: Known(part.mask.to(self.device), part.tokens.to(self.device, self.dtype))
            for index, part in known.items()
        }
        self.known_units = {index for index, part in known.items() if part.mask.all()}
        """Those of which every token is known."""

    def __iter__(self) -> Iterator[Finished]:
        for said in self.walk():
            if isinstance(said, Finished):
                yield said
            else:
                said["output"] = self.network(**said)

    def walk(self) -> Iterator[Finished | dict[str, Any]]:
        """Yield units as they finish, and what the network is asked: put its `output` in.

        So several samplers can be walked side by side, and their passes be one.
        """
        yield from self._deliver()
        while self._enter():
            yield from self._advance()
            yield from self._deliver()

    def _deliver(self) -> Iterator[Finished]:
        """Hand out finished units, in order.

        Who stops or saves between two units of a wave gets the rest later.
        """
        while (index := self.delivered) in self.active:
            if self._shown(index):
                return
            self.delivered += 1
            yield Finished(self._unit(index), self.active[index], self._before.get(index))

    def _unit(self, index: int) -> Unit:
        return self.cache.keep(self.units.at, index)

    def _sigma(self, index: int, later: int = 0) -> float:
        """The sigma of a unit before this row, or a later one."""
        wave = self._unit(index).wave
        return self.rows.of(wave)[self.rows.done(self.row + later, wave)]

    def _shown(self, index: int) -> float:
        """The same as the model is shown it: a known unit does not wait for its turn."""
        return 0.0 if index in self.known_units else self._sigma(index)

    def _enter(self) -> bool:
        """Begin with the units that are due in this row; say whether any step is left."""
        while self.units.count is None or self.entered < self.units.count:
            unit = self._unit(index := self.entered)
            if self.rows.enters(unit.wave) > self.row:
                break
            noise = self._noise[index] if self._noise else self._fresh(index)
            self.active[index] = self._hold(index, noise)
            self.entered += 1
        return self.entered != self.units.count or any(map(self._sigma, self.active))

    def _advance(self) -> Iterator[dict[str, Any]]:
        """Run one row, unless no sigma moves and none is due for the cache."""
        group = [self._unit(index) for index in sorted(self.active)]
        # What the first clean ones read is in the cache.
        ready = list(itertools.takewhile(lambda unit: not self._sigma(unit.index), group))
        unknown = self.active.keys() - self.known_units
        moving = {index for index in unknown if self._sigma(index) != self._sigma(index, 1)}
        if ready or moving:
            yield (asked := self._pass(group))
            velocities = asked["output"].velocity.split([unit.size for unit in group], dim=1)
            for unit, velocity in zip(group, velocities, strict=True):
                if unit.index in moving:
                    self.active[unit.index] = self._step(unit.index, velocity)
            self._commit(ready)
        self.row += 1

    def _step(self, index: int, velocity: Tensor) -> Tensor:
        """Return the tokens of a unit after one step more."""
        x, wave = self.active[index], self._unit(index).wave
        done = self.rows.done(self.row, wave)
        sigmas = self.rows.of(wave)[: done + 2]
        if not sigmas[-1]:
            self._before[index] = x
        memory, fresh = self._memory.pop(index, None), partial(self._fresh, index, done + 1)
        after, memory = self.config.step(x, velocity, sigmas, memory, fresh)
        if memory is not None:
            self._memory[index] = memory
        heard = after if self.on_step is None else self.on_step(index, done, after)
        return self._hold(index, heard)

    def _fresh(self, index: int, draw: int = 0) -> Tensor:
        """Draw noise for a unit."""
        shape = (self._unit(index).size, self.network.config.token_dim)
        return sent(unit_noise(self.seeds, index, shape, draw=draw), self.device, self.dtype)

    def _hold(self, index: int, tokens: Tensor) -> Tensor:
        """Put in what is known of a unit."""
        known = self.known.get(index)
        return tokens if known is None else torch.where(known.mask[:, None], known.tokens, tokens)

    def _pass(self, group: list[Unit]) -> dict[str, Any]:
        noise = self.config.context_noise
        self._place_sinks(group[-1].index)
        tokens, sigmas = [], []
        for unit in group:
            x, sigma = self.active[unit.index], self._shown(unit.index)
            partly, told = sigma and unit.index in self.known, self.config.told(sigma)
            if noise and not sigma:
                draw = len(self.rows.of(unit.wave))
                told, x = noise, add_noise(x, self._fresh(unit.index, draw), noise)
            tokens.append(x)
            sigmas.append((told, unit.size, unit.index if partly else -1))
        self.passes += 1
        keep, indices = self.cache.keep, tuple(unit.index for unit in group)
        told, rows = keep(self._levels, *sigmas)
        return {
            "tokens": tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1),
            "coords": keep(self._coords, *indices),
            "sigma": told,
            "unit": rows,
            "text": self.text,
            "mask": keep(self._mask, self.cache.version, *indices),
            "cache": self.cache,
        }

    def _levels(self, *of_units: tuple[float, int, int]) -> tuple[Tensor, Tensor]:
        """Return the sigmas of a pass, and for every token which.

        Given are those of the units, the number of tokens, and the index where some are known, -1
        elsewhere.
        """
        sigmas, rows = [sigma for sigma, *_ in of_units] + [0.0], []
        for row, (_, size, index) in enumerate(of_units):
            rows.append(torch.full((size,), row, device=self.device))
            if index >= 0:
                rows[-1][self.known[index].mask] = len(of_units)
        count = len(of_units) + any(index >= 0 for *_, index in of_units)
        return torch.tensor([sigmas[:count]], device=self.device), torch.cat(rows)

    def _coords(self, *indices: int) -> Tensor:
        """Return the positions of a pass over some units."""
        return sent(torch.cat([self._unit(index).coords for index in indices]), self.device)

    def _mask(self, _: int, *indices: int) -> Mask | None:
        """Say what tokens of a pass may read: cached ones, then each other; None: everything."""
        visible, cached = self.config.visible, self.cache.blocks
        oldest = min((i for i in cached if i >= visible.sink), default=indices[0])
        if len(indices) == 1 and not visible.expired(oldest, indices[0]):
            return None
        group, order = map(self._unit, indices), sorted(cached, key=lambda i: cached[i].start)
        found = [(i, -1, cached[i].stop - cached[i].start) for i in order]  # of earlier waves
        found += [(unit.index, unit.wave, unit.size) for unit in group]
        index, wave, size = torch.tensor(found).unbind(1)
        reads = torch.repeat_interleave(torch.arange(len(found)), size)
        seen, reader = visible.matrix(index, wave)[len(order) :], reads[self.cache.tokens :]
        return attention_mask(seen, reader - len(order), reads, device=self.device)

    def _place_sinks(self, newest: int) -> None:
        """Let the window move on while the sinks stay right before it, as they were in training."""
        visible, units = self.config.visible, self.units
        first = newest - (visible.window or 0) + 1
        moving = self.config.moving_sinks and visible.sink and visible.window
        if not moving or first <= visible.sink:
            return
        # No unit of a later segment starts earlier than those of the first one.
        segment = units.units_per_segment
        window = range(first, min(newest + 1, (first // segment + 1) * segment))
        shift, model = min(map(units.start_of, window)) - self._sink_frames, self.network.config
        if shift > 0:
            how = {"head_dim": model.head_dim, "theta": model.rope_theta}
            self.cache.place_sinks(visible.sink, shift, **how)

    @cached_property
    def _sink_frames(self) -> int:
        """Latent frames that the sinks reach into."""
        sinks = map(self.units.at, range(self.config.visible.sink))
        return 1 + max(int(unit.grid_index[:, 0].max()) for unit in sinks)

    def _commit(self, units: list[Unit]) -> None:
        """Keep the first units of a pass, clean in it, in the cache; drop what nobody reads."""
        if units:
            for unit in units:
                del self.active[unit.index]
                self._before.pop(unit.index, None)
            self.cache.commit([(unit.index, unit.size) for unit in units])
            oldest = min(self.active, default=self.entered)  # what it cannot read, no later can
            expired = self.config.visible.expired
            self.cache.evict([i for i in self.cache.blocks if expired(i, oldest)])

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that are enough to go on in another process."""
        state = {f"cache.{name}": value for name, value in self.cache.state_dict().items()}
        state |= {f"active.{index}": value for index, value in self.active.items()}
        state |= {f"memory.{index}": value for index, value in self._memory.items()}
        position = [self.row, self.entered, self.delivered, self.passes]
        return state | {"position": torch.tensor(position)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where the sampler that gave `state` stood, on whatever device that was."""
        self.row, self.entered, self.delivered, self.passes = state["position"].tolist()
        self.cache.load_state_dict(part_of(state, "cache", device=self.device))
        active = part_of(state, "active", device=self.device)
        self.active = {int(index): x.to(self.dtype) for index, x in active.items()}
        memory = part_of(state, "memory", device=self.device)
        self._memory = {int(index): x for index, x in memory.items()}
