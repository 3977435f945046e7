"""How long one robot waits for one answer."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np

from vla.types import Policy, Suite


def measure_latency(policy: Policy, suite: Suite, n: int = 60, warmup: int = 5) -> dict[str, Any]:
    """Milliseconds of `n` single-observation calls on a real first frame: p50, p90, p99, mean; and n."""
    task = suite.tasks[0].name
    env = suite.make(task)
    try:
        observation = dataclasses.replace(env.reset(seed=1)[0], privileged=None)
    finally:
        env.close()
    times_ms = []
    for i in range(n + warmup):
        started = time.perf_counter()
        policy.act([observation])
        if i >= warmup:
            times_ms.append((time.perf_counter() - started) * 1e3)
    p50, p90, p99 = np.percentile(times_ms, [50, 90, 99])
    return {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "mean_ms": float(np.mean(times_ms)), "n": n}
