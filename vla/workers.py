"""Long-lived processes that run environments.

A worker owns several slots and serves their calls in order. Messages are small and go through a pipe; frames lie in shared
memory. Every call has a deadline. A worker that crashes, hangs, raises or returns nonsense is killed and started again:
after such an event nothing in that process (simulator state, GL context) is trusted.

Processes are spawned, never forked: an EGL context does not survive a fork.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np

from vla.env_host import EnvReply
from vla.types import Suite, VlaError
from vla.worker_process import serve, spawn_surroundings, view_images

MAX_START_FAILURES = 3
MAX_BACKOFF_S = 10.0
NOBODY = -1


@dataclass(frozen=True)
class Deadlines:
    """How long one call may take before its worker counts as hung."""

    start_timeout_s: float = 120.0
    """From starting the process to its first sign of life."""
    reset_timeout_s: float = 120.0
    """One reset, building the environment included."""
    step_timeout_s: float = 30.0
    """One chunk of steps."""


DEFAULT_DEADLINES = Deadlines()


@dataclass(frozen=True)
class WorkerFault:
    """A worker died. All episodes in its slots are lost; only the guilty one's request is to blame."""

    text: str
    guilty_slot: int | None
    """Whose call it happened in; None if it cannot be told, `NOBODY` if no episode is to blame."""


@dataclass
class _Call:
    slot: int
    what: str
    timeout_s: float
    started_at: float
    ignored: bool = False


class EnvWorker:
    """One environment process, seen from the parent. Calls return at once; `poll` brings the answers."""

    def __init__(self, suite: Suite, *, deadlines: Deadlines = DEFAULT_DEADLINES, max_idle_envs: int = 8) -> None:
        self._suite, self._deadlines, self._max_idle_envs = suite, deadlines, max_idle_envs
        self._image_bytes = suite.image_size_px**2 * 3
        self._blocks: dict[int, SharedMemory] = {}
        self._calls: deque[_Call] = deque()
        self._process: Any = None
        self._connection: Any = None
        self._ready = False
        self._started_at = self._restart_at = 0.0
        self._n_faults_in_row = self._n_start_failures = 0
        self.n_restarts = 0
        self._start()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def reset(self, slot: int, task: str, seed: int, draw: bool = True) -> None:
        """Start an episode; `draw` says whether anybody looks at its first frame."""
        self._send(slot, "reset", self._deadlines.reset_timeout_s, 0, (task, seed, draw))

    def run_chunk(self, slot: int, actions: np.ndarray, render_every: int = 0, draw: bool = True) -> None:
        """Actions are float32 (n, D); all n are executed unless the episode ends first. `draw`: the last frame."""
        n_frames = (len(actions) // render_every + 1) * len(self._suite.cameras) if render_every else 0
        self._send(slot, "chunk", self._deadlines.step_timeout_s, n_frames, (actions, render_every, draw))

    def poll(self) -> tuple[list[tuple[int, EnvReply]], WorkerFault | None]:
        """Answers since the last poll, and the fault that ended the process, if one did. VlaError: the user's mistake."""
        replies: list[tuple[int, EnvReply]] = []
        if self._process is None:
            return replies, None
        try:
            while self._connection.poll():
                kind, content = self._connection.recv()
                if kind == "ready":
                    self._ready, self._n_start_failures = True, 0
                    self._restart_clock()
                    continue
                if kind == "user_error":
                    raise VlaError(content)
                if kind == "fault":
                    return replies, self._fault(content, self._current_slot())
                call = self._calls.popleft()
                self._restart_clock()
                self._n_faults_in_row = 0
                if not call.ignored:
                    replies.append((call.slot, self._with_images(call.slot, *content)))
        except (EOFError, ConnectionResetError):
            return replies, self._fault(self._exit_text(), self._current_slot())
        if not self._process.is_alive():
            return replies, self._fault(self._exit_text(), self._current_slot())
        return replies, self._hang()

    def available(self) -> bool:
        """True if calls can be sent. Starts the process again once its back-off is over."""
        if self._process is None and time.monotonic() >= self._restart_at:
            self._start()
        return self._process is not None

    def handles(self) -> list[Any]:
        """What `multiprocessing.connection.wait` can wait on."""
        return [] if self._process is None else [self._connection, self._process.sentinel]

    def next_event_s(self) -> float | None:
        """Seconds until a deadline or restart is due; None if nothing is."""
        due = self._due_at()
        return None if due is None else max(0.0, due - time.monotonic())

    def abandon(self) -> None:
        """Drop the answers still to come."""
        for call in self._calls:
            call.ignored = True

    def close(self) -> None:
        """End the process and free the shared memory."""
        if self._process is not None:
            if self._calls or not self._ready:
                self._process.kill()  # it would finish its work first
            else:
                self._try_send(None)
            self._process.join(5.0)
            self._kill()
        for block in self._blocks.values():
            block.close()
            block.unlink()
        self._blocks.clear()

    def _start(self) -> None:
        context = get_context("spawn")
        self._connection, child = context.Pipe()
        arguments = (child, self._suite, self._max_idle_envs)
        self._process = context.Process(target=serve, args=arguments, name="vla-env-worker", daemon=True)
        with spawn_surroundings(self._suite):
            self._process.start()
        child.close()
        self._ready, self._started_at = False, time.monotonic()

    def _send(self, slot: int, what: str, timeout_s: float, n_frames: int, arguments: tuple[Any, ...]) -> None:
        block = self._block(slot, n_frames)
        self._calls.append(_Call(slot, what, timeout_s, time.monotonic()))
        self._try_send((what, slot, block.name, *arguments))

    def _try_send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            return  # the process is dead; the next poll says so

    def _block(self, slot: int, n_frames: int) -> SharedMemory:
        """Room for one image per camera and `n_frames` more; grows, never shrinks."""
        size = (len(self._suite.cameras) + n_frames) * self._image_bytes
        block = self._blocks.get(slot)
        if block is None or block.size < size:
            if block is not None:
                block.close()
                block.unlink()
            block = self._blocks[slot] = SharedMemory(create=True, size=max(size, 1))
        return block

    def _with_images(self, slot: int, reply: EnvReply, has_images: bool, n_frames: int) -> EnvReply:
        n_images = len(self._suite.cameras) if has_images else 0
        images = view_images(self._blocks[slot], n_images + n_frames, self._suite.image_size_px).copy()
        named = dict(zip(self._suite.cameras, images, strict=False)) if has_images else {}
        return replace(reply, observation=replace(reply.observation, images=named), frames=list(images[n_images:]))

    def _restart_clock(self) -> None:
        """Calls run one after another: the next one's time starts when the one before it has answered."""
        if self._calls:
            self._calls[0].started_at = max(self._calls[0].started_at, time.monotonic())

    def _due_at(self) -> float | None:
        if self._process is None:
            return self._restart_at
        if not self._ready:
            return self._started_at + self._deadlines.start_timeout_s
        return self._calls[0].started_at + self._calls[0].timeout_s if self._calls else None

    def _hang(self) -> WorkerFault | None:
        due = self._due_at()
        if due is None or time.monotonic() < due:
            return None
        if not self._ready:
            return self._fault(f"hang: not ready {self._deadlines.start_timeout_s:g} s after its start", NOBODY)
        return self._fault(
            f"hang: {self._calls[0].what} took over {self._calls[0].timeout_s:g} s", self._current_slot()
        )

    def _current_slot(self) -> int | None:
        if not self._ready or (self._calls and self._calls[0].ignored):
            return NOBODY
        return self._calls[0].slot if self._calls else None

    def _exit_text(self) -> str:
        self._process.join(5.0)
        code = self._process.exitcode
        return (
            f"crash: worker killed by signal {-code}" if (code or 0) < 0 else f"crash: worker exited with code {code}"
        )

    def _fault(self, text: str, guilty_slot: int | None) -> WorkerFault:
        was_ready = self._ready
        self._kill()
        self._calls.clear()
        self.n_restarts += 1
        self._n_start_failures += not was_ready
        if self._n_start_failures >= MAX_START_FAILURES:
            raise VlaError(
                f"environment workers for suite {self._suite.name!r} fail to start ({text}, {MAX_START_FAILURES} times in a row); "
                "their own error is printed above; fix: make the suite importable and picklable in a fresh process"
            )
        self._restart_at = time.monotonic() + min(0.1 * 2**self._n_faults_in_row, MAX_BACKOFF_S)
        self._n_faults_in_row += 1
        return WorkerFault(text, guilty_slot)

    def _kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self._connection.close()
        self._process = self._connection = None
