"""Checks of what an action means: displacement or target, the gripper's sign, idle frames. Pure functions."""

from __future__ import annotations

import re

import numpy as np

from vla.doctor.evidence import DataView, Predictions
from vla.doctor.finding import DATASET, Finding, not_checked, passed, suspect, wrong
from vla.doctor.statistics import GRIPPER_WORDS, gripper_dims
from vla.spec import ActionSpec

EXPLAINED = 0.3  # least share of variance that counts as an explanation
NOOP = 1e-4  # OpenVLA's `regenerate_libero_dataset.py`
MEANINGS = ("delta", "absolute", "second difference", "delta minus state")
SUITE_GRIPPER = {"libero": 1, "metaworld": 1, "ml": 1, "calvin": -1, "simpler": -1}
"""Start of a suite's name -> +1 if a positive gripper action closes, -1 if it opens."""


def meaning_scores(data: DataView, skip: list[int]) -> dict[str, float] | None:
    """How well each reading of an action explains it from the state: 1 perfectly, 0 not at all.

    delta: a_t ~ s_{t+1} - s_t up to a scale; absolute: a_t = s_{t+1}; second difference: a_t ~ the change of that
    displacement; delta minus state: a_t = -s_t plus a small part, openpi's delta transform applied to displacements.
    Each dimension is explained by the state dimension that does it best; the better half of them is averaged, because
    rotations rarely are differences of the state's rotation. None without a state or two-step episodes.
    """
    pairs = data.pairs()
    dims = [d for d in range(data.actions.shape[1]) if d not in skip and np.ptp(data.actions[:, d]) > 0]
    if data.states is None or len(pairs) < 10 or not dims:
        return None
    a, s, after = (x[pairs].astype(np.float64) for x in (data.actions, data.states, np.roll(data.states, -1, axis=0)))
    inner = np.flatnonzero(np.diff(pairs) == 1) + 1  # rows of `pairs` whose predecessor is in the same episode
    change = after - s
    found = {
        "delta": _squared_correlation(a, change), "absolute": _equal(a, after), "delta minus state": _equal(a, -s),
        "second difference": _squared_correlation(a[inner], change[inner] - change[inner - 1]) if len(inner) > 10
        else np.zeros((a.shape[1], s.shape[1])),
    }  # fmt: skip
    half = -(-len(dims) // 2)
    return {m: float(np.sort(found[m][dims].max(1))[-half:].mean()) for m in MEANINGS}


def check_delta(action: ActionSpec, data: DataView | None) -> Finding:
    """Does `delta` of the policy fit the data?"""
    name = "delta or absolute"
    scores = None if data is None else meaning_scores(data, gripper_dims(action))
    if data is None or scores is None:
        return not_checked(name, DATASET if data is None else f"a state in {data.name} that changes within an episode")
    evidence = f"the policy says {'delta' if action.delta else 'absolute'}; variance explained: {_shown(scores)}"
    if max(scores["delta"], scores["absolute"]) < EXPLAINED:
        return not_checked(name, f"a state that follows the actions ({_shown(scores)})")
    is_delta = scores["delta"] >= scores["absolute"]
    if is_delta != action.delta and abs(scores["delta"] - scores["absolute"]) > 0.1:
        meant = "displacements" if is_delta else "targets"
        fix = f"set action.delta to {str(is_delta).lower()} (--{'delta' if is_delta else 'no-delta'} in `vla finetune`)"
        return wrong(name, f"the data's actions are {meant}; {evidence}", fix)
    return passed(name, evidence)


def check_double_delta(action: ActionSpec, data: DataView | None) -> Finding:
    """Was a difference taken of actions that were differences already?"""
    name = "double delta"
    scores = None if data is None else meaning_scores(data, gripper_dims(action))
    if data is None or scores is None:
        return not_checked(name, DATASET if data is None else f"a state in {data.name} that changes within an episode")
    twice = max("second difference", "delta minus state", key=lambda meaning: scores[meaning])
    evidence = f"variance explained: {_shown(scores)}"
    if scores[twice] > EXPLAINED and scores[twice] > max(scores["delta"], scores["absolute"]) + 0.2:
        fix = "turn off the extra delta transform where the data is made (openpi: extra_delta_transform=False)"
        return wrong(name, f"the actions look like: {twice}; {evidence}", fix)
    return passed(name, evidence)


def check_noops(action: ActionSpec, data: DataView | None) -> Finding:
    """Frames in which nothing is commanded: no motion, and the gripper as before (OpenVLA's rule)."""
    name = "no-ops"
    if data is None:
        return not_checked(name, DATASET)
    grippers = [d for d in gripper_dims(action) if d < data.actions.shape[1]]
    motion = np.delete(data.actions, grippers, axis=1)
    before = np.roll(data.actions, 1, axis=0)
    if not action.delta:
        motion = motion - np.delete(before, grippers, axis=1)
    idle = np.linalg.norm(motion, axis=1) < NOOP
    first = np.zeros(len(idle), bool)
    first[data.starts] = True
    same_gripper = (data.actions[:, grippers] == before[:, grippers]).all(1)
    share = float((idle & (same_gripper | first) & (action.delta | ~first)).mean())
    evidence = f"{share:.1%} of {len(idle)} frames command nothing (motion below {NOOP:g}, gripper unchanged)"
    fix = "drop those frames before training, as OpenVLA does for LIBERO"
    if share >= 0.10:
        return wrong(name, evidence, fix)
    return suspect(name, evidence, fix) if share >= 0.02 else passed(name, evidence)


def check_gripper_polarity(action: ActionSpec, predictions: Predictions | None) -> Finding:
    """Does the predicted gripper move with the recorded one, and not against it?"""
    name = "gripper polarity"
    found = _changing_gripper(name, action, predictions)
    if isinstance(found, Finding):
        return found
    truth, predicted = found
    middle = (truth.max() + truth.min()) / 2
    agree = float((np.sign(predicted - middle) == np.sign(truth - middle)).mean())
    correlation = float(np.corrcoef(truth, predicted)[0, 1]) if np.ptp(predicted) > 0 else 0.0
    evidence = (
        f"predicted and recorded gripper on the same side in {agree:.0%} of steps, correlation {correlation:+.2f}"
    )
    if correlation < -0.2 and agree < 0.5:
        fix = "flip the gripper's sign in the data or in the evaluation, in one place only"
        return wrong(name, f"the signs are opposite: {evidence}", fix)
    if agree < 0.7:
        return suspect(name, evidence, "train longer, and see that the gripper is not normalised (mask)")
    return passed(name, evidence)


def check_gripper_convention(action: ActionSpec, data: DataView | None, suite: str | None) -> Finding:
    """Do the policy's words, the fingers in the data and, after `gripper_invert`, the suite agree on which sign closes?"""
    name, dims = "gripper convention", gripper_dims(action)
    if not dims:
        return passed(name, "no gripper among the action dimensions")
    said, seen = closing_sign(action.gripper_convention), None if data is None else _seen_sign(data, dims[0])
    wanted = next((sign for start, sign in SUITE_GRIPPER.items() if suite and suite.startswith(start)), None)
    if wanted is not None and action.gripper_invert:
        wanted = -wanted
    signs = {"policy.json": said, "fingers in the data": seen, f"suite {suite}, before gripper_invert": wanted}
    known = {who: sign for who, sign in signs.items() if sign}
    shown = [f"{who}: the higher value {'closes' if sign > 0 else 'opens'}" for who, sign in known.items()]
    evidence = "; ".join(shown) or "nothing known"
    if len(set(known.values())) > 1:
        fix = "correct gripper_convention or gripper_invert, so that exactly one flip is made where signs differ"
        return wrong(name, evidence, fix)
    if said is None:
        fix = "write it down: --gripper-convention '+1 closes, -1 opens' in `vla finetune`"
        return suspect(name, f"policy.json says {action.gripper_convention!r}; {evidence}", fix)
    if len(known) > 1:
        return passed(name, evidence)
    return not_checked(name, f"a finger state in the data, or a suite; {evidence}")


def check_gripper_threshold(action: ActionSpec, predictions: Predictions | None) -> Finding:
    """Is the gripper read in its own range, and would a threshold at 0.5, 0.7 or 0.8 of it decide alike?"""
    name = "gripper threshold"
    found = _changing_gripper(name, action, predictions)
    if isinstance(found, Finding):
        return found
    truth, predicted = found
    low, high = (0.0, 1.0) if action.gripper_range == "unit" else (-1.0, 1.0)
    recorded = (
        f"recorded {truth.min():g} .. {truth.max():g}, gripper_range {action.gripper_range} ({low:g} .. {high:g})"
    )
    outside = float(((truth < low - 0.01) | (truth > high + 0.01)).mean())
    if outside:
        return wrong(name, f"{outside:.0%} of recorded values are outside the range: {recorded}",
                     "set action.gripper_range, or scale the gripper in the data")  # fmt: skip
    between = (truth - truth.min()) / np.ptp(truth)
    is_switch = float(np.mean((between > 0.1) & (between < 0.9))) <= 0.02
    if is_switch and (truth.min() > low + 0.25 or truth.max() < high - 0.25):
        return wrong(name, f"one position of the switch is in the middle of the range: {recorded}",
                     "set action.gripper_range to the data's, or scale the gripper in the data")  # fmt: skip
    if not is_switch:
        return passed(name, f"the recorded gripper takes values in between and needs no threshold; {recorded}")
    place = (predicted - low) / (high - low)
    own = 0.5 if action.gripper_threshold is None else (action.gripper_threshold - low) / (high - low)
    changed = {t: float(((place > own) != (place > t)).mean()) for t in (0.3, 0.5, 0.7, 0.8)}
    shown = ", ".join(f"{t:g}: {share:.1%}" for t, share in changed.items())
    used = "none" if action.gripper_threshold is None else f"{action.gripper_threshold:g}"
    evidence = f"{recorded}; threshold {used}; decisions that another place in the range would change: {shown}"
    if max(changed.values()) > 0.02:
        return suspect(name, evidence, "train longer, or state action.gripper_threshold with the result")
    return passed(name, evidence)


def closing_sign(convention: str) -> int | None:
    """'+1 closes, -1 opens' -> 1; '1 = open' -> -1; None if the words do not say."""
    for sign, number, verb in re.findall(r"([+\-−]?)\s*(\d(?:\.\d+)?)\D{0,8}?(clos|open)", convention.lower()):
        value = -1 if sign in ("-", "−") or float(number) == 0 else 1
        return value if verb == "clos" else -value
    return None


def _seen_sign(data: DataView, dim: int) -> int | None:
    """+1 if a positive gripper action is followed by a smaller finger opening in the state."""
    fingers = [i for i, name in enumerate(data.state_names) if any(word in name.lower() for word in GRIPPER_WORDS)]
    pairs = data.pairs()
    if data.states is None or not fingers or dim >= data.actions.shape[1] or len(pairs) < 10:
        return None
    opening = np.abs(data.states[:, fingers]).mean(1)
    change, command = opening[pairs + 1] - opening[pairs], data.actions[pairs, dim]
    if np.ptp(command) == 0 or np.ptp(change) == 0:
        return None
    correlation = float(np.corrcoef(command, change)[0, 1])
    return None if abs(correlation) < 0.1 else (1 if correlation < 0 else -1)


def _changing_gripper(
    name: str, action: ActionSpec, predictions: Predictions | None
) -> tuple[np.ndarray, np.ndarray] | Finding:
    """`_gripper` of recordings in which it changes; else what check `name` has to say."""
    dims = gripper_dims(action)
    if not dims:
        return passed(name, "no gripper among the action dimensions")
    if predictions is None:
        return not_checked(name, DATASET)
    truth, predicted = _gripper(predictions, dims[0])
    if len(truth) < 2 or np.ptp(truth) == 0:
        return not_checked(name, "frames in which the recorded gripper changes; take more with --frames")
    return truth, predicted


def _gripper(predictions: Predictions, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Recorded and predicted values (n,) over valid steps of decodable answers."""
    keep = predictions.valid & predictions.ok[:, None]
    return predictions.truth[keep][:, dim], predictions.predicted[keep][:, dim]


def _squared_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, D), (N, S) -> (D, S)."""
    a, b = a - a.mean(0), b - b.mean(0)
    scale = np.sqrt((a**2).sum(0)[:, None] * (b**2).sum(0)[None])
    return (a.T @ b / np.maximum(scale, 1e-12)) ** 2


def _equal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(D, S): 1 - mean squared difference over the variance of `b`, at least 0."""
    error = ((a[:, :, None] - b[:, None, :]) ** 2).mean(0)
    return np.clip(1 - error / np.maximum(b.var(0), 1e-12), 0.0, 1.0)


def _shown(scores: dict[str, float]) -> str:
    return ", ".join(f"{meaning} {score:.2f}" for meaning, score in scores.items())
