"""Sessions: what follows is changed while it comes, and no moment of it is lost."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SCHEMES, tiny_pipeline

from videoar.checks import Note
from videoar.generation.latents import known_tokens
from videoar.generation.pipeline import VideoPipeline
from videoar.generation.session import Session
from videoar.generation.state import packed, unpacked

PROMPT, OTHER = "a red ball", "a blue square"
GUIDED = {"guidance_scale": 2.0, "negative_prompt": "moves", "context_noise": 0.1}


@pytest.fixture(scope="module")
def pipe() -> VideoPipeline:
    """Prompt to frames in milliseconds, with sinks that move."""
    return tiny_pipeline()


def _take(session: Session, count: int) -> list:
    return list(itertools.islice(session, count))


def _frames(parts: list) -> np.ndarray:
    return np.concatenate(parts)


# ---------------------------------------------------------------- changes


@pytest.mark.parametrize(
    ("units", "how"), [*zip(SCHEMES, itertools.cycle([{}, {"recompute": True}, {"over": 3}]))]
)
def test_a_new_prompt_holds_from_the_next_unit_on(pipe, units: str, how: dict) -> None:
    """Not a frame before is another; what follows is, by either way and when blended."""
    plain = pipe.session(PROMPT, units=units)
    changed = pipe.session(PROMPT, units=units)
    for _ in range(5):
        plain.step(), changed.step()
    assert changed.generation.stats.frames == plain.generation.stats.frames
    changed.change(prompt=OTHER, **how)
    assert changed.prompt == OTHER
    tokens = [each.generation.sampler.delivered for each in (plain, changed)]
    assert tokens[0] == tokens[1]
    plain.step(), changed.step()
    units_of = [each.generation.sampler for each in (plain, changed)]
    first, second = (sampler.active[sampler.delivered - 1] for sampler in units_of)
    assert first.shape == second.shape
    assert not np.array_equal(first.numpy(), second.numpy())
    assert not np.array_equal(_frames(_take(plain, 3)), _frames(_take(changed, 3)))


def test_two_prompts_are_blended_unit_by_unit(pipe) -> None:
    """The share of the new one rises evenly, and at the end nothing is left of the old."""
    session = pipe.session(PROMPT, units="frame")
    _take(session, 2)
    session.change(prompt=OTHER, over=4)
    words = [pipe.encode([prompt])[0][0] for prompt in (PROMPT, OTHER)]
    lefts, keys = [], []
    for _ in range(6):
        session.step()
        lefts.append(session.generation.plan.left)
        keys.append(session.generation.sampler.text[0][0])
    assert lefts == [2, 1, 0, 0, 0, 0]
    assert np.array_equal(keys[-1].numpy(), words[1].numpy())
    assert not np.array_equal(keys[0].numpy(), words[0].numpy())


def test_a_blend_goes_on_while_other_units_wait(pipe) -> None:
    """A prompt holds from the next unit on, also if it was asked for with other units."""
    session = pipe.session(PROMPT, units="cube:1x1x1")
    for _ in range(3):
        session.step()
    session.change(prompt=OTHER, over=4, units="frame")
    seen = []
    for _ in range(16):
        session.step()
        seen.append((session.generation.plan.left, session.generation.plan.options.units))
    assert seen[:4] == [(2, "cube:1x1x1"), (1, "cube:1x1x1"), (0, "cube:1x1x1"), (0, "cube:1x1x1")]
    assert seen[12:] == [(0, "cube:1x1x1"), *[(0, "frame")] * 3]  # 16 units are a segment
    assert session.units == "frame"


@pytest.mark.parametrize(
    ("units", "after"), [*zip(SCHEMES, SCHEMES[3:] + SCHEMES[:3], strict=True)]
)
def test_other_units_begin_with_the_next_segment(pipe, units: str, after: str) -> None:
    """Frame after frame without a gap; nothing that was shown is shown again."""
    session, plain = (pipe.session(PROMPT, units=units) for _ in range(2))
    begun = [[done[1][0]] if done[1] is not None else [] for done in (session.step(), plain.step())]
    session.units = after
    shown, usual = (
        _frames(parts + _take(each, 6)) for parts, each in zip(begun, (session, plain), strict=True)
    )
    assert session.generation.plan.options.units == after
    assert session.generation.wanted is None
    count = min(len(shown), len(usual))
    segment = 4 * pipe.lattice(units, None).segment_frames - 3
    assert np.array_equal(shown[:segment], usual[:segment])
    assert units == after or not np.array_equal(shown[:count], usual[:count])
    assert session.generation.sampler.units.scheme.name == after
    assert session.generation.stats.frames == len(shown)


def test_a_stretch_knows_what_a_unit_reads_and_no_more(pipe) -> None:
    """The sinks and the newest frames, side by side, as the cache holds them when they move."""
    session = pipe.session(PROMPT, units="frame", window_frames=6, sink_frames=2)
    _take(session, 12)
    past = session.generation._past
    assert sorted(past) == [0, 1, *range(6, 12)]
    session.units = "chunk:2"
    session.step()
    sampler = session.generation.sampler
    known = [sampler.known[unit].tokens for unit in range(2)]
    assert len(sampler.known) == 2  # 2 of sinks, and 4 in the window of which the unit has 2
    again = pipe.session(PROMPT, units="frame", window_frames=6, sink_frames=2)
    _take(again, 12)
    assert all(tokens.isfinite().all() for tokens in known)


def test_a_recomputed_cache_is_that_of_a_video_that_began_so(pipe) -> None:
    """With all in the window: keys of the same frames under the new words, no trace of the old."""
    session = pipe.session(PROMPT, units="frame", window_frames=None)
    _take(session, 3)
    session.change(prompt=OTHER, recompute=True)
    session.step()
    ours = session.generation.sampler
    other = pipe.session(OTHER, units="frame", window_frames=None)
    generation = other.generation
    generation.sampler.hold(ours.known)
    for _ in range(4):
        generation.step()
    kept = ours.cache.state_dict()["kv"]
    theirs = generation.sampler.cache.state_dict()["kv"]
    assert np.allclose(kept.numpy(), theirs[..., : kept.shape[-2], :].numpy(), atol=1e-5)


@pytest.mark.parametrize("units", SCHEMES)
def test_a_new_prompt_is_read_with_the_last_frames_alone(pipe, units: str) -> None:
    """What is begun of a segment stays behind whole ones; nothing else of a change does that."""
    session = pipe.session(PROMPT, units=units, recall_frames=1)
    _take(session, 5)
    session.step()
    generation, before = session.generation, session.generation.sampler
    session.change(seed=4)
    session.step()
    assert generation.sampler is before
    whole, length, begun = generation._whole, before.units.segment_frames, len(generation._open)
    kept = [*range(whole - (length if begun else 1), whole)]
    last = torch.cat([generation._past[t] for t in kept], dim=1)
    session.change(prompt=OTHER)
    again = session.branch()
    session.step()
    sampler = generation.sampler
    assert generation.kept == kept
    found = known_tokens(last, sampler.units, patch=2)
    assert len(sampler.known) == len(found) + begun
    for unit, known in found.items():
        assert torch.equal(sampler.known[unit].tokens, known.tokens)
    again.step()
    assert np.array_equal(_frames(_take(session, 4)), _frames(_take(again, 4)))


@pytest.mark.parametrize("how", [{"recompute": False}, {"over": 3}])
def test_a_new_prompt_is_read_with_the_cache_if_that_is_said(pipe, how: dict) -> None:
    """What is asked for wins over what the checkpoint does by default."""
    found = []
    for recall in (None, 1):
        session = pipe.session(PROMPT, units="frame", recall_frames=recall)
        _take(session, 5)
        session.change(prompt=OTHER, **how)
        found.append(_frames(_take(session, 5)))
    assert np.array_equal(*found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"recall_frames": 0}, "recall_frames is 0"),
        ({"prompt": "x" * 3000}, "3000 characters: shorten"),
        ({"prompt": OTHER, "over": 0}, "over is 0: use 1 to 1000 units"),
        ({"units": "frames"}, "Did you mean frame"),
        ({"units": "full"}, "endless"),
        ({"units": "chunk:7"}, "use a window of 7 or more"),
        ({"seed": -1}, "seed is -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"fps": 8}, "fps is 8: use the rate that it began with"),
    ],
)
def test_a_wrong_change_is_refused_and_changes_nothing(pipe, change: dict, message: str) -> None:
    """At once, in a sentence; the stream goes on as if it had not been asked."""
    session, plain = (pipe.session(PROMPT, units="frame") for _ in range(2))
    _take(session, 2), _take(plain, 2)
    with pytest.raises(ValueError, match=message):
        session.change(**change)
    with pytest.raises(ValueError, match=message):
        session.change_at(9.0, **change)
    assert np.array_equal(_frames(_take(session, 3)), _frames(_take(plain, 3)))


def test_a_change_in_the_past_is_refused(pipe) -> None:
    """It would hold at once, which is not what was asked for."""
    session = pipe.session(PROMPT, units="frame")
    _take(session, 3)
    with pytest.raises(ValueError, match="frame is 8: use 9, those that there are, or more"):
        session.change_at(0.5, prompt=OTHER)


def test_a_script_is_the_changes_made_by_hand(pipe) -> None:
    """At its moments, in a stream and in a clip, bit for bit."""
    by_hand = pipe.session(PROMPT, units="frame")
    shown = []
    for frames in by_hand:
        shown.append(frames)
        if by_hand.generation.stats.frames == 17:
            by_hand.prompt = OTHER
        if by_hand.generation.stats.frames == 33:
            by_hand.units = "chunk:2"
        if by_hand.seconds >= 4:
            break
    clip = pipe.session(PROMPT, units="frame", num_frames=65)
    clip.change_at(1.0, prompt=OTHER)
    clip.change_at(2.0, units="chunk:2")
    assert np.array_equal(_frames(list(clip)), _frames(shown)[:65])
    assert clip.generation.stats.frames == 65


# ---------------------------------------------------------------- states


MANY = ((0.5, {"prompt": OTHER, "over": 2}), (0.8, {"units": "cube:1x2x2"}))
RECOMPUTED = (1.2, {"prompt": PROMPT, "recompute": True})


@pytest.mark.parametrize(
    ("units", "options", "changes"),
    [
        *(
            (units, options, (*MANY, RECOMPUTED))
            for units, options in zip(
                SCHEMES, itertools.cycle([{}, GUIDED, {"lag": 1}, {"first_steps": (4, 3)}])
            )
        ),
        *((units, {"recall_frames": 1}, (MANY[0], RECOMPUTED)) for units in SCHEMES),
    ],
)
def test_a_saved_session_goes_on_bit_for_bit(
    pipe, units: str, options: dict, changes: tuple, tmp_path: Path
) -> None:
    """Between any two units, in the middle of all changes, through a file and another pipeline."""

    def begin() -> Session:
        session = pipe.session(PROMPT, num_frames=33, units=units, **options)
        for second, change in changes:
            session.change_at(second, **change)
        return session

    whole = _frames(list(begin()))
    assert len(whole) == 33
    first, other = begin(), tiny_pipeline()
    parts: list = []
    for index in itertools.count():
        done = first.step()
        if done is None:
            break
        parts += [] if done[1] is None else [done[1][0]]
        if index % 7 == 1:
            first = other.resume(first.save(tmp_path / "state", overwrite=True))
    assert np.array_equal(_frames(parts), whole)


def test_a_session_that_began_with_a_picture_goes_on(pipe, tmp_path: Path) -> None:
    """What is known and not yet shown is in the state."""
    picture = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)

    def begin() -> Session:
        return pipe.session(PROMPT, num_frames=25, units="chunk:2", video=picture)

    whole, session = _frames(list(begin())), begin()
    parts = _take(session, 1)
    parts += list(pipe.resume(session.save(tmp_path / "state")))
    assert np.array_equal(_frames(parts), whole)
    assert np.array_equal(whole[:9], picture)


@pytest.mark.parametrize("units", ["frame", "key-detail:3", "cube:2x2x1/wavefront"])
def test_a_branch_leaves_its_origin_alone(pipe, units: str) -> None:
    """Both go on from the same moment, each on its own."""
    plain = _frames(_take(pipe.session(PROMPT, units=units), 12))
    session = pipe.session(PROMPT, units=units)
    shown = _take(session, 5)
    branch = session.branch()
    branch.prompt = OTHER
    other = shown + _take(branch, 7)
    assert np.array_equal(_frames(shown + _take(session, 7)), plain)
    count = len(_frames(shown))
    assert np.array_equal(_frames(other)[:count], plain[:count])
    assert not np.array_equal(_frames(other)[: len(plain)], plain)


def test_a_branch_has_the_size_of_its_origin(pipe) -> None:
    """The size that was asked for is in the state; the checkpoint has another."""
    session = pipe.session(PROMPT, units="frame", height=32, width=48)
    _take(session, 2)
    branch = session.branch()
    assert np.array_equal(_frames(_take(branch, 2)), _frames(_take(session, 2)))
    assert _frames(_take(branch, 1)).shape[1:] == (32, 48, 3)


def test_back_is_bit_for_bit_and_another_way_can_be_taken(pipe) -> None:
    """The newest kept point at or before the moment; what came after it is forgotten."""
    session = pipe.session(PROMPT, units="frame")
    shown = _frames(_take(session, 20))
    session.change(units="chunk:2", prompt=OTHER)
    _take(session, 4)
    session.seek(2.5)
    begin = session.generation.stats.frames
    assert 16 < begin <= 40
    assert (session.units, session.prompt) == ("frame", PROMPT)
    assert np.array_equal(_frames(_take(session, 5)), shown[begin : begin + 20])
    session.seek(0)
    session.prompt = OTHER
    again = _frames(_take(session, 3))
    assert np.array_equal(again, _frames(_take(pipe.session(OTHER, units="frame"), 3)))


def test_what_is_kept_to_go_back_is_bounded(pipe) -> None:
    """In bytes, whatever the length; a moment that is gone is refused with those that are there."""
    session = pipe.session(PROMPT, units="frame")
    session.kept_bytes = 900_000
    _take(session, 60)
    held = sum(t.nbytes for _, state in session._kept for t in state.values())
    assert 500_000 < held <= session.kept_bytes
    with pytest.raises(ValueError, match=r"1 s is not kept: go back to \d+\.\d to 14\.8 s"):
        session.seek(1)
    with pytest.raises(ValueError, match="99 s is not kept"):
        session.seek(99)


def _units(pipe):
    return pipe.generate([PROMPT], num_frames=41, seeds=[0], units="chunk:2")


def _batch(pipe):
    return pipe.generate([PROMPT] * 2, num_frames=41, seeds=[0, 1], units="frame")


def _model(pipe):
    other = tiny_pipeline(seed=1)
    return other.generate([PROMPT], num_frames=41, seeds=[0], units="frame")


def _length(pipe):
    return pipe.generate([PROMPT], num_frames=45, seeds=[0], units="frame")


def _prompt(pipe):
    return pipe.generate([OTHER], num_frames=41, seeds=[0], units="frame")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (_units, r"begun.options.units = frame, but chunk:2 is asked for: keep the old value"),
        (_batch, r"begun.prompts = \['a red ball'\], but"),
        (_model, r"codec = .* is asked for"),
        (_length, "num_frames = 41, but 45"),
        (_prompt, r"begun.prompts = \['a red ball'\], but \['a blue square'\] is asked for"),
    ],
)
def test_the_state_of_another_generation_is_refused(pipe, other: Callable, message: str) -> None:
    """It gave no frames, or an error of torch; it says what it is of."""
    ours = pipe.generate([PROMPT], num_frames=41, seeds=[0], units="frame")
    list(itertools.islice(ours, 2))
    with pytest.raises(ValueError, match=message) as caught:
        other(pipe).load_state_dict(ours.state_dict())
    assert "\n" not in str(caught.value)


def test_a_state_of_an_older_version_goes_on(pipe) -> None:
    """It knew nothing of a field of the sampling, which is at its default."""
    begin = partial(pipe.generate, [PROMPT], num_frames=41, seeds=[0], units="frame")
    state = begin().state_dict()
    held = unpacked(state)
    for plan in (held["about"]["begun"], held["now"]["plan"]):
        del plan["options"]["context_noise"]
    with pytest.warns(Note, match=r"goes on with begun.options.context_noise = 0.0"):
        begin().load_state_dict(state | {"json": packed(held)})


def test_a_session_of_another_model_or_file_is_refused(pipe, tmp_path: Path) -> None:
    """So is a file that is no state."""
    file = pipe.session(PROMPT).save(tmp_path / "state")
    with pytest.raises(ValueError, match=r"codec = .* is asked for"):
        tiny_pipeline(seed=1).resume(file)
    with pytest.raises(ValueError, match="exists already"):
        pipe.session(PROMPT).save(file)
    with pytest.raises(ValueError, match="no state of a generation"):
        pipe.resume({})
    file.write_bytes(b"hello")
    with pytest.raises(ValueError, match="state"):
        pipe.resume(file)


def test_memory_stays_as_it_was(pipe) -> None:
    """With changes and without: cache, past and ring are bounded."""
    session = pipe.session(PROMPT, units="cube:1x2x2")
    session.kept_bytes = 0
    sizes = []
    for index in range(32):
        _take(session, 1)
        if index % 8 == 3:
            session.change(prompt=[PROMPT, OTHER][index // 8 % 2], recompute=True)
        state = session.generation.state_dict()
        sizes.append(sum(tensor.nbytes for name, tensor in state.items() if name != "json"))
    assert max(sizes[10:20]) == max(sizes[20:])


def test_a_misspelt_setting_is_not_taken(pipe) -> None:
    """It would change nothing, and nobody would know."""
    session = pipe.session("a ball", num_frames=5)
    with pytest.raises(AttributeError, match="prompts"):
        session.prompts = "a square"
    with pytest.raises(TypeError, match="no keyword 'promt'; did you mean prompt"):
        session.change(promt="a square")
    with pytest.raises(TypeError, match="no keyword 'dtyp'; did you mean dtype"):
        VideoPipeline.from_pretrained("toy", dtyp="float32")
    with pytest.raises(TypeError, match="no keyword 'steps'; did you mean num_inference_steps"):
        pipe("a ball", steps=2)
