"""Render videos of a robot at work, with captions: `python examples/robot/render.py OUT`.

Meta-World's scripted experts do the work, MuJoCo draws it. A clip depends on the seed, its task and
its index alone, is written under another name and then renamed: a run that was stopped, by whatever
means, goes on with the same command, and ends with the same bytes.
"""

import argparse
import multiprocessing
import os
import queue
import signal
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tasks as world
from folder import Folder

if TYPE_CHECKING:
    from stage import Stage

FRAMES = {"single": 61, "long": 241}
STEPS = 3
"""Control steps from one frame to the next."""
LATEST = 44
"""Frame of a single clip by which the task has to be done: what comes after is seen, too."""
SLOWEST = 56
"""Frames that a part of a long clip may take until it is done; later ones are not begun."""
ATTEMPTS = 200
VERSION = 1
"""Of what is rendered: clips of different versions do not go into one folder."""

REMEDY = "pip install -e '.[robot]' and, on Debian, apt-get install libosmesa6"


@dataclass
class Take:
    """What has been filmed so far."""

    stage: "Stage"
    joints: list[np.ndarray] = field(default_factory=list)
    """Of every frame. Drawing takes ten times as long as moving: only what succeeds is drawn."""
    states: list[float] = field(default_factory=list)
    hands: list[tuple[float, float]] = field(default_factory=list)
    steps: int = 0
    done: bool = False
    """Whether the task is done as things stand, says Meta-World."""

    def film(self) -> None:
        """Add a frame."""
        stage = self.stage
        self.joints.append(stage.data.qpos.copy())
        self.states.append(round(stage.state, 4))
        across, down = world.CAMERA.project(stage.hand)
        self.hands.append((round(across, 3), round(down, 3)))

    def step(self, action: np.ndarray) -> None:
        """Go on by one control step."""
        self.done = self.stage.step(action)
        self.steps += 1
        if self.steps % STEPS == 0:
            self.film()

    def work(self, until: int, rng: np.random.Generator) -> int | None:
        """Let the expert work; return the frame in which the task was done, or nothing."""
        expert, self.begun, self.done = self.stage.expert(), self.stage.state, False
        while not self.done:
            if len(self.joints) >= until:
                return None
            self.step(self.stage.act(expert))
        success, self.reached = len(self.joints), self.stage.state
        for _ in range(int(rng.integers(3, 10))):  # It does not let go at once.
            self.step(self.stage.act(expert))
        return success

    def kept(self) -> bool:
        """Return whether the thing is still where it had been brought, or beyond."""
        return (self.stage.state - self.begun) / (self.reached - self.begun) > 0.7

    def go_home(self, until: int, speed: float) -> bool:
        """Let go, get clear and return; return whether the hand has come home by then."""
        retreat, start = np.array(self.stage.task.retreat), self.stage.hand
        length, step = float(np.linalg.norm(retreat)), np.append(retreat, 0.0)
        step = step / length * speed - np.array([0.0, 0.0, 0.0, 1.0])
        self.stage.release()
        for _ in range(4):
            self.step(np.array([0.0, 0.0, 0.0, -1.0]))
        stuck = min(until, len(self.joints) + 10)
        while len(self.joints) < stuck:
            if (self.stage.hand - start) @ retreat > 0.9 * length**2:
                break
            self.step(step)
        over = self.stage.home.copy()
        over[2] = max(over[2], self.stage.hand[2])
        for target in (over, self.stage.home):
            stuck = min(until, len(self.joints) + 20)
            while len(self.joints) < stuck:
                away = target - self.stage.hand
                if np.abs(away).max() < 0.02:
                    break
                self.step(np.append(np.clip(10 * away, -speed, speed), -1.0))
        return len(self.joints) < until

    def rest(self, until: int) -> None:
        """Stay where it is."""
        while len(self.joints) < until:
            self.step(np.array([0.0, 0.0, 0.0, -1.0]))


class Studio:
    """All stages of a process, made when they are first needed."""

    def __init__(self, *, seed: int, size: int) -> None:
        self.seed, self.size = seed, size
        self.stages = dict[str, "Stage"]()

    def stage(self, task: str) -> "Stage":
        """Return the stage of a task."""
        if task not in self.stages:
            from stage import Stage  # Needs the simulator, which may be missing.

            self.stages[task] = Stage(task, self.size)
        return self.stages[task]

    def clip(self, name: str, index: int) -> tuple[list[np.ndarray], dict[str, Any]]:
        """Film a clip: return its pictures and its label."""
        task = name.removeprefix("long ")
        long = name != task
        color, position = world.draw_look(self.seed, name, index)
        for attempt in range(ATTEMPTS):
            rng = world.random(self.seed, name, index, attempt)
            stage = self.stage(task)
            stage.reset(color=color, position=position, rng=rng)
            take = Take(stage)
            take.film()
            parts = self._long(take, task, rng) if long else self._single(take, task, rng)
            if parts:
                break
        else:
            raise RuntimeError(f"no success in {ATTEMPTS} attempts at {name}, index {index}")
        rng = world.random(self.seed, name, index, "words")
        for part in parts:
            part["captions"] = world.captions(part["task"], color, position, rng)
        said = parts[0]["captions"]
        if long:
            said = world.joined_captions([part["task"] for part in parts], color, position, rng)
        across, down = world.CAMERA.project(stage.point)
        label = {
            "file_name": f"videos/{world.clip_name(name, index)}.mp4",
            "task": task,
            "object": stage.scene.thing,
            "action": stage.task.action,
            "color": color,
            "position": position,
            "seen_at": [round(across, 3), round(down, 3)],
            "seed": self.seed,
            "index": index,
            "attempt": attempt,
            "frames": len(take.joints),
            "fps": world.FPS,
            "success_frame": parts[0]["success_frame"],
            "start_state": take.states[0],
            "end_state": take.states[-1],
            "caption": said[0],
            "captions": said,
            "parts": parts,
            "states": take.states,
            "hands": take.hands,
        }
        return [stage.draw(joints) for joints in take.joints], label

    def _single(self, take: Take, task: str, rng: np.random.Generator) -> list[dict[str, Any]]:
        """Film one task; return nothing if it failed or was undone by what came after."""
        success = take.work(LATEST, rng)
        if success is None:
            return []
        take.go_home(FRAMES["single"], rng.uniform(0.6, 1.0))
        take.rest(FRAMES["single"])
        if take.stage.task.undone_by and not take.kept():
            return []
        last = FRAMES["single"] - 1
        return [{"task": task, "first": 0, "last": last, "success_frame": success}]

    def _long(self, take: Take, task: str, rng: np.random.Generator) -> list[dict[str, Any]]:
        """Film tasks that undo each other in turn; return nothing if one of them failed."""
        end, parts = FRAMES["long"], list[dict[str, Any]]()
        speed = rng.uniform(0.6, 1.0)
        while len(take.joints) + SLOWEST < end:
            first = len(take.joints) if parts else 0
            success = take.work(min(len(take.joints) + SLOWEST, end), rng)
            if success is None:
                return []
            parts.append({"task": task, "first": first, "last": end - 1, "success_frame": success})
            if not take.go_home(end, speed):
                break
            # A part begins where a latent frame does: one of 1 frame, then all of 4.
            rest = len(take.joints) + int(rng.integers(1, 8))
            take.rest(min(rest + (1 - rest) % 4, end))
            if not take.kept():
                return []
            if len(take.joints) + SLOWEST < end:
                parts[-1]["last"] = len(take.joints) - 1
                task = world.TASKS[task].undone_by
                after = self.stage(task)
                after.take_over(take.stage, rng)
                take.stage = after
        take.rest(end)
        return parts if len(parts) > 2 else []


def work(folder: Folder, seed: int, size: int, jobs: list[tuple[str, int]], done: Any) -> None:
    """Render clips in a process of its own, and tell of each."""
    warnings.simplefilter("ignore")  # Experts ask for more speed than they get.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent, studio = os.getppid(), Studio(seed=seed, size=size)
    for name, index in jobs:
        if os.getppid() != parent:  # Killed without a word.
            return
        try:
            pictures, label = studio.clip(name, index)
            folder.add(name, index, pictures, label)
        except (OSError, RuntimeError) as error:
            done.put(str(error))
            return
        done.put(label)


def render(
    folder: Folder, *, seed: int, size: int, episodes: int, long: int, workers: int, every: float
) -> None:
    """Render what is missing in a folder."""
    labels, missing = dict[str, dict[str, Any]](), list[tuple[str, int]]()
    for job in world.jobs(episodes, long):
        if label := folder.label(*job):
            labels[label["file_name"]] = label
        else:
            missing.append(job)
    total, began = len(labels) + len(missing), time.monotonic()
    print(f"{len(labels)} of {total} clips are there, {workers} processes", flush=True)
    context = multiprocessing.get_context("spawn")
    done = context.Queue()
    processes = [
        context.Process(
            target=work, args=(folder, seed, size, missing[rank::workers], done), daemon=True
        )
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        collected, count = began, 0
        while count < len(missing):
            try:
                label = done.get(timeout=5)
            except queue.Empty:
                if any(process.exitcode for process in processes):
                    raise RuntimeError("a process ended early: run the command again") from None
                continue
            if isinstance(label, str):
                raise RuntimeError(label)
            labels[label["file_name"]] = label
            count += 1
            now = time.monotonic()
            if now - collected > every:
                folder.collect(labels)
                collected = now
                rate = count / (now - began)
                left = (len(missing) - count) / rate / 60
                print(
                    f"{len(labels)} of {total} clips, {60 * rate:.1f} a minute,"
                    f" {left:.0f} minutes left",
                    flush=True,
                )
    finally:
        for process in processes:
            process.terminate()
        folder.collect(labels)
    print(f"{len(labels)} clips in {folder.root}", flush=True)


def check_renderer() -> None:
    """Draw something, so that what is missing is named before work begins."""
    try:
        import av  # noqa: F401
        import metaworld  # noqa: F401
        import mujoco

        model = mujoco.MjModel.from_xml_string("<mujoco/>")
        mujoco.Renderer(model, 16, 16).close()
    except Exception as error:  # The many ways in which OpenGL fails to load.
        raise ValueError(f"the renderer does not start ({error}): {REMEDY}") from error


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, render, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("--episodes", type=int, default=300, help="single clips of each task")
    parser.add_argument("--long", type=int, default=300, help="clips of several tasks, in all")
    parser.add_argument("--size", type=int, default=128, help="width and height in pixels")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, default=30, help="seconds between progress lines")
    args = parser.parse_args(arguments)
    # A termination ends in the same way as an interruption: tables are written first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # Software rendering unless asked otherwise; processes are enough, threads would only wait.
    os.environ.setdefault("MUJOCO_GL", "osmesa")
    os.environ.update(OMP_NUM_THREADS="1", LP_NUM_THREADS="0")
    try:
        if args.size < 16 or args.size % 2:
            raise ValueError(f"size {args.size}: take an even number from 16")
        if min(args.episodes, args.long) < 0 or args.workers < 1:
            raise ValueError("--episodes and --long from 0, --workers from 1")
        check_renderer()
        folder = Folder(args.folder)
        folder.open({"seed": args.seed, "size": args.size, "version": VERSION})
        numbers = {name: getattr(args, name) for name in ("seed", "size", "episodes", "long")}
        render(folder, **numbers, workers=args.workers, every=args.every)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
