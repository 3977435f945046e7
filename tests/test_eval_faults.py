"""What goes wrong in a long evaluation: faulty simulators, a dead endpoint, a full disk, a killed process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vla import files
from vla.eval.results import EvalResult, read_rows
from vla.eval.run import Settings, run
from vla.files import read_jsonl
from vla.testing import FAULT_KINDS, FakeSuite, NoisyPolicy
from vla.types import VlaError

SEED = 1_000_000
N_PER_TASK = 250
TASKS = ("reach-near", "reach-far")


def settings(out: Path, **changes: Any) -> Settings:
    base = Settings(
        "noisy", suite="fake", episodes_per_task=6, temperature=1.0, workers=0, slots=4, videos_per_task=0, out=out
    )
    return replace(base, **changes)


def trace(result: EvalResult) -> dict[tuple[str, int], tuple[bool, int, int]]:
    """What must not depend on anything but the seed."""
    return {
        (row.task, row.index): (row.success, row.n_steps, len(row.latency_ms))
        for row in result.rows
        if row.fault is None
    }


def test_500_episodes_are_accounted_for_under_every_kind_of_fault(tmp_path: Path) -> None:
    """Nothing is lost, nothing is counted twice, and whoever is not to blame has the result of a run without faults."""
    (tmp_path / "once").mkdir()
    size = {"episodes_per_task": N_PER_TASK, "slots": 8}
    clean = run(settings(tmp_path / "clean", **size), policy=NoisyPolicy(noise=0.1))
    long = [(row.task, row.seed) for row in clean.rows if row.n_steps > 5]  # so that every fault has time to strike
    always = {long[15 + 31 * k]: kind for k, kind in enumerate(FAULT_KINDS)}
    once = {long[30 + 31 * k]: kind for k, kind in enumerate(FAULT_KINDS)}
    planted = tuple((*key, kind) for key, kind in always.items())
    passing = tuple((*key, kind) for key, kind in once.items())
    suite = FakeSuite(faults=planted, passing_faults=passing, passed_in=str(tmp_path / "once"))
    limits = {"workers": 2, "step_timeout_s": 2.0, "reset_timeout_s": 4.0}
    result = run(settings(tmp_path / "faulty", **size, **limits), policy=NoisyPolicy(noise=0.1), suite=suite)

    lines = read_jsonl(tmp_path / "faulty" / "episodes.jsonl")
    assert len(lines) == len(result.rows) == 500
    every = {(task, SEED + i) for task in TASKS for i in range(N_PER_TASK)}
    assert Counter((line["task"], line["seed"]) for line in lines) == Counter(every)
    assert {(row.task, row.seed) for row in result.rows if row.fault is not None} == always.keys()
    assert len(list((tmp_path / "once").iterdir())) == len(once), "every passing fault has struck"
    tally = result.tally()
    assert (tally.trials, tally.faults) == (500 - len(always), len(always))
    assert tally.successes + tally.failures + tally.timeouts + tally.undecodable == tally.trials
    expected = {key: value for key, value in trace(clean).items() if (key[0], SEED + key[1]) not in always}
    assert trace(result) == expected
    report = (tmp_path / "faulty" / "report.html").read_text()
    assert "Simulator faults" in report and "hang: chunk took over 2 s" in report


class DyingEndpoint(NoisyPolicy):
    """Answers so often, then as `RemotePolicy` does when nobody answers."""

    calls_left = 10

    def act(self, observations: Any) -> Any:
        self.calls_left -= 1
        if self.calls_left < 0:
            raise VlaError("got no connection to http://gpu:8000; expected a server; fix: start it with `vla serve`")
        return super().act(observations)


def test_an_endpoint_that_dies_costs_no_finished_episode(tmp_path: Path) -> None:
    straight = run(settings(tmp_path / "a"), policy=NoisyPolicy(noise=0.1))
    with pytest.raises(VlaError) as caught:
        run(settings(tmp_path / "b"), policy=DyingEndpoint(noise=0.1))
    done = len(read_rows(tmp_path / "b"))
    assert 0 < done < 12
    assert str(caught.value) == (
        "got no connection to http://gpu:8000; expected a server; fix: start it with `vla serve`. "
        f"{done} of 12 episodes are finished and kept in {tmp_path / 'b'}: once that is mended, run the same command again"
    )
    again = NoisyPolicy(noise=0.1)
    assert trace(run(settings(tmp_path / "b"), policy=again)) == trace(straight)
    assert 0 < sum(again.batch_sizes) < sum(len(row.latency_ms) for row in straight.rows)


@pytest.mark.parametrize("victim", ["episodes.jsonl", "mp4", "result.json", "report.html"])
def test_a_full_disk_is_one_clear_error_and_what_was_finished_stays(
    tmp_path: Path, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run(settings(tmp_path / "a"), policy=NoisyPolicy(noise=0.1))
    out, room = tmp_path / "b", [3]
    small_disk(monkeypatch, victim, room if victim in ("episodes.jsonl", "mp4") else [0])
    chosen = settings(out, videos_per_task=6)
    match = rf"got No space left on device while writing .*{victim}.*; fix: free some space.*of 12 episodes are finished and kept in"
    with pytest.raises(VlaError, match=match):
        run(chosen, policy=NoisyPolicy(noise=0.1))
    done = len(read_rows(out))
    assert done == (12 if victim in ("result.json", "report.html") else 3)
    assert not [path for path in out.rglob("*.tmp")], "half-written files only fill the disk further"
    monkeypatch.undo()
    result = run(chosen, policy=NoisyPolicy(noise=0.1))
    assert trace(result) == trace(straight)
    assert len(read_jsonl(out / "episodes.jsonl")) == 12
    assert (out / "report.html").exists() and len(list((out / "videos").iterdir())) == 12


def small_disk(monkeypatch: pytest.MonkeyPatch, victim: str, room: list[int]) -> None:
    """So many files (or lines) whose names contain `victim` can be written; the next is cut in the middle."""
    real = open

    def limited(path: Any, mode: str = "r", **options: Any) -> Any:
        file = real(path, mode, **options)
        if mode not in ("a", "wb") or victim not in str(path):
            return file
        room[0] -= 1
        if room[0] >= 0:
            return file
        write = file.write

        def fail(data: Any) -> int:
            write(data[: len(data) // 2])
            file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        return _Proxy(file, fail)

    monkeypatch.setattr(files, "open", limited, raising=False)


class _Proxy:
    """A file whose `write` is another function."""

    def __init__(self, file: Any, write: Any) -> None:
        self.file, self.write = file, write

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()


SCRIPT = """
import sys
from pathlib import Path
from vla.eval.run import Settings, run
from vla.testing import FakeSuite, NoisyPolicy
settings = Settings("noisy", suite="fake", episodes_per_task=40, temperature=1.0, workers=1, slots=3, videos_per_task=1,
                    out=Path(sys.argv[1]))
run(settings, policy=NoisyPolicy(noise=0.1, sleep_s=float(sys.argv[2])), suite=FakeSuite())
"""


def test_kill_9_and_resume_loses_no_finished_episode(tmp_path: Path) -> None:
    out, episodes = tmp_path / "out", tmp_path / "out" / "episodes.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(out), "0.05"], env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60.0
    while (not episodes.exists() or episodes.read_text().count("\n") < 8) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = episodes.read_text()
    done = read_rows(out)
    assert 8 <= len(done) < 80 and not (out / "result.json").exists()
    chosen = settings(out, episodes_per_task=40, videos_per_task=1)
    again = run(chosen, policy=NoisyPolicy(noise=0.1))
    assert episodes.read_text().startswith(before[: before.rfind("\n") + 1])
    assert len(read_jsonl(episodes)) == len(again.rows) == 80
    assert trace(again) == trace(run(replace(chosen, out=tmp_path / "b"), policy=NoisyPolicy(noise=0.1)))
