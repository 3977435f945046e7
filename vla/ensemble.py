"""Temporal ensembling of action chunks (ACT: Zhao et al., arXiv 2304.13705, §IV-A).

The policy is asked at every control step, so that up to H chunks, made at earlier steps, say what to do now. What is done is
their weighted mean with w_i = exp(-m i), where w_0 weighs the oldest of them; the smaller m, the sooner the newest count.
Every dimension is averaged, the gripper too, as ACT does.

In the rollout engine this is `run_episodes(temporal_ensemble=m)`: it keeps one `ChunkEnsemble` per episode. Where one robot
is driven by hand, `EnsemblePolicy` wraps any policy, also that of an endpoint, whose server so remembers nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vla.types import ActionChunk, Observation, Policy, problem


class ChunkEnsemble:
    """The chunks of one episode that still speak about the present."""

    def __init__(self, m: float) -> None:
        """`m` >= 0; 0 is the plain mean, ACT uses 0.01."""
        if not (np.isfinite(m) and m >= 0.0):
            raise problem(f"temporal ensemble {m}", "a number >= 0", "pass 0.01, as ACT")
        self.m = m
        self._chunks: deque[np.ndarray] = deque()
        """Oldest first; the one at index -1 - k was made k steps ago."""

    def next(self, actions: np.ndarray) -> np.ndarray:
        """Give the chunk (H, D) that was predicted at this step; float32 (D,), what to do at it."""
        if self._chunks and actions.shape != self._chunks[-1].shape:
            raise problem(
                f"a chunk of shape {actions.shape}", f"{self._chunks[-1].shape}, as before", "reset the ensemble"
            )
        self._chunks.append(np.array(actions, np.float32))
        if len(self._chunks) > len(actions):
            self._chunks.popleft()
        n = len(self._chunks)
        now = np.stack([chunk[n - 1 - i] for i, chunk in enumerate(self._chunks)]).astype(np.float64)  # (n, D)
        weights = np.exp(-self.m * np.arange(n))
        return (weights @ now / weights.sum()).astype(np.float32)


class EnsemblePolicy:
    """A policy whose chunks are one averaged action, for one robot that asks at every step. See `vla.types.Policy`.

    `reset()` begins an episode. An undecodable chunk is passed on as it is; the ensemble is then over until `reset()`.
    A policy that reads past actions is shown the answers so far, unless an observation says what was executed.
    """

    def __init__(self, policy: Policy, m: float = 0.01) -> None:
        self.policy, self.m = policy, m
        self._ensemble: ChunkEnsemble | None = ChunkEnsemble(m)
        self._answers: deque[np.ndarray] = deque(maxlen=int(policy.metadata.get("history") or 0))

    @property
    def metadata(self) -> dict[str, Any]:
        return {**self.policy.metadata, "horizon": 1, "temporal_ensemble": self.m}

    def act(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        if len(observations) != 1:
            raise problem(f"{len(observations)} observations", "one robot's, one at a time",
                          "use one EnsemblePolicy per robot, or run_episodes(temporal_ensemble=...)")  # fmt: skip
        if self._ensemble is None:
            raise problem("a query after an undecodable chunk", "reset() first", "begin a new episode")
        observation = observations[0]
        if self._answers.maxlen and observation.past_actions is None:
            n_dims = int(self.policy.metadata["action_dim"])
            past = np.array(self._answers, np.float32).reshape(len(self._answers), n_dims)
            observation = replace(observation, past_actions=past)
        chunk = self.policy.act([observation])[0]
        if not chunk.ok:
            self._ensemble = None
            return [chunk]
        action = self._ensemble.next(chunk.actions)
        self._answers.append(action)
        return [replace(chunk, actions=action[None])]

    def reset(self) -> None:
        self.policy.reset()
        self._ensemble = ChunkEnsemble(self.m)
        self._answers.clear()
