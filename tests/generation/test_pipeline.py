"""From a prompt to frames: streams, seeds, saved states, limits, and schemes of one's own."""

import inspect
import itertools
from dataclasses import dataclass, replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import Plan, recomputed, to_latents
from safetensors.torch import load, save
from tiny import MODEL, SCHEMES, TEXT, tiny_pipeline, tiny_transformer

from videoar.checks import Note
from videoar.core.flow import sigma_steps
from videoar.core.loss import FlowMatchingConfig
from videoar.core.sampler import Sampler, SamplerConfig
from videoar.core.schemes import Cells, Scheme, box, parse
from videoar.core.tokens import to_tokens
from videoar.core.units import Units, Visible
from videoar.encoders.codec import to_frames
from videoar.encoders.text_encoder import TextEncoder
from videoar.generation.config import GenerationConfig
from videoar.generation.pipeline import VideoPipeline
from videoar.generation.progress import Progress
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
    endless = pipe.stream(PROMPT, seed=3, units=units)
    shown = np.concatenate(list(itertools.islice(endless, 4)))
    for num_frames in (1, 10, 1 + 4 * (4 * segment - 1)):  # also where the last unit is cut
        clip = pipe(PROMPT, num_frames=num_frames, seed=3, units=units).frames
        assert len(clip) == num_frames
        both = min(len(shown), num_frames)
        assert np.array_equal(shown[:both], clip[:both])


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


def test_several_prompts_give_several_videos(pipe) -> None:
    """Each is the video of its prompt and seed, in the order of the prompts."""
    prompts, how = [PROMPT, "a blue square"], {"num_frames": 5, "seed": 4}
    four = pipe(prompts, num_videos_per_prompt=2, **how)
    assert [video.seed for video in four] == [4, 5, 6, 7]
    for video, prompt in zip(four, [PROMPT, PROMPT, "a blue square", "a blue square"], strict=True):
        alone = pipe(prompt, num_frames=5, seed=video.seed).frames
        assert np.abs(alone.astype(int) - video.frames.astype(int)).max() <= 1
    assert len(pipe([PROMPT], **how)) == 1
    assert [v.seed for v in pipe(prompts, num_frames=1, seed=[9, 3])] == [9, 3]
    for given, message in (
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt is 0: use 1 or more"),
        ({"seed": [1]}, "2 prompts and 1 seeds"),
        ({"output_type": "mp4"}, "output_type is mp4: use one of video, np, pil, pt, latent"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(prompts, num_frames=1, **given)


def test_a_seed_may_be_drawn_and_is_reported(pipe) -> None:
    """By a generator, whose state moves on as in diffusers, or by torch; a seed repeats it."""
    rng = torch.Generator().manual_seed(0)
    first, second = (pipe(PROMPT, num_frames=5, generator=rng) for _ in range(2))
    assert first.seed != second.seed
    again = pipe(PROMPT, num_frames=5, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(first.frames, again.frames)
    drawn = pipe(PROMPT, num_frames=5, seed=None)
    assert np.array_equal(pipe(PROMPT, num_frames=5, seed=drawn.seed).frames, drawn.frames)
    with pytest.raises(ValueError, match="seed and generator both"):
        pipe(PROMPT, generator=rng, seed=3)


def test_the_output_has_the_type_that_was_asked_for(pipe) -> None:
    """As diffusers' pipelines give it: floats in [0, 1], tensors with channels first, latents."""
    video = pipe(PROMPT, num_frames=6)
    floats, tensor, pictures, latents = (
        pipe(PROMPT, num_frames=6, output_type=kind) for kind in ("np", "pt", "pil", "latent")
    )
    assert np.array_equal((floats * 255).round().astype(np.uint8), video.frames)
    assert torch.equal(tensor, torch.from_numpy(floats).permute(0, 3, 1, 2))
    assert np.array_equal(np.stack(list(map(np.asarray, pictures))), video.frames)
    decoded = to_frames(pipe.codec.decode(latents[None]))[0]
    assert np.array_equal(decoded[:6], video.frames)


def test_a_callback_hears_and_may_change_every_step(pipe) -> None:
    """It gets what diffusers gives it: pipeline, step, timestep, and a dict to change."""
    heard = []

    def callback(its_pipe, step, timestep, values):
        heard.append((its_pipe is pipe, step, timestep, values["unit"]))
        return {"latents": torch.zeros_like(values["latents"])}

    how = {"num_frames": 5, "units": "frame", "output_type": "latent"}
    assert not pipe(PROMPT, callback_on_step_end=callback, **how).any()
    sigmas = sigma_steps(2, shift=5.0)
    assert heard == [(True, k, 1000 * sigmas[k], unit) for unit in (0, 1) for k in (0, 1)]
    plain = pipe(PROMPT, **how)
    assert torch.equal(pipe(PROMPT, callback_on_step_end=lambda *_: None, **how), plain)


def test_a_size_may_be_asked_for(pipe) -> None:
    """The checkpoint's own is a default, and stays what it was."""
    video = pipe(PROMPT, num_frames=5, height=32, width=48)
    assert video.frames.shape == (5, 32, 48, 3)
    assert (pipe.height, pipe.width) == (64, 64)
    with pytest.raises(ValueError, match="height is 0 pixels"):
        pipe(PROMPT, height=0)


def test_a_pipeline_moves_and_says_what_it_is() -> None:
    """On one screen; a video does, too, and shows itself in a notebook."""
    pipe = tiny_pipeline()
    assert pipe.to("cpu", torch.bfloat16) is pipe
    assert pipe.transformer.proj_out.weight.dtype == torch.bfloat16
    assert pipe(PROMPT, num_frames=1).frames.shape == (1, 64, 64, 3)
    pipe.to(torch.float32)
    assert next(pipe.prompt_encoder.encoder.parameters()).dtype == torch.float32
    with pytest.raises(ValueError, match="choose the dtype"):
        pipe.to(torch.int8)
    assert "prompt_encoder       TinyPromptEncoder" in repr(pipe)
    assert len(repr(pipe).splitlines()) < 24
    video = pipe(PROMPT, num_frames=8, seed=3)
    assert repr(video) == "<Video: 8 frames of 64x64, 0.50 s at 16 fps, seed 3>"
    assert video._repr_html_().startswith("<video")


def test_a_call_shows_how_far_it_is_unless_it_is_told_not_to(pipe, capsys, monkeypatch) -> None:
    """Minutes of silence look like a hang; a log of a thousand lines is no better."""
    monkeypatch.setattr(Progress, "__init__", partialmethod(_eager, Progress.__init__))
    pipe(PROMPT, num_frames=5, units="frame")
    assert capsys.readouterr().err.splitlines()[0].startswith("1 of 4 steps, ")
    quiet = replace(pipe)
    quiet.set_progress_bar_config(disable=True)
    quiet(PROMPT, num_frames=5)
    assert capsys.readouterr().err == ""


def _eager(self, init, file, *, every, disable=False):
    init(self, file, every=0.0, disable=disable)


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


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("heigth", "height"),
        ("num_frame", "num_frames"),
        ("guidance", "guidance_scale"),
        ("Lag", "lag"),
    ],
)
def test_an_unknown_keyword_is_refused_with_the_nearest(pipe, wrong: str, right: str) -> None:
    """A typing error must not pass as an option without effect."""
    with pytest.raises(TypeError, match=f"no keyword '{wrong}'; did you mean {right}\\?"):
        pipe(PROMPT, **{wrong: 3})


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
        return len(generation.sampler.config.sigmas) - 1

    assert [steps(units=name) for name in ("frame", "cube:1x2x2", "chunk:2")] == [1, 3, 2]
    assert steps(units="frame", num_inference_steps=4) == 4
    assert steps(units=parse("frame")) == 1
    with pytest.raises(ValueError, match="unit_steps of frame is 0"):
        replace(pipe.sampling, unit_steps={"frame": 0})


@pytest.mark.parametrize("ask", [VideoPipeline.__call__, VideoPipeline.session])
def test_what_a_model_never_learned_is_said(ask) -> None:
    """In Python as by the command: what it makes of such words and units is chance."""
    pipe = tiny_pipeline()
    pipe.meta = {"words": ["a", "ball"], "units": ["frame"]}
    with pytest.warns(Note) as notes:
        ask(pipe, "a golden ball", num_frames=5, units="chunk:2")
    said = [str(note.message) for note in notes]
    assert said[0] == "the model is not trained on chunk:2, but on frame"
    assert said[1:] == ["in no caption of the model's training: golden"]
    ask(pipe, "A ball", num_frames=5, units="frame")  # says nothing


def test_what_a_model_never_learned_is_said_of_changes() -> None:
    """Of what a stream goes on with, once it is asked for."""
    pipe = tiny_pipeline()
    pipe.meta = {"words": ["a", "ball"], "units": ["frame"]}
    session = pipe.session("a ball", units="frame")
    with pytest.warns(Note, match="training: golden"):
        session.prompt = "a golden ball"
    with pytest.warns(Note, match="not trained on chunk:2"):
        session.change(prompt="a ball", units="chunk:2")
    session.change(prompt="a ball", units="frame")  # says nothing: both are gone


def test_another_size_than_that_of_the_training_is_said() -> None:
    """Once it is known: a converted model tells none."""
    pipe = tiny_pipeline()
    pipe.meta = {"height": pipe.height, "width": pipe.width}
    pipe("a ball", num_frames=1)
    with pytest.warns(Note, match="own videos have 64x64 pixels, not 96x64"):
        pipe("a ball", num_frames=1, width=96)
