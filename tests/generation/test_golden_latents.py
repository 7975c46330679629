"""What the bundled checkpoint generates, unit by unit, is what it generated before."""

from collections.abc import Callable, Sequence

import pytest
import torch

from videoar.core.schemes import KINDS
from videoar.generation.pipeline import VideoPipeline


@pytest.mark.golden
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("units", [*KINDS, "cube:2x2x2/wavefront", "full"])
def test_the_bundled_model_samples_the_stored_latents(
    units: str, scale: float, golden: Callable[[str, Sequence[float]], None]
) -> None:
    """Text, positions, mask, cache, window, sinks and noise meet here; a change of any shows."""
    pipe = VideoPipeline.from_pretrained("toy")
    prompt = "a small red ball moves left on a black background"
    how = {"units": units, "guidance_scale": scale, "window_frames": 5, "sink_frames": 1}
    how["num_inference_steps"] = 4
    generation = pipe.generate([prompt], num_frames=33, seeds=[3], **how)
    numbers: list[float] = []
    with torch.inference_mode():
        finished_units = list(generation.sampler)
    for finished in finished_units:
        tokens = finished.tokens
        numbers += [tokens.mean().item(), tokens.std().item(), tokens.flatten()[0].item()]
    golden(f"latents-{units.replace('/', '-')}-{scale:g}", numbers)
