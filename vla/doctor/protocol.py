"""Checks of chunks, rates, step limits and everything else about how episodes are run. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla.doctor.evidence import DataView
from vla.doctor.finding import DATASET, SUITE, Finding, not_checked, passed, suspect, wrong
from vla.libero_protocol import SUITES, get_protocol, max_steps
from vla.types import Task

EVALUATION_SEED = 1_000_000  # `vla eval` starts there
RATE_TOLERANCE_HZ = 0.5  # a dataset's rate is a whole number
PAPERS = get_protocol("openvla")
REPLAY_GOOD, REPLAY_BAD = 0.9, 0.5


def check_horizon(horizon: int, trained: int | None, data: DataView | None) -> Finding:
    """Is the chunk as long as in training, and shorter than the episodes? `trained`: what that stage recorded."""
    name, evidence = "chunk horizon", f"{horizon} actions per chunk"
    if trained is not None and trained != horizon:
        return wrong(name, f"{evidence}, trained with {trained}", f"set action.horizon to {trained}")
    if data is None:
        return passed(name, evidence) if trained is not None else not_checked(name, DATASET)
    median = float(np.median(data.lengths))
    evidence += f"; episodes of {data.name} have {median:g} steps in the middle"
    if horizon > median:
        return suspect(name, evidence, "fine-tune with a shorter --horizon: most chunks end in padding")
    return passed(name, evidence)


def check_replan(horizon: int, n_execute: int | None, by_step: np.ndarray | None) -> Finding:
    """Are only those actions of a chunk executed that are still good?

    Args:
        n_execute: as given to `vla eval`; None: all.
        by_step: (H,) error of each step of a chunk, relative to the data's spread.
    """
    name, used = "replan length", n_execute or horizon
    if used > horizon:
        return wrong(name, f"{used} of {horizon} actions", f"pass --n-execute {horizon} or less")
    evidence = f"{used} of {horizon} actions are executed before the policy is asked again"
    if by_step is None or not np.isfinite(by_step[0]):
        return not_checked(name, f"{DATASET}; {evidence}")
    errors = by_step[:used]
    evidence += f"; error by step: {', '.join(f'{e:.2f}' for e in by_step)} of the spread"
    limit = max(2 * float(by_step[0]), float(by_step[0]) + 0.1)
    late = np.flatnonzero(errors > limit)
    if len(late):
        return suspect(
            name, evidence, f"pass --n-execute {max(1, int(late[0]))}: later actions are twice as wrong as the first"
        )
    return passed(name, evidence)


def check_control_rate(policy_hz: float, data: DataView | None, suite_hz: float | None) -> Finding:
    """Are policy, data and simulator at one rate? 0 and None: unknown."""
    name = "control rate"
    rates = {"policy": policy_hz, "dataset": data.fps if data else 0.0, "suite": suite_hz or 0.0}
    known = {who: hz for who, hz in rates.items() if hz}
    evidence = ", ".join(f"{who} {hz:.3g} Hz" for who, hz in known.items()) or "no rate known"
    if known and max(known.values()) - min(known.values()) > RATE_TOLERANCE_HZ:
        return wrong(name, evidence, "collect data at the simulator's rate, or set the simulator's to the data's")
    if not policy_hz:
        return suspect(name, f"policy.json does not say; {evidence}", "set action.control_hz to the data's rate")
    return passed(name, evidence) if len(known) > 1 else not_checked(name, f"{DATASET} or a suite; {evidence}")


def check_max_steps(suite: str | None, tasks: Sequence[Task], data: DataView | None) -> Finding:
    """Does the limit leave time for what demonstrations need?"""
    name = "max steps"
    if suite is None or not tasks:
        return not_checked(name, SUITE)
    least, usual = min(task.max_steps for task in tasks), published_max_steps(suite)
    evidence = f"{suite} stops after {least} steps" + (f" (papers: {usual})" if usual else "")
    if usual and least < usual:
        return wrong(name, evidence, f"allow {usual} steps")
    if data is None:
        return passed(name, evidence) if usual else not_checked(name, f"{DATASET}; {evidence}")
    usual_length, longest = float(np.quantile(data.lengths, 0.95)), int(data.lengths.max())
    evidence += f"; demonstrations need up to {longest}, 95 % of them {usual_length:g}"
    if least < usual_length:
        return wrong(name, evidence, "raise the limit")
    return suspect(name, evidence, "raise the limit") if least < longest else passed(name, evidence)


def published_max_steps(suite: str) -> int | None:
    """OpenVLA's limit for a suite of LIBERO, None for any other."""
    return max_steps(PAPERS, suite) if suite.startswith(SUITES) else None


def check_settle_steps(suite: str | None, settle_steps: int | None) -> Finding:
    """Do LIBERO's objects come to rest before the policy acts? `settle_steps`: the suite's, None if it has no such field."""
    name = "settle steps"
    if suite is None:
        return not_checked(name, SUITE)
    if not suite.startswith("libero"):
        return passed(name, f"{suite} starts at rest; LIBERO alone needs {PAPERS.settle_steps}")
    if settle_steps is None:
        return not_checked(name, "a suite that says how many steps it waits")
    evidence = f"{settle_steps} steps before the first action; every LIBERO client takes {PAPERS.settle_steps}"
    if settle_steps < PAPERS.settle_steps:
        return wrong(name, evidence, f"wait {PAPERS.settle_steps} steps with the dummy action")
    return passed(name, evidence) if settle_steps == PAPERS.settle_steps else suspect(name, evidence, "wait 10 steps")


def check_protocol(name: str, differences: Mapping[str, tuple[Any, Any]] | None) -> Finding:
    """Does the policy directory do what a published protocol does?

    Args:
        name: of the protocol; empty: none was named.
        differences: field -> (the policy's, the protocol's).
    """
    if differences is None:
        return not_checked("protocol", "--protocol NAME, when comparing with a published LIBERO result")
    if not differences:
        return passed("protocol", f"image path and gripper are those of {name}")
    shown = ", ".join(f"{field} {mine} instead of {theirs}" for field, (mine, theirs) in differences.items())
    return suspect(
        "protocol", f"unlike {name}: {shown}", "evaluate a policy as it was trained; say so beside the result"
    )


def check_success_latch(data: DataView | None) -> Finding:
    """How many episodes were a success at some step but not at the last: what reading the last step would lose."""
    name = "success latch"
    if data is None or data.success is None:
        return not_checked(name, DATASET if data is None else f"next.success in {data.name}")
    ever = np.array([data.success[a:b].any() for a, b in zip(data.starts, data.stops, strict=True)])
    last = data.success[data.stops - 1]
    lost = int((ever & ~last).sum())
    evidence = f"{int(ever.sum())} of {len(ever)} episodes succeed at some step, {int(last.sum())} at the last"
    if lost:
        return suspect(name, evidence, "count success at any step, as `vla eval` does, when comparing with other tools")
    return passed(name, evidence)


def check_seeds(data: DataView | None) -> Finding:
    """Is no evaluation seed among the training seeds?"""
    name = "seeds"
    if data is None or not data.seeds:
        return not_checked(name, DATASET if data is None else f"seeds in {data.name}")
    leaked = [seed for seed in data.seeds if seed >= EVALUATION_SEED]
    evidence = f"seeds {min(data.seeds)} .. {max(data.seeds)}; evaluation starts at {EVALUATION_SEED}"
    if leaked:
        return wrong(name, f"{len(leaked)} training episodes start from evaluation seeds; {evidence}",
                     "collect with --first-seed below it, or evaluate with another --seed")  # fmt: skip
    return passed(name, evidence)


def check_replay(successes: int | None, trials: int, needs: str = "") -> Finding:
    """Do recorded actions, through the policy's normaliser and tokens, still solve their episodes?

    Args:
        successes: of `trials` replayed successful demonstrations; None: none could be replayed.
        needs: why not.
    """
    name = "replay success"
    if successes is None or not trials:
        return not_checked(name, needs or f"{SUITE}, and a dataset of it with seeds")
    rate, evidence = successes / trials, f"{successes} of {trials} recorded successes succeed again through the tokens"
    fix = "look at simulator version, control rate, seeds and bounds; more bins if those are right"
    if rate < REPLAY_BAD:
        return wrong(name, evidence, fix)
    return suspect(name, evidence, fix) if rate < REPLAY_GOOD else passed(name, evidence)
