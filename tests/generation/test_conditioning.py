"""What is given comes out unchanged, all the rest follows from it, and bad files get a sentence."""

import itertools

import pytest
import torch
from reference import to_latents
from safetensors.torch import load, save
from tiny import MODEL, SCHEMES, tiny_pipeline, tiny_transformer

from videoar.core.flow import euler_step, renoise_step, sigma_steps
from videoar.core.noise import unit_noise
from videoar.core.sampler import Sampler, SamplerConfig
from videoar.core.schemes import parse
from videoar.core.tokens import Known, to_tokens
from videoar.core.transformer import TextContext, VideoTransformer
from videoar.core.units import Units, Visible, token_mask
from videoar.generation.guidance import Guided
from videoar.generation.latents import known_tokens
from videoar.generation.pipeline import VideoPipeline

STEPS, SEEDS, PROMPT = 2, (1, 2), "a red ball"
LATTICE = (5, 3, 4)


@pytest.fixture(scope="module")
def model() -> VideoTransformer:
    """A transformer in which every input matters."""
    return tiny_transformer()


@pytest.fixture(scope="module")
def pipe() -> VideoPipeline:
    """Prompt to frames in milliseconds."""
    return tiny_pipeline()


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def _text(model: VideoTransformer, batch: int) -> TextContext:
    words = torch.randn(batch, 5, MODEL.text_dim, generator=torch.Generator().manual_seed(5))
    return model.encode_text(words)


def _latents(frames: int) -> torch.Tensor:
    return torch.randn(2, frames, 4, 6, 8, generator=torch.Generator().manual_seed(3))


def _sampler(model, units: Units, known, *, guided: bool = False, **config) -> Sampler:
    config = SamplerConfig(**{"sigmas": sigma_steps(STEPS, shift=3.0), **config})
    network = Guided(model, 2.5) if guided else model
    text = _text(model, len(SEEDS) * (2 if guided else 1))
    return Sampler(network, units, text, config, seeds=SEEDS, known=known)


def _tokens(sampler: Sampler) -> torch.Tensor:
    parts = list(sampler)
    assert [part.unit.index for part in parts] == list(range(len(parts)))
    return torch.cat([part.tokens for part in parts], dim=1)


def _given(units: Units, frames: int) -> torch.Tensor:
    """Which tokens of a clip lie in the first frames."""
    return torch.tensor([cell[0] < frames for unit in units for cell in unit.cells])


# ---------------------------------------------------------------- known units


@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize("name", [*SCHEMES, "full"])
def test_known_tokens_are_those_of_the_clip(name: str, frames: int) -> None:
    """A token is given if all that it covers is, coarse ones too, wherever its unit ends."""
    units, latents = Units(parse(name), *LATTICE), _latents(5)
    known, given = known_tokens(latents[:, :frames], units), _given(units, frames)
    reached = [unit.index for unit in units if any(cell[0] < frames for cell in unit.cells)]
    assert sorted(known) == reached
    ours = torch.cat([known[index].tokens[:, known[index].mask] for index in reached], dim=1)
    assert torch.equal(ours, to_tokens(latents, units)[:, given])
    if parse(name).frames:  # an endless stream begins alike
        endless = known_tokens(latents[:, :frames], Units(parse(name), None, 3, 4))
        assert all(torch.equal(endless[i].tokens, known[i].tokens) for i in reached[:1])


@pytest.mark.parametrize("lag", [STEPS, 1, 0])
@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("name", [*SCHEMES, "full"])
def test_what_is_given_comes_out_unchanged(model, name: str, frames: int, lag: int) -> None:
    """Bit for bit, in units that are known whole or in part, under every schedule."""
    units, latents = Units(parse(name), *LATTICE), _latents(frames)
    rule = renoise_step if frames == 4 else euler_step
    options = {"lag": lag, "visible": Visible(window=3), "context_noise": 0.1, "step": rule}
    sampler = _sampler(model, units, known_tokens(latents, units), **options)
    tokens = _tokens(sampler)
    assert torch.equal(to_latents(tokens, units)[:, :frames], latents)
    assert tokens.isfinite().all()
    free = _tokens(_sampler(model, units, {}, **options))
    assert not torch.equal(tokens[:, ~_given(units, frames)], free[:, ~_given(units, frames)])


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_going_on_from_a_video_is_never_having_stopped(model, name: str, guided: bool) -> None:
    """With the same seed, from the end of any unit, bit for bit: keys must be what they were."""
    scheme = parse(name)
    units = Units(scheme, 3 * scheme.frames + 1, 3, 4)
    segment = units.units_per_segment
    visible = Visible(window=2 * segment, sink=segment)
    options = {"visible": visible, "context_noise": 0.1, "guided": guided}
    whole = list(_sampler(model, units, {}, **options))
    for kept in {1, segment, 2 * segment, 2 * segment + 1}:
        held = {
            part.unit.index: Known(torch.ones(part.tokens.shape[1]).bool(), part.tokens)
            for part in whole[:kept]
        }
        again = _sampler(model, units, held, **options)
        parts = list(again)
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(whole, parts, strict=True))
        if (first := int(units.waves[kept])) != units.waves[kept - 1]:
            # A wave that is known whole costs the pass that commits it; the last shares one.
            assert again.passes == STEPS * (int(units.waves.max()) + 1 - first) + first - 1


@pytest.mark.parametrize("name", ["frame", "chunk:2", "cube:1x2x2", "key-detail:3"])
def test_latents_of_a_video_are_its_units(model, name: str) -> None:
    """What a codec would give back exactly goes on as the tokens themselves do."""
    scheme = parse(name)
    units = Units(scheme, 2 * scheme.frames, 3, 4)
    whole = _tokens(_sampler(model, units, {}))
    kept = to_latents(whole, units)[:, : scheme.frames]
    assert torch.equal(_tokens(_sampler(model, units, known_tokens(kept, units))), whole)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("name", [*SCHEMES, "full"])
def test_cached_equals_uncached_with_known_tokens(model, name, frames, window) -> None:
    """Recomputed from the beginning in every step: all read clean known tokens, and say so."""
    units, text = Units(parse(name), *LATTICE), _text(model, 2)
    clip, given = to_tokens(_latents(5), units), _given(units, frames)
    visible, sigmas = Visible(window=window), sigma_steps(STEPS, shift=3.0)
    seen = visible.matrix(torch.arange(units.count), units.waves)
    expected = torch.zeros(2, 0, MODEL.token_dim)
    for unit in units:
        rows = units.unit <= unit.index
        own, held = units.unit[rows] == unit.index, given[units.unit == unit.index]
        x = unit_noise(SEEDS, unit.index, (len(unit.cells), MODEL.token_dim))
        for sigma, after in itertools.pairwise(sigmas):
            x = torch.where(held[:, None], clip[:, units.unit == unit.index], x)
            level = torch.where(own & ~given[: len(own)], sigma, 0.0)
            velocity = model(
                torch.cat([expected, x], dim=1),
                coords=units.coords[rows],
                sigma=level.expand(2, -1),
                unit=torch.arange(len(level)),
                text=text,
                mask=token_mask(seen, units.unit[rows], units.unit[rows]),
            ).velocity[:, own]
            x = x + (after - sigma) * velocity
        x = torch.where(held[:, None], clip[:, units.unit == unit.index], x)
        expected = torch.cat([expected, x], dim=1)
    known = known_tokens(_latents(5)[:, :frames], units)
    ours = _tokens(_sampler(model, units, known, visible=visible))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lag", [STEPS, 1])
@pytest.mark.parametrize("name", ["chunk:2", "multiscale:2,1", "cube:2x2x1/wavefront"])
def test_a_saved_stream_with_known_tokens_goes_on(model, name: str, lag: int) -> None:
    """After any unit, known or not, through a file; and a state of doubles fits as well."""
    units = Units(parse(name), *LATTICE)
    known = known_tokens(_latents(3), units)
    options = {"lag": lag, "visible": Visible(window=4, sink=1), "context_noise": 0.1}
    whole = _tokens(_sampler(model, units, known, **options))
    for stop in (1, 2, units.count - 1):
        first, second = (_sampler(model, units, known, **options) for _ in range(2))
        parts = list(itertools.islice(first, stop))
        state = {
            name: value.double() if name.startswith("active") else value
            for name, value in load(save(first.state_dict())).items()
        }
        second.load_state_dict(state)
        parts += second
        assert torch.equal(torch.cat([part.tokens for part in parts], dim=1), whole)
