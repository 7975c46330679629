"""The procedural world repeats for ever, its captions tell all, and its judge reads it back."""

import json
from collections import Counter

import numpy as np
import pytest

from videoar.data.world import (
    BACKGROUNDS,
    COLORS,
    LANE_MOTIONS,
    MOTIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    caption,
    find_path,
    render,
    sample_scene,
)
from videoar.evaluation.judge import Reading, read, score

# Written by hand and apart from the phrase tables of the module: what a reader would look for.
KEYWORDS = {
    "small": {"small", "little", "tiny"},
    "large": {"large", "big", "huge"},
    "ball": {"ball", "disc", "circle"},
    "square": {"square", "box"},
    "triangle": {"triangle"},
    "cross": {"cross", "plus"},
    "left": {"left", "leftwards"},
    "right": {"right", "rightwards"},
    "up": {"moves up", "upwards", "rises", "floats up"},
    "down": {"moves down", "downwards", "falls", "sinks"},
    "bouncing": {"bounces", "bouncing", "hops"},
    "circling": {"in a circle", "circles", "circling", "round and round"},
    "growing": {"grows", "growing", "pulses", "swells"},
    "still": {"still", "not move", "rest"},
    "black": {"black"},
    "white": {"white"},
    "grey": {"grey", "gray"},
    "navy": {"navy"},
} | {color: {color} for color in COLORS}


def a_scene(**changes: str | float) -> Scene:
    """One small red ball at rest on black, or what differs from it."""
    plain = {"shape": "ball", "color": "red", "size": "small", "motion": "still", "x": 32, "y": 44}
    return Scene(things=(Thing(**(plain | changes)),), background="black")


def soften(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Halve the resolution, smooth, tint and add noise: what a lossy codec does, and more."""
    num_frames, size = frames.shape[:2]
    coarse = frames.reshape(num_frames, size // 2, 2, size // 2, 2, 3).mean(axis=(2, 4))
    soft = coarse.repeat(2, axis=1).repeat(2, axis=2)
    for axis in (1, 2):
        soft = (np.roll(soft, 1, axis) + 2 * soft + np.roll(soft, -1, axis)) / 4
    soft = soft * rng.uniform(0.9, 1.05, 3) + rng.normal(0, 8, soft.shape)
    return soft.clip(0, 255).astype(np.uint8)


def mean_scores(readings: list[Reading], scenes: list[Scene]) -> dict[str, float]:
    """Average every score over the scenes."""
    scores = [score(reading, scene) for reading, scene in zip(readings, scenes, strict=True)]
    return {name: float(np.mean([each[name] for each in scores])) for name in scores[0]}


@pytest.mark.parametrize("seconds", [2, 3])
def test_judge_reads_the_world_back(rng: np.random.Generator, seconds: int) -> None:
    """Clips from anywhere in a video are read right: else scores would measure the judge."""
    scenes = [sample_scene(rng) for _ in range(60)]
    starts = rng.integers(100_000, size=len(scenes)).tolist()
    clips = [
        render(scene, num_frames=16 * seconds, start=start)
        for scene, start in zip(scenes, starts, strict=True)
    ]
    for name, share in mean_scores([read(clip) for clip in clips], scenes).items():
        assert share >= 0.98, f"{name}: {share:.3f}"


def test_judge_reads_soft_noisy_clips(rng: np.random.Generator) -> None:
    """Blur, tint and noise of a codec do not mislead the judge: else it would punish codecs."""
    scenes = [sample_scene(rng) for _ in range(60)]
    clips = [soften(render(scene, num_frames=33), rng) for scene in scenes]
    for name, share in mean_scores([read(clip) for clip in clips], scenes).items():
        assert share >= 0.96, f"{name}: {share:.3f}"


@pytest.mark.slow
def test_judge_is_right_in_a_thousand_scenes(rng: np.random.Generator) -> None:
    """No rare pairing of shape, colour, motion and background is misread."""
    scenes = [sample_scene(rng) for _ in range(1000)]
    readings = [read(render(scene, num_frames=32, start=7777)) for scene in scenes]
    for name, share in mean_scores(readings, scenes).items():
        assert share >= 0.99, f"{name}: {share:.3f}"


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("color", COLORS)
def test_every_color_shows_on_every_background(color: str, background: str) -> None:
    """All pairs of colours can be told apart: else some prompts could never be fulfilled."""
    scene = Scene(things=a_scene(color=color, shape="cross").things, background=background)
    reading = read(render(scene, num_frames=24))
    assert reading.background == background
    assert [seen.color for seen in reading.things] == [color]


def test_judge_reads_larger_frames(rng: np.random.Generator) -> None:
    """Sizes and speeds are counted in frames, not pixels, so resolution changes no verdict."""
    scenes = [sample_scene(rng) for _ in range(8)]
    readings = [read(render(scene, num_frames=32, size=128)) for scene in scenes]
    assert set(mean_scores(readings, scenes).values()) == {1.0}


def test_judge_follows_a_thing_across_the_edge() -> None:
    """Two halves at opposite edges are one thing on its way: else drifts would read as two."""
    scene = a_scene(motion="right", shape="square", x=52, y=30)
    (seen,) = read(render(scene, num_frames=32)).things
    assert (seen.shape, seen.motion) == ("square", "right")
    truth = find_path(scene.things[0], np.arange(32) / 16)
    np.testing.assert_allclose(seen.track - seen.track[0], truth - truth[0], atol=0.2)


def test_judge_tells_a_wrong_clip(rng: np.random.Generator) -> None:
    """A clip of another scene scores zero in what differs: else the judge would praise all."""
    shown = a_scene(color="blue", shape="cross", size="large", motion="up")
    scores = score(read(render(shown, num_frames=32)), a_scene())
    assert [scores[name] for name in ("color", "shape", "size", "motion")] == [0, 0, 0, 0]
    assert (scores["background"], scores["count"]) == (1, 1)


def test_score_counts_a_missing_thing_as_wrong() -> None:
    """Half a scene earns half the points, whatever the order of its things."""
    ball, box = a_scene(x=12).things[0], a_scene(x=52, color="cyan", shape="square").things[0]
    reading = read(render(Scene(things=(box,), background="black"), num_frames=24))
    for things in ((ball, box), (box, ball)):
        scores = score(reading, Scene(things=things, background="black"))
        assert scores == {
            "color": 0.5, "shape": 0.5, "motion": 0.5, "size": 0.5, "background": 1.0, "count": 0.0
        }  # fmt: skip


def test_spurious_things_cost_as_much_as_missing_ones() -> None:
    """The right thing among others is a half or a third: else showing every colour would pay."""
    ball, box = a_scene().things[0], a_scene(x=12, color="cyan", shape="square").things[0]
    cross = a_scene(x=12, y=14, color="blue", shape="cross").things[0]
    for things, share in (((ball,), 1), ((box, ball), 1 / 2), ((box, cross, ball), 1 / 3)):
        reading = read(render(Scene(things=things, background="black"), num_frames=24))
        assert len(reading.things) == len(things)
        scores = score(reading, a_scene())
        assert [scores[name] for name in ("color", "shape", "motion", "size")] == [share] * 4
        assert (scores["background"], scores["count"]) == (1, len(things) == 1)


def test_judge_takes_any_pixels(rng: np.random.Generator) -> None:
    """A broken generator gives an empty reading, not a crash in the middle of an evaluation."""
    noise = rng.integers(0, 256, (24, 64, 64, 3)).astype(np.uint8)
    red = np.zeros((24, 64, 64, 3), np.uint8) + np.array(COLORS["red"], np.uint8)
    flicker = np.where(np.arange(24)[:, None, None, None] % 2, red, 0).astype(np.uint8)
    assert read(np.zeros_like(noise)) == Reading(background="black", things=())
    assert read(red) == Reading(background=None, things=())
    assert read(noise).things == ()
    assert len(read(flicker).things) <= 1
    half = np.concatenate([render(a_scene(), num_frames=13), np.zeros((11, 64, 64, 3), np.uint8)])
    assert [seen.motion for seen in read(half).things] == ["still"]


def test_judge_calls_no_jumping_thing_still(rng: np.random.Generator) -> None:
    """A thing that jumps about has no motion: else chaos would score as stillness."""
    places = rng.uniform(0, 64, (32, 2))
    clips = [render(a_scene(x=x, y=y), num_frames=1) for x, y in places]
    (seen,) = read(np.concatenate(clips)).things
    assert (seen.shape, seen.motion) == ("ball", None)


@pytest.mark.parametrize("apart", [20, 31])
def test_judge_gives_no_shape_to_a_double(apart: int) -> None:
    """Two balls of one colour are not a ball: doubling is what weak generators do."""
    clips = [render(a_scene(x=x, y=30), num_frames=32) for x in (16, 16 + apart)]
    (seen,) = read(np.maximum(*clips)).things
    assert seen.shape is None


def test_judge_names_no_motion_in_a_short_clip() -> None:
    """Under 1.5 s a bounce may look like a drift, so the judge says that it cannot tell."""
    (seen,) = read(render(a_scene(motion="left"), num_frames=23)).things
    assert (seen.color, seen.shape, seen.size, seen.motion) == ("red", "ball", "small", None)


def test_a_late_start_shows_the_same_video(rng: np.random.Generator) -> None:
    """Frame k depends on k alone: else windows of a long video would not fit together."""
    for scene in [sample_scene(rng) for _ in range(20)]:
        whole, tail = render(scene, num_frames=40), render(scene, num_frames=15, start=25)
        np.testing.assert_array_equal(whole[25:], tail)


@pytest.mark.parametrize("motion", MOTIONS)
def test_motions_go_on_for_an_hour(motion: str) -> None:
    """After an hour a thing is as far into its motion as at the start: nothing leaves or slows."""
    scene = a_scene(motion=motion, phase=0.25 if motion == "circling" else 0.0)
    period = 16 * 5 * 16  # frames: a multiple of every period, 1.25 s, 2 s and 3.2 s
    first = render(scene, num_frames=32)
    np.testing.assert_array_equal(first, render(scene, num_frames=32, start=45 * period))
    assert [seen.motion for seen in read(first).things] == [motion]


def test_two_things_never_touch(rng: np.random.Generator) -> None:
    """Things keep to their lanes: else blended colours would be neither of the two captioned."""
    pairs = [scene for scene in (sample_scene(rng) for _ in range(400)) if len(scene.things) == 2]
    assert 70 <= len(pairs) <= 130
    for scene in pairs[::3]:
        alone = [Scene(things=(thing,), background="black") for thing in scene.things]
        masks = [render(each, num_frames=64).max(axis=-1) > 5 for each in alone]
        assert not (masks[0] & masks[1]).any(), scene


def test_scenes_show_every_value(rng: np.random.Generator) -> None:
    """Attributes are drawn evenly: a rare one would be learned last and measured badly."""
    scenes = [sample_scene(rng) for _ in range(2000)]
    single = [scene.things[0] for scene in scenes if len(scene.things) == 1]
    double = [thing for scene in scenes if len(scene.things) == 2 for thing in scene.things]
    assert {thing.motion for thing in double} == {m for lane in LANE_MOTIONS.values() for m in lane}
    for name, values in (
        ("shape", SHAPES),
        ("color", COLORS),
        ("size", SIZES),
        ("motion", MOTIONS),
    ):
        counts = Counter(getattr(thing, name) for thing in single)
        assert min(counts[value] for value in values) > 0.7 * len(single) / len(values), name
    counts = Counter(scene.background for scene in scenes)
    assert min(counts[ground] for ground in BACKGROUNDS) > 0.7 * len(scenes) / len(BACKGROUNDS)


def test_captions_name_every_attribute_and_no_other(rng: np.random.Generator) -> None:
    """Each clause names its thing's five words and no rival: else a prompt could not be kept."""
    for scene in [sample_scene(rng) for _ in range(500)]:
        wanted = {scene.background}
        for thing in scene.things:
            wanted |= {thing.shape, thing.color, thing.size, thing.motion}
        text = caption(scene, rng)
        words = text.lower().replace(",", "").rstrip(".").replace("moves in a circle", "circles")
        named = {
            value
            for value, phrases in KEYWORDS.items()
            if any(f" {phrase} " in f" {words} " for phrase in phrases)
        }
        assert named == wanted, text
        assert len(words.split()) <= (24 if len(scene.things) == 1 else 34), text


def test_captions_vary_with_few_words(rng: np.random.Generator) -> None:
    """One scene has many captions from a small vocabulary: enough to learn language from clips."""
    scenes = [sample_scene(rng) for _ in range(1000)]
    words = {
        w for s in scenes for w in caption(s, rng).lower().replace(",", "").rstrip(".").split()
    }
    assert len(words) <= 90
    assert len({caption(scenes[0], rng) for _ in range(200)}) > 100


def test_scenes_survive_json(rng: np.random.Generator) -> None:
    """Stored evaluation sets mean the same scenes later, bit for bit."""
    for scene in [sample_scene(rng) for _ in range(50)]:
        assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene


def test_unknown_words_are_refused() -> None:
    """A misspelt attribute is named together with the known ones, before anything is drawn."""
    with pytest.raises(ValueError, match="color is pink: use one of red, green"):
        a_scene(color="pink")
    with pytest.raises(ValueError, match="no color twice"):
        Scene(things=a_scene().things * 2, background="black")
    with pytest.raises(ValueError, match="size is 32"):
        render(a_scene(), num_frames=1, size=32)
    with pytest.raises(ValueError, match="32x32"):
        read(np.zeros((24, 32, 32, 3), np.uint8))
