"""Demonstrations without no-ops: OpenVLA's rule, states that follow from what is left, and only successes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from vla.finetune.collect import Settings, run
from vla.finetune.demonstrate import demonstrate, demonstrate_without_noops, noops, repeat
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.types import ActionChunk, Observation, Task, VlaError

TASK = Task("lift", "lift the box", 30)


class LiftEnv:
    """A hand on a line: close at 0.5, and it is won at 1 with the gripper closed. `grip_steps`: the grasp takes so long."""

    def __init__(self, grip_steps: int = 1) -> None:
        self.render_frames, self.grip_steps = True, grip_steps
        self.place, self.n_closed, self.n_drawn = 0.0, 0, 0

    def reset(self, *, seed, options=None):
        self.place, self.n_closed = float(np.random.default_rng(seed).uniform(0, 0.2)), 0
        return self.observation(), {"success": False}

    def step(self, action):
        self.n_closed = self.n_closed + 1 if action[6] > 0 else 0
        if self.n_closed == 0 or self.n_closed >= self.grip_steps or action[0] == 0:
            self.place += float(action[0])
        else:
            self.place = -9.0  # moved on before it held anything
        success = self.place >= 1 and self.n_closed > 0
        return self.observation(), float(success), success, False, {"success": success}

    def close(self):
        pass

    def observation(self):
        images = {}
        if self.render_frames:
            self.n_drawn += 1
            images = {name: np.full((8, 8, 3), int(np.clip(self.place, 0, 1) * 200), np.uint8) for name in ("a", "b")}
        seen = np.array([self.place] * 8, np.float32)
        return Observation(images, seen, TASK.instruction, privileged=np.array([self.place]))


class PausingExpert:
    """Waits for two steps, goes to the box, closes for four steps, lifts."""

    metadata = {"name": "pausing", "horizon": 1, "action_dim": 7}

    def reset(self):
        self.n = self.n_closing = 0

    def act(self, observations):
        action = np.zeros(7, np.float32)
        action[6] = -1
        place, self.n = observations[0].privileged[0], self.n + 1
        if self.n > 2 and place < 0.5 and self.n_closing == 0:
            action[0] = 0.25
        elif self.n > 2:
            self.n_closing += 1
            action[6] = 1
            action[0] = 0.25 if self.n_closing > 4 else 0.0
        return [ActionChunk(action[None])]


@dataclass(frozen=True)
class LiftSuite:
    """Seven action dimensions, as LIBERO has. See `vla.types.Suite`."""

    grip_steps: int = 1
    name: str = "lift"
    cameras: tuple[str, ...] = ("a", "b")
    image_size_px: int = 8
    control_hz: float = 20.0
    frames_upside_down: bool = False
    default_slots: int = 4
    action_names: tuple[str, ...] = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
    state_names: tuple[str, ...] = tuple(f"s{i}" for i in range(8))
    tasks: tuple[Task, ...] = (TASK,)

    def make(self, task):
        return LiftEnv(self.grip_steps)

    def expert(self, task):
        return PausingExpert()

    def versions(self):
        return {"lift": "1"}


def test_the_rule() -> None:
    moving, still, opened = [0.1, 0, 1], [0, 0, 1], [0, 0, -1]
    rows = np.array([still, moving, still, opened, opened, [6e-5, 6e-5, -1], [8e-5, 8e-5, -1], still], np.float32)
    assert noops(rows).tolist() == [True, False, True, False, True, True, False, False]
    assert noops(rows[:1]).tolist() == [True], "before the first action nothing is asked of the gripper"
    assert noops(np.zeros((0, 7))).shape == (0,)


def test_the_gripper_is_compared_with_what_was_kept() -> None:
    """OpenVLA's `prev_action` is the last action it kept, not the last it saw."""
    rows = np.array([[0, 0, 1], [0, 0, -1], [0.5, 0, -1], [0, 0, 1]], np.float32)
    assert noops(rows).tolist() == [True, True, False, False]


def test_states_follow_from_the_actions_that_are_left() -> None:
    env = LiftEnv()
    whole = demonstrate(env, PausingExpert(), TASK, 3, 0.0, "lift")
    env.n_drawn = 0
    episode = demonstrate_without_noops(env, PausingExpert(), TASK, 3, "lift")
    assert (
        whole.success and episode.success and len(episode) == len(whole) - 5
    )  # two at the start, three of four closings
    assert env.n_drawn == len(episode) + 1, "the first pass draws nothing"
    again = repeat(env, [step.action for step in episode.steps], TASK, 3, "lift")
    for one, other in zip(episode.steps, again.steps, strict=True):
        np.testing.assert_array_equal(one.observation.state, other.observation.state)
        np.testing.assert_array_equal(one.observation.images["b"], other.observation.images["b"])
        assert one.observation.privileged is None
    assert not noops(np.stack([step.action for step in episode.steps])).any()


def test_a_demonstration_that_needs_its_pauses_is_dropped() -> None:
    env = LiftEnv(grip_steps=3)
    assert demonstrate(env, PausingExpert(), TASK, 0, 0.0, "lift").success
    assert not demonstrate_without_noops(env, PausingExpert(), TASK, 0, "lift").success


def test_an_experts_failure_is_not_drawn() -> None:
    env = LiftEnv()
    short = Task("lift", "lift the box", 4)
    assert not demonstrate_without_noops(env, PausingExpert(), short, 0, "lift").success and env.n_drawn == 0


def test_collecting_an_arms_data(tmp_path: Path) -> None:
    dropped = run(Settings(tmp_path / "dropped", episodes_per_task=2), LiftSuite())
    kept = run(Settings(tmp_path / "kept", episodes_per_task=2, drop_noops=False), LiftSuite())
    assert dropped.n_episodes == kept.n_episodes == 2 and dropped.n_frames == kept.n_frames - 10
    reader = LeRobotReader(tmp_path / "dropped")
    assert (
        reader.cameras == ("a", "b")
        and reader.state_dim == 8
        and reader.action_names[6] == "gripper"
        and reader.fps == 20
    )
    assert [reader.seed_of(i) for i in range(2)] == [0, 1] and set(reader.actions()[:, 6]) == {-1.0, 1.0}
    with pytest.raises(VlaError, match="drop_noops False; expected True, as the collection"):
        run(Settings(tmp_path / "dropped", episodes_per_task=3, drop_noops=False), LiftSuite())
    with pytest.raises(VlaError, match=r"noise_std 0.1 and dropped no-ops; .*--no-drop-noops"):
        run(Settings(tmp_path / "noisy", noise_std=0.1), LiftSuite())
    assert not (tmp_path / "noisy").exists()
    with pytest.raises(VlaError, match="0 successful demonstrations of lift"):
        run(Settings(tmp_path / "none", episodes_per_task=1), LiftSuite(grip_steps=3))
    run(Settings(tmp_path / "noisy", episodes_per_task=1, noise_std=0.001, drop_noops=False), LiftSuite())


def test_test_seeds_are_refused(tmp_path: Path) -> None:
    for changes in ({"first_seed": 1_000_000}, {"first_seed": 999_990, "episodes_per_task": 3}):
        with pytest.raises(VlaError, match="expected seeds below 1000000: the others are for tests"):
            Settings(tmp_path, **changes)
    assert Settings(tmp_path, first_seed=999_990, episodes_per_task=2).first_seed == 999_990
