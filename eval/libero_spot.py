"""Where to put an object and which way to bring it there, from the collision boxes of a MuJoCo scene.

Python 3.8, numpy only: it runs inside the simulator's interpreter, loaded by `libero_expert.py`. All lengths are metres,
in world axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from libero_grasp import CELL, FINGER_TIP, HAND_BOTTOM, Boxes, Cells, grid, yaw_matrix


class Spot(NamedTuple):
    """Where an object comes to rest: its origin (3,), the hand's extra turn about z (rad), the release height."""

    origin: np.ndarray
    yaw: float
    cost: float


def find_spot(
    held: Boxes,
    origin: np.ndarray,
    hand: np.ndarray,
    hand_rotation: np.ndarray,
    others: Boxes,
    choices: np.ndarray,
    yaws: Sequence[float],
    gap: float,
) -> Spot:
    """The best of `choices` (K, 2) to let go of an object that the hand holds, seen from above.

    The object is lowered until it, the hand or an opening finger would touch: the answer's origin is `gap` above that.
    Earlier choices are preferred, a centimetre of extra height costs as much as five places in the list.
    """
    margin = 0.25
    low = np.append(choices.min(0) - margin, others.low()[2] - CELL)
    high = np.append(choices.max(0) + margin, others.high()[2] + CELL)
    surface = _surface(others, low, high)
    under_object = _bottom_points(held) - origin
    opening = np.array([[u, v, FINGER_TIP] for u in (-0.07, -0.055, -0.04, 0.04, 0.055, 0.07) for v in (-0.011, 0.011)])
    palm = grid(np.linspace(-0.105, 0.105, 11), (-0.032, 0.0, 0.032), (HAND_BOTTOM,))
    under_hand = np.concatenate([opening, palm]) @ hand_rotation.T + (hand - origin)
    best: Spot | None = None
    for yaw in yaws:
        turn = yaw_matrix(yaw)
        object_points, hand_points = under_object @ turn.T, under_hand @ turn.T
        for rank, xy in enumerate(choices):
            landing = (_height(surface, low, object_points[:, :2] + xy) - object_points[:, 2]).max()
            touching = (_height(surface, low, hand_points[:, :2] + xy) - hand_points[:, 2]).max()
            z = max(landing + gap, touching + 0.006)
            cost = 100 * z + 0.2 * rank + 0.6 * abs(yaw)
            if best is None or cost < best.cost - 1e-9:
                best = Spot(np.append(xy, z), yaw, cost)
    assert best is not None
    return best


def _bottom_points(boxes: Boxes) -> np.ndarray:
    signs = grid((-1, 0, 1), (-1, 0, 1), (-1, 1))
    return (boxes.centre[:, None] + np.einsum("nij,nkj->nki", boxes.rotation, signs * boxes.half[:, None])).reshape(
        -1, 3
    )


def _surface(boxes: Boxes, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(X, Y): height of the topmost occupied cell of each column, -inf where there is none."""
    cells = Cells(low, high).fill(boxes, 0.003).full
    top = cells.shape[2] - 1 - cells[:, :, ::-1].argmax(2)
    return np.where(cells.any(2), low[2] + top * CELL, -np.inf)


def _height(surface: np.ndarray, low: np.ndarray, xy: np.ndarray) -> np.ndarray:
    index = np.rint((xy - low[:2]) / CELL).astype(int).clip(0, np.array(surface.shape) - 1)
    return surface[index[:, 0], index[:, 1]]


def corridor_top(boxes: Boxes, start: np.ndarray, end: np.ndarray, radius: float) -> float:
    """Height of the highest box within `radius` of the straight way from start to end, seen from above."""
    points = start[:2] + np.linspace(0, 1, 12)[:, None] * (end - start)[:2]
    distance = np.abs(points[:, None] - boxes.centre[None, :, :2]) - boxes.extent()[None, :, :2]
    on_the_way = (distance < radius).all(2).any(0)
    return float((boxes.centre + boxes.extent())[on_the_way, 2].max()) if on_the_way.any() else float("-inf")


def spiral(centre: np.ndarray, axes: np.ndarray, half: np.ndarray, step: float = 0.01) -> np.ndarray:
    """(K, 2) points of a rectangle, nearest to its centre first. axes: (2, 2) unit columns; half: (2,) half sizes."""
    a, b = (np.arange(-np.floor(h / step), np.floor(h / step) + 1) * step for h in half)
    offsets: list[np.ndarray] = sorted(grid(a, b), key=lambda p: float(np.hypot(*p)))
    return centre + np.array(offsets) @ axes.T


def way_out(held: Boxes, others: Boxes, margin: float = 0.005) -> np.ndarray:
    """(3,) shortest level move after which nothing of `others` is over `held`; zero if nothing is, or none is found."""
    low, high = held.low() - margin, held.high() + margin
    first, last = others.centre - others.extent(), others.centre + others.extent()
    above = first[:, 2] > held.high()[2] - 0.01
    for distance in np.arange(0.0, 0.16, 0.01):
        for angle in np.arange(0, 2 * np.pi, np.pi / 8):
            way = distance * np.array([np.cos(angle), np.sin(angle), 0.0])
            over = ((first < high + way) & (last > low + way))[:, :2].all(1)
            if not (over & above).any():
                return way
    return np.zeros(3)


def open_side(boxes: Boxes, at: np.ndarray, axes: np.ndarray) -> np.ndarray | None:
    """(3,) the level direction among `axes` (columns) in which `boxes` leave the way out of `at` free; None without a roof."""

    def met(direction: np.ndarray) -> bool:
        ahead = at + direction * np.arange(0.02, 0.2, 0.005)[:, None]
        return bool((np.abs(ahead[:, None] - boxes.centre) <= boxes.extent()).all(2).any())

    if not met(np.array([0.0, 0.0, 1.0])):
        return None
    level = [sign * axis for axis in axes.T if abs(axis[2]) < 0.5 for sign in (1.0, -1.0)]
    free = [direction for direction in level if not met(direction)]
    return free[0] if len(free) == 1 else None


def surface_below(boxes: Boxes, at: np.ndarray) -> float:
    """Height of the highest box top under a point."""
    under = (np.abs(boxes.centre - at) <= boxes.extent())[:, :2].all(1) & (boxes.centre[:, 2] < at[2])
    return float((boxes.centre + boxes.extent())[under, 2].max())
