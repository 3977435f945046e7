"""The rollout engine: results that depend on nothing but the request, and faults that harm nobody else."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vla.rollout import RolloutStats, run_episodes
from vla.testing import CAMERA, FakeSuite, NoisyPolicy
from vla.types import ActionChunk, EpisodeRequest, EpisodeResult, VlaError
from vla.worker_pool import WorkerPool
from vla.workers import Deadlines

FAST = Deadlines(start_timeout_s=60.0, reset_timeout_s=5.0, step_timeout_s=1.0)


def requests(n: int = 10) -> list[EpisodeRequest]:
    return [EpisodeRequest(("reach-near", "reach-far")[i % 2], i, key=(7, i), tags={"i": i}) for i in range(n)]


def summary(results: list[EpisodeResult]) -> list[tuple]:
    """Everything that must not depend on scheduling, by request."""
    rows = []
    for result in sorted(results, key=lambda r: r.request.tags["i"]):
        trace = [(q.observation.key, q.chunk.actions.tobytes(), q.n_executed) for q in result.queries]
        pixels = [q.observation.images[CAMERA].tobytes() for q in result.queries]
        rows.append(
            (result.request.tags["i"], result.success, result.n_steps, result.fault, result.undecodable, trace, pixels)
        )
    return rows


@pytest.fixture(scope="module")
def reference() -> list[tuple]:
    results = run_episodes(NoisyPolicy(), FakeSuite(), requests(), n_workers=0, slots_per_worker=1, keep_queries=True)
    return summary(list(results))


def assert_no_children() -> None:
    deadline = time.monotonic() + 5.0
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_reference_has_both_outcomes_and_partial_chunks(reference: list[tuple]) -> None:
    assert {row[1] for row in reference} == {True, False}
    assert any(query[2] < 5 for row in reference for query in row[5])


@pytest.mark.parametrize(("n_workers", "slots"), [(0, 4), (1, 3), (2, 2)])
def test_results_do_not_depend_on_workers_or_slots(reference: list[tuple], n_workers: int, slots: int) -> None:
    policy = NoisyPolicy()
    results = list(
        run_episodes(policy, FakeSuite(), requests(), n_workers=n_workers, slots_per_worker=slots, keep_queries=True)
    )
    assert summary(results) == reference
    assert max(policy.batch_sizes) > 1
    assert_no_children()


def test_ordered_and_on_result() -> None:
    completed: list[int] = []
    results = run_episodes(
        NoisyPolicy(), FakeSuite(), requests(), n_workers=0, slots_per_worker=4, ordered=True,
        on_result=lambda r: completed.append(r.request.tags["i"]),
    )  # fmt: skip
    assert [r.request.tags["i"] for r in results] == list(range(10))
    assert completed != list(range(10)) and sorted(completed) == list(range(10))


def test_n_execute_replans(reference: list[tuple]) -> None:
    results = list(run_episodes(NoisyPolicy(), FakeSuite(), requests(4), n_workers=0, n_execute=2, keep_queries=True))
    for result in results:
        assert all(query.n_executed <= 2 for query in result.queries)
        assert sum(query.n_executed for query in result.queries) == result.n_steps
        assert [query.observation.key[-1] for query in result.queries] == list(range(len(result.queries)))


def test_finished_slots_are_never_forwarded_again() -> None:
    policy, stats = NoisyPolicy(), RolloutStats()
    results = list(
        run_episodes(policy, FakeSuite(), requests(), n_workers=0, slots_per_worker=4, keep_queries=True, stats=stats)
    )
    assert sum(policy.batch_sizes) == sum(len(r.queries) for r in results) == stats.n_queries
    assert stats.n_env_steps == sum(r.n_steps for r in results)


def test_greedy_requests_have_no_key() -> None:
    class Greedy(NoisyPolicy):
        def act(self, observations):  # noqa: ANN001, ANN202
            assert all(o.key == () for o in observations)
            return [ActionChunk(np.zeros((5, 2), np.float32)) for _ in observations]

    results = list(run_episodes(Greedy(), FakeSuite(), [EpisodeRequest("reach-far", 3)], n_workers=0))
    assert not results[0].success and results[0].n_steps == 12


def test_undecodable_ends_as_failure_and_is_not_executed() -> None:
    policy = NoisyPolicy(undecodable_keys=((7, 1),))
    results = {
        r.request.tags["i"]: r for r in run_episodes(policy, FakeSuite(), requests(4), n_workers=0, keep_queries=True)
    }
    broken = results[1]
    assert (broken.success, broken.fault, broken.undecodable) == (False, None, 1)
    assert broken.n_steps == 5 and [q.n_executed for q in broken.queries] == [5, 0]
    assert all(results[i].undecodable == 0 for i in (0, 2, 3))


@pytest.mark.parametrize("n_workers", [0, 1])
def test_frames(n_workers: int) -> None:
    run = {"n_workers": n_workers, "slots_per_worker": 2, "keep_queries": True}
    seen = list(run_episodes(NoisyPolicy(), FakeSuite(), requests(2), keep_frames=True, **run))
    for result in seen:
        assert len(result.frames) == len(result.queries)
        for frame, query in zip(result.frames, result.queries, strict=True):
            np.testing.assert_array_equal(frame, query.observation.images[CAMERA])
    film = list(
        run_episodes(
            NoisyPolicy(), FakeSuite(), requests(2), keep_frames=lambda r: r.tags["i"] == 1, render_every=2, **run
        )
    )
    by_number = {r.request.tags["i"]: r for r in film}
    assert by_number[0].frames == []
    assert len(by_number[1].frames) == 1 + by_number[1].n_steps // 2
    assert summary(film) == summary(seen)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("exit", "crash: worker exited with code 1"),
        ("raise_reset", "exception in reset: RuntimeError: planted fault in reset"),
        ("raise_step", "exception in step: RuntimeError: planted fault in step"),
        ("garbage_shape", r"bad observation: state \(7,\), expected shape \(2,\)"),
        ("nan", "non-finite state"),
    ],
)
def test_fault_is_reported_and_harms_nobody_else(reference: list[tuple], kind: str, text: str) -> None:
    suite, stats = FakeSuite(faults=(("reach-far", 3, kind),)), RolloutStats()
    results = list(
        run_episodes(NoisyPolicy(), suite, requests(), n_workers=1, slots_per_worker=4, keep_queries=True, stats=stats)
    )
    faulty = [r for r in results if r.fault is not None]
    assert [r.request.tags["i"] for r in faulty] == [3] and not faulty[0].success
    assert re.search(text, faulty[0].fault or "")
    assert stats.n_faults == 2  # tried twice, then given up
    others = [r for r in results if r.fault is None]
    assert summary(others) == [row for row in reference if row[0] != 3]
    assert_no_children()


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_fault_that_happens_once_costs_nothing(reference: list[tuple], tmp_path: Path, n_workers: int) -> None:
    kind = "raise_step" if n_workers == 0 else "exit"
    suite = FakeSuite(passing_faults=(("reach-far", 3, kind), ("reach-near", 4, kind)), passed_in=str(tmp_path))
    stats = RolloutStats()
    results = list(
        run_episodes(
            NoisyPolicy(), suite, requests(), n_workers=n_workers, slots_per_worker=3, keep_queries=True, stats=stats
        )
    )
    assert summary(results) == reference
    assert stats.n_faults == 2


def test_hang_is_cut_at_its_deadline() -> None:
    suite = FakeSuite(faults=(("reach-far", 1, "hang"),))
    times: dict[int, float] = {}
    start = time.monotonic()
    for result in run_episodes(NoisyPolicy(), suite, requests(2), n_workers=2, slots_per_worker=1, deadlines=FAST):
        times[result.request.tags["i"]] = time.monotonic() - start
        if result.request.tags["i"] == 1:
            assert result.fault == "hang: chunk took over 1 s"
    assert times[1] - times[0] < 2 * 1.0 + 15.0  # two deadlines, one restart
    assert_no_children()


def test_too_many_faults_abort_with_a_report() -> None:
    suite = FakeSuite(faults=tuple((task, i, "raise_reset") for i in range(30) for task in ("reach-near", "reach-far")))
    with pytest.raises(VlaError, match=r"10 of 10 episode attempts.*10x exception in reset: RuntimeError.*at most 20%"):
        list(run_episodes(NoisyPolicy(), suite, requests(30), n_workers=0))


def test_infinite_requests_and_close() -> None:
    drawn = itertools.count()

    def endless():  # noqa: ANN202
        for i in drawn:
            yield EpisodeRequest("reach-near", i, key=(1, i))

    run = run_episodes(NoisyPolicy(), FakeSuite(), endless(), n_workers=2, slots_per_worker=2)
    first = list(itertools.islice(run, 6))
    assert len(first) == 6
    assert len(multiprocessing.active_children()) == 2
    run.close()
    assert_no_children()
    assert next(drawn) <= 6 + 4 + 4  # drawn on demand: one per slot ahead


def test_pool_outlives_a_run_that_is_closed_early(reference: list[tuple]) -> None:
    with WorkerPool(FakeSuite(), n_workers=1, slots_per_worker=3) as pool:
        run = run_episodes(NoisyPolicy(), FakeSuite(), requests(), pool=pool)
        next(run)
        run.close()
        pid = multiprocessing.active_children()[0].pid
        results = list(run_episodes(NoisyPolicy(), FakeSuite(), requests(), pool=pool, keep_queries=True))
        assert summary(results) == reference
        assert [child.pid for child in multiprocessing.active_children()] == [pid]
    assert_no_children()


def test_fixed_batch_pads_and_splits(reference: list[tuple]) -> None:
    policy = NoisyPolicy()
    results = run_episodes(
        policy, FakeSuite(), requests(), n_workers=0, slots_per_worker=4, fixed_batch=3, keep_queries=True
    )
    assert summary(list(results)) == reference
    assert set(policy.batch_sizes) == {3}


def test_users_mistakes_are_not_faults() -> None:
    with pytest.raises(VlaError, match="got task 'reech'; expected one of reach-far, reach-near"):
        list(run_episodes(NoisyPolicy(), FakeSuite(), [EpisodeRequest("reech", 0)], n_workers=0))
    with pytest.raises(VlaError, match=r"n_execute=0"):
        run_episodes(NoisyPolicy(), FakeSuite(), requests(), n_execute=0)
    with pytest.raises(VlaError, match=r"shape \(5, 2\); expected \(H, 2\) with H >= 9: dx, dy"):
        list(run_episodes(NoisyPolicy(), FakeSuite(), requests(), n_workers=0, n_execute=9))
    wrong = replace(FakeSuite(), action_names=("dx", "dy", "gripper"))
    with pytest.raises(VlaError, match=r"shape \(5, 2\); expected \(H, 3\)"):
        list(run_episodes(NoisyPolicy(), wrong, requests(), n_workers=0))


def test_a_policy_learned_at_another_rate_is_refused() -> None:
    class At(NoisyPolicy):
        metadata = {"name": "at", "horizon": 5, "action_dim": 2, "control_hz": 20.0}

    with pytest.raises(VlaError, match="trained on data at 20 Hz; expected 10 Hz, the rate of"):
        list(run_episodes(At(), FakeSuite(), requests(), n_workers=0))
    At.metadata = {**At.metadata, "control_hz": 10.4}  # a dataset's whole number for a suite's fraction
    assert list(run_episodes(At(), FakeSuite(), requests(1), n_workers=0))


SCRIPT = """
import itertools, sys
from vla.rollout import run_episodes
from vla.testing import FakeSuite, NoisyPolicy
from vla.types import EpisodeRequest
print("main module runs", flush=True)
endless = (EpisodeRequest("reach-near", i, key=(1, i)) for i in itertools.count())
for n, result in enumerate(run_episodes(NoisyPolicy(), FakeSuite(step_sleep_s=0.01), endless, n_workers=2)):
    if n == 3:
        import multiprocessing
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_parent_and_main_is_not_imported_again(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "script.py"  # without `if __name__ == "__main__"`
    script.write_text(SCRIPT)
    root = str(Path(__file__).resolve().parents[1])
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script)]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore Ctrl-C
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "main module runs\n"
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2
    os.killpg(process.pid, how) if how == signal.SIGINT else process.kill()
    rest, error = process.communicate(timeout=20)
    assert "main module runs" not in rest
    if how == signal.SIGINT:
        assert error.count("KeyboardInterrupt") == 1  # the parent's, none from the workers
    deadline = time.monotonic() + 10.0
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    """True if the process exists and is no zombie (in a container nobody may reap orphans)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
