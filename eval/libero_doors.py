"""Skills of the LIBERO expert for what hangs on a joint: drawers, doors and knobs.

Python 3.8, numpy and mujoco only: it runs inside the simulator's interpreter, loaded by `libero_expert.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mujoco as _mujoco
import numpy as np
from libero_arm import OPEN, SHUT, Arm
from libero_grasp import find_grasp, yaw_matrix

if TYPE_CHECKING:
    from libero_arm import Actions

mujoco: Any = _mujoco  # its types leave out most of what it has


def move_door(arm: Arm, target: str, to_open: bool) -> Actions:
    """Open or close a drawer, or close a door."""
    joint = arm.joint(target)
    if arm.model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_HINGE.value:
        yield from push_door(arm, joint)
        return
    body = int(arm.model.jnt_bodyid[joint])
    pull = -arm.data.xaxis[joint]  # LIBERO's drawers open towards negative positions
    boxes = arm.boxes(only=body)
    front = int((boxes.centre @ pull).argmax())
    handle = boxes.only(np.arange(len(boxes.body)) == front)
    if to_open:
        yield from pull_handle(arm, handle, pull, body)
    else:
        yield from push_handle(arm, handle, pull, joint)


def pull_handle(arm: Arm, handle: Any, pull: np.ndarray, body: int) -> Actions:
    """Open a drawer by its handle, which the level hand holds from above and below."""
    arm.phase = "handle"
    rest = arm.boxes(only=min(arm.family(body)))  # light things in front may be pushed aside
    others = rest.only(np.abs(rest.centre - handle.centre[0]).max(1) > 1e-6)
    middle = handle.centre[0]
    grasp = find_grasp(handle, others, arm.leanings(pull), middle, arm.shoulder(), 0.004, 0.001)
    if grasp is None:
        yield from arm.give_up()
        return
    back = -0.07 * grasp.rotation[:, 2]
    yield from arm.travel(grasp.position + back, grasp.rotation, 0.0)
    arm.phase = "reach handle"
    yield from arm.go(grasp.position + back, grasp.rotation, 0.015, limit=40)
    yield from arm.go(grasp.position, grasp.rotation, 0.008, limit=25)
    yield from arm.squeeze(SHUT, 12)
    arm.phase = "pull"
    start = arm.data.xpos[body].copy()
    end = arm.hand() + 0.19 * pull
    for _ in range(60):
        if (arm.data.xpos[body] - start) @ pull > 0.155:
            break
        yield arm.servo(end, grasp.rotation)
    yield from arm.squeeze(OPEN, 6)
    yield from arm.go(arm.hand() + back, grasp.rotation, 0.02, limit=20)
    yield from arm.go(arm.hand() + [0, 0, 0.15], grasp.rotation, 0.03, limit=20)


def push_handle(arm: Arm, handle: Any, pull: np.ndarray, joint: int) -> Actions:
    """Close a drawer with the shut fingers against its handle, the hand leaning back from the cabinet."""
    arm.phase = "push"
    rotation = arm.lean_back(pull, 0.6, sideways=True)
    face = handle.centre[0] + 0.02 * pull
    yield from arm.travel(face + 0.06 * pull, rotation, 0.0)
    arm.grip = SHUT
    yield from arm.go(face + 0.06 * pull, rotation, 0.015, limit=40)
    start, limit = arm.hand(), float(arm.model.jnt_range[joint, 1])
    for _ in range(70):
        if arm.joint_position(joint) > limit - 0.004:
            break
        yield arm.servo(start - 0.3 * pull, rotation)
    yield from arm.go(arm.hand() + 0.06 * pull, rotation, 0.02, limit=15)
    yield from arm.go(arm.hand() + [0, 0, 0.1], rotation, 0.03, limit=20)


def widen(arm: Arm, target: str) -> Actions:
    """Open an open drawer all the way, with the shut fingers behind its front."""
    arm.phase = "widen"
    joint = arm.joint(target)
    body, pull = int(arm.model.jnt_bodyid[joint]), -arm.data.xaxis[joint]
    boxes = arm.boxes(only=body)
    ends = boxes.centre @ pull + boxes.extent() @ np.abs(pull)
    wide = boxes.extent() @ np.abs(np.cross(pull, [0.0, 0.0, 1.0])) > 0.06
    n = int(np.where(wide, ends, -np.inf).argmax())
    behind = boxes.centre[n] - (float(boxes.extent()[n] @ np.abs(pull)) + 0.02) * pull
    behind[2] = boxes.centre[n, 2] + boxes.extent()[n, 2] - 0.012
    rotation = arm.lean_back(pull, 0.0, sideways=True)
    yield from arm.travel(behind, rotation, 0.06)
    arm.grip = SHUT
    yield from arm.go(behind + [0, 0, 0.06], rotation, 0.012, limit=25)
    yield from arm.go(behind, rotation, 0.010, limit=25)
    end = arm.hand() + 0.06 * pull
    for _ in range(30):
        if arm.joint_position(joint) < arm.model.jnt_range[joint, 0] + 0.004:
            break
        yield arm.servo(end, rotation)
    yield from arm.go(arm.hand() - 0.01 * pull + [0, 0, 0.08], rotation, 0.03, limit=20)


def push_door(arm: Arm, joint: int) -> Actions:
    """Close a hinged door with the shut fingers, pushing its outer face around the hinge."""
    arm.phase = "push door"
    body = int(arm.model.jnt_bodyid[joint])
    axis = arm.data.xaxis[joint].copy()
    boxes = arm.boxes(only=body)
    panel = boxes.only(np.arange(len(boxes.body)) == int(boxes.half.prod(1).argmax()))
    anchor = arm.data.xanchor[joint].copy()

    def target(lead: float) -> np.ndarray:
        """A point `lead` metres beyond the outer face, three fifths along the panel, under its upper edge."""
        now = arm.boxes(only=body).only(np.arange(len(boxes.body)) == int(boxes.half.prod(1).argmax()))
        out = now.centre[0] - anchor
        out[2] = 0.0
        normal = -np.cross(axis, out) / np.linalg.norm(out)  # away from where it closes
        point = anchor + 1.3 * out + lead * normal
        point[2] = panel.high()[2] - 0.02
        return point

    yield from arm.travel(target(0.09), arm.rest, 0.0)
    arm.grip = SHUT
    yield from arm.go(target(0.09), arm.rest, 0.02, limit=40)
    for _ in range(160):
        if arm.joint_position(joint) > -0.003:
            break
        yield arm.servo(target(-0.06), arm.rest)
    yield from arm.go(arm.hand() + [0, 0, 0.1], arm.rest, 0.03, limit=20)


def turn_knob(arm: Arm, name: str, on: bool) -> Actions:
    """Switch a stove: hold the far end of the knob's bar and carry it around the axis."""
    arm.phase = "knob"
    joint = arm.joint(name)
    body = int(arm.model.jnt_bodyid[joint])
    anchor = arm.data.xanchor[joint].copy()
    boxes = arm.boxes(only=body)
    tops = boxes.centre[:, 2] + boxes.extent()[:, 2]
    bar = boxes.only(tops > tops.max() - 0.02)
    far = bar.centre[int(np.linalg.norm((bar.centre - anchor)[:, :2], axis=1).argmax())]
    grasp = find_grasp(bar, arm.boxes(exclude=(body,)), arm.upright_rotations(anchor), far, arm.shoulder(), 0.004)
    if grasp is None:
        yield from arm.give_up()
        return
    yield from arm.travel(grasp.position, grasp.rotation, 0.05)
    yield from arm.go(grasp.position, grasp.rotation, 0.007, limit=40)
    yield from arm.squeeze(SHUT, 12)
    arm.phase = "turn"
    begin, reach = arm.joint_position(joint), arm.hand() - anchor
    for _ in range(100):
        if arm.holds(["turnon" if on else "turnoff", name]):
            break
        ahead = yaw_matrix(arm.joint_position(joint) - begin + (0.5 if on else -0.5))
        yield arm.servo(anchor + ahead @ reach, ahead @ grasp.rotation)
    yield from arm.squeeze(OPEN, 6)
    yield from arm.go(arm.hand() + [0, 0, 0.08], arm.hand_rotation(), 0.03, limit=20)


def is_shut(arm: Arm, target: str) -> bool:
    """Whether `target` is inside a drawer that is not open."""
    site = arm.inner.object_sites_dict.get(target)
    return site is not None and bool(site.joints) and not arm.inner.object_states_dict[target].is_open()


def is_ajar(arm: Arm, target: str) -> bool:
    """Whether `target` is inside a drawer that is open, but not all the way."""
    site = arm.inner.object_sites_dict.get(target)
    if site is None or not site.joints or is_shut(arm, target):
        return False
    joint = arm.joint(target)
    return arm.joint_position(joint) > float(arm.model.jnt_range[joint, 0]) + 0.012
