"""What the checks of `vla doctor` look at in a simulator: its facts, some first observations, and replayed episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla.doctor.finding import SUITE
from vla.eval.replay import ReplayPolicy, TokenPath, replay
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.policy import LocalPolicy
from vla.types import Observation, Suite, VlaError


@dataclass(frozen=True)
class FirstObservations:
    """A few resets of the simulator."""

    states: np.ndarray | None
    """float32 (R, S)."""
    pairs: tuple[tuple[np.ndarray, np.ndarray], ...]
    """(simulator's, dataset's) first frame uint8 (h, w, 3) of the same task and seed, of a camera both have."""
    needs: str = ""
    """What was missing if `pairs` is empty."""


def settle_steps(suite: Suite) -> int | None:
    """How many steps a suite waits before the policy acts, None if it has no such field."""
    found = getattr(suite, "settle_steps", None)
    return found if isinstance(found, int) else None


def first_observations(suite: Suite, reader: LeRobotReader | None, n: int) -> FirstObservations:
    """Reset up to `n` recorded episodes from their own task and seed; without any, the first task from seeds 0, 1, ..."""
    wanted = [] if reader is None else replayable(suite, reader, n)
    task = suite.tasks[0].name
    starts = [(e, reader.task_of(e) or task, reader.seed_of(e) or 0) for e in wanted] if reader else []
    try:
        seen = [(e, _first(suite, name, seed)) for e, name, seed in starts or [(-1, task, seed) for seed in range(n)]]
    except VlaError as error:
        return FirstObservations(None, (), f"a simulator that starts ({error})")
    states = [o.state for _, o in seen if o.state is not None]
    stacked = np.stack(states) if states else None
    if reader is None or not wanted:
        return FirstObservations(stacked, (), "a dataset of this suite with seeds and task names")
    shared = [camera for camera in suite.cameras if camera in reader.cameras]
    if not shared:
        return FirstObservations(
            stacked, (), f"a camera that both have: suite {', '.join(suite.cameras)}; data {', '.join(reader.cameras)}"
        )
    frames = [(o.images[shared[0]], reader.images(reader.episodes[e].start, shared[:1])[shared[0]]) for e, o in seen]
    return FirstObservations(stacked, tuple(frames))


def replayable(suite: Suite, reader: LeRobotReader, n: int) -> list[int]:
    """Up to `n` episodes, evenly spread, with a seed and a task of this suite, that were no failure."""
    tasks = {task.name for task in suite.tasks}
    good = [
        e for e in range(reader.n_episodes)
        if reader.seed_of(e) is not None and reader.task_of(e) in tasks and reader.success_of(e) is not False
    ]  # fmt: skip
    return [good[int(i)] for i in np.unique(np.linspace(0, len(good) - 1, min(n, len(good))).round())] if good else []


def replay_success(
    policy: LocalPolicy, suite: Suite, readers: Sequence[LeRobotReader], n: int, workers: int
) -> tuple[int | None, int, str]:
    """(successes, trials, what was missing) of up to `n` recorded episodes through the policy's normaliser and tokens."""
    for reader in readers:
        wanted = replayable(suite, reader, n)
        if not wanted:
            continue
        action = policy.spec.action
        episodes = [reader.episode(e, cameras=()) for e in wanted]
        try:
            recorded = ReplayPolicy(
                episodes, TokenPath(policy.codec, policy.normalizer), delta=action.delta, gripper_dim=action.gripper_dim,
                control_hz=reader.fps,
            )  # fmt: skip
            tally = replay(recorded, suite, n_workers=workers).tally()
        except VlaError as error:
            return None, 0, f"a replay that runs ({error})"
        return tally["successes"], tally["trials"], "a simulator without faults"
    return None, 0, f"{SUITE}, and a dataset of it with seeds and task names"


def _first(suite: Suite, task: str, seed: int) -> Observation:
    env = suite.make(task)
    try:
        return env.reset(seed=seed)[0]
    finally:
        env.close()
