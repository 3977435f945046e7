"""One model behind many requests: rows that wait at the same time are answered by one `Policy.act`.

A lone client never waits for company: the batching window opens only while requests were seen to overlap within the
last second. Without a window, two robots in step would take turns forever.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from vla.serve.errors import RequestError, as_request_error, undecodable
from vla.types import ActionChunk, ActionDecodeError, Observation, Policy, VlaError

OVERLAP_S = 1.0
"""How long the window stays in use after two requests were last seen at the same time."""

Answer = ActionChunk | RequestError

logger = logging.getLogger("vla.serve")


class Batcher:
    """Calls the policy from one thread of its own, so the event loop is never blocked and no lock is needed."""

    def __init__(self, policy: Policy, max_batch: int = 16, window_s: float = 0.003, max_waiting: int = 256) -> None:
        self.batches = 0
        self.rows = 0
        self._policy = policy
        self._max_batch = max_batch
        self._window_s = window_s
        self._max_waiting = max_waiting
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")
        self._waiting: deque[tuple[Observation, asyncio.Future[Answer]]] = deque()
        self._drain_task: asyncio.Task[None] | None = None
        self._overlap_until_s = 0.0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def act(self, observations: Sequence[Observation]) -> list[Answer]:
        """One answer per observation, in order; a row's error is in its place.

        RequestError 503 if too many rows wait already.
        """
        if self._waiting and len(self._waiting) + len(observations) > self._max_waiting:
            raise RequestError(503, f"{len(self._waiting)} observations waiting", f"at most {self._max_waiting}",
                               "try again shortly, or start more servers")  # fmt: skip
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Answer]] = [loop.create_future() for _ in observations]
        self._waiting.extend(zip(observations, futures, strict=True))
        if self._drain_task is None:
            self._drain_task = loop.create_task(self._drain())
        else:
            self._overlap_until_s = time.monotonic() + OVERLAP_S
        return await asyncio.gather(*futures)

    async def _drain(self) -> None:
        """Answer rows until none waits. Started by the first row, so nothing runs while nobody asks."""
        try:
            while self._waiting:
                if len(self._waiting) < self._max_batch and time.monotonic() < self._overlap_until_s:
                    await asyncio.sleep(self._window_s)
                await self._answer([self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_batch))])
        finally:
            self._drain_task = None

    async def _answer(self, batch: list[tuple[Observation, asyncio.Future[Answer]]]) -> None:
        self.batches += 1
        self.rows += len(batch)
        try:
            loop = asyncio.get_running_loop()
            answers = await loop.run_in_executor(self._thread, self._run, [observation for observation, _ in batch])
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():  # done: its request was cancelled
                    future.set_result(answer)
        finally:
            for _, future in batch:
                future.cancel()  # no effect once answered; nobody may wait forever on a server that is going down

    def _run(self, observations: list[Observation]) -> list[Answer]:
        """In the policy's thread. One bad row must not fail its neighbours, so after an error each row goes alone."""
        try:
            chunks = self._policy.act(observations)
            if len(chunks) != len(observations):
                raise RuntimeError(f"the policy gave {len(chunks)} chunks for {len(observations)} observations")
            return list(chunks)
        except Exception as error:  # the boundary between a policy we do not know and the server: all is reported
            if len(observations) > 1:
                return [self._run([observation])[0] for observation in observations]
            return [_reported(error)]

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def _reported(error: Exception) -> RequestError:
    """What the client may see of a policy's exception; the rest goes to the log under an id."""
    if isinstance(error, ActionDecodeError):
        return undecodable(str(error))
    if isinstance(error, VlaError):
        return as_request_error(error)
    return internal_error(error)


def internal_error(error: Exception) -> RequestError:
    """Log the traceback under a fresh id and give the client that id."""
    error_id = uuid.uuid4().hex[:12]
    logger.error("error %s", error_id, exc_info=error)
    return RequestError(500, f"an internal error ({type(error).__name__})", "an action chunk",
                        f"look for {error_id} in the server's log", id=error_id)  # fmt: skip
