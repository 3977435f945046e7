"""`vla card`: write a policy's model card anew, with what was measured since.

    vla card runs/sft/policy --eval runs/eval-sft --license apache-2.0
    vla card runs/merged --run runs/sft runs/rl --eval runs/eval-rl --datasets lerobot/libero_10_image

Figures come from a run's metrics.jsonl and an evaluation's result.json, never from the command line. They are kept in the
policy's card.json, so that the card can be written again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from vla.card_facts import METRICS_FILE, Facts, clean_command, read_facts, run_facts, with_entry, write_facts
from vla.eval.results import EvalResult, Tally, read_result
from vla.files import write_text
from vla.model_card import is_hub_id, model_card
from vla.policy_files import STATISTICS_FILE, read_statistics
from vla.spec import read_spec
from vla.types import problem


@dataclass(frozen=True)
class Settings:
    """Settings of `vla card`."""

    policy: tyro.conf.Positional[Path]
    """Policy directory."""
    run: tuple[Path, ...] = ()
    """Training runs whose last figures are shown. Default: the run folder that the policy lies in, if it does."""
    eval: tuple[Path, ...] = ()
    """Evaluations of this policy whose success rates are shown (`vla eval --out`)."""
    license: str = ""
    """Hub id of the licence: apache-2.0, mit, llama2, other, ..."""
    datasets: tuple[str, ...] = ()
    """OWNER/NAME of datasets on the Hub that it was trained on."""
    limits: tuple[str, ...] = ()
    """Sentences for the section on limits."""
    any_policy: bool = False
    """Take evaluations whose result.json names another policy."""


def run(settings: Settings) -> Path:
    """Write card.json and README.md; returns the latter."""
    spec, facts = read_spec(settings.policy), read_facts(settings.policy)
    if wrong := [name for name in settings.datasets if not is_hub_id(name)]:
        raise problem(
            f"--datasets {wrong[0]!r}", "OWNER/NAME on the Hub", "correct it; other data is named by its statistics"
        )
    parent = settings.policy.resolve().parent
    runs = settings.run or ((parent,) if (parent / METRICS_FILE).is_file() else ())
    for folder in runs:
        facts = with_entry(facts, "runs", run_facts(folder))
    for folder in settings.eval:
        result = read_result(folder)
        if result.policy_metadata.get("name") != spec.name and not settings.any_policy:
            raise problem(f"an evaluation of {result.policy_metadata.get('name')!r} in {folder}", f"one of {spec.name!r}",
                          "give this policy's, or pass --any-policy")  # fmt: skip
        facts = with_entry(facts, "evaluations", _evaluation(result, folder.name))
    given = {"license": settings.license, "datasets": list(settings.datasets), "limits": list(settings.limits)}
    facts |= {name: value for name, value in given.items() if value}
    card = model_card(spec, read_statistics(settings.policy / STATISTICS_FILE), facts)
    write_facts(settings.policy, facts)
    path = settings.policy / "README.md"
    write_text(path, card)
    print(f"wrote {path}: {len(facts.get('runs', []))} runs, {len(facts.get('evaluations', []))} evaluations")
    return path


def _evaluation(result: EvalResult, name: str) -> Facts:
    settings = result.settings
    return {
        "name": name, "suite": result.suite, "tasks": [task.name for task in result.tasks],
        **_sums(result.tally()), "per_task": {task.name: _sums(result.tally(task.name)) for task in result.tasks},
        "seed": settings.get("seed"), "protocol": settings.get("protocol"),
        "quantization": result.policy_metadata.get("quantization"), "versions": result.versions,
        "command": clean_command(result.command),
    }  # fmt: skip


def _sums(tally: Tally) -> dict[str, Any]:
    found: dict[str, Any] = {"successes": tally.successes, "trials": tally.trials, "faults": tally.faults}
    if tally.trials:
        interval = tally.interval
        found |= {"success_rate": interval.estimate, "low": interval.low, "high": interval.high}
    return found
