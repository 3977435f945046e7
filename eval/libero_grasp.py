"""Where to hold an object: a search over the collision boxes of a MuJoCo scene.

Every collision geom of LIBERO's objects is a box, so a grid of occupied cells is exact to a cell. Left out: grasps that
need force closure beyond two parallel fingers, and motion planning (the expert travels above everything instead).
Python 3.8, numpy only: it runs inside the simulator's interpreter. All lengths are metres, in world axes;
a rotation of the hand is (3, 3) float64 with columns closing direction, sideways, approach.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

CELL = 0.004
PLANE = 0  # mujoco.mjtGeom.mjGEOM_PLANE
# The Panda's hand, measured from its geoms in the frame of the grip site. Fingers open: inner faces 38 mm from the axis.
FINGER_TIP = 0.010
HAND_BOTTOM, HAND_TOP = -0.026, -0.13
SHOULDER_HEIGHT, COMFORTABLE = 0.333, 0.66  # of the Panda; beyond 0.70 m from shoulder to wrist the elbow is straight


class Boxes(NamedTuple):
    """Oriented boxes: centres (N, 3), rotations (N, 3, 3), half sizes (N, 3), and the body of each, (N,)."""

    centre: np.ndarray
    rotation: np.ndarray
    half: np.ndarray
    body: np.ndarray

    def only(self, keep: np.ndarray) -> Boxes:
        return Boxes(self.centre[keep], self.rotation[keep], self.half[keep], self.body[keep])

    def extent(self) -> np.ndarray:
        """(N, 3): half the size of each box's axis-aligned hull."""
        return np.einsum("nij,nj->ni", np.abs(self.rotation), self.half)

    def low(self) -> np.ndarray:
        return (self.centre - self.extent()).min(0)

    def high(self) -> np.ndarray:
        return (self.centre + self.extent()).max(0)


class Grasp(NamedTuple):
    """The pose of the grip site at the moment of closing, position (3,) and rotation (3, 3), and how bad it is."""

    position: np.ndarray
    rotation: np.ndarray
    cost: float


def collision_boxes(model: Any, data: Any) -> Boxes:
    """All colliding geoms except planes, as boxes (other shapes by their hull in the geom's frame)."""
    keep = ((model.geom_contype != 0) | (model.geom_conaffinity != 0)) & (model.geom_type != PLANE)
    rotation = data.geom_xmat[keep].reshape(-1, 3, 3)
    centre = data.geom_xpos[keep] + np.einsum("nij,nj->ni", rotation, model.geom_aabb[keep, :3])
    return Boxes(centre, rotation.copy(), model.geom_aabb[keep, 3:].copy(), model.geom_bodyid[keep].copy())


class Cells:
    """A grid over `low`..`high` (world, metres): which cells a set of boxes, each grown by `grow`, occupies."""

    def __init__(self, low: np.ndarray, high: np.ndarray) -> None:
        self.low = low
        self.shape = tuple(int(n) for n in np.ceil((high - low) / CELL) + 1)
        self.full = np.zeros(self.shape, dtype=bool)

    def fill(self, boxes: Boxes, grow: float = CELL / 2) -> Cells:
        reach = boxes.extent() + grow
        first = np.floor((boxes.centre - reach - self.low) / CELL).astype(int).clip(0)
        last = (np.ceil((boxes.centre + reach - self.low) / CELL).astype(int) + 1).clip(0, self.shape)
        for n in np.flatnonzero((last > first).all(1)):
            axes = [np.arange(first[n, k], last[n, k]) * CELL + self.low[k] - boxes.centre[n, k] for k in range(3)]
            # distance along box axis j = sum over world axes k of rotation[k, j] * offset[k]
            inside = np.ones([len(axis) for axis in axes], dtype=bool)
            for j in range(3):
                x, y, z = (boxes.rotation[n, k, j] * axes[k] for k in range(3))
                inside &= np.abs(x[:, None, None] + y[None, :, None] + z[None, None, :]) <= boxes.half[n, j] + grow
            self.full[tuple(slice(first[n, k], last[n, k]) for k in range(3))] |= inside
        return self

    def at(self, points: np.ndarray) -> np.ndarray:
        """points (..., 3) -> (...) bool; points outside the grid count as free."""
        index = np.rint((points - self.low) / CELL).astype(np.int32)
        inside: Any = ((index >= 0) & (index < self.shape)).all(-1)
        index = np.where(inside[..., None], index, 0)
        return self.full[index[..., 0], index[..., 1], index[..., 2]] & inside


def grid(*axes: Iterable[float]) -> np.ndarray:
    return np.array(list(itertools.product(*axes)))


_CLOSING = grid(np.arange(-9, 10) * 0.004, (-0.006, 0.0, 0.006), (-0.009, -0.003, 0.003))  # (19 * 9, 3)
# (across, along the approach): the outer face tapers towards the tip
_PROFILE = [
    (x, z)
    for z, outer in ((-0.04, 0.066), (-0.02, 0.062), (-0.008, 0.059), (0.004, 0.055), (FINGER_TIP, 0.054))
    for x in np.linspace(0.041, outer, 4)
]
_FINGERS = np.array([(sign * x, y, z) for x, z in _PROFILE for y in (-0.011, -0.004, 0.004, 0.011) for sign in (-1, 1)])
_HAND = grid(np.linspace(-0.105, 0.105, 11), (-0.032, 0.0, 0.032), np.linspace(HAND_TOP, HAND_BOTTOM, 6))


def below(rotation: np.ndarray) -> float:
    """How far the open hand reaches below its grip site when turned like this."""
    return float(-(np.concatenate([_FINGERS, _HAND]) @ rotation.T)[:, 2].min())


def find_grasp(
    target: Boxes,
    others: Boxes,
    rotations: Sequence[tuple[np.ndarray, float]],
    towards: np.ndarray,
    shoulder: np.ndarray,
    step: float,
    clearance: float = 0.003,
) -> Grasp | None:
    """The cheapest pose in which the open hand fits around part of `target` and touches nothing, or None.

    Args:
        target: what to hold.
        others: everything the hand must not touch.
        rotations: hand orientations to try, each with its own cost (1 = as bad as holding 5 cm off the centre).
        towards: (3,) point of `target` that would be best to hold.
        shoulder: (3,) the arm's shoulder; poses near the end of its reach cost more.
        step: distance between the positions tried.
        clearance: of the fingers; the palm, which tilts a little on the way, keeps 7 mm more.
    """
    low, high = target.low(), target.high()
    window = (low - 0.16, high + 0.16)
    held = Cells(*window).fill(target)
    solid = Cells(*window).fill(others, clearance)
    solid.full |= held.full
    roomy = Cells(*window).fill(others, clearance + 0.007)
    near = Cells(*window).fill(others, 0.015)
    steps = (step, step, step / 2 if step > 0.005 else step)
    centres = grid(*(np.arange(low[k], high[k] + 0.004, steps[k]) for k in range(3)))
    best = None
    for rotation, own_cost in rotations:
        likely = centres[_centred(held.at(centres[:, None] + _CLOSING[5::9] @ rotation.T))]
        profile = held.at(likely[:, None] + _CLOSING @ rotation.T).reshape(len(likely), 19, 9)
        good = _centred(np.asarray(profile.any(2)))
        points = likely[good]
        if len(points) == 0:
            continue
        contact, slant = profile[good].any(1).mean(1), _slant(profile[good])
        points, contact, slant = points[contact > 0.5], contact[contact > 0.5], slant[contact > 0.5]
        body = np.concatenate([_FINGERS, _HAND]) @ rotation.T
        free = ~solid.at(points[:, None] + body).any(1) & ~roomy.at(points[:, None] + body[len(_FINGERS) :]).any(1)
        points, contact, slant = points[free], contact[free], slant[free]
        if len(points) == 0:
            continue
        crowded = near.at(points[:, None] + body).mean(1)
        away = np.linalg.norm((points - towards)[:, :2], axis=1) / 0.05
        depth = np.minimum(high[2] - points[:, 2], 0.018) / 0.05
        cost = own_cost + away + 12.0 * crowded - 1.5 * contact + 0.3 * slant - 0.5 * depth
        lifted = points + [0, 0, 0.07]
        cost += 30 * (stretch(lifted, rotation[:, 2], shoulder) - COMFORTABLE).clip(0)
        n = int(cost.argmin())
        if best is None or cost[n] < best.cost - 1e-9:
            best = Grasp(points[n], rotation, float(cost[n]))
    return best


def stretch(points: np.ndarray, approach: np.ndarray, shoulder: np.ndarray) -> np.ndarray:
    """(..., 3) hand positions -> (...) distance in metres from the shoulder to the wrist (the Panda's DH lengths)."""
    wrist = points - 0.204 * approach - shoulder
    return np.hypot(np.hypot(wrist[..., 0], wrist[..., 1]) - 0.088, wrist[..., 2])


def _slant(profile: np.ndarray) -> np.ndarray:
    """(K, 19, 9) -> (K,): by how many cells the two held faces lean or bend within the pads; the fingers slip off a slope."""
    first, last = profile.argmax(1), 18 - profile[:, ::-1].argmax(1)  # (K, 9)
    touched = profile.any(1)
    spread = np.zeros(len(profile))
    for side in (first, last):
        spread += np.where(touched, side, -1).max(1) - np.where(touched, side, 99).min(1)
    return spread


def _centred(profile: np.ndarray) -> np.ndarray:
    """(K, 19) occupied cells between the fingers -> (K,) bool: something is there, in the middle, narrow enough."""
    first, last = profile.argmax(1), 18 - profile[:, ::-1].argmax(1)
    return profile.any(1) & (np.abs(first + last - 18) <= 2) & (last - first <= 16)


def yaw_matrix(angle: float) -> np.ndarray:
    """(3, 3): a turn about the world's vertical."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def lean(axis: int, angle: float) -> np.ndarray:
    """(3, 3): a turn about the hand's own closing (0) or sideways (1) axis."""
    c, s = np.cos(angle), np.sin(angle)
    turn = np.eye(3)
    first, second = (1, 2) if axis == 0 else (2, 0)
    turn[[first, second], [first, second]] = c
    turn[first, second], turn[second, first] = -s, s
    return turn
