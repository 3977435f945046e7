"""A dataset that a tiny model learns in seconds, because the image alone says what to do, for the tests of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from training import sft_settings, tiny_backbone

from vla.finetune import sft
from vla.finetune.formats.lerobot_writer import LeRobotWriter
from vla.types import Episode, Observation, Policy, Step, Task, VlaError

ACTIONS = ("dx", "dy", "dz", "gripper")
STATES = ("x", "y", "z", "gripper")
DIRECTIONS = np.array([[1, 0, 1], [-1, 0, -1], [0, 1, 1], [0, -1, -1]]) * [0.05, 0.05, 0.02]
GRIPPER = (1.0, -1.0, -1.0, 1.0)
CORNERS = ((12, 24), (12, 0), (24, 12), (0, 12))  # row, column of a bright square at the right, left, bottom, top
FPS = 10


def toy_episode(k: int, n: int = 6) -> Episode:
    """One direction for the whole episode; every 50th episode makes one step three times as long."""
    rng = np.random.default_rng(k)
    which = k % 4
    state = np.array([*rng.uniform(-0.5, 0.5, 3), 0.5])
    image = np.full((32, 32, 3), 20, np.uint8)
    row, column = CORNERS[which]
    image[row : row + 8, column : column + 8] = (255, 240, 200)
    instruction = ("move the square", "push the square")[k // 4 % 2]
    steps = []
    for i in range(n):
        action = np.array([*DIRECTIONS[which], GRIPPER[which]])
        if k // 4 % 12 == 3 and i == 2:
            action[:3] *= 3
        observation = Observation({"front": image}, state.astype(np.float32), instruction)
        steps.append(Step(observation, action.astype(np.float32), float(i == n - 1), i == n - 1))
        state = state + [*action[:3], 0.0]
        state[3] = np.clip(state[3] - 0.1 * action[3], 0.0, 1.0)  # +1 closes
    return Episode(steps, instruction, "toy", True, k, f"task-{which}")


def toy_dataset(root: Path, episodes: int = 48, change: Any = None, **writer: Any) -> Path:
    """`change(episode) -> episode` plants a fault."""
    options = {"fps": FPS, "cameras": {"front": (32, 32)}, "state_names": STATES, "action_names": ACTIONS, **writer}
    with LeRobotWriter(root, robot_type="toy", **options) as out:
        for k in range(episodes):
            episode = toy_episode(k)
            out.add_episode(change(episode) if change else episode)
    return root


def toy_policy(folder: Path) -> Path:
    """A policy directory trained on folder/toy until it has learned it."""
    tiny_backbone(folder)
    settings = sft_settings(
        folder, data=(folder / "toy",), horizon=2, bins=32, lora_r=8, lora_alpha=16, lr=1e-2, steps=120, batch_size=16,
        lora_parts=("llm", "projector", "vision"), loss_over="actions", gripper_dim=-1, state=False,
        gripper_convention="+1 closes, -1 opens", eval_every_steps=1000, save_every_steps=1000, log_every_steps=20,
    )  # fmt: skip
    return sft.run(settings)


class ToyEnv:
    """Starts where `toy_episode(seed)` does; success once it has gone nine tenths of the episode's way."""

    def __init__(self, suite: ToySuite, task: Task) -> None:
        self.suite, self.task, self.render_frames = suite, task, True

    def reset(self, *, seed: int, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        self._start = toy_episode(seed, 1).steps[0].observation
        assert self._start.state is not None
        self._direction, self._n_steps = DIRECTIONS[seed % 4], 0
        self._state = self._start.state.astype(np.float64)
        return self._observation(), {"success": False}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        self._n_steps += 1
        self._state[:3] += action[:3]
        assert self._start.state is not None
        gone = (self._state - self._start.state)[:3] @ self._direction / (self._direction @ self._direction)
        success = bool(gone > 5.4)
        return self._observation(), 0.0, success, self._n_steps >= self.task.max_steps, {"success": success}

    def close(self) -> None:
        pass

    def _observation(self) -> Observation:
        frame = np.rot90(self._start.images["front"], self.suite.quarter_turns)
        frame = (frame * self.suite.light).astype(np.uint8)
        state = (self._state + self.suite.state_offset).astype(np.float32)
        return Observation({"front": np.ascontiguousarray(frame)}, state, self.task.instruction)


@dataclass(frozen=True)
class ToySuite:
    """See `vla.types.Suite`; its fields plant faults."""

    quarter_turns: int = 0
    light: float = 1.0
    state_offset: float = 0.0
    control_hz: float = float(FPS)
    max_steps: int = 8
    instruction: str = "move the square"
    action_names: tuple[str, ...] = ACTIONS
    name: str = "toy"
    image_size_px: int = 32
    cameras: tuple[str, ...] = ("front",)
    default_slots: int = 1
    frames_upside_down: bool = False
    state_names: tuple[str, ...] = STATES

    @property
    def tasks(self) -> tuple[Task, ...]:
        return tuple(Task(f"task-{i}", self.instruction, self.max_steps) for i in range(4))

    def make(self, task: str) -> ToyEnv:
        return ToyEnv(self, next(known for known in self.tasks if known.name == task))

    def expert(self, task: str) -> Policy:
        raise VlaError("no expert")

    def versions(self) -> dict[str, str]:
        return {"toy": "1"}
