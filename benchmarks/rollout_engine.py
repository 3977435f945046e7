"""The rollout engine against a plain loop that draws every frame; Meta-World, the same policy, the same episodes.

    python -m benchmarks.rollout_engine --episodes 8 --repeats 5

The policy repeats its expert's action for a whole chunk, so that its own cost is nothing. Both sides keep their environments
between repeats; the two take turns; the outcome (success, steps) of every episode must be equal. Prints medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence

import numpy as np

from vla.eval.expert import SuiteExpert
from vla.eval.metaworld_suite import MetaWorldEnv, MetaWorldSuite
from vla.rollout import run_episodes
from vla.types import ActionChunk, EpisodeRequest, Observation
from vla.worker_pool import WorkerPool

Outcome = tuple[str, int, bool, int]
"""Task, seed, success, steps."""


class HoldingExpert(SuiteExpert):
    """The expert's action, held for a chunk: float32 (H, D)."""

    horizon = 8

    def act(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        return [ActionChunk(np.repeat(chunk.actions, self.horizon, 0)) for chunk in super().act(observations)]


def plain_loop(
    suite: MetaWorldSuite, policy: HoldingExpert, envs: dict[str, MetaWorldEnv], requests: list[EpisodeRequest]
) -> list[Outcome]:
    """One environment at a time, a frame at every step: what a Gymnasium loop does."""
    outcomes = []
    for request in requests:
        if request.task not in envs:
            envs[request.task] = suite.make(request.task)
        env = envs[request.task]
        observation, _ = env.reset(seed=request.seed)
        n_steps, success, ended = 0, False, False
        while not ended:
            for action in policy.act([observation])[0].actions:
                observation, _, terminated, truncated, info = env.step(action)
                n_steps += 1
                success |= info["success"]
                ended = terminated or truncated
                if ended:
                    break
        outcomes.append((request.task, request.seed, success, n_steps))
    return outcomes


def engine(
    suite: MetaWorldSuite, policy: HoldingExpert, pool: WorkerPool, requests: list[EpisodeRequest]
) -> list[Outcome]:
    results = run_episodes(policy, suite, requests, pool=pool, ordered=True)
    return [(r.request.task, r.request.seed, r.success, r.n_steps) for r in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--slots", type=int, default=2)
    arguments = parser.parse_args()
    suite = MetaWorldSuite(("faucet-open", "drawer-close"))
    policy, envs = HoldingExpert(suite), dict[str, MetaWorldEnv]()
    requests = [EpisodeRequest(suite.task_names[i % 2], i) for i in range(arguments.episodes)]
    with WorkerPool(suite, arguments.workers, arguments.slots) as pool, WorkerPool(suite, 0, 1) as local:
        sides = {
            "plain loop, every frame": lambda: plain_loop(suite, policy, envs, requests),
            "engine, in-process": lambda: engine(suite, policy, local, requests),
            f"engine, {arguments.workers} workers x {arguments.slots} slots": lambda: engine(
                suite, policy, pool, requests
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        outcomes = {name: side() for name, side in sides.items()}  # warm-up: build environments, draw first frames
        for _ in range(arguments.repeats):
            for name, side in sides.items():
                start = time.perf_counter()
                found = side()
                seconds[name].append(time.perf_counter() - start)
                if found != outcomes["plain loop, every frame"]:
                    sys.exit(f"outcomes differ: {name} {found} against {outcomes['plain loop, every frame']}")
    n_steps = sum(outcome[3] for outcome in outcomes["plain loop, every frame"])
    base = statistics.median(seconds["plain loop, every frame"])
    print(f"{arguments.episodes} episodes, {n_steps} steps, chunk {policy.horizon}, median of {arguments.repeats}, "
          f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; outcomes equal")  # fmt: skip
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"{name:32s} {median:7.2f} s  {arguments.episodes / median:6.2f} episodes/s  {n_steps / median:7.1f} env steps/s  {base / median:5.2f}x"
        )
    sys.stdout.flush()
    os._exit(0)  # GL libraries complain at an orderly exit


if __name__ == "__main__":
    main()
