"""Recorded passes: a pass that comes again is one graph, launched by one call of the driver.

A pass is determined by the shapes of its tokens, by how much is cached, and by its mask. A
recording holds addresses: of weights, text and cache, and of buffers to which all else is brought.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_leaves, tree_map_only

from videoar.core.attention import Mask
from videoar.core.cache import KVCache
from videoar.core.transformer import Network, Output

MAX_GRAPHS = 64
Key = tuple[Any, ...]
Replay = Callable[[Mask | None], Tensor]


@dataclass
class Place:
    """Where something that is kept between passes lies for a graph."""

    make: Callable[..., Any]
    given: tuple[Any, ...]
    """What it is made of, the inputs of a pass by name."""
    source: Any
    value: Any
    """The same as `source`, always at the same addresses."""


class Stable(KVCache):
    """The cache of a generation; what it keeps is found where graphs look for it."""

    def __init__(self, cache: KVCache, tokens: Tensor):
        self.cache, self.reserve, self.attend = cache, cache.reserve, cache.attend
        self.tokens_of_pass = torch.empty_like(tokens)
        self.places: dict[str, Place] = {}
        self.inputs: dict[str, Any] = {}

    def keep(self, make: Callable[..., Any], *given: Any) -> Any:
        """Return what is made, at its place."""
        if make.__name__ not in self.places:
            names = {id(each): name for name, each in self.inputs.items()}
            source = self.cache.keep(make, *given)
            places = tuple(names.get(id(each), each) for each in given)
            # What is made of no input is of the weights, and lies still by itself.
            moves = not names.keys().isdisjoint(map(id, given))
            value = tree_map_only(Tensor, torch.clone, source) if moves else source
            self.places[make.__name__] = Place(make, places, source, value)
        return self.places[make.__name__].value

    def fill(self, tokens: Tensor, inputs: dict[str, Any]) -> bool:
        """Bring what belongs to a pass to its place; say whether the weights still have theirs."""
        self.inputs = {name: inputs[name] for name in ("coords", "sigma", "unit")}
        self.tokens_of_pass.copy_(tokens)
        for place in self.places.values():
            given = (self.inputs.get(g, g) if isinstance(g, str) else g for g in place.given)
            fresh = self.cache.keep(place.make, *given)
            if fresh is not place.source and place.value is place.source:
                return False
            if fresh is not place.source:
                torch._foreach_copy_(_tensors(place.value), _tensors(fresh))
                place.source = fresh
        return True


class Recorded:
    """A network whose passes are recorded when they come again, and replayed from then on.

    They come again once the window is full. With another text, another place of the cache (when it
    grows, or a state is loaded) or other weights all is recorded anew; beyond `MAX_GRAPHS` graphs,
    under a block mask, and for several streams in one pass the network runs as it is. Without CUDA
    nothing is recorded, but all else is done alike.
    """

    def __init__(self, network: Network):
        self.network, self.config = network, network.config
        self._forget((None, None))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recorded) and self.network == other.network

    def _forget(self, at: tuple[Any, Any]) -> None:
        """Record all anew, with the text and the cache at other places."""
        self._text, self._layers = at
        self._stable: dict[Key, Stable] = {}
        self._seen: dict[Key, int] = {}
        self.replays: dict[Key, Replay] = {}
        self._pool: Any = None

    def __call__(self, tokens: Tensor, *, mask: Mask | None, cache: KVCache, **inputs) -> Output:
        unfit = type(cache) is not KVCache or isinstance(mask, BlockMask)
        if not (unfit or torch.is_grad_enabled()):
            if self._text is not inputs["text"] or self._layers is not cache.layers:
                self._forget((inputs["text"], cache.layers))
            shapes = tokens.shape, inputs["coords"].shape, inputs["sigma"].shape
            shape = (*shapes, cache.keep(_bytes, inputs["unit"]))
            form = mask.shape if isinstance(mask, Tensor) else repr(mask)
            key = (*shape, cache.tokens, form)
            if key in self.replays or self._comes_again(key, cache.version):
                stable = self._stable.setdefault(shape, Stable(cache, tokens))
                if stable.fill(tokens, inputs):
                    if key not in self.replays:
                        self.replays[key] = self._record(stable, mask, inputs)
                    return Output(self.replays[key](mask))
                self._forget((inputs["text"], cache.layers))
        return self.network(tokens=tokens, mask=mask, cache=cache, **inputs)

    def _comes_again(self, key: Key, version: int) -> bool:
        """Say whether a pass was seen before the cache changed: until it is full, none is."""
        if len(self._seen) > 16 * MAX_GRAPHS:
            self._seen.clear()
        again = self._seen.setdefault(key, version) != version
        return again and len(self.replays) < MAX_GRAPHS

    def _record(self, stable: Stable, mask: Mask | None, inputs: dict[str, Any]) -> Replay:
        """Return what computes the velocity of a pass that was brought to its place."""
        run, tokens, launch = self.network, stable.tokens_of_pass, None
        own, out = mask.clone() if isinstance(mask, Tensor) else None, tokens
        given = inputs | {"tokens": tokens, "mask": mask if own is None else own, "cache": stable}
        if tokens.is_cuda:
            side, now = torch.cuda.Stream(tokens.device), torch.cuda.current_stream(tokens.device)
            side.wait_stream(now)
            with torch.cuda.stream(side):
                run(**given)  # libraries make what they need in their first call
            now.wait_stream(side)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            launch = torch.cuda.CUDAGraph()
            # Another thread may be decoding meanwhile.
            with torch.cuda.graph(launch, pool=self._pool, capture_error_mode="thread_local"):
                out = run(**given).velocity

        def replay(mask: Mask | None) -> Tensor:
            if own is not None and isinstance(mask, Tensor):
                own.copy_(mask)
            if launch is None:
                return run(**given).velocity
            launch.replay()
            return out.clone()  # the next one overwrites it

        return replay


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
