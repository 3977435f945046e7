"""`vla data collect`: demonstrations of a suite's scripted experts, as a LeRobot dataset.

Seeds are tried in order and successes kept until each task has its number, so the dataset depends on the settings
alone: not on the number of processes, nor on how often the program was stopped and started again.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vla.files import write_json
from vla.finetune.demonstrate import demonstrate, demonstrate_without_noops
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.formats.lerobot_writer import LeRobotWriter
from vla.progress import Progress
from vla.types import Env, Episode, Policy, Suite, Task, VlaError, problem

SETTINGS_FILE = "collect.json"
FIRST_TEST_SEED = 1_000_000
"""Evaluations start from this seed on; on LIBERO these are the benchmark's own initial states."""
ARM_ACTION_DIM = 7


@dataclass(frozen=True)
class Settings:
    """Collect expert demonstrations of every task of a suite."""

    out: Path
    """Folder of the dataset. If it holds a collection with the same settings, that is continued."""
    suite: str = "metaworld"
    """Simulator suite to collect in."""
    tasks: tuple[str, ...] = ()
    """Tasks of the suite; none given: all of them."""
    episodes_per_task: int = 25
    """Successful demonstrations of each task. A larger number later adds episodes to those on disk."""
    first_seed: int = 0
    """Seed of the first attempt; the next attempts count up. Evaluate on other seeds."""
    max_attempts_per_episode: int = 5
    """Give up on a task after this many attempts per wanted demonstration."""
    noise_std: float = 0.0
    """Standard deviation of Gaussian noise on executed actions; the expert's clean action is what is recorded."""
    drop_noops: bool = True
    """Leave out the frames of an arm (6 displacements and a gripper, as in LIBERO) in which nothing moves, as OpenVLA's
    data do. Other robots' data, Meta-World's too, are left as they are."""
    image_mode: Literal["image", "video"] = "image"
    """`image`: PNG, exact. `video`: AV1, ten times smaller, lossy."""
    processes: int = 1
    """Simulators at work at once, each in a process of its own if more than one."""
    episode_timeout_s: float = 300.0
    """Stop with an error if one episode takes longer (only with more than one process)."""
    dry_run: bool = False
    """Print what would be collected and stop."""

    def __post_init__(self) -> None:
        counts = {"episodes_per_task": self.episodes_per_task, "processes": self.processes,
                  "max_attempts_per_episode": self.max_attempts_per_episode}  # fmt: skip
        for name, count in counts.items():
            if count < 1:
                raise problem(f"{name} {count}", "at least 1", "raise it")
        if self.noise_std < 0 or self.first_seed < 0:
            raise problem(f"noise_std {self.noise_std}, first_seed {self.first_seed}", "at least 0", "raise them")
        beyond = self.first_seed + self.episodes_per_task * self.max_attempts_per_episode
        if beyond > FIRST_TEST_SEED:
            raise problem(f"seeds {self.first_seed} .. {beyond - 1}", f"seeds below {FIRST_TEST_SEED}: the others are for tests",
                          "lower --first-seed, --episodes-per-task or --max-attempts-per-episode")  # fmt: skip


@dataclass(frozen=True)
class Collected:
    """What a collection amounts to."""

    out: Path
    n_episodes: int
    n_frames: int
    n_new: int
    """Episodes written by this run."""
    n_failed: int
    """Attempts of this run that did not succeed and were dropped."""
    wall_s: float


def run(settings: Settings, suite: Suite) -> Collected:
    """Collect until every task has its demonstrations, or continue where an earlier run stopped.

    Raises:
        VlaError: unknown task, a folder with other data or settings, or an expert that fails too often.
    """
    began = time.monotonic()
    tasks = _chosen_tasks(settings, suite)
    if _drops_noops(settings, suite) and settings.noise_std:
        raise problem(f"noise_std {settings.noise_std} and dropped no-ops", "one of them: without the pauses, the expert's "
                      "answers to the noise belong to other states", "pass --no-drop-noops, or no noise")  # fmt: skip
    for task in tasks:
        _expert(suite, task.name)  # before anything is written
    if settings.dry_run:
        print(f"{len(tasks)} tasks x {settings.episodes_per_task} demonstrations -> {settings.out}")
        for task in tasks:
            print(f"  {task.name}: {task.instruction} (at most {task.max_steps} steps)")
        return Collected(settings.out, 0, 0, 0, 0, 0.0)
    _claim_folder(settings, suite)
    size = (suite.image_size_px, suite.image_size_px)
    writer = LeRobotWriter(
        settings.out, round(suite.control_hz), {camera: size for camera in suite.cameras}, tuple(suite.state_names),
        tuple(suite.action_names), suite.name, settings.image_mode, resume=True,
    )  # fmt: skip
    n_before, n_failed = writer.n_episodes, 0
    done = _on_disk(settings.out)
    wanted, n_done = settings.episodes_per_task, {task.name: len(done.get(task.name, ())) for task in tasks}
    progress = Progress("demonstrations", wanted * len(tasks), sum(min(n, wanted) for n in n_done.values()))
    with writer, _Attempts(settings, suite) as attempts, progress:
        for task in tasks:
            n_failed += _collect_task(settings, task, done.get(task.name, []), attempts, writer, progress)
    wall_s = time.monotonic() - began
    result = Collected(settings.out, writer.n_episodes, writer.n_frames, writer.n_episodes - n_before, n_failed, wall_s)
    print(f"{result.n_new} new episodes, {result.n_episodes} in all, {result.n_frames} frames, {n_failed} failed attempts "
          f"dropped, {wall_s:.0f} s: {settings.out}")  # fmt: skip
    return result


def _collect_task(
    settings: Settings, task: Task, seeds: list[int], attempts: _Attempts, writer: LeRobotWriter, progress: Progress
) -> int:
    """Fill one task up to its number of demonstrations; returns the number of failed attempts."""
    wanted, n_done, n_failed = settings.episodes_per_task, len(seeds), 0
    last = settings.first_seed + wanted * settings.max_attempts_per_episode
    if n_done >= wanted:
        return 0
    for episode in attempts(task, range(max(seeds, default=settings.first_seed - 1) + 1, last)):
        if not episode.success:
            n_failed += 1
            continue
        writer.add_episode(episode)
        n_done += 1
        progress.advance(1, task.name)
        if n_done == wanted:
            return n_failed
    raise problem(f"{n_done} successful demonstrations of {task.name} in {last - settings.first_seed} attempts",
                  f"{wanted}", "ask for fewer, lower --noise-std, or raise --max-attempts-per-episode")  # fmt: skip


class _Demonstrator:
    """Environment and expert of one process: of one task at a time, because an environment can take gigabytes."""

    def __init__(self, suite: Suite, noise_std: float, drop_noops: bool) -> None:
        self.suite, self.noise_std, self.drop_noops = suite, noise_std, drop_noops
        self.tasks = {task.name: task for task in suite.tasks}
        self.made: tuple[str, Env, Policy] | None = None

    def __call__(self, task: str, seed: int) -> Episode:
        if self.made is None or self.made[0] != task:
            self.close()
            self.made = (task, self.suite.make(task), _expert(self.suite, task))
        _, env, expert = self.made
        if self.drop_noops:
            return demonstrate_without_noops(env, expert, self.tasks[task], seed, self.suite.name)
        return demonstrate(env, expert, self.tasks[task], seed, self.noise_std, self.suite.name)

    def close(self) -> None:
        if self.made is not None:
            self.made[1].close()
        self.made = None


class _Attempts:
    """Attempts at a task in the order of their seeds, in this process or in several others."""

    def __init__(self, settings: Settings, suite: Suite) -> None:
        self.processes, self.timeout_s = settings.processes, settings.episode_timeout_s
        self.arguments = (suite, settings.noise_std, _drops_noops(settings, suite))
        self.demonstrator = _Demonstrator(*self.arguments)
        self.pool: Any = None

    def __enter__(self) -> _Attempts:
        if self.processes > 1:
            context = multiprocessing.get_context("spawn")  # simulators and their GL do not survive a fork
            self.pool = context.Pool(self.processes, _start_worker, self.arguments)
        return self

    def __exit__(self, *error: object) -> None:
        self.demonstrator.close()
        if self.pool is not None:
            self.pool.terminate()
            self.pool.join()

    def __call__(self, task: Task, seeds: range) -> Iterator[Episode]:
        if self.pool is None:
            yield from (self.demonstrator(task.name, seed) for seed in seeds)
            return
        pending: deque[tuple[int, Any]] = deque()
        for seed in seeds:
            pending.append((seed, self.pool.apply_async(_work, (task.name, seed))))
            if len(pending) > self.processes:
                yield self._result(task, *pending.popleft())
        while pending:
            yield self._result(task, *pending.popleft())

    def _result(self, task: Task, seed: int, pending: Any) -> Episode:
        try:
            return pending.get(self.timeout_s)
        except multiprocessing.TimeoutError as error:
            raise problem(f"no answer about {task.name}, seed {seed}, in {self.timeout_s:g} s", "a finished episode",
                          "the simulator hangs or was killed: start again, or raise --episode-timeout-s") from error  # fmt: skip


_WORKER: list[Callable[[str, int], Episode]] = []  # what this worker process makes episodes with


def _start_worker(suite: Suite, noise_std: float, drop_noops: bool) -> None:
    _WORKER[:] = [_Demonstrator(suite, noise_std, drop_noops)]


def _work(task: str, seed: int) -> Episode:
    return _WORKER[0](task, seed)


def _chosen_tasks(settings: Settings, suite: Suite) -> list[Task]:
    known = {task.name: task for task in suite.tasks}
    unknown = [name for name in settings.tasks if name not in known]
    if unknown:
        raise problem(f"task {', '.join(unknown)}", f"tasks of {suite.name}: {', '.join(known)}", "correct --tasks")
    return [known[name] for name in settings.tasks or known]


def _drops_noops(settings: Settings, suite: Suite) -> bool:
    return settings.drop_noops and len(suite.action_names) == ARM_ACTION_DIM


def _expert(suite: Suite, task: str) -> Policy:
    try:
        return suite.expert(task)
    except ValueError as error:
        raise problem(
            f"no expert for {task} of {suite.name} ({error})", "a task with one", "choose other --tasks"
        ) from error


def _claim_folder(settings: Settings, suite: Suite) -> None:
    """Save the settings beside the data, or check that those already there agree in all that shapes an episode."""
    shaping = {
        "suite": suite.name, "cameras": list(suite.cameras), "image_size_px": suite.image_size_px,
        "versions": suite.versions(), "first_seed": settings.first_seed, "noise_std": settings.noise_std,
        "image_mode": settings.image_mode, "drop_noops": _drops_noops(settings, suite),
    }  # fmt: skip
    path = settings.out / SETTINGS_FILE
    if path.is_file():
        try:
            found = {"drop_noops": False} | json.loads(path.read_text(encoding="utf-8"))["shaping"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise problem(f"{path}: {error!r}", "the settings of the collection", "collect to a new folder") from error
        for name, value in shaping.items():
            if found.get(name) != value:
                raise problem(f"{name} {value!r}", f"{found.get(name)!r}, as the collection in {settings.out} began",
                              "use the same, or another folder")  # fmt: skip
    elif settings.out.exists() and (not settings.out.is_dir() or any(settings.out.iterdir())):
        raise problem(
            f"{settings.out} is not empty", "a new folder, or a collection to continue", "choose another --out"
        )
    write_json(path, {"shaping": shaping, "settings": asdict(settings)})


def _on_disk(root: Path) -> dict[str, list[int]]:
    """Task -> seeds of the demonstrations that are already there."""
    reader, seeds = LeRobotReader(root), {}
    for i in range(reader.n_episodes):
        seed, task = reader.seed_of(i), reader.task_of(i)
        if seed is None or task is None:
            raise VlaError(f"episode {i} of {root} has no seed or task; fix: collect to a new folder")
        seeds.setdefault(task, []).append(seed)
    return seeds
