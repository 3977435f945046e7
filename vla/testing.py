"""A tiny simulator and policy, deterministic and dependency-free, for tests of anything that drives episodes.

The task: move a red square onto a green one. Faults can be planted per (task, seed).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla.types import ActionChunk, Observation, Policy, Task, problem

CAMERA = "front"
IMAGE_SIZE_PX = 32
MAX_MOVE = 0.1
GOAL_RADIUS = 0.06
FAULT_STEP = 3
FAULT_KINDS = ("exit", "segfault", "hang", "raise_reset", "raise_step", "garbage_shape", "garbage_image", "nan")


class FakeEnv:
    """A point in the unit square, and a goal drawn from the seed. See `vla.types.Env`."""

    def __init__(self, suite: FakeSuite, task: Task) -> None:
        self.suite, self.task = suite, task
        self.render_frames = True
        self.seed = self.n_steps = 0
        self.hand = self.goal = np.zeros(2)

    def reset(self, *, seed: int, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        rng = np.random.default_rng(seed)
        self.seed, self.n_steps = seed, 0
        self.hand = rng.uniform(0.1, 0.9, 2)
        reach = 0.2 if self.task.name == "reach-near" else 0.5
        self.goal = np.clip(self.hand + rng.uniform(-reach, reach, 2), 0.05, 0.95)
        if self._fault_due(("raise_reset",)):
            raise RuntimeError("planted fault in reset")
        return self._observation(), {"success": False}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        time.sleep(self.suite.step_sleep_s)
        if self.n_steps == FAULT_STEP and self._fault_due(("exit",)):
            os._exit(1)
        if self.n_steps == FAULT_STEP and self._fault_due(("segfault",)):
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.n_steps == FAULT_STEP and self._fault_due(("hang",)):
            time.sleep(3600.0)
        if self.n_steps == FAULT_STEP and self._fault_due(("raise_step",)):
            raise RuntimeError("planted fault in step")
        self.hand = np.clip(self.hand + np.clip(action[:2], -MAX_MOVE, MAX_MOVE), 0.0, 1.0)
        if self.n_steps == FAULT_STEP and self._fault_due(("nan",)):
            self.hand = np.full(2, np.nan)
        success = bool(np.linalg.norm(self.hand - self.goal) < GOAL_RADIUS)
        truncated = not success and self.n_steps >= self.task.max_steps
        return self._observation(), float(success), success, truncated, {"success": success}

    def close(self) -> None:
        pass

    def frame(self) -> np.ndarray:
        """uint8 (32, 32, 3): green goal, red hand."""
        image = np.full((IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), 230, np.uint8)
        for place, colour in ((self.goal, (0, 160, 0)), (self.hand, (200, 0, 0))):
            x, y = (np.nan_to_num(place) * (IMAGE_SIZE_PX - 4)).astype(int)
            image[y : y + 4, x : x + 4] = colour
        return image

    def _observation(self) -> Observation:
        images = {CAMERA: self.frame()} if self.render_frames else {}
        state = self.hand.astype(np.float32)
        if self.n_steps >= FAULT_STEP and self._fault_due(("garbage_shape",)):
            state = np.zeros(7, np.float32)
        if images and self._fault_due(("garbage_image",)):
            images = {CAMERA: images[CAMERA][:5].astype(np.float32)}
        return Observation(images, state, self.task.instruction, privileged=np.concatenate([self.hand, self.goal]))

    def _fault_due(self, kinds: tuple[str, ...]) -> bool:
        me = (self.task.name, self.seed)
        planted = [kind for task, seed, kind in (*self.suite.faults, *self.suite.passing_faults) if (task, seed) == me]
        if not planted or planted[0] not in kinds:
            return False
        if self.suite.passed_in is None or (*me, planted[0]) not in self.suite.passing_faults:
            return True
        marker = Path(self.suite.passed_in) / f"{self.task.name}-{self.seed}-{planted[0]}"
        if marker.exists():
            return False
        marker.touch()
        return True


class FakeExpert:
    """Goes straight to the goal. Reads the privileged state: hand x, y, goal x, y."""

    metadata = {"name": "expert/fake", "horizon": 1, "action_dim": 2, "reads_images": False}

    def act(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        return [ActionChunk(_towards_goal(observation)[None]) for observation in observations]

    def reset(self) -> None:
        pass


@dataclass
class NoisyPolicy:
    """Chunks towards the goal plus noise drawn from `Observation.key`. Remembers the sizes of its batches.

    It reads the images (they must be there) and, for the direction, the privileged state.
    """

    horizon: int = 5
    noise: float = 0.05
    undecodable_keys: tuple[tuple[int, ...], ...] = ()
    """Keys (without the query number) whose second query is answered with `ok=False`."""
    sleep_s: float = 0.0

    def __post_init__(self) -> None:
        self.batch_sizes: list[int] = []

    @property
    def metadata(self) -> dict[str, Any]:
        return {"name": "noisy", "horizon": self.horizon, "action_dim": 2}

    def act(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        time.sleep(self.sleep_s)
        self.batch_sizes.append(len(observations))
        return [self._chunk(observation) for observation in observations]

    def reset(self) -> None:
        pass

    def _chunk(self, observation: Observation) -> ActionChunk:
        if observation.key[:-1] in self.undecodable_keys and observation.key[-1] == 1:
            return ActionChunk(np.full((self.horizon, 2), np.nan, np.float32), ok=False)
        pixels = int(observation.images[CAMERA].astype(np.int64).sum()) % 97  # the frame must matter to the result
        rng = np.random.default_rng([*observation.key, pixels])
        noise = rng.normal(0.0, self.noise, (self.horizon, 2))
        return ActionChunk((_towards_goal(observation) / 2 + noise).astype(np.float32))


@dataclass(frozen=True)
class FakeSuite:
    """See `vla.types.Suite`."""

    task_names: tuple[str, ...] = ("reach-near", "reach-far")
    max_steps: int = 12
    faults: tuple[tuple[str, int, str], ...] = ()
    """(task, seed, kind): that episode fails in that way (`FAULT_KINDS`), at its third step or, for
    raise_reset and garbage_image, at once."""
    passing_faults: tuple[tuple[str, int, str], ...] = ()
    """The same, but each strikes at the first attempt only."""
    passed_in: str | None = None
    """A folder for the marks of passing faults that have struck; needed if there are any."""
    step_sleep_s: float = 0.0
    name: str = "fake"
    image_size_px: int = IMAGE_SIZE_PX
    cameras: tuple[str, ...] = (CAMERA,)
    control_hz: float = 10.0
    frames_upside_down: bool = False
    default_slots: int = 16
    action_names: tuple[str, ...] = ("dx", "dy")
    state_names: tuple[str, ...] = ("x", "y")

    @property
    def tasks(self) -> tuple[Task, ...]:
        return tuple(Task(name, f"{name} the green square", self.max_steps) for name in self.task_names)

    def make(self, task: str) -> FakeEnv:
        for known in self.tasks:
            if known.name == task:
                return FakeEnv(self, known)
        raise problem(f"task {task!r}", f"one of {', '.join(self.task_names)}", "choose a task of this suite")

    def expert(self, task: str) -> Policy:
        return FakeExpert()

    def versions(self) -> dict[str, str]:
        return {"fake": "1"}


def _towards_goal(observation: Observation) -> np.ndarray:
    """float32 (2,)."""
    if observation.privileged is None:
        raise problem("no privileged state", "hand and goal", "use the fake suite's own observations")
    delta = observation.privileged[2:] - observation.privileged[:2]
    return np.clip(delta, -MAX_MOVE, MAX_MOVE).astype(np.float32)
