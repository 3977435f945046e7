"""Runs environments for a number of slots, one call after another. Used inside worker processes and in-process.

A slot holds one episode. Environments outlive episodes: one that a slot gives back is re-targeted (reset with a new seed)
by the next episode of the same task. Frames are drawn only where somebody looks: the first step of an episode, the last
executed step of a chunk (unless the policy reads no images), and every `render_every`-th step of a filmed episode.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vla.types import Env, Observation, Suite, Task, VlaError


class EnvFault(Exception):
    """The simulator misbehaved. The text is what `EpisodeResult.fault` says."""


@dataclass(frozen=True)
class EnvReply:
    """Answer of one slot to a reset or a chunk."""

    observation: Observation
    """After the last executed step; without images if the episode has ended."""
    n_executed: int = 0
    success: bool = False
    """Latched since the reset."""
    ended: bool = False
    frames: list[np.ndarray] = field(default_factory=list)
    """The film, uint8 (height, width, 3): of each filmed step the first camera's frame, the second's, ..."""


@dataclass
class _Slot:
    task: Task
    env: Env
    n_steps: int = 0
    success: bool = False


class EnvHost:
    """Environments by slot, plus up to `max_idle_envs` kept for later."""

    def __init__(self, suite: Suite, max_idle_envs: int) -> None:
        self._suite = suite
        self._tasks = {task.name: task for task in suite.tasks}
        self._max_idle_envs = max_idle_envs
        self._slots: dict[int, _Slot] = {}
        self._idle: list[_Slot] = []  # oldest first

    def reset(self, slot: int, task: str, seed: int, draw: bool = True) -> EnvReply:
        """Start an episode; EnvFault if the simulator fails, VlaError if the user can mend it. `draw`: the first frame."""
        self._release(slot)
        found = guarded("make", lambda: self._take(task))
        self._trim_idle()
        self._slots[slot] = found
        found.env.render_frames = draw
        observation = guarded("reset", lambda: self._checked(found.env.reset(seed=seed)[0], draw))
        return EnvReply(observation if draw else without_images(observation))

    def run_chunk(self, slot: int, actions: np.ndarray, render_every: int = 0, draw: bool = True) -> EnvReply:
        """Execute float32 (n, D) actions until the episode ends. `render_every` 0: no film. `draw`: the last frame."""
        state = self._slots[slot]
        return guarded("step", lambda: self._steps(state, actions, render_every, draw))

    def close(self) -> None:
        for state in [*self._slots.values(), *self._idle]:
            state.env.close()
        self._slots.clear()
        self._idle.clear()

    def _steps(self, state: _Slot, actions: np.ndarray, render_every: int, draw: bool) -> EnvReply:
        frames: list[np.ndarray] = []
        for i, action in enumerate(actions):
            state.n_steps += 1
            filmed = render_every > 0 and state.n_steps % render_every == 0
            final = state.n_steps >= state.task.max_steps
            seen = draw and i == len(actions) - 1 and not final  # nobody sees the frame after the last step
            state.env.render_frames = seen or filmed
            observation, _, terminated, truncated, info = state.env.step(action)
            observation = self._checked(observation, seen or filmed)
            state.success |= bool(info["success"])
            if filmed:
                frames.extend(observation.images[camera] for camera in self._suite.cameras)
            if terminated or truncated or final:
                return EnvReply(without_images(observation), i + 1, state.success, True, frames)
        return EnvReply(
            observation if draw else without_images(observation), len(actions), state.success, False, frames
        )

    def _take(self, task: str) -> _Slot:
        for i, state in enumerate(self._idle):
            if state.task.name == task:
                del self._idle[i]
                return _Slot(state.task, state.env)
        self._trim_idle()  # before another one needs memory
        return _Slot(self._tasks[task], self._suite.make(task))

    def _release(self, slot: int) -> None:
        state = self._slots.pop(slot, None)
        if state is None:
            return
        self._idle.append(state)

    def _trim_idle(self) -> None:
        while len(self._idle) > self._max_idle_envs:
            self._idle.pop(0).env.close()

    def _checked(self, observation: Observation, with_images: bool) -> Observation:
        check_observation(self._suite, observation, with_images)
        return observation


def check_observation(suite: Suite, observation: Observation, with_images: bool) -> None:
    """EnvFault unless the images, state and privileged state are what the suite announces, and finite."""
    size = suite.image_size_px
    for camera in suite.cameras if with_images else ():
        image = observation.images.get(camera)
        got = "no image" if image is None else f"{image.dtype} {image.shape}"
        if got != f"uint8 {(size, size, 3)}":
            raise EnvFault(f"bad observation: camera {camera!r} gave {got}, expected uint8 {(size, size, 3)}")
    n_state = len(suite.state_names)
    if n_state and (observation.state is None or observation.state.shape != (n_state,)):
        got = "none" if observation.state is None else observation.state.shape
        raise EnvFault(f"bad observation: state {got}, expected shape {(n_state,)}")
    for name, values in (("state", observation.state), ("privileged state", observation.privileged)):
        if values is not None and not np.isfinite(values).all():
            raise EnvFault(f"non-finite {name}")


def without_images(observation: Observation) -> Observation:
    return replace(observation, images={})


def guarded(what: str, call: Callable[[], Any]) -> Any:
    """Turn any exception of a simulator into an EnvFault; the user's mistakes pass."""
    try:
        return call()
    except (VlaError, EnvFault):
        raise
    except Exception as error:  # a simulator may raise anything; all of it means that this episode is void
        place = traceback.extract_tb(error.__traceback__)[-1]
        name = place.filename.rsplit("/", 1)[-1]
        raise EnvFault(f"exception in {what}: {type(error).__name__}: {error} ({name}:{place.lineno})") from error
