"""Is the gripper recorded one way in all episodes? Three observations; none of them proves a convention.

1. Values: a command that is meant to be two-valued takes a third value, or is constant.
2. The start: most demonstrations begin with an open hand, so episodes whose first command is the opposite of almost all
   others' were probably recorded with the other sign.
3. The hand itself, where the state has its opening or its fingers: does a larger command open or close it? Episodes that
   answer differently from the others contradict them.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from vla.finetune.data.dataset_check import Finding
from vla.finetune.formats.source import FrameSource

GRIPPER_WORDS = ("grip", "jaw", "finger", "claw")
ARM_ACTION_DIM = 7
MIN_EPISODES = 4
RARE = 0.25
"""A minority of this share of the episodes at most is a suspect, a larger one a second way of doing the task."""
CLEAR = 0.3
"""Correlation from which on the hand's answer counts."""
LAG_FRAMES = 3
"""The hand answers a command within so many frames."""


def gripper_dim(source: FrameSource) -> int | None:
    """The action dimension named after a gripper; of 7 dimensions without telling names, the last; else None."""
    found = [d for d, name in enumerate(source.action_names) if any(word in name.lower() for word in GRIPPER_WORDS)]
    if len(found) == 1:
        return found[0]
    unnamed = all(name.isdigit() for name in source.action_names)
    return ARM_ACTION_DIM - 1 if not found and unnamed and source.action_dim == ARM_ACTION_DIM else None


def check_gripper(source: FrameSource, closes: Literal["high", "low"] | None = None) -> list[Finding]:
    """`closes`: which command closes the hand, if the user knows; the data's answer is then compared with it."""
    dim = gripper_dim(source)
    if dim is None or not len(source):
        return []
    name, commands = source.action_names[dim], source.actions()[:, dim]
    findings = _check_values(source, name, commands)
    middle = (float(np.nanmin(commands)) + float(np.nanmax(commands))) / 2
    high = commands > middle
    findings += _check_start(source, name, high)
    answers = {span.index: _answer(source, span.start, span.stop, commands - middle) for span in source.episodes}
    known = {k: sign for k, sign in answers.items() if sign}
    opening = [k for k, sign in known.items() if sign > 0]
    closing = [k for k, sign in known.items() if sign < 0]
    few, many = sorted((opening, closing), key=len)
    if few and len(known) >= MIN_EPISODES and len(few) <= RARE * len(known):
        text = f"{name}: in {len(few)} episodes the hand answers the command the other way round than in the other {len(many)}"
        findings.append(Finding("error", text, "gripper", tuple(few), "turn the sign of their gripper, or drop them"))
    if closes is not None and len(many) > len(few):
        told = "low" if many is opening else "high"
        if told != closes:
            text = (
                f"{name}: the hand's state says that {told} commands close it, in {len(many)} of {len(known)} episodes"
            )
            findings.append(
                Finding("error", text, "gripper", tuple(many), f"the convention given, {closes}, is the other one")
            )
    return findings


def _check_values(source: FrameSource, name: str, commands: np.ndarray) -> list[Finding]:
    values, counts = np.unique(commands[np.isfinite(commands)], return_counts=True)
    if len(values) == 1:
        return [
            Finding(
                "warning",
                f"{name} is {values[0]:g} in every frame",
                "gripper",
                (),
                "the hand is never used, or this is not the gripper",
            )
        ]
    rare = values[counts < 0.02 * len(commands)]
    findings = []
    if len(values) - len(rare) == 2 and 0 < len(rare) <= 3:
        episodes = tuple(sorted({source.episode_of(int(i)) for i in np.flatnonzero(np.isin(commands, rare))}))
        text = f"{name} has two values and, rarely, {', '.join(f'{v:g}' for v in rare)}"
        findings.append(
            Finding("warning", text, "gripper", episodes, "a third value is decoded as one of the two: mend it")
        )
    if len(values) and (values[0] < -1.0001 or values[-1] > 1.0001):
        text = f"{name} goes from {values[0]:g} to {values[-1]:g}, outside -1..1"
        findings.append(
            Finding("warning", text, "gripper", (), "a position rather than a command? name it, or scale it")
        )
    return findings


def _check_start(source: FrameSource, name: str, high: np.ndarray) -> list[Finding]:
    first = np.array([high[span.start] for span in source.episodes])
    changes = np.array([high[span.start : span.stop].any() and not high[span.start : span.stop].all()
                        for span in source.episodes])  # fmt: skip
    rare = first != (first.mean() > 0.5)
    suspects = np.flatnonzero(rare & changes)
    if len(first) < MIN_EPISODES or not len(suspects) or rare.mean() > RARE:
        return []
    text = f"{name}: {len(suspects)} episodes begin with the opposite command of the other {int((~rare).sum())}"
    return [
        Finding(
            "warning",
            text,
            "gripper",
            tuple(suspects.tolist()),
            "if the hand begins open there too, its sign is turned",
        )
    ]


def _answer(source: FrameSource, start: int, stop: int, commands: np.ndarray) -> int:
    """`commands`: of the whole dataset, their middle at 0. 1: a larger command opens the hand; -1: closes it; 0: the data does not say."""
    states = source.states()
    dims = [d for d, name in enumerate(source.state_names) if any(word in name.lower() for word in GRIPPER_WORDS)]
    if states is None or not dims or stop - start <= LAG_FRAMES + 2:
        return 0
    # Fingers may be given as two positions of opposite sign: what counts is how far they are from the middle.
    opening = np.abs(states[start:stop][:, dims]).sum(1).astype(np.float64)
    change, command = (
        opening[LAG_FRAMES:] - opening[:-LAG_FRAMES],
        commands[start : stop - LAG_FRAMES].astype(np.float64),
    )
    moving = np.abs(change) > 1e-3 * max(float(np.ptp(opening)), 1e-9)
    if moving.sum() < 2 or not np.ptp(opening):
        return 0
    agreement = float(np.mean(np.sign(change[moving]) * np.sign(command[moving])))
    return 0 if abs(agreement) < CLEAR else int(np.sign(agreement))
