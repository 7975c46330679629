"""Sampling again, slowly: what the tests compare the sampler and the cache with.

Nothing here imports the sampler, the cache, the masks or the rotary code of the package.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoar.core.noise import unit_noise
from videoar.core.transformer import ModelConfig, Output, TextContext, VideoTransformer
from videoar.core.units import Unit, Units
from videoar.generation.latents import Assembler


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The facts of a generation that decide its result."""

    sigmas: tuple[float, ...]
    lag: int
    window: int | None = None
    sink: int = 0
    context_noise: float = 0.0
    renoise: bool = False
    first: tuple[tuple[float, ...], ...] = ()
    """Sigmas of the first waves."""
    table: tuple[tuple[int, ...], ...] = ()
    """How many steps every wave has made before every row, if no lag says it."""

    @property
    def steps(self) -> int:
        """Denoising steps of a unit."""
        return len(self.sigmas) - 1

    def own(self, wave: int) -> tuple[float, ...]:
        """The sigmas of a wave."""
        return [*self.first, *[self.sigmas] * (wave + 1)][wave]

    def level(self, row: int, wave: int) -> int:
        """How many steps a wave has made before a row."""
        if self.table:
            return self.table[row][wave]
        return min(max(row - self.lag * wave, 0), self.steps)

    def reads(self, reader: Unit, read: Unit) -> bool:
        """Whether one unit may read the other."""
        if reader.index == read.index:
            return True
        near = self.window is None or reader.index - read.index < self.window
        return read.wave < reader.wave and (near or read.index < self.sink)

    def mask(self, readers: list[Unit], reads: list[Unit]) -> Tensor:
        """Which token may read which, tokens in the order of the lists."""
        rows = [
            torch.tensor([self.reads(a, b) for b in reads for _ in b.cells]).expand(
                len(a.cells), -1
            )
            for a in readers
        ]
        return torch.cat(rows)

    def next(
        self, x: Tensor, velocity: Tensor, *, level: int, seeds, unit: int, wave: int = 2**20
    ) -> Tensor:
        """Make one step with a unit's tokens."""
        now, then = self.own(min(wave, len(self.first)))[level : level + 2]
        if not self.renoise:
            return x - (now - then) * velocity
        clean = x - now * velocity
        fresh = unit_noise(seeds, unit, tuple(x.shape[1:]), draw=level + 1)
        return (1 - then) * clean + then * fresh

    def context(self, x: Tensor, *, seeds, unit: int, wave: int = 2**20) -> tuple[Tensor, float]:
        """What later units read of a finished one, and the level that the model is told."""
        if not self.context_noise:
            return x, 0.0
        draw = len(self.own(min(wave, len(self.first))))
        noise = unit_noise(seeds, unit, tuple(x.shape[1:]), draw=draw)
        return (1 - self.context_noise) * x + self.context_noise * noise, self.context_noise


def to_latents(tokens: Tensor, units: Units, *, patch: int = 2) -> Tensor:
    """Read the latents of a clip from its tokens, in unit order."""
    assembler = Assembler(units, patch=patch)
    parts = map(assembler.add, units.clip, tokens.split(units.sizes, dim=1))
    return torch.cat([frames for frames in parts if frames is not None], dim=1)


def recomputed(
    model: VideoTransformer, units: Units, text: TextContext, plan: Plan, *, seeds, scale=None
) -> Tensor:
    """Generate a clip without any cache: every row runs all units from the beginning."""
    group = list(units)
    mask = plan.mask(group, group)
    rows = len(plan.table) - 1 if plan.table else plan.lag * group[-1].wave + plan.steps
    state = [unit_noise(seeds, u.index, (len(u.cells), model.config.token_dim)) for u in group]
    for row in range(rows):
        levels = [plan.level(row, u.wave) for u in group]
        inputs, told = [], []
        for x, u, level in zip(state, group, levels, strict=True):
            sigma = plan.own(u.wave)[level]
            shown = (x, sigma)
            if not sigma:
                shown = plan.context(x, seeds=seeds, unit=u.index, wave=u.wave)
            inputs.append(shown[0])
            told.append(shown[1])

        def velocity(text: TextContext, inputs=inputs, told=told) -> Tensor:
            return model(
                torch.cat(inputs, dim=1),
                coords=units.coords,
                sigma=torch.tensor([told]).expand(len(seeds), -1),
                unit=units.unit,
                text=text,
                mask=mask,
            ).velocity

        if scale is None:
            moves = velocity(text)
        else:
            with_prompt, without = (
                velocity([(k[part], v[part]) for k, v in text])
                for part in (slice(None, len(seeds)), slice(len(seeds), None))
            )
            moves = with_prompt * scale + without * (1 - scale)
        for u, move in zip(group, moves.split(units.sizes, dim=1), strict=True):
            if plan.level(row + 1, u.wave) > levels[u.index]:
                step = {"level": levels[u.index], "unit": u.index, "wave": u.wave}
                state[u.index] = plan.next(state[u.index], move, seeds=seeds, **step)
    return torch.cat(state, dim=1)


def rebased(
    model: VideoTransformer, units: Units, text: TextContext, plan: Plan, *, seeds
) -> Tensor:
    """Generate a clip row by row, with keys stored *before* the rotary embedding.

    They are rotated when they are read: those of the sinks as if they stood right before the window
    of the newest unit in the pass, all others where they are.
    """
    group = list(units)
    state = [unit_noise(seeds, u.index, (len(u.cells), model.config.token_dim)) for u in group]
    stored: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for row in range(plan.lag * group[-1].wave + plan.steps):
        now = [u for u in group if 0 <= row - plan.lag * u.wave <= plan.steps]
        levels = {u.index: plan.level(row, u.wave) for u in now}
        inputs, told = [], []
        for u in now:
            x, sigma = state[u.index], plan.sigmas[levels[u.index]]
            if levels[u.index] == plan.steps:
                x, sigma = plan.context(x, seeds=seeds, unit=u.index)
            inputs.append(x)
            told += [sigma] * len(u.cells)

        shift = _sink_shift(plan, group, newest=now[-1].index)
        past = [group[index] for index in sorted(stored)]
        places = [u.coords + torch.tensor([shift * (u.index < plan.sink), 0, 0, 0]) for u in past]
        keys = [
            [
                torch.cat(parts, dim=2)
                for parts in zip(*(stored[u.index][n] for u in past), strict=True)
            ]
            for n in range(model.config.num_layers if past else 0)
        ]
        velocity, fresh = _unroped_pass(
            model,
            torch.cat(inputs, dim=1),
            coords=torch.cat([u.coords for u in now]),
            sigma=torch.tensor(told),
            text=text,
            past=keys,
            past_coords=torch.cat(places) if places else None,
            mask=plan.mask(now, past + now),
        )
        start = 0
        for u in now:
            tokens = slice(start, start + len(u.cells))
            start = tokens.stop
            if levels[u.index] == plan.steps:
                stored[u.index] = [(k[:, :, tokens], v[:, :, tokens]) for k, v in fresh]
            else:
                state[u.index] = plan.next(
                    state[u.index],
                    velocity[:, tokens],
                    level=levels[u.index],
                    seeds=seeds,
                    unit=u.index,
                )
    return torch.cat(state, dim=1)


def _sink_shift(plan: Plan, group: list[Unit], *, newest: int) -> int:
    """Frames by which the sinks move so that none lies between them and the window."""
    if plan.window is None or not plan.sink:
        return 0
    first = max(0, newest - plan.window + 1)
    window_start = min(cell[0] for u in group[first : newest + 1] for cell in u.cells)
    sink_end = 1 + max(cell[0] for u in group[: plan.sink] for cell in u.cells)
    return max(0, window_start - sink_end)


def turned(x: Tensor, coords: Tensor, *, theta: float) -> Tensor:
    """Rotary embedding by complex numbers in double precision."""
    head_dim = x.shape[-1]
    side = 2 * (head_dim // 6)
    angles = []
    for axis, dims in enumerate((head_dim - 2 * side, side, side)):
        rates = torch.tensor([theta ** (-2 * i / dims) for i in range(dims // 2)]).double()
        angles.append(coords[:, axis, None].double() * rates)
    angle = torch.cat(angles, dim=1)
    turn = torch.polar(torch.ones_like(angle), angle)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention, written out."""
    scores = (q @ k.mT) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v


def _standardised(x: Tensor, eps: float) -> Tensor:
    """Layer norm without weights, written out."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def _scaled(norm: nn.RMSNorm, x: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm, written out."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight


def _heads(x: Tensor, config: ModelConfig) -> Tensor:
    return x.unflatten(-1, (config.num_heads, -1)).transpose(1, 2)


def _unroped_pass(model, tokens, *, coords, sigma, text, past, past_coords, mask):
    """One pass of the transformer that reads and returns keys without positions."""
    config = model.config
    place = {"theta": config.rope_theta}
    x = F.linear(tokens, model.patch_embedding.weight.flatten(1), model.patch_embedding.bias)
    x = x + model.scale_embedding(coords[:, 3].long())
    embedded, modulation = model.condition_embedder(sigma[None])
    fresh = []
    for layer, block in enumerate(model.blocks):
        parts = (block.scale_shift_table + modulation).unbind(2)
        normed = _standardised(x, config.eps) * (1 + parts[1]) + parts[0]
        own, read = block.attn1, block.attn2
        key = _heads(_scaled(own.norm_k, own.to_k(normed), config.eps), config)
        value = _heads(own.to_v(normed), config)
        fresh.append((key, value))
        keys, values = turned(key, coords, **place), value
        if past:
            keys = torch.cat([turned(past[layer][0], past_coords, **place), keys], dim=2)
            values = torch.cat([past[layer][1], values], dim=2)
        query = _heads(_scaled(own.norm_q, own.to_q(normed), config.eps), config)
        seen = attention(turned(query, coords, **place), keys, values, mask)
        x = x + own.to_out[0](seen.transpose(1, 2).flatten(2)) * parts[2]
        normed = _standardised(x, config.eps) * block.norm2.weight + block.norm2.bias
        query = _heads(_scaled(read.norm_q, read.to_q(normed), config.eps), config)
        seen = attention(query, *text[layer], torch.ones(1, dtype=torch.bool))
        x = x + read.to_out[0](seen.transpose(1, 2).flatten(2))
        normed = _standardised(x, config.eps) * (1 + parts[4]) + parts[3]
        up, _, down = block.ffn["net"]
        x = x + down(F.gelu(up["proj"](normed), approximate="tanh")) * parts[5]
    shift, scale = (model.scale_shift_table + embedded[:, :, None]).unbind(2)
    out = model.proj_out(_standardised(x, config.eps) * (1 + scale) + shift)
    channels = config.latent_channels
    return out.unflatten(2, (-1, channels)).transpose(2, 3).flatten(2), fresh


class Oracle(nn.Module):
    """A network that knows the clip: its velocity is exact at every noise level.

    It finds a token by its coordinates, so it takes any set of tokens in any order.
    """

    def __init__(self, clean: Tensor, coords: Tensor, *, channels: int, patch: int = 2):
        super().__init__()
        self.config = ModelConfig(
            latent_channels=channels, patch=patch, num_layers=1, num_heads=1, head_dim=6
        )
        self.clean = clean
        self.where = {tuple(place): row for row, place in enumerate(coords.tolist())}
        self.offset = nn.Parameter(torch.zeros(()))
        self.asked: Tensor | None = None

    def encode_text(self, embeddings: Tensor) -> TextContext:
        """Take no notice of the text."""
        return []

    def forward(
        self, tokens, *, coords, sigma, unit, text, mask=None, cache=None, offset=None
    ) -> Output:
        """Return `(x - clean) / sigma`."""
        rows = [self.where[tuple(place)] for place in coords.tolist()]
        level = sigma[:, unit, None]
        exact = torch.where(level > 0, (tokens - self.clean[:, rows]) / level.clamp(min=1e-6), 0)
        self.asked = exact + self.offset
        if self.asked.requires_grad:
            self.asked.retain_grad()
        return Output(self.asked)
