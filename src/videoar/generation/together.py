"""Several streams side by side: their passes are one."""

from typing import Any

import torch
from torch import Tensor

from videoar.core.cache import KVCache
from videoar.core.sampler import Finished, Sampler
from videoar.core.transformer import Network, Output, TextContext

Pass = dict[str, Any]
"""What a network is asked, by name."""


class Caches(KVCache):
    """The caches of several streams in one pass, of which every so-many-th row is of one stream.

    Attention is each stream's own, with its own mask; all else of a pass is shared.
    """

    def __init__(self, passes: list[Pass]):
        self.caches, self.masks = ([each[name] for each in passes] for name in ("cache", "mask"))
        self.keep = self.caches[0].keep

    def reserve(self, tokens: int, *, shape: tuple[int, ...], like: Tensor) -> None:
        """Make room in each."""
        own = (*shape[:2], shape[2] // len(self.caches), *shape[3:])
        for cache in self.caches:
            cache.reserve(tokens, shape=own, like=like)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        """Let the tokens of every stream read what is its own."""
        found, count = [], len(self.caches)
        for k, (cache, own) in enumerate(zip(self.caches, self.masks, strict=True)):
            found.append(cache.attend(layer, *(x[k::count] for x in (query, key, value)), own))
        return _rows(*found)


@torch.inference_mode()
def side_by_side(samplers: list[Sampler]) -> list[Finished | None]:
    """Compute the next unit of every sampler; None: it is at its end.

    Passes of one network over as many tokens at the same sigmas are one, and give what each alone
    would, as far as a product of matrices gives a row the same bits whatever the number of rows.
    """
    walks = dict(enumerate(sampler.walk() for sampler in samplers))
    found = dict[int, Finished | None]()
    while walks:
        groups: list[tuple[Network, list[Pass]]] = []
        for k, walk in list(walks.items()):
            if not isinstance(said := next(walk, None), dict):
                found[k] = said
                del walks[k]
                continue
            network = samplers[k].network
            near = [own for of, own in groups if of == network and _alike(own[0], said)]
            if near:
                near[0].append(said)
            else:
                groups.append((network, [said]))
        for network, passes in groups:
            velocity = network(**passes[0] if len(passes) == 1 else _joined(passes)).velocity
            for k, each in enumerate(passes):
                each["output"] = Output(velocity[k :: len(passes)])
    return [found[k] for k in range(len(samplers))]


def _alike(one: Pass, other: Pass) -> bool:
    """Say whether two passes can be one."""
    shapes = [(each["tokens"].shape, each["text"][0][0].shape) for each in (one, other)]
    pairs, keep = ((one[k], other[k]) for k in ("sigma", "unit")), one["cache"].keep
    # Compared once, as a GPU has to be waited for.
    return shapes[0] == shapes[1] and all(keep(torch.equal, *pair) for pair in pairs)


def _joined(passes: list[Pass]) -> Pass:
    """Return what a network is asked by all."""
    caches, texts = Caches(passes), (each["text"] for each in passes)
    flat = (each for text in texts for layer in text for each in layer)
    text = caches.keep(_texts, len(passes), *flat)
    rows = len(text[0][0]) // len(passes)
    return passes[0] | {
        "tokens": _rows(*(each["tokens"] for each in passes)),
        "coords": caches.keep(_coords, rows, *(each["coords"] for each in passes)),
        "text": text,
        "cache": caches,
    }


def _rows(*parts: Tensor) -> Tensor:
    """Return rows in which those of the parts take turns: halves of them are those of all parts."""
    return torch.stack(parts, dim=1).flatten(0, 1)


def _texts(count: int, *flat: Tensor) -> TextContext:
    each = len(flat) // count
    rows = [_rows(*flat[k::each]) for k in range(each)]
    return list(zip(rows[::2], rows[1::2], strict=True))


def _coords(rows: int, *coords: Tensor) -> Tensor:
    return _rows(*(each.expand(rows, -1, -1) for each in coords))
