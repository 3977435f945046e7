"""The Panda of a LIBERO scene as its expert sees it: its hand, the boxes around it, and motions made of actions.

Left out: collision-free motion planning; the hand travels above everything on its way.
Python 3.8, numpy and mujoco only: it runs inside the simulator's interpreter, loaded by `libero_expert.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import mujoco as _mujoco
import numpy as np
from libero_grasp import SHOULDER_HEIGHT, below, collision_boxes, yaw_matrix
from libero_spot import corridor_top

mujoco: Any = _mujoco  # its types leave out most of what it has

OPEN, SHUT = -1.0, 1.0
# robosuite's OSC_POSE: stiffness 150 / s^2, critically damped, and what an action of 1 asks for (m, rad)
_STIFFNESS, _DAMPING, _STEP = 150.0, 24.49, np.array([0.05, 0.05, 0.05, 0.5, 0.5, 0.5])
_MODE_LIMIT = 0.7
_GAIN = 1.3  # of the expert's own loop around it

if TYPE_CHECKING:  # Python 3.8 cannot subscript them
    Actions = Iterator[np.ndarray]
    Point = np.ndarray | Callable[[], np.ndarray]


class Arm:
    """One robot in one simulated scene; anew for every reset. Generators yield the actions of a motion."""

    def __init__(self, env: Any) -> None:
        self.env, self.inner = env, env.env
        self.model, self.data = env.sim.model._model, env.sim.data._data
        self.site = env.robots[0].eef_site_id
        joints = (mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_JOINT, f"gripper0_finger_joint{n}") for n in (1, 2))
        self.fingers = [self.model.jnt_qposadr[joint] for joint in joints]
        self.rest = _upright(self.hand_rotation())
        chain = [mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_JOINT, f"robot0_joint{n}") for n in range(1, 8)]
        self.dofs = self.model.jnt_dofadr[chain]
        self.grip = OPEN
        self.phase = "start"  # for people who debug

    # --- the simulator's state --------------------------------------------------------------------------------------

    def turn_to(self, rotation: np.ndarray) -> np.ndarray:
        """(3,) rotation vector from the hand's orientation to `rotation`, in world axes."""
        quaternion, vector = np.zeros(4), np.zeros(3)
        mujoco.mju_mat2Quat(quaternion, (rotation @ self.hand_rotation().T).flatten())
        mujoco.mju_quat2Vel(vector, quaternion, 1.0)
        return vector

    def hand_rotation(self) -> np.ndarray:
        """(3, 3), columns: closing direction, sideways, approach."""
        return self.data.site_xmat[self.site].reshape(3, 3).copy()

    def hand(self) -> np.ndarray:
        """(3,) of the grip site."""
        return self.data.site_xpos[self.site].copy()

    def position(self, name: str) -> np.ndarray:
        """(3,) of an object's origin."""
        return self.data.xpos[self.inner.obj_body_id[name]].copy()

    def boxes(self, only: int | None = None, exclude: tuple[int, ...] = ()) -> Any:
        """The boxes below body `only`, or all but the robot's and those below `exclude`."""
        boxes, robot = collision_boxes(self.model, self.data), self._robot()
        keep = np.zeros(len(boxes.body), dtype=bool)
        for n, body in enumerate(boxes.body):
            family = self.family(int(body))
            if only is not None:
                keep[n] = only in family
            else:
                keep[n] = not robot & family and not family & set(exclude)
        return boxes.only(keep)

    def family(self, body: int) -> set:
        """The body and all those it hangs on."""
        family = set()
        while body > 0:
            family.add(body)
            body = int(self.model.body_parentid[body])
        return family

    def _robot(self) -> set:
        names = (mujoco.mj_id2name(self.model, 1, body) or "" for body in range(self.model.nbody))
        return {body for body, name in enumerate(names) if name.startswith(("robot0", "gripper0", "mount0"))}

    def joint(self, target: str) -> int:
        """The joint of a fixture, or of the drawer that a place is in."""
        inner = self.inner
        owner = inner.object_sites_dict[target] if target in inner.object_sites_dict else inner.get_object(target)
        return mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_JOINT, owner.joints[-1])

    def joint_position(self, joint: int) -> float:
        return float(self.data.qpos[self.model.jnt_qposadr[joint]])

    def holds(self, goal: list[str]) -> bool:
        """Whether LIBERO counts this goal, such as ["on", "bowl_1", "plate_1"], as reached."""
        return bool(self.inner._eval_predicate(goal))

    def shoulder(self) -> np.ndarray:
        """(3,) where the upper arm turns."""
        base = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_BODY, "robot0_base")
        return self.data.xpos[base] + [0, 0, SHOULDER_HEIGHT]

    # --- orientations of the hand -------------------------------------------------------------------------------------

    def upright_rotations(self, at: np.ndarray) -> list[tuple[np.ndarray, float]]:
        """Turns about the vertical, half a turn in all; cheap where the last joint stays away from its limits."""
        joint = self.data.qpos[self.model.jnt_qposadr[mujoco.mj_name2id(self.model, 3, "robot0_joint7")]]
        base = self.data.xpos[mujoco.mj_name2id(self.model, 1, "robot0_base")]
        here = self.hand() - base
        swing = np.arctan2(at[1] - base[1], at[0] - base[0]) - np.arctan2(here[1], here[0])
        choices = []
        for step in range(-8, 9):
            angle = np.deg2rad(step * 11.25)
            limit = abs(joint + swing - angle)
            choices.append((yaw_matrix(angle) @ self.rest, 0.25 * abs(angle) + 4 * max(0.0, limit - 2.3)))
        return choices

    def lean_back(self, pull: np.ndarray, angle: float, sideways: bool = False) -> np.ndarray:
        """The hand in front of a drawer that opens along `pull`, leaning back by `angle` (0: upright, pi / 2: level)."""
        across = np.cross(pull, [0.0, 0.0, 1.0])
        approach = -np.sin(angle) * pull - np.cos(angle) * np.array([0.0, 0.0, 1.0])
        first = across if sideways else np.cross(across, approach)
        options = [np.stack([sign * first, np.cross(approach, sign * first), approach], 1) for sign in (1.0, -1.0)]
        # the nearest to the hand at rest; of two equally near ones that which turns the last joint towards its middle
        return max(options, key=lambda option: float(np.trace(option.T @ self.rest) + (option @ self.rest.T)[1, 0]))

    def leanings(self, pull: np.ndarray) -> list[tuple[np.ndarray, float]]:
        """Ways to hold a handle from the front, with their costs."""
        return [(self.lean_back(pull, angle), 0.2 * angle) for angle in np.arange(0.2, 1.6, 0.15)]

    # --- motion -----------------------------------------------------------------------------------------------------

    def still(self) -> np.ndarray:
        """The action that asks for no motion."""
        action = np.zeros(7)
        action[6] = self.grip
        return action

    def servo(self, goal: np.ndarray, rotation: np.ndarray, speed: float = 1.0) -> np.ndarray:
        """One action towards a pose; `speed` scales the step it may take.

        The controller computes its force and its torque as if the other did not act (robosuite's uncoupled OSC): with the
        arm stretched out they fight, and the hand creeps or swings. `mixing` is what they do to the hand together, so
        its inverse gives the commands that make the hand accelerate as wanted.
        """
        error = np.concatenate([goal - self.hand(), self.turn_to(rotation)])
        error[:3] *= min(1.0, 0.05 * speed / max(float(np.abs(error[:3]).max()), 1e-9))
        error[3:] *= min(1.0, 0.25 / max(float(np.abs(error[3:]).max()), 1e-9))
        jacobian, mixing = self._mixing()
        drag = _DAMPING / _STIFFNESS * jacobian @ self.data.qvel[self.dofs]
        out, gains, into = np.linalg.svd(mixing / _STEP[:, None] * _STEP)
        modes = into.T * (out.T @ ((_GAIN * error - drag) / _STEP)) / np.maximum(gains, 0.01)
        modes /= np.maximum(1.0, np.abs(modes).max(0) / _MODE_LIMIT)
        action = np.empty(7)
        action[:6] = np.clip(modes.sum(1) + drag / _STEP, -1.0, 1.0)
        action[6] = self.grip
        return action

    def _mixing(self) -> tuple[np.ndarray, np.ndarray]:
        """(6, 7) Jacobian of the hand, and (6, 6): acceleration of the hand per commanded force and torque."""
        jacobian, mass = np.zeros((6, self.model.nv)), np.zeros((self.model.nv, self.model.nv))
        mujoco.mj_jacSite(self.model, self.data, jacobian[:3], jacobian[3:], self.site)
        mujoco.mj_fullM(self.model, mass, self.data.qM)
        arm = jacobian[:, self.dofs]
        mobility = arm @ np.linalg.solve(mass[np.ix_(self.dofs, self.dofs)], arm.T)
        inertia = np.zeros((6, 6))
        inertia[:3, :3], inertia[3:, 3:] = np.linalg.inv(mobility[:3, :3]), np.linalg.inv(mobility[3:, 3:])
        return arm, mobility @ inertia

    def go(
        self, to: Point, rotation: np.ndarray, near: float, limit: int, turn: float = 0.1, speed: float = 1.0
    ) -> Actions:
        """Servo until within `near` metres and `turn` radians of the pose, for at most `limit` steps."""
        for _ in range(limit):
            goal = to() if callable(to) else to
            action = self.servo(goal, rotation, speed)
            if np.linalg.norm(goal - self.hand()) < near and np.linalg.norm(self.turn_to(rotation)) < turn:
                return
            yield action

    def squeeze(
        self, grip: float, limit: int, position: np.ndarray | None = None, rotation: np.ndarray | None = None
    ) -> Actions:
        """Open or close, on the spot or at a pose, until the fingers stop, for at most `limit` steps."""
        self.grip = grip
        position = self.hand() if position is None else position
        rotation = self.hand_rotation() if rotation is None else rotation
        before = np.full(2, np.inf)
        for step in range(limit):
            fingers = self.data.qpos[self.fingers]
            if step >= 8 and np.abs(fingers - before).max() < 2e-4:
                return
            before = fingers
            yield self.servo(position, rotation)

    def travel(self, goal: np.ndarray, rotation: np.ndarray, hover: float) -> Actions:
        """To `hover` above `goal`, over everything on the way, with an open hand."""
        self.phase = "travel"
        self.grip = OPEN
        depth = max(below(rotation), below(self.hand_rotation())) + 0.015
        yield from self.over(lambda: goal + [0, 0, hover], rotation, self.boxes(), depth, 0.025)

    def over(
        self,
        to: Callable[[], np.ndarray],
        rotation: np.ndarray,
        obstacles: Any,
        hanging: float,
        near: float,
        stop: Callable[[], bool] = lambda: False,
    ) -> Actions:
        """Above `to`, passing over all obstacles with what is `hanging` below the hand; ends `near` the goal sideways."""
        patience = 25  # steps to wait for the climb
        for _ in range(100):
            here, goal = self.hand(), to()
            way = goal[:2] - here[:2]
            distance = float(np.linalg.norm(way))
            if stop() or (distance < near and np.linalg.norm(self.turn_to(rotation)) < 0.2):
                return
            # a turn of half a circle goes by way of the rest, away from the limit of the last joint
            turning = rotation if np.linalg.norm(self.turn_to(rotation)) < 2.5 else self.rest
            ceiling = self._ceiling(here)
            ahead = np.append(here[:2] + way * min(1.0, 0.05 / max(distance, 1e-6)), 0.0)
            if patience and here[2] < min(corridor_top(obstacles, here, ahead, 0.09) + hanging, ceiling) - 0.01:
                patience -= 1
                goal[:2] = here[:2]
            goal[2] = max(goal[2], min(corridor_top(obstacles, here, to(), 0.09) + hanging, ceiling))
            yield self.servo(goal, turning)

    def _ceiling(self, at: np.ndarray) -> float:
        """The greatest height at which the arm, hand down, still reaches this far."""
        out = float(np.linalg.norm((at - self.shoulder())[:2])) - 0.088
        return float(self.shoulder()[2] - 0.204 + np.sqrt(max(0.0, 0.715**2 - out**2)))

    def give_up(self) -> Actions:
        """Nothing can be held: wait, things may still be rolling."""
        self.phase = "no grasp"
        for _ in range(5):
            yield self.still()


def _upright(rotation: np.ndarray) -> np.ndarray:
    """The nearest rotation that points straight down."""
    down = np.array([0.0, 0.0, -1.0])
    closing = rotation[:, 0] - down * (rotation[:, 0] @ down)
    closing /= np.linalg.norm(closing)
    return np.stack([closing, np.cross(down, closing), down], 1)
