"""Meta-World (MuJoCo, Sawyer arm) as a `Suite`: https://github.com/Farama-Foundation/Metaworld

Action (D=4): hand displacement dx, dy, dz in [-1, 1] (1 moves the target of the hand by 1 cm per simulator step) and
gripper effort in [-1, 1] (+1 closes). An action is held for six simulator steps, which makes 13 decisions a second, as
robot data has (BridgeData 5 Hz, DROID 15, LIBERO 20). Bare Meta-World's 80 cost six times as much to run, and RL's
credit for one success is then spread over six times as many draws.
State (S=4): hand x, y, z in metres and finger opening in [0, 1].

Camera `corner2`, moved to (0.75, 0.075, 0.7) as published Meta-World policies do (LeRobot, QueST), turned upright.
Shadows and reflections are off: on a software renderer they cost four times the rest of the frame.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from vla.eval.metaworld_tasks import INSTRUCTIONS
from vla.types import ActionChunk, Observation, Policy, Task, VlaError, problem

CAMERA = "corner2"
CAMERA_POSITION_M = (0.75, 0.075, 0.7)
MAX_STEPS = 40  # the experts need 7 to 30
# Of the benchmark's splits. Held for six simulator steps, its expert never pulls the lever; for three, it does.
ACTION_REPEAT_ML = 3
MAX_STEPS_ML = 500 // ACTION_REPEAT_ML  # Meta-World's own limit is 500 simulator steps


def use_offscreen_gl() -> None:
    """Choose MuJoCo's off-screen backend before it is imported; EGL unless the user chose another."""
    os.environ.setdefault("MUJOCO_GL", "egl")


def _metaworld() -> Any:
    use_offscreen_gl()
    try:
        import metaworld
        import metaworld.env_dict
        import metaworld.policies
    except ImportError as error:
        raise VlaError(f"Meta-World cannot be imported ({error}); fix: pip install 'vla-toolkit[metaworld]'") from error
    return metaworld


def _mujoco() -> Any:
    import mujoco  # its types leave out most of what it has

    return mujoco


_RENDERERS: dict[tuple[str, int], Any] = {}


def shared_renderer(task: str, size_px: int, model: Any, max_renderers: int) -> Any:
    """This process's `mujoco.Renderer` for a task; any instance of the task can be drawn with it.

    A renderer holds the task's meshes and textures (some 300 MB on a software renderer), which never change; what does
    change is read from the instance's own model when the scene is updated. The last `max_renderers` are kept.
    """
    if (task, size_px) in _RENDERERS:
        _RENDERERS[task, size_px] = _RENDERERS.pop((task, size_px))  # the latest last
    else:
        mujoco = _mujoco()
        renderer = mujoco.Renderer(model, size_px, size_px)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            renderer.scene.flags[flag] = False
        atexit.register(renderer.close)  # left to the garbage collector, EGL complains on the way out
        _RENDERERS[task, size_px] = renderer
        while len(_RENDERERS) > max_renderers:
            oldest = _RENDERERS.pop(next(iter(_RENDERERS)))
            atexit.unregister(oldest.close)
            oldest.close()
    return _RENDERERS[task, size_px]


class MetaWorldEnv:
    """One Meta-World task. See `vla.types.Env`."""

    def __init__(self, task: Task, image_size_px: int, action_repeat: int, max_renderers: int = 8) -> None:
        metaworld = _metaworld()
        self._mujoco = _mujoco()
        self.task = task
        self.action_repeat = action_repeat
        self.image_size_px = image_size_px
        self.max_renderers = max_renderers
        self.render_frames = True
        classes = metaworld.env_dict.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
        self._env = classes[f"{task.name}-v3-goal-observable"](seed=0)
        # A new object position at each reset, drawn from this env's seed (Meta-World's default: np.random's global state).
        self._env._freeze_rand_vec = False
        self._env.seeded_rand_vec = True
        self._env.max_path_length = task.max_steps * action_repeat + 1  # our own limit truncates first
        self._env.model.camera(CAMERA).pos[:] = CAMERA_POSITION_M
        self._n_steps = 0

    def reset(self, *, seed: int, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        self._env.seed(seed)
        raw, _ = self._env.reset()
        # Places the camera, and makes the solver's warm start the same in a fresh and a used environment.
        self._mujoco.mj_forward(self._env.model, self._env.data)
        self._n_steps = 0
        return self._observation(raw), {"success": False}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        if action.shape != (4,) or not np.isfinite(action).all():
            raise problem(f"action {action!r}", "4 finite numbers", "check the policy's action spec")
        self._n_steps += 1
        success = False
        for _ in range(self.action_repeat):
            raw, _, _, _, info = self._env.step(np.clip(action, -1.0, 1.0))
            if not np.isfinite(raw).all():
                raise FloatingPointError(
                    f"simulator state is not finite after step {self._n_steps} of {self.task.name}"
                )
            success = bool(info["success"] > 0)
            if success:
                break
        truncated = not success and self._n_steps >= self.task.max_steps
        return self._observation(raw), float(success), success, truncated, {"success": success}

    def close(self) -> None:
        """Nothing to give back: renderers are shared and live as long as the process."""

    def frame(self) -> np.ndarray:
        """uint8 (image_size_px, image_size_px, 3), upright."""
        mujoco, model, data = self._mujoco, self._env.model, self._env.data
        renderer = shared_renderer(self.task.name, self.image_size_px, model, self.max_renderers)
        camera = mujoco.MjvCamera()
        camera.fixedcamid, camera.type = model.camera(CAMERA).id, mujoco.mjtCamera.mjCAMERA_FIXED
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(model, data, mujoco.MjvOption(), None, camera, everything, renderer.scene)
        return np.ascontiguousarray(renderer.render()[::-1, ::-1])

    def _observation(self, raw: np.ndarray) -> Observation:
        images = {CAMERA: self.frame()} if self.render_frames else {}
        return Observation(images, raw[:4].astype(np.float32), self.task.instruction, privileged=raw.copy())


class MetaWorldExpert:
    """Meta-World's own scripted policy for one task, as a `Policy` with a horizon of one."""

    def __init__(self, task: str) -> None:
        self._policy = _metaworld().policies.ENV_POLICY_MAP[f"{task}-v3"]()
        self.metadata = {"name": f"expert/{task}", "horizon": 1, "action_dim": 4, "reads_images": False}

    def act(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        chunks = []
        for observation in observations:
            if observation.privileged is None:
                raise problem("no privileged state", "the simulator's state vector", "run the expert in its own suite")
            action = self._policy.get_action(observation.privileged)
            chunks.append(ActionChunk(np.clip(action, -1.0, 1.0).astype(np.float32)[None]))
        return chunks

    def reset(self) -> None:
        pass


@dataclass(frozen=True)
class MetaWorldSuite:
    """See `vla.types.Suite`."""

    task_names: tuple[str, ...] = ("faucet-open", "faucet-close", "button-press", "plate-slide")
    name: str = "metaworld"
    image_size_px: int = 160
    max_steps: int = MAX_STEPS
    cameras: tuple[str, ...] = (CAMERA,)
    frames_upside_down: bool = False
    default_slots: int = 16
    action_repeat: int = 6
    """Simulator steps per action. One simulator step moves the hand by at most a centimetre in 12.5 ms."""
    max_renderers: int = 8
    """Tasks whose meshes a process keeps ready to draw, some 300 MB each on a software renderer."""
    action_names: tuple[str, ...] = ("dx", "dy", "dz", "gripper")
    state_names: tuple[str, ...] = ("hand_x_m", "hand_y_m", "hand_z_m", "gripper_opening")

    @property
    def control_hz(self) -> float:
        return 80.0 / self.action_repeat  # a simulator step is 5 physics frames of 2.5 ms

    def __post_init__(self) -> None:
        for name in self.task_names:
            if name not in INSTRUCTIONS:
                raise problem(f"Meta-World task {name!r}", f"one of {', '.join(INSTRUCTIONS)}", "correct the name")

    @property
    def tasks(self) -> tuple[Task, ...]:
        return tuple(Task(name, INSTRUCTIONS[name], self.max_steps) for name in self.task_names)

    def make(self, task: str) -> MetaWorldEnv:
        found = [t for t in self.tasks if t.name == task]
        if not found:
            raise problem(f"task {task!r}", f"one of {', '.join(self.task_names)}", "choose a task of this suite")
        return MetaWorldEnv(found[0], self.image_size_px, self.action_repeat, self.max_renderers)

    def expert(self, task: str) -> Policy:
        return MetaWorldExpert(task)

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("metaworld", "mujoco", "gymnasium")}
