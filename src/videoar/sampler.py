"""Sampling: one generator for clips, batches, endless streams and training rollouts.

All of it is a walk down the rows of the sigma matrix (`flow.sigma_matrix`). In every row the units
whose level moves run through the model, together with the units that reached 0 in the row before:
their pass writes the cache. So the commit of unit i shares a forward with the first step of unit
i+1.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from videoar.attention import rope_table
from videoar.cache import KVCache
from videoar.flow import add_noise, euler_step, level, unit_noise
from videoar.model import ModelConfig, Output, TextContext, VideoTransformer
from videoar.units import Unit, Units, Visible, token_mask

Step = Callable[[Tensor, Tensor, float, float, Tensor], Tensor]
"""(x, velocity, sigma, next sigma, fresh noise) -> x at the next sigma: see `flow.euler_step`."""


@runtime_checkable
class Network(Protocol):
    """What the sampler calls: a `VideoTransformer`, or something that wraps it."""

    @property
    def config(self) -> ModelConfig:
        """Its size."""
        ...

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """Return the `Output` of one pass."""
        ...


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How units are generated."""

    sigmas: tuple[float, ...]
    """Falling noise levels of one unit, 1 first and 0 last: `flow.sigma_steps`."""
    lag: int | None = None
    """Rows between the starts of successive waves; None: one wave after the other. Less than the
    number of steps is pipelined and needs a model trained with noisy context; 0 is full
    sequence."""
    visible: Visible = field(default_factory=Visible)
    """What a unit may read."""
    context_noise: float = 0.0
    """Noise level at which finished units are written to the cache."""
    step: Step = euler_step
    """How a noise level is left."""

    def __post_init__(self):
        falling = all(a > b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False))
        if len(self.sigmas) < 2 or not falling or self.sigmas[-1] != 0:
            raise ValueError(f"sigmas must fall and end in 0, got {self.sigmas}: see sigma_steps.")
        if self.lag is not None and not 0 <= self.lag <= self.num_steps:
            raise ValueError(f"lag is {self.lag}: use 0 to {self.num_steps}, the number of steps.")
        if not 0 <= self.context_noise < 1:
            raise ValueError(f"context_noise is {self.context_noise}: use 0 to below 1.")

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1


@dataclass(frozen=True)
class Finished:
    """A unit that reached sigma 0."""

    unit: Unit
    tokens: Float[Tensor, "batch tokens features"]


class Sampler:
    """A generation in progress; iterate over it to get units as they finish.

    Its state (`state_dict`) is the cache, the units in flight, and how far it is.
    """

    def __init__(
        self,
        network: Network,
        units: Units,
        text: TextContext,
        config: SamplerConfig,
        *,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.network, self.units, self.text, self.config = network, units, text, config
        self.seeds, self.device, self.dtype = tuple(seeds), device, dtype
        self.lag = config.num_steps if config.lag is None else config.lag
        if self.lag == 0 and units.count is None:
            raise ValueError(
                "With lag 0 all units start at once, which an endless stream cannot: "
                "use a lag of 1 or more, or give a number of frames."
            )
        self.cache = KVCache()
        self.row = 0
        self.entered = 0
        """Units that have started."""
        self.delivered = 0
        """Units that have been handed out."""
        self.active: dict[int, Tensor] = {}
        """Tokens of the units in flight, the finished but uncommitted ones included."""
        self._mask_of: tuple[tuple[int, ...], Tensor | None] | None = None
        self.passes = 0
        """Forward passes so far."""

    def __iter__(self) -> Iterator[Finished]:
        yield from self._deliver()
        while self._enter() or self._moving():
            self._advance()
            yield from self._deliver()

    def _deliver(self) -> Iterator[Finished]:
        """Hand out finished units, in order.

        Who stops or saves between two units of a wave gets the rest later.
        """
        while self.delivered in self.active:
            index = self.delivered
            if self._level(index, self.row) < self.config.num_steps:
                return
            self.delivered += 1
            yield Finished(self.units.at(index), self.active[index])

    def _level(self, index: int, row: int) -> int:
        wave = self.units.wave_of(index)
        return level(row, wave, steps=self.config.num_steps, lag=self.lag)

    def _moving(self) -> bool:
        steps = self.config.num_steps
        return any(self._level(index, self.row) < steps for index in self.active)

    def _enter(self) -> bool:
        """Start the units whose level first moves in this row; say whether there were any."""
        before = self.entered
        while self.units.count is None or self.entered < self.units.count:
            unit = self.units.at(self.entered)
            if unit.wave * self.lag > self.row:
                break
            shape = (len(unit.cells), self.network.config.token_dim)
            noise = unit_noise(self.seeds, unit.index, shape)
            self.active[unit.index] = noise.to(self.device, self.dtype)
            self.entered += 1
        return self.entered > before

    def _advance(self) -> None:
        """Run one row."""
        row, config = self.row, self.config
        group = [self.units.at(index) for index in sorted(self.active)]
        levels = [self._level(unit.index, row) for unit in group]
        output = self._forward(group, levels)

        sizes = [len(unit.cells) for unit in group]
        velocities = output.velocity.split(sizes, dim=1)
        for unit, at, velocity in zip(group, levels, velocities, strict=True):
            if at == config.num_steps:
                del self.active[unit.index]
                continue
            x = self.active[unit.index]
            sigma, after = config.sigmas[at], config.sigmas[at + 1]
            fresh = x
            if 0 < after and config.step is not euler_step:
                noise = unit_noise(self.seeds, unit.index, tuple(x.shape[1:]), draw=at + 1)
                fresh = noise.to(x)
            self.active[unit.index] = config.step(x, velocity, sigma, after, fresh)
        self._commit(group, levels, output)
        self.row += 1

    def _forward(self, group: list[Unit], levels: list[int]) -> Output:
        config, device = self.config, self.device
        self._place_sinks(group[-1].index)
        tokens, sigmas = [], []
        for unit, at in zip(group, levels, strict=True):
            x, sigma = self.active[unit.index], config.sigmas[at]
            if at == config.num_steps and config.context_noise:
                sigma = config.context_noise
                noise = unit_noise(self.seeds, unit.index, tuple(x.shape[1:]), draw=at + 1)
                x = add_noise(x, noise.to(x), sigma)
            tokens.append(x)
            sigmas.append(sigma)
        row = torch.repeat_interleave(
            torch.arange(len(group)), torch.tensor([len(unit.cells) for unit in group])
        )
        self.passes += 1
        return self.network(
            torch.cat(tokens, dim=1),
            coords=torch.cat([unit.coords for unit in group]).to(device),
            sigma=torch.tensor([sigmas], device=device).expand(len(self.seeds), -1),
            unit=row.to(device),
            text=self.text,
            mask=self._mask(group, row),
            cache=self.cache,
        )

    def _mask(self, group: list[Unit], row: Tensor) -> Tensor | None:
        """What tokens of this pass may read: cached tokens, then each other. None: everything."""
        key = (self.cache.version, *(unit.index for unit in group))
        if self._mask_of is None or self._mask_of[0] != key:
            cached, inverse = torch.unique(self.cache.unit, return_inverse=True)
            index = torch.cat([cached, torch.tensor([unit.index for unit in group])])
            wave = torch.tensor([self.units.wave_of(i) for i in index.tolist()])
            visible = self.config.visible.matrix(index, wave)[len(cached) :]
            mask = None
            if not visible.all():
                reads = torch.cat([inverse, len(cached) + row])
                mask = token_mask(visible, row, reads).to(self.device)
            self._mask_of = key, mask
        return self._mask_of[1]

    def _place_sinks(self, newest: int) -> None:
        """Let the window move on while the sinks stay right before it, as they were in training."""
        visible = self.config.visible
        if not visible.sink or visible.window is None or newest - visible.window < visible.sink:
            return
        window = range(newest - visible.window + 1, newest + 1)
        shift = min(self.units.start_of(index) for index in window) - self._sink_frames
        if shift > 0:
            model = self.network.config
            coords = torch.tensor([[float(shift), 0, 0, 0]], device=self.device)
            table = rope_table(coords, head_dim=model.head_dim, theta=model.rope_theta)
            self.cache.place_sinks(visible.sink, table)

    @cached_property
    def _sink_frames(self) -> int:
        """Latent frames that the sinks reach into."""
        sinks = (self.units.at(index) for index in range(self.config.visible.sink))
        return 1 + max(cell[0] for unit in sinks for cell in unit.cells)

    def _commit(self, group: list[Unit], levels: list[int], output: Output) -> None:
        """Write the units that were clean in this pass to the cache, and drop what nobody reads."""
        oldest = min(self.active, default=self.entered)  # what it cannot read, no later unit can
        visible = self.config.visible
        cached = torch.unique(self.cache.unit).tolist()
        self.cache.evict([i for i in cached if visible.expired(i, oldest)])
        clean = [
            at == self.config.num_steps and not visible.expired(unit.index, oldest)
            for unit, at in zip(group, levels, strict=True)
        ]
        if not any(clean):
            return
        sizes = torch.tensor([len(unit.cells) for unit in group])
        slots = torch.repeat_interleave(torch.tensor(clean), sizes).nonzero()[:, 0]
        unit = torch.repeat_interleave(torch.tensor([unit.index for unit in group]), sizes)
        update = [(k[:, :, slots], v[:, :, slots]) for k, v in output.key_values]
        self.cache.commit(update, unit[slots])

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that are enough to go on in another process."""
        state = {f"cache.{name}": value for name, value in self.cache.state_dict().items()}
        state |= {f"active.{index}": value for index, value in self.active.items()}
        position = [self.row, self.entered, self.delivered, self.passes]
        return state | {"position": torch.tensor(position)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.row, self.entered, self.delivered, self.passes = state["position"].tolist()
        self._mask_of = None
        prefix = "cache."
        self.cache.load_state_dict(
            {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
        )
        self.active = {
            int(name.removeprefix("active.")): value
            for name, value in state.items()
            if name.startswith("active.")
        }


class Guided:
    """Classifier-free guidance around a network (Ho and Salimans 2022, arXiv:2207.12598).

    The cache and the text hold the conditional batch followed by the unconditional one.
    """

    def __init__(self, network: VideoTransformer, scale: float):
        self.network, self.scale, self.config = network, scale, network.config

    def __call__(self, tokens: Tensor, *, sigma: Tensor, **inputs) -> Output:
        output = self.network(torch.cat([tokens] * 2), sigma=torch.cat([sigma] * 2), **inputs)
        conditional, unconditional = output.velocity.chunk(2)
        velocity = unconditional + self.scale * (conditional - unconditional)
        return Output(velocity, output.key_values)
