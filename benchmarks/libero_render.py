"""Frames drawn only when the policy will see them, against a plain loop that draws every camera at every step.

    python -m benchmarks.libero_render --suite libero_object --chunks 4 --episodes 2 --repeats 5 --workers 1 2

The policy is a fixed wave of small motions in chunks of 8 and costs nothing. Both sides run in this process, on environments
kept between repeats, and take turns; then the same episodes on 1, 2, ... worker processes. What the policy sees at every
query, the last state included (images and state), must be equal bit for bit on all sides, or the benchmark stops.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from vla.eval.suites import TASKS, get_suite
from vla.rollout import run_episodes
from vla.types import ActionChunk, Env, EpisodeRequest, Observation, Suite
from vla.worker_pool import WorkerPool

HORIZON = 8
FIRST_SEED = 0

Seen = dict[tuple[int, ...], str]
"""(seed, query) -> digest of the images and the state."""


@dataclass
class Wave:
    """Small motions that depend on the query alone; ends an episode after `n_chunks` by answering that it cannot."""

    action_dim: int
    n_chunks: int
    seen: Seen = field(default_factory=dict)
    began: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Seed -> wall and processor time of its first query."""
    stepping_s: list[float] = field(default_factory=list)
    """Of each episode: from its first query to its last."""
    stepping_cpu_s: list[float] = field(default_factory=list)
    """The same in processor time of this process: what to compare on a machine with other work."""

    @property
    def metadata(self) -> dict[str, object]:
        return {"name": "wave", "horizon": HORIZON, "action_dim": self.action_dim}

    def act(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        return [self._chunk(observation) for observation in observations]

    def reset(self) -> None:
        pass

    def _chunk(self, observation: Observation) -> ActionChunk:
        now, now_cpu = time.perf_counter(), time.process_time()
        seed, query = observation.key
        self.seen[observation.key] = digest(observation)
        if query == 0:
            self.began[seed] = time.perf_counter(), time.process_time()  # digesting is not the simulator's time
        if query == self.n_chunks:
            self.stepping_s.append(now - self.began[seed][0])
            self.stepping_cpu_s.append(now_cpu - self.began[seed][1])
            return ActionChunk(np.full((HORIZON, self.action_dim), np.nan, np.float32), ok=False)
        steps = np.arange(query * HORIZON, (query + 1) * HORIZON)[:, None]
        actions = 0.3 * np.sin(0.2 * steps + np.arange(self.action_dim))  # (H, D)
        actions[:, -1] = -1.0
        return ActionChunk(actions.astype(np.float32))


def digest(observation: Observation) -> str:
    found = hashlib.sha256(b"" if observation.state is None else observation.state.tobytes())
    for name in sorted(observation.images):
        found.update(name.encode() + observation.images[name].tobytes())
    return f"{len(observation.images)} images {found.hexdigest()}"


def plain_loop(env: Env, policy: Wave, requests: Sequence[EpisodeRequest]) -> None:
    """What a Gymnasium loop does: every camera at every step."""
    env.render_frames = True
    for request in requests:
        observation, _ = env.reset(seed=request.seed)
        for query in range(policy.n_chunks + 1):
            asked = Observation(observation.images, observation.state, observation.instruction, (*request.key, query))
            chunk = policy.act([asked])[0]
            for action in chunk.actions if chunk.ok else ():
                observation, _, terminated, truncated, _ = env.step(action)
                if terminated or truncated:
                    sys.exit(f"seed {request.seed} ended in chunk {query}: lower --chunks")


def engine(suite: Suite, policy: Wave, pool: WorkerPool, requests: Sequence[EpisodeRequest]) -> None:
    results = list(run_episodes(policy, suite, requests, pool=pool, min_batch=1))
    faults = [result.fault for result in results if result.fault is not None]
    if faults or any(result.n_steps != policy.n_chunks * HORIZON for result in results):
        sys.exit(f"episodes of {[result.n_steps for result in results]} steps, faults {faults}")


@dataclass
class Side:
    """One way of running the episodes, and how long each repeat took."""

    policy: Wave
    wall_s: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--task", default="", help="default: the first of the suite")
    parser.add_argument("--chunks", type=int, default=4, help="of 8 steps, per episode")
    parser.add_argument("--episodes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    arguments = parser.parse_args()
    task = arguments.task or TASKS[arguments.suite][0]
    suite = get_suite(arguments.suite, (task,))
    requests = [EpisodeRequest(task, FIRST_SEED + i, (FIRST_SEED + i,)) for i in range(arguments.episodes)]

    def side() -> Side:
        return Side(Wave(len(suite.action_names), arguments.chunks))

    with ExitStack() as stack:
        env = suite.make(task)
        stack.callback(env.close)
        local = stack.enter_context(WorkerPool(suite, 0, 1))
        pools = {n: stack.enter_context(WorkerPool(suite, n, 1)) for n in arguments.workers}
        plain, lazy, scaled = side(), side(), {n: side() for n in pools}

        def turn(timed: bool) -> None:
            run_timed(plain, lambda: plain_loop(env, plain.policy, requests), timed)
            run_timed(lazy, lambda: engine(suite, lazy.policy, local, requests), timed)
            for n, pool in pools.items():
                run_timed(scaled[n], lambda n=n, pool=pool: engine(suite, scaled[n].policy, pool, requests), timed)
            for name, other in {"in-process": lazy, **scaled}.items():
                if other.policy.seen != plain.policy.seen:
                    wrong = sorted(
                        key for key in plain.policy.seen if other.policy.seen.get(key) != plain.policy.seen[key]
                    )
                    sys.exit(f"runner ({name}) and plain loop differ at (seed, query) {wrong}")

        turn(timed=False)  # warm-up: environments, first frames
        for _ in range(arguments.repeats):
            turn(timed=True)
        report(suite, arguments, plain, lazy, scaled)
    sys.stdout.flush()
    os._exit(0)  # GL libraries complain at an orderly exit


def run_timed(side: Side, run: Callable[[], None], timed: bool) -> None:
    start = time.perf_counter()
    run()
    if timed:
        side.wall_s.append(time.perf_counter() - start)
    else:
        side.policy.stepping_s.clear()
        side.policy.stepping_cpu_s.clear()


def report(suite: Suite, arguments: argparse.Namespace, plain: Side, lazy: Side, scaled: dict[int, Side]) -> None:
    n_steps = arguments.chunks * HORIZON
    n_compared = len(plain.policy.seen)
    print(f"{suite.name}, {', '.join(suite.cameras)} at {suite.image_size_px} px, {arguments.episodes} episodes of {n_steps} "
          f"steps, median of {arguments.repeats} interleaved repeats, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; "
          f"{n_compared} observations equal on all sides")  # fmt: skip
    base, base_cpu = (statistics.median(times) for times in (plain.policy.stepping_s, plain.policy.stepping_cpu_s))
    for name, side in (("plain loop, every frame", plain), ("runner, in-process", lazy)):
        times, wall = side.policy.stepping_s, statistics.median(side.wall_s)
        stepping, cpu = statistics.median(times), statistics.median(side.policy.stepping_cpu_s)
        chunk_ms, low_ms, high_ms, cpu_ms = (
            1e3 * t / arguments.chunks for t in (stepping, min(times), max(times), cpu)
        )
        print(f"{name:24s} {chunk_ms:6.0f} ms per chunk ({low_ms:.0f} .. {high_ms:.0f}), {n_steps / stepping:6.1f} steps/s, "
              f"{base / stepping:5.2f}x; processor {cpu_ms:6.0f} ms, {base_cpu / cpu:5.2f}x; "
              f"with resets {3600 * arguments.episodes / wall:6.0f} episodes/h")  # fmt: skip
    one = statistics.median(scaled[min(scaled)].wall_s) if scaled else 0.0
    for n, side in scaled.items():
        wall = statistics.median(side.wall_s)
        print(f"runner, {n} worker{'s' if n > 1 else ' '}         {arguments.episodes * n_steps / wall:6.1f} steps/s and "
              f"{3600 * arguments.episodes / wall:6.0f} episodes/h with resets, {one / wall:5.2f}x of {min(scaled)} worker")  # fmt: skip


if __name__ == "__main__":
    main()
