"""Units that a router chooses: segment by segment, from what a stream has by then."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import MENU, tiny_pipeline, tiny_router

from videoar.cli.main import main
from videoar.encoders.codec import from_frames
from videoar.generation.pipeline import VideoPipeline
from videoar.generation.router import RouterConfig
from videoar.generation.session import Session

PROMPT = "a red ball"


@pytest.fixture(scope="module")
def pipe() -> VideoPipeline:
    """Prompt to frames in milliseconds, with a router of four kinds of unit."""
    made = tiny_pipeline()
    made.router = tiny_router()
    return made


def frames(session: Session, count: int) -> np.ndarray:
    """The next parts of a stream."""
    return np.concatenate(list(itertools.islice(session, count)))


def chosen(session: Session, segments: int) -> list[str]:
    """What the router chooses for the next segments."""
    found: list[str] = []
    while len(found) < segments:
        begins = not session.generation._open
        session.step()
        found += [session.units] if begins else []
    return found


def test_choices_differ_and_do_not_depend_on_how_the_video_is_asked_for(pipe) -> None:
    """A stream, a clip, and its latents are one video; a longer one begins like a shorter one."""
    session = pipe.session(PROMPT, units="auto")
    assert len(set(chosen(session, 8))) > 1
    clip = pipe(PROMPT, units="auto", num_frames=61, seed=0)
    stream = np.concatenate(list(pipe.stream(PROMPT, units="auto", num_frames=61)))
    endless = frames(pipe.session(PROMPT, units="auto"), 12)
    assert np.array_equal(clip.frames, stream)
    count = min(61, len(endless))
    assert count > 20
    assert np.array_equal(clip.frames[:count], endless[:count])
    latents = pipe(PROMPT, units="auto", num_frames=61, output_type="latent")
    assert latents.shape[0] == 16
    decoded = pipe.codec.decode(latents[None])
    assert np.allclose(127.5 * (decoded[0, 20] + 1), clip.frames[20].transpose(2, 0, 1), atol=2)


@pytest.mark.parametrize("name", MENU)
def test_a_router_that_always_chooses_the_same_changes_nothing(pipe, name: str) -> None:
    """Bit for bit: a choice is a change of units, and none is made where there is none to make."""
    own = tiny_pipeline()
    own.router = tiny_router()
    with torch.no_grad():
        own.router.layers[-1].bias[MENU.index(name)] = 1e6
    session, plain = own.session(PROMPT, units="auto"), pipe.session(PROMPT, units=name)
    assert np.array_equal(frames(session, 5), frames(plain, 5))
    assert set(session.generation.stats.chosen) == {name}


def test_a_choice_is_a_change_made_by_hand(pipe) -> None:
    """There is one way in which units change, and it is told apart by nothing."""
    names = chosen(pipe.session(PROMPT, units="auto"), 7)
    by_hand, shown = pipe.session(PROMPT, units=names[0]), []
    for name in names:
        by_hand.units = name
        done = by_hand.step()
        while done is not None:
            shown += [] if done[1] is None else [done[1][0]]
            done = by_hand.step() if by_hand.generation._open else None
    routed = pipe.stream(PROMPT, units="auto")
    expected = np.concatenate(list(itertools.islice(routed, len(shown))))
    assert np.array_equal(np.concatenate(shown), expected)


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0}, {"lag": 1}])
def test_a_routed_session_goes_on_bit_for_bit(pipe, options: dict, tmp_path: Path) -> None:
    """Saved between any two units, loaded elsewhere: the same choices, and the same frames."""
    whole = frames(pipe.session(PROMPT, num_frames=33, units="auto", **options), 99)
    again = tiny_pipeline()
    again.router = tiny_router()
    for number in range(0, 14, 3):
        session, shown = pipe.session(PROMPT, num_frames=33, units="auto", **options), []
        made = [done for _ in range(number) if (done := session.step()) is not None]
        shown.extend(batch[0] for _, batch in made if batch is not None)
        file = session.save(tmp_path / f"{number}.state")
        resumed = again.resume(file)
        assert resumed.generation.stats.chosen == session.generation.stats.chosen
        shown.extend(resumed)
        assert np.array_equal(np.concatenate(shown), whole)


def test_a_session_changes_to_chosen_units_and_back(pipe) -> None:
    """With the next segment, as to any others; a new prompt leaves the choice to the router."""
    session = pipe.session(PROMPT, units="chunk:2")
    session.step()
    session.units = "auto"
    assert set(chosen(session, 5)) - {"chunk:2"}
    session.prompt = "a blue square"
    session.step()
    assert session.generation.plan.routed
    session.units = "frame"
    assert set(chosen(session, 6)[1:]) == {"frame"}
    assert not session.generation.plan.routed


@pytest.mark.parametrize("change", [{}, {"units": "chunk:2"}, {"recompute": True}])
def test_given_frames_stay_as_they_are(pipe, change: dict) -> None:
    """What a video begins with is known to all that follows, whatever is changed meanwhile."""
    given = np.random.default_rng(0).integers(0, 255, (13, 64, 64, 3), dtype=np.uint8)
    units = {} if change else {"units": "auto"}
    session = pipe.session(PROMPT, video=given, **{"units": "frame"} | units)
    session.step()
    if change:
        session.change(**change)
    chosen(session, 6)
    true = pipe.codec.encode(from_frames(given[None]))
    past = session.generation._past
    assert torch.equal(torch.cat([past[t] for t in range(2)], dim=1), true[:, :2])  # the sinks


# ---------------------------------------------------------------- files and limits


def test_a_router_is_stored_beside_its_checkpoint(pipe, tmp_path: Path, capsys) -> None:
    """And found with it, by every command that takes units."""
    folder = pipe.save_pretrained(tmp_path / "routed")
    loaded = VideoPipeline.from_pretrained(folder)
    assert loaded.router.config == pipe.router.config
    ours, theirs = (each(PROMPT, units="auto", num_frames=21) for each in (pipe, loaded))
    assert np.array_equal(ours.frames, theirs.frames)
    out, model = tmp_path / "auto.mp4", ["--model", str(folder)]
    words = ["generate", PROMPT, "--units", "auto", "--num-frames", "21", "--out", str(out)]
    assert main([*words, *model]) == 0
    assert " units of auto (segments: " in capsys.readouterr().out
    alone = tmp_path / "alone"
    tiny_pipeline().save_pretrained(alone)
    words[-1] = str(tmp_path / "none.mp4")
    assert main([*words, "--model", str(alone)]) == 2
    assert "chosen by a router, and the checkpoint has none" in capsys.readouterr().err
    words = ["study", "units", "--units", "frame", "auto", "--out", str(tmp_path / "study")]
    assert main([*words, "--checkpoint", str(alone)]) == 2
    assert "has none: name units" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [PROMPT, PROMPT], "seeds": [0, 1]}, "number of videos is 2: use 1 at a time"),
        ({"latents": torch.zeros(1)}, "latents is given: use none with the units auto"),
        ({"window_frames": 2}, "smaller than one unit of chunk:3"),
        ({"lag": "trapezoid"}, "another for an endless stream"),
    ],
)
def test_what_cannot_be_chosen_for_is_refused(pipe, options: dict, message: str) -> None:
    """In one sentence, and before anything is computed, for all units of the menu."""
    given = {"prompts": [PROMPT], "seeds": [0], "num_frames": 41, "units": "auto", **options}
    with pytest.raises(ValueError, match=message):
        pipe.generate(**given)


def test_a_state_is_of_one_router(pipe) -> None:
    """Another one would choose otherwise, and none not at all."""
    state = pipe.session(PROMPT, units="auto").generation.state_dict()
    other = tiny_pipeline()
    with pytest.raises(ValueError, match="router"):
        other.resume(state)
    other.router = tiny_router(MENU[::-1])
    with pytest.raises(ValueError, match="router"):
        other.resume(state)


@pytest.mark.parametrize(
    ("menu", "message"),
    [
        (("frame",), "two or more units"),
        (("frame", "chunk:1"), "none twice"),
        (("frame", "full"), "of a number of frames each"),
        (("frame", "frames"), "Did you mean frame"),
    ],
)
def test_a_menu_is_of_units_that_a_stream_can_have(menu: tuple[str, ...], message: str) -> None:
    """A wrong name is said when a router is made, and not when it chooses it."""
    with pytest.raises(ValueError, match=message):
        RouterConfig(menu=menu, latent_channels=4, text_channels=8)
