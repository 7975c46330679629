"""Meta-World's scenes as stages: things where they are wanted, in colour, before one camera."""

import sys
from collections.abc import Sequence
from typing import Any

import mujoco
import numpy as np
import tasks as world
from gymnasium.spaces import Box
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP

GREY = 0.6
QUARTERS = (np.arange(4 * 255 + 1) / 4).round().astype(np.uint8)
"""Means of four, from their sum: numpy's own mean takes five times as long."""
OUT_OF_SIGHT = ("pedestal", "right_arm_base_link", "right_l0", "head", "right_l1")
"""Parts of the robot that the camera never sees: more than half of all triangles."""


class Stage:
    """One task of Meta-World, with its model, its renderer and its expert.

    Making one takes longer than an episode; so it is used again, with everything that an episode
    changes in the model put back before the next.
    """

    CHANGED = ("body_pos", "geom_rgba", "geom_matid", "mat_rgba", "site_pos")

    def __init__(self, task: str, size: int) -> None:
        self.task = world.TASKS[task]
        self.scene = world.SCENES[self.task.scene]
        self.env: Any = ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
        self.make_expert = ENV_POLICY_MAP[f"{task}-v3"]
        self.env._partially_observable = False  # Experts may see their goal.
        # Without limits, as things will be moved beyond those of Meta-World.
        self.env.__dict__["sawyer_observation_space"] = Box(-np.inf, np.inf, (39,), np.float64)
        self.env._freeze_rand_vec = self.env._set_task_called = True
        self.env.max_path_length = sys.maxsize
        self.model, self.data = self.env.model, self.env.data
        self.pristine = {name: getattr(self.model, name).copy() for name in self.CHANGED}
        # Shadows take two thirds of the time. Edges are smoothed by drawing twice the size.
        self.model.vis.quality.shadowsize = self.model.vis.quality.offsamples = 0
        for geom in range(self.model.ngeom):
            if self.model.body(self.model.geom_bodyid[geom]).name in OUT_OF_SIGHT:
                self.model.geom_group[geom] = 5  # Not drawn.
        self.renderer = mujoco.Renderer(self.model, 2 * size, 2 * size)
        self.option, self.camera = mujoco.MjvOption(), mujoco.MjvCamera()
        self.option.sitegroup[:] = 0  # Marks of goals.
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FREE
        for name in ("distance", "azimuth", "elevation", "lookat"):
            setattr(self.camera, name, getattr(world.CAMERA, name))
        moving = self._below([self.scene.moving])
        joints = [j for j in range(self.model.njnt) if self.model.jnt_bodyid[j] in moving]
        self.state_address = self.model.jnt_qposadr[joints[self.scene.joint]]
        self.shift = np.zeros(3)

    def reset(self, *, color: str, position: str, rng: np.random.Generator) -> None:
        """Set the table: draw where things stand, move them into view, paint them."""
        env, model, bodies = self.env, self.model, self.scene.bodies
        for name, value in self.pristine.items():
            getattr(model, name)[:] = value
        space = env._random_reset_space
        env._last_rand_vec = rng.uniform(space.low, space.high)
        mujoco.mj_resetData(model, self.data)
        env.reset_model()
        places = np.array([model.body(name).pos for name in bodies])
        depth, share = rng.uniform(-0.08, 0.0), rng.uniform(*world.BANDS[position])
        self.point = places.mean(0) + np.array(self.scene.centre) + np.array([0.0, depth, 0.0])
        self.shift = np.array([world.CAMERA.shift_to(self.point, share), depth, 0.0])
        self.point[0] += self.shift[0]
        # Experts reckon with a hand before the thing, and do not walk around it.
        jitter = rng.uniform(-1, 1, 3) * np.array([0.08, 0.04, 0.04])
        jitter[0] += self.shift[0]
        self.home = env.hand_init_pos = np.array(self.scene.home) + jitter
        # Once more, with nothing in the way of the hand.
        mujoco.mj_resetData(model, self.data)
        for name in bodies:
            model.body(name).pos[1] += 5.0
        env.reset_model()
        for name, place in zip(bodies, places, strict=True):
            model.body(name).pos = place + self.shift
        env._target_pos = env._target_pos + self.shift
        env.obj_init_pos = env.obj_init_pos + self.shift
        self._paint(color, rng)
        self._settle()

    def _below(self, bodies: Sequence[str]) -> set[int]:
        """Return the bodies of these names and all that hang on them."""
        below = {self.model.body(name).id for name in bodies}
        # A parent comes before its children.
        for body in range(self.model.nbody):
            if self.model.body_parentid[body] in below:
                below.add(body)
        return below

    def _paint(self, color: str, rng: np.random.Generator) -> None:
        """Give the thing its colour, and the table a shade that no caption tells of."""
        model = self.model
        bare = {model.material(name).id for name in self.scene.bare}
        below = self._below(self.scene.painted)
        for geom in range(model.ngeom):
            if model.geom_bodyid[geom] in below and model.geom_matid[geom] not in bare:
                model.geom_matid[geom] = -1
                model.geom_rgba[geom, :3] = world.COLORS[color]
        for name in self.scene.grey:
            model.mat_rgba[model.material(name).id, :3] = GREY
        model.mat_rgba[model.material("table_wood").id, :3] *= rng.uniform(0.75, 1.1)

    def take_over(self, other: "Stage", rng: np.random.Generator) -> None:
        """Go on where another task of the same scene is, to the last digit."""
        env, space = self.env, self.env._random_reset_space
        drawn, before = rng.uniform(space.low, space.high), other.env._last_rand_vec
        # Three numbers are the place of the thing, six that of a plate and where it is to go.
        env._last_rand_vec = before if len(before) == 3 else drawn
        env.hand_init_pos = self.home = other.home
        env.reset_model()
        for name in self.CHANGED:
            getattr(self.model, name)[:] = getattr(other.model, name)
        self.shift, self.point = other.shift, other.point
        env._target_pos = env._target_pos + self.shift
        env.obj_init_pos = env.obj_init_pos + self.shift
        everything = mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.empty(mujoco.mj_stateSize(self.model, everything))
        mujoco.mj_getState(other.model, other.data, state, everything)
        mujoco.mj_setState(self.model, self.data, state, everything)
        self._settle()

    def _settle(self) -> None:
        """Tell the environment what has been changed behind its back."""
        if self.task.goal:
            self.env._target_pos = self.model.body(self.task.goal).pos.copy()
        mujoco.mj_forward(self.model, self.data)
        self.env._prev_obs = self.env._get_curr_obs_combined_no_goal()
        self.observation = self.env._get_obs()

    @property
    def hand(self) -> np.ndarray:
        """Where the hand is, in metres."""
        return self.env.get_endeff_pos().copy()

    @property
    def state(self) -> float:
        """Opening or angle of the thing, in metres or radians."""
        return float(self.data.qpos[self.state_address])

    def expert(self) -> Any:
        """Return who can do the task as things stand."""
        # Those of Meta-World turn a faucet from the middle only.
        if self.scene.thing == "faucet" and abs(self.state) > 0.5:
            return FaucetExpert(self)
        return self.make_expert()

    def act(self, expert: Any) -> np.ndarray:
        """Return what an expert does, who sees the table where Meta-World would have put it.

        Some of them know places by heart.
        """
        seen = self.observation.copy()
        for first in (0, 4, 18, 22, 36):
            seen[first : first + 3] -= self.shift
        return expert.get_action(seen)

    def step(self, action: np.ndarray) -> bool:
        """Go on by one control step and return whether the task is done."""
        self.observation, *_, info = self.env.step(np.clip(action, -1, 1))
        return bool(info["success"])

    def release(self) -> None:
        """Stop pulling: the arm follows its command like a spring, and would let things bounce."""
        self.data.mocap_pos[0] = self.hand

    def draw(self, joints: np.ndarray) -> np.ndarray:
        """Return the picture of what stands where the joints say."""
        self.data.qpos[:] = joints
        mujoco.mj_forward(self.model, self.data)
        self.renderer.update_scene(self.data, self.camera, self.option)
        picture = self.renderer.render().astype(np.uint16)
        rows = picture[::2] + picture[1::2]
        return QUARTERS[rows[:, ::2] + rows[:, 1::2]]


class FaucetExpert:
    """Turns a faucet back from where it has been turned to: gets behind the handle and pushes."""

    RADIUS, BEHIND, ABOVE = 0.14, 0.05, 0.03

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.way = -np.sign(stage.state)
        self.pushes = False

    def get_action(self, _seen: np.ndarray) -> np.ndarray:
        """Return the action, as experts of Meta-World do."""
        angle, hand = self.stage.state, self.stage.hand
        along = np.array([np.sin(angle), -np.cos(angle), 0.0])
        push = self.way * np.array([np.cos(angle), np.sin(angle), 0.0])
        handle = self.stage.data.body(self.stage.scene.moving).xpos + self.RADIUS * along
        target = handle - self.BEHIND * push + np.array([0.0, 0.0, self.ABOVE])
        away = target - hand
        if self.pushes:
            target = target + 0.1 * push
        elif np.linalg.norm(away[:2]) > 0.03:
            target[2] += 0.12
        elif abs(away[2]) < 0.02:
            self.pushes = True
        return np.append(10 * (target - hand), 1.0)
