"""A set of environment workers: processes, or the same interface in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vla.env_host import EnvFault, EnvHost, EnvReply
from vla.types import Suite
from vla.workers import DEFAULT_DEADLINES, Deadlines, EnvWorker, WorkerFault


class LocalWorker:
    """The interface of `EnvWorker` in this process: for tests and debugging. Hangs and crashes are not survived."""

    def __init__(self, suite: Suite, *, max_idle_envs: int = 8) -> None:
        self._suite, self._max_idle_envs = suite, max_idle_envs
        self._host = EnvHost(suite, max_idle_envs)
        self._calls: list[tuple[int, Any]] = []
        self.n_restarts = 0

    def reset(self, slot: int, task: str, seed: int, draw: bool = True) -> None:
        self._calls.append((slot, lambda: self._host.reset(slot, task, seed, draw)))

    def run_chunk(self, slot: int, actions: np.ndarray, render_every: int = 0, draw: bool = True) -> None:
        self._calls.append((slot, lambda: self._host.run_chunk(slot, actions, render_every, draw)))

    def poll(self) -> tuple[list[tuple[int, EnvReply]], WorkerFault | None]:
        """Execute everything asked for."""
        replies: list[tuple[int, EnvReply]] = []
        calls, self._calls = self._calls, []
        for slot, call in calls:
            try:
                replies.append((slot, call()))
            except EnvFault as fault:
                self._host = EnvHost(self._suite, self._max_idle_envs)  # the old one is not trusted, not even to close
                self.n_restarts += 1
                return replies, WorkerFault(str(fault), slot)
        return replies, None

    def available(self) -> bool:
        return True

    def handles(self) -> list[Any]:
        return []

    def next_event_s(self) -> float | None:
        """Seconds until something is due here; None if nothing is."""
        return 0.0 if self._calls else None

    def abandon(self) -> None:
        self._calls.clear()

    def close(self) -> None:
        self._host.close()


class WorkerPool:
    """Workers that outlive one run, e.g. for every iteration of RL. A context manager."""

    def __init__(
        self,
        suite: Suite,
        n_workers: int,
        slots_per_worker: int = 4,
        *,
        deadlines: Deadlines = DEFAULT_DEADLINES,
        max_idle_envs: int | None = None,
    ) -> None:
        """`max_idle_envs`: kept by each process for later episodes; default: half as many as the suite's slots."""
        max_idle_envs = suite.default_slots // 2 if max_idle_envs is None else max_idle_envs
        self.suite, self.slots_per_worker = suite, slots_per_worker
        self.workers: Sequence[EnvWorker | LocalWorker]
        if n_workers == 0:
            self.workers = [LocalWorker(suite, max_idle_envs=max_idle_envs)]
        else:
            options = {"deadlines": deadlines, "max_idle_envs": max_idle_envs}
            self.workers = [EnvWorker(suite, **options) for _ in range(n_workers)]

    def abandon(self) -> None:
        """Forget all running episodes; the processes stay."""
        for worker in self.workers:
            worker.abandon()

    def close(self) -> None:
        for worker in self.workers:
            worker.close()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
