"""UniPC without diffusers: exact where paths are straight, and a stream that can be stopped."""

import itertools

import pytest
import torch
from reference import Oracle, to_latents
from safetensors.torch import load, save
from tiny import MODEL, tiny_transformer

from videoar.core.sampler import Sampler, SamplerConfig
from videoar.core.schemes import parse
from videoar.core.tokens import Known, to_tokens
from videoar.core.units import Units, Visible
from videoar.generation.config import STEPS
from videoar.generation.unipc import grid

UNIPC = STEPS["unipc"]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", ["frame", "full", "multiscale:2,1"])
def test_with_the_exact_velocity_the_clip_comes_back(name: str, steps: int) -> None:
    """Every estimate of the clean data is the clip: no weight of an update may lose any of it.

    The model is told whole timesteps, so it is wrong by as much as they are cut off.
    """
    units = Units(parse(name), 4, 4, 4)
    latents = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    oracle = Oracle(to_tokens(latents, units), units.coords, channels=4)
    for lag in (steps, 1, 0):
        sigmas = grid("unipc", steps, shift=3.0)
        config = SamplerConfig(sigmas=sigmas, lag=lag, **UNIPC, visible=Visible(window=3))
        parts = list(Sampler(oracle, units, [], config, seeds=(1, 2)))
        tokens = torch.cat([part.tokens for part in parts], dim=1)
        assert (to_latents(tokens, units) - latents).abs().max() < 0.01


@pytest.mark.parametrize("lag", [3, 1])
def test_a_saved_stream_goes_on_as_if_never_stopped(lag: int) -> None:
    """Units in flight need the steps before: they are in the state."""
    model, units = tiny_transformer(), Units(parse("cube:1x2x2"), 3, 4, 4)
    words = torch.randn(2, 5, MODEL.text_dim, generator=torch.Generator().manual_seed(5))
    sigmas = grid("unipc", 3, shift=3.0)
    config = SamplerConfig(sigmas=sigmas, lag=lag, **UNIPC, visible=Visible(window=4))

    def sampler() -> Sampler:
        return Sampler(model, units, model.encode_text(words), config, seeds=(1, 2))

    whole = list(sampler())
    for stop in (1, 2, 5):
        first, second = sampler(), sampler()
        parts = list(itertools.islice(first, stop))
        list(itertools.islice(second, 7))  # used before
        second.load_state_dict(load(save(first.state_dict())))
        parts += second
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(parts, whole, strict=True))
        assert any(key.startswith("memory.") for key in first.state_dict()) == (lag == 1)


def test_what_is_known_of_a_unit_stays() -> None:
    """The corrector goes back a step: it must not bring the noise back."""
    model, units = tiny_transformer(), Units(parse("chunk:2"), 2, 4, 4)
    mask = torch.arange(32) < 16
    known = {0: Known(mask, torch.full((1, 32, MODEL.token_dim), 0.25))}
    config = SamplerConfig(sigmas=grid("unipc", 4, shift=1.0), **UNIPC)
    text = model.encode_text(torch.zeros(1, 5, MODEL.text_dim))
    (part,) = Sampler(model, units, text, config, seeds=(1,), known=known)
    assert (part.tokens[:, mask] == 0.25).all()
    assert part.tokens[:, ~mask].isfinite().all()
