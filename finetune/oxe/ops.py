"""The small operations that dataset transforms of Open X-Embodiment are made of, on the columns of one episode.

A transform is a row: which recorded numbers, through which operations, side by side, make the action and the state.
Rules and thresholds are those of OpenVLA (prismatic/vla/datasets/rlds/utils/data_utils.py and oxe/transforms.py), so that
data is what published checkpoints were trained on.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from vla.types import problem

Op = Callable[[np.ndarray], np.ndarray]
"""Floats (T, W) -> floats (T, W'), one row per step of the episode in order. A function at the top of a module."""


class Part(Protocol):
    """Some of the numbers of an action or a state."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Flattened keys of the columns it reads."""
        ...

    def values(self, columns: Mapping[str, np.ndarray], n: int) -> np.ndarray:
        """Floats (n, W) from columns of n steps each."""
        ...


@dataclass(frozen=True)
class Take:
    """Numbers `start` .. `stop - 1` of a recorded column, through `ops` in order."""

    key: str
    start: int | None = None
    stop: int | None = None
    ops: tuple[Op, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def values(self, columns: Mapping[str, np.ndarray], n: int) -> np.ndarray:
        numbers = _numbers(self.key, columns[self.key])[:, self.start : self.stop]
        _check_finite(self.key, numbers)
        for op in self.ops:
            numbers = op(numbers)
        if not np.isfinite(numbers).all():
            raise problem(f"{self.key} whose values have no {self.ops[-1].__name__}", "rotations of unit length",
                          "the recording is broken: leave the episode out")  # fmt: skip
        return numbers


@dataclass(frozen=True)
class Inflate:
    """A column of `width` float32, recorded as zlib-compressed bytes; taken as it is if the reader has decoded it."""

    key: str
    width: int

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def values(self, columns: Mapping[str, np.ndarray], n: int) -> np.ndarray:
        column = np.asarray(columns[self.key])
        if column.dtype.kind not in "OS":
            return Take(self.key).values(columns, n)
        numbers = np.empty((n, self.width), np.float32)
        for i, value in enumerate(column):
            numbers[i] = self._inflate(value, i)
        _check_finite(self.key, numbers)
        return numbers

    def _inflate(self, value: object, i: int) -> np.ndarray:
        if isinstance(value, str):  # bytes that chanced to be UTF-8
            value = value.encode()
        if not isinstance(value, bytes):
            raise problem(f"{self.key} of type {type(value).__name__}", "zlib-compressed bytes or numbers",
                          "this is not the dataset of that name: check it")  # fmt: skip
        try:
            raw = zlib.decompress(value)
        except zlib.error as error:
            raise problem(f"step {i} of {self.key}: {error}", "zlib-compressed float32",
                          "the file is damaged: fetch it again") from error  # fmt: skip
        if len(raw) != 4 * self.width:
            raise problem(f"step {i} of {self.key}: {len(raw)} bytes", f"{4 * self.width}, {self.width} float32",
                          "the file is damaged: fetch it again")  # fmt: skip
        return np.frombuffer(raw, "<f4")


@dataclass(frozen=True)
class Change:
    """Numbers 0 .. `stop - 1` of a column at the next step, less those at this one. The last step, which has no next one,
    is 0 and must be dropped (`Transform.drop_last`)."""

    key: str
    stop: int

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def values(self, columns: Mapping[str, np.ndarray], n: int) -> np.ndarray:
        numbers = Take(self.key, 0, self.stop).values(columns, n)
        change = np.zeros_like(numbers)
        change[:-1] = numbers[1:] - numbers[:-1]
        return change


@dataclass(frozen=True)
class Fill:
    """A constant where the data has nothing."""

    width: int
    value: float = 0.0

    @property
    def keys(self) -> tuple[str, ...]:
        return ()

    def values(self, columns: Mapping[str, np.ndarray], n: int) -> np.ndarray:
        return np.full((n, self.width), self.value, np.float32)


@dataclass(frozen=True)
class Transform:
    """One dataset's recorded steps -> actions, states and instructions."""

    action: tuple[Part, ...]
    state: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)
    """Observations that are made, by the names that a row's `state` uses; any other name is a recorded observation."""
    instruction: str = "language_instruction"
    """Key of the text, or of Unicode code points (T, N) ended by 0."""
    gripper: str = "as recorded"
    """What the last number of the action means."""
    drop_first: int = 0
    """Recorded steps at the start that are left out, after the operations, which see the whole episode."""
    drop_last: int = 0

    def state_parts(self, names: Sequence[str | None]) -> tuple[Part, ...]:
        """The parts of a state of these observations; None is one number of padding, 0."""
        parts: list[Part] = []
        for name in names:
            if name is None:
                parts.append(Fill(1))
            elif name in self.state:
                parts.extend(self.state[name])
            else:
                parts.append(Take(f"observation/{name}"))
        return tuple(parts)


def join(parts: Sequence[Part], columns: Mapping[str, np.ndarray], n: int) -> np.ndarray:
    """float32 (n, W): the parts side by side."""
    return np.concatenate([part.values(columns, n) for part in parts], axis=1).astype(np.float32)


def invert(x: np.ndarray) -> np.ndarray:
    """1 - x: closed 1 becomes open 1."""
    return 1 - x


def clip(x: np.ndarray) -> np.ndarray:
    """Into 0 .. 1: what is recorded as -1 .. 1 loses its lower half, a binary command loses nothing."""
    return np.clip(x, 0, 1)


def binarize(x: np.ndarray) -> np.ndarray:
    """Absolute gripper commands, 1 open, to exactly 0 or 1.

    Above 0.95 is open, below 0.05 is closed. Values in between become the state that is reached after them; at the end of
    the episode, where none is, the last recorded value.
    """
    is_open = x > 0.95
    decided = is_open | (x < 0.05)
    n = len(x)
    reached = np.where(decided, np.arange(n)[:, None], n)
    reached = np.minimum.accumulate(reached[::-1], axis=0)[::-1]  # index of the next decided step, n if none
    values = np.take_along_axis(is_open, np.minimum(reached, n - 1), axis=0).astype(np.float32)
    return np.where(reached < n, values, x[-1:].astype(np.float32))


def to_absolute(x: np.ndarray) -> np.ndarray:
    """Relative gripper commands, positive closes and negative opens, to absolute ones: 1 open, 0 closed.

    Commands within -0.1 .. 0.1 keep what was. Before the first command the gripper is in the opposite state, because
    that command is taken not to be redundant; with no command at all it is open.
    """
    command = np.where(x < -0.1, 1, np.where(x > 0.1, -1, 0))
    steps = np.arange(len(x))[:, None]
    held = np.maximum.accumulate(np.where(command != 0, steps, -1), axis=0)  # index of the last command, -1 if none
    first = np.take_along_axis(command, np.argmax(command != 0, axis=0)[None], axis=0)
    start = np.where(first == 0, 1, -first)
    state = np.where(held < 0, start, np.take_along_axis(command, np.maximum(held, 0), axis=0))
    return state.astype(np.float32) / 2 + np.float32(0.5)


def euler_from_quaternion(q: np.ndarray) -> np.ndarray:
    """Unit quaternions (T, 4), xyzw, to angles (T, 3) about x, y, z: R = Rz(z) Ry(y) Rx(x), rad; NaN if not of unit length.

    Term by term as tensorflow_graphics' `euler.from_quaternion`: products are shrunk by two machine epsilons into the open
    interval (-1, 1), and within 1e-6 of gimbal lock the angle about z is 0.
    """
    eps = q.dtype.type(2 * np.finfo(q.dtype).eps)
    shrink = q.dtype.type(1) - eps
    x, y, z, w = q.T
    tx, ty, tz = 2 * x * shrink, 2 * y * shrink, 2 * z * shrink
    r00, r01, r02 = (1 - (ty * y + tz * z)) * shrink, (ty * x - tz * w) * shrink, (tz * x + ty * w) * shrink
    r10, r20 = (ty * x + tz * w) * shrink, (tz * x - ty * w) * shrink
    r21, r22 = (tz * y + tx * w) * shrink, (1 - (tx * x + ty * y)) * shrink

    sign = _sign(r20)
    locked = np.stack([np.arctan2(-sign * r01, -sign * (r02 + _sign(r02) * eps)),
                       -sign * q.dtype.type(np.pi / 2), np.zeros_like(x)], axis=1)  # fmt: skip
    with np.errstate(invalid="ignore"):
        pitch = -np.arcsin(r20)
        free = np.stack([np.arctan2(r21, r22 + _sign(r22) * eps), pitch,
                         np.arctan2(r10, r00 + _sign(r00) * eps)], axis=1)  # fmt: skip
    return np.where((np.abs(np.abs(r20) - 1) < 1e-6)[:, None], locked, free)


def _sign(x: np.ndarray) -> np.ndarray:
    """1 where x >= 0, else -1."""
    return np.where(x >= 0, x.dtype.type(1), x.dtype.type(-1))


def _numbers(key: str, column: np.ndarray) -> np.ndarray:
    """Floats (T, W) of a column (T,) or (T, W)."""
    column = np.asarray(column)
    if column.dtype.kind not in "fbiu" or column.ndim not in (1, 2):
        raise problem(f"column {key!r} of {column.dtype} with shape {column.shape}", "numbers (T,) or (T, W), T steps",
                      "this is not the dataset of that name: check it")  # fmt: skip
    if column.dtype.kind != "f":
        column = column.astype(np.float32)
    return column[:, None] if column.ndim == 1 else column


def _check_finite(key: str, numbers: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(numbers).all(axis=1))
    if len(bad):
        raise problem(f"{key} = {numbers[bad[0]].tolist()} at step {bad[0]}", "finite numbers",
                      "the recording is broken: leave the episode out")  # fmt: skip
