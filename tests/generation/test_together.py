"""Streams side by side share their passes, and the frames of each are those that it has alone."""

from typing import Any

import numpy as np
import pytest
from tiny import tiny_pipeline

from videoar.generation.session import Session
from videoar.generation.together import side_by_side


def _sessions(pipe: Any, **options: Any) -> list[Session]:
    """Three streams: the second begins later, and the third is told something else."""
    prompts = ("a red ball", "a blue square", "a green cross")
    found = [pipe.session(p, seed=k, **options) for k, p in enumerate(prompts)]
    for _ in range(5):
        found[0].step()
    found[2].change_at(1, prompt="a red ball", recompute=True)
    return found


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("units", ["frame", "cube:2x2x1/wavefront", "key-detail:3"])
def test_streams_side_by_side_are_those_alone(units: str, guidance: float) -> None:
    """To the bit, on a processor, at different places, with guidance, and with fewer passes."""
    pipe, asked = tiny_pipeline(), []
    options: dict[str, Any] = {"units": units, "guidance_scale": guidance, "window_frames": 4}
    together, alone = _sessions(pipe, **options), _sessions(pipe, **options)
    pipe.transformer.register_forward_hook(lambda *_: asked.append(1))
    for _ in range(16):
        sessions = dict(enumerate(together))
        due = [session.generation.due() for session in sessions.values()]
        finished = side_by_side([sampler for sampler in due if sampler is not None])
        before = len(asked)
        for session, other, unit in zip(together, alone, finished, strict=True):
            ours, theirs = session.step(unit), other.step()
            assert ours is not None
            assert theirs is not None
            assert ours[0].index == theirs[0].index
            assert (ours[1] is None) == (theirs[1] is None)
            assert ours[1] is None or np.array_equal(ours[1], theirs[1])
        del asked[before:]
    shared = len(asked)
    assert shared < 0.75 * sum(session.generation.stats.passes for session in alone)
