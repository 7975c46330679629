"""The KV cache of a generation: finished units' keys and values, per layer.

Keys are stored after the rotary embedding, at absolute positions: attention depends on differences
of positions only. The cache is read-only during a forward pass; `commit` is the only place where
it grows.
"""

import itertools

import torch
from jaxtyping import Float, Int
from torch import Tensor

from videoar.core.attention import rotate
from videoar.core.units import Units, Visible

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one layer for the tokens of one pass: batch heads tokens head_dim."""


class KVCache:
    """Keys and values of the units that later units may still read.

    Slots 0 .. tokens-1 are always in use, in no particular order: attention does not care, so the
    slots of an evicted unit are filled by the next one, and nothing is ever shifted. Behind them
    lies scratch space, where a pass puts its own keys and values beside the cached ones without a
    copy of the cache.
    """

    def __init__(self):
        self.unit: Int[Tensor, " tokens"] = torch.empty(0, dtype=torch.long)
        """The unit of every cached token, on the host: it builds masks without a device sync."""
        self.version = 0
        """Counts changes of what is cached."""
        self._kv: Float[Tensor, "layers two batch heads capacity head_dim"] | None = None
        self._sink: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Cached tokens."""
        return len(self.unit)

    @property
    def num_bytes(self) -> int:
        """Memory held, scratch included."""
        return 0 if self._kv is None else self._kv.nbytes

    def extend(self, layer: int, key: Tensor, value: Tensor) -> KeyValue:
        """Return the cached keys and values of a layer followed by those of this pass.

        With gradients the result is a copy; without, a view whose tail the next pass overwrites.
        """
        if self._kv is None:
            return key, value
        cached, end = self._kv[layer], self.tokens + key.shape[2]
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            kept = cached[:, :, :, : self.tokens]
            return torch.cat([kept[0], key], dim=2), torch.cat([kept[1], value], dim=2)
        cached[0, :, :, self.tokens : end] = key
        cached[1, :, :, self.tokens : end] = value
        return cached[0, :, :, :end], cached[1, :, :, :end]

    def reserve(self, tokens: int) -> None:
        """Make scratch room for a pass of `tokens` tokens; a no-op before the first commit."""
        if self._kv is not None:
            self._grow(self._kv, tokens)

    def _grow(self, like: Tensor, tokens: int) -> Tensor:
        """Return storage with room for `tokens` more tokens than are cached."""
        needed = self.tokens + tokens
        if self._kv is None or self._kv.shape[4] < needed:
            # A quarter more than needed: growth stays rare, and the peak near the true need.
            grown = like.new_empty(*like.shape[:4], needed + needed // 4, like.shape[5])
            if self._kv is not None:
                grown[..., : self.tokens, :] = self._kv[..., : self.tokens, :]
            self._kv = grown
        return self._kv

    def commit(self, update: list[KeyValue], unit: Int[Tensor, " tokens"]) -> None:
        """Append finished tokens; gradients do not flow through the cache.

        Args:
            update: per layer, the keys and values of exactly these tokens.
            unit: their units.
        """
        fresh = torch.stack([torch.stack([key, value]) for key, value in update]).detach()
        storage = self._grow(fresh, len(unit))
        storage[..., self.tokens : self.tokens + len(unit), :] = fresh
        self.unit = torch.cat([self.unit, unit.cpu()])
        self.version += 1

    def evict(self, units: list[int]) -> None:
        """Drop units: tokens from the end move into the slots that become free."""
        if self._kv is None or not units:
            return
        gone = torch.isin(self.unit, torch.tensor(units))
        left = self.tokens - int(gone.sum())
        holes, movers = gone[:left].nonzero()[:, 0], left + (~gone[left:]).nonzero()[:, 0]
        self._kv[..., holes, :] = self._kv[..., movers, :]
        self.unit[holes] = self.unit[movers]
        self.unit = self.unit[:left]
        self.version += 1

    def place_sinks(self, sink: int, shift: Float[Tensor, "2 1 pairs"]) -> None:
        """Move the keys of units below `sink` by a rotation of positions.

        The rotation starts from where they were committed: rotations compose, but over an hour
        their rounding would add up. Sinks are committed first and never evicted, so they hold the
        first slots.
        """
        if self._kv is None:
            return
        count = int((self.unit < sink).sum())
        kept = 0 if self._sink is None else self._sink.shape[-2]
        if kept < count:  # committed since: with a lag the first sinks may have moved already
            fresh = self._kv[:, 0, :, :, kept:count].clone()
            self._sink = fresh if self._sink is None else torch.cat([self._sink, fresh], dim=-2)
        if self._sink is not None:
            self._kv[:, 0, :, :, :count] = rotate(self._sink, shift)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that is needed to go on later; empty tensors before the first commit."""
        kv = torch.empty(0) if self._kv is None else self._kv[..., : self.tokens, :].clone()
        return {
            "unit": self.unit.clone(),
            "kv": kv,
            "sink": torch.empty(0) if self._sink is None else self._sink.clone(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.unit = state["unit"].cpu().clone()
        self._kv = state["kv"].clone() if state["kv"].numel() else None
        self._sink = state["sink"].clone() if state["sink"].numel() else None


def cached_tokens(units: Units, visible: Visible) -> int:
    """Return the most tokens that the cache holds while wave after wave is generated."""
    before, waves = [0, *itertools.accumulate(units.sizes)], units.waves.tolist()
    most = first = 0
    for reader, wave in enumerate(waves):
        first = reader if wave != waves[first] else first  # of the wave: it reads what is before
        since = 0 if visible.window is None else max(0, reader - visible.window + 1)
        sink = min(visible.sink, first, since)
        most = max(most, before[sink] + before[first] - before[min(since, first)])
    return most
