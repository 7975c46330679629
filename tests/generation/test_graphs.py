"""A stream whose passes are recorded is the stream without, to the bit.

Without a card nothing is recorded, but all that a recording reads lies where it would be read, and
what a later pass brings is brought there: what is forgotten shows in the frames.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_pipeline

from videoar.core.schemes import KINDS
from videoar.generation import graphs
from videoar.generation.pipeline import VideoPipeline
from videoar.generation.session import Session
from videoar.generation.together import side_by_side

PROMPT, OTHER = "a red ball", "a blue square"
OPTIONS: dict[str, Any] = {"window_frames": 8, "sink_frames": 2}


@pytest.fixture(scope="module")
def pipe() -> VideoPipeline:
    """Prompt to frames in milliseconds, with sinks that move."""
    return tiny_pipeline()


def _pair(pipe: VideoPipeline, **options: Any) -> list[Session]:
    """Return a session that records and one that does not."""
    return [replace(pipe, graphs=on).session(PROMPT, **OPTIONS | options) for on in (True, False)]


def _same(sessions: list[Session], units: int) -> None:
    """Compare what two sessions make of the next units."""
    for _ in range(units):
        one, other = (session.step() for session in sessions)
        assert one is not None
        assert other is not None
        assert one[0].index == other[0].index
        assert (one[1] is None) == (other[1] is None)
        assert one[1] is None or np.array_equal(one[1], other[1])


def _replays(session: Session) -> dict:
    return session.generation.sampler.network.replays


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("units", [*KINDS, "cube:2x2x4/wavefront"])
def test_a_recorded_stream_is_the_stream(pipe, units: str, guidance: float) -> None:
    """For every kind of unit, with sinks that move, through a new prompt that is blended in."""
    sessions = _pair(pipe, units=units, guidance_scale=guidance)
    segment = sessions[0].generation.sampler.units.units_per_segment
    full = 14 // sessions[0].generation.sampler.units.segment_frames * segment
    _same(sessions, full)
    before = len(_replays(sessions[0]))
    assert 0 < before <= 3 * segment  # alone, and with what is due for the cache
    for session in sessions:
        session.change(prompt=OTHER, over=2)
    _same(sessions, 1)
    assert not _replays(sessions[0])  # addresses of another text
    _same(sessions, 3 * segment)
    assert _replays(sessions[0])


def test_wide_models_and_context_noise_are_recorded_too(pipe, monkeypatch) -> None:
    """Where every unit has a modulation of its own, whose slices are part of a recording."""
    monkeypatch.setattr("videoar.core.transformer.LARGEST_KEPT", 0)
    sessions = _pair(pipe, units="multiscale:4,2,1", context_noise=0.1)
    _same(sessions, 24)
    assert _replays(sessions[0])


def test_a_recorded_stream_is_saved_branched_and_taken_back(pipe, tmp_path) -> None:
    """A state holds no recording: what goes on from it records anew where its cache lies."""
    sessions = _pair(pipe, units="frame")
    _same(sessions, 12)
    branches = [session.branch() for session in sessions]
    assert not _replays(branches[0])
    _same(branches, 12)
    assert _replays(branches[0])
    saved = sessions[0].save(tmp_path / "state")
    _same(sessions, 3)
    for session in sessions:
        session.seek(session.oldest)
    _same(sessions, 4)
    resumed = replace(pipe, graphs=True).resume(saved), pipe.resume(saved)
    _same(list(resumed), 8)


def test_streams_in_one_pass_are_recorded_streams_alone(pipe) -> None:
    """Shared passes run as they are, the passes of a session alone are replayed: same frames."""
    pairs = [_pair(pipe, units="frame", seed=seed) for seed in (0, 1)]
    for step in range(20):
        ours = [pair[0] for pair in pairs]
        finished: list[Any] = [None, None]
        if step % 4:  # now and then each alone
            due = [session.generation.due() for session in ours]
            finished = side_by_side([sampler for sampler in due if sampler is not None])
        for (one, other), unit in zip(pairs, finished, strict=True):
            done, plain = one.step(unit), other.step()
            assert done is not None
            assert plain is not None
            assert np.array_equal(done[1], plain[1])


def test_the_number_of_recordings_is_bounded(pipe, monkeypatch) -> None:
    """Passes beyond it run as they are: a recording holds memory of the card."""
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    sessions = _pair(pipe, units="frame")
    _same(sessions, 14)
    assert len(_replays(sessions[0])) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("units", KINDS)
def test_a_card_replays_what_it_would_compute(units: str) -> None:
    """The same latents, to the bit: a graph launches the same kernels."""
    pipe = tiny_pipeline().to("cuda")
    sessions = _pair(pipe, units=units)
    with torch.inference_mode():
        _same(sessions, 40)
    assert _replays(sessions[0])
