"""The rollout engine: many episodes, one policy, a fixed number of environment slots. Shared by evaluation and RL.

Slots, not waves: a slot whose episode ends takes the next request at once, so no slot waits for the slowest episode of a
batch, and the policy is asked about running episodes only. An episode's result depends on its request and the policy,
never on the number of workers, the order of arrival, or what happens in other slots: every random draw of the policy
is keyed by `Observation.key`, and a worker's death re-runs its episodes from their start.

    for result in run_episodes(policy, suite, requests, n_workers=2, slots_per_worker=4):
        ...
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing import connection

import numpy as np

from vla.ensemble import ChunkEnsemble
from vla.env_host import EnvReply, without_images
from vla.types import ActionChunk, EpisodeRequest, EpisodeResult, Observation, Policy, Query, Suite, VlaError, problem
from vla.worker_pool import WorkerPool
from vla.workers import DEFAULT_DEADLINES, Deadlines, WorkerFault

MAX_ATTEMPTS = 2
MIN_ATTEMPTS_TO_JUDGE_FAULTS = 10
FIRST_WINDOW_S = 1.0


@dataclass
class RolloutStats:
    """What a run has done so far; pass one in to watch it."""

    n_episodes: int = 0
    n_env_steps: int = 0
    n_policy_calls: int = 0
    n_queries: int = 0
    n_faults: int = 0
    """Episodes' attempts that ended in a fault; episodes lost because a neighbour's worker died are not among them."""
    policy_s: float = 0.0
    waiting_s: float = 0.0
    """Time in which the policy had nothing to do because all slots were busy."""
    fault_texts: Counter[str] = field(default_factory=Counter)


@dataclass
class _Episode:
    index: int
    request: EpisodeRequest
    attempt: int = 1
    observation: Observation | None = None
    ready_at: float = 0.0
    started_at: float = 0.0
    n_queries: int = 0
    n_steps: int = 0
    asked: tuple[Observation, ActionChunk, float] | None = None
    given: np.ndarray | None = None
    """float32 (n, D): the actions that the simulator was last given."""
    past_actions: np.ndarray | None = None
    """`Observation.past_actions` of the next query; None if the policy is not shown any."""
    ensemble: ChunkEnsemble | None = None
    queries: list[Query] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)


def run_episodes(
    policy: Policy,
    suite: Suite,
    requests: Iterable[EpisodeRequest],
    *,
    n_workers: int = 2,
    slots_per_worker: int = 4,
    n_execute: int | None = None,
    temporal_ensemble: float | None = None,
    ordered: bool = False,
    keep_queries: bool = False,
    keep_frames: bool | Callable[[EpisodeRequest], bool] = False,
    render_every: int = 0,
    on_result: Callable[[EpisodeResult], None] | None = None,
    deadlines: Deadlines = DEFAULT_DEADLINES,
    max_fault_fraction: float = 0.2,
    min_batch: int | None = None,
    window_s: float | None = None,
    fixed_batch: int | None = None,
    pool: WorkerPool | None = None,
    stats: RolloutStats | None = None,
) -> Generator[EpisodeResult, None, None]:
    """Run every request once; a simulator fault re-runs it once more, a second one is reported as `fault`.

    Requests are drawn only when a slot is free, so they may be infinite. Closing the generator ends the workers.
    A policy whose metadata says `"reads_images": False` gets observations without images: only a film's frames are drawn.
    One whose metadata says `"history": K` gets the last K actions executed in the episode.

    Args:
        n_workers: environment processes; 0 runs the environments in this process.
        n_execute: how many actions of each chunk to execute before asking again; None: all.
        temporal_ensemble: m of `vla.ensemble`; the policy is then asked at every step, and `n_execute` is 1 or left out.
        ordered: yield in the order of the requests instead of the order of completion. Take this when only some of an
            infinite stream's results are used: the first to complete are the short episodes, hence the successes.
        keep_frames: True, or which requests: keep the frames the policy saw, all cameras side by side; with
            `render_every` = k the first frame and every k-th step instead.
        on_result: called at completion, in that order.
        max_fault_fraction: more than this share of attempts (of at least 10) ending in a fault raises VlaError.
        min_batch: ask the policy as soon as so many slots are ready; default: half of them.
        window_s: or when the first of them has waited so long; default: as long as one policy call takes, which never
            costs more than twice the best possible choice.
        fixed_batch: give the policy exactly this many observations at a time (the last is repeated to fill up), for
            bitwise equal results on hardware whose kernels depend on the batch size.
        pool: workers to use and leave running; overrides `n_workers`, `slots_per_worker`, `deadlines`.

    Raises:
        VlaError: unknown task, wrong action shape or control rate, `n_execute` beyond the horizon, too many faults.
    """
    if n_execute is not None and n_execute < 1:
        raise problem(f"n_execute={n_execute}", "at least 1", "leave it out to execute whole chunks")
    if temporal_ensemble is not None:
        ChunkEnsemble(temporal_ensemble)
        if n_execute not in (None, 1):
            raise problem(f"n_execute={n_execute} with temporal_ensemble", "1: the policy is asked at every step",
                          "leave one of them out")  # fmt: skip
    if n_workers < 0 or slots_per_worker < 1:
        expected = "n_workers >= 0 and slots_per_worker >= 1"
        raise problem(f"n_workers={n_workers}, slots_per_worker={slots_per_worker}", expected, "correct them")

    def film(request: EpisodeRequest) -> bool:
        return keep_frames(request) if callable(keep_frames) else keep_frames

    def results() -> Generator[EpisodeResult, None, None]:
        check_control_rate(policy, suite)
        own = pool or WorkerPool(suite, n_workers, slots_per_worker, deadlines=deadlines)
        try:
            engine = _Engine(policy, own, iter(requests), stats or RolloutStats())
            engine.n_execute, engine.keep_queries, engine.film, engine.render_every = (
                n_execute,
                keep_queries,
                film,
                render_every,
            )
            engine.temporal_ensemble = temporal_ensemble
            engine.max_fault_fraction, engine.fixed_batch = max_fault_fraction, fixed_batch
            engine.min_batch = min_batch or (len(engine.free) + 1) // 2
            engine.window_s = window_s
            waiting: dict[int, EpisodeResult] = {}
            n_yielded = 0
            for index, result in engine.run():
                if on_result is not None:
                    on_result(result)
                if not ordered:
                    yield result
                    continue
                waiting[index] = result
                while n_yielded in waiting:
                    n_yielded += 1
                    yield waiting.pop(n_yielded - 1)
        finally:
            own.abandon() if own is pool else own.close()

    return results()


def side_by_side(observation: Observation, suite: Suite) -> np.ndarray:
    """uint8 (height, C * width, 3)."""
    return np.concatenate([observation.images[camera] for camera in suite.cameras], 1)


def check_control_rate(policy: Policy, suite: Suite) -> None:
    """A policy's deltas belong to the rate of its data: at half the rate the robot goes half as far, without a word.

    Raises:
        VlaError: both rates are known and more than half a hertz apart (a dataset's is a whole number).
    """
    learned = float(policy.metadata.get("control_hz") or 0.0)
    if learned and suite.control_hz and abs(learned - suite.control_hz) > 0.5:
        raise problem(f"a policy trained on data at {learned:g} Hz", f"{suite.control_hz:.3g} Hz, the rate of {suite.name}",
                      "collect data from this suite, or set the suite's rate to the policy's")  # fmt: skip


class _Engine:
    """State of one `run_episodes`. A slot is (worker number, slot number in it)."""

    n_execute: int | None
    temporal_ensemble: float | None
    keep_queries: bool
    film: Callable[[EpisodeRequest], bool]
    render_every: int
    max_fault_fraction: float
    fixed_batch: int | None
    min_batch: int
    window_s: float | None

    def __init__(
        self, policy: Policy, pool: WorkerPool, requests: Iterator[EpisodeRequest], stats: RolloutStats
    ) -> None:
        self.policy, self.pool, self.requests, self.stats = policy, pool, requests, stats
        self.reads_images = policy.metadata.get("reads_images") is not False
        self.history = int(policy.metadata.get("history") or 0)
        self.tasks = {task.name for task in pool.suite.tasks}
        # Worker first, so that few episodes are spread over all workers.
        self.free = [(w, s) for s in range(pool.slots_per_worker) for w in range(len(pool.workers))]
        self.running: dict[tuple[int, int], _Episode] = {}
        self.ready: list[tuple[int, int]] = []
        self.retries: deque[_Episode] = deque()
        self.finished: list[tuple[int, EpisodeResult]] = []
        self.exhausted = False
        self.n_drawn = 0
        self.call_s: float | None = None

    def run(self) -> Iterator[tuple[int, EpisodeResult]]:
        """(number of the request, result), in order of completion."""
        self.policy.reset()
        while True:
            self._fill()
            if not self.running and not self.retries and self.exhausted:
                return
            due = self._policy_due()
            self._collect(0.0 if due else self._wait_s())
            if self._policy_due():
                self._ask_policy()
            finished, self.finished = self.finished, []
            yield from finished

    def _fill(self) -> None:
        for slot in list(self.free):
            if not self.pool.workers[slot[0]].available():
                continue
            episode = self.retries.popleft() if self.retries else self._next_request()
            if episode is None:
                return
            self.free.remove(slot)
            self.running[slot] = episode
            episode.started_at = time.monotonic()
            draw = self.reads_images or self.film(episode.request)
            self.pool.workers[slot[0]].reset(slot[1], episode.request.task, episode.request.seed, draw)

    def _next_request(self) -> _Episode | None:
        request = None if self.exhausted else next(self.requests, None)
        if request is None:
            self.exhausted = True
            return None
        if request.task not in self.tasks:
            raise problem(
                f"task {request.task!r}", f"one of {', '.join(sorted(self.tasks))}", "choose a task of this suite"
            )
        self.n_drawn += 1
        return _Episode(self.n_drawn - 1, request)

    def _wait_s(self) -> float | None:
        """Until something may be due; None: until a worker answers."""
        due = [event for worker in self.pool.workers if (event := worker.next_event_s()) is not None]
        if self.ready:
            oldest = self.running[self.ready[0]].ready_at
            due.append(max(0.0, oldest + self._window_s() - time.monotonic()))
        return min(due) if due else None

    def _collect(self, timeout_s: float | None) -> None:
        handles = [handle for worker in self.pool.workers for handle in worker.handles()]
        start = time.monotonic()
        if handles:
            connection.wait(handles, timeout_s)
        elif timeout_s:
            time.sleep(timeout_s)
        self.stats.waiting_s += time.monotonic() - start
        for number, worker in enumerate(self.pool.workers):
            replies, fault = worker.poll()
            for slot, reply in replies:
                self._on_reply((number, slot), reply)
            if fault is not None:
                self._on_fault(number, fault)

    def _on_reply(self, slot: tuple[int, int], reply: EnvReply) -> None:
        episode = self.running[slot]
        self.stats.n_env_steps += reply.n_executed
        episode.n_steps += reply.n_executed
        if self.history:
            episode.past_actions = self._with_executed(episode, reply.n_executed)
        if episode.asked is not None and self.keep_queries:
            observation, chunk, latency_ms = episode.asked
            episode.queries.append(Query(observation, chunk, reply.n_executed, latency_ms))
        if self.film(episode.request):
            n_cameras = len(self.pool.suite.cameras)
            episode.frames.extend(
                np.concatenate(reply.frames[i : i + n_cameras], 1) for i in range(0, len(reply.frames), n_cameras)
            )
            if not reply.ended and (episode.asked is None or not self.render_every):
                episode.frames.append(side_by_side(reply.observation, self.pool.suite))
        if reply.ended:
            self._finish(slot, success=reply.success)
            return
        key = (*episode.request.key, episode.n_queries) if episode.request.key else ()
        observation = reply.observation if self.reads_images else without_images(reply.observation)
        episode.observation = replace(observation, key=key, past_actions=episode.past_actions)
        episode.ready_at = time.monotonic()
        self.ready.append(slot)

    def _with_executed(self, episode: _Episode, n_executed: int) -> np.ndarray:
        """The last actions of an episode, after `n_executed` of those it was given."""
        if episode.past_actions is None or episode.given is None:
            return np.zeros((0, len(self.pool.suite.action_names)), np.float32)
        return np.concatenate([episode.past_actions, episode.given[:n_executed]])[-self.history :]

    def _on_fault(self, worker: int, fault: WorkerFault) -> None:
        """The guilty episode is charged with an attempt; its neighbours only start again."""
        self.stats.fault_texts[fault.text] += 1
        for slot in [slot for slot in self.running if slot[0] == worker]:
            episode = self.running[slot]
            guilty = fault.guilty_slot in (None, slot[1])
            self.stats.n_faults += guilty
            if guilty and episode.attempt >= MAX_ATTEMPTS:
                self._finish(slot, fault=fault.text)
            else:
                self._free(slot)
                self.retries.append(_Episode(episode.index, episode.request, episode.attempt + guilty))
        attempts = self.stats.n_episodes + self.stats.n_faults
        if attempts >= MIN_ATTEMPTS_TO_JUDGE_FAULTS and self.stats.n_faults > self.max_fault_fraction * attempts:
            report = "; ".join(f"{count}x {text}" for text, count in self.stats.fault_texts.most_common(5))
            raise VlaError(
                f"{self.stats.n_faults} of {attempts} episode attempts ended in a simulator fault ({report}); expected at most "
                f"{self.max_fault_fraction:.0%}; fix: mend the simulator, or raise the limit or the deadlines"
            )

    def _window_s(self) -> float:
        if self.window_s is not None:
            return self.window_s
        return FIRST_WINDOW_S if self.call_s is None else self.call_s

    def _policy_due(self) -> bool:
        if not self.ready:
            return False
        if len(self.ready) >= min(self.min_batch, len(self.running)):
            return True
        return time.monotonic() - self.running[self.ready[0]].ready_at >= self._window_s()

    def _ask_policy(self) -> None:
        slots, self.ready = self.ready, []
        if self.fixed_batch is not None and len(slots) > self.fixed_batch:
            slots, self.ready = slots[: self.fixed_batch], slots[self.fixed_batch :]
        observations = [observation for slot in slots if (observation := self.running[slot].observation) is not None]
        padding = max(0, (self.fixed_batch or 0) - len(slots)) * [observations[-1]]
        start = time.monotonic()
        chunks = self.policy.act([*observations, *padding])
        call_s = time.monotonic() - start
        self.call_s = call_s if self.call_s is None else 0.7 * self.call_s + 0.3 * call_s
        self.stats.policy_s += call_s
        self.stats.n_policy_calls += 1
        self.stats.n_queries += len(slots)
        if len(chunks) != len(observations) + len(padding):
            expected = f"{len(observations) + len(padding)}, one per observation"
            raise problem(f"{len(chunks)} action chunks", expected, "correct the policy's act()")
        for slot, observation, chunk in zip(slots, observations, chunks, strict=False):
            self._on_chunk(slot, observation, chunk, call_s * 1e3)

    def _on_chunk(self, slot: tuple[int, int], observation: Observation, chunk: ActionChunk, latency_ms: float) -> None:
        episode = self.running[slot]
        episode.n_queries += 1
        episode.asked = (observation, chunk, latency_ms)
        if not chunk.ok:
            if self.keep_queries:
                episode.queries.append(Query(observation, chunk, 0, latency_ms))
            self._finish(slot, undecodable=1)
            return
        self._check_chunk(chunk)
        filmed = self.film(episode.request)
        render_every = self.render_every if filmed else 0
        draw = self.reads_images or (filmed and not render_every)
        actions = np.ascontiguousarray(chunk.actions[: self.n_execute], np.float32)
        if self.temporal_ensemble is not None:
            episode.ensemble = episode.ensemble or ChunkEnsemble(self.temporal_ensemble)
            actions = episode.ensemble.next(chunk.actions)[None]
        episode.given = actions
        self.pool.workers[slot[0]].run_chunk(slot[1], actions, render_every, draw)

    def _check_chunk(self, chunk: ActionChunk) -> None:
        n_names = len(self.pool.suite.action_names)
        if chunk.actions.ndim != 2 or chunk.actions.shape[1] != n_names or len(chunk.actions) < (self.n_execute or 1):
            expected = f"(H, {n_names}) with H >= {self.n_execute or 1}: {', '.join(self.pool.suite.action_names)}"
            raise problem(
                f"actions of shape {chunk.actions.shape}", expected, "use a policy for this suite, or lower n_execute"
            )
        if not np.isfinite(chunk.actions).all():
            raise problem(
                "actions that are not finite, with ok=True", "finite actions, or ok=False", "correct the policy"
            )

    def _finish(
        self, slot: tuple[int, int], success: bool = False, fault: str | None = None, undecodable: int = 0
    ) -> None:
        episode = self.running[slot]
        self._free(slot)
        self.stats.n_episodes += fault is None
        wall_s = time.monotonic() - episode.started_at
        result = EpisodeResult(
            episode.request, success, episode.n_steps, episode.queries, episode.frames, fault, undecodable, wall_s
        )
        self.finished.append((episode.index, result))

    def _free(self, slot: tuple[int, int]) -> None:
        del self.running[slot]
        self.free.append(slot)
        if slot in self.ready:
            self.ready.remove(slot)
