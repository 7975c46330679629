"""The KV cache of a generation: finished units' keys and values, per layer.

Keys are stored after the rotary embedding, at absolute positions: attention depends on differences
of positions only. A pass leaves its own behind what is cached; `commit` is the only place where the
cache grows.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from videoar.core.attention import attend, rope_table, rotate
from videoar.core.units import Units, Visible

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one layer: batch heads tokens head_dim."""
MAX_KEPT = 64  # results of `keep`


class KVCache:
    """Keys and values of the units that later units may still read.

    Every unit is a block of slots. The blocks lie side by side, in no particular order: attention
    does not care, so the block of an evicted unit is filled by the last one. Behind them lies
    scratch space for the keys and values of a pass; to commit is to count them in, without a copy.

    Args:
        capacity: slots that a generation needs, scratch included; None: unknown, so that the
            storage grows by copies.
    """

    def __init__(self, capacity: int | None = None):
        self.blocks: dict[int, slice] = {}
        """The slots of every cached unit."""
        self.tokens = 0
        """Cached tokens."""
        self.version = 0
        """Counts changes of what is cached."""
        self.capacity = capacity
        self._kv: Float[Tensor, "layers two batch heads capacity head_dim"] | None = None
        self.layers: list[KeyValue] = []
        """Keys and values of every layer, with room; another list once they lie elsewhere."""
        self._sink: Tensor | None = None
        self._placed = (0, 0.0)
        self._kept: dict[tuple, Any] = {}

    @property
    def num_bytes(self) -> int:
        """Memory held, scratch included."""
        return 0 if self._kv is None else self._kv.nbytes

    def keep(self, make: Callable[..., Any], *given: Any) -> Any:
        """Return `make(*given)`; made once for the same tensors, while it is among the latest.

        Methods of one name must be one method.
        """
        key = (make.__name__, *given)  # tensors are the same if they are one object
        found = self._kept.pop(key) if key in self._kept else make(*given)
        self._kept[key] = found
        if len(self._kept) > MAX_KEPT:
            del self._kept[next(iter(self._kept))]
        return found

    def extend(self, layer: int, key: Tensor, value: Tensor) -> KeyValue:
        """Return the cached keys and values of a layer followed by those of this pass.

        With gradients the result is a copy; without, a view whose tail the next pass overwrites.
        """
        keys, values = self.layers[layer]
        end = self.tokens + key.shape[2]
        keys[:, :, self.tokens : end] = key.detach()
        values[:, :, self.tokens : end] = value.detach()
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            cached = keys[:, :, : self.tokens], values[:, :, : self.tokens]
            return torch.cat([cached[0], key], dim=2), torch.cat([cached[1], value], dim=2)
        return keys[:, :, :end], values[:, :, :end]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        """Let the tokens of a pass read what is cached, and each other."""
        return attend(query, *self.extend(layer, key, value), mask)

    def reserve(self, tokens: int, *, shape: tuple[int, ...], like: Tensor) -> None:
        """Make scratch room for a pass of so many tokens.

        Args:
            tokens: of the pass.
            shape: layers, 2, batch, heads, channels of a head.
            like: a tensor on the device and of the dtype.
        """
        needed = self.tokens + tokens
        if self._kv is None or self._kv.shape[4] < needed:
            # Unknown, a quarter more than needed: growth stays rare, and memory near the need.
            room = max(self.capacity or needed + needed // 4, needed)
            self._store(like.detach().new_empty(*shape[:4], room, shape[4]))

    def _store(self, storage: Tensor) -> None:
        """Use other storage, with what is cached."""
        if self._kv is not None:
            storage[..., : self.tokens, :] = self._kv[..., : self.tokens, :]
        self._kv, self.layers = storage, [(kv[0], kv[1]) for kv in storage]

    def commit(self, units: list[tuple[int, int]]) -> None:
        """Keep the first tokens of the last pass: units, and how many tokens each has."""
        for unit, tokens in units:
            self.blocks[unit] = slice(self.tokens, self.tokens + tokens)
            self.tokens += tokens
        self.version += 1

    def evict(self, units: list[int]) -> None:
        """Drop units; the last block moves into a gap that it fits, else all behind move up."""
        for unit in units:
            gap, end = self.blocks.pop(unit), self.tokens
            size = gap.stop - gap.start
            start = end - size if slice(end - size, end) in self.blocks.values() else gap.stop
            for part in chain.from_iterable(self.layers):  # one by one: copies take little memory
                part[:, :, gap.start : gap.start + end - start] = part[:, :, start:end].clone()
            by = start - gap.start
            for u, at in self.blocks.items():
                self.blocks[u] = at if at.start < start else slice(at.start - by, at.stop - by)
            self.tokens -= size
            self.version += 1

    def place_sinks(self, sink: int, shift: float, *, head_dim: int, theta: float) -> None:
        """Move the keys of units below `sink` by a number of frames.

        The rotation starts from where they were committed: rotations compose, but over an hour
        their rounding would add up. Sinks are committed first and never evicted, so they hold the
        first slots.
        """
        count = sum(at.stop - at.start for unit, at in self.blocks.items() if unit < sink)
        if self._kv is None or self._placed == (count, shift):
            return
        kept = 0 if self._sink is None else self._sink.shape[-2]
        if kept < count:  # committed since: with a lag the first sinks may have moved already
            fresh = self._kv[:, 0, :, :, kept:count].clone()
            self._sink = fresh if self._sink is None else torch.cat([self._sink, fresh], dim=-2)
        if self._sink is not None:
            moved = shift * torch.eye(1, 4, device=self._kv.device)  # no copy from the host
            table = rope_table(moved, head_dim=head_dim, theta=theta)
            self._kv[:, 0, :, :, :count] = rotate(self._sink, table)
            self._placed = count, shift

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that is needed to go on later; empty tensors before the first commit."""
        kv = None if self._kv is None else self._kv[..., : self.tokens, :]
        blocks = [(unit, at.start, at.stop) for unit, at in self.blocks.items()]
        return {
            "blocks": torch.tensor(blocks, dtype=torch.long).view(-1, 3),
            "kv": torch.empty(0) if kv is None else kv.clone(),
            "sink": torch.empty(0) if self._sink is None else self._sink.clone(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on like the cache that gave `state`."""
        self.blocks = {unit: slice(*ends) for unit, *ends in state["blocks"].tolist()}
        self.tokens = sum(at.stop - at.start for at in self.blocks.values())
        self._kv, self.layers, self._placed = None, [], (0, 0.0)
        if state["kv"].numel():
            self._store(state["kv"].clone())
        self._sink = state["sink"].clone() if state["sink"].numel() else None
        self.version += 1


def cached_tokens(units: Units, visible: Visible, *, in_flight: int = 0) -> int:
    """Return the most tokens that a generation has in the cache.

    Args:
        units: of a clip, or of a stream with a window.
        visible: what they may read.
        in_flight: waves in a pass, whose tokens lie behind the cached ones and count, too.
    """
    frames = units.frames
    if visible.window is not None:
        # By then the cache is as full as it gets, and all that follows is alike.
        segments = (visible.window + visible.sink) // units.units_per_segment + in_flight + 3
        enough = segments * units.segment_frames
        frames = enough if frames is None else min(frames, enough)
    part = replace(units, frames=frames)
    most, before = 0, [0, *accumulate(part.sizes)]
    firsts = [0, *(part.waves.diff().nonzero()[:, 0] + 1).tolist()]
    ends = [*firsts[in_flight:], *[len(part.sizes)] * in_flight]
    for first, end in zip(firsts, ends, strict=False):
        sink = min(visible.sink, first)
        oldest = sink if visible.window is None else max(sink, first - visible.window + 1)
        most = max(most, before[end] - before[oldest] + before[sink])
    return most
