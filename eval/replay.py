"""Recorded actions replayed in the simulator, as they are or through the action tokens.

A policy that predicted every token of its training data perfectly would execute `unnormalise(detokenise(tokenise(
normalise(action))))`. Replaying exactly that from each episode's own seed measures what the tokens lose: the upper bound
of imitation with this codec and these statistics. Raw replay must reproduce the recording; if it does not, the simulator,
its version or the dataset's seeds differ from those of the recording, and no policy's figure means anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla.eval.statistics import wilson
from vla.normalize import ActionNormalizer
from vla.progress import Progress
from vla.rollout import run_episodes
from vla.tokenizers.chunk_codec import ActionCodec
from vla.types import ActionChunk, Episode, EpisodeRequest, EpisodeResult, Observation, Suite, problem

SCHEMA = "vla-replay/1"


@dataclass(frozen=True)
class TokenPath:
    """The road of an action through the tokens."""

    codec: ActionCodec
    normalizer: ActionNormalizer
    to_robot: Callable[[np.ndarray], np.ndarray] | None = None
    """From actions (N, D) as the data has them to actions as the robot wants them; None: they are the same."""

    def __call__(self, actions: np.ndarray) -> np.ndarray:
        """float32 (N, D) recorded actions -> float32 (N, D) as a policy without any error would predict them.

        The last chunk is filled up with the episode's last action, as training does.
        """
        horizon, dim = self.codec.horizon, self.codec.dim
        wanted = np.minimum(np.arange(-(-len(actions) // horizon) * horizon), len(actions) - 1)
        chunks = self.normalizer.normalize(actions[wanted]).reshape(-1, horizon, dim)
        decoded, _ = self.codec.decode(self.codec.encode(chunks))
        return self.normalizer.unnormalize(decoded).reshape(-1, dim)[: len(actions)]

    def clipped(self, actions: np.ndarray) -> np.ndarray:
        """float64 (D,): share of the actions (N, D) that lie beyond q01 .. q99 (or beyond [-1, 1] where not masked)."""
        bounds = self.normalizer
        # float32 as the actions, or a value that is itself the bound could count as beyond it.
        low = np.where(bounds.mask, bounds.q01, -1.0).astype(np.float32)
        high = np.where(bounds.mask, bounds.q99, 1.0).astype(np.float32)
        return ((actions < low) | (actions > high)).mean(axis=0)


class ReplayPolicy:
    """Answers query k of episode i with recorded actions k H .. (k + 1) H; see `vla.types.Policy`.

    `Observation.key` says which episode and which query: use the requests of `requests()`, and execute whole chunks.
    Where a recording is over but the simulator has not called it a success, the robot is held still: only what was
    recorded may win.
    """

    def __init__(
        self, episodes: Sequence[Episode], token_path: TokenPath | None, *, horizon: int = 8, delta: bool = True,
        gripper_dim: int | None = None, control_hz: float = 0.0,
    ) -> None:  # fmt: skip
        """
        Args:
            episodes: with seed and task; images are not needed.
            token_path: None replays the actions as they are.
            horizon: actions per chunk of a raw replay; otherwise the codec decides.
            delta: the actions are displacements, so that holding still is 0 (False: the last action again).
            gripper_dim: keeps its last value while the robot is held still; None: there is no gripper.
            control_hz: rate of the recording; 0: unknown.

        Raises:
            VlaError: no episodes, one without seed, task or steps, or of another action size than the codec's.
        """
        self.episodes = tuple(episodes)
        self.horizon = token_path.codec.horizon if token_path else horizon
        self.recorded = [_recorded_actions(i, episode) for i, episode in enumerate(self.episodes)]
        dims = sorted(
            {actions.shape[1] for actions in self.recorded} | ({token_path.codec.dim} if token_path else set())
        )
        if len(dims) != 1:
            raise problem(f"{len(self.episodes)} episodes with action sizes {dims} (and the codec's)", "one size",
                          "replay a dataset with the codec of a policy trained on it")  # fmt: skip
        self.dim, self.control_hz = dims[0], control_hz
        self.predicted = [token_path(actions) if token_path else actions for actions in self.recorded]
        """float32 (N, D) of each episode, as the data has actions."""
        to_robot = token_path.to_robot if token_path else None
        self.executed = [to_robot(actions) for actions in self.predicted] if to_robot else self.predicted
        """float32 (N, D) of each episode, as the robot gets them."""
        self._token_path = token_path
        self._holds = [_hold(actions[-1], delta, gripper_dim) for actions in self.executed]

    @property
    def metadata(self) -> dict[str, Any]:
        name = "replay/tokens" if self._token_path else "replay/raw"
        return {"name": name, "horizon": self.horizon, "action_dim": self.dim, "control_hz": self.control_hz,
                "reads_images": False}  # fmt: skip

    def requests(self) -> list[EpisodeRequest]:
        """One per episode, in order."""
        found = []
        for i, episode in enumerate(self.episodes):
            assert episode.task is not None and episode.seed is not None  # checked at the start
            found.append(EpisodeRequest(episode.task, episode.seed, (i,), {"episode": i}))
        return found

    def act(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        return [self._chunk(observation.key) for observation in observations]

    def reset(self) -> None:
        """Nothing is remembered between queries."""

    def reconstruction(self) -> dict[str, list[float]]:
        """Per dimension over all recorded frames, in the data's units: mean and largest |predicted - recorded|, share clipped."""
        recorded, predicted = np.concatenate(self.recorded), np.concatenate(self.predicted)
        error = np.abs(predicted.astype(np.float64) - recorded)
        clipped = self._token_path.clipped(recorded) if self._token_path else np.zeros(self.dim)
        return {"l1": error.mean(0).tolist(), "max": error.max(0).tolist(), "clipped": clipped.tolist()}

    def _chunk(self, key: tuple[int, ...]) -> ActionChunk:
        if len(key) != 2 or not 0 <= key[0] < len(self.episodes) or key[1] < 0:
            raise problem(f"Observation.key {key}", f"(episode 0..{len(self.episodes) - 1}, query)",
                          "run the requests of ReplayPolicy.requests()")  # fmt: skip
        episode, query = key
        actions = self.executed[episode][query * self.horizon : (query + 1) * self.horizon]
        rest = np.repeat(self._holds[episode][None], self.horizon - len(actions), axis=0)
        return ActionChunk(np.concatenate([actions, rest]))


@dataclass(frozen=True)
class ReplayedEpisode:
    """One recording and what became of it."""

    episode: int
    """Its number in the policy's episodes."""
    task: str
    seed: int
    recorded_success: bool | None
    recorded_steps: int
    success: bool
    n_steps: int
    fault: str | None


@dataclass(frozen=True)
class ReplayResult:
    """What replaying some episodes found."""

    suite: str
    mode: str
    """Name of the policy: replay/raw or replay/tokens."""
    action_names: tuple[str, ...]
    reconstruction: dict[str, list[float]]
    """`ReplayPolicy.reconstruction`."""
    episodes: tuple[ReplayedEpisode, ...]
    versions: dict[str, str]
    """Of the simulator."""

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.task for row in self.episodes))

    def tally(self, task: str | None = None) -> dict[str, int]:
        """Counts over one task, or over all: episodes, recorded, successes, trials (without faults), faults."""
        rows = [row for row in self.episodes if task in (None, row.task)]
        faults = sum(row.fault is not None for row in rows)
        return {
            "episodes": len(rows), "recorded": sum(row.recorded_success is True for row in rows),
            "successes": sum(row.success for row in rows), "trials": len(rows) - faults, "faults": faults,
        }  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Plain values; `wilson_95` is the interval of successes / trials."""

        def counts(task: str | None) -> dict[str, Any]:
            tally = self.tally(task)
            interval = wilson(tally["successes"], tally["trials"])
            limits = [interval.low, interval.high] if tally["trials"] else None
            return {**tally, "wilson_95": limits}

        return {
            "schema": SCHEMA, "suite": self.suite, "mode": self.mode, "versions": self.versions,
            "all": counts(None), "tasks": {task: counts(task) for task in self.tasks},
            "action_names": list(self.action_names), "reconstruction": self.reconstruction,
            "episodes": [dict(vars(row)) for row in self.episodes],
        }  # fmt: skip


def replay(policy: ReplayPolicy, suite: Suite, *, n_workers: int = 2, slots_per_worker: int = 1) -> ReplayResult:
    """Replay every episode of `policy` once from its own seed.

    Raises:
        VlaError: a task the suite does not have, another action size or control rate, too many simulator faults.
    """
    if policy.dim != len(suite.action_names):
        raise problem(f"recorded actions of size {policy.dim}", f"{len(suite.action_names)}: {', '.join(suite.action_names)}",
                      f"replay data of {suite.name}, or choose the suite it was recorded in")  # fmt: skip
    requests = policy.requests()
    results = run_episodes(policy, suite, requests, n_workers=min(n_workers, len(requests)),
                           slots_per_worker=slots_per_worker, ordered=True)  # fmt: skip
    rows: list[ReplayedEpisode] = []
    successes = 0
    try:
        with Progress("replay", len(requests)) as progress:
            for result in results:
                rows.append(_row(policy, result))
                successes += result.success
                progress.advance(1, f"success {successes}/{len(rows)}")
    finally:
        results.close()
    names = tuple(suite.action_names)
    mode = policy.metadata["name"]
    return ReplayResult(suite.name, mode, names, policy.reconstruction(), tuple(rows), suite.versions())


def _row(policy: ReplayPolicy, result: EpisodeResult) -> ReplayedEpisode:
    i, request = int(result.request.tags["episode"]), result.request
    episode = policy.episodes[i]
    return ReplayedEpisode(i, request.task, request.seed, episode.success, len(episode), result.success, result.n_steps,
                           result.fault)  # fmt: skip


def _recorded_actions(number: int, episode: Episode) -> np.ndarray:
    """float32 (N, D)."""
    if episode.seed is None or episode.task is None or not len(episode):
        raise problem(f"episode {number} with seed {episode.seed}, task {episode.task} and {len(episode)} steps",
                      "a seed, the simulator's task name and at least one step",
                      "replay data that `vla data collect` recorded")  # fmt: skip
    return np.stack([step.action for step in episode.steps]).astype(np.float32)


def _hold(last: np.ndarray, delta: bool, gripper_dim: int | None) -> np.ndarray:
    """float32 (D,): the action that leaves the robot where it is."""
    if not delta:
        return last
    hold = np.zeros_like(last)
    if gripper_dim is not None:
        hold[gripper_dim] = last[gripper_dim]
    return hold
