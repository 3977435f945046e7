"""Checks of the statistics that turn tokens into actions. Every function is pure: numbers in, a finding out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vla.doctor.finding import DATASET, Finding, not_checked, passed, suspect, wrong
from vla.normalize import Statistics
from vla.spec import ActionSpec

CLOSE = 0.01  # bounds that differ by less than this share of the range are the same
FAR = 0.10
GRIPPER_WORDS = ("grip", "finger")


def gripper_dims(action: ActionSpec) -> list[int]:
    """The dimensions that are a gripper: the spec's, or any so named."""
    named = [d for d, name in enumerate(action.names) if any(word in name.lower() for word in GRIPPER_WORDS)]
    return sorted({*named, *([action.gripper_dim] if action.gripper_dim is not None else [])})


def bounds_distance(entry: dict[str, Any], other: dict[str, Any]) -> np.ndarray:
    """float64 (D,): how far q01 and q99 are apart, as a share of the range of `other`; 0 where neither is normalised."""
    low, high = (np.asarray(entry[name], np.float64) for name in ("q01", "q99"))
    other_low, other_high = (np.asarray(other[name], np.float64) for name in ("q01", "q99"))
    scale = np.maximum(other_high - other_low, 1e-3 * np.maximum(np.abs(other_high), 1e-6))
    distance = np.maximum(np.abs(low - other_low), np.abs(high - other_high)) / scale
    return np.where(np.asarray(entry.get("mask", [True] * len(low)), bool), distance, 0.0)


def check_unnorm_key(statistics: Statistics, key: str, data: str | None, recomputed: dict[str, Any] | None) -> Finding:
    """Do the actions come back in the units of this data?

    Args:
        data: the dataset's name.
        recomputed: its `dataset_statistics` entry.
    """
    name, known = "unnorm key", ", ".join(sorted(statistics))
    if recomputed is None:
        if len(statistics) == 1:
            return passed(name, f"the policy has one set of statistics, {key!r}")
        return not_checked(name, f"{DATASET}: there are {len(statistics)} keys ({known}), {key!r} is in use")
    n = len(recomputed["action"]["q01"])
    far = {
        k: float(bounds_distance(entry["action"], recomputed["action"]).max())
        for k, entry in statistics.items() if len(entry["action"]["q01"]) == n
    }  # fmt: skip
    nearest = min(far, key=lambda k: (far[k], k != key)) if far else key
    shown = ", ".join(f"{k!r} {far[k]:.1%}" for k in sorted(far))
    evidence = f"in use: {key!r}; largest distance of its bounds from {data!r}: {shown} of the range"
    if far.get(key, np.inf) > max(CLOSE, 2 * far.get(nearest, np.inf)) and nearest != key:
        return wrong(name, evidence, f"pass --unnorm-key {nearest}, or correct unnorm_key in policy.json")
    if key != data and data in statistics and far[key] > CLOSE:
        return wrong(name, evidence, f"pass --unnorm-key {data}")
    return passed(name, evidence)


def check_statistic_kind(entry: dict[str, Any], rows: np.ndarray | None) -> Finding:
    """Are q01 and q99 quantiles, and not another statistic under their name?

    Args:
        entry: `statistics[key]["action"]`.
        rows: float (N, D) actions of the data; None: the entry is only compared with itself.
    """
    name, fix = "statistic kind", "recompute with `vla data stats`, and fine-tune again if training used these bounds"
    low, high = np.asarray(entry["q01"], np.float64), np.asarray(entry["q99"], np.float64)
    mask = np.asarray(entry.get("mask", [True] * len(low)), bool)
    if rows is None:
        same = mask & np.isclose(low, entry["min"]) & np.isclose(high, entry["max"]) & (high > low)
        if mask.any() and (same | ~mask | (high <= low)).all() and same.any():
            return suspect(name, "q01 and q99 equal min and max in every normalised dimension", fix)
        return passed(name, "q01 and q99 differ from min and max, as quantiles do")
    exact = rows.astype(np.float64)
    mean, std = exact.mean(0), exact.std(0)
    candidates = {
        "quantiles": tuple(np.quantile(exact, [0.01, 0.99], axis=0)), "min/max": (exact.min(0), exact.max(0)),
        "mean -/+ std": (mean - std, mean + std), "mean and std": (mean, std),
    }  # fmt: skip
    scale = np.maximum(exact.max(0) - exact.min(0), 1e-9)
    usable = mask & (high > low)
    if not usable.any():
        return passed(name, "no dimension is normalised")
    distance = {
        kind: float(np.median((np.maximum(np.abs(low - a), np.abs(high - b)) / scale)[usable]))
        for kind, (a, b) in candidates.items()
    }
    best = min(distance, key=lambda kind: (round(distance[kind], 4), kind != "quantiles"))
    shown = ", ".join(f"{kind} {value:.1%}" for kind, value in distance.items())
    evidence = f"median distance of q01 and q99 from the data's: {shown} of the range"
    if best != "quantiles" and distance["quantiles"] > CLOSE:
        return wrong(name, f"q01 and q99 hold the data's {best}; {evidence}", fix)
    return passed(name, evidence)


def check_dataset_statistics(entry: dict[str, Any], recomputed: dict[str, Any] | None, names: Sequence[str]) -> Finding:
    """Do the policy's bounds equal exact quantiles of this data? Both are `statistics[...]["action"]`."""
    name = "dataset statistics"
    if recomputed is None:
        return not_checked(name, DATASET)
    if len(recomputed["q01"]) != len(entry["q01"]):
        return wrong(name, f"{len(entry['q01'])} dimensions in the policy, {len(recomputed['q01'])} in the data",
                     "use the data the policy was trained on")  # fmt: skip
    distance = bounds_distance(entry, recomputed)
    d = int(distance.argmax())
    evidence = (
        f"largest difference: {names[d]}, {distance[d]:.1%} of its range (policy {entry['q01'][d]:.4g} .. "
        f"{entry['q99'][d]:.4g}, data {recomputed['q01'][d]:.4g} .. {recomputed['q99'][d]:.4g})"
    )
    fix = "if this is the training data, recompute with `vla data stats` and fine-tune again; else expect a shift"
    if distance[d] > FAR:
        return wrong(name, evidence, fix)
    return suspect(name, evidence, fix) if distance[d] > CLOSE else passed(name, evidence)


def check_mask(action: ActionSpec, entry: dict[str, Any]) -> Finding:
    """Is the gripper left as it is, and everything else normalised? `entry`: `statistics[key]["action"]`."""
    name, grippers = "mask", gripper_dims(action)
    mask = entry.get("mask", [True] * action.dim)
    low, high = np.asarray(entry["q01"]), np.asarray(entry["q99"])
    fix = "set the mask False for the gripper alone and fine-tune again (--gripper-dim)"
    scaled = [d for d in grippers if mask[d]]
    changed = [d for d in scaled if not (np.isclose(low[d], -1) and np.isclose(high[d], 1))]
    if changed:
        shown = ", ".join(f"{action.names[d]} {low[d]:.4g} .. {high[d]:.4g}" for d in changed)
        return wrong(name, f"the gripper is normalised to bounds that change it: {shown}", fix)
    if scaled:
        return suspect(
            name, f"{action.names[scaled[0]]} is normalised; its bounds are -1 .. 1, so nothing changes yet", fix
        )
    bare = [d for d in range(action.dim) if d not in grippers and not mask[d]]
    if bare:
        shown = ", ".join(f"{action.names[d]} {entry['min'][d]:.4g} .. {entry['max'][d]:.4g}" for d in bare)
        return wrong(name, f"not normalised although no gripper: {shown}; tokens cover -1 .. 1", fix)
    constant = [action.names[d] for d in range(action.dim) if mask[d] and high[d] - low[d] <= 0]
    if constant:
        return suspect(
            name, f"no range in {', '.join(constant)}: every token means the same", "drop it, or collect varied data"
        )
    return passed(name, f"normalised: all but {', '.join(action.names[d] for d in grippers) or 'nothing'}")


def check_action_names(action: ActionSpec, other: Sequence[str] | None, owner: str) -> Finding:
    """Are the dimensions those of `owner`, in its order? `other`: its action names."""
    name, mine = "action names", list(action.names)
    if other is None:
        return not_checked(name, f"{DATASET} or a suite")
    evidence = f"policy {', '.join(mine)}; {owner} {', '.join(other)}"
    if len(mine) != len(other):
        return wrong(name, evidence, f"use a policy for the {len(other)} dimensions of {owner}")
    if mine != list(other) and sorted(mine) == sorted(other):
        return wrong(name, evidence, "reorder the action dimensions")
    if mine != list(other):
        return suspect(name, evidence, "see that the names mean the same")
    return passed(name, evidence)
