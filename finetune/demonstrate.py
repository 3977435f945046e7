"""One demonstration of a scripted expert, with or without the frames in which nothing is asked of the robot."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from vla.types import Env, Episode, Observation, Policy, Step, Task

NOOP_NORM = 1e-4


def demonstrate(env: Env, expert: Policy, task: Task, seed: int, noise_std: float, dataset: str) -> Episode:
    """One attempt of the expert. Recorded actions are the expert's own, without the noise it is executed with.

    The noise makes the data show how to come back from small errors (DART, Laskey et al. 2017).
    """
    env.render_frames = True
    return _attempt(env, expert, task, seed, noise_std, dataset)


def demonstrate_without_noops(env: Env, expert: Policy, task: Task, seed: int, dataset: str) -> Episode:
    """The expert's actions without those that move nothing, executed once more from the same seed, and that recorded.

    As the LIBERO data of OpenVLA were made (`regenerate_libero_dataset.py`): states follow from the actions that are
    left, and an attempt that only succeeds with its pauses counts as failed. A policy trained on pauses learns to stay
    where it is. Nothing is drawn in the first pass.
    """
    env.render_frames = False
    first = _attempt(env, expert, task, seed, 0.0, dataset)
    if not first.success:
        return first
    actions = np.stack([step.action for step in first.steps])
    return repeat(env, actions[~noops(actions)], task, seed, dataset)


def repeat(env: Env, actions: Iterable[np.ndarray], task: Task, seed: int, dataset: str) -> Episode:
    """Execute float32 (D,) actions from a seed until they or the episode end; every frame is drawn."""
    env.render_frames = True
    observation, _ = env.reset(seed=seed)
    steps: list[Step] = []
    for action in actions:
        observation, step, ended = _step(env, observation, action, action)
        steps.append(step)
        if ended:
            break
    return _episode(steps, task, seed, dataset)


def noops(actions: np.ndarray) -> np.ndarray:
    """bool (N,): which actions (N, D), the gripper last, ask for no motion.

    OpenVLA's rule: the norm of all but the gripper is below 1e-4 and the gripper is as in the last action that was kept
    (nothing is asked of it before the first).
    """
    return np.fromiter(_noops(actions), bool, len(actions))


def _noops(actions: np.ndarray) -> Iterator[bool]:
    gripper: float | None = None
    for action in actions:
        noop = bool(np.linalg.norm(action[:-1]) < NOOP_NORM) and gripper in (None, float(action[-1]))
        if not noop:
            gripper = float(action[-1])
        yield noop


def _attempt(env: Env, expert: Policy, task: Task, seed: int, noise_std: float, dataset: str) -> Episode:
    noise = np.random.default_rng([seed, zlib.crc32(task.name.encode())])
    observation, _ = env.reset(seed=seed)
    expert.reset()
    steps: list[Step] = []
    for _ in range(task.max_steps):
        action = expert.act([observation])[0].actions[0].astype(np.float32)
        executed = action + noise.normal(0.0, noise_std, action.shape).astype(np.float32) if noise_std else action
        observation, step, ended = _step(env, observation, action, executed)
        steps.append(step)
        if ended:
            break
    return _episode(steps, task, seed, dataset)


def _step(env: Env, seen: Observation, action: np.ndarray, executed: np.ndarray) -> tuple[Observation, Step, bool]:
    """(what follows, the step to record, whether the episode has ended)."""
    following, reward, terminated, truncated, info = env.step(executed)
    step = Step(replace(seen, privileged=None), action, float(reward), bool(info["success"]))
    return following, step, terminated or truncated


def _episode(steps: list[Step], task: Task, seed: int, dataset: str) -> Episode:
    return Episode(steps, task.instruction, dataset, any(step.success for step in steps), seed, task.name)
