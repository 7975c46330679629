"""Cached equals uncached, a stream equals a clip, and an oracle gives its clip back."""

import itertools

import pytest
import torch
from reference import Oracle, Plan, rebased, recomputed, to_latents
from safetensors.torch import load, save
from tiny import MODEL, SCHEMES, tiny_transformer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from videoar.core import schemes, transformer
from videoar.core.flow import euler_step, renoise_step, sigma_steps
from videoar.core.sampler import Sampler, SamplerConfig
from videoar.core.schemes import parse
from videoar.core.tokens import to_tokens
from videoar.core.transformer import TextContext, VideoTransformer
from videoar.core.units import Units, Visible
from videoar.generation.guidance import Guided
from videoar.generation.latents import Assembler

STEPS = 3
SEEDS = (1, 2)
LAGS = (STEPS, 2, 1, 0)


@pytest.fixture(scope="module")
def model() -> VideoTransformer:
    """A transformer in which every input matters."""
    return tiny_transformer()


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def _text(model: VideoTransformer, batch: int) -> TextContext:
    words = torch.randn(batch, 5, MODEL.text_dim, generator=torch.Generator().manual_seed(5))
    return model.encode_text(words)


def _config(plan: Plan) -> SamplerConfig:
    return SamplerConfig(
        sigmas=plan.sigmas,
        lag=plan.lag,
        visible=Visible(window=plan.window, sink=plan.sink),
        context_noise=plan.context_noise,
        step=renoise_step if plan.renoise else euler_step,
    )


def _clip(sampler: Sampler) -> torch.Tensor:
    """All tokens of a finite generation in unit order."""
    finished = list(sampler)
    assert [part.unit.index for part in finished] == list(range(sampler.units.count))
    return torch.cat([part.tokens for part in finished], dim=1)


def _plan(**changes) -> Plan:
    return Plan(**{"sigmas": sigma_steps(STEPS, shift=3.0), "lag": STEPS, **changes})


# ---------------------------------------------------------------- cached == uncached


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("window", [None, 3, 1])
@pytest.mark.parametrize("name", [*SCHEMES, "full"])
def test_cached_equals_uncached(model, name: str, window: int | None, lag: int) -> None:
    """The cache saves work and changes nothing; else we would generate with another model."""
    units, plan = Units(parse(name), 4, 3, 4), _plan(window=window, lag=lag)
    text = _text(model, len(SEEDS))
    cached = _clip(Sampler(model, units, text, _config(plan), seeds=SEEDS))
    expected = recomputed(model, units, text, plan, seeds=SEEDS)
    torch.testing.assert_close(cached, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("lag", [STEPS, 1])
@pytest.mark.parametrize("renoise", [False, True])
@pytest.mark.parametrize("name", ["key-detail:3", "multiscale:2,1", "cube:2x2x1/wavefront"])
def test_cached_equals_uncached_with_guidance_and_noisy_context(
    model, name: str, renoise: bool, lag: int
) -> None:
    """Both halves of guidance have caches of their own, and noise on the context is drawn once."""
    units = Units(parse(name), 4, 3, 4)
    plan = _plan(lag=lag, renoise=renoise, window=5, context_noise=0.2)
    text = _text(model, 2 * len(SEEDS))
    cached = _clip(Sampler(Guided(model, 2.5), units, text, _config(plan), seeds=SEEDS))
    expected = recomputed(model, units, text, plan, seeds=SEEDS, scale=2.5)
    torch.testing.assert_close(cached, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lag", [STEPS, 1])
@pytest.mark.parametrize("window", ["segments", "part"])
@pytest.mark.parametrize("name", SCHEMES)
def test_sinks_are_read_right_before_the_window(model, name: str, window: str, lag: int) -> None:
    """Sinks stay at distances that were trained: as if rotated when they are read."""
    scheme = parse(name)
    units = Units(scheme, 3 * scheme.frames + 1, 3, 4)
    segment = units.units_per_segment
    # Windows and sinks of whole segments as the pipeline makes them, and others.
    size, sink = (segment, segment) if window == "segments" else (2, 3 if segment > 2 else 1)
    plan = _plan(lag=lag, window=size, sink=sink, context_noise=0.1)
    text = _text(model, 1)
    cached = _clip(Sampler(model, units, text, _config(plan), seeds=(3,)))
    expected = rebased(model, units, text, plan, seeds=(3,))
    torch.testing.assert_close(cached, expected, atol=5e-5, rtol=1e-4)
    plain = recomputed(model, units, text, plan, seeds=(3,))
    assert not torch.allclose(cached, plain, atol=5e-4), (
        "the sinks did not move: nothing was tested"
    )


def test_the_two_references_agree_where_no_sink_moves(model) -> None:
    """They share no code for positions, masks or attention: an error in one would show here."""
    units, text = Units(parse("cube:2x2x2"), 4, 3, 4), _text(model, 2)
    for plan in (_plan(), _plan(window=3, lag=1, context_noise=0.3, renoise=True)):
        both = [
            reference(model, units, text, plan, seeds=SEEDS) for reference in (recomputed, rebased)
        ]
        torch.testing.assert_close(*both, atol=2e-5, rtol=1e-4)


# ---------------------------------------------------------------- streams


@pytest.mark.parametrize("lag", [STEPS, 1])
@pytest.mark.parametrize("name", SCHEMES)
def test_an_endless_stream_begins_like_a_clip_bit_for_bit(model, name: str, lag: int) -> None:
    """What is shown while generating is what would have been saved."""
    scheme = parse(name)
    frames = 3 * scheme.frames
    clip, endless = (Units(scheme, length, 3, 4) for length in (frames, None))
    config = _config(_plan(lag=lag, window=2 * clip.units_per_segment, sink=clip.units_per_segment))
    text = _text(model, 1)
    whole = list(Sampler(model, clip, text, config, seeds=(4,)))
    # The last units of a clip run without later ones beside them, which rounds differently.
    settled = len(whole) if lag == STEPS else clip.units_per_segment
    stream = itertools.islice(Sampler(model, endless, text, config, seeds=(4,)), settled)
    for part, same in zip(whole, stream, strict=False):
        assert torch.equal(part.tokens, same.tokens)


@pytest.mark.parametrize("lag", [STEPS, 1, 0])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_saved_stream_goes_on_as_if_never_stopped(model, name: str, lag: int) -> None:
    """After any unit, even in the middle of a wave, and through a file: the same bits."""
    scheme = parse(name)
    units, text = Units(scheme, 2 * scheme.frames + 1, 3, 4), _text(model, 2)
    segment = units.units_per_segment
    config = _config(_plan(lag=lag, window=segment, sink=segment, context_noise=0.1, renoise=True))

    def sampler() -> Sampler:
        return Sampler(model, units, text, config, seeds=SEEDS)

    whole = list(sampler())
    for stop in sorted({1, 2, segment + 1, 2 * segment}):
        first, second = sampler(), sampler()
        parts = list(itertools.islice(first, stop))
        second.load_state_dict(load(save(first.state_dict())))
        parts += second
        assert [part.unit.index for part in parts] == list(range(len(whole)))
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(parts, whole, strict=True))
        assert second.passes == whole_passes(units, lag)


def whole_passes(units: Units, lag: int) -> int:
    """Forward passes of a clip: one per row of the table of sigmas."""
    return lag * int(units.waves.max()) + STEPS


def test_a_state_loads_into_a_sampler_that_was_used_before(model) -> None:
    """Nothing of the other stream, not even its masks, may stay."""
    units, text, config = (
        Units(parse("cube:1x2x2"), 4, 3, 4),
        _text(model, 1),
        _config(_plan(window=3)),
    )
    first, other = (Sampler(model, units, text, config, seeds=(seed,)) for seed in (0, 0))
    for sampler, count in ((first, 2), (other, 9)):
        list(itertools.islice(sampler, count))
    other.load_state_dict(first.state_dict())
    for part, same in zip(first, other, strict=True):
        assert torch.equal(part.tokens, same.tokens)


@pytest.mark.parametrize("name", ["frame", "key-detail:3", "cube:2x2x1/wavefront"])
def test_videos_of_a_batch_do_not_mix(model, name: str) -> None:
    """A batch is its videos one by one, up to rounding."""
    units, text = Units(parse(name), 4, 3, 4), _text(model, 2)
    config = _config(_plan(window=4, sink=1, lag=2))
    both = _clip(Sampler(model, units, text, config, seeds=SEEDS))
    for row, seed in enumerate(SEEDS):
        own = [(k[row : row + 1], v[row : row + 1]) for k, v in text]
        alone = _clip(Sampler(model, units, own, config, seeds=(seed,)))
        torch.testing.assert_close(both[row : row + 1], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("lag", [STEPS, 1])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_cache_of_an_endless_stream_stays_small(model, name: str, lag: int) -> None:
    """A unit is dropped once no later one can read it: an hour costs what a minute costs."""
    units = Units(parse(name), None, 3, 4)
    segment = units.units_per_segment
    visible = Visible(window=2 * segment, sink=segment)
    config = SamplerConfig(sigmas=sigma_steps(2), lag=min(lag, 2), visible=visible)
    sampler = Sampler(model, units, _text(model, 1), config, seeds=(0,))
    limit = 3 * sum(len(units.at(index).cells) for index in range(segment))
    memory = []
    for _ in itertools.islice(sampler, 8 * segment):
        assert sampler.cache.tokens <= limit
        memory.append(sampler.cache.num_bytes)
    assert max(memory[4 * segment :]) == max(memory[: 4 * segment])


def test_without_a_window_nothing_is_forgotten(model) -> None:
    """Units may read all before them; a dropped one would be missed without any error."""
    units = Units(parse("cube:1x2x2"), 4, 3, 4)
    sampler = Sampler(model, units, _text(model, 1), _config(_plan()), seeds=(0,))
    for part in sampler:
        assert sampler.cache.blocks.keys() == set(range(part.unit.index))


# ---------------------------------------------------------------- the oracle


@pytest.mark.parametrize("step", [euler_step, renoise_step])
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", [*SCHEMES, "full"])
def test_with_the_exact_velocity_every_schedule_gives_the_clip_back(name, steps, step) -> None:
    """Paths are straight: only a wrong sign, level or order of tokens could miss the clip."""
    units = Units(parse(name), 5, 3, 4)
    latents = torch.randn(2, 5, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    oracle = Oracle(to_tokens(latents, units), units.coords, channels=4)
    for lag, shift in {(steps, 1.0), (1, 7.0), (steps // 2, 3.0), (0, 7.0)}:
        config = SamplerConfig(
            sigmas=sigma_steps(steps, shift=shift),
            lag=lag,
            step=step,
            visible=Visible(window=3),
            context_noise=0.1,
        )
        tokens = _clip(Sampler(oracle, units, [], config, seeds=SEEDS))
        torch.testing.assert_close(to_latents(tokens, units), latents, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("lag", "name"), [(3, "frame"), (2, "cube:1x2x2"), (1, "cube:2x2x1/wavefront")]
)
def test_a_clip_costs_one_pass_per_row(model, lag: int, name: str) -> None:
    """The commit of a unit shares the first pass of the next one: no pass is only for the cache."""
    units = Units(parse(name), 4, 3, 4)
    sampler = Sampler(model, units, _text(model, 1), _config(_plan(lag=lag)), seeds=(0,))
    list(sampler)
    assert sampler.passes == whole_passes(units, lag)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigmas": ()}, "sigmas must fall"),
        ({"sigmas": (1.0,)}, "sigmas must fall"),
        ({"sigmas": (1.0, 0.5)}, "sigmas must fall"),
        ({"sigmas": (1.0, 0.5, 0.5, 0.0)}, "sigmas must fall"),
        ({"sigmas": (float("nan"), 0.0)}, "sigmas must fall"),
        ({"lag": 4}, "lag is 4: use 0 to 3"),
        ({"lag": -1}, "lag is -1: use 0 to 3"),
        ({"context_noise": 1.0}, "context_noise is 1.0"),
        ({"context_noise": -0.1}, "context_noise is -0.1"),
        ({"context_noise": float("nan")}, "context_noise is nan"),
    ],
)
def test_an_impossible_schedule_is_refused(changes: dict, message: str) -> None:
    """Before anything is computed, with the value and the limit."""
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**{"sigmas": sigma_steps(STEPS), **changes})


# ---------------------------------------------------------------- ready for a GPU


class Recorder(TorchDispatchMode):
    """Notes every operation and the shape that comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...] | None]] = []
        self.copies: list[bool] = []
        """Between devices: whether the host waits for them."""
        self.waits: list[str] = []
        """Operations that read a value back from the device."""
        self.fresh: list[int] = []
        """Bytes of every tensor that is no part of another."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Do it and note it."""
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)]
        devices = {x.device for x in tensors if x.ndim}
        if len(devices) > 1:
            names = [argument.name for argument in func._schema.arguments]
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            self.copies.append(not given.get("non_blocking"))
        if DEVICE in devices and any(word in str(func) for word in WAITS):
            self.waits.append(str(func))
        self.seen.append((str(func), tuple(out.shape) if isinstance(out, torch.Tensor) else None))
        given, new = (
            {x.untyped_storage()._cdata: x.nbytes for x in tree_leaves(tree) if torch.is_tensor(x)}
            for tree in ((args, kwargs), out)
        )
        self.fresh += [size for storage, size in new.items() if storage not in given]
        return out


class Constants(TorchFunctionMode):
    """Notes tensors made of Python's numbers on the device: each is a copy that is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Do it and note it."""
        made = func in (torch.tensor, torch.as_tensor)
        self.made += made and (kwargs or {}).get("device") == DEVICE
        return func(*args, **(kwargs or {}))


DEVICE = torch.device("meta")
"""Stands for a card: it has shapes alone, so what reads a value raises."""
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "unique", "equal.default", "isin")
KINDS = (*schemes.KINDS, "cube:2x2x1/wavefront")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("widest", [2**16, 0])
def test_a_stream_repeats_its_operations_and_never_waits(name, widest, monkeypatch) -> None:
    """With a full window a segment costs the operations of the one before, in the same shapes.

    So it allocates as much as any other: for a pass of 2 layers 110 tensors at most, assembling its
    units included, and for each of their tokens 20 KiB.

    That is what a recorded graph needs, and the cache has to stay where it is. No operation reads a
    value back, and no copy from the host waits for the device, sinks and latents included: noise, a
    mask and the cells of latents come for each unit, and its places alone and with the one before.
    """
    monkeypatch.setattr(transformer, "LARGEST_KEPT", widest)  # 0: what a wide model does
    device = torch.device("cpu") if widest == 0 else DEVICE
    with device:
        model = VideoTransformer(MODEL)
        text = model.encode_text(torch.randn(1, 5, MODEL.text_dim))
    units = Units(parse(name), None, 4, 4)
    segment = units.units_per_segment
    config = _config(_plan(window=2 * segment, sink=segment))
    sampler = Sampler(model, units, text, config, seeds=(0,), device=device)
    assembler, finished, segments, storage = Assembler(units), iter(sampler), [], set()
    for _ in range(6):
        passes, tokens = sampler.passes, 0
        with torch.inference_mode(), Constants() as constants, Recorder() as recorder:
            for unit in itertools.islice(finished, segment):
                assembler.add(unit.unit, unit.tokens)
                tokens += unit.unit.size
        passes = sampler.passes - passes
        segments.append(recorder)
        storage.add(id(sampler.cache.layers))
    assert segments[-1].seen == segments[-2].seen
    assert len(storage) == 1
    assert recorder.fresh == segments[-2].fresh
    assert len(recorder.fresh) <= 110 * passes
    assert sum(recorder.fresh) <= 20 * 1024 * passes * tokens / segment
    assert not constants.made
    assert not recorder.waits
    assert not any(recorder.copies)
    assert len(recorder.copies) <= 5 * segment
