"""Checks of the state and of the words a policy is given. Pure functions."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from vla.doctor.evidence import DataView, Predictions
from vla.doctor.finding import DATASET, SUITE, Finding, not_checked, passed, suspect, wrong
from vla.doctor.images import SAME, gain
from vla.spec import PromptSpec

LIBERO_STATE = 8  # position 3, axis-angle 3, fingers 2


def check_state_source(
    prompt: PromptSpec,
    statistics: dict[str, Any] | None,
    names: Sequence[str] | None,
    states: np.ndarray | None,
    owner: str,
) -> Finding:
    """Is this state the one the policy learned from?

    Args:
        statistics: the policy's `proprio` statistics, if it has any.
        names: state names of `owner`, a dataset or a suite; None: there is no owner.
        states: float (N, S).
    """
    name, shown = "state source", prompt.state_names
    if not shown:
        return passed(name, "the policy is not shown the state")
    if names is None or states is None or not len(states):
        return not_checked(name, f"states, from {DATASET} or a suite")
    if len(names) != len(shown):
        return wrong(name, f"the policy reads {', '.join(shown)}; {owner} has {', '.join(names) or 'none'}",
                     "give the policy the state it was trained on")  # fmt: skip
    low, high = np.asarray(prompt.state_low), np.asarray(prompt.state_high)
    slack = 0.02 * np.maximum(high - low, 1e-6)
    outside = ((states < low - slack) | (states > high + slack)).mean(0)
    shift = np.zeros(len(shown))
    if statistics is not None and len(statistics["mean"]) == len(shown):
        spread = np.maximum(np.asarray(statistics["std"]), 0.02 * (high - low) + 1e-6)
        shift = np.abs(states.mean(0) - np.asarray(statistics["mean"])) / spread
    d = int((outside + (shift > 3)).argmax())
    evidence = (
        f"{owner}, {names[d]}: {outside[d]:.0%} of {len(states)} states beyond the policy's {low[d]:.3g} .. {high[d]:.3g} "
        f"(they are {states[:, d].min():.3g} .. {states[:, d].max():.3g}), mean {shift[d]:.1f} standard deviations off"
    )
    fix = "read the state from the same sensor, frame and unit as in training (observation, not controller)"
    if outside.max() > 0.5 or (len(states) >= 30 and shift.max() > 3):
        return wrong(name, evidence, fix)
    if list(names) != list(shown):
        return suspect(name, f"the policy reads {', '.join(shown)}; {owner} has {', '.join(names)}; {evidence}", fix)
    return suspect(name, evidence, fix) if outside.max() > 0.05 else passed(name, evidence)


def check_axis_angle(
    prompt: PromptSpec, statistics: dict[str, Any] | None, data: DataView | None, n_state: int | None = None
) -> Finding:
    """Are rotations in the state continuous, and of the policy's antipode?

    q and -q are one rotation. robosuite does not choose between them, so axis-angle vectors longer than pi occur and
    must stay as they are; whoever normalises them sends vectors the policy has never seen.
    """
    name = "axis-angle"
    if data is None or data.states is None:
        return not_checked(name, DATASET if data is None else f"a state in {data.name}")
    dims, is_quaternion = rotation_dims(data.state_names)
    if not dims:
        return passed(name, f"no rotation among {', '.join(data.state_names)}")
    rotation, pairs = data.states[:, dims].astype(np.float64), data.pairs()
    jumps = int(_antipode_jumps(rotation[pairs], rotation[pairs + 1], is_quaternion).sum())
    what = "quaternion" if is_quaternion else "axis-angle"
    longest = np.linalg.norm(rotation, axis=1).max()
    evidence = f"{what} in {', '.join(data.state_names[d] for d in dims)}; longest vector {longest:.2f}; {jumps} antipode jumps"
    fix = "use the quaternion exactly as the simulator gives it (robosuite: no sign choice) in data and evaluation"
    if statistics is not None and len(statistics["min"]) == len(data.state_names):
        apart = _disjoint(rotation, np.asarray(statistics["min"])[dims], np.asarray(statistics["max"])[dims])
        if apart > 0.05:
            return wrong(name, f"{apart:.0%} of rotations are the antipode of what the policy saw; {evidence}", fix)
    if jumps:
        return suspect(name, evidence, fix)
    return passed(name, evidence)


def rotation_dims(names: Sequence[str]) -> tuple[list[int], bool]:
    """Indices of a rotation among state names, and whether it is a quaternion; empty without one."""
    quaternion = [i for i, n in enumerate(names) if re.search(r"quat|(^|_)q[xyzw]$", n.lower())]
    if len(quaternion) == 4:
        return quaternion, True
    angle = [i for i, n in enumerate(names) if re.search(r"axis.?angle|(^|_)(ax|ay|az|rx|ry|rz)$|rot", n.lower())]
    if len(angle) == 3:
        return angle, False
    unnamed = all(name.isdigit() for name in names)
    return ([3, 4, 5], False) if len(names) == LIBERO_STATE and unnamed else ([], False)


def check_instructions(prompt: PromptSpec, data: Sequence[str] | None, suite: Sequence[str] | None) -> Finding:
    """Are the suite's instructions worded as in the data?"""
    name = "instruction wording"
    if data is None or suite is None:
        return not_checked(name, f"{DATASET}, and {SUITE}")
    seen = {_as_prompted(text, prompt) for text in data}
    loosely = {_bare(text): text for text in data}
    unseen = [text for text in suite if _as_prompted(text, prompt) not in seen]
    if not unseen:
        return passed(name, f"all {len(suite)} instructions of the suite are in the data, letter by letter")
    near = [text for text in unseen if _bare(text) in loosely]
    if near:
        evidence = f"{near[0]!r} in the suite is {loosely[_bare(near[0])]!r} in the data; {len(near)} such instructions"
        return suspect(name, evidence, "use the data's capitals, punctuation and spaces (prompt.lowercase)")
    evidence = (
        f"{len(unseen)} of {len(suite)} instructions are not in the data, e.g. {unseen[0]!r}; data: {sorted(data)[0]!r}"
    )
    fix = "evaluate on the tasks of the data, or expect to measure generalisation"
    return wrong(name, evidence, fix) if len(unseen) == len(suite) else suspect(name, evidence, fix)


def check_instruction_matters(predictions: Predictions | None) -> Finding:
    """Does another instruction change anything?"""
    name, variant = "instruction matters", "other instructions"
    if predictions is None:
        return not_checked(name, DATASET)
    if variant not in predictions.losses:
        return not_checked(name, "at least two instructions among the sampled frames")
    own, other = predictions.losses["own"], predictions.losses[variant]
    evidence = f"loss {own.mean():.3f} a token, with other instructions {other.mean():.3f}"
    if np.abs(own - other).max() < SAME:
        return wrong(name, f"another instruction changes nothing: {evidence}", "see that the prompt reaches the model")
    if gain(other, own) <= 0:
        return passed(name, f"{evidence}: the images of this data tell the tasks apart by themselves")
    return passed(name, evidence)


def check_prompt(prompt: PromptSpec, trained: str | None, source: str) -> Finding:
    """Is the prompt the one of training, and does it end where the action begins?

    Args:
        trained: template that the fine-tuning stage recorded; None or empty: it did not.
        source: the backbone's.
    """
    name, template = "prompt template", prompt.template
    evidence = f"{template!r}, instructions {'in lower case' if prompt.lowercase else 'as they are'}"
    if trained and trained != template:
        return wrong(name, f"{evidence}; trained with {trained!r}", f"set prompt.template to {trained!r}")
    if "openvla" in source.lower() and (template != PromptSpec.template or not prompt.lowercase):
        fix = f"use OpenVLA's {PromptSpec.template!r} with lower case"
        return suspect(name, f"{evidence}, on weights that know another prompt", fix)
    if template != template.rstrip(" "):
        return suspect(
            name, f"{evidence} ends in a space", "drop it: action ids follow the text, and the space tokenises apart"
        )
    return passed(name, evidence)


def _as_prompted(text: str, prompt: PromptSpec) -> str:
    text = text.strip().rstrip(".")
    return text.lower() if prompt.lowercase else text


def _bare(text: str) -> str:
    """Letters and digits alone, to find the same words in another dress."""
    return " ".join(text.lower().replace("_", " ").translate(str.maketrans("", "", string.punctuation)).split())


def _antipode_jumps(before: np.ndarray, after: np.ndarray, is_quaternion: bool) -> np.ndarray:
    """bool (n,): the numbers jump although the rotation hardly changes."""
    a, b = (before, after) if is_quaternion else (_quaternion(before), _quaternion(after))
    near = np.abs((a * b).sum(1)) > np.cos(0.5 / 2)  # less than half a radian between the rotations
    return near & (np.linalg.norm(after - before, axis=1) > 1.0)


def _quaternion(axis_angle: np.ndarray) -> np.ndarray:
    """(n, 3) -> (n, 4) unit quaternions."""
    angle = np.linalg.norm(axis_angle, axis=1, keepdims=True)
    axis = axis_angle / np.maximum(angle, 1e-9)
    return np.concatenate([axis * np.sin(angle / 2), np.cos(angle / 2)], axis=1)


def _disjoint(rotation: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """Share of rotations outside the policy's box whose other representation lies inside it."""
    angle = np.linalg.norm(rotation, axis=1, keepdims=True)
    axis = rotation / np.maximum(angle, 1e-9)
    other = -rotation if rotation.shape[1] == 4 else axis * (angle - 2 * np.pi)
    slack = 0.1 * np.maximum(high - low, 0.1)
    inside = lambda v: ((v >= low - slack) & (v <= high + slack)).all(1)  # noqa: E731
    return float((~inside(rotation) & inside(other)).mean())
