"""card.json of a policy directory: what its model card says beyond policy.json, as data.

{"license": str, "datasets": [Hub id], "limits": [sentence],
 "runs": [{"name", "command", "steps", "counter": what is counted, step or iteration, "figures": {figure: value}}],
 "evaluations": [{"name", "suite", "tasks", "successes", "trials", "success_rate", "low", "high", "faults",
                  "seed", "command", ...}]}
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

from vla.files import read_jsonl, write_json
from vla.types import problem

CARD_FILE = "card.json"
METRICS_FILE = "metrics.jsonl"
COUNTERS = ("step", "iteration")
Facts = dict[str, Any]


def read_facts(folder: Path) -> Facts:
    """Of a policy directory; empty without the file."""
    path = folder / CARD_FILE
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise problem(f"{path}: {error}", "JSON", "delete it and write the card again with `vla card`") from error
    if not isinstance(value, dict):
        raise problem(f"{path} with a {type(value).__name__}", "an object", "delete it and write the card again with `vla card`")  # fmt: skip
    return value


def write_facts(folder: Path, facts: Facts) -> None:
    write_json(folder / CARD_FILE, facts)


def without_evaluations(facts: Facts) -> Facts:
    """Of a policy made from another: its success rates were measured on other weights."""
    return {name: value for name, value in facts.items() if name != "evaluations"}


def run_facts(folder: Path, command: str = "") -> Facts:
    """What a training run's metrics.jsonl ends with: the last value of every figure, the lowest held-out loss, and of
    reinforcement learning the highest success rate.

    Raises:
        VlaError: no metrics there.
    """
    rows = read_jsonl(folder / METRICS_FILE)
    if not rows:
        raise problem(f"no {METRICS_FILE} in {folder}", "a training run's folder", "give the --out of `vla finetune` or `vla rl`")  # fmt: skip
    counter = next((name for name in COUNTERS if name in rows[-1]), COUNTERS[0])
    figures: dict[str, float] = {}
    for row in rows:
        figures |= {name: value for name, value in row.items() if _is_figure(value) and name not in COUNTERS}
    losses = [(row["holdout_loss"], row[counter]) for row in rows if _is_figure(row.get("holdout_loss"))]
    if losses:
        figures["lowest_holdout_loss"], figures["lowest_holdout_loss_step"] = min(losses)
    rates = [row["success"] for row in rows if counter == "iteration" and _is_figure(row.get("success"))]
    if rates:
        figures["highest_success"] = max(rates)
    steps = int(rows[-1].get(counter, 0))
    return {"name": folder.name, "command": command, "steps": steps, "counter": counter, "figures": figures}


def with_entry(facts: Facts, part: str, entry: Facts) -> Facts:
    """`facts` with an entry of `runs` or `evaluations`; one of the same name is replaced."""
    kept = [other for other in facts.get(part, []) if other["name"] != entry["name"]]
    old = next((other for other in facts.get(part, []) if other["name"] == entry["name"]), {})
    entry = entry if entry.get("command") else {**entry, "command": old.get("command", "")}
    return {**facts, part: [*kept, entry]}


def this_command() -> str:
    """The command line of this process, if it is `vla`; without the folder of the program."""
    return clean_command(shlex.join(sys.argv))


def clean_command(command: str) -> str:
    """'/home/me/bin/vla eval ...' -> 'vla eval ...'; empty for anything but `vla`."""
    words = shlex.split(command)
    if not words or Path(words[0]).name not in ("vla", "cli.py"):
        return ""
    return shlex.join(["vla", *words[1:]])


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
