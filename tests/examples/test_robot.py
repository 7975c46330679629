"""The robot's captions, labels and order of work, without the simulator."""

import os
import runpy
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from videoar.checkpoints.checkpoint import Checkpoint

ROBOT = Path(__file__).parents[2] / "examples" / "robot"
WORLD = runpy.run_path(str(ROBOT / "tasks.py"))
TASKS, COLORS, POSITIONS = WORLD["TASKS"], WORLD["COLORS"], WORLD["POSITIONS"]


def words(sentence: str) -> set[str]:
    """Return the words of a sentence."""
    return set(sentence.replace(",", "").split())


@pytest.mark.parametrize("task", TASKS)
def test_captions_say_thing_color_and_place(task):
    """All captions but the last name all three, and no two are the same."""
    thing = WORLD["SCENES"][TASKS[task].scene].thing
    for index, color in enumerate(COLORS):
        position = list(POSITIONS)[index % 3]
        said = WORLD["captions"](task, color, position, np.random.default_rng(index))
        assert len(set(said)) == 4
        for text in said[:-1]:
            assert f"the {color} {thing}" in text
            assert any(text.endswith(place) for place in POSITIONS[position])
        assert color not in words(said[-1])
        assert thing in said[-1]


@pytest.mark.parametrize("pair", WORLD["PAIRS"])
def test_tasks_that_undo_each_other_are_told_apart(pair):
    """No phrase of one is one of the other, though the scene is the same."""
    first, second = (TASKS[name] for name in pair)
    assert first.scene == second.scene
    assert second.undone_by == pair[0]
    assert not set(first.phrases) & set(second.phrases)


def test_joined_captions_say_parts_in_order():
    """A long caption has a clause per part; the thing is named once."""
    parts = ("drawer-open", "drawer-close", "drawer-open")
    rng = np.random.default_rng(0)
    for text in WORLD["joined_captions"](parts, "green", "left", rng):
        clauses = text.split(", then ")
        assert len(clauses) == 3
        for part, clause in zip(parts[1:], clauses[1:], strict=True):
            assert clause in {phrase.format("it") for phrase in TASKS[part].phrases}


def test_a_thing_is_seen_where_it_was_wanted():
    """Moving a point along x by `shift_to` puts it at the wanted share of the width."""
    camera, rng = WORLD["CAMERA"], np.random.default_rng(0)
    for _ in range(20):
        point = rng.uniform([-0.2, 0.6, 0.0], [0.2, 0.9, 0.3])
        share = rng.uniform(0.2, 0.8)
        moved = point + np.array([camera.shift_to(point, share), 0.0, 0.0])
        assert camera.project(moved)[0] == pytest.approx(share, abs=1e-9)


def test_the_camera_looks_at_its_point_and_up_is_up():
    """What it looks at is in the middle of the picture; what is higher is seen higher."""
    camera = WORLD["CAMERA"]
    assert camera.project(camera.lookat) == pytest.approx((0.5, 0.5))
    higher = np.array(camera.lookat) + np.array([0.0, 0.0, 0.1])
    assert camera.project(higher)[1] < 0.5


def test_any_beginning_of_the_work_is_balanced():
    """A run that is cut short has as much of each task, and its share of long clips."""
    jobs = list(WORLD["jobs"](6, 32))
    assert len(set(jobs)) == len(jobs) == 6 * len(TASKS) + 32
    half = Counter(name for name, _ in islice(jobs, len(jobs) // 2))
    assert {half[task] for task in TASKS} == {3}
    assert sum(count for name, count in half.items() if name.startswith("long ")) == 16
    assert len({WORLD["clip_name"](*job) for job in jobs}) == len(jobs)


def test_longer_work_begins_with_the_same_clips():
    """Raising the numbers only adds: what a clip shows depends on its name and index alone."""
    assert set(WORLD["jobs"](2, 5)) < set(WORLD["jobs"](3, 20))
    looks = [WORLD["draw_look"](0, "drawer-open", index) for index in range(36)]
    assert set(Counter(looks).values()) == {2}
    assert len(set(looks)) == len(COLORS) * len(POSITIONS)


def test_a_missing_renderer_is_one_sentence(tmp_path):
    """Without simulator or OpenGL the remedy is named, the code is 2 and no folder is made."""
    run = subprocess.run(
        [sys.executable, str(ROBOT / "render.py"), str(tmp_path / "out")],
        env={**os.environ, "MUJOCO_GL": "none of them"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: the renderer does not start")
    assert "libosmesa6" in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_states_are_said_in_words() -> None:
    """How a thing stands is the nearest word; on its way from one to the other it is none."""
    said = WORLD["state_words"]
    assert said("drawer", [0.0, -0.02, -0.075, -0.14]) == ["closed", "closed", None, "open"]
    assert said("faucet", [-1.5, 0.1, 1.6]) == ["left", "middle", "right"]
    assert all(len(scene.states) > 1 for scene in WORLD["SCENES"].values())


def test_the_recipe_makes_a_model_like_the_bundled_one():
    """A recipe that is shown beside a model is the one that made it."""
    recipe, known = runpy.run_path(str(ROBOT / "recipe.py")), Checkpoint.find("robot")
    robot, few = recipe["robot"](), recipe["few_robot"]()
    sizes = {"latent_channels": 16, "text_dim": 128}  # of the codec and of the text encoder
    assert replace(robot.task.model, **sizes) == known.transformer().config
    assert list(robot.task.units) == list(few.task.units) == known.meta["units"]
    assert few.task.teacher == str(robot.out / "checkpoint")
    ours, theirs = few.task.distillation, known.meta["config"]["task"]["distillation"]
    assert (ours.stage, ours.num_inference_steps) == ("consistency", 2)
    assert ours.guidance_scale == theirs["guidance_scale"]
    assert (few.steps, few.batch_size) == (known.meta["step"], known.meta["config"]["batch_size"])


def test_stories_tell_two_things_in_words_that_the_model_knows():
    """A word that is strange to the model would be counted against its units."""
    told, known = runpy.run_path(str(ROBOT / "told.py")), Checkpoint.find("robot").meta["words"]
    for story, actions in told["STORIES"].items():
        one, other = told["sides"](story)
        assert one != other
        assert len(set(actions)) == 2
        assert words(one) | words(other) <= set(known)
