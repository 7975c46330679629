"""From a prompt to frames: streams, seeds, saved states, limits, and schemes of one's own."""

import inspect
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import Plan, recomputed
from safetensors.torch import load, save
from tiny import MODEL, SCHEMES, TEXT, tiny_pipeline, tiny_transformer

from videoar.core.flow import sigma_steps
from videoar.core.loss import FlowMatchingConfig
from videoar.core.sampler import Sampler, SamplerConfig
from videoar.core.schemes import Cells, Scheme, box, parse
from videoar.core.tokens import to_latents, to_tokens
from videoar.core.units import Units, Visible
from videoar.encoders.text_encoder import TextEncoder
from videoar.generation.config import GenerationConfig
from videoar.generation.pipeline import VideoPipeline
from videoar.training.objectives import FlowMatching, TextToVideo

PROMPT = "a red ball"


@pytest.fixture(scope="module")
def pipe() -> VideoPipeline:
    """Prompt to frames in milliseconds."""
    return tiny_pipeline()


# ---------------------------------------------------------------- streams


@pytest.mark.parametrize("units", SCHEMES)
def test_a_stream_shows_what_a_clip_saves_bit_for_bit(pipe, units: str) -> None:
    """Frames arrive as they are finished, and never change afterwards."""
    segment = parse(units).frames
    num_frames = 1 + 4 * (4 * segment - 1)  # whole segments
    clip = pipe(PROMPT, num_frames=num_frames, seed=3, units=units).frames
    assert len(clip) == num_frames
    endless = pipe.stream(PROMPT, seed=3, units=units)
    shown = np.concatenate(list(itertools.islice(endless, 4)))
    assert len(shown) <= num_frames
    assert np.array_equal(shown, clip[: len(shown)])


@pytest.mark.parametrize("units", SCHEMES)
@pytest.mark.parametrize("num_frames", [1, 2, 5, 18])
def test_a_clip_has_the_frames_that_were_asked_for(pipe, units: str, num_frames: int) -> None:
    """Also where they do not fill the last latent frame or the last segment."""
    assert len(pipe(PROMPT, num_frames=num_frames, units=units).frames) == num_frames


@pytest.mark.parametrize(
    "options", [{}, {"lag": 1}, {"guidance_scale": 2.0, "context_noise": 0.1}, {"lag": 0}]
)
@pytest.mark.parametrize("units", ["frame", "key-detail:3", "cube:2x2x1/wavefront"])
def test_a_saved_generation_goes_on_as_if_never_stopped(pipe, units: str, options: dict) -> None:
    """Through a file, at any frame: sampler, half-finished frames and the codec's memory."""

    def begin():
        return pipe.generate(
            [PROMPT, "a blue square"], num_frames=41, seeds=[0, 1], units=units, **options
        )

    whole = list(begin())
    for stop in (1, len(whole) - 1):
        first, second = begin(), begin()
        parts = list(itertools.islice(first, stop))
        second.load_state_dict(load(save(first.state_dict())))
        parts += second
        assert np.array_equal(np.concatenate(parts, axis=1), np.concatenate(whole, axis=1))
        assert second.stats.frames == 41


def test_the_memory_of_a_stream_does_not_grow(pipe) -> None:
    """A minute must fit where a second fits."""
    generation = pipe.generate([PROMPT], num_frames=None, seeds=[0], units="cube:1x2x2")
    states = [
        sum(tensor.nbytes for tensor in generation.state_dict().values())
        for _ in itertools.islice(generation, 24)
    ]
    assert max(states[8:]) == max(states[16:]) == max(states)


# ---------------------------------------------------------------- seeds and batches


def test_the_same_seed_is_the_same_video_and_another_is_not(pipe) -> None:
    """A seed is a name for a video: nothing else random may have a part in it."""
    first = pipe(PROMPT, num_frames=9, seed=5).frames
    torch.randn(7)
    assert np.array_equal(pipe(PROMPT, num_frames=9, seed=5).frames, first)
    assert not np.array_equal(pipe(PROMPT, num_frames=9, seed=6).frames, first)
    assert not np.array_equal(pipe("a blue square", num_frames=9, seed=5).frames, first)


def test_a_batch_is_its_videos_one_by_one(pipe) -> None:
    """Up to rounding, and one grey level of it."""
    prompts, seeds = [PROMPT, "a blue square"], [4, 9]
    options = {"num_frames": 17, "guidance_scale": 1.5, "negative_prompt": "moves"}
    both = np.concatenate(list(pipe.generate(prompts, seeds=seeds, **options)), axis=1)
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = pipe(prompt, seed=seed, **options).frames
        assert np.abs(alone.astype(int) - both[row].astype(int)).max() <= 1


def test_guidance_of_one_is_none_and_more_leads_away(pipe) -> None:
    """At 1 the second pass would be for nothing; above, the negative prompt counts."""
    plain = pipe(PROMPT, num_frames=5).frames
    with pytest.raises(ValueError, match="guidance_scale is 1, which is none: raise it, or leave"):
        pipe(PROMPT, num_frames=5, negative_prompt="left")
    leading = replace(pipe, sampling=replace(pipe.sampling, negative_prompt="left"))
    assert np.array_equal(leading(PROMPT, num_frames=5).frames, plain)  # a default, not asked for
    guided = [
        pipe(PROMPT, num_frames=5, guidance_scale=3.0, negative_prompt=negative).frames
        for negative in ("", "left")
    ]
    assert not np.array_equal(guided[0], plain)
    assert not np.array_equal(guided[0], guided[1])


def test_frames_per_second_are_those_that_were_asked_for(pipe) -> None:
    """The rate is a field like the others, and goes into the file."""
    assert pipe(PROMPT, num_frames=1).fps == 16
    assert pipe(PROMPT, num_frames=1, fps=8).fps == 8


def test_a_saved_pipeline_generates_the_same(pipe, tmp_path: Path) -> None:
    """Weights, words and defaults are all in the folder."""
    changed = replace(pipe, sampling=replace(pipe.sampling, units="chunk:2", sink_frames=0, lag=1))
    loaded = VideoPipeline.from_pretrained(changed.save_pretrained(tmp_path / "tiny"))
    assert loaded.sampling == changed.sampling
    ours, theirs = (each(PROMPT, num_frames=17, seed=2).frames for each in (changed, loaded))
    assert np.array_equal(ours, theirs)


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("units", SCHEMES)
@pytest.mark.parametrize(("window", "sink"), [(4, 1), (6, 2), (8, 4), (3, 3), (9, 0)])
def test_a_unit_reads_no_more_frames_than_the_window(units: str, window: int, sink: int) -> None:
    """The window bounds memory and was trained: its own frames and the sinks are part of it."""
    lattice = Units(parse(units), 24, 2, 2)
    visible = GenerationConfig(window_frames=window, sink_frames=sink).visible(lattice)
    assert visible.window % lattice.units_per_segment == 0
    assert visible.sink % lattice.units_per_segment == 0
    segment = lattice.segment_frames
    kept = set(range(min(sink, window - segment) // segment * segment))
    seen = visible.matrix(torch.arange(lattice.count), lattice.waves)
    for reader in lattice:
        frames = {
            cell[0] for read in lattice if seen[reader.index, read.index] for cell in read.cells
        }
        last_of_segment = (reader.index + 1) % lattice.units_per_segment == 0
        if last_of_segment:
            assert len(frames) <= window
            assert frames >= {frame for frame in kept if frame < max(frames)}


def test_no_window_means_everything_before() -> None:
    """None is no limit."""
    lattice = Units(parse("frame"), 9, 2, 2)
    assert GenerationConfig(window_frames=None).visible(lattice) == Visible()


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "num_frames is 0: use 1 or more"),
        ({"num_frames": -3}, "num_frames is -3"),
        ({"seeds": [-1]}, "seed is -1: use 0 to"),
        ({"seeds": [2**63]}, "seed is 9223372036854775808"),
        ({"seeds": [1, 2]}, "1 prompts and 2 seeds"),
        ({"prompts": [""]}, "prompt is empty"),
        ({"prompts": [" \n\t"]}, "prompt is empty"),
        ({"prompts": ["x" * 10_000]}, "10000 characters: shorten it to 2000"),
        ({"prompts": ["ball " * 300]}, "tokens, but the limit is 24: shorten it"),
        ({"negative_prompt": "x" * 10_000}, "10000 characters"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"shift": float("nan")}, "shift is nan"),
        ({"lag": 3}, "lag is 3: use 0 to 2"),
        ({"lag": -1}, "lag is -1"),
        ({"num_frames": None, "lag": 0}, "lag of 1 or more"),
        ({"context_noise": 1.0}, "context_noise is 1.0"),
        ({"sink_frames": -1}, "sink_frames is -1"),
        ({"window_frames": 0}, "window of 0 latent frames is smaller than one unit"),
        ({"window_frames": 2, "units": "chunk:3"}, "use a window of 3 or more"),
        ({"units": "cube:2x2"}, "Unknown units 'cube:2x2'"),
        ({"units": "frames"}, "Did you mean frame"),
        ({"units": "full", "num_frames": None}, "endless"),
    ],
)
def test_an_argument_out_of_its_limits_is_refused(pipe, options: dict, message: str) -> None:
    """One sentence with the value and the limit, before anything is computed."""
    arguments = {"prompts": [PROMPT], "num_frames": 41, "seeds": [0], **options}
    with pytest.raises(ValueError, match=message) as caught:
        pipe.generate(arguments.pop("prompts"), **arguments)
    assert "\n" not in str(caught.value)


def test_damaged_weights_do_not_make_a_video() -> None:
    """Frames of NaN are grey or black; hours of them would look like a finished job."""
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.transformer.proj_out.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"latents of unit \d are not finite"):
        pipe("a ball", num_frames=5)


def test_an_unknown_argument_is_refused(pipe) -> None:
    """A typing error must not pass as an option without effect."""
    with pytest.raises(TypeError, match="num_steps"):
        pipe(PROMPT, num_frames=1, num_steps=3)


def test_a_stream_refuses_at_once(pipe) -> None:
    """Not when the first frame is asked for, perhaps in another thread."""
    with pytest.raises(ValueError, match="seed is -1"):
        pipe.stream(PROMPT, seed=-1)


# ---------------------------------------------------------------- a new scheme


@dataclass(frozen=True)
class _Checkerboard(Scheme):
    """Dark squares first, in one wave of single cells per colour; then light ones as one unit."""

    frames: int = 2

    def segment(self, frames: int, height: int, width: int) -> list[list[Cells]]:
        cells = box(range(frames), range(height), range(width))
        dark = [(cell,) for cell in cells if sum(cell[:3]) % 2 == 0]
        light = tuple(cell for cell in cells if sum(cell[:3]) % 2)
        return [dark, [light]] if light else [dark]


@pytest.mark.parametrize("frames", [4, 5])
def test_a_new_scheme_works_everywhere(pipe, frames: int) -> None:
    """Units, latents, mask, cache, sampler, loss and streaming read the partition alone.

    Were there a branch on the kind of unit anywhere, this scheme would fail there.
    """
    assert len(inspect.getsource(_Checkerboard).splitlines()) <= 15
    units = Units(_Checkerboard(), frames, 3, 4)
    latents = torch.randn(2, frames, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_latents(to_tokens(latents, units), units), latents)

    model = tiny_transformer()
    with torch.inference_mode():
        words = torch.randn(1, 3, MODEL.text_dim, generator=torch.Generator().manual_seed(1))
        text = model.encode_text(words)
        for lag, window in itertools.product((2, 1, 0), (None, 9)):
            plan = Plan(sigmas=sigma_steps(2), lag=lag, window=window)
            config = SamplerConfig(sigmas=plan.sigmas, lag=lag, visible=Visible(window=window))
            parts = list(Sampler(model, units, text, config, seeds=(7,)))
            cached = torch.cat([part.tokens for part in parts], dim=1)
            expected = recomputed(model, units, text, plan, seeds=(7,))
            torch.testing.assert_close(cached, expected, atol=2e-5, rtol=1e-4)

    module = TextToVideo(tiny_transformer(), TextEncoder(TEXT))
    objective = FlowMatching(module, schemes=(_Checkerboard(),), config=FlowMatchingConfig())
    batch = {"latents": latents, "text": torch.ones(2, 3, dtype=torch.long)}
    loss = objective.loss(batch, torch.Generator().manual_seed(0))["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in module.transformer.parameters())

    clip = pipe(PROMPT, num_frames=13, units=_Checkerboard()).frames
    stream = pipe.stream(PROMPT, units=_Checkerboard(), num_frames=13)
    assert np.array_equal(np.concatenate(list(stream)), clip)
    endless = list(itertools.islice(pipe.stream(PROMPT, units=_Checkerboard()), 2))
    assert np.array_equal(np.concatenate(endless), clip)


def test_a_kind_of_unit_has_its_own_steps_unless_others_are_named() -> None:
    """Distilled cubes lose nothing in one step where frames do; who names steps means them."""
    pipe = tiny_pipeline()
    pipe.sampling = replace(pipe.sampling, unit_steps={"frame": 1, "cube:1x2x2": 3})

    def steps(**how: Any) -> int:
        generation = pipe.generate(["a ball"], num_frames=9, seeds=[0], **how)
        return generation.sampler.config.num_steps

    assert [steps(units=name) for name in ("frame", "cube:1x2x2", "chunk:2")] == [1, 3, 2]
    assert steps(units="frame", num_inference_steps=4) == 4
    assert steps(units=parse("frame")) == 1
    with pytest.raises(ValueError, match="unit_steps of frame is 0"):
        replace(pipe.sampling, unit_steps={"frame": 0})
