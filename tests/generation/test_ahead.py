"""A generation that computes the next units while frames are decoded is one that does not."""

import itertools
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from tiny import SCHEMES, tiny_pipeline

from videoar.generation.pipeline import VideoPipeline
from videoar.generation.stream import Generation

PROMPT, OTHER = "a red ball", "a blue square"
OPTIONS = itertools.cycle([{}, {"lag": 1}, {"guidance_scale": 2.0, "context_noise": 0.1}])
EACH = pytest.mark.parametrize(("units", "options"), [*zip(SCHEMES, OPTIONS, strict=False)])
NUM_FRAMES = 33


@pytest.fixture(scope="module")
def pipe() -> VideoPipeline:
    """Prompt to frames in milliseconds."""
    return tiny_pipeline()


@pytest.fixture(scope="module")
def ahead(pipe) -> VideoPipeline:
    """The same, which runs ahead."""
    return replace(pipe, ahead=True)


def _begin(pipe: VideoPipeline, units: str, **options: Any) -> Generation:
    """Begin a clip in which prompts, units and cache change."""
    generation = pipe.generate([PROMPT], num_frames=NUM_FRAMES, seeds=[0], units=units, **options)
    generation.change_at(9, prompts=[OTHER], over=2)
    generation.change_at(13, units="cube:1x2x2")
    generation.change_at(21, prompts=[PROMPT], recompute=True)
    return generation


def _frames(parts: Any) -> np.ndarray:
    return np.concatenate(list(parts), axis=1)


@EACH
def test_it_shows_the_same_frames_and_goes_on_from_any_state(pipe, ahead, units, options) -> None:
    """Changes fall between the same units; what is computed and not shown is in the state."""
    plain = _begin(pipe, units, **options)
    whole = _frames(plain)
    assert whole.shape[1] == NUM_FRAMES
    generation, parts = _begin(ahead, units, **options), []
    for frames in generation:
        parts.append(frames)
        if len(parts) in (1, 3, 4):
            other = _begin(pipe if len(parts) == 3 else ahead, units, **options)
            other.load_state_dict(load(save(generation.state_dict())))
            assert np.array_equal(_frames([*parts, *other]), whole)
            assert other.stats.frames == NUM_FRAMES
    assert np.array_equal(_frames(parts), whole)
    assert generation.stats.passes == plain.stats.passes
    assert generation.stats.units == plain.stats.units


def test_it_can_be_left_and_gone_on_with(pipe, ahead) -> None:
    """No thread stays behind who leaves, and no unit is lost: by step or by iteration it goes on.

    A change holds behind the unit that is computed.
    """
    before = threading.active_count()
    generation, plain = (_begin(each, "frame") for each in (ahead, pipe))
    parts = list(itertools.islice(generation, 2))
    assert threading.active_count() == before
    parts += [generation.step()[1]]
    parts += itertools.islice(generation, 1)
    generation.change(prompts=[OTHER])
    shown = list(itertools.islice(plain, len(parts) + 1))
    plain.change(prompts=[OTHER])
    assert np.array_equal(_frames([*parts, *generation]), _frames([*shown, *plain]))
    assert threading.active_count() == before


def test_an_endless_stream_is_one_unit_ahead(ahead) -> None:
    """And no more, however long its frames are not asked for."""
    generation = ahead.generate([PROMPT], num_frames=None, seeds=[0], units="frame")
    for shown, _ in enumerate(itertools.islice(generation, 5), start=1):
        generation.state_dict()  # waits
        assert generation.stats.units == shown + 1


def test_what_goes_wrong_ahead_is_raised_to_who_iterates(ahead) -> None:
    """With the number of the unit, after all frames before it; no thread stays behind."""
    before = threading.active_count()
    generation = ahead.generate([PROMPT], num_frames=None, seeds=[0], units="frame")

    def break_down(unit: int, step: int, tokens: torch.Tensor) -> torch.Tensor:
        if unit == 3:
            raise MemoryError("no room")
        return tokens

    generation.sampler.on_step = break_down
    shown = iter(generation)
    assert len([next(shown) for _ in range(3)]) == 3
    with pytest.raises(MemoryError, match="no room") as caught:
        next(shown)
    assert caught.value.__notes__ == ["in unit 3"]
    assert threading.active_count() == before


def test_latents_of_a_clip_change_as_its_frames_do(pipe) -> None:
    """A script holds for what is computed, so it needs no frames."""
    latents = _begin(pipe, "frame").latents()
    decoded = pipe.codec.decode(latents)
    shown = torch.from_numpy(_frames(_begin(pipe, "frame"))).movedim(-1, 2)
    assert (decoded * 127.5 + 127.5 - shown).abs().max() <= 1
