"""A scripted expert for LIBERO tasks: plans from the goal and the simulator's full state, acts through the 7-d action.

    expert = LiberoExpert(env)      # env: LIBERO's ControlEnv or OffScreenRenderEnv
    env.reset(); ...; expert.reset()
    env.step(expert.action())

One goal after another: unmet goals are worked on in the order open, place, switch, close, and again until all hold.
Left out: collision-free motion planning (the hand travels above everything on its way) and re-grasping in the air.
Python 3.8, numpy and mujoco only, no package imports: it is loaded by path inside the simulator's interpreter.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mujoco as _mujoco
import numpy as np

mujoco: Any = _mujoco  # its types leave out most of what it has

_spec = importlib.util.spec_from_file_location("libero_grasp", str(Path(__file__).with_name("libero_grasp.py")))
assert _spec is not None and _spec.loader is not None
geometry = importlib.util.module_from_spec(_spec)
sys.modules.setdefault("libero_grasp", geometry)  # NamedTuples look their module up
_spec.loader.exec_module(geometry)

OPEN, SHUT = -1.0, 1.0
# robosuite's OSC_POSE: stiffness 150 / s^2, critically damped, and what an action of 1 asks for (m, rad)
_STIFFNESS, _DAMPING, _STEP = 150.0, 24.49, np.array([0.05, 0.05, 0.05, 0.5, 0.5, 0.5])
_MODE_LIMIT = 0.7
_TIGHT = 0.8  # cost of a grasp beyond which others are looked for
_GAIN = 1.3  # of the expert's own loop around it
_ORDER = {"open": 0, "in": 1, "on": 1, "turnon": 2, "turnoff": 2, "close": 3}

if TYPE_CHECKING:  # Python 3.8 cannot subscript them
    Actions = Iterator[np.ndarray]
    Point = np.ndarray | Callable[[], np.ndarray]


class LiberoExpert:
    """Recommends the next action. Deterministic: the same simulator state at reset gives the same actions."""

    def __init__(self, env: Any) -> None:
        self._env = env
        self.reset()

    def reset(self) -> None:
        """Plans anew for the state the simulator is in. Call it after every env.reset() and set_init_state()."""
        self._model, self._data = self._env.sim.model._model, self._env.sim.data._data
        self._site = self._env.robots[0].eef_site_id
        joints = (
            mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_JOINT, f"gripper0_finger_joint{n}") for n in (1, 2)
        )
        self._fingers = [self._model.jnt_qposadr[joint] for joint in joints]
        self._rest = self._upright(self._hand_rotation())
        arm = [mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_JOINT, f"robot0_joint{n}") for n in range(1, 8)]
        self._dofs = self._model.jnt_dofadr[arm]
        self._grip = OPEN
        self._plan = self._solve()
        self.phase = "start"  # for people who debug

    def action(self) -> np.ndarray:
        """(7,) float64 in [-1, 1]: translation / 0.05 m, rotation vector / 0.5 rad (world axes), -1 open / +1 close."""
        return next(self._plan)

    # --- the plan ---------------------------------------------------------------------------------------------------

    def _solve(self) -> Actions:
        goals = sorted(self._env.env.parsed_problem["goal_state"], key=lambda goal: _ORDER[goal[0].lower()])
        attempt = 0
        while True:
            unmet = [goal for goal in goals if not self._holds(goal)]
            if not unmet:
                self.phase = "done"
                yield self._still()
                continue
            # a goal that keeps failing must not keep the others from being tried
            goal = unmet[attempt // 2 % len(unmet)] if attempt > 3 else unmet[0]
            attempt += 1
            kind = goal[0].lower()
            if kind in ("in", "on"):
                yield from self._place(goal[1], goal[2], goals, attempt)
            elif kind in ("open", "close"):
                yield from self._move_door(goal[1], kind == "open")
            else:
                yield from self._turn_knob(goal[1], kind == "turnon")

    def _holds(self, goal: list[str]) -> bool:
        return bool(self._env.env._eval_predicate(goal))

    # --- skills -----------------------------------------------------------------------------------------------------

    def _place(self, name: str, target: str, goals: list[list[str]], attempt: int) -> Actions:
        body = self._env.env.obj_body_id[name]
        if self._shut(target):
            yield from self._move_door(target, True)
        grasp = self._plan_grasp(name)
        if grasp is None:
            self.phase = "no grasp"
            yield from self._give_up()
            return
        offset = grasp.position - self._position(name)
        yield from self._travel(grasp.position, grasp.rotation, 0.05)
        self.phase = "reach " + name

        def funnel() -> np.ndarray:
            """The grasp, or above it as long as the hand is beside it: a finger must not land on the rim."""
            goal = self._position(name) + offset
            aside = float(np.linalg.norm((goal - self._hand())[:2]))
            return goal + [0, 0, min(0.05, max(0.0, 6 * (aside - 0.008)))]

        yield from self._go(funnel, grasp.rotation, 0.007, limit=40)
        yield from self._squeeze(SHUT, 14)
        self.phase = "lift " + name
        relative = self._hand() - self._position(name)
        yield from self._go(self._hand() + [0, 0, 0.04], grasp.rotation, 0.015, limit=15)
        # only now: a bowl tips in the hand until its wall lies flat on the fingers
        spot = self._plan_spot(name, target, goals)
        below = self._hand()[2] - self._boxes(only=body).low()[2]

        def lost() -> bool:
            return bool(np.linalg.norm(self._hand() - self._position(name)) > np.linalg.norm(relative) + 0.03)

        self.phase = "carry " + name
        rotation = geometry.yaw_matrix(spot.yaw) @ grasp.rotation

        def destination() -> np.ndarray:
            return self._hand() + spot.origin - self._position(name)

        yield from self._over(destination, rotation, self._boxes(exclude=(body,)), below + 0.02, 0.02, lost)
        if lost():
            yield from self._squeeze(OPEN, 8)
            yield from self._go(self._hand() + [0, 0, 0.08], self._hand_rotation(), 0.03, limit=15)
            return
        self.phase = "lower " + name
        yield from self._go(destination, rotation, 0.008, limit=30)
        yield from self._squeeze(OPEN, 6)
        self.phase = "leave " + name
        yield from self._go(self._hand() + [0, 0, 0.10], rotation, 0.03, limit=20)

    def _move_door(self, target: str, to_open: bool) -> Actions:
        """Open or close a drawer, or close a door."""
        joint = self._joint(target)
        if self._model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_HINGE.value:
            yield from self._push_door(joint)
            return
        body = int(self._model.jnt_bodyid[joint])
        pull = -self._data.xaxis[joint]  # LIBERO's drawers open towards negative positions
        boxes = self._boxes(only=body)
        front = int((boxes.centre @ pull).argmax())
        handle = boxes.only(np.arange(len(boxes.body)) == front)
        if to_open:
            yield from self._pull(handle, pull, body)
        else:
            yield from self._push(handle, pull, joint)

    def _pull(self, handle: Any, pull: np.ndarray, body: int) -> Actions:
        self.phase = "handle"
        rest = self._boxes(exclude=())
        others = rest.only(np.abs(rest.centre - handle.centre[0]).max(1) > 1e-6)
        middle = handle.centre[0]
        grasp = geometry.find_grasp(handle, others, self._leaning(pull), middle, self._shoulder(), 0.004)
        if grasp is None:
            yield from self._give_up()
            return
        back = -0.07 * grasp.rotation[:, 2]
        yield from self._travel(grasp.position + back, grasp.rotation, 0.0)
        self.phase = "reach handle"
        yield from self._go(grasp.position + back, grasp.rotation, 0.015, limit=40)
        yield from self._go(grasp.position, grasp.rotation, 0.008, limit=25)
        yield from self._squeeze(SHUT, 12)
        self.phase = "pull"
        start = self._data.xpos[body].copy()
        end = self._hand() + 0.19 * pull
        for _ in range(60):
            if (self._data.xpos[body] - start) @ pull > 0.155:
                break
            yield self._servo(end, grasp.rotation)
        yield from self._squeeze(OPEN, 6)
        yield from self._go(self._hand() + back, grasp.rotation, 0.02, limit=20)
        yield from self._go(self._hand() + [0, 0, 0.08], grasp.rotation, 0.03, limit=20)

    def _push(self, handle: Any, pull: np.ndarray, joint: int) -> Actions:
        """Close a drawer with the shut fingers against its handle, the hand leaning back from the cabinet."""
        self.phase = "push"
        rotation = self._lean_back(pull, 0.6, sideways=True)
        address = self._model.jnt_qposadr[joint]
        face = handle.centre[0] + 0.02 * pull
        yield from self._travel(face + 0.06 * pull, rotation, 0.0)
        self._grip = SHUT
        yield from self._go(face + 0.06 * pull, rotation, 0.015, limit=40)
        start, limit = self._hand(), float(self._model.jnt_range[joint, 1])
        for _ in range(70):
            if self._data.qpos[address] > limit - 0.004:
                break
            yield self._servo(start - 0.3 * pull, rotation)
        yield from self._go(self._hand() + 0.06 * pull, rotation, 0.02, limit=15)
        yield from self._go(self._hand() + [0, 0, 0.1], rotation, 0.03, limit=20)

    def _push_door(self, joint: int) -> Actions:
        """Close a hinged door with the shut fingers, pushing its outer face around the hinge."""
        self.phase = "push door"
        body = int(self._model.jnt_bodyid[joint])
        address, axis = self._model.jnt_qposadr[joint], self._data.xaxis[joint].copy()
        boxes = self._boxes(only=body)
        panel = boxes.only(np.arange(len(boxes.body)) == int(boxes.half.prod(1).argmax()))
        anchor = self._data.xanchor[joint].copy()

        def target(lead: float) -> np.ndarray:
            """A point `lead` metres beyond the outer face, three fifths along the panel, under its upper edge."""
            now = self._boxes(only=body).only(np.arange(len(boxes.body)) == int(boxes.half.prod(1).argmax()))
            out = now.centre[0] - anchor
            out[2] = 0.0
            normal = -np.cross(axis, out) / np.linalg.norm(out)  # away from where it closes
            point = anchor + 1.3 * out + lead * normal
            point[2] = panel.high()[2] - 0.02
            return point

        yield from self._travel(target(0.09), self._rest, 0.0)
        self._grip = SHUT
        yield from self._go(target(0.09), self._rest, 0.02, limit=40)
        for _ in range(160):
            if self._data.qpos[address] > -0.003:
                break
            yield self._servo(target(-0.06), self._rest)
        yield from self._go(self._hand() + [0, 0, 0.1], self._rest, 0.03, limit=20)

    def _turn_knob(self, name: str, on: bool) -> Actions:
        self.phase = "knob"
        joint = self._joint(name)
        body = int(self._model.jnt_bodyid[joint])
        address, anchor = self._model.jnt_qposadr[joint], self._data.xanchor[joint].copy()
        boxes = self._boxes(only=body)
        tops = boxes.centre[:, 2] + boxes.extent()[:, 2]
        bar = boxes.only(tops > tops.max() - 0.02)
        far = bar.centre[int(np.linalg.norm((bar.centre - anchor)[:, :2], axis=1).argmax())]
        grasp = geometry.find_grasp(
            bar, self._boxes(exclude=(body,)), self._upright_rotations(anchor), far, self._shoulder(), 0.004
        )
        if grasp is None:
            yield from self._give_up()
            return
        yield from self._travel(grasp.position, grasp.rotation, 0.05)
        yield from self._go(grasp.position, grasp.rotation, 0.007, limit=40)
        yield from self._squeeze(SHUT, 12)
        self.phase = "turn"
        begin, arm = float(self._data.qpos[address]), self._hand() - anchor
        for _ in range(100):
            if self._holds(["turnon" if on else "turnoff", name]):
                break
            ahead = geometry.yaw_matrix(float(self._data.qpos[address]) - begin + (0.5 if on else -0.5))
            yield self._servo(anchor + ahead @ arm, ahead @ grasp.rotation)
        yield from self._squeeze(OPEN, 6)
        yield from self._go(self._hand() + [0, 0, 0.08], self._hand_rotation(), 0.03, limit=20)

    def _give_up(self) -> Actions:
        """Nothing can be held: go up a little, so that the next attempt sees another scene."""
        yield from self._go(self._hand() + [0, 0, 0.05], self._rest, 0.02, limit=20)
        yield self._still()

    def _joint(self, target: str) -> int:
        inner = self._env.env
        owner = inner.object_sites_dict[target] if target in inner.object_sites_dict else inner.get_object(target)
        return mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_JOINT, owner.joints[-1])

    def _shut(self, target: str) -> bool:
        """Whether `target` is inside a drawer that is not open."""
        site = self._env.env.object_sites_dict.get(target)
        return site is not None and bool(site.joints) and not self._env.env.object_states_dict[target].is_open()

    def _lean_back(self, pull: np.ndarray, angle: float, sideways: bool = False) -> np.ndarray:
        """The hand in front of a drawer that opens along `pull`, leaning back by `angle` (0: upright, pi / 2: level)."""
        across = np.cross(pull, [0.0, 0.0, 1.0])
        approach = -np.sin(angle) * pull - np.cos(angle) * np.array([0.0, 0.0, 1.0])
        first = across if sideways else np.cross(across, approach)
        options = [np.stack([sign * first, np.cross(approach, sign * first), approach], 1) for sign in (1.0, -1.0)]
        return max(options, key=lambda option: float(np.trace(option.T @ self._rest)))

    def _leaning(self, pull: np.ndarray) -> list[tuple[np.ndarray, float]]:
        return [(self._lean_back(pull, angle), 0.2 * angle) for angle in np.arange(0.2, 1.6, 0.15)]

    # --- planning ---------------------------------------------------------------------------------------------------

    def _plan_grasp(self, name: str) -> Any:
        body = self._env.env.obj_body_id[name]
        boxes = self._boxes(only=body)
        middle = (boxes.low() + boxes.high()) / 2
        others, rotations = self._boxes(exclude=(body,)), self._upright_rotations(middle)
        best = geometry.find_grasp(boxes, others, rotations, middle, self._shoulder(), 0.006)
        if best is None or best.cost > _TIGHT:  # leaning the hand away from a wall may give room
            leaning = [
                (turn @ geometry.lean(0, angle), cost + abs(angle))
                for turn, cost in rotations
                for angle in (-0.4, -0.2, 0.0, 0.2, 0.4)
            ]
            other = geometry.find_grasp(boxes, others, leaning, middle, self._shoulder(), 0.004)
            best = min(
                (grasp for grasp in (best, other) if grasp is not None), key=lambda grasp: grasp.cost, default=None
            )
        return best

    def _upright_rotations(self, at: np.ndarray) -> list[tuple[np.ndarray, float]]:
        """Turns about the vertical, half a turn in all; cheap where the last joint stays away from its limits."""
        joint = self._data.qpos[self._model.jnt_qposadr[mujoco.mj_name2id(self._model, 3, "robot0_joint7")]]
        base = self._data.xpos[mujoco.mj_name2id(self._model, 1, "robot0_base")]
        here = self._hand() - base
        swing = np.arctan2(at[1] - base[1], at[0] - base[0]) - np.arctan2(here[1], here[0])
        choices = []
        for step in range(-8, 9):
            angle = np.deg2rad(step * 11.25)
            limit = abs(joint + swing - angle)
            choices.append((geometry.yaw_matrix(angle) @ self._rest, 0.25 * abs(angle) + 4 * max(0.0, limit - 2.3)))
        return choices

    def _plan_spot(self, name: str, target: str, goals: list[list[str]]) -> Any:
        inner = self._env.env
        body = inner.obj_body_id[name]
        held, yaws = self._boxes(only=body), (0.0,)
        if target in inner.obj_body_id:
            choices = self._position(target)[None, :2]
        else:
            site = mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_SITE, target)
            centre, matrix = self._data.site_xpos[site][:2], self._data.site_xmat[site].reshape(3, 3)
            half = np.maximum(np.abs(matrix @ inner.object_sites_dict[target].size)[:2] - 0.02, 0.0)
            same = [goal[1] for goal in goals if goal[2:] == [target]]
            if goals[0][0].lower() == "on" and len(same) > 1:  # side by side
                size = (held.high() - held.low())[:2]
                side = np.eye(2)[int(size.argmin())] * (size.min() + 0.006)
                centre = centre + side * (same.index(name) - (len(same) - 1) / 2)
                half = half * 0.2
            choices = geometry.spiral(centre, np.eye(2), half)
            yaws = tuple(np.deg2rad(np.arange(-90, 91, 15)))
        others = self._boxes(exclude=(body,))
        return geometry.find_spot(
            held, self._position(name), self._hand(), self._hand_rotation(), others, choices, yaws, 0.012
        )

    # --- motion -----------------------------------------------------------------------------------------------------

    def _travel(self, goal: np.ndarray, rotation: np.ndarray, hover: float) -> Actions:
        """To `hover` above `goal`, over everything on the way, with an open hand."""
        self.phase = "travel"
        self._grip = OPEN
        yield from self._over(
            lambda: goal + [0, 0, hover], rotation, self._boxes(), geometry.below(rotation) + 0.015, 0.025
        )

    def _over(
        self,
        to: Callable[[], np.ndarray],
        rotation: np.ndarray,
        obstacles: Any,
        below: float,
        near: float,
        stop: Callable[[], bool] = lambda: False,
    ) -> Actions:
        """Above `to`, passing over all obstacles with what hangs `below` the hand; ends `near` the goal sideways."""
        patience = 25  # steps to wait for the climb
        for _ in range(100):
            here, goal = self._hand(), to()
            way = goal[:2] - here[:2]
            distance = float(np.linalg.norm(way))
            if stop() or (distance < near and np.linalg.norm(self._turn_to(rotation)) < 0.2):
                return
            ceiling = self._ceiling(here)
            ahead = np.append(here[:2] + way * min(1.0, 0.05 / max(distance, 1e-6)), 0.0)
            if patience and here[2] < min(geometry.corridor_top(obstacles, here, ahead, 0.09) + below, ceiling) - 0.01:
                patience -= 1
                goal[:2] = here[:2]
            goal[2] = max(goal[2], min(geometry.corridor_top(obstacles, here, to(), 0.09) + below, ceiling))
            yield self._servo(goal, rotation)

    def _ceiling(self, at: np.ndarray) -> float:
        """The greatest height at which the arm, hand down, still reaches this far."""
        out = float(np.linalg.norm((at - self._shoulder())[:2])) - 0.088
        return float(self._shoulder()[2] - 0.204 + np.sqrt(max(0.0, 0.715**2 - out**2)))

    def _shoulder(self) -> np.ndarray:
        base = mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_BODY, "robot0_base")
        return self._data.xpos[base] + [0, 0, geometry.SHOULDER_HEIGHT]

    def _squeeze(self, grip: float, limit: int) -> Actions:
        """Open or close on the spot until the fingers stop, for at most `limit` steps."""
        self._grip = grip
        position, rotation = self._hand(), self._hand_rotation()
        before = np.full(2, np.inf)
        for step in range(limit):
            fingers = self._data.qpos[self._fingers]
            if step >= 8 and np.abs(fingers - before).max() < 2e-4:
                return
            before = fingers
            yield self._servo(position, rotation)

    def _go(
        self, to: Point, rotation: np.ndarray, near: float, limit: int, turn: float = 0.1, speed: float = 1.0
    ) -> Actions:
        """Servo until within `near` metres and `turn` radians of the pose, for at most `limit` steps."""
        for _ in range(limit):
            goal = to() if callable(to) else to
            action = self._servo(goal, rotation, speed)
            if np.linalg.norm(goal - self._hand()) < near and np.linalg.norm(self._turn_to(rotation)) < turn:
                return
            yield action

    def _servo(self, goal: np.ndarray, rotation: np.ndarray, speed: float = 1.0) -> np.ndarray:
        """One action towards a pose; `speed` scales the step it may take.

        The controller computes its force and its torque as if the other did not act (robosuite's uncoupled OSC): with the
        arm stretched out they fight, and the hand creeps or swings. `mixing` is what they do to the hand together, so
        its inverse gives the commands that make the hand accelerate as wanted.
        """
        error = np.concatenate([goal - self._hand(), self._turn_to(rotation)])
        error[:3] *= min(1.0, 0.05 * speed / max(float(np.abs(error[:3]).max()), 1e-9))
        error[3:] *= min(1.0, 0.25 / max(float(np.abs(error[3:]).max()), 1e-9))
        jacobian, mixing = self._mixing()
        drag = _DAMPING / _STIFFNESS * jacobian @ self._data.qvel[self._dofs]
        out, gains, into = np.linalg.svd(mixing / _STEP[:, None] * _STEP)
        modes = into.T * (out.T @ ((_GAIN * error - drag) / _STEP)) / np.maximum(gains, 0.01)
        modes /= np.maximum(1.0, np.abs(modes).max(0) / _MODE_LIMIT)
        action = np.empty(7)
        action[:6] = np.clip(modes.sum(1) + drag / _STEP, -1.0, 1.0)
        action[6] = self._grip
        return action

    def _mixing(self) -> tuple[np.ndarray, np.ndarray]:
        """(6, 7) Jacobian of the hand, and (6, 6): acceleration of the hand per commanded force and torque."""
        jacobian, mass = np.zeros((6, self._model.nv)), np.zeros((self._model.nv, self._model.nv))
        mujoco.mj_jacSite(self._model, self._data, jacobian[:3], jacobian[3:], self._site)
        mujoco.mj_fullM(self._model, mass, self._data.qM)
        arm = jacobian[:, self._dofs]
        mobility = arm @ np.linalg.solve(mass[np.ix_(self._dofs, self._dofs)], arm.T)
        inertia = np.zeros((6, 6))
        inertia[:3, :3], inertia[3:, 3:] = np.linalg.inv(mobility[:3, :3]), np.linalg.inv(mobility[3:, 3:])
        return arm, mobility @ inertia

    def _still(self) -> np.ndarray:
        action = np.zeros(7)
        action[6] = self._grip
        return action

    # --- the simulator's state --------------------------------------------------------------------------------------

    def _hand(self) -> np.ndarray:
        return self._data.site_xpos[self._site].copy()

    def _hand_rotation(self) -> np.ndarray:
        return self._data.site_xmat[self._site].reshape(3, 3).copy()

    def _turn_to(self, rotation: np.ndarray) -> np.ndarray:
        """(3,) rotation vector from the hand's orientation to `rotation`, in world axes."""
        quaternion, vector = np.zeros(4), np.zeros(3)
        mujoco.mju_mat2Quat(quaternion, (rotation @ self._hand_rotation().T).flatten())
        mujoco.mju_quat2Vel(vector, quaternion, 1.0)
        return vector

    @staticmethod
    def _upright(rotation: np.ndarray) -> np.ndarray:
        """The nearest rotation that points straight down."""
        down = np.array([0.0, 0.0, -1.0])
        closing = rotation[:, 0] - down * (rotation[:, 0] @ down)
        closing /= np.linalg.norm(closing)
        return np.stack([closing, np.cross(down, closing), down], 1)

    def _position(self, name: str) -> np.ndarray:
        return self._data.xpos[self._env.env.obj_body_id[name]].copy()

    def _boxes(self, only: int | None = None, exclude: tuple[int, ...] = ()) -> Any:
        """The boxes below body `only`, or all but the robot's and those below `exclude`."""
        boxes = geometry.collision_boxes(self._model, self._data)
        keep = np.zeros(len(boxes.body), dtype=bool)
        for n, body in enumerate(boxes.body):
            family = self._family(int(body))
            if only is not None:
                keep[n] = only in family
            else:
                keep[n] = not self._robot & family and not family & set(exclude)
        return boxes.only(keep)

    def _family(self, body: int) -> set:
        family = set()
        while body > 0:
            family.add(body)
            body = int(self._model.body_parentid[body])
        return family

    @property
    def _robot(self) -> set:
        names = (mujoco.mj_id2name(self._model, 1, body) or "" for body in range(self._model.nbody))
        return {body for body, name in enumerate(names) if name.startswith(("robot0", "gripper0", "mount0"))}
