"""A dataset made of arrays, for tests of what works on every format."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vla.finetune.formats.source import FrameSource, Span
from vla.types import VlaError

ARM = ("dx", "dy", "dz", "drx", "dry", "drz", "gripper")


class ArraySource(FrameSource):
    """Everything is an argument; frames are noise that tells episodes and frames apart unless `frames` are given."""

    def __init__(
        self,
        actions: Sequence[np.ndarray],
        states: Sequence[np.ndarray] | None = None,
        *,
        instructions: Sequence[str] | None = None,
        success: Sequence[bool | None] | None = None,
        seeds: Sequence[int | None] | None = None,
        action_names: tuple[str, ...] = ARM,
        state_names: tuple[str, ...] = (),
        cameras: dict[str, tuple[int, int]] | None = None,
        fps: float = 10.0,
        name: str = "arrays",
    ) -> None:
        self.name, self.where, self.fps = name, f"memory/{name}", fps
        self.action_names, self.state_names = action_names, state_names
        self.sizes = {"front": (16, 20)} if cameras is None else cameras
        self.cameras = tuple(self.sizes)
        stops = np.cumsum([len(rows) for rows in actions]).tolist()
        self.episodes = [
            Span(k, stop - len(rows), stop) for k, (rows, stop) in enumerate(zip(actions, stops, strict=True))
        ]
        self._actions = np.concatenate(actions).astype(np.float32)
        self._states = None if states is None else np.concatenate(states).astype(np.float32)
        self.instructions = list(instructions or ["push the cup"] * len(actions))
        self.success, self.seeds = success, seeds
        self.broken: set[int] = set()
        """Frames that cannot be decoded."""
        self.frame_seeds = {i: i for i in range(len(self))}
        """Frame -> seed of its noise."""
        self.jpegs: dict[int, bytes] = {}

    def actions(self) -> np.ndarray:
        return self._actions

    def states(self) -> np.ndarray | None:
        return self._states

    def images(self, i: int, cameras: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        self.check_frame(i)
        if i in self.broken:
            raise VlaError(f"got a broken frame {i}; expected a picture; fix: none")
        found = {}
        for camera in self.cameras if cameras is None else cameras:
            self.check_camera(camera)
            rng = np.random.default_rng([self.frame_seeds[i], self.cameras.index(camera)])
            found[camera] = rng.integers(0, 256, (*self.sizes[camera], 3), dtype=np.uint8)
        return found

    def jpeg(self, i: int, camera: str) -> bytes | None:
        return self.jpegs.get(i)

    def image_shape(self, camera: str) -> tuple[int, int, int]:
        self.check_camera(camera)
        return (*self.sizes[camera], 3)

    def instruction_of(self, i: int) -> str:
        return self.instructions[self.episode_of(i)]

    def success_of(self, episode: int) -> bool | None:
        return None if self.success is None else self.success[episode]

    def seed_of(self, episode: int) -> int | None:
        return None if self.seeds is None else self.seeds[episode]


def toy_source(n_episodes: int = 4, n: int = 7, **options) -> ArraySource:
    """Episodes of n, n + 1, ... random actions and states of 3 numbers; two cameras."""
    rng = np.random.default_rng(0)
    lengths = [n + k for k in range(n_episodes)]
    options = {"cameras": {"front": (16, 20), "wrist/left": (12, 12)}, "action_names": ("dx", "dy", "gripper"),
               "state_names": ("x", "y", "z"), "instructions": [("open", "close")[k % 2] for k in range(n_episodes)],
               "seeds": [100 + k for k in range(n_episodes)]} | options  # fmt: skip
    actions = [rng.uniform(-1, 1, (k, 3)) for k in lengths]
    return ArraySource(actions, [rng.normal(size=(k, 3)) for k in lengths], **options)


def arm_source(n_episodes: int = 6, n: int = 60, seed: int = 0, fps: float = 10.0) -> ArraySource:
    """A hand that reaches smoothly for the same point from anywhere, and then closes: displacements, and a state that follows them.

    Gripper: -1 is open, 1 closes; the state's last number is the opening in metres, which follows it.
    """
    rng = np.random.default_rng(seed)
    all_actions, all_states = [], []
    for _ in range(n_episodes):
        goal, position, opening = np.linspace(-0.5, 0.5, 6), rng.uniform(-1, 1, 6), 0.04
        actions, states = [], []
        for i in range(n):
            states.append([*position, opening])
            move = np.clip(0.08 * (goal - position) + rng.normal(0, 0.004, 6), -0.1, 0.1)
            grip = 1.0 if i >= n * 2 // 3 else -1.0
            actions.append([*move, grip])
            position = position + move
            opening = float(np.clip(opening - 0.004 * grip, 0.0, 0.04))
        all_actions.append(np.array(actions))
        all_states.append(np.array(states))
    names = ("x", "y", "z", "rx", "ry", "rz", "gripper_width")
    return ArraySource(
        all_actions, all_states, state_names=names, fps=fps, seeds=[seed * 1000 + k for k in range(n_episodes)]
    )
