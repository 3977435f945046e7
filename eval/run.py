"""`vla eval`: success rates of a policy on a simulator suite, with intervals, videos and a report.

Seeds are paired: episode i of a task starts from seed + i whatever the policy, so two evaluations can be compared
episode by episode (`vla.eval.results.compare`). Interrupted, the same command continues where it stopped.

    vla eval --policy runs/sft/policy --out runs/eval-sft
"""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vla.eval.expert import SuiteExpert
from vla.eval.html import percent, percent_interval
from vla.eval.report import write_report
from vla.eval.results import EPISODES_FILE, RESULT_FILE, EpisodeRow, EvalResult, read_rows, to_json
from vla.eval.suites import get_suite
from vla.eval.video import write_video
from vla.files import append_jsonl, write_json
from vla.progress import Progress
from vla.rollout import run_episodes
from vla.threads import leave_cores_to
from vla.types import EpisodeRequest, EpisodeResult, Policy, Suite, problem
from vla.workers import Deadlines

SETTINGS_FILE = "settings.json"
LIBRARIES = ("vla-toolkit", "torch", "transformers", "peft", "numpy")
MAX_VIDEO_FPS = 20.0
SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True)
class Settings:
    """Evaluate a policy on a simulator suite."""

    policy: str
    """Policy directory, http(s) URL of an endpoint, or `expert` for the suite's scripted experts."""
    suite: str = "metaworld"
    """Simulator suite."""
    tasks: tuple[str, ...] = ()
    """Tasks of the suite; none given: the suite's own choice."""
    episodes_per_task: int = 20
    """Episodes per task. May be raised later in the same folder."""
    seed: int = 1_000_000
    """Episode i of each task is reset with seed + i. Training data uses seeds below a million."""
    n_execute: int | None = None
    """Actions of each chunk to execute before asking again; default: the whole chunk."""
    temperature: float = 0.0
    """0 acts greedily; above, actions are drawn, reproducibly."""
    quantization: str = "none"
    """Of a policy directory: none, int8 or nf4."""
    unnorm_key: str | None = None
    """Whose statistics un-normalise the actions of a policy directory; default: the policy's own."""
    device: str = "cpu"
    """Where a policy directory is loaded."""
    dtype: str = "float32"
    """In which precision a policy directory is loaded."""
    workers: int = 2
    """Simulator processes; 0 runs the simulator in this process. Does not change results."""
    slots: int = 16
    """Environments per process. Does not change results."""
    videos_per_task: int = 2
    """The first so many episodes of each task are filmed."""
    video_every_steps: int = 2
    """Film every so many control steps."""
    reset_timeout_s: float = 120.0
    """A reset that takes longer counts as a hang."""
    step_timeout_s: float = 30.0
    """A chunk of steps that takes longer counts as a hang."""
    max_fault_fraction: float = 0.2
    """Stop with a report if more than this share of episodes end in a simulator fault."""
    out: Path = Path("runs/eval")
    """Folder for episodes.jsonl, result.json, report.html and videos/."""
    dry_run: bool = False
    """Say what would be done, then stop."""


# Two runs that differ in one of these may not share a folder.
IDENTITY = (
    "policy",
    "suite",
    "tasks",
    "seed",
    "n_execute",
    "temperature",
    "quantization",
    "unnorm_key",
    "device",
    "dtype",
)


def run(settings: Settings, *, policy: Policy | None = None, suite: Suite | None = None) -> EvalResult:
    """Evaluate; returns what `result.json` and the report say.

    Args:
        policy: to use instead of loading `settings.policy`; needed for a URL, whose client is not this part's business.
        suite: to use instead of `settings.suite`.

    Raises:
        VlaError: unknown suite or task, a policy that does not load, a folder with another evaluation, too many faults.
    """
    started = time.monotonic()
    _check(settings)
    suite = suite or get_suite(settings.suite, settings.tasks)
    if settings.dry_run:
        n = settings.episodes_per_task
        names = ", ".join(task.name for task in suite.tasks)
        print(
            f"would run {n} episodes of each of {len(suite.tasks)} tasks ({names}) with {settings.policy} into {settings.out}"
        )
        return _result(settings, suite, {}, {}, started)
    policy = policy or _load(settings, suite)
    metadata = json.loads(json.dumps(policy.metadata, default=str))
    identity = _identity(settings, suite, metadata)
    _claim(settings.out, identity)
    rows = {key: row for key, row in read_rows(settings.out).items() if row.fault is None}  # faults get another chance
    with leave_cores_to(settings.workers):
        _run_missing(settings, policy, suite, rows, metadata)
    result = _result(settings, suite, rows, metadata, started)
    write_json(settings.out / RESULT_FILE, to_json(result))
    write_report(result)
    print_table(result)
    return result


def print_table(result: EvalResult) -> None:
    """The summary on the terminal."""
    table = Table(title=f"{result.policy} on {result.suite}")
    for column in ("task", "success", "rate [95 %]", "time-outs", "undecodable", "faults"):
        table.add_column(column, justify="left" if column == "task" else "right")
    names = [task.name for task in result.tasks]
    for name in [*names, None]:
        tally = result.tally(name)
        cells = (f"{tally.successes}/{tally.trials}", percent_interval(tally.interval))
        counts = (str(tally.timeouts), str(tally.undecodable), str(tally.faults))
        table.add_row(name or "all", *cells, *counts, end_section=name == names[-1])
    console = Console()
    console.print(table)
    console.print(f"report: {result.out / 'report.html'}", soft_wrap=True)


def _check(settings: Settings) -> None:
    if settings.episodes_per_task < 1:
        raise problem(f"episodes_per_task={settings.episodes_per_task}", "at least 1", "raise it")
    if settings.video_every_steps < 1 or settings.videos_per_task < 0:
        got = f"video_every_steps={settings.video_every_steps}, videos_per_task={settings.videos_per_task}"
        raise problem(got, "video_every_steps >= 1 and videos_per_task >= 0", "use --videos-per-task 0 for no videos")


def _load(settings: Settings, suite: Suite) -> Policy:
    if settings.policy == "expert":
        return SuiteExpert(suite)
    if settings.policy.startswith(("http://", "https://")):
        raise problem(f"the URL {settings.policy} without a client", "run(settings, policy=client)", "pass the client")
    if not Path(settings.policy).is_dir():
        raise problem(
            f"policy {settings.policy!r}", "a policy directory, an http(s) URL or `expert`", "correct --policy"
        )
    from vla.policy import load_policy

    return load_policy(
        settings.policy, device=settings.device, dtype=settings.dtype, quantization=settings.quantization,
        unnorm_key=settings.unnorm_key, temperature=settings.temperature,
    )  # fmt: skip


def _identity(settings: Settings, suite: Suite, metadata: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for two runs to be one evaluation."""
    chosen = {name: value for name, value in asdict(settings).items() if name in IDENTITY}
    chosen["tasks"] = [task.name for task in suite.tasks]
    chosen["simulator"] = suite.versions()
    is_folder = Path(settings.policy).is_dir()
    chosen["policy_content"] = folder_digest(Path(settings.policy)) if is_folder else metadata.get("name")
    return json.loads(json.dumps(chosen))


def folder_digest(folder: Path) -> str:
    """sha256 over names, sizes and contents; of large files only the first and the last mebibyte are read."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\0{size}\0".encode())
        with open(path, "rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(max(0, size - SAMPLE_BYTES))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _claim(out: Path, identity: dict[str, Any]) -> None:
    """Make the folder this evaluation's own, or see that it is."""
    path = out / SETTINGS_FILE
    if not path.exists():
        if (out / EPISODES_FILE).exists():
            raise problem(f"{out} with episodes but no {SETTINGS_FILE}", "both", "choose another --out")
        write_json(path, identity)
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    for name, value in identity.items():
        if found.get(name) != value:
            raise problem(
                f"{name}={value!r} for {out}, which holds an evaluation with {name}={found.get(name)!r}",
                "the same settings", "choose another --out, or delete that folder to start afresh",
            )  # fmt: skip


def _run_missing(
    settings: Settings, policy: Policy, suite: Suite, rows: dict[tuple[str, int], EpisodeRow], metadata: dict[str, Any]
) -> None:
    """Run what `rows` lacks and add it, to the file as well."""
    sampled = settings.temperature > 0 or float(metadata.get("temperature") or 0) > 0
    wanted = [(task.name, i) for i in range(settings.episodes_per_task) for task in suite.tasks]
    missing = [key for key in wanted if key not in rows]
    if not missing:
        return
    successes = sum(rows[key].success for key in wanted if key in rows)
    done = len(wanted) - len(missing)

    def requests() -> Iterator[EpisodeRequest]:
        for task, i in missing:
            key = (settings.seed, zlib.crc32(task.encode()), i) if sampled else ()
            yield EpisodeRequest(task, settings.seed + i, key, {"index": i})

    results = run_episodes(
        policy, suite, requests(), n_workers=min(settings.workers, len(missing)), slots_per_worker=settings.slots,
        n_execute=settings.n_execute, keep_queries=True, render_every=settings.video_every_steps,
        keep_frames=lambda request: request.tags["index"] < settings.videos_per_task,
        max_fault_fraction=settings.max_fault_fraction,
        deadlines=Deadlines(reset_timeout_s=settings.reset_timeout_s, step_timeout_s=settings.step_timeout_s),
    )  # fmt: skip
    try:
        with Progress("episodes", len(wanted), done) as progress:
            for result in results:
                row = _row(settings, suite, result)
                append_jsonl(settings.out / EPISODES_FILE, asdict(row))
                rows[row.task, row.index] = row
                done += 1
                successes += row.success
                progress.advance(1, f"success {successes}/{done} ({percent(successes / done)})")
    finally:
        results.close()


def _row(settings: Settings, suite: Suite, result: EpisodeResult) -> EpisodeRow:
    request, index = result.request, int(result.request.tags["index"])
    latency = tuple(round(query.latency_ms, 3) for query in result.queries)
    video = None
    if result.frames and result.fault is None:
        video = f"videos/{request.task}-{index}-{'success' if result.success else 'failure'}.mp4"
        fps = min(MAX_VIDEO_FPS, suite.control_hz / settings.video_every_steps)
        write_video(settings.out / video, result.frames, fps, border=result.success)
    return EpisodeRow(
        request.task, index, request.seed, result.success, result.n_steps, result.undecodable, result.fault,
        round(result.wall_s, 3), latency, video,
    )  # fmt: skip


def _result(
    settings: Settings, suite: Suite, rows: dict[tuple[str, int], EpisodeRow], metadata: dict[str, Any], started: float
) -> EvalResult:
    tasks = tuple(suite.tasks)
    chosen = [rows[task.name, i] for task in tasks for i in range(settings.episodes_per_task) if (task.name, i) in rows]
    return EvalResult(
        settings.policy, suite.name, tasks, tuple(chosen), {**asdict(settings), "out": str(settings.out)},
        _versions(suite), shlex.join(sys.argv), metadata, time.monotonic() - started, settings.out,
    )  # fmt: skip


def _versions(suite: Suite) -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | suite.versions()
