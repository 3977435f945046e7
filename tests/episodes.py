"""Small made-up episodes for the tests of the dataset code."""

from __future__ import annotations

from typing import Any

import numpy as np

from vla.types import Episode, Observation, Step

CAMERAS = {"front": (16, 20), "wrist": (12, 12)}
STATE_NAMES = ("x", "y", "z")
ACTION_NAMES = ("dx", "dy", "gripper")
INSTRUCTIONS = ("open the drawer", "close the door")
WRITER: dict[str, Any] = {
    "fps": 10,
    "cameras": CAMERAS,
    "state_names": STATE_NAMES,
    "action_names": ACTION_NAMES,
    "robot_type": "toy",
}


def make_episode(k: int, n: int = 5) -> Episode:
    """Episode number `k` of `n` steps; success in the last. Every frame of every episode is different."""
    rng = np.random.default_rng(k)
    steps = []
    for i in range(n):
        images = {name: rng.integers(0, 256, (*size, 3), dtype=np.uint8) for name, size in CAMERAS.items()}
        state, action = rng.normal(size=3).astype(np.float32), rng.uniform(-1, 1, 3).astype(np.float32)
        instruction = INSTRUCTIONS[k % 2]
        steps.append(Step(Observation(images, state, instruction), action, float(i == n - 1), i == n - 1))
    return Episode(steps, INSTRUCTIONS[k % 2], "toy", True, 100 + k, f"task-{k % 2}")


def smooth_episode(k: int, n: int = 6, size: int = 64) -> Episode:
    """Frames of one flat grey each, 20 levels apart, which survive lossy video and tell frames apart."""
    steps = []
    for i in range(n):
        images = {"front": np.full((size, size, 3), 10 + 20 * i + 3 * k, np.uint8)}
        steps.append(Step(Observation(images, np.full(3, i, np.float32), "go"), np.full(3, i / 10, np.float32)))
    return Episode(steps, "go", "toy", False, k, "go")


def assert_same_episode(a: Episode, b: Episode) -> None:
    """Everything that is stored is equal."""
    assert (a.instruction, a.success, a.seed, a.task, len(a)) == (b.instruction, b.success, b.seed, b.task, len(b))
    for x, y in zip(a.steps, b.steps, strict=True):
        assert x.observation.images.keys() == y.observation.images.keys()
        for name, image in x.observation.images.items():
            np.testing.assert_array_equal(image, y.observation.images[name])
        np.testing.assert_array_equal(x.observation.state, y.observation.state)
        np.testing.assert_array_equal(x.action, y.action)
        assert (x.reward, x.success, x.observation.instruction) == (y.reward, y.success, y.observation.instruction)
