"""Skills of the LIBERO expert that bring an object to a place: lift it over, slide it, or push it in from the side.

Left out: grasping again in the air.
Python 3.8, numpy and mujoco only: it runs inside the simulator's interpreter, loaded by `libero_expert.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mujoco as _mujoco
import numpy as np
from libero_arm import OPEN, SHUT, Arm
from libero_doors import is_ajar, is_shut, move_door, widen
from libero_grasp import find_grasp, lean, yaw_matrix
from libero_spot import find_spot, open_side, spiral, surface_below, way_out

if TYPE_CHECKING:
    from libero_arm import Actions

mujoco: Any = _mujoco  # its types leave out most of what it has

_TIGHT = 0.8  # cost of a grasp beyond which others are looked for


def place(arm: Arm, name: str, target: str, goals: list[list[str]]) -> Actions:
    """Bring object `name` to `target`, an object or a place; `goals`: all of the task, for what shares the place."""
    if is_shut(arm, target):
        yield from move_door(arm, target, True)
    if is_ajar(arm, target):
        yield from widen(arm, target)
    if on_table(arm, target) and is_flat(arm, name):
        yield from slide(arm, name, target)
        return
    out = way_in(arm, target)
    if out is not None:
        yield from insert(arm, name, target, out)
        return
    grasp = plan_grasp(arm, name)
    if grasp is None:
        yield from arm.give_up()
        return
    yield from pick(arm, name, grasp)
    yield from carry(arm, name, target, goals, grasp.rotation)


def pick(arm: Arm, name: str, grasp: Any) -> Actions:
    """Hold it from above and lift it a little."""
    offset = grasp.position - arm.position(name)
    yield from arm.travel(grasp.position, grasp.rotation, 0.05)
    arm.phase = "reach " + name

    def funnel() -> np.ndarray:
        """The grasp, or above it as long as the hand is beside it: a finger must not land on the rim."""
        goal = arm.position(name) + offset
        aside = float(np.linalg.norm((goal - arm.hand())[:2]))
        return goal + [0, 0, min(0.05, max(0.0, 6 * (aside - 0.008)))]

    yield from arm.go(funnel, grasp.rotation, 0.007, limit=40)
    yield from arm.squeeze(SHUT, 14, grasp.position, grasp.rotation)
    arm.phase = "lift " + name


def carry(arm: Arm, name: str, target: str, goals: list[list[str]], rotation: np.ndarray) -> Actions:
    """Bring what the hand holds to its spot, over everything on the way, and let go."""
    body = arm.inner.obj_body_id[name]
    relative = float(np.linalg.norm(arm.hand() - arm.position(name)))
    yield from escape(arm, body, rotation)
    yield from arm.go(arm.hand() + [0, 0, 0.04], rotation, 0.015, limit=15)
    # only now: a bowl tips in the hand until its wall lies flat on the fingers
    spot = plan_spot(arm, name, target, goals)
    hanging = arm.hand()[2] - arm.boxes(only=body).low()[2] + 0.02
    rotation = yaw_matrix(spot.yaw) @ rotation

    def lost() -> bool:
        return bool(np.linalg.norm(arm.hand() - arm.position(name)) > relative + 0.03)

    def destination() -> np.ndarray:
        return arm.hand() + spot.origin - arm.position(name)

    arm.phase = "carry " + name
    yield from arm.over(destination, rotation, arm.boxes(exclude=(body,)), hanging, 0.02, lost)
    if lost():
        yield from arm.squeeze(OPEN, 8)
        yield from arm.go(arm.hand() + [0, 0, 0.08], arm.hand_rotation(), 0.03, limit=15)
        return
    arm.phase = "lower " + name
    yield from arm.go(destination, rotation, 0.008, limit=30)
    yield from arm.squeeze(OPEN, 6)
    arm.phase = "leave " + name
    yield from arm.go(arm.hand() + [0, 0, 0.10], rotation, 0.03, limit=20)


def plan_grasp(arm: Arm, name: str) -> Any:
    """The cheapest grasp from above, or None."""
    body = arm.inner.obj_body_id[name]
    boxes = arm.boxes(only=body)
    middle = (boxes.low() + boxes.high()) / 2
    others, rotations = arm.boxes(exclude=(body,)), arm.upright_rotations(middle)
    best = find_grasp(boxes, others, rotations, middle, arm.shoulder(), 0.006)
    if best is None or best.cost > _TIGHT:  # leaning the hand away from a wall may give room
        leaning = [
            (turn @ lean(0, angle), cost + abs(angle))
            for turn, cost in rotations
            for angle in (-0.4, -0.2, 0.0, 0.2, 0.4)
        ]
        other = find_grasp(boxes, others, leaning, middle, arm.shoulder(), 0.004)
        best = min((grasp for grasp in (best, other) if grasp is not None), key=lambda grasp: grasp.cost, default=None)
    return best


def plan_spot(arm: Arm, name: str, target: str, goals: list[list[str]]) -> Any:
    """Where to let go of the held object."""
    inner = arm.inner
    body = inner.obj_body_id[name]
    held, yaws = arm.boxes(only=body), (0.0,)
    if target in inner.obj_body_id:
        choices = arm.position(target)[None, :2]
    else:
        site = mujoco.mj_name2id(arm.model, mujoco.mjtObj.mjOBJ_SITE, target)
        centre, matrix = arm.data.site_xpos[site][:2], arm.data.site_xmat[site].reshape(3, 3)
        half = np.maximum(np.abs(matrix @ inner.object_sites_dict[target].size)[:2] - 0.02, 0.0)
        same = [goal[1] for goal in goals if goal[2:] == [target]]
        if goals[0][0].lower() == "on" and len(same) > 1:  # side by side
            size = (held.high() - held.low())[:2]
            side = np.eye(2)[int(size.argmin())] * (size.min() + 0.006)
            centre = centre + side * (same.index(name) - (len(same) - 1) / 2)
            half = half * 0.2
        choices = spiral(centre, np.eye(2), half)
        yaws = tuple(np.deg2rad(np.arange(-90, 91, 15)))
    others = arm.boxes(exclude=(body,))
    return find_spot(held, arm.position(name), arm.hand(), arm.hand_rotation(), others, choices, yaws, 0.012)


def escape(arm: Arm, body: int, rotation: np.ndarray) -> Actions:
    """Sideways from under whatever hangs over the held object."""
    held, others = arm.boxes(only=body), arm.boxes(exclude=(body,))
    way = way_out(held, others)
    if np.any(way):
        arm.phase = "escape"
        yield from arm.go(arm.hand() + [0, 0, 0.012], rotation, 0.006, limit=8)
        yield from arm.go(arm.hand() + way, rotation, 0.012, limit=25)


def insert(arm: Arm, name: str, target: str, out: np.ndarray) -> Actions:
    """Into a roofed place, held from the side with the hand level, through the open side; `out` leads out of there."""
    body = arm.inner.obj_body_id[name]
    boxes = arm.boxes(only=body)
    near = (boxes.low() + boxes.high()) / 2 + 0.5 * (boxes.high() - boxes.low()) * out
    rotations = [
        (arm.lean_back(out, angle, sideways), 2.0 * abs(1.5 - angle))
        for angle in (1.2, 1.3, 1.4, 1.5)
        for sideways in (True, False)
    ]
    grasp = find_grasp(boxes, arm.boxes(exclude=(body,)), rotations, near, arm.shoulder(), 0.006)
    if grasp is None:
        yield from arm.give_up()
        return
    back = -0.10 * grasp.rotation[:, 2]
    yield from arm.travel(grasp.position + back, grasp.rotation, 0.0)
    arm.phase = "reach " + name
    yield from arm.go(grasp.position + back, grasp.rotation, 0.015, limit=40)
    yield from arm.go(grasp.position, grasp.rotation, 0.007, limit=30)
    yield from arm.squeeze(SHUT, 14, grasp.position, grasp.rotation)
    yield from _carry_level(arm, name, target, out, grasp.rotation, back)


def _carry_level(arm: Arm, name: str, target: str, out: np.ndarray, rotation: np.ndarray, back: np.ndarray) -> Actions:
    before, end = _way_through(arm, name, target, out)
    held = arm.hand() - arm.position(name)

    def to(origin: np.ndarray) -> Callable[[], np.ndarray]:
        return lambda: arm.hand() + origin - arm.position(name)

    arm.phase = "carry " + name
    yield from arm.go(to(np.append(arm.position(name)[:2], before[2])), rotation, 0.015, limit=25)
    if np.linalg.norm(arm.hand() - arm.position(name) - held) > 0.03:  # it slipped out
        yield from arm.squeeze(OPEN, 8)
        yield from arm.go(arm.hand() + back, rotation, 0.03, limit=20)
        return
    yield from arm.go(to(before), rotation, 0.015, limit=60)
    arm.phase = "insert " + name
    yield from arm.go(to(end), rotation, 0.012, limit=50)
    yield from arm.go(to(end - [0, 0, 0.010]), rotation, 0.006, limit=15)
    yield from arm.squeeze(OPEN, 8)
    arm.phase = "leave " + name
    yield from arm.go(arm.hand() + 0.18 * out, rotation, 0.03, limit=30)


def _way_through(arm: Arm, name: str, target: str, out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the held object's origin has to be before the opening, and inside, a little nearer to it than the middle."""
    body = arm.inner.obj_body_id[name]
    site = mujoco.mj_name2id(arm.model, mujoco.mjtObj.mjOBJ_SITE, target)
    matrix = arm.data.site_xmat[site].reshape(3, 3)
    depth = float(np.abs(matrix @ arm.inner.object_sites_dict[target].size) @ np.abs(out))
    end = arm.data.site_xpos[site].copy()
    floor = surface_below(arm.boxes(exclude=(body,)), end)
    end[2] = floor + 0.012 + arm.position(name)[2] - arm.boxes(only=body).low()[2]
    end += out * 0.6 * depth
    return end + out * (0.4 * depth + 0.16), end


def way_in(arm: Arm, target: str) -> np.ndarray | None:
    """(3,) level direction from a roofed place out through its open side; None if it has no roof."""
    sites = arm.inner.object_sites_dict
    if target not in sites or on_table(arm, target):
        return None
    site = mujoco.mj_name2id(arm.model, mujoco.mjtObj.mjOBJ_SITE, target)
    here, matrix = arm.data.site_xpos[site], arm.data.site_xmat[site].reshape(3, 3)
    fixture = min(arm.family(int(arm.model.site_bodyid[site])))
    return open_side(arm.boxes(only=fixture), here, matrix)


def slide(arm: Arm, name: str, target: str) -> Actions:
    """Move something flat and hollow over the table: the shut fingers press on the far slope of its inside."""
    body = arm.inner.obj_body_id[name]
    site = mujoco.mj_name2id(arm.model, mujoco.mjtObj.mjOBJ_SITE, target)
    boxes = arm.boxes(only=body)
    radius, low = float((boxes.high() - boxes.low())[:2].max()) / 2, float(boxes.low()[2])

    def pose(lead: float, height: float) -> np.ndarray:
        """`lead` metres beyond the object's middle, on the line from it to the target."""
        now = arm.boxes(only=body)
        middle = (now.low() + now.high())[:2] / 2
        way = arm.data.site_xpos[site][:2] - middle
        return np.append(middle + lead * way / max(float(np.linalg.norm(way)), 0.01), low + height)

    way = (arm.data.site_xpos[site] - pose(0.0, 0.0)) * [1.0, 1.0, 0.0]
    rotation = arm.lean_back(way / np.linalg.norm(way), 0.0, sideways=True)
    yield from arm.travel(pose(0.5 * radius, 0.0), rotation, 0.10)
    arm.grip = SHUT
    for _ in range(8):
        arm.phase = "down on " + name
        yield from arm.go(lambda: pose(0.5 * radius, 0.035), rotation, 0.015, limit=25)
        yield from arm.go(lambda: pose(0.5 * radius, 0.015), rotation, 0.006, limit=25)
        arm.phase = "slide " + name
        for _ in range(60):
            if np.linalg.norm((arm.hand() - pose(0.0, 0.0))[:2]) > 0.8 * radius:  # it slips out
                break
            if np.linalg.norm(pose(0.0, 0.0)[:2] - arm.data.site_xpos[site][:2]) < 0.02:
                return
            yield arm.servo(pose(0.9 * radius, 0.012), rotation, 0.5)
    yield from arm.go(arm.hand() + [0, 0, 0.10], rotation, 0.03, limit=20)


def on_table(arm: Arm, target: str) -> bool:
    """Whether `target` is a place on the table itself."""
    site = arm.inner.object_sites_dict.get(target)
    return site is not None and arm.inner.get_object(site.parent_name) is None


def is_flat(arm: Arm, name: str) -> bool:
    """Whether it is low and wider than the open hand."""
    boxes = arm.boxes(only=arm.inner.obj_body_id[name])
    size = boxes.high() - boxes.low()
    return bool(size[2] < 0.03 and size[:2].min() > 0.08)
