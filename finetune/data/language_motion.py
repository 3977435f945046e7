"""Language motions read off the data: a phrase for every frame, from what the robot then does.

As RT-H labels its data (Belkhale et al., arXiv 2403.01823): each dimension of the robot's movement has a word for
either direction, movements below a threshold are left out, and the others are said in the order of their size, such as
"move arm forward and left, close gripper". Different here: movement is what the actions command, summed over the next
`lookahead` steps of the episode; sizes are compared in units of each dimension's own fast movement (the 99th percentile of
one step), as metres and radians have no common one; at most `MOST_PARTS` dimensions are said; the gripper stands last.

Directions are those of a right-handed frame at the robot's base, x forward, y left, z up (REP 103); data of another frame
says so with `--motion-words`. A gripper is commanded by position, so it is said where its command changes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla.finetune.formats.source import FrameSource
from vla.types import problem

STILL = "hold still"
"""Nothing moves faster than the threshold."""
MOST_PARTS = 3
WORDS = {
    "x": ("move arm forward", "move arm backward"),
    "y": ("move arm left", "move arm right"),
    "z": ("move arm up", "move arm down"),
    "roll": ("roll wrist right", "roll wrist left"),
    "pitch": ("tilt arm down", "tilt arm up"),
    "yaw": ("rotate arm counterclockwise", "rotate arm clockwise"),
}
"""Dimension -> (what an increase is called, what a decrease is called)."""
TURNS = {"rx": "roll", "ry": "pitch", "rz": "yaw"}
OPENS = re.compile(r"\b(?:opens?|opened)\b")
CLOSES = re.compile(r"\b(?:closes?|closed)\b")


@dataclass(frozen=True)
class MotionRule:
    """How movements become phrases."""

    lookahead: int = 8
    """Steps whose movement a phrase describes."""
    threshold: float = 0.25
    """A dimension is said if it moves at least so fast, as a share of its own fast movement."""
    delta: bool = True
    """The actions are displacements; False: absolute targets, whose differences are taken."""
    words: tuple[str, ...] = ()
    """NAME=PLUS/MINUS for dimensions whose words are others, e.g. dx=right/left or dyaw=turn base left/turn base right;
    a single word is a direction of the arm. NAME= leaves a dimension out."""

    def __post_init__(self) -> None:
        if self.lookahead < 1 or not 0.0 < self.threshold <= 1.0:
            raise problem(f"lookahead {self.lookahead}, threshold {self.threshold}", "lookahead >= 1, 0 < threshold <= 1",
                          "correct --motion-lookahead or --motion-threshold")  # fmt: skip
        _given(self.words)


@dataclass(frozen=True)
class Labels:
    """One dataset's phrases."""

    phrases: tuple[str, ...]
    """The different ones."""
    of_frame: np.ndarray
    """int32 (N,): of each frame, its index in `phrases`."""

    def counts(self) -> dict[str, int]:
        """Phrase -> its frames, the most frequent first; among equals by the alphabet."""
        n = np.bincount(self.of_frame, minlength=len(self.phrases)).tolist()
        return dict(sorted(zip(self.phrases, n, strict=True), key=lambda item: (-item[1], item[0])))


def label_frames(
    source: FrameSource, rule: MotionRule, gripper_dim: int | None = None, gripper_convention: str = ""
) -> Labels:
    """The phrase of every frame of a dataset.

    Args:
        gripper_dim: a gripper's index in an action, besides the dimensions whose names say gripper.
        gripper_convention: which values open and close it, in words; default: `source.gripper`.

    Raises:
        VlaError: a dimension that there are no words for.
    """
    names, actions = source.action_names, source.actions().astype(np.float64)
    grippers = [d for d, name in enumerate(names) if d == gripper_dim or "gripper" in name.lower()]
    words = words_of(names, rule.words, grippers, gripper_convention or source.gripper)
    starts, stops = _bounds(source)
    steps = actions if rule.delta else _differences(actions, starts, [_is_turn(name) for name in names])
    speed = _speeds(steps, stops, rule.lookahead)
    speed[:, [d for d in range(len(names)) if d in grippers or words[d] is None]] = 0.0
    said = [_codes(speed, rule.threshold)]
    said += [_gripper_codes(actions[:, d], d, starts, stops, rule.lookahead)[:, None] for d in grippers if words[d]]
    whole, of_frame = np.unique(np.concatenate(said, axis=1), axis=0, return_inverse=True)
    phrases = [_phrase(row, words) for row in whole.tolist()]
    known = {phrase: k for k, phrase in enumerate(dict.fromkeys(phrases))}
    renumber = np.array([known[phrase] for phrase in phrases], np.int32)
    return Labels(tuple(known), renumber[of_frame.ravel()])


def all_phrases(labels: Sequence[Labels]) -> tuple[str, ...]:
    """Those of several datasets, the most frequent of all first; among equals by the alphabet."""
    total = Counter[str]()
    for one in labels:
        total.update(one.counts())
    return tuple(sorted(total, key=lambda phrase: (-total[phrase], phrase)))


def words_of(
    names: Sequence[str], given: Sequence[str], grippers: Sequence[int], convention: str
) -> list[tuple[str, str] | None]:
    """Of each dimension, what an increase and a decrease are called; None: it is left out.

    Raises:
        VlaError: a dimension without words, or words for a dimension that does not exist.
    """
    chosen, found, missing = _given(given), list[tuple[str, str] | None](), list[str]()
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        raise problem(f"words for {', '.join(unknown)}", f"dimensions of the actions: {', '.join(names)}",
                      "correct --motion-words")  # fmt: skip
    for d, name in enumerate(names):
        if name in chosen:
            found.append(chosen[name])
        elif d in grippers:
            found.append(_gripper_words(convention))
        else:
            found.append(WORDS.get(_axis(name)))
        if found[-1] is None and name not in chosen:
            missing.append(name)
    if missing:
        hint = "close gripper/open gripper" if names.index(missing[0]) in grippers else "forward/backward"
        raise problem(f"action dimensions without words: {', '.join(missing)}", "a word for either direction of each",
                      f"pass --motion-words '{missing[0]}={hint}' ..., or '{missing[0]}=' to leave it out")  # fmt: skip
    return found


def _given(words: Sequence[str]) -> dict[str, tuple[str, str] | None]:
    found: dict[str, tuple[str, str] | None] = {}
    for text in words:
        name, equals, directions = text.partition("=")
        parts = [" ".join(part.split()) for part in directions.split("/")]
        whole = [part if " " in part else f"move arm {part}" for part in parts]
        fine = equals and name and (not directions.strip() or (len(parts) == 2 and all(parts) and whole[0] != whole[1]))
        if not fine or name in found:
            raise problem(f"motion words {text!r}", "NAME=PLUS/MINUS such as dx=right/left, or NAME= to leave it out, each "
                          "name once", "correct --motion-words")  # fmt: skip
        found[name] = (whole[0], whole[1]) if directions.strip() else None
    return found


def _axis(name: str) -> str:
    """The name in `WORDS` that a dimension's name stands for: dx, delta_x, action.x -> x; rx, d_rx, droll -> roll."""
    last = re.split(r"[./]", name.lower())[-1]
    axis = re.sub(r"^(?:delta|d)_?(?=(?:x|y|z|rx|ry|rz|roll|pitch|yaw)$)", "", last)
    return TURNS.get(axis, axis)


def _is_turn(name: str) -> bool:
    return _axis(name) in ("roll", "pitch", "yaw")


def _gripper_words(convention: str) -> tuple[str, str] | None:
    """(increase, decrease) by a convention such as '+1 closes, -1 opens' or '1 open, 0 closed'; None if it does not say."""
    signs = set[int]()
    for clause in re.split(r"[,;]| and ", convention.lower()):
        number = re.search(r"[-+]?\d+(?:\.\d+)?", clause)
        opens, closes = OPENS.search(clause), CLOSES.search(clause)
        if number and bool(opens) != bool(closes):
            signs.add((1 if float(number.group()) > 0 else -1) * (1 if closes else -1))
    if len(signs) != 1:
        return None
    return ("close gripper", "open gripper") if signs == {1} else ("open gripper", "close gripper")


def _bounds(source: FrameSource) -> tuple[np.ndarray, np.ndarray]:
    """(int64 (N,), int64 (N,)): where the episode of each frame starts and stops."""
    starts = np.array([span.start for span in source.episodes], np.int64)
    stops = np.array([span.stop for span in source.episodes], np.int64)
    return np.repeat(starts, stops - starts), np.repeat(stops, stops - starts)


def _differences(actions: np.ndarray, starts: np.ndarray, turns: Sequence[bool]) -> np.ndarray:
    """What each absolute target adds to the one before it, 0 at the start of an episode; angles (radians) the short way."""
    steps = np.diff(actions, axis=0, prepend=actions[:1])
    steps[np.arange(len(actions)) == starts] = 0.0
    wrap = np.asarray(turns, bool)
    steps[:, wrap] = (steps[:, wrap] + np.pi) % (2 * np.pi) - np.pi
    return steps


def _speeds(steps: np.ndarray, stops: np.ndarray, lookahead: int) -> np.ndarray:
    """float64 (N, D): the mean of each frame's next steps within its episode, in units of the dimension's fast step."""
    total = np.concatenate([np.zeros((1, steps.shape[1])), np.cumsum(steps, axis=0)])
    here = np.arange(len(steps))
    ends = np.minimum(here + lookahead, stops)
    fast = np.quantile(np.abs(steps), 0.99, axis=0) if len(steps) else np.zeros(steps.shape[1])
    moves = fast > 1e-8  # else rounding would count as movement
    return np.where(moves, (total[ends] - total[here]) / ((ends - here)[:, None] * np.where(moves, fast, 1.0)), 0.0)


def _codes(speed: np.ndarray, threshold: float) -> np.ndarray:
    """int64 (N, up to MOST_PARTS): the dimensions said, the fastest first, as 2 d + 1 (increase) or 2 d + 2 (decrease); 0:
    none."""
    order = np.argsort(-np.abs(speed), axis=1, kind="stable")[:, :MOST_PARTS]
    fastest = np.take_along_axis(speed, order, axis=1)
    return np.where(np.abs(fastest) >= threshold, 2 * order + np.where(fastest > 0, 1, 2), 0)


def _gripper_codes(command: np.ndarray, dim: int, starts: np.ndarray, stops: np.ndarray, lookahead: int) -> np.ndarray:
    """int64 (N,): as `_codes`, where the command rises or falls by half its range or more from the step before a frame to the
    last one looked at."""
    here = np.arange(len(command))
    change = command[np.minimum(here + lookahead, stops) - 1] - command[np.maximum(here - 1, starts)]
    half = (command.max() - command.min()) / 2 if len(command) else 0.0
    return np.where((half > 0) & (np.abs(change) >= half), 2 * dim + np.where(change > 0, 1, 2), 0)


def _phrase(codes: Sequence[int], words: Sequence[tuple[str, str] | None]) -> str:
    """Parts that begin with the same words are said together: move arm forward and left."""
    groups: dict[str, list[str]] = {}
    for code in codes:
        pair = words[(code - 1) // 2] if code else None
        if pair is not None:
            verb, _, direction = pair[(code - 1) % 2].rpartition(" ")
            groups.setdefault(verb, []).append(direction)
    return ", ".join(f"{verb} {' and '.join(directions)}" for verb, directions in groups.items()) or STILL
