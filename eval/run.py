"""`vla eval`: success rates of a policy on a simulator suite, with intervals, videos and a report.

Seeds are paired: episode i of a task starts from seed + i whatever the policy, so two evaluations can be compared
episode by episode (`vla.eval.results.compare`). Interrupted, the same command continues where it stopped.

    vla eval --policy runs/sft/policy --out runs/eval-sft
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vla.eval.expert import SuiteExpert
from vla.eval.html import percent
from vla.eval.recording import record
from vla.eval.report import write_report
from vla.eval.results import EPISODES_FILE, RESULT_FILE, EpisodeRow, EvalResult, drop_cut_line, read_rows, to_json
from vla.eval.run_folder import claim, folder_digest, says_how_to_continue
from vla.eval.shards import deal, parse_shard
from vla.eval.suites import get_suite, with_options
from vla.eval.terminal import print_table
from vla.files import append_jsonl, write_json
from vla.hub_policy import names_repository, policy_folder
from vla.libero_protocol import disagreements, get_protocol, protocol_settings
from vla.progress import Progress
from vla.rollout import run_episodes
from vla.spec import PolicySpec
from vla.threads import leave_cores_to
from vla.types import EpisodeRequest, Policy, Suite, problem
from vla.workers import Deadlines

LIBRARIES = ("vla-toolkit", "torch", "transformers", "peft", "numpy")
EXPERT = "expert"


@dataclass(frozen=True)
class Settings:
    """Evaluate a policy on a simulator suite."""

    policy: str
    """Policy directory, OWNER/NAME of one on the Hub, http(s) URL of an endpoint, or `expert` for the suite's scripted experts."""
    suite: str = "metaworld"
    """Simulator suite."""
    tasks: tuple[str, ...] = ()
    """Tasks of the suite; none given: the suite's own choice."""
    protocol: str | None = None
    """LIBERO only: evaluate as openvla, oft, openpi or lerobot do; sets trials, re-planning, step limits, settling, size."""
    episodes_per_task: int | None = None
    """Episodes per task; default: 20, or the protocol's. May be raised later in the same folder."""
    seed: int = 1_000_000
    """Episode i of each task is reset with seed + i. Training data uses seeds below a million."""
    shard: str | None = None
    """i/n: run only the i-th of n equal parts, e.g. one per machine, each in a folder of its own. Then `vla eval merge`."""
    n_execute: int | None = None
    """Actions of each chunk to execute before asking again; default: the protocol's, or the whole chunk."""
    temporal_ensemble: float | None = None
    """Ask at every step and execute the mean of all chunks that cover it, weighted by exp(-m i) from the oldest on, as ACT
    does with m = 0.01; replaces n_execute."""
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
    turn_frames: bool = False
    """LIBERO only: turn every frame by 180 degrees, for a policy trained on frames that were turned already."""
    sim_python: str | None = None
    """LIBERO only: the Python interpreter that has the simulator, if it is not this one."""
    force_versions: bool = False
    """LIBERO only: run although the simulator's versions are known to shift results."""
    workers: int = 2
    """Simulator processes; 0 runs the simulator in this process. Does not change results."""
    slots: int | None = None
    """Environments per process; default: as many as the suite advises. Does not change results."""
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


DEFAULT_EPISODES = 20

# Two runs that differ in one of these may not share a folder.
IDENTITY = (
    "policy",
    "suite",
    "protocol",
    "turn_frames",
    "tasks",
    "seed",
    "shard",
    "n_execute",
    "temporal_ensemble",
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
    settings = resolved(settings)
    _check(settings)
    suite = suite or _suite(settings)
    if settings.dry_run:
        n = settings.episodes_per_task
        names = ", ".join(task.name for task in suite.tasks)
        part = f", shard {settings.shard} ({len(_wanted(settings, suite))} episodes)," if settings.shard else ""
        print(
            f"would run {n} episodes of each of {len(suite.tasks)} tasks ({names}){part} with {settings.policy} into {settings.out}"
        )
        return _result(settings, suite, {}, {}, started)
    policy = policy or _load(settings, suite)
    metadata = json.loads(json.dumps(policy.metadata, default=str))
    if differences := _disagreements(settings, policy):
        metadata["protocol_disagreements"] = differences
        for text in differences:
            print(f"warning: {text}", file=sys.stderr)
    identity = _identity(settings, suite, metadata)
    wanted = _wanted(settings, suite)
    claim(settings.out, identity)
    with says_how_to_continue(settings.out, len(wanted)):
        drop_cut_line(settings.out)
        # Faults get another chance.
        rows = {key: row for key, row in read_rows(settings.out).items() if row.fault is None}
        with leave_cores_to(settings.workers):
            _run_missing(settings, policy, suite, wanted, rows, metadata)
        result = _result(settings, suite, rows, metadata, started)
        write_result(result)
    print_table(result)
    return result


def resolved(settings: Settings) -> Settings:
    """With the protocol's values, or the defaults, for what the user left open."""
    chosen = protocol_settings(settings.protocol, settings.suite) if settings.protocol else {}
    n_execute = settings.n_execute
    if settings.temporal_ensemble is not None:
        n_execute = 1 if n_execute is None else n_execute
    elif n_execute is None and settings.policy != EXPERT:  # an expert has no chunks
        n_execute = chosen.get("n_execute")
    n = settings.episodes_per_task
    n = chosen.get("episodes_per_task", DEFAULT_EPISODES) if n is None else n
    return replace(settings, episodes_per_task=n, n_execute=n_execute)


def _suite(settings: Settings) -> Suite:
    """The suite, as the protocol and the simulator's flags have it."""
    suite = get_suite(settings.suite, settings.tasks, expert=settings.policy == EXPERT)
    options = protocol_settings(settings.protocol, suite.name)["suite_options"] if settings.protocol else {}
    if settings.sim_python is not None:
        options["sim_python"] = settings.sim_python
    if settings.force_versions:
        options["force_versions"] = True
    if settings.turn_frames:
        options["turn_frames"] = True
    return with_options(suite, options)


def _disagreements(settings: Settings, policy: Policy) -> list[str]:
    """What a policy directory says of pictures and gripper that the protocol has otherwise; empty without either."""
    if settings.protocol is None or not isinstance(spec := getattr(policy, "spec", None), PolicySpec):
        return []
    protocol = get_protocol(settings.protocol)
    found = disagreements(protocol, spec.action, spec.image, frames_turned=settings.turn_frames)
    fix = "evaluate it as it was trained, or train it with `vla finetune --protocol`"
    return [
        f"the policy has {name} {own!r}, protocol {protocol.name} has {wanted!r}; fix: {fix}"
        for name, (own, wanted) in found.items()
    ]


def write_result(result: EvalResult) -> None:
    """`result.json` and `report.html`, into the evaluation's folder."""
    write_json(result.out / RESULT_FILE, to_json(result))
    write_report(result)


def _check(settings: Settings) -> None:
    parse_shard(settings.shard)
    if (settings.episodes_per_task or 0) < 1:
        raise problem(f"episodes_per_task={settings.episodes_per_task}", "at least 1", "raise it")
    if settings.video_every_steps < 1 or settings.videos_per_task < 0:
        got = f"video_every_steps={settings.video_every_steps}, videos_per_task={settings.videos_per_task}"
        raise problem(got, "video_every_steps >= 1 and videos_per_task >= 0", "use --videos-per-task 0 for no videos")


def _load(settings: Settings, suite: Suite) -> Policy:
    if settings.policy == EXPERT:
        return SuiteExpert(suite)
    if settings.policy.startswith(("http://", "https://")):
        raise problem(f"the URL {settings.policy} without a client", "run(settings, policy=client)", "pass the client")
    if not Path(settings.policy).is_dir() and not names_repository(settings.policy):
        raise problem(f"policy {settings.policy!r}", "a policy directory, OWNER/NAME on the Hub, an http(s) URL or `expert`",
                      "correct --policy")  # fmt: skip
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
    is_folder = Path(settings.policy).is_dir() or names_repository(settings.policy)
    chosen["policy_content"] = folder_digest(policy_folder(settings.policy)) if is_folder else metadata.get("name")
    return json.loads(json.dumps(chosen))


def _wanted(settings: Settings, suite: Suite) -> list[tuple[str, int]]:
    """(task, index) of this run's episodes, in order."""
    return deal([task.name for task in suite.tasks], settings.episodes_per_task or 0, settings.shard)


def _run_missing(
    settings: Settings,
    policy: Policy,
    suite: Suite,
    wanted: Sequence[tuple[str, int]],
    rows: dict[tuple[str, int], EpisodeRow],
    metadata: dict[str, Any],
) -> None:
    """Run what `rows` lacks and add it, to the file as well."""
    sampled = settings.temperature > 0 or float(metadata.get("temperature") or 0) > 0
    missing = [key for key in wanted if key not in rows]
    if not missing:
        return
    successes = sum(rows[key].success for key in wanted if key in rows)
    done = len(wanted) - len(missing)

    def requests() -> Iterator[EpisodeRequest]:
        for task, i in missing:
            key = (settings.seed, zlib.crc32(task.encode()), i) if sampled else ()
            yield EpisodeRequest(task, settings.seed + i, key, {"index": i})

    slots = suite.default_slots if settings.slots is None else settings.slots
    results = run_episodes(
        policy, suite, requests(), n_workers=min(settings.workers, len(missing)), slots_per_worker=slots,
        n_execute=settings.n_execute, temporal_ensemble=settings.temporal_ensemble, keep_queries=True, render_every=settings.video_every_steps,
        keep_frames=lambda request: request.tags["index"] < settings.videos_per_task,
        max_fault_fraction=settings.max_fault_fraction,
        deadlines=Deadlines(reset_timeout_s=settings.reset_timeout_s, step_timeout_s=settings.step_timeout_s),
    )  # fmt: skip
    try:
        with Progress("episodes", len(wanted), done) as progress:
            for result in results:
                row = record(settings.out, suite, result, settings.video_every_steps)
                append_jsonl(settings.out / EPISODES_FILE, asdict(row))
                rows[row.task, row.index] = row
                done += 1
                successes += row.success
                progress.advance(1, f"success {successes}/{done} ({percent(successes / done)})")
    finally:
        results.close()


def _result(
    settings: Settings, suite: Suite, rows: dict[tuple[str, int], EpisodeRow], metadata: dict[str, Any], started: float
) -> EvalResult:
    tasks = tuple(suite.tasks)
    wanted = set(_wanted(settings, suite))
    every = ((task.name, i) for task in tasks for i in range(settings.episodes_per_task or 0))
    chosen = [rows[key] for key in every if key in wanted and key in rows]
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
