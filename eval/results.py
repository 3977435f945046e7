"""What an evaluation found: one row per episode, sums per task, and `result.json`."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vla.eval.statistics import Interval, mcnemar, paired_difference, percentile, wilson
from vla.files import read_jsonl, write_text
from vla.types import Task, problem

SCHEMA = "vla-eval/1"
OUTCOMES = ("success", "failure", "time-out", "undecodable", "fault")
EPISODES_FILE = "episodes.jsonl"
RESULT_FILE = "result.json"


@dataclass(frozen=True)
class EpisodeRow:
    """One line of `episodes.jsonl`."""

    task: str
    index: int
    """0, 1, ... within the task; the reset seed is the evaluation's seed plus this."""
    seed: int
    success: bool
    n_steps: int
    undecodable: int
    fault: str | None
    """Why the simulator failed, twice; such an episode counts neither as success nor as failure."""
    wall_s: float
    latency_ms: tuple[float, ...]
    """Of each policy query: how long the batched call took that answered it."""
    video: str | None = None
    """Relative to the evaluation's folder."""
    last_frame: str | None = None
    """Of an episode that failed and was not filmed: the picture of its last query. Relative to the evaluation's folder."""
    motions: tuple[str, ...] = ()
    """Of each policy query, the language motion it acted by; empty for a policy without."""


@dataclass(frozen=True)
class Tally:
    """Sums over some episodes. successes + failures + timeouts + undecodable = trials; trials + faults = episodes."""

    successes: int
    trials: int
    """Episodes without a fault."""
    faults: int
    failures: int
    """Episodes that the simulator ended before the step limit, without success."""
    timeouts: int
    """Episodes that used up all their steps without success."""
    undecodable: int
    """Episodes that ended because the model's output was no action chunk."""
    mean_steps_to_success: float

    @property
    def interval(self) -> Interval:
        """Success rate with Wilson's 95 % limits."""
        return wilson(self.successes, self.trials)


@dataclass(frozen=True)
class EvalResult:
    """Everything the report shows."""

    policy: str
    suite: str
    tasks: tuple[Task, ...]
    rows: tuple[EpisodeRow, ...]
    """Sorted by task and index."""
    settings: dict[str, Any]
    versions: dict[str, str]
    command: str
    policy_metadata: dict[str, Any]
    wall_s: float
    """Of the last run; an evaluation that was resumed took longer."""
    out: Path

    def tally(self, task: str | None = None) -> Tally:
        """Of one task, or of all episodes pooled."""
        rows = [row for row in self.rows if task in (None, row.task)]
        n = Counter(self.outcome(row) for row in rows)
        steps = [row.n_steps for row in rows if row.success and row.fault is None]
        mean_steps = sum(steps) / len(steps) if steps else math.nan
        return Tally(n["success"], len(rows) - n["fault"], n["fault"], n["failure"], n["time-out"], n["undecodable"], mean_steps)  # fmt: skip

    def outcome(self, row: EpisodeRow) -> str:
        """One of `OUTCOMES`."""
        if row.fault is not None:
            return "fault"
        if row.success:
            return "success"
        if row.undecodable:
            return "undecodable"
        limit = next(task.max_steps for task in self.tasks if task.name == row.task)
        return "time-out" if row.n_steps >= limit else "failure"

    @property
    def macro(self) -> float:
        """Mean of the tasks' success rates; nan if a task has no trial."""
        rates = [self.tally(task.name).interval.estimate for task in self.tasks]
        return sum(rates) / len(rates) if rates else math.nan

    @property
    def latency_ms(self) -> dict[str, float]:
        """Percentiles over queries of the duration of the policy call that answered them."""
        values = [value for row in self.rows for value in row.latency_ms]
        return {"queries": len(values)} | {f"p{q}": percentile(values, q) for q in (50, 90, 99)}

    def outcomes(self) -> dict[tuple[str, int], bool]:
        """(task, seed) -> success, for pairing with another evaluation; episodes with a fault are left out."""
        return {(row.task, row.seed): row.success for row in self.rows if row.fault is None}


@dataclass(frozen=True)
class Comparison:
    """Two evaluations on the same seeds."""

    gain: Interval
    """Success rate of b minus that of a, over pairs."""
    p_value: float
    """McNemar's exact test."""
    pairs: int
    successes_a: int
    successes_b: int
    only_a: int
    """Pairs in which only a succeeded."""
    only_b: int


def compare(a: EvalResult, b: EvalResult, task: str | None = None) -> Comparison:
    """Pair by (task, seed), over one task or all. VlaError if the two share no seed."""
    first, second = a.outcomes(), b.outcomes()
    shared = sorted(key for key in first.keys() & second.keys() if task in (None, key[0]))
    if not shared:
        raise problem(
            "two evaluations without a common (task, seed)", "paired seeds", "evaluate with the same --seed and tasks"
        )
    x, y = [first[key] for key in shared], [second[key] for key in shared]
    gain, p_value = paired_difference(x, y), mcnemar(x, y)
    only_a, only_b = (sum(p > q for p, q in pairs) for pairs in (zip(x, y, strict=True), zip(y, x, strict=True)))
    return Comparison(gain, p_value, len(shared), sum(x), sum(y), only_a, only_b)


def read_rows(out: Path) -> dict[tuple[str, int], EpisodeRow]:
    """(task, index) -> its last row, without a line that a crash cut. Changes nothing."""
    rows = read_jsonl(out / EPISODES_FILE)
    parsed = [EpisodeRow(**{**row, "latency_ms": tuple(row["latency_ms"]), "motions": tuple(row.get("motions", ()))})
              for row in rows]  # fmt: skip
    return {(row.task, row.index): row for row in parsed}


def drop_cut_line(out: Path) -> None:
    """Take a last line that a crash or a full disk cut out of the file, so that the next one starts afresh."""
    path = out / EPISODES_FILE
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text and not text.endswith("\n"):
        write_text(path, text[: text.rfind("\n") + 1])


def read_result(out: Path) -> EvalResult:
    """The finished evaluation in a folder. VlaError if there is none."""
    path = out / RESULT_FILE
    if not path.exists():
        raise problem(
            f"no {RESULT_FILE} in {out}", "a finished evaluation", "run `vla eval` with this --out to its end"
        )
    value = json.loads(path.read_text(encoding="utf-8"))
    if value.get("schema") != SCHEMA:
        raise problem(f"schema {value.get('schema')!r} in {path}", SCHEMA, "evaluate again with this version")
    tasks = tuple(Task(name, entry["instruction"], entry["max_steps"]) for name, entry in value["tasks"].items())
    found = read_rows(out)
    n = value["settings"]["episodes_per_task"]
    rows = tuple(found[task.name, i] for task in tasks for i in range(n) if (task.name, i) in found)
    settings = value["settings"]
    return EvalResult(settings["policy"], settings["suite"], tasks, rows, settings, value["versions"], value["command"],
                      value["policy"], value["wall_s"], out)  # fmt: skip


def to_json(result: EvalResult) -> dict[str, Any]:
    """The content of `result.json` (docs/result-schema.md); rates are in [0, 1], a number that does not exist is null.

    schema      "vla-eval/1"
    overall     successes, trials (episodes without a fault), success_rate, low, high (Wilson 95 %, episodes pooled),
                macro (mean of the tasks' rates), faults, failures, timeouts, undecodable, mean_steps_to_success
    tasks       task name -> instruction, max_steps, and the same sums
    latency_ms  queries, p50, p90, p99: per query, the duration of the (batched) policy call that answered it
    policy      what the policy says of itself
    settings, versions, command, wall_s
    """
    tasks = {
        task.name: {"instruction": task.instruction, "max_steps": task.max_steps} | _tally_json(result.tally(task.name))
        for task in result.tasks
    }
    return {
        "schema": SCHEMA,
        "overall": _tally_json(result.tally()) | {"macro": _number(result.macro)},
        "tasks": tasks,
        "latency_ms": {name: _number(value) for name, value in result.latency_ms.items()},
        "policy": result.policy_metadata,
        "settings": result.settings,
        "versions": result.versions,
        "command": result.command,
        "wall_s": round(result.wall_s, 3),
    }


def steps_curve(rows: Sequence[EpisodeRow]) -> list[tuple[float, float]]:
    """(steps, share of the episodes that had succeeded by then): the cumulative success curve, from 0 steps on."""
    counted = [row for row in rows if row.fault is None]
    points = [(0.0, 0.0)]
    for n, row in enumerate(sorted((row for row in counted if row.success), key=lambda row: row.n_steps), 1):
        points += [(float(row.n_steps), points[-1][1]), (float(row.n_steps), n / len(counted))]
    longest = max((row.n_steps for row in counted), default=0)
    return [*points, (float(longest), points[-1][1])]


def _tally_json(tally: Tally) -> dict[str, Any]:
    interval = tally.interval
    fields = {name: value for name, value in asdict(tally).items() if name != "mean_steps_to_success"}
    limits = {"success_rate": _number(interval.estimate), "low": interval.low, "high": interval.high}
    return fields | limits | {"mean_steps_to_success": _number(tally.mean_steps_to_success)}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
