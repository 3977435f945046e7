"""Counts and latencies of one server, kept in memory."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np

WINDOW = 2048
"""Latencies kept: percentiles are over the last this many answered requests."""


class Metrics:
    """Written by the event loop only, so no lock."""

    def __init__(self) -> None:
        self.requests = 0
        self.errors = 0
        """Answers with status 400 or above."""
        self.undecodable = 0
        """Observations whose model output was not an action."""
        self._started_s = time.monotonic()
        self._latencies_ms: deque[float] = deque(maxlen=WINDOW)

    def record(self, status: int, latency_ms: float) -> None:
        self.requests += 1
        if status >= 400:
            self.errors += 1
        else:
            self._latencies_ms.append(latency_ms)

    def counts(self) -> dict[str, Any]:
        uptime_s = time.monotonic() - self._started_s
        return {"uptime_s": round(uptime_s, 3), "requests": self.requests, "errors": self.errors,
                "undecodable": self.undecodable}  # fmt: skip

    def latency_ms(self) -> dict[str, float | None]:
        """p50, p90, p99 of the server's own time per request, first byte to last; None before the first."""
        if not self._latencies_ms:
            return {"p50": None, "p90": None, "p99": None}
        p50, p90, p99 = np.percentile(np.fromiter(self._latencies_ms, float), [50, 90, 99])
        return {"p50": round(p50, 3), "p90": round(p90, 3), "p99": round(p99, 3)}
