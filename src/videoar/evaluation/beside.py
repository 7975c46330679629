"""What the sampler is timed beside: a plain loop of the same weights, and those in diffusers."""

import importlib.util
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from videoar.checkpoints.convert import diffusers_config
from videoar.core.attention import attend
from videoar.core.cache import KeyValue, KVCache
from videoar.core.noise import unit_noise
from videoar.core.sampler import Sampler
from videoar.core.transformer import VideoTransformer
from videoar.core.units import Unit
from videoar.files import Json
from videoar.machine import hardware

TURN_SECONDS = 0.25  # that a side works, before it is the turn of the next
MATMUL = 1024  # rows and columns
EMPTY_WINDOW = 8  # units after which a sampler that forgets nothing is timed


class Context(KVCache):
    """What a unit may read, for every layer one tensor that every pass copies; nothing is kept."""

    def __init__(self, units: list[list[KeyValue]]):
        super().__init__()
        layers = (zip(*layer, strict=True) for layer in zip(*units, strict=True))
        self.past = [tuple(torch.cat(each, dim=2) for each in layer) for layer in layers]
        self.keys = self.past[0][0].shape[2] if units else 0
        self.own: list[KeyValue] = []
        """Keys and values of the last pass, by layer."""

    def reserve(self, tokens: int, *, shape: tuple[int, ...], like: Tensor) -> None:
        """Forget the pass before."""
        self.own = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        """Read what came before, and the unit itself."""
        self.own.append((key, value))
        parts = zip(*self.past[layer : layer + 1], (key, value), strict=True)
        keys, values = (torch.cat(part, dim=2) for part in parts)
        return attend(query, keys, values, mask)


def plain_loop(sampler: Sampler) -> Iterator[tuple[Unit, Tensor, int]]:
    """Do what a sampler would do, by one pass for each step of each unit and one for its keys.

    Layers as they are called in training, positions and sigmas made anew for every pass. Units of
    a wave come after each other; context noise and sinks that move are left out. Weights must not
    require gradients. With every unit come its tokens, and how many keys it read.
    """
    network, config, device = sampler.network, sampler.config, sampler.device
    kept: dict[int, tuple[int, list[KeyValue]]] = {}
    for unit in sampler.units:
        kept = {i: own for i, own in kept.items() if not config.visible.expired(i, unit.index)}
        cache = Context([own for wave, own in kept.values() if wave < unit.wave])
        shape, sigmas = (unit.size, network.config.token_dim), sampler.rows.of(unit.wave)
        noise = partial(unit_noise, sampler.seeds, unit.index, shape)
        x, memory = noise().to(device, sampler.dtype), None
        for step, sigma in enumerate(sigmas, start=1):
            row = torch.zeros(unit.size, dtype=torch.long, device=device)
            where: dict[str, Any] = {"coords": unit.coords.to(device), "unit": row}
            told = torch.tensor([[config.told(sigma)]], device=device)
            with torch.inference_mode(mode=False), torch.enable_grad():  # so nothing is kept
                out = network(tokens=x, sigma=told, text=sampler.text, cache=cache, **where)
            if sigma:
                given = sigmas[: step + 1], memory, partial(noise, draw=step)
                x, memory = config.step(x, out.velocity, *given)
        kept[unit.index] = unit.wave, cache.own
        yield unit, x, cache.keys + unit.size


def alone(model: VideoTransformer, unit: Unit, words: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return passes over a unit without any context, of pure noise, that tell its velocity.

    Ours has the text as keys and values, as all passes but the first of a generation have; that of
    diffusers projects it every time. Only if that is installed, and knows such a unit: a block.
    """
    low, high = unit.grid_index.amin(0), unit.grid_index.amax(0) + 1
    *sides, levels = (high - low).tolist()
    block = levels == high[3] == 1 and math.prod(sides) == unit.size
    if not block or importlib.util.find_spec("diffusers") is None:
        return {}
    kind: Any = importlib.import_module("diffusers").WanTransformer3DModel
    config, weights = model.config, model.state_dict()
    theirs = kind(**diffusers_config(config)).to(words).eval()
    size = config.head_dim, theirs.config.patch_size, theirs.config.rope_max_seq_len
    theirs.rope = type(theirs.rope)(*size, theta=config.rope_theta)
    level = weights.pop("scale_embedding.weight")[0]  # of every token, where there is one level
    weights["patch_embedding.bias"] = weights["patch_embedding.bias"] + level
    theirs.load_state_dict(weights)

    x = unit_noise((0,), unit.index, (unit.size, config.token_dim))
    where = dict(zip(("t", "h", "w"), sides, strict=True), p=config.patch, q=config.patch)
    latents = rearrange(x, "b (t h w) (c p q) -> b c t (h p) (w q)", **where).to(words)
    given = {"coords": unit.coords, "sigma": torch.ones(1, 1), "text": model.encode_text(words)}
    given |= {"unit": torch.zeros(unit.size, dtype=torch.long), "cache": KVCache()}

    def of_diffusers() -> Tensor:
        out = theirs(latents, torch.tensor([1000.0]), words, return_dict=False)[0]
        out = rearrange(out, "b c t (h p) (w q) -> b (t h w) (c p q)", **where)
        return x - out if config.prediction == "clean" else out

    return {"alone": lambda: model(x, **given).velocity, "diffusers": of_diffusers}


@torch.inference_mode()
def beside(model: VideoTransformer, sampler: Sampler, words: Tensor, *, repeats: int) -> Json:
    """Time a sampler with a full window and what does the same, in turn.

    Args:
        model: the transformer that the sampler runs.
        sampler: of an endless stream, at its beginning.
        words: embeddings of a prompt, for passes of one unit without context.
        repeats: turns of each side.

    Returns:
        The seconds of every turn, by side, per pass of one unit; the operations of such a pass,
        counting the keys that may be read, and its tokens; the largest differences between what
        pairs of sides computed, as shares of the largest value; and where that was. A side is a
        large product of matrices, which stands for what the machine can do.
    """
    model.requires_grad_(requires_grad=False)
    visible, segment = sampler.config.visible, sampler.units.units_per_segment
    config = replace(sampler.config, lag=None, context_noise=0.0, moving_sinks=False)
    how: dict[str, Any] = {"seeds": sampler.seeds, "device": sampler.device, "dtype": sampler.dtype}
    own = Sampler(sampler.network, sampler.units, sampler.text, config, **how)
    runs: Any = {"ours": ((each.unit, each.tokens) for each in own), "plain": plain_loop(own)}
    filled = segment * math.ceil(((visible.window or EMPTY_WINDOW) + visible.sink) / segment)
    first = [[x for _, x, *_ in itertools.islice(run, filled)] for run in runs.values()]
    lone, text = alone(model, sampler.units.at(0), words), sampler.text[0][0]
    pairs = [[torch.cat(each, dim=1) for each in first], [call() for call in lone.values()]]
    read = [(unit.size, keys) for unit, _, keys in itertools.islice(runs["plain"], segment)]
    flops = [model.flops(size, keys=keys, words=text.shape[2]) for size, keys in read]
    sides: Any = {name: (partial(next, run), len(config.sigmas)) for name, run in runs.items()}
    sides |= {name: (call, 1) for name, call in lone.items()}
    large = torch.ones(MATMUL, MATMUL, dtype=words.dtype)
    sides["matmul"] = (lambda: large @ large, 1)
    return {
        "dtype": str(words.dtype).removeprefix("torch."),
        "hardware": hardware("cpu"),
        "seconds": in_turn(sides, whole=segment, repeats=repeats),
        "steps": len(config.sigmas) - 1,
        "tokens": statistics.mean(size for size, _ in read),
        "flops": len(text) * statistics.mean(flops),
        "matmul_flops": 2 * MATMUL**3,
        "difference": [float((a - b).abs().max() / b.abs().max()) for a, b in filter(None, pairs)],
    }


def in_turn(
    sides: Mapping[str, tuple[Callable[[], object], int]], *, whole: int, repeats: int
) -> dict[str, list[float]]:
    """Return the seconds of a pass, by side and turn; what else the machine does falls on all.

    Args:
        sides: what is called, a multiple of `whole` times in a turn, and its passes.
        whole: as many calls are alike.
        repeats: turns of each side.
    """
    # What others do on the same core is not in the time of a process.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    calls, found = dict.fromkeys(sides, whole), {name: list[float]() for name in sides}
    for turn in range(repeats + 1):  # the first one warms up, and says how many calls are a turn
        for name, (call, passes) in sides.items():
            before = clock()
            for _ in range(calls[name]):
                call()
            seconds = (clock() - before) / calls[name]
            if turn:
                found[name].append(seconds / passes)
            else:
                calls[name] = whole * max(1, round(TURN_SECONDS / seconds / whole))
    return found
