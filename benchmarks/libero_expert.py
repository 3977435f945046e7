"""How often the scripted expert solves LIBERO within the usual step limits, physics only.

    python -m benchmarks.libero_expert --suite libero_object --states 5 25 --out runs/libero_expert.jsonl

Runs in an interpreter with the [libero] extra, in one process: initial states `--states FIRST END` of the benchmark, with
fixtures placed by seed 0. One JSON line per episode; what is already in the file is not run again. Prints a table.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import tyro

from vla.eval.libero_sim import LiberoSim, versions
from vla.eval.libero_tasks import MAX_STEPS, base_suite, suite_tasks
from vla.eval.statistics import wilson
from vla.files import append_jsonl, read_jsonl

SIMULATOR_SEED = 0


@dataclass(frozen=True)
class Settings:
    """What to run, and where to keep it."""

    suite: str = "libero_object"
    """A LIBERO suite."""
    tasks: tuple[int, ...] = ()
    """Task numbers in the suite's order; none: all."""
    states: tuple[int, int] = (5, 25)
    """First initial state and the one after the last. States 0 to 4 were used to tune the expert."""
    out: Path = Path("runs/libero_expert.jsonl")
    """One line per episode."""


def main(settings: Settings) -> None:
    done = read_jsonl(settings.out) if settings.out.exists() else []
    rows = []
    for index, task in enumerate(suite_tasks(settings.suite)):
        if settings.tasks and index not in settings.tasks:
            continue
        wanted = range(*settings.states)
        here = [
            row for row in done if (row["suite"], row["task"]) == (settings.suite, task.name) and row["state"] in wanted
        ]
        missing = sorted(set(wanted) - {row["state"] for row in here})
        if missing:
            sim = LiberoSim(settings.suite, task.name, expert=True)
            sim.render_frames = False
            for state in missing:
                row = {
                    "suite": settings.suite,
                    "task": task.name,
                    "state": state,
                    **run_episode(sim, settings.suite, state),
                }
                append_jsonl(settings.out, {**row, "versions": versions()})
                here.append(row)
            sim.close()
        rows.append((index, task.instruction, here))
        print(_line(*rows[-1]), flush=True)
    print(table(rows))


def run_episode(sim: LiberoSim, suite: str, state: int) -> dict[str, Any]:
    """One episode of the expert: success, steps after settling, seconds of this machine."""
    began, limit = time.perf_counter(), MAX_STEPS[base_suite(suite)]
    seen = sim.reset(SIMULATOR_SEED, state)
    n_steps = 0
    while not seen.success and n_steps < limit:
        assert seen.expert_action is not None
        seen = sim.step(seen.expert_action)
        n_steps += 1
    return {"success": seen.success, "n_steps": n_steps, "wall_s": time.perf_counter() - began}


def table(rows: list[tuple[int, str, list[dict[str, Any]]]]) -> str:
    """Markdown: task, success with its 95 % Wilson interval, steps of the successes."""
    lines = ["| task | | success | 95 % interval | steps, mean (range) |", "|---|---|---|---|---|"]
    lines += [_line(*row) for row in rows]
    return "\n".join([*lines, _line("all", "", [episode for row in rows for episode in row[2]])])


def _line(index: int | str, instruction: str, episodes: list[dict[str, Any]]) -> str:
    steps = [episode["n_steps"] for episode in episodes if episode["success"]]
    rate = wilson(len(steps), len(episodes))
    took = f"{fmean(steps):.0f} ({min(steps)}-{max(steps)})" if steps else "-"
    interval = f"{100 * rate.low:.0f}-{100 * rate.high:.0f} %"
    return f"| {index} | {instruction} | {len(steps)}/{len(episodes)} | {interval} | {took} |"


if __name__ == "__main__":
    main(tyro.cli(Settings))
